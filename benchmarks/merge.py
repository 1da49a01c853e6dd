"""Merging files against mergekit: time of whole processes, of the merge alone, and memory; models of 75 M parameters.

    python benchmarks/merge.py --mergekit PATH/TO/mergekit-yaml [--methods ties slerp] [--rounds 3] [--times 10]

Both programs run the same mergekit file as fresh processes, in turn; figures are minima over the rounds. The merge part
is the time of the whole process less that of its ``--help``, which has to import as much. Anonymous memory is the peak
of what the process has beside mapped files, and for ours also without what ``import torch`` has. ``--times 10`` also
merges models of ten times as many layers, which takes 30 GB of disk, and compares the rate. Results of both programs
are compared tensor by tensor (random masks differ, so not for DARE and DELLA). Then spectral merges, in this process,
against their form by plain SVDs.

mergekit is not a dependency: install it into an environment of its own (``pip install mergekit==0.1.5``).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from measure import machine, minima
from safetensors.torch import load_file, save_file
from torch import Tensor

from fulgurite.checkpoints.sources import open_source
from fulgurite.methods.merging.base import Merger
from fulgurite.methods.merging.iso_c import IsoC
from fulgurite.methods.merging.iso_cts import IsoCts
from fulgurite.methods.merging.tsv_m import TsvM

CLI = Path(__file__).resolve().parent.parent / "cli.py"
VOCABULARY, WIDTH, INNER, LAYERS, HEADS = 16000, 640, 1728, 11, 10
MB = 1_000_000
RANDOM = ("dare_linear", "dare_ties", "della")
# Parameters of each model, and how many models beside the base (None: no base).
METHODS: dict[str, tuple[dict[str, float], int, bool]] = {
    "linear": ({"weight": 1.0}, 3, False),
    "slerp": ({}, 2, True),
    "model_stock": ({}, 3, True),
    "task_arithmetic": ({"weight": 0.3}, 3, True),
    "dare_linear": ({"weight": 1.0, "density": 0.2}, 3, True),
    "dare_ties": ({"weight": 1.0, "density": 0.2}, 3, True),
    "della": ({"weight": 1.0, "density": 0.2, "epsilon": 0.1}, 3, True),
    "ties": ({"weight": 1.0, "density": 0.2}, 3, True),
    "breadcrumbs": ({"weight": 1.0, "density": 0.2, "gamma": 0.01}, 3, True),
}
BARS = {"linear": "whole at most 0.5", **dict.fromkeys((*RANDOM, "ties", "breadcrumbs"), "merge at most 0.14")}


@dataclass
class Cost:
    """What one process took: seconds by the clock and of the processor, and peak bytes of anonymous memory."""

    wall: float
    cpu: float
    anonymous: int

    def least(self, other: Cost | None) -> Cost:
        """The lesser times, the greater memory."""
        if other is None:
            return self
        return Cost(min(self.wall, other.wall), min(self.cpu, other.cpu), max(self.anonymous, other.anonymous))


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Tensors of a LLaMA of these sizes."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH)}
    for layer in range(layers):
        place = f"model.layers.{layer}"
        out |= {f"{place}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qkvo"}
        out |= {f"{place}.mlp.{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
        out[f"{place}.mlp.down_proj.weight"] = (WIDTH, INNER)
        out |= {f"{place}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
    return out | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCABULARY, WIDTH)}


def make_models(root: Path, layers: int) -> list[Path]:
    """A base and three models near it, as folders of Hugging Face."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    paths = []
    for number in range(4):
        folder = root / f"{layers}-layers-{number}"
        paths.append(folder)
        if (folder / "config.json").is_file():
            continue
        folder.mkdir(parents=True)
        base, own = (torch.Generator().manual_seed(seed) for seed in (0, 100 + number))
        state = {name: torch.randn(shape, generator=base) * 0.02 for name, shape in shapes(layers).items()}
        if number:
            for tensor in state.values():
                tensor += 0.002 * torch.randn(tensor.shape, generator=own)
        save_file(state, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
    return paths


def recipe(method: str, models: list[Path], file: Path) -> Path:
    """The mergekit file of a method."""
    parameters, number, has_base = METHODS[method]
    # Spherical interpolation counts the base as the first of its two models.
    chosen = models[:2] if method == "slerp" else models[1 : number + 1]
    value: dict[str, Any] = {"merge_method": method, "dtype": "float32"}
    value["models"] = [{"model": str(path), "parameters": parameters} for path in chosen]
    if has_base:
        value["base_model"] = str(models[0])
    if method == "slerp":
        value["parameters"] = {"t": 0.5}
        value["models"] = [{"model": str(path)} for path in chosen]
    file.write_text(yaml.safe_dump(value))
    return file


def run(command: list[str], log: Path) -> Cost:
    """Run a process to its end.

    Raises:
        RuntimeError: it failed; with the end of what it printed.
    """
    peak, start = 0, time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**os.environ, "HF_HUB_OFFLINE": "1"})
        ended = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not ended.wait(0.01):
                peak = max(peak, anonymous_bytes(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - start
        ended.set()
        watcher.join()
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text(errors='replace')[-2000:]}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, peak)


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def difference(ours: Path, theirs: Path) -> float:
    """Share of entries that differ by more than 1e-6."""
    first, second = open_source(ours).tensors, load_file(theirs / "model.safetensors")
    apart = sum(int(((first[name] - tensor).abs() > 1e-6).sum()) for name, tensor in second.items())
    return apart / sum(tensor.numel() for tensor in second.values())


def compare(methods: list[str], models: list[Path], mergekit: str, rounds: int, folder: Path) -> dict[str, Cost]:
    """Print both programs' costs; returns ours."""
    log = folder / "log"
    torch_only = min((run([sys.executable, "-c", "import torch"], log) for _ in range(rounds)), key=lambda c: c.wall)
    starts = {"ours": [sys.executable, str(CLI), "merge", "--help"], "mergekit": [mergekit, "--help"]}
    idle: dict[str, Cost] = {}
    for _ in range(rounds):
        for name, command in starts.items():
            idle[name] = run(command, log).least(idle.get(name))
    over = idle["ours"].wall - torch_only.wall
    print(f"start-up: ours {idle['ours'].wall:.2f} s (import torch {over:+.2f} s; bar +0.5), mergekit", end=" ")
    print(f"{idle['mergekit'].wall:.2f} s; import torch has {torch_only.anonymous / MB:.0f} MB of anonymous memory\n")
    print(
        f"{'method':<16}{'ours s':>8}{'mergekit':>10}{'ratio':>7}   {'merge s':>8}{'mergekit':>10}{'ratio':>7}", end=""
    )
    print(f"{'speed-up':>10}   {'CPU ratio':>9}   {'MB':>5}{'- torch':>8}{'mergekit':>9}   {'differ':>8}  bar")
    best: dict[str, Cost] = {}
    for method in methods:
        file = recipe(method, models, folder / f"{method}.yml")
        out = {name: folder / f"{method}-{name}" for name in starts}
        commands = {
            "ours": [sys.executable, str(CLI), "merge", "--mergekit", str(file), "--out", str(out["ours"])],
            "mergekit": [mergekit, str(file), str(out["mergekit"]), "--no-copy-tokenizer", "--no-write-model-card"],
        }
        costs: dict[str, Cost] = {}
        for _ in range(rounds):
            for name, command in commands.items():
                shutil.rmtree(out[name], ignore_errors=True)
                costs[name] = run(command, log).least(costs.get(name))
        ours, theirs = costs["ours"], costs["mergekit"]
        merge = [max(cost.wall - idle[name].wall, 0.01) for name, cost in costs.items()]
        cpu = [max(cost.cpu - idle[name].cpu, 0.01) for name, cost in costs.items()]
        apart = "" if method in RANDOM else f"{difference(*out.values()):.1e}"
        print(
            f"{method:<16}{ours.wall:8.2f}{theirs.wall:10.2f}{ours.wall / theirs.wall:7.2f}   "
            f"{merge[0]:8.2f}{merge[1]:10.2f}{merge[0] / merge[1]:7.3f}{merge[1] / merge[0]:9.1f}x   "
            f"{cpu[0] / cpu[1]:9.3f}   {ours.anonymous / MB:5.0f}{(ours.anonymous - torch_only.anonymous) / MB:8.0f}"
            f"{theirs.anonymous / MB:9.0f}   {apart:>8}  {BARS.get(method, '')}",
            flush=True,
        )
        best[method] = Cost(merge[0], cpu[0], ours.anonymous)
        for path in out.values():
            shutil.rmtree(path)
    return best


def larger(methods: list[str], times: int, small: dict[str, Cost], rounds: int, folder: Path) -> None:
    """Print the rate per entry at more layers against that of the small models."""
    models, log = make_models(folder, LAYERS * times), folder / "log"
    sizes = [sum(torch.Size(shape).numel() for shape in shapes(n).values()) for n in (LAYERS, LAYERS * times)]
    idle = min(run([sys.executable, str(CLI), "merge", "--help"], log).wall for _ in range(rounds))
    print(f"\n{sizes[1] / 1e6:.0f} M parameters, {sizes[1] / sizes[0]:.1f} times as many")
    for method in methods:
        file, out = recipe(method, models, folder / f"{method}.yml"), folder / "large"
        cost = None
        for _ in range(rounds):
            shutil.rmtree(out, ignore_errors=True)
            cost = run([sys.executable, str(CLI), "merge", "--mergekit", str(file), "--out", str(out)], log).least(cost)
        ratio = (cost.wall - idle) / sizes[1] / (small[method].wall / sizes[0])
        print(f"{method:<16}{cost.wall:8.2f} s, time per entry {ratio:.2f} x, {cost.anonymous / MB:.0f} MB anonymous")
    shutil.rmtree(out)


def spectral(rounds: int) -> None:
    """Print the spectral merges of one layer against their form by plain SVDs."""
    generator = torch.Generator().manual_seed(0)
    forms: dict[str, tuple[Merger, Merger]] = {
        "Iso-C": (IsoC(solver="svd"), IsoC()),
        "Iso-CTS": (IsoCts(solver="svd"), IsoCts()),
        "TSV-M": (TsvM(whiten="svd"), TsvM()),
    }
    print(f"\nspectral merges of three models, {torch.get_num_threads()} threads (bar: 3 times faster)")
    for shape in ((WIDTH, WIDTH), (INNER, WIDTH), (VOCABULARY // 4, WIDTH)):
        base = {"w": torch.randn(shape, generator=generator) * 0.02}
        experts = [{"w": base["w"] + 0.002 * torch.randn(shape, generator=generator)} for _ in range(3)]
        for name, (plain, fast) in forms.items():
            times = minima({"svd": partial(plain, experts, base), "ours": partial(fast, experts, base)}, rounds)
            apart = relative(plain(experts, base)["w"] - base["w"], fast(experts, base)["w"] - base["w"])
            print(
                f"{name:<8} {shape[0]:>5} x {shape[1]}: {times['svd'] / times['ours']:5.2f} times faster "
                f"({times['ours'] * 1e3:.0f} against {times['svd'] * 1e3:.0f} ms), differs by {apart:.1e}",
                flush=True,
            )


def relative(first: Tensor, second: Tensor) -> float:
    """Norm of the difference over that of the first."""
    return float((first - second).norm() / first.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="the program mergekit-yaml")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--times", type=int, default=0, help="also models of so many times as many layers")
    parser.add_argument("--folder", help="of models, kept; a temporary one by default")
    parser.add_argument("--parts", nargs="+", default=["files", "spectral"], choices=["files", "spectral"])
    options = parser.parse_args()
    if "files" in options.parts and options.mergekit is None:
        parser.error("mergekit-yaml is not on PATH: give --mergekit, see --help")
    print(machine(torch.get_num_threads()))
    if "files" in options.parts:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(options.folder or temporary).absolute()
            small = compare(options.methods, make_models(folder, LAYERS), options.mergekit, options.rounds, folder)
            if options.times:
                larger(options.methods, options.times, small, options.rounds, folder)
    if "spectral" in options.parts:
        spectral(options.rounds)


if __name__ == "__main__":
    main()
