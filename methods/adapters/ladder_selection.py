"""Structured selection of the units that a ladder's side blocks start with (LST, arXiv 2206.06522, its version v2).

One pass goes through the layers of a stack from input to output. Every layer keeps some of its rows; the rows that
were kept last are the columns that the next layer reads, and the entries of the norms between. Layers that read the
same input side by side (queries, keys and values; the two halves of a gated feed-forward) keep the same rows, scored
by the row sums of

    |F_1 * F_2 * ...|      with F the importance of each, at the columns that are still there,

in float64, since products of squared gradients leave the range of float32. Any importance of the weights' shape will
do: summed squared gradients (the empirical Fisher information), or the weights themselves.

Legend: O rows, I columns, V tokens, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

StateDict = Mapping[str, Tensor]
UnitOrder = Literal["ascending", "official"]
Rule = Literal["units", "heads"]
Residual = Literal["per_layer", "consistent"]


@dataclass(frozen=True)
class Norm:
    """Vectors over the units that pass through: a norm's weight and bias, or a scale per unit.

    Args:
        names: of the tensors.
    """

    names: tuple[str, ...]


@dataclass(frozen=True)
class Together:
    """Linear layers that read the same units and keep the same rows.

    Args:
        layers: names of the layers, whose ``weight`` is (O, I); a ``bias`` follows the rows.
        writes: whether what they give is added to the residual stream.
        from_memory: those of ``layers`` that read the states of the encoder.
        heads: heads that the rows consist of, one after the other; 0 where they are none.
        groups: query heads per key and value head; the first layer has so many times the rows of the others.
        fused: matrices that lie above each other in one weight, as in a layer for queries, keys and values.
    """

    layers: tuple[str, ...]
    writes: bool = False
    from_memory: tuple[str, ...] = ()
    heads: int = 0
    groups: int = 1
    fused: int = 1


Part = Norm | Together


@dataclass(frozen=True)
class Units:
    """Which units the residual stream and the layer before keep, each a long index (n,).

    Args:
        last: those chosen last, which the next layer reads.
        memory: those of the encoder's states, for layers that read them; None reads ``last``, as v2 does.
        stream: those of the whole residual stream under the consistent rule, else None.
    """

    last: Tensor
    memory: Tensor | None = None
    stream: Tensor | None = None


def kept_units(scores: Tensor, keep: int, order: UnitOrder = "ascending") -> Tensor:
    """Index (keep,) long of the largest of ``scores`` (n,); equal ones go by the lowest index.

    Args:
        scores: importance of each unit.
        keep: how many stay.
        order: ``"ascending"``, or ``"official"`` as CPython iterates over the set of them, which is how the published
            code orders them.

    Raises:
        ValueError: ``keep`` is not from 1 to n, or a score is not finite.
    """
    if not 1 <= keep <= len(scores):
        raise ValueError(f"{keep} units of {len(scores)} cannot be kept; change the reduction")
    if not bool(scores.isfinite().all()):
        raise ValueError("the importance of some units is not finite")
    kept = scores.argsort(descending=True, stable=True)[:keep].sort().values
    if order == "official":
        gone = set(range(len(scores))) - set(kept.tolist())
        kept = torch.tensor(list(set(range(len(scores))) - gone), dtype=torch.long, device=scores.device)
    return kept


def kept_heads_first(scores: Tensor, keep: int, heads: int, order: UnitOrder = "ascending") -> Tensor:
    """As `kept_units`, where whole heads go first: those with the lowest sums, then the lowest units of the next one.

    Args:
        scores: (n,), ``heads`` runs of equal length.
        keep: how many stay.
        heads: number of heads.
        order: as in `kept_units`.
    """
    per_head = scores.view(heads, -1)
    ranks = per_head.sum(1).argsort(descending=True, stable=True)
    whole, rest = divmod(keep, per_head.shape[1])
    allowed = torch.full_like(per_head, -1.0)
    allowed[ranks[:whole]] = 1.0
    if rest:
        inner = per_head[ranks[whole]].argsort(descending=True, stable=True)[:rest]
        allowed[ranks[whole], inner] = 1.0
    return kept_units(allowed.flatten(), keep, order)


def column_units(table: Tensor, keep: int, order: UnitOrder = "ascending") -> Tensor:
    """Units (keep,) of the stream by the column sums of the importance of the token table (V, D)."""
    return kept_units(table.double().abs().sum(0), keep, order)


def stream_units(
    importance: StateDict, parts: Sequence[Part], keep: int, order: UnitOrder = "ascending", table: Tensor | None = None
) -> Tensor:
    """One choice of units (keep,) for the whole residual stream of a stack: the consistent rule, our own.

    Every layer that writes into the stream, and the token table, has one vote: its row (column) sums divided by their
    total.
    """
    votes = [importance[f"{name}.weight"].double().abs().sum(1) for part in _writers(parts) for name in part.layers]
    if table is not None:
        votes.append(table.double().abs().sum(0))
    if not votes:
        raise ValueError("no layer writes into the residual stream")
    return kept_units(sum(vote / vote.sum().clamp(min=torch.finfo(vote.dtype).tiny) for vote in votes), keep, order)


def _writers(parts: Sequence[Part]) -> list[Together]:
    return [part for part in parts if isinstance(part, Together) and part.writes]


def prune(
    weights: StateDict,
    importance: StateDict,
    parts: Sequence[Part],
    sizes: Mapping[str, int],
    units: Units,
    order: UnitOrder = "ascending",
    rule: Rule = "units",
) -> tuple[dict[str, Tensor], Units]:
    """The kept rows and columns of the layers of a block, and what the next block reads.

    Args:
        weights: the block's tensors by name.
        importance: of the same shapes; needed for linear weights only.
        parts: its layers in the order of the data.
        sizes: rows to keep of each layer's ``weight``.
        units: what the first layer reads.
        order: of the kept units, see `kept_units`.
        rule: ``"units"`` as v2; ``"heads"`` removes whole heads of attention layers first.

    Returns:
        Tensors by name, new ones; and the units that were kept last.
    """
    out: dict[str, Tensor] = {}
    for part in parts:
        if isinstance(part, Norm):
            out.update((name, weights[name][units.last]) for name in part.names if name in weights)
            continue
        columns = [_columns(name, part, units) for name in part.layers]
        if part.writes and units.stream is not None:
            rows = units.stream
        else:
            scores = _scores(importance, part, columns)
            keep = sizes[part.layers[-1]] // part.fused
            rows = (
                kept_heads_first(scores, keep, part.heads, order)
                if rule == "heads" and part.heads
                else kept_units(scores, keep, order)
            )
        for number, (name, read) in enumerate(zip(part.layers, columns)):
            taken = _grouped(rows, part, len(scores), keep) if number == 0 and part.groups > 1 else rows
            taken = _stacked(taken, weights[f"{name}.weight"].shape[0], part.fused)
            out[f"{name}.weight"] = weights[f"{name}.weight"][taken][:, read]
            if f"{name}.bias" in weights:
                out[f"{name}.bias"] = weights[f"{name}.bias"][taken]
        last = _grouped(rows, part, len(scores), keep) if part.groups > 1 else rows
        units = Units(last, units.memory, units.stream)
    return out, units


def _columns(name: str, part: Together, units: Units) -> Tensor:
    return units.memory if name in part.from_memory and units.memory is not None else units.last


def _scores(importance: StateDict, part: Together, columns: Sequence[Tensor]) -> Tensor:
    """Row sums of the product of the layers' importances, (O,); with grouped queries, of keys and values."""
    product: Tensor | None = None
    for number, (name, read) in enumerate(zip(part.layers, columns)):
        of_layer = importance[f"{name}.weight"].double().abs()[:, read]
        if number == 0 and part.groups > 1:  # all query heads of a group are scored together
            kv_heads = part.heads
            of_layer = of_layer.view(kv_heads, part.groups, -1, of_layer.shape[1]).sum(1).flatten(0, 1)
        for matrix in of_layer.chunk(part.fused):
            product = matrix if product is None else product * matrix
    return product.sum(1)


def _stacked(rows: Tensor, total: int, fused: int) -> Tensor:
    """``rows`` of each of the ``fused`` matrices of a weight with ``total`` rows."""
    return torch.cat([rows + number * (total // fused) for number in range(fused)])


def _grouped(rows: Tensor, part: Together, total: int, keep: int) -> Tensor:
    """Rows of the query layer for kept ``rows`` of the keys: every new query head reads where its new key head does."""
    old, new = total // part.heads, keep // part.heads
    head, inside = rows.view(part.heads, 1, new) // old, rows.view(part.heads, 1, new) % old
    member = torch.arange(part.groups, device=rows.device).view(1, -1, 1)
    return ((head * part.groups + member) * old + inside).flatten()
