"""The golden file: what transformers says about the same tokens, the same bytes every time, and rows and routers to the point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from oxfuse.compiler.golden import spread_rows, write_golden
from oxfuse.errors import UserError
from oxfuse.models.checkpoint import Checkpoint
from oxfuse.models.contract import lookup
from oxfuse.models.load import load_reference
from tests.checkpoints import random_gpt_oss, transformers_model


def golden_of(folder: Path, path: Path, max_context: int = 1024, **options: Any) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    contract = lookup(checkpoint.config["model_type"])
    config = contract.parse_config(dict(checkpoint.config))
    task = options.pop("task", "text-generation")
    sources = contract.sources(checkpoint, config, task)
    return write_golden(path, contract=contract, config=config, task=task, sources=sources, max_context=max_context, **options)


@pytest.mark.parametrize("layout", ["hf", "mxfp4"])
@torch.no_grad()
def test_equals_transformers(tmp_path: Path, layout: str) -> None:
    folder = random_gpt_oss(tmp_path / "checkpoint", layout=layout)
    written = golden_of(folder, tmp_path / "golden.safetensors")
    golden = load_file(tmp_path / "golden.safetensors")
    assert golden.keys() == written.keys() == {"token_ids", "positions", "rows", "logits", "router_indices"}
    assert golden["token_ids"].shape == golden["positions"].shape == (256,)
    assert golden["positions"].tolist() == list(range(256))
    assert golden["rows"].shape == (32,)

    model = transformers_model(folder, torch.float32)
    answer = model(input_ids=golden["token_ids"][None], output_router_logits=True, use_cache=False)
    expected = answer.logits[0, golden["rows"]]
    assert golden["logits"].dtype == torch.float32
    assert golden["logits"].shape == expected.shape
    assert (golden["logits"] - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())
    assert golden["router_indices"].shape == (3, 256, 2)
    for ours, theirs in zip(golden["router_indices"], answer.router_logits, strict=True):
        best = theirs.reshape(256, -1).topk(2, dim=-1)
        gap = theirs.reshape(256, -1).topk(3, dim=-1).values.diff(dim=-1).abs().amin(-1)
        assert ((ours == best.indices).all(-1) | (gap < 1e-4)).all()


def test_same_bytes_every_time(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path / "checkpoint")
    for name in "ab":
        golden_of(folder, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    (tmp_path / "plain").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
    other = golden_of(folder, tmp_path / "c", seed=1)
    assert not other["token_ids"].equal(load_file(tmp_path / "a")["token_ids"])


def test_short_context(tmp_path: Path) -> None:
    golden = golden_of(random_gpt_oss(tmp_path / "checkpoint"), tmp_path / "golden", max_context=5)
    assert golden["token_ids"].shape == (5,)
    assert golden["rows"].tolist() == [0, 1, 2, 3, 4]
    assert golden["logits"].shape[0] == 5


@torch.no_grad()
def test_model_without_a_head(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path / "checkpoint")
    golden = golden_of(folder, tmp_path / "golden", task="feature-extraction")
    model = load_reference(folder, task="feature-extraction")
    expected = model(input_ids=golden["token_ids"][None]).last_hidden_state[0, golden["rows"]]
    assert golden["logits"].shape == (32, 64)
    assert torch.allclose(golden["logits"], expected, atol=1e-4)


def test_damaged_values_are_refused(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path / "checkpoint")
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    data[header:] = b"\xff" * (len(data) - header)  # every float is NaN
    path.write_bytes(data)
    with pytest.raises(UserError, match="infinite or undefined"):
        golden_of(folder, tmp_path / "golden")
    assert not (tmp_path / "golden").exists()


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 256])
def test_rows_are_spread(length: int) -> None:
    rows = spread_rows(length).tolist()
    assert len(rows) == len(set(rows)) == min(32, length)
    assert rows == sorted(rows)
    assert rows[-1] == length - 1
    assert rows[0] == 0 or length == 1
