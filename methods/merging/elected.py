"""Task vectors that TIES has trimmed and elected, one per expert: what AdaMerging++ learns coefficients of."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fulgurite.methods.merging.plan import StateDict
from fulgurite.methods.merging.ties import Ties


def elected_task_vectors(
    experts: Sequence[StateDict], base: StateDict, density: float = 0.2
) -> list[dict[str, Tensor]]:
    """tau_i where it is among the ``density`` largest of expert i and has the sign that all experts elect, else 0.

    Both are asked of `Ties` itself: of one expert it keeps what survives trimming, and of all of them the merged change
    has the elected sign. Memory: T + 2 models.

    Args:
        experts: T models, floating-point tensors alone.
        base: theirs.
        density: share of the entries of a whole model that is kept, at least one.
    """
    ties = Ties(density=density)
    merged = ties(experts, base)
    elected = {name: (merged[name] - base[name]).sign() for name in base}
    out = []
    for expert in experts:
        kept = ties([expert], base)
        taus = {name: expert[name] - base[name] for name in base}
        out.append(
            {
                name: torch.where((kept[name] != base[name]) & (tau.sign() == elected[name]), tau, 0)
                for name, tau in taus.items()
            }
        )
    return out
