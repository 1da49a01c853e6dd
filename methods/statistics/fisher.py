"""The diagonal Fisher information of a model's parameters, and other moments of per-example gradients.

    expected     F(theta) = mean_x sum_y p(y|x) (d log p(y|x) / d theta)^2      (arXiv 2111.09832)
    empirical    F(theta) = mean_x (d loss(x) / d theta)^2                      with the data's own labels
    batch_summed F(theta) = 1/N sum_batches (d / d theta sum_x sum_y sqrt(p(y|x)) log p(y|x))^2

The sum over y is exact for few classes, else over labels drawn from the model. The last is a surrogate that others
publish numbers with: its cross terms between examples and classes make it another number, which depends on the
batches. With absolute moments |.| stands for (.)^2. B examples, T positions, C classes, P parameters.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.utils import _pytree as pytree

from fulgurite.checkpoints.tensorfile import is_sharded
from fulgurite.methods.random import uniform
from fulgurite.methods.recomputation import without_recomputation
from fulgurite.methods.statistics.base import Statistic

Kind = Literal["expected", "empirical", "batch_summed"]
Moment = Literal["square", "absolute"]
Output = Tensor | tuple[Tensor, Tensor]


class FisherStatistics(Statistic):
    """Moments of the gradient of every example, per parameter.

        fisher = FisherStatistics(model, lambda model, batch: model(batch["image"]))
        for batch in data:
            fisher.update(batch)
        fisher.means()["head.weight"]

    Example by example: a batch is only a way to bring examples. The model is in evaluation mode meanwhile, and
    neither its parameters nor their ``grad`` change.

    Memory: one number per parameter in the type of the sums, and at most ``chunk`` gradients of the chosen parameters
    with their squares, and the activations of as many examples. Time: one forward pass per example and one backward
    pass per class or draw.

    Args:
        model: what the Fisher is of.
        function: (model, batch) -> logits (B, C), or (B, T, C) for T labels per example; with padding, the pair of
            logits and a mask (B, T), nonzero where a label counts. For ``empirical`` it gives losses (B,) with the
            data's own labels, which is the form for generative losses. It sees one example at a time, with B = 1.
        pattern: full pattern of the names of the parameters; all by default.
        expected: how many parameter tensors it must match, where given.
        kind: which moment, see above.
        moment: squares, or absolute values (what some pruning and quantization scores take).
        max_exact: most classes whose expectation is exact; above, or where T > 1, labels are drawn.
        samples: draws per example where labels are drawn.
        generator: where labels are drawn, gives the seed of the draws, in its current state; equally seeded on all
            processes. Draws depend on that seed and the example's index alone.
        chunk: most gradients at once.
        vectorize: by `torch.func.vmap`; False takes gradients one after the other, for models that vmap cannot run.
        dtype: of the sums; float64 on the CPU and float32 elsewhere by default.
        device: of the sums; that of each parameter by default.
    """

    def __init__(
        self,
        model: nn.Module,
        function: Callable[[nn.Module, Any], Output],
        pattern: str = ".*",
        expected: int | None = None,
        kind: Kind = "expected",
        moment: Moment = "square",
        max_exact: int = 64,
        samples: int = 1,
        generator: torch.Generator | None = None,
        chunk: int = 16,
        vectorize: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(dtype)
        if min(samples, chunk) < 1:
            raise ValueError(f"samples={samples} and chunk={chunk} must be at least 1")
        if kind == "batch_summed" and moment != "square":
            raise ValueError('kind="batch_summed" is a surrogate of squares: set moment="square"')
        self.kind, self.moment, self.max_exact, self.samples = kind, moment, max_exact, samples
        self.chunk, self.vectorize = chunk, vectorize
        self.seed = None if generator is None else int(torch.randint(2**62, (), generator=generator, device="cpu"))
        self.call = Call(model, function)
        self.parameters = chosen_parameters(model, pattern, expected)
        sharded = [name for name, parameter in model.named_parameters() if is_sharded(parameter)]
        if sharded:
            raise ValueError(
                f"{len(sharded)} parameters are sharded ({sharded[0]}), and gradients of single examples need them "
                "whole: measure a second module, as Context.build(path) makes it of a checkpoint"
            )
        for name, parameter in self.parameters.items():
            self.make(name, tuple(parameter.shape), parameter.device if device is None else torch.device(device))
        self.make_count("examples", next(iter(self.sums.values())).device)

    @property
    def settings(self) -> dict[str, Any]:
        """Kind and moment, and how labels are drawn."""
        names = ("kind", "moment", "max_exact", "samples", "seed")
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def update(self, batch: Any, indices: Tensor | None = None) -> None:
        """Add the examples of one batch.

        Args:
            batch: a tensor, or nested dicts, lists or tuples of tensors that all have B rows; what else it holds is
                handed on to every example.
            indices: (B,) of the examples in the data set, where labels are drawn and several processes share the
                examples; by default they are counted as this process sees them.

        Raises:
            ValueError: rows differ, the function's output has a wrong shape, or labels must be drawn without a
                generator.
        """
        self.check_open()
        batch = Examples(batch)
        seen = int(self.counts["examples"])
        numbers = range(seen, seen + len(batch)) if indices is None else [int(number) for number in indices]
        if len(numbers) != len(batch):
            raise ValueError(f"{len(numbers)} indices for {len(batch)} examples")
        with evaluating(self.call.model):
            if self.kind == "batch_summed":
                self._add(self._moments(batch.whole(), lambda logits, mask: summed_direction(logits)))
            else:
                self._add_examples(batch, numbers)
        self.counts["examples"] += len(batch)

    def means(self) -> dict[str, Tensor]:
        """Parameter name -> moment, in the parameter's shape, divided by the number of examples.

        Raises:
            ValueError: there was no example.
        """
        count = self.counts["examples"]
        if not count > 0:
            raise ValueError("no example was seen; call update before means")
        return {name: total / count.to(total.device, total.dtype) for name, total in self.sums.items()}

    def _add(self, moments: Mapping[str, Tensor]) -> None:
        for name, total in self.sums.items():
            total.add_(moments[name].to(total.device, total.dtype))

    def _add_examples(self, batch: Examples, numbers: Sequence[int]) -> None:
        """Add the moments of every example, as many at a time as ``chunk`` allows."""
        exact, positions, num_gradients = self._plan(batch)
        drawn = self.kind == "expected" and not exact
        power = 0.5 if self.moment == "square" else 1.0  # of a label's weight, which the moment squares or not

        def moments(draws: Tensor, *rows: Tensor) -> dict[str, Tensor]:
            def directions(output: Tensor, mask: Tensor) -> Tensor:
                if self.kind == "empirical":
                    return torch.ones_like(output)[None]
                found = drawn_directions(output, draws, power) if drawn else exact_directions(output, power)
                return found * mask[..., None].to(found.dtype)

            return self._moments(batch.example(rows), directions)

        step = max(1, self.chunk // num_gradients) if self.vectorize else 1
        for start in range(0, len(batch), step):
            rows = batch.rows(start, start + step)
            count = positions * self.samples if drawn else 0
            draws = [uniform(self.seed, "fisher", number, "", count) for number in numbers[start : start + step]]
            draws = torch.stack(draws).view(len(draws), -1, self.samples).to(rows[0].device)
            if self.vectorize:
                found = vmap(moments)(draws, *rows)
                self._add({name: value.to(self.sums[name].dtype).sum(0) for name, value in found.items()})
            else:
                self._add(moments(draws[0], *(row[0] for row in rows)))

    def _plan(self, batch: Examples) -> tuple[bool, int, int]:
        """Whether the expectation is exact, T, and gradients per example, from the output for the first example."""
        output, mask = self._run(self._values(), batch.example([row[0] for row in batch.rows(0, 1)]))
        shape = tuple(output.shape)
        if self.kind == "empirical":
            if output.numel() != 1:
                raise ValueError(
                    f'kind="empirical" needs one loss per example, got {shape} for one: return (B,) losses'
                )
            return False, 0, 1
        if output.dim() not in (2, 3) or shape[0] != 1 or mask.shape != shape[:-1]:
            raise ValueError(
                f"for one example the function gave logits {shape} and a mask {tuple(mask.shape)}; "
                "expected (1, C) or (1, T, C), and a mask without the C"
            )
        positions, classes = output[..., 0].numel(), shape[-1]
        if positions == 1 and classes <= self.max_exact:
            return True, 1, classes
        if self.seed is None:
            raise ValueError(
                f"labels must be drawn for {positions} positions of {classes} classes (exact for one position of at "
                f'most max_exact={self.max_exact}): give a generator, or kind="empirical" with losses'
            )
        return False, positions, self.samples

    def _values(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def _run(self, values: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, Tensor]:
        """The function's output with ``values`` in place of the chosen parameters, and a mask of ones where none."""
        rest = {name: parameter.detach() for name, parameter in self.call.model.named_parameters()}
        given = {f"model.{name}": value for name, value in {**rest, **values}.items()}
        with without_recomputation():
            output = functional_call(self.call, given, (batch,))
        return output if isinstance(output, tuple) else (output, output.detach().new_ones(output.shape[:-1]))

    def _moments(self, batch: Any, directions: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        """sum_k |d <u_k, output> / d theta|^power over the directions u_k, at most ``chunk`` gradients at a time."""
        values = self._values()
        if self.vectorize:
            output, pull, mask = vjp(lambda v: self._run(v, batch), values, has_aux=True)
            gradients = vmap(lambda direction: pull(direction)[0])
        else:
            values = {name: value.requires_grad_() for name, value in values.items()}
            with torch.enable_grad():
                output, mask = self._run(values, batch)

            def gradients(direction: Tensor) -> dict[str, Tensor]:
                found = torch.autograd.grad(
                    output, list(values.values()), direction[0], retain_graph=True, materialize_grads=True
                )
                return {name: gradient[None] for name, gradient in zip(values, found)}

        given = directions(output.detach(), mask).to(output.dtype)
        total: dict[str, Tensor] = {}
        for part in given.split(self.chunk if self.vectorize else 1):
            found = gradients(part)
            for name in list(found):
                gradient = found.pop(name)  # freed once it has been counted
                wide = gradient if gradient.dtype == torch.float64 else gradient.float()
                moment = (wide.square() if self.moment == "square" else wide.abs()).sum(0)
                total[name] = total[name] + moment if name in total else moment
        return total


class Call(nn.Module):
    """A function of a model as a module, whose parameters can be replaced in a call."""

    def __init__(self, model: nn.Module, function: Callable[[nn.Module, Any], Output]) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: Any) -> Output:
        """``function(model, batch)``."""
        return self.function(self.model, batch)


class Examples:
    """A batch as rows that can be taken one by one.

    Raises:
        ValueError: its tensors have no rows, or different numbers of them.
    """

    def __init__(self, batch: Any) -> None:
        self.leaves, self.structure = pytree.tree_flatten(batch)
        self.places = [place for place, leaf in enumerate(self.leaves) if isinstance(leaf, Tensor) and leaf.dim()]
        sizes = sorted({len(self.leaves[place]) for place in self.places})
        if len(sizes) != 1:
            raise ValueError(f"the tensors of a batch have {sizes} rows; all must have one row per example")
        self.size = sizes[0]

    def __len__(self) -> int:
        return self.size

    def whole(self) -> Any:
        """The batch."""
        return pytree.tree_unflatten(self.leaves, self.structure)

    def rows(self, start: int, stop: int) -> list[Tensor]:
        """Some examples of every tensor."""
        return [self.leaves[place][start:stop] for place in self.places]

    def example(self, rows: Sequence[Tensor]) -> Any:
        """A batch of one example, from its row of every tensor."""
        leaves = list(self.leaves)
        for place, row in zip(self.places, rows):
            leaves[place] = row[None]
        return pytree.tree_unflatten(leaves, self.structure)


def exact_directions(logits: Tensor, power: float) -> Tensor:
    """p_y^power d log p_y / d logits for every label y: (C, *logits.shape), from logits with one position."""
    p = probabilities(logits)
    labels = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
    each = (labels - p.reshape(-1)) * p.reshape(-1, 1).pow(power)
    return each.reshape(-1, *logits.shape)


def drawn_directions(logits: Tensor, draws: Tensor, power: float) -> Tensor:
    """S^-power d log p_y / d logits for S labels drawn at every position, (S, *logits.shape).

    Args:
        logits: (1, C) or (1, T, C).
        draws: (T, S) numbers in [0, 1).
        power: 1/2 where the gradients are squared, 1 where not.
    """
    p = probabilities(logits)
    shares = p.reshape(-1, 1, p.shape[-1]).cumsum(-1)  # (T, 1, C)
    labels = (draws[..., None] >= shares).sum(-1).clamp(max=p.shape[-1] - 1)  # (T, S)
    chosen = (labels.T[..., None] == torch.arange(p.shape[-1], device=p.device)).to(p.dtype)  # (S, T, C)
    return (chosen.reshape(-1, *logits.shape) - p) / draws.shape[-1] ** power


def summed_direction(logits: Tensor) -> Tensor:
    """d / d logits of sum_x sum_y sqrt(p) log p, the root held constant: (1, *logits.shape)."""
    p = probabilities(logits)
    return (p.sqrt() - p * p.sqrt().sum(-1, keepdim=True))[None]


def probabilities(logits: Tensor) -> Tensor:
    """Softmax over the classes, in float32 or better."""
    return (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)


def chosen_parameters(model: nn.Module, pattern: str, expected: int | None) -> dict[str, nn.Parameter]:
    """Floating-point parameters whose names ``pattern`` matches in full; tied ones under their first name.

    Raises:
        LookupError: there is none, or another number than ``expected``.
    """
    named = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    found = {name: p for name, p in named.items() if re.fullmatch(pattern, name)}
    if not found or (expected is not None and len(found) != expected):
        wanted = "at least 1" if expected is None else expected
        near = difflib.get_close_matches(pattern, named, n=3, cutoff=0.3)
        raise LookupError(f"pattern {pattern!r} matches {len(found)} parameters, expected {wanted}; near: {near}")
    return found


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode while inside; every module's own mode after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
