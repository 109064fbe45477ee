"""The ops inside a program of AOTInductor: exported with dynamic dims, compiled, run at sizes of 1, caches changed in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, export

from oxfuse.passes.fusions.build import OpsBuild
from oxfuse.passes.fusions.rms_norm import reference as reference

HEADS, KV, DIM, BLOCK, HIDDEN, WIDTH, EXPERTS = 4, 2, 16, 4, 64, 32, 4
OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.check_lowerbound": False,
    "always_keep_tensor_constants": True,
    "cpp.dynamic_threads": True,
    "fx_graph_cache": False,
    "joint_graph_constant_folding": False,
}


class Layer(nn.Module):
    """One layer over flat tokens, with every op; `names` maps Python ops to those that are to be called."""

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.names = names

        def weight(*size: int, scale: float = 0.3) -> nn.Parameter:
            return nn.Parameter(torch.randn(*size, generator=generator) * scale, requires_grad=False)

        def bytes_(low: int, high: int, *size: int) -> nn.Parameter:
            return nn.Parameter(torch.randint(low, high, size, dtype=torch.uint8, generator=generator), requires_grad=False)

        self.norm, self.qkv, self.sink = weight(HIDDEN), weight((HEADS + 2 * KV) * DIM, HIDDEN), weight(HEADS)
        self.out, self.router, self.router_bias = weight(HIDDEN, HEADS * DIM), weight(EXPERTS, HIDDEN), weight(EXPERTS)
        self.gate_up, self.gate_up_scales = (
            bytes_(0, 256, EXPERTS, WIDTH // 8, HIDDEN // 32, 256),  # packed
            bytes_(120, 125, EXPERTS, WIDTH // 8, HIDDEN // 32, 16),
        )
        self.down, self.down_scales = (
            bytes_(0, 256, EXPERTS, HIDDEN // 16, WIDTH // 32, 256),
            bytes_(120, 125, EXPERTS, HIDDEN // 16, WIDTH // 32, 16),
        )
        self.gate_up_bias, self.down_bias = weight(EXPERTS, 2 * WIDTH), weight(EXPERTS, HIDDEN)
        self.inv_freq = weight(DIM // 2)

    def op(self, name: str) -> Any:
        return getattr(torch.ops.oxfuse, self.names.get(f"oxfuse::{name}", name).removeprefix("oxfuse::"))

    def forward(self, x: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor, *index: Tensor) -> Tensor:
        normed = self.op("rms_norm")(x, self.norm, 1e-5)
        q, k, v = torch.nn.functional.linear(normed, self.qkv).unflatten(1, (-1, DIM)).split([HEADS, KV, KV], 1)
        q, k = self.op("rotary_embedding")(q, k, positions, self.inv_freq, 1.3)
        attended = self.op("sink_attention")(q, k, v, self.sink, k_cache, v_cache, *index, 5, 0.25)
        y = torch.nn.functional.linear(attended.flatten(1), self.out)
        normed, total = self.op("add_rms_norm")(y, x, self.norm, 1e-5)
        experts = self.gate_up, self.gate_up_scales, self.gate_up_bias, self.down, self.down_scales, self.down_bias
        return total + self.op("moe_dispatch")(normed, self.router, self.router_bias, *experts, 2, 1.702, 7.0)


def inputs(sequences: list[tuple[int, int]]) -> tuple[Tensor, ...]:
    """`sequences`: keys before the step and new tokens of each. Blocks lie in order, and old keys are random."""
    generator = torch.Generator().manual_seed(1)
    tokens, columns = sum(new for _, new in sequences), max(-(-(past + new) // BLOCK) for past, new in sequences)
    table = torch.arange(1, 1 + len(sequences) * columns).view(len(sequences), columns)
    caches = [torch.full((1 + table.numel(), KV, *tail), torch.nan) for tail in ((DIM, BLOCK), (BLOCK, DIM))]
    slots: list[int] = []
    for n, (past, new) in enumerate(sequences):
        old = (1 + n * columns) * BLOCK + torch.arange(past)
        for cache in (caches[0].permute(0, 3, 1, 2), caches[1].transpose(1, 2)):  # [blocks, BLOCK, KV, DIM]
            cache[old // BLOCK, old % BLOCK] = torch.randn(past, KV, DIM, generator=generator)
        slots += range((1 + n * columns) * BLOCK + past, (1 + n * columns) * BLOCK + past + new)
    starts = torch.tensor([0, *(new for _, new in sequences)]).cumsum(0)
    positions = torch.cat([torch.arange(past, past + new) for past, new in sequences])
    lengths = torch.tensor([past + new for past, new in sequences])
    return torch.randn(tokens, HIDDEN, generator=generator), positions, *caches, starts, lengths, torch.tensor(slots), table


def compiled(layer: Layer, folder: Path) -> Any:
    tokens, sequences, starts, columns, blocks = (
        Dim(name, min=1 + (name == "N1"), max=4096) for name in ("T", "N", "N1", "M", "B")
    )
    shapes = (
        {0: tokens},
        {0: tokens},
        {0: blocks},
        {0: blocks},
        ({0: starts}, {0: sequences}, {0: tokens}, {0: sequences, 1: columns}),
    )
    with torch.no_grad():
        program = export(layer, inputs([(3, 2), (0, 5), (6, 1)]), dynamic_shapes=shapes, strict=False)
        return torch._inductor.aoti_load_package(
            torch._inductor.aoti_compile_and_package(program, package_path=str(folder / "layer.pt2"), inductor_configs=OPTIONS)
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cpp", "plain"])
@pytest.mark.parametrize("ops", ["native"], indirect=True)
def test_program_with_the_ops(kind: str, ops: OpsBuild, tmp_path: Path) -> None:
    plain = Layer({})
    run = compiled(Layer(dict(ops.names)) if kind == "cpp" else plain, tmp_path)
    assert (b"sink_attention_" in Path(tmp_path / "layer.pt2").read_bytes()) == (kind == "cpp")
    real = dict(plain.named_parameters())
    run.load_constants({name: real[name] for name in run.get_constant_fqns()}, check_full_update=True, user_managed=True)
    for sequences in ([(0, 1)], [(3, 1)], [(4, 1)], [(9, 1), (2, 1)], [(0, 17)], [(30, 3), (0, 1), (5, 20)]):
        for threads in (1, 4):
            torch.set_num_threads(threads)
            args, expected_args = inputs(sequences), inputs(sequences)
            got, expected = run(*args), plain(*expected_args)
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
            for a, b in zip(args[2:4], expected_args[2:4], strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=1e-5, equal_nan=True)
                assert not torch.equal(a.isnan(), inputs(sequences)[2].isnan())
