"""One set of weights for all modalities, of a model that has one per modality in each block (arXiv 2304.14933).

M are the branches of a tensor (v vision, l language, and in the upper blocks vl for both), all in one state dict:

    interpolation   W = sum_m a_m W_m / sum_m a_m,   a = (2/3 r, 2/3 (1 - r), 1/3) for (v, l, vl)
    arithmetic      W = W_0 + lam sum_m (W_m - W_0)                                     rule "sum"
                    W <- W + lam (W_m - W), one m after the other from W = W_0          rule "sequential"
    RegMean         W = (sum_m W_m G_m) (sum_m G_m)^-1 for matrices, the mean for the rest

With two branches interpolation is r W_v + (1 - r) W_l. The sequential rule is what the published code computes in
place of the paper's formula; there one branch alone comes back whatever lam is. Entries that have no branches are
copied, so models that share part of a block merge too, whatever the number of blocks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fulgurite.methods.merging.base import average
from fulgurite.methods.merging.linear import TaskArithmetic
from fulgurite.methods.merging.plan import StateDict
from fulgurite.methods.merging.regmean import fitting_gram, regression_mean

LISTED = 8  # names in a message
# transformer.blocks.3.attn.v.qkv.weight -> transformer.blocks.3.attn.qkv.weight, branch v
OFFICIAL = r"(?P<head>(?:.*\.)?(?:attn|mlp|norm1|norm2))\.(?P<branch>v|l|vl)\.(?P<tail>.+)"
Task = Literal["retrieval", "vqa", "nlvr2"]
JOINT = "vl"


@dataclass(frozen=True)
class Layout:
    """How names say which branch a tensor belongs to.

    Args:
        pattern: matches the whole name of a branch's tensor, with groups ``head``, ``branch`` and ``tail``; the merged
            one is called ``head.tail``.
        used_by: the task that the merged model is for. Where a tensor has a joint branch vl, retrieval merges v and l
            only, which encode images and texts apart; vqa and nlvr2 take vl, which sees their pairs. All by default.
    """

    pattern: str = OFFICIAL
    used_by: Task | None = None

    def branches(self, names: Sequence[str]) -> dict[str, dict[str, str]]:
        """Merged name -> branch -> name, for all names that match, in their order.

        Raises:
            ValueError: no name matches, or a merged name is there already. Names them.
        """
        found: dict[str, dict[str, str]] = {}
        for name in names:
            match = re.fullmatch(self.pattern, name)
            if match:
                found.setdefault(f"{match['head']}.{match['tail']}", {})[match["branch"]] = name
        if not found:
            raise ValueError(
                f"no tensor has branches by the pattern {self.pattern!r}; there are {list(names)[:LISTED]}"
            )
        both = sorted(found.keys() & set(names))
        if both:
            raise ValueError(f"tensors both with and without branches: {both[:LISTED]}")
        return found

    def used(self, branches: Mapping[str, str]) -> dict[str, str]:
        """The branches that the task uses.

        Raises:
            ValueError: there is none.
        """
        if self.used_by is None or JOINT not in branches:
            return dict(branches)
        joint = self.used_by != "retrieval"
        chosen = {branch: name for branch, name in branches.items() if (branch == JOINT) == joint}
        if not chosen:
            raise ValueError(
                f"{self.used_by} uses branches other than {JOINT}, and there is only {list(branches.values())}"
            )
        return chosen


MergeOne = Callable[[str, Mapping[str, Tensor], Mapping[str, str]], Tensor]


@torch.no_grad()
def merge_branches(state: StateDict, layout: Layout, merge: MergeOne) -> dict[str, Tensor]:
    """The state dict of the model without branches, in order of the first branch's names.

    Args:
        state: of the model with branches. One tensor's branches are read at a time.
        layout: of its names.
        merge: called with the merged name, the used branches' tensors in float32 (float64 if one is), and their
            names; gives the merged tensor.

    Raises:
        ValueError: branches differ in shape, or one holds NaN; and what `Layout` raises.
    """
    branches = layout.branches(list(state))
    merged_name = {name: target for target, found in branches.items() for name in found.values()}
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        target = merged_name.get(name)
        if target is None:
            out[name] = tensor.detach().clone()
        elif target not in out:
            names = layout.used(branches[target])
            sources = _sources(state, names)
            out[target] = merge(target, sources, names).to(state[next(iter(names.values()))].dtype)
    return out


def _sources(state: StateDict, names: Mapping[str, str]) -> dict[str, Tensor]:
    given = {branch: state[name].detach() for branch, name in names.items()}
    shapes = {names[branch]: tuple(tensor.shape) for branch, tensor in given.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"branches of one tensor have different shapes: {shapes}")
    exact = any(tensor.dtype == torch.float64 for tensor in given.values())
    out = {branch: tensor.to(torch.float64 if exact else torch.float32) for branch, tensor in given.items()}
    for branch, tensor in out.items():
        if tensor.isnan().any():
            raise ValueError(f"{names[branch]} holds NaN")
    return out


class InterpolateBranches:
    """The weighted mean of the branches.

    Args:
        ratio: r, of v against l.
        weights: branch -> a_m, in place of those that ``ratio`` stands for; divided by the sum over the branches that
            a tensor has. One branch alone is taken whatever its weight.
        layout: of the names.

    Raises:
        ValueError: ``ratio`` is outside 0 to 1, or a weight is negative.
    """

    def __init__(
        self, ratio: float = 0.5, weights: Mapping[str, float] | None = None, layout: Layout = Layout()
    ) -> None:
        if not 0 <= ratio <= 1:
            raise ValueError(f"ratio={ratio} must be from 0 to 1")
        self.weights = {"v": 2 / 3 * ratio, "l": 2 / 3 * (1 - ratio), "vl": 1 / 3} if weights is None else dict(weights)
        if min(self.weights.values(), default=0) < 0:
            raise ValueError(f"weights must not be negative: {self.weights}")
        self.layout = layout

    def __call__(self, state: StateDict) -> dict[str, Tensor]:
        """The merged state dict; see `merge_branches`.

        Raises:
            ValueError: also where a branch has no weight, or those of a tensor are all 0.
        """
        return merge_branches(state, self.layout, self._merge)

    def _merge(self, target: str, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Tensor:
        if len(tensors) == 1:
            return next(iter(tensors.values())).clone()
        lacking = [branch for branch in tensors if branch not in self.weights]
        if lacking:
            raise ValueError(f"{target}: no weight for the branches {lacking}; weights has {list(self.weights)}")
        shares = [self.weights[branch] for branch in tensors]
        if sum(shares) <= 0:
            raise ValueError(f"{target}: the weights of its branches {list(tensors)} are all 0")
        return average(list(tensors.values()), shares)


class BranchArithmetic:
    """The seed model plus the branches' differences from it.

    Args:
        lam: multiple of each difference; the published runs take 0.75.
        rule: ``sum``, the formula, or ``sequential``, what the published code computes, which depends on the order of
            the branches: v, l, vl.
        layout: of the names.
    """

    def __init__(self, lam: float = 1.0, rule: Literal["sum", "sequential"] = "sum", layout: Layout = Layout()) -> None:
        self.lam, self.rule, self.layout = lam, rule, layout

    def __call__(self, state: StateDict, seed: StateDict) -> dict[str, Tensor]:
        """The merged state dict; see `merge_branches`.

        Args:
            state: of the model with branches.
            seed: W_0, of the model without branches that they all started from.

        Raises:
            ValueError: also where the seed lacks a tensor, or has it in another shape. Names all.
        """
        problems = []
        for target, names in self.layout.branches(list(state)).items():
            shape = tuple(state[next(iter(names.values()))].shape)
            own = tuple(seed[target].shape) if target in seed else "missing"
            if own != shape:
                problems.append(f"{target}: seed {own}, branches {shape}")
        if problems:
            listed = "\n  ".join(problems[:LISTED])
            raise ValueError(f"{len(problems)} tensors of the seed do not fit the branches:\n  {listed}")

        def merge(target: str, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Tensor:
            first = next(iter(tensors.values()))
            start = seed[target].detach().to(first.device, first.dtype)
            return branch_arithmetic(start, tensors, self.lam, self.rule)

        return merge_branches(state, self.layout, merge)


def branch_arithmetic(
    seed: Tensor, tensors: Mapping[str, Tensor], lam: float, rule: Literal["sum", "sequential"]
) -> Tensor:
    """W of one tensor from W_0 and its branches; see the module. One running tensor."""
    if rule == "sum":
        return TaskArithmetic(lam).merge_tensor("", seed, list(tensors.values()), [1.0] * len(tensors))
    ordered = [tensors[branch] for branch in sorted(tensors, key=_official_order)]
    if len(ordered) == 1:
        return ordered[0].clone()
    out = seed
    for tensor in ordered:
        out = out + lam * (tensor - out)
    return out


def _official_order(branch: str) -> tuple[int, str]:
    known = ("v", "l", "vl")
    return (known.index(branch) if branch in known else len(known), branch)


class RegMeanBranches:
    """The least-squares average of the branches' linear layers, the mean of all else.

    A Gram is X^T X of a layer's inputs on its own modality. Sums and means over tokens differ: of sums, the modality
    with more tokens counts more, which is what the published code does.

    NOTE: the published code passes over a branch without a Gram; here that is an error. It always merges v and l for
    retrieval, vl for vqa and all for nlvr2: say so by ``used_by`` of the layout. A ridge relative to the Grams' mean
    diagonal pulls directions without data to the plain mean of the branches.

    Args:
        offdiag: factor of the Grams' off-diagonal entries.
        ridge: added to the diagonal of the summed Gram, relative to its mean.
        weights: branch -> factor of its Gram, 1 for those not named.
        layout: of the names.
    """

    def __init__(
        self,
        offdiag: float = 1.0,
        ridge: float = 1e-8,
        weights: Mapping[str, float] | None = None,
        layout: Layout = Layout(),
    ) -> None:
        if not 0 <= offdiag <= 1:
            raise ValueError(f"offdiag={offdiag} must be from 0 to 1")
        self.offdiag, self.ridge, self.weights, self.layout = offdiag, ridge, dict(weights or {}), layout

    def __call__(self, state: StateDict, grams: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The merged state dict; see `merge_branches`.

        Args:
            state: of the model with branches.
            grams: by the name of the linear layer, or for ``qkv`` by that of the module around it
                (``blocks.0.attn.v``), whose input it is: (in, in).

        Raises:
            ValueError: also where a used matrix has no Gram, or one that does not fit. Names all that lack one.
        """
        lacking = []
        for names in self.layout.branches(list(state)).values():
            used = self.layout.used(names).values()
            if len(used) > 1 and is_matrix(state, names):
                lacking += [name for name in used if gram_name(name, grams) is None]
        if lacking:
            raise ValueError(f"{len(lacking)} matrices have no Gram: {lacking[:LISTED]}")

        def merge(target: str, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Tensor:
            matrices, shares = list(tensors.values()), [self.weights.get(branch, 1.0) for branch in tensors]
            if len(matrices) == 1:
                return matrices[0].clone()
            if not is_matrix(state, names):
                return average(matrices, [1.0] * len(matrices))
            own = [
                fitting_gram(name, number, grams[gram_name(name, grams)], matrices[0])
                for number, name in enumerate(names.values())
            ]
            return regression_mean(matrices, own, shares, self.offdiag, self.ridge)

        return merge_branches(state, self.layout, merge)


def is_matrix(state: StateDict, names: Mapping[str, str]) -> bool:
    """Whether these are the branches of a linear layer's weight."""
    first = next(iter(names.values()))
    return first.endswith(".weight") and state[first].dim() == 2


def gram_name(name: str, grams: Mapping[str, Tensor]) -> str | None:
    """The key of the Gram of a layer's inputs, by the name of its weight; None where there is none."""
    layer = name.removesuffix(".weight")
    around, _, last = layer.rpartition(".")
    return next((key for key in (layer, around if last == "qkv" else layer) if key in grams), None)
