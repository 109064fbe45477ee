"""Every block of every page is run as it stands: commands, programs, and the files that a page tells its reader to write.

Commands talk to a hub on loopback that serves the bundled checkpoint as openai/gpt-oss-20b. The two set-up lines of README.md are
left to `.ci/run` and to whoever tries them in a fresh clone.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from oxfuse.models.contract import ModelContract
from oxfuse.passes.fusion import all_fusions
from oxfuse.runtime.manifest import Manifest
from tests.compiler.hub import running

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "artifacts/README.md", "passes/README.md", "passes/fusions/README.md", "models/README.md")
SETUP = ("quickstart", "tests")  # the marks of the lines that install oxfuse
MODEL = "openai/gpt-oss-20b"
FENCE = re.compile(r"^(?:<!-- (?P<mark>\w+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Block:
    """A fenced block of a page; `kind` says who runs it."""

    page: str
    line: int
    mark: str | None
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """Return the path in the first line's comment, which makes the block a file to write."""
        found = re.match(r"(?:#|//) ([\w/]+\.\w+)\n", self.text)
        return found[1] if found else None

    @property
    def kind(self) -> str:
        """Return setup, file, program or commands; or "nobody runs this", which fails."""
        if self.mark in SETUP and self.language == "bash":
            return "setup"
        if self.file is not None and self.language in ("python", "cpp"):
            return "file"
        commands = [line for line in self.text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        if self.language == "bash" and all(re.search(r"\boxfuse\b", line) for line in commands):
            return "commands"
        return "program" if self.language == "python" else "nobody runs this"

    @property
    def wants_artifact(self) -> bool:
        """Tell whether the block compiles a model, or uses the artifact that the commands made: minutes, not seconds."""
        return Path(MODEL).name in self.text


def blocks_of(page: str) -> list[Block]:
    text = (ROOT / page).read_text("utf-8")
    return [
        Block(page=page, line=text.count("\n", 0, m.start()) + 1, mark=m["mark"], language=m["language"], text=m["text"])
        for m in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def test_every_block_is_run_by_somebody() -> None:
    for page in PAGES:
        assert (ROOT / page).read_text("utf-8").count("```") == 2 * len(blocks_of(page)), f"{page}: a fence was not understood"
    assert [f"{b.page}:{b.line}" for b in BLOCKS if b.kind == "nobody runs this"] == []
    assert [(b.page, b.mark) for b in BLOCKS if b.kind == "setup" or b.mark] == [("README.md", mark) for mark in SETUP]
    assert all("venv" in b.text and "pip install" in b.text for b in BLOCKS if b.kind == "setup")
    assert {b.page for b in BLOCKS if b.kind == "file"} == {"passes/fusions/README.md"}  # whose test writes them
    assert {b.page for b in BLOCKS if b.wants_artifact and b.kind == "program"} <= {"README.md"}  # as the slow test runs them


def run_programs(blocks: list[Block], place: Path, **environment: str) -> str:
    """Run the blocks, those of a page one after the other in one namespace, in a new process and the folder `place`."""
    pages: dict[str, str] = {}
    for block in blocks:
        pages[block.page] = pages.get(block.page, "") + block.text
    names = [f"{number}_{page.replace('/', '_')}.py" for number, page in enumerate(pages)]
    for name, text in zip(names, pages.values(), strict=True):
        (place / name).write_text(text, "utf-8")
    code = f"import runpy, oxfuse\nfor name in {names}: runpy.run_path(name)\nprint(oxfuse.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the source tree with the files of the page about fusions in it, as a reader would have it."""
    tree = tmp_path / "oxfuse"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "__pycache__", "*.egg-info"))
    for block in BLOCKS:
        if block.file is not None:
            (tree / block.file).parent.mkdir(exist_ok=True)
            (tree / block.file).write_text(block.text, "utf-8")
            (tree / block.file).with_name("__init__.py").write_text('"""Soft cap of logits."""\n', "utf-8")
    return tree


def test_programs(copy: Path, tmp_path: Path) -> None:
    """One process for all pages: most of the time goes into importing torch."""
    programs = [b for b in BLOCKS if b.kind == "program" and not b.wants_artifact]
    assert {b.page for b in programs} >= {"passes/README.md", "passes/fusions/README.md", "models/README.md"}
    (place := tmp_path / "place").mkdir()
    assert run_programs(programs, place, PYTHONPATH=str(tmp_path)).endswith(f"{copy / '__init__.py'}\n")


@pytest.mark.slow
def test_the_fusion_of_the_page_meets_the_contract(copy: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "tests/fusions/test_contract.py",
        "-k",
        "soft_cap and not v3",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(command, cwd=copy, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count(".") >= 40  # five cases: plain, C++, dtypes, threads


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What a user's shell has, with a hub on loopback and a cache of its own."""
    home = tmp_path_factory.mktemp("home")
    served = shutil.copytree(ROOT / "artifacts" / "tiny-gpt-oss", home / "served")
    config = json.loads((served / "config.json").read_text("utf-8"))
    (served / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 131072}), "utf-8")  # as the real one
    with running(**{MODEL.replace("/", "__"): served}) as hub:
        paths = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        yield {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "PATH": paths}


@pytest.mark.slow
def test_commands(environment: dict[str, str], tmp_path: Path) -> None:
    """All pages share a folder, as a reader who goes through them does: what one has compiled, the next one inspects."""
    for block in BLOCKS:
        if block.kind == "commands":
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", block.text],
                cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900,
            )  # fmt: skip
            assert done.returncode == 0, f"{block.page}:{block.line}\n{done.stdout}\n{done.stderr}"
            assert "Traceback" not in done.stderr
    artifact = tmp_path / f"{Path(MODEL).name}-cpu"
    named = re.findall(r"`([\w./-]+)`", (ROOT / "artifacts/README.md").read_text("utf-8").split("## The manifest")[0])
    for path in artifact.rglob("*"):
        inside = path.relative_to(artifact).as_posix()
        assert path.is_dir() or any(inside == name or (name.endswith("/") and inside.startswith(name)) for name in named), inside


@pytest.mark.slow
def test_programs_that_compile(environment: dict[str, str], tmp_path: Path) -> None:
    programs = [b for b in BLOCKS if b.kind == "program" and b.wants_artifact]
    assert programs
    run_programs(programs, tmp_path, **environment)


def rows(page: str, section: str) -> list[str]:
    """Return the names in the first column of a section's tables."""
    text = (ROOT / page).read_text("utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def test_tables_name_what_there_is() -> None:
    assert rows("artifacts/README.md", "The manifest") == [field.name for field in dataclasses.fields(Manifest)]
    assert rows("models/README.md", "The contract") == [field.name for field in dataclasses.fields(ModelContract)]
    fusions = [fusion.name for fusion in all_fusions()]
    assert rows("passes/README.md", "In order") == ["drop_noops", *fusions, "pack_weights", "insert_cache"]


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        text = re.sub(FENCE, "", (ROOT / page).read_text("utf-8"))
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}"
