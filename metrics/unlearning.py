"""How well facts were deleted, and at what cost: attacks that still succeed, scores of edits, answers that were lost.

Legend: N items.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fulgurite.methods.unlearning.scores import Form, edit_score, neighbourhood_score, target_score
from fulgurite.metrics.item_figures import ItemFigures

SETS = ("random", "neighbour_questions", "neighbour_images")
SCORES = ("rewrite", "paraphrase", "neighbourhood", "target")


class AttackSuccess(ItemFigures):
    """Share of items that attacks still get out of the model, before and after the edit, in per cent.

    Args:
        budgets: B, the most candidates per item, by name of the attack.
        level: of the intervals.
        resamples: of the bootstrap.
        seed: of its draws.

    Raises:
        ValueError: no attacks, or a budget below 1.
    """

    def __init__(self, budgets: Mapping[str, int], level: float = 0.95, resamples: int = 1000, seed: int = 0) -> None:
        if not budgets or min(budgets.values()) < 1:
            raise ValueError(f"budgets={dict(budgets)}: name at least one attack, each with 1 candidate or more")
        kinds = ("success", "success_before", "fraction", "fraction_before")
        super().__init__([f"{kind}/{attack}" for attack in budgets for kind in kinds], level, resamples, seed)
        self.budgets = dict(budgets)

    def update(self, ids: Sequence[str], attack: str, after: Tensor, before: Tensor | None = None) -> None:
        """Add what one attack got of N items.

        Args:
            ids: of the items.
            attack: its name.
            after: (N,) share of the candidates that are the answer, of the edited model; the attack succeeds where it
                is above 0.
            before: (N,) the same of the model before the edit; None where it was not attacked.

        Raises:
            ValueError: the attack has no budget, or shapes do not fit.
        """
        figures = {f"success/{attack}": _succeeded(after), f"fraction/{attack}": 100 * after.double()}
        if before is not None:
            figures |= {
                f"success_before/{attack}": _succeeded(before),
                f"fraction_before/{attack}": 100 * before.double(),
            }
        super().update(ids, figures)

    def compute(self) -> dict[str, Tensor]:
        """Per attack ``success/<attack>``, ``success_before``, ``fraction`` and ``fraction_before`` with intervals,
        and ``budget/<attack>``.
        """
        budgets = {
            f"budget/{attack}": torch.tensor(float(budget), device=self.device)
            for attack, budget in self.budgets.items()
        }
        return {**super().compute(), **budgets}


class UnlearningScores(ItemFigures):
    """Rewrite, paraphrase, neighbourhood and target scores, and accuracies on what must stay.

    Scores lie in [0, 1] and are better high. Accuracies are in per cent, and ``delta`` is that before minus that after:
    the damage, in points.

    Args:
        form: ``"injection"`` where the edit makes the model say another text.
        sets: names of the sets of questions whose answers must stay.
        level: of the intervals.
        resamples: of the bootstrap.
        seed: of its draws.

    Raises:
        ValueError: ``form`` is unknown.
    """

    def __init__(
        self,
        form: Form = "erasure",
        sets: Sequence[str] = SETS,
        level: float = 0.95,
        resamples: int = 1000,
        seed: int = 0,
    ) -> None:
        if form not in ("erasure", "injection"):
            raise ValueError(f"form={form!r}: choose 'erasure' or 'injection'")
        accuracies = [f"{kind}/{name}" for name in sets for kind in ("delta", "accuracy_before", "accuracy_after")]
        super().__init__([*SCORES, *accuracies], level, resamples, seed)
        self.form: Form = form

    def update(
        self,
        ids: Sequence[str],
        before: Tensor | None = None,
        after: Tensor | None = None,
        accuracies: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    ) -> None:
        """Add what is known of N items.

        Args:
            ids: of the items.
            before: (N, 3) probabilities of the edit's target on the edited question, on a rephrasing, and on a
                neighbour question; NaN where the item has none. An item that lacks one has target score 0.
            after: (N, 3) the same of the edited model.
            accuracies: by name of the set, the share of right answers (N,) to the item's questions in it, before and
                after; NaN where it has none.

        Raises:
            ValueError: there is no such set, or shapes do not fit.
        """
        figures = {} if before is None else self._scores(ids, before, after)
        for name, (had, has) in (accuracies or {}).items():
            had, has = 100 * had.double(), 100 * has.double()
            figures |= {f"delta/{name}": had - has, f"accuracy_before/{name}": had, f"accuracy_after/{name}": has}
        super().update(ids, figures)

    def _scores(self, ids: Sequence[str], before: Tensor, after: Tensor | None) -> dict[str, Tensor]:
        if after is None or before.shape != (len(ids), 3) or after.shape != before.shape:
            raise ValueError(
                f"probabilities {tuple(before.shape)} before and {after if after is None else tuple(after.shape)} "
                f"after, of {len(ids)} items: give three for each"
            )
        before, after = before.double(), after.double()
        rewrite, paraphrase = (edit_score(before[:, i], after[:, i], self.form) for i in (0, 1))
        neighbourhood = neighbourhood_score(before[:, 2], after[:, 2])
        target = target_score(rewrite, paraphrase, neighbourhood)
        return dict(zip(SCORES, (rewrite, paraphrase, neighbourhood, target)))


def _succeeded(share: Tensor) -> Tensor:
    """(N,) 100 where the share is above 0, 0 elsewhere; NaN stays."""
    return 100.0 * share.double().sign()
