"""Adapters folded into the weights that they stand beside, where the result is exact.

Kinds that change what a layer computes with (LoRA, replaced modules, changed weights) give the tensors that do the same
without them, `Adapter.folded`. Several sets mixed by weights p that sum to 1 are folded alike, since for these kinds

    sum_i p_i (W + change_i) = W + sum_i p_i change_i.

Where several adapters meet at a site, each is folded into what came of those before it.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.bank import AdapterBank
from fulgurite.methods.adapters.base import Adapter, FoldError
from fulgurite.methods.adapters.places import Place
from fulgurite.methods.adapters.replace import bare_copy


@torch.no_grad()
def fold(bank: AdapterBank, model: nn.Module, weights: Mapping[str, float], sites: Container[str]) -> dict[str, Tensor]:
    """Tensors of ``model`` that replace its own, by name, with a mixture of sets folded in; nothing is changed.

    Args:
        bank: attached to ``model``.
        model: the frozen model.
        weights: set to its weight; they sum to 1.
        sites: names of the adapters to fold, among ``bank.sites``; the others are left out.

    Raises:
        FoldError: a kind has no exact form as weights, or a mixture of sets is not one. All sites are listed.
        LookupError: there is no set of that name.
        ValueError: the weights do not sum to 1.
    """
    if not weights or not math.isclose(sum(weights.values()), 1, abs_tol=1e-6):
        raise ValueError(f"weights of sets must sum to 1 to be folded; these are {dict(weights)}")
    out: dict[str, Tensor] = {}
    refused: dict[str, list[str]] = {}
    chosen = {name: bank.adapters_of(name) for name in weights}
    done: set[str] = set()
    for place in bank.places:
        if place.label not in sites:
            continue
        site = model.get_submodule(place.name)
        module = _with_tensors(site, place.name, out) if place.name in done else site
        done.add(place.name)
        try:
            tensors = _mixed({chosen[name][place.label]: share for name, share in weights.items()}, place, module)
        except FoldError as error:
            refused.setdefault(str(error), []).append(place.name)
            continue
        prefix = f"{place.name}." if place.name else ""  # the model itself may be a site
        out |= {prefix + tensor: value for tensor, value in tensors.items()}
    if refused:
        lines = [f"{why}: {sites[0]} and {len(set(sites)) - 1} more" for why, sites in refused.items()]
        raise FoldError("; ".join(lines))
    return out


def _mixed(shares: Mapping[Adapter, float], place: Place, module: nn.Module) -> dict[str, Tensor]:
    """Tensors of ``module`` with which it computes what the adapters' weighted average does at it."""
    mixed: dict[str, Tensor] = {}
    for adapter, share in shares.items():
        if len(shares) > 1 and not adapter.mixes:
            raise FoldError(f"{adapter.title} defines no mixing")
        folded = adapter.folded(module) if place.index is None else adapter.folded_at(place.index, module)
        for tensor, value in folded.items():
            if not value.is_floating_point() or len(shares) == 1:
                mixed.setdefault(tensor, value)
            else:
                mixed[tensor] = mixed.get(tensor, 0) + share * value.to(torch.promote_types(value.dtype, torch.float32))
    return mixed


def _with_tensors(site: nn.Module, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the module ``name`` with what was folded into it so far."""
    module = bare_copy(site)
    for key, value in tensors.items():
        inner = key.removeprefix(f"{name}.")
        if inner != key:
            owner, _, tensor = inner.rpartition(".")
            owner = module.get_submodule(owner)
            (owner._buffers if tensor in owner._buffers else owner._parameters)[tensor] = value
    return module
