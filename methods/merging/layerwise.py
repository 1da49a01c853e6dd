"""Other weights for other tensors: by name, and along the depth of the model.

    - [pattern, [w_1, .., w_T]]      the first pattern that is found in a tensor's name gives its weights
    - [pattern, [[g_0, .., g_k], w_2, ..]]    a list instead of a number is a gradient over depth

Layer n of L is at depth x = n / (L - 1); a gradient is g_0 at the first layer, g_k at the last one, and straight
between its points, which are evenly spaced. Weights 0 and 1 swap layers (layer swapping, arXiv 2410.01335).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fulgurite.methods.merging.base import Merger
from fulgurite.methods.merging.plan import Operands, Plan

# The first number that is a part of its own: `blocks` and 3 of blocks.3.mlp.experts.0.weight.
LAYER = re.compile(r"^(?P<stack>.*?)(?:^|\.)(?P<number>\d+)(?:\.|$)")
Weight = float | list[float]


def depths(names: Sequence[str]) -> dict[str, float]:
    """Depth in [0, 1] of each name with a layer number; each stack of layers (what stands before) has its own."""
    found = {name: match for name in names if (match := LAYER.match(name))}
    last: dict[str, int] = {}
    for match in found.values():
        last[match["stack"]] = max(last.get(match["stack"], 0), int(match["number"]))
    return {name: int(match["number"]) / max(last[match["stack"]], 1) for name, match in found.items()}


def at_depth(weight: Weight, depth: float | None) -> float:
    """The weight, or a gradient's value at a depth in [0, 1]."""
    if not isinstance(weight, Sequence):
        return float(weight)
    return float(np.interp(depth, np.linspace(0, 1, len(weight)), weight))


class Layerwise(Merger):
    """A merger with other weights for tensors that a rule is about; the others have the weights of the call.

    Args:
        merger: what merges.
        rules: pattern (`re.search` in the tensor's name) and one weight per expert, a number or a gradient over depth.
            The first rule that fits holds. A rule with a gradient is only about names with a layer number.

    Raises:
        ValueError: a pattern that is no regular expression, a gradient without a value.
    """

    def __init__(self, merger: Merger, rules: list[tuple[str, list[Weight]]]) -> None:
        self.merger = merger
        self.rules = [(compiled(pattern), list(weights)) for pattern, weights in rules]
        self.needs_base, self.min_experts = merger.needs_base, merger.min_experts
        self.piecewise = merger.piecewise
        for pattern, weights in self.rules:
            if [] in weights:
                raise ValueError(f"the rule {pattern.pattern!r} has a gradient over depth without a value")

    def check(self, num_experts: int, has_base: bool, weights: Sequence[float] | None) -> list[float]:
        """The wrapped merger's weights of tensors without a rule.

        Raises:
            ValueError: see the wrapped merger's; also where a rule has another number of weights.
        """
        checked = self.merger.check(num_experts, has_base, weights)
        for pattern, own in self.rules:
            if len(own) != num_experts:
                raise ValueError(f"the rule {pattern.pattern!r} has {len(own)} weights for {num_experts} models")
            for depth in (0.0, 1.0):
                self.merger.check(num_experts, has_base, [at_depth(weight, depth) for weight in own])
        return checked

    def begin(self, plan: Plan) -> str | None:
        """Forget an earlier merge, and find the weights of every tensor.

        Raises:
            LookupError: a rule is about no tensor of the model.
        """
        self.scanned = {"table": table(self.rules, list(plan.sizes))}
        return self.merger.begin(plan)

    def scan(self, name: str, base: Tensor | None, experts: Sequence[Tensor]) -> Any:
        """As the wrapped merger's."""
        self.merger.stage = self.stage
        return self.merger.scan(name, base, experts)

    def combine(self, summary: Any, other: Any) -> Any:
        """As the wrapped merger's."""
        return self.merger.combine(summary, other)

    def settle(self, summary: Any) -> str | None:
        """As the wrapped merger's."""
        self.merger.stage = self.stage
        return self.merger.settle(summary)

    def merge_one(self, operands: Operands, weights: Sequence[float]) -> Iterator[Tensor]:
        """The wrapped merger's tensor at the weights of its name."""
        return self.merger.merge_one(operands, self.weights_of(operands.name, weights))

    def merge_tensor(
        self, name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """See `merge_one`."""
        return self.merger.merge_tensor(name, base, experts, self.weights_of(name, weights))

    def weights_of(self, name: str, default: Sequence[float]) -> Sequence[float]:
        """The weights of one tensor."""
        own = self.scanned["table"].get(name)
        return default if own is None else self.merger.check(len(own), True, own)


def compiled(pattern: str) -> re.Pattern[str]:
    """The pattern, or a ValueError that names it."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error


def table(rules: Sequence[tuple[re.Pattern[str], list[Weight]]], names: Sequence[str]) -> Mapping[str, list[float]]:
    """Weights by name, of the names that a rule is about.

    Raises:
        LookupError: a rule is about none.
    """
    at, out, used = depths(names), {}, set()
    for name in names:
        for number, (pattern, weights) in enumerate(rules):
            graded = any(isinstance(weight, Sequence) for weight in weights)
            if pattern.search(name) and (name in at or not graded):
                out[name] = [at_depth(weight, at.get(name)) for weight in weights]
                used.add(number)
                break
    idle = [repr(pattern.pattern) for number, (pattern, _) in enumerate(rules) if number not in used]
    if idle:
        near = ", ".join(names[:4])
        raise LookupError(
            f"rules of layer-wise weights that no tensor is left for: {', '.join(idle)}; the first that fits holds, a "
            f"gradient needs a layer number, and names are like {near}"
        )
    return out
