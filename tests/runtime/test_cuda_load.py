"""From an artifact to a GPU, as far as that goes without one: which GPU, how much memory, weights, and programs run in C."""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from oxfuse.errors import InternalError, UserError
from oxfuse.runtime import artifact as artifact_module
from oxfuse.runtime import host, upload
from oxfuse.runtime.artifact import check_targets, choose_programs, load
from oxfuse.runtime.cache_size import PREFILL_CHUNK, least_cache, size_cache
from oxfuse.runtime.device_load import device_engine
from oxfuse.runtime.gpus import Gpu, Gpus, choose_gpu, find_gpus, gpu_misfits
from oxfuse.runtime.library import Library
from oxfuse.runtime.manifest import CacheGroup, CacheSpec, Limits, ProgramSpec, read_manifest
from oxfuse.runtime.memory_plan import RESERVE, Room, plan_caches, step_limits, workspace_bytes
from oxfuse.runtime.model import CompiledModel
from oxfuse.runtime.program import DeviceProgram, Program
from oxfuse.runtime.upload import lay_out, upload_weights
from oxfuse.runtime.weights import map_tensors

from .fake_accelerator import FakeAccelerator
from .tiny_artifact import VOCAB

A100 = Gpu(index=0, name="NVIDIA A100", arch="sm_80")
H100 = Gpu(index=1, name="NVIDIA H100", arch="sm_90")
H200 = Gpu(index=2, name="NVIDIA H200", arch="sm_90")
ALL = Gpus(found=(A100, H100, H200), driver=(13, 0))


def edited(folder: Path, change: Callable[[dict], object]) -> Path:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def for_gpu(folder: Path, *archs: str, decode: bool = True) -> Path:
    """Let the artifact say that it is for GPUs. Its programs stay what they are."""

    def change(manifest: dict) -> None:
        (step,) = manifest["programs"]
        step["dims"]["N"] = {"min": 1, "max": 3}
        names = ("step", "decode") if decode else ("step",)
        manifest["programs"] = [{**step, "name": name, "target": f"cuda:{arch}"} for arch in archs for name in names]
        manifest["requirements"]["gpu_archs"] = [*archs]

    return edited(folder, change)


# --- which GPU


@pytest.mark.parametrize(
    ("archs", "device", "current", "index"),
    [
        (["sm_80"], None, None, 0),
        (["sm_90"], None, None, 1),
        (["sm_90"], "cuda", None, 1),
        (["sm_90"], None, 2, 2),
        (["sm_90"], None, 0, 1),
        (["sm_90"], "cuda:2", 1, 2),
        (["sm_80", "sm_90"], "cuda", 1, 1),
        (["sm_80", "sm_90"], "cuda:0", None, 0),
    ],
)
def test_choice_of_the_gpu(archs: list[str], device: str | None, current: int | None, index: int) -> None:
    assert choose_gpu(archs, device, ALL, current).index == index


@pytest.mark.parametrize(
    ("archs", "device", "words"),
    [
        (["sm_100"], None, ("compiled for sm_100", "cuda:0, NVIDIA A100, sm_80; cuda:1")),
        (["sm_90"], "cuda:0", ("NVIDIA A100, sm_80 is not of sm_90", "--target cuda:sm_80")),
        (["sm_90"], "cuda:3", ("cuda:3", "cuda:2, NVIDIA H200")),
        (["sm_90"], "gpu", ("'gpu'", "'cuda:N'")),
        (["sm_90"], "cuda:", ("'cuda:'",)),
        (["sm_90"], "cuda:99999", ("'cuda:99999'",)),
    ],
)
def test_gpus_that_do_not_fit(archs: list[str], device: str | None, words: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refusal:
        choose_gpu(archs, device, ALL)
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_what_a_machine_lacks() -> None:
    assert gpu_misfits(["sm_90"], ALL, "13.0") == gpu_misfits(["sm_80", "sm_100"], ALL, "12.9") == []
    (cpu_build,) = gpu_misfits(["sm_90"], ALL, "")
    assert "torch is its CPU build" in cpu_build and "install its CUDA build" in cpu_build
    none = gpu_misfits(["sm_80", "sm_90"], Gpus(problem="there is no NVIDIA driver here"), "")
    assert len(none) == 2 and "no NVIDIA driver here, a GPU of sm_80 or sm_90 is needed" in none[1]
    (other,) = gpu_misfits(["sm_100"], ALL, "13.0")
    assert "not of sm_100" in other and "compile with --target cuda:sm_80,sm_90" in other and "NVIDIA H200" in other
    (old,) = gpu_misfits(["sm_90"], Gpus(found=(H100,), driver=(12, 8)), "13.0")
    assert "runs CUDA up to 12.8, torch was built for CUDA 13.0: update the driver" in old


DRIVER = """
#include <stdio.h>
#include <string.h>
int cuInit(unsigned f) { return %(init)d; }
int cuDriverGetVersion(int *v) { *v = 13010; return 0; }
int cuDeviceGetCount(int *n) { *n = %(count)d; return 0; }
int cuDeviceGet(int *d, int i) { *d = i + 7; return 0; }
int cuDeviceGetName(char *s, int n, int d) { snprintf(s, n, "GPU of %%d", d); return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 8 + d - 7 : a == 76 ? (d == 8 ? 0 : 6) : -1; return 0; }
int cuGetErrorName(int e, const char **s) { *s = e == 100 ? "CUDA_ERROR_NO_DEVICE" : 0; return 0; }
"""


@pytest.fixture
def driver(tmp_path: Path) -> Callable[..., str]:
    def build(init: int = 0, count: int = 2) -> str:
        path = tmp_path / f"libcuda{init}_{count}.so.1"
        code = DRIVER % {"init": init, "count": count}
        subprocess.run(["gcc", "-shared", "-fPIC", "-xc", "-", "-o", path], input=code.encode(), check=True)
        return str(path)

    return build


def test_the_driver_is_asked(driver: Callable[..., str]) -> None:
    found = find_gpus(driver())
    assert found.driver == (13, 1) and not found.problem
    assert [str(gpu) for gpu in found.found] == ["cuda:0, GPU of 7, sm_86", "cuda:1, GPU of 8, sm_90"]
    assert "shows no GPU" in find_gpus(driver(count=0)).problem
    assert find_gpus(driver(init=100)) == Gpus(problem="the NVIDIA driver finds no GPU that it can use (CUDA_ERROR_NO_DEVICE)")
    assert "code 3" in find_gpus(driver(init=3)).problem
    assert "no NVIDIA driver" in find_gpus("libcuda_that_nobody_has.so.1").problem


def test_what_torch_was_built_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.torch_cuda() == (torch.version.cuda or "")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise AssertionError('nobody is to import this')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    for text, version in (
        ("cuda: Optional[str] = '13.0'", "13.0"),
        ('cuda = "12.8"\nhip = None', "12.8"),
        ("cuda: Optional[str] = None", ""),
        ("", ""),
    ):
        (tmp_path / "torch" / "version.py").write_text(f"__version__ = '2.13.0'\n{text}\nhip: Optional[str] = None\n")
        assert host.torch_cuda() == version
    monkeypatch.setattr(host.importlib.util, "find_spec", lambda name: None)
    assert host.torch_cuda() == ""


# --- what an artifact holds


def test_targets_are_those_that_are_stated(copy: Path) -> None:
    assert check_targets(read_manifest(copy), None) == check_targets(read_manifest(copy), "cpu") == "cpu"
    with pytest.raises(UserError, match=r"no program for 'cuda:1', only for cpu: compile with --target cuda:sm_90"):
        check_targets(read_manifest(copy), "cuda:1")
    manifest = read_manifest(for_gpu(copy, "sm_80", "sm_90"))
    assert check_targets(manifest, None) == check_targets(manifest, "cuda:3") == "cuda"
    with pytest.raises(UserError, match="no program for 'cpu', only for cuda:sm_80, cuda:sm_90: compile with --target 'cpu'"):
        check_targets(manifest, "cpu")
    assert choose_programs(manifest, "cuda:sm_80").keys() == {"step", "decode"}
    assert all(p.target == "cuda:sm_80" for p in choose_programs(manifest, "cuda:sm_80").values())
    for archs in (["sm_90"], ["sm_80", "sm_90", "sm_100"], []):
        edited(copy, lambda m, archs=archs: m["requirements"].update(gpu_archs=archs))
        with pytest.raises(UserError, match=r"is for .*, its programs are for .*: it is damaged"):
            load(copy)
    edited(copy, lambda m: (m["requirements"].update(gpu_archs=["sm_80", "sm_90"]), m["programs"][0].update(name="stop")))
    with pytest.raises(UserError, match=r"\['decode', 'stop'\] for cuda:sm_80, expected a step program"):
        choose_programs(read_manifest(copy), "cuda:sm_80")


@pytest.mark.skipif(torch.version.cuda is not None, reason="says what a CPU build of torch lacks")
def test_loading_without_a_gpu(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for_gpu(copy, "sm_90")
    with pytest.raises(UserError, match=r"does not fit this machine: torch is its CPU build.*a GPU of sm_90 is needed"):
        load(copy)
    monkeypatch.setattr(artifact_module, "find_gpus", lambda: Gpus(found=(A100,), driver=(13, 0)))
    with pytest.raises(UserError, match=r"NVIDIA A100, sm_80\) are not of sm_90.*--target cuda:sm_80"):
        load(copy, device="cuda")
    monkeypatch.setattr(artifact_module, "find_gpus", lambda: ALL)
    monkeypatch.setattr(host, "torch_cuda", lambda: "13.0")
    with pytest.raises(UserError, match="torch cannot use cuda:2, NVIDIA H200, sm_90: Torch not compiled with CUDA enabled"):
        load(copy, device=torch.device("cuda:2"))


def test_a_cpu_artifact_leaves_cuda_alone(artifact: Path) -> None:
    program = """
import sys, torch
import oxfuse
from oxfuse.runtime import artifact
artifact.find_gpus = None
model = oxfuse.load(sys.argv[1])
model.generate([1, 2, 3], max_new_tokens=2)
print(torch.cuda.is_initialized(), [m for m in sys.modules if m in ("oxfuse.runtime.cuda", "triton")])
"""
    run = subprocess.run([sys.executable, "-c", program, str(artifact)], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[0] == "False []"


# --- memory

SPEC = CacheSpec(
    block_size=64,
    dtype="bfloat16",
    kv_heads=(8,) * 4,
    head_dim=(64,) * 4,
    groups=(CacheGroup(window=0, layers=(0, 2)), CacheGroup(window=128, layers=(1, 3))),
)
LIMITS = Limits(max_context=32768, max_batch=4, max_step_tokens=2048)
PLAN = {"chunk": 1024, "reserve": 1024, "weights": 10**10, "workspace": 10**8}


def room(free: int) -> Room:
    return Room(device="cuda:0, NVIDIA H200, sm_90", free=free, total=150 * 10**9)


def test_caches_take_what_is_wanted_or_left() -> None:
    sizes = {"chunk": 1024, "reserve": 1024}
    whole, least = size_cache(SPEC, LIMITS, **sizes).bytes, least_cache(SPEC, LIMITS, **sizes).bytes
    assert whole > 20 * least > 10**7
    taken = PLAN["weights"] + PLAN["workspace"] + RESERVE
    assert plan_caches(SPEC, LIMITS, **PLAN, room=room(10**11)) == whole
    assert plan_caches(SPEC, LIMITS, **PLAN, room=room(taken + whole)) == whole
    assert plan_caches(SPEC, LIMITS, **PLAN, room=room(taken + whole - 1)) == whole - 1
    assert plan_caches(SPEC, LIMITS, **PLAN, room=room(taken + least)) == least
    assert size_cache(SPEC, LIMITS, **sizes, cache_bytes=least).bytes == least
    assert plan_caches(SPEC, LIMITS, **PLAN, room=room(10**11), cache_bytes=10**8) <= 10**8
    assert plan_caches(SPEC, LIMITS, **PLAN, room=room(10**11), cache_bytes=10**12) == whole


def test_memory_that_is_too_small_is_told_in_bytes() -> None:
    least = least_cache(SPEC, LIMITS, chunk=1024, reserve=1024).bytes
    needed = 10**10 + 10**8 + RESERVE + least
    with pytest.raises(UserError) as refusal:
        plan_caches(SPEC, LIMITS, **PLAN, room=room(needed - 1))
    for number in (needed - 1, 150 * 10**9, needed, 10**10, least, 10**8, RESERVE):
        assert f"{number:,}" in str(refusal.value), number
    assert "cuda:0, NVIDIA H200, sm_90 has" in str(refusal.value) and "prefill chunk of 1024 tokens" in str(refusal.value)
    asked = size_cache(SPEC, LIMITS, chunk=1024, reserve=1024, cache_bytes=4 * 10**8).bytes
    with pytest.raises(UserError) as refusal:
        plan_caches(SPEC, LIMITS, **PLAN, room=room(needed + 10**8), cache_bytes=4 * 10**8)
    for word in ("cache_bytes 400000000", f"{asked:,}", f"give a cache_bytes of {least + 10**8} or less"):
        assert word in str(refusal.value), word
    with pytest.raises(UserError, match="cache_bytes is 5; the smallest cache"):
        plan_caches(SPEC, LIMITS, **PLAN, room=room(10**11), cache_bytes=5)


def test_workspace(artifact: Path) -> None:
    for context, batch, tokens, most in ((4096, 8, 8192, 2048), (4096, 3000, 8192, 3000), (4096, 8, 100, 100), (9, 8, 8192, 72)):
        limits = Limits(max_context=context, max_batch=batch, max_step_tokens=tokens)
        assert step_limits(limits).max_step_tokens == most
    assert step_limits(Limits(max_context=32768, max_batch=1, max_step_tokens=8192)).max_step_tokens == PREFILL_CHUNK
    program = read_manifest(artifact).programs[0]
    logits = 128 * VOCAB * (4 + 4)
    assert workspace_bytes(program, LIMITS) == logits + 2048 * (256 << 10)


# --- weights


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "STAGING_BYTES", 1000)
    monkeypatch.setattr(upload, "READ_BYTES", 300)


def weight_files(folder: Path) -> tuple[list[Path], dict[str, torch.Tensor]]:
    make = torch.Generator().manual_seed(0)
    tensors = {
        "a": torch.randn(3, 70, generator=make),
        "b": torch.randint(0, 255, (999,), dtype=torch.uint8, generator=make),
        "c": torch.randn(2, 3, 5, generator=make).bfloat16(),
        "d": torch.tensor(4.5),
        "e": torch.randn(31, 40, generator=make).half(),
        "f": torch.empty(0, 4),
        "g": torch.arange(600),
    }
    paths = [folder / "one.safetensors", folder / "two.safetensors"]
    save_file({name: tensors[name] for name in "gafcd"}, paths[0])
    save_file({name: tensors[name] for name in "be"}, paths[1])
    return paths, tensors


@pytest.mark.usefixtures("small_pieces")
def test_weights_arrive_as_they_are(tmp_path: Path) -> None:
    paths, tensors = weight_files(tmp_path)
    layout, accelerator, read = lay_out(paths, {*"abcdefg"}), FakeAccelerator(), list[int]()
    found = upload_weights(layout, accelerator, read.append)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor) and found[name].is_contiguous()
        assert found[name].data_ptr() % 64 == 0 and layout.places[name].begin % 256 == 0
    assert accelerator.uploads == -(-layout.bytes // 1000) > 7
    assert sum(read) == sum(t.numel() * t.itemsize for t in tensors.values()) and max(read) <= 300
    one = found["a"].untyped_storage()
    assert all(t.untyped_storage().data_ptr() == one.data_ptr() for t in found.values()) and one.nbytes() == layout.bytes
    some = upload_weights(lay_out(paths, {"e", "d"}), FakeAccelerator())
    assert some.keys() == {"d", "e"} and torch.equal(some["e"], tensors["e"])


@pytest.mark.usefixtures("small_pieces")
def test_buffers_are_not_filled_while_they_are_copied(tmp_path: Path) -> None:
    """The fake copies as late as it may: when it is waited for."""
    paths, tensors = weight_files(tmp_path)
    waited = list[int]()

    class Slow(FakeAccelerator):
        def upload(self, target: torch.Tensor, source: torch.Tensor) -> Callable[[], None]:
            number, copy = self.uploads, super().upload(target, source)

            def wait() -> None:
                waited.append(number)
                copy()

            return wait

    found = upload_weights(lay_out(paths, {*"abcdefg"}), Slow())
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert sorted(waited) == [*range(len(waited))], "each is waited for once"


@pytest.mark.usefixtures("small_pieces")
def test_weights_that_end_too_early(tmp_path: Path) -> None:
    paths, _ = weight_files(tmp_path)
    layout = lay_out(paths, {*"abcdefg"})
    paths[1].write_bytes(paths[1].read_bytes()[:-700])
    with pytest.raises(UserError, match=r"two\.safetensors ended at byte \d+ while it was read: the artifact is damaged"):
        upload_weights(layout, FakeAccelerator())
    paths[1].unlink()
    with pytest.raises(UserError, match=r"two\.safetensors cannot be read: No such file"):
        upload_weights(layout, FakeAccelerator())


# --- programs


@pytest.fixture
def program(artifact: Path) -> tuple[ProgramSpec, dict[str, torch.Tensor]]:
    manifest = read_manifest(artifact)
    return manifest.programs[0], {n: t.clone() for n, t in map_tensors(artifact / manifest.weights[0].path).items()}


def test_a_program_through_its_c_interface(artifact: Path) -> None:
    """Steps, decodes and replays of a real library give what torch's own runner gives."""
    manifest = read_manifest(artifact)
    step = manifest.programs[0]
    programs = {"step": step, "decode": ProgramSpec(**{**vars(step), "name": "decode", "dims": {"N": step.dims["T"]}})}
    accelerator, told = FakeAccelerator(), list[float]()
    engine = device_engine(artifact, manifest, programs, accelerator, progress=told.append)
    model = CompiledModel(engine, vocab_size=VOCAB)
    assert told == sorted(told) and 0.9 < told[-1] <= 1
    expected = load(artifact)
    make = random.Random(0)
    prompts = [[make.randrange(VOCAB) for _ in range(n)] for n in (1, 9, 20)]
    assert_close(model.logits(prompts), expected.logits(prompts), rtol=0, atol=1e-4)
    new = {"max_new_tokens": 10}
    assert [g.token_ids for g in model.generate(prompts, **new)] == [g.token_ids for g in expected.generate(prompts, **new)]
    assert accelerator.replays >= 9 and accelerator.records == 1
    assert engine.used_blocks == 0


def test_a_refusal_comes_before_anything_is_allocated(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    accelerator = FakeAccelerator(free=10**8)
    with pytest.raises(UserError, match=r"has 100,000,000 bytes free of .* weights 33,558,528, the smallest cache"):
        device_engine(artifact, manifest, {"step": manifest.programs[0]}, accelerator)
    assert not accelerator.uploads


def owners(tensor: torch.Tensor) -> int:
    """How many tensors keep the memory."""
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]


def test_weights_are_borrowed_and_let_go(artifact: Path, program: tuple[ProgramSpec, dict[str, torch.Tensor]]) -> None:
    spec, weights = program
    accelerator = FakeAccelerator()
    alone = [owners(tensor) for tensor in weights.values()]
    step = DeviceProgram(artifact, spec, weights, accelerator)
    zeros = [torch.zeros(1, dtype=torch.long) for _ in range(2)]
    shapes = {"query_start": (2,), "kv_lens": (1,), "slots": (1, 1), "block_tables": (1, 1, 1), "rows": (1,)}
    flat = [*zeros, *(torch.ones(shape, dtype=torch.long) for shape in shapes.values())]
    flat[2][0], flat[4][0, 0], flat[6][0] = 0, 4, 0
    caches = [torch.zeros(3, 1, 1024, 4), torch.zeros(3, 1, 4, 1024)]
    with accelerator.active():
        before = step([*flat, *caches])
        assert caches[0].any() and caches[1].any(), "caches are written in place"
        weights["head.weight"] *= 2
        assert_close(step([*flat, *caches]), 2 * before)
        with pytest.raises(InternalError, match="2 inputs were given, 9 are expected"):
            step(flat[:2])
    del step
    gc.collect()
    assert [owners(tensor) for tensor in weights.values()] == alone, "the library keeps weights for ever"


def test_libraries_that_are_refused(copy: Path, program: tuple[ProgramSpec, dict[str, torch.Tensor]]) -> None:
    spec, weights = program
    with pytest.raises(UserError, match="wants the constant phase, which the manifest maps to nothing"):
        constants = {name: stored for name, stored in spec.constants.items() if name != "phase"}
        DeviceProgram(copy, ProgramSpec(**{**vars(spec), "constants": constants}), weights, FakeAccelerator())
    with pytest.raises(UserError, match=r"with dtype code 6, phase is torch\.float64"):
        DeviceProgram(copy, spec, {**weights, "phase": weights["phase"].double()}, FakeAccelerator())
    with pytest.raises(UserError, match="takes 9 inputs and gives 1 outputs, the manifest says 8 and 1"):
        DeviceProgram(copy, ProgramSpec(**{**vars(spec), "inputs": spec.inputs[1:]}), weights, FakeAccelerator())
    library = copy / spec.path / spec.library
    Program(copy, spec, weights)
    with pytest.raises(RuntimeError, match="Invalid device"):
        Library(library, "toaster")  # type: ignore[arg-type]
    library.with_suffix(".json").write_text('{"nodes": [{"name": "x"}, {}]}')
    with pytest.raises(InternalError, match="calls 2 operators by name"):
        Library(library, torch.device("cpu"))
    library.with_suffix(".json").unlink()
    library.unlink()
    library.write_bytes(b"nothing")  # another file of that name, while the first one is still in use
    with pytest.raises(UserError, match=r"cannot be loaded: .*Compile the checkpoint again for this GPU and torch"):
        DeviceProgram(copy, spec, weights, FakeAccelerator())
    with pytest.raises(UserError, match=r"cannot be loaded: .*Compile the checkpoint again on this machine"):
        Program(copy, spec, weights)
