"""Activations that backward makes again from what autograd keeps anyway, so that they need not be kept too.

The gradient of an adapter's first matrix needs the layer's input x. Where x left a function whose own backward keeps
its arguments, such as GELU, x is that function of tensors that are in memory already, and is made again, bit for bit.

What autograd has kept is asked by names that torch does not document. Where they are missing, x itself is kept, which
costs memory and changes no value.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

Recipe = tuple[Callable[..., Tensor], tuple[Tensor, ...]]

# Node of autograd -> the arguments that it keeps, and the function that gives its output from them.
_NODES: dict[str, tuple[tuple[str, ...], Callable[[Any], Callable[..., Tensor]]]] = {
    "GeluBackward0": (("self",), lambda node: partial(F.gelu, approximate=node._saved_approximate)),
    "SiluBackward0": (("self",), lambda node: F.silu),
    "MulBackward0": (("self", "other"), lambda node: torch.mul),  # keeps both where both have gradients
}


def recipe_of(x: Tensor) -> Recipe:
    """A function and the tensors from which it makes ``x`` in backward; ``x`` itself where no others are kept.

    Of parameters nothing is made: a strategy may free or change them before backward.
    """
    return _from_arguments(x) or (_itself, (x,))


def _from_arguments(x: Tensor) -> Recipe | None:
    node = x.grad_fn
    name = None if node is None else node.name()
    if name not in _NODES or type(x) is not Tensor or x._version or _is_watched():
        return None
    arguments, function_of = _NODES[name]
    # A hook of the graph that made x, as of activation checkpointing, would run to give the tensor back.
    kept = [getattr(node, f"_raw_saved_{argument}", None) for argument in arguments]
    if any(getattr(each, "unpack_hook", _itself) is not None for each in kept):
        return None
    try:
        sources = tuple(getattr(node, f"_saved_{argument}") for argument in arguments)
        function = function_of(node)
    except (AttributeError, RuntimeError):  # freed by an earlier backward, or changed in place since
        return None
    return (function, sources) if all(map(_is_activation, sources)) else None


def _is_activation(source: Tensor | None) -> bool:
    """Whether it was computed, rather than being a leaf, a view of one, or not kept."""
    if source is None or source.grad_fn is None:
        return False
    return source._base is None or source._base.grad_fn is not None


def _is_watched() -> bool:
    """Whether hooks act on what is being saved, or a transform of `torch.func` runs, under which graphs are nested."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    transforms = getattr(torch._C, "_are_functorch_transforms_active", None)
    return hooks is None or transforms is None or hooks(False) is not None or transforms()


def _itself(x: Tensor) -> Tensor:
    return x
