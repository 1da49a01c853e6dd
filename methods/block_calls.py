"""What the blocks of a model are given in one forward pass, so that each can be run again by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Enough(Exception):
    """The last block that matters has been reached."""


class _Hidden:
    """Stands in a block's arguments where the hidden states go."""


HIDDEN = _Hidden()


@dataclass
class BlockCall:
    """The arguments of one block for one batch.

    Args:
        args: by position, `HIDDEN` among them or among ``kwargs``.
        kwargs: by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, module: nn.Module, hidden: Tensor, device: torch.device) -> Any:
        """The block's output with these hidden states, on ``device``."""

        def at_home(value: Any) -> Any:
            return hidden if value is HIDDEN else mapped(value, lambda tensor: tensor.to(device, non_blocking=True))

        return module(*map(at_home, self.args), **{name: at_home(value) for name, value in self.kwargs.items()})

    def shapes(self, hidden: Tensor) -> tuple[tuple[int, ...], ...]:
        """Of the hidden states and of all tensors among the other arguments."""
        found = [tuple(hidden.shape)]

        def note(tensor: Tensor) -> Tensor:
            found.append(tuple(tensor.shape))
            return tensor

        for value in (*self.args, *self.kwargs.values()):
            if value is not HIDDEN:
                mapped(value, note)
        return tuple(found)


def catch_calls(
    modules: Mapping[str, nn.Module], run: Callable[[], Any], storage: torch.device, whole_pass: bool = False
) -> tuple[Tensor, list[BlockCall]]:
    """Input of the first block in one forward pass, and the other arguments of it and of those that it leads to.

    A block leads to the next one where that takes exactly what it gives, untouched, and nothing that an earlier one
    gave.

    Args:
        modules: blocks by name, in the order of the data.
        run: the pass, in which each is called once at most.
        storage: where what is caught is kept.
        whole_pass: go on to the end, since all ranks gather the weights of every block together.

    Raises:
        ValueError: a block is not reached, is called twice or before the first, or its hidden states cannot be told.
    """
    names = list(modules)
    calls: list[BlockCall] = []
    first: list[Tensor] = []
    outputs: list[Tensor] = []
    written: list[int] = []  # how often, by then
    memo: dict[int, tuple[Tensor, Tensor]] = {}
    ended = False

    def enough() -> None:
        nonlocal ended
        ended = True
        if not whole_pass:
            raise Enough

    def stored(tensor: Tensor) -> Tensor:
        # The same mask goes into every block, and is kept once.
        if id(tensor) not in memo:
            memo[id(tensor)] = (tensor, tensor.detach().to(storage))
        return memo[id(tensor)][1]

    def before(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if ended:
            return
        if number < len(calls):
            raise ValueError(f"{names[number]} is called more than once by a batch, so it has no one input")
        if number and not calls:
            raise ValueError(f"{names[number]} is called before {names[0]}: blocks must be named in their order")
        expected = outputs[-1] if number else first_tensor(args, kwargs)
        values = (*args, *kwargs.values())
        hits = sum(value is expected for value in values)
        if number:
            beside = any(value is each for value in values if value is not expected for each in outputs)
            if number != len(calls) or hits != 1 or beside or expected._version != written[-1]:
                enough()
                return
        else:
            if expected is None or hits != 1:
                raise ValueError(f"{names[0]} is given its hidden states {hits} times, expected once")
            first.append(expected.detach().to(storage, copy=True))
        calls.append(
            BlockCall(
                tuple(packed(value, expected, stored, names[number]) for value in args),
                {name: packed(value, expected, stored, names[number]) for name, value in kwargs.items()},
            )
        )

    def after(number: int, output: Any) -> None:
        if ended:
            return
        outputs.append(hidden_of(output, names[number]))
        written.append(outputs[-1]._version)
        if number == len(names) - 1:
            enough()

    hooks = []
    for number, module in enumerate(modules.values()):
        hooks.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs, number=number: before(number, args, kwargs), with_kwargs=True
            )
        )
        hooks.append(module.register_forward_hook(lambda *given, number=number: after(number, given[-1])))
    try:
        with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode do not count their writes
            run()
    except Enough:
        pass
    finally:
        for hook in hooks:
            hook.remove()
    if not ended:
        raise ValueError(f"{names[len(calls)]} is not reached by a forward pass")
    return first[0], calls


def hidden_of(output: Any, name: str) -> Tensor:
    """The hidden states in a block's output: itself, or its first entry.

    Raises:
        ValueError: there is no tensor.
    """
    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, Tensor):
        raise ValueError(f"{name} gives {type(output).__name__}, in which no hidden states can be found")
    return hidden


def first_tensor(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The first floating-point tensor among the arguments."""
    values = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
    return next((value for value in values if value.is_floating_point()), None)


def packed(value: Any, hidden: Tensor, stored: Callable[[Tensor], Tensor], name: str) -> Any:
    """An argument to keep: `HIDDEN` for the hidden states, stored copies of tensors.

    Raises:
        ValueError: a cache of keys and values, which a second pass would fill again.
    """
    if value is hidden:
        return HIDDEN
    if type(value).__name__.endswith("Cache"):
        raise ValueError(f"{name} is given a {type(value).__name__}: run the model without a cache (use_cache=False)")
    return mapped(value, stored)


def mapped(value: Any, of: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with ``of`` applied to every tensor in its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return of(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(item, of) for item in value)
    if type(value) is dict:
        return {key: mapped(item, of) for key, item in value.items()}
    return value
