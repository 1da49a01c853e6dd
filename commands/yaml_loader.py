"""Strict YAML: what a config may hold, checked on the parser's events before anything is built.

Refused, each with file and line: duplicate keys, tags other than the plain ones, aliases that expand to more
than ``MAX_NODES`` nodes, nesting deeper than ``MAX_DEPTH``, files over ``MAX_BYTES``, a byte order mark, NUL
and other control characters, tabs as indentation, numbers too large for a float, and ``.nan``. ``1e-3`` is a
float (YAML 1.2), dates stay text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import yaml

from fulgurite.commands.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_NODES = 50_000

_PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}
_NUMBER = re.compile(
    r"""^(?: [-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
         | [-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
         | [-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
         | [-+]?\.(?:inf|Inf|INF)
         | \.(?:nan|NaN|NAN) )$""",
    re.X,
)


_CORE = {
    "float": (_NUMBER, "-+0123456789."),
    "int": (re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+)$"), "-+0123456789"),
    "bool": (re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), "tTfF"),
    "null": (re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    "merge": (re.compile(r"^(?:<<)$"), "<"),
}


class _Loader(yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader):
    """The safe loader with the scalars of YAML 1.2: `off`, `010`, `1:30` and dates are text."""

    yaml_implicit_resolvers: ClassVar[dict] = {}


for _name, (_pattern, _letters) in _CORE.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, list(_letters))


@dataclass
class _Open:
    """A collection whose end has not come yet."""

    anchor: str | None
    mapping: bool
    nodes: int = 1
    children: int = 0
    keys: dict[str, int] = field(default_factory=dict)


def load_text(text: str, path: str = "") -> object:
    """The value that a YAML text stands for.

    Args:
        text: the whole document, at most ``MAX_BYTES``.
        path: name for error messages; empty for a value of the command line.

    Raises:
        ConfigError: the text is not the plain YAML described in the module's docstring.
    """
    where = path or "value"
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{where}: {len(text):,} characters; a config has at most {MAX_BYTES:,}")
    try:
        _check(text, where)
        value = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        spot = text.splitlines()[mark.line : mark.line + 1] if mark else []
        hint = "; indent with spaces, not tabs" if any("\t" in found for found in spot) else ""
        raise ConfigError(f"{where}{line}: {error.problem or 'not valid YAML'}{hint}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: {str(error).splitlines()[0][:200]}") from error
    except RecursionError as error:
        raise ConfigError(f"{where}: a value contains itself") from error
    if not path and isinstance(value, dict) and all(item is None for item in value.values()):
        return text  # `{a}` and `a:` on the command line are words, not mappings
    return value


def load_file(path: Path) -> dict:
    """The mapping in a config file. Raises ``ConfigError`` with the file's name for anything else."""
    try:
        size = path.stat().st_size
        raw = path.read_bytes() if size <= MAX_BYTES and path.is_file() else b""
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    if not path.is_file():
        raise ConfigError(f"--config {path}: not a file")
    if size > MAX_BYTES:
        raise ConfigError(f"--config {path}: {size:,} bytes; a config has at most {MAX_BYTES:,}")
    if raw.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError(f"{path}: starts with a byte order mark; save the file as UTF-8 without one")
    if b"\x00" in raw:
        line = raw[: raw.index(b"\x00")].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line}: holds a NUL byte; save the file as UTF-8 text")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line}: not UTF-8; save the file as UTF-8") from error
    value = load_text(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: holds a {type(value).__name__}; a config is a mapping of option to value")
    return value


def _check(text: str, where: str) -> None:
    """Walk the parser's events once; nothing is built, aliases are counted by what they would expand to."""
    stack: list[_Open] = []
    anchored: dict[str, int] = {}
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.CollectionEndEvent):
            done = stack.pop()
            _count(done.nodes, done.anchor, stack, anchored, where, event)
            continue
        if not isinstance(event, yaml.NodeEvent):
            continue
        at = f"{where}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchored:
                raise ConfigError(f"{at}: *{event.anchor[:80]} refers to nothing that ends before it")
            _count(anchored[event.anchor], None, stack, anchored, where, event)
            continue
        if event.tag is not None and event.tag not in _PLAIN_TAGS:
            raise ConfigError(f"{at}: tag {event.tag[:80]!r} is not accepted; write class_path and init_args")
        if isinstance(event, yaml.ScalarEvent):
            _check_scalar(event, stack[-1] if stack else None, at)
            _count(1, event.anchor, stack, anchored, where, event)
            continue
        if len(stack) >= MAX_DEPTH:
            raise ConfigError(f"{at}: nested deeper than {MAX_DEPTH} levels")
        stack.append(_Open(event.anchor, isinstance(event, yaml.MappingStartEvent)))


def _check_scalar(event: yaml.ScalarEvent, parent: _Open | None, at: str) -> None:
    is_key = parent is not None and parent.mapping and parent.children % 2 == 0
    if is_key and event.value != "<<":
        if event.value in parent.keys:
            first = parent.keys[event.value]
            raise ConfigError(f"{at}: key {event.value[:80]!r} appears twice in one mapping, first in line {first}")
        parent.keys[event.value] = event.start_mark.line + 1
    if event.implicit[0] and _NUMBER.match(event.value):
        digits = event.value.replace("_", "").lower()
        if "nan" in digits:
            raise ConfigError(f"{at}: {event.value} is not a usable number")
        if "inf" not in digits and math.isinf(float(digits)):
            raise ConfigError(f"{at}: {event.value[:80]} is too large for a float")


def _count(
    nodes: int,
    anchor: str | None,
    stack: list[_Open],
    anchored: dict[str, int],
    where: str,
    event: yaml.Event,
) -> None:
    if anchor is not None:
        anchored[anchor] = nodes
    if not stack:
        total = nodes
    else:
        stack[-1].children += 1
        stack[-1].nodes += nodes
        total = stack[-1].nodes
    if total > MAX_NODES:
        line = event.start_mark.line + 1
        raise ConfigError(f"{where}, line {line}: aliases and values add up to more than {MAX_NODES:,} values")
