"""How much each calibration token should count when a layer is quantized (RSQ, arXiv 2503.01820).

    attention       the mass it receives; see `attention_mass`
    norm            ||x_t||
    change          -||x_t - y_t||: what a layer changes little is important
    similarity      mean over u of ||x_t - x_u||^2 = ||x_t||^2 - 2 <x_t, mean x> + mean ||x_u||^2
    dot             sum over u of <x_t, x_u> = <x_t, sum x>
    frequency       -(how often the token occurs in the calibration data)
    centroids       distance to the nearest of some centroids
    chunks          1 in some of N equal runs of the sequence, 0 elsewhere

Raw importance becomes weights r of an example by `token_weights`:

    a <- a^2 or sqrt(a);  a <- a / (queries that see t), or its square root
    r = r_min + (r_max - r_min) (a - min a) / (max a - min a), with quantiles for min and max if asked for
    then the lowest m T are 0 and the others 1 (masking) or r (truncate), or equal-count bins have equal steps of r

Only ratios of r within an example matter: `methods.statistics.gram.token_shares` makes each example weigh its number of
tokens. B examples, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor


def norm_importance(x: Tensor) -> Tensor:
    """||x_t|| of (B, T, D): (B, T)."""
    return wide(x).norm(dim=-1)


def change_importance(x: Tensor, y: Tensor) -> Tensor:
    """-||x_t - y_t|| of a layer's input and output (B, T, D): (B, T)."""
    return -(wide(x) - wide(y)).norm(dim=-1)


def similarity_importance(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared distance to the tokens of the example, (B, T), in O(T D); ``mask`` (B, T) says which are real."""
    x, real, count = wide(x), of_real(x, mask), num_real(x, mask)
    square = x.square().sum(-1)
    mean = (x * real[..., None]).sum(1, keepdim=True) / count[..., None]
    return square - 2 * (x * mean).sum(-1) + (square * real).sum(1, keepdim=True) / count


def dot_importance(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Sum of dot products with the tokens of the example, (B, T), in O(T D)."""
    x, real = wide(x), of_real(x, mask)
    return (x * (x * real[..., None]).sum(1, keepdim=True)).sum(-1)


def token_counts(batches: Iterable[Tensor], vocabulary: int, masks: Iterable[Tensor] | None = None) -> Tensor:
    """(vocabulary,) how often every token occurs in the calibration data."""
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    masks = iter(masks) if masks is not None else None
    for ids in batches:
        kept = ids.flatten() if masks is None else ids[next(masks) != 0]
        counts += torch.bincount(kept.cpu(), minlength=vocabulary)
    return counts


def frequency_importance(ids: Tensor, counts: Tensor) -> Tensor:
    """-(number of occurrences) of every token (B, T), looked up by its number: rare ones are important."""
    return -counts.to(ids.device)[ids].to(torch.float32)


def centroid_importance(x: Tensor, centroids: Tensor) -> Tensor:
    """Distance of every token (B, T, D) to the nearest of (K, D) centroids: (B, T)."""
    return torch.cdist(wide(x), wide(centroids).to(wide(x).dtype)).amin(-1)


def kmeans(rows: Tensor, num_centroids: int = 100, iterations: int = 20, seed: int = 0) -> Tensor:
    """(K, D) centroids of rows (N, D), by Lloyd's iterations from K rows drawn without replacement.

    Raises:
        ValueError: fewer rows than centroids.
    """
    if len(rows) < num_centroids:
        raise ValueError(f"{len(rows)} rows for num_centroids={num_centroids}")
    rows = wide(rows)
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:num_centroids]
    centroids = rows[drawn.to(rows.device)].clone()
    for _ in range(iterations):
        nearest = torch.cdist(rows, centroids).argmin(1)
        sums = torch.zeros_like(centroids).index_add_(0, nearest, rows)
        counts = torch.bincount(nearest, minlength=num_centroids)[:, None]
        centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
    return centroids


def chunk_importance(pattern: str, batch: int, length: int) -> Tensor:
    """1 in the named runs of the sequence, (B, T).

    Args:
        pattern: runs, counted from 0, and then their number, as ``0_8`` (the first eighth) or ``0_31_32``.

    Raises:
        ValueError: no such pattern, or a run outside of them.
    """
    parts = pattern.split("_")
    if len(parts) < 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"chunks {pattern!r}: expected numbers of runs, and how many there are, as in '0_31_32'")
    *chosen, total = map(int, parts)
    if not chosen or total < 1 or max(chosen) >= total:
        raise ValueError(f"chunks {pattern!r}: runs are numbered 0 to {total - 1}")
    run = torch.arange(length) * total // length
    return torch.isin(run, torch.tensor(chosen)).to(torch.float32).expand(batch, length).clone()


def token_weights(
    importance: Tensor,
    mask: Tensor | None = None,
    minimum: float = 0.005,
    maximum: float = 1.0,
    power: Literal["square", "sqrt"] | None = None,
    normalize: Literal["linear", "sqrt"] | None = None,
    quantile: float | None = None,
    masking: float | None = None,
    truncate: float | None = None,
    num_bins: int | None = None,
) -> Tensor:
    """Weights r (B, T) of raw importance, example by example; see above.

    Padding has 0, and all tokens of constant importance have 1.

    Args:
        importance: (B, T), finite for real tokens.
        mask: (B, T), nonzero for real tokens.
        minimum: r of the least important token.
        maximum: r of the most important one; below ``minimum`` the order is reversed.
        power: of the importance, which must then not be negative.
        normalize: divide by the number of queries that see a token, or by its square root.
        quantile: take the quantiles 1 - q and q for minimum and maximum.
        masking: share of tokens that get 0, where the others get 1.
        truncate: share of tokens that get 0.
        num_bins: how many steps r has.

    Raises:
        ValueError: shapes, numbers out of range, or more than one of masking, truncate and num_bins.
    """
    check(importance, mask, minimum, maximum, quantile, masking, truncate, num_bins)
    real = torch.ones_like(importance, dtype=torch.bool) if mask is None else mask != 0
    values = wide(importance).masked_fill(~real, 0)
    if not torch.isfinite(values).all():
        raise ValueError("the importance of a real token is not finite")
    if power is not None:
        if (values < 0).any():
            raise ValueError(f"power={power!r} of negative importance")
        values = values.square() if power == "square" else values.sqrt()
    count = real.sum(1, keepdim=True)
    if normalize is not None:
        seen_by = (count - real.cumsum(1) + 1).clamp(min=1).to(values.dtype)  # queries at t and after it
        values = values / (seen_by if normalize == "linear" else seen_by.sqrt())
    low, high = bounds(values, real, quantile)
    span = high - low
    share = ((values - low) / torch.where(span > 0, span, 1)).clamp(0, 1)
    weights = minimum + (maximum - minimum) * share
    share_cut = truncate if masking is None else masking
    if share_cut is not None:
        kept = ranks(weights, real) >= (share_cut * count.double()).floor()
        weights = kept.to(weights.dtype) if masking is not None else weights * kept
    if num_bins is not None:
        steps = torch.linspace(minimum, maximum, num_bins, dtype=weights.dtype, device=weights.device)
        ascending = ranks(values, real)
        weights = steps[(ascending * num_bins // count.clamp(min=1)).clamp(max=num_bins - 1)]
    return torch.where(span > 0, weights, 1) * real


def check(
    importance: Tensor,
    mask: Tensor | None,
    minimum: float,
    maximum: float,
    quantile: float | None,
    masking: float | None,
    truncate: float | None,
    num_bins: int | None,
) -> None:
    """Raise ValueError for arguments of `token_weights` that mean nothing."""
    if importance.dim() != 2 or (mask is not None and mask.shape != importance.shape):
        shape = None if mask is None else tuple(mask.shape)
        raise ValueError(f"importance {tuple(importance.shape)} and mask {shape}: expected (examples, tokens)")
    if min(minimum, maximum) < 0:
        raise ValueError(f"minimum={minimum} and maximum={maximum} must not be negative")
    if quantile is not None and not 0.5 < quantile <= 1:
        raise ValueError(f"quantile={quantile}: expected one above 0.5, at most 1")
    given = {"masking": masking, "truncate": truncate, "num_bins": num_bins}
    if len(named := [name for name, value in given.items() if value is not None]) > 1:
        raise ValueError(f"only one of {', '.join(named)} can be given")
    for name in ("masking", "truncate"):
        if given[name] is not None and not 0 <= given[name] < 1:
            raise ValueError(f"{name}={given[name]}: expected a share from 0 to below 1")
    if num_bins is not None and num_bins < 1:
        raise ValueError(f"num_bins={num_bins}: expected at least 1")


def bounds(values: Tensor, real: Tensor, quantile: float | None) -> tuple[Tensor, Tensor]:
    """(B, 1) smallest and largest of the real ones, or quantiles; 0 where there are none."""
    if quantile is None:
        low = values.masked_fill(~real, torch.inf).amin(1, keepdim=True)
        high = values.masked_fill(~real, -torch.inf).amax(1, keepdim=True)
    else:
        blank = values.masked_fill(~real, torch.nan)
        low, high = (blank.nanquantile(q, dim=1, keepdim=True) for q in (1 - quantile, quantile))
    some = real.any(1, keepdim=True)
    return torch.where(some, low, 0), torch.where(some, high, 0)


def ranks(values: Tensor, real: Tensor) -> Tensor:
    """(B, T) the place of every real token among those of its example, from the smallest, 0; of equal ones by order."""
    order = values.masked_fill(~real, torch.inf).argsort(dim=1, stable=True)
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(values.shape[1], device=values.device).expand_as(order)
    )


def wide(x: Tensor) -> Tensor:
    """In float32, or float64 where it has that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def of_real(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, T) 1 for real tokens of x (B, T, D)."""
    return torch.ones_like(wide(x[..., 0])) if mask is None else (mask != 0).to(wide(x).dtype)


def num_real(x: Tensor, mask: Tensor | None) -> Tensor:
    """(B, 1) number of real tokens, at least 1."""
    return of_real(x, mask).sum(1, keepdim=True).clamp(min=1)
