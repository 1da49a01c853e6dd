"""fit, validate, test and predict: Lightning's command line, one parser per command, and this project's options.

Order of precedence, lowest first: defaults of the signatures; the config stored in the run of the checkpoint, only
when no ``--config`` is given; ``--config`` files from left to right; the rest of the command line.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import jsonargparse
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fulgurite.commands import yaml_loader
from fulgurite.commands.errors import DONE, INTERRUPTED, TERMINATED, ConfigError
from fulgurite.commands.invocation import Invocation
from fulgurite.commands.names import import_named
from fulgurite.commands.runs import experiment_folder, new_folder, plan_of
from fulgurite.commands.train_cli import ALLOWED, PARSER_MODE, TrainCLI

FOLDER_VARIABLE = "FULGURITE_FOLDER"  # how the first process tells the processes that it starts


def run(command: str, argv: list[str]) -> int:
    """Parse, build and run one of the four Trainer commands; returns the exit code.

    Raises:
        ConfigError: the command line, a config or a constructor's argument is wrong.
        DataError, CheckpointError: what the run reads is not as it must be.
    """
    invocation = Invocation.of(command, argv)
    plan = plan_of(invocation)
    if plan.stored is not None:
        invocation = invocation.on_top_of(plan.stored)
    allow_imports(invocation.allow)
    import_named(invocation.typed, invocation.documents)
    folder = _folder(invocation, plan.run)
    try:
        cli = TrainCLI(invocation, plan, folder)
    except SystemExit as ended:  # --help and --print_config
        return int(ended.code or 0)
    before = os.environ.get(FOLDER_VARIABLE)
    os.environ[FOLDER_VARIABLE] = str(folder)
    try:
        return execute(cli)
    finally:
        if before is None:
            del os.environ[FOLDER_VARIABLE]
        else:
            os.environ[FOLDER_VARIABLE] = before


def allow_imports(extra: tuple[str, ...]) -> None:
    """Let class paths come from ``ALLOWED`` and ``extra`` only; anything else is refused before its import."""
    for prefix in extra:
        if not all(part.isidentifier() for part in prefix.split(".")):
            raise ConfigError(f"--allow {prefix[:80]!r}: expected a package or module, as my_project.models")
    if extra and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    jsonargparse.set_loader(PARSER_MODE, yaml_loader.load_text, (ConfigError,))
    jsonargparse.set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=[*ALLOWED, *extra])


def execute(cli: TrainCLI) -> int:
    """Run the Trainer; signals become exit codes."""
    trainer = cli.trainer
    try:
        getattr(trainer, cli.invocation.command)(**cli.method_arguments())
        if not trainer.received_sigterm and cli.invocation.command == "fit" and cli.config.test_after_fit:
            trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    except SIGTERMException:
        return TERMINATED
    except SystemExit as ended:
        if trainer.interrupted and ended.code == 1:  # what the Trainer makes of Ctrl-C
            return INTERRUPTED
        raise
    return TERMINATED if trainer.received_sigterm else DONE


def _folder(invocation: Invocation, run: Path | None) -> Path:
    """Where this command writes: the run, or ``evaluations/<command>-<time>`` of the run that it evaluates."""
    if FOLDER_VARIABLE in os.environ and "LOCAL_RANK" in os.environ:
        return Path(os.environ[FOLDER_VARIABLE])
    if invocation.command == "fit":
        if run is None and invocation.option("resume") == "auto":
            rank_zero_info("--resume auto: nothing to continue, a new run starts")
        return run or new_folder(experiment_folder(invocation))
    return new_folder((run or experiment_folder(invocation)) / "evaluations", f"{invocation.command}-")
