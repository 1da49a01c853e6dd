"""How alike the changes are that several models made to one base: kinship and sign conflicts of task vectors.

For experts theta_1 .. theta_T and tau_i = theta_i - theta_0, per tensor and summed over any set of tensors:

    cosine_ij          <tau_i, tau_j> / (|tau_i| |tau_j|)
    correlation_ij     the cosine of tau_i and tau_j, each less its mean (Pearson)
    conflict_ij        share of the coordinates where tau_i and tau_j have other signs, of those where neither is zero
    contested          share where any two have other signs, of the coordinates where at least two are not zero

Model kinship (arXiv 2410.12613) is a similarity of the task vectors of the whole model, averaged over the pairs. The
similarity is the correlation there, and as a second choice the cosine; `over_pairs` averages either.

NOTE: the published code takes the absolute value of the cosine, so that opposite changes count as alike; here the sign
stays. Without a base, tau_i is the distance from the mean of the experts. The tau_i then sum to zero: two experts
have cosine -1 whatever they are, and T unrelated ones of one norm -1 / (T - 1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from itertools import combinations
from operator import add

import torch
from torch import Tensor

from fulgurite.methods.merging.layerwise import LAYER
from fulgurite.methods.merging.plan import Matching, Plan, StateDict, plan_of

PIECE = 2**18  # elements of one piece: 2 MiB of each model in float64


@dataclass(frozen=True)
class Alikeness:
    """Sums over coordinates, in float64, from which all figures follow; those of several tensors add up.

    What has no value is NaN: the cosine with a zero vector, a share of no coordinates, all of a merge that
    is not there.

    Args:
        size: coordinates.
        gram: (T, T) inner products of the task vectors.
        total: (T,) sums of their entries.
        both: (T, T) coordinates where neither of the two is zero.
        opposed: (T, T) coordinates where the two have other signs.
        shared: coordinates where at least two are not zero.
        fought: coordinates where any two have other signs.
        touched: coordinates where any is not zero.
        base_square: square of the norm of the base (of the mean, where there is none).
        merged_square: square of the norm of the merged change.
        merged_kept: coordinates that the merge changed, of the touched ones.
        merged_gram: (T,) inner products of the merged change with the task vectors.
    """

    size: Tensor
    gram: Tensor
    total: Tensor
    both: Tensor
    opposed: Tensor
    shared: Tensor
    fought: Tensor
    touched: Tensor
    base_square: Tensor
    merged_square: Tensor
    merged_kept: Tensor
    merged_gram: Tensor

    def __add__(self, other: Alikeness) -> Alikeness:
        """The sums over both sets of coordinates."""
        return Alikeness(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    @property
    def norms(self) -> Tensor:
        """(T,) |tau_i|."""
        return self.gram.diagonal().sqrt()

    @property
    def norm_ratios(self) -> Tensor:
        """(T,) |tau_i| / |theta_0|."""
        return self.norms / self.base_square.sqrt()

    @property
    def cosine(self) -> Tensor:
        """(T, T)."""
        return normalized(self.gram)

    @property
    def correlation(self) -> Tensor:
        """(T, T) Pearson; NaN with a vector of equal entries."""
        square = self.gram.diagonal()
        centred = self.gram - torch.outer(self.total, self.total) / self.size
        # What rounding leaves of a constant vector is no direction.
        constant = centred.diagonal() <= 1e-14 * square
        return normalized(centred.masked_fill(constant[:, None] | constant[None, :], 0.0))

    @property
    def conflict(self) -> Tensor:
        """(T, T) sign conflict rates, 0 of a vector with itself."""
        return self.opposed / self.both

    @property
    def contested(self) -> float:
        """Share of the coordinates with any conflict."""
        return float(self.fought / self.shared)

    @property
    def merged_norm(self) -> float:
        """|theta - theta_0| of the merged model theta."""
        return float(self.merged_square.sqrt())

    @property
    def merged_ratio(self) -> float:
        """The same over |theta_0|."""
        return float((self.merged_square / self.base_square).sqrt())

    @property
    def kept(self) -> float:
        """Share of the coordinates that the merge changed, of those that any expert changed."""
        return float(self.merged_kept / self.touched)

    @property
    def merged_cosine(self) -> Tensor:
        """(T,) cosine of the merged change with each task vector."""
        return self.merged_gram / (self.norms * self.merged_square.sqrt())


def diagnose(
    experts: Sequence[StateDict],
    base: StateDict | None = None,
    merged: StateDict | None = None,
    matching: Matching | None = None,
    piece: int = PIECE,
) -> dict[str, Alikeness]:
    """The alikeness of T models in every tensor that a merge of them would merge; see `diagnose_plan`.

    Args:
        experts: T mappings, mapped files will do.
        base: the model that they were fine-tuned from; the mean of the experts by default.
        merged: what was made of them.
        matching: what happens to entries that differ, as in the merge.
        piece: elements.

    Raises:
        ValueError: the models do not fit together, or one holds NaN.
    """
    return diagnose_plan(plan_of(experts, base, matching), merged, piece)


def diagnose_plan(plan: Plan, merged: StateDict | None = None, piece: int = PIECE) -> dict[str, Alikeness]:
    """The alikeness of the models of a merge in every tensor of `comparable`.

    One pass over the data, in pieces: holds ``piece`` elements of each model in float64, and 3 T^2 numbers per tensor.

    Args:
        plan: the models.
        merged: what was made of them, of the base's type: where it was stored in another one, rounding counts as a
            change.
        piece: elements; the result depends on it by rounding only.

    Raises:
        ValueError: a model holds NaN, or a merged tensor has another shape.
    """
    return {name: _of_tensor(plan, name, None if merged is None else merged[name], piece) for name in comparable(plan)}


def comparable(plan: Plan) -> list[str]:
    """Names of the merged tensors that are not empty and that all models have a part in, in the order of the model."""
    everyone = list(range(plan.num_experts + plan.has_base))
    sizes = plan.sizes
    return [name for name in plan.order if sizes.get(name) and list(plan.models(name)) == everyone]


def _of_tensor(plan: Plan, name: str, merged: Tensor | None, piece: int) -> Alikeness:
    operands, flat = plan.operands(name, piece), None
    if merged is not None:
        if merged.shape != operands.shape:
            raise ValueError(f"{name}: the merged tensor is {tuple(merged.shape)}, the models' {tuple(operands.shape)}")
        flat = merged.detach().reshape(-1)
    return reduce(
        add,
        (
            alikeness(base, experts, None if flat is None else flat[start : start + piece])
            for start, base, experts in operands.pieces()
        ),
    )


def alikeness(base: Tensor | None, models: Sequence[Tensor], merged: Tensor | None = None) -> Alikeness:
    """Of one flat piece.

    Args:
        base: theta_0, (N,); None for the mean of the experts.
        models: T experts, (N,) each.
        merged: what was made of them, (N,).
    """
    experts = torch.stack([model.double() for model in models])
    start = experts.mean(0) if base is None else base.double()
    base_square = start.square().sum()
    experts -= start
    change = torch.full_like(start, torch.nan) if merged is None else merged.to(start) - start
    signs = experts.sign().float()  # sums of up to 2^24 ones are exact
    filled = signs.abs()
    both, agreement = (filled @ filled.T).double(), (signs @ signs.T).double()
    number = filled.sum(0)
    touched = number > 0
    kept = torch.full_like(base_square, torch.nan) if merged is None else (touched & (change != 0)).sum().double()
    return Alikeness(
        size=torch.full_like(base_square, start.numel()),
        gram=experts @ experts.T,
        total=experts.sum(1),
        both=both,
        opposed=(both - agreement) / 2,
        shared=(number > 1).sum().double(),
        fought=(signs.sum(0).abs() < number).sum().double(),
        touched=touched.sum().double(),
        base_square=base_square,
        merged_square=change.square().sum(),
        merged_kept=kept,
        merged_gram=experts @ change,
    )


def whole(found: Mapping[str, Alikeness]) -> Alikeness:
    """Over all tensors.

    Raises:
        ValueError: there is none.
    """
    if not found:
        raise ValueError("the models have no floating-point tensor in common: there is nothing to compare")
    return reduce(add, found.values())


def by_layer(found: Mapping[str, Alikeness]) -> dict[str, Alikeness]:
    """Over the tensors of each layer, and of each module outside of layers.

    Layers are named by what stands before their number, and the number: ``blocks.3``. They stand where the first of
    their stack stood, in the order of their numbers.
    """
    grouped: dict[tuple[str, int], list[str]] = {}
    for name in found:
        match = LAYER.match(name)
        key = (name.rpartition(".")[0] or name, -1) if match is None else (match["stack"], int(match["number"]))
        grouped.setdefault(key, []).append(name)
    stacks = {stack: place for place, (stack, _) in reversed(list(enumerate(grouped)))}
    keys = sorted(grouped, key=lambda key: (stacks[key[0]], key[1]))
    return {layer_name(*key): reduce(add, (found[name] for name in grouped[key])) for key in keys}


def layer_name(stack: str, number: int) -> str:
    """``blocks.3``; the module's own name where there is no number."""
    return stack if number < 0 else f"{stack}.{number}".removeprefix(".")


def pairs(num: int) -> Iterator[tuple[int, int]]:
    """All (i, j) with i < j < ``num``."""
    return combinations(range(num), 2)


def over_pairs(matrix: Tensor) -> float:
    """The mean over the pairs i < j of a (T, T) matrix; pairs without a value are left out, NaN where none has one."""
    return float(torch.stack([matrix[i, j] for i, j in pairs(len(matrix))]).nanmean()) if len(matrix) > 1 else torch.nan


def normalized(gram: Tensor) -> Tensor:
    """(T, T) cosines from inner products, 1 with itself and in [-1, 1]; NaN with a zero vector."""
    norms = gram.diagonal().sqrt()
    return (gram / torch.outer(norms, norms)).clamp(-1, 1)
