"""Lowering for GPUs on a machine without one: what comes out, what is inside, and what is refused."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import export

from oxfuse.compiler.lowering import aoti, cuda, cuda_requirements
from oxfuse.compiler.lowering.anatomy import (
    Anatomy,
    Kernel,
    cache_copies,
    constant_names,
)
from oxfuse.compiler.lowering.cuda_requirements import why_not
from oxfuse.compiler.process_memory import MemoryWatch
from oxfuse.errors import InternalError, UserError

from ..checkpoints import random_gpt_oss
from ..neox import random_gpt_neox
from .cuda_programs import TOY_OPS, Toy, assert_loads, step_program, toy_program

pytestmark = pytest.mark.skipif(bool(why_not(90, os.environ)), reason="; ".join(map(str, why_not(90, os.environ))))
LEVEL = "x86-64-v3"
Built = tuple[aoti.Lowered, Anatomy]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Built:
    with MemoryWatch() as watch:
        program = toy_program(width=1 << 24)
        built = cuda.lower_cuda(program, tmp_path_factory.mktemp("toy") / "program", 90, LEVEL, modules=[TOY_OPS], native=False)
    weights = sum(value.nbytes for value in program.state_dict.values())
    assert weights > 4e9 and (not watch.samples or watch.peak.unavoidable < weights / 2), watch.peak
    return built


def test_library_needs_what_a_gpu_machine_has_and_finds_it(toy: Built, tmp_path: Path) -> None:
    lowered, anatomy = toy
    assert {"libcuda.so.1", "libtorch_cuda.so", "libtorch_cpu.so"} <= set(anatomy.needed)
    assert not {name for name in anatomy.needed if name.startswith("libcudart")}, (
        "it would bind the program to a toolkit's version"
    )
    assert_loads(lowered.folder / lowered.library, tmp_path / "stubs")


def test_library_that_lacks_a_symbol_does_not_load(tmp_path: Path) -> None:
    """The control of the test above: a name that no library has is noticed."""
    import subprocess

    library = tmp_path / "program.so"
    code = "int no_such_function(void); int AOTInductorModelContainerCreateWithDevice(void) { return no_such_function(); }"
    subprocess.run(["g++", "-shared", "-fPIC", "-xc", "-", "-o", library], input=code, text=True, check=True)
    with pytest.raises(AssertionError, match="no_such_function"):
        assert_loads(library, tmp_path / "stubs")


def test_library_holds_its_kernels_and_names_no_folder_of_this_machine(toy: Built) -> None:
    lowered, anatomy = toy
    assert anatomy.archs == ("sm_90a",)
    files = {path.name: path.read_bytes() for path in lowered.folder.iterdir()}
    assert not [name for name in files if name.endswith(".cubin")]
    assert len(re.findall(rb"\x7fELF.{14}\xbe\0", files[lowered.library], re.DOTALL)) == len(
        anatomy.kernels
    )  # machine 190: a cubin
    for name, data in files.items():
        paths = {
            path for path in re.findall(rb"(?:/[\w.+@-]+){2,}", data) if Path(os.fsdecode(b"/" + path.split(b"/")[1])).is_dir()
        }
        assert not paths, (name, sorted(paths)[:10])


def test_toy_has_three_kernels_and_no_copy(toy: Built) -> None:
    _, anatomy = toy
    assert anatomy.cache_copies == ()
    append, norm, silu = anatomy.kernels
    assert append.name == "toy_append_kernel_0" and norm.name.startswith("triton_per_") and silu.name.startswith("triton_poi_")
    assert anatomy.sequence == (append.name, norm.name, "addmm_out", silu.name, "addmm_out"), anatomy.sequence
    assert anatomy.launches == 3 and anatomy.torch_calls == {"cuda_addmm_out": 2}
    for kernel in anatomy.kernels:
        assert kernel.float64 == () and kernel.stack_bytes == 0 and 0 < kernel.registers <= 255, kernel
    assert [kernel.int64 for kernel in anatomy.kernels] == [(), (), ("xnumel",)]  # 8192 rows of 2^24
    assert Anatomy.from_json(json.loads(json.dumps(anatomy.to_json()))) == anatomy


@pytest.mark.slow
def test_copied_cache_and_float64_are_seen(tmp_path: Path) -> None:
    """The controls: reading the cache as it was before makes a copy of it, a Python float makes an fp64."""
    _, anatomy = cuda.lower_cuda(toy_program(broken=True), tmp_path / "program", 80, LEVEL, modules=[TOY_OPS], native=False)
    assert anatomy.archs == ("sm_80",)
    assert len(anatomy.cache_copies) == 1 and "buffer" in anatomy.cache_copies[0], anatomy.cache_copies
    assert {kernel.name: kernel.float64 for kernel in anatomy.kernels if kernel.float64} == {"toy_scale_kernel_1": ("scale",)}


@pytest.mark.slow
def test_this_process_lowers_for_the_cpu_afterwards_with_the_same_constants(toy: Built, tmp_path: Path) -> None:
    program = toy_program(width=1 << 24)
    before = {name: value.data_ptr() for name, value in program.state_dict.items()}
    on_cpu = aoti.lower(program, tmp_path / "program", LEVEL)
    assert toy[0].constants == on_cpu.constants and "frequency" in on_cpu.constants
    assert before == {name: value.data_ptr() for name, value in program.state_dict.items()}
    assert not torch.cuda.is_available() or torch.version.cuda


@pytest.mark.skipif(not torch.cuda.is_available(), reason="runs programs on a GPU")
def test_native_and_cross_compiled_programs_do_the_same(tmp_path: Path) -> None:
    major, minor = torch.cuda.get_device_capability()
    model = Toy(256, False).requires_grad_(False)
    for value in (*model.parameters(), model.frequency):
        value.normal_(std=0.1, generator=torch.Generator().manual_seed(value.numel()))
    weights = {**dict(model.named_parameters(remove_duplicate=False)), "frequency": model.frequency}
    x, slots, cache = torch.randn(5, 64).bfloat16(), torch.arange(20, 25), torch.zeros(7, 16, 64, dtype=torch.bfloat16)
    results = []
    for native in (True, False):
        place = tmp_path / str(native)
        lowered, _ = cuda.lower_cuda(toy_program(), place, 10 * major + minor, LEVEL, modules=[TOY_OPS], native=native)
        runner = torch._C._aoti.AOTIModelContainerRunnerCuda(str(place / lowered.library), 1, "cuda:0", "")
        names = runner.get_constant_names_to_original_fqns()
        assert tuple(sorted(names.values())) == lowered.constants
        runner.update_constant_buffer({name: weights[own].cuda() for name, own in names.items()}, False, True)
        changed = cache.cuda()
        results.append((*runner.run([x.cuda(), slots.cuda(), changed]), changed))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.testing.assert_close(results[0][0].cpu(), model(x, slots, cache), rtol=0.03, atol=0.03)
    assert torch.equal(results[0][1].cpu(), cache) and torch.equal(cache.view(-1, 64)[slots], x)


def test_failure_in_the_other_process_is_told_and_harms_nothing(tmp_path: Path) -> None:
    program = toy_program()
    with pytest.raises(InternalError, match=r"sm_90 failed; the process ended with 1: ModuleNotFoundError: .*no_such_module"):
        cuda.lower_cuda(program, tmp_path / "program", 90, LEVEL, modules=[TOY_OPS, "no_such_module"])
    assert not (tmp_path / "program").exists()
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="A native build for sm_90 needs such a GPU; this machine has none"):
            cuda.lower_cuda(program, tmp_path / "program", 90, LEVEL, modules=[TOY_OPS], native=True)


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What packages claim to be; change it to let them claim something else."""
    found = {"torch": "2.13.0+cpu", "triton": "3.7.1"}

    def version(package: str) -> str:
        if package not in found:
            raise importlib.metadata.PackageNotFoundError(package)
        return found[package]

    monkeypatch.setattr(cuda_requirements.importlib.metadata, "version", version)
    return found


@pytest.mark.parametrize(
    ("torch_version", "triton_version", "says"),
    [
        ("2.11.0+cu130", "3.6.0", None),
        ("2.12.1", "3.7.1", None),
        ("2.13.0+cpu", "3.7.1", None),
        ("2.10.1", "3.5.1", "torch is 2.10.1; install one of these pairs: torch 2.11 with triton 3.6"),
        ("2.14.0", "3.8.0", "torch is 2.14.0; install one"),
        ("2.13.0", "3.6.0", "torch 2.13.0 goes with triton 3.7, and triton is 3.6.0; pip install 'triton==3.7.*'"),
        ("2.11.0", None, "torch 2.11.0 goes with triton 3.6, and there is none; pip install 'triton==3.6.*'"),
        (None, None, "torch is not installed; install one"),
    ],
)
def test_pairs_of_torch_and_triton(
    torch_version: str | None, triton_version: str | None, says: str | None, versions: dict[str, str]
) -> None:
    versions.clear()
    versions |= {name: v for name, v in (("torch", torch_version), ("triton", triton_version)) if v is not None}
    lacks = [str(lack) for lack in why_not(90, os.environ)]
    assert [lack for lack in lacks if says is None or says not in lack] == []
    assert len(lacks) == (says is not None)


def test_compiler_and_arch_that_are_not_there(tmp_path: Path) -> None:
    (lack,) = why_not(90, {**os.environ, "CXX": "no-such-compiler"})
    assert (
        str(lack) == "the C++ compiler no-such-compiler is not in PATH; install GCC 11 or later (Debian, Ubuntu: apt install g++)"
    )
    (lack,) = why_not(75, os.environ)
    assert str(lack) == "sm_75 is not an arch that oxfuse has kernels for; choose among sm_80, sm_90, sm_100"
    with pytest.raises(UserError, match=r"cannot build for sm_75: sm_75 is not .* `oxfuse doctor`"):
        cuda.lower_cuda(toy_program(), tmp_path / "program", 75, LEVEL)


def test_triton_without_its_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "triton")
    (lack,) = why_not(100, os.environ)
    assert str(lack).startswith(f"{tmp_path}/triton/backends/nvidia lacks bin/ptxas-blackwell, bin/cuobjdump, include/cuda.h")


SOURCE = """
Model::Model() : AOTInductorModelBase(3,
                                      1,
                                      2,
                                      device_str,
    constants_info_[0].name = "a_b";
    constants_info_[0].from_folded = false;
    constants_info_[0].original_fqn = "b.weight";
    constants_info_[1].name = "c";
    constants_info_[1].from_folded = false;
    constants_info_[1].original_fqn = "a.weight";
void Model::run_impl(
    auto arg0_1 = std::move(inputs[0]);
    auto arg2_1 = std::move(inputs[2]);
    int64_t s1 = arg0_1_size[0];
    int64_t s7 = arg2_1_size[0];
    const int64_t int_array_0[] = {s1, 64L};
    aoti_torch_empty_strided(2, int_array_0, int_array_1, cached_torch_dtype_bfloat16, &buf0_handle);
    aoti_torch_clone_preserve_strides(arg2_1, &arg2_1_aligned);
    call_first_0(arg0_1, buf0, s1, this->device_idx_, stream, kernels, this->cubin_dir_);
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_cuda_mm_out(buf1, buf0, b_weight));
    call_first_0(arg0_1, buf0, s1, this->device_idx_, stream, kernels, this->cubin_dir_);
"""


def test_generated_code_is_read() -> None:
    assert constant_names(SOURCE) == ("a.weight", "b.weight")
    assert cache_copies(SOURCE, {2}) == ()
    assert cache_copies(SOURCE, {0}) == ("a buffer of [s1, 64L]",)
    assert cache_copies(SOURCE + "aoti_torch_copy_(buf1, arg2_1, 0);", {2}) == ("aoti_torch_copy_",)
    assert cache_copies(SOURCE + "aoti_torch_clone(arg2_1, &buf1);", {2}) == ("aoti_torch_clone",)
    for broken in (
        SOURCE.replace("original_fqn", "fqn"),
        SOURCE.replace("2,\n", "3,\n"),
        SOURCE.replace("from_folded", "folded"),
    ):
        with pytest.raises(InternalError, match="constants"):
            constant_names(broken)
    with pytest.raises(InternalError, match="run_impl"):
        cache_copies(SOURCE.replace("run_impl", "run"), {2})


def test_period_is_the_longest_way_from_one_launch_to_the_next() -> None:
    kernel = Kernel(name="a", launches=3, warps=4, registers=32, stack_bytes=0, shared_bytes=0, float64=(), int64=())
    anatomy = Anatomy(
        archs=("sm_90a",),
        kernels=(kernel,),
        torch_calls={},
        sequence=("x", "a_0", "y", "a_1", "y", "z", "a_0"),
        cache_copies=(),
        needed=(),
    )
    assert anatomy.period("a_") == 3 and anatomy.launches == 3
    with pytest.raises(InternalError, match="x is launched 1 times"):
        anatomy.period("x")


class Writes(nn.Module):
    def forward(self, x: Tensor, caches: list[Tensor], slots: Tensor) -> Tensor:
        y = torch.ops.oxfuse_toy.append(x, caches[1], slots, 0.5)
        return torch.ops.oxfuse_toy.append(y, caches[0].view(-1, 4, 64), slots, 0.5)


def test_inputs_that_ops_write_to_are_found() -> None:
    caches = [torch.zeros(3, 4, 64) for _ in range(3)]
    program = export(Writes(), (torch.zeros(2, 64), caches, torch.arange(2)), strict=False)
    assert cuda.mutated_inputs(program) == (1, 2)


GPT_OSS = dict(
    num_hidden_layers=2, head_dim=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=64
)
NEOX = dict(hidden_size=128, num_attention_heads=4, intermediate_size=128)


def lowered_step(checkpoint: Path, kind: str, arch: int, place: Path, dtype: str = "bfloat16") -> Anatomy:
    """Lower a checkpoint's program and check what holds for every one."""
    lowered, anatomy = cuda.lower_cuda(step_program(checkpoint, kind, dtype=dtype), place / "program", arch, LEVEL, native=False)
    assert anatomy.archs == (f"sm_{arch}" + "a" * (arch >= 90),)
    assert anatomy.cache_copies == ()
    assert not [name for name in anatomy.torch_calls if "attention" in name or "sdp" in name or not name.startswith("cuda_")]
    assert {k.name: (k.float64, k.stack_bytes) for k in anatomy.kernels if k.float64 or k.stack_bytes} == {}
    assert_loads(lowered.folder / lowered.library, place / "stubs")
    return anatomy


def test_decode_of_gpt_oss_on_sm_90(tmp_path: Path) -> None:
    """At most 8 launches a layer, and of torch's own kernels none: a captured launch costs 1.3 µs in which no weight is read."""
    checkpoint = random_gpt_oss(tmp_path / "checkpoint", layout="mxfp4", **GPT_OSS)
    anatomy = lowered_step(checkpoint, "decode", 90, tmp_path)
    assert anatomy.period("decode_kernel") <= 8, anatomy.sequence
    assert set(anatomy.torch_calls) <= {"cuda_index_out", "cuda_index_select_out"}, anatomy.torch_calls


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.parametrize("layout", ["mxfp4", "hf"])
def test_decode_of_gpt_oss_on_other_archs(arch: int, layout: str, tmp_path: Path) -> None:
    anatomy = lowered_step(random_gpt_oss(tmp_path / "checkpoint", layout=layout, **GPT_OSS), "decode", arch, tmp_path)
    assert anatomy.period("decode_kernel") <= 8, anatomy.sequence


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_step_of_gpt_oss(arch: int, tmp_path: Path) -> None:
    lowered_step(random_gpt_oss(tmp_path / "checkpoint", layout="mxfp4", **GPT_OSS), "step", arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["step", "decode"])
@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_neox_on_sm_90(parallel: bool, kind: str, dtype: str, tmp_path: Path) -> None:
    checkpoint = random_gpt_neox(tmp_path / "checkpoint", use_parallel_residual=parallel, **NEOX)
    anatomy = lowered_step(checkpoint, kind, 90, tmp_path, dtype)
    if kind == "decode":
        assert anatomy.period("decode_kernel") <= (7 if parallel else 8) and not anatomy.torch_calls, anatomy.sequence
