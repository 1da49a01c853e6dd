"""NuSLERP: SLERP by weights, of whole tensors or of each of their vectors, of models or of their task vectors.

    t = w_1 / (w_0 + w_1),    slerp(t) of `slerp` without its shortcut for small angles

as in arcee-ai/mergekit; only vectors on one line to the precision of float32 are interpolated on that line.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from fulgurite.methods.merging.slerp import TwoModels, combine, gram, share_of_second, slerp_factors

COLLINEAR = 1 - 5e-13  # |c| at an angle of 1e-6, which is what rounding to float32 makes of none


class NuSlerp(TwoModels):
    """NuSLERP of two models.

    Args:
        t: share of the second model; None takes it from the weights, a half where they cancel.
        flatten: each tensor is one vector; False interpolates vector by vector.
        dim: along which the vectors lie where not ``flatten``: -1 are the rows of a matrix (out, in), 0 its columns
            (``row_wise`` in mergekit).
        task_vectors: interpolate the changes from the base, and add them to it.
    """

    def __init__(
        self, t: float | None = None, flatten: bool = True, dim: Literal[-1, 0] = -1, task_vectors: bool = False
    ) -> None:
        super().__init__(t)
        self.flatten, self.dim, self.needs_base = flatten, dim, task_vectors

    def merge_tensor(
        self, name: str, base: Tensor | None, experts: Sequence[Tensor], weights: Sequence[float]
    ) -> Tensor:
        """The point at ``t`` of each arc; one running sum, and copies of the models where ``dim`` is 0."""
        t = share_of_second(weights)
        if t in (0, 1):
            return experts[int(t)].clone()
        vectors = [self.vectors(expert) for expert in experts]
        origin = self.vectors(base) if self.needs_base else None
        merged = combine(slerp_factors(gram(vectors, origin), t, COLLINEAR), vectors, origin)
        if self.flatten or self.dim == -1 or experts[0].dim() < 2:
            return merged.view(experts[0].shape)
        return merged.T.reshape(experts[0].shape)

    def vectors(self, tensor: Tensor) -> Tensor:
        """(R, C)."""
        if self.flatten or tensor.dim() < 2:
            return tensor.reshape(1, -1)
        return tensor.reshape(-1, tensor.shape[-1]) if self.dim == -1 else tensor.reshape(len(tensor), -1).T
