"""The folder of one run: ``<root>/<experiment>/<time>/`` and what is in it."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

from fulgurite.checkpoints.atomic import is_leftover, naming, resolve
from fulgurite.checkpoints.errors import CheckpointError, MissingError
from fulgurite.checkpoints.manifest import MANIFEST_NAME, Manifest, read_manifest

CHECKPOINTS = "checkpoints"
ADAPTERS = "adapters"
ARTEFACTS = "artefacts"
EVALUATIONS = "evaluations"


def new_run(root: str | Path, experiment: str, time: datetime | None = None) -> Path:
    """Make the folder of a new run and return its path. For rank 0, which hands the path to the others.

    Two runs that start in the same second get different folders (``...-2``). ValueError for an experiment
    name that is not a plain file name; `WriteError` where the folder cannot be made.
    """
    if not re.fullmatch(r"[\w=+,.-]+", experiment) or experiment.strip(".") == "":
        raise ValueError(f"experiment={experiment!r} is not a plain name; use letters, digits and any of _=+,.-")
    stem = (time or datetime.now()).strftime("%Y-%m-%d_%H-%M-%S")
    parent, count = Path(root, experiment), 1
    with naming(parent):
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            run = parent / (stem if count == 1 else f"{stem}-{count}")
            try:
                run.mkdir()
                return run
            except FileExistsError:
                count += 1


def list_checkpoints(run: str | Path) -> list[tuple[Path, Manifest]]:
    """All checkpoints of a run with a sound manifest, oldest first; tensors are not read.

    A replace that a crash interrupted counts with its old version. Raises `CheckpointError` for a damaged
    manifest, naming the newest checkpoint whose manifest is sound.
    """
    found, damaged = [], []
    for path in sorted(_candidates(Path(run, CHECKPOINTS))):
        try:
            found.append((path, read_manifest(path)))
        except MissingError:
            continue
        except CheckpointError as error:
            damaged.append(error)
    found.sort(key=lambda pair: pair[1].created)
    if damaged:
        good = f"The newest with a sound manifest is {found[-1][0]}." if found else "There is no other checkpoint."
        raise type(damaged[0])(f"{damaged[0]} {good}")
    return found


def newest_checkpoint(run: str | Path) -> Path | None:
    """The checkpoint of ``run`` that was written last, or None. Errors as `list_checkpoints`."""
    found = list_checkpoints(run)
    return found[-1][0] if found else None


def _candidates(folder: Path) -> set[Path]:
    """Names under which a checkpoint can be read, whether published or left aside by a crash."""
    if not folder.is_dir():
        return set()
    names = set()
    for entry in folder.iterdir():
        name = entry.name.removeprefix(".").removesuffix(".old") if is_leftover(entry) else entry.name
        path = folder / name
        if not is_leftover(entry) or resolve(path) == entry:
            names.add(path)
    return {path for path in names if (resolve(path) / MANIFEST_NAME).is_file()}
