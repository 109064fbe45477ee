"""A Hugging Face hub on loopback: a real HTTP server with the part of the hub's API that downloads use, and faults on demand.

Like the hub, it answers for large files with a redirect to another host (here: another name of this machine), which serves ranges
and must not see the token. It speaks no Xet, but can say that it does.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 100_000
"""Bytes from which on a file is stored as the hub stores large ones: under its SHA-256, on another host."""


WEIGHTS = "model-00000-of-00002.safetensors"
CHUNK = 10_000
"""What a broken connection may cost in tests: the library takes up 10 MB before it writes, far more than these files have."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong in the next `times` answers to `method` requests whose path contains `path`.

    status: answer with this and no body. html: answer 200 with a page instead of what was asked. hang: wait so many seconds
    first. drop: send so many bytes of the body, then close the connection ("fin") or reset it ("rst"). said: add to the size
    that the headers tell. body: send so many bytes, and say so. ignore_range: answer 200 with the whole file. shift: start
    ranges later.
    """

    path: str
    method: str = "GET"
    times: int = 1
    status: int | None = None
    html: bool = False
    hang: float = 0.0
    drop: int | None = None
    by: Literal["fin", "rst"] = "fin"
    said: int = 0
    body: int | None = None
    ignore_range: bool = False
    shift: int = 0


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request as it came."""

    method: str
    path: str
    range: str | None
    token: str | None
    when: float = field(default_factory=time.monotonic)


@dataclass(kw_only=True)
class Repository:
    """A repository: its files, who may read it, the names of its one commit, and whether large files are offered by Xet too."""

    folder: Path
    access: Literal["public", "gated", "private"] = "public"
    revisions: tuple[str, ...] = ("main", "v1", COMMIT)
    xet: bool = False


@dataclass(kw_only=True)
class Hub:
    """The running hub. Repositories and faults may be changed between requests; `asked` is what it was asked."""

    endpoint: str = ""
    token: str = "hf_right"
    repositories: dict[str, Repository] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    def fault(self, method: str, path: str) -> Fault | None:
        """Return the fault of this request, if any, and count it."""
        with self.lock:
            for i, fault in enumerate(self.faults):
                if fault.method in (method, "*") and fault.path in path:
                    left = fault.times - 1
                    self.faults[i : i + 1] = [Fault(**{**vars(fault), "times": left})] if left else []
                    return fault
        return None

    def bodies(self, name: str) -> list[Asked]:
        """Return the requests for the content of a file, in the order they came; those that were redirected are left out."""
        return [asked for asked in self.asked if asked.method == "GET" and asked.path.startswith("/cdn/") and name in asked.path]


@contextmanager
def running(**repositories: Repository | Path) -> Iterator[Hub]:
    """Serve repositories, `org__name` for org/name, until the block ends."""
    hub = Hub()
    for name, served in repositories.items():
        hub.repositories[name.replace("__", "/")] = served if isinstance(served, Repository) else Repository(folder=served)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.ended.set()
        server.shutdown()
        server.server_close()


FETCH = [
    sys.executable,
    "-c",
    f"""
from huggingface_hub import constants
from oxfuse.compiler.source import open_source
constants.DOWNLOAD_CHUNK_SIZE = {CHUNK}
open_source('org/model')
""",
]


def environment(hub: Hub, tmp_path: Path, **more: str) -> dict[str, str]:
    """Return what a user would set: the library reads all of it by itself."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    home = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HOME": str(tmp_path / "home")}
    return kept | {"HF_ENDPOINT": hub.endpoint, **home, **more}


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*.incomplete"))


def whole(folder: Path, served: Path) -> bool:
    """Tell whether every file of a snapshot is the served one, byte for byte."""
    return all((served / path.name).read_bytes() == path.read_bytes() for path in folder.iterdir())


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that left needs no answer
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/") and not path.startswith("/api/models/"):
            return self._refuse(404, "NoSuchPath")  # the library's own affairs
        token = (self.headers["Authorization"] or "").removeprefix("Bearer ") or None
        self.hub.asked.append(Asked(method=self.command, path=self.path, range=self.headers["Range"], token=token))
        fault = self.hub.fault(self.command, path)
        if fault is not None:
            self.hub.ended.wait(fault.hang)
            if fault.status is not None:
                return self._send(fault.status, b"<h1>no</h1>", {"Content-Type": "text/html"})
            if fault.html:
                names = {"X-Repo-Commit": COMMIT, "ETag": '"5e1f"'} if self.command == "GET" else {}
                page = b"<html><body>Please log in to the airport</body></html>"
                return self._send(200, page, {"Content-Type": "text/html", **names})
        if path.startswith("/cdn/"):
            file = self.hub.repositories["/".join(path.split("/")[2:4])].folder / path.split("/", 5)[5]
            return self._file(file, {}, fault)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path)
        if found is not None:
            return self._api(*found.groups(), token)
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found is not None and self._permitted(found[1], found[2].replace("%2F", "/"), token):
            return self._resolve(found[1], found[3], fault)
        return None if found else self._refuse(404, "NoSuchPath")

    def _permitted(self, name: str, revision: str, token: str | None) -> bool:
        repository = self.hub.repositories.get(name)
        if token is not None and token != self.hub.token and not token.startswith("hf_other"):
            self._send(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repository is None or (repository.access == "private" and token != self.hub.token):
            self._refuse(404 if token else 401, "RepoNotFound")
        elif repository.access == "gated" and token != self.hub.token:
            self._refuse(403 if token else 401, "GatedRepo")
        elif revision not in repository.revisions:
            self._refuse(404, "RevisionNotFound")
        else:
            return True
        return False

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code, "X-Error-Message": code})

    def _api(self, name: str, kind: str | None, revision: str | None, token: str | None) -> None:
        if not self._permitted(name, (revision or "main").replace("%2F", "/"), token):
            return
        folder, files, tree = self.hub.repositories[name].folder, list[dict[str, Any]](), list[dict[str, Any]]()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            data = path.read_bytes()
            entry = {"rfilename": path.relative_to(folder).as_posix(), "size": len(data), "blobId": _git_sha1(data)}
            if len(data) >= LARGE:
                entry["lfs"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}
            files.append(entry)
            lfs = {"lfs": {**entry["lfs"], "oid": entry["lfs"]["sha256"]}} if "lfs" in entry else {}
            tree.append({"type": "file", "path": entry["rfilename"], "size": len(data), "oid": entry["blobId"], **lfs})
        info = {"id": name, "modelId": name, "sha": COMMIT, "tags": [], "siblings": files}
        self._send(200, json.dumps(tree if kind == "tree" else info).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, file: str, fault: Fault | None) -> None:
        path = self.hub.repositories[name].folder / file
        if not path.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        data = path.read_bytes()
        told = {"X-Repo-Commit": COMMIT}
        if len(data) < LARGE:
            return self._file(path, {**told, "ETag": f'"{_git_sha1(data)}"'}, fault)
        other_host = self.hub.endpoint.replace("127.0.0.1", "localhost")
        digest, said = hashlib.sha256(data).hexdigest(), len(data) + (fault.said if fault else 0)
        told |= {"X-Linked-Size": str(said), "X-Linked-Etag": f'"{digest}"', "ETag": f'"{digest}"'}
        if self.hub.repositories[name].xet:
            told |= {"X-Xet-Hash": digest, "X-Xet-Refresh-Route": f"{self.hub.endpoint}/xet-token"}
        return self._send(302, b"", {**told, "Location": f"{other_host}/cdn/{name}/{digest[:8]}/{file}"})

    def _file(self, path: Path, headers: dict[str, str], fault: Fault | None) -> None:
        data, status, fault = path.read_bytes(), 200, fault or Fault(path="")
        first = int(found[1]) if (found := re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")) else 0
        if first and not fault.ignore_range:
            if first >= len(data):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            headers, status = {**headers, "Content-Range": f"bytes {first}-{len(data) - 1}/{len(data)}"}, 206
            data = data[first + fault.shift :] + b"x" * fault.shift
        if fault.body is not None:
            data = data[: fault.body]
        said = len(data) + fault.said
        self._send(status, data, {"ETag": f'"{path.name}"', **headers, "Content-Length": str(said)}, fault)

    def _send(self, status: int, data: bytes, headers: dict[str, str], fault: Fault | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if fault is None or fault.drop is None:
            self.wfile.write(data)
            return
        self.wfile.write(data[: fault.drop])
        self.wfile.flush()
        self.hub.ended.wait(0.05)  # what was sent arrives before the end of the connection does
        if fault.by == "rst":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        self.close_connection = True


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
