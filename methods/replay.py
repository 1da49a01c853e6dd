"""Parts of a model that give again what they gave before, where they are asked again what they were asked before.

    replay = Replay({name: model.get_submodule(name) for name in blocks})
    with replay.recording():
        model(batch)
    with replay.without(["layers.7"]):     # its weights have been changed
        model(batch)                       # only it runs, and whatever then sees other inputs than before

The model's own forward runs, so it need not be known how the parts hang together: what lies before a changed part is
asked the same again, and so is a tower that runs beside it. A part whose arguments are equal, entry by entry, is not
computed; the first of a run of them is compared, and the rest are handed the very tensors of the record.

Memory: the inputs and outputs of all parts, where the output of one that is the input of the next counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class _Reached(Exception):
    """The part that matters has run."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


@dataclass(frozen=True)
class Asked:
    """One call of a part.

    Args:
        arguments: (by position, by name).
        output: what it gave.
        versions: how often each tensor of the two had been written to, by then.
    """

    arguments: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any
    versions: tuple[int, ...]

    @classmethod
    def of(cls, arguments: tuple[tuple[Any, ...], dict[str, Any]], output: Any) -> Asked:
        """A call that has just been made."""
        return cls(arguments, output, versions_of((arguments, output)))

    def holds(self) -> bool:
        """Whether nobody has written to a tensor since."""
        return self.versions == versions_of((self.arguments, self.output))


class Replay:
    """See the module. No gradients: what is recorded is detached from how it came about.

    Args:
        parts: name -> module whose output depends on its arguments and weights alone (no dropout, no cache of keys
            and values).
    """

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self.parts = dict(parts)
        self.asked: dict[str, list[Asked]] = {}

    @contextmanager
    def recording(self, names: Collection[str] | None = None) -> Iterator[None]:
        """Record these parts (all where None), and replay no other; what was known of them is forgotten."""
        names = list(self.parts) if names is None else names
        for name in names:
            self.asked[name] = []

        def record(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                refuse_caches(name, (args, kwargs))
                output = forward(*args, **kwargs)
                self.asked[name].append(Asked.of((args, kwargs), output))
                return output

            return run

        with patched({name: self.parts[name] for name in names}, record), torch.no_grad():
            yield

    @contextmanager
    def without(self, changed: Collection[str], ahead: Mapping[str, Asked] | None = None) -> Iterator[None]:
        """Replay all recorded parts but these.

        Args:
            changed: names of parts.
            ahead: name -> the call that is expected of a part, perhaps a changed one, in the place of the record.
        """
        ahead = ahead or {}
        expected = {name: asked for name, asked in self.asked.items() if name not in changed}
        expected.update({name: [call] for name, call in ahead.items()})

        def replay(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            places = iter(expected[name])

            def run(*args: Any, **kwargs: Any) -> Any:
                known = next(places, None)
                if known is not None and known.holds() and same((args, kwargs), known.arguments):
                    return known.output
                return forward(*args, **kwargs)

            return run

        with patched({name: self.parts[name] for name in expected}, replay), torch.no_grad():
            yield

    def output_of(self, name: str, run: Callable[[], Any]) -> Any:
        """What a part gives for the first time in ``run``, which goes no further.

        Raises:
            ValueError: it is not reached.
        """

        def stop(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
            def last(*args: Any, **kwargs: Any) -> Any:
                raise _Reached(forward(*args, **kwargs))

            return last

        try:
            with patched({name: self.parts[name]}, stop):
                run()
        except _Reached as reached:
            return reached.output
        raise ValueError(f"{name} is not reached")

    def forget(self, names: Collection[str]) -> None:
        """Free what is known of these parts."""
        for name in names:
            self.asked.pop(name, None)


@contextmanager
def patched(
    modules: Mapping[str, nn.Module], wrap: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Put ``wrap(name, forward)`` in the place of every module's forward while inside; hooks run as ever."""
    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.forward = wrap(name, module.forward)
        yield
    finally:
        for name, module in modules.items():
            if before[name] is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = before[name]


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors in a tree of tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_of(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_of(item)


def versions_of(value: Any) -> tuple[int, ...]:
    """How often each tensor of a tree has been written to."""
    return tuple(tensor._version for tensor in tensors_of(value))


def same(one: Any, other: Any) -> bool:
    """Whether two trees hold equal tensors, bit for bit but for the sign of 0, and equal plain values."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        alike = one.shape == other.shape and one.dtype == other.dtype and one.device == other.device
        return alike and torch.equal(one, other)
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, bool | int | float | str) and one == other


def refuse_caches(name: str, value: Any) -> None:
    """Raise ValueError for a cache of keys and values among arguments: its content changes between two calls."""
    values = (*value[0], *value[1].values())
    for each in values:
        if type(each).__name__.endswith("Cache"):
            raise ValueError(
                f"{name} is given a {type(each).__name__}: compute the loss without a cache (use_cache=False)"
            )
