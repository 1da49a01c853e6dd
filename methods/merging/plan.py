"""Which entries of several models are merged, copied or tied, and how a merger reads them: piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

StateDict = Mapping[str, Tensor]
LISTED = 8  # names in a message
PIECE = 2**16  # entries of each model that are read at once: they stay in the cache of a processor
Read = tuple[Tensor | None, list[Tensor]]


@dataclass(frozen=True)
class Matching:
    """What happens to entries that the models do not all have alike.

    Args:
        strict: every name must be in every model; otherwise what only some have is taken from the base, or from the
            first expert that has it.
        rows: matrices with another number of rows (vocabularies): ``"error"``, or ``"common"`` to merge the rows that
            all have and leave out the rest.
        donor: index of the expert whose integer entries are taken where they differ; None makes that an error.

    Raises:
        ValueError: the donor is a negative number.
    """

    strict: bool = True
    rows: Literal["error", "common"] = "error"
    donor: int | None = None

    def __post_init__(self) -> None:
        if self.donor is not None and self.donor < 0:
            raise ValueError(f"donor={self.donor}: experts are counted from 0")


@dataclass(frozen=True)
class Operands:
    """One tensor of all models, as a merger reads it: in float32, in float64 where one model has that.

    Args:
        name: of the tensor.
        tensors: the base's, if there is one, then the T experts', all of one shape.
        has_base: whether the first of them is the base's.
        labels: what to call the models in an error, in that order.
        size: entries of one piece.
        checked: names of tensors known to hold no NaN; shared, and added to.
    """

    name: str
    tensors: Sequence[Tensor]
    has_base: bool
    labels: Sequence[str] = ()
    size: int = PIECE
    checked: set[str] = field(default_factory=set)

    @property
    def names(self) -> Sequence[str]:
        """What to call the models in an error."""
        return self.labels or [source_name(number, self.has_base) for number in range(len(self.tensors))]

    @property
    def shape(self) -> torch.Size:
        """Of each of them."""
        return self.tensors[0].shape

    @property
    def num_entries(self) -> int:
        """Of each of them."""
        return self.tensors[0].numel()

    def pieces(self) -> Iterator[tuple[int, Tensor | None, list[Tensor]]]:
        """Index of the first entry, base and experts, of flat pieces in order.

        Raises:
            ValueError: one holds NaN.
        """
        flat = [tensor.detach().reshape(-1) for tensor in self.tensors]
        for start in range(0, self.num_entries, self.size):
            yield start, *self._read([tensor[start : start + self.size] for tensor in flat])
        self.checked.add(self.name)

    def part(self, start: int, count: int) -> Read:
        """Base and experts, of the ``count`` flat entries from ``start`` on. Errors as `pieces`."""
        return self._read([tensor.detach().reshape(-1)[start : start + count] for tensor in self.tensors])

    def rows(self, columns: int) -> Iterator[Read]:
        """Base and experts, of blocks (R, columns) in order; at least one row each. Errors as `pieces`."""
        if self.num_entries == 0:
            return
        views = [tensor.detach().reshape(-1, columns) for tensor in self.tensors]
        height = max(self.size // columns, 1)
        for row in range(0, len(views[0]), height):
            yield self._read([view[row : row + height] for view in views])
        self.checked.add(self.name)

    def whole(self) -> Read:
        """Base and experts in full. Errors as `pieces`."""
        out = self._read([tensor.detach() for tensor in self.tensors])
        self.checked.add(self.name)
        return out

    def _read(self, parts: Sequence[Tensor]) -> Read:
        exact = any(tensor.dtype == torch.float64 for tensor in self.tensors)
        device, dtype = self.tensors[0].device, torch.float64 if exact else torch.float32
        values = []
        for number, part in enumerate(parts):
            value = part.to(device, dtype)
            # A sum that is finite holds no NaN, and costs less than to look at every entry.
            if self.name not in self.checked and not math.isfinite(value.sum()) and value.isnan().any():
                raise ValueError(f"{self.names[number]} holds NaN in {self.name}")
            values.append(value)
        return (values[0], values[1:]) if self.has_base else (None, values)


@dataclass(frozen=True)
class Plan:
    """What becomes of every entry of the result; see `plan_of`.

    Args:
        order: names of the result.
        merged: name -> tensors that it is merged from, the base's first if there is one, with the rows that all have.
        copied: name -> tensor.
        tied: name -> the name before it that has the same storage.
        num_experts: T.
        has_base: whether the models have a base.
        labels: what to call the models in an error, the base first.
        owners: name -> numbers of the models that its tensors are of, where those are not all models in order.
    """

    order: tuple[str, ...]
    merged: Mapping[str, Sequence[Tensor]]
    copied: Mapping[str, Tensor]
    tied: Mapping[str, str]
    num_experts: int
    has_base: bool
    labels: Sequence[str]
    checked: set[str] = field(default_factory=set)
    owners: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, int]:
        """Entries of every merged tensor, by sorted name."""
        return {name: self.merged[name][0].numel() for name in sorted(self.merged)}

    def operands(self, name: str, size: int = PIECE) -> Operands:
        """The tensors that ``name`` is merged from."""
        labels = self.labels and [self.labels[number] for number in self.models(name)]
        return Operands(name, self.merged[name], self.has_base, labels, size, self.checked)

    def models(self, name: str) -> Sequence[int]:
        """Numbers of the models that the tensors of ``name`` are of."""
        return self.owners.get(name, range(len(self.merged[name])))


def source_name(number: int, has_base: bool) -> str:
    """``the base`` or ``expert i`` for the number-th source."""
    return "the base" if has_base and number == 0 else f"expert {number - has_base}"


def plan_of(
    experts: Sequence[StateDict],
    base: StateDict | None,
    matching: Matching | None = None,
    labels: Sequence[str] | None = None,
) -> Plan:
    """Compare the models, without reading a value of what is merged.

    Args:
        experts: T models.
        base: theirs, if there is one.
        matching: what happens to entries that differ; strict by default.
        labels: what to call the models in an error, the base first; ``the base``, ``expert 0`` .. by default.

    Raises:
        ValueError: with all names that some lack, shapes that differ, ties that some lack, and integer entries that
            disagree; or a donor that is none of the experts.
    """
    matching = matching or Matching()
    if matching.donor is not None and matching.donor >= len(experts):
        raise ValueError(f"donor={matching.donor}: there are {len(experts)} experts, counted from 0")
    models = [*([] if base is None else [base]), *experts]
    labels = labels or [source_name(number, base is not None) for number in range(len(models))]
    names: dict[str, None] = {name: None for model in models for name in model}
    problems: list[str] = []
    order, merged, copied, tied = [], {}, {}, {}
    seen: dict[tuple[int, int, tuple[int, ...], tuple[int, ...]], str] = {}
    for name in names:
        holders = [number for number, model in enumerate(models) if name in model]
        if len(holders) < len(models) and matching.strict:
            problems.append(f"{name}: not in {next(labels[n] for n in range(len(models)) if n not in holders)}")
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
            apart = [n for n, model in enumerate(models) if not torch.equal(model[name], model[seen[place]])]
            if apart:
                problems.append(f"{name}: one tensor with {seen[place]} in {labels[0]}, another in {labels[apart[0]]}")
            continue
        seen[place] = name
        if unlike := shape_problems(name, tensors, matching.rows):
            problems += unlike
            continue
        if first.is_floating_point():
            merged[name] = with_common_rows(tensors)
            continue
        chosen = first if matching.donor is None else experts[matching.donor][name]
        if matching.donor is None and not all(torch.equal(first, other) for other in tensors):
            problems.append(f"{name}: {str(first.dtype).removeprefix('torch.')} entries differ; name a donor")
        copied[name] = chosen
    if problems:
        more = f"\n  ... and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
        listed = "\n  ".join(problems[:LISTED])
        raise ValueError(f"the models do not fit together in {len(problems)} entries:\n  {listed}{more}")
    return Plan(tuple(order), merged, copied, tied, len(experts), base is not None, labels)


def with_common_rows(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors without the rows that some lack."""
    if tensors[0].dim() == 0:
        return list(tensors)
    rows = min(len(tensor) for tensor in tensors)
    return [tensor if len(tensor) == rows else tensor[:rows] for tensor in tensors]


def shape_problems(name: str, tensors: Sequence[Tensor], rows: str) -> list[str]:
    """One text where shapes differ in more than the number of rows, or in that where it is an error."""
    shapes = [tuple(tensor.shape) for tensor in tensors]
    alike = len(set(shapes)) == 1
    same_columns = len({(len(shape), shape[1:]) for shape in shapes}) == 1 and len(shapes[0]) > 0
    if alike or (rows == "common" and same_columns and tensors[0].is_floating_point()):
        return []
    hint = '; rows="common" merges the rows that all have' if same_columns else ""
    return [f"{name}: shapes {', '.join(map(str, dict.fromkeys(shapes)))}{hint}"]
