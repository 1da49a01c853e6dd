"""The folder that a command leaves behind: config, final metrics, predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from fulgurite.callbacks.checkpoint_io import MANIFEST_KEY, METRICS_KEY
from fulgurite.callbacks.gather import gather_rows
from fulgurite.checkpoints import write_json, write_text
from fulgurite.checkpoints.structure import MODULES
from fulgurite.datamodules.base import FulguriteDataModule
from fulgurite.samples import Sample


class RunFolder(Callback):
    """Writes ``config.yaml`` at set-up, ``metrics.json`` at the end, and ``predictions.jsonl`` after
    ``predict``.

    Hooks: ``setup``, before any checkpoint can be written; the end of fit, validate, test and predict, after
        the last checkpoint. Rank 0 decides the folder, hands it to the others, and is the only one that
        writes. Nothing is stored in checkpoints; a resumed run writes the same files again. With
        ``fast_dev_run`` nothing is written.

    Args:
        path: the folder of this command: the run itself, or ``evaluations/<command>-<time>`` in it.
        config: the complete config as YAML text.
    """

    def __init__(self, path: Path, config: str) -> None:
        self.path = path
        self.config = config
        self.announced = False
        self.metrics: dict[str, float | None] = {}
        self.predictions: list[tuple[tuple[int, int, int, int], dict[str, Any]]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Agree on the folder and write the config into it."""
        self.path = Path(trainer.strategy.broadcast(str(self.path)))
        trainer._default_root_dir = str(self.path)
        if trainer.is_global_zero and not trainer.fast_dev_run:
            write_text(self.path / "config.yaml", self.config)
            if not self.announced:  # a test after the fit has the same folder
                rank_zero_info(f"run folder: {self.path}")
            self.announced = True

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the config into the manifest, so that the checkpoint can be loaded wherever it is moved to."""
        entry = checkpoint.setdefault(MANIFEST_KEY, {})
        entry["settings"] = yaml.safe_load(self.config)
        if hasattr(pl_module, "rebuilt"):
            entry["structure"] = {**entry.get("structure", {}), MODULES: pl_module.rebuilt}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Start from the metrics of the run that is resumed; one that is complete logs none again."""
        if trainer.state.fn == "fit":
            self.metrics.update(checkpoint.get(METRICS_KEY, {}))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the final metrics of the training."""
        self._write_metrics(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the metrics of ``validate``; the validation inside a fit is left to ``on_fit_end``."""
        if trainer.state.fn == "validate":
            self._write_metrics(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the metrics of ``test``, beside those of the fit that it followed."""
        results = getattr(pl_module, "test_results", None)
        if results is not None and trainer.is_global_zero and not trainer.fast_dev_run:
            write_json(self.path / "results.json", plain(results))
        self._write_metrics(trainer)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the predictions of one batch, with their place in the data."""
        if not isinstance(outputs, list) or not all(isinstance(row, dict) for row in outputs):
            raise TypeError(
                f"{type(pl_module).__name__}.predict_step returned {type(outputs).__name__}; "
                "expected a list of dicts, one per question"
            )
        for position, row in enumerate(outputs):
            self.predictions.append(((dataloader_idx, batch_idx, position, trainer.global_rank), plain(row)))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the rows of all ranks and write them in the order of the data.

        Rank r of W holds the items r::W of every global batch, so sorting by (loader, batch, position, rank)
        gives the order of the data back. All rows are held in memory once, on rank 0 twice. A module that predicts by
        the whole split gives its rows here, by ``predicted``, those of rank after rank in the order of the data.
        """
        if hasattr(pl_module, "predicted"):
            rank, rows = trainer.global_rank, pl_module.predicted()
            self.predictions += [((0, rank, position, 0), plain(row)) for position, row in enumerate(rows)]
        rows, self.predictions = gather_rows(self.predictions), []
        if trainer.is_global_zero and not trainer.fast_dev_run:
            ordered = [row for _, row in sorted(rows, key=lambda item: item[0])]
            data = trainer.datamodule
            if isinstance(data, FulguriteDataModule):
                ordered = with_questions(ordered, data.samples("predict"))
            lines = (json.dumps(row, ensure_ascii=False) for row in ordered)
            write_text(self.path / "predictions.jsonl", "".join(f"{line}\n" for line in lines))
            rank_zero_info(f"{len(ordered):,} predictions: {self.path / 'predictions.jsonl'}")

    def _write_metrics(self, trainer: Trainer) -> None:
        for name, value in trainer.callback_metrics.items():
            number = float(value)
            self.metrics[name] = number if math.isfinite(number) else None
        if trainer.is_global_zero and not trainer.fast_dev_run:
            write_json(self.path / "metrics.json", dict(sorted(self.metrics.items())))


def with_questions(rows: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Rows with the domain, question and video of their samples, which are in the same order.

    A row of another id than the sample in its place stays as it is, and so does what a row has itself.
    """
    joined = []
    for row, sample in zip_longest(rows, samples[: len(rows)]):
        if sample is not None and row.get("id") == sample.id:
            video = None if sample.video is None else sample.video.name
            row = {"id": sample.id, "domain": sample.domain, "question": sample.question, "video": video, **row}
        joined.append(row)
    return joined


def plain(value: Any) -> Any:
    """A value with its tensors as numbers and lists and NaN as None, so that it can be written as JSON."""
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value
