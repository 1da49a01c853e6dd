"""Building what a parsed config names, so that what a constructor refuses is told with the option that did it.

jsonargparse tries the types of a union in turn and reports all that went wrong as one outline, in which the error of a
constructor is lost. So every class of a config is built through `Building`, which knows the error, the class, its
arguments, and the config that they stand in.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from fulgurite.checkpoints import CheckpointError
from fulgurite.commands.errors import ConfigError, shorten
from fulgurite.commands.explain import place
from fulgurite.commands.invocation import Invocation

# What a constructor raises for arguments that it does not take, or for a package that is not installed.
REFUSALS = (ValueError, LookupError, ImportError, MisconfigurationException)
PLAIN = (str, int, float, bool, type(None))


class Building:
    """Instantiators for a parser, and a context in which the parser builds.

    Within the context a constructor's own error is raised in place of the parser's: a `ConfigError` with option and
    value for one of `REFUSALS`, else the error itself, with its traceback. What is built later (a callable with
    arguments, as an optimizer) is told in the same way when it is built.

    Args:
        config: the parsed config, to find where a class stands in it.
        invocation: says who set a value.
    """

    def __init__(self, config: Namespace, invocation: Invocation) -> None:
        self.config = config.as_dict()
        self.invocation = invocation
        self.failed: BaseException | None = None

    def __enter__(self) -> Building:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and self.failed is not None and error is not self.failed:
            raise self.failed from self.failed.__cause__

    def through(self, build: Callable[..., Any]) -> Callable[..., Any]:
        """An instantiator for jsonargparse that calls ``build(class, *args, **kwargs)`` and remembers what fails."""

        @functools.wraps(build)
        def instantiate(class_type: type, *args: Any, **kwargs: Any) -> Any:
            try:
                built = build(class_type, *args, **kwargs)
            except BaseException as error:
                self.failed = error
                if isinstance(error, REFUSALS) and not isinstance(error, ConfigError | CheckpointError):
                    self.failed = ConfigError(shorten(self.text(class_type, kwargs, error)))
                    raise self.failed from error
                raise
            self.failed = None
            return built

        return instantiate

    def text(self, class_type: type, kwargs: Mapping[str, Any], error: Exception) -> str:
        """``option = value (where it was set), refused by Class: the constructor's own text``."""
        said = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        said = said.strip() or type(error).__name__
        key = next(places(self.config, class_type, kwargs), class_type.__name__)
        named = mentioned(said, kwargs)
        if named is None:
            return f"{key}, refused by {class_type.__name__}: {said}"
        key = f"{key}.{named}"
        value = kwargs[named]
        shown = f" = {shorten(repr(value), 80)}" if plain(value) else ""
        return f"{key}{shown}{place(self.invocation, key)}, refused by {class_type.__name__}: {said}"


def build(class_type: type, *args: Any, **kwargs: Any) -> Any:
    """What jsonargparse does by itself."""
    return class_type(*args, **kwargs)


def places(config: object, class_type: type, kwargs: Mapping[str, Any], key: str = "") -> Iterator[str]:
    """Dotted keys, ``init_args`` left out, at which a config asks for ``class_type`` with these arguments."""
    if isinstance(config, list):
        for number, item in enumerate(config):
            yield from places(item, class_type, kwargs, f"{key}[{number}]")
    elif isinstance(config, dict):
        if "class_path" in config:
            module, _, name = str(config["class_path"]).rpartition(".")
            fits = getattr(sys.modules.get(module), name, None) is class_type
            if fits and same(config.get("init_args") or {}, kwargs):
                yield key
            config = config.get("init_args") or {}
        elif key and set(config) == set(kwargs) and same(config, kwargs):
            yield key
        for name, item in config.items():
            yield from places(item, class_type, kwargs, f"{key}.{name}".lstrip("."))


def same(written: Mapping[str, Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether plain values agree; what has been built from them cannot be compared."""
    return all(written.get(name) == value for name, value in kwargs.items() if plain(value))


def plain(value: object) -> bool:
    """Whether a value stands in a config as it is."""
    if isinstance(value, list | tuple):
        return all(map(plain, value))
    return isinstance(value, PLAIN)


def mentioned(text: str, kwargs: Mapping[str, Any]) -> str | None:
    """The argument that a message speaks of: the first one shown with its value, else the only one whose name, or
    whose value, stands there.
    """
    shown = [(m.start(), n) for n in kwargs if (m := re.search(rf"\b{re.escape(n)}\s?[=:]", text))]
    if shown:
        return min(shown)[1]
    named = [n for n in kwargs if len(n) > 2 and re.search(rf"\b{re.escape(n)}\b", text)]
    values = [
        n
        for n, v in kwargs.items()
        if isinstance(v, str | float) and v and re.search(rf"(?<!\w){re.escape(str(v))}(?!\w)", text)
    ]
    return named[0] if len(named) == 1 else values[0] if len(values) == 1 else None
