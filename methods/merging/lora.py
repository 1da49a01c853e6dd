"""Merge LoRA adapters (arXiv 2106.09685): per layer, one pair of factors for sum_i w_i s_i B_i A_i.

    cat     A = [w_1 s_1 A_1; ...; w_T s_T A_T],  B = [B_1, ..., B_T]:  exact, rank sum r_i
    mean    the same with w_i / sum w: the mean of the weight changes (SELMA, arXiv 2403.06952), not of the factors
    svd     the best approximation of rank R: with B = Q_B R_B and A^T = Q_A R_A, the SVD of the core R_B R_A^T
            (sum r_i squared) gives A = V_R^T Q_A^T and B = Q_B U_R S_R. No matrix (out, in) is made.
    delta_* ``peft``'s *_svd: an element-wise rule on the dense changes, then rank R
    factors_*  ``peft``'s linear, ties, ...: a rule on A and on B, which leaves the cross terms B_i A_j in

An adapter is a mapping site -> `Factors`; s carries alpha / r and rank-stabilised alpha / sqrt(r) alike. Functions
between it and a set of an `AdapterBank`, or peft's files, are in `lora_io`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fulgurite.methods.merging.lora_factors import Combination, Vote, of_factors

LISTED = 8  # names in a message
Form = Literal[
    "cat",
    "mean",
    "svd",
    "delta_ties",
    "delta_dare_linear",
    "delta_dare_ties",
    "delta_magnitude_prune",
    "factors_linear",
    "factors_ties",
    "factors_dare_linear",
    "factors_dare_ties",
    "factors_magnitude_prune",
]


class Factors(NamedTuple):
    """The change s B A of one layer's weight; of a convolution's, A is (r, in, h, w) and B (out, r, 1, 1)."""

    down: Tensor  # A (r, in)
    up: Tensor  # B (out, r)
    scale: float  # s

    @property
    def rank(self) -> int:
        """r."""
        return self.down.shape[0]

    def change(self) -> Tensor:
        """s B A, dense: (out, in)."""
        dense = self.up.flatten(1) @ self.down.flatten(1) * self.scale
        return dense.view(-1, *self.down.shape[1:])


LoRAFactors = Mapping[str, Factors]


def exact_sum(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """sum_i w_i s_i B_i A_i as one pair of factors of rank sum r_i and scale 1."""
    down = torch.cat([f.down * (weight * f.scale) for f, weight in zip(factors, weights)])
    return Factors(down, torch.cat([f.up for f in factors], dim=1), 1.0)


def truncated(factors: Factors, rank: int) -> Factors:
    """The best approximation of s B A of at most ``rank`` (Eckart-Young), in O((out + in) r^2); the scale is 1."""
    up, down = factors.up.flatten(1), factors.down.flatten(1) * factors.scale
    left, core_up = torch.linalg.qr(up)
    right, core_down = torch.linalg.qr(down.T)
    u, s, vh = torch.linalg.svd(core_up @ core_down.T, full_matrices=False)
    return _shaped(vh[:rank] @ right.T, left @ (u[:, :rank] * s[:rank]), factors)


def truncated_change(change: Tensor, rank: int, like: Factors) -> Factors:
    """The best approximation of a dense change (out, in) of at most ``rank``, with the axes of ``like``."""
    u, s, vh = torch.linalg.svd(change.flatten(1), full_matrices=False)
    return _shaped(vh[:rank], u[:, :rank] * s[:rank], like)


def _shaped(down: Tensor, up: Tensor, like: Factors) -> Factors:
    return Factors(down.reshape(-1, *like.down.shape[1:]), up.reshape(*up.shape, *like.up.shape[2:]), 1.0)


class MergeLoRA:
    """One LoRA adapter of several.

    One adapter at weight 1 comes back to the bit in every form, at density 1. Memory: the factors of one layer, for
    ``delta_*`` T + 1 dense matrices of one layer.

    Args:
        form: see the module. ``factors_*`` are for parity with ``peft`` and warn: what they make is far from the
            sum of the changes.
        rank: R of ``svd`` and ``delta_*``, by default the largest of the adapters at that layer; of ``mean``, where
            it is exact by default. R above the rank that there is adds nothing.
        density: share of entries that the pruning forms keep, in (0, 1]; they need one.
        vote: of the ``*_ties`` forms: by the sum of entries (``total``) or of their signs (``frequency``).
        seed: of the masks of ``*_dare_*``.
        strict: every layer must be in every adapter; otherwise one that lacks it does not change it.

    Raises:
        ValueError: a setting that the form does not have, or lacks.
    """

    def __init__(
        self,
        form: Form = "cat",
        rank: int | None = None,
        density: float | None = None,
        vote: Vote = "total",
        seed: int = 0,
        strict: bool = True,
    ) -> None:
        kind, _, rule = form.partition("_")
        prunes = kind in ("delta", "factors") and rule != "linear"
        if rank is not None and (rank < 1 or form == "cat" or kind == "factors"):
            raise ValueError(f"rank={rank}: svd, mean and delta_* take one of at least 1; form is {form!r}")
        if prunes and density is None:
            raise ValueError(f"form={form!r} prunes: give density, the share of entries to keep")
        if density is not None and (not prunes or not 0 < density <= 1):
            raise ValueError(f"density={density}: the pruning forms take one in (0, 1]; form is {form!r}")
        if kind == "factors":
            warnings.warn(
                f"{form} combines A and B one by one; the result is not the sum of the changes. For that, take cat or "
                "svd",
                stacklevel=2,
            )
        self.form, self.rank, self.density, self.strict = form, rank, density, strict
        self.combine = Combination(rule, density or 1.0, vote, seed) if kind in ("delta", "factors") else None

    def __call__(self, adapters: Sequence[LoRAFactors], weights: Sequence[float] | None = None) -> dict[str, Factors]:
        """The merged adapter, in the types of the first that has the layer; computed in float32 (float64 if given).

        Args:
            adapters: T adapters; the order of sites is that of the first.
            weights: T numbers, 1 for each by default.

        Raises:
            ValueError: the adapters do not fit together, or one is not finite. Names all that is wrong.
        """
        weights = [1.0] * len(adapters) if weights is None else [float(weight) for weight in weights]
        if len(weights) != len(adapters):
            raise ValueError(f"{len(weights)} weights for {len(adapters)} adapters")
        check_adapters(adapters, self.strict, self.form.startswith("factors"))
        if self.form == "mean":
            total = sum(weights)
            if abs(total) < 1e-8:
                raise ValueError(f"form='mean' divides by the sum of the weights, and {weights} cancel")
            weights = [weight / total for weight in weights]
        merged = {}
        for site in dict.fromkeys(site for adapter in adapters for site in adapter):
            held = [(Factors(*a[site]), weight) for a, weight in zip(adapters, weights) if site in a]
            merged[site] = self.merge_site(site, [factors for factors, _ in held], [weight for _, weight in held])
        return merged

    @torch.no_grad()
    def merge_site(self, site: str, given: Sequence[Factors], weights: Sequence[float]) -> Factors:
        """One layer's factors, of T that fit together."""
        first = given[0]
        rank = self.rank or max(f.rank for f in given)
        if len(given) == 1 and weights[0] == 1 and self.density in (None, 1) and rank >= first.rank:
            return Factors(first.down.detach().clone(), first.up.detach().clone(), first.scale)
        exact = any(tensor.dtype == torch.float64 for f in given for tensor in (f.down, f.up))
        dtype, device = torch.float64 if exact else torch.float32, first.down.device
        factors = [Factors(f.down.detach().to(device, dtype), f.up.detach().to(device, dtype), f.scale) for f in given]
        out = self._merge(site, factors, weights, rank)
        return Factors(out.down.to(first.down.dtype), out.up.to(first.up.dtype), out.scale)

    def _merge(self, site: str, factors: Sequence[Factors], weights: Sequence[float], rank: int) -> Factors:
        if self.form.startswith("factors"):
            shares = [weight * f.scale for f, weight in zip(factors, weights)]
            down, up = of_factors([f.down for f in factors], [f.up for f in factors], shares, self.combine, site)
            return Factors(down, up, 1.0)
        if self.combine is not None:
            change = self.combine([f.change() for f in factors], weights, site)
            return truncated_change(change, rank, factors[0])
        summed = exact_sum(factors, weights)
        whole = self.form == "cat" or (self.form == "mean" and self.rank is None) or rank >= summed.rank
        return summed if whole else truncated(summed, rank)


def check_adapters(adapters: Sequence[LoRAFactors], strict: bool = True, same_rank: bool = False) -> None:
    """Refuse adapters that do not fit together.

    Args:
        adapters: T of them.
        strict: every layer must be in every adapter.
        same_rank: a layer must have one rank in all adapters.

    Raises:
        ValueError: there are none, or layers that some lack, whose shapes differ, or that are not finite. Lists them.
    """
    if not adapters or not any(adapters):
        raise ValueError("no adapters to merge, or none with a layer")
    problems = problems_of(adapters, strict, same_rank)
    if problems:
        more = f"\n  ... and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        listed = "\n  ".join(problems[:LISTED])
        raise ValueError(f"the adapters do not fit together in {len(problems)} things:\n  {listed}{more}")


def problems_of(adapters: Sequence[LoRAFactors], strict: bool, same_rank: bool) -> list[str]:
    """One text for each site that some lack (where ``strict``), whose shapes differ, or that is not finite."""
    problems = []
    for site in dict.fromkeys(site for adapter in adapters for site in adapter):
        lacking = [str(number) for number, adapter in enumerate(adapters) if site not in adapter]
        if strict and lacking:
            problems.append(f"{site}: not in adapter {', '.join(lacking)}; strict=False takes it as no change")
        held = {number: Factors(*adapter[site]) for number, adapter in enumerate(adapters) if site in adapter}
        first = next(iter(held.values()))
        for number, f in held.items():
            shapes = f"A {tuple(f.down.shape)}, B {tuple(f.up.shape)}"
            if f.down.dim() < 2 or f.up.dim() < 2 or f.up.shape[1] != f.rank:
                problems.append(f"{site}: adapter {number} has {shapes}, which is no A (r, in) and B (out, r)")
            elif f.down.shape[1:] != first.down.shape[1:] or len(f.up) != len(first.up):
                problems.append(f"{site}: adapter {number} has {shapes}, adapter {next(iter(held))} another layer's")
            elif same_rank and f.rank != first.rank:
                problems.append(f"{site}: ranks {first.rank} and {f.rank}; factors_* need equal ones, svd does not")
            elif not (f.down.isfinite().all() and f.up.isfinite().all()):
                problems.append(f"{site}: adapter {number} holds NaN or infinity")
    return problems
