"""Per-sample averages of linear maps, exact in values and gradients.

Every sample b has weights p(b) over K experts and sees one merged map:

    W(b) = sum_i p_i(b) W_i,   bias(b) = sum_i p_i(b) bias_i,   out(b) = x(b) W(b)^T + bias(b)

Three forms compute this. They differ in cost only, and `mixed_linear` picks one:

- ``rows``: one pass per *distinct* row of p, merging just the experts with a non-zero weight into one reused
  buffer. Extra memory O * I, forward and backward. An expert that has weight 1 is used as it is, without a
  copy.
- ``batched``: all merged maps by one product (B, k) x (k, O * I), then one batched product. Extra memory
  (B + k) * O * I, for the k experts used anywhere in the batch.
- ``factored``: experts applied side by side, their results weighted. Extra memory B * S * k * min(I, O).

Shapes: B batch, K experts, S positions of one sample, I and O features in and out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

Form = Literal["rows", "batched", "factored"]


@dataclass(frozen=True)
class Group:
    """Samples that have the same mixing weights.

    Args:
        rows: their positions in the batch; a slice where they are neighbours.
        experts: the experts with a non-zero weight, the largest magnitude first.
        weights: their weights, in the same order.
    """

    rows: slice | Tensor
    experts: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Mixture:
    """Mixing weights of one batch, with the equal rows found once for all sites that use them.

    Args:
        weights: (B, K).
        groups: the distinct rows of ``weights``.
        used: experts with a non-zero weight in any row; all of them where ``weights`` carries a gradient.
        is_one_hot: every row picks one expert with weight 1, and no gradient goes to ``weights``.
    """

    weights: Tensor
    groups: tuple[Group, ...]
    used: tuple[int, ...]
    is_one_hot: bool

    @classmethod
    def of(cls, weights: Tensor) -> Mixture:
        """Group the rows of ``weights`` (B, K). Waits for the device that holds them, once."""
        members: dict[tuple[float, ...], list[int]] = {}
        for position, row in enumerate(weights.detach().double().tolist()):
            members.setdefault(tuple(row), []).append(position)
        groups = []
        for row, positions in members.items():
            weighed = [(weight, expert) for expert, weight in enumerate(row) if weight]
            weighed.sort(key=lambda pair: -abs(pair[0]))
            shares, experts = tuple(w for w, _ in weighed), tuple(e for _, e in weighed)
            groups.append(Group(_rows(positions, weights.device), experts, shares))
        needed = weights.requires_grad
        used = sorted({expert for group in groups for expert in group.experts}) or [0]
        return cls(
            weights=weights,
            groups=tuple(groups),
            used=tuple(range(weights.shape[1]) if needed else used),
            is_one_hot=not needed and all(group.weights == (1.0,) for group in groups),
        )

    def average(self, vectors: Sequence[Tensor], like: Tensor) -> Tensor:
        """Each sample's average of K vectors (N,), shaped (B, 1, ..., N) to meet ``like`` (B, ..., N)."""
        shares = self.weights[:, list(self.used)]
        averages = shares @ torch.stack([vectors[i].to(shares.dtype) for i in self.used])
        return averages.to(like.dtype).view(len(averages), *(1,) * (like.dim() - 2), -1)

    def gather(self, parts: Sequence[Tensor], num_samples: int) -> Tensor:
        """The results of all groups as rows of one batch, (B, ...)."""
        out = parts[0].new_empty(num_samples, *parts[0].shape[1:])
        for group, part in zip(self.groups, parts):
            out[group.rows] = part
        return out

    @classmethod
    def one_hot(cls, index: Tensor, num_experts: int) -> Mixture:
        """One expert per sample; ``index`` is (B,) long."""
        return cls.of(F.one_hot(index, num_experts).float())


def _rows(positions: list[int], device: torch.device) -> slice | Tensor:
    """Rising ``positions`` as a slice where they are neighbours, else on ``device``."""
    first, last = positions[0], positions[-1]
    if last - first + 1 == len(positions):
        return slice(first, last + 1)
    return torch.tensor(positions, device=device)


def mixed_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    mixture: Mixture,
    form: Form | None = None,
) -> Tensor:
    """Apply to every sample of ``x`` the average of linear maps that its mixing weights ask for.

    Args:
        x: (B, ..., I).
        weights: K tensors (O, I).
        biases: K tensors (O,), or None.
        mixture: weights (B, K).
        form: see the module's docstring; None picks by device and sizes.

    Returns:
        (B, ..., O), in the dtype of ``x`` or of an active autocast. Gradients reach ``x``, the experts, and
        the mixing weights.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    out_features, in_features = weights[0].shape
    flat = x.reshape(x.shape[0], -1, in_features)
    form = form or pick_form(flat, out_features, mixture)
    if form == "rows":
        num_experts = len(weights)
        out = _RowsLinear.apply(mixture, num_experts, flat, mixture.weights, *weights, *(biases or ()))
    else:
        weights = [weights[i].to(x.dtype) for i in mixture.used]
        biases = biases and [biases[i].to(x.dtype) for i in mixture.used]
        shares = mixture.weights[:, list(mixture.used)].to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            out = (_batched if form == "batched" else _factored)(flat, weights, biases, shares)
    return out.reshape(*x.shape[:-1], out_features)


def mixed_norm(x: Tensor, norms: Sequence[nn.LayerNorm | nn.RMSNorm], mixture: Mixture) -> Tensor:
    """What norms over the last dimension with averaged weights and biases make of ``x`` (B, ..., N)."""
    first = norms[0]
    if isinstance(first, nn.LayerNorm):
        scaled = F.layer_norm(x, first.normalized_shape, eps=first.eps)
    else:
        scaled = F.rms_norm(x, first.normalized_shape, eps=first.eps)
    scaled = scaled * mixture.average([norm.weight for norm in norms], like=scaled)
    if getattr(first, "bias", None) is None:
        return scaled
    return scaled + mixture.average([norm.bias for norm in norms], like=scaled)


def pick_form(x: Tensor, out_features: int, mixture: Mixture) -> Form:
    """The cheapest form for ``x`` (B, S, I).

    A CPU merges one small map in cache faster than it moves B of them through memory. Accelerators pay per
    launch, so they batch, unless few rows differ or the merged maps would outgrow the activations.
    """
    if x.device.type == "cpu" or len(mixture.groups) <= 2:
        return "rows"
    num_samples, positions, in_features = x.shape
    merged = num_samples * out_features * in_features
    factored = num_samples * positions * len(mixture.used) * min(in_features, out_features)
    return "batched" if merged <= max(factored, 4 * x.numel()) else "factored"


def _batched(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, shares: Tensor) -> Tensor:
    merged = (shares @ torch.stack(tuple(weights)).flatten(1)).view(len(x), *weights[0].shape)  # (B, O, I)
    if biases is None:
        return torch.bmm(x, merged.mT)
    return torch.baddbmm((shares @ torch.stack(tuple(biases)))[:, None], x, merged.mT)


def _factored(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, shares: Tensor) -> Tensor:
    out_features, in_features = weights[0].shape
    if out_features <= in_features:  # weigh on the narrow side: it is what autograd keeps
        each = F.linear(x, torch.cat(tuple(weights))).unflatten(-1, (len(weights), out_features))  # (B, S, k, O)
        out = torch.einsum("bsko,bk->bso", each, shares)
    else:
        out = F.linear((shares[:, None, :, None] * x[:, :, None]).flatten(2), torch.cat(tuple(weights), dim=1))
    return out if biases is None else out + (shares @ torch.stack(tuple(biases)))[:, None]


def merge_into(buffer: Tensor, tensors: Sequence[Tensor], group: Group) -> tuple[Tensor, float]:
    """The merged tensor of one group as (tensor, factor): w_0 * (t_0 + w_1 / w_0 t_1 + ...), factor w_0.

    Two experts take one pass over memory. ``buffer`` is overwritten, or left alone where a single expert
    needs no merging.
    """
    first, *others = group.experts
    factor, *weights = group.weights
    if not others:
        return tensors[first].to(buffer.dtype), factor
    torch.add(tensors[first], tensors[others[0]], alpha=weights[0] / factor, out=buffer)
    for expert, weight in zip(others[1:], weights[1:]):
        buffer.add_(tensors[expert], alpha=weight / factor)
    return buffer, factor


class _RowsLinear(torch.autograd.Function):
    """The ``rows`` form. Keeps ``x`` and the experts for the backward pass, and merges anew there."""

    @staticmethod
    def forward(ctx, mixture: Mixture, num_experts: int, x: Tensor, shares: Tensor, *tensors: Tensor) -> Tensor:
        weights, biases = tensors[:num_experts], tensors[num_experts:]
        ctx.mixture, ctx.num_experts = mixture, num_experts
        ctx.save_for_backward(x, *tensors)
        out_features, in_features = weights[0].shape
        out = x.new_empty(*x.shape[:-1], out_features)
        buffer = x.new_empty(out_features, in_features)
        offset = x.new_empty(out_features)
        for group in mixture.groups:
            rows = group.rows
            target = out[rows].view(-1, out_features)  # a view where rows is a slice, else a copy
            if not group.experts:
                target.zero_()
            else:
                merged, factor = merge_into(buffer, weights, group)
                inputs = x[rows].reshape(-1, in_features)
                if biases:
                    bias, bias_factor = merge_into(offset, biases, group)
                    torch.addmm(bias, inputs, merged.t(), beta=bias_factor, alpha=factor, out=target)
                else:
                    torch.mm(inputs, merged.t(), out=target)
                    if factor != 1:
                        target.mul_(factor)
            if not isinstance(rows, slice):
                out[rows] = target.view(-1, *out.shape[1:])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *tensors = ctx.saved_tensors
        num_experts, mixture = ctx.num_experts, ctx.mixture
        weights, biases = tensors[:num_experts], tensors[num_experts:]
        needs_x, needs_shares, *needs = ctx.needs_input_grad[2:]
        out_features, in_features = weights[0].shape
        grad_x = torch.zeros_like(x) if needs_x else None
        grads = [torch.zeros_like(t) if need else None for t, need in zip(tensors, needs)]
        buffer = x.new_empty(out_features, in_features)
        for group in mixture.groups:
            if not group.experts:
                continue
            outer = grad[group.rows].reshape(-1, out_features)
            if needs_x:
                merged, factor = merge_into(buffer, weights, group)
                grad_x[group.rows] = (outer @ merged).mul_(factor).view(-1, *x.shape[1:])
            if any(grads[i] is not None for i in group.experts):
                product = torch.mm(outer.t(), x[group.rows].reshape(-1, in_features), out=buffer)
                for expert, weight in zip(group.experts, group.weights):
                    if grads[expert] is not None:
                        grads[expert].add_(product, alpha=weight)
            for expert, weight in zip(group.experts, group.weights) if biases else ():
                if grads[num_experts + expert] is not None:
                    grads[num_experts + expert].add_(outer.sum(0), alpha=weight)
        grad_shares = _shares_gradient(x, grad, weights, biases) if needs_shares else None
        return None, None, grad_x, grad_shares, *grads


def _shares_gradient(x: Tensor, grad: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]) -> Tensor:
    """(B, K): how the loss changes with a sample's weight of an expert, also where that weight is zero."""
    columns = []
    for number, weight in enumerate(weights):
        weight = weight.to(x.dtype)
        if weight.shape[0] <= weight.shape[1]:
            column = (F.linear(x, weight) * grad).flatten(1).sum(1)
        else:
            column = ((grad @ weight) * x).flatten(1).sum(1)
        columns.append(column + grad.sum(1) @ biases[number].to(x.dtype) if biases else column)
    return torch.stack(columns, dim=1)
