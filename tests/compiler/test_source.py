"""Where checkpoints come from: folders, a hub that really answers over HTTP, and everything that is neither."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants
from torch import nn

from oxfuse.compiler.source import fingerprint, open_source
from oxfuse.errors import UserError
from tests.checkpoints import random_gpt_oss

COMMIT = "0123456789abcdef0123456789abcdef01234567"


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


def test_neither_file_nor_module_nor_number(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        open_source(tmp_path / "file")
    with pytest.raises(UserError, match=r"live module.*save_pretrained"):
        open_source(nn.Linear(1, 1))
    with pytest.raises(UserError, match="expected a folder or a hub id"):
        open_source(3)


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that a download uses, for one public and one gated repository."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        type(self).asked.append(f"{self.command} {self.path}")
        path = self.path.split("?")[0].removeprefix("/api/models").strip("/").split("/")
        repository, rest = "/".join(path[:2]), path[2:]
        revision = rest[1] if len(rest) > 1 else "main"
        if repository == "org/gated":
            return self.send(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"}, body)
        if repository != "org/model":
            return self.send(401, b"", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "not found"}, body)
        if revision not in ("main", "v1", COMMIT):
            return self.send(404, b"", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "no revision"}, body)
        if rest[:1] == ["resolve"]:
            file = self.folder / "/".join(rest[2:])
            if not file.is_file():
                return self.send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, body)
            data = file.read_bytes()
            return self.send(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{abs(hash(data)):x}"'}, body)
        names = [p.relative_to(self.folder).as_posix() for p in sorted(self.folder.rglob("*")) if p.is_file()]
        if rest[:1] == ["tree"]:
            files = [{"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": "0"} for name in names]
            return self.send(200, json.dumps(files).encode(), {"Content-Type": "application/json"}, body)
        info = {
            "id": repository,
            "modelId": repository,
            "sha": COMMIT,
            "siblings": [{"rfilename": name} for name in names],
            "tags": [],
        }
        return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"}, body)

    def send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    folder = random_gpt_oss(tmp_path / "served", shards=2)
    (folder / "original").mkdir()
    (folder / "original" / "model.safetensors").write_bytes(b"a second copy of the weights")
    (folder / "README.md").write_text("not needed")
    (folder / "tokenizer.json").write_text("{}")
    Hub.folder, Hub.asked = folder, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let huggingface_hub talk to an endpoint, with an empty cache; it reads its environment into these names when imported."""

    def point_at(endpoint: str, offline: bool = False) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)

    return point_at


def test_hub(hub: str, reach: Callable[..., None]) -> None:
    reach(hub)
    checkpoint, told = open_source("org/model")
    assert told == {"kind": "hub", "name": "org/model", "revision": COMMIT, **fingerprint(Hub.folder)}
    names = {p.relative_to(checkpoint.folder).as_posix() for p in checkpoint.folder.rglob("*")}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} < names
    assert not any("original" in name or "README" in name for name in names)
    listed = [asked for asked in Hub.asked if "/revision/" in asked or "/tree/" in asked]
    assert listed and all(COMMIT in asked for asked in listed)  # not by a branch, which may move between two questions
    assert open_source("org/model@v1")[1] == told

    for source, words in (
        ("org/absent", "neither a folder here nor a repository on the hub"),
        ("org/model@v9", "has no such revision"),
        ("org/gated", r"gated.*HF_TOKEN"),
    ):
        with pytest.raises(UserError, match=words):
            open_source(source)

    Hub.asked.clear()
    reach(hub, offline=True)
    assert open_source("org/model")[1] == told
    with pytest.raises(UserError, match="not in the cache"):
        open_source("org/other")
    assert Hub.asked == []


def test_hub_that_does_not_answer(reach: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # the library tries again for half a minute
    reach("http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot be reached.*HF_ENDPOINT"):
        open_source("org/model")
