"""The GPU kernels of attention: the numbers under Triton's interpreter, and the machine code at the true shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from oxfuse.compiler.lowering.kernels import SHARED_MEMORY, Binary, Launches, compile_launch
from oxfuse.passes.fusions import tuning
from oxfuse.passes.fusions.contract import OpCase
from oxfuse.passes.fusions.sink_attention import reference
from oxfuse.passes.fusions.sink_attention import triton as kernels
from oxfuse.passes.fusions.sink_attention.cases import cached_case, paged_case

from . import triton_interpreter
from .triton_tolerances import assert_as_near

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
MIX = [(0, 1), (37, 1), (0, 19), (0, 0), (20, 5), (3, 0)]
ONES = [(0, 1), (15, 1), (16, 1), (149, 1)]


def in_float64(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def check(case: OpCase, dtype: torch.dtype) -> None:
    """Compare the kernels of `sink_attention` or `sink_attention_cached` with the op, and the caches bit for bit."""
    interpreted = triton_interpreter.interpreted("sink_attention.triton")
    args, plain, exact = case.args(dtype), case.args(dtype), in_float64(case.args(dtype))
    if case.op == "oxfuse::sink_attention":
        q, k, v, sink, k_cache, v_cache, starts, lengths, slots, table, *how = args
        interpreted.launch_store(triton_interpreter.run, k, v, k_cache, v_cache, slots, 90)
        args, how, op = (q, sink, k_cache, v_cache, starts, lengths, table), [*how, False], reference.sink_attention
    else:
        args, how, op = args[:7], list(args[7:]), reference.sink_attention_cached
    got = interpreted.launch_attention(triton_interpreter.run, *args, *how, 90)
    assert got.is_contiguous()
    assert_as_near(got, op(*plain), op(*exact), case.name)
    caches = plain[4:6] if case.op == "oxfuse::sink_attention" else plain[2:4]
    for mine, others in zip(args[2:4], caches, strict=True):
        assert torch.equal(mine.nan_to_num(7.5), others.nan_to_num(7.5))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the table's tiles small, so that few keys and tokens make many of them."""

    def shrink(**blocks: int) -> None:
        choose = tuning.choose

        def smaller(*args: Any, **shape: Any) -> tuning.Config:
            config = choose(*args, **shape)
            changed = {name: blocks.get(name, value) for name, value in config.blocks.items()}
            return tuning.Config(num_warps=config.num_warps, num_stages=config.num_stages, blocks=changed)

        monkeypatch.setattr(tuning, "choose", smaller)

    return shrink


@pytest.mark.parametrize(
    ("window", "dtype"), [*((w, DTYPES[0]) for w in (0, 1, 15, 16, 17, 40)), (0, DTYPES[1]), (17, DTYPES[2])]
)
def test_any_mix(window: int, dtype: torch.dtype, small_tiles: Callable[..., None]) -> None:
    small_tiles(ROWS=32, KEYS=16)
    check(paged_case("mix", MIX, 4, 1, 16, window, block_size=32, padding=5, strided=True), dtype)


def test_tiles_of_the_table() -> None:
    check(paged_case("tiles", [(0, 40), (130, 20), (63, 1)], 8, 1, 64, 0, block_size=64), torch.bfloat16)
    check(paged_case("tiles", [(0, 40), (130, 20), (63, 1)], 8, 1, 64, 128, block_size=128), torch.bfloat16)


@pytest.mark.parametrize("length", [126, 127, 128, 129, 130])
def test_the_released_window(length: int) -> None:
    check(paged_case("window", [(length, 1), (length - 3, 3)], 8, 1, 32, 128, block_size=64), torch.bfloat16)


@pytest.mark.parametrize(("heads", "kv"), [(1, 1), (8, 8), (8, 1), (10, 2), (24, 1), (6, 2)])
def test_groups(heads: int, kv: int, small_tiles: Callable[..., None]) -> None:
    small_tiles(ROWS=16, KEYS=16, CHUNK=32, SPLITS=2)
    for sequences, decode in (([(17, 3), (0, 2)], False), ([(40, 1), (0, 1)], True)):
        check(cached_case("groups", paged_case("", sequences, heads, kv, 16, 0, block_size=16), decode=decode), torch.bfloat16)


@pytest.mark.parametrize(
    ("dim", "dtype"), [*((d, DTYPES[0]) for d in (20, 32, 64, 80, 96, 128, 256)), (96, DTYPES[1]), (80, DTYPES[2])]
)
def test_head_dims(dim: int, dtype: torch.dtype, small_tiles: Callable[..., None]) -> None:
    small_tiles(SPLITS=2)
    check(paged_case("step", [(3, 7), (0, 2)], 2, 1, dim, 0, block_size=16), dtype)
    check(cached_case("decode", paged_case("", [(20, 1), (4, 1)], 2, 1, dim, 0, block_size=16), decode=True), dtype)


@pytest.mark.parametrize(
    ("window", "sink", "dtype"),
    [
        *((w, True, DTYPES[0]) for w in (0, 1, 15, 16, 17, 90, 600)),
        *((w, False, dtype) for w in (0, 16) for dtype in DTYPES),
    ],
)
def test_decode(window: int, sink: bool, dtype: torch.dtype, small_tiles: Callable[..., None]) -> None:
    small_tiles(KEYS=16, CHUNK=32, **({"SPLITS": 4} if window in (0, 600) else {}))
    paged = paged_case("", ONES, 4, 1, 16, window, block_size=16, sink=sink, strided=True)
    check(cached_case("decode", paged, decode=True), dtype)


def test_more_keys_than_splits_of_one_chunk(small_tiles: Callable[..., None]) -> None:
    small_tiles(KEYS=16, CHUNK=16, SPLITS=4)
    paged = paged_case("", [(63, 1), (64, 1), (127, 1), (200, 1), (10, 1)], 4, 2, 16, 0, block_size=16)
    check(cached_case("decode", paged, decode=True), torch.float32)


def test_decode_is_a_step_of_one_token_each(small_tiles: Callable[..., None]) -> None:
    small_tiles(KEYS=16, CHUNK=32, SPLITS=4)
    interpreted = triton_interpreter.interpreted("sink_attention.triton")
    for window in (0, 17):
        case = paged_case("", [(11, 1), (100, 1), (0, 1)], 4, 2, 16, window, block_size=16)
        *args, decode = cached_case("", case, decode=True).args(torch.float32)
        one, other = (interpreted.launch_attention(triton_interpreter.run, *args, kind, 90) for kind in (decode, False))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_padded_rows_of_a_captured_graph_yield_zero() -> None:
    *args, decode = cached_case("", paged_case("", [(0, 1)] * 3, 4, 2, 16, 0, block_size=16), decode=True).args(torch.float32)
    args[5] = torch.tensor([0, 1, 0])
    for kind in (decode, False):
        interpreted = triton_interpreter.interpreted("sink_attention.triton")
        got = interpreted.launch_attention(triton_interpreter.run, *args, kind, 90)
        assert not got[[0, 2]].any() and got[1].any()


@pytest.mark.parametrize("level", [-60.0, 12.0, 60.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sinks_far_from_the_scores(level: float, dtype: torch.dtype, small_tiles: Callable[..., None]) -> None:
    """Weights are then tiny beside the maximum, or the sink is."""
    small_tiles(KEYS=16, CHUNK=32, SPLITS=4)
    for sequences, decode in (([(20, 9)], False), ([(70, 1), (3, 1)], True)):
        case = cached_case("", paged_case("", sequences, 4, 1, 16, 0, block_size=16), decode=decode)
        sink = torch.full((4,), level, dtype=dtype)
        args = case.args(dtype)
        shifted = OpCase(name=f"sink {level}", op=case.op, args=lambda d, a=args, s=sink: (a[0], s, *a[2:]))
        check(shifted, dtype)


def test_refusals() -> None:
    *args, _ = cached_case("", paged_case("", [(3, 1)], 2, 1, 16, 0, block_size=16)).args(torch.float32)
    with pytest.raises(ValueError, match=r"scale is -0\.5"):
        kernels.launch_attention(Launches().wrap, *args[:-1], -0.5, False, 90)
    args[2:4] = torch.empty(4, 1, 16, 24), torch.empty(4, 1, 24, 16)
    with pytest.raises(ValueError, match="blocks have 24 slots"):
        kernels.launch_attention(Launches().wrap, *args, False, 90)


def test_bodies_launch_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = Launches()
    monkeypatch.setattr(torch.library, "wrap_triton", launches.wrap)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    real = paged_case("", [(3, 1)], 4, 2, 16, 0, block_size=16).args(torch.float32)
    with FakeTensorMode():
        move = lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")  # noqa: E731
        args = [move(x) if isinstance(x, Tensor) else x for x in real]
        assert reference.sink_attention(*args).shape == (1, 4, 16)
        cached = args[0], *args[3:8], *args[9:]
        for window, decode in ((0, False), (0, True), (32, True)):
            reference.sink_attention_cached(*cached[:-2], window, 1.0, decode)
    names = [launch.name for launch in launches.made]
    assert names == ["store_kernel", "prefill_kernel", "prefill_kernel", "decode_kernel", "reduce_kernel", "decode_kernel"]


# heads, KV heads, head_dim, dtype: GPT-OSS 20b and 120b; GPT-NeoX 20b; the head dims of pythia.
GPT_OSS = (64, 8, 64, torch.bfloat16)
NEOX = (64, 64, 96, torch.float16)
PYTHIA = [
    (16, 16, 32, torch.bfloat16),
    (16, 16, 64, torch.float16),
    (32, 32, 80, torch.float16),
    (16, 16, 128, torch.bfloat16),
    (8, 8, 256, torch.float16),
]
FLOAT32 = [(64, 8, 64, torch.float32), (64, 64, 96, torch.float32), (8, 8, 256, torch.float32)]
SHAPES = [(GPT_OSS, 0), (GPT_OSS, 128), (NEOX, 0), ((64, 64, 96, torch.bfloat16), 0), *((shape, 0) for shape in PYTHIA + FLOAT32)]
QUICK = {(GPT_OSS, 90)}
CUBINS = [
    pytest.param(shape, window, arch, marks=() if (shape, arch) in QUICK else pytest.mark.slow, id=f"{shape}-{window}-sm_{arch}")
    for shape, window in SHAPES
    for arch in SHARED_MEMORY
]


def compiled(shape: tuple[Any, ...], window: int, arch: int, *, tokens: int, decode: bool) -> dict[str, Binary]:
    """Compile what the op launches at a true shape, and look at what holds for every kernel."""
    heads, kv, dim, dtype = shape

    def empty(*size: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    sequences = tokens if decode else 4
    launches = Launches()
    caches = empty(99, kv, dim, 64), empty(99, kv, 64, dim)
    k, v = (empty(tokens, heads + 2 * kv, dim)[:, -kv:] for _ in "kv")
    kernels.launch_store(launches.wrap, k, v, *caches, empty(tokens, dtype=torch.int64), arch)
    indices = (empty(*size, dtype=torch.int64) for size in ((sequences + 1,), (sequences,), (sequences, 64)))
    sink = empty(heads) if kv < heads else None
    out = kernels.launch_attention(
        launches.wrap, empty(tokens, heads, dim), sink, *caches, *indices, window, dim**-0.5, decode, arch
    )
    assert out.shape == (tokens, heads, dim)
    binaries = {}
    for launch in launches.made:
        assert "fp64" not in launch.signature.values()
        binary = binaries[launch.name] = compile_launch(launch, arch)
        print(f"{launch.name} {shape} window {window} sm_{arch}: {binary.registers} registers, {binary.shared_bytes} B shared")
        assert binary.spill_bytes == 0 and binary.shared_bytes <= SHARED_MEMORY[arch], launch.name
    return binaries


@pytest.mark.parametrize(("shape", "window", "arch"), CUBINS)
def test_machine_code_of_a_step(shape: tuple[Any, ...], window: int, arch: int) -> None:
    binaries = compiled(shape, window, arch, tokens=512, decode=False)
    prefill = binaries["prefill_kernel"]
    if shape[3] != torch.float32:
        assert "cp.async.cg.shared.global [" in prefill.ptx  # 16 bytes a thread
        instruction = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}[arch]
        assert instruction in prefill.sass()


@pytest.mark.parametrize(("shape", "window", "arch"), CUBINS)
def test_machine_code_of_a_decode_step(shape: tuple[Any, ...], window: int, arch: int) -> None:
    binaries = compiled(shape, window, arch, tokens=8, decode=True)
    assert ("reduce_kernel" in binaries) == (window == 0)
    assert shape[3] == torch.float32 or "cp.async.cg.shared.global [" in binaries["decode_kernel"].ptx
