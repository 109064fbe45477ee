"""The walls between the folders: what a module may import, and what loading an artifact brings into a process."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "runtime": {"runtime"},
    "passes": {"passes", "errors", "runtime.manifest"},
    "models": {"models", "errors", "runtime.manifest"},
}
MODEL_NAMES = ("gpt_oss", "gptoss", "gpt-oss", "gpt_neox", "gptneox", "gpt-neox", "neox")


def modules(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "oxfuse":
            inner = node.module.removeprefix("oxfuse").removeprefix(".")
            found |= {inner} if inner else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("oxfuse.") for a in node.names if a.name.split(".")[0] == "oxfuse"}
    return found


@pytest.mark.parametrize("folder", ALLOWED)
def test_a_folder_imports_only_what_it_may(folder):
    assert modules(folder)
    for path in modules(folder):
        wrong = {m for m in imported(path) if m and not any(m == a or m.startswith(f"{a}.") for a in ALLOWED[folder])}
        assert not wrong, f"{path.relative_to(ROOT)} imports {wrong}"


@pytest.mark.parametrize("folder", ["passes", "runtime"])
def test_passes_and_runtime_name_no_model(folder):
    for path in [*modules(folder), *(ROOT / folder).rglob("*.cpp"), *(ROOT / folder).rglob("*.h")]:
        code = path.read_text().lower()
        tree = {name for name in MODEL_NAMES if name in code and path.suffix != ".py"}
        if path.suffix == ".py":  # a docstring may say where a formula comes from, code may not know a model
            nodes = ast.walk(ast.parse(path.read_text()))
            words = [getattr(n, "id", getattr(n, "attr", "")) or "" for n in nodes]
            words += [
                n.value
                for n in ast.walk(ast.parse(path.read_text()))
                if isinstance(n, ast.Constant) and isinstance(n.value, str) and "\n" not in n.value and len(n.value) < 60
            ]
            tree = {name for name in MODEL_NAMES if any(name in word.lower() for word in words)}
        assert not tree, f"{path.relative_to(ROOT)} names {tree}"


def test_running_an_artifact_imports_neither_compiler_nor_passes_nor_models(compiled):
    _, _, artifact = compiled("base")
    code = f"""
import sys, oxfuse
model = oxfuse.load({str(artifact)!r})
model.generate([1, 2, 3], max_new_tokens=4, stop_token_ids=[])
wrong = [m for m in sys.modules if m.startswith(("oxfuse.compiler", "oxfuse.passes", "oxfuse.models"))]
wrong += [m for m in ("transformers", "huggingface_hub", "triton", "onnx") if m in sys.modules]
assert not wrong, wrong
"""
    subprocess.run([sys.executable, "-c", code], check=True)
