"""Writing that a crash cannot spoil.

A file is written under a temporary name in its own folder, synced, and renamed over the target. A folder is
built beside its target and renamed into place. Where a folder is already there, it is first renamed to
``.<name>.old``:

    build .name.tmp-<pid>-<token>  ->  name to .name.old  ->  temporary to name  ->  delete .name.old

A crash between the two renames leaves no ``name``, but a complete ``.name.old``: `resolve` gives readers that
one, `recover` moves it back. So at every instant one complete version, old or new, can be found.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fulgurite.checkpoints.digest import FileRecord, digest_of_bytes
from fulgurite.checkpoints.errors import CheckpointError, WriteError
from fulgurite.checkpoints.listing import LISTING_NAME, encode_listing, read_listing, with_version

FOLDER_FAULT_POINTS = (
    "opened",
    "written",
    "synced",
    "renamed_away",
    "renamed_in",
    "parent_synced",
    "old_deleted",
)
FILE_FAULT_POINTS = (
    "file_opened",
    "file_written",
    "file_synced",
    "list_opened",
    "list_written",
    "list_synced",
    "list_renamed",
    "list_parent_synced",
    "file_renamed",
    "file_parent_synced",
)
REMOVE_FAULT_POINTS = ("set_aside", "deleted")
_TEMPORARY = re.compile(r"^\..+\.tmp-(\d+)-[0-9a-f]{8}$")
_OLD = re.compile(r"^\.(.+)\.old$")
_ADVICE = {
    errno.ENOSPC: "The disk is full: free some space, or write elsewhere.",
    errno.EDQUOT: "The disk quota is used up: free some space, or write elsewhere.",
    errno.EFBIG: "The file-size limit of this process is too low.",
    errno.EACCES: "Check the permissions of the folder, or write elsewhere.",
    errno.EPERM: "Check the permissions of the folder, or write elsewhere.",
    errno.EROFS: "The file system is read-only: write elsewhere.",
    errno.ENOENT: "The folder has vanished while it was written.",
    errno.ENOTDIR: "A part of the path is a file.",
}
_fault_hook: Callable[[str], None] | None = None


def fault(point: str) -> None:
    """A named point at which tests inject a kill or an error; does nothing otherwise."""
    if _fault_hook is not None:
        _fault_hook(point)


@contextmanager
def inject_faults(hook: Callable[[str], None]) -> Iterator[None]:
    """Call ``hook(point)`` at every fault point inside the block. For tests only."""
    global _fault_hook
    previous, _fault_hook = _fault_hook, hook
    try:
        yield
    finally:
        _fault_hook = previous


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `WriteError` that names ``path`` and what to do."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, "See the operating system's message.")
        raise WriteError(f"cannot write {path}: {error.strerror or error}. {advice}", error.errno) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an `OSError` of the block into a `CheckpointError` that names ``path``."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error


def write_bytes(path: str | Path, data: bytes) -> None:
    """Put ``data`` at ``path``: after a crash the file holds the old or the new bytes, never a mixture.

    The folder's ``digests.json`` gets the digest before the file does, so `audit` knows both versions. Missing
    parent folders are made. One process writes to a folder at a time. Raises `WriteError`, and `DamagedError`
    where the folder's list is damaged.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        listing = with_version(read_listing(path.parent), path, FileRecord(len(data), digest_of_bytes(data)))
        with _staged(path, data, "file") as put_file:
            with _staged(path.with_name(LISTING_NAME), encode_listing(listing), "list") as put_list:
                put_list()
            put_file()


@contextmanager
def _staged(path: Path, data: bytes, what: str) -> Iterator[Callable[[], None]]:
    """``data`` synced under a temporary name; the function given renames it to ``path``."""
    temporary = _temporary(path)

    def put() -> None:
        os.replace(temporary, path)
        fault(f"{what}_renamed")
        _sync_folder(path.parent)
        fault(f"{what}_parent_synced")

    try:
        with open(temporary, "xb") as file:
            fault(f"{what}_opened")
            file.write(data)
            fault(f"{what}_written")
            file.flush()
            os.fsync(file.fileno())
        fault(f"{what}_synced")
        yield put
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """`write_bytes` of ``text`` in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: object) -> None:
    """`write_bytes` of ``value`` as indented JSON. NaN and infinities raise ValueError: they are not JSON."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextmanager
def publish_folder(path: str | Path) -> Iterator[Path]:
    """Give a temporary folder to fill; at the end of the block it becomes ``path``, all or nothing.

    A file or folder that is already at ``path`` is replaced. If the block raises, nothing changes and the
    temporary folder is removed. Raises `WriteError` where the operating system refuses.
    """
    path = Path(path)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        temporary = _temporary(path)
        temporary.mkdir()
    try:
        fault("opened")
        yield temporary
        fault("written")
        with naming(path):
            _sync_tree(temporary)
            fault("synced")
            _swap_in(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    with naming(path):
        _sync_folder(path.parent)
        fault("parent_synced")
        _delete(_old(path))
        fault("old_deleted")


def remove(path: str | Path) -> None:
    """Delete a file or folder; a folder disappears at once, by a rename, so no reader meets half of it."""
    path = Path(path)
    with naming(path):
        _delete(_old(path))
        if os.path.lexists(path):
            trash = _temporary(path)
            os.rename(path, trash)
            fault("set_aside")
            _sync_folder(path.parent)
            _delete(trash)
            fault("deleted")


def resolve(path: str | Path) -> Path:
    """Where the complete version of ``path`` lies: there, or at ``.<name>.old`` after a crash in a replace."""
    path = Path(path)
    return _old(path) if not path.exists() and _old(path).exists() else path


def recover(path: str | Path) -> None:
    """Finish a replace of ``path`` that a crash interrupted. For the owner of the folder, not for readers."""
    path, old = Path(path), _old(Path(path))
    if not os.path.lexists(old):
        return
    if os.path.lexists(path):
        _delete(old)
    else:
        os.rename(old, path)
        _sync_folder(path.parent)


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Clear what crashed writers left in ``folder``; returns the temporary paths deleted.

    Temporary files of living processes stay. To be called by the one process that owns the folder.
    """
    folder, deleted = Path(folder), []
    if not folder.is_dir():
        return deleted
    with naming(folder):
        for entry in sorted(folder.iterdir()):
            if match := _OLD.match(entry.name):
                recover(folder / match[1])
            elif (match := _TEMPORARY.match(entry.name)) and not _alive(int(match[1])):
                _delete(entry)
                deleted.append(entry)
    return deleted


def is_leftover(path: Path) -> bool:
    """Whether ``path`` has the name of a temporary or replaced version rather than of a published one."""
    return bool(_TEMPORARY.match(path.name) or _OLD.match(path.name))


def published(path: Path) -> str | None:
    """The name that a leftover ``.<name>.old`` had, None for any other path."""
    match = _OLD.match(path.name)
    return match[1] if match else None


def _swap_in(temporary: Path, path: Path) -> None:
    replaces = os.path.lexists(path)
    if replaces:
        os.rename(path, _old(path))
    try:
        if replaces:
            fault("renamed_away")
        os.rename(temporary, path)
    except BaseException:
        if replaces:
            os.rename(_old(path), path)
        raise
    fault("renamed_in")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")


def _old(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(root: Path) -> None:
    for folder, _, names in os.walk(root):
        for name in names:
            _sync(Path(folder, name), os.O_RDONLY)
        _sync_folder(Path(folder))


def _sync_folder(folder: Path) -> None:
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
