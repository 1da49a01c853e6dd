"""Adam as the published code of BERT, and of video-text retrieval after it, has it.

    g <- g min(1, c / (|g| + 1e-6))          per tensor, c = max_grad_norm
    m <- beta1 m + (1 - beta1) g             v <- beta2 v + (1 - beta2) g^2
    p <- p - lr (m / (sqrt(v) + eps) + weight_decay p)

Unlike `torch.optim.AdamW` it corrects no bias: with (0.9, 0.98) the first update is 0.1 / sqrt(0.02), so 0.71 lr times
the sign of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class BertAdam(Optimizer):
    """Adam without bias correction, with decoupled weight decay and gradients clipped per tensor.

    The published training clips all gradients together at 1.0 before this: ``trainer.gradient_clip_val: 1.0``. The
    state has two tensors per parameter, of its type; learning rates are scheduled from outside (`BertCosine`).

    Args:
        params: tensors, or groups of them with options of their own.
        lr: learning rate.
        betas: decay of the mean gradient and of the mean squared gradient.
        eps: added outside the root.
        weight_decay: share of the parameter that is added to its update, before ``lr``.
        max_grad_norm: limit of the 2-norm of the gradient of each tensor; None clips none.

    Raises:
        ValueError: an option is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.98),
        eps: float = 1e-6,
        weight_decay: float = 0.2,
        max_grad_norm: float | None = 1.0,
    ) -> None:
        for name, value in {"lr": lr, "eps": eps, "weight_decay": weight_decay}.items():
            if value < 0:
                raise ValueError(f"BertAdam: {name}={value} must not be negative")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"BertAdam: betas={betas} must lie in [0, 1)")
        if max_grad_norm is not None and max_grad_norm <= 0:
            raise ValueError(f"BertAdam: max_grad_norm={max_grad_norm} must be positive, or None to clip none")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what ``closure`` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)
        return loss

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        if group["max_grad_norm"] is not None:
            norm = torch.linalg.vector_norm(gradient)
            gradient = gradient * (group["max_grad_norm"] / (norm + 1e-6)).clamp(max=1)
        first, second = group["betas"]
        mean.mul_(first).add_(gradient, alpha=1 - first)
        square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        update = mean / (square.sqrt() + group["eps"])
        update.add_(parameter, alpha=group["weight_decay"])
        parameter.add_(update, alpha=-group["lr"])
