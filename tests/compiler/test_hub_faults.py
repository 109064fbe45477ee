"""A hub and a network that fail: broken connections, lies about sizes, pages for files, silence, and disks that are full."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import pty
import re
import subprocess
import termios
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import pytest

from oxfuse.compiler import hub as fetching
from oxfuse.compiler.source import open_source
from oxfuse.errors import UserError

from .hub import COMMIT, FETCH, WEIGHTS, Fault, Hub, environment, leftovers, whole

Reach = Callable[..., None]


@pytest.mark.parametrize("by", ["fin", "rst"])
def test_broken_connections_go_on_where_they_stopped(by: str, hub: Hub, served: Path, reach: Reach) -> None:
    reach(hub.endpoint)
    hub.faults = [Fault(path="/cdn/org/model/", times=3, drop=50_000, by=by)]
    folder = open_source("org/model")[0].folder
    assert folder is not None and whole(folder, served) and not leftovers(folder.parents[2])
    ranges = [asked.range for asked in hub.bodies("safetensors")]
    assert [text for text in ranges if text] == ["bytes=50000-", "bytes=100000-", "bytes=150000-"]


def test_a_later_run_goes_on_where_a_broken_one_stopped(hub: Hub, served: Path, reach: Reach, tmp_path: Path) -> None:
    reach(hub.endpoint)
    hub.faults = [Fault(path="/cdn/org/model/", drop=60_000), Fault(path="/cdn/org/model/", status=500, times=99)]
    with pytest.raises(UserError, match=r"error 500.*try again later"):
        open_source("org/model")
    (partial,) = (tmp_path / "cache").rglob("*.incomplete")
    assert partial.stat().st_size == 60_000
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    hub.faults, hub.asked = [], []
    folder = open_source("org/model")[0].folder
    assert folder is not None and whole(folder, served) and not leftovers(folder.parents[2])
    assert [asked.range for asked in hub.bodies("safetensors")] == ["bytes=60000-", None]


def test_a_killed_run_leaves_what_it_had(hub: Hub, served: Path, tmp_path: Path) -> None:
    hub.faults = [Fault(path="/cdn/org/model/", drop=60_000), Fault(path="/cdn/org/model/", hang=60)]
    process = subprocess.Popen(FETCH, env=environment(hub, tmp_path), stderr=subprocess.DEVNULL)
    while len(hub.bodies("safetensors")) < 2 and process.poll() is None:
        hub.ended.wait(0.05)
    process.kill()
    process.wait()
    assert [path.stat().st_size for path in (tmp_path / "cache").rglob("*.incomplete")] == [60_000]
    hub.faults, hub.asked = [], []
    terminal, inside = pty.openpty()
    termios.tcsetwinsize(inside, (30, 100))
    subprocess.run(FETCH, env=environment(hub, tmp_path), check=True, stderr=inside)
    os.close(inside)
    assert re.search(rb"model-0000\d.*100%", os.read(terminal, 65536))  # bars, of which the next test finds none in a pipe
    os.close(terminal)
    assert [asked.range for asked in hub.bodies("safetensors")] == ["bytes=60000-", None]
    assert whole(tmp_path / "cache" / "models--org--model" / "snapshots" / COMMIT, served) and not leftovers(tmp_path)


def test_a_hub_that_drops_everything_is_given_up(hub: Hub, reach: Reach, tmp_path: Path) -> None:
    reach(hub.endpoint)
    hub.faults = [Fault(path="/cdn/org/model/", drop=0, times=99)]
    with pytest.raises(UserError, match=r"could not be fetched.*try again.*HF_ENDPOINT") as error:
        open_source("org/model")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors")) and not leftovers(tmp_path)


LIES = {
    "announces more": ("where the hub had announced", Fault(path=f"/resolve/{COMMIT}/{WEIGHTS}", method="HEAD", said=1000)),
    "announces less": ("where the hub had announced", Fault(path=f"/resolve/{COMMIT}/{WEIGHTS}", method="HEAD", said=-1000)),
    "length too large": ("try again, it goes on where it stopped", Fault(path="/cdn/org/model/", said=1000)),
    "length too small": ("try again, it goes on where it stopped", Fault(path="/cdn/org/model/", said=-1000)),
    "body cut short": ("", Fault(path="/cdn/org/model/", body=70_000)),  # the rest is asked for
    "not the range": ("", Fault(path="/cdn/org/model/", drop=50_000), Fault(path="/cdn/org/model/", ignore_range=True)),
    "another range": ("another hash", Fault(path="/cdn/org/model/", drop=50_000), Fault(path="/cdn/org/model/", shift=7)),
    "page for weights": ("try again", Fault(path="/cdn/org/model/", html=True)),
    "page for config": ("try again", Fault(path="/config.json", html=True)),
    "config cut short": ("thrown away", Fault(path="/config.json", method="*", body=100)),
    "tokenizer cut short": ("thrown away", Fault(path="/tokenizer.json", method="*", body=1)),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_never_yield_a_wrong_file(lie: str, hub: Hub, served: Path, reach: Reach, tmp_path: Path) -> None:
    reach(hub.endpoint)
    words, *faults = LIES[lie]
    hub.faults = [dataclasses.replace(fault, times=1 if fault.drop else 99) for fault in faults]
    if words:
        with pytest.raises(UserError, match=words) as error:
            open_source("org/model")
        assert "\n" not in str(error.value)
        assert ("thrown away" in str(error.value)) <= (not leftovers(tmp_path))
    else:
        open_source("org/model")
    snapshot = tmp_path / "cache" / "models--org--model" / "snapshots" / COMMIT
    assert not snapshot.exists() or whole(snapshot, served)
    hub.faults = []
    folder = open_source("org/model")[0].folder  # nothing that was kept stands in the way
    assert folder == snapshot and whole(snapshot, served) and not leftovers(tmp_path)


@pytest.mark.parametrize("length", [0.5, 1.0, 1.5])
def test_garbage_of_an_earlier_run_is_found_out(length: float, hub: Hub, served: Path, reach: Reach, tmp_path: Path) -> None:
    reach(hub.endpoint)
    weights = (served / WEIGHTS).read_bytes()
    blobs = tmp_path / "cache" / "models--org--model" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / f"{hashlib.sha256(weights).hexdigest()}.incomplete").write_bytes(b"x" * int(length * len(weights)))
    folder = open_source("org/model")[0].folder
    assert folder is not None and whole(folder, served) and not leftovers(tmp_path)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(path="/api/", status=500, times=99), "answers with error 500: try again later"),
        (Fault(path="/api/", status=429, times=99), "too often.*wait"),
        (Fault(path="/api/", status=403, times=99), "forbidden to this token"),
        (Fault(path="/api/", html=True, times=99), "does not answer as a hub does: check HF_ENDPOINT"),
        (Fault(path="/resolve/", method="HEAD", html=True, times=99), "does not answer as a hub does: check HF_ENDPOINT"),
        (Fault(path="/resolve/", method="HEAD", status=503, times=99), "answers with error 503"),
        (Fault(path="/api/", hang=60, times=99), "does not answer in time.*HF_HUB_ETAG_TIMEOUT"),
        (Fault(path="/resolve/", method="HEAD", hang=60, times=99), "does not answer in time.*HF_HUB_ETAG_TIMEOUT"),
        (Fault(path="/cdn/", hang=60, times=99), "does not answer in time.*HF_HUB_DOWNLOAD_TIMEOUT"),
    ],
)
def test_a_hub_in_trouble(fault: Fault, words: str, hub: Hub, reach: Reach, tmp_path: Path) -> None:
    reach(hub.endpoint, timeout=0.2)
    hub.faults, began = [fault], time.monotonic()
    with pytest.raises(UserError, match=words) as error:
        open_source("org/model")
    assert time.monotonic() - began < 5  # at most six attempts
    assert "\n" not in str(error.value)
    assert not leftovers(tmp_path)


def test_trouble_that_passes_is_waited_for(hub: Hub, served: Path, reach: Reach) -> None:
    reach(hub.endpoint, timeout=0.5)
    hub.faults = [
        Fault(path="/api/", status=503),
        Fault(path="/api/", hang=5),
        Fault(path=f"/{WEIGHTS}", method="HEAD", status=500, times=2),
        Fault(path="/cdn/", hang=5),
    ]
    folder = open_source("org/model")[0].folder
    assert folder is not None and whole(folder, served) and not hub.faults


def test_two_at_once_fetch_each_file_once(hub: Hub, served: Path, reach: Reach) -> None:
    reach(hub.endpoint)
    hub.faults = [Fault(path="/cdn/", hang=0.3, times=9)]
    with ThreadPoolExecutor(2) as pool:
        folders = {checkpoint.folder for checkpoint, _ in pool.map(open_source, ["org/model"] * 2)}
    (folder,) = folders
    assert folder is not None and whole(folder, served) and not leftovers(folder.parents[2])
    assert len(hub.bodies("safetensors")) == 2


def test_a_full_disk(hub: Hub, reach: Reach, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reach(hub.endpoint)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(fetching.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(UserError, match=r"has 1,000 bytes free, the model needs [\d,]+ more.*HF_HOME"):
        open_source("org/model")
    assert not hub.bodies("safetensors")


def test_a_disk_that_fills_up_on_the_way(hub: Hub, reach: Reach, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reach(hub.endpoint)

    def full(url: str, stream: BinaryIO, **_: object) -> None:
        stream.write(b"x" * 100)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(UserError, match=r"does not fit into the hub's cache.*free some space, or set HF_HOME"):
        open_source("org/model")
    monkeypatch.undo()
    assert not list((tmp_path / "cache" / "models--org--model").rglob("config.json"))


def test_a_cache_that_cannot_be_written(hub: Hub, reach: Reach, tmp_path: Path) -> None:
    reach(hub.endpoint)
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(UserError, match="set HF_HOME to a folder where you may write"):
        open_source("org/model")
