"""fit, validate, test and predict: Lightning's command line, one parser per command, and this project's
options.

Order of precedence, lowest first: defaults of the signatures; the config stored in the run of the checkpoint,
only when no ``--config`` is given; ``--config`` files from left to right; the rest of the command line.
"""

from __future__ import annotations

import atexit
import logging
import os
import sys
import warnings
from contextlib import nullcontext

import torch.distributed as dist
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from fulgurite.callbacks.finite import NotFiniteError
from fulgurite.callbacks.interruption import Interruption
from fulgurite.checkpoints import read_manifest, writing
from fulgurite.checkpoints.structure import rebuild
from fulgurite.commands.errors import DONE, INTERRUPTED, NOT_FINITE, SIGNALLED, ConfigError
from fulgurite.commands.imports import imports_allowed
from fulgurite.commands.invocation import Invocation
from fulgurite.commands.names import import_named
from fulgurite.commands.runs import plan_of
from fulgurite.commands.train_cli import FOLDER_VARIABLE, TrainCLI, refuse_options_of_fit
from fulgurite.modules.adapted import AdaptedModule

# What Lightning warns of and this project does on purpose, by the start of the message.
EXPECTED = (
    r".*(LeafSpec|nn\.functional\.all_gather).* is deprecated",  # Lightning's own use of torch
    r"Total length of `list` across ranks is zero",  # epochs within a stage have no validation
    r"Found \d+ module\(s\) in eval mode",  # a frozen backbone stays in evaluation mode
    r"The number of training batches .* is smaller than the logging interval",  # a stage may be short
    r"The '\w+' does not have many workers",  # features are cached, so workers would only cost their start
    r"It is recommended to use `self\.log\(.*sync_dist=True",  # metrics are reduced before they are logged
)
# The same, of a run that goes on in its own folder, and of a checkpoint that is only evaluated.
RESUMED = r"Checkpoint directory .* exists and is not empty"
EVALUATED = r"The dirpath has changed from "


def run(command: str, argv: list[str]) -> int:
    """Parse, build and run one of the four Trainer commands; returns the exit code.

    Raises:
        ConfigError: the command line, a config or a constructor's argument is wrong.
        DataError, CheckpointError: what the run reads is not as it must be.
    """
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(no_advertisement)
    atexit.register(leave_group)
    invocation = Invocation.of(command, argv)
    if command != "fit":
        refuse_options_of_fit(invocation)
    plan = plan_of(invocation)
    more = [EVALUATED] if command != "fit" else [RESUMED] if plan.checkpoint is not None else []
    for message in (*EXPECTED, *more):
        warnings.filterwarnings("ignore", message=message)
    if plan.stored is not None:
        invocation = invocation.on_top_of(plan.stored)
    with imports_allowed(invocation.allow):
        import_named(invocation.typed, invocation.documents)
        cli = TrainCLI(invocation, plan)
        try:
            return execute(cli)
        except BaseException:
            if command != "fit" or cli.trainer.global_step == 0:
                cli.remove_unused_folder()
            raise


def leave_group() -> None:
    """End this process's part in the process group: its threads, still there at the exit, may abort a good run."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def no_advertisement(record: logging.LogRecord) -> bool:
    """Whether a line of Lightning's log is about this run, and not about a product to install."""
    return "Tip: For seamless" not in record.getMessage()


def execute(cli: TrainCLI) -> int:
    """Run the Trainer; a signal becomes the exit code 128 + its number."""
    trainer, before = cli.trainer, os.environ.get(FOLDER_VARIABLE)
    (interruption,) = (c for c in trainer.callbacks if isinstance(c, Interruption))
    os.environ[FOLDER_VARIABLE] = str(cli.folder)
    fits = cli.invocation.command == "fit"
    owned = writing(cli.folder) if fits and trainer.is_global_zero and not trainer.fast_dev_run else nullcontext()
    if cli.plan.checkpoint is not None:
        manifest = read_manifest(cli.plan.checkpoint)
        rebuild(cli.model, manifest.structure)
        if not fits and isinstance(cli.model, AdaptedModule):
            # The data may know less (questions alone), and a sharded model cannot be rebuilt later.
            cli.model.restore(manifest.facts)
    try:
        with owned:
            getattr(trainer, cli.invocation.command)(**cli.method_arguments())
            if not interruption.received and fits and cli.config.test_after_fit:
                trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    except SIGTERMException:
        return SIGNALLED + interruption.received
    except NotFiniteError as error:
        print(f"fulgurite {cli.invocation.command}: {error}", file=sys.stderr)
        return NOT_FINITE
    except MisconfigurationException as error:  # Lightning's word for settings that do not go together
        raise ConfigError(str(error)) from error
    except SystemExit as ended:
        if trainer.interrupted and ended.code == 1:  # what the Trainer makes of Ctrl-C
            return INTERRUPTED
        raise
    finally:
        if before is None:
            del os.environ[FOLDER_VARIABLE]
        else:
            os.environ[FOLDER_VARIABLE] = before
    return SIGNALLED + interruption.received if interruption.received else DONE
