"""What every merger shares: in which arithmetic, in which order, and in how many passes models are merged.

A merger combines experts theta_1 .. theta_T, given as mappings from name to tensor, with or without the base theta_0
that they were fine-tuned from; tau_i = theta_i - theta_0 is a task vector. Only floating-point tensors are merged, in
float32 (float64 where a source has it), and cast to the base's type at the end. See `Merger`.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, ClassVar

import torch
from torch import Tensor

from fulgurite.methods.merging.plan import PIECE, Matching, Operands, Plan, StateDict, plan_of
from fulgurite.methods.ranks import ALONE, Ranks

# Running statistics of normalisation: their mean is one, while a sum or a trimmed task vector is not.
STATISTIC = re.compile(r"(^|\.)running_(mean|var)$")
IN_MEMORY = 2**20  # entries of a piece that all threads of a kernel share
Seen = Callable[[str, int], None]


class Merger(ABC):
    """A way to make one model of several.

    A subclass says in `merge_tensor` what becomes of one tensor. What it must know of the whole model before (a
    threshold, a length) it collects in passes: `begin` names the first, `scan` sees every tensor, `settle` draws the
    conclusion and names the next. A method that needs no tensor whole is a `Piecewise` one.
    Nothing is kept from one merge to the next, and no input is changed.

    Attributes:
        scanned: what the passes have found in this merge.
        stage: name of the present pass.
    """

    needs_base: ClassVar[bool] = True
    min_experts: ClassVar[int] = 1
    piecewise: bool = False  # whether tensors are read in flat pieces, here and in `scan`
    stage: str = ""

    def begin(self, plan: Plan) -> str | None:
        """Forget an earlier merge; called once, before all else.

        Returns:
            name of the first pass; None where there is none.
        """
        self.scanned: dict[str, Any] = {}
        return None

    def scan(self, name: str, base: Tensor | None, experts: Sequence[Tensor]) -> Any:
        """What the pass ``stage`` must know of one tensor (of flat pieces of it, in order, where ``piecewise``).

        Tensors are shown in any order and at the same time, so nothing is stored here; statistics of normalisation,
        which are averaged, are not shown.
        """
        raise NotImplementedError(f"{type(self).__name__} names a pass, and does not say what it looks for")

    def combine(self, summary: Any, other: Any) -> Any:
        """What `scan` returns, of both parts of the model together; the same in whatever order parts are combined."""
        raise NotImplementedError(f"{type(self).__name__} names a pass, and does not say how its parts add up")

    def settle(self, summary: Any) -> str | None:
        """Draw what follows from a pass that has seen all; returns the name of the next pass, if there is one."""
        raise NotImplementedError(f"{type(self).__name__} names a pass, and does not say what follows")

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

    def merge_pieces(self, operands: Operands, weights: Sequence[float]) -> Iterator[Tensor]:
        """One merged tensor as flat pieces in order; here a single one."""
        yield self.merge_tensor(operands.name, *operands.whole(), weights).reshape(-1)

    def merge_one(self, operands: Operands, weights: Sequence[float]) -> Iterator[Tensor]:
        """`merge_pieces`, except for running statistics of normalisation, which are averaged.

        They are by the size of the weights: a variance from which another is taken away could be negative.

        Raises:
            ValueError: infinite entries make NaN, as infinity less infinity is.
        """
        if STATISTIC.search(operands.name):
            sizes = [abs(weight) for weight in weights]
            merged = (average(experts, sizes) for _, _, experts in operands.pieces())
        else:
            merged = self.merge_pieces(operands, weights)
        for piece in merged:
            if not math.isfinite(piece.sum()) and piece.isnan().any():
                infinite = [label for label, t in zip(operands.names, operands.tensors) if t.isinf().any()]
                if infinite:
                    of = f"{operands.name}, of infinite entries in {', '.join(infinite)}"
                    raise ValueError(f"{type(self).__name__} makes NaN of {of}")
            yield piece

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
        plan = plan_of(experts, base, matching)
        survey(self, plan)
        out: dict[str, Tensor] = {}
        for name in plan.order:
            if name in plan.tied:
                out[name] = out[plan.tied[name]]
            elif name in plan.merged:
                own = plan.merged[name][0]
                operands = plan.operands(name, IN_MEMORY if own.device.type == "cpu" else max(own.numel(), 1))
                out[name] = whole_of(self.merge_one(operands, weights), own)
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


class Piecewise(Merger):
    """A merger that reads each tensor piece by piece, as often as it must, and holds none of them whole.

    A subclass says in `merge_pieces` what becomes of one tensor.
    """

    piecewise = True

    @abstractmethod
    def merge_pieces(self, operands: Operands, weights: Sequence[float]) -> Iterator[Tensor]:
        """One merged tensor as flat pieces in order, of any length."""

    def merge_tensor(
        self, name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """The pieces put together."""
        given = [*([] if base is None else [base]), *experts]
        return whole_of(self.merge_pieces(Operands(name, given, base is not None), weights), given[0])


class Elementwise(Piecewise):
    """A merger whose `merge_tensor` does the same with every entry, so that it may be given flat pieces."""

    @abstractmethod
    def merge_tensor(
        self, name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """See `Merger.merge_tensor`; also of flat pieces of a tensor."""

    def merge_pieces(self, operands: Operands, weights: Sequence[float]) -> Iterator[Tensor]:
        """`merge_tensor` of piece after piece."""
        for _, base, experts in operands.pieces():
            yield self.merge_tensor(operands.name, base, experts, weights)


def survey(
    merger: Merger,
    plan: Plan,
    threads: int = 1,
    ranks: Ranks = ALONE,
    size: int = PIECE,
    seen: Seen | None = None,
) -> None:
    """Make the merger's passes over the models, each tensor on one thread of one rank; every rank knows the outcome.

    Args:
        merger: what is asked.
        plan: the models.
        threads: tensors at a time.
        ranks: who shares the work; all of them call this.
        size: entries of a piece.
        seen: called with the name of the pass and the number of entries whenever a tensor has been seen.
    """
    merger.stage = merger.begin(plan) or ""
    sizes = {name: count for name, count in plan.sizes.items() if not STATISTIC.search(name)}

    def look(name: str) -> Any:
        operands = plan.operands(name, size)
        parts = ((b, e) for _, b, e in operands.pieces()) if merger.piecewise else iter([operands.whole()])
        summary = fold(merger, (merger.scan(name, base, experts) for base, experts in parts))
        if seen is not None:
            seen(merger.stage, sizes[name])
        return summary

    while merger.stage and sizes:
        with ThreadPoolExecutor(threads) as pool:
            summaries = ranks.together(lambda: fold(merger, as_they_come(pool, look, ranks.share(sizes))))
        merger.stage = merger.settle(fold(merger, iter(summaries))) or ""


def as_they_come(pool: ThreadPoolExecutor, work: Callable[[str], Any], names: Sequence[str]) -> Iterator[Any]:
    """What ``work`` gives for all of them, each as soon as it is there, so that none is kept waiting in memory."""
    for done in as_completed([pool.submit(work, name) for name in names]):
        yield done.result()


def fold(merger: Merger, summaries: Iterator[Any]) -> Any:
    """All of them combined; None where there is none."""
    total = None
    for summary in summaries:
        if summary is not None:
            total = summary if total is None else merger.combine(total, summary)
    return total


def whole_of(pieces: Iterator[Tensor], like: Tensor) -> Tensor:
    """Flat pieces in order as one tensor of the shape, type and device of ``like``."""
    out, done = torch.empty(like.shape, dtype=like.dtype, device=like.device), 0
    flat = out.view(-1)
    for piece in pieces:
        flat[done : done + piece.numel()] = piece
        done += piece.numel()
    if done != flat.numel():
        raise ValueError(f"{done} of {flat.numel()} entries were merged")
    return out


def average(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i t_i / sum_i w_i; the plain mean where the weights cancel. One running tensor."""
    total = sum(weights)
    if abs(total) < 1e-8:
        weights, total = [1.0] * len(tensors), float(len(tensors))
    out = tensors[0] * (weights[0] / total)
    for tensor, weight in zip(tensors[1:], weights[1:]):
        out.add_(tensor, alpha=weight / total)
    return out
