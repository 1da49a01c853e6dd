"""How much a loss depends on each matrix of a model, from forward passes alone (ECoFLaP, arXiv 2310.02998).

    c = (L(W + eps z) - L(W - eps z)) / (2 eps),     z ~ N(0, 1),     statistic: mean |c| over batches and draws

For small eps, c is <dL/dW, z>, so the mean of |c| tends to sqrt(2 / pi) ||dL/dW||_F: one draw of a matrix has a
relative standard deviation of 0.76. Several matrices that are perturbed together, a unit, give the norm of all of their
gradients. Two passes per unit, batch and draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fulgurite.methods.statistics.base import Statistic
from fulgurite.methods.statistics.noise import normal

PIECE = 1 << 18
PURPOSE = "zeroth_order"

At = Callable[[int], Any]  # sign -> context in which the unit's weights are W + sign eps z
TwoLosses = Callable[[str, At], tuple[Tensor | float, Tensor | float]]


def two_passes(loss: Callable[[], Tensor | float]) -> TwoLosses:
    """The plain way to get both losses: the whole model, once per sign."""

    def both(unit: str, at: At) -> tuple[Tensor | float, Tensor | float]:
        with at(+1):
            plus = loss()
        with at(-1):
            minus = loss()
        return plus, minus

    return both


class ZerothOrderStatistics(Statistic):
    """Sums of |c| of units of a model's weights.

        scores = ZerothOrderStatistics({name: model.get_parameter(name) for name in names}, seed=0)
        for number, batch in enumerate(data):
            scores.update(two_passes(lambda: loss(model, batch)), number)
        scores.means()["blocks.0.fc1.weight"]

    Weights are perturbed in place and put back bit for bit, also after an exception, and the state of torch's random
    numbers too; both signs see the same state, and so the same dropout. Memory: a copy of the unit's weights, and
    its noise in float32 or wider, which is made once for however many passes.

    Args:
        parameters: name -> weight of this process; a shard of some rows where the model is sharded.
        units: name -> unit that the weight belongs to; every weight is one by default.
        eps: size of the perturbation.
        draws: of every unit and batch.
        seed: of the noise, the same on all processes.
        first_rows: name -> first row of the shard in the whole weight; 0 where not given.
        dtype: of the sums.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        units: Mapping[str, str] | None = None,
        eps: float = 1e-3,
        draws: int = 1,
        seed: int = 0,
        first_rows: Mapping[str, int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dtype)
        if not parameters:
            raise ValueError("no weights to score")
        if not (0 < eps < math.inf and draws >= 1):
            raise ValueError(f"eps={eps} must be positive and draws={draws} at least 1")
        units = units or {name: name for name in parameters}
        if missing := [name for name in parameters if name not in units]:
            raise ValueError(f"{len(missing)} weights have no unit, first {missing[0]}")
        self.parameters, self.eps, self.draws, self.seed = dict(parameters), eps, draws, seed
        self.first_rows = dict(first_rows or {})
        self.members: dict[str, list[str]] = {}
        for name in parameters:
            self.members.setdefault(units[name], []).append(name)
        for unit, names in self.members.items():
            self.make(unit, (), self.parameters[names[0]].device)
            self.make_count(unit, self.parameters[names[0]].device)

    @property
    def settings(self) -> dict[str, Any]:
        """How the noise is drawn."""
        return {"eps": self.eps, "draws": self.draws, "seed": self.seed}

    @torch.no_grad()
    def update(self, losses: TwoLosses, batch: int, units: Sequence[str] | None = None) -> None:
        """Score units on one batch.

        Args:
            losses: (unit, at) -> both losses of this batch, the first inside ``at(+1)`` and the second inside
                ``at(-1)``. It may keep what lies before the unit, and run only what follows; see `two_passes`.
            batch: its number among those of all processes; the noise depends on it.
            units: which; all by default.

        Raises:
            ValueError: a loss that is not finite.
            LookupError: an unknown unit.
        """
        self.check_open()
        for unit in self.members if units is None else units:
            if unit not in self.members:
                raise LookupError(f"no unit {unit!r}; there are {sorted(self.members)[:8]}")
            for draw in range(self.draws):
                plus, minus = (float(loss) for loss in self._run(losses, unit, batch * self.draws + draw))
                if not (math.isfinite(plus) and math.isfinite(minus)):
                    raise ValueError(f"{unit}: losses {plus} and {minus} of batch {batch} are not finite")
                self.sums[unit] += abs(plus - minus) / (2 * self.eps)
                self.counts[unit] += 1

    def means(self) -> dict[str, Tensor]:
        """Unit -> mean |c|."""
        if unseen := [unit for unit, count in self.counts.items() if not count > 0]:
            raise ValueError(f"{len(unseen)} units were never scored, first {unseen[0]}")
        return {unit: total / self.counts[unit].to(total.dtype) for unit, total in self.sums.items()}

    def noise(self, name: str, number: int, start: int, count: int) -> Tensor:
        """(count,) of the noise of a weight, from entry ``start`` of it on, in draw ``number``."""
        weight = self.parameters[name]
        offset = self.first_rows.get(name, 0) * (weight[0].numel() if weight.dim() and len(weight) else 1)
        return normal(self.seed, PURPOSE, number, name, count, offset + start)

    def _run(self, losses: TwoLosses, unit: str, number: int) -> tuple[Tensor | float, Tensor | float]:
        weights = {name: self.parameters[name] for name in self.members[unit]}
        saved = {name: weight.detach().clone() for name, weight in weights.items()}
        devices = sorted({weight.device.index or 0 for weight in weights.values() if weight.is_cuda})
        random_states = [torch.cuda.get_rng_state(device) for device in devices]
        state = torch.get_rng_state()
        noises: dict[str, Tensor] = {}

        def restore() -> None:
            for name, weight in weights.items():
                weight.copy_(saved[name])
            torch.set_rng_state(state)
            for device, random_state in zip(devices, random_states):
                torch.cuda.set_rng_state(random_state, device)

        @contextmanager
        def at(sign: int) -> Iterator[None]:
            restore()
            for name, weight in weights.items():
                if name not in noises:
                    noises[name] = self._noise_of(name, weight, number)
                shift(weight, saved[name], noises[name], sign * self.eps)
            try:
                yield
            finally:
                restore()

        try:
            return losses(unit, at)
        finally:
            restore()

    def _noise_of(self, name: str, weight: Tensor, number: int) -> Tensor:
        """The noise of a whole weight, flat, on its device and in its type, or float32 where that is narrower."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        out = torch.empty(weight.numel(), dtype=wide, device=weight.device)
        for start in range(0, weight.numel(), PIECE):
            part = out[start : start + PIECE]
            part.copy_(self.noise(name, number, start, len(part)))
        return out


def shift(weight: Tensor, saved: Tensor, noise: Tensor, step: float) -> None:
    """W <- W + step z, computed in the type of z, in the weight's own."""
    flat, source = weight.detach().view(-1), saved.view(-1)
    for start in range(0, flat.numel(), PIECE):
        part = slice(start, start + PIECE)
        flat[part] = source[part].to(noise.dtype).add(noise[part], alpha=step).to(weight.dtype)
