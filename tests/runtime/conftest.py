"""An artifact made by hand, and a toy model: every test that runs it must leave the block pool as it found it."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel

from oxfuse.runtime.model import CompiledModel

from .tiny_artifact import VOCAB, digest, write_artifact
from .toy import ToyModel, toy_model


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("artifact") / "tiny")


@pytest.fixture(scope="session")
def worded(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact with a tokenizer that has a word for each token id, w0 to w4095, so that whatever it generates is text."""
    folder = Path(shutil.copytree(artifact, tmp_path_factory.mktemp("worded") / "tiny"))
    tokenizer = Tokenizer(WordLevel({f"_w{i}": i for i in range(VOCAB)}, unk_token="_w0"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace("_"), decoders.Metaspace("_")
    tokenizer.save(str(folder / "tokenizer.json"))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["tokenizer_files"]["tokenizer.json"] = digest(folder / "tokenizer.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(artifact, tmp_path / "copy"))


@pytest.fixture
def toy() -> ToyModel:
    return ToyModel()


@pytest.fixture(scope="session", autouse=True)
def what_other_suites_left() -> Iterator[None]:
    """Garbage is collected after every test here: look through these tests' objects, not through millions of others."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def open_model(toy: ToyModel) -> Iterator[Callable[..., CompiledModel]]:
    """Make models over `toy`; afterwards all their blocks must be free, and no job left."""
    models: list[CompiledModel] = []

    def make(**options: object) -> CompiledModel:
        models.append(toy_model(toy, **options))
        return models[-1]

    yield make
    gc.collect()
    for model in models:
        assert model.scheduler.engine.used_blocks == 0, "blocks did not return to the pool"
        assert not model.scheduler.running and not model.scheduler.waiting


@pytest.fixture
def model(open_model: Callable[..., CompiledModel]) -> CompiledModel:
    return open_model()
