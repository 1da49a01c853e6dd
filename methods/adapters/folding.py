"""Adapters folded into the weights that they stand beside, where the result is exact.

Kinds that change what a layer computes with (LoRA, replaced modules, changed weights) give the tensors that do the same
without them, `Adapter.folded`. Several sets mixed by weights p that sum to 1 are folded alike, since for these kinds

    sum_i p_i (W + change_i) = W + sum_i p_i change_i.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.bank import AdapterBank
from fulgurite.methods.adapters.base import FoldError


@torch.no_grad()
def fold(bank: AdapterBank, model: nn.Module, weights: Mapping[str, float], sites: Container[str]) -> dict[str, Tensor]:
    """Tensors of ``model`` that replace its own, by name, with a mixture of sets folded in; nothing is changed.

    Args:
        bank: attached to ``model``.
        model: the frozen model.
        weights: set to its weight; they sum to 1.
        sites: module names of the sites to fold; the others are left out.

    Raises:
        FoldError: a kind has no exact form as weights, or a mixture of sets is not one. All sites are listed.
        LookupError: there is no set of that name.
        ValueError: the weights do not sum to 1.
    """
    if not weights or not math.isclose(sum(weights.values()), 1, abs_tol=1e-6):
        raise ValueError(f"weights of sets must sum to 1 to be folded; these are {dict(weights)}")
    out: dict[str, Tensor] = {}
    refused: dict[str, list[str]] = {}
    for name, share in weights.items():
        for site, adapter in bank.adapters_of(name).items():
            if site not in sites:
                continue
            try:
                if len(weights) > 1 and not adapter.mixes:
                    raise FoldError(f"{type(adapter).__name__} defines no mixing")
                tensors = adapter.folded(model.get_submodule(site))
            except FoldError as error:
                refused.setdefault(str(error), []).append(site)
                continue
            for tensor, value in tensors.items():
                key = f"{site}.{tensor}"
                if not value.is_floating_point() or len(weights) == 1:
                    out.setdefault(key, value)
                else:
                    kind = torch.promote_types(value.dtype, torch.float32)
                    out[key] = out.get(key, 0) + share * value.to(kind)
    if refused:
        lines = [f"{why}: {sites[0]} and {len(set(sites)) - 1} more" for why, sites in refused.items()]
        raise FoldError("; ".join(lines))
    return out
