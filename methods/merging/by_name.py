"""Another merger, and other weights, for every tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from fulgurite.methods.merging.base import Merger
from fulgurite.methods.merging.plan import Operands, Plan


def by_name(chosen: Mapping[str, tuple[Merger, list[float]]]) -> Merger:
    """A merger that merges each tensor by the merger that was chosen for its name.

    Args:
        chosen: name -> merger and weights, one per model that the tensor is merged from; for all tensors of the plan.
            Mergers that look at the whole model first are refused as soon as a merge begins.
    """
    return _ByName(chosen)


class _ByName(Merger):
    needs_base = False

    def __init__(self, chosen: Mapping[str, tuple[Merger, list[float]]]) -> None:
        self.chosen = chosen
        self.mergers = list({id(merger): merger for merger, _ in chosen.values()}.values())
        self.piecewise = all(merger.piecewise for merger in self.mergers)

    def begin(self, plan: Plan) -> str | None:
        """Let all mergers begin.

        Raises:
            ValueError: one of them must see all tensors first.
        """
        super().begin(plan)
        for merger in self.mergers:
            if merger.begin(plan) is not None:
                raise ValueError(f"{type(merger).__name__} sees the whole model first: it cannot be chosen by tensor")
        return None

    def merge_one(self, operands: Operands, weights: Sequence[float]) -> Iterator[Tensor]:
        """The tensor by its own merger, at its own weights."""
        merger, own = self.chosen[operands.name]
        return merger.merge_one(operands, own)

    def merge_tensor(
        self, name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """See `merge_one`."""
        merger, own = self.chosen[name]
        return merger.merge_tensor(name, base, experts, own)
