"""One writer per run folder.

The lock is the operating system's `flock` on ``<run>/.lock``, so it ends with the process that holds it, however
that dies: the file may stay, but blocks nobody. The JSON in it only tells people who the owner is. A lock on a
network file system works between hosts where that system supports `flock`.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from fulgurite.checkpoints.atomic import naming
from fulgurite.checkpoints.errors import LockedError

LOCK_NAME = ".lock"
_held: set[int] = set()


@contextmanager
def writing(run: str | Path) -> Iterator[None]:
    """Hold the folder ``run`` for writing during the block; the folder is made if it is not there.

    A forked child (a data loading worker, say) does not hold it, so a child that outlives its parent blocks nobody.

    Raises:
        LockedError: another process, or another block of this one, holds it; names the owner.
        WriteError: the operating system refused.
    """
    path = Path(run, LOCK_NAME)
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path)
    _held.add(descriptor)
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    try:
        with naming(path):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        yield
    finally:
        if descriptor in _held:  # not in a forked child
            with suppress(OSError):  # it blocks nobody, and an error here would hide that of the block
                if _is_at(descriptor, path):  # else the folder was removed, and the file may be another's
                    path.unlink()
            _held.discard(descriptor)
            os.close(descriptor)


def _acquire(path: Path) -> int:
    """An open, locked file at ``path``; once more where a former owner has deleted it in the meantime."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise LockedError(_refusal(path)) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    return False


def _refusal(path: Path) -> str:
    try:
        owner = json.loads(path.read_bytes())
        who = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        who = "another process, which has just begun or ended"
    return f"{path.parent} is being written by {who}. Wait until it ends or stop it, or write to another folder."


def _let_go() -> None:
    """A forked child closes what its parent holds; the parent's lock stays."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)
