"""The configurations of the parity suite, and what a model must show on each: one definition for all ways of running it.

Every checkpoint is random; logits have a standard deviation of at least 1 and greedy text at least 50 distinct tokens, so that
no defect hides behind flat logits. Window and original context are so small that the prompts cross both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oxfuse.models import load_reference
from oxfuse.runtime import CompiledModel

from .. import neox
from ..checkpoints import TINY, random_gpt_oss, transformers_model

GENERATED = 300
SMALL_GAP = 1e-5
"""Two candidates closer than this in float64 may change places in float32."""


@dataclass(frozen=True)
class Case:
    """A checkpoint: overrides of `TINY`, and how it is stored."""

    name: str
    config: dict[str, Any] = field(default_factory=dict)
    layout: str = "hf"
    shards: int = 1
    old_keys: bool = False

    def write(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        options = dict(layout=self.layout, shards=self.shards, old_keys=self.old_keys, dtype=dtype)
        return random_gpt_oss(folder, **options, **self.config)

    def transformers(self, folder: Path, scratch: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return transformers' model; it reads no original layout, so it gets the same weights in its own."""
        if self.layout.startswith("original"):
            layout = "mxfp4" if self.layout == "original" else "hf"
            folder = random_gpt_oss(scratch, layout=layout, **self.config)
        return transformers_model(folder, dtype)

    @property
    def window(self) -> int:
        return self.config.get("sliding_window", TINY["sliding_window"])

    @property
    def vocabulary(self) -> int:
        return self.config.get("vocab_size", TINY["vocab_size"])


@dataclass(frozen=True)
class NeoxCase(Case):
    """A GPT-NeoX checkpoint: overrides of `neox.TINY`."""

    new_names: bool = False
    old_buffers: bool = False

    def write(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        names = dict(shards=self.shards, new_names=self.new_names, old_buffers=self.old_buffers)
        return neox.random_gpt_neox(folder, dtype=dtype, **names, **self.config)

    def transformers(self, folder: Path, scratch: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
        return neox.transformers_neox(folder, dtype)

    @property
    def window(self) -> int:
        return 60  # there is none: any length

    @property
    def vocabulary(self) -> int:
        return self.config.get("vocab_size", neox.TINY["vocab_size"])


CASES = [
    Case("base"),
    Case("one_kv_head", dict(num_attention_heads=8, num_key_value_heads=1)),
    Case("eight_kv_heads", dict(num_attention_heads=8, num_key_value_heads=8, head_dim=8)),
    Case("tied", dict(tie_word_embeddings=True)),
    Case("window_1", dict(sliding_window=1)),
    Case("odd_sizes", dict(hidden_size=54, intermediate_size=37, vocab_size=173, num_attention_heads=3, num_key_value_heads=3, head_dim=10)),  # noqa: E501
    Case("own_layer_types", dict(num_hidden_layers=4, layer_types=["full_attention"] * 2 + ["sliding_attention"] * 2)),
    Case("two_experts", dict(num_local_experts=2, num_experts_per_tok=1)),
    Case("sixteen_experts", dict(num_local_experts=16, num_experts_per_tok=4)),
    Case("truncate", dict(rope_parameters=dict(truncate=True, beta_fast=4.0, beta_slow=0.5)), old_keys=True),
    Case("plain_rope", dict(rope_parameters=dict(rope_type="default"), attention_bias=False), shards=3),
    Case("mxfp4", dict(intermediate_size=64), layout="mxfp4", shards=2),
    Case("original", dict(num_experts_per_tok=3, swiglu_limit=7.0), layout="original"),
    Case("original_dense", dict(sliding_window=40), layout="original-dense"),
]  # fmt: skip
YARN = dict(type="yarn", factor=8.0, original_max_position_embeddings=64)
NEOX_CASES = [
    NeoxCase("neox"),
    NeoxCase("sequential", dict(use_parallel_residual=False, hidden_act="gelu_new")),
    NeoxCase("gelu_fast", dict(hidden_act="gelu_fast"), old_buffers=True),
    NeoxCase("relu", dict(hidden_act="relu", use_parallel_residual=False), new_names=True),
    NeoxCase("silu", dict(hidden_act="silu", attention_bias=False), shards=3),
    NeoxCase("whole_heads_turn", dict(rotary_pct=1.0, rotary_emb_base=500)),
    NeoxCase("odd_part_turns", dict(hidden_size=80)),
    NeoxCase("linear", dict(rope_scaling=dict(type="linear", factor=4.0))),
    NeoxCase("dynamic", dict(rope_scaling=dict(type="dynamic", factor=4.0))),
    NeoxCase("yarn", dict(rope_scaling=YARN, rotary_pct=0.5)),
    NeoxCase("tied_neox", dict(tie_word_embeddings=True)),
    NeoxCase("one_head", dict(num_attention_heads=1, hidden_size=20, intermediate_size=37, vocab_size=173)),
]


def random_ids(case: Case, *shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, case.vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def assert_close(got: Tensor, expected: Tensor, what: str) -> None:
    error, bound = float((got - expected).abs().max()), 1e-4 * max(1.0, float(expected.abs().max()))
    assert error <= bound, f"{what}: error {error:.1e}, at most {bound:.1e} is allowed"


@torch.no_grad()
def assert_logits(model: CompiledModel, reference: nn.Module, case: Case, *, jumps: bool = True) -> None:
    """Prompts shorter than, equal to and longer than the window and the original context; positions; padding; ragged rows.

    `jumps`: whether positions may be any.
    """
    for length in sorted({1, max(1, case.window - 1), case.window, case.window + 1, 150}):
        ids = random_ids(case, 1, length, seed=length)
        expected = reference(input_ids=ids).logits
        assert_close(model.logits(ids), expected, f"{length} tokens")
    assert expected.std() >= 1, f"logits vary by {expected.std():.2f} only: the checkpoint hides defects"

    ids = random_ids(case, 1, 60)
    positions = torch.arange(60).mul(3).add(50)[None]  # beyond the original context, and not consecutive
    mask = torch.ones_like(ids)  # or transformers takes every jump for a new sequence
    if jumps:
        expected = reference(input_ids=ids, position_ids=positions, attention_mask=mask).logits
        assert_close(model.logits(ids, position_ids=positions), expected, "explicit positions")

    ids = random_ids(case, 3, 70)
    for side in ("left", "right"):
        mask = torch.ones_like(ids)
        for row, pads in enumerate((0, 13, 41)):
            mask[row, slice(0, pads) if side == "left" else slice(70 - pads, 70)] = 0
        expected = reference(input_ids=ids, attention_mask=mask).logits
        got = model.logits(ids, attention_mask=mask)
        assert not got[mask == 0].any(), "padding has logits"
        assert_close(got[mask == 1], expected[mask == 1], f"{side} padding")

    ragged = [random_ids(case, n, seed=n) for n in (5, 120, 33)]
    got = model.logits([row.tolist() for row in ragged])
    for row, ids in enumerate(ragged):
        assert_close(got[row, : len(ids)], reference(input_ids=ids[None]).logits[0], f"ragged row {row}")


@torch.no_grad()
def assert_greedy(model: CompiledModel, reference: nn.Module, case: Case, folder: Path) -> None:
    """Three prompts at once, GENERATED tokens each: every token is the reference's choice after the ones before it."""
    prompts = [random_ids(case, n, seed=n).tolist() for n in (3, 110, 37)]
    said: set[int] = set()
    for prompt, generated in zip(prompts, model.generate(prompts, max_new_tokens=GENERATED, stop_token_ids=[]), strict=True):
        tokens = generated.token_ids
        said |= {*tokens}
        assert len(tokens) == GENERATED
        ids = torch.tensor([prompt + tokens])
        expected = reference(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        wrong = (expected.argmax(-1) != torch.tensor(tokens)).nonzero().flatten().tolist()
        if wrong:
            excused = near_ties(folder, ids, range(len(prompt) - 1, ids.shape[1] - 1))
            assert set(wrong) <= excused, f"token {wrong[0]} of {GENERATED} differs from the reference's"
    assert len(said) >= 50, f"only {len(said)} distinct tokens: the checkpoint hides defects"


def near_ties(folder: Path, ids: Tensor, rows: range) -> set[int]:
    """Return which of `rows`, counted from its start, have two tokens or two experts close together at the edge of the choice."""
    model = load_reference(folder, torch.float64)
    top_k = getattr(model.config, "num_experts_per_tok", None)
    wanted = {} if top_k is None else {"output_router_logits": True}
    exact = model(input_ids=ids, use_cache=False, **wanted)
    gap = exact.logits[0, rows.start : rows.stop].topk(2).values.diff().abs().flatten()
    close = gap < SMALL_GAP
    for logits in exact.router_logits if top_k is not None else ():
        if logits.shape[-1] > top_k:
            ranked = logits.sort(-1, descending=True).values
            tie = (ranked[:, top_k - 1] - ranked[:, top_k]) < SMALL_GAP
            close |= tie[rows.start : rows.stop]
    return set(close.nonzero().flatten().tolist())


def assert_parity(model: CompiledModel, reference: nn.Module, case: Case, folder: Path, *, jumps: bool = True) -> None:
    """All that float32 must show."""
    assert_logits(model, reference, case, jumps=jumps)
    assert_greedy(model, reference, case, folder)
