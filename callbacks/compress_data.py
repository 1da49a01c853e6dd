"""What a model is measured on before and while it is compressed: batches, the walk over its blocks, its loss.

Batch i of all goes to process i modulo their number, so that several processes measure what one measures, up to the
order of additions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fulgurite.callbacks.steps import Context
from fulgurite.checkpoints import digest_of_json, digest_of_state
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.losses import answer_loss
from fulgurite.methods.ranks import Ranks
from fulgurite.modules.calibration import counted_inputs, masks_by_layer
from fulgurite.modules.compression import Compressible
from fulgurite.samples import Batch, DataError
from fulgurite.samples.loader import Failure, ResumableLoader

TARGETS = "answer_targets"  # beside the inputs of a batch
LARGEST = 16  # samples of a batch at most, whatever the number of processes
Inputs = dict[str, Tensor]


@dataclass
class CalibrationSamples:
    """What the inputs of layers are measured on.

    Args:
        samples: training samples, drawn without replacement.
        seed: of the choice.
    """

    samples: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(f"calibration: samples={self.samples} must be at least 1")


def calibration_batches(
    module: Compressible, calibration: CalibrationSamples, context: Context
) -> tuple[list[Inputs], dict[str, Any]]:
    """This process's batches, and what the samples of all are. All ranks call it.

    What is digested is all that the module is given, so that other answers, pixels or another preparation are other
    data; it is the same for any number of processes with batches of one size.

    Raises:
        LookupError: the context has no data.
        ValueError: there are too few samples.
    """
    ranks = context.ranks

    def prepare() -> tuple[ResumableLoader, list[Inputs], list[str]]:
        loader = context.calibration(calibration.samples, calibration.seed)
        if (count := len(loader.dataset.samples)) < ranks.size:
            raise ValueError(f"{count} samples do not serve {ranks.size} processes: set calibration.samples up")
        batches = [
            {**counted_inputs(module, batch), TARGETS: module.answer_targets(batch).cpu()}
            for batch in dealt(loader, ranks)
        ]
        return loader, batches, [digest_of_state(batch) for batch in batches]

    loader, batches, own = ranks.agree(prepare)
    in_turn = zip_longest(*ranks.gather(own))
    samples = loader.dataset.samples
    data = {
        "samples": len(samples),
        "domains": sorted({sample.domain for sample in samples}),
        "data": digest_of_json([digest for turn in in_turn for digest in turn if digest is not None]),
        "batch": batch_size(loader, ranks),
    }
    return batches, data


def batch_size(loader: ResumableLoader, ranks: Ranks) -> int:
    """Samples of a batch: the same for any number of processes that so many batches serve."""
    return min(loader.batch_sampler.global_batch_size, LARGEST, len(loader.dataset) // ranks.size)


def dealt(loader: ResumableLoader, ranks: Ranks) -> Iterator[Batch]:
    """Whole batches in the order of the samples, of which every ``ranks.size``-th is this process's."""
    count, size = len(loader.dataset), batch_size(loader, ranks)
    batches = [list(range(start, min(start + size, count))) for start in range(0, count, size)]
    own = DataLoader(
        loader.dataset,
        batch_sampler=batches[ranks.rank :: ranks.size],
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        generator=torch.Generator(),
    )
    for batch in own:
        if isinstance(batch, Failure):
            raise DataError(batch.text)
        yield batch


def walk_over(
    module: Compressible, batches: Sequence[Inputs], context: Context, towers: Sequence[str] | None
) -> LayerWalk:
    """A walk over the blocks of the module, with its live adapters where it has some."""
    part, prefix = module.get_submodule(module.compressible_part), f"{module.compressible_part}."

    def masks(batch: Inputs, names: Sequence[str]) -> dict[str, Tensor]:
        found = masks_by_layer(module, [prefix + name for name in names], inputs_of(batch, context.device))
        return {name.removeprefix(prefix): mask for name, mask in found.items()}

    def forward(batch: Inputs) -> None:
        module.pass_blocks(inputs_of(batch, context.device))

    return LayerWalk(part, module.blocks_spec(), batches, forward, masks, context.ranks, towers=towers)


def loss_of(module: Compressible, context: Context) -> Callable[[Inputs], Tensor]:
    """Mean cross entropy of the answers of a batch, with the live adapters where there are some."""

    def loss(batch: Inputs) -> Tensor:
        logits = module.answer_logits(inputs_of(batch, context.device))
        return answer_loss(logits, batch[TARGETS].to(logits.device)).mean()

    return loss


def inputs_of(batch: Inputs, device: torch.device | str) -> Inputs:
    """What the module reads of a batch, on its device."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items() if name != TARGETS}
