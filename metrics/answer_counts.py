"""What is counted of the answers to questions, over the stages of a stream.

Legend: B batch, A answers, T stages, N domains, K question types.
"""

from __future__ import annotations

from torch import Tensor, nn

from fulgurite.metrics.continual_accuracy import ContinualAccuracy
from fulgurite.metrics.targets import Targets
from fulgurite.metrics.vqa_accuracy import best_answers


class AnswerCounts(nn.Module):
    """Accuracy in all, by question type, among the ten best answers, and on questions that come with speech.

    Args:
        num_domains: N.
        num_stages: T.
        num_kinds: K.
    """

    def __init__(self, num_domains: int, num_stages: int, num_kinds: int) -> None:
        super().__init__()
        self.accuracy = ContinualAccuracy(num_domains, num_stages, num_kinds)
        self.top10 = ContinualAccuracy(num_domains, num_stages)
        self.speech = ContinualAccuracy(num_domains, num_stages)

    def update(self, stage: int, logits: Tensor, targets: Targets) -> None:
        """Add a batch of (B, A) ``logits`` of the model after ``stage`` (0 = before any)."""
        use, domains = targets.use, targets.domains
        gained = targets.scores.gather(-1, best_answers(logits, 10)).double()
        credit = gained[:, 0]
        self.accuracy.update(stage, domains[use], credit[use], targets.kinds[use])
        self.top10.update(stage, domains[use], gained.amax(-1)[use])
        spoken = use & targets.speech
        self.speech.update(stage, domains[spoken], credit[spoken])

    def results(self) -> dict[str, Tensor]:
        """``matrix`` (T + 1, N), and of its last row ``by_kind`` (N, K), ``top10`` (N,) and ``speech`` (N,).

        NaN where nothing was counted. A collective when there are several ranks.
        """
        accuracy = self.accuracy.results()
        return {
            "matrix": accuracy["matrix"],
            "by_kind": accuracy["by_kind"][-1],
            "top10": self.top10.results()["matrix"][-1],
            "speech": self.speech.results()["matrix"][-1],
        }


def mean_of_known(values: Tensor) -> float:
    """Mean of the entries that are not NaN; NaN where there are none."""
    return values[~values.isnan()].mean().item()
