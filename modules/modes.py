"""Inference modes of a continually trained model, as weights over its adapter sets.

Every mode is a row of weights over the sets ``[initial, stage 1, ..., stage T]``; after stage t only the first t stages
may be used. So one finished run gives the accuracy of every mode after every stage, without training anything again.

Legend: B samples, T stages, R rows (mode, stage), A answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fulgurite.methods.routing.base import Features, Router
from fulgurite.samples import Batch

Mode = Literal["dynamic", "second_router", "router", "average", "oracle", "last", "zero_shot"]
MODES: tuple[Mode, ...] = get_args(Mode)

MODE_NAMES: dict[str, str] = {
    "dynamic": "dynamic merging",
    "second_router": "dynamic merging, second router",
    "router": "router only (top-1)",
    "average": "static average",
    "oracle": "oracle domain",
    "last": "last adapter (sequential)",
    "zero_shot": "zero-shot",
}


def mode_weights(
    mode: Mode, stage: int, num_stages: int, routers: Sequence[Router], features: Features, own_stage: Tensor
) -> Tensor:
    """Weights of one mode after ``stage``.

    Args:
        mode: which.
        stage: t, 0 = before any stage.
        num_stages: T.
        routers: the router and, for ``second_router``, another one.
        features: routing features of the B samples.
        own_stage: (B,) the stage (1..T) that trains the sample's domain, 0 where none does.

    Returns:
        (B, T + 1) float32, rows sum to 1; column 0 is the set before any stage.
    """
    size = len(own_stage)
    weights = torch.zeros(size, num_stages + 1, device=own_stage.device)
    if stage == 0 or mode == "zero_shot":
        weights[:, 0] = 1
    elif mode == "last":
        weights[:, stage] = 1
    elif mode == "average":
        weights[:, 1 : stage + 1] = 1 / stage
    elif mode == "oracle":
        column = torch.where(own_stage <= stage, own_stage, 0)
        weights[torch.arange(size, device=own_stage.device), column] = 1
    elif mode == "router":
        weights[:, 1:] = routers[0](features, num_models=stage, top_k=1)
    else:
        weights[:, 1:] = routers[mode == "second_router"](features, num_models=stage)
    return weights


def take(batch: Batch, index: Tensor) -> Batch:
    """The samples ``index`` (U,) of a batch; repeats are allowed."""
    rows = index.tolist()
    return {
        key: value[index] if isinstance(value, Tensor) else [value[i] for i in rows] for key, value in batch.items()
    }


def distinct_pairs(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct (sample, weights) pairs among many rows, equal weights side by side.

    Args:
        rows: (R, B, K) weights.

    Returns:
        sample (U,), weights (U, K) and the position (R, B) of every row's pair among the U.
    """
    num_rows, size, width = rows.shape
    samples = torch.arange(size, device=rows.device, dtype=rows.dtype).expand(num_rows, size)
    keyed = torch.cat([rows.reshape(-1, width), samples.reshape(-1, 1)], dim=1)
    distinct, inverse = torch.unique(keyed, dim=0, return_inverse=True)
    return distinct[:, -1].long(), distinct[:, :-1], inverse.view(num_rows, size)


def logits_of_rows(
    forward: Callable[[Batch, Tensor], Tensor],
    batch: Batch,
    rows: Tensor,
    chunk: int,
    agree: Callable[[int], int] = lambda n: n,
) -> Tensor:
    """Scores of every row of weights, computing each distinct (sample, weights) pair once.

    Args:
        forward: (batch, weights) -> logits.
        batch: B samples.
        rows: (R, B, K).
        chunk: pairs per forward pass.
        agree: number of passes that every rank makes; sharded models need equal counts.

    Returns:
        (R, B, A).
    """
    sample, weights, inverse = distinct_pairs(rows)
    own = -(-len(sample) // chunk)
    parts = []
    for number in range(agree(own)):
        part = slice(number * chunk, (number + 1) * chunk) if number < own else slice(chunk)
        parts.append(forward(take(batch, sample[part]), weights[part]))
    return torch.cat(parts[:own])[inverse]
