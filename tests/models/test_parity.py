"""The reference against transformers' GptOssForCausalLM in float32: every output, over many configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oxfuse.models import load_reference
from oxfuse.models.gpt_oss import GptOssForCausalLM, GptOssModel
from oxfuse.models.losses import load_balancing_loss
from tests.checkpoints import TINY, random_gpt_oss, transformers_model

SLIDING, FULL = "sliding_attention", "full_attention"
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "truncated yarn": {"rope_parameters": {"truncate": True}},
    "truncate missing": {"rope_parameters": {"truncate": None}},
    "yarn mscale": {"rope_parameters": {"mscale": 0.7, "mscale_all_dim": 1.3}},
    "yarn attention factor": {"rope_parameters": {"attention_factor": 1.5, "beta_fast": 20.0, "beta_slow": 2.0}},
    "default rope": {"rope_parameters": {"rope_type": "default"}},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "tied": {"tie_word_embeddings": True},
    "window 1": {"sliding_window": 1, "num_hidden_layers": 4},
    "layer types": {"layer_types": [FULL, FULL, SLIDING, FULL], "num_hidden_layers": 4, "sliding_window": 31},
    "no window": {"layer_types": [FULL] * 3},
    "odd sizes": {
        "hidden_size": 52, "intermediate_size": 37, "head_dim": 10, "num_attention_heads": 6, "num_key_value_heads": 3,
        "vocab_size": 97, "sliding_window": 7,
    },
    "one kv head": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8},
    "eight kv heads": {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 8, "attention_bias": False},
    "top 1 of 2": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "top 4 of 16": {"num_local_experts": 16, "num_experts_per_tok": 4},
    "all experts": {"num_local_experts": 3, "num_experts_per_tok": 3},
    "swiglu": {"swiglu_alpha": 1.1, "swiglu_limit": 1.5},
    "eps": {"rms_norm_eps": 0.1},
}  # fmt: skip


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    """Assert the issue's tolerance: 1e-4 of max(1, largest value)."""
    ours, theirs = ours.detach(), theirs.detach()
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert float((ours - theirs).abs().max()) <= tolerance * max(1.0, float(theirs.abs().max()))


def ids(rows: int, length: int, seed: int = 0, below: int = 97) -> Tensor:
    return torch.randint(0, below, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, nn.Module]:
    folder = random_gpt_oss(tmp_path_factory.mktemp("tiny"))
    return load_reference(folder), transformers_model(folder)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits(name: str, tmp_path: Path) -> None:
    """150 tokens: far beyond every window here, and beyond the original context of 96."""
    overrides = dict(CONFIGS[name])
    if name == "truncate missing":
        overrides["rope_parameters"] = {}
    folder = random_gpt_oss(tmp_path, seed=len(name), **overrides)
    if name == "truncate missing":
        text = (folder / "config.json").read_text()
        assert '"truncate": false,' in text
        (folder / "config.json").write_text(text.replace('"truncate": false,', ""))
    ours, theirs = load_reference(folder), transformers_model(folder)
    tokens = ids(2, 150)
    expected = theirs(tokens).logits
    assert expected.std() > 1
    close(ours(tokens).logits, expected)


@pytest.mark.parametrize("length", [1, 18, 19, 20, 97])
@torch.no_grad()
def test_lengths_around_window_and_context(pair: tuple[nn.Module, nn.Module], length: int) -> None:
    ours, theirs = pair
    tokens = ids(1, length, seed=length)
    close(ours(tokens).logits, theirs(tokens).logits)


@torch.no_grad()
def test_explicit_positions_turn_the_rotation_and_nothing_else(pair: tuple[nn.Module, nn.Module]) -> None:
    """transformers is given its mask too: without one it would read jumps in the positions as packed sequences."""
    ours, theirs = pair
    tokens = ids(2, 60)
    positions = torch.stack([torch.arange(60) * 3 % 71 + 5, torch.arange(60) + 900])
    everything = torch.ones_like(tokens)
    expected = theirs(tokens, attention_mask=everything, position_ids=positions).logits
    close(ours(tokens, position_ids=positions).logits, expected)
    assert (expected - theirs(tokens).logits).abs().max() > 0.1
    shared = ours(tokens, position_ids=positions[:1]).logits
    close(shared, theirs(tokens, attention_mask=everything, position_ids=positions[:1].expand(2, -1)).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding(pair: tuple[nn.Module, nn.Module], side: str) -> None:
    ours, theirs = pair
    tokens, lengths = ids(3, 40), torch.tensor([40, 33, 5])
    column = torch.arange(40)
    mask = (column >= 40 - lengths[:, None] if side == "left" else column < lengths[:, None]).long()
    for kind in (mask, mask.bool(), mask.float()):
        close(ours(tokens, attention_mask=kind).logits[mask.bool()], theirs(tokens, attention_mask=mask).logits[mask.bool()])
    alone = ours(
        tokens[1:2, 7:] if side == "left" else tokens[1:2, :33], position_ids=(7 * (side == "left") + torch.arange(33))[None]
    )
    close(ours(tokens, attention_mask=mask).logits[1][mask[1].bool()], alone.logits[0])


@torch.no_grad()
def test_cache_step_by_step(pair: tuple[nn.Module, nn.Module]) -> None:
    """Chunks of several sizes, over window and original context, a padded row among them."""
    ours, theirs = pair
    tokens, mask = ids(2, 110), torch.ones(2, 110, dtype=torch.long)
    mask[1, :6] = 0
    past, their_past, at = None, None, 0
    whole = ours(tokens, attention_mask=mask).logits
    for size in (1, 18, 1, 1, 30, 7, 50, 1, 1):
        part = {"input_ids": tokens[:, at : at + size], "attention_mask": mask[:, : at + size]}
        out = ours(**part, past_key_values=past)
        their_out = theirs(**part, past_key_values=their_past, use_cache=True)
        past, their_past = out.past_key_values, their_out.past_key_values
        used = mask[:, at : at + size].bool()
        close(out.logits[used], their_out.logits[used])
        close(out.logits[used], whole[:, at : at + size][used])
        at += size
    assert at == 110 == past.get_seq_length()


@torch.no_grad()
def test_greedy_text_is_diverse_and_equal(pair: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = pair
    prompt = ids(1, 9)
    expected = theirs.generate(prompt, max_new_tokens=120, do_sample=False, pad_token_id=0)[0, 9:].tolist()
    tokens, cache, found = prompt, None, []
    for _ in range(120):
        out = ours(tokens, past_key_values=cache, logits_to_keep=1)
        tokens, cache = out.logits[:, -1].argmax(-1, keepdim=True), out.past_key_values
        found.append(int(tokens))
    assert found == expected and len(set(found)) >= 40


@torch.no_grad()
def test_every_output(pair: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = pair
    tokens = ids(2, 30)
    wanted = dict.fromkeys(("output_attentions", "output_hidden_states", "output_router_logits"), True)
    a, b = ours(tokens, labels=tokens, **wanted), theirs(tokens, labels=tokens, **wanted)
    assert list(a.keys()) == list(b.keys())
    for name in ("loss", "aux_loss", "logits"):
        close(a[name], b[name])
    for name, count in (("hidden_states", 4), ("attentions", 3), ("router_logits", 3)):
        assert len(a[name]) == len(b[name]) == count
        for x, y in zip(a[name], b[name], strict=True):
            close(x, y)
    assert a.router_logits[0].shape == (60, 8)
    assert a.attentions[0].sum(-1).max() < 1  # the sink has the rest
    as_tuple = ours(tokens, labels=tokens, return_dict=False, **wanted)
    assert len(as_tuple) == 7 and torch.equal(as_tuple[2], a.logits) and torch.equal(a[0], a.loss) and a[2:3] == (a.logits,)
    with pytest.raises(KeyError):
        ours(tokens)["loss"]


@torch.no_grad()
def test_bare_model(pair: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path)
    bare, (ours, theirs) = load_reference(folder, task="feature-extraction"), pair
    assert isinstance(bare, GptOssModel) and isinstance(ours, GptOssForCausalLM)
    tokens = ids(2, 30)
    wanted = dict.fromkeys(("output_attentions", "output_hidden_states", "output_router_logits"), True)
    a, b = bare(tokens, **wanted), theirs.model(tokens, **wanted)
    close(a.last_hidden_state, b.last_hidden_state)
    assert a.keys() == ["last_hidden_state", "past_key_values", "hidden_states", "attentions", "router_logits"]
    assert torch.equal(a.hidden_states[-1], a.last_hidden_state)
    assert bare(tokens, use_cache=False).keys() == ["last_hidden_state"] == list(bare(tokens, use_cache=False))
    assert len(bare(tokens, use_cache=False, return_dict=False)) == len(bare(tokens, use_cache=False)) == 1


@torch.no_grad()
def test_embeddings_as_input_and_rows_as_output(pair: tuple[nn.Module, nn.Module]) -> None:
    ours, theirs = pair
    tokens = ids(2, 30)
    whole = ours(tokens).logits
    close(ours(inputs_embeds=theirs.model.embed_tokens(tokens)).logits, whole)
    torch.testing.assert_close(ours(tokens, logits_to_keep=3).logits, whole[:, -3:])
    rows = torch.tensor([29, 0, 4])
    close(ours(tokens, logits_to_keep=rows).logits, theirs(tokens, logits_to_keep=rows).logits)
    assert ours(tokens, cache_position=torch.arange(30), use_cache=False).past_key_values is None


@torch.no_grad()
def test_config_gives_the_defaults_of_flags(tmp_path: Path) -> None:
    folder = random_gpt_oss(
        tmp_path, use_cache=False, output_router_logits=True, output_hidden_states=True, output_attentions=True, return_dict=False
    )
    out = load_reference(folder)(ids(1, 5))
    assert [type(x) for x in out] == [Tensor, Tensor, tuple, tuple, tuple]
    assert load_reference(folder)(ids(1, 5), return_dict=True).past_key_values is None


def test_gradients_and_losses(tmp_path: Path) -> None:
    """Every parameter's gradient of loss and balancing loss, on padded rows with ignored labels; a pad token gets none."""
    folder = random_gpt_oss(tmp_path, pad_token_id=3, output_router_logits=True)
    ours, theirs = load_reference(folder), transformers_model(folder)
    tokens, mask = ids(3, 25), torch.ones(3, 25, dtype=torch.long)
    mask[0, 20:], mask[2, :4] = 0, 0
    tokens[1, 5] = 3
    labels = tokens.masked_fill(mask == 0, -100)
    labels[1, :10] = -100
    a, b = (model(tokens, attention_mask=mask, labels=labels) for model in (ours, theirs))
    for name in ("loss", "aux_loss", "logits"):
        x, y = (out[name][mask.bool()] if name == "logits" else out[name] for out in (a, b))
        close(x, y)
    a.loss.backward()
    b.loss.backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = max(1e-3, float(expected[name].grad.abs().max()))
        close(parameter.grad / scale, expected[name].grad / scale)
    assert not ours.model.embed_tokens.weight.grad[3].any() and ours.model.embed_tokens.weight.grad[5].any()


@torch.no_grad()
def test_router_logits_without_labels_and_with_cache(pair: tuple[nn.Module, nn.Module]) -> None:
    """The mask covers cached tokens too; only the new ones are balanced."""
    ours, theirs = pair
    tokens, mask = ids(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[1, 16:] = 0
    first = ours(tokens[:, :12], attention_mask=mask[:, :12])
    out = ours(tokens[:, 12:], attention_mask=mask, past_key_values=first.past_key_values, output_router_logits=True)
    whole = ours(tokens, attention_mask=mask, output_router_logits=True)
    assert out.loss is None and whole.loss is None
    close(out.aux_loss, load_balancing_loss(out.router_logits, 2, mask[:, 12:]))
    close(whole.aux_loss, theirs(tokens, attention_mask=mask, output_router_logits=True).aux_loss)
    for part, full in zip(out.router_logits, whole.router_logits, strict=True):
        close(part, full.view(2, 20, -1)[:, 12:].flatten(0, 1))


def test_attention_dropout_acts_in_training_only(tmp_path: Path) -> None:
    model = load_reference(random_gpt_oss(tmp_path, attention_dropout=0.5))
    tokens = ids(1, 12)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, model(tokens).logits)
        model.train()
        assert not torch.equal(model(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_float64_computes_in_float64_and_bfloat16_stays_near(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path)
    tokens = ids(1, 60)
    exact, single, half = (
        load_reference(folder, dtype)(tokens).logits for dtype in (torch.float64, torch.float32, torch.bfloat16)
    )
    assert (exact.dtype, half.dtype) == (torch.float64, torch.bfloat16)
    assert 1e-9 < float((exact - single).abs().max()) < 1e-4
    assert float((exact - half).square().mean().sqrt()) < 0.5
    model = load_reference(folder, torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    table = load_reference(folder).model.rotary_emb.inv_freq
    for cast in (model.double(), model.half(), model.float(), model.to_empty(device="cpu")):
        assert torch.equal(cast.model.rotary_emb.inv_freq, table)


@torch.no_grad()
def test_an_expert_that_was_not_chosen_has_no_influence(tmp_path: Path) -> None:
    model = load_reference(random_gpt_oss(tmp_path))
    tokens = ids(1, 2)
    out = model(tokens, output_router_logits=True)
    unused = next(e for e in range(8) if e not in out.router_logits[1].topk(2).indices)
    model.model.layers[1].mlp.experts.down_proj[unused] = torch.nan
    assert torch.equal(model(tokens).logits, out.logits)


@torch.no_grad()
def test_slices_of_experts_add_up(pair: tuple[nn.Module, nn.Module]) -> None:
    mlp = pair[0].model.layers[0].mlp
    x = torch.randn(7, TINY["hidden_size"])
    _, weights, indices = mlp.router(x)
    parts = []
    for first, last in ((0, 3), (3, 4), (4, 8)):
        some = {name: p[first:last] for name, p in mlp.experts.named_parameters()}
        parts.append(torch.func.functional_call(mlp.experts, some, (x, indices, weights, first)))
    close(sum(parts), mlp.experts(x, indices, weights))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "neither of input_ids and inputs_embeds"),
        ({"input_ids": ids(1, 4), "inputs_embeds": torch.zeros(1, 4, 64)}, "both of input_ids"),
        ({"input_ids": ids(1, 4), "past_key_values": [1]}, "past_key_values is a list"),
        ({"input_ids": ids(1, 4), "attention_mask": torch.ones(1, 5)}, r"attention_mask has shape \(1, 5\)"),
        ({"input_ids": ids(1, 4), "attention_mask": torch.ones(1, 1, 4, 4)}, "attention_mask has shape"),
        ({"input_ids": ids(1, 4), "logits_to_keep": torch.zeros(1, 2)}, "logits_to_keep has shape"),
        ({"input_ids": ids(1, 4), "labels": ids(1, 4), "logits_to_keep": 2}, "no logits_to_keep"),
    ],
)
def test_inputs_that_do_not_fit(pair: tuple[nn.Module, nn.Module], arguments: dict[str, Any], words: str) -> None:
    from oxfuse.errors import UserError

    with pytest.raises(UserError, match=words):
        pair[0](**arguments)
