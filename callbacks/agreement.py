"""Ranks that must do the same thing say so before the first step."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch.distributed as dist

from fulgurite.checkpoints import MismatchError
from fulgurite.checkpoints.digest import digest_of_state
from fulgurite.checkpoints.software import software
from fulgurite.datamodules.base import FulguriteDataModule
from fulgurite.samples import Sample


class RanksAgree(pl.Callback):
    """Compares config, data, seed and library versions over the ranks at the start of a fit.

    Hook: ``on_fit_start``, after the data are read and before weights are loaded. Every rank raises the same error, so
    the run ends at once instead of training a mixture. Nothing is stored.

    Args:
        config: the complete config as text.
        parameters: also compare the trained parameters, at the start and after every validation. Under FSDP2 the ranks
            hold different slices, and only their names are compared.
    """

    def __init__(self, config: str = "", parameters: bool = False) -> None:
        self.config, self.parameters = config, parameters

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare what the run is made of."""
        if trainer.world_size == 1:
            return
        facts = {"config": digest(self.config), "seed": os.environ.get("PL_GLOBAL_SEED", "not set")}
        facts |= {f"version of {name}": version for name, version in software().items()}
        data = trainer.datamodule
        if isinstance(data, FulguriteDataModule):
            facts |= {f"{split} data": digest_of_samples(data.samples(split)) for split in ("train", "val")}
        if self.parameters:
            facts["parameters"] = digest_of_parameters(pl_module)
        require_agreement(facts)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compare the parameters where that is asked for."""
        if self.parameters and trainer.world_size > 1 and trainer.state.fn == "fit":
            require_agreement({"parameters": digest_of_parameters(pl_module)})


def require_agreement(facts: Mapping[str, str]) -> None:
    """Raise `MismatchError` on every rank where ``facts`` are not the same on all. A collective."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, dict(facts))
    wrong = [name for name in facts if len({rank.get(name) for rank in ranks}) > 1]
    if wrong:
        lines = [
            f"  {name}: " + ", ".join(f"rank {r} {rank.get(name)}" for r, rank in enumerate(ranks)) for name in wrong
        ]
        raise MismatchError(
            "the processes of this run do not agree:\n"
            + "\n".join(lines)
            + "\nStart all of them with the same command, "
            "config files, data and environment."
        )


def digest(text: str) -> str:
    """Short digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def digest_of_samples(samples: Sequence[Sample]) -> str:
    """Short digest of what is asked, in order, with its answers; media are not read."""
    whole = hashlib.sha256()
    for sample in samples:
        whole.update(repr((sample.domain, sample.id, sample.question, sorted(sample.answers.items()))).encode())
    return f"{len(samples)} samples {whole.hexdigest()[:12]}"


def digest_of_parameters(module: pl.LightningModule) -> str:
    """Digest of what trains; of the names alone where it is sharded."""
    named = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
    if any(hasattr(p, "device_mesh") for p in named.values()):
        return digest("\n".join(named))
    return digest_of_state(named)
