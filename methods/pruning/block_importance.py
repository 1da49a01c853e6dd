"""The importance of a group of matrices, from the sensitivity of each of its weights (ECoFLaP, arXiv 2310.02998).

    score       first order: G per weight              zeroth order: S per matrix
    gradient    G = mean |dL/dW|                       S = mean |c|, once per matrix
    magnitude   |W| G                                  |W| S
    squared     W^2 G, G = mean (dL/dW)^2              W^2 S^2

A group's importance is the sum over its matrices, or that divided by the number of its weights.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Literal

import torch
from torch import Tensor

Score = Literal["gradient", "magnitude", "squared"]


def matrix_importance(weight: Tensor, sensitivity: Tensor, score: Score = "gradient") -> float:
    """The sum of the scores of one matrix.

    Args:
        weight: any shape.
        sensitivity: of every weight, in the same shape (for ``squared`` the mean of squares), or one number S.

    Raises:
        ValueError: another shape or an unknown score.
    """
    if sensitivity.dim() and sensitivity.shape != weight.shape:
        raise ValueError(f"a sensitivity {tuple(sensitivity.shape)} does not fit a weight {tuple(weight.shape)}")
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    known = sensitivity.to(wide)
    if score == "gradient":
        return known.sum().item()
    if score == "magnitude":
        return (wide.abs() * known).sum().item()
    if score == "squared":
        return (wide.square() * (known if known.dim() else known.square())).sum().item()
    raise ValueError(f"score={score!r}: expected 'gradient', 'magnitude' or 'squared'")


def group_importance(
    importance: Mapping[str, float],
    sizes: Mapping[str, int],
    groups: Mapping[str, Hashable],
    reduction: Literal["sum", "average"] = "sum",
) -> tuple[dict[Hashable, float], dict[Hashable, int]]:
    """Importance and number of weights of every group, in the order in which groups first appear.

    Args:
        importance: matrix -> sum of its scores.
        sizes: matrix -> weights.
        groups: matrix -> group: its block, its tower, or itself.
        reduction: sum over the group, or that per weight.
    """
    total: dict[Hashable, float] = {}
    count: dict[Hashable, int] = {}
    for name, value in importance.items():
        total[groups[name]] = total.get(groups[name], 0.0) + value
        count[groups[name]] = count.get(groups[name], 0) + sizes[name]
    if reduction == "average":
        total = {group: value / count[group] for group, value in total.items()}
    elif reduction != "sum":
        raise ValueError(f"reduction={reduction!r}: expected 'sum' or 'average'")
    return total, count
