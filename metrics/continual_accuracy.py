"""Accuracy over the stages of a continual stream, and what follows from it.

``R[t, i]`` is the accuracy on domain i after stage t; row 0 is the model before any stage (zero-shot).

    average            mean_i R[T, i]
    forgetting         mean over i learned before T of max_{t >= s_i} R[t, i] - R[T, i]
    forgetting_own     the same with R[s_i, i] in place of the maximum
    backward_transfer  -forgetting_own
    forward_transfer   mean over i not in stage 1 of R[s_i - 1, i] - R[0, i]

with s_i the stage that trains domain i (Lopez-Paz and Ranzato 2017; Chaudhry et al. 2018). A domain of which nothing
was counted (NaN, as under a limit on the test batches) is left out of every mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


def continual_scores(matrix: Tensor, stage_of_domain: Sequence[int | None]) -> dict[str, float]:
    """Summary of an accuracy matrix.

    Args:
        matrix: (T + 1, N) accuracies, row 0 before any stage; NaN where nothing was counted.
        stage_of_domain: for each of the N domains the stage (1..T) that trains it, None where none does.

    Returns:
        ``average`` and, where defined, ``forgetting``, ``forgetting_own``, ``backward_transfer``,
        ``forward_transfer``, ``unseen`` (domains never trained, at the end), each over the counted domains alone.
    """
    last = matrix.shape[0] - 1
    counted = ~matrix.isnan().any(0)
    trained = [(i, s) for i, s in enumerate(stage_of_domain) if s is not None and counted[i]]
    scores = {"average": matrix[last, [i for i, _ in trained]].mean().item()} if trained else {}
    earlier = [(i, s) for i, s in trained if s < last]
    if earlier:
        drop = [(matrix[s:, i].max() - matrix[last, i]).item() for i, s in earlier]
        own = [(matrix[s, i] - matrix[last, i]).item() for i, s in earlier]
        scores["forgetting"] = sum(drop) / len(drop)
        scores["forgetting_own"] = sum(own) / len(own)
        scores["backward_transfer"] = -scores["forgetting_own"]
    later = [(matrix[s - 1, i] - matrix[0, i]).item() for i, s in trained if s > 1]
    if later:
        scores["forward_transfer"] = sum(later) / len(later)
    unseen = [i for i, s in enumerate(stage_of_domain) if s is None and counted[i]]
    if unseen:
        scores["unseen"] = matrix[last, unseen].mean().item()
    return scores


class ContinualAccuracy(Metric):
    """Accumulates ``R[t, i]`` and the accuracy by question type; exact over ranks with uneven data.

    Args:
        num_domains: N.
        num_stages: T.
        num_kinds: question types; samples without a type are only in the totals.

    State: credit and count, (T + 1, N, num_kinds + 1) float64, the last column for samples without a type.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, num_domains: int, num_stages: int, num_kinds: int = 0) -> None:
        super().__init__()
        shape = (num_stages + 1, num_domains, num_kinds + 1)
        self.add_state("credit", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, stage: int, domain: Tensor, credit: Tensor, kind: Tensor | None = None) -> None:
        """Add samples seen after ``stage`` (0 = before any).

        Args:
            stage: row.
            domain: (B,) column of each sample.
            credit: (B,) score of each sample in [0, 1].
            kind: (B,) question type, -1 for none.
        """
        kinds = self.credit.shape[2]
        kind = torch.full_like(domain, -1) if kind is None else kind
        cell = domain * kinds + kind % kinds
        # Not bincount, which CUDA refuses under deterministic algorithms.
        self.credit[stage].view(-1).index_add_(0, cell, credit.double())
        self.count[stage].view(-1).index_add_(0, cell, torch.ones_like(credit, dtype=torch.float64))

    def compute(self) -> dict[str, Tensor]:
        """``matrix`` (T + 1, N) and ``by_kind`` (T + 1, N, num_kinds); NaN where nothing was counted."""
        return {
            "matrix": self.credit.sum(-1) / self.count.sum(-1),
            "by_kind": self.credit[..., :-1] / self.count[..., :-1],
        }

    def results(self) -> dict[str, Tensor]:
        """`compute` in full shape whatever the sizes; torchmetrics takes all dimensions off a single number."""
        stages, domains, kinds = self.credit.shape
        shapes = {"matrix": (stages, domains), "by_kind": (stages, domains, kinds - 1)}
        return {name: value.view(shapes[name]) for name, value in self.compute().items()}
