"""A model made smaller matrix by matrix: the loop that pruning and quantization share.

    for every block: statistics of what goes into its layers, a new weight for each, and the block runs again

A `Compressor` says what becomes of one matrix; `compressed_blocks` walks, shares the matrices among processes, and puts
the new weights into the model. What depends on the whole model (which sparsity, which bits, which weights are kept) is
settled in `Compressor.begin`.
"""

from __future__ import annotations

import logging
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fulgurite.methods.layer_walk import Block, LayerWalk
from fulgurite.methods.quantization.quantized_weight import Compressed
from fulgurite.methods.sharding import OnDemand, reshard, whole, write
from fulgurite.methods.statistics.gram import PerLayer, input_width

log = logging.getLogger(__name__)
Needs = Literal["nothing", "energies", "grams"]
TokenWeights = Callable[[Block], Sequence[PerLayer]]


class Compressor(ABC):
    """What becomes of one matrix.

    Attributes:
        needs: what must be known of the inputs of a layer.
        sequential: whether the layers of a block are compressed one after the other, each seeing what those before it
            have become; else all from what the whole block was.
    """

    needs: ClassVar[Needs]
    sequential: bool = False

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        """Look at all matrices (out, in), by name, before the first is compressed.

        Raises:
            ValueError: settings that do not fit them, such as a pattern that matches none.
        """
        return

    @abstractmethod
    def compress(self, name: str, weight: Tensor, moment: Tensor | None) -> Compressed:
        """The new weight of one layer.

        Args:
            name: of the layer.
            weight: (out, in); not changed.
            moment: Gram (in, in) or column energies (in,) of its inputs, as `needs` says; None where nothing is needed.
        """


@dataclass(frozen=True)
class LayerReport:
    """What became of one matrix, as plain values.

    Args:
        name: of the layer.
        tower: it belongs to.
        block: it belongs to.
        shape: (out, in).
        sparsity: share of entries that are 0.
        bits: of an entry that is not kept; None where the weight was not quantized.
        kept: share of entries that are kept as they are, beside the quantized ones.
        error: relative squared error of the layer's output, tr((W - Q) G (W - Q)^T) / tr(W G W^T), with the diagonal
            of G where only that is known, and G = 1 where nothing is.
        damping: of the Gram, where one was factored.
        seconds: solving took.
    """

    name: str
    tower: str
    block: str
    shape: tuple[int, int]
    sparsity: float
    bits: int | None
    kept: float
    error: float
    damping: float | None
    seconds: float

    def data(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> LayerReport:
        """What `data` gave."""
        return cls(**{**data, "shape": tuple(data["shape"])})


@dataclass(frozen=True)
class CompressedBlock:
    """One block after its matrices have been replaced.

    Args:
        block: as it is now.
        results: by name of the layer, on the CPU; the weights are (out, in) whatever the layer stores.
        reports: by name.
    """

    block: Block
    results: dict[str, Compressed]
    reports: dict[str, LayerReport]


def compressed_blocks(
    walk: LayerWalk,
    compressor: Compressor,
    pattern: str | None = None,
    token_weights: TokenWeights | None = None,
    done: Callable[[str], Mapping[str, Compressed] | None] = lambda name: None,
) -> Iterator[CompressedBlock]:
    """Compress block by block; all ranks of the walk make the same calls.

    Args:
        walk: over the model, which is changed.
        compressor: what to do; `Compressor.begin` has been called.
        pattern: full pattern of the names of the layers; all linear layers of the walked blocks where None.
        token_weights: of a block before it is changed, (B, S) for every batch, or by name of the layer.
        done: results of a block that an earlier run has left, by its name; such a block is not measured again.

    Raises:
        ValueError: a layer that cannot be compressed, by name.
    """
    if left := left_dense(walk):
        log.info("left as they are, for they belong to no linear layer: %s", "; ".join(left))
    for block in walk:
        layers = block.linears(pattern)
        if (known := done(block.name)) is not None:
            reshard(block.module)
            for name, result in known.items():
                put(layers[name], result.weight)
            yield CompressedBlock(block, dict(known), {})
            continue
        results: dict[str, Compressed] = {}
        reports: dict[str, LayerReport] = {}
        weights = token_weights(block) if token_weights is not None and layers else None
        for names in groups_of(block, layers, compressor):
            moments = moments_of(block, names, weights, compressor)
            reshard(block.module)
            solved = solve(walk, compressor, {n: layers[n] for each in names for n in each}, moments)
            for name, (result, error, seconds) in solved.items():
                put(layers[name], result.weight)
                results[name] = result
                reports[name] = report_of(name, block, result, error, seconds)
        yield CompressedBlock(block, results, reports)


def groups_of(block: Block, layers: Mapping[str, nn.Module], compressor: Compressor) -> list[list[list[str]]]:
    """What is solved together, each as lists of layers that share an input, in the order of the data."""
    if not layers:
        return []
    if compressor.needs == "nothing":
        return [[[name] for name in layers]]
    groups = block.input_groups(layers)
    return [[group] for group in groups] if compressor.sequential else [groups]


def moments_of(
    block: Block, groups: Sequence[Sequence[str]], weights: Sequence[PerLayer] | None, compressor: Compressor
) -> dict[str, Tensor]:
    """What ``compressor`` needs of the inputs of layers, some of which share one."""
    if compressor.needs == "nothing":
        return {}
    if compressor.needs == "energies":
        return block.grams(groups, weights, diagonal=True).means()
    return grams_of(block, groups, weights)


def grams_of(block: Block, groups: Sequence[Sequence[str]], weights: Sequence[Tensor] | None) -> dict[str, Tensor]:
    """Grams in the type that layers are solved in, which on the CPU takes half of the memory of the sums."""
    types = [block.walk.model.get_submodule(name).weight.dtype for group in groups for name in group]
    solved = torch.float64 if torch.float64 in types else torch.float32
    return block.grams(groups, weights).means(dtype=solved)


def solve(
    walk: LayerWalk, compressor: Compressor, layers: Mapping[str, nn.Module], moments: Mapping[str, Tensor]
) -> dict[str, tuple[Compressed, float, float]]:
    """Result, error and seconds of every layer, on every rank; each is solved on one of them.

    Memory: of sharded layers, the whole weights of those that are solved here.
    """
    names = walk.ranks.share({name: cost(module) for name, module in layers.items()})
    weights = {}
    for name, module in layers.items():  # all ranks gather all of them
        weight = matrix(module)
        if name in names:
            weights[name] = weight

    def own() -> dict[str, tuple[Compressed, float, float]]:
        out = {}
        for name in names:
            begin, weight = time.perf_counter(), weights.pop(name)
            try:
                result = compressor.compress(name, weight, moments.get(name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            error = relative_error(weight, result.weight, moments.get(name))
            out[name] = (result.to("cpu"), error, time.perf_counter() - begin)
        return out

    found = {name: value for part in walk.ranks.together(own) for name, value in part.items()}
    return {name: found[name] for name in layers}


def cost(module: nn.Module) -> int:
    """What solving a layer takes, in any unit: in^3 + out in^2."""
    columns, turned = input_width(module)
    return columns**2 * (columns + module.weight.shape[1 if turned else 0])


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear layer as (out, in). Of a sharded one, whole: a collective."""
    weight = whole(module.weight.detach())
    return weight.T if input_width(module)[1] else weight


def put(module: nn.Module, weight: Tensor) -> None:
    """Give a linear layer the weight (out, in), in the place and type of its own. Of a sharded one, its slice."""
    write(module.weight.detach(), weight.T if input_width(module)[1] else weight)


def matrices(walk: LayerWalk, pattern: str | None = None) -> Mapping[str, Tensor]:
    """Every weight (out, in) that a walk would compress, by the name of its layer.

    Those of a sharded model are gathered one at a time, each when it is asked for, by all ranks.

    Raises:
        ValueError: there is none, or another module holds the same tensor.
    """
    reshard(walk.model)
    found: dict[str, nn.Module] = {}
    holders: dict[int, list[str]] = {}
    for name, module in walk.model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    for block in blocks_of(walk):
        for layer, module in block.linears(pattern).items():
            if others := [name for name in holders[id(module.weight)] if name != layer]:
                raise ValueError(f"{layer} and {others[0]} are one tensor, which one result cannot fit: leave it out")
            found[layer] = module
    if not found:
        towers = [tower.name for tower in walk.towers]
        example = next((name for block in blocks_of(walk) for name in block.linears()), None)
        if pattern is None or example is None:
            raise ValueError(f"the blocks hold no linear layer of {towers}")
        raise ValueError(
            f"layers={pattern!r} matches no linear layer of {towers}; it is a full pattern, as of {example}"
        )
    if walk.sharded:
        return OnDemand({layer: partial(matrix, module) for layer, module in found.items()})
    return {layer: matrix(module) for layer, module in found.items()}


def blocks_of(walk: LayerWalk) -> Iterator[Block]:
    """The blocks of a walk as they are, without inputs."""
    for tower in walk.towers:
        for name in walk.spec.block_names(walk.model, tower.name):
            yield Block(name, tower, walk.model.get_submodule(name), [], [], walk)


def left_dense(walk: LayerWalk) -> list[str]:
    """What no compression here reaches in the blocks, as text: alike parameters of several blocks together."""
    counts = Counter(
        (re.sub(r"(?<=\.)\d+(?=\.)", "*", name), *about)
        for block in blocks_of(walk)
        for name, about in block.others().items()
    )
    return [f"{count} x {name} ({kind} {list(shape)})" for (name, kind, shape), count in counts.items()]


def relative_error(before: Tensor, after: Tensor, moment: Tensor | None) -> float:
    """See `LayerReport.error`. Memory: two matrices in float32."""
    wide = torch.promote_types(before.dtype, torch.float32)
    before, change = before.to(wide), (after.to(before.device, wide) - before.to(wide))

    def energy(rows: Tensor) -> float:
        if moment is None:
            return rows.square().sum().item()
        if moment.dim() == 1:
            return (rows.square() @ moment.to(wide)).sum().item()
        return ((rows @ moment.to(wide)) * rows).sum().item()

    whole = energy(before)
    return max(energy(change), 0.0) / whole if whole > 0 else 0.0


def report_of(name: str, block: Block, result: Compressed, error: float, seconds: float) -> LayerReport:
    """Figures of one result."""
    quantized = result.quantized
    kept = 0.0 if quantized is None or quantized.kept is None else quantized.kept.float().mean().item()
    return LayerReport(
        name,
        block.tower.name,
        block.name,
        tuple(result.weight.shape),
        1 - torch.count_nonzero(result.weight).item() / result.weight.numel(),
        None if quantized is None else quantized.bits,
        kept,
        error,
        result.damping,
        seconds,
    )


def totals(reports: Sequence[LayerReport]) -> dict[str, float]:
    """Means over all entries: ``sparsity``, and ``bits``: 16 where not quantized, 32 of a kept entry with its index."""
    sizes = [report.shape[0] * report.shape[1] for report in reports]
    bits = [16 if r.bits is None else r.bits * (1 - r.kept) + 32 * r.kept for r in reports]
    return {
        "sparsity": sum(size * report.sparsity for size, report in zip(sizes, reports)) / sum(sizes),
        "bits": sum(size * each for size, each in zip(sizes, bits)) / sum(sizes),
    }
