"""What this machine can compile and run, and why not: every requirement looked at, each with its remedy.

In: the environment's variables and a folder. Out: findings. A broken installation is what this is for, so nothing is imported
here that could be broken: torch is tried in a process of its own, where it may crash, and the compiler on a real program.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from oxfuse import __version__
from oxfuse.compiler.choices import TARGETS
from oxfuse.compiler.lowering.cuda_requirements import Lack, why_not
from oxfuse.errors import UserError
from oxfuse.passes.fusions.isa import resolve_isa
from oxfuse.runtime.machine import Processors, cpu_features, memory, processors
from oxfuse.runtime.units import size_text

Status = Literal["ok", "warning", "missing"]
RUNS = ("run", "compile")
COMPILES = ("compile",)
CUDA = "cuda:sm_"

RUN_PACKAGES = ("torch", "numpy", "tokenizers", "jinja2", "click", "tqdm")
COMPILE_PACKAGES = ("safetensors", "huggingface_hub")
ONNX_COMPILES, ONNX_RUNS = ("onnx",), ("onnxruntime-gpu", "onnxruntime")
PROBE_SECONDS = 300
ROOM = 2e9
"""Bytes below which a disk or a memory is worth a warning: a compile of 20b takes 0.8 GB of memory besides what torch takes."""
NOTED = {
    "avx512_vnni": "VNNI",
    "avx512_bf16": "BF16",
    "avx512_fp16": "FP16",
    "avx_vnni": "AVX-VNNI",
    "amx_bf16": "AMX-BF16",
    "amx_int8": "AMX-INT8",
}
"""Processor flags beyond the x86-64 levels that matter for speed."""

TORCH_PROBE = """
import json, torch
gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
print(json.dumps({
    "threads": torch.get_num_threads(),
    "cuda": torch.version.cuda,
    "gpus": [[torch.cuda.get_device_name(i), "sm_%d%d" % torch.cuda.get_device_capability(i)] for i in gpus],
    "aoti": hasattr(torch._C, "_aoti"),
}))
"""
HUB_PROBE = """
import json
from huggingface_hub import constants, get_token
print(json.dumps({
    "endpoint": constants.ENDPOINT,
    "offline": constants.HF_HUB_OFFLINE,
    "cache": str(constants.HF_HUB_CACHE),
    "token": get_token() is not None,
}))
"""
TRIAL = """
#include <omp.h>
#include <vector>
int main() {
    std::vector<float> sums(omp_get_max_threads());
    #pragma omp parallel
    sums[omp_get_thread_num()] += 1;
    return sums[0] == 1 ? 0 : 1;
}
"""
TRIAL_FLAGS = ("-std=c++20", "-O2", "-fopenmp")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at. `blocks` says what is impossible as long as it is missing; `remedy` is there unless it is ok."""

    name: str
    status: Status
    found: str
    remedy: str = ""
    blocks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert (self.status == "ok") == (not self.remedy) and (self.status == "missing" or not self.blocks), self


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All findings. `others`: targets besides cpu that can be compiled ("compile") and run ("run") here, if anything can."""

    findings: tuple[Finding, ...]
    others: Mapping[str, tuple[str, ...]]

    def can(self, what: str) -> bool:
        """Tell whether this machine can "run" or "compile"."""
        return not any(what in finding.blocks for finding in self.findings)

    def targets(self, what: str) -> list[str]:
        """Return the targets that can be compiled or run here."""
        return ["cpu", *self.others[what]] if self.can(what) else []

    def to_json(self) -> str:
        """Return it as JSON: `can` with the targets that can be compiled and run here, and the findings."""
        can = {what: self.targets(what) for what in COMPILES + RUNS[:1]}
        return json.dumps(
            {"oxfuse": __version__, "can": can, "findings": [dataclasses.asdict(f) for f in self.findings]}, indent=1
        )


def examine(environment: Mapping[str, str], folder: Path) -> Diagnosis:
    """Look at this machine as a command sees it that is run with `environment` in `folder`. Takes some seconds."""
    torch = _probe(TORCH_PROBE, environment)
    here = processors()
    lacks = {target: why_not(int(target.removeprefix(CUDA)), environment) for target in TARGETS if target.startswith(CUDA)}
    gpus = [f"cuda:{arch}" for _, arch in torch.get("gpus", ())]
    findings = (
        *_system(),
        *_packages(),
        _torch(torch),
        *_compilers(environment),
        _processor(here),
        _threads(here, torch, environment),
        _memory(),
        *_disks({"this folder": folder, "temporary files": Path(tempfile.gettempdir())}),
        _gpu(torch, environment),
        _cuda_targets(lacks),
        _onnx(),
        _hub(_probe(HUB_PROBE, environment)),
    )
    able = {
        "compile": [target for target, missing in lacks.items() if not missing],
        "run": [target for target in lacks if target in gpus],
    }
    onnx = [target for target in TARGETS if target.startswith("onnx")]
    others = {what: (*targets, *(onnx if _onnx_target(what) else ())) for what, targets in able.items()}
    return Diagnosis(findings=findings, others=others)


def _probe(code: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """Run Python code that prints a JSON object and return it; where that fails, an object with the `error`."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", code],
            capture_output=True,
            text=True,
            errors="replace",
            env=dict(environment),
            timeout=PROBE_SECONDS,
        )
        if done.returncode == 0:
            found = json.loads(done.stdout.splitlines()[-1])
            assert isinstance(found, dict)
            return found
    except subprocess.TimeoutExpired:
        return {"error": f"it did not answer within {PROBE_SECONDS} s"}
    except (OSError, ValueError, IndexError) as error:
        return {"error": str(error)}
    if done.returncode < 0:
        return {"error": f"the process died of signal {-done.returncode}"}
    return {"error": (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]}


def _system() -> Iterator[Finding]:
    yield Finding(name="oxfuse", status="ok", found=__version__)
    yield Finding(name="Python", status="ok", found=f"{platform.python_version()}, {sys.executable}")
    libc = " ".join(platform.libc_ver()).strip()
    found = f"{platform.system()} {platform.release()}, {platform.machine()}, {libc or 'no glibc'}"
    if sys.platform == "linux" and libc.startswith("glibc"):
        yield Finding(name="system", status="ok", found=found)
    else:
        yield Finding(
            name="system", status="missing", found=found, remedy="use Linux with glibc: torch has no other", blocks=RUNS
        )


def _packages() -> Iterator[Finding]:
    try:
        from packaging.requirements import Requirement

        listed = importlib.metadata.requires("oxfuse") or []
    except (ModuleNotFoundError, importlib.metadata.PackageNotFoundError) as error:
        remedy = "install oxfuse again with pip"
        yield Finding(name="packages", status="warning", found=f"versions cannot be checked: {error}", remedy=remedy)
        return
    for requirement in map(Requirement, listed):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, wanted = requirement.name, str(requirement.specifier)
        key = name.lower().replace("-", "_")
        blocks = RUNS if key in RUN_PACKAGES else COMPILES if key in COMPILE_PACKAGES else ()
        status: Status = "missing" if blocks else "warning"
        remedy = f"pip install '{name}{wanted}'" + ("" if blocks else "; cpu compiles and runs without it")
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name=name, status=status, found="not installed", remedy=remedy, blocks=blocks)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield Finding(name=name, status="ok", found=f"{version} ({wanted})" if wanted else version)
        else:
            found = f"{version}, oxfuse takes {wanted}"
            yield Finding(name=name, status=status, found=found, remedy=remedy, blocks=blocks)


def _torch(probe: Mapping[str, Any]) -> Finding:
    if "error" in probe:
        remedy = "install torch again; `python -c 'import torch'` shows the error"
        return Finding(name="import torch", status="missing", found=f"fails: {probe['error']}", remedy=remedy, blocks=RUNS)
    if not probe["aoti"]:
        remedy = "install a torch from its official wheels"
        return Finding(
            name="import torch", status="missing", found="it was built without AOTInductor", remedy=remedy, blocks=RUNS
        )
    return Finding(name="import torch", status="ok", found="works, with AOTInductor")


def _compilers(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Try the compiler of the C++ ops, and the one that AOTInductor takes if CXX names another."""
    for command in dict.fromkeys(("g++", environment.get("CXX") or "g++")):
        name = "C++ compiler" if command == "g++" else f"C++ compiler, CXX={command}"
        path = shutil.which(command, path=environment.get("PATH", ""))
        if path is None:
            remedy = "install GCC 11 or later (Debian, Ubuntu: apt install g++), or compile elsewhere: artifacts run without it"
            yield Finding(name=name, status="missing", found=f"{command} is not in PATH", remedy=remedy, blocks=COMPILES)
            continue
        version, problem = _try_compiler(path, environment)
        if problem:
            remedy = "install GCC 11 or later with its OpenMP library (libgomp)"
            yield Finding(name=name, status="missing", found=f"{version}: {problem}", remedy=remedy, blocks=COMPILES)
        else:
            yield Finding(name=name, status="ok", found=f"{version}, {path}")


def _try_compiler(path: str, environment: Mapping[str, str]) -> tuple[str, str]:
    """Return the compiler's version line, and what is wrong with a program that it makes, or ""."""

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, input=TRIAL, capture_output=True, text=True, errors="replace", env=dict(environment), timeout=60
        )

    version = "unknown version"
    try:
        version = (run(path, "--version").stdout.splitlines() or [version])[0]
        level, features = resolve_isa("native")
        flags = [*TRIAL_FLAGS, *([f"-march={level}"] if features else [])]
        with tempfile.TemporaryDirectory(prefix="oxfuse-doctor-") as folder:
            program = f"{folder}/trial"
            made = run(path, *flags, "-xc++", "-", "-o", program)
            if made.returncode:
                lines = made.stderr.splitlines()
                why = next((line for line in lines if "error" in line), (lines or ["it says nothing"])[-1])
                return version, f"a program with {' '.join(flags)} does not compile: {why}"
            if code := run(program).returncode:
                return version, f"a program with {' '.join(flags)} ends with {code}"
    except (OSError, subprocess.TimeoutExpired, UserError) as error:
        return version, str(error)
    return version, ""


def _processor(here: Processors) -> Finding:
    try:
        level, _ = resolve_isa("native")
    except (UserError, OSError) as error:
        remedy = "use a processor of the last fifteen years"
        return Finding(name="processor", status="missing", found=f"{here.model}: {error}", remedy=remedy, blocks=RUNS)
    more = [name for flag, name in NOTED.items() if flag in cpu_features()]
    return Finding(name="processor", status="ok", found=f"{here.model}: {level}, {' '.join(more) or 'no VNNI, BF16 or AMX'}")


def _threads(here: Processors, torch: Mapping[str, Any], environment: Mapping[str, str]) -> Finding:
    used, chosen = torch.get("threads"), environment.get("OMP_NUM_THREADS")
    found = f"{here.count} processors"
    found += f", the container keeps {here.quota:g} of them busy" if here.quota is not None else ""
    found += f"; torch uses {used} threads" if used is not None else ""
    found += f" (OMP_NUM_THREADS={chosen})" if chosen is not None else ""
    if used is not None and used > here.threads:
        remedy = f"set OMP_NUM_THREADS={here.threads} in Python programs; the commands do it themselves"
        return Finding(name="threads", status="warning", found=found, remedy=remedy)
    if used is not None and chosen is not None and 2 * used <= here.threads:
        remedy = f"unset OMP_NUM_THREADS, or give --threads {here.threads}, to use them all"
        return Finding(name="threads", status="warning", found=found, remedy=remedy)
    return Finding(name="threads", status="ok", found=found)


def _memory() -> Finding:
    here = memory()
    if here is None:
        return Finding(name="memory", status="ok", found="this system does not tell")
    limit = f", the container's limit is {size_text(here.limit)}" if here.limit is not None else ""
    found = f"{size_text(here.total)}, {size_text(here.available)} available{limit}"
    if min(here.usable, here.available) < ROOM:
        remedy = f"free some: a compile takes up to {size_text(ROOM)}. `oxfuse inspect DIR` tells what an artifact needs"
        return Finding(name="memory", status="warning", found=found, remedy=remedy)
    return Finding(name="memory", status="ok", found=found)


def _disks(folders: Mapping[str, Path]) -> Iterator[Finding]:
    for name, folder in folders.items():
        try:
            free = shutil.disk_usage(folder).free
        except OSError as error:
            yield Finding(name=name, status="warning", found=str(error), remedy="change into a folder that exists")
            continue
        found = f"{size_text(free)} free in {folder}"
        if free < ROOM:
            yield Finding(name=name, status="warning", found=found, remedy="free some: an artifact is as large as its checkpoint")
        else:
            yield Finding(name=name, status="ok", found=found)


def _gpu(torch: Mapping[str, Any], environment: Mapping[str, str]) -> Finding:
    gpus = [f"{name} ({arch})" for name, arch in torch.get("gpus", ())]
    if gpus:
        return Finding(name="GPU", status="ok", found=", ".join(gpus))
    why = f"torch is built for CUDA {torch['cuda']}" if torch.get("cuda") else "torch is built without CUDA"
    driver = "nvidia-smi is there" if shutil.which("nvidia-smi", path=environment.get("PATH", "")) else "no nvidia-smi"
    return Finding(name="GPU", status="ok", found=f"none ({why}, {driver}); cuda artifacts run elsewhere")


def _cuda_targets(lacks: Mapping[str, list[Lack]]) -> Finding:
    """Tell which GPUs can be compiled for; that needs none of them."""
    able = [target for target, missing in lacks.items() if not missing]
    problems = dict.fromkeys(lack for missing in lacks.values() for lack in missing)
    if not problems:
        return Finding(name="cuda targets", status="ok", found=f"{', '.join(able)} can be compiled")
    found = "; ".join(lack.found for lack in problems)
    remedy = "; ".join(lack.remedy for lack in problems)
    return Finding(name="cuda targets", status="warning", found=found, remedy=remedy)


def _onnx() -> Finding:
    """Tell what is there of the packages that ONNX targets take: one makes models, the other runs them."""
    found = {name: version for name in (*ONNX_COMPILES, *ONNX_RUNS) if (version := _version(name))}
    told = ", ".join(f"{name} {version}" for name, version in found.items())
    if _onnx_target("compile") and _onnx_target("run"):
        return Finding(name="onnx targets", status="ok", found=told)
    remedy = "pip install 'oxfuse[onnx]' to compile and run onnx targets"
    return Finding(name="onnx targets", status="warning", found=told or "not installed", remedy=remedy)


def _onnx_target(what: str) -> bool:
    """Tell whether ONNX targets can be compiled ("compile") or run ("run") with the packages that are here."""
    return any(_version(name) for name in (ONNX_COMPILES if what == "compile" else ONNX_RUNS))


def _version(package: str) -> str:
    """Return the version of an installed package, "" without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _hub(probe: Mapping[str, Any]) -> Finding:
    if "error" in probe:
        remedy = "pip install huggingface_hub, or compile from a folder"
        return Finding(name="hub", status="warning", found=f"fails: {probe['error']}", remedy=remedy)
    token = "a token is set" if probe["token"] else "no token: gated and private models need one (HF_TOKEN, or hf auth login)"
    endpoint = re.sub(r"//[^/@]*@", "//", str(probe["endpoint"]))  # a password in the address
    found = f"{endpoint}, {token}, cache in {probe['cache']}"
    if probe["offline"]:
        remedy = "unset HF_HUB_OFFLINE to fetch models; those in the cache compile"
        return Finding(name="hub", status="warning", found=f"offline by HF_HUB_OFFLINE, {found}", remedy=remedy)
    return Finding(name="hub", status="ok", found=found)


def lines(diagnosis: Diagnosis) -> list[tuple[Status, str]]:
    """Return the diagnosis for a person, line by line with its status; the last line is the verdict."""
    width = max(len(finding.name) for finding in diagnosis.findings)
    found: list[tuple[Status, str]] = []
    for finding in diagnosis.findings:
        found.append((finding.status, f"{finding.status:<7}  {finding.name:<{width}}  {finding.found}"))
        if finding.remedy:
            found.append((finding.status, f"{'':<7}  {'':<{width}}  -> {finding.remedy}"))
    able = [what for what in COMPILES + RUNS[:1] if diagnosis.can(what)]
    told = [f"{what} for {', '.join(diagnosis.targets(what))}" for what in able]
    verdict = f"This machine can {' and '.join(told)}." if able else "This machine can neither compile nor run."
    if able == ["run"]:
        verdict += " It cannot compile; artifacts that were compiled elsewhere run."
    return [*found, ("ok" if len(able) == 2 else "missing", verdict)]
