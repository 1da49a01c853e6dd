"""The list of a folder's single files: ``digests.json``, with size and digest of each.

It is for files that come one by one and are written again, such as a run's config and metrics. Before a file is
replaced, its list entry gets the new version in front of the present one, so a crash between the two writes
leaves a file that the list knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from fulgurite.checkpoints.digest import FileRecord, algorithm_of, digest_of_file
from fulgurite.checkpoints.errors import DamagedError
from fulgurite.checkpoints.signed import body_of, open_signed, sign

LISTING_NAME = "digests.json"
FORMAT_VERSION = 1
_ADVICE = "Delete it to start a new list; the files themselves are not touched by that."

Versions = list[FileRecord]


def read_listing(folder: Path) -> dict[str, Versions]:
    """File name to the versions that its file may have, newest first; empty where there is no list.

    Raises:
        DamagedError: the list was changed, or is none of this project.
    """
    file = folder / LISTING_NAME
    if not file.is_file():
        return {}
    value = open_signed(file, file.read_bytes(), _ADVICE)
    try:
        if value["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {value['format_version']!r}, this version reads {FORMAT_VERSION}")
        listing = {name: [FileRecord(**record) for record in records] for name, records in value["files"].items()}
        for record in (record for records in listing.values() for record in records):
            algorithm_of(record.digest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedError(f"{file} is no list of files: {error!r}. {_ADVICE}") from error
    return listing


def encode_listing(listing: Mapping[str, Versions]) -> bytes:
    """The bytes of a list."""
    files = {name: [asdict(record) for record in records] for name, records in sorted(listing.items())}
    return sign(body_of({"format_version": FORMAT_VERSION, "files": files}))


def with_version(listing: Mapping[str, Versions], path: Path, record: FileRecord) -> dict[str, Versions]:
    """``listing`` with ``record`` as the newest version of ``path``, the present one behind it if it is sound."""
    present = version_at(path, listing.get(path.name, []))
    older = [] if present is None or present == record else [present]
    return {**listing, path.name: [record, *older]}


def version_at(path: Path, versions: Versions) -> FileRecord | None:
    """Which of ``versions`` the file at ``path`` is, None for none of them."""
    if path.is_symlink() or not path.is_file():
        return None
    size = path.stat().st_size
    for record in versions:
        if record.bytes == size and record.digest == digest_of_file(path, algorithm_of(record.digest)):
            return record
    return None
