"""The report of a test: a page, a picture, every answer, and a table on the terminal."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from fulgurite.callbacks.gather import gather_rows
from fulgurite.checkpoints import write_bytes, write_text
from fulgurite.datamodules.base import FulguriteDataModule
from fulgurite.reports import ReportSource, Section, render_page
from fulgurite.reports.tables import html_table, plain_table
from fulgurite.samples import Sample

LIBRARIES = ("fulgurite", "torch", "lightning", "transformers", "timm", "torchmetrics")


class Report(Callback):
    """Writes ``report.html``, the sections' pictures and ``answers.jsonl`` into the run or evaluation folder.

    Hooks: ``on_validation_end`` of ``validate``, which prints the metrics alone; ``on_test_end``, after every metric is
        computed. Each rank brings the module's ``test_answers``; rank 0 gets them all, in the order of the data, writes
        and prints. Sections come from the module's ``report_sections`` (see `ReportSource`), then from the same method,
        given the trainer, of each callback that has it; where none of them has a table for the terminal, that of the
        metrics is printed. Nothing is stored in checkpoints; a second test writes the same files again. With
        ``fast_dev_run`` nothing is written.

    Args:
        title: of the page; the name of the folder that holds the run by default.
    """

    def __init__(self, title: str | None = None) -> None:
        self.title = title

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of ``validate``; a fit shows its own in the progress bar."""
        if trainer.state.fn == "validate" and trainer.is_global_zero:
            show([metrics_section(trainer.callback_metrics, printed=True)])

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather, write, print."""
        data = trainer.datamodule
        samples = data.samples("test") if isinstance(data, FulguriteDataModule) else []
        answers = getattr(pl_module, "test_answers", None)
        if answers is not None:
            answers = gather_rows(answers)
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        if answers is not None:
            answers = pl_module.test_answers = in_order(answers, samples)
        folder = Path(trainer.default_root_dir)
        sections = list(pl_module.report_sections(samples)) if isinstance(pl_module, ReportSource) else []
        for callback in trainer.callbacks:
            if hasattr(callback, "report_sections"):
                sections += callback.report_sections(trainer)
        sections.append(metrics_section(trainer.callback_metrics, all(s.printed is None for s in sections)))
        for name, content in {n: c for s in sections for n, c in s.files.items()}.items():
            write_bytes(folder / name, content)
        if answers is not None:
            lines = [json.dumps(row, ensure_ascii=False) for row in answers]
            write_text(folder / "answers.jsonl", "".join(f"{line}\n" for line in lines))
        title = self.title or folder.resolve().name
        subtitle = f"{type(pl_module).__name__} on {type(data).__name__}" if data else type(pl_module).__name__
        page = render_page(
            title,
            subtitle,
            sections,
            run_facts(trainer, len(samples if answers is None else answers), folder),
        )
        write_text(folder / "report.html", page)
        show(sections, folder / "report.html")


def in_order(rows: Sequence[dict[str, Any]], samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Rows in the order of ``samples``, those of no sample behind them by domain and id."""
    place = {(s.domain, s.id): i for i, s in enumerate(samples)}
    return sorted(rows, key=lambda r: (place.get((r["domain"], r["id"]), len(place)), str(r["domain"]), str(r["id"])))


def metrics_section(metrics: Mapping[str, Any], printed: bool) -> Section:
    """All logged metrics, by name; ``printed`` on the terminal where no other section has a table for it."""
    header, rows = ["metric", "value"], [[name, f"{float(value):.4f}"] for name, value in sorted(metrics.items())]
    html = f"<details><summary>{len(rows)} values</summary>{html_table(header, rows)}</details>"
    return Section("Metrics", html, order=1, printed=plain_table("Metrics", header, rows) if printed and rows else None)


def run_facts(trainer: Trainer, questions: int, folder: Path) -> dict[str, str]:
    """What a reader needs to judge and repeat the run: seeds, versions, devices, config."""
    module, data = trainer.lightning_module, trainer.datamodule
    facts = {
        "folder": str(folder),
        "checkpoint": str(trainer.ckpt_path) if trainer.ckpt_path else "weights in memory",
        "steps trained": f"{trainer.global_step:,}",
        "test questions": f"{questions:,}",
        "seed": os.environ.get("PL_GLOBAL_SEED", "not set"),
        "data seed": str(getattr(data, "seed", "not set")),
        "devices": f"{trainer.world_size} x {module.device.type}, precision {trainer.precision}",
        "versions": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        "python": platform.python_version(),
    }
    config = folder / "config.yaml"
    if config.is_file():
        facts["config.yaml"] = config.read_text(encoding="utf-8").rstrip() + "\n"
    return facts


def show(sections: Sequence[Section], page: Path | None = None) -> None:
    """What the sections have for the terminal, at least as wide as it must be, and where the page lies, if any."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console()
    if not console.is_terminal:
        console.width = 120
    for section in sections:
        if section.printed is not None:
            wide = console.options.update(max_width=10_000)
            console.width = max(console.width, Measurement.get(console, wide, section.printed).minimum)
            console.print(section.printed)
    if page is not None:
        console.print(f"report: {page}", highlight=False, markup=False, soft_wrap=True)
