"""TIES: trim task vectors, elect one sign per coordinate, merge those that agree with it (arXiv 2306.01708).

    trim     u_i = the int(density n) entries of tau_i of largest magnitude
    elect    s = sign(sum_i w_i u_i); a tie goes to the sign that most coordinates get where all weights are 1
    merge    tau* = sum_{i: w_i u_i s > 0} w_i u_i / sum_{i: w_i u_i s > 0} |w_i|;  theta* = theta_0 + lam tau*

The paper trims over all parameters of a model at once, which needs passes over it before the merge: two for the
threshold, one for the sign of most coordinates. Extra memory: a histogram and the entries in one bin of it per model,
and blocks of 65,536 entries; time: about a read of all models per pass.

Dialects, each with its own defaults, differ from that:

    official   keeps all entries not below the (int(density n) + 1)-th largest, so one more, and ties
    mergekit   per tensor; density 1; a tied vote is plus
    peft       per tensor; votes without weights; a tied vote is plus; divides by the number of those that agree
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fulgurite.methods.merging.election import Aggregate, Election, merge_elected
from fulgurite.methods.merging.selection import (
    EVERYTHING,
    Cut,
    Difference,
    Order,
    Passes,
    blocks,
    cut_of,
    kept_count,
    take,
)

Dialect = Literal["none", "official", "mergekit", "peft"]


class Ties(Passes):
    """Trim, elect, merge.

    Args:
        density: fraction of entries kept; by default 0.2, and 1 in mergekit's dialect. The peft dialect has none.
        lam: multiple of the merged task vector.
        aggregate: ``mean`` (weighted), ``sum``, or ``max`` of the entries that agree.
        scope: of the fraction, and of the majority: a ``tensor`` or the whole ``model``; by default the model, and a
            tensor in the dialects of mergekit and peft.
        vote: by the sum of values (``total``) or of signs (``frequency``).
        dialect: whose rules; see above.

    Raises:
        ValueError: density outside (0, 1], or none given to the peft dialect.
    """

    def __init__(
        self,
        density: float | None = None,
        lam: float = 1.0,
        aggregate: Aggregate = "mean",
        scope: Literal["tensor", "model"] | None = None,
        vote: Literal["total", "frequency"] = "total",
        dialect: Dialect = "none",
    ) -> None:
        if density is None:
            if dialect == "peft":
                raise ValueError("dialect='peft' has no default density: give density")
            density = 1.0 if dialect == "mergekit" else 0.2
        if not 0 < density <= 1:
            raise ValueError(f"density lies above 0 and up to 1, got {density}")
        foreign = dialect in ("mergekit", "peft")
        self.density, self.lam, self.dialect = density, lam, dialect
        self.scope = scope or ("tensor" if foreign else "model")
        self.election = Election(
            vote=vote,
            weighted=dialect != "peft",
            zero="positive" if foreign else "majority",
            aggregate=aggregate,
            divisor="count" if dialect == "peft" else "weights",
        )
        trims, settles = density < 1, not foreign
        self.scans = 2 * trims + settles if self.scope == "model" else 0

    def see(self, number: int, name: str, base: Tensor, experts: Sequence[Tensor]) -> None:
        """Threshold in the first two passes where anything is trimmed, signs in the last where ties need them."""
        vectors = [Difference(expert, base) for expert in experts]
        stage = number if self.density < 1 else number + 2
        if stage == 2:
            votes = self.scanned.setdefault("signs", 0.0)
            self.scanned["signs"] = votes + self.signs(vectors, self.scanned_cuts(name, len(experts)))
            return
        orders = self.scanned.setdefault("orders", [Order() for _ in experts])
        for order, vector in zip(orders, vectors):
            for part in blocks(vector.numel()):
                if stage == 0:
                    order.count(vector[part].abs())
                else:
                    order.refine(name, vector[part].abs())

    def seen(self, number: int) -> None:
        """Turn what the pass has counted into a rank to look for, and that into thresholds."""
        if self.density == 1 or "orders" not in self.scanned:
            return
        orders = self.scanned["orders"]
        if number == 0:
            for order in orders:
                order.locate(self.keep(order.seen))
        if number == 1:
            names = list(self.scanned["names"])
            self.scanned["cuts"] = [order.cuts(names, self.dialect == "official") for order in orders]

    def keep(self, count: int) -> int:
        """The rank of the threshold among ``count`` magnitudes."""
        if self.dialect == "official":
            return min(int(self.density * count) + 1, count)
        return kept_count(self.density, count)

    def scanned_cuts(self, name: str, num_experts: int) -> list[Cut]:
        """Where to cut this tensor of each expert under a threshold over the model."""
        return [EVERYTHING] * num_experts if self.density == 1 else [cuts[name] for cuts in self.scanned["cuts"]]

    def signs(self, vectors: Sequence[Difference], cuts: Sequence[Cut]) -> float:
        """Coordinates that vote plus, less those that vote minus, every expert with weight 1."""
        cuts, weights, total = list(cuts), [1.0] * len(vectors), 0.0
        for part in blocks(vectors[0].numel()):
            total += float(self.election.votes(trimmed(vectors, cuts, part), weights).sign().sum(dtype=torch.float64))
        return total

    def merge_tensor(
        self, name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """theta_0 + lam tau*, block by block."""
        own, sources = base.flatten(), [expert.flatten() for expert in experts]
        vectors = [Difference(source, own) for source in sources]
        if self.scope == "model":
            collected = self.results()
            cuts, signs = self.scanned_cuts(name, len(experts)), collected.get("signs", 0.0)
        else:
            keep = self.keep(own.numel())
            cuts = [cut_of(vector, keep, self.dialect == "official") for vector in vectors]
            signs = self.signs(vectors, cuts) if self.election.zero == "majority" else 0.0
        majority = float((signs > 0) - (signs < 0))
        out = torch.empty_like(own)
        for part in blocks(own.numel()):
            deltas, parts = trimmed(vectors, cuts, part), [source[part] for source in sources]
            out[part] = merge_elected(own[part], parts, deltas, weights, self.election, self.lam, majority, as_is=True)
        return out.view_as(base)


def trimmed(vectors: Sequence[Difference], cuts: list[Cut], part: slice) -> list[Tensor]:
    """A block of the sparse task vectors; ``cuts`` is left with the ties that remain for the blocks that follow."""
    out = []
    for number, vector in enumerate(vectors):
        kept, cuts[number] = take(vector[part], cuts[number])
        out.append(kept)
    return out
