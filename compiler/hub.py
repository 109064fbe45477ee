"""Fetches a model of the Hugging Face hub into the hub's cache.

In: a repository and a revision. Out: the folder of the snapshot. huggingface_hub asks the hub, so HF_ENDPOINT, HF_HUB_OFFLINE,
HF_TOKEN and the cache's place count, and draws the bars. What it leaves open is done here: a file goes on where an earlier
attempt stopped, be it of this run or of a killed one; nothing enters the cache that differs in size or hash from what the hub
lists; a hub that hangs is left after its timeouts; every failure says what to do.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import BufferedRandom
from pathlib import Path
from typing import BinaryIO, TypeVar

from oxfuse.errors import UserError
from oxfuse.models.checkpoint import Checkpoint
from oxfuse.models.contract import lookup

CONFIG = "config.json"
NAME = r"\w[\w.-]*"
"""What the hub may call a commit, a file or a blob here: each becomes a file name."""
PAUSES = (1.0, 2.0)
"""Seconds before a question that the hub did not answer is asked again."""
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ListedFile:
    """A file as the hub lists it: bytes, SHA-256 of the content (of large files) or git's SHA-1; None where it does not tell."""

    name: str
    size: int | None
    sha256: str | None
    git_sha1: str | None


def fetch(repository: str, revision: str | None = None) -> Path:
    """Fetch what the model of a hub repository needs; return the folder of the snapshot, named after its commit.

    Where the hub cannot be asked, the snapshot of an earlier fetch serves if it is whole. Raises UserError.
    """
    which = repository + (f"@{revision}" if revision else "")
    try:
        with _explained(which):
            commit, listed = _again(lambda: _list_files(repository, revision))
    except UserError as refused:
        if 400 <= (_status(refused.__cause__) or 0) < 500:
            raise
        return _cached(repository, revision, refused)
    from huggingface_hub import constants

    with _explained(which):
        home = Path(constants.HF_HUB_CACHE).expanduser() / f"models--{repository.replace('/', '--')}"
        folder = home / "snapshots" / commit
        if CONFIG not in listed:
            raise UserError(f"{which} has no {CONFIG}, so it is not a checkpoint that oxfuse reads.")
        _get_file(repository, folder, listed[CONFIG])
        wanted = _wanted(folder / CONFIG, listed, which)
        _require_room(folder, wanted)
        for file in wanted:
            _get_file(repository, folder, file)
        if commit != revision:  # once all is there, so that what the cache names is whole
            ref = home / "refs" / (revision or constants.DEFAULT_REVISION)
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit, "utf-8")
    return folder


def _list_files(repository: str, revision: str | None) -> tuple[str, dict[str, ListedFile]]:
    """Return the commit that the revision names now, and its files by name."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import FileMetadataError

    info = HfApi().model_info(repository, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    try:
        files = [
            ListedFile(name=file.rfilename, size=file.size, sha256=file.lfs.sha256 if file.lfs else None, git_sha1=file.blob_id)
            for file in info.siblings or ()
        ]
        named = {file.name: file for file in files if re.fullmatch(NAME, file.name)}  # subfolders hold further copies
        if re.fullmatch(NAME, info.sha or ""):
            return str(info.sha), named
    except (TypeError, AttributeError) as error:
        raise FileMetadataError("a listing of another form") from error
    raise FileMetadataError("a listing without a commit")


def _cached(repository: str, revision: str | None, refused: UserError) -> Path:
    """Return the snapshot of an earlier fetch, if it is whole; else raise the UserError that tells why the hub did not answer."""
    from huggingface_hub import constants, hf_hub_download

    try:
        folder = Path(hf_hub_download(repository, CONFIG, revision=revision, local_files_only=True)).parent
    except Exception:
        raise refused from refused.__cause__
    try:
        Checkpoint.open(folder)
    except UserError as error:
        raise UserError(f"{refused} The cache holds a part of it: {error}") from refused
    if not constants.HF_HUB_OFFLINE:
        logging.getLogger(__name__).warning("%s Going on with the copy in the cache, commit %s.", refused, folder.name)
    return folder


def _wanted(config: Path, listed: dict[str, ListedFile], which: str) -> list[ListedFile]:
    """Return the files that the model needs, small ones first: a snapshot without its weights is seen to be a part."""
    try:
        model_type = json.loads(config.read_text("utf-8")).get("model_type")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{CONFIG} of {which} is not a JSON object: {error}. Choose another revision or repository.") from error
    patterns = lookup(model_type).source_files
    files = [file for name, file in listed.items() if any(fnmatchcase(name, pattern) for pattern in patterns)]
    return sorted(files, key=lambda file: file.size or 0)


def _require_room(folder: Path, files: list[ListedFile]) -> None:
    """Raise UserError unless the cache's disk has room for what is missing."""
    needed = sum(file.size or 0 for file in files if not (folder / file.name).exists())
    needed -= sum(partial.stat().st_size for partial in _blobs(folder).glob("*.incomplete"))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"The hub's cache at {folder.parents[2]} has {free:,} bytes free, the model needs {needed:,} more. "
            "Free some space, or set HF_HOME to a folder on another disk."
        )


def _blobs(folder: Path) -> Path:
    return folder.parents[1] / "blobs"


def _get_file(repository: str, folder: Path, file: ListedFile) -> None:
    """See that the snapshot holds the file as the hub lists it. A cached file is believed if it has the right size."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import FileMetadataError

    path = folder / file.name
    if path.exists() and file.size in (None, path.stat().st_size):
        return
    _forget(path)
    url = hf_hub_url(repository, file.name, revision=folder.name)
    told = _again(lambda: get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT))
    if told.xet_file_data is not None and not constants.HF_HUB_DISABLE_XET and importlib.util.find_spec("hf_xet"):
        hf_hub_download(repository, file.name, revision=folder.name)  # Xet verifies every chunk that it fetches
        if file.size not in (None, path.stat().st_size):
            raise _damaged(file.name, f"has {path.stat().st_size:,} bytes, where the hub lists {file.size:,}")
        return
    size = file.size if told.size is None else told.size
    if size is None or not re.fullmatch(NAME, told.etag or ""):
        raise FileMetadataError(f"{file.name} without a size or an ETag")
    blob = _blobs(folder) / str(told.etag)
    if not blob.exists():
        _get_blob(url, blob, file, size)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        path.symlink_to(Path("../../blobs") / blob.name)
    except FileExistsError:
        pass  # another process was faster
    except OSError:  # a file system without links
        blob.replace(path)


def _get_blob(url: str, blob: Path, file: ListedFile, size: int) -> None:
    """Fetch a blob of `size` bytes, going on with what there is of it. Its name is taken when its bytes are verified."""
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{blob.name}.incomplete")
    with partial.open("ab+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # another compile may be fetching it
        try:
            if blob.exists():
                return
            while True:
                resumed = stream.seek(0, os.SEEK_END) > 0
                _download(url, stream, size, file.name)
                if not (wrong := _misfit(stream, file)):
                    break
                if not resumed:
                    raise _damaged(file.name, wrong)
                stream.truncate(0)  # what an earlier run left may be at fault
            os.fsync(stream.fileno())
            partial.replace(blob)
        except UserError:
            partial.unlink()
            raise
        finally:
            if partial.exists() and (blob.exists() or os.fstat(stream.fileno()).st_size == 0):
                partial.unlink(missing_ok=True)


def _download(url: str, stream: BinaryIO, size: int, name: str) -> None:
    """Append the rest of the file to what `stream` holds. A broken connection is tried again as long as bytes arrive."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    def length() -> int:
        stream.flush()
        return os.fstat(stream.fileno()).st_size

    while True:
        had = stream.seek(0, os.SEEK_END)
        if had > size:
            had = stream.seek(stream.truncate(0))
        try:
            http_get(url, stream, resume_size=had, headers=build_hf_headers(), expected_size=size, displayed_filename=name)
        except Exception as error:
            if length() > size or _status(error) == 416:  # what is there has no continuation
                raise _damaged(name, f"came with {length():,} bytes, where the hub had announced {size:,}") from error
            if length() <= had or (isinstance(error, OSError) and error.errno is not None):
                raise
            time.sleep(PAUSES[0])
            continue
        if length() != size:
            raise _damaged(name, f"came with {length():,} bytes, where the hub had announced {size:,}")
        return


def _misfit(stream: BufferedRandom, file: ListedFile) -> str:
    """Tell in what the content of `stream` differs from the listing; nothing where it fits."""
    size = stream.seek(0, os.SEEK_END)
    if file.size not in (None, size):
        return f"has {size:,} bytes, where the hub lists {file.size:,}"
    stream.seek(0)
    if file.sha256:
        found, listed = hashlib.file_digest(stream, "sha256").hexdigest(), file.sha256
    else:
        digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
        while piece := stream.read(1 << 20):
            digest.update(piece)
        found, listed = digest.hexdigest(), file.git_sha1 or digest.hexdigest()
    return "" if found == listed else f"has another hash than the hub lists, {listed}"


def _forget(path: Path) -> None:
    """Remove a file of a snapshot and the blob that it links to, so that it is fetched again."""
    if path.is_symlink():
        (path.parent / path.readlink()).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _damaged(name: str, how: str) -> UserError:
    return UserError(f"{name} {how}. It was thrown away: try again, or fetch it yourself and name the folder.")


def _again(ask: Callable[[], T]) -> T:
    """Return what `ask` returns; where the hub did not answer or has a fault of its own, ask again after a pause."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    for pause in PAUSES:
        try:
            return ask()
        except (OfflineModeIsEnabled, HFValidationError):
            raise
        except Exception as error:
            if 400 <= (status := _status(error) or 0) < 500 and status not in (408, 429):
                raise
            time.sleep(pause)
    return ask()


def _status(error: BaseException | None) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


@contextmanager
def _explained(which: str) -> Iterator[None]:
    """Turn every error inside into a UserError that names the repository and says what to do."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # the library also lets through the errors of its HTTP client, which changes with versions
        raise UserError(f"{which} {_remedy(error)}.") from error


def _remedy(error: Exception) -> str:
    """Say what the hub's refusal means and what to do. Sorted from the special to the general."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # why the hub was not asked
    status, message = _status(error), " ".join(str(error).split())
    told = f"{type(error).__name__}: {message[:200]}" if message else type(error).__name__
    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"is gated: ask for access on its page, then {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return "has no such revision: name a branch, a tag or a commit"
    if status == 401 and "Invalid credentials" in message:
        return f"was refused, since the hub does not know the token: {login}"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 404):
        return f"is neither a folder here nor a repository on the hub: check the name; for a private one, {login}"
    if status == 403:
        return f"is forbidden to this token: {login} with one that may read it"
    if isinstance(error, errors.HFValidationError):
        return "is not a valid repository name: expected org/name"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "is no folder here and not in the cache, and HF_HUB_OFFLINE forbids fetching it: unset it, or name a folder"
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"does not fit into the hub's cache at {constants.HF_HUB_CACHE}: free some space, or set HF_HOME to another disk"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
        return f"cannot be stored in the hub's cache ({told}): set HF_HOME to a folder where you may write"
    again = "try again, it goes on where it stopped; check the network and HF_ENDPOINT"
    if status == 429:
        return f"was asked for too often (error 429): wait some minutes, or {login}"
    if status is not None and status >= 500:
        return f"could not be fetched, {constants.ENDPOINT} answers with error {status}: try again later, or check HF_ENDPOINT"
    if "Timeout" in type(error).__name__:
        return (
            f"could not be fetched, {constants.ENDPOINT} does not answer in time ({told}): {again}, or raise "
            "HF_HUB_ETAG_TIMEOUT and HF_HUB_DOWNLOAD_TIMEOUT"
        )
    if isinstance(error, errors.FileMetadataError | json.JSONDecodeError):
        return f"could not be fetched, {constants.ENDPOINT} does not answer as a hub does: check HF_ENDPOINT and the proxy"
    if "Connect" in type(error).__name__:
        return (
            f"is no folder here and not in the cache, and {constants.ENDPOINT} cannot be reached ({told}): "
            "check the network and HF_ENDPOINT"
        )
    return f"could not be fetched ({told}): {again}, or fetch it yourself and name the folder"
