"""TIES: trim task vectors, elect one sign per coordinate, merge those that agree with it (arXiv 2306.01708).

    trim     u_i = the int(density n) entries of tau_i of largest magnitude
    elect    s = sign(sum_i w_i u_i); a tie goes to the sign that most coordinates get where all weights are 1
    merge    tau* = sum_{i: w_i u_i s > 0} w_i u_i / sum_{i: w_i u_i s > 0} |w_i|;  theta* = theta_0 + lam tau*

The paper trims over all parameters of a model at once, which needs passes over it before the merge: two for the
threshold, a third where some but not all entries at the threshold are kept, one for the sign of most coordinates.

Dialects, each with its own defaults, differ from that:

    official   keeps all entries not below the (int(density n) + 1)-th largest, so one more, and ties
    mergekit   per tensor; density 1; a tied vote is plus
    peft       per tensor; votes without weights; a tied vote is plus; divides by the number of those that agree
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fulgurite.methods.merging.base import STATISTIC, Piecewise
from fulgurite.methods.merging.election import Aggregate, Election, merge_elected
from fulgurite.methods.merging.per_expert import PerExpert, check_fractions, each, for_each
from fulgurite.methods.merging.plan import Operands, Plan
from fulgurite.methods.merging.trimming import cuts_of
from fulgurite.methods.selection import (
    EVERYTHING,
    Cut,
    Split,
    bits_of,
    kept_count,
    locate,
    lower_histogram,
    take,
    upper_histogram,
    value_of,
)

Dialect = Literal["none", "official", "mergekit", "peft"]


class Ties(Piecewise):
    """Trim, elect, merge. Memory of a pass: 1 MB per expert and thread.

    Args:
        density: fraction of entries kept, one or one per expert; by default 0.2, and 1 in mergekit's dialect. The
            peft dialect has none.
        lam: multiple of the merged task vector.
        aggregate: ``mean`` (weighted), ``sum``, or ``max`` of the entries that agree.
        scope: of the fraction, and of the majority: a ``tensor`` or the whole ``model``; by default the model, and a
            tensor in the dialects of mergekit and peft.
        vote: by the sum of values (``total``) or of signs (``frequency``).
        dialect: whose rules; see above.

    Raises:
        ValueError: density outside [0, 1], or none given to the peft dialect.
    """

    def __init__(
        self,
        density: PerExpert | None = None,
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
        foreign = dialect in ("mergekit", "peft")
        self.density, self.lam, self.dialect = check_fractions("density", density), lam, dialect
        self.all_ties = dialect == "official"
        self.scope = scope or ("tensor" if foreign else "model")
        self.election = Election(
            vote=vote,
            weighted=dialect != "peft",
            zero="positive" if foreign else "majority",
            aggregate=aggregate,
            divisor="count" if dialect == "peft" else "weights",
        )

    def check(self, num_experts: int, has_base: bool, weights: Sequence[float] | None) -> list[float]:
        """See `Merger.check`; also refuses another number of densities."""
        weights = super().check(num_experts, has_base, weights)
        for_each("density", self.density, num_experts)
        return weights

    def begin(self, plan: Plan) -> str | None:
        """Forget an earlier merge; under a threshold over the model, look for it first."""
        super().begin(plan)
        sizes = {name: size for name, size in plan.sizes.items() if not STATISTIC.search(name)}
        keep = self.keep(sum(sizes.values()), plan.num_experts)
        self.scanned = {"names": list(sizes), "keep": keep, "signs": 0.0}
        if self.scope == "tensor":
            return None
        if min(each(self.density)) < 1:
            return "bins"
        self.scanned |= {"cuts": {name: [EVERYTHING] * plan.num_experts for name in sizes}, "open": {}}
        return self.after_cuts()

    def after_cuts(self) -> str | None:
        """The pass that follows once the thresholds are known."""
        return "signs" if self.election.zero == "majority" else None

    def scan(self, name: str, base: Tensor | None, experts: Sequence[Tensor]) -> Any:
        """Of a piece: histograms for the thresholds, the number of ties at them, or the balance of signs."""
        vectors = [expert.sub(base).flatten() for expert in experts]
        if self.stage == "bins":
            return [upper_histogram(bits_of(vector)).cpu() for vector in vectors]
        if self.stage == "values":
            places = self.scanned["places"]
            return [lower_histogram(bits_of(vector), upper).cpu() for vector, (upper, _, _) in zip(vectors, places)]
        if self.stage == "ties":
            values = self.scanned["split"].values
            return {name: [int((v.abs().to(torch.float32) == value).sum()) for v, value in zip(vectors, values)]}
        cuts = self.scanned["open"].setdefault(name, list(self.scanned["cuts"][name]))
        return self.signs(taken(vectors, cuts))

    def combine(self, summary: Any, other: Any) -> Any:
        """Sums of counts."""
        if self.stage in ("bins", "values"):
            return [own.add_(more) for own, more in zip(summary, other)]
        if self.stage == "ties":
            for name, counts in other.items():
                summary[name] = [a + b for a, b in zip(summary.get(name, [0] * len(counts)), counts)]
            return summary
        return summary + other

    def settle(self, summary: Any) -> str | None:
        """Turn counts into a rank to look for, that into thresholds, and those into cuts of every tensor."""
        if self.stage == "bins":
            self.scanned["places"] = [locate(histogram, keep) for histogram, keep in zip(summary, self.scanned["keep"])]
            return "values"
        if self.stage == "signs":
            self.scanned["signs"] = summary
            return None
        if self.stage == "values":
            places = self.scanned["places"]
            found = [locate(histogram, rank) for histogram, (_, rank, _) in zip(summary, places)]
            values = [
                value_of(upper, lower) if keep else math.inf
                for (upper, _, _), (lower, _, _), keep in zip(places, found, self.scanned["keep"])
            ]
            equal = [count for _, _, count in found]
            ties = equal if self.all_ties else [rank for _, rank, _ in found]
            self.scanned["split"] = Split(values, ties, equal)
            if self.scanned["split"].is_open:
                return "ties"
        counts = summary if self.stage == "ties" else None
        self.scanned["cuts"] = self.scanned["split"].cuts(self.scanned["names"], counts)
        self.scanned["open"] = {}
        return self.after_cuts()

    def keep(self, count: int, num_experts: int) -> list[int]:
        """The rank of each expert's threshold among ``count`` magnitudes."""
        densities = for_each("density", self.density, num_experts)
        if self.all_ties:
            return [min(int(density * count) + 1, count) for density in densities]
        return [kept_count(density, count) for density in densities]

    def signs(self, deltas: Sequence[Tensor]) -> float:
        """Coordinates that vote plus, less those that vote minus, every expert with weight 1."""
        return float(self.election.votes(deltas, [1.0] * len(deltas)).sign().sum(dtype=torch.float64))

    def merge_pieces(self, operands: Operands, weights: Sequence[float]) -> Iterator[Tensor]:
        """theta_0 + lam tau*."""
        if self.scope == "model":
            cuts, signs = self.scanned["cuts"][operands.name], self.scanned["signs"]
        else:
            cuts, signs = cuts_of(operands, self.keep(operands.num_entries, len(weights)), self.all_ties), 0.0
            if self.election.zero == "majority":
                left = list(cuts)
                for _, base, experts in operands.pieces():
                    signs += self.signs(taken([expert - base for expert in experts], left))
        majority, left = float((signs > 0) - (signs < 0)), list(cuts)
        for _, base, experts in operands.pieces():
            deltas = taken([expert - base for expert in experts], left)
            yield merge_elected(base, experts, deltas, weights, self.election, self.lam, majority, as_is=True)


def taken(vectors: Sequence[Tensor], cuts: list[Cut]) -> list[Tensor]:
    """A piece of the sparse task vectors; ``cuts`` is left with the ties that remain for the pieces that follow."""
    out = []
    for number, vector in enumerate(vectors):
        kept, cuts[number] = take(vector, cuts[number])
        out.append(kept)
    return out
