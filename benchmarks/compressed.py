"""What the tables of compressed models share: grids, bits, sparsities, rows that are kept as they are made, a page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fulgurite.checkpoints import write_json, write_text
from fulgurite.reports.compression import Point, tradeoff_section
from fulgurite.reports.page import Section, render_page
from fulgurite.reports.tables import html_table

GRID: dict[str, Any] = {"group_size": 64, "scheme": "asymmetric", "clip_search": True}
BITS, SPARSITIES = (4, 3, 2), (0.4, 0.5, 0.6, 0.7)


class Rows:
    """Figures of methods and seeds, in a file that a later call goes on with.

    Args:
        file: JSON.
        settings: of all rows; a file of others is refused.
        wanted: words that the name of a row begins with; all rows where None.
    """

    def __init__(self, file: Path, settings: dict[str, Any], wanted: Sequence[str] | None) -> None:
        self.file, self.wanted = file, wanted
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"settings": settings, "rows": {}}
        if known["settings"] != settings:
            raise SystemExit(f"{file} is of {known['settings']}: choose another --folder")
        self.settings, self.found = settings, known["rows"]

    def missing(self, name: str, seed: int) -> bool:
        """Whether a row is wanted and not there."""
        asked = self.wanted is None or any(name.startswith(word) for word in self.wanted)
        return asked and f"{name} | {seed}" not in self.found

    def add(self, name: str, seed: int, figures: dict[str, float]) -> None:
        """Keep a row."""
        self.found[f"{name} | {seed}"] = figures
        write_json(self.file, {"settings": self.settings, "rows": self.found})

    def show(
        self, title: str, metric: str, text: Callable[[float], str], picture: tuple[str, Callable[[float], float]]
    ) -> None:
        """Mean and spread over seeds of every method, printed, and as ``report.html`` beside the file.

        Args:
            title: of the page.
            metric: name of the figure.
            text: of one value or spread.
            picture: name of the axis, and what it shows of a mean.
        """
        by_name: dict[str, list[dict[str, float]]] = {}
        for key, figures in self.found.items():
            by_name.setdefault(key.rpartition(" | ")[0], []).append(figures)
        header = ["method", metric, "seeds", "bits per weight", "sparsity", "seconds"]
        table: list[list[str]] = []
        points: dict[str, list[Point]] = {"bits": [], "sparsity": []}
        for name, found in by_name.items():
            values = torch.tensor([each[metric] for each in found], dtype=torch.float64)
            mean, spread = values.mean().item(), f" ± {text(values.std().item())}" if len(found) > 1 else ""
            bits, sparsity, seconds = (
                sum(each[key] for each in found) / len(found) for key in ("bits", "sparsity", "seconds")
            )
            pruned = "%" in name
            shown = f"{100 * sparsity:.1f} %" if pruned else "–"
            table.append([name, f"{text(mean)}{spread}", str(len(found)), f"{bits:.2f}", shown, f"{seconds:.0f}"])
            for kind in ("bits", "sparsity"):
                if name == "dense" or (kind == "sparsity") == pruned:
                    size = bits if kind == "bits" else 100 * sparsity
                    points[kind].append(Point(name, size, picture[1](mean)))
        for row in [header, *table]:
            print("".join(f"{cell:>18}" for cell in row))
        sections = [
            Section(re.sub("^.", lambda first: first[0].upper(), metric), html_table(header, table)),
            tradeoff_section(points["bits"], "bits per weight", picture[0], "Quantized"),
            tradeoff_section(points["sparsity"], "sparsity, %", picture[0], "Pruned"),
        ]
        page = self.file.with_name("report.html")
        write_text(page, render_page(title, "", sections, {key: str(value) for key, value in self.settings.items()}))
        print(page)
