"""The tensors of a backbone that a sparse mask chooses entries of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import nn

from fulgurite.methods.adapters.base import SpanSite


@dataclass(frozen=True)
class MaskedWeight:
    """A tensor of the backbone with entries that may train.

    Args:
        name: in the backbone; of a tensor that several modules share, that in the first of them.
        shape: of the tensor.
        offset: of its first entry in the concatenation of all tensors.
        owners: (site, path in the site) of all modules that have it.
    """

    name: str
    shape: tuple[int, ...]
    offset: int
    owners: tuple[tuple[int, str], ...]

    @property
    def size(self) -> int:
        """Entries."""
        return prod(self.shape)


def masked_weights(sites: Sequence[SpanSite]) -> list[MaskedWeight]:
    """The floating-point tensors that the sites own themselves, in order; one that several own is one.

    An `nn.MultiheadAttention` owns its output projection too, which it never calls.

    Raises:
        ValueError: there are none, or a site is a recurrent layer of torch.
    """
    found: dict[int, tuple[str, tuple[int, ...], list[tuple[int, str]]]] = {}
    for number, site in enumerate(sites):
        if isinstance(site.module, nn.RNNBase):
            raise ValueError(f"{site.name!r} is a {type(site.module).__name__}, which keeps its weights elsewhere")
        named = dict(site.module.named_parameters(recurse=False, remove_duplicate=False))
        if isinstance(site.module, nn.MultiheadAttention):
            named |= {f"out_proj.{name}": p for name, p in site.module.out_proj.named_parameters()}
        for path, parameter in named.items():
            if parameter.is_floating_point():
                name = f"{site.name}.{path}" if site.name else path
                entry = found.setdefault(id(parameter), (name, tuple(parameter.shape), []))
                entry[2].append((number, path))
    if not found:
        raise ValueError(f"none of {len(sites)} sites owns a parameter that could be masked")
    weights, offset = [], 0
    for name, shape, owners in found.values():
        weights.append(MaskedWeight(name, shape, offset, tuple(owners)))
        offset += prod(shape)
    return weights
