"""A configuration of mergekit (0.1.5) as data, and what its parameters are at a tensor.

    models     one slice with all layers of every model
    slices     one after the other: layers [first, end) of each of its sources
    settings   a value; a list, which is a gradient over the layers of the slice; or conditions {filter, value}, of
               which the first whose filter is a part of the tensor's name holds. A source's own come before those of
               its slice, and those before those of the configuration.

A gradient of k + 1 numbers over L layers has at layer l the value at t = l / (L - 1) of the line through its points at
0, 1/k, .. 1; t is 1 where L is 1, and 0 for tensors of no layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Settings = Mapping[str, Any]
KEYS = {
    "models",
    "slices",
    "modules",
    "merge_method",
    "base_model",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "parameters",
}
DTYPES = ("float16", "bfloat16", "float32", "float64")
SCALARS = (bool, int, float, str)


@dataclass(frozen=True)
class Input:
    """One source of an output slice: its layers from ``layers[0]`` up to ``layers[1]``, all where None."""

    model: str
    layers: tuple[int, int] | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Layers of the result that follow one another, merged from as many of each source."""

    sources: tuple[Input, ...]
    base: str | None = None
    parameters: Settings = field(default_factory=dict)

    def scopes(self, model: str | None) -> list[Settings]:
        """Where a parameter of a model (None: of the slice) may stand, what counts most first."""
        own = [source.parameters for source in self.sources if model is not None and source.model == model]
        return [*own, self.parameters]


@dataclass(frozen=True)
class Recipe:
    """What is merged, and how.

    Args:
        method: mergekit's name.
        slices: of the result; a single one with all layers of whole models where ``whole``.
        base: mergekit's ``base_model``.
        parameters: of the whole configuration, those of its one module first.
        dtype: ``out_dtype``, or else ``dtype``.
        tokenizer: model whose tokenizer the result gets; None leaves that of the base, or of the first model.
        whole: whether this is the form ``models``.
    """

    method: str
    slices: tuple[Slice, ...]
    base: str | None = None
    parameters: tuple[Settings, ...] = ()
    dtype: str | None = None
    tokenizer: str | None = None
    whole: bool = True

    @property
    def models(self) -> list[str]:
        """All models, the base first, then in order of appearance."""
        named = [self.base, *(m for s in self.slices for m in (s.base, *(i.model for i in s.sources))), self.tokenizer]
        return list(dict.fromkeys(name for name in named if name))

    def base_of(self, part: Slice) -> str | None:
        """The base of a slice."""
        return part.base if part.base is not None else self.base

    def all_settings(self) -> Iterable[tuple[str, Any]]:
        """Every parameter with its setting, wherever it stands."""
        for scope in (*self.parameters, *(s for part in self.slices for s in part_scopes(part))):
            yield from scope.items()


def part_scopes(part: Slice) -> list[Settings]:
    """All settings inside a slice."""
    return [part.parameters, *(source.parameters for source in part.sources)]


def read_recipe(value: Mapping[str, Any]) -> tuple[Recipe, list[str]]:
    """The recipe that a configuration describes, as far as it does, and all that is wrong or not supported in it."""
    problems = [f"{key}: no such option" for key in value if key not in KEYS]
    reader = _Reader(problems)
    body, extra = dict(value), []
    if "modules" in body:
        modules = body.pop("modules")
        if not isinstance(modules, Mapping) or list(modules) != ["default"] or not isinstance(modules["default"], dict):
            problems.append("modules: only one, called default, is supported; merge others file by file")
        else:
            extra = [reader.settings(modules["default"].get("parameters"), "modules.default.parameters")]
            body |= {key: part for key, part in modules["default"].items() if key in ("models", "slices")}
    forms = [key for key in ("models", "slices") if body.get(key)]
    base = reader.model(body["base_model"], "base_model") if body.get("base_model") else None
    slices: tuple[Slice, ...] = ()
    if len(forms) != 1:
        problems.append("give one of models and slices")
    elif forms == ["models"]:
        slices = reader.whole(body["models"], base)
    else:
        slices = reader.slices(body["slices"])
    method = body.get("merge_method")
    if not isinstance(method, str):
        problems.append("merge_method: missing")
    for key in ("dtype", "out_dtype"):
        if body.get(key) not in (None, *DTYPES):
            problems.append(f"{key}: {body[key]!r} is none of {', '.join(DTYPES)}")
    if body.get("chat_template") is not None:
        problems.append("chat_template: not supported; edit the tokenizer's own afterwards")
    tokenizer = reader.tokenizer(body, base)
    scopes = (*extra, reader.settings(body.get("parameters"), "parameters"))
    dtype = body.get("out_dtype") or body.get("dtype")
    recipe = Recipe(str(method), slices, base or None, scopes, dtype, tokenizer or None, forms == ["models"])
    return recipe, problems


def listed(problems: Sequence[str], what: str) -> str:
    """One message of all problems."""
    own = list(dict.fromkeys(problems))
    return "\n  ".join([f"{len(own)} thing{'s' * (len(own) > 1)} {what}:", *own])


class _Reader:
    """Parts of a configuration; what is wrong goes to ``problems``."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems

    def model(self, value: Any, at: str) -> str:
        """Path or hub name of a model."""
        given = value
        if isinstance(value, Mapping):
            more = [key for key, part in value.items() if key not in ("model", "path") and part is not None]
            self.problems += [f"{at}.{key}: not supported" for key in more]
            given = value.get("model", value.get("path"))
            if isinstance(given, Mapping):
                return self.model(given, at)
        if not isinstance(given, str) or not given:
            self.problems.append(f"{at}: {value!r} names no model")
            return ""
        if not Path(given).exists():
            name, plus, lora = given.partition("+")
            if plus:
                self.problems.append(f"{at}: the adapter {lora!r} on {name!r}; merge it into the model first")
            elif "@" in given:
                self.problems.append(f"{at}: the revision of {given!r}; name the folder of that revision")
        return given

    def settings(self, value: Any, at: str) -> Settings:
        """Parameters, each a well-formed setting."""
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            self.problems.append(f"{at}: no mapping")
            return {}
        for name, setting in value.items():
            self._check(setting, f"{at}.{name}")
        return value

    def _check(self, setting: Any, at: str) -> None:
        conditions = setting if isinstance(setting, list) else [setting]
        if all(isinstance(item, SCALARS) for item in conditions):
            return
        for item in conditions:
            good = isinstance(item, Mapping) and "value" in item and not item.keys() - {"filter", "value"}
            if not good or not isinstance(item.get("filter"), (str, type(None))):
                self.problems.append(f"{at}: {item!r} is no number, gradient or condition {{filter, value}}")
            elif isinstance(item["value"], list) and not all(isinstance(v, SCALARS) for v in item["value"]):
                self.problems.append(f"{at}: {item['value']!r} is no gradient")
            elif not isinstance(item["value"], (*SCALARS, list)):
                self.problems.append(f"{at}: {item['value']!r} is no value")

    def items(self, value: Any, at: str, keys: set[str]) -> list[tuple[str, Mapping[str, Any]]]:
        """Mappings of a list with the places where they stand; other keys are problems."""
        out = []
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            place = f"{at}[{number}]"
            if isinstance(item, Mapping):
                self.problems += [f"{place}.{key}: not supported" for key in item if key not in keys]
                out.append((place, item))
            else:
                self.problems.append(f"{place}: no mapping")
        return out

    def whole(self, value: Any, base: str | None) -> tuple[Slice, ...]:
        """The form ``models``; a base that is not among them is added."""
        sources = [
            Input(
                self.model(item.get("model"), f"{at}.model"),
                None,
                self.settings(item.get("parameters"), f"{at}.parameters"),
            )
            for at, item in self.items(value, "models", {"model", "parameters"})
        ]
        if base is not None and base not in [source.model for source in sources]:
            sources.append(Input(base))
        return (Slice(tuple(sources)),)

    def slices(self, value: Any) -> tuple[Slice, ...]:
        """The form ``slices``."""
        out = []
        for at, item in self.items(value, "slices", {"sources", "base_model", "parameters"}):
            base = self.model(item["base_model"], f"{at}.base_model") if item.get("base_model") else None
            sources = []
            for place, source in self.items(
                item.get("sources"), f"{at}.sources", {"model", "layer_range", "parameters"}
            ):
                layers = self.layers(source.get("layer_range"), f"{place}.layer_range")
                own = self.settings(source.get("parameters"), f"{place}.parameters")
                sources.append(Input(self.model(source.get("model"), f"{place}.model"), layers, own))
            counts = {s.layers[1] - s.layers[0] for s in sources if s.layers is not None}
            if len(counts) > 1:
                self.problems.append(f"{at}: its sources have {', '.join(map(str, sorted(counts)))} layers")
            out.append(Slice(tuple(sources), base, self.settings(item.get("parameters"), f"{at}.parameters")))
        return tuple(out)

    def layers(self, value: Any, at: str) -> tuple[int, int] | None:
        """First layer, and the one behind the last."""
        plain = isinstance(value, list) and len(value) == 2 and all(type(number) is int for number in value)
        if not plain or not 0 <= value[0] < value[1]:
            self.problems.append(f"{at}: {value!r} is no range [first, end)")
            return None
        return value[0], value[1]

    def tokenizer(self, body: Mapping[str, Any], base: str | None) -> str | None:
        """The model whose tokenizer is asked for."""
        source, at = body.get("tokenizer_source"), "tokenizer_source"
        if body.get("tokenizer") is not None:
            own = body["tokenizer"]
            if source is not None:
                self.problems.append("tokenizer_source and tokenizer: give one of them")
            if not isinstance(own, Mapping):
                self.problems.append("tokenizer: no mapping")
                return None
            self.problems += [f"tokenizer.{key}: not supported" for key in own if key != "source" and own[key]]
            source, at = own.get("source", "union"), "tokenizer.source"
        if source is None:
            return None
        if source == "union":
            self.problems.append(f"{at}: union is not supported; name base or a model, whose tokenizer is copied")
            return None
        if source == "base":
            return base if base is not None else self.first(body)
        return self.model(source, at)

    def first(self, body: Mapping[str, Any]) -> str | None:
        """The first model that is named."""
        for key, inner in (("models", None), ("slices", "sources")):
            for item in body.get(key) or []:
                found = item if inner is None else next(iter(item.get(inner) or [{}]), {})
                return self.model(found.get("model"), key)
        return None


def setting_at(setting: Any, name: str, t: float, kind: type) -> Any:
    """The value of a setting at a tensor; None where no condition fits, or a gradient is empty.

    Args:
        setting: see the module.
        name: of the tensor.
        t: place in the slice.
        kind: bool, int, float: what values are read as.

    Raises:
        ValueError: a value is none of that kind.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return read(setting, kind)
    if any(isinstance(item, Mapping) for item in setting):
        for item in setting:
            wanted = item.get("filter")
            if wanted in (None, "*") or wanted in name:
                return setting_at(item["value"], name, t, kind)
        return None
    values = [read(item, kind) for item in setting]
    if not values:
        return None
    place = t * (len(values) - 1)
    first = int(place)
    if kind is bool:
        return values[first]
    second = min(first + 1, len(values) - 1)
    return read((1 - (place - first)) * values[first] + (place - first) * values[second], kind)


def read(value: Any, kind: type) -> Any:
    """A value of a kind; numbers may be written as text."""
    if kind is bool:
        if value in (True, False) or (isinstance(value, str) and value.lower() in ("true", "false")):
            return value if isinstance(value, bool) else str(value).lower() in ("true", "1")
    elif not isinstance(value, bool):
        number = float(value)
        if kind is float or number == int(number):
            return kind(number)
    raise ValueError(f"{value!r} is no {kind.__name__}")
