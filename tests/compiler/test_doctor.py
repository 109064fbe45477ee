"""`oxfuse doctor` on machines that lack things: no compiler, a broken one, a torch that fails or dies, little memory."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from oxfuse.compiler import doctor
from oxfuse.compiler.choices import TARGETS
from oxfuse.compiler.doctor import Diagnosis, Finding, examine
from oxfuse.runtime.machine import Memory, Processors

from ..runtime.commands import finish, run, spawn

TORCH = {"threads": 2, "cuda": None, "gpus": [], "aoti": True}
HUB = {"endpoint": "https://huggingface.co", "offline": False, "cache": "/cache", "token": False}


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """What the probes answer, so that a test need not import torch; the machine has two processors and enough memory."""
    answers = {doctor.TORCH_PROBE: dict(TORCH), doctor.HUB_PROBE: dict(HUB)}
    monkeypatch.setattr(doctor, "_probe", lambda code, environment: answers[code])
    monkeypatch.setattr(doctor, "processors", lambda: Processors(model="A Chip", count=2, quota=None))
    monkeypatch.setattr(doctor, "memory", lambda: Memory(total=10**10, available=10**10, limit=None))
    return {"torch": answers[doctor.TORCH_PROBE], "hub": answers[doctor.HUB_PROBE]}


ONNX = ["onnx", "onnx-portable"]


def look(**environment: str) -> tuple[dict[str, Finding], Diagnosis]:
    found = examine({"PATH": os.environ["PATH"]} | environment, Path.cwd())
    return {finding.name: finding for finding in found.findings}, found


def test_a_machine_that_has_everything(probes: dict[str, dict[str, Any]]) -> None:
    by_name, found = look()
    assert found.can("run") and found.can("compile")
    assert {f.status for f in found.findings if f.name not in ("this folder", "temporary files")} == {"ok"}, found
    assert "g++" in by_name["C++ compiler"].found and "x86-64-v" in by_name["processor"].found
    assert "onnx " in by_name["onnx targets"].found and "onnxruntime-gpu " in by_name["onnx targets"].found
    assert by_name["cuda targets"].found == "cuda:sm_80, cuda:sm_90, cuda:sm_100 can be compiled"
    report = json.loads(found.to_json())
    assert report["can"] == {"compile": [*TARGETS], "run": ["cpu", *ONNX]} and len(report["findings"]) == len(found.findings)
    verdict = (
        "This machine can compile for cpu, cuda:sm_80, cuda:sm_90, cuda:sm_100, onnx, onnx-portable and run for cpu, onnx, "
        "onnx-portable."
    )
    assert doctor.lines(found)[-1] == ("ok", verdict)


def test_without_a_compiler(probes: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    by_name, found = look(PATH=str(tmp_path))
    assert by_name["C++ compiler"].status == "missing" and "apt install g++" in by_name["C++ compiler"].remedy
    assert found.can("run") and not found.can("compile") and json.loads(found.to_json())["can"]["compile"] == []
    assert doctor.lines(found)[-1][1].startswith("This machine can run for cpu, onnx, onnx-portable. It cannot compile")


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo 'g++ 4.8'; exit 1", "g++ 4.8: a program with -std=c++20 -O2 -fopenmp"),
        ("case $1 in --version) echo 'g++ 9';; *) echo 'fatal error: omp.h is missing' >&2; exit 1;; esac", "omp.h is missing"),
        (
            "case $1 in --version) echo 'g++ 9';; *) for o; do :; done; printf '#!/bin/sh\\nexit 3' > $o; chmod +x $o;; esac",
            "ends with 3",
        ),
    ],
)
def test_a_compiler_that_does_not_work(probes: dict[str, dict[str, Any]], tmp_path: Path, script: str, reason: str) -> None:
    (tmp_path / "g++").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "g++").chmod(0o755)
    by_name, found = look(PATH=f"{tmp_path}:{os.environ['PATH']}")
    finding = by_name["C++ compiler"]
    assert finding.status == "missing" and reason in finding.found and "libgomp" in finding.remedy, finding
    assert not found.can("compile") and found.can("run")


def test_the_compiler_of_cxx_is_tried_too(probes: dict[str, dict[str, Any]]) -> None:
    by_name, found = look(CXX="no-such-compiler")
    assert by_name["C++ compiler"].status == "ok" and not found.can("compile")
    assert by_name["C++ compiler, CXX=no-such-compiler"].status == "missing"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ImportError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13"),
        ("import os; os.kill(os.getpid(), 4)", "died of signal 4"),
        ("import sys; sys.exit(3)", "exit code 3"),
    ],
)
def test_a_torch_that_fails(tmp_path: Path, body: str, reason: str) -> None:
    """The whole command, with a broken torch in front of the real one."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(body)
    ran = finish(spawn("doctor", environment={"PYTHONPATH": str(tmp_path)}))
    assert ran.code == 2 and ran.err == "" and "This machine can neither compile nor run." in ran.out
    (line,) = (line for line in ran.out.splitlines() if "import torch " in line)
    assert line.startswith("missing") and reason in line


def test_the_whole_command_here() -> None:
    ran = run("doctor", "--json")
    report = json.loads(ran.out)
    torch = next(finding for finding in report["findings"] if finding["name"] == "import torch")
    assert torch["status"] == "ok" and ran.err == "" and ran.code == (0 if all(report["can"].values()) else 2)


def test_versions_out_of_range(probes: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": "2.14.0", "triton": "1.0", "jinja2": "3.1.2", "setuptools": "80"}
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda name: WANTED)
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: versions.get(name) or _absent(name))
    by_name, found = look()
    assert by_name["torch"].status == "missing" and by_name["torch"].blocks == ("run", "compile")
    assert "2.14.0, oxfuse takes <2.14,>=2.11" in by_name["torch"].found and "pip install 'torch<2.14" in by_name["torch"].remedy
    assert by_name["huggingface_hub"].blocks == ("compile",) and by_name["huggingface_hub"].found == "not installed"
    assert by_name["triton"].status == "warning" and not by_name["triton"].blocks and by_name["jinja2"].status == "ok"
    assert "onnx" not in by_name and not found.can("run")
    assert by_name["onnx targets"].found == "not installed" and "oxfuse[onnx]" in by_name["onnx targets"].remedy


WANTED = ["torch<2.14,>=2.11", "triton<3.8,>=3.6", "huggingface_hub>=0.34", "jinja2>=3.1", 'onnx>=1.18; extra == "onnx"']


def _absent(name: str) -> str:
    raise doctor.importlib.metadata.PackageNotFoundError(name)


@pytest.mark.parametrize(
    ("used", "here", "variables", "remedy"),
    [
        (2, Processors(model="x", count=2, quota=None), {}, ""),
        (8, Processors(model="x", count=8, quota=2.0), {}, "set OMP_NUM_THREADS=2"),
        (1, Processors(model="x", count=8, quota=None), {"OMP_NUM_THREADS": "1"}, "unset OMP_NUM_THREADS, or give --threads 8"),
        (6, Processors(model="x", count=8, quota=None), {"OMP_NUM_THREADS": "6"}, ""),
        (4, Processors(model="x", count=8, quota=None), {}, ""),  # half of the logical processors are the other half's twins
    ],
)
def test_threads(
    probes: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    used: int,
    here: Processors,
    variables: dict[str, str],
    remedy: str,
) -> None:
    monkeypatch.setattr(doctor, "processors", lambda: here)
    probes["torch"]["threads"] = used
    finding = look(**variables)[0]["threads"]
    assert remedy in finding.remedy and (finding.status == "warning") == bool(remedy), finding


@pytest.mark.parametrize(
    ("memory", "status"),
    [
        (Memory(total=10**10, available=10**9, limit=None), "warning"),
        (Memory(total=10**10, available=9 * 10**9, limit=10**9), "warning"),
        (Memory(total=10**10, available=9 * 10**9, limit=5 * 10**9), "ok"),
        (None, "ok"),
    ],
)
def test_memory(probes: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, memory: Memory | None, status: str) -> None:
    monkeypatch.setattr(doctor, "memory", lambda: memory)
    assert look()[0]["memory"].status == status


def test_gpus(probes: dict[str, dict[str, Any]]) -> None:
    by_name, found = look()
    assert by_name["GPU"].status == "ok" and "cuda artifacts run elsewhere" in by_name["GPU"].found
    probes["torch"].update(cuda="13.0", gpus=[["NVIDIA H200", "sm_90"]])
    by_name, found = look()
    assert by_name["GPU"].found == "NVIDIA H200 (sm_90)" and found.targets("run") == ["cpu", "cuda:sm_90", *ONNX]


def test_what_a_gpu_target_lacks(probes: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor.importlib.metadata.version
    monkeypatch.setattr(doctor.importlib.metadata, "version", lambda name: "3.9.0" if name == "triton" else version(name))
    by_name, found = look()
    assert found.targets("compile") == ["cpu", *ONNX] and by_name["cuda targets"].status == "warning"
    assert "triton is 3.9.0" in by_name["cuda targets"].found and "pip install 'triton==3." in by_name["cuda targets"].remedy


def test_the_hub_and_its_secrets(tmp_path: Path) -> None:
    environment = {
        "HF_TOKEN": "hf_secret",
        "HF_HUB_OFFLINE": "1",
        "HF_ENDPOINT": "http://me:pass@mirror.example",
        "HF_HOME": "/h",
    }
    found = doctor._hub(doctor._probe(doctor.HUB_PROBE, os.environ | environment))
    assert found.status == "warning" and "HF_HUB_OFFLINE" in found.remedy
    assert "a token is set" in found.found and "http://mirror.example" in found.found and "/h/hub" in found.found
    assert "hf_secret" not in str(found) and "pass" not in str(found)
    bare = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {"HF_HOME": str(tmp_path)}
    found = doctor._hub(doctor._probe(doctor.HUB_PROBE, bare))
    assert found.status == "ok" and "no token" in found.found


def test_a_probe_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.2)
    assert "within 0.2 s" in doctor._probe("import time; time.sleep(60)", os.environ)["error"]
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert "nonexistent" in doctor._probe("", os.environ)["error"]


def test_a_folder_that_is_gone(probes: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    found = examine({"PATH": os.environ["PATH"]}, tmp_path / "gone")
    assert next(f for f in found.findings if f.name == "this folder").status == "warning"
