"""The errors of the storage layer. Each text names the path, what is wrong there, and what to do."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A file of the project cannot be read, written or used as asked."""


class MissingError(CheckpointError):
    """There is no checkpoint, or no such part of it, at the given path."""


class DamagedError(CheckpointError):
    """Stored bytes differ from what the manifest recorded."""


class MismatchError(CheckpointError):
    """The files are sound, but do not fit what they are loaded into."""


class RefusedError(CheckpointError):
    """A value cannot be stored without loss, or a foreign file asks for something that is never run."""


class WriteError(CheckpointError):
    """The operating system refused a write; the previous version of the target is untouched.

    Args:
        message: the whole text.
        errno: number of the operating system's error, None if there was none.
    """

    def __init__(self, message: str, errno: int | None = None) -> None:
        super().__init__(message)
        self.errno = errno


class LockedError(CheckpointError):
    """Another living process writes to the folder."""
