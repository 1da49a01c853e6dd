"""Dual softmax: a score counts as far as the candidate prefers the query among all test queries.

CAMoE (Cheng et al. 2021, arXiv 2109.04290), at test time:

    S'_qj = S_qj * P_qj,   P_qj = exp(S_qj / T) / sum_{q' of the test} exp(S_q'j / T)

Legend: L levels, Q queries, N candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fulgurite.methods.ranks import ALONE, Ranks
from fulgurite.methods.retrieval.normalizers import Blocks, ColumnLogSumExp, ScoreNormalizer, pieces


class DualSoftmax(ScoreNormalizer):
    """S' = mean_l S_l * softmax over the test queries of S_l / ``temperature``. Needs all test queries, in one pass.

    It presumes that every candidate belongs to some query of the test. The published product is meant for positive
    scores: a negative one is raised where its share is small.

    Args:
        temperature: in units of scores (cosines times the logit scale).

    Raises:
        ValueError: ``temperature`` is not positive.
    """

    mode = "transductive"

    def __init__(self, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} of DualSoftmax: above 0")
        self.temperature = temperature

    @torch.no_grad()
    def fit(self, blocks: Blocks, ranks: Ranks = ALONE) -> dict[str, Tensor]:
        """The sums of the shares, ``log_sum`` (L, N), over all test queries."""
        sums = ColumnLogSumExp()
        for x in pieces(blocks()):
            sums.add(x / self.temperature)
        return {"log_sum": sums.total(ranks).float()}

    def apply(self, scores: Tensor, fitted: dict[str, Tensor]) -> Tensor:
        """As in the base; rows of other queries than those fitted on have shares that do not sum to 1."""
        share = (scores / self.temperature - fitted["log_sum"].to(scores.device)[:, None]).exp()
        return (scores * share).mean(0)
