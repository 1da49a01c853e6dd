"""Which weights a task needs exactly: they stay in 16 bits while all others have a few (TaCQ, arXiv 2504.07389).

    A = sum over examples of |dL / dW|,     score = |A (W - W_q) W|,     the k = int(p M) largest of all M weights

W_q is what plain quantization makes of W. A is of `methods.statistics.absolute_gradients`; it depends neither on bits
nor on p, so that both may change without a new backward pass. Differences and products are taken in float32, as those
of 16-bit numbers vanish. A larger p keeps what a smaller one does and more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fulgurite.methods.exact_masks import largest_of_all

KEPT_BITS = 16
INDEX_BITS = 16


def task_circuit_scores(sensitivity: Tensor, weight: Tensor, quantized: Tensor) -> Tensor:
    """|A (W - W_q) W| in float32, or float64 where all have that.

    Raises:
        ValueError: shapes differ.
    """
    if not sensitivity.shape == weight.shape == quantized.shape:
        shapes = ", ".join(str(tuple(each.shape)) for each in (sensitivity, weight, quantized))
        raise ValueError(f"sensitivity, weight and quantized weight have shapes {shapes}")
    dtype = torch.float64 if weight.dtype == sensitivity.dtype == torch.float64 else torch.float32
    wide = weight.detach().to(dtype)
    return (wide - quantized.to(wide)).mul_(wide).mul_(sensitivity.to(wide)).abs_()


def task_circuit_mask(
    sensitivity: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    quantized: Callable[[str], Tensor],
    ratio: float,
    num_all: int | None = None,
) -> dict[str, Tensor]:
    """True at the weights that are kept, of every matrix.

    Scores are computed three times, and those of two matrices never exist together. Memory: three copies of one matrix,
    and the masks.

    Args:
        sensitivity: name -> A, on any common scale.
        weights: name -> W, before quantization, in the order in which equal scores are kept.
        quantized: name -> W_q, the same whenever it is asked; ``dict.__getitem__`` of one, or a reader of a file.
        ratio: p.
        num_all: what p is a share of, M by default; the published code has an option to count all of a model.

    Raises:
        ValueError: names or shapes differ, a ratio outside [0, 1], or more than all kept.
    """
    if missing := [name for name in weights if name not in sensitivity]:
        raise ValueError(f"{len(missing)} matrices have no sensitivity, first {missing[0]}")
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio={ratio}: expected a share from 0 to 1")
    sizes = {name: weight.numel() for name, weight in weights.items()}
    count = int(ratio * (sum(sizes.values()) if num_all is None else num_all))
    if count > sum(sizes.values()):
        raise ValueError(f"ratio={ratio} of {num_all} weights is more than the {sum(sizes.values())} to choose from")

    def score_of(name: str) -> Tensor:
        return task_circuit_scores(sensitivity[name], weights[name], quantized(name).to(weights[name].device))

    return dict(largest_of_all(score_of, sizes, count))


def average_bits(bits: float, ratio: float, columns: int = 0) -> float:
    """Bits per weight: b (1 - p) + (16 + 16) p, with an index for each kept weight, and scale and zero of a row.

    Args:
        bits: of the others.
        ratio: p, kept.
        columns: length of a row (or group) that has a scale and a zero of 16 bits each; 0 for none.
    """
    return bits * (1 - ratio) + (KEPT_BITS + INDEX_BITS) * ratio + (32 / columns if columns else 0)


def ratio_for(budget: float, bits: float, columns: int = 0) -> float:
    """The largest share p that `average_bits` allows within ``budget``.

    Raises:
        ValueError: the budget does not even hold the others.
    """
    least = average_bits(bits, 0, columns)
    if not least <= budget < math.inf:
        raise ValueError(f"a budget of {budget} bits is below the {least:.4g} of {bits} bits with their scales")
    return min(1.0, (budget - least) / (KEPT_BITS + INDEX_BITS - bits))
