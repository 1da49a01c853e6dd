"""The loss of a batch of pairs: every picture against every caption.

    softmax   L = (CE(x, i) + CE(x^T, i)) / 2                          CLIP, arXiv 2103.00020
    sigmoid   L = - sum_ij log sigmoid((2 [i = j] - 1) x_ij) / B       SigLIP, arXiv 2303.15343

x_ij is the scaled similarity of picture i and caption j. B pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def softmax_loss(logits: Tensor) -> Tensor:
    """Mean cross entropy of naming the own partner, over pictures and captions; 0 of a single pair.

    Args:
        logits: (B, B).
    """
    own = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own)) / 2


def sigmoid_loss(logits: Tensor) -> Tensor:
    """Negative log-likelihood of which pairs belong together, each by itself, per picture.

    Args:
        logits: (B, B), with the model's bias.
    """
    signs = 2 * torch.eye(len(logits), device=logits.device) - 1
    return -functional.logsigmoid(signs * logits).sum() / len(logits)
