"""One sign per coordinate by vote of the experts, and the merge of those that agree with it (TIES, arXiv 2306.01708).

With u_ij the j-th entry of expert i's sparse task vector, and s_j the elected sign:

    total      s_j = sign(sum_i w_i u_ij)             frequency  s_j = sign(sum_i w_i sign(u_ij))
    mean       sum_{i: u_ij s_j > 0} w_i u_ij / sum_{i: u_ij s_j > 0} |w_i|
    sum        sum_{i: u_ij s_j > 0} w_i u_ij         max        s_j max_{i: u_ij s_j > 0} |w_i u_ij|

where w_i enters the vote and the agreement only if it is ``weighted`` (else as 1 there). A tie (s_j = 0) goes to the
sign that most coordinates have, or to plus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Aggregate = Literal["mean", "sum", "max"]


@dataclass(frozen=True)
class Election:
    """How votes are counted and what becomes of those that agree.

    Args:
        vote: by the sum of values, or of signs.
        weighted: whether weights count in the vote.
        zero: the sign where a vote is tied: plus, or the ``majority`` sign given to `merge_elected`.
        aggregate: what is made of the agreeing entries.
        divisor: of the mean: the sum of the agreeing ``weights`` in magnitude, or their ``count``.
        floor: the least that the mean is divided by.
    """

    vote: Literal["total", "frequency"] = "total"
    weighted: bool = True
    zero: Literal["majority", "positive"] = "majority"
    aggregate: Aggregate = "mean"
    divisor: Literal["weights", "count"] = "weights"
    floor: float = 0.0

    def votes(self, deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The sum that decides the sign, in the shape of one delta."""
        out = torch.zeros_like(deltas[0])
        for delta, weight in zip(deltas, weights):
            out.add_(delta if self.vote == "total" else delta.sign(), alpha=weight if self.weighted else 1.0)
        return out

    def signs(self, deltas: Sequence[Tensor], weights: Sequence[float], majority: float) -> Tensor:
        """The elected signs, -1, 0 or 1, in the shape of one delta."""
        out = self.votes(deltas, weights).sign_()
        tie = majority if self.zero == "majority" else 1.0
        if not tie:
            # The published rule keeps what is not above 0 where nothing is elected, except that max has no sign then.
            tie = 0.0 if self.aggregate == "max" else -1.0
        return out.add_(out.abs().neg_().add_(1), alpha=tie) if tie else out


def merge_elected(
    base: Tensor,
    experts: Sequence[Tensor],
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    election: Election,
    lam: float = 1.0,
    majority: float = 1.0,
    as_is: bool = False,
) -> Tensor:
    """theta_0 + lam tau*, with tau* made of those that agree with the elected sign.

    Args:
        base: theta_0.
        experts: T tensors theta_i of that shape.
        deltas: T sparse task vectors of that shape; may be overwritten.
        weights: T numbers; a negative one votes against its expert and takes it away.
        election: the rule.
        lam: the multiple.
        majority: the sign of ties under ``zero="majority"``: 1, -1 or 0.
        as_is: deltas are tau_i or 0, nothing rescaled; then what is taken from one expert alone, at lam 1 and weight
            1, is that expert's value to the bit.

    Returns:
        a new tensor. Memory: four tensors.
    """
    signs = election.signs(deltas, weights, majority)
    by_weight = election.divisor == "weights"
    plain = all(weight == 1 for weight in weights) or (by_weight and min(weights) > max(election.floor, 0))
    averages = election.aggregate == "mean" or len(deltas) == 1
    # theta_0 + (theta_i - theta_0) is theta_i but for its last bit, so average the experts' own values where possible.
    direct = as_is and lam == 1 and averages and plain
    total, divisor = torch.zeros_like(base), torch.zeros_like(base)
    for expert, delta, weight in zip(experts, deltas, weights):
        vote = weight if election.weighted else 1.0
        agreeing = delta.mul_(signs) if vote > 0 else delta.mul_(signs).neg_() if vote < 0 else delta.zero_()
        if direct:
            present = agreeing.gt_(0)
            total.addcmul_(present, expert, value=weight)
            divisor.add_(present, alpha=weight)
            continue
        agreeing.clamp_min_(0)
        if election.aggregate == "max":
            torch.maximum(total, agreeing.mul_(abs(weight)), out=total)
            continue
        total.add_(agreeing, alpha=abs(weight) if election.weighted else weight)
        if election.aggregate == "mean":
            divisor.add_(agreeing.sign_(), alpha=abs(weight) if by_weight else 1.0)
    if direct:
        absent = divisor.eq(0).to(base.dtype)
        return total.addcmul_(absent, base).div_(divisor.add_(absent))
    if election.aggregate == "mean":
        total.div_(divisor.clamp_min_(max(election.floor, torch.finfo(base.dtype).tiny)))
    return torch.addcmul(base, total, signs, value=lam)


def add_deltas(
    base: Tensor,
    experts: Sequence[Tensor],
    deltas: Sequence[Tensor],
    weights: Sequence[float],
    lam: float = 1.0,
    as_is: bool = False,
) -> Tensor:
    """theta_0 + lam sum_i w_i delta_i; arguments as in `merge_elected`, with its promise for one expert alone."""
    if not as_is or all(lam * weight != 1 for weight in weights):
        out = base.clone()
        for delta, weight in zip(deltas, weights):
            out.add_(delta, alpha=lam * weight)
        return out
    out, share = torch.zeros_like(base), torch.ones_like(base)
    for expert, delta, weight in zip(experts, deltas, weights):
        present = delta.ne_(0)
        out.addcmul_(present, expert, value=lam * weight)
        share.add_(present, alpha=-lam * weight)
    return out.addcmul_(share, base)
