"""States inside a module that are computed again in the backward pass instead of being kept (Chen et al., 2016).

Of a block only what goes in is kept, so that the memory of a stack of n blocks is n inputs and the inside of one block,
for one more forward pass. The numbers are the same to the bit: dropout draws again what it drew, and what the block's
adapters look up (the active set, the tasks of the samples) is what it was. Source: arXiv 1604.06174.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

T = TypeVar("T")

_OFF: contextvars.ContextVar[bool] = contextvars.ContextVar("fulgurite_no_recomputation", default=False)


def recomputed(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """What ``function`` gives, which runs once more in the backward pass; just so where there is none to come.

    It must change nothing outside of itself.
    """
    if _OFF.get() or not torch.is_grad_enabled():
        return function(*args, **kwargs)
    context = contextvars.copy_context()

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> T:
        return context.run(function, *args, **kwargs)

    # In one tuple and one dict, since states of random numbers are kept for the devices of positional arguments alone.
    return checkpoint(run, args, kwargs, use_reentrant=False)


@contextlib.contextmanager
def without_recomputation() -> Iterator[None]:
    """Keep all states of forward passes inside, for gradients by parameters that stand in for a module's own."""
    token = _OFF.set(True)
    try:
        yield
    finally:
        _OFF.reset(token)


def recompute(modules: Iterable[nn.Module]) -> None:
    """Let these modules compute their insides again, from now on. Hooks on them stay outside, those within are inside.

    Parameter names stay; copies and pickles do the same with their own.
    """
    for module in modules:
        module.forward = functools.partial(_forward, module)


def recomputes(module: nn.Module) -> bool:
    """Whether `recompute` was told of the module."""
    return getattr(module.__dict__.get("forward"), "func", None) is _forward


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return recomputed(type(module).forward, module, *args, **kwargs)
