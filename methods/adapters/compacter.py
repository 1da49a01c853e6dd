"""Compacter (Karimi Mahabadi et al., 2021, arXiv 2106.04647): bottlenecks of sums of Kronecker products.

A parameterised hypercomplex multiplication (PHM) layer has, for n rules A_i (n, n) and blocks W_i (I/n, O/n),

    y = x H + b,   H = sum_{i=1..n} A_i kron W_i,   H[a K + k, c P + p] = sum_i A_i[a, c] W_i[k, p]

with K = I/n and P = O/n. Factorised, W_i = L_i R_i.

Legend: I and O features in and out, n division, R rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fulgurite.methods.adapters.base import site_width
from fulgurite.methods.adapters.down_up import Activation, DownUp, Init, inner_width
from fulgurite.methods.adapters.kept import Kept


class PHMRule(nn.Module):
    """The A of a PHM layer, (n, n, n)."""

    def __init__(self, division: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(division, division, division))


class PHMLinear(nn.Module):
    """y = x H + b.

    Parameters: n^3 for the own A, n (I/n)(O/n) or factorised n R (I/n + O/n), and O.

    H is put together where it is smaller than what the products without it would keep, n times the narrow side of
    every row. For few rows, and where the factors are narrow, x meets the W_i and A one after the other. In evaluation
    H is kept while the parameters stay as they are.

    Args:
        in_features: I.
        out_features: O.
        division: n, which divides both.
        rank: R of the factorised form; None for whole W_i.
        rule: the A of another owner; None for an own one.

    Raises:
        ValueError: ``division`` does not divide a size, or ``rank`` is below 1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        division: int = 4,
        rank: int | None = None,
        rule: PHMRule | None = None,
    ) -> None:
        super().__init__()
        if division < 1 or in_features % division or out_features % division:
            raise ValueError(
                f"division={division} must divide the sizes of the layer, {in_features} and {out_features}; change it "
                "or the reduction"
            )
        if rank is not None and rank < 1:
            raise ValueError(f"rank={rank} must be at least 1, or null for whole blocks")
        self.in_features, self.out_features = in_features, out_features
        self.division, self.rank = division, rank
        shape = (division, in_features // division, out_features // division)
        if rule is None:
            self.rule = PHMRule(division)
        else:
            self.link(rule)
        if rank is None:
            self.blocks = nn.Parameter(torch.empty(shape))
        else:
            self.left = nn.Parameter(torch.empty(division, shape[1], rank))
            self.right = nn.Parameter(torch.empty(division, rank, shape[2]))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self._kept = Kept()

    def link(self, rule: PHMRule) -> None:
        """Compute with an A that is stored elsewhere."""
        self.__dict__["rule"] = rule

    @torch.no_grad()
    def reset_parameters(self, zero: bool = False, generator: torch.Generator | None = None) -> None:
        """Blocks or factors ~ Xavier uniform with gain sqrt(2), each slice by itself, or with ``zero`` H = 0; b = 0.

        A is its owner's to draw.
        """
        for block in (self.blocks,) if self.rank is None else (self.left, self.right):
            xavier_(block, generator)
        if zero:
            (self.blocks if self.rank is None else self.right).zero_()
        self.bias.zero_()

    @property
    def weight(self) -> Tensor:
        """H^T (O, I), as a linear layer has it."""
        blocks = self.blocks if self.rank is None else self.left @ self.right
        products = torch.einsum("iac,ikp->cpak", self.rule.weight, blocks)
        return products.reshape(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., I) -> (..., O)."""
        if not (self.training or torch.is_grad_enabled()):
            made_of = [self.rule.weight, *((self.blocks,) if self.rank is None else (self.left, self.right))]
            return F.linear(x, self._kept.get("H", made_of, lambda: self.weight), self.bias)
        narrow = min(self.in_features, self.out_features)
        few_rows = x.numel() // self.in_features * self.division * narrow < self.in_features * self.out_features
        narrow_factors = self.rank is not None and self.division * self.rank < narrow
        return self.products(x) if few_rows or narrow_factors else F.linear(x, self.weight, self.bias)

    def products(self, x: Tensor) -> Tensor:
        """`forward` without H. Legend: r rows, a and c divisions, k and p features within, s rank."""
        rule = self.rule.weight
        x_rak = x.reshape(-1, self.division, self.in_features // self.division)
        if self.rank is not None:
            inner_rcis = torch.einsum("rak,iks,iac->rcis", x_rak, self.left, rule)
            y_rcp = torch.einsum("rcis,isp->rcp", inner_rcis, self.right)
        elif self.out_features <= self.in_features:
            y_rcp = torch.einsum("raip,iac->rcp", torch.einsum("rak,ikp->raip", x_rak, self.blocks), rule)
        else:
            y_rcp = torch.einsum("rcik,ikp->rcp", torch.einsum("rak,iac->rcik", x_rak, rule), self.blocks)
        y = y_rcp.reshape(*x.shape[:-1], self.out_features)
        return y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, division={self.division}"


def xavier_(slices: Tensor, generator: torch.Generator | None) -> None:
    """Fill (..., I, O) with U(-a, a), a = sqrt(2) sqrt(6 / (I + O))."""
    bound = math.sqrt(2) * math.sqrt(6 / sum(slices.shape[-2:]))
    slices.uniform_(-bound, bound, generator=generator)


class Compacter(DownUp):
    """A(z) = z + s (up(drop(act(down(z))))), with PHM layers down and up.

    Parameters for width D and inner width b = D // reduction: 2 n^3 + 2 D b / n + D + b; of the A once with
    ``one_rule``; factorised 2 R (D + b) in the place of 2 D b / n. Mixing averages the H of sets.

    Args:
        dim: features that leave the site, or the site itself.
        reduction: the inner width is ``dim // reduction``.
        division: n; divides ``dim`` and the inner width.
        rank: R of factorised blocks; None for whole ones.
        one_rule: one A for both layers, the part ``rule``, which `PerTask` and `Shared` can share further.
        scale: s.
        dropout: after the activation.
        activation: the non-linearity.
        init: ``"zero_up"`` starts with an up-layer of zeros, the identity; ``"official"`` draws it like the other.

    Raises:
        ValueError: a size that ``reduction`` or ``division`` does not fit.
    """

    def __init__(
        self,
        dim: int | nn.Module,
        reduction: int = 8,
        division: int = 4,
        rank: int | None = None,
        one_rule: bool = False,
        scale: float = 1.0,
        dropout: float = 0.0,
        activation: Activation = "gelu_new",
        init: Init = "zero_up",
    ) -> None:
        width = site_width(dim)
        inner = inner_width(width, reduction)
        rule = PHMRule(division) if one_rule else None
        down = PHMLinear(width, inner, division, rank, rule)
        super().__init__(down, PHMLinear(inner, width, division, rank, rule), scale, dropout, activation, init)
        if rule is not None:
            self.rule = rule
        self.reset_parameters()

    def adopt(self, name: str, module: nn.Module) -> None:
        """As every adapter; both layers follow a new A."""
        super().adopt(name, module)
        if name == "rule":
            self.down.link(module)
            self.up.link(module)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """A ~ N(0, 0.01); blocks as `PHMLinear.reset_parameters`."""
        for rule in dict.fromkeys((self.down.rule, self.up.rule)):
            rule.weight.normal_(std=0.01, generator=generator)
        self.down.reset_parameters(generator=generator)
        self.up.reset_parameters(self.init == "zero_up", generator)
