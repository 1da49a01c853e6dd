"""Which patches of a frame are compared with words: a learned score of each, and the k largest, differentiably.

Perturbed top-k of d scores s (arXiv 2104.03059), with M standard normal vectors n_m:

    I_m  = sort(topk(s + sigma n_m))                     k indices, ascending
    Y    = (1 / M) sum_m onehot(I_m)                     (k, d), rows sum to 1
    E_kd = (1 / (M sigma)) sum_m onehot(I_m)_kd n_md     dL/ds_d = sum_k dL/dY_kd E_kd

E is the element-wise estimator of the published code: how Y_kd changes with s_d, and not with the other scores.

Score of patch x_n of a frame with class token x_0, of a video of F frames:

    video   u = gelu(W1 LN [x_n ; x_0]),  v = sum over frames of u_0    UCoFiA, arXiv 2309.10091
    frame   u = gelu(W1 LN x_n),          v = u_0                       TS2-Net, arXiv 2207.07852
    both    s = tanh(w3 gelu(W2 [u ; v]))

Legend: B rows, V videos, F frames, N tokens of a frame, D width, M samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

NUMBERS = 1 << 22  # perturbed scores that are looked at at once
TOKENS = 1 << 14  # that are scored at once


def hard_topk(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest scores, ascending; of equal scores the first are taken.

    Args:
        scores: (..., d).
        k: 1 to d.

    Returns:
        (..., k) long.

    Raises:
        ValueError: k is not in 1 to d.
    """
    _require_enough(scores, k)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return order[..., :k].sort(dim=-1).values


def perturbed_topk(
    scores: Tensor,
    k: int,
    samples: int = 500,
    sigma: float = 0.05,
    generator: torch.Generator | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """How often each score is the first, second, .. of the k largest (by index) under noise.

    Memory beside the result and an estimate of the same size, which the backward pass needs: about 2 `NUMBERS` floats
    and 4 `NUMBERS` k / d indices (39 MiB for k = 3 of d = 49 in float32), or those of one row where it has more.

    Args:
        scores: (B, d).
        k: 1 to d.
        samples: M.
        sigma: standard deviation of the noise; 0 is `hard_topk`, whose gradient is zero.
        generator: of the noise, on the device of ``scores``.
        noise: (B, M, d) standard normal, instead of drawing it.

    Returns:
        (B, k, d), non-negative, rows sum to 1; float32 or better.

    Raises:
        ValueError: k is not in 1 to d, or the noise has another shape.
    """
    _require_enough(scores, k)
    rows, d = scores.shape
    exact = scores.detach().to(torch.promote_types(scores.dtype, torch.float32))
    if sigma == 0:
        value = functional.one_hot(hard_topk(exact, k), d).to(exact.dtype)
        return _Estimated.apply(scores, value, torch.zeros_like(value))
    if noise is not None and noise.shape != (rows, samples, d):
        raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {(rows, samples, d)}: rows, samples, scores")
    selection, estimate = exact.new_zeros(rows, k, d), exact.new_zeros(rows, k, d)
    step = max(NUMBERS // (samples * d), 1)
    for start in range(0, rows, step):
        part = slice(start, start + step)
        here = exact[part, None]
        if noise is None:
            drawn = torch.randn(len(here), samples, d, generator=generator, device=here.device, dtype=here.dtype)
        else:
            drawn = noise[part].to(here)
        found = torch.add(here, drawn, alpha=sigma).topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
        weights = drawn.gather(-1, found).mT / (samples * sigma)
        selection[part].scatter_add_(2, found.mT, torch.ones_like(weights))
        estimate[part].scatter_add_(2, found.mT, weights)
    return _Estimated.apply(scores, selection / samples, estimate)


class _Estimated(torch.autograd.Function):
    """A function of the scores whose value and element-wise derivative (both (B, k, d)) are known."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, value: Tensor, derivative: Tensor) -> Tensor:
        ctx.save_for_backward(derivative)
        ctx.dtype = scores.dtype
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (derivative,) = ctx.saved_tensors
        return (gradient * derivative).sum(-2).to(ctx.dtype), None, None


def _require_enough(scores: Tensor, k: int) -> None:
    if not 1 <= k <= scores.shape[-1]:
        raise ValueError(
            f"k={k} patches of a frame cannot be selected: the frame has {scores.shape[-1]}; k is 1 to that"
        )


class PatchSelector(nn.Module):
    """The class token of every frame, followed by k of its patches, in the order of their places.

    Missing frames are treated like the others, unless a mask keeps them out of the sum over frames. The scores are
    computed outside autocast, in the precision of the parameters, for `TOKENS` tokens at once (or one video), and once
    more in the backward pass, which so keeps nothing but the scores.

    Args:
        width: D.
        hidden: rows of W1 and W2; None takes the published share of D, all of it for ``video`` and half for ``frame``.
        variant: see the top of this file; ``video`` is what the released checkpoints of UCoFiA hold.
        k: patches of a frame.
        samples: M of `perturbed_topk`.
        sigma: of `perturbed_topk`.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        width: int,
        hidden: int | None = None,
        variant: Literal["video", "frame"] = "video",
        k: int = 3,
        samples: int = 500,
        sigma: float = 0.05,
    ) -> None:
        super().__init__()
        if k < 1 or samples < 1 or sigma < 0:
            raise ValueError(f"k={k} and samples={samples} must be at least 1, and sigma={sigma} not negative")
        if variant not in ("video", "frame"):
            raise ValueError(f"variant={variant!r} is neither 'video' nor 'frame'")
        self.of_video = variant == "video"
        self.k, self.samples, self.sigma = k, samples, sigma
        inputs = 2 * width if self.of_video else width
        hidden = inputs // 2 if hidden is None else hidden
        self.norm = nn.LayerNorm(inputs)
        self.token = nn.Linear(inputs, hidden, bias=False)
        self.joint = nn.Linear(2 * hidden, hidden, bias=False)
        self.score = nn.Linear(hidden, 1, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of standard deviation 0.02, as published."""
        self.norm.reset_parameters()
        for layer in (self.token, self.joint, self.score):
            nn.init.normal_(layer.weight, std=0.02)

    def scores(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """(V, F, N, D) tokens and (V, F) mask -> (V, F, N - 1) scores of the patches, in (-1, 1)."""
        step = max(TOKENS // (tokens.shape[1] * tokens.shape[2]), 1)
        parts = tokens.split(step)
        masks = [None] * len(parts) if mask is None else mask.split(step)
        return torch.cat(
            [
                checkpoint(self._scores, part, its_mask, use_reentrant=False, preserve_rng_state=False)
                for part, its_mask in zip(parts, masks)
            ]
        )

    def _scores(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.to(self.norm.weight.dtype)
            if self.of_video:
                tokens = torch.cat((tokens, tokens[:, :, :1].expand_as(tokens)), dim=-1)
            states = functional.gelu(self.token(self.norm(tokens)))
            whole = states[:, :, :1]
            if self.of_video:
                if mask is not None:
                    whole = whole.masked_fill(~mask[..., None, None], 0)
                whole = whole.sum(1, keepdim=True)
            # W2 [u ; v] in two halves: the second is that of all patches of a frame.
            own, common = self.joint.weight.chunk(2, dim=1)
            joint = functional.linear(states[:, :, 1:], own) + functional.linear(whole, common)
            return torch.tanh(self.score(functional.gelu(joint))).squeeze(-1)

    def forward(self, tokens: Tensor, seeds: Sequence[int] | None = None, mask: Tensor | None = None) -> Tensor:
        """Select.

        Args:
            tokens: (V, F, N, D), of which token 0 of a frame is the class token.
            seeds: one per video, of its noise, whatever its place in the batch (on one kind of device); None takes
                the k patches of largest score themselves, through which no gradient reaches the score.
            mask: (V, F) True for frames that count in the score of others; None counts all, as published.

        Returns:
            (V, F * (k + 1), D).

        Raises:
            ValueError: frames of fewer than k patches, or another number of seeds than videos.
        """
        scores, patches = self.scores(tokens, mask), tokens[:, :, 1:]
        if seeds is None:
            chosen = torch.take_along_dim(patches, hard_topk(scores, self.k)[..., None], dim=2)
        else:
            chosen = self._selection(scores, seeds).to(patches.dtype) @ patches
        return torch.cat((tokens[:, :, :1], chosen), dim=2).flatten(1, 2)

    def _selection(self, scores: Tensor, seeds: Sequence[int]) -> Tensor:  # (V, F, N - 1) -> (V, F, k, N - 1)
        if len(seeds) != len(scores):
            raise ValueError(f"{len(seeds)} seeds for {len(scores)} videos: give one per video")
        generators = [torch.Generator(scores.device).manual_seed(int(seed)) for seed in seeds]
        own = [perturbed_topk(s, self.k, self.samples, self.sigma, g) for s, g in zip(scores, generators)]
        return torch.stack(own)
