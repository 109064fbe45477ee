"""Finds the checkpoint that a caller names: a folder, or a repository of the Hugging Face hub.

In: what stood on the command line. Out: the opened checkpoint, and a fingerprint for the manifest that tells which bytes were
compiled, without reading the weights: their headers and sizes are enough to tell one checkpoint from another by accident,
and the artifact's weight file carries hashes of what was read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from torch import nn

from oxfuse.errors import UserError
from oxfuse.models.checkpoint import Checkpoint
from oxfuse.models.contract import lookup

LARGEST_HEADER = 100_000_000  # the limit of the safetensors format
HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?")


def open_source(source: str | Path | nn.Module) -> tuple[Checkpoint, dict[str, str]]:
    """Open the checkpoint at `source`, a folder or a hub id `org/name` or `org/name@revision`; return it with its fingerprint.

    A hub repository is fetched into the hub's cache: only the files that the model needs, at one commit. HF_ENDPOINT,
    HF_HUB_OFFLINE, HF_TOKEN and the cache's place are honoured by huggingface_hub, which also shows the progress. Raises
    UserError if there is no such folder or repository, it cannot be reached, or it is no checkpoint.
    """
    if isinstance(source, nn.Module):
        raise UserError(
            f"{type(source).__name__} is a live module, which this version cannot compile. "
            "Save it with its save_pretrained(folder) and compile the folder."
        )
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


def fetch(repository: str, revision: str | None = None) -> Path:
    """Fetch what the model of a hub repository needs; return the folder of the snapshot, named after its commit.

    Raises UserError.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    def get(call: Callable[..., str], **options: Any) -> Path:
        try:
            return Path(call(repository, **options))
        except Exception as error:  # the library also lets through the errors of its HTTP client, which changes with versions
            raise _hub_error(repository, revision, error) from error

    config = get(hf_hub_download, filename="config.json", revision=revision)
    try:
        model_type = json.loads(config.read_text("utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"config.json of {repository} is not a JSON object: {error}.") from error
    patterns = list(lookup(model_type).source_files)
    # The commit that config.json came from: a branch may move between the two calls.
    return get(snapshot_download, revision=config.parent.name, allow_patterns=patterns)


def _hub_error(repository: str, revision: str | None, error: Exception) -> UserError:
    """Say what the hub's refusal means and what to do. Sorted from the special to the general."""
    from huggingface_hub import errors

    which = repository + (f"@{revision}" if revision else "")
    remedies: list[tuple[type[Exception], str]] = [
        (errors.GatedRepoError, "is gated: ask for access on its page, then log in with `hf auth login` or set HF_TOKEN"),
        (errors.RevisionNotFoundError, "has no such revision: name a branch, a tag or a commit"),
        (
            errors.RepositoryNotFoundError,
            "is neither a folder here nor a repository on the hub: check the name; for a private one, log in or set HF_TOKEN",
        ),
        (errors.OfflineModeIsEnabled, "is not in the cache, and HF_HUB_OFFLINE forbids fetching it: unset it, or name a folder"),
        (
            errors.LocalEntryNotFoundError,
            "is not in the cache, and the hub cannot be reached: check the network, HF_ENDPOINT and HF_HUB_OFFLINE",
        ),
        (errors.EntryNotFoundError, "has no config.json, so it is not a checkpoint that oxfuse reads"),
        (errors.HFValidationError, "is not a valid repository name"),
    ]
    for kind, remedy in remedies:
        if isinstance(error, kind):
            return UserError(f"{which} {remedy}.")
    return UserError(
        f"{which} could not be fetched: {type(error).__name__}: {error}. Check the network, HF_ENDPOINT and the disk, "
        "or fetch it yourself and name the folder."
    )


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
