"""Where a command reads and writes: which run, which checkpoint, which stored config.

``<runs>/<experiment>/<time>/`` is a run; it holds ``config.yaml`` and ``checkpoints/<name>/manifest.json``. A
folder without a manifest is not a checkpoint: it was never finished.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from fulgurite.checkpoints import (
    LISTING_NAME,
    MANIFEST_NAME,
    CheckpointError,
    DamagedError,
    newest_checkpoint,
    newest_good,
    verify,
)
from fulgurite.checkpoints.atomic import resolve
from fulgurite.checkpoints.runs import CHECKPOINTS, EVALUATIONS
from fulgurite.commands.errors import ConfigError
from fulgurite.commands.invocation import Invocation

LIGHTNING_WORDS = ("best", "last", "hparams", "registry")  # of a Trainer that has just fitted, or of a store elsewhere


@dataclass(frozen=True)
class Plan:
    """What the command starts from.

    Attributes:
        run: the run it belongs to, None for a new one.
        checkpoint: the checkpoint folder it loads, None for fresh weights.
        made_with: the config of the run that the checkpoint comes from.
        stored: the same config, read below everything else; None where ``--config`` was given.
    """

    run: Path | None = None
    checkpoint: Path | None = None
    made_with: Path | None = None
    stored: Path | None = None


def plan_of(invocation: Invocation) -> Plan:
    """Decide what to continue or evaluate. Raises ``ConfigError`` where a named run or checkpoint is not
    there.
    """
    named = invocation.option("ckpt_path")
    if named in LIGHTNING_WORDS and not Path(named).exists():
        advice = "; --resume auto goes on with the newest run" if invocation.command == "fit" else ""
        raise ConfigError(f"--ckpt_path {named}: expected a checkpoint folder or a run folder{advice}")
    if invocation.command == "fit":
        run, checkpoint = _to_continue(invocation, named)
    else:
        run, checkpoint = None, checkpoint_at(named, "--ckpt_path") if named else None
    origin = None if checkpoint is None else run_of(checkpoint)
    made_with = None if origin is None else origin / "config.yaml"
    return Plan(run or origin, checkpoint, made_with, None if invocation.configs else made_with)


def _to_continue(invocation: Invocation, named: str | None) -> tuple[Path | None, Path | None]:
    resume, chosen = invocation.option("resume") or "none", invocation.option("run")
    run = Path(chosen) if chosen else None
    if named and resume != "none":
        raise ConfigError("--resume and --ckpt_path both name what to continue; give one of them")
    if resume == "auto":
        run = run or newest_run(experiment_folder(invocation))
        return run, good_checkpoint(run, invocation) if run is not None else None
    if named:
        checkpoint = checkpoint_at(named, "--ckpt_path")
    elif resume == "none":
        checkpoint = None
    else:
        at = Path(resume)
        checkpoint = (is_run(at) and good_checkpoint(at, invocation)) or checkpoint_at(resume, "--resume")
    if run is not None and (run / "config.yaml").exists() and not is_of(checkpoint, run):
        raise ConfigError(
            f"--run {run}: holds a run already{'' if checkpoint is None else f', and not that of {checkpoint}'}; "
            "add --resume auto to continue it, or name another folder"
        )
    return run, checkpoint


def is_of(checkpoint: Path | None, run: Path) -> bool:
    """Whether a checkpoint lies in this run."""
    origin = None if checkpoint is None else run_of(checkpoint)
    return origin is not None and origin.resolve() == run.resolve()


def experiment_of(invocation: Invocation) -> str:
    """``--experiment``, or the name of the first config, or "unnamed"."""
    name = invocation.option("experiment") or (invocation.configs[0].stem if invocation.configs else "unnamed")
    if not re.fullmatch(r"[\w=+,.-]+", name) or not name.strip("."):
        raise ConfigError(f"experiment {name[:80]!r}: expected letters, digits and any of _=+,.-; set --experiment")
    return name


def experiment_folder(invocation: Invocation) -> Path:
    """The folder of all runs of this experiment: in ``trainer.default_root_dir``, else in ``--runs``."""
    root = invocation.option("trainer.default_root_dir") or invocation.option("runs") or "runs"
    return Path(root) / experiment_of(invocation)


def evaluation_folder(parent: Path, command: str) -> Path:
    """A name in ``<parent>/evaluations`` that nothing has yet. Nothing is created."""
    stem = parent / EVALUATIONS / f"{command}-{datetime.now():%Y-%m-%d_%H-%M-%S}"
    path, number = stem, 1
    while path.exists():
        number += 1
        path = stem.with_name(f"{stem.name}-{number}")
    return path


def names_in(folder: Path) -> set[str] | None:
    """Names of what is in a folder; None where there is no such folder."""
    return {path.name for path in folder.iterdir()} if folder.is_dir() else None


def remove_unused(folder: Path, before: set[str] | None) -> None:
    """Remove what a command that never began left in its folder, and the folder itself if it is the command's own.

    Nothing is removed where more than ``config.yaml``, its digest and empty event files is new. What was there stays.

    Args:
        folder: where the command writes.
        before: `names_in` before the command.
    """
    new = (names_in(folder) or set()) - (before or set())
    if all(name in ("config.yaml", LISTING_NAME) or name.startswith("events.out.tfevents.") for name in new):
        for name in new:
            (folder / name).unlink()
        with suppress(OSError):  # not there, or not empty
            if before is None:
                folder.rmdir()
            if folder.parent.name == EVALUATIONS:
                folder.parent.rmdir()


def newest_run(folder: Path) -> Path | None:
    """The newest run of an experiment that has a finished checkpoint."""
    runs = sorted(folder.iterdir(), key=time_and_number, reverse=True) if folder.is_dir() else []
    return next((run for run in runs if has_checkpoints(run)), None)


def time_and_number(run: Path) -> tuple[str, int]:
    """What orders the names that `new_run` makes: ``<time>``, ``<time>-2``, ``<time>-10``."""
    made = re.fullmatch(r"(\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)-(\d+)", run.name)
    return (made[1], int(made[2])) if made else (run.name, 1)


def has_checkpoints(run: Path) -> bool:
    """Whether a run has written a checkpoint, sound or not."""
    try:
        return newest_checkpoint(run) is not None
    except CheckpointError:
        return True


def is_run(path: Path) -> bool:
    """Whether checkpoints lie in it, rather than it being one."""
    return not (resolve(path) / MANIFEST_NAME).is_file() and (path / CHECKPOINTS).is_dir()


def good_checkpoint(run: Path, invocation: Invocation) -> Path | None:
    """The newest checkpoint of ``run``, or None; with ``--resume_from_older`` the newest of which every byte is sound.

    Raises:
        DamagedError: the newest one is not as it was written, and an older one was not asked for. Names file and
            tensor, and the newest good checkpoint.
        ConfigError: there is no good one.
    """
    older = invocation.flag("resume_from_older")
    try:
        newest = newest_checkpoint(run)
        problems = [] if newest is None else verify(newest).problems
    except CheckpointError as error:
        newest, problems = None, [str(error)]
    if not problems:
        return newest
    good = newest_good(run / CHECKPOINTS)
    if good is None:
        raise ConfigError(f"{problems[0]} No checkpoint in {run / CHECKPOINTS} is good; start a new run.")
    step = f"{good[0]} (step {good[1].facts.get('global_step', 'unknown')})"
    if not older:
        raise DamagedError(f"{problems[0]} The newest good checkpoint is {step}: --resume_from_older goes on there.")
    from lightning.pytorch.utilities.rank_zero import rank_zero_info

    rank_zero_info(f"{problems[0]} Going on from the newest good checkpoint, {step}.")
    return good[0]


def checkpoint_at(named: str, option: str) -> Path:
    """The checkpoint that a path names: a checkpoint folder, or the newest one of a run folder."""
    path = Path(named)
    if (resolve(path) / MANIFEST_NAME).is_file():
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        there = "has no manifest.json and no finished checkpoint in checkpoints/" if path.is_dir() else "does not exist"
        raise ConfigError(f"{option} {named}: {there}; expected a checkpoint folder or a run folder")
    return newest


def run_of(checkpoint: Path) -> Path | None:
    """The run folder that a checkpoint or artefact lies in: the nearest parent with a ``config.yaml``."""
    for parent in checkpoint.absolute().parents[:3]:
        if (parent / "config.yaml").is_file():
            here = Path.cwd()
            return parent.relative_to(here) if parent.is_relative_to(here) else parent
    return None
