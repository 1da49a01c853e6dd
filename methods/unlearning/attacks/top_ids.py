"""The k largest or smallest entries of rows over a vocabulary, exactly k, ties to the lowest id.

An entry among the k first is in one of the k chunks whose own first entries come first, so that only one pass looks at
everything.

Legend: n rows, V vocabulary, k kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 128


def top_ids(values: Tensor, k: int, largest: bool = True) -> Tensor:
    """(n, k) long: ids of the k first entries of each row of ``values`` (n, V), the first one first.

    Raises:
        ValueError: the vocabulary has fewer than k entries, or a value is not a number.
    """
    size = values.shape[-1]
    if not 1 <= k <= size:
        raise ValueError(f"k={k} must be between 1 and the {size} entries of the vocabulary")
    whole = size // CHUNK * CHUNK
    extreme = torch.amax if largest else torch.amin
    chunks = extreme(values[:, :whole].unflatten(1, (-1, CHUNK)), dim=-1) if whole else values[:, :0]
    if whole < size:
        chunks = torch.cat([chunks, extreme(values[:, whole:], dim=-1, keepdim=True)], dim=1)
    if bool(chunks.isnan().any()):
        raise ValueError("a lens holds values that are not numbers: the edit has spoilt the model; lower its lr")
    best = chunks.sort(dim=1, descending=largest, stable=True).indices[:, :k].sort(dim=1).values
    ids = (best[..., None] * CHUNK + torch.arange(CHUNK, device=values.device)).flatten(1)
    inside = ids < size
    worst = -torch.inf if largest else torch.inf
    found = values.gather(1, ids.clamp(max=size - 1)).masked_fill(~inside, worst)
    # Places beyond the vocabulary are the last ones, so that a stable sort puts them behind equal real entries.
    return ids.gather(1, found.sort(dim=1, descending=largest, stable=True).indices[:, :k])
