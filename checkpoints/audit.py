"""The state of every file below a folder: a run, many runs, checkpoints, adapters, a feature store."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fulgurite.checkpoints.atomic import is_leftover, published, resolve
from fulgurite.checkpoints.errors import DamagedError, MissingError
from fulgurite.checkpoints.listing import LISTING_NAME, Versions, read_listing, version_at
from fulgurite.checkpoints.lock import LOCK_NAME
from fulgurite.checkpoints.manifest import MANIFEST_NAME
from fulgurite.checkpoints.runs import ADAPTERS, ARTEFACTS, CHECKPOINTS
from fulgurite.checkpoints.store import verify

State = Literal["good", "damaged", "missing", "not covered", "leftover"]


@dataclass(frozen=True)
class FileState:
    """What `audit` found of one file.

    Args:
        path: the file, or the leftover folder.
        state: ``good`` has its recorded digest; ``damaged`` has another; ``missing`` is recorded and not there;
            ``not covered`` has no recorded digest, so nothing is known of it; ``leftover`` is what an
            interrupted write left, cleared when the run goes on.
        note: more, where there is more to say.
    """

    path: Path
    state: State
    note: str = ""

    @property
    def sound(self) -> bool:
        """Whether nothing that was written is lost."""
        return self.state not in ("damaged", "missing")


def audit(path: str | Path) -> list[FileState]:
    """Check every recorded digest below ``path``; files without one are listed as ``not covered``.

    Reads all covered bytes. Links are not followed. Raises `MissingError` where there is no such folder.
    """
    path = Path(path)
    if not resolve(path).is_dir():
        raise MissingError(f"{path}: {'a file' if path.exists() else 'no such folder'}; give a run, a checkpoint, ...")
    found = list(_folder(path))
    old = path.absolute().with_name(f".{path.absolute().name}.old")
    if path.exists() and old.exists():
        found.append(FileState(old, "leftover", "replaced version of an interrupted write"))
    return found


def digested_folders(path: str | Path) -> list[Path]:
    """All folders with a manifest at or below ``path``, by name; interrupted writes count with their old version."""
    path = Path(path)
    if (resolve(path) / MANIFEST_NAME).is_file():
        return [path]
    if not path.is_dir():
        return []
    names = {path / (published(entry) or entry.name) for entry in path.iterdir() if not entry.is_symlink()}
    inner = sorted(name for name in names if resolve(name).is_dir() and not is_leftover(name))
    return [folder for name in inner for folder in digested_folders(name)]


def _folder(path: Path) -> Iterator[FileState]:
    folder = resolve(path)
    if (folder / MANIFEST_NAME).is_file():
        yield from _checkpoint(path)
    elif _lost_its_manifest(folder):
        yield FileState(
            path / MANIFEST_NAME,
            "missing",
            f"{path} has no {MANIFEST_NAME}, so nothing in it can be checked or loaded.",
        )
        yield from (FileState(file, "not covered") for file in sorted(folder.rglob("*")) if not file.is_dir())
    else:
        yield from _plain(folder)


def _checkpoint(path: Path) -> Iterator[FileState]:
    folder, report = resolve(path), verify(path)
    aside = "" if folder == path else f"in {folder.name}, set aside by an interrupted write"
    for name, problems in report.files.items():
        if problems:
            state = "damaged" if (folder / name).exists() else "missing"
            yield FileState(path / name, state, "\n".join(problems))
        else:
            yield FileState(path / name, "good", aside)
    for name in report.extra:
        yield FileState(path / name, "not covered", "not part of the checkpoint, never read")
    if report.manifest is None:
        yield from (
            FileState(path / f.name, "not covered") for f in sorted(folder.iterdir()) if f.name != MANIFEST_NAME
        )


def _plain(folder: Path) -> Iterator[FileState]:
    listing: dict[str, Versions] = {}
    file = folder / LISTING_NAME
    if file.exists():
        try:
            listing = read_listing(folder)
            yield FileState(file, "good")
        except DamagedError as error:
            yield FileState(file, "damaged", str(error))
    for name, versions in listing.items():
        yield _listed(folder / name, versions)
    for entry in sorted(folder.iterdir()):
        if entry.name in listing or entry == file:
            continue
        name = published(entry)
        if name is not None and not (folder / name).exists():
            yield FileState(entry, "leftover", f"{name} is read from it until the run goes on")
            yield from _folder(folder / name) if entry.is_dir() else ()
        elif entry.name == LOCK_NAME:
            yield FileState(entry, "leftover", "a lock: of a run that is going on, or that was killed")
        elif is_leftover(entry):
            yield FileState(entry, "leftover", "of an interrupted write")
        elif entry.is_dir() and not entry.is_symlink():
            yield from _folder(entry)
        else:
            yield FileState(entry, "not covered", "a link, not followed" if entry.is_symlink() else "")


def _listed(file: Path, versions: Versions) -> FileState:
    if not file.exists():
        return FileState(file, "missing", f"{file} is missing, but {LISTING_NAME} lists it.")
    version = version_at(file, versions)
    if version is None:
        size = file.stat().st_size
        written = f"{versions[0].bytes} bytes, {versions[0].digest}"
        return FileState(file, "damaged", f"{file} is damaged: {size} bytes that are not those written ({written}).")
    return FileState(file, "good", "" if version == versions[0] else "the version before an interrupted write")


def _lost_its_manifest(folder: Path) -> bool:
    """Whether a folder without manifest must have had one: it holds tensors, or lies where only checkpoints lie."""
    if any(folder.glob("*.safetensors")):
        return True
    placed = folder.absolute().parent.name in (CHECKPOINTS, ADAPTERS, ARTEFACTS)
    return placed and not any(entry.is_dir() for entry in folder.iterdir())
