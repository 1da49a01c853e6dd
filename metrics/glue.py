"""Figures of the tasks of GLUE, by torchmetrics: accuracy, F1, Matthews, Pearson, Spearman, and their mean."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_f1_score, binary_matthews_corrcoef
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef

from fulgurite.metrics.per_sample import PerSampleMetric

FIGURES = {
    "cola": ("matthews",),
    "sst2": ("accuracy",),
    "mrpc": ("f1", "accuracy"),
    "qqp": ("f1", "accuracy"),
    "stsb": ("pearson", "spearman"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}
NO_LABEL = -1.0


def correlated(task: str) -> bool:
    """Whether what is right is a score, to which answers may be near, so that none is judged alone."""
    return "pearson" in FIGURES.get(task, ())


class GlueScores(PerSampleMetric):
    """The figures of one task in per cent, over all samples of all ranks.

    Labels and scores come as texts or as numbers. A text that is none of the task is wrong: where there are two labels
    it counts as the other one (as T5 and LST do), and for scores as -1, below all of them. A correlation that is not
    defined, as of equal scores, is 0, as LST counts it.

    Args:
        task: name, as `fulgurite.datamodules.glue.Glue` has it.

    State: what was predicted and what is right, one float64 per sample.

    Raises:
        ValueError: there is no such task.
    """

    predicted: list[Tensor]
    right: list[Tensor]

    def __init__(self, task: str) -> None:
        super().__init__()
        if task not in FIGURES:
            raise ValueError(f"task={task!r}: choose one of {list(FIGURES)}")
        self.task = task
        self.keep("predicted", torch.float64)
        self.keep("right", torch.float64)

    def update(
        self, predicted: Sequence[str] | Tensor, right: Sequence[str] | Tensor, counted: Tensor | None = None
    ) -> None:
        """Add B samples; those where ``counted`` (B,) is False are left out.

        Raises:
            ValueError: what is right is no number.
        """
        values, truth = self._numbers(predicted), self._numbers(right)
        if (truth == NO_LABEL).any():
            raise ValueError(f"{self.task}: a label of {list(right)} is no number")
        use = torch.ones_like(truth, dtype=torch.bool) if counted is None else counted.to(truth.device)
        self.predicted.append(values[use])
        self.right.append(truth[use])

    def compute(self) -> dict[str, Tensor]:
        """The figures by name, and ``average``, their mean; NaN where nothing was counted."""
        values, truth = self.joined("predicted"), self.joined("right")
        figures = {name: 100 * self._figure(name, values, truth) for name in FIGURES[self.task]}
        return {**figures, "average": torch.stack(list(figures.values())).mean()}

    def _figure(self, name: str, values: Tensor, truth: Tensor) -> Tensor:
        if not len(truth):
            return torch.tensor(torch.nan, dtype=torch.float64)
        if name in ("pearson", "spearman"):
            measure = pearson_corrcoef if name == "pearson" else spearman_corrcoef
            # Of one sample, or of equal ones, there is no correlation, and torchmetrics warns or divides by nothing.
            if values.unique().numel() == 1 or truth.unique().numel() == 1:
                return torch.zeros((), dtype=torch.float64)
            return measure(values, truth).double()
        if name == "accuracy":
            return (values == truth).double().mean()
        two = torch.where((values == 0) | (values == 1), values, 1 - truth).long()
        measure = binary_f1_score if name == "f1" else binary_matthews_corrcoef
        return measure(two, truth.long()).double()

    def _numbers(self, values: Sequence[str] | Tensor) -> Tensor:
        if isinstance(values, Tensor):
            return values.double().to(self.device)
        return torch.tensor([_number(value) for value in values], dtype=torch.float64, device=self.device)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return NO_LABEL
    return value if abs(value) < float("inf") else NO_LABEL
