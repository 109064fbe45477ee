"""Makes an artifact folder appear whole or not at all.

In: the place where the folder shall be. Out: an empty folder to fill; on success it is moved to that place in one step, on
failure nothing is left. Everything lies in `.NAME.partial` beside the final place: a lock, and the folder being filled. A
process that is killed leaves only that; its lock dies with it, and the next compile to the same place clears it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType

from oxfuse.errors import UserError
from oxfuse.runtime.manifest import MANIFEST

LOCK = "lock"
REPLACED = "replaced"
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class ArtifactWriter:
    """A transaction on a folder: `with ArtifactWriter(output) as folder:` yields the empty folder to fill.

    `output` may be an existing empty folder, or with `force` an existing artifact, which stays in place until the new one is
    complete. `checkpoint` is the folder that is compiled: the artifact may not lie in it, nor replace a folder that holds it.
    `expected_bytes` is what the artifact will need at least; it is looked at before any work.

    Entering raises UserError where the place is taken, locked by a living compile, not writable or too small. A full disk
    inside the block is a UserError too; every other exception passes through. Both leave the place as it was.
    """

    def __init__(
        self, output: Path, *, force: bool = False, checkpoint: Path | None = None, expected_bytes: int | None = None
    ) -> None:
        # Resolved, so that a link to a folder stays a link and its target is replaced.
        self.output = Path(output).expanduser().resolve()
        self.partial = self.output.parent / f".{self.output.name}.partial"
        self.folder = self.partial / self.output.name
        self._force = force
        self._checkpoint = checkpoint.resolve() if checkpoint is not None else None
        self._expected_bytes = expected_bytes
        self._lock: int | None = None
        self._made_parents: list[Path] = []

    def __enter__(self) -> Path:
        self._check_place()
        try:
            self._make_parents()
            self._lock = acquire_lock(self.partial / LOCK)
            try:
                self._clear_dead_partial()
                self._check_place()  # the compile that held the lock until now may have finished
                if self._expected_bytes is not None:
                    require_space(self.partial, self._expected_bytes)
                self.folder.mkdir()
            except BaseException:
                self._abandon()
                raise
        except OSError as error:
            self._remove_made_parents()
            raise UserError(f"{self.output} cannot be written: {error}. Name a place where you may write.") from error
        except BaseException:
            self._remove_made_parents()
            raise
        return self.folder

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self._publish()
        except OSError as failure:
            error = failure
            if failure.errno not in DISK_FULL:
                raise UserError(f"{self.output} could not be put in place: {failure}. Name another folder.") from failure
        finally:
            written = folder_bytes(self.folder) if error is not None else 0
            self._abandon()
            if not self.output.exists():
                self._remove_made_parents()
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            place = Path(os.fsdecode(error.filename)) if error.filename else self.partial
            ours = place.is_relative_to(self.partial)  # else a temporary file of the compiler, on another disk perhaps
            raise disk_full(place, max(written, self._expected_bytes or 0) if ours else None) from error

    def _check_place(self) -> None:
        output, checkpoint = self.output, self._checkpoint
        if not output.name:
            raise UserError(f"The artifact cannot be written to {output}. Name a folder, such as ./my-artifact.")
        if checkpoint is not None:
            if output.is_relative_to(checkpoint):
                raise UserError(
                    f"{output} lies in the checkpoint {checkpoint}, which is never written to. Name a folder outside it."
                )
            if checkpoint.is_relative_to(output):
                raise UserError(
                    f"{output} holds the checkpoint {checkpoint}, so it cannot become the artifact. Name another folder."
                )
        if not output.exists():
            return
        if not output.is_dir():
            raise UserError(f"{output} is a file; an artifact is a folder. Name another place.")
        if os.path.ismount(output):
            raise UserError(f"{output} is a mount point, which cannot be replaced by a folder. Name a folder inside it.")
        if not any(output.iterdir()):
            return
        if not self._force:
            raise UserError(f"{output} exists and is not empty. Name another folder, or replace it with --force (force=True).")
        if not is_artifact(output):
            raise UserError(
                f"{output} is not an oxfuse artifact (it has no {MANIFEST} of one), and --force replaces nothing else. "
                "Name another folder, or remove this one yourself."
            )

    def _make_parents(self) -> None:
        missing = [p for p in self.output.parents if not p.exists()]
        for parent in reversed(missing):
            with contextlib.suppress(FileExistsError):
                parent.mkdir()
                self._made_parents.append(parent)

    def _remove_made_parents(self) -> None:
        for parent in reversed(self._made_parents):
            with contextlib.suppress(OSError):  # not empty: someone else has put something there
                parent.rmdir()

    def _clear_dead_partial(self) -> None:
        """Remove what a killed compile left; put back an artifact that it had moved aside (see `_replace`)."""
        replaced = self.partial / REPLACED
        if replaced.is_dir() and not self.output.exists():
            replaced.rename(self.output)
        for child in self.partial.iterdir():
            if child.name != LOCK:
                remove(child)

    def _publish(self) -> None:
        sync_tree(self.folder)
        self._check_place()  # someone may have filled it meanwhile
        if self.output.is_dir() and any(self.output.iterdir()):
            self._replace()
        else:
            self.folder.rename(self.output)  # takes the place of an empty folder; fails if it is no longer empty
        sync(self.output.parent)

    def _replace(self) -> None:
        """Put the new folder in the old one's place; the old one is left in the partial folder, to be removed.

        One step where the file system can exchange two names (Linux: ext4, xfs, btrfs, tmpfs, overlayfs). Elsewhere two
        renames: a reader may find nothing between them, and after a kill there the next compile puts the old one back.
        """
        if not exchange(self.folder, self.output):
            replaced = self.partial / REPLACED
            self.output.rename(replaced)
            try:
                self.folder.rename(self.output)
            except BaseException:
                replaced.rename(self.output)
                raise

    def _abandon(self) -> None:
        """Remove the partial folder, its lock last: only its holder may touch the rest."""
        if self._lock is None:
            return
        try:
            for child in self.partial.iterdir():
                if child.name != LOCK:
                    remove(child)
            (self.partial / LOCK).unlink()
            self.partial.rmdir()
        except OSError:
            pass  # what could not be removed is a dead partial, which the next compile clears
        finally:
            os.close(self._lock)
            self._lock = None


def is_artifact(folder: Path) -> bool:
    """Tell whether a folder is an artifact, be it of another version or damaged: many things have a file manifest.json."""
    try:
        manifest = (folder / MANIFEST).read_text("utf-8", "replace")
    except OSError:
        return False
    return '"format_version"' in manifest and '"programs"' in manifest


def acquire_lock(path: Path) -> int:
    """Take the lock file at `path`, making its folder; return the descriptor that holds it until it is closed.

    The lock is the kernel's (flock), so it goes with its process. Its last holder unlinks file and folder while holding it;
    hence a lock on a file that no longer has this name is worth nothing, and another attempt is made.
    Raises UserError where another process or thread holds it.
    """
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except FileNotFoundError:
            continue  # the folder went between the two calls
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
                os.truncate(lock, 0)
                os.write(lock, str(os.getpid()).encode())
                return lock
        except BlockingIOError:
            holder = os.pread(lock, 20, 0).decode("ascii", "replace") or "unknown"
            os.close(lock)
            raise UserError(
                f"Another compile (process {holder}) is writing {path.parent}. Wait for it to end, or name another folder."
            ) from None
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step; return False where kernel, C library or file system cannot. Raises OSError."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def require_space(folder: Path, needed: int) -> None:
    """Raise UserError unless the disk of `folder` has `needed` bytes free for this user."""
    if shutil.disk_usage(folder).free < needed:
        raise disk_full(folder, needed)


def disk_full(place: Path, needed: int | None) -> UserError:
    """Return the error for a full disk: it tells how many bytes are needed at least, if that is known, and how many are free."""
    disk = next(p for p in (place.absolute(), *place.absolute().parents) if p.is_mount())
    demand = f"at least {needed:,} bytes are needed" if needed is not None else "temporary files did not fit"
    return UserError(
        f"The disk at {disk} is too small: {demand} and {shutil.disk_usage(disk).free:,} are free. "
        "Free some space, or name a folder on another disk."
    )


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files under `folder`, 0 where there is none."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all it holds."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def sync(path: Path) -> None:
    """Wait until the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Wait until the folder and all it holds is on the disk."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)
