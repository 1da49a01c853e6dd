"""``metrics.csv`` in the run folder: one row per logged step, kept when a run is resumed."""

from __future__ import annotations

import csv
import io
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from fulgurite.checkpoints.atomic import write_text

FLUSH_SECONDS = 10.0


class MetricsCSV(Logger):
    """Writes every logged metric into ``<folder>/metrics.csv``; columns in the order of their first
    appearance.

    A resumed run keeps the rows of the earlier part up to the first step that it logs, and of that step those with
    other metrics, so that nothing appears twice. Rows are held in memory (about 100 bytes per value) and the whole file
    is replaced at most every ten seconds, with every checkpoint and at the end, so a reader always finds a complete
    file and a killed run loses no row that its checkpoint stands on. Only rank 0 writes.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.rows: list[dict[str, Any]] | None = None
        self.first_step = 0
        self.written_at = 0.0

    @property
    def name(self) -> str:
        """Part of no path."""
        return ""

    @property
    def version(self) -> str:
        """Part of no path."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of ``metrics.csv``."""
        return str(self.folder)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: ``config.yaml`` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add a row."""
        step = 0 if step is None else step
        if self.rows is None:
            self.rows = [row for row in read_rows(self.folder / "metrics.csv") if int(row["step"]) <= step]
            self.first_step = step
        if step == self.first_step:
            again = metrics.keys() - {"epoch"}
            self.rows = [row for row in self.rows if int(row["step"]) < step or not again & row.keys()]
        self.rows.append({"step": step, **{name: float(value) for name, value in metrics.items()}})

    @rank_zero_only
    def save(self) -> None:
        """Write the file if the last write is ten seconds ago."""
        if self.rows and time.monotonic() - self.written_at > FLUSH_SECONDS:
            self._write()

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Write the file, and once more with the next row: a step is logged after its checkpoint."""
        if self.rows:
            self._write()
        self.written_at = float("-inf")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the file."""
        if self.rows:
            self._write()

    def _write(self) -> None:
        names = dict.fromkeys(name for row in self.rows or [] for name in row)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(names), restval="")
        writer.writeheader()
        writer.writerows(self.rows or [])
        write_text(self.folder / "metrics.csv", text.getvalue())
        self.written_at = time.monotonic()


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a ``metrics.csv``, without the empty cells; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [{name: value for name, value in row.items() if value != ""} for row in csv.DictReader(file)]
