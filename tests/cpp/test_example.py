"""`oxfuse compile --emit-example cpp`: a folder inside the artifact that builds and runs as its README says."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import oxfuse
from oxfuse.compiler.example import FOLDER, SOURCES, write_example
from oxfuse.errors import UserError
from oxfuse.runtime.verify import verify_artifact

from ..parity.cases import random_ids
from .builds import ids_text


def test_the_example_is_whole_and_changes_nothing(compiled, tmp_path):
    case, _, plain = compiled("base")
    artifact = Path(shutil.copytree(plain, tmp_path / "artifact"))
    folder = write_example(artifact, "2.13")
    assert folder == artifact / FOLDER
    library = [path.relative_to(SOURCES) for path in SOURCES.rglob("*") if path.is_file() and "examples" not in path.parts]
    assert len(library) > 20
    for name in library:
        assert (folder / "oxfuse" / name).read_bytes() == (SOURCES / name).read_bytes()
    assert (folder / "main.cpp").read_bytes() == (SOURCES / "examples" / "generate.cpp").read_bytes()
    assert verify_artifact(artifact)["ok"]
    prompt = random_ids(case, 20).tolist()
    generated = [oxfuse.load(path).generate(prompt, max_new_tokens=5)[0].token_ids for path in (plain, artifact)]
    assert generated[0] == generated[1]
    assert not (plain / FOLDER).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"emit_example": "rust"}, "expected cpp"),
        ({"emit_example": "cpp", "target": "onnx"}, "no cpp example for target onnx"),
        ({"emit_example": "cpp", "target": "onnx-portable"}, "no cpp example for target onnx-portable"),
        ({"emit_example": "cpp", "task": "feature-extraction"}, "text-generation alone"),
    ],
)
def test_an_example_that_could_not_run_is_refused_before_any_work(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        oxfuse.compile(tmp_path / "there-is-none", tmp_path / "artifact", **options)


def test_the_task_of_the_checkpoint_counts_as_well(tmp_path):
    from ..neox import random_gpt_neox

    checkpoint = random_gpt_neox(tmp_path / "checkpoint", task="text-classification", id2label={"0": "a", "1": "b"})
    with pytest.raises(UserError, match="no cpp example for text-classification"):
        oxfuse.compile(checkpoint, tmp_path / "artifact", emit_example="cpp")
    assert not (tmp_path / "artifact").exists()


@pytest.mark.slow
def test_the_commands_of_its_readme_build_and_run_it(compiled, tmp_path):
    """In a copy elsewhere, as it would be on another machine."""
    case, _, artifact = compiled("base", emit_example="cpp")
    copy = shutil.copytree(artifact, tmp_path / "elsewhere")
    (block,) = re.findall(r"```bash\n(.*?)```", (copy / FOLDER / "README.md").read_text(), re.DOTALL)
    *build, use = block.replace("python3", shlex.quote(sys.executable)).splitlines()
    for command in build:
        subprocess.run(command, shell=True, check=True, cwd=copy / FOLDER, capture_output=True)
    prompt = random_ids(case, 30).tolist()
    use = use.replace("1 2 3", ids_text(prompt))
    printed = subprocess.run(use, shell=True, check=True, cwd=copy / FOLDER, capture_output=True, text=True).stdout
    (expected,) = oxfuse.load(artifact).generate(prompt, max_new_tokens=20)
    assert [int(word) for word in printed.split()] == expected.token_ids
