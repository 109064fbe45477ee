"""The library of C++ ops: what is built, how it is loaded, and what it refuses."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from oxfuse.errors import InternalError, UserError
from oxfuse.passes.fusions.build import OpsBuild, build_ops, cpu_kernels, load_ops
from oxfuse.passes.fusions.contract import CpuKernel
from oxfuse.passes.fusions.isa import resolve_isa
from oxfuse.passes.fusions.moe_dispatch.cases import CASES as MOE
from oxfuse.passes.fusions.sink_attention.cases import CASES as ATTENTION


def case(cases: tuple, name: str, dtype: torch.dtype = torch.float32) -> tuple:
    (found,) = (c for c in cases if c.name == name and c.op in ("oxfuse::sink_attention", "oxfuse::moe_dispatch"))
    return found.args(dtype)


def cpp(ops: OpsBuild, name: str):
    return getattr(torch.ops.oxfuse, ops.names[f"oxfuse::{name}"].removeprefix("oxfuse::"))


def test_a_copy_of_a_loaded_library_is_left_alone(ops: OpsBuild, tmp_path: Path) -> None:
    copy = dataclasses.replace(ops, path=Path(shutil.copy(ops.path, tmp_path / "copy.so")))
    load_ops(ops)
    load_ops(copy)


@pytest.mark.parametrize("ops", ["native"], indirect=True)
def test_two_builds_live_in_one_process(ops: OpsBuild, tmp_path: Path) -> None:
    (kernel,) = (k for k in cpu_kernels() if k.source.name == "rotary_embedding.cpp")
    other = build_ops([kernel], ops.isa, tmp_path / "other.so")
    assert other.tag != ops.tag and set(other.names) == {"oxfuse::rotary_embedding"}
    load_ops(other)
    args = (torch.randn(2, 2, 4), torch.randn(2, 1, 4), torch.arange(2), torch.ones(2), 1.0)
    for a, b in zip(cpp(other, "rotary_embedding")(*args), cpp(ops, "rotary_embedding")(*args), strict=True):
        assert torch.equal(a, b)
    assert not list(tmp_path.glob(".*"))


def test_the_tag_follows_the_sources_and_nothing_else(tmp_path: Path) -> None:
    builds = []
    for folder, text in (("a", "int x;"), ("b", "int x;"), ("c", "int y;")):
        (tmp_path / folder).mkdir()
        (source := tmp_path / folder / "nothing.cpp").write_text(f"namespace oxfuse {{ {text} const char* file = __FILE__; }}\n")
        kernel = CpuKernel(source=source, ops={"oxfuse::rms_norm": "nothing"})
        builds.append(build_ops([kernel], "native", tmp_path / folder / "x.so"))
    a, b, c = builds
    assert a.tag == b.tag != c.tag and a.names["oxfuse::rms_norm"] == f"oxfuse::nothing_{a.tag}"
    assert str(tmp_path).encode() not in a.path.read_bytes()
    with pytest.raises(InternalError, match="is not registered"):
        load_ops(a)


def test_a_compiler_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (source := tmp_path / "broken.cpp").write_text("#error this is broken\n")
    with pytest.raises(UserError, match="this is broken"):
        build_ops([CpuKernel(source=source, ops={"oxfuse::x": "x"})], "native", tmp_path / "x.so")
    with pytest.raises(UserError, match="no-such-compiler was not found"):
        build_ops([], "native", tmp_path / "x.so", compiler="no-such-compiler")
    assert list(tmp_path.iterdir()) == [source]


def test_isa_names() -> None:
    with pytest.raises(UserError, match="'avx512' is unknown"):
        resolve_isa("avx512")
    v3, v4 = set(resolve_isa("x86-64-v3")[1]), set(resolve_isa("x86-64-v4")[1])
    assert {"avx2", "fma", "ssse3"} <= v3 < v4 and "avx512f" in v4 - v3
    flags = set(Path("/proc/cpuinfo").read_text().split())
    assert set(resolve_isa("native")[1]) <= flags


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs binutils")
def test_inner_loops_are_vectors_of_the_level(ops: OpsBuild) -> None:
    text = subprocess.run(["objdump", "-dC", "--no-show-raw-insn", ops.path], capture_output=True, text=True, check=True).stdout
    register, rows, tall = {"x86-64-v4": ("zmm", 4, 12), "x86-64-v3": ("ymm", 2, 3)}[ops.isa]
    assert ops.isa == "x86-64-v4" or "zmm" not in text
    found = {}
    for m, weights, body in re.findall(
        r"^\w+ <void oxfuse::advance_steps<(\d), oxfuse::([^(]*)>\(.*?>:\n(.*?)\n\n", text, re.M | re.S
    ):
        found[weights.strip(), int(m)] = len(re.findall(rf"vfmadd\w+ +.*%{register}", body))
        assert not re.search(rf"%{register}\d+,.*\(%r[sb]p\)", body), "accumulators left the registers"
    kinds = ("Decoded", "Dense<float>", "Dense<oxfuse::bfloat16>")
    assert found == {(kind, m): 6 * m for kind in kinds for m in range(1, rows + 1)}
    pairs = re.findall(r"^\w+ <void oxfuse::advance_pairs<(\d)>\(.*?>:\n(.*?)\n\n", text, re.M | re.S)
    assert {int(m): len(re.findall(r"vdpbf16ps", body)) for m, body in pairs} == (
        {m: 6 * m for m in range(1, 5)} if ops.isa == "x86-64-v4" else {}
    )
    assert not any(re.search(r"zmm\d+,.*\(%r[sb]p\)", body) for _, body in pairs), "accumulators left the registers"
    wide = ops.isa == "x86-64-v4"
    panels = re.findall(r"^\w+ <void oxfuse::advance_(wide|panel_pairs|words)<(\d+)>\(.*?>:\n(.*?)\n\n", text, re.M | re.S)
    panels += [
        ("bytes", rows, body)
        for rows, body in re.findall(
            r"^\w+ <void oxfuse::advance_bytes<oxfuse::Vnni, 12, (\d+)>\(.*?>:\n(.*?)\n\n", text, re.M | re.S
        )
    ]
    products = "vdpbf16ps|vpdpwssd|vpdpbusd|vfmadd"
    counts = {(kind, int(r)): len(re.findall(rf"(?:{products})\w* +.*%{register}", body)) for kind, r, body in panels}
    vectors = 2 if wide else 4  # of a pair of panels; those of a scaled block's sum come besides
    expected = {("wide", r): 2 * vectors * r for r in range(1, tall + 1)}
    expected |= {("bytes", r): 2 * vectors * r for r in range(1, (6 if wide else 2) + 1)}
    if wide:
        expected |= {("panel_pairs", r): vectors * r for r in range(1, 7)} | {("words", r): 2 * vectors * r for r in range(1, 7)}
    assert counts == expected
    assert not any(re.search(rf"%{register}\d+,.*\(%r[sb]p\)", body) for *_, body in panels), "accumulators left the registers"
    strips = re.findall(r"^\w+ <void oxfuse::outer<(\d), (\d)>\(.*?>:\n(.*?)\n\n", text, re.M | re.S)
    counts = {(int(m), int(v)): len(re.findall(rf"vfmadd\w+ +.*%{register}", body)) for m, v, body in strips}
    assert counts == {(m, v): m * v for m in range(1, 7) for v in range(1, 1 + (4 if ops.isa == "x86-64-v4" else 2))}
    strips += re.findall(r"^\w+ <void oxfuse::outer_pairs<(\d), (\d)>\(.*?>:\n(.*?)\n\n", text, re.M | re.S)
    in_pairs = {(int(m), int(v)): body.count("vdpbf16ps") for m, v, body in strips[len(counts) :]}
    assert in_pairs == ({(m, v): m * v for m, v in counts} if wide else {})
    assert not any(re.search(rf"%{register}\d+,.*\(%r[sb]p\)", body) for *_, body in strips), "accumulators left the registers"
    streams = re.findall(r"^\w+ <void oxfuse::stream_rows<(\d), (\d)>\(.*?>:\n(.*?)\n\n", text, re.M | re.S)
    counts = {(int(m), int(r)): len(re.findall(rf"vfmadd\w+ +.*%{register}", body)) for m, r, body in streams}
    pairs = {(m, 4 if m == 1 else 2) for m in range(1, rows + 1)}
    assert counts == {(m, r): 2 * m * r for m, r in pairs}  # in each row even places and odd ones
    functions = re.findall(r"^\w+ <(.*?)>:\n(.*?)\n\n", text, re.M | re.S)
    # They are called where the processor has the instruction.
    asking = {
        "vdpbf16ps": {"advance_pairs", "advance_panel_pairs", "stream_twos", "outer_pairs"} if wide else set(),
        "vpdpwssd": {"advance_words", "stream_twos"} if wide else set(),
        "vpdpbusd": {"advance_bytes", "stream_bytes"},
    }
    for instruction, names in asking.items():
        users = [name.removeprefix("void oxfuse::") for name, body in functions if instruction in body]
        assert {re.sub("<.*", "", name) for name in users} == names
        assert instruction != "vpdpbusd" or all("Vnni" in name for name in users)
    streams = [(name, body) for name, body in functions if re.search("stream_(panels|twos|bytes|rows)<", name)]
    silent = [name for name, body in streams if "prefetch" not in body]
    assert streams and not silent, "the memory is not asked ahead: GCC took the calls for ones without effect"
    if wide:
        streams = [(name, body) for name, body in functions if re.search(r"stream_(panels|twos|bytes<oxfuse::Vnni)", name)]
        kept = [name for name, body in streams if re.search(rf"%{register}\d+,.*\(%r[sb]p\)", body)]
        assert len(streams) == 4 * (2 + 2 + 2) and not kept, "sums of rows that stream by left the registers"


def test_nan_goes_where_it_belongs(ops: OpsBuild) -> None:
    args = case(MOE, "many tokens")
    clean = cpp(ops, "moe_dispatch")(*args)
    args[0][7, 3] = torch.nan
    dirty = cpp(ops, "moe_dispatch")(*args)
    assert dirty[7].isnan().all()
    keep = torch.arange(len(clean)) != 7
    assert torch.equal(dirty[keep], clean[keep])

    args = case(MOE, "all tokens on one expert")  # odd sizes: a row ends within a vector, and the next expert's follows
    clean = cpp(ops, "moe_dispatch")(*args)
    for weights in args[3], args[6]:
        weights[[0, 2]] = torch.nan
    assert torch.equal(cpp(ops, "moe_dispatch")(*args), clean)

    assert_nan_stays(ops, torch.float32)


def assert_nan_stays(ops: OpsBuild, dtype: torch.dtype) -> None:
    """A key that is none reaches the tokens that see it alone, in strips and blocks of others, whoever computes which part."""
    for name, token, first, last in (
        ("longer than a tile", 2, 2, 6),
        ("window longer than a tile", 1, 1, 4),
        ("a long decode", 0, 0, 1),
    ):
        q, *rest = case(ATTENTION, name, dtype)
        clean = cpp(ops, "sink_attention")(q, *rest)
        rest[1][token] = torch.nan
        dirty = cpp(ops, "sink_attention")(q, *rest)
        assert dirty[first:last].isnan().all()
        assert torch.equal(dirty[:first], clean[:first]) and torch.equal(dirty[last:], clean[last:])
    for threads in (1, 4):  # which share the segments of a block
        torch.set_num_threads(threads)
        q, *rest = case(ATTENTION, "longer than a segment", dtype)
        clean = cpp(ops, "sink_attention")(q, *rest)
        rest[1][1] = torch.nan  # the second of three new tokens
        dirty = cpp(ops, "sink_attention")(q, *rest)
        assert dirty[1:3].isnan().all()
        assert torch.equal(dirty[0], clean[0]) and torch.equal(dirty[3:], clean[3:])
    for name, threads in (("strips of all heights", 4), ("window longer than a tile", 1), ("window longer than a tile", 4)):
        torch.set_num_threads(threads)
        q, *rest = case(ATTENTION, name, dtype)
        clean, starts, window = cpp(ops, "sink_attention")(q, *rest), rest[5], rest[9]
        for token in range(len(q)):  # at even places and at odd ones
            values = rest[1].clone()
            values[token] = torch.inf
            dirty = cpp(ops, "sink_attention")(q, rest[0], values, *rest[2:])
            seen = torch.zeros(len(q), dtype=torch.bool)
            seen[token : min(token + window, int(starts[torch.bucketize(token, starts, right=True)]))] = True
            assert torch.equal(~(dirty == clean).flatten(1).all(1), seen)


def test_bfloat16_rounds_ties_to_even(ops: OpsBuild) -> None:
    x = torch.arange(0x3F80, 0x3F90, dtype=torch.int16).view(torch.bfloat16).view(1, 1, 16)
    args = x, x, torch.zeros(1, dtype=torch.int64), torch.ones(8), 1 + 2.0**-8  # 1 becomes the middle between two neighbours
    for got, expected in zip(cpp(ops, "rotary_embedding")(*args), torch.ops.oxfuse.rotary_embedding(*args), strict=True):
        assert torch.equal(got, expected)
    assert float(got[0, 0, 0]) == 1.0


def test_a_token_does_not_depend_on_its_company(ops: OpsBuild) -> None:
    for name in (
        "many tokens",
        "columns, longer than a panel is deep",
        "packed, more than are streamed",
        "longer than a chunk",
        "packed, longer than a chunk",
        "all tokens on one expert",
    ):
        x, *rest = case(MOE, name)
        together, alone = cpp(ops, "moe_dispatch")(x, *rest), [cpp(ops, "moe_dispatch")(row[None], *rest) for row in x]
        assert torch.equal(together, torch.cat(alone))


def test_a_sequence_does_not_depend_on_how_it_is_cut(ops: OpsBuild) -> None:
    assert_cuts_do_not_matter(ops, torch.float32, block_size=8)


def assert_cuts_do_not_matter(ops: OpsBuild, dtype: torch.dtype, block_size: int) -> None:
    torch.manual_seed(0)
    length, size = 700, block_size  # more than a segment
    q, k, v = (torch.randn(length, n, 16).to(dtype) for n in (6, 2, 2))
    sink = torch.randn(6)
    results = []
    for window in (0, 33):
        for threads, cuts in ((1, (700,)), (1, (1, 60, 1, 449, 2, 187)), (5, (699, 1))):
            torch.set_num_threads(threads)
            blocks, rows, done = 2 + length // size, [], 0
            caches = [torch.full((blocks, 2, *tail), torch.nan, dtype=dtype) for tail in ((16, size), (size, 16))]
            for count in cuts:
                part = slice(done, done + count)
                done += count
                starts, lengths, table = torch.tensor([0, count]), torch.tensor([done]), torch.arange(1, blocks)[None]
                slots = torch.arange(size + part.start, size + part.stop)
                index = starts, lengths, slots, table
                rows.append(cpp(ops, "sink_attention")(q[part], k[part], v[part], sink, *caches, *index, window, 0.25))
            results.append(torch.cat(rows))
    for a, b in zip(results, [results[0]] * 3 + [results[3]] * 3, strict=True):
        assert torch.equal(a, b)


def test_many_steps_of_one_large_batch(ops: OpsBuild) -> None:
    """More routed rows than fit the bound on temporary memory: the tokens are taken in several steps."""
    torch.manual_seed(0)
    hidden, width, tokens = 8, 16384, 600
    weights = torch.randn(2, 2 * width, hidden) * 0.1, torch.randn(2, hidden, width) * 0.01
    args = (
        torch.randn(2, hidden),
        torch.randn(2),
        weights[0],
        None,
        torch.zeros(2, 2 * width),
        weights[1],
        None,
        torch.zeros(2, hidden),
    )
    x = torch.randn(8, hidden).repeat(tokens * 2 // 8, 1)
    got = cpp(ops, "moe_dispatch")(x, *args, 2, 1.702, 7.0)
    assert torch.equal(got, cpp(ops, "moe_dispatch")(x[:8], *args, 2, 1.702, 7.0).repeat(tokens * 2 // 8, 1))


def test_attention_refuses(ops: OpsBuild) -> None:
    names = ["q", "k", "v", "sink", "k_cache", "v_cache", "query_start", "kv_lens", "slots", "block_table", "window", "scale"]

    def refused(match: str, **changes: object) -> None:
        args = dict(zip(names, case(ATTENTION, "decode"), strict=True)) | changes
        with pytest.raises(RuntimeError, match=match):
            cpp(ops, "sink_attention")(*args.values())

    q, k, v, _, k_cache, v_cache, *_ = case(ATTENTION, "decode")
    refused("k_cache must be a contiguous", k_cache=k_cache.transpose(1, 2).contiguous().transpose(1, 2))
    refused("v has dtype", v=v.bfloat16())
    wide = {name: x.double() for name, x in zip(("q", "k", "v", "k_cache", "v_cache"), (q, k, v, k_cache, v_cache), strict=True)}
    refused("q has dtype ScalarType 7, expected float32 or bfloat16", **wide)
    refused("slots has shape", slots=torch.tensor([8, 9]))
    refused("slot 10000 is outside", slots=torch.tensor([10000]))
    refused("slot -2 is outside", slots=torch.tensor([-2]))
    refused("block_table names block 99", block_table=torch.full((1, 4), 99))
    refused("needs more than", kv_lens=torch.tensor([1000]))
    refused("query_start must rise", query_start=torch.tensor([0, 2]))
    refused("an index tensor has dtype", kv_lens=torch.tensor([12], dtype=torch.int32))
    refused("sink has shape", sink=torch.zeros(3))
    refused("cannot share", q=torch.randn(1, 5, 16), sink=None)


def test_moe_refuses(ops: OpsBuild) -> None:
    x, router, *rest = case(MOE, "packed, one token")
    with pytest.raises(RuntimeError, match="x must end in the router's 64 features"):
        cpp(ops, "moe_dispatch")(x[:, :32], router, *rest)
    with pytest.raises(RuntimeError, match="both or neither"):
        cpp(ops, "moe_dispatch")(x, router, *rest[:2], None, *rest[3:])
    with pytest.raises(RuntimeError, match="gate_up_scales has shape"):
        cpp(ops, "moe_dispatch")(x, router, rest[0], rest[1], rest[2][:, :-1], *rest[3:])
    with pytest.raises(RuntimeError, match="weights must be contiguous"):
        cpp(ops, "moe_dispatch")(x, router.T.contiguous().T, *rest)
    _, _, _, dense, none, *others = case(MOE, "one token")
    with pytest.raises(RuntimeError, match="experts' weights must be contiguous, as rows or as columns"):
        columns = dense.transpose(1, 2).contiguous().transpose(1, 2)
        cpp(ops, "moe_dispatch")(*case(MOE, "one token")[:3], columns, none, *others)
    with pytest.raises(RuntimeError, match="top_k 9 of 4"):
        cpp(ops, "moe_dispatch")(x, router, *rest[:-3], 9, *rest[-2:])
