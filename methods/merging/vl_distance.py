"""How far two branches or models are apart, entry by entry: what predicts whether merging them works.

    SSD(x, y)    1 - (1/N) sum_i |x_i + y_i| / (|x_i| + |y_i|): soft sign dissimilarity; 0 where all signs agree, 1
                 where entries are opposite; an entry that is 0 in both adds 0
    TSSD(x, y)   SSD after all but the largest share of each vector has become 0, over entries that one keeps
    L2           |x - y|
    cosine       1 - <x, y> / (|x| |y|); 0 where a vector is 0

For models that were trained from one start, x and y are the differences from it. VL-Merging (arXiv 2304.14933)
introduces the first two.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.methods.merging.plan import StateDict
from fulgurite.methods.merging.trimming import trim
from fulgurite.methods.merging.vl_merging import Layout


@dataclass(frozen=True)
class Distance:
    """Distances of two vectors of ``size`` entries; see the module."""

    ssd: float
    tssd: float
    l2: float
    cosine: float
    size: int


@dataclass(frozen=True)
class Distances:
    """Of each tensor by its name, and of all tensors together as one vector."""

    tensors: dict[str, Distance]
    overall: Distance


def ssd(x: Tensor, y: Tensor) -> float:
    """Soft sign dissimilarity of two tensors of one shape, in [0, 1]."""
    return float(_dissimilar(x, y).mean(dtype=torch.float64)) if x.numel() else 0.0


def tssd(x: Tensor, y: Tensor, keep: float) -> float:
    """Truncated SSD; ``keep`` is the share of each tensor that stays, in (0, 1]; 1 gives `ssd`."""
    if not 0 < keep <= 1:
        raise ValueError(f"keep={keep} lies above 0 and up to 1")
    if keep == 1 or not x.numel():
        return ssd(x, y)
    x, y = trim(x, keep), trim(y, keep)
    return float(_dissimilar(x, y).sum(dtype=torch.float64) / ((x != 0) | (y != 0)).sum().clamp(min=1))


def _dissimilar(x: Tensor, y: Tensor) -> Tensor:
    # Divided by the larger first, so that neither tiny nor huge entries leave the range of numbers.
    largest = torch.maximum(x.abs(), y.abs())
    largest = torch.where(largest == 0, 1, largest)
    x, y = x / largest, y / largest
    total = x.abs() + y.abs()
    return torch.where(total == 0, 0, 1 - (x + y).abs() / torch.where(total == 0, 1, total))


def distance(x: Tensor, y: Tensor, keep: float = 0.2) -> Distance:
    """All distances of two tensors of one shape; ``keep`` is the share that TSSD looks at."""
    x, y = x.detach().flatten(), y.detach().flatten()
    dot, x2, y2 = (float((a * b).sum(dtype=torch.float64)) for a, b in ((x, y), (x, x), (y, y)))
    norms = (x2 * y2) ** 0.5
    l2 = float((x - y).square().sum(dtype=torch.float64)) ** 0.5
    return Distance(ssd(x, y), tssd(x, y, keep), l2, max(1 - dot / norms, 0.0) if norms else 0.0, x.numel())


@torch.no_grad()
def distances(x: StateDict, y: StateDict, start: StateDict | None = None, keep: float = 0.2) -> Distances:
    """Distances of two models tensor by tensor and overall, in float32 (float64 where one is).

    Args:
        x: floating-point tensors by name.
        y: tensors of the same names and shapes.
        start: what both were trained from; their differences from it are compared then.
        keep: the share that TSSD looks at, of each tensor; overall, of all entries as one vector.

    Returns:
        the distances. Holds both models once more for the overall ones.

    Raises:
        ValueError: names or shapes differ.
    """
    for other in (y,) if start is None else (y, start):
        problems = [name for name in x if name not in other or other[name].shape != x[name].shape]
        if problems or not x or (other is y and len(y) != len(x)):
            raise ValueError(f"models of different names or shapes, or none: {problems or list(x.keys() ^ y.keys())}")
    found, flat = {}, ([], [])
    for name in x:
        exact = torch.float64 in (x[name].dtype, y[name].dtype)
        pair = [model[name].detach().to(torch.float64 if exact else torch.float32) for model in (x, y)]
        if start is not None:
            pair = [tensor - start[name].detach().to(tensor) for tensor in pair]
        found[name] = distance(*pair, keep)
        for vector, tensor in zip(flat, pair):
            vector.append(tensor.flatten())
    return Distances(found, distance(torch.cat(flat[0]), torch.cat(flat[1]), keep))


def branch_distances(
    state: StateDict,
    first: str = "v",
    second: str = "l",
    seed: StateDict | None = None,
    keep: float = 0.2,
    layout: Layout | None = None,
) -> Distances:
    """Distances of two branches of one state dict, by the merged names of the tensors that have both.

    Args:
        state: of the model with branches.
        first, second: names of the branches.
        seed: W_0, of the model without branches that they started from.
        keep: see `distances`.
        layout: of the names, the published code's by default.
    """
    found: Mapping[str, Mapping[str, str]] = (layout or Layout()).branches(list(state))
    both = {target: names for target, names in found.items() if first in names and second in names}
    one, two = ({target: state[names[branch]] for target, names in both.items()} for branch in (first, second))
    return distances(one, two, seed, keep)
