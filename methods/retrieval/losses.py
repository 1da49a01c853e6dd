"""What is made small in training: losses of a batch of captions and videos, chosen by name.

Legend: B pairs of a caption (row) and a video (column), of all ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from fulgurite.methods.contrastive import best_bias, multi_positive_loss, sigmoid_loss, softmax_loss


class PairLoss(ABC):
    """The loss of a batch of pairs."""

    @abstractmethod
    def __call__(self, logits: Tensor, same: Tensor, counted: Tensor | None = None) -> Tensor:
        """Scalar.

        Args:
            logits: (B, B) scores of every caption and every video.
            same: (B, B) True where caption and video belong together, the diagonal among them.
            counted: (B,) False for pairs that repeat others so that ranks make equally many steps; None counts all.
        """


class SymmetricCrossEntropy(PairLoss):
    """`softmax_loss`, as published: another caption's copy of the same video is a wrong answer like any other."""

    def __call__(self, logits: Tensor, same: Tensor, counted: Tensor | None = None) -> Tensor:
        """The loss; ``same`` is not looked at."""
        return softmax_loss(logits, counted)


class MultiPositive(PairLoss):
    """`multi_positive_loss`: all captions of a video, and all copies of it in the batch, are right answers."""

    def __call__(self, logits: Tensor, same: Tensor, counted: Tensor | None = None) -> Tensor:
        """The loss."""
        return multi_positive_loss(logits, same, counted)


class Sigmoid(PairLoss):
    """`sigmoid_loss` of the scores plus a bias; all that belongs together in the batch is right.

    SigLIP learns its bias, from -10. Here a learned one would hardly move (`BertAdam` changes it by about its rate of
    1e-4 a step), and the level of the scores depends on towers and head. So none is learned: it is given, or that which
    is best for the batch, which makes the loss blind to a constant added to all scores.

    Args:
        bias: added to the scores; None takes `best_bias` of every batch.
    """

    def __init__(self, bias: float | None = None) -> None:
        self.bias = bias

    def __call__(self, logits: Tensor, same: Tensor, counted: Tensor | None = None) -> Tensor:
        """The loss."""
        bias = best_bias(logits, same, counted) if self.bias is None else self.bias
        return sigmoid_loss(logits + bias, same, counted)
