"""Six defences against all attacks on facts that a small model has learned, with one budget.

    python benchmarks/unlearning_table.py --checkpoint RUN [--facts facts] [--items 60] [--folder runs/unlearning]

RUN is what `fit --config configs/unlearning/facts.yaml` left. Defences are the records beside it, as they stand: the
same edit of the same weight, the same steps and rate; nothing is tuned. Items are the first facts that the model
answers right; accuracy on all of them is printed. Figures before the edit are taken once. Rows that are there are kept,
so that a call that was cut short goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jsonargparse
import lightning.pytorch as pl
import torch
import yaml
from compressed import Rows
from lightning.pytorch import LightningModule
from measure import machine

from fulgurite.checkpoints import write_json, write_text
from fulgurite.commands.imports import PARSER_MODE, imports_allowed
from fulgurite.commands.names import import_named
from fulgurite.commands.yaml_loader import load_file
from fulgurite.datamodules.base import Split
from fulgurite.datamodules.facts import Facts
from fulgurite.methods.unlearning.answers import says
from fulgurite.modules.edited_state import EditedState
from fulgurite.modules.item_questions import answer_of
from fulgurite.modules.multimodal_unlearning import MultimodalUnlearning
from fulgurite.modules.unlearning_summary import key_of
from fulgurite.reports.compression import Point, tradeoff_section
from fulgurite.reports.heat import heat_figure
from fulgurite.reports.images import img_tag
from fulgurite.reports.page import Section, render_page
from fulgurite.reports.tables import html_table
from fulgurite.reports.unlearning import items_html
from fulgurite.samples import Sample

RECORDS = Path(__file__).resolve().parent.parent / "configs" / "unlearning"
FIRST = "fact_erasure"
DEFENCES = {
    "Fact Erasure": FIRST,
    "Empty Response": "empty_response",
    "Error Injection": "error_injection",
    "Head Projection Defence": "head_projection",
    "Max-Entropy Defence": "max_entropy",
    "Input Rephrasing": "input_rephrasing",
}
SCORES = ("rewrite", "paraphrase", "neighbourhood", "target")
DAMAGE = ("delta/random", "delta/neighbour_questions", "delta/neighbour_images")


class Known(Facts):
    """The facts that a model knows."""

    kept_ids: frozenset[str] | None = None  # None takes all

    def read(self, split: Split) -> list[Sample]:
        """Those facts, in the order of the file."""
        found = super().read(split)
        return found if self.kept_ids is None else [sample for sample in found if sample.id in self.kept_ids]


def built(record: str, checkpoint: Path) -> MultimodalUnlearning:
    """The module of a record laid over the first one, on the model of a run."""
    with imports_allowed(()), tempfile.TemporaryDirectory() as folder:
        parser = jsonargparse.ArgumentParser(exit_on_error=False, parser_mode=PARSER_MODE)
        parser.add_argument("--config", action="config")
        parser.add_subclass_arguments(LightningModule, "model", fail_untyped=False)
        models = [{"model": load_file(RECORDS / f"{name}.yaml")["model"]} for name in dict.fromkeys((FIRST, record))]
        import_named((), models)
        argv = []
        for number, model in enumerate(models):
            path = Path(folder) / f"{number}.yaml"
            path.write_text(yaml.safe_dump(model), encoding="utf-8")
            argv += ["--config", str(path)]
        argv += ["--model.init_args.backbone.init_args.checkpoint", str(checkpoint.absolute())]
        return parser.instantiate(parser.parse_args(argv)).model


def trainer() -> pl.Trainer:
    """One that tests."""
    return pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False)


@torch.no_grad()
def known_of(module: MultimodalUnlearning, data: Known) -> list[str]:
    """Ids of the facts that the model answers right."""
    samples = data.samples("test")
    state = EditedState(module.bank, module.site)
    texts = module.written(samples, torch.zeros(len(samples), dtype=torch.long), state)
    return [sample.id for sample, text in zip(samples, texts) if says(text, answer_of(sample))]


def show(rows: Rows, answers: dict[str, Any], samples: list[Sample], facts: dict[str, str]) -> None:
    """The table, printed, and ``report.html`` beside the rows."""
    names = [name for name in DEFENCES if f"{name} | 0" in rows.found]
    found = {name: rows.found[f"{name} | 0"] for name in names}
    attacks = facts.pop("attacks").split("; ")
    first = found[names[0]]

    def cell(figures: dict[str, float], name: str, times: float = 1.0) -> str:
        mean, low, high = (times * figures[f"{name}{end}"] for end in ("", "/low", "/high"))
        return f"{mean:.1f} ({low:.0f} to {high:.0f})"

    table = [[f"attack: {key}", cell(first, f"success_before/{key}")] for key in attacks]
    table += [[key, "-"] for key in (*SCORES, *DAMAGE)]
    for name in names:
        for row, key in zip(table, attacks):
            row.append(cell(found[name], f"success/{key}"))
        for row, key in zip(table[len(attacks) :], (*SCORES, *DAMAGE)):
            row.append(cell(found[name], key, 100 if key in SCORES else 1))
    header = ["%, 95 % interval over items", "before", *names]
    for row in [header, *table]:
        print(f"{row[0]:36}" + "".join(f"{each:>24}" for each in row[1:]))
    sections = [Section("Defences and attacks", html_table(header, table))]
    for title, chosen in (("White box", attacks[:4]), ("Black box", attacks[4:-2])):
        points = [Point("before", 0.0, sum(first[f"success_before/{key}"] for key in chosen) / len(chosen))]
        for name in names:
            success = sum(found[name][f"success/{key}"] for key in chosen) / len(chosen)
            points.append(Point(name, found[name]["delta/random"], success))
        sections.append(
            tradeoff_section(points, "accuracy lost on other items, points", "mean attack success, %", title)
        )
    layers = {name: answers[name]["layers"] for name in names}
    columns = ["before", *names]
    matrix = [
        [layers[names[0]]["before"][depth], *[layers[name]["after"][depth] for name in names]]
        for depth in range(len(layers[names[0]]["before"]))
    ]
    depths = ["embeddings", *[f"block {n}" for n in range(1, len(matrix))]]
    figure = heat_figure(matrix, depths, columns, "The deleted answer in the hidden states", "probability", "share")
    sections.append(Section("Layers", f"<figure>{img_tag(figure, 'probability by layer')}</figure>"))
    sections += [Section(name, items_html(answers[name]["rows"], samples, 6)) for name in names]
    page = rows.file.with_name("report.html")
    write_text(page, render_page("Deleting facts about drawings", "", sections, facts))
    print(page)


def main() -> None:
    """Add what is missing, show all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--facts", type=Path, default=Path("facts"))
    parser.add_argument("--folder", type=Path, default=Path("runs/unlearning"))
    parser.add_argument("--items", type=int, default=60)
    parser.add_argument("--rows", nargs="+", help="words that a row's name begins with; all by default")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = Rows(options.folder / "rows.json", {"items": options.items}, options.rows)
    kept = options.folder / "answers.json"
    answers: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    data = Known(options.facts, eval_batch_size=8)
    module = built(FIRST, options.checkpoint)
    known = known_of(module, data)
    print(
        f"{len(known)} of {len(data.samples('test'))} facts are known; the first {options.items} of these are deleted"
    )
    before: dict[Any, Any] = {}
    for name, record in DEFENCES.items():
        if not rows.missing(name, 0):
            continue
        start = time.perf_counter()
        module = built(record, options.checkpoint)
        module.before = before
        data = Known(options.facts, eval_batch_size=8)
        data.kept_ids = frozenset(known[: options.items])
        trainer().test(module, datamodule=data, verbose=False)
        answers[name] = {"rows": module.test_answers, "layers": module.test_results["layers"]}
        write_json(kept, answers)
        rows.add(name, 0, {**module.test_results["figures"], "seconds": time.perf_counter() - start})
        print(f"{name}: {time.perf_counter() - start:.0f} s")
    facts = {"machine": machine(options.threads), "facts known": f"{len(known)} of {len(data.samples('test'))}"}
    show(rows, answers, data.samples("test"), {**facts, "attacks": "; ".join(map(key_of, module.attacks))})


if __name__ == "__main__":
    main()
