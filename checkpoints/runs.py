"""The folder of one run: ``<root>/<experiment>/<time>/`` and what is in it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from fulgurite.checkpoints.atomic import is_leftover, naming, published, resolve
from fulgurite.checkpoints.errors import CheckpointError, DamagedError, MissingError
from fulgurite.checkpoints.manifest import MANIFEST_NAME, Manifest, read_manifest
from fulgurite.checkpoints.store import verify

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

    A replace that a crash interrupted counts with its old version. Raises `CheckpointError` for a damaged or lost
    manifest, naming the newest good checkpoint.
    """
    found = []
    for path in sorted(_candidates(Path(run, CHECKPOINTS))):
        with naming_another(path):
            found.append((path, read_manifest(path)))
    return sorted(found, key=lambda pair: pair[1].created)


def newest_checkpoint(run: str | Path) -> Path | None:
    """The checkpoint of ``run`` that was written last, or None. Errors as `list_checkpoints`."""
    found = list_checkpoints(run)
    return found[-1][0] if found else None


def readable_checkpoints(folder: str | Path) -> list[tuple[Path, Manifest]]:
    """The checkpoints directly in ``folder`` that have a sound manifest, oldest first; others are passed over."""
    found = []
    for path in _candidates(Path(folder)):
        try:
            found.append((path, read_manifest(path)))
        except CheckpointError:
            continue
    return sorted(found, key=lambda pair: (pair[1].created, pair[0].name))


def newest_good(folder: str | Path, but: str | Path | None = None) -> tuple[Path, Manifest] | None:
    """The newest checkpoint directly in ``folder`` of which every byte is sound, or None.

    Reads whole checkpoints, newest first, until one is good. ``but`` is passed over.
    """
    found = reversed(readable_checkpoints(folder))
    return next((pair for pair in found if pair[0] != but and verify(pair[0]).ok), None)


@contextmanager
def naming_another(path: str | Path) -> Iterator[None]:
    """Let an error about damage of the checkpoint ``path`` end with the checkpoint to take instead of it."""
    try:
        yield
    except (DamagedError, MissingError) as error:
        path = Path(path)
        if not resolve(path).exists():
            raise
        good = newest_good(path.parent, but=path)
        if good is None:
            advice = f"There is no other good checkpoint in {path.parent}."
        else:
            step = good[1].facts.get("global_step")
            advice = f"The newest good checkpoint beside it is {good[0]}{'' if step is None else f' (step {step})'}."
        raise type(error)(f"{error} {advice}") from error


def _candidates(folder: Path) -> set[Path]:
    """Names under which a checkpoint can be read, whether published or left aside by a crash."""
    if not folder.is_dir():
        return set()
    names = (folder / (published(entry) or entry.name) for entry in folder.iterdir())
    return {path for path in names if not is_leftover(path) and _was_checkpoint(resolve(path))}


def _was_checkpoint(path: Path) -> bool:
    """Whether it has a manifest, or what lies beside one; a folder appears at once, so a missing manifest was lost."""
    return (path / MANIFEST_NAME).is_file() or (path / "state.json").is_file()
