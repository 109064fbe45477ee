"""The reference against transformers' GPT-NeoX classes in float32: every output of every head, over many configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from oxfuse.errors import UserError
from oxfuse.models import load_reference
from oxfuse.models.gpt_neox import GPTNeoXConfig
from tests.models.test_parity import close, ids
from tests.neox import HEADS, random_gpt_neox, transformers_neox

CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "sequential": {"use_parallel_residual": False},
    "gelu_fast": {"hidden_act": "gelu_fast"},
    "gelu_new": {"hidden_act": "gelu_new", "use_parallel_residual": False},
    "relu": {"hidden_act": "relu"},
    "silu": {"hidden_act": "silu", "attention_bias": False},
    "whole heads turn": {"rotary_pct": 1.0, "rotary_emb_base": 500.0},
    "an odd part turns": {"hidden_size": 80, "rotary_pct": 0.25},
    "new keys": {
        "rotary_pct": None, "rotary_emb_base": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 3000.0, "partial_rotary_factor": 0.5},
    },
    "linear": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}, "rotary_pct": 0.5},
    "one head, odd sizes": {"num_attention_heads": 1, "hidden_size": 20, "intermediate_size": 37, "vocab_size": 97},
    "eps": {"layer_norm_eps": 0.1},
}  # fmt: skip
TASKS = [task for task in HEADS if task != "text-generation"]
LABELS = {"id2label": {"0": "O", "1": "B-PER", "2": "I-PER"}, "label2id": {"O": 0, "B-PER": 1, "I-PER": 2}}


def pair(folder: Path, task: str = "text-generation", **config: Any) -> tuple[nn.Module, nn.Module]:
    random_gpt_neox(folder, task=task, **config)
    return load_reference(folder), transformers_neox(folder, task=task)


def values(out: Any, task: str) -> Tensor:
    """Return what a task's model says, whatever its fields are called."""
    if task == "question-answering":
        return torch.stack([out.start_logits, out.end_logits], -1)
    return out.last_hidden_state if task == "feature-extraction" else out.logits


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_logits(name: str, tmp_path: Path) -> None:
    ours, theirs = pair(tmp_path, seed=len(name), **CONFIGS[name])
    tokens = ids(2, 150)
    expected = theirs(tokens).logits
    assert expected.std() > 1
    close(ours(tokens).logits, expected)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_heads(name: str, task: str, tmp_path: Path) -> None:
    """Padding on either side too."""
    ours, theirs = pair(tmp_path, task, seed=len(name), pad_token_id=3, **LABELS, **CONFIGS[name])
    tokens, mask = ids(3, 70), torch.ones(3, 70, dtype=torch.long)
    tokens[0, 60:], mask[0, 60:] = 3, 0
    tokens[1, :9], mask[1, :9] = 3, 0
    for inputs in ({}, {"attention_mask": mask}):
        close(values(ours(tokens, **inputs), task), values(theirs(tokens, **inputs), task))


@torch.no_grad()
def test_tied_embeddings_and_names(tmp_path: Path) -> None:
    tokens = ids(1, 40)
    for number, config in enumerate(
        [{"tie_word_embeddings": True}, {"new_names": True}, {"old_buffers": True}, {"shards": 3, "old_buffers": True}]
    ):
        ours, theirs = pair(tmp_path / str(number), **config)
        close(ours(tokens).logits, theirs(tokens).logits)
        assert ("embed_out.weight" in dict(ours.named_parameters())) != config.get("tie_word_embeddings", False)


@torch.no_grad()
def test_outputs(tmp_path: Path) -> None:
    """Hidden states, attentions, explicit positions, embeddings in, rows to keep, the cache, tuples."""
    ours, theirs = pair(tmp_path)
    tokens, mask = ids(2, 40), torch.ones(2, 40, dtype=torch.long)
    flags = {"output_hidden_states": True, "output_attentions": True}
    a, b = ours(tokens, **flags), theirs(tokens, **flags)
    assert len(a.hidden_states) == len(b.hidden_states) == 4 and len(a.attentions) == len(b.attentions) == 3
    for x, y in zip([*a.hidden_states, *a.attentions], [*b.hidden_states, *b.attentions], strict=True):
        close(x, y)
    positions = torch.arange(40).mul(3).add(7).expand(2, -1)
    expected = theirs(tokens, position_ids=positions, attention_mask=mask).logits  # the mask: or jumps mean packed sequences
    close(ours(tokens, position_ids=positions).logits, expected)
    assert (expected - b.logits).abs().max() > 0.1
    close(ours(inputs_embeds=theirs.gpt_neox.embed_in(tokens)).logits, b.logits)
    rows = torch.tensor([39, 0, 4])
    close(ours(tokens, logits_to_keep=rows).logits, b.logits[:, rows])
    close(ours(tokens, logits_to_keep=3).logits, b.logits[:, -3:])
    first = ours(tokens[:, :25])
    second = ours(tokens[:, 25:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, second.logits], 1), b.logits)
    assert [type(x) for x in ours(tokens, return_dict=False, use_cache=False)] == [Tensor]
    assert ours(tokens, use_cache=False).keys() == ["logits"]
    for task, keys in {
        "text-classification": ["logits", "past_key_values"],
        "token-classification": ["logits"],
        "question-answering": ["start_logits", "end_logits"],
        "feature-extraction": ["last_hidden_state", "past_key_values"],
    }.items():
        head, other = pair(tmp_path / task, task)
        out = head(tokens[:1])
        assert out.keys() == keys == [key for key in other(tokens[:1], use_cache=True) if key in keys]
        assert len(head(tokens[:1], return_dict=False)) == len(keys)


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients(name: str, tmp_path: Path) -> None:
    """Of every head: losses within 1e-5, every parameter's gradient within 1e-4 of its largest; both kinds of attention."""
    tokens, mask = ids(3, 25), torch.ones(3, 25, dtype=torch.long)
    tokens[0, 20:], mask[0, 20:], tokens[2, :4], mask[2, :4] = 3, 0, 3, 0
    kept = tokens.masked_fill(mask == 0, -100)
    labels: dict[str, dict[str, Tensor]] = {
        "text-generation": {"labels": kept},
        "text-classification": {"labels": torch.tensor([0, 2, 1])},
        "token-classification": {"labels": kept.clamp(max=2)},
        "question-answering": {"start_positions": torch.tensor([3, 9, 40]), "end_positions": torch.tensor([-2, 15, 24])},
    }
    for task, wanted in labels.items():
        folder = random_gpt_neox(tmp_path / task, task=task, seed=len(name), pad_token_id=3, **LABELS, **CONFIGS[name])
        for attention in ("eager", "sdpa"):  # they differ where a query sees nothing, and spans count such queries
            model = load_reference(folder, attn_implementation=attention)
            theirs = transformers_neox(folder, attention=attention, task=task)
            reference = theirs(tokens, attention_mask=mask, **wanted).loss
            reference.backward()
            expected = {n.replace("lm_head.", "embed_out."): p.grad for n, p in theirs.named_parameters()}
            loss = model(tokens, attention_mask=mask, **wanted).loss
            assert abs(float(loss.detach() - reference.detach())) <= 1e-5 * max(1.0, abs(float(reference.detach())))
            loss.backward()
            for parameter_name, parameter in model.named_parameters():
                scale = max(1e-3, float(expected[parameter_name].abs().max()))
                close(parameter.grad / scale, expected[parameter_name] / scale)


def test_kinds_of_classification_loss(tmp_path: Path) -> None:
    """Regression with one label and with several, several labels at once, and the kind that the configuration names."""
    tokens = ids(3, 12)
    one = {"id2label": {"0": "value"}, "label2id": {"value": 0}}
    for number, (config, wanted) in enumerate(
        [
            (one, torch.tensor([0.3, -1.0, 2.0])),
            (LABELS, torch.rand(3, 3).round()),
            ({**LABELS, "problem_type": "regression"}, torch.rand(3, 3)),
            ({**LABELS, "problem_type": "multi_label_classification"}, torch.rand(3, 3).round()),
        ]
    ):
        ours, theirs = pair(tmp_path / str(number), "text-classification", pad_token_id=3, **config)
        a, b = ours(tokens, labels=wanted), theirs(tokens, labels=wanted)
        assert abs(float(a.loss.detach() - b.loss.detach())) <= 1e-5 * max(1.0, float(b.loss.detach()))
    with pytest.raises(UserError, match=r"labels are \[3, 2\], the logits \[3, 3\]"):
        ours(tokens, labels=torch.rand(3, 2))
    single = load_reference(tmp_path / "1", problem_type="single_label_classification")
    with pytest.raises(UserError, match=r"3 sequences and labels \[2\]"):
        single(tokens, labels=torch.tensor([1, 0]))


@torch.no_grad()
def test_pooling(tmp_path: Path) -> None:
    """The rightmost token that is not padding, whatever the mask; index 0 of a row of pads; the last position of embeddings."""
    ours, theirs = pair(tmp_path, "text-classification", pad_token_id=3)
    tokens = ids(4, 20)
    tokens[0, 15:], tokens[1, :5], tokens[2], tokens[3, 8] = 3, 3, 3, 3
    close(ours(tokens).logits, theirs(tokens).logits)
    mask = torch.ones_like(tokens)
    mask[3, 12:] = 0
    close(ours(tokens, attention_mask=mask).logits, theirs(tokens, attention_mask=mask).logits)
    embedded = theirs.gpt_neox.embed_in(tokens)
    with pytest.warns(UserWarning, match="do not show padding"):
        close(ours(inputs_embeds=embedded).logits, theirs(inputs_embeds=embedded).logits)
    without, _ = pair(tmp_path / "none", "text-classification")
    close(without(tokens[:1]).logits, theirs.score(theirs.gpt_neox(tokens[:1]).last_hidden_state)[:, -1])
    with pytest.raises(UserError, match="4 sequences, and the configuration has no pad_token_id"):
        without(tokens)


def test_spans_beyond_the_text(tmp_path: Path) -> None:
    """Positions beyond the text do not count; if none counts, the loss is NaN, as in transformers."""
    ours, theirs = pair(tmp_path, "question-answering")
    tokens = ids(2, 12)
    for start, end in (([3, 12], [4, 99]), ([12, 50], [1, 2]), ([[3], [5]], [[4], [7]])):
        spans = {"start_positions": torch.tensor(start), "end_positions": torch.tensor(end)}
        a, b = ours(tokens, **spans).loss, theirs(tokens, **spans).loss
        torch.testing.assert_close(a, b, equal_nan=True)
    assert ours(tokens, start_positions=torch.tensor([0, 1])).loss is None


def test_a_head_that_the_checkpoint_lacks(tmp_path: Path) -> None:
    """from_pretrained makes it, says so, and the result trains, saves and loads, here and in transformers."""
    from oxfuse.models.gpt_neox import GPTNeoXForCausalLM, GPTNeoXForQuestionAnswering, GPTNeoXForTokenClassification

    folder = random_gpt_neox(tmp_path / "lm")
    with pytest.raises(UserError, match=r"Missing: qa_outputs.weight, qa_outputs.bias\. That is this task's head"):
        load_reference(folder, task="question-answering")
    with pytest.warns(UserWarning, match=r"has no qa_outputs.weight, qa_outputs.bias: initialised at random"):
        model = GPTNeoXForQuestionAnswering.from_pretrained(folder)
    assert model.qa_outputs.weight.std() > 0 and not model.qa_outputs.bias.any()
    with pytest.warns(UserWarning, match="has no classifier"):
        assert GPTNeoXForTokenClassification.from_pretrained(folder, num_labels=5).classifier.weight.shape == (5, 64)
    model.save_pretrained(tmp_path / "qa")
    theirs, tokens = transformers_neox(tmp_path / "qa", task="question-answering"), ids(2, 30)
    with torch.no_grad():
        close(load_reference(tmp_path / "qa")(tokens).start_logits, theirs(tokens).start_logits)
    with pytest.raises(UserError, match=r"Missing: embed_out.weight\. That is this task's head"):
        load_reference(tmp_path / "qa", task="text-generation")
    with pytest.raises(UserError, match="holds a gpt_neox model, not gpt_oss"):
        from oxfuse.models.gpt_oss import GptOssForCausalLM

        GptOssForCausalLM.from_pretrained(folder)
    assert isinstance(GPTNeoXForCausalLM.from_pretrained(folder), GPTNeoXForCausalLM)


@torch.no_grad()
def test_sdpa_is_eager(tmp_path: Path) -> None:
    eager, _ = pair(tmp_path)
    fast = load_reference(tmp_path, attn_implementation="sdpa")
    tokens, mask = ids(2, 50), torch.ones(2, 50, dtype=torch.long)
    mask[0, :9] = 0
    close(fast(tokens).logits, eager(tokens).logits)
    close(fast(tokens, attention_mask=mask).logits[mask == 1], eager(tokens, attention_mask=mask).logits[mask == 1])
    first = fast(tokens[:, :30])
    close(fast(tokens[:, 30:], past_key_values=first.past_key_values).logits, eager(tokens).logits[:, 30:])
    assert len(fast(tokens, output_attentions=True).attentions) == 3


@torch.no_grad()
def test_the_dynamic_rotation_is_fixed_for_a_context(tmp_path: Path) -> None:
    """Up to max_position_embeddings it is transformers'; for a longer context, transformers' at that length."""
    ours, theirs = pair(tmp_path, max_position_embeddings=64, rope_scaling={"type": "dynamic", "factor": 4.0})
    assert ours.config.longest_context == 256
    tokens = ids(1, 100)
    close(ours(tokens[:, :64]).logits, theirs(tokens[:, :64]).logits)
    config = ours.config.for_context(100)
    assert GPTNeoXConfig(**config.to_dict()) == config != ours.config
    longer = type(ours)(config)
    longer.load_state_dict(ours.state_dict())
    close(longer.eval()(tokens).logits, theirs(tokens).logits)
    assert (ours(tokens).logits - theirs(tokens).logits).abs().max() > 0.01


def test_dropouts_act_in_training_only(tmp_path: Path) -> None:
    for number, name in enumerate(("attention_dropout", "hidden_dropout")):
        random_gpt_neox(tmp_path / str(number), **{name: 0.5})
        for kind in ("eager", "sdpa"):
            model = load_reference(tmp_path / str(number), attn_implementation=kind)
            tokens = ids(1, 12)
            with torch.no_grad():
                assert torch.equal(model(tokens).logits, model(tokens).logits)
                model.train()
                assert not torch.equal(model(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_float64_computes_in_float64(tmp_path: Path) -> None:
    random_gpt_neox(tmp_path)
    tokens = ids(1, 60)
    exact, single, half = (
        load_reference(tmp_path, dtype)(tokens).logits for dtype in (torch.float64, torch.float32, torch.bfloat16)
    )
    assert (exact.dtype, half.dtype) == (torch.float64, torch.bfloat16)
    assert 1e-9 < float((exact - single).abs().max()) < 1e-4
    assert float((exact - half).square().mean().sqrt()) < 0.5
