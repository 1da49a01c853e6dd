"""How a side block of a ladder is built from a library's own block, and called beside it.

Masks and caches are those of the backbone block's call, unless the side stream is longer: it has the pictures that
the backbone does not see. A decoder's side keys and values lie in the library's own cache, behind the backbone's
layers, so that beams and incremental decoding need nothing more.

Legend: B batch, S positions of the side stream, M positions of the encoder's side states, D width, r reduction.
"""

from __future__ import annotations

import copy
import functools
import inspect
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.ladder_selection import Norm, Part
from fulgurite.methods.adapters.ladder_stack import SideCall

CACHES = ("cache", "past_key_values")  # what the library calls the argument


class ConfiguredBlocks(ABC):
    """Blocks of transformers that are built from a configuration.

    Args:
        block: a backbone block.
        config: of the model that it is from.
        shrunk: names of the configuration's sizes that are divided, the width first.
        heads: how many share the width between them, where the configuration gives them no size of their own.
    """

    dropout = 0.0

    def __init__(self, block: nn.Module, config: Any, shrunk: tuple[str, ...], heads: int = 1) -> None:
        self.kind, self.config, self.shrunk, self.heads = type(block), copy.deepcopy(config), shrunk, heads
        self.width = getattr(config, shrunk[0])
        self.parts = self.parts_of(block)

    @abstractmethod
    def parts_of(self, block: nn.Module) -> list[Part]:
        """The layers of a block in the order of the data."""

    def small(self, reduction: int) -> Any:
        """The configuration with the sizes divided.

        Raises:
            ValueError: one of them is no multiple of the reduction, or heads do not share the new width.
        """
        config = copy.deepcopy(self.config)
        divided(f"{self.shrunk[0]} / {self.heads} heads", self.width // self.heads, reduction)
        for name in self.shrunk:
            setattr(config, name, divided(name, getattr(config, name), reduction))
        return config

    def make(self, number: int, cache_index: int, reduction: int, first: bool) -> nn.Module:
        """As `SideBlocks.make`."""
        side = self.kind(self.small(reduction), layer_idx=number)
        for module in side.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = cache_index
        return side

    def norm(self, reduction: int) -> nn.Module:
        """None: the block ends with one."""
        return nn.Identity()

    def run(self, side: nn.Module, state: Tensor, call: SideCall) -> Tensor:
        """As `SideBlocks.run`."""
        given = arguments(self.kind, call)
        given["hidden_states"] = state
        if call.mask is not None:
            given["attention_mask"] = additive(call.mask[:, None, None], state.dtype)
        cover(given, [m.layer_idx for m in side.modules() if hasattr(m, "layer_idx")][:1])
        return first_of(side(**given))


def divided(name: str, size: int, reduction: int) -> int:
    """``size / reduction``. Raises `ValueError` where that is no whole number."""
    if size % reduction:
        raise ValueError(f"{name}={size} is no multiple of reduction={reduction}")
    return size // reduction


def whole_norm(name: str) -> Norm:
    """A norm with a weight and perhaps a bias."""
    return Norm((f"{name}.weight", f"{name}.bias"))


def first_of(output: Any) -> Tensor:
    """A block's hidden states."""
    return output[0] if isinstance(output, tuple) else output


@functools.cache
def _signature(kind: type[nn.Module]) -> inspect.Signature:
    return inspect.signature(kind.forward)


def arguments(kind: type[nn.Module], call: SideCall) -> dict[str, Any]:
    """All arguments of the backbone block's call, by name."""
    bound = _signature(kind).bind(None, *call.args, **call.kwargs).arguments
    named = {name: value for name, value in list(bound.items())[1:] if name != "kwargs"}
    return {**named, **bound.get("kwargs", {})}


def with_memory(call: SideCall, kind: type[nn.Module], dtype: torch.dtype) -> SideCall:
    """``call`` where the encoder's side states take the place of its states."""
    given = arguments(kind, call)
    given["encoder_hidden_states"] = call.memory
    if call.memory_mask is not None:
        given["encoder_attention_mask"] = additive(call.memory_mask[:, None, None], dtype)
    return replace(call, args=(), kwargs=given)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Zero where ``mask`` is true, the lowest number elsewhere; a mask of floats is one already."""
    if mask.dtype != torch.bool and mask.is_floating_point():
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask.bool(), torch.finfo(dtype).min)


def cache_of(given: dict[str, Any]) -> Any:
    """The library's cache among the arguments of a block; None where there is none."""
    return next((given[name] for name in CACHES if given.get(name) is not None), None)


def cover(given: dict[str, Any], indices: list[int]) -> None:
    """Let the cache among the arguments have layers up to the indices.

    Raises:
        ValueError: its layers are of a kind that cannot be added to.
    """
    cache = cache_of(given)
    if cache is None or not indices:
        return
    for each in (getattr(cache, f"{name}_attention_cache", None) for name in ("self", "cross")):
        _cover(each, max(indices))
    if not hasattr(cache, "self_attention_cache"):
        _cover(cache, max(indices))


def _cover(cache: Any, index: int) -> None:
    if cache is None or cache.layer_class_to_replicate is not None:
        return  # it adds layers by itself
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    while len(cache.layers) <= index:
        like = cache.layers[0]
        if type(like) is DynamicLayer:
            cache.layers.append(DynamicLayer())
        elif type(like) is DynamicSlidingWindowLayer:
            cache.layers.append(DynamicSlidingWindowLayer(sliding_window=like.sliding_window))
        else:
            raise ValueError(f"a ladder decodes with a dynamic cache; this one has layers of {type(like).__name__}")
