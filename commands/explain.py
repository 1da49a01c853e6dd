"""Parser errors in one short message: key, value, expected, and the nearest valid names.

jsonargparse reports a wrong value as an outline: each level of nesting is indented further, and a union lists
the reason of every type it tried. The deepest reason is the one the user can act on; the lines that it is
indented under give its key and class.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass

from jsonargparse import ArgumentParser

from fulgurite.commands.errors import ConfigError, shorten
from fulgurite.commands.invocation import Invocation
from fulgurite.commands.names import class_table

_KEY = re.compile(r'Parser key "([^"]+)"(?: element (\d+))?')
_CLASS = re.compile(r"class_path '([\w.]+)'")
_UNKNOWN = re.compile(r"(?:Option|does not accept option) '([^']+)'(?: is not accepted)?")
_EXPECTED = re.compile(r"Expected an? (.+?)(?:\. Got value: (.*?))?(?:\. Got value: Namespace.*)?$")
_NO_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_DENIED = re.compile(r"Importing '([^']+)' is not allowed")
_NO_ATTRIBUTE = re.compile(r"module '([\w.]+)' has no attribute '(\w+)'")
_NO_MODULE = re.compile(r"No module named '([\w.]+)'")
_NOT_SUBCLASS = re.compile(r"Import path (\S+) does not correspond to a subclass of (\w+)")
_CAUSES = (_UNKNOWN, _NO_CLASS, _DENIED, _NO_ATTRIBUTE, _NO_MODULE, _NOT_SUBCLASS, _EXPECTED)
_NOISE = re.compile(r"- Expected a path but |Expected a <class 'NoneType'>|Expected a function or|Subtypes: ")
_CHOICES = re.compile(r"(?:typing\.)?Literal\[(.*)\]")
_BOUND = re.compile(r"Got value: Namespace\(class_path='([\w.]+)'")
_REQUIRED = re.compile(r"arguments are required: (.+)")
_UNRECOGNIZED = re.compile(r"unrecognized arguments: (\S+)(?: (.*))?")


@dataclass
class _Reason:
    """The deepest reason: what matched, its dotted key, and the class whose argument it is."""

    pattern: re.Pattern[str]
    match: re.Match[str]
    key: str
    class_path: str
    expected: list[str]


def explain(error: Exception, parser: ArgumentParser, invocation: Invocation) -> ConfigError:
    """The error of a parser as a ``ConfigError`` of less than 2 kB."""
    return ConfigError(shorten(_text(str(error), parser, invocation)))


def _text(raw: str, parser: ArgumentParser, invocation: Invocation) -> str:
    if match := _REQUIRED.search(raw):
        above = ".".join(key for key, _ in _KEY.findall(raw))
        names = [f"{above}.{name}".lstrip(".") for name in match[1].split(", ")]
        flags = " and ".join(f"--{name}" for name in names)
        return f"{' and '.join(names)}: required and not given; write it in a --config file or as {flags}"
    if match := _UNRECOGNIZED.search(raw):
        name = match[1].partition("=")[0].lstrip("-")
        if taken := _taken_by_a_class(name, invocation):
            return f"no option {match[1]!r}; did you mean --{taken}?"
        return f"no option {match[1]!r}{_near(name, parser.get_defaults().keys())}"
    reason = _deepest(raw)
    if reason is None:
        return raw.strip()
    first = reason.match[1]
    if reason.pattern is _UNKNOWN:
        key = f"{reason.key}.{first}".lstrip(".")
        accepted = _arguments(reason.class_path) if reason.class_path else list(parser.get_defaults().keys())
        owner = f"{reason.class_path} has no option {first!r}" if reason.class_path else f"no option {first!r}"
        return f"{key}: {owner}{_value(invocation, key)}{_near(first, accepted, listed=bool(reason.class_path))}"
    if reason.pattern is _NO_CLASS:
        if first in class_table():
            return f"{reason.key}: {first} is a class of the package, but of another kind than this option takes"
        expected = " Expected the short name of a fulgurite class, or a full class path"
        return f"{reason.key}: no class {first!r}{_near(first, _class_names())}{expected}"
    if reason.pattern is _DENIED:
        return (
            f"{reason.key}: class path {first!r} is not allowed, nothing was imported; --allow PREFIX admits "
            "a package or module (on the command line only; --help lists those admitted)"
        )
    if reason.pattern is _NO_ATTRIBUTE:
        names = [name for name in vars(importlib.import_module(first)) if not name.startswith("_")]
        return f"{reason.key}: module {first!r} has no class {reason.match[2]!r}{_near(reason.match[2], names)}"
    if reason.pattern is _NO_MODULE:
        return f"{reason.key}: no module {first!r} for class path {reason.class_path!r}"
    if reason.pattern is _NOT_SUBCLASS:
        return f"{reason.key}: {first} is no {reason.match[2]}; expected a subclass of {reason.match[2]}"
    return _wrong_value(reason, raw, invocation)


def _wrong_value(reason: _Reason, raw: str, invocation: Invocation) -> str:
    value = reason.match[2]
    if value is None:
        given = re.findall(r"Given value: (.*)", raw)
        value = min(given, key=len) if given else "something else"
    closed = [match[1] for text in reason.expected if (match := _CHOICES.fullmatch(text))]
    choices = list(dict.fromkeys(word.strip(" '") for text in closed for word in text.split(",")))
    types = [_type_name(text) for text in reason.expected if not _CHOICES.fullmatch(text)]
    expected = " or ".join([*types, f"one of {', '.join(choices)}"] if choices else types)
    near = _near(value, choices)
    owner = f" of {reason.class_path}" if reason.class_path else ""
    got = f"{shorten(value, 300)!r}{place(invocation, reason.key)}"
    return f"{reason.key}{owner}: expected {expected}, got {got}{near}"


def _deepest(raw: str) -> _Reason | None:
    lines = [line for line in raw.splitlines() if line.strip()]
    found: tuple[int, int, re.Pattern[str], re.Match[str]] | None = None
    for number, line in enumerate(lines):
        if _NOISE.search(line):
            continue
        for pattern in _CAUSES:
            match = pattern.search(line)
            if match and (found is None or _indent(line) > found[0]):
                found = (_indent(line), number, pattern, match)
            if match:
                break
    if found is None:
        return None
    depth, number, pattern, match = found
    above, limit = [lines[number]], depth
    for line in reversed(lines[:number]):
        if _indent(line) < limit or (_indent(line) == 0 and limit == 0):
            above.insert(0, line)
            limit = _indent(line)
    # Keys come before the class that owns the next key; a key after the last class names the argument itself.
    keys = [key + (f"[{int(element) - 1}]" if element else "") for key, element in _KEY.findall("\n".join(above))]
    classes = _CLASS.findall("\n".join(above))
    classes += _BOUND.findall(lines[number])
    siblings = [line for line in lines[number:] if _indent(line) == depth and not _NOISE.search(line)]
    expected = [inner[1] for line in siblings if (inner := _EXPECTED.search(line)) and pattern is _EXPECTED]
    return _Reason(pattern, match, ".".join(keys), classes[-1] if classes else "", expected)


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" -"))


def _class_names() -> set[str]:
    """Names that resolve without a path: the package's classes, and the usual ones of Lightning and torch."""
    import torch
    from lightning.pytorch import callbacks, loggers, profilers, strategies

    foreign = (callbacks, loggers, profilers, strategies, torch.optim)
    return {*class_table(), *(name for module in foreign for name in vars(module) if name[0].isupper())}


def _arguments(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(module), name))
    return [name for name in signature.parameters if name not in ("args", "kwargs")]


def _taken_by_a_class(name: str, invocation: Invocation) -> str | None:
    """The option ``pruner.sparsity`` where ``name`` is ``sparsity`` and ``--pruner Wanda`` was given."""
    for word, following in zip(invocation.typed, (*invocation.typed[1:], "")):
        option, equals, value = word.partition("=")
        value = value if equals else following
        for module in class_table().get(value, []) if option.startswith("--") else []:
            if name in _arguments(f"{module}.{value}"):
                return f"{option.lstrip('-')}.{name}"
    return None


def _type_name(text: str) -> str:
    return re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", text)


def _near(name: str, accepted: Iterable[str], listed: bool = False) -> str:
    accepted = sorted(set(accepted))
    near = difflib.get_close_matches(name, accepted, n=3, cutoff=0.6)
    leaf = name.rpartition(".")[2]
    near = near or difflib.get_close_matches(leaf, accepted, n=3, cutoff=0.6)
    text = f"; did you mean {' or '.join(near)}?" if near else ""
    return text + (f" It accepts: {shorten(', '.join(accepted), 600)}" if listed else "")


def place(invocation: Invocation, key: str) -> str:
    """Where an option was written, as " (command line)"; nothing if it was not found."""
    leaf, flag = key.rpartition(".")[2], "--" + re.sub(r"\[\d+\]", "", key) + "."
    for argument in invocation.typed:
        name = argument.partition("=")[0].removesuffix("+")
        if name.startswith("--") and (name.rpartition(".")[2] == leaf or flag.startswith(f"{name}.")):
            return " (command line)"
    for path, document in reversed(list(zip(invocation.configs, invocation.documents))):
        if any(True for _ in _values_under(document, leaf)):
            return f" ({path})"
    return ""


def _value(invocation: Invocation, key: str) -> str:
    """The value of an option that is not accepted and where it was written, as " = '3' (command line)"."""
    leaf = key.rpartition(".")[2]
    for argument, following in zip(invocation.typed, (*invocation.typed[1:], "")):
        name, equals, value = argument.partition("=")
        if name.startswith("--") and name.rpartition(".")[2] == leaf:
            return f" = {shorten(value if equals else following, 80)!r} (command line)"
    for path, document in reversed(list(zip(invocation.configs, invocation.documents))):
        for value in _values_under(document, leaf):
            return f" = {shorten(str(value), 80)!r} ({path})"
    return ""


def _values_under(value: object, leaf: str) -> Iterable[object]:
    if isinstance(value, dict):
        for name, item in value.items():
            if name == leaf or str(name).endswith(f".{leaf}"):
                yield item
            yield from _values_under(item, leaf)
    elif isinstance(value, list):
        for item in value:
            yield from _values_under(item, leaf)
