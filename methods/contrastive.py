"""The loss of a batch of pairs: every picture, or video, against every caption.

    softmax          L = (CE(x, i) + CE(x^T, i)) / 2                        CLIP, arXiv 2103.00020
    sigmoid          L = - sum_ij log sigmoid(z_ij x_ij) / B                SigLIP, arXiv 2303.15343
    multi-positive   L = (M(x) + M(x^T)) / 2,
                     M(x) = - mean_i mean_{j in P_i} log softmax_j(x_ij)    SupCon (its L_out), arXiv 2004.11362

x_ij is the scaled similarity of row i and column j, z_ij is 1 for those that belong together and -1 for others, and P_i
are the columns that belong to row i: its own partner, and where ``same`` is given the partners of its equals. B pairs.

A pair that is only there because ranks have to make equally many steps is one that does not count: ``counted`` is False
there. It is then no query, no candidate, and no part of a mean.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def softmax_loss(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean cross entropy of naming the own partner, over rows and columns; 0 of a single pair.

    Args:
        logits: (B, B).
        counted: (B,) True for pairs that count, at least one; None counts all.
    """
    logits = _only(logits, counted)
    own = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def multi_positive_loss(logits: Tensor, same: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean cross entropy of naming all partners with equal probability; `softmax_loss` where each has one.

    Args:
        logits: (B, B).
        same: (B, B) True where row and column belong together, the diagonal among them; symmetric.
        counted: (B,) True for pairs that count, at least one; None counts all.
    """
    logits, same = _only(logits, counted), _only(same, counted)
    shares = same.to(logits.dtype) / same.sum(1, keepdim=True)
    return (functional.cross_entropy(logits, shares) + functional.cross_entropy(logits.T, shares)) / 2


def sigmoid_loss(logits: Tensor, same: Tensor | None = None, counted: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of which pairs belong together, each by itself, per row.

    Args:
        logits: (B, B), with the model's bias.
        same: (B, B) True where row and column belong together; None takes the diagonal.
        counted: (B,) True for pairs that count, at least one; None counts all.
    """
    if same is None:
        same = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits, same = _only(logits, counted), _only(same, counted)
    return -functional.logsigmoid(torch.where(same, logits, -logits)).sum() / len(logits)


def best_bias(logits: Tensor, same: Tensor, counted: Tensor | None = None) -> Tensor:
    """The b for which `sigmoid_loss` of ``logits`` + b is least: where the sum of sigmoid(x + b) is that of ``same``.

    Found by halving an interval that reaches 50 beyond the logits; its end where all belong together. Without gradient.

    Args:
        logits: (B, B).
        same: (B, B) True where row and column belong together.
        counted: (B,) True for pairs that count, at least one; None counts all.

    Returns:
        A scalar in the type of ``logits``.
    """
    logits, same = _only(logits.detach(), counted), _only(same, counted)
    partners = same.sum()
    low, high = -logits.max() - 50, -logits.min() + 50
    for _ in range(40):
        middle = (low + high) / 2
        too_many = torch.sigmoid(logits + middle).sum() > partners
        low, high = torch.where(too_many, low, middle), torch.where(too_many, middle, high)
    return (low + high) / 2


def _only(matrix: Tensor, counted: Tensor | None) -> Tensor:
    return matrix if counted is None else matrix[counted][:, counted]
