"""OPCM: models merged one after the other, each change orthogonal to those before it (arXiv 2501.09522).

N_1 = tau_1. For model t, per matrix, with N_{t-1} = U S V^T and r the first (0-based) index with
cumsum(s)_r / sum(s) > alpha:

    P = U^T tau_t V,  its main diagonal and its leading r x r block set to 0
    N_t = N_{t-1} + U P V^T            (other tensors: N_{t-1} + tau_t)
    theta*_t = theta_0 + N_t / lam_t,  lam_t = |N_t| / mean(|tau_1| .. |tau_t|), norms over all parameters

U and V are square there. U P V^T = tau_t - U_r U_r^T tau_t V_r V_r^T - sum_{i >= r} u_i (u_i^T tau_t v_i) v_i^T needs
the thin ones only. N does not depend on lam, so the merge of a list takes lam_T alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fulgurite.methods.merging.base import Merger
from fulgurite.methods.merging.plan import Plan


def orthogonal_part(tau: Tensor, merged: Tensor, alpha: float = 0.5) -> Tensor:
    """U P V^T of tau (m, n) with respect to the merged change N (m, n); tau itself where N is 0. One thin SVD."""
    if not merged.any():
        return tau.clone()
    left, values, right = torch.linalg.svd(merged, full_matrices=False)
    within = values.cumsum(0) / values.sum() > alpha
    rank = int(within.to(torch.uint8).argmax()) if within.any() else len(values)
    seen = left.mT @ tau
    diagonal = (seen * right).sum(1)
    block = (seen[:rank] @ right[:rank].mT) @ right[:rank]
    removed = torch.cat([block, diagonal[rank:, None] * right[rank:]])
    return tau - left @ removed


@dataclass(frozen=True)
class OpcmState:
    """Where a stream of models stands: with the merged model, all that the next one needs.

    Args:
        norms: |tau_i| of every model so far.
        lam: lam_t, by which the merged change was divided.
    """

    norms: tuple[float, ...]
    lam: float

    def __post_init__(self) -> None:
        if not self.norms or self.lam <= 0:
            raise ValueError(f"a stream that has begun has norms and lam > 0, got {self.norms} and {self.lam}")


class Opcm(Merger):
    """OPCM of experts in the order given, or of a merged model and the experts that come after.

        first = Opcm();             merged = first([a, b], base)
        then = Opcm(state=first.state());   merged = then([merged, c], base)      # as Opcm()([a, b, c], base)

    Sees every tensor twice (its length must be known of the whole model), with T - 1 thin SVDs per matrix each time
    unless ``keep``. A stream should keep its merged model in float32.

    Args:
        alpha: share of the sum of singular values whose directions are left alone.
        exclude: patterns (`re.search` in a name) of matrices that are treated like other tensors; the published code
            projects weights of linear layers only, so that embeddings are to be named here.
        state: of a stream so far, whose merged model is the first of the experts; None begins one.
        keep: hold the sum of each tensor between the two passes, one more model in memory, instead of a second SVD.
    """

    def __init__(
        self, alpha: float = 0.5, exclude: Sequence[str] = (), state: OpcmState | None = None, keep: bool = False
    ) -> None:
        self.alpha, self.exclude = alpha, [re.compile(pattern) for pattern in exclude]
        self.before, self.keep = state, keep

    def check(self, num_experts: int, has_base: bool, weights: Sequence[float] | None) -> list[float]:
        """How many models each expert stands for, by which statistics are averaged.

        Raises:
            ValueError: see `Merger.check`; or weights other than 1.
        """
        weights = super().check(num_experts, has_base, weights)
        if set(weights) != {1.0}:
            raise ValueError(f"Opcm weighs models by their lengths; leave out the weights {weights}")
        return [float(len(self.before.norms)) if self.before else 1.0, *weights[1:]]

    def begin(self, plan: Plan) -> str | None:
        """Forget an earlier merge."""
        self.scanned: dict[str, Any] = {"squares": [], "merged": 0.0, "sums": {}}
        return "lengths"

    def scan(self, name: str, base: Tensor | None, experts: Sequence[Tensor]) -> dict[str, list[float]]:
        """Squared lengths of one tensor: of each new task vector, and of their sum."""
        new = experts if self.before is None else experts[1:]
        total = self.total(name, base, experts)
        if self.keep:
            self.scanned["sums"][name] = total
        return {name: [*(square(expert - base) for expert in new), square(total)]}

    def combine(self, summary: dict[str, list[float]], other: dict[str, list[float]]) -> dict[str, list[float]]:
        """Those of all tensors."""
        return summary | other

    def settle(self, summary: dict[str, list[float]]) -> None:
        """Lengths of the whole model, added in the order of names."""
        *self.scanned["squares"], self.scanned["merged"] = map(sum, zip(*(summary[name] for name in sorted(summary))))

    def total(self, name: str, base: Tensor, experts: Sequence[Tensor]) -> Tensor:
        """N_T of one tensor."""
        out = experts[0] - base
        if self.before is not None:
            out *= self.before.lam
        matrix = out.dim() == 2 and out.numel() and not any(pattern.search(name) for pattern in self.exclude)
        for expert in experts[1:]:
            tau = expert - base
            out += orthogonal_part(tau, out, self.alpha) if matrix else tau
        return out

    def state(self) -> OpcmState:
        """Where the stream stands after a merge (from the first tensor of it on)."""
        if self.before is not None and not self.scanned["squares"]:
            return self.before
        norms = (*(self.before.norms if self.before else ()), *map(math.sqrt, self.scanned["squares"]))
        mean, merged = sum(norms) / len(norms), math.sqrt(self.scanned["merged"])
        return OpcmState(norms, merged / mean if merged and mean and len(norms) > 1 else 1.0)

    def merge_tensor(
        self, name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """theta_0 + N_T / lam_T; the only expert itself."""
        if len(experts) == 1:
            return experts[0].clone()
        total = self.scanned["sums"].pop(name, None)
        if total is None:
            total = self.total(name, base, experts)
        return base.add(total, alpha=1 / self.state().lam)


def square(tensor: Tensor) -> float:
    """Sum of squares, in float64."""
    return float(tensor.double().square().sum())
