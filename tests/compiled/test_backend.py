"""`torch.compile(module, backend="oxfuse")` on modules in memory: the same results, every layer fused, no compile for a token."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters, get_compilation_metrics
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward, repeat_kv

import oxfuse
from oxfuse.models import load_reference

from ..checkpoints import random_gpt_oss
from ..parity.cases import CASES, NEOX_CASES, Case, random_ids
from ..passes.graphs import transformers_gpt_neox, transformers_gpt_oss

IDS = torch.randint(1, 200, (1, 25), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """What was compiled and counted before does not count here."""
    torch._dynamo.reset()
    counters.clear()
    get_compilation_metrics().clear()
    yield
    torch._dynamo.reset()


def fused() -> dict[str, int]:
    return dict(counters["oxfuse"])


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def assert_close(got: Tensor, expected: Tensor) -> None:
    assert float((got - expected).abs().max()) <= 1e-4 * max(1.0, float(expected.abs().max()))


def generate(model: Any, ids: Tensor, count: int, **more: Any) -> Any:
    model.config.use_cache = model.generation_config.use_cache = True
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    wanted = dict(max_new_tokens=count, do_sample=False, cache_implementation="static")
    return model.generate(ids, **wanted, return_dict_in_generate=True, output_logits=True, **more)


def fusions_of(model: Any, attention: str, times: int) -> dict[str, int]:
    layers = model.config.num_hidden_layers
    counts = {attention: layers, "rotary_embedding": layers}
    if model.config.model_type == "gpt_oss":
        counts |= {"moe_dispatch": layers, "rms_norm": 2 * layers + 1}
    return {name: times * count for name, count in counts.items()}


CONFIGURATIONS = [
    pytest.param(case, experts, marks=() if (family, i) == ("oss", 0) else pytest.mark.slow, id=f"{family}-{case.name}-{experts}")
    for family, cases in (("oss", CASES), ("neox", NEOX_CASES))
    for i, (case, experts) in enumerate(zip(cases[:6], 3 * ("grouped_mm", "batched_mm"), strict=True))
]


@pytest.mark.parametrize(("case", "experts"), CONFIGURATIONS)
def test_transformers_generates_the_same_from_a_static_cache(case: Case, experts: str, tmp_path: Path) -> None:
    """Across the window, which is when the cache begins to roll, and the original context of YaRN."""
    model: Any = case.transformers(case.write(tmp_path / "checkpoint"), tmp_path)
    if model.config.model_type == "gpt_oss":
        model.set_experts_implementation(experts)
    ids = random_ids(case, 1, 9)
    expected = generate(model, ids, 300)
    model.forward = torch.compile(model.forward, backend="oxfuse")
    got = generate(model, ids, 300)
    assert torch.equal(got.sequences[:, : 9 + 200], expected.sequences[:, : 9 + 200])
    for a, b in zip(got.logits[:200], expected.logits, strict=False):
        assert_close(a, b)
    assert graphs() - 1 <= 2, "more than two recompiles"
    assert fused() == fusions_of(model, "masked_attention", graphs())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["oss", "neox"])
def test_a_ragged_batch_of_any_length(family: str) -> None:
    model = transformers_gpt_oss() if family == "oss" else transformers_gpt_neox("sdpa")
    compiled = torch.compile(model, backend="oxfuse", dynamic=True)
    with torch.no_grad():
        for lengths in ((5, 9, 7), (40, 12, 31)):
            rows = [(torch.arange(max(lengths)) >= max(lengths) - length).long() for length in lengths]
            mask, ids = torch.stack(rows), torch.randint(1, 200, (len(lengths), max(lengths)))
            given = dict(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
            got, expected = compiled(**given).logits, model(**given).logits
            for row, length in enumerate(lengths):
                assert_close(got[row, -length:], expected[row, -length:])
    assert graphs() == 1 and fused() == fusions_of(model, "masked_attention", 1)


@pytest.mark.parametrize("family", ["oss", "neox"])
def test_positions_are_the_caller_s_choice(family: str) -> None:
    """One graph serves all: where positions restart, transformers' mask of GPT-NeoX hides one sequence from the next."""
    one = dict(num_hidden_layers=1)
    model = transformers_gpt_oss(**one) if family == "oss" else transformers_gpt_neox("sdpa", **one)
    compiled = torch.compile(model, backend="oxfuse")
    choices = ([*range(25)], [*range(6, 31)], [*range(10), *range(15)], [*range(3), *range(2), *range(7, 27)])
    with torch.no_grad():
        for positions in choices:
            given = dict(input_ids=IDS, position_ids=torch.tensor([positions]))
            assert_close(compiled(**given).logits, model(**given).logits)
    assert graphs() == 1 and fused() == fusions_of(model, "sink_attention" if family == "oss" else "masked_attention", 1)


class Windowed(nn.Module):
    """Attention over a window that the caller names."""

    def forward(self, x: Tensor, window: int) -> Tensor:
        j = torch.arange(x.shape[2])
        i = j[:, None]
        return nn.functional.scaled_dot_product_attention(x, x, x, ((j <= i) & (j > i - window))[None, None], scale=0.5)


def test_a_window_that_is_an_argument_is_not_guessed() -> None:
    """A dynamic number is an input of the graph as the size of a batch is, and means something else."""
    compiled, model = torch.compile(Windowed(), backend="oxfuse", dynamic=True), Windowed()
    for length, window in ((12, 3), (9, 4), (9, 1)):
        x = torch.randn(2, 4, length, 16)
        with torch.no_grad():
            assert_close(compiled(x, window), model(x, window))
    assert fused() == {"masked_attention": graphs()}


def test_a_causal_mask_for_each_sequence_of_a_batch() -> None:
    """The size of a batch is an input of the graph that nobody chooses apart from the batch."""

    class Causal(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            mask = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril().expand(x.shape[0], 1, -1, -1)
            return nn.functional.scaled_dot_product_attention(x, x, x, mask, scale=0.5)

    compiled = torch.compile(Causal(), backend="oxfuse", dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, 12), (3, 9)):
            x = torch.randn(batch, 4, length, 16)
            assert_close(compiled(x), Causal()(x))
    assert graphs() == 1 and fused() == {"sink_attention": 1}


def test_our_reference_and_its_weights_as_they_are_now(tmp_path: Path) -> None:
    """The compiled graph holds no copy of a weight: what changes in the module counts from the next call on."""
    model = load_reference(random_gpt_oss(tmp_path / "checkpoint")).eval()
    compiled = torch.compile(model, backend="oxfuse", dynamic=True)
    ids = IDS % model.config.vocab_size
    with torch.no_grad():
        assert_close(compiled(ids).logits, model(ids).logits)
        before = model(ids).logits
        for parameter in model.parameters():
            parameter.mul_(0.9)
        assert (model(ids).logits - before).abs().max() > 0.1
        shorter = ids[0, :7].clone()[None]
        assert_close(compiled(shorter).logits, model(shorter).logits)
    assert graphs() == 1 and fused() == fusions_of(model, "sink_attention", 1)


@pytest.mark.slow
def test_half_precision_is_no_worse(tmp_path: Path) -> None:
    """bfloat16 through the backend is as close to float32 as transformers' own, on rows where both chose the same experts."""
    exact = transformers_gpt_oss()
    model = transformers_gpt_oss(dtype=torch.bfloat16)
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    compiled = torch.compile(model, backend="oxfuse", dynamic=True)
    with torch.no_grad():
        expected = exact(IDS).logits
        ours, theirs = ((m(IDS).logits.float() - expected).square().mean(-1).sqrt() for m in (compiled, model))
    assert float(ours.median()) <= 1.2 * float(theirs.median())


@pytest.mark.slow
def test_experts_in_a_loop_leave_the_rest_to_fuse() -> None:
    model = transformers_gpt_oss("eager", num_hidden_layers=2)
    compiled = torch.compile(model, backend="oxfuse", dynamic=True)
    with pytest.warns(UserWarning, match="found nothing to fuse"), torch.no_grad():
        assert_close(compiled(IDS).logits, model(IDS).logits)
    # Both layers run through the graphs of the first.
    assert fused()["masked_attention"] >= 1 and fused()["rms_norm"] >= 3 and "moe_dispatch" not in fused()


def test_a_graph_without_a_match_runs_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).requires_grad_(False)
    compiled, x = torch.compile(model, backend="oxfuse"), torch.randn(3, 8)
    with pytest.warns(UserWarning) as told:
        torch.testing.assert_close(compiled(x), model(x))
    ours = [str(one.message) for one in told if "oxfuse" in str(one.message)]  # importing Inductor brings warnings of torch's
    assert ours == ['backend="oxfuse" found nothing to fuse. The graph runs through Inductor as it is.']
    assert not fused()


def test_gradients_are_refused() -> None:
    model = nn.Linear(4, 4)
    with pytest.raises(Exception, match=r"computes no gradients.*torch\.no_grad"):
        torch.compile(model, backend="oxfuse")(torch.ones(1, 4))


def keep_the_sink(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any) -> Any:
    """The sink's column is not dropped, the last key's is."""
    keys, values = (repeat_kv(x, module.num_key_value_groups) for x in (key, value))
    scores = query @ keys.transpose(2, 3) * scaling + mask
    sinks = module.sinks.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[-2], -1)
    weights = torch.cat([scores, sinks], -1).softmax(-1)[..., 1:]
    return (weights @ values).transpose(1, 2).contiguous(), None


def one_more_term(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **more: Any) -> Any:
    """A slope for each head, as ALiBi has it, beside the mask."""
    slope = torch.arange(query.shape[1]).view(-1, 1, 1) * torch.arange(key.shape[2]) * -0.01
    return eager_attention_forward(module, query, key, value, mask + slope, **more)


@pytest.mark.parametrize(
    ("change", "reason"),
    [(keep_the_sink, "the sink's probability is not dropped"), (one_more_term, "not one plane for all heads")],
)
def test_attention_that_is_another_stays(change: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    ALL_ATTENTION_FUNCTIONS.register(change.__name__, change)
    model = transformers_gpt_oss(num_hidden_layers=1)
    model.config._attn_implementation = change.__name__
    compiled = torch.compile(model, backend="oxfuse")
    mask = torch.full((25, 25), -1e9).triu(1)[None, None]
    with caplog.at_level(logging.WARNING), torch.no_grad():
        assert_close(compiled(IDS, attention_mask=mask).logits, model(IDS, attention_mask=mask).logits)
    assert {name: fused().get(name, 0) for name in ("masked_attention", "sink_attention", "moe_dispatch")} == {
        "masked_attention": 0,
        "sink_attention": 0,
        "moe_dispatch": 1,
    }
    assert reason in caplog.text
    assert any(reason in left.reason for left in oxfuse.explain(model, {"input_ids": IDS, "attention_mask": mask}).left)


def test_another_activation_stays(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = transformers_gpt_oss(num_hidden_layers=2)
    odd = model.model.layers[0].mlp.experts
    odd._apply_gate = lambda x: (
        (x[..., 1::2] + 2).clamp(max=7.0) * x[..., ::2].clamp(max=7.0) * torch.sigmoid(x[..., ::2] * 1.702)
    )
    compiled = torch.compile(model, backend="oxfuse")
    with caplog.at_level(logging.WARNING), torch.no_grad():
        assert_close(compiled(IDS).logits, model(IDS).logits)
    assert fused() | {"moe_dispatch": 2} == fusions_of(model, "sink_attention", 1) and fused()["moe_dispatch"] == 1
    assert "model.layers.0.mlp" in caplog.text and "not moe_dispatch" in caplog.text
