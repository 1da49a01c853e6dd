"""Routing by the cosine to one mean feature per expert, as in DAM (arXiv 2403.08755).

    c_i = mean of the training features of expert i,   s_i = <g / |g|, c_i / |c_i|>
    p   = softmax(s / temperature) over the top-k of s, zero elsewhere

B batch, N samples, D feature width, K experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite.methods.routing.base import Features, Router


def mixing_weights(
    similarities: Tensor,
    top_k: int = 2,
    temperature: float = 0.01,
    num_models: int | None = None,
    is_prob: bool = False,
) -> Tensor:
    """Weights of the experts, from how similar a sample is to each.

    Args:
        similarities: (B, K).
        top_k: experts to keep; all of them for 0 or less, and never more than there are. Ties keep the lowest
            index.
        temperature: of the softmax over the kept ones; towards 0 it becomes one-hot.
        num_models: only the first so many experts exist; the others get 0. All, when not given.
        is_prob: the input holds probabilities; the kept ones are divided by their sum instead.

    Returns:
        (B, K), non-negative, with rows that sum to 1.

    Raises:
        ValueError: ``num_models`` or ``temperature`` is out of range.
    """
    num_experts = similarities.shape[-1]
    num_models = num_experts if num_models is None else num_models
    if not 1 <= num_models <= num_experts:
        raise ValueError(f"num_models={num_models}, but there are {num_experts} experts")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature} must be above 0")
    known = similarities[..., :num_models]
    count = num_models if top_k <= 0 else min(top_k, num_models)
    order = known.argsort(dim=-1, descending=True, stable=True)[..., :count]
    kept = known.gather(-1, order)
    # The largest is subtracted first, so that a constant added to all similarities changes nothing.
    shares = kept / kept.sum(-1, keepdim=True) if is_prob else ((kept - kept[..., :1]) / temperature).softmax(-1)
    return torch.zeros_like(similarities).scatter(-1, order, shares)


class CentroidRouter(Router):
    """Weights experts by the cosine of a feature to the mean training feature of each.

    The means are float64 sums and counts, so they do not depend on the order, the batches, or the number of
    processes that fed them. Both are buffers of fixed shape once the width and the experts are known: give
    them here, or call `build`, before a checkpoint is loaded.

    Args:
        top_k: experts to mix per sample; 0 or less mixes all.
        temperature: of the softmax over the similarities.
        normalize_parts: scale every part of the feature to length 1 before they are joined. As published, the
            parts are joined as they are, and the one with the larger norm dominates.
        width: D, the sum over the parts.
        experts: their names, in the order of the columns.
    """

    sums: Tensor
    counts: Tensor

    def __init__(
        self,
        top_k: int = 2,
        temperature: float = 0.01,
        normalize_parts: bool = False,
        width: int | None = None,
        experts: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        self.top_k, self.temperature, self.normalize_parts = top_k, temperature, normalize_parts
        self.experts: list[str] = []
        self.register_buffer("sums", torch.zeros(0, 0, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(0, dtype=torch.float64))
        if width is not None:
            self.build(width, experts)
        elif experts:
            raise ValueError("experts without a width: give both, or neither and call build")

    def build(self, width: int, experts: Sequence[str]) -> None:
        """Make room for ``experts`` with features of ``width``; forgets what was learnt."""
        if len(set(experts)) != len(experts):
            raise ValueError(f"experts are named twice: {list(experts)}")
        self.experts = list(experts)
        self.sums = self.sums.new_zeros(len(experts), width)
        self.counts = self.counts.new_zeros(len(experts))

    def add(self, expert: str) -> None:
        """Make room for one more expert, after the others."""
        if expert in self.experts:
            raise ValueError(f"expert {expert!r} exists already")
        self.experts.append(expert)
        self.sums = torch.cat([self.sums, self.sums.new_zeros(1, self.sums.shape[1])])
        self.counts = torch.cat([self.counts, self.counts.new_zeros(1)])

    def joined(self, features: Features) -> Tensor:
        """The feature (N, D), from one tensor or from its parts."""
        parts = (features,) if isinstance(features, Tensor) else tuple(features)
        if self.normalize_parts:
            parts = tuple(F.normalize(part.double(), dim=-1) for part in parts)
        joined = torch.cat([part.double() for part in parts], dim=-1)
        if joined.shape[-1] != self.sums.shape[1]:
            raise ValueError(
                f"features with parts of width {[part.shape[-1] for part in parts]} meet a router built for "
                f"{self.sums.shape[1]} in all; call build(width, experts) with the width of the joined parts"
            )
        return joined

    @torch.no_grad()
    def update(self, features: Features, expert: str, reduce: Callable[[Tensor], Tensor] | None = None) -> None:
        """Add the features (N, D) of some training samples, N >= 0, to the mean of ``expert``.

        ``reduce`` sums a tensor over processes. With several processes give it, and call this equally often
        in all of them: the buffers must stay equal everywhere, since DDP overwrites them with the first
        process's.
        """
        row = self._row(expert)
        joined = self.joined(features)
        added = torch.cat([joined.sum(0), joined.new_tensor([len(joined)])])
        added = added if reduce is None else reduce(added)
        self.sums[row] += added[:-1]
        self.counts[row] += added[-1]

    def reset(self, expert: str) -> None:
        """Forget the features of one expert."""
        row = self._row(expert)
        self.sums[row], self.counts[row] = 0, 0

    def _row(self, expert: str) -> int:
        if expert not in self.experts:
            raise LookupError(f"no expert {expert!r}; there are {self.experts}")
        return self.experts.index(expert)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CentroidRouter:
        # A change of the model's precision moves the sums to a device, but keeps them in float64.
        return super()._apply(lambda tensor: tensor.to(fn(tensor.new_empty(0)).device), recurse)

    @property
    def centroids(self) -> Tensor:
        """Mean features (K, D) in float64; zeros for an expert without samples."""
        return self.sums / self.counts.clamp(min=1)[:, None]

    def similarities(self, features: Features) -> Tensor:
        """Cosines (B, K) in float64."""
        return F.normalize(self.joined(features), dim=-1) @ F.normalize(self.centroids, dim=-1).T

    def forward(self, features: Features, num_models: int | None = None, top_k: int | None = None) -> Tensor:
        """Mixing weights (B, K) in float32; zero for experts after the first ``num_models``.

        Raises:
            ValueError: an expert in use has seen no sample.
        """
        empty = [name for name, n in zip(self.experts[:num_models], self.counts.tolist()) if n == 0]
        if empty or not self.experts:
            raise ValueError(f"no training features of {empty or 'any expert'}; update the router before routing")
        kept = self.top_k if top_k is None else top_k
        weights = mixing_weights(self.similarities(features), kept, self.temperature, num_models)
        return weights.float()
