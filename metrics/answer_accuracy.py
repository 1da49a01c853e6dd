"""Accuracy of answers as texts, in all and by kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric


class CreditByKind(Metric):
    """Mean credit of samples in per cent, in all and by kind; exact over ranks with uneven data. No texts are kept.

    Args:
        kinds: names of the kinds that have figures of their own, as ``DataInfo.kinds``.

    State: credit and count, (K + 1,) float64, the last entry for samples of no kind or another one.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self, kinds: Sequence[str] = ()) -> None:
        super().__init__()
        self.kinds = tuple(kinds)
        for state in ("credit", "count"):
            self.add_state(state, torch.zeros(len(self.kinds) + 1, dtype=torch.float64), dist_reduce_fx="sum")

    def add(
        self,
        credits: Sequence[float],
        kinds: Sequence[str | None] | None = None,
        counted: Tensor | None = None,
    ) -> None:
        """Add the credit of B samples; those where ``counted`` (B,) is False are left out."""
        columns = {kind: column for column, kind in enumerate(self.kinds)}
        use = [True] * len(credits) if counted is None else counted.tolist()
        gained, number = [0.0] * len(self.credit), [0.0] * len(self.credit)
        for credit, kind, used in zip(credits, kinds or [None] * len(credits), use, strict=True):
            if used:
                gained[columns.get(kind, -1)] += credit
                number[columns.get(kind, -1)] += 1
        self.credit += self.credit.new_tensor(gained)
        self.count += self.count.new_tensor(number)

    def compute(self) -> dict[str, Tensor]:
        """``accuracy`` in per cent, and ``accuracy/<kind>``; NaN where nothing was counted."""
        figures = {"accuracy": 100 * self.credit.sum() / self.count.sum()}
        for column, kind in enumerate(self.kinds):
            figures[f"accuracy/{kind}"] = 100 * self.credit[column] / self.count[column]
        return figures


class AnswerAccuracy(CreditByKind):
    """Mean score of the answers among the accepted ones, which must be met to the letter.

    So GQA is judged, NLVR2 (``"true"`` and ``"false"``), and video questions with choices (``"a0"`` to ``"a4"``).
    """

    def update(
        self,
        answers: Sequence[str],
        accepted: Sequence[Mapping[str, float]],
        kinds: Sequence[str | None] | None = None,
        counted: Tensor | None = None,
    ) -> None:
        """Add B answers and the scores of those accepted; where ``counted`` (B,) is False they are left out."""
        self.add([scores.get(answer, 0.0) for answer, scores in zip(answers, accepted, strict=True)], kinds, counted)
