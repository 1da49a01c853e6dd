"""Losses of models that write their answers, as VL-Adapter trains them (arXiv 2112.06825, its code).

    scored    mean over samples of score_n times the mean over the tokens of sample n       (VQA)
    samples   mean over samples of the mean over their tokens                               (GQA, NLVR2, video)
    tokens    mean over all tokens of the batch                                             (captions)

A batch of several tasks has the mean over its samples of what each task's own loss makes of them. All of them are sums
over samples of a weight times the sample's token mean, so that several processes can share a batch exactly.

Legend: B samples, T target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

LossKind = Literal["scored", "samples", "tokens"]
KINDS: tuple[LossKind, ...] = get_args(LossKind)
IGNORED = -100


def token_means(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) mean cross entropy over the target tokens of each sample, and (B,) how many it has.

    Args:
        logits: (B, T, V).
        targets: (B, T), `IGNORED` where there is no token.
    """
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none", ignore_index=IGNORED)
    lengths = (targets != IGNORED).sum(1)
    return losses.sum(1) / lengths.clamp(min=1), lengths


def sample_weights(
    kinds: Sequence[LossKind], scores: Tensor, lengths: Tensor, counted: Tensor, total: Callable[[Tensor], Tensor]
) -> Tensor:
    """(B,) weights of this process's samples, whose weighted losses add up to the batch's loss over all processes.

    Args:
        kinds: of each sample's task.
        scores: (B,) of the sampled answers.
        lengths: (B,) target tokens.
        counted: (B,) whether a sample counts.
        total: sums a tensor over processes; a collective.
    """
    of_tokens = torch.tensor([kind == "tokens" for kind in kinds], device=scores.device) & counted
    sums = total(torch.stack([counted.sum(), of_tokens.sum(), (lengths * of_tokens).sum()]).double()).clamp(min=1)
    samples, captions, tokens = sums.unbind()
    scored = torch.tensor([kind == "scored" for kind in kinds], device=scores.device)
    each = torch.where(scored, scores.double(), 1.0) / samples
    weights = torch.where(of_tokens, lengths * captions / (tokens * samples), each)
    return (weights * counted).to(scores.dtype)
