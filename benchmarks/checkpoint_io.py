"""Time, memory and bytes of saving, loading and verifying checkpoints, against safetensors and Lightning's own.

    python benchmarks/checkpoint_io.py [--mb 1000] [--rounds 5] [--folder DIR]

Both sides of a comparison run in turn in this process, on the same disk; figures are minima over the rounds. Saves end
with fsync on both sides. Files are in the page cache when they are read, so reading costs memory bandwidth alone. Extra
memory is the highest resident size during the call less that before it.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import safetensors
import torch
import xxhash
from lightning.pytorch import LightningModule, Trainer
from measure import load, machine
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fulgurite.callbacks.checkpoint_io import DigestCheckpointIO
from fulgurite.checkpoints import load_tensors, save_checkpoint_folder, verify

MB = 1_000_000


def state_of(megabytes: int) -> dict[str, Tensor]:
    """Float32 matrices of 4 MB, as many as are needed, and a bias of 4 kB beside each."""
    count = max(megabytes // 4, 1)
    generator = torch.Generator().manual_seed(0)
    weights = {f"layers.{i}.weight": torch.randn(1000, 1000, generator=generator) for i in range(count)}
    return weights | {f"layers.{i}.bias": torch.randn(1000, generator=generator) for i in range(count)}


def in_turn(calls: dict[str, Callable[[], object]], rounds: int, prepare: Callable[[], None]) -> dict[str, float]:
    """Least seconds of each by the wall clock, since the disk is part of it; ``prepare`` comes before each call."""
    least = dict.fromkeys(calls, float("inf"))
    for number in range(rounds):
        for name in calls if number % 2 else reversed(calls):
            prepare()
            os.sync()
            start = time.perf_counter()
            calls[name]()
            least[name] = min(least[name], time.perf_counter() - start)
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
    """A full save: digests of all tensors and files, fsync, rename."""
    size, path = bytes_in(state), folder / "theirs.safetensors"

    def clear() -> None:
        shutil.rmtree(folder / "ours", ignore_errors=True)
        path.unlink(missing_ok=True)

    def ours() -> None:
        save_checkpoint_folder(folder / "ours", {"weights": state})

    def theirs() -> None:
        save_file(state, path)
        synced(path)

    ours()
    theirs()
    least = in_turn({"ours": ours, "theirs": theirs}, rounds, clear)
    print(f"save {size / MB:.0f} MB: {least['ours']:.3f} s; save_file and fsync {least['theirs']:.3f} s")
    tell("time, times save_file and fsync", least["ours"] / least["theirs"], "x", 1.15)
    clear()
    tell("extra memory", extra_memory(ours) / 2**20, "MiB", 8)
    theirs()


def loading(folder: Path, state: dict[str, Tensor], rounds: int) -> None:
    """All tensors of a checkpoint: 99 parts mapped as they are, and a delta of one part verified."""
    delta = {name: state[name] for name in list(state)[::100]}
    save_checkpoint_folder(folder / "both", {"weights": delta, "frozen": state})
    files = [folder / "both" / f"{name}.safetensors" for name in ("weights", "frozen")]

    def ours() -> None:
        load_tensors(folder / "both")
        load_tensors(folder / "both", "frozen", verify=False)

    def theirs() -> None:
        for file in files:
            load_file(file)

    ours()
    theirs()
    least = in_turn({"ours": ours, "theirs": theirs}, 4 * rounds, lambda: None)
    print(f"load by mapping: {least['ours'] * 1e3:.2f} ms; load_file {least['theirs'] * 1e3:.2f} ms")
    tell(f"time, times load_file ({bytes_in(delta) / MB:.0f} MB verified)", least["ours"] / least["theirs"], "x", 1.2)


def verifying(folder: Path, state: dict[str, Tensor], rounds: int) -> None:
    """Every byte compared with its digest, from the page cache; beside it the digest of as many bytes in memory."""
    size = bytes_in(state)
    block = torch.randint(0, 256, (size,), dtype=torch.uint8).numpy()
    calls = {
        "verify": lambda: verify(folder / "ours"),
        "load": lambda: load_tensors(folder / "ours"),
        "memory": lambda: xxhash.xxh3_128(block).digest(),
    }
    save_checkpoint_folder(folder / "ours", {"weights": state})
    speed = {name: size / least / 1e9 for name, least in in_turn(calls, rounds, lambda: None).items()}
    print(
        f"verify: {speed['verify']:.1f} GB/s; load and verify all: {speed['load']:.1f}; memory: {speed['memory']:.1f}"
    )
    tell("verification", speed["verify"], "GB/s", 5, more=True)


class Adapted(LightningModule):
    """Frozen matrices and a trained part of one hundredth, which alone is in `state_dict` if ``own``."""

    def __init__(self, state: dict[str, Tensor], own: bool) -> None:
        super().__init__()
        self.own = own
        self.frozen = nn.ParameterList(nn.Parameter(t, requires_grad=False) for t in state.values())
        self.trained = nn.Parameter(torch.randn(bytes_in(state) // 400, generator=torch.Generator().manual_seed(0)))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The trained part, or everything."""
        return {"trained": self.trained.detach()} if self.own else super().state_dict(*args, **kwargs)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.trained.square().sum()

    def train_dataloader(self) -> DataLoader:
        return DataLoader(torch.zeros(1, 1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([self.trained])


def adapting(folder: Path, state: dict[str, Tensor], rounds: int) -> None:
    """A checkpoint of a model that trains one hundredth of its parameters, as the Trainer writes it."""
    trainers = {}
    for name, plugins in (("ours", [DigestCheckpointIO()]), ("theirs", [])):
        trainers[name] = Trainer(
            accelerator="cpu",
            max_steps=1,
            logger=False,
            plugins=plugins,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainers[name].fit(Adapted(state, own=name == "ours"))
    paths = {"ours": folder / "adapter", "theirs": folder / "full.ckpt"}
    calls = {name: partial(trainer.save_checkpoint, paths[name]) for name, trainer in trainers.items()}
    least = in_turn(calls, rounds, lambda: None)
    size = {"ours": sum(f.stat().st_size for f in paths["ours"].iterdir()), "theirs": paths["theirs"].stat().st_size}
    module = trainers["ours"].lightning_module
    moments = trainers["ours"].optimizers[0].state[module.trained].values()
    needed = module.trained.nbytes + sum(t.nbytes for t in moments)
    print(f"adapter checkpoint: {size['ours'] / MB:.2f} MB in {least['ours'] * 1e3:.0f} ms with fsync;", end=" ")
    print(f"Lightning's own: {size['theirs'] / MB:.0f} MB in {least['theirs'] * 1e3:.0f} ms without")
    tell("bytes, times trained weights and optimizer state", size["ours"] / needed, "x", 1.05)
    tell("times faster than Lightning's own", least["theirs"] / least["ours"], "x", 20, more=True)


def bytes_in(state: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in state.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mb", type=int, default=1000, help="size of the checkpoint; a few MB only show that it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="on the disk to measure")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    folder = Path(tempfile.mkdtemp(dir=options.folder, prefix="checkpoint-io-"))
    disk = shutil.disk_usage(folder)
    print(machine(torch.get_num_threads()))
    print(
        f"safetensors {safetensors.__version__}, lightning {lightning.__version__}, xxhash {xxhash.VERSION}", end="; "
    )
    print(
        f"{options.folder}: {disk.free / 1e9:.0f} of {disk.total / 1e9:.0f} GB free; minima of {options.rounds} rounds"
    )
    state = state_of(options.mb)
    try:
        for part in (saving, loading, verifying, adapting):
            part(folder, state, options.rounds)
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    finally:
        shutil.rmtree(folder)
    print(f"at the end: {load()}")


if __name__ == "__main__":
    main()
