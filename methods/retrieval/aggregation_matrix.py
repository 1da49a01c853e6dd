"""The square matrices of interactive similarity aggregation, which start as the identity.

    full       M[i, j], one number for each pair of places; fewer places use the leading block
    relative   M[i, j] = r[j - i], shared by all pairs at equal distance, so that any number of places will do;
               distances never trained count nothing

Places that belong together, such as the patches of a frame, share a block for each distance of their groups.

Legend: L length in groups, G places of a group.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fulgurite.methods.retrieval.isa import identity_diagonals, toeplitz

Kind = Literal["full", "relative"]


class FullMatrix(nn.Module):
    """One number for each pair of places.

    Args:
        length: most groups L.
        group: G.
    """

    def __init__(self, length: int, group: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(length * group))

    def forward(self, length: int) -> Tensor:
        """The whole matrix, whatever ``length`` is: who aggregates fewer places uses its leading block."""
        return self.weight


class RelativeMatrix(nn.Module):
    """One (G, G) block for each distance between groups.

    Args:
        length: groups L, whose distances are learned.
        group: G.
    """

    def __init__(self, length: int, group: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(identity_diagonals(length)[:, None, None] * torch.eye(group))

    def forward(self, length: int) -> Tensor:
        """A matrix whose leading (L G, L G) block is that of ``length`` groups."""
        known, group = (len(self.weight) + 1) // 2, self.weight.shape[1]
        unknown = max(length - known, 0)
        table = functional.pad(self.weight, (0, 0, 0, 0, unknown, unknown))
        matrices = torch.stack([toeplitz(diagonals) for diagonals in table.flatten(1).T])  # (G G, L, L)
        size = matrices.shape[-1] * group
        return matrices.unflatten(0, (group, group)).permute(2, 0, 3, 1).reshape(size, size)


def aggregation_matrix(kind: Kind, length: int, group: int = 1) -> nn.Module:
    """A `FullMatrix` or a `RelativeMatrix`."""
    return (FullMatrix if kind == "full" else RelativeMatrix)(length, group)
