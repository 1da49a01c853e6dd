"""Merges that a configuration of mergekit describes: slices of layers, and parameters tensor by tensor.

Every output slice is a merge of its own: views of its sources under the names that their tensors have in the result.
Their plans, one after the other, are the plan of the whole, and a merger for each tensor has the parameters there.
Results are those of mergekit 0.1.5 but for random masks, arithmetic (here in float32, whatever the models' type) and
the quartiles of large tensors under arcee_fusion, which are exact here.

NOTE: ties and della divide by the sum of |w| of the models that agree, not of w, which can be 0 where one is negative.

What stands before the layers (embeddings) is that of the first slice, what stands behind them that of the last.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch

from fulgurite.methods.merging.base import Merger
from fulgurite.methods.merging.by_name import by_name
from fulgurite.methods.merging.layerwise import LAYER
from fulgurite.methods.merging.mergekit_methods import KNOWN, REQUIRED, Method, Parameter, method
from fulgurite.methods.merging.mergekit_recipe import Recipe, Slice, listed, setting_at
from fulgurite.methods.merging.plan import Plan, StateDict, plan_of

# Tensors before the first layer, by their names in the architectures that mergekit knows.
BEFORE = re.compile(r"(^|\.)(embed(?!_out)|\w*embeddings?\b|wte|wpe|embd|shared\b|rotary|relative_pe|patch_|ln_pre)")
Names = dict[str, str]


@dataclass(frozen=True)
class Placed:
    """One slice as it lies in the result.

    Args:
        part: the slice.
        models: its sources, in the order in which they are merged.
        names: for each, name in the result -> name in that model.
        places: name in the result -> t.
    """

    part: Slice
    models: list[str]
    names: list[Names]
    places: dict[str, float]


def check(recipe: Recipe) -> tuple[list[str], list[str]]:
    """What is wrong with a recipe, as far as its models do not matter, and remarks on what has no effect."""
    try:
        methods = methods_of(recipe)
    except LookupError as error:
        return [str(error)], []
    problems = []
    for number, (part, own) in enumerate(zip(recipe.slices, methods)):
        models = [source.model for source in part.sources if source.model]
        at = "models" if recipe.whole else f"slices[{number}]"
        problems += [f"{at}: {text} ({recipe.method})" for text in own.problems(models, recipe.base_of(part))]
    given = dict.fromkeys(name for name, _ in recipe.all_settings())
    used = methods[0].parameters if methods else {}
    problems += [f"{name}: no method of mergekit has this parameter" for name in given if name not in KNOWN]
    return problems, [
        f"{name} has no effect on {recipe.method}" for name in given if name in KNOWN and name not in used
    ]


def methods_of(recipe: Recipe) -> list[Method]:
    """The method as each slice needs it.

    Raises:
        LookupError: there is none of that name.
    """
    return [method(recipe.method, recipe.base_of(part) is not None) for part in recipe.slices]


def planned(
    recipe: Recipe, models: Mapping[str, StateDict], labels: Mapping[str, str]
) -> tuple[Plan, Merger, list[float], list[int] | None]:
    """The plan, the merger, by expert whether it has a weight (1 or 0), and the first source's layer of each layer.

    Args:
        recipe: checked.
        models: name -> tensors, of all models of the recipe that are merged.
        labels: name -> what to call the model in an error.

    Raises:
        ValueError: the models do not fit together, or parameters are missing or wrong. Lists all.
    """
    methods = methods_of(recipe)
    order = [name for name in recipe.models if name in models]
    placed, layers = placements(recipe, methods, models)
    plans, chosen, problems = [], {}, []
    for part, own in zip(placed, methods):
        views = [{new: models[m][old] for new, old in names.items()} for m, names in zip(part.models, part.names)]
        has_base = takes_base(own, recipe.base_of(part.part))
        shown = [labels[model] for model in part.models]
        plan = plan_of(views[has_base:], views[0] if has_base else None, None, shown)
        chooser = _Chooser(recipe, own, part, problems)
        chosen |= {name: chooser.choose(name, has_base) for name in plan.merged}
        plans.append(plan)
    if problems:
        raise ValueError(listed(problems, f"in the parameters of {recipe.method} are wrong or not supported"))
    owners = [[order.index(model) for model in part.models] for part in placed]
    plan = joined(plans, owners, [labels[model] for model in order])
    active = {n for name, (_, own) in chosen.items() for n, w in zip(plan.owners[name][plan.has_base :], own) if w != 0}
    return plan, by_name(chosen), [float(n in active) for n in range(plan.has_base, len(order))], layers


def takes_base(own: Method, base: str | None) -> bool:
    """Whether the first operand is the base of the others."""
    return base is not None and own.base != "ignored" and not own.base_is_expert


def placements(
    recipe: Recipe, methods: Sequence[Method], models: Mapping[str, StateDict]
) -> tuple[list[Placed], list[int] | None]:
    """Where the tensors of all slices lie in the result, and the layers of the first source in the result's order.

    Raises:
        ValueError: layers that a model lacks, or more than one stack of them.
    """
    if recipe.whole:
        (part,) = recipe.slices
        order = in_order(methods[0], part, recipe.base)
        names = [{name: name for name in models[model]} for model in order]
        return [Placed(part, order, names, places_of(dict.fromkeys(n for own in names for n in own)))], None
    stacks = {model: stack_of(state) for model, state in models.items()}
    problems = [f"{model}: its layers are not one stack: slices need that" for model, s in stacks.items() if s is None]
    for number, part in enumerate(recipe.slices):
        for source in part.sources:
            count = (stacks[source.model] or ("", 0))[1]
            if stacks[source.model] is not None and source.layers[1] > count:
                problems.append(f"slices[{number}]: layers up to {source.layers[1]} of {source.model}, it has {count}")
    if problems:
        raise ValueError(listed(problems, "in the slices are wrong or not supported"))
    out, layers = [], []
    for number, (part, own) in enumerate(zip(recipe.slices, methods)):
        order = in_order(own, part, recipe.base_of(part))
        ranges = {source.model: source.layers for source in part.sources}
        first, last = number == 0, number == len(recipe.slices) - 1
        names = [
            slice_names(models[model], stacks[model][0], ranges[model], len(layers), first, last) for model in order
        ]
        start, end = part.sources[0].layers
        places = {
            name: place(int(match["number"]) - len(layers), end - start)
            for name in dict.fromkeys(n for own_names in names for n in own_names)
            if (match := LAYER.match(name))
        }
        out.append(Placed(part, order, names, places))
        layers += range(start, end)
    return out, layers


def in_order(own: Method, part: Slice, base: str | None) -> list[str]:
    """Models of a slice, the base first where the method has one."""
    models = [source.model for source in part.sources]
    return models if own.base == "ignored" else sorted(models, key=lambda model: model != base)


def place(layer: int, count: int) -> float:
    """t of a layer."""
    return layer / (count - 1) if count > 1 else 1.0


def places_of(names: Mapping[str, Any]) -> dict[str, float]:
    """t of all tensors of whole models; each stack of layers counts its own."""
    found = {name: match for name in names if (match := LAYER.match(name))}
    counts: dict[str, int] = {}
    for match in found.values():
        counts[match["stack"]] = max(counts.get(match["stack"], 0), int(match["number"]) + 1)
    return {name: place(int(match["number"]), counts[match["stack"]]) for name, match in found.items()}


def stack_of(state: StateDict) -> tuple[str, int] | None:
    """What stands before the numbers of layers, and how many there are; None where there are other stacks."""
    found = [match for name in state if (match := LAYER.match(name))]
    stacks = {match["stack"] for match in found}
    if len(stacks) != 1:
        return None
    return stacks.pop(), 1 + max(int(match["number"]) for match in found)


def slice_names(state: StateDict, stack: str, layers: tuple[int, int], offset: int, first: bool, last: bool) -> Names:
    """Name in the result -> name in a model, of the layers of a slice that begins at layer ``offset``."""
    out, after = {}, {}
    for name in state:
        match = LAYER.match(name)
        if match is None:
            before = BEFORE.search(name) is not None
            if (first and before) or (last and not before):
                (out if before else after)[name] = name
        elif layers[0] <= int(match["number"]) < layers[1]:
            number = int(match["number"]) - layers[0] + offset
            out[name[: match.start("number")] + str(number) + name[match.end("number") :]] = name
    return out | after


class _Chooser:
    """Mergers of the tensors of one slice; equal parameters share one."""

    def __init__(self, recipe: Recipe, own: Method, part: Placed, problems: list[str]) -> None:
        self.recipe, self.own, self.part, self.problems = recipe, own, part, problems
        self.base = None if own.base == "ignored" else recipe.base_of(part.part)
        self.known: dict[str, Any] = {}

    def choose(self, name: str, has_base: bool) -> Any:
        """Merger and weights of one tensor; a problem is noted, and None is returned."""
        t = self.part.places.get(name, 0.0)
        kinds = self.own.parameters.items()
        shared = {key: self.value(key, p, None, name, t) for key, p in kinds if p.scope == "shared"}
        own = [
            {key: self.value(key, p, model, old.get(name, name), t) for key, p in kinds if p.scope != "shared"}
            for model, old in zip(self.part.models, self.part.names)
            if model != self.base
        ]
        key = repr((shared, own))
        if key not in self.known:
            try:
                merger, weights = self.own.build(shared, own)
                self.known[key] = merger, merger.check(len(weights), has_base, weights)
            except (ValueError, TypeError) as error:
                self.problems.append(str(error))
                self.known[key] = None
        return self.known[key]

    def value(self, key: str, parameter: Parameter, model: str | None, name: str, t: float) -> Any:
        """One parameter of one tensor."""
        for scope in (*self.part.part.scopes(model), *self.recipe.parameters):
            if key in scope:
                try:
                    found = setting_at(scope[key], name, t, parameter.kind)
                except ValueError as error:
                    self.problems.append(f"{key}: {error}")
                    return 0
                if found is not None:
                    return found
        if parameter.default is REQUIRED:
            what = f"{key} is missing{f' for {model}' if model else ''}"
            if not any(problem.startswith(what) for problem in self.problems):
                self.problems.append(f"{what}, as at {name}")
            return 0
        return parameter.default


def joined(plans: Sequence[Plan], owners: Sequence[Sequence[int]], labels: Sequence[str]) -> Plan:
    """Plans with other names each as one.

    Args:
        plans: of slices.
        owners: for each, numbers of the models that it merges.
        labels: of all models.
    """

    def all_of(maps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return reduce(lambda found, more: found | dict(more), maps, {})

    return Plan(
        tuple(name for plan in plans for name in plan.order),
        all_of([plan.merged for plan in plans]),
        all_of([plan.copied for plan in plans]),
        all_of([plan.tied for plan in plans]),
        len(labels) - plans[0].has_base,
        plans[0].has_base,
        labels,
        owners={name: own for plan, own in zip(plans, owners) for name in plan.merged},
    )


def promoted(plan: Plan) -> dict[str, torch.dtype]:
    """The type that every merged tensor has where the recipe names none: that in which all of its models fit."""
    return {name: reduce(torch.promote_types, [t.dtype for t in tensors]) for name, tensors in plan.merged.items()}
