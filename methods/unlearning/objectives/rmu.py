"""RMU, representation misdirection (Li et al., 2024, arXiv 2403.03218).

    L = mean_r 1/(n_r D) sum_t |h_l(x_r, t) - c|^2 ,   c = s u / |u| ,   u ~ Uniform[0, 1)^D

h_l is the output of block l, so a pass may end there. `RetainStates` is the published retain term.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fulgurite.methods.unlearning.objectives.base import Objective, Terms, View, per_row, positive


class RMU(Objective):
    """Hidden states of the answer are driven to one random vector.

    NOTE: the published code multiplies the mean error by the mean of 1/n_r; here each answer has its own n_r.

    Args:
        layer: l, counted from 0.
        coefficient: s, length of the vector.
        seed: of its direction.

    Raises:
        ValueError: ``layer`` is negative, or ``coefficient`` not above 0.
    """

    needs_logits = False

    def __init__(self, layer: int = 7, coefficient: float = 2.0, seed: int = 0) -> None:
        positive(coefficient=coefficient)
        if layer < 0:
            raise ValueError(f"layer={layer} must be the number of a block, from 0 on")
        self.state_layer = layer
        self.coefficient, self.seed = coefficient, seed

    def control(self, width: int) -> Tensor:
        """(D,) c, the same wherever it is drawn."""
        direction = torch.rand(width, generator=torch.Generator().manual_seed(self.seed))
        return self.coefficient * direction / direction.norm()

    def __call__(self, views: Sequence[View], references: Sequence[View | None]) -> Terms:
        """The loss of the one target, by rows."""
        (view,) = views
        return squared_distance(view, self.control(view.states.shape[-1]).to(view.states.device))


def squared_distance(view: View, target: Tensor) -> Terms:
    """Of hidden states from a vector (D,) or from other states (R, T, D): a mean over tokens and width per row."""
    each = (view.states.float() - target.float()).square().mean(-1).where(view.labelled, 0.0)
    return per_row(each.sum(1) / view.lengths.clamp(min=1), view)
