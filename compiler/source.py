"""Finds the checkpoint that a caller names: a folder, or a repository of the Hugging Face hub.

In: what stood on the command line. Out: the opened checkpoint, and a fingerprint for the manifest that tells which bytes were
compiled, without reading the weights: their headers and sizes are enough to tell one checkpoint from another by accident,
and the artifact's weight file carries hashes of what was read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from oxfuse.compiler.hub import fetch
from oxfuse.errors import UserError
from oxfuse.models.checkpoint import Checkpoint

LARGEST_HEADER = 100_000_000  # the limit of the safetensors format
HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


def open_source(source: str | Path) -> tuple[Checkpoint, dict[str, str]]:
    """Open the checkpoint at `source`, a folder or a hub id `org/name` or `org/name@revision`; return it with its fingerprint.

    A hub repository is fetched into the hub's cache: only the files that the model needs, at one commit. Raises UserError if
    there is no such folder or repository, it cannot be reached, or it is no checkpoint.
    """
    if not isinstance(source, str | Path):
        raise UserError(f"The source is {type(source).__name__} {source!r:.60}; expected a folder or a hub id such as org/name.")
    folder = Path(source).expanduser()
    if folder.is_dir():
        return Checkpoint.open(folder), {"kind": "folder", "name": folder.resolve().name, **fingerprint(folder)}
    if folder.exists():
        raise UserError(f"{source} is a file; expected the folder that holds config.json and the safetensors files.")
    hub_id = HUB_ID.fullmatch(str(source)) if isinstance(source, str) else None
    if hub_id is None or str(source).startswith(("./", "../")):
        raise UserError(f"There is no folder {source}, and it is not a hub id of the form org/name. Check the path.")
    folder = fetch(hub_id["id"], hub_id["revision"])
    told = {"kind": "hub", "name": hub_id["id"], "revision": folder.name}
    return Checkpoint.open(folder), {**told, **fingerprint(folder)}


def fingerprint(folder: Path) -> dict[str, str]:
    """Return SHA-256 sums of config.json's bytes, and of every safetensors file's name, size and header."""
    try:
        config = hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
        weights = _headers_sum(sorted(folder.glob("*.safetensors")))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error}.") from error
    return {"config_sha256": config, "headers_sha256": weights}


def _headers_sum(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            prefix = file.read(8)
            header = file.read(min(int.from_bytes(prefix, "little"), LARGEST_HEADER))
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + prefix + header)
    return digest.hexdigest()
