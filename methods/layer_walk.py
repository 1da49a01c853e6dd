"""A walk over the blocks of a model, in the order in which data flow: what goes into each, and on to the next.

    walk = LayerWalk(model, spec, batches, lambda batch: model(**batch))
    for block in walk:
        grams = block.grams(block.input_groups(block.linears())).means()
        ...                                # change the weights of the layers
                                           # the block runs again, and its outputs go into the next one

The inputs of a tower's first block are caught by running the model up to it; a tower that comes later sees what the
earlier ones have become. Where a block does not take exactly what the one before it gives (something lies between
them, or it reads what an earlier one gave beside), its inputs are caught in the same way, and this is logged. All other
arguments of a block (masks, positions, the states that cross-attention reads) are those of that catch. Memory: the
hidden states of all batches, two of them on the device.

Blocks may be units of FSDP2. Every rank then makes the same passes: whole ones, over as many batches.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.methods.block_calls import BlockCall, Enough, catch_calls, hidden_of
from fulgurite.methods.ranks import ALONE, Ranks
from fulgurite.methods.sharding import is_sharded
from fulgurite.methods.statistics.gram import GramStatistics, PerLayer, input_width, version_of
from fulgurite.methods.structure import ModelSpec, Tower

log = logging.getLogger(__name__)
Masks = Callable[[Any, Sequence[str]], Mapping[str, Tensor]]


@dataclass
class Block:
    """One block of the walk, with what goes into it.

    Args:
        name: of the module in the model.
        tower: it belongs to.
        module: itself.
        inputs: hidden states of this process's batches.
        calls: the other arguments of each.
        walk: that it is part of.
        called_once: whether each of its layers is, by a batch of any of their shapes; known after `input_groups`.
    """

    name: str
    tower: Tower
    module: nn.Module
    inputs: list[Tensor]
    calls: list[BlockCall]
    walk: LayerWalk = field(repr=False)
    called_once: bool = False

    def linears(self, pattern: str | None = None) -> dict[str, nn.Module]:
        """Linear layers inside, by their full names.

        Args:
            pattern: full pattern of names; all where None.

        Raises:
            ValueError: another kind of module that holds matrices matches the pattern.
        """
        found = {}
        for name, module in self._modules(pattern):
            try:
                input_width(module)
            except ValueError as error:
                if pattern is not None and matrices_of(module):
                    raise ValueError(f"{name}: {error}; leave it out of {pattern!r}") from None
                continue
            found[name] = module
        return found

    def others(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Parameters inside with two dimensions or more that belong to no linear layer: name -> (class, shape)."""
        linears = self.linears()
        return {
            f"{name}.{inner}": (type(module).__name__, tuple(parameter.shape))
            for name, module in self._modules(None)
            if name not in linears
            for inner, parameter in matrices_of(module).items()
        }

    def _modules(self, pattern: str | None) -> Iterator[tuple[str, nn.Module]]:
        for inner, module in self.module.named_modules():
            name = f"{self.name}.{inner}" if inner else self.name
            if pattern is None or re.fullmatch(pattern, name):
                yield name, module

    def outputs(self, limit: int | None = None) -> Iterator[Tensor]:
        """Hidden states that the block gives for each batch, as it is now."""
        for number in range(len(self.inputs) if limit is None else limit):
            yield self.output(number)

    def pass_on(self) -> None:
        """Put what the block gives in the place of its inputs, for which it has no more use."""
        for place, output in enumerate(self.outputs()):
            self.inputs[place] = output.to(self.walk.storage)

    @torch.no_grad()
    def output(self, number: int) -> Tensor:
        """Hidden states that the block gives for one batch, as it is now."""
        device = self.walk.device
        # A copy, since some blocks write into what they are given.
        hidden = self.inputs[number].to(device, copy=True)
        return hidden_of(self.calls[number].run(self.module, hidden, device), self.name)

    def run_until(self, names: Sequence[str], number: int) -> None:
        """Run one batch, no further than where the layers ``names`` have been called, if one call of each is all."""
        missing = set(names)

        def note(name: str, _: Tensor) -> None:
            missing.discard(name)
            if not missing:
                raise Enough

        if not self.called_once or self.walk.sharded:
            self.output(number)
            return
        with watching({name: self.walk.model.get_submodule(name) for name in names}, note), suppress(Enough):
            self.output(number)

    def input_groups(self, layers: Mapping[str, nn.Module]) -> list[list[str]]:
        """``layers`` in the order in which they are called, those that are given the same tensors together.

        Layers that some batches do not call, as experts, are looked for in the others. All ranks call it.

        Raises:
            ValueError: a layer is never called as a module.
        """
        order: dict[tuple[tuple[int, int], ...], list[str]] = {}
        kept: list[Tensor] = []  # so that no tensor takes another's identity
        missing = set(layers)
        calls: dict[str, tuple[tuple[int, int], ...]] = {}  # in one batch
        self.called_once = True

        def note(name: str, x: Tensor) -> None:
            kept.append(x)
            calls[name] = (*calls.get(name, ()), (id(x), version_of(x)))

        def look() -> None:
            shapes = set()
            for number, hidden in enumerate(self.inputs):
                own, looked = self.calls[number].shapes(hidden), len(kept)
                if own in shapes and not missing and not self.walk.sharded:
                    continue  # how often a layer is called depends on shapes at most
                shapes.add(own)
                with watching(layers, note):
                    self.output(number)
                self.called_once &= all(len(numbers) == 1 for numbers in calls.values())
                if not missing:
                    del kept[looked:]
                for name, numbers in calls.items():
                    if name in missing:
                        order.setdefault(numbers, []).append(name)
                missing.difference_update(calls)
                calls.clear()

        self.walk.ranks.agree(look)
        found = [sorted(names) for names in order.values()]
        per_rank = self.walk.ranks.gather((found, sorted(missing)))
        if nowhere := set.intersection(*(set(unseen) for _, unseen in per_rank)):
            raise ValueError(
                f"{self.name}: {sorted(nowhere)} were not called as modules by any batch; leave them out of the layers "
                "that are compressed, or give more samples; those of nn.MultiheadAttention are called as modules "
                "within `methods.packed_attention.exposed_attention`"
            )
        groups, placed = [], set()
        for groups_of_rank, _ in per_rank:
            for names in groups_of_rank:
                if rest := [name for name in names if name not in placed]:
                    groups.append(rest)
                    placed.update(rest)
        return groups

    def grams(
        self, groups: Sequence[Sequence[str]], weights: Sequence[PerLayer] | None = None, diagonal: bool = False
    ) -> GramStatistics:
        """Second moments of the inputs of layers, in one pass over the batches of all ranks.

        A batch runs no further than to the last of them, where `input_groups` has seen that one call of each is all.

        Args:
            groups: some of `input_groups`: names of layers that share an input.
            weights: (B, S) of the tokens of each batch, or by name of the layer; see `token_shares`.
            diagonal: only the column energies.
        """
        walk, names = self.walk, [name for group in groups for name in group]
        if not walk.batches:
            raise ValueError(f"{self.name}: there is no calibration data to measure the inputs of {names[0]} with")
        shared = [[re.escape(name) for name in group] for group in groups if len(group) > 1]
        pattern = "|".join(map(re.escape, names))
        tables = [name for name in names if walk.spec.reads_positions(name)]
        grams = GramStatistics(walk.model, pattern, len(names), shared, diagonal, device=walk.device, tables=tables)

        def measure() -> None:
            for number, batch in enumerate(walk.batches):
                mask = walk.masks(batch, names) if walk.masks is not None else None
                with grams.watch(mask, None if weights is None else weights[number]):
                    self.run_until(names, number)

        walk.ranks.agree(measure)
        grams.reduce(walk.ranks.total)
        return grams


class LayerWalk:
    """See the module. One walk is made once; the model must be in evaluation mode, and is only changed by the caller.

    Args:
        model: with all towers on one device.
        spec: where its blocks are.
        batches: calibration data of this process, any objects. Without any, blocks come without inputs, in order.
        forward: runs the model on one of them; no cache of keys and values may be in use.
        masks: (batch, names of layers) -> by name, nonzero for the tokens that count; none has padding where None.
        ranks: processes that walk together, each with its own batches.
        offload: keep hidden states on the CPU between blocks.
        towers: names of those to walk; all where None.
    """

    def __init__(
        self,
        model: nn.Module,
        spec: ModelSpec,
        batches: Sequence[Any],
        forward: Callable[[Any], Any],
        masks: Masks | None = None,
        ranks: Ranks = ALONE,
        offload: bool = True,
        towers: Sequence[str] | None = None,
    ) -> None:
        if model.training:
            raise ValueError(f"{type(model).__name__} is in training mode: call eval() first")
        known = [tower.name for tower in spec.towers]
        if unknown := sorted(set(towers or []) - set(known)):
            raise ValueError(f"towers={unknown}: this model has {known}")
        self.model, self.spec, self.batches, self.forward = model, spec, list(batches), forward
        self.masks, self.ranks = masks, ranks
        self.towers = [tower for tower in spec.towers if towers is None or tower.name in towers]
        self.device, self.sharded = next(model.parameters()).device, is_sharded(model)
        self.storage = torch.device("cpu") if offload else self.device

    def __iter__(self) -> Iterator[Block]:
        counts = self.ranks.gather(len(self.batches))
        without = [rank for rank, count in enumerate(counts) if not count]
        if without and len(without) < self.ranks.size:
            raise ValueError(f"ranks {without} have no calibration data: give every process a batch")
        if self.sharded and len(set(counts)) > 1:
            raise ValueError(f"ranks have {counts} batches, and the blocks are sharded: give every process as many")
        if self.batches:
            self.ranks.agree(self._require_one_call)
        for tower in self.towers:
            names = self.spec.block_names(self.model, tower.name)
            if not self.batches:
                yield from (Block(name, tower, self.model.get_submodule(name), [], [], self) for name in names)
                continue
            done = 0
            while done < len(names):
                inputs, calls = self._catch(names[done:])
                for number, name in enumerate(names[done : done + len(calls)]):
                    module = self.model.get_submodule(name)
                    yield (block := Block(name, tower, module, inputs, calls[number], self))
                    if number + 1 < len(calls):
                        self.ranks.agree(block.pass_on)
                done += len(calls)
                if done < len(names):
                    log.info("%s takes other inputs than %s gives: they are caught anew", names[done], names[done - 1])

    def _catch(self, names: Sequence[str]) -> tuple[list[Tensor], list[list[BlockCall]]]:
        """Inputs of the first of ``names``, and the other arguments of it and of those that it leads to, by block."""
        caught = self.ranks.agree(lambda: [self._caught(names, batch) for batch in self.batches])
        length = min(self.ranks.gather(min(len(calls) for _, calls in caught)))
        return [first for first, _ in caught], [[calls[number] for _, calls in caught] for number in range(length)]

    def _require_one_call(self) -> None:
        """Run the model on one batch. Raises ValueError for a block that it calls more than once."""
        names = [name for tower in self.towers for name in self.spec.block_names(self.model, tower.name)]
        counts: Counter[str] = Counter()
        modules = {name: self.model.get_submodule(name) for name in names}
        with torch.no_grad(), watching(modules, lambda name, _: counts.update([name])):
            self.forward(self.batches[0])
        if name := next((name for name in names if counts[name] > 1), None):
            raise ValueError(f"{name} is called {counts[name]} times by a batch, so it has no one input")

    def _caught(self, names: Sequence[str], batch: Any) -> tuple[Tensor, list[BlockCall]]:
        modules = {name: self.model.get_submodule(name) for name in names}
        return catch_calls(modules, lambda: self.forward(batch), self.storage, whole_pass=self.sharded)


def matrices_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters with two dimensions or more."""
    return {name: each for name, each in module.named_parameters(recurse=False) if each.dim() > 1}


@contextmanager
def watching(layers: Mapping[str, nn.Module], note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """``note`` the name and input of every layer that is called inside."""
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: note(name, args[0] if args else next(iter(kwargs.values()), None)),
            with_kwargs=True,
        )
        for name, module in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
