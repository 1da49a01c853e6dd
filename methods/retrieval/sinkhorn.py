"""Sinkhorn-Knopp bias: candidates that a bank of queries finds too often or too rarely are evened out.

UCoFiA (arXiv 2309.10091) scales exp(B), B the scores of a bank of training queries against the candidates, until its
columns sum to 1, and takes the logarithm of the column factors as a term per candidate. With LSE the log-sum-exp,

    lb_j = -LSE_i(B_ij)
    repeat:  la_i = -LSE_j(B_ij + lb_j),  lb_j = -LSE_i(B_ij + la_i)
    beta = log_softmax(lb)

is the published linear form in logarithms, in which no row can underflow. A row's term needs that row alone, and the
columns' sums add up over rows, so each repetition is one pass over the bank.

Legend: L levels, N candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fulgurite.methods.ranks import ALONE, Ranks
from fulgurite.methods.retrieval.normalizers import Blocks, ColumnLogSumExp, ScoreNormalizer, pieces


@torch.no_grad()
def streamed_sinkhorn_bias(blocks: Blocks, iterations: int = 4, ranks: Ranks = ALONE) -> Tensor:
    """The bias of every level, (L, N) float32, from a bank of any size.

    ``iterations`` + 1 passes; memory of O(N) per level and a few rows beside the block. Works in float64, so that how
    the bank is divided changes nothing.

    Args:
        blocks: gives the bank's scores (L, b, N), block after block, from the start at every call.
        iterations: of the scaling.
        ranks: share the bank. A collective.

    Raises:
        ValueError: the bank is empty, or a later pass has another number of queries than the first.
    """
    column_terms, rows = None, None
    for _ in range(iterations + 1):
        sums = ColumnLogSumExp()
        for x in pieces(blocks()):
            sums.add(x if column_terms is None else x - (x + column_terms).logsumexp(2, keepdim=True))
        if rows is not None and rows != sums.rows:
            raise ValueError(
                f"the first pass over the bank gave {rows} queries, a later one {sums.rows}: give a function that "
                "starts anew at every call"
            )
        column_terms, rows = -sums.total(ranks)[:, None], sums.rows
    return column_terms[:, 0].log_softmax(-1).float()


def sinkhorn_bias(bank_scores: Tensor, iterations: int = 4) -> Tensor:
    """The bias of every candidate, (N,) float32, from the (N_bank, N) scores of a bank. See the module's equations.

    Raises:
        ValueError: the bank is empty.
    """
    return streamed_sinkhorn_bias(lambda: [bank_scores[None]], iterations)[0]


class Sinkhorn(ScoreNormalizer):
    """S = mean_l (S_l + beta_l), one beta per level and candidate. Needs a bank, passed over ``iterations`` + 1 times.

    Args:
        iterations: of the scaling.

    Raises:
        ValueError: ``iterations`` is negative.
    """

    mode = "single-query"

    def __init__(self, iterations: int = 4) -> None:
        if iterations < 0:
            raise ValueError(f"iterations={iterations} of Sinkhorn: at least 0")
        self.iterations = iterations

    def fit(self, blocks: Blocks, ranks: Ranks = ALONE) -> dict[str, Tensor]:
        """``bias`` (L, N)."""
        return {"bias": streamed_sinkhorn_bias(blocks, self.iterations, ranks)}

    def apply(self, scores: Tensor, fitted: dict[str, Tensor]) -> Tensor:
        """As in the base."""
        return (scores + fitted["bias"].to(scores.device)[:, None]).mean(0)

    def bias(self, fitted: dict[str, Tensor]) -> Tensor | None:
        """That of `fit`."""
        return fitted["bias"]
