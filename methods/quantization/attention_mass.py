"""How much attention every token receives, without a matrix of all pairs of tokens (RSQ, arXiv 2503.01820).

    a_t = sum over heads h and queries q of P[h, q, t],     sum_t a_t = heads x queries

P = softmax(scale q k^T) in float32 or wider, by blocks of queries. B examples, H heads, G key heads, T tokens, D width
of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIECE = 1 << 21  # probabilities that exist at once


@torch.no_grad()
def attention_mass(
    query: Tensor,
    key: Tensor,
    scale: float | None = None,
    mask: Tensor | None = None,
    causal: bool = True,
    bias: Tensor | None = None,
) -> Tensor:
    """a (B, T), float32 or wider. Holds three times 2^21 numbers, or those of one query of all heads.

    Args:
        query: (B, H, T, D), as the product takes them: after rotary positions, say.
        key: (B, G, T, D); each serves H / G query heads in a row.
        scale: 1 / sqrt(D) by default.
        mask: (B, T), nonzero for real tokens; padding neither gives nor receives.
        causal: a query sees itself and what lies before it.
        bias: broadcast to (B, H, T, T), as the product takes it: bool, True where a query sees a key, or numbers that
            are added to the scores. A query that sees nothing gives nothing.

    Raises:
        ValueError: shapes that do not fit.
    """
    batch, heads, length, width = query.shape
    if key.dim() != 4 or key.shape[0] != batch or key.shape[2:] != (length, width) or heads % key.shape[1]:
        raise ValueError(f"keys {tuple(key.shape)} do not fit queries {tuple(query.shape)}")
    if mask is not None and mask.shape != (batch, length):
        raise ValueError(f"mask {tuple(mask.shape)} does not fit {batch} examples of {length} tokens")
    dtype = torch.promote_types(query.dtype, torch.float32)
    groups = key.shape[1]
    if bias is not None:
        bias = bias.expand(batch, heads, length, length).unflatten(1, (groups, heads // groups))
    grouped = query.unflatten(1, (groups, heads // groups))
    keys = key[:, :, None].to(dtype).transpose(-1, -2)  # (B, G, 1, D, T)
    real = torch.ones(batch, length, dtype=torch.bool, device=query.device) if mask is None else mask != 0
    mass = torch.zeros(batch, length, dtype=dtype, device=query.device)
    step = max(1, PIECE // (batch * heads * length))
    places = torch.arange(length, device=query.device)
    for start in range(0, length, step):
        stop = min(start + step, length)
        seen = stop if causal else length
        scores = grouped[..., start:stop, :].to(dtype) * (width**-0.5 if scale is None else scale) @ keys[..., :seen]
        allowed = real[:, None, :seen].expand(-1, stop - start, -1)  # (B, queries, keys)
        if causal:
            allowed = allowed & (places[:seen] <= places[start:stop, None])
        scores.masked_fill_(~allowed[:, None, None], -torch.inf)
        if bias is not None:
            part = bias[..., start:stop, :seen]
            scores = scores.masked_fill_(~part, -torch.inf) if bias.dtype == torch.bool else scores.add_(part)
        blind = scores.amax(-1, keepdim=True) == -torch.inf  # their shares are NaN
        shares = scores.softmax(-1).masked_fill_(blind, 0).sum((1, 2))  # (B, queries, keys)
        mass[:, :seen] += shares.masked_fill_(~real[:, start:stop, None], 0).sum(1)
    return mass
