"""Search in two stages: the coarse level finds candidates among all, the fine levels order them.

The coarse score is a product of two vectors, so that any number of candidates is looked through in blocks; only the
best so far are kept. The fine levels cost hundreds of times as much per candidate, and are asked for the best alone.

Legend: Q queries, N candidates of the store, C of them kept, D width, L levels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

# Of a query by its number, and candidates by theirs (C,): scores at all levels (L, C), the coarse one first.
Fine = Callable[[int, Tensor], Tensor]

PIECE = 1 << 20  # coarse scores at once
_LAST = (1 << 32) - 1


def _keys(scores: Tensor, first: int) -> Tensor:
    """int64 numbers in the order of (Q, n) scores, of which the equal are in the reverse order of their columns."""
    bits = (scores.float() + 0.0).view(torch.int32)  # + 0.0 makes one of the two zeros
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    columns = torch.arange(first, first + scores.shape[1], device=scores.device)
    return (order << 32) | (_LAST - columns)


def _scores_and_columns(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_keys`."""
    order = (keys >> 32).int()
    return torch.where(order < 0, order ^ 0x7FFFFFFF, order).view(torch.float32), _LAST - (keys & _LAST)


def _pieces(store: Tensor | Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    for block in [store] if isinstance(store, Tensor) else store:
        yield from block.split(rows)


@torch.no_grad()
def coarse_candidates(
    queries: Tensor, store: Tensor | Iterable[Tensor], count: int = 100, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The ``count`` candidates with the highest product with each query.

    Memory beside queries and results: about a million scores, and the rows of the store that they belong to, in the
    type of the queries; whatever N.

    Args:
        queries: (Q, D), with all factors of the coarse score in them (the logit scale, where a bias is added).
        store: (N, D), or blocks (n, D) of it one after the other, as the shards of a memory-mapped store; in any
            floating-point type.
        count: C; all where the store has fewer.
        bias: (N,) added to the scores.

    Returns:
        Scores (Q, C) float32 and indices (Q, C) int64, best first; of equal scores the lower index comes first, and
        is kept, however the store is divided.

    Raises:
        ValueError: ``count`` is below 1, a score is not a number, the store is empty or does not fit the bias.
    """
    if count < 1:
        raise ValueError(f"count={count} candidates: at least 1")
    best, first = None, 0
    for piece in _pieces(store, max(1, PIECE // max(1, len(queries)))):
        scores = queries @ piece.to(queries).T
        if bias is not None:
            if first + len(piece) > len(bias):
                raise ValueError(f"the store has more candidates than the {len(bias)} of the bias")
            scores = scores + bias[first : first + len(piece)].to(scores)
        if scores.isnan().any():
            raise ValueError(f"a score of candidates {first} to {first + len(piece) - 1} is not a number")
        keys = _keys(scores, first)
        keys = keys.topk(min(count, keys.shape[1])).values
        keys = keys if best is None else torch.cat([best, keys], 1)
        best = keys.topk(min(count, keys.shape[1])).values
        first += len(piece)
    if best is None:
        raise ValueError("the store to search in is empty")
    if bias is not None and first != len(bias):
        raise ValueError(f"the store has {first} candidates, the bias {len(bias)}")
    return _scores_and_columns(best)


@torch.no_grad()
def two_stage_search(
    queries: Tensor,
    store: Tensor | Iterable[Tensor],
    fine: Fine,
    candidates: int = 100,
    top: int = 10,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The ``top`` candidates of each query: the best ``candidates`` of the coarse level, ordered by all levels.

    With ``candidates`` of N or more it is the full ranking; otherwise one is lost where the coarse level does not have
    it among the best.

    Args:
        queries: (Q, D); see `coarse_candidates`.
        store: (N, D) or blocks of it.
        fine: gives the scores (L, C) at all levels, the coarse one first, of a query and its candidates by their
            numbers; its mean over levels is the score.
        candidates: how many the fine levels are asked for.
        top: how many are returned; at most ``candidates``, and all where the store has fewer.
        bias: (L, N) of a normaliser (`ScoreNormalizer.bias`); its first level is added in the first stage too.

    Returns:
        Scores (Q, top) float32 and indices (Q, top) int64, best first; of equal scores the better at the coarse level
        comes first.

    Raises:
        ValueError: ``top`` is above ``candidates``; as `coarse_candidates`.
    """
    if not 1 <= top <= candidates:
        raise ValueError(f"top={top} of candidates={candidates}: from 1 to the number of candidates")
    _, found = coarse_candidates(queries, store, candidates, None if bias is None else bias[0])
    scores, indices = [], []
    for query, columns in enumerate(found):
        levels = fine(query, columns)
        if bias is not None:
            levels = levels + bias[:, columns.to(bias.device)].to(levels)
        score, order = levels.mean(0).float().sort(descending=True, stable=True)
        if score.isnan().any():
            raise ValueError(f"a fine score of query {query} is not a number")
        scores.append(score[:top])
        indices.append(columns[order[:top].to(columns.device)])
    return torch.stack(scores), torch.stack(indices)
