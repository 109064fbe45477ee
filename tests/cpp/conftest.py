"""One build of the C++ library for all its tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from .builds import Build, Driver, build


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Build:
    return build(tmp_path_factory.mktemp("cpp"))


@pytest.fixture
def driver(library: Build) -> Iterator[Driver]:
    with Driver(library) as process:
        yield process


@pytest.fixture
def loaded(driver: Driver, compiled: Callable[..., tuple]) -> Callable[..., tuple]:
    """Return (case, artifact, driver) with the artifact of a configuration loaded as model `m`, in a process of its own."""

    def get(name: str, load: dict[str, object] | None = None, **options: object) -> tuple:
        case, _, artifact = compiled(name, **options)
        driver.call("load", "m", artifact, **(load or {}))
        return case, artifact, driver

    return get
