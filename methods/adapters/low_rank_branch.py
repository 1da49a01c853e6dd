"""The two thin layers of a low-rank branch beside a frozen layer, y + s B A x, with few passes over wide tensors.

A is (R, in), B is (out, R); R is far below both. What a step costs beyond the frozen layer is memory traffic: each pass
over x, y or their gradients costs about as much as a thin product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.nn import functional as F

from fulgurite.methods.adapters.remade import recipe_of


class Down(nn.Linear):
    """h = A x, see `branch_down`."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` (..., in) -> (..., R)."""
        return branch_down(x, self.weight)


class Up(nn.Linear):
    """y + s B h, see `branch_up`."""

    def forward(self, hidden: Tensor, y: Tensor, scale: float) -> Tensor:
        """``hidden`` (..., R), ``y`` (..., out) -> (..., out)."""
        return branch_up(hidden, y, self.weight, scale)


def branch_down(x: Tensor, weight: Tensor) -> Tensor:
    """A x, as `F.linear`, which keeps ``x`` for backward only where it cannot be made again, see `recipe_of`.

    ``x`` (..., in), ``weight`` A (R, in) -> (..., R).
    """
    if torch.compiler.is_compiling():
        return F.linear(x, weight)
    device = x.device.type
    if is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        # Here, where autograd sees it, and not inside, where backward would mix types.
        x, weight = (t.to(torch.get_autocast_dtype(device)) for t in (x, weight))
    return _Down.apply(x, weight)


def branch_up(hidden: Tensor, y: Tensor, weight: Tensor, scale: float) -> Tensor:
    """y + s B h in one product that adds to a copy of ``y``.

    ``hidden`` (..., R), ``y`` (..., out), ``weight`` B (out, R) -> (..., out).
    """
    if hidden.dtype != y.dtype:  # the sum is in the wider type
        return torch.add(y, F.linear(hidden, weight), alpha=scale)
    # Contiguous, or autograd reads y's gradient column by column for that of B, which takes twice the time on CPU.
    wide = weight.t().contiguous()
    total = torch.addmm(y.reshape(-1, len(weight)), hidden.reshape(-1, len(wide)), wide, alpha=scale)
    return total.view(y.shape)


class _Down(torch.autograd.Function):
    """x A^T. Gradients are no views, so that autograd adds those of several users of x in place."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, weight = inputs
        ctx.make, sources = recipe_of(x) if ctx.needs_input_grad[1] else (None, ())
        ctx.save_for_backward(weight, *sources)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        weight, *sources = ctx.saved_tensors
        of_x = of_weight = None
        if ctx.needs_input_grad[1]:  # first, so that an x made again is gone when the other is made
            x = ctx.make(*sources)
            of_weight = grad.reshape(-1, len(weight)).t() @ x.reshape(-1, x.shape[-1])
            del x
        if ctx.needs_input_grad[0]:
            of_x = grad @ weight
        return of_x, of_weight
