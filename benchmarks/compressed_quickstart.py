"""The trained quickstart, its adapters merged by TIES, with its text encoder pruned and quantized by every method.

    make quickstart                                                    # gives runs/quickstart/<time>
    python benchmarks/compressed_quickstart.py RUN [--folder DIR] [--samples 128] [--seeds 0] [--rows gptq rsq ..]

All methods see the same training samples of a seed, with the merged adapters, and are scored on the test questions.
The grids of all quantizers are the same: groups of 64 columns, asymmetric, with clip search. RSQ weighs tokens by the
attention that they receive and does not rotate, for the norms of this encoder lie behind its layers and cannot be
folded; TaCQ keeps 0.35 % of the weights. ECoFLaP allocates per block from forward passes on 32 samples, a cap 0.1 above
the target, and prunes by Wanda. Nothing was tuned.

Rows go to ``rows.json`` of the folder as they are done; a later call goes on, prints the table, and writes report.html.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from statistics import mean

import torch
from compressed import BITS, GRID, SPARSITIES, Rows
from measure import load, machine

import fulgurite
from fulgurite.callbacks.compress_data import CalibrationSamples
from fulgurite.callbacks.compress_step import CompressAtCheckpoint
from fulgurite.callbacks.merge_step import MergeAtCheckpoint
from fulgurite.callbacks.prune_step import PruneAtCheckpoint
from fulgurite.callbacks.quantize_step import QuantizeAtCheckpoint
from fulgurite.callbacks.steps import Context
from fulgurite.checkpoints import read_manifest
from fulgurite.commands.statistics import data_of
from fulgurite.datamodules.base import FulguriteDataModule
from fulgurite.methods.merging.ties import Ties
from fulgurite.methods.pruning.ecoflap import Ecoflap
from fulgurite.methods.pruning.magnitude import Magnitude
from fulgurite.methods.pruning.sparsegpt import SparseGpt
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.methods.quantization.rsq import TokenImportance
from fulgurite.methods.quantization.rtn import Rtn
from fulgurite.methods.quantization.tacq import TaskCircuit
from fulgurite.modules.calibration import counted_inputs


def steps_of_table(samples: CalibrationSamples) -> dict[str, CompressAtCheckpoint]:
    """Every row by its name."""
    steps: dict[str, CompressAtCheckpoint] = {}
    for bits in BITS:
        gptq, on_data = Gptq(bits, **GRID), {"calibration": samples}
        steps[f"rtn {bits} bits"] = QuantizeAtCheckpoint(Rtn(bits, **GRID))
        steps[f"gptq {bits} bits"] = QuantizeAtCheckpoint(gptq, **on_data)
        steps[f"rsq {bits} bits"] = QuantizeAtCheckpoint(gptq, **on_data, importance=TokenImportance())
        steps[f"tacq {bits} bits"] = QuantizeAtCheckpoint(gptq, **on_data, task_circuit=TaskCircuit())
    for share in SPARSITIES:
        name = f"{100 * share:.0f} %"
        steps[f"magnitude {name}"] = PruneAtCheckpoint(Magnitude(share))
        steps[f"wanda {name}"] = PruneAtCheckpoint(Wanda(share), calibration=samples)
        steps[f"sparsegpt {name}"] = PruneAtCheckpoint(SparseGpt(share), calibration=samples)
        steps[f"ecoflap {name}"] = PruneAtCheckpoint(Wanda(share), calibration=samples, allocation=Ecoflap(share))
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run of configs/quickstart.yaml; it is not changed")
    parser.add_argument("--folder", type=Path, default=Path("runs/compressed_quickstart"))
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rows", nargs="+", help="words that a row's name begins with; all by default")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(options.threads))
    run = options.folder / "run"
    if not run.is_dir():
        shutil.copytree(options.run, run)
    source = run / "artefacts" / "merged"
    if not source.is_dir():
        MergeAtCheckpoint(Ties())([run / "checkpoints" / "last"], Context(source))
    data = data_of(run / "checkpoints" / "last", None, (), fulgurite.load(source))
    data.setup("test")
    settings = {"samples": options.samples, "run": read_manifest(run / "checkpoints" / "last").digest}
    done = Rows(options.folder / "rows.json", settings, options.rows)
    for seed in options.seeds:
        if done.missing("dense", seed):
            done.add("dense", seed, {"bits": 16.0, "sparsity": 0.0, "seconds": 0.0, "accuracy": accuracy(source, data)})
        for name, step in steps_of_table(CalibrationSamples(options.samples, seed)).items():
            if not done.missing(name, seed):
                continue
            out, start = run / "artefacts" / "compressed", time.perf_counter()
            step([source], Context(out, builder=fulgurite.load, data=data))
            figures = {**read_manifest(out).facts["totals"], "seconds": time.perf_counter() - start}
            figures["accuracy"] = accuracy(out, data)
            shutil.rmtree(out)
            done.add(name, seed, figures)
            print(
                f"{name:18} {seed:2} {100 * figures['accuracy']:6.1f} {figures['seconds']:7.0f} s  {load()}", flush=True
            )
    done.show(
        "The quickstart compressed", "accuracy", lambda share: f"{100 * share:.1f}", ("accuracy, %", lambda x: 100 * x)
    )


@torch.no_grad()
def accuracy(artefact: Path, data: FulguriteDataModule) -> float:
    """Mean over the worlds of the share of test questions that the merged adapters answer."""
    module, right = fulgurite.load(artefact), {}
    for batch in data.within_fit("test"):
        answers = module.answer_logits(counted_inputs(module, batch)).argmax(1, keepdim=True)
        scores = module.answer_targets(batch).gather(1, answers).squeeze(1)
        for domain, score in zip(batch["domain"], scores.tolist(), strict=True):
            right.setdefault(domain, []).append(score)
    return mean(map(mean, right.values()))


if __name__ == "__main__":
    main()
