"""Visual tokens of VL-BART and VL-T5: projected features of a grid, a place, the picture's number and its token's.

    vis = Norm(W_f feats + b_f) + Norm(W_p [box ; area] + b_p) + E_img[picture] + E_order[token]

Features of a grid have no boxes: [box ; area] is zero, and the second term is one vector. E_order are rows of the
language model's own token table, counted from its end, or a table of its own.
Source: Cho et al., "Unifying Vision-and-Language Tasks via Text Generation" (2021), arXiv 2102.02779, equation 1, and
the released code of VL-Adapter.

Legend: B batch, K pictures, N tokens of a grid, V visual tokens of a sample, f feature width, D width, G side.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ORDERS = 100  # rows of the token table that are kept for E_order
PICTURES = 2  # rows of E_img


def downsampled(features: Tensor, side: int) -> Tensor:
    """Grids (K, N, f), row by row, max-pooled to (K, side * side, f); of that size already, they stay as they are.

    Raises:
        ValueError: N is no square, or smaller than the result.
    """
    own = isqrt(features.shape[1])
    if own * own != features.shape[1]:
        raise ValueError(f"{features.shape[1]} tokens are no square grid")
    if own < side:
        raise ValueError(f"a grid of {own} x {own} cannot be pooled to {side} x {side}")
    grid = features.transpose(1, 2).unflatten(2, (own, own))
    return F.adaptive_max_pool2d(grid, side).flatten(2).transpose(1, 2)


def numbers_of(frames: int, tokens: int, num_images: int = 1) -> tuple[Tensor, Tensor]:
    """Number of the picture, and of the token within it, of ``frames`` times ``tokens`` visual tokens, each (V,).

    The frames of a video are one picture; several pictures have equally many tokens.
    """
    each = frames // num_images * tokens
    return torch.arange(num_images).repeat_interleave(each), torch.arange(each).repeat(num_images)


def orders_of(picture: Tensor) -> Tensor:
    """Number of each token within its picture (B, V), from the numbers of pictures (B, V)."""
    same = picture[:, :, None] == picture[:, None, :]
    return same.tril(-1).sum(-1)


class VisualEmbedding(nn.Module):
    """The sum above; names of tensors are those of the published code.

    Its parts are called with one tensor each, so that a trained copy can take the place of each.

    Args:
        feature_dim: f.
        width: D.
        norm: makes the norm over D, LayerNorm of BART or the one of T5.
        own_orders: rows of a table E_order of its own, which then trains with the rest; 0 for none.
    """

    def __init__(self, feature_dim: int, width: int, norm: Callable[[int], nn.Module], own_orders: int = 0) -> None:
        super().__init__()
        self.feat_embedding = nn.Sequential(nn.Linear(feature_dim, width), norm(width))
        self.absolute_vis_pos_embedding = nn.Sequential(nn.Linear(5, width), norm(width))
        self.img_order_embedding = nn.Embedding(PICTURES, width)
        self.obj_order_embedding = nn.Embedding(own_orders, width) if own_orders else None

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """N(0, ``std``) for matrices and tables, zero biases; norms stay."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(std=std)
            if isinstance(module, nn.Linear):
                module.bias.zero_()

    def forward(self, features: Tensor, picture: Tensor, order: Tensor, table: Tensor) -> Tensor:
        """Visual tokens (B, V, D).

        Args:
            features: (B, V, f).
            picture: (B, V) long, number of the picture.
            order: (B, V) long, number of the token within it.
            table: (vocabulary, D) of the language model.
        """
        features = features.to(self.feat_embedding[0].weight.dtype)
        place = self.absolute_vis_pos_embedding(features.new_zeros(len(features), 1, 5))
        if self.obj_order_embedding is None:
            turn = F.embedding(len(table) - 1 - order, table)
        else:
            turn = self.obj_order_embedding(order)
        return self.feat_embedding(features) + place + self.img_order_embedding(picture) + turn
