"""What every merger shares: which entries of several models are merged, in which arithmetic, and in which order.

A merger combines experts theta_1 .. theta_T, given as mappings from name to tensor, with or without the base theta_0
that they were fine-tuned from; tau_i = theta_i - theta_0 is a task vector. Only floating-point tensors are merged, in
float32 (float64 where a source has it), and cast to the base's type at the end. See `Merger`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

StateDict = Mapping[str, Tensor]
LISTED = 8  # names in a message
# Running statistics of normalisation: their mean is one, while a sum or a trimmed task vector is not.
STATISTIC = re.compile(r"(^|\.)running_(mean|var)$")


@dataclass(frozen=True)
class Matching:
    """What happens to entries that the models do not all have alike.

    Args:
        strict: every name must be in every model; otherwise what only some have is taken from the base, or from the
            first expert that has it.
        rows: matrices with another number of rows (vocabularies): ``"error"``, or ``"common"`` to merge the rows that
            all have and leave out the rest.
        donor: index of the expert whose integer entries are taken where they differ; None makes that an error.
    """

    strict: bool = True
    rows: Literal["error", "common"] = "error"
    donor: int | None = None


class Merger(ABC):
    """A way to make one model of several.

    A subclass says in `merge_tensor` what becomes of one tensor; what it must know of all tensors before (a threshold
    over the whole model) it collects in `scan`. Nothing is kept from one merge to the next, and no input is changed.

    Attributes:
        scanned: what `scan` has collected in this merge.
    """

    needs_base: ClassVar[bool] = True
    scans: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False  # whether `merge_tensor` may be given a tensor in flat pieces, one by one
    min_experts: ClassVar[int] = 1

    def begin(self, num_experts: int) -> None:
        """Forget an earlier merge. Called once, before `scan`."""
        self.scanned: dict[str, Any] = {}

    def scan(self, name: str, base: Tensor | None, experts: Sequence[Tensor]) -> None:
        """See one tensor of all models, in the order of sorted names; only where ``scans``."""
        raise NotImplementedError(f"{type(self).__name__} says scans, and does not say how")

    @abstractmethod
    def merge_tensor(
        self, name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """One merged tensor.

        Args:
            name: of the tensor.
            base: theta_0 in float32 or float64; None where there is none.
            experts: T tensors of that shape and type.
            weights: T numbers.

        Returns:
            a new tensor of that shape and type.
        """

    def __call__(
        self,
        experts: Sequence[StateDict],
        base: StateDict | None = None,
        weights: Sequence[float] | None = None,
        matching: Matching | None = None,
    ) -> dict[str, Tensor]:
        """The merged model: names, types, devices and ties of the base, or of the first expert where there is none.

        Args:
            experts: T models.
            base: the model that they were fine-tuned from.
            weights: one number per expert, 1 for each by default.
            matching: what happens to entries that differ; strict by default.

        Raises:
            ValueError: the models do not fit together, or one holds NaN. Names all that is wrong.
        """
        weights = self.check(len(experts), base is not None, weights)
        plan = plan_of(experts, base, matching or Matching())
        self.begin(len(experts))
        for name in sorted(plan.merged) if self.scans else ():
            self.scan(name, *plan.sources(name))
        out: dict[str, Tensor] = {}
        for name in plan.order:
            if name in plan.tied:
                out[name] = out[plan.tied[name]]
            elif name in plan.merged:
                own = plan.reference(name)
                out[name] = self.merge_one(name, *plan.sources(name), weights).to(own.dtype)
            else:
                out[name] = plan.copied[name].clone()
        return out

    def check(self, num_experts: int, has_base: bool, weights: Sequence[float] | None) -> list[float]:
        """The weights as a list; refuse what this merger cannot take.

        Raises:
            ValueError: too few experts, no base where one is needed, or another number of weights.
        """
        name = type(self).__name__
        if num_experts < self.min_experts:
            raise ValueError(f"{name} merges at least {self.min_experts} models, got {num_experts}")
        if self.needs_base and not has_base:
            raise ValueError(f"{name} needs the base model that the experts were fine-tuned from: give base")
        weights = [1.0] * num_experts if weights is None else [float(weight) for weight in weights]
        if len(weights) != num_experts:
            raise ValueError(f"{len(weights)} weights for {num_experts} models")
        return weights

    def merge_one(self, name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """`merge_tensor`, except for running statistics of normalisation, which are averaged."""
        if STATISTIC.search(name):
            return average(experts, weights)
        return self.merge_tensor(name, base, experts, weights)


@dataclass(frozen=True)
class Plan:
    """Which entries are merged, copied or tied; see `plan_of`."""

    order: tuple[str, ...]
    merged: frozenset[str]
    copied: dict[str, Tensor]
    tied: dict[str, str]
    experts: Sequence[StateDict]
    base: StateDict | None

    def reference(self, name: str) -> Tensor:
        """The tensor whose type and device the result has."""
        return (self.experts[0] if self.base is None else self.base)[name]

    def sources(self, name: str) -> tuple[Tensor | None, list[Tensor]]:
        """Base and experts of one tensor in the arithmetic's type, on the reference's device, with common rows.

        Raises:
            ValueError: a source holds NaN.
        """
        return self._read(name, self._cut(name))

    def pieces(self, name: str, size: int) -> Iterator[tuple[int, Tensor | None, list[Tensor]]]:
        """`sources` in flat pieces of at most ``size`` elements, with the index of the first one of each."""
        cut = [tensor.detach().reshape(-1) for tensor in self._cut(name)]
        for start in range(0, cut[0].numel(), size):
            yield start, *self._read(name, [tensor[start : start + size] for tensor in cut])

    def shape(self, name: str) -> torch.Size:
        """Of the merged tensor."""
        return self._cut(name)[0].shape

    def _cut(self, name: str) -> list[Tensor]:
        """Base, if any, and experts, with the rows that all have."""
        given = [*([] if self.base is None else [self.base[name]]), *(expert[name] for expert in self.experts)]
        rows = min(tensor.shape[0] for tensor in given) if given[0].dim() else None
        return [tensor if rows is None or tensor.shape[0] == rows else tensor[:rows] for tensor in given]

    def _read(self, name: str, cut: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        exact = any(tensor.dtype == torch.float64 for tensor in cut)
        device = self.reference(name).device
        tensors = []
        for number, tensor in enumerate(cut):
            value = tensor.detach().to(device, torch.float64 if exact else torch.float32)
            if value.isnan().any():
                raise ValueError(f"{source_name(number, self.base is not None)} holds NaN in {name}")
            tensors.append(value)
        return (None, tensors) if self.base is None else (tensors[0], tensors[1:])


def source_name(number: int, has_base: bool) -> str:
    """``the base`` or ``expert i`` for the number-th source."""
    return "the base" if has_base and number == 0 else f"expert {number - has_base}"


def plan_of(experts: Sequence[StateDict], base: StateDict | None, matching: Matching) -> Plan:
    """Compare the models, without reading a value of what is merged.

    Raises:
        ValueError: with all names that some lack, shapes that differ, and integer entries that disagree.
    """
    models = [*([] if base is None else [base]), *experts]
    names: dict[str, None] = {name: None for model in models for name in model}
    problems, order, merged, copied, tied = [], [], set(), {}, {}
    seen: dict[tuple[int, int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name in names:
        holders = [number for number, model in enumerate(models) if name in model]
        if len(holders) < len(models) and matching.strict:
            lacking = next(n for n in range(len(models)) if n not in holders)
            problems.append(f"{name}: not in {source_name(lacking, base is not None)}")
            continue
        order.append(name)
        tensors = [models[number][name] for number in holders]
        first = tensors[0]
        if len(holders) < len(models):
            copied[name] = first
            continue
        place = (first.data_ptr(), first.storage_offset(), tuple(first.shape), tuple(first.stride()))
        if first.numel() and place in seen:
            tied[name] = seen[place]
            continue
        seen[place] = name
        problems += shape_problems(name, tensors, matching.rows)
        if first.is_floating_point():
            merged.add(name)
            continue
        chosen = first if matching.donor is None else experts[matching.donor][name]
        if matching.donor is None and not all(torch.equal(first, other) for other in tensors):
            problems.append(f"{name}: {str(first.dtype).removeprefix('torch.')} entries differ; name a donor")
        copied[name] = chosen
    if problems:
        more = f"\n  ... and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        listed = "\n  ".join(problems[:LISTED])
        raise ValueError(f"the models do not fit together in {len(problems)} entries:\n  {listed}{more}")
    return Plan(tuple(order), frozenset(merged), copied, tied, experts, base)


def shape_problems(name: str, tensors: Sequence[Tensor], rows: str) -> list[str]:
    """One text where shapes differ in more than the number of rows, or in that where it is an error."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    alike = len(set(shapes)) == 1
    same_columns = len({(len(shape), shape[1:]) for shape in shapes}) == 1 and len(shapes[0]) > 0
    if alike or (rows == "common" and same_columns and tensors[0].is_floating_point()):
        return []
    hint = '; rows="common" merges the rows that all have' if same_columns else ""
    return [f"{name}: shapes {', '.join(map(str, dict.fromkeys(shapes)))}{hint}"]


def average(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i t_i / sum_i w_i; the plain mean where the weights cancel. One running tensor."""
    total = sum(weights)
    if abs(total) < 1e-8:
        weights, total = [1.0] * len(tensors), float(len(tensors))
    out = tensors[0] * (weights[0] / total)
    for tensor, weight in zip(tensors[1:], weights[1:]):
        out.add_(tensor, alpha=weight / total)
    return out


def task_vectors(base: Tensor, experts: Sequence[Tensor]) -> list[Tensor]:
    """tau_i = theta_i - theta_0. Holds T tensors."""
    return [expert - base for expert in experts]
