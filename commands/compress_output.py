"""What ``prune`` and ``quantize`` print, and the table of layers that they write."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fulgurite.checkpoints import Manifest
from fulgurite.checkpoints.card import method_of, visible
from fulgurite.checkpoints.lineage import lineage_of
from fulgurite.commands.tables import console, plain_table, size_text
from fulgurite.methods.compression import LayerReport, totals
from fulgurite.reports.compression import compression_sections
from fulgurite.reports.merging import sections_of_lineage
from fulgurite.reports.page import render_page

REPORT_NAME, PAGE_NAME = "layers.csv", "report.html"
SHOWN = 8  # layers with the largest error in the table


def show_layers(reports: Sequence[LayerReport]) -> None:
    """Print a row per tower, and the layers whose outputs changed most."""
    table = plain_table("Compressed layers", "tower", "layers", "weights", "sparsity", "bits", "mean error", "seconds")
    for tower in dict.fromkeys(report.tower for report in reports):
        own = [report for report in reports if report.tower == tower]
        figures = totals(own)
        table.add_row(
            tower,
            f"{len(own):,}",
            f"{sum(each.shape[0] * each.shape[1] for each in own):,}",
            f"{100 * figures['sparsity']:.1f} %",
            "–" if all(report.bits is None for report in own) else f"{figures['bits']:.2f}",
            f"{sum(each.error for each in own) / len(own):.4g}",
            f"{sum(each.seconds for each in own):.1f}",
        )
    worst = plain_table("Largest relative error of outputs", "layer", "error")
    for report in sorted(reports, key=lambda each: -each.error)[:SHOWN]:
        worst.add_row(report.name, f"{report.error:.4g}")
    screen = console()
    screen.print(table)
    screen.print(worst)


def show_result(verb: str, figures: Mapping[str, Any], out: Any) -> None:
    """Print sizes, perplexities and where the result is."""
    screen = console()
    if "perplexity" in figures:
        before, after = figures["perplexity_before"], figures["perplexity"]
        screen.print(f"perplexity: {before:.4g} before, {after:.4g} after, on {figures['tokens']:,} tokens")
    screen.print(
        f"weights: {size_text(figures['bytes_before'])} before, {size_text(figures['bytes'])} after; "
        f"{figures['stored_bits']:.2f} bits stored per weight of the layers, scales and masks included",
        soft_wrap=True,
    )
    screen.print(f"{verb}d: {out}, equal to the live model in a fresh process", soft_wrap=True)


def documents_of(reports: Sequence[LayerReport], manifest: Manifest, out: Path) -> dict[str, bytes]:
    """The table of layers, and a page with pictures of it."""
    software = {name: str(version) for name, version in manifest.facts["software"].items()}
    sections = compression_sections(out.name, reports, manifest.facts.get("importance"))
    sections += sections_of_lineage(lineage_of(manifest, out))
    page = render_page(visible(out.name), f"{len(reports)} layers by {method_of(manifest)}", sections, software)
    return {REPORT_NAME: csv_of(reports), PAGE_NAME: page.encode()}


def csv_of(reports: Sequence[LayerReport]) -> bytes:
    """A row per layer, with the names of `LayerReport`'s fields as header."""
    text = io.StringIO()
    rows = [report.data() for report in reports]
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({**row, "shape": "x".join(map(str, row["shape"]))})
    return text.getvalue().encode()
