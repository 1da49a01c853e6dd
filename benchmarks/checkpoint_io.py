"""Time, memory and bytes of saving, loading and verifying checkpoints, against safetensors and Lightning's own.

    python benchmarks/checkpoint_io.py [--mb 1000] [--rounds 5] [--folder DIR]

Both sides of a comparison run in turn in this process, on the same disk, and each figure is the minimum over the rounds.
Saves end with fsync on both sides. Files are in the page cache when they are read, so reading costs memory bandwidth
alone. Memory is the highest resident size during the call less that before it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lightning
import safetensors
import torch
import xxhash
from lightning.pytorch import LightningModule, Trainer
from measure import load, machine
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fulgurite.callbacks.checkpoint_io import DigestCheckpointIO
from fulgurite.checkpoints import load_tensors, save_checkpoint_folder, verify

MB = 1_000_000


def state_of(megabytes: int) -> dict[str, Tensor]:
    """Float32 matrices of 4 MB, as many as are needed, and a bias of 4 kB beside each."""
    count = max(megabytes // 4, 1)
    generator = torch.Generator().manual_seed(0)
    weights = {f"layers.{i}.weight": torch.randn(1000, 1000, generator=generator) for i in range(count)}
    return weights | {f"layers.{i}.bias": torch.randn(1000, generator=generator) for i in range(count)}


def in_turn(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Least seconds of each by the wall clock, since most of them is waiting for the disk."""
    least: dict[str, float] = {}
    for number in range(rounds):
        names = list(calls) if number % 2 else list(reversed(calls))
        for name in names:
            os.sync()
            start = time.perf_counter()
            calls[name]()
            least[name] = min(least.get(name, float("inf")), time.perf_counter() - start)
    return least


def extra_memory(call: Callable[[], object]) -> int:
    """Bytes by which the resident size of this process grew at most."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """A size in /proc/self/status, in bytes."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


def synced(path: Path) -> None:
    """fsync of a file and its folder, which safetensors leaves to the caller."""
    for name in (path, path.parent):
        descriptor = os.open(name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def tell(what: str, value: float, unit: str, bar: float, more: bool = False) -> None:
    """One line: a figure and its bar."""
    holds = value >= bar if more else value <= bar
    sign = ">=" if more else "<="
    print(f"  {what:<58}{value:8.2f} {unit:<5} bar {sign} {bar:g}{'' if holds else '   MISSED'}")


def saving(folder: Path, state: dict[str, Tensor], rounds: int) -> None:
    size = sum(t.nbytes for t in state.values())

    def ours() -> None:
        save_checkpoint_folder(folder / "ours", {"weights": state})

    def theirs() -> None:
        save_file(state, folder / "theirs.safetensors")
        synced(folder / "theirs.safetensors")

    def anew(call: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            shutil.rmtree(folder / "ours", ignore_errors=True)
            (folder / "theirs.safetensors").unlink(missing_ok=True)
            os.sync()
            call()

        return run

    anew(ours)()
    anew(theirs)()
    least: dict[str, float] = {}
    for number in range(rounds):
        pair = {"ours": ours, "safetensors": theirs}
        for name in pair if number % 2 else reversed(pair):
            shutil.rmtree(folder / "ours", ignore_errors=True)
            (folder / "theirs.safetensors").unlink(missing_ok=True)
            os.sync()
            start = time.perf_counter()
            pair[name]()
            least[name] = min(least.get(name, float("inf")), time.perf_counter() - start)
    print(f"save {size / MB:.0f} MB with digests and fsync: {least['ours']:.3f} s;", end=" ")
    print(f"safetensors save_file and fsync: {least['safetensors']:.3f} s")
    tell("time, times safetensors", least["ours"] / least["safetensors"], "x", 1.15)
    tell("extra memory", extra_memory(anew(ours)) / 2**20, "MiB", 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="checkpoint-io-"))
    state = state_of(options.mb)
    print(machine(torch.get_num_threads()))
    try:
        saving(folder, state, options.rounds)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
