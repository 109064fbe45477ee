"""Every test that runs the toy model must leave the block pool as it found it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest

from oxfuse.runtime.model import CompiledModel

from .toy import ToyModel, toy_model


@pytest.fixture
def toy() -> ToyModel:
    return ToyModel()


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
