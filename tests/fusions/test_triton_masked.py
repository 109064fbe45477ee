"""The GPU kernels for attention of whole tensors: the numbers under Triton's interpreter, and the machine code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from oxfuse.compiler.lowering.kernels import SHARED_MEMORY, Launch, Launches, compile_launch
from oxfuse.passes.fusions import tuning
from oxfuse.passes.fusions.contract import OpCase
from oxfuse.passes.fusions.masked_attention import reference
from oxfuse.passes.fusions.masked_attention import triton as kernels
from oxfuse.passes.fusions.masked_attention.cases import CASES, MASKED
from oxfuse.passes.fusions.sink_attention import reference as sink_reference
from oxfuse.passes.fusions.sink_attention.cases import DENSE

from . import triton_interpreter
from .triton_tolerances import assert_as_near

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LEAST = torch.finfo(torch.float32).min
SMALL = {"ROWS": 32, "KEYS": 16, "CHUNK": 32, "SPLITS": 4}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Make the table's tiles small, so that few keys and tokens make many of them."""
    if "table" in request.node.name:
        return
    choose = tuning.choose

    def smaller(*args: Any, **shape: Any) -> tuning.Config:
        config = choose(*args, **shape)
        changed = {name: SMALL.get(name, value) for name, value in config.blocks.items()}
        return tuning.Config(num_warps=config.num_warps, num_stages=config.num_stages, blocks=changed)

    monkeypatch.setattr(tuning, "choose", smaller)


def launched(op: str, args: tuple[Any, ...]) -> Tensor:
    interpreted = triton_interpreter.interpreted("masked_attention.triton")
    launch = interpreted.launch_masked if op == MASKED else interpreted.launch_causal
    result: Tensor = launch(triton_interpreter.run, *args, 90)
    return result


def plain(op: str, args: tuple[Any, ...]) -> Tensor:
    result: Tensor = getattr(torch.ops.oxfuse, op.removeprefix("oxfuse::"))(*args)
    return result


def check(op: str, args: tuple[Any, ...], what: str = "") -> None:
    exact = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)
    got = launched(op, args)
    assert got.is_contiguous()
    assert_as_near(got, plain(op, args), plain(op, exact), what)


CONTRACT = [
    pytest.param(case, dtype, id=f"{case.op}-{case.name}-{dtype}", marks=() if quick else pytest.mark.slow)
    for case in CASES
    for dtype in DTYPES
    for quick in [dtype == torch.bfloat16 and "block" not in case.name]
]


@pytest.mark.parametrize(("case", "dtype"), CONTRACT)
def test_kernels_mean_the_plain_op(case: OpCase, dtype: torch.dtype) -> None:
    check(case.op, case.args(dtype), case.name)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(
    batch: int, tokens: int, keys: int, heads: int, kv: int, dim: int, dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v, heads first in memory."""
    lying = ((heads, tokens), (kv, keys), (kv, keys))
    q, k, v = (random(batch, *sizes, dim, seed=i, dtype=dtype).transpose(1, 2) for i, sizes in enumerate(lying))
    return q, k, v


def seen(tokens: int, keys: int, past: int, window: int = 0) -> Tensor:
    key, token = torch.arange(keys), torch.arange(tokens)[:, None] + past
    return ((key <= token) & (key > token - (window or keys)))[None, None]


def added(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.where(visible, 0.0, torch.finfo(dtype).min).to(dtype)


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [
        *((80, DTYPES[1]), (33, DTYPES[2])),
        *(
            pytest.param(d, dtype, marks=pytest.mark.slow)
            for d, dtype in ((96, DTYPES[2]), *((d, DTYPES[0]) for d in (20, 64, 80, 96, 128)))
        ),
    ],
)
def test_head_dims(dim: int, dtype: torch.dtype) -> None:
    for tokens, past in ((3, 14), (1, 30)):
        q, k, v = whole(1, tokens, 40, 2, 1, dim, dtype)
        check(MASKED, (q, k, v, random(2, dtype=dtype), seen(tokens, 40, past), dim**-0.5))
    q, k, v = whole(1, 18, 18, 2, 1, dim, dtype)
    check(DENSE, (q, k, v, None, 0, dim**-0.5))


@pytest.mark.parametrize("window", [17, *(pytest.param(w, marks=pytest.mark.slow) for w in (0, 1, 15, 16, 40))])
def test_windows(window: int) -> None:
    q, k, v = whole(2, 50, 50, 4, 1, 16)
    sink = random(4)
    check(DENSE, (q, k, v, sink, window, 0.25))
    causal = launched(DENSE, (q, k, v, sink, window, 0.25))
    for mask in (seen(50, 50, 0, window), added(seen(50, 50, 0, window), torch.float32)):
        torch.testing.assert_close(launched(MASKED, (q, k, v, sink, mask, 0.25)).float(), causal.float(), rtol=0, atol=2e-2)
        check(MASKED, (q, k, v, sink, mask, 0.25))


@pytest.mark.parametrize(
    ("heads", "kv"), [(10, 2), (40, 1), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((1, 1), (8, 8), (24, 1)))]
)
def test_groups(heads: int, kv: int) -> None:
    for tokens, past in ((5, 20), (1, 30)):
        q, k, v = whole(2, tokens, 35, heads, kv, 16)
        check(MASKED, (q, k, v, random(heads), added(seen(tokens, 35, past), torch.bfloat16), 0.25))


@pytest.mark.parametrize("tokens", [1, pytest.param(7, marks=pytest.mark.slow)])
def test_any_strides(tokens: int) -> None:
    q, k, v = (torch.cat([x, x], -1)[..., :16] for x in whole(2, tokens, 45, 4, 2, 16))
    mask = random(2, 1, 90, 2 * tokens, dtype=torch.float32)
    for some in (mask, mask > 0):
        args = q, k, v, random(4), some.transpose(2, 3)[:, :, ::2, ::2], 0.25
        check(MASKED, args)
        check(MASKED, (*args[:4], args[4][1:], 0.25), "one sequence for all")
        check(MASKED, (*(x.transpose(2, 3).contiguous().transpose(2, 3) for x in args[:3]), *args[3:]), "dims apart")


@pytest.mark.parametrize("sink", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tokens", [1, 6])
def test_rows_that_see_nothing(tokens: int, sink: bool) -> None:
    """Hidden by bools or -inf they yield 0; hidden by finite values they see all alike, beside rows that see some."""
    q, k, v = whole(3, tokens, 100, 4, 2, 16, torch.float32)
    weights = random(4, dtype=torch.float32) if sink else None
    visible = seen(tokens, 100, 30).expand(3, 1, tokens, 100).clone()
    visible[1, :, -1] = False
    assert not launched(MASKED, (q, k, v, weights, visible, 0.25))[1, -1].any()
    infinite = torch.where(visible, 0.0, -torch.inf)
    check(MASKED, (q, k, v, weights, infinite, 0.25))
    check(MASKED, (q, k, v, weights, torch.where(visible, 0.0, LEAST), 0.25))
    if not sink:
        got = launched(MASKED, (q, k, v, None, torch.where(visible, 0.0, LEAST), 0.25))[1, -1]
        torch.testing.assert_close(got, v[1].mean(0).repeat_interleave(2, 0))
    infinite[2, :, 0] = LEAST
    infinite[2, :, 0, 50:] = -torch.inf
    check(MASKED, (q, k, v, weights, infinite, 0.25))


@pytest.mark.parametrize("tokens", [1, 6])
def test_keys_that_no_token_sees_are_not_touched(tokens: int) -> None:
    q, k, v = whole(1, tokens, 200, 4, 2, 16)
    visible = seen(tokens, 200, 70, 20)
    clean = [launched(MASKED, (q, k, v, None, m, 0.25)) for m in (visible, added(visible, torch.float32))]
    for x in (k, v):
        x[:, :32], x[:, 96:] = torch.nan, torch.nan
    dirty = [launched(MASKED, (q, k, v, None, m, 0.25)) for m in (visible, added(visible, torch.float32))]
    assert all(torch.equal(a, b) for a, b in zip(dirty, clean, strict=True)) and clean[0].isfinite().all()


@pytest.mark.parametrize("level", [-60.0, *(pytest.param(level, marks=pytest.mark.slow) for level in (12.0, 60.0))])
def test_sinks_far_from_the_scores(level: float) -> None:
    for dtype in DTYPES:
        for tokens in (1, 6):
            q, k, v = whole(1, tokens, 70, 4, 1, 16, dtype)
            check(MASKED, (q, k, v, torch.full((4,), level, dtype=dtype), seen(tokens, 70, 50), 0.25))
        q, k, v = whole(1, 20, 20, 4, 1, 16, dtype)
        check(DENSE, (q, k, v, torch.full((4,), level, dtype=dtype), 0, 0.25))


@pytest.mark.slow
def test_tiles_of_the_table() -> None:
    q, k, v = whole(1, 40, 300, 8, 1, 64)
    check(MASKED, (q, k, v, random(8), seen(40, 300, 170), 0.125))
    q, k, v = whole(1, 1, 700, 8, 1, 64)
    check(MASKED, (q, k, v, random(8), added(seen(1, 700, 600), torch.bfloat16), 0.125))
    q, k, v = whole(1, 150, 150, 8, 1, 64)
    check(DENSE, (q, k, v, random(8), 128, 0.125))


def test_refusals() -> None:
    q, k, v = whole(1, 3, 3, 2, 1, 16, torch.float64)
    with pytest.raises(ValueError, match=r"the queries are torch\.float64"):
        kernels.launch_causal(Launches().wrap, q, k, v, None, 0, 0.25, 90)
    with pytest.raises(NotImplementedError, match="no kernel for device meta; it runs on cpu and cuda"):
        reference.masked_attention(*(x.to("meta") for x in (q, k, v)), None, q.to("meta"), 0.25)


def recorded(tokens: int, keys: int, mask: torch.dtype | None, dim: int = 64) -> list[Launch]:
    """Return what GPT-OSS 20b launches; without a mask, causally."""
    launches = Launches()
    q, k, v = (
        torch.empty(1, heads, count, dim, dtype=torch.bfloat16, device="meta").transpose(1, 2)
        for heads, count in ((64, tokens), (8, keys), (8, keys))
    )
    sink = torch.empty(64, dtype=torch.bfloat16, device="meta")
    if mask is None:
        kernels.launch_causal(launches.wrap, q, k, v, sink, 0, 0.125, 90)
    else:
        hidden = torch.empty(1, 1, tokens, keys, dtype=mask, device="meta")
        kernels.launch_masked(launches.wrap, q, k, v, sink, hidden, 0.125, 90)
    return launches.made


@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32])
def test_one_binary_serves_all_lengths_of_the_table(mask: torch.dtype | None) -> None:
    first, *others = (recorded(n, n if mask is None else 4 * n, mask) for n in (32, 512, 4096))
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert (a.signature, a.constants, a.aligned, a.options) == (b.signature, b.constants, b.aligned, b.options)


def test_machine_code_of_the_table() -> None:
    """The rest of it is in `tests/gpu/results`."""
    for launch in recorded(1, 4096, torch.bfloat16) + recorded(512, 512, None):
        binary = compile_launch(launch, 90)
        assert "fp64" not in launch.signature.values()
        assert binary.spill_bytes == 0 and binary.shared_bytes <= SHARED_MEMORY[90], launch.name
        if launch.name == "attention_kernel":
            assert "cp.async.cg.shared.global [" in binary.ptx  # 16 bytes a thread


def test_bodies_launch_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    monkeypatch.setattr(torch.library, "wrap_triton", launches.wrap)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode():
        for tokens in (5, 1):
            q, k, v = (torch.empty(2, n, heads, 16, device="cuda") for n, heads in ((tokens, 4), (5, 2), (5, 2)))
            mask = torch.empty(2, 1, tokens, 5, dtype=torch.bool, device="cuda")
            assert reference.masked_attention(q, k, v, None, mask, 0.25).shape == q.shape
        assert sink_reference.sink_attention_dense(k, k, v, None, 3, 0.25).shape == k.shape
    assert [launch.name for launch in launches.made] == [
        "attention_kernel",
        "attention_kernel",
        "join_kernel",
        "attention_kernel",
    ]
