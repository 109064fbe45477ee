"""An artifact appears whole or not at all: taken places, dead and living compiles, full disks, the exchange of old and new."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from oxfuse.compiler import artifact
from oxfuse.compiler.artifact import ArtifactWriter
from oxfuse.errors import UserError
from oxfuse.runtime.manifest import MANIFEST


def tree(folder: Path) -> dict[str, str]:
    """Return every file under `folder` with its text."""
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def manifest(text: str) -> str:
    return json.dumps({"format_version": 1, "programs": text})


def fill(folder: Path, text: str) -> None:
    (folder / "programs").mkdir()
    (folder / "programs" / "step.so").write_text(text)
    (folder / MANIFEST).write_text(manifest(text))


def whole(text: str) -> dict[str, str]:
    return {MANIFEST: manifest(text), "programs/step.so": text}


def compile_to(output: Path, text: str, **options: bool) -> None:
    with ArtifactWriter(output, **options) as folder:
        fill(folder, text)


WRITE_AND_WAIT = """
import sys, time
from pathlib import Path
from oxfuse.compiler.artifact import ArtifactWriter
with ArtifactWriter(Path(sys.argv[1]), force=True) as folder:
    (folder / "half").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other_compile() -> Callable[[Path], subprocess.Popen[str]]:
    """Start another process that has begun to write to a place; ended with the test."""
    started: list[subprocess.Popen[str]] = []

    def start(output: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen([sys.executable, "-c", WRITE_AND_WAIT, str(output)], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("existing", ["absent", "empty", "parents absent"])
def test_success_leaves_the_artifact_alone(tmp_path: Path, existing: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    output = root / "a" / "b" / "out" if existing == "parents absent" else root / "out"
    if existing == "empty":
        output.mkdir()
    with ArtifactWriter(output) as folder:
        assert folder.is_relative_to(output.parent / ".out.partial")
        assert not output.exists() or not any(output.iterdir())
        fill(folder, "new")
    assert tree(output) == whole("new")
    assert names(output.parent) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken"), OSError(errno.EIO, "broken")])
@pytest.mark.parametrize("force", [False, True])
def test_failure_leaves_nothing(tmp_path: Path, error: BaseException, force: bool) -> None:
    output = tmp_path / "deep" / "out"
    if force:
        compile_to(output, "old")
    with pytest.raises(type(error)), ArtifactWriter(output, force=force) as folder:
        fill(folder, "new")
        raise error
    assert tree(tmp_path) == ({f"deep/out/{name}": text for name, text in whole("old").items()} if force else {})
    assert names(tmp_path) == (["deep"] if force else [])


def test_taken_place_is_refused_before_any_work(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine").write_text("mine")
    with pytest.raises(UserError, match=r"not empty.*--force"), ArtifactWriter(output):
        pytest.fail("entered")
    with pytest.raises(UserError, match="not an oxfuse artifact"), ArtifactWriter(output, force=True):
        pytest.fail("entered")
    with pytest.raises(UserError, match="is a file"), ArtifactWriter(output / "mine", force=True):
        pytest.fail("entered")
    assert tree(tmp_path) == {"out/mine": "mine"}
    assert names(tmp_path) == ["out"]


def test_checkpoint_is_never_written_to(tmp_path: Path) -> None:
    checkpoint = tmp_path / "all" / "checkpoint"
    checkpoint.mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to(checkpoint)
    for output in (checkpoint, checkpoint / "out", link / "a" / "out", tmp_path / "all"):
        for force in (False, True):
            with pytest.raises(UserError, match="checkpoint"), ArtifactWriter(output, force=force, checkpoint=checkpoint):
                pytest.fail("entered")
    assert not any(checkpoint.iterdir())


@pytest.mark.parametrize("can_exchange", [True, False])
def test_force_replaces_an_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    if not can_exchange:
        monkeypatch.setattr(artifact, "exchange", lambda one, other: False)
    output = tmp_path / "out"
    compile_to(output, "old")
    with ArtifactWriter(output, force=True) as folder:
        fill(folder, "new")
        assert tree(output) == whole("old")
    assert tree(output) == whole("new")
    assert names(tmp_path) == ["out"]


def test_exchange_leaves_no_moment_without_an_artifact(tmp_path: Path) -> None:
    output, stop, missing = tmp_path / "out", threading.Event(), list[str]()
    compile_to(output, "0")

    def watch() -> None:
        while not stop.is_set():
            try:
                (output / MANIFEST).read_text()
            except FileNotFoundError as error:
                missing.append(str(error))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for i in range(20):
            compile_to(output, str(i), force=True)
    finally:
        stop.set()
        watcher.join()
    assert not missing


def test_exchange_tells_a_file_system_that_cannot_from_an_error(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    with pytest.raises(FileNotFoundError):
        artifact.exchange(tmp_path / "one", tmp_path / "other")


def test_kill_between_the_two_renames_keeps_the_old_artifact(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (tmp_path / ".out.partial" / "replaced").mkdir(parents=True)
    fill(tmp_path / ".out.partial" / "replaced", "old")
    with pytest.raises(UserError, match="not empty"), ArtifactWriter(output):
        pytest.fail("entered")
    assert tree(tmp_path) == {f"out/{name}": text for name, text in whole("old").items()}


def test_a_living_compile_is_respected(tmp_path: Path, other_compile: Callable[[Path], subprocess.Popen[str]]) -> None:
    output = tmp_path / "out"
    process = other_compile(output)
    for _ in range(2):
        with pytest.raises(UserError, match=rf"Another compile \(process {process.pid}\)"), ArtifactWriter(output, force=True):
            pytest.fail("entered")
    assert (tmp_path / ".out.partial" / "out" / "half").is_file()
    with ArtifactWriter(tmp_path / "elsewhere") as folder:
        fill(folder, "new")


def test_two_compiles_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "out") as folder:
        with pytest.raises(UserError, match="Another compile"), ArtifactWriter(tmp_path / "out"):
            pytest.fail("entered")
        fill(folder, "new")
    assert tree(tmp_path / "out") == whole("new")


def test_a_killed_compile_leaves_only_its_partial_folder(
    tmp_path: Path, other_compile: Callable[[Path], subprocess.Popen[str]]
) -> None:
    output = tmp_path / "out"
    process = other_compile(output)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert names(tmp_path) == [".out.partial"]
    compile_to(output, "new")
    assert names(tmp_path) == ["out"]
    assert tree(output) == whole("new")


def test_lock_is_won_by_one_at_a_time(tmp_path: Path) -> None:
    """Many threads take and give up the same place; the folder, its lock and its holder never mix."""
    inside, worst, entered = [0], [0], [0]

    def work() -> None:
        for _ in range(60):
            try:
                with ArtifactWriter(tmp_path / "out") as folder:
                    inside[0] += 1
                    worst[0] = max(worst[0], inside[0])
                    entered[0] += 1
                    (folder / "file").write_text("x")
                    inside[0] -= 1
                    raise InterruptedError
            except (UserError, InterruptedError):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert worst[0] == 1
    assert entered[0] > 0
    assert names(tmp_path) == []


def test_lock_on_a_file_that_was_removed_is_worth_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, flock = tmp_path / "folder" / "lock", fcntl.flock

    def last_holder_leaves_between_open_and_lock(handle: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        path.unlink()
        path.write_text("of the next one")
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", last_holder_leaves_between_open_and_lock)
    handle = artifact.acquire_lock(path)
    assert os.path.samestat(os.fstat(handle), path.stat())
    os.close(handle)


def test_too_small_a_disk_is_refused_before_any_work(tmp_path: Path) -> None:
    words = r"at least 1,000,000,000,000,000,000 bytes are needed and [\d,]+ are free"
    with pytest.raises(UserError, match=words), ArtifactWriter(tmp_path / "out", expected_bytes=10**18):
        pytest.fail("entered")
    assert names(tmp_path) == []


def test_disk_that_fills_up_is_a_user_error(tmp_path: Path) -> None:
    size = sum(map(len, whole("new").values()))
    words = rf"at least {size} bytes are needed and [\d,]+ are free"
    with pytest.raises(UserError, match=words), ArtifactWriter(tmp_path / "out") as folder:
        fill(folder, "new")
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(UserError, match="temporary files"), ArtifactWriter(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device", "/tmp/xyz/step.cpp")
    assert names(tmp_path) == []


def test_disk_that_fills_up_while_moving_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(artifact, "sync_tree", full)
    with pytest.raises(UserError, match="too small"), ArtifactWriter(tmp_path / "out") as folder:
        fill(folder, "new")
    assert names(tmp_path) == []


def test_place_filled_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(UserError, match="not empty"), ArtifactWriter(output) as folder:
        fill(folder, "new")
        output.mkdir()
        (output / "mine").write_text("mine")
    assert tree(tmp_path) == {"out/mine": "mine"}


def test_unwritable_place_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), ArtifactWriter(tmp_path / "file" / "out"):
        pytest.fail("entered")
