"""Where checkpoints come from: folders, and everything that is neither a folder nor a hub id. `test_hub.py` has the hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from oxfuse.compiler.source import fingerprint, open_source
from oxfuse.errors import UserError
from tests.checkpoints import random_gpt_oss


def test_folder(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path / "checkpoint", shards=2)
    checkpoint, told = open_source(str(folder))
    assert checkpoint.config["model_type"] == "gpt_oss"
    assert told.keys() == {"kind", "name", "config_sha256", "headers_sha256"}
    assert (told["kind"], told["name"]) == ("folder", "checkpoint")


def test_fingerprint_tells_checkpoints_apart(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path / "one")
    first = fingerprint(folder)
    assert fingerprint(Path(shutil.copytree(folder, tmp_path / "copy"))) == first
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "swiglu_limit": 6.0}))
    second = fingerprint(folder)
    assert second["config_sha256"] != first["config_sha256"]
    assert second["headers_sha256"] == first["headers_sha256"]
    other = fingerprint(random_gpt_oss(tmp_path / "other", vocab_size=212))
    assert other["headers_sha256"] != first["headers_sha256"]


def test_fingerprint_reads_no_weights(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path / "one")
    first = fingerprint(folder)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert fingerprint(folder) == first


@pytest.mark.parametrize(
    "path", ["/nowhere/model", "./org/model", "../org/model", "a/b/c", "model", "~/model", "org/model@", "org/.."]
)
def test_a_folder_that_does_not_exist_is_not_looked_up_on_the_hub(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oxfuse.compiler.source.fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="There is no folder"):
        open_source(path)


def test_a_path_object_is_never_a_hub_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("oxfuse.compiler.source.fetch", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(UserError, match="There is no folder"):
        open_source(Path("org/model"))


def test_neither_file_nor_number(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_source(tmp_path / "file")
    with pytest.raises(UserError, match="expected a folder or a hub id"):
        open_source(3)
