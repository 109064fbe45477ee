"""A hub on loopback that serves a random checkpoint, and huggingface_hub pointed at it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from tests.checkpoints import random_gpt_oss

from .hub import CHUNK, LARGE, WEIGHTS, Hub, running


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = random_gpt_oss(tmp_path_factory.mktemp("hub") / "served", shards=2)
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"a second copy of the weights")
    (folder / "README.md").write_text("not needed")
    (folder / "tokenizer.json").write_text("{}")
    assert (folder / WEIGHTS).stat().st_size > 2 * LARGE
    return folder


@pytest.fixture
def hub(served: Path) -> Iterator[Hub]:
    with running(org__model=served) as hub:
        yield hub


@pytest.fixture
def reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let huggingface_hub talk to an endpoint, with an empty cache; it reads its environment into these names when imported."""

    def point_at(endpoint: str, offline: bool = False, token: str | None = None, timeout: float = 10) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", timeout)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", timeout)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
        if token is None:
            monkeypatch.delenv("HF_TOKEN", raising=False)
        else:
            monkeypatch.setenv("HF_TOKEN", token)

    monkeypatch.setattr("time.sleep", lambda _: None)  # both this package and the library pause between attempts
    return point_at
