"""Query bank normalisation: inverted softmax against a bank, for all queries or for those drawn to a hub.

QB-Norm (Bogolin et al. 2022, arXiv 2112.12777). Inverted softmax (Smith et al. 2017, arXiv 1702.03859) for query q and
candidate j, with the scores B of a bank:

    IS_qj = exp(beta S_qj) / sum_i exp(beta B_ij)

Dynamic inverted softmax takes IS for the rows whose best candidate is the best of some query of the bank (a hub), and
leaves the other rows as they are. Here IS is written as ``log(IS) / beta = S_qj - LSE_i(beta B_ij) / beta``, which
ranks alike and stays in units of scores, so that levels can be averaged.

Legend: L levels, Q queries, N candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fulgurite.methods.ranks import ALONE, Ranks
from fulgurite.methods.retrieval.normalizers import Blocks, ColumnLogSumExp, ScoreNormalizer, pieces


class QueryBank(ScoreNormalizer):
    """S' = mean_l (S_l - LSE_bank(beta B_l) / beta), at each level for the rows that are normalised. Needs a bank.

    One pass.

    Args:
        beta: inverse temperature. The paper has 20 on cosines; scores are cosines times a logit scale of at most 100,
            hence 0.2.
        dynamic: normalise a row of a level only where its best candidate is the best of a query of the bank.

    Raises:
        ValueError: ``beta`` is not positive.
    """

    mode = "single-query"

    def __init__(self, beta: float = 0.2, dynamic: bool = True) -> None:
        if not beta > 0:
            raise ValueError(f"beta={beta} of QueryBank: above 0")
        self.beta = beta
        self.dynamic = dynamic

    @property
    def needs_whole_rows(self) -> bool:
        """A row's best candidate decides, where ``dynamic``."""
        return self.dynamic

    @torch.no_grad()
    def fit(self, blocks: Blocks, ranks: Ranks = ALONE) -> dict[str, Tensor]:
        """``bias`` (L, N), and ``hubs`` (L, N): the best candidates of the bank's queries."""
        sums, hubs = ColumnLogSumExp(), None
        for x in pieces(blocks()):
            sums.add(self.beta * x)
            hubs = x.new_zeros(x.shape[0], x.shape[2], dtype=torch.bool) if hubs is None else hubs
            hubs.scatter_(1, x.argmax(2), True)
        bias = -sums.total(ranks) / self.beta
        found = [each for each in ranks.gather(None if hubs is None else hubs.cpu()) if each is not None]
        return {"bias": bias.float(), "hubs": torch.stack(found).any(0).to(bias.device)}

    def apply(self, scores: Tensor, fitted: dict[str, Tensor]) -> Tensor:
        """As in the base."""
        bias = fitted["bias"].to(scores.device)[:, None]
        if self.dynamic:
            bias = bias * fitted["hubs"].to(scores.device).gather(1, scores.argmax(2))[..., None]  # (L, Q, N)
        return (scores + bias).mean(0)

    def bias(self, fitted: dict[str, Tensor]) -> Tensor | None:
        """As in the base; with ``dynamic``, rows differ."""
        return super().bias(fitted) if self.dynamic else fitted["bias"]
