"""onnxruntime-genai generates from the folder that `--target onnx` makes what transformers' model generates.

It brings an onnxruntime of its own, so it lives in a virtual environment of its own, which is made here, from the package index.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ..parity.cases import Case, near_ties, random_ids

VERSION = "0.18.*"
COUNT = 200
LENGTHS = (110, 9, 37)
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def genai(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the interpreter of an environment with onnxruntime-genai."""
    place = tmp_path_factory.mktemp("genai")
    venv.create(place, with_pip=True)
    python = place / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"onnxruntime-genai=={VERSION}"], check=True, stdout=sys.stderr)
    return python


def run(python: Path, artifact: Path, prompts: list[list[int]], end: int, place: Path) -> dict[str, Any]:
    request, answer = place / "request.json", place / "answer.json"
    request.write_text(json.dumps({"prompts": prompts, "count": COUNT, "end": end}))
    client = Path(__file__).with_name("genai_client.py")
    done = subprocess.run([python, client, artifact, request, answer], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(answer.read_text())


@torch.no_grad()
def assert_greedy(tokens: list[int], prompt: list[int], theirs: nn.Module, folder: Path, what: str) -> None:
    """Every token is the reference's choice after the ones before it."""
    ids = torch.tensor([prompt + tokens])
    rows = range(len(prompt) - 1, ids.shape[1] - 1)
    chosen = theirs(input_ids=ids).logits[0, rows.start : rows.stop].argmax(-1)
    wrong = (chosen != torch.tensor(tokens)).nonzero().flatten().tolist()
    assert not wrong or set(wrong) <= near_ties(folder, ids, rows), f"{what}: token {wrong[0]} differs"


@pytest.mark.parametrize("name", ["base", "mxfp4", "one_kv_head", "neox", "whole_heads_turn", "yarn"])
def test_greedy(compiled, genai: Path, name: str, tmp_path: Path) -> None:
    """Alone, in chunks, after a rewind, shorter than the window, across it, and in a ragged batch of three."""
    case: Case
    case, folder, artifact = compiled(name, target="onnx")
    theirs = case.transformers(folder, tmp_path)
    end = case.vocabulary - 1  # genai takes it for padding wherever it finds it
    prompts = [[token % end for token in random_ids(case, n, seed=n).tolist()] for n in LENGTHS]
    answer = run(genai, artifact, prompts, end, tmp_path)
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(prompts[:1])).logits[0]
    error = float((torch.tensor(answer["logits"]) - expected).abs().max())
    assert error <= 1e-4 * max(1.0, float(expected.abs().max())), f"logits: {error:.1e}"
    for what in ("alone", "in_chunks", "again", "batch"):
        for prompt, generated in zip(prompts, answer[what], strict=True):
            tokens = generated[: generated.index(end)] if end in generated else generated
            tokens += [end] * (len(tokens) < COUNT)  # where a text ends, genai leaves the end away
            assert_greedy(tokens, prompt, theirs, folder, what)
    assert max(map(len, answer["alone"])) == COUNT
    short = answer["short"] + [end] * (len(answer["short"]) < 10)
    assert_greedy(short, prompts[0][:6], theirs, folder, "max_length 16")
