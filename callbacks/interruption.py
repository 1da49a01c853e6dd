"""Stopping on a signal: all ranks between the same two batches, a fit with a checkpoint."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fulgurite.callbacks.publish import PublishedCheckpoint
from fulgurite.checkpoints.runs import CHECKPOINTS

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Interruption(pl.Callback):
    """Ends the run after SIGTERM, SIGINT or SIGUSR1, whichever rank received it.

    The signal alone is noted. After every batch the ranks compare notes (one integer over a CPU group), so that all of
    them stop between the same two batches: a fit within one batch and one save, with its state in ``checkpoints/last``.
    A second SIGINT stops at once, without a checkpoint. A stop in the middle of a validation is stored so that the
    resumed run does the whole validation again. Before the first batch the signals end the process as ever.

    Under SLURM with automatic requeueing the requeue signal (SIGUSR1 by default) also queues the job again; give its
    command ``--resume auto``.

    Where the run fails otherwise, the processes that this one has started end with it, those that hang included.

    Hooks: ``setup`` puts the handlers in the place of Lightning's; the end of every batch, before a checkpoint of that
    batch is written; ``on_exception`` writes. Nothing is stored in checkpoints.

    Attributes:
        received: number of the signal that ends the run, equal on all ranks; 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._noted = 0
        self._group: Any = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take over the handling of signals, which begins with the first batch."""
        self.received = self._noted = 0
        trainer._signal_connector = _Handlers(trainer, self)
        if trainer.world_size > 1 and "gloo" not in dist.get_backend():
            self._group = dist.new_group(backend="gloo", timeout=getattr(trainer.strategy, "_timeout", None))

    def note(self, number: int, frame: FrameType | None) -> None:
        """Remember the signal; a second SIGINT is an interrupt like any other."""
        name = signal.Signals(number).name
        self._noted = max(self._noted, number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            name += " (once more to stop at once)"
        # Printing may be what the signal has interrupted; this cannot be.
        os.write(2, f"{name}: stopping after this batch\n".encode())

    def _compare(self, trainer: pl.Trainer) -> None:
        highest = self._noted
        if trainer.world_size > 1:
            number = torch.tensor(highest)
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
            highest = int(number)
        if highest and not self.received:
            self.received = highest
            # The training and validation loops look at this, and raise where their state is whole.
            trainer._signal_connector.received_sigterm = True

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Compare notes."""
        self._compare(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Compare notes."""
        self._compare(trainer)

    def on_test_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Compare notes."""
        self._compare(trainer)

    def on_predict_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        """Compare notes; the loop of predictions does not look for signals itself."""
        self._compare(trainer)
        if self.received:
            raise SIGTERMException

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Write ``checkpoints/last`` where a signal has ended a fit that had begun."""
        if not isinstance(exception, SIGTERMException):
            # At exit, so that the traceback comes first: Lightning kills a process whose child was killed.
            atexit.register(end_all, getattr(trainer.strategy.launcher, "procs", []))
            return
        if trainer.state.fn != "fit" or trainer.fast_dev_run or trainer.sanity_checking:
            return
        if trainer.validating:
            begin_again(trainer)
        publisher = next((c for c in trainer.callbacks if isinstance(c, PublishedCheckpoint)), None)
        if publisher is not None:
            path = publisher.publish_now(trainer)
        else:
            path = Path(trainer.default_root_dir, CHECKPOINTS, "last")
            trainer.save_checkpoint(path, weights_only=False)
        rank_zero_info(f"{signal.Signals(self.received).name}: step {trainer.global_step} is saved in {path}")
        environment = trainer._accelerator_connector.cluster_environment
        requeues = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
        if requeues and self.received == environment.requeue_signal and trainer.is_global_zero:
            requeue()


class _Handlers(_SignalConnector):
    """Lightning's place for handlers, with ours in it: its own call a collective from inside a handler."""

    def __init__(self, trainer: pl.Trainer, interruption: Interruption) -> None:
        super().__init__(trainer)
        self.interruption = interruption

    def register_signal_handlers(self) -> None:
        super().register_signal_handlers()
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self.interruption.note)


def requeue() -> None:
    """Ask SLURM to queue this job, or this task of an array, once more."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array else os.environ["SLURM_JOB_ID"]
    done = subprocess.run(["scontrol", "requeue", job], check=False)
    rank_zero_info(f"requeued SLURM job {job}" if done.returncode == 0 else f"scontrol requeue {job} failed")


def end_all(processes: list[subprocess.Popen]) -> None:
    """Kill what is left of ``processes``; one that is stopped, or waits for this one, would never end by itself."""
    for process in processes:
        if process.poll() is None:
            process.kill()


def begin_again(trainer: pl.Trainer) -> None:
    """Set the progress of the running validation back, to where a resumed run starts it anew."""
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.reset()
    # One batch that has begun and not ended: Lightning then goes back to the validation before it trains on.
    for counts in (progress.total, progress.current):
        counts.ready = counts.started = 1
