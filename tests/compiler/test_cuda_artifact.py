"""`oxfuse compile --target cuda:sm_90` without such a GPU: the artifact, its report, and its refusal to load here."""

from __future__ import annotations

import json
import shutil
from importlib.resources import files
from pathlib import Path

import pytest

import oxfuse
from oxfuse.compiler.lowering.anatomy import Anatomy
from oxfuse.compiler.options import CompileOptions
from oxfuse.errors import UserError
from oxfuse.runtime.manifest import read_manifest

from ..runtime.commands import run

BUNDLED = Path(str(files("oxfuse.artifacts") / "tiny-gpt-oss"))
LAUNCHES = 8
"""Most kernels that a layer may launch while decoding."""


def test_several_gpus_are_one_target() -> None:
    assert CompileOptions().archs == () and CompileOptions().device == "cpu"
    both = CompileOptions(target="cuda:sm_90,sm_80", dtype="float16")
    assert both.archs == (80, 90) and both.device == "cuda"
    for wrong in ("cuda", "cuda:", "cuda:sm_70", "cuda:sm_80,", "cuda:sm_80,cuda:sm_90", "cuda:90"):
        with pytest.raises(UserError, match=r"targets: cpu, .*cuda:sm_80,sm_90"):
            CompileOptions(target=wrong)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return oxfuse.compile(BUNDLED, tmp_path_factory.mktemp("cuda") / "artifact", target="cuda:sm_90")


@pytest.mark.slow
def test_the_artifact(artifact: Path) -> None:
    manifest = read_manifest(artifact)
    assert [(p.name, p.target, p.path) for p in manifest.programs] == [
        ("step", "cuda:sm_90", "programs/cuda_sm_90/step"),
        ("decode", "cuda:sm_90", "programs/cuda_sm_90/decode"),
    ]
    step, decode = manifest.programs
    assert [spec.name for spec in step.inputs] == [spec.name for spec in decode.inputs]
    assert decode.dims["T"] == decode.dims["N"] and decode.dims["T"].max == 8 < step.dims["T"].max
    assert manifest.requirements.gpu_archs == ("sm_90",) and manifest.requirements.cpu_isa == "x86-64-v3"
    assert manifest.cache.block_size == 64 and manifest.ops_library is None and manifest.golden is not None
    stored = {name for file in manifest.weights for name in file.tensors}
    assert {*step.constants.values(), *decode.constants.values()} == stored
    assert sum(path.stat().st_size for path in (artifact / "programs").rglob("*")) < 40e6


@pytest.mark.slow
def test_what_is_inside(artifact: Path) -> None:
    report = json.loads((artifact / "report.json").read_text())
    assert report["parity"]["rms"] is None and "GPU" in report["parity"]["reason"]
    for program in report["programs"]:
        anatomy = Anatomy.from_json(program["anatomy"])
        assert anatomy.archs == ("sm_90a",) and not anatomy.cache_copies
        assert not [call for call in anatomy.torch_calls if "attention" in call], anatomy.torch_calls
        for kernel in anatomy.kernels:
            assert not kernel.stack_bytes and not kernel.float64, kernel
        if program["name"] == "decode":
            assert anatomy.period("qkv_rotary_kernel") <= LAUNCHES, anatomy.sequence
            assert not anatomy.torch_calls
    text = (artifact / "report.md").read_text()
    assert "### Kernels of decode for cuda:sm_90" in text and "Not measured" in text


@pytest.mark.slow
def test_it_does_not_load_here(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sm_90") as refused:
        oxfuse.load(artifact)
    assert "compile" in str(refused.value)
    for command in (("generate", artifact, "-p", "x"), ("verify", artifact)):
        ran = run(*command)
        assert ran.code == 2 and ran.err.count("\n") == 1 and "sm_90" in ran.err
    assert run("inspect", artifact).code == 0
    copy = Path(shutil.copytree(artifact, tmp_path / "copy"))
    library = copy / "programs/cuda_sm_90/decode/program.so"
    library.write_bytes(library.read_bytes()[:-1])
    assert run("verify", copy).code == 2
