"""When checkpoints are written, and who is told."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from fulgurite.callbacks.checkpoint_io import MANIFEST_KEY, METRICS_KEY
from fulgurite.callbacks.finite import FiniteCheck, any_rank, first_not_finite
from fulgurite.checkpoints import remove_leftovers, retain
from fulgurite.checkpoints.runs import ADAPTERS, ARTEFACTS, CHECKPOINTS
from fulgurite.methods.adapters.bank import AdapterBank

PATHS = ("best_model_path", "kth_best_model_path", "last_model_path")
PublishedHook = Callable[[pl.Trainer, pl.LightningModule, Path], None]


class PublishedCheckpoint(ModelCheckpoint):
    """`ModelCheckpoint` for checkpoint folders: ``<run>/checkpoints/epoch=..-step=..`` and ``last``.

    When: as Lightning's, with one change. A step checkpoint that falls on the last batch of an epoch is
    written at the end of that epoch instead, after validation, since a run resumed from it would skip that
    validation. Where the training ends at a step that no checkpoint holds, ``last`` is written once more; a
    stop in the middle of an epoch (``max_steps``, ``max_time``) is saved there, so that a resumed run goes on
    with the next batch.

    Once a folder is complete, ``on_checkpoint_published(trainer, pl_module, path)`` of every callback that
    has it, and every hook given to `subscribe`, is called on all ranks, once per step (``last`` repeats the
    step of the folder before it). The current metrics go into the manifest. At the start of a fit rank 0
    clears what a crashed run left half-written in its folder. Arguments not listed mean the same as Lightning's.

    Args:
        dirpath: ``<default_root_dir>/checkpoints`` unless given; the command line makes that the run folder.
        save_last: keep a folder ``last`` that repeats the newest one.
        save_top_k: how many to keep by ``monitor``, beside the newest; without one, the newest so many; -1 keeps all.
            A folder is deleted only once a newer one is complete and, if it was the last good one, never.
    """

    FILE_EXTENSION = ""

    def __init__(
        self,
        dirpath: str | None = None,
        filename: str | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        verbose: bool = False,
        save_last: bool = True,
        save_top_k: int = 1,
        save_on_exception: bool = False,
        save_weights_only: bool = False,
        auto_insert_metric_name: bool = True,
        every_n_train_steps: int | None = None,
        train_time_interval: timedelta | None = None,
        every_n_epochs: int | None = None,
        save_on_train_epoch_end: bool | None = None,
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            verbose=verbose,
            save_last=save_last,
            save_top_k=min(save_top_k, 0) if save_top_k < 1 else -1,  # deleting is left to `retain`
            save_on_exception=save_on_exception,
            save_weights_only=save_weights_only,
            auto_insert_metric_name=auto_insert_metric_name,
            every_n_train_steps=every_n_train_steps,
            train_time_interval=train_time_interval,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=save_on_train_epoch_end,
            # A run that repeats a step after a crash replaces that step's folder by an equal one.
            enable_version_counter=False,
        )
        self.keep = save_top_k
        self._own: list[str] = []
        self._hooks: list[PublishedHook] = []
        self._published_step: int | None = None
        self._due = False

    def subscribe(self, hook: PublishedHook) -> None:
        """Call ``hook(trainer, pl_module, path)`` on every rank whenever a new step has been published."""
        self._hooks.append(hook)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fix the folder, equal on all ranks, and clear what a crash left in it."""
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir, CHECKPOINTS).absolute())
        super().setup(trainer, pl_module, stage)
        # With max_steps, Lightning would take up a checkpoint of an epoch's end in the middle of that epoch.
        trainer.fit_loop._iteration_based_training = lambda: False
        if stage == "fit" and trainer.is_global_zero:
            run = Path(trainer.default_root_dir)
            for folder in (self.dirpath, run, run / ADAPTERS, run / ARTEFACTS):
                remove_leftovers(folder)
        trainer.strategy.barrier("published checkpoints")

    def publish_now(self, trainer: pl.Trainer, name: str = "last") -> Path:
        """Write the folder ``name`` whatever the schedule, and tell who listens. All ranks must call it.

        Returns:
            its path.
        """
        path = str(Path(self.dirpath, name))
        if name == self.CHECKPOINT_NAME_LAST:
            self.last_model_path = path
        self._publish(trainer, path)
        return Path(path)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A resumed run has its first step in a checkpoint already; the next batch may only add to gradients."""
        super().on_train_start(trainer, pl_module)
        self._last_global_step_saved = self._published_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a step checkpoint is due, or put it off to the end of the epoch."""
        if trainer.is_last_batch:
            every = self._every_n_train_steps
            self._due = every >= 1 and trainer.global_step % every == 0
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step:
            # The end of the epoch comes next, and would save as if the epoch were complete.
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save what is due at the end of an epoch, by epochs or put off by `on_train_batch_end`."""
        super().on_train_epoch_end(trainer, pl_module)
        due, self._due = self._due, False
        if due and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        if 0 <= trainer.max_epochs <= trainer.current_epoch + 1:
            self._save_last(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Bring ``last`` to the final step."""
        self._save_last(trainer)

    def _save_last(self, trainer: pl.Trainer) -> None:
        if self.save_last and not self._should_skip_saving_checkpoint(trainer):
            self.publish_now(trainer)

    def _retain(self, trainer: pl.Trainer) -> None:
        if self.keep < 1 or len(self._own) <= 1:
            return
        gone: list[str] = []
        if trainer.is_global_zero:
            best = self.keep if self.monitor is not None else 0
            last = 1 if self.monitor is not None else self.keep
            deleted = retain(self.dirpath, last, best, self.monitor, self.mode, self._own)
            gone = [str(path) for path in deleted]
        gone = trainer.strategy.broadcast(gone)
        self._own = [path for path in self._own if path not in gone]
        for path in gone:
            self.best_k_models.pop(path, None)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Hand the current metrics, the size of the model and whether it is finite to the manifest."""
        facts = checkpoint.setdefault(MANIFEST_KEY, {})
        facts["parameters"] = parameters_of(pl_module)
        if not any(isinstance(callback, FiniteCheck) for callback in trainer.callbacks):  # which lets no other through
            trained = ((name, p) for name, p in pl_module.named_parameters() if p.requires_grad)
            facts["finite"] = not any_rank(trainer, first_not_finite(trained) is not None)
        checkpoint[METRICS_KEY] = {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            if isinstance(value, Tensor) and value.numel() == 1
        }

    def state_dict(self) -> dict[str, Any]:
        """As Lightning's, and the folders that are this callback's to delete; by name, so that a run can be moved."""
        state = super().state_dict()
        best = {self._name(path): score for path, score in state["best_k_models"].items()}
        names = {key: self._name(state[key]) for key in PATHS}
        return {**state, **names, "best_k_models": best, "own": [*map(self._name, self._own)], "dirpath": ""}

    def _name(self, path: str) -> str:
        return os.path.relpath(path, self.dirpath) if path else ""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with those folders that are in this run."""

        def here(name: str) -> str:
            path = os.path.join(self.dirpath, name)
            return path if name and os.path.isdir(path) else ""

        state = state_dict | {"dirpath": self.dirpath}
        state |= {key: here(state[key]) for key in PATHS}
        state["best_k_models"] = {here(name): score for name, score in state["best_k_models"].items() if here(name)}
        self._own = [here(name) for name in state["own"] if here(name)]
        super().load_state_dict(state)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        counted = filepath != self.last_model_path
        if counted:
            self._own = [*(path for path in self._own if path != filepath), filepath]
        self._publish(trainer, filepath)
        if counted:
            self._retain(trainer)

    def _publish(self, trainer: pl.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if self._published_step == trainer.global_step:
            return
        self._published_step = trainer.global_step
        listeners = (getattr(callback, "on_checkpoint_published", None) for callback in trainer.callbacks)
        for hook in [*filter(None, listeners), *self._hooks]:
            hook(trainer, trainer.lightning_module, Path(filepath))


def parameters_of(module: pl.LightningModule) -> dict[str, int]:
    """Parameters that are ``trained``, and those of the ``model`` without the frozen copies in a bank of adapters."""
    bank = getattr(module, "bank", None)
    if isinstance(bank, AdapterBank):
        report = bank.report()
        return {"trained": report.num_parameters, "model": report.num_model_parameters}
    parameters = list(module.parameters())
    return {
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "model": sum(p.numel() for p in parameters),
    }
