"""KnOTS: merge LoRA adapters in a basis that they share (arXiv 2410.19735).

    [dW_1 ... dW_T] = U S [V_1 ... V_T]   for each layer, side by side along the inputs, dW_i = s_i B_i A_i
    dW = lam U merge(S V_1, ..., S V_T)   merge: any merger of task vectors, by default TIES over all layers at once

The SVD is that of a core (sum r_i squared) between the Q factors of [B_1 ... B_T] and of each A_i^T, so no matrix
(out, in) is made, and the result is a pair of factors of rank at most sum r_i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fulgurite.methods.merging.base import Merger
from fulgurite.methods.merging.lora import Factors, LoRAFactors, check_adapters
from fulgurite.methods.merging.ties import Ties


class MergeKnOTS:
    """One LoRA adapter of several, merged in their common basis.

    Memory: S V_i of all layers in float64, T * sum r_i * in numbers per layer.

    Args:
        then: merges S V_i, given by the layers' names, with zeros for the base; TIES with the largest 20 % by default.
        lam: multiple of the merged change; 0.6 is the published choice for a ViT-B with rank 16.
        tol: singular values up to this are noise.
    """

    def __init__(self, then: Merger | None = None, lam: float = 0.6, tol: float = 1e-5) -> None:
        self.then = then or Ties(density=0.2)
        self.lam, self.tol = lam, tol

    @torch.no_grad()
    def __call__(self, adapters: Sequence[LoRAFactors], weights: Sequence[float] | None = None) -> dict[str, Factors]:
        """The merged adapter, in the first one's types; computed in float64.

        Args:
            adapters: T adapters with the same layers.
            weights: T numbers for ``then``, 1 for each by default.

        Raises:
            ValueError: the adapters do not fit together, or one is not finite; and what ``then`` refuses.
        """
        check_adapters(adapters)
        bases: dict[str, Tensor] = {}
        parts: list[dict[str, Tensor]] = [{} for _ in adapters]
        for site in adapters[0]:
            bases[site], own = common_basis([Factors(*adapter[site]) for adapter in adapters], self.tol)
            for part, tensor in zip(parts, own):
                part[site] = tensor
        zeros = {site: torch.zeros_like(tensor) for site, tensor in parts[0].items()} if self.then.needs_base else None
        merged = self.then(parts, zeros, weights)
        out = {}
        for site, basis in bases.items():
            first = Factors(*adapters[0][site])
            down = merged[site].view(-1, *first.down.shape[1:]).to(first.down.dtype)
            up = basis.view(*basis.shape, *[1] * (first.up.dim() - 2)).to(first.up.dtype)
            out[site] = Factors(down, up, self.lam)
        return out


def common_basis(factors: Sequence[Factors], tol: float = 1e-5) -> tuple[Tensor, list[Tensor]]:
    """U (out, k) with orthonormal columns, and T times S V_i (k, in), so that s_i B_i A_i = U (S V_i); float64.

    k counts the singular values above ``tol``, and is at least 1.
    """
    left, core = torch.linalg.qr(torch.cat([f.up.detach().flatten(1).double() * f.scale for f in factors], dim=1))
    rights, cores, start = [], [], 0
    for f in factors:
        right, own = torch.linalg.qr(f.down.detach().flatten(1).double().T)
        rights.append(right)
        cores.append(core[:, start : start + f.rank] @ own.T)
        start += f.rank
    u, s, vh = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False)
    k = max(int((s > tol).sum()), 1)
    columns = (s[:k, None] * vh[:k]).split([right.shape[1] for right in rights], dim=1)
    return left @ u[:, :k], [column @ right.T for column, right in zip(columns, rights)]
