"""Models of a hub that really answers over HTTP: what is asked and kept, and who may read. `test_hub_faults.py` has the rest."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, ModelInfo, constants, hf_hub_download, scan_cache_dir, snapshot_download

from oxfuse.compiler.source import fingerprint, open_source
from oxfuse.errors import UserError
from oxfuse.models.checkpoint import Checkpoint
from tests.checkpoints import random_gpt_oss

from .hub import COMMIT, WEIGHTS, Fault, Hub, Repository, environment, running, whole

Reach = Callable[..., None]


def test_what_is_fetched(hub: Hub, served: Path, reach: Reach) -> None:
    reach(hub.endpoint)
    checkpoint, told = open_source("org/model")
    assert told == {"kind": "hub", "name": "org/model", "revision": COMMIT, **fingerprint(served)}
    assert checkpoint.folder is not None
    assert {path.name for path in checkpoint.folder.iterdir()} == {
        "config.json", "tokenizer.json", "model.safetensors.index.json", WEIGHTS, WEIGHTS.replace("00000", "00001"),
    }  # fmt: skip
    assert all(path.is_symlink() for path in checkpoint.folder.iterdir()) and whole(checkpoint.folder, served)
    files = [asked.path for asked in hub.asked if "/resolve/" in asked.path]
    assert files and all(f"/resolve/{COMMIT}/" in path for path in files)  # a branch may move between two questions

    hub.asked.clear()
    assert open_source("org/model@v1")[1] == told
    assert [asked.path.split("?")[0] for asked in hub.asked] == ["/api/models/org/model/revision/v1"]
    hub.asked.clear()
    reach(hub.endpoint, offline=True)
    assert open_source("org/model")[1] == open_source("org/model@v1")[1] == open_source(f"org/model@{COMMIT}")[1] == told
    assert hub.asked == []


@pytest.mark.parametrize("enabled", [True, False])
def test_files_that_are_offered_by_xet_too(enabled: bool, served: Path, reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    """With Xet the library fetches them; a hub that speaks Xet is not to be had here, so it is told what to deliver."""
    left_to_the_library = []

    def deliver(repository: str, name: str, revision: str) -> str:
        left_to_the_library.append(name)
        path = Path(constants.HF_HUB_CACHE, "models--org--model", "snapshots", revision, name)
        path.write_bytes((served / name).read_bytes()[: 1000 if len(left_to_the_library) == 1 else None])
        return str(path)

    with running(org__model=Repository(folder=served, xet=True)) as hub:
        reach(hub.endpoint)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", deliver)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", not enabled)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
        if enabled:
            with pytest.raises(UserError, match=r"has 1,000 bytes, where the hub lists [\d,]+\. It was thrown away"):
                open_source("org/model")
        folder = open_source("org/model")[0].folder
    assert folder is not None and whole(folder, served)
    assert len(hub.bodies("safetensors")) == (0 if enabled else 2)
    assert len(left_to_the_library) == (3 if enabled else 0)


def test_the_library_finds_what_was_fetched(hub: Hub, reach: Reach) -> None:
    reach(hub.endpoint)
    folder = open_source("org/model")[0].folder
    hub.asked.clear()
    found = snapshot_download("org/model", allow_patterns=["*.safetensors", "*.json"], ignore_patterns="original/*")
    assert Path(found) == folder
    assert not [asked for asked in hub.asked if asked.method == "GET" and "/api/" not in asked.path]
    cache = scan_cache_dir(constants.HF_HUB_CACHE)
    assert not cache.warnings
    (repository,) = cache.repos
    assert (repository.repo_id, repository.refs.keys()) == ("org/model", {"main"})


@pytest.mark.parametrize(
    ("source", "token", "words"),
    [
        ("org/absent", None, "neither a folder here nor a repository on the hub"),
        ("org/absent", "hf_right", "neither a folder here nor a repository on the hub"),
        ("org/model@v9", None, "has no such revision"),
        ("org/gated", None, "gated.*HF_TOKEN"),
        ("org/gated", "hf_other", "gated.*ask for access"),
        ("org/private", None, "neither a folder.*for a private one, log in"),
        ("org/private", "hf_other", "neither a folder.*for a private one, log in"),
        ("org/model", "hf_wrong", "does not know the token.*HF_TOKEN"),
        ("org/empty", None, "has no config.json"),
        ("org/unknown", None, "model_type is 'bert'"),
        ("org--x/model", None, "not a valid repository name"),
    ],
)
def test_refusals(source: str, token: str | None, words: str, served: Path, tmp_path: Path, reach: Reach) -> None:
    (empty := tmp_path / "empty").mkdir()
    (unknown := tmp_path / "unknown").mkdir()
    (unknown / "config.json").write_text('{"model_type": "bert"}')
    closed = {f"org__{access}": Repository(folder=served, access=access) for access in ("gated", "private")}
    with running(org__model=served, org__empty=empty, org__unknown=unknown, **closed) as hub:
        reach(hub.endpoint, token=token)
        with pytest.raises(UserError, match=words) as error:
            open_source(source)
    assert "\n" not in str(error.value)
    assert not [asked for asked in hub.asked if "safetensors" in asked.path]


@pytest.mark.parametrize("access", ["gated", "private"])
def test_the_token_opens_and_stays_with_the_hub(access: str, served: Path, reach: Reach) -> None:
    with running(org__model=Repository(folder=served, access=access)) as hub:
        reach(hub.endpoint, token="hf_right")
        assert open_source("org/model")[1]["revision"] == COMMIT
    assert {asked.token for asked in hub.asked if not asked.path.startswith("/cdn/")} == {"hf_right"}
    assert {asked.token for asked in hub.asked if asked.path.startswith("/cdn/")} == {None}


def test_the_environment_of_a_command(served: Path, tmp_path: Path) -> None:
    """`--max-context 99999` is refused once the checkpoint is open, before any work."""
    command = [sys.executable, "-m", "oxfuse", "compile", "org/model", "-o", str(tmp_path / "artifact"), "--max-context", "99999"]
    with running(org__model=Repository(folder=served, access="private")) as hub:
        hub.faults = [Fault(path="/api/", hang=60)]
        told = environment(hub, tmp_path, HF_TOKEN="hf_right", HF_HUB_ETAG_TIMEOUT="1")
        done = subprocess.run(command, env=told, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and not (tmp_path / "artifact").exists()
    (line,) = done.stderr.splitlines()
    assert line.startswith("oxfuse: error: max_context is 99999")
    assert hub.asked[1].when - hub.asked[0].when < 8  # a second and a pause; ten seconds are the library's default
    assert whole(tmp_path / "cache" / "models--org--model" / "snapshots" / COMMIT, served)


def test_what_is_taken_off_the_hub_is_not_served_from_the_cache(hub: Hub, reach: Reach) -> None:
    reach(hub.endpoint)
    open_source("org/model")
    hub.repositories["org/model"].access = "gated"
    with pytest.raises(UserError, match="is gated"):
        open_source("org/model")


def test_a_hub_that_is_not_there(reach: Reach, hub: Hub, served: Path, caplog: pytest.LogCaptureFixture) -> None:
    nowhere = "http://127.0.0.1:9"
    reach(nowhere)
    with pytest.raises(UserError, match=r"no folder here.*cannot be reached.*HF_ENDPOINT"):
        open_source("org/model")
    reach(nowhere, offline=True)
    with pytest.raises(UserError, match=r"no folder here.*HF_HUB_OFFLINE"):
        open_source("org/model")
    reach(hub.endpoint)
    told = open_source("org/model")[1]
    assert not caplog.records
    reach(nowhere)
    assert open_source("org/model")[1] == told
    assert re.search(r"cannot be reached.*Going on with the copy in the cache", caplog.text)
    reach(nowhere, offline=True)
    caplog.clear()
    assert open_source("org/model")[1] == told and not caplog.records


def test_a_part_of_a_snapshot_is_not_taken_for_the_whole(hub: Hub, reach: Reach, tmp_path: Path) -> None:
    reach(hub.endpoint)
    for name in ("config.json", "tokenizer.json", "model.safetensors.index.json", WEIGHTS):  # as another program leaves it
        hf_hub_download("org/model", name)
    reach(hub.endpoint, offline=True)
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE.*holds a part of it.*00001-of-00002"):
        open_source("org/model")
    reach(hub.endpoint)
    hub.asked.clear()
    open_source("org/model")
    assert len(hub.bodies("safetensors")) == 1 and "00001-of" in hub.bodies("safetensors")[0].path


def test_a_cached_file_of_another_size_is_fetched_again(hub: Hub, served: Path, reach: Reach) -> None:
    reach(hub.endpoint)
    folder = open_source("org/model")[0].folder
    assert folder is not None
    os.truncate(folder / WEIGHTS, 1000)
    assert not whole(folder, served)
    open_source("org/model")
    assert whole(folder, served)


def test_names_from_the_hub_do_not_leave_the_cache(hub: Hub, reach: Reach, monkeypatch: pytest.MonkeyPatch) -> None:
    reach(hub.endpoint)
    honest = HfApi.model_info

    def evil(self: HfApi, *args: Any, **options: Any) -> ModelInfo:
        info = honest(self, *args, **options)
        assert info.siblings is not None
        info.siblings += [dataclasses.replace(info.siblings[-1], rfilename="model/../../../../evil.safetensors")]
        return info

    monkeypatch.setattr(HfApi, "model_info", evil)
    open_source("org/model")
    assert not [asked for asked in hub.asked if "evil" in asked.path]


def test_snapshots_open_through_their_links(hub: Hub, reach: Reach, tmp_path: Path) -> None:
    reach(hub.endpoint)
    folder = open_source("org/model")[0].folder
    assert folder is not None
    blob = (folder / WEIGHTS).resolve()
    shared = tmp_path / "cache" / "blobs" / "ab" / ("ab" * 32)  # what huggingface_hub 2 makes of a file that came by Xet
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(Path("../../blobs/ab") / shared.name)
    assert open_source("org/model")[0].folder == open_source(folder)[0].folder == folder
    for outside in (tmp_path / "cache" / "other" / "weights", tmp_path / "weights"):
        outside.parent.mkdir(exist_ok=True)
        shared.rename(outside)
        blob.unlink()
        blob.symlink_to(outside)
        with pytest.raises(UserError, match="outside the folder"):
            open_source("org/model")
        outside.rename(shared)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "generation_config.json", "model.safetensors"])
def test_links_that_leave_a_plain_folder_are_refused(name: str, tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path / "checkpoint")
    for text in ("tokenizer.json", "generation_config.json"):
        (folder / text).write_text("{}")
    assert open_source(folder)[0].folder == folder
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(UserError, match=f"'{name}' leads to .* outside the folder. Copy the file into it"):
        open_source(folder)
    (folder / name).unlink()
    (folder / name).symlink_to(folder / name)  # in a circle
    with pytest.raises(UserError):
        Checkpoint.open(folder)


def test_a_checkpoint_folder_is_not_written_to(tmp_path: Path) -> None:
    folder = random_gpt_oss(tmp_path / "checkpoint", shards=2)
    before = {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in (folder, *folder.rglob("*"))}
    folder.chmod(0o555)
    try:
        open_source(folder)
    finally:
        folder.chmod(0o755)
    after = {path: (path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in (folder, *folder.rglob("*"))}
    assert {path: times[0] for path, times in after.items()} == {path: times[0] for path, times in before.items()}
