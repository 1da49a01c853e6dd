"""What an unlearning objective sees, and what it gives back.

A pass gives a `View` of its rows; an objective makes `Terms` of it, a total and a count per row. The loss of a group of
rows (an item, or a batch over all ranks and accumulation steps) is the sum of its totals by the sum of its counts. So
neither padding nor the way in which rows are shared out changes a loss.

    nll_r = - sum_t log p(y_t | x_r, y_<t)        over the n_r answer tokens of row r
    count 1      means over rows: probabilities, preferences, hidden states
    count n_r    means over all answer tokens

Legend: R rows, T answer tokens, V vocabulary, D width, S layers of the logit lens.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite.methods.generation_losses import IGNORED

REFUSAL = "I don't know"


@dataclass
class View:
    """What a pass over R rows gives.

    Args:
        logits: (R, T, V) of each answer token under teacher forcing: ``logits[:, t]`` predicts ``labels[:, t]``.
        labels: (R, T) ids of the answer tokens, `IGNORED` elsewhere; padding may lie anywhere.
        lens: (R, S, V) float32 log-probabilities of the logit lens at the last position of the prompt, in the order
            of the objective's ``layers``.
        states: (R, T, D) output of block ``state_layer`` at the positions that predict the labels.
        nll: (R,) in place of the logits, where only this is kept of a pass made before.
    """

    logits: Tensor | None
    labels: Tensor
    lens: Tensor | None = None
    states: Tensor | None = None
    nll: Tensor | None = None

    @property
    def labelled(self) -> Tensor:
        """(R, T) where there is an answer token."""
        return self.labels != IGNORED

    @property
    def lengths(self) -> Tensor:
        """(R,) float32 number of answer tokens."""
        return self.labelled.sum(1).float()

    @property
    def answered(self) -> Tensor:
        """(R,) whether the answer has tokens; rows without any have total 0 and count 0."""
        return self.labelled.any(1)


@dataclass
class Terms:
    """Totals and counts (R,) float32 of the rows."""

    totals: Tensor
    counts: Tensor

    @property
    def loss(self) -> Tensor:
        """Of all rows as one group; 0 where nothing counts."""
        return self.totals.sum() / self.counts.sum().clamp(min=1)


class Objective(ABC):
    """A loss whose minimum is a model that has forgotten.

    Attributes:
        layers: that the logit lens reads, 0 the embeddings, L the last block.
        state_layer: the block whose output it reads, counted from 0; a pass may stop behind it.
        needs_logits: whether it reads logits of the answer.
        needs_reference: whether it compares with the model before the edit.
        injects: whether its first target is to be said, so that scores are of that text's probability and not of the
            deleted answer's.
        keeps_nll: whether ``nll`` is all that it reads of the reference, so that one pass serves a whole run.
    """

    layers: tuple[int, ...] = ()
    state_layer: int | None = None
    needs_logits: bool = True
    needs_reference: bool = False
    keeps_nll: bool = False
    injects: bool = False

    def targets(self, answer: str, alternatives: Sequence[str]) -> tuple[str, ...]:
        """Texts that are scored: the deleted answer, or what is to take its place.

        Args:
            answer: to be deleted.
            alternatives: other answers to the same question, the best first.
        """
        return (answer,)

    def questions(self, question: str, rephrasings: Sequence[str]) -> tuple[str, ...]:
        """Texts that are asked, a row each."""
        return (question,)

    @abstractmethod
    def __call__(self, views: Sequence[View], references: Sequence[View | None]) -> Terms:
        """Totals and counts of R rows.

        Args:
            views: one per target.
            references: the same passes of the model before the edit; None where none is needed.
        """


def token_losses(view: View) -> Tensor:
    """(R, T) float32 negative log-probabilities of the answer tokens, 0 elsewhere."""
    flat = view.logits.float().flatten(0, 1)
    losses = F.cross_entropy(flat, view.labels.flatten(), reduction="none", ignore_index=IGNORED)
    return losses.view(view.labels.shape)


def answer_nll(view: View) -> Tensor:
    """(R,) float32 negative log-probability of each answer."""
    return token_losses(view).sum(1) if view.nll is None else view.nll.float()


@torch.no_grad()
def reference_nll(view: View) -> Tensor:
    """`answer_nll` of the model before the edit, which learns nothing."""
    return answer_nll(view)


def per_row(values: Tensor, view: View) -> Terms:
    """A mean over rows of ``values`` (R,)."""
    return Terms(values.where(view.answered, 0.0), view.answered.float())


def per_token(values: Tensor, view: View) -> Terms:
    """A mean over answer tokens of ``values`` (R, T)."""
    return Terms(values.where(view.labelled, 0.0).sum(1), view.lengths)


def preference(margins: Tensor, beta: float) -> Tensor:
    """(R,) ``-(2 / beta) log sigmoid(beta margin)``: falls with the margin, by 1 per unit where it is 0."""
    return -2 / beta * F.logsigmoid(beta * margins)


def soft_cross_entropy(logits: Tensor, probabilities: Tensor) -> Tensor:
    """(R, T) float32 cross entropy of ``logits`` (R, T, V) against distributions of the same shape."""
    return -(probabilities * F.log_softmax(logits.float(), dim=-1)).sum(-1)


def true_tokens(view: View) -> Tensor:
    """(R, T, 1) ids of the answer tokens, 0 where there is none: an index of the vocabulary."""
    return view.labels.clamp(min=0)[..., None]


def positive(**values: float) -> None:
    """Raise ValueError where an argument is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name}={value} must be above 0")
