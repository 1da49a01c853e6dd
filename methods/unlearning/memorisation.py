"""What a model still knows of an answer by heart, token by token under teacher forcing (TOFU, MUSE, open-unlearning).

    probability           exp(-nll / n)
    exact memorisation    share of tokens that arg-max predicts
    extraction strength   1 - k / n ,  k the shortest prefix behind which arg-max predicts all (arXiv 2012.07805 ff.)
    min-k                 - mean of the lowest max(1, floor(share n)) log-probabilities            (arXiv 2310.16789)
    min-k++               the same of (log p - mu) / sigma ,  mu and sigma of log p under p        (arXiv 2404.02936)
    truth ratio           R = exp(-mean_j nll_false_j) / exp(-nll_right) ,  nll per token          (arXiv 2401.06121)

An answer without tokens has NaN. The published code leaves the last token, an end mark, out of all but the first and
the last: `without_end`.

Legend: R answers, T tokens, V vocabulary, J false answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fulgurite.methods.generation_losses import IGNORED
from fulgurite.methods.unlearning.scores import harmonic_mean

TINY = 1e-10
TruthRatio = Literal["closeness", "margin", "probability"]


def without_end(labels: Tensor) -> Tensor:
    """(R, T) labels, the last token of each answer `IGNORED`."""
    left = (labels != IGNORED).flip(1).cumsum(1).flip(1)
    return labels.where(left > 1, IGNORED)


def probability(nll: Tensor, lengths: Tensor) -> Tensor:
    """(R,) geometric mean of the tokens' probabilities, from summed losses (R,) and numbers of tokens (R,)."""
    return (-nll / lengths).exp()


def normalised_probability(right: Tensor, false: Tensor) -> Tensor:
    """(R,) share of the right answer's probability (R,) among it and the false ones' (R, J)."""
    return right / (right + false.sum(1) + TINY)


def exact_memorisation(logits: Tensor, labels: Tensor) -> Tensor:
    """(R,) share of the answer's tokens that ``logits`` (R, T, V) predict, with ``labels`` (R, T)."""
    labelled = labels != IGNORED
    return ((logits.argmax(-1) == labels) & labelled).sum(1) / labelled.sum(1)


def extraction_strength(logits: Tensor, labels: Tensor) -> Tensor:
    """(R,) share of the answer that needs no showing; 0 where its last token is not predicted."""
    labelled = labels != IGNORED
    wrong = (logits.argmax(-1) != labels) & labelled
    behind = wrong.flip(1).cumsum(1).flip(1) == 0
    return (behind & labelled).sum(1) / labelled.sum(1)


def token_log_probabilities(logits: Tensor, labels: Tensor, standardised: bool = False) -> Tensor:
    """(R, T) float32 log-probabilities of the tokens; meaningless where there is none.

    Args:
        logits: (R, T, V).
        labels: (R, T).
        standardised: by their mean and deviation under the distribution itself, for min-k++.
    """
    every = torch.log_softmax(logits.float(), dim=-1)
    own = every.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    if not standardised:
        return own
    weights = every.exp()
    mean = (weights * every).sum(-1)
    variance = (weights * every.square()).sum(-1) - mean.square()
    return (own - mean) / variance.clamp(min=1e-6).sqrt()


def min_k(values: Tensor, labels: Tensor, share: float = 0.4) -> Tensor:
    """(R,) negative mean of the lowest of the tokens' ``values`` (R, T).

    Raises:
        ValueError: ``share`` is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share} must be above 0 and at most 1")
    labelled = labels != IGNORED
    lengths = labelled.sum(1)
    # In float64, where 0.4 times a number of tokens is as the published code has it.
    taken = (share * lengths.double()).floor().clamp(min=1)
    rising = values.where(labelled, math.inf).sort(dim=1).values
    first = torch.arange(values.shape[1], device=values.device) < taken[:, None]
    mean = -rising.where(first, 0.0).sum(1) / taken
    return mean.where(lengths > 0, math.nan).to(values)


def truth_ratio(right: Tensor, false: Tensor) -> Tensor:
    """(R,) R, from losses per token of the right answer in other words (R,) and of the false ones (R, J)."""
    return (-false.mean(1)).exp() / ((-right).exp() + TINY)


def truth_ratio_scores(right: Tensor, false: Tensor, kind: TruthRatio) -> Tensor:
    """(R,) what is averaged over items, in [0, 1]. Arguments as of `truth_ratio`.

    ``"closeness"`` (forget set): min(R, 1 / R), 1 where false and right answers are equally likely. ``"margin"``
    (retain set, real authors, world facts): max(0, 1 - R). ``"probability"``: the right answer's share of both.
    """
    ratio = truth_ratio(right, false)
    if kind == "closeness":
        return torch.minimum(ratio, 1 / (ratio + TINY))
    if kind == "margin":
        return (1 - ratio).clamp(min=0)
    known, mistaken = (-right).exp(), (-false.mean(1)).exp()
    return known / (known + mistaken + TINY)


def model_utility(figures: Sequence[float]) -> float:
    """Harmonic mean; published of probability, ROUGE-L recall and truth ratio on three sets. 0 where one is 0."""
    return harmonic_mean(torch.tensor(figures, dtype=torch.float64)).item()
