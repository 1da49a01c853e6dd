"""What a fit trains, as a table when it starts."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Sequence

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fulgurite.callbacks.report import show
from fulgurite.methods.adapters.bank import AdapterBank
from fulgurite.reports import Section
from fulgurite.reports.tables import plain_table

HEADER = ["what trains", "places", "parameters", "share", "stored MB", "optimizer MB"]


class ParameterReport(pl.Callback):
    """Prints how many parameters train, where, and what they take.

    Hooks: ``on_fit_start``, when optimizers are there and nothing has been trained. Rank 0 prints. Nothing is stored; a
        resumed run prints again.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table."""
        if trainer.is_global_zero:
            rows, caption = parameter_rows(pl_module, trainer.optimizers)
            table = plain_table("Trained parameters", HEADER, rows, caption)
            show([Section("Parameters", "", printed=table)])


def parameter_rows(module: nn.Module, optimizers: Sequence[Optimizer]) -> tuple[list[list[str]], str]:
    """Rows under `HEADER` and a caption: a row per placement of adapters, per other part that trains, and for all.

    The model is the backbone with one set of adapters: the frozen copies that a bank keeps do not count.
    """
    kept = {parameter: size for each in optimizers for parameter, size in state_sizes(each).items()}
    bank, notes, copies = getattr(module, "bank", None), [], 0
    lines: list[tuple[str, str, list[Tensor], int]] = []
    if isinstance(bank, AdapterBank):
        lines = [placement_line(bank, number) for number in range(len(bank.placements))]
        frozen = [name for name in bank.names if name != bank.live]
        copies = count(parameter for name in frozen for parameter in bank.parameters_of(name))
        if frozen and lines:
            notes.append(f"sets of this size: {bank.live}, which trains, and frozen {', '.join(frozen)}")
    adapters = {id(parameter) for _, _, parameters, _ in lines for parameter in parameters}
    others: dict[str, list[Tensor]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and id(parameter) not in adapters:
            others[name.partition(".")[0]].append(parameter)
    lines += [(name, "", parameters, num_bytes(parameters)) for name, parameters in others.items()]
    lines.append(("all", "", [p for _, _, parameters, _ in lines for p in parameters], sum(size for *_, size in lines)))
    total = count(module.parameters()) - copies
    rows = [
        [
            title,
            places,
            f"{count(parameters):,}",
            f"{count(parameters) / max(total, 1):.2%}",
            f"{size / 1e6:.2f}",
            f"{sum(kept.get(parameter, 0) for parameter in parameters) / 1e6:.2f}",
        ]
        for title, places, parameters, size in lines
    ]
    notes.append(f"model: {total:,} parameters")
    return rows, "; ".join(notes)


def placement_line(bank: AdapterBank, number: int) -> tuple[str, str, list[Tensor], int]:
    """Title, places, parameters and stored bytes of a placement in the set that trains; what is shared counts once."""
    places = [place for place in bank.places if place.placement == number]
    own = bank.adapters_of(bank.live)
    adapters = [own[label] for label in dict.fromkeys(place.label for place in places)]
    parameters = list({id(p): p for adapter in adapters for p in adapter.parameters()}.values())
    buffers = list({id(b): b for adapter in adapters for b in adapter.buffers()}.values())
    title = f"{adapters[0].title} at {', '.join(bank.placements[number].points)}"
    return title, f"{len(places):,}", parameters, num_bytes([*parameters, *buffers])


def count(parameters: Iterable[Tensor]) -> int:
    """Entries of tensors."""
    return sum(parameter.numel() for parameter in parameters)


def num_bytes(parameters: Sequence[Tensor]) -> int:
    """Bytes of tensors."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def state_sizes(optimizer: Optimizer) -> dict[Tensor, int]:
    """Bytes that an optimizer will keep for each of its parameters, by a step on a small one with the same options."""
    sizes: dict[Tensor, int] = {}
    for group in optimizer.param_groups:
        for dtype in {parameter.dtype for parameter in group["params"]}:
            device = group["params"][0].device
            small = nn.Parameter(torch.zeros(2, 3, dtype=dtype, device=device))
            small.grad = torch.zeros_like(small)
            trial = copy.copy(optimizer)
            trial.state, trial.param_groups = defaultdict(dict), [{**group, "params": [small]}]
            trial.step(lambda: torch.zeros(()))
            kept = [t for t in trial.state[small].values() if isinstance(t, Tensor) and t.shape == small.shape]
            each = sum(t.element_size() for t in kept)
            sizes |= {parameter: each * parameter.numel() for parameter in group["params"] if parameter.dtype == dtype}
    return sizes
