"""Four image classifiers, fine-tuned from one pretrained encoder on different pictures, merged by every method.

    python benchmarks/merged_classifiers.py [--runs DIR] [--threads 2] [--methods Ties IsoC ..]

Trains what is not in the folder yet (configs/merge/picture_expert.yaml once per set, configs/merge/ada_merging.yaml and
its second form), merges the encoders, and evaluates each merged encoder on the four test sets with the experts' own
heads. Writes report.html and a table, table-averaged.json, from which a later call takes the methods that are done.

The rules are the same for every method. `default`: its constructor's own options. `chosen`: its scale (``lam``) from
SCALES by mean accuracy on the validation pictures; methods without a scale have one candidate. Nothing is chosen by
test pictures. A normalised accuracy is the mean over the sets of the accuracy divided by that of the single expert.

The experts keep the running statistics of the pretrained encoder (see the config), so their average is the same and
right. For experts that do not, ``--statistics anew`` measures them on training pictures of all sets.

Pointwise convolutions are matrices here, as which they act: the spectral methods and OPCM treat them so, and RegMean
has Grams of their inputs. Depthwise convolutions, the stem, biases and normalisation are summed or averaged by these.
Fisher: expected over all classes, first FISHER_PICTURES training pictures of a random order.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from measure import load, machine
from torch import Tensor, nn

import fulgurite
from fulgurite.backbones.frames import TimmFrameEncoder
from fulgurite.checkpoints import MismatchError, load_tensors, newest_checkpoint, read_manifest, write_json, write_text
from fulgurite.commands.names import class_table
from fulgurite.datamodules.pictures import Pictures
from fulgurite.methods.merging.base import Merger
from fulgurite.methods.merging.plan import Matching
from fulgurite.methods.normalization import recompute_statistics
from fulgurite.methods.statistics.fisher import FisherStatistics
from fulgurite.methods.statistics.gram import gram_of
from fulgurite.modules.image_classification import ImageClassifier
from fulgurite.reports.images import img_tag
from fulgurite.reports.page import Section, render_page
from fulgurite.reports.plots import bars_figure
from fulgurite.reports.tables import best_cells, html_table, percent, plain_table

ROOT = Path(__file__).resolve().parent.parent
SETS = ("emoji", "doom", "grid", "letters")
METHODS = ("Average", "TaskArithmetic", "Ties", "Dare", "Della", "Breadcrumbs", "MagMax", "Pcb", "Sce")
METHODS = (*METHODS, "MultiSlerp", "Karcher", "ModelStock", "IsoC", "IsoCts", "TsvM", "Opcm", "Fisher", "RegMean")
FITTED = {"AdaMerging": (), "AdaMerging++": ("--model.density", "0.2")}
SCALES = (0.3, 0.5, 1.0)
MIXED_PICTURES, FISHER_PICTURES, GRAM_PICTURES = 32, 24, 64  # of each set
BATCH = 64
State = dict[str, Tensor]


def fit(folder: Path, config: str, *options: str, threads: int) -> Path:
    """A finished run of a shipped config, trained now unless its folder is complete."""
    if not (folder / "report.html").exists():
        command = [sys.executable, str(ROOT / "cli.py"), "fit", "--config", str(ROOT / "configs" / "merge" / config)]
        command += ["--run", str(folder), "--resume", "auto", "--trainer.enable_progress_bar", "false", *options]
        print(f"training {folder}, {load()}", flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return folder


class Experiment:
    """The experts, their pictures, and the accuracy of any encoder on them."""

    def __init__(self, folders: Mapping[str, Path], anew: bool) -> None:
        self.anew = anew
        self.experts: dict[str, ImageClassifier] = {name: fulgurite.load(folder) for name, folder in folders.items()}
        self.model: ImageClassifier = fulgurite.load(folders[SETS[0]])
        self.pictures: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        for name, expert in self.experts.items():
            data, collator = Pictures(name), expert.collator("test")
            batches = {split: collator(data.samples(split)) for split in ("train", "val", "test")}
            self.pictures[name] = {s: (batch["pixels"], expert.labels_of(batch)) for s, batch in batches.items()}
        share = BATCH // len(SETS)
        starts = range(0, MIXED_PICTURES, share)
        self.mixed = [torch.cat([self.shuffled(name)[at : at + share] for name in SETS]) for at in starts]
        self.base = as_matrices(pretrained(self.model, folders[SETS[0]]))
        self.states = [as_matrices(self.experts[name].encoder.state_dict()) for name in SETS]

    def shuffled(self, name: str) -> Tensor:
        """The training pictures of a set in a fixed random order."""
        pixels = self.pictures[name]["train"][0]
        return pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))]

    def statistics(self, method: str) -> list[Mapping[str, Tensor]]:
        """What a data-driven method knows of every expert, on its own training pictures."""
        out = []
        for name, expert in self.experts.items():
            pictures, head = self.shuffled(name), expert.heads[name]
            if method == "Fisher":
                fisher = FisherStatistics(expert.encoder, lambda model, x, head=head: head(model.pooled(x)))
                fisher.update(pictures[:FISHER_PICTURES])
                out.append({key: value.view_as(self.base[key]) for key, value in fisher.means().items()})
            else:
                out.append(pointwise_grams(expert.encoder, pictures[:GRAM_PICTURES]))
        return out

    def merge(self, merger: Merger) -> State:
        """The merged encoder."""
        return merger(self.states, self.base, matching=Matching(donor=0))

    @torch.no_grad()
    def accuracies(self, state: Mapping[str, Tensor], split: str) -> dict[str, float]:
        """Of an encoder, by set, each with its expert's head."""
        own = self.model.encoder.state_dict()
        self.model.encoder.load_state_dict({name: tensor.view_as(own[name]) for name, tensor in state.items()})
        self.model.eval()
        if self.anew:
            recompute_statistics(self.model.encoder, self.mixed)
        out = {}
        for name, expert in self.experts.items():
            pixels, labels = self.pictures[name][split]
            logits = torch.cat([expert.heads[name](self.model.features(part)) for part in pixels.split(BATCH)])
            out[name] = (logits.argmax(-1) == labels).double().mean().item()
        return out

    def row(self, name: str, states: Mapping[float | None, State], default: float | None) -> dict[str, Any]:
        """A row of the table: the test accuracies at the default scale and at that chosen on validation pictures."""
        scores = {at: mean(self.accuracies(state, "val")) if len(states) > 1 else 0 for at, state in states.items()}
        chosen = max(scores, key=scores.__getitem__)
        tested = {at: self.accuracies(states[at], "test") for at in {default, chosen}}
        row = {"method": name, "default_scale": default, "scale": chosen, "scores": [*scores.items()]}
        return row | {"default": tested[default], "chosen": tested[chosen]}


def mean(values: Mapping[str, float]) -> float:
    """Of the sets, each counting the same."""
    return sum(values.values()) / len(values)


def pretrained(model: ImageClassifier, folder: Path) -> State:
    """The encoder as it was before fine-tuning."""
    fresh = ImageClassifier(TimmFrameEncoder(size=model.encoder.size, grid=0))
    if read_manifest(newest_checkpoint(folder)).facts["pretrained"]["digest"] != fresh.pretrained["digest"]:
        raise MismatchError(f"{folder} was not fine-tuned from the encoder of configs/merge/picture_expert.yaml")
    return fresh.encoder.state_dict()


def as_matrices(state: Mapping[str, Tensor]) -> State:
    """Kernels (out, in, 1, 1) of pointwise convolutions as (out, in)."""
    return {name: t.flatten(1) if t.dim() == 4 and t[0, 0].numel() == 1 else t for name, t in state.items()}


@torch.no_grad()
def pointwise_grams(encoder: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """X^T X / rows of the inputs of every pointwise convolution; a row is a place of a picture."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[..., None]:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            rows = inputs[0].movedim(1, -1).flatten(0, -2)
            sums[name] = sums.get(name, 0) + gram_of(rows, None, torch.float64)
            counts[name] = counts.get(name, 0) + len(rows)

        return add

    layers = {n: m for n, m in encoder.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1)}
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    for part in pixels.split(BATCH):
        encoder(part)
    for handle in handles:
        handle.remove()
    return {name: total / counts[name] for name, total in sums.items()}


def scaled(method: str) -> tuple[dict[float | None, Merger], float | None]:
    """The mergers to try, by scale, and the scale by default; None for a method without one."""
    kind = getattr(importlib.import_module(class_table()[method][0]), method)
    option = inspect.signature(kind).parameters.get("lam")
    if option is None:
        return {None: kind()}, None
    default = kind().combine.lam if option.default is None else option.default
    return {scale: kind(lam=scale) for scale in sorted({*SCALES, default})}, default


def table_of(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]], set[tuple[int, int]]]:
    """Header, cells, and the best of every column."""
    header = ["method", "default", "normalised", "scale", "chosen", "normalised", *SETS]
    cells, values = [], []
    for row in results["rows"]:
        normalised = {
            rule: mean({name: value / results["single"][name] for name, value in row[rule].items()})
            for rule in ("default", "chosen")
        }
        front = [mean(row["default"]), normalised["default"]]
        back = [mean(row["chosen"]), normalised["chosen"], *row["chosen"].values()]
        scale = "–" if row["scale"] is None else f"{row['scale']:g}"
        cells.append([row["method"], *map(percent, front), scale, *map(percent, back)])
        values.append([None, *front, None, *back])
    return header, cells, best_cells(values)


def page(results: Mapping[str, Any]) -> tuple[str, list[Any]]:
    """The report, and the tables for the terminal."""
    alone = [("experts", results["single"]), ("pretrained", results["base"])]
    lines = [[name, *map(percent, (mean(values), *values.values()))] for name, values in alone]
    header, title = (
        ["encoder", "mean", *SETS],
        "Test accuracy of the experts, and of their heads on the pretrained encoder, %",
    )
    sections, printed = [Section(title, html_table(header, lines))], [plain_table(title, header, lines)]
    header, cells, best = table_of(results)
    title, rows = "Test accuracy of merged encoders, %", results["rows"]
    means = [mean(row["chosen"]) for row in rows]
    points = [list(row["chosen"].values()) for row in rows]
    names, nothing = [row["method"] for row in rows], [float("nan")] * len(rows)
    figure = bars_figure(names, means, nothing, means.index(max(means)), points, "Mean accuracy on the four sets")
    note = "Sets: at the chosen scale. Normalised: divided by the single experts. Dots: the sets."
    picture = f"<figure>{img_tag(figure, title)}<figcaption>{note}</figcaption></figure>"
    sections.append(Section(title, html_table(header, cells, best) + picture, order=1))
    printed.append(plain_table(title, header, cells, note))
    keys = ("machine", "load_at_the_end", "seconds", "adapted_to", "statistics")
    facts = {key: str(results[key]) for key in keys}
    return render_page("Merged image classifiers", "One pretrained encoder, four experts", sections, facts), printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/merged_classifiers"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--statistics", choices=("averaged", "anew"), default="averaged")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    start, described = time.time(), machine(options.threads)
    train = {"threads": options.threads}
    folders = {n: fit(options.runs / n, "picture_expert.yaml", "--data.dataset", n, **train) for n in SETS}
    experts = ("--model.experts", f"[{', '.join(str(folders[name].absolute()) for name in SETS)}]")
    fitted = {n: fit(options.runs / n, "ada_merging.yaml", *experts, *more, **train) for n, more in FITTED.items()}
    bench = Experiment(folders, options.statistics == "anew")
    single = {name: bench.accuracies(bench.states[i], "test")[name] for i, name in enumerate(SETS)}
    table = options.runs / f"table-{options.statistics}.json"
    done = {row["method"]: row for row in json.loads(table.read_text())["rows"]} if table.exists() else {}
    results: dict[str, Any] = {"machine": described, "statistics": options.statistics, "single": single, "rows": []}
    results["base"] = bench.accuracies(bench.base, "test")
    for method in options.methods:
        if method not in done:
            mergers, default = scaled(method)
            if method in ("Fisher", "RegMean"):
                statistics = bench.statistics(method)
                mergers = {scale: merger.use(statistics) for scale, merger in mergers.items()}
            done[method] = bench.row(method, {at: bench.merge(m) for at, m in mergers.items()}, default)
        results["rows"].append(done[method])
        write_json(table, results)
        print(f"{method}: {mean(done[method]['chosen']):.3f}, {time.time() - start:.0f} s", flush=True)
    for method, folder in fitted.items():
        artefact = folder / "artefacts" / "merged-ada_merging"
        state = {n.removeprefix("encoder."): t for n, t in load_tensors(artefact).items() if n.startswith("encoder.")}
        results["rows"].append(bench.row(method, {None: state}, None))
        results["adapted_to"] = read_manifest(artefact).facts["adapted_to"]
    results |= {"load_at_the_end": load(), "seconds": round(time.time() - start)}
    html, tables = page(results)
    write_json(table, results)
    write_text(options.runs / "report.html", html)
    from rich.console import Console

    for table in tables:
        Console(width=130).print(table)
    print(f"{described}; at the end: {load()}; report: {options.runs / 'report.html'}")


if __name__ == "__main__":
    main()
