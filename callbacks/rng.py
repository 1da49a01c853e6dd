"""Random number generators of every rank, kept in checkpoints."""

from __future__ import annotations

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info


class RandomStates(pl.Callback):
    """Keeps the generators of torch, Python, NumPy and the rank's GPU in every checkpoint, and restores them.

    When: stored while a checkpoint is made (each rank's state is gathered, rank 0 writes); restored at the
    first ``on_train_batch_start`` after a resume, since building loaders and the sanity check draw numbers
    before that. With another number of ranks nothing is restored, and a line says so. Together with loaders
    whose order and workers depend on seed and epoch alone this makes a resumed run equal to the unbroken one,
    bit for bit.
    """

    def __init__(self) -> None:
        self._restore: list[dict[str, Any]] | None = None

    def state_dict(self) -> dict[str, Any]:
        """The states of all ranks, in order of rank. A collective when there are several."""
        own = read_states()
        if not (dist.is_available() and dist.is_initialized()):
            return {"ranks": [own]}
        ranks: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, own)
        return {"ranks": ranks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the states until the first training batch."""
        self._restore = state_dict["ranks"]

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        """Restore the rank's states once."""
        if self._restore is None:
            return
        if len(self._restore) == trainer.world_size:
            write_states(self._restore[trainer.global_rank])
        else:
            rank_zero_info(
                f"The checkpoint holds random states of {len(self._restore)} ranks and this run has "
                f"{trainer.world_size}: they are not restored, so it will not repeat the saved run exactly."
            )
        self._restore = None

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Forget states that were loaded for a run without training."""
        self._restore = None


def read_states() -> dict[str, Any]:
    """The states of this process's generators, as tensors and plain numbers."""
    version, words, gauss_next = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    states = {
        "torch": torch.get_rng_state(),
        "python": {"version": version, "words": torch.tensor(words), "gauss_next": gauss_next},
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def write_states(states: dict[str, Any]) -> None:
    """Inverse of `read_states`."""
    torch.set_rng_state(states["torch"])
    python = states["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss_next"]))
    numpy = states["numpy"]
    keys = numpy["keys"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
