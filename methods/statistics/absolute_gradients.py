"""Moments of the gradients of whole losses, one backward pass at a time: sum |g|, or sum g^2.

    A = sum_i |dL_i / dW|       TaCQ (arXiv 2504.07389) with one example per loss, ECoFLaP with one batch

Absolute values before the sum: opposite gradients add up and do not cancel. A gradient is added to its sum and freed as
soon as it is complete, so that one gradient of one weight lives at a time, where `FisherStatistics` holds those of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from fulgurite.checkpoints.tensorfile import is_sharded
from fulgurite.methods.statistics.base import Statistic


class AbsoluteGradients(Statistic):
    """Sums of |g| or g^2 over losses.

        gradients = AbsoluteGradients({name: model.get_parameter(name) for name in names})
        for example in data:
            gradients.update(loss(model, example))
        gradients.means()["layers.0.up.weight"]

    Memory: the sums, and one weight's gradient besides what the backward pass itself holds.

    Args:
        parameters: name -> weight, a leaf that no other name stands for. Their gradients must be None.
        moment: absolute values, or squares.
        dtype: of the sums; float64 on the CPU and float32 elsewhere by default.
        device: of the sums; that of each weight by default.

    Raises:
        ValueError: no weights, one weight under two names, or sharded weights.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        moment: Literal["absolute", "square"] = "absolute",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(dtype)
        if moment not in ("absolute", "square"):
            raise ValueError(f"moment={moment!r}: expected 'absolute' or 'square'")
        if not parameters:
            raise ValueError("no weights to take gradients of")
        if sharded := [name for name, parameter in parameters.items() if is_sharded(parameter)]:
            raise ValueError(
                f"{len(sharded)} weights are sharded ({sharded[0]}), and their gradients are averages over processes: "
                "measure a second module, as Context.build(path) makes it of a checkpoint"
            )
        if len({id(parameter) for parameter in parameters.values()}) < len(parameters):
            raise ValueError("one weight has two names: give it once")
        self.parameters, self.moment = dict(parameters), moment
        for name, parameter in self.parameters.items():
            self.make(name, tuple(parameter.shape), parameter.device if device is None else torch.device(device))
        self.make_count("losses", next(iter(self.sums.values())).device)

    @property
    def settings(self) -> dict[str, Any]:
        """The moment."""
        return {"moment": self.moment}

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Let the weights have gradients while inside, which is where losses are computed."""
        before = {name: parameter.requires_grad for name, parameter in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.requires_grad_(before[name])

    def update(self, loss: Tensor) -> None:
        """Add the moments of one loss's gradients; a weight that it does not depend on adds 0.

        Raises:
            ValueError: a weight has a gradient already, or the loss is not finite, or depends on no weight.
        """
        self.check_open()
        if not torch.isfinite(loss):
            raise ValueError(f"loss {loss.item()} number {int(self.counts['losses'])} is not finite")
        if not loss.requires_grad:
            raise ValueError("the loss depends on none of the weights: it was computed without gradients, or elsewhere")
        if held := [name for name, parameter in self.parameters.items() if parameter.grad is not None]:
            raise ValueError(f"{held[0]} has a gradient already: set it to None first")

        def add(name: str, parameter: Tensor) -> None:
            total = self.sums[name]
            wide = parameter.grad.to(total.device, total.dtype)
            total.add_(wide.abs() if self.moment == "absolute" else wide.square())
            parameter.grad = None

        hooks = [
            parameter.register_post_accumulate_grad_hook(lambda parameter, name=name: add(name, parameter))
            for name, parameter in self.parameters.items()
            if parameter.requires_grad
        ]
        try:
            torch.autograd.backward(loss, inputs=[p for p in self.parameters.values() if p.requires_grad])
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in self.parameters.values():
                parameter.grad = None
        self.counts["losses"] += 1

    def means(self) -> dict[str, Tensor]:
        """Name -> mean over losses, in the weight's shape."""
        if not self.counts["losses"] > 0:
            raise ValueError("no loss was seen")
        return {name: total / self.counts["losses"].to(total.device, total.dtype) for name, total in self.sums.items()}
