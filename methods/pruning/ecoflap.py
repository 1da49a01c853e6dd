"""ECoFLaP: how sparse each part of a whole model should be, before any of it is pruned (arXiv 2310.02998).

    importance   of every matrix, from one loss of the whole model: by its gradients, or by forward passes alone
    allocation   of every model, block or layer: the more important, the more of its weights are kept

See `block_importance` for the scores, `statistics.zeroth_order` for forward passes, `allocation` for exact counts. The
sparsities go to a pruner, which then walks the model:

    pruner.assign(Ecoflap(target=0.5).sparsities(walk, loss))

A perturbed matrix changes nothing that lies before it, so that is not computed again (`methods.replay`): with N blocks
in a row (N + 1) / 2N of the arithmetic is left, less what of its own block precedes the matrix, and towers that do not
see each other are not computed for each other. Both signs go through the rest of a tower as one batch of twice the size
(`methods.replay_pairs`), so that of 2 N calls of blocks for each matrix (N + 3) / 2 are left. Three more for each
block and batch make and try the record. Memory: three times the hidden states of a batch at all blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from fulgurite.methods.calibration import Loss, first_batches, gradient_moments, kept_random_state
from fulgurite.methods.compression import matrices
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.pruning.allocation import Dialect, allocate_per_tower, allocate_sparsity
from fulgurite.methods.pruning.block_importance import Score, group_importance, matrix_importance
from fulgurite.methods.replay import Replay
from fulgurite.methods.replay_pairs import Chain
from fulgurite.methods.statistics.zeroth_order import At, ZerothOrderStatistics, two_passes

Granularity = Literal["model", "block", "layer"]


class Ecoflap:
    """Sparsities by importance for the loss.

    Args:
        target: share of all weights that is pruned.
        max_sparsity: cap on the share of each group; ``target`` + 0.1 where None.
        score: sensitivity alone (``gradient``), times |W| (``magnitude``), or squared times W^2 (``squared``).
        order: ``zeroth``, by forward passes and the memory of inference; ``first``, by gradients.
        granularity: what shares a sparsity: all layers of a tower (``model``), of a ``block``, or each ``layer`` alone.
        reduction: of the scores of a group: their ``sum``, or that per weight (``average``).
        per_tower: give every tower the target on its own, instead of all together.
        samples: examples to score with, over all processes: the first batches that hold as many; all where None.
        draws: of noise for every matrix and batch (zeroth order).
        eps: size of the perturbation (zeroth order).
        perturb: one ``matrix`` at a time as published, or a whole ``group``, which costs as many times less.
        seed: of the noise.
        dialect: of the allocation; see `allocate_sparsity`.

    Raises:
        ValueError: numbers outside their ranges.
    """

    def __init__(
        self,
        target: float = 0.5,
        max_sparsity: float | None = None,
        score: Score = "gradient",
        order: Literal["first", "zeroth"] = "zeroth",
        granularity: Granularity = "block",
        reduction: Literal["sum", "average"] = "sum",
        per_tower: bool = False,
        samples: int | None = 32,
        draws: int = 1,
        eps: float = 1e-3,
        perturb: Literal["matrix", "group"] = "matrix",
        seed: int = 0,
        dialect: Dialect = "exact",
    ) -> None:
        cap = min(1.0, target + 0.1) if max_sparsity is None else max_sparsity
        if not 0 <= target <= cap <= 1:
            raise ValueError(f"target={target}, max_sparsity={max_sparsity}: expected 0 <= target <= max_sparsity <= 1")
        for name, value, allowed in (
            ("score", score, ("gradient", "magnitude", "squared")),
            ("order", order, ("first", "zeroth")),
            ("granularity", granularity, ("model", "block", "layer")),
            ("reduction", reduction, ("sum", "average")),
            ("perturb", perturb, ("matrix", "group")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
        if perturb == "group" and (order == "first" or score != "gradient"):
            raise ValueError("perturb=group scores a group as one: it needs order=zeroth and score=gradient")
        if (samples is not None and samples < 1) or draws < 1 or not eps > 0:
            raise ValueError(f"samples={samples} and draws={draws} must be at least 1, eps={eps} positive")
        self.target, self.max_sparsity, self.score, self.order = target, cap, score, order
        self.granularity, self.reduction, self.per_tower = granularity, reduction, per_tower
        self.samples, self.draws, self.eps, self.perturb = samples, draws, eps, perturb
        self.seed, self.dialect = seed, dialect

    def sparsities(self, walk: LayerWalk, loss: Loss, pattern: str | None = None) -> dict[str, float]:
        """Sparsity of every layer that the walk would prune. All ranks call it; the model is as it was.

        Args:
            walk: with the batches to score with, which are the same for any number of processes where batch i of
                rank r is batch i * size + r of one process.
            loss: of the whole model on one batch; deterministic, and without a cache of keys and values.
            pattern: full pattern of names of layers; all linear layers of the walked blocks where None.

        Raises:
            ValueError: no batches, or a loss that is not finite or that no weight changes.
        """
        return self.allocate(walk, self.importance(walk, loss, pattern), pattern)

    def importance(self, walk: LayerWalk, loss: Loss, pattern: str | None = None) -> dict[str, float]:
        """Of every layer, or group where groups are perturbed; see `sparsities`. It depends on no target."""
        layers = {name: walk.model.get_submodule(name) for name in matrices(walk, pattern)}
        batches = first_batches(walk.batches, self.samples, walk.ranks)
        if self.order == "first":
            moment = "square" if self.score == "squared" else "absolute"
            found = gradient_moments(walk, loss, layers, [batch for _, batch in batches], moment)
        else:
            found = self._forwards(walk, loss, layers, batches)
        if self.perturb == "group":
            return {group: value.item() for group, value in found.items()}
        return {name: matrix_importance(layer.weight, found[name], self.score) for name, layer in layers.items()}

    def allocate(
        self, walk: LayerWalk, importance: Mapping[str, float], pattern: str | None = None
    ) -> dict[str, float]:
        """Sparsity of every layer by what `importance` has found, now or for another target.

        Raises:
            ValueError: it is of other layers, or 0 throughout.
        """
        sizes = {name: weight.numel() for name, weight in matrices(walk, pattern).items()}
        groups = groups_of(walk, sizes, self.granularity)
        if self.perturb == "group":
            count: dict[str, int] = {}
            for name, size in sizes.items():
                count[groups[name]] = count.get(groups[name], 0) + size
            check_names(importance, count)
            whole = self.reduction == "sum"
            scores = {group: importance[group] / (1 if whole else size) for group, size in count.items()}
        else:
            check_names(importance, sizes)
            ordered = {name: importance[name] for name in sizes}
            scores, count = group_importance(ordered, sizes, groups, self.reduction)
        if not any(scores.values()):
            raise ValueError("the importance of all layers is 0: the loss does not depend on them")
        towers = {groups[name]: tower for name, tower in groups_of(walk, sizes, "model").items()}
        numbers = (list(scores.values()), list(count.values()))
        if self.per_tower:
            of_group = [towers[group] for group in scores]
            found = allocate_per_tower(*numbers, of_group, self.target, self.max_sparsity, self.dialect)
        else:
            found = allocate_sparsity(*numbers, self.target, self.max_sparsity, self.dialect)
        by_group = dict(zip(scores, found.sparsity))
        return {name: by_group[groups[name]] for name in sizes}

    def _forwards(
        self, walk: LayerWalk, loss: Loss, layers: Mapping[str, nn.Module], batches: Sequence[tuple[int, Any]]
    ) -> dict[str, Tensor]:
        """Mean |c| of every matrix or group."""
        blocks = places_of(walk, layers)
        units = groups_of(walk, layers, self.granularity if self.perturb == "group" else "layer")
        scores = ZerothOrderStatistics(
            {name: layer.weight for name, layer in layers.items()}, units, self.eps, self.draws, self.seed
        )
        walk.ranks.agree(lambda: [score_batch(walk, loss, scores, layers, blocks, *numbered) for numbered in batches])
        scores.reduce(walk.ranks.total)
        return scores.means()


def score_batch(
    walk: LayerWalk,
    loss: Loss,
    scores: ZerothOrderStatistics,
    layers: Mapping[str, nn.Module],
    places: Mapping[str, Sequence[str]],
    number: int,
    batch: Any,
) -> None:
    """Score all units of ``scores`` on one batch, computing only what each perturbation changes.

    Args:
        layers: name -> module.
        places: name of a layer -> where its weight is used; see `places_of`.
        number: of the batch among those of all processes.
    """
    everything = {name: walk.model.get_submodule(name) for name in walk.spec.all_block_names(walk.model)}
    replay = Replay({**everything, **layers})
    with kept_random_state(walk.device), replay.recording(everything):
        loss(batch)
    towers = [walk.spec.block_names(walk.model, tower.name) for tower in walk.spec.towers]
    chains = {name: chain for names in towers for chain in [Chain(replay, names)] for name in chain.next}
    at, own = None, []
    for unit, members in scores.members.items():
        used = {place for name in members for place in places[name]}
        changed, single = used.union(members), len(used) == 1
        if single and used != {at}:
            if at is not None:
                replay.forget(own)
            (at,) = used
            own = [name for name, place in places.items() if at in place]
            with kept_random_state(walk.device), replay.without([at]), replay.recording(own):
                loss(batch)

        def loss_now(changed: set[str] = changed) -> Tensor:
            with replay.without(changed):
                return loss(batch)

        def together(_: str, shifted: At, changed: set[str] = changed, at: str = at) -> tuple[Tensor, Tensor]:
            outputs = []
            for sign in (+1, -1):
                with shifted(sign):
                    outputs.append(replay.output_of(at, loss_now))
            found = []
            for sign, known in zip((+1, -1), chains[at].ahead(at, tuple(outputs))):
                with shifted(sign), replay.without(changed, known):
                    found.append(loss(batch))
            return tuple(found)

        scores.update(together if single and at in chains else two_passes(loss_now), number, [unit])


def groups_of(walk: LayerWalk, names: Iterable[str], granularity: Granularity) -> dict[str, str]:
    """Layer -> the name of its tower, of its block, or its own."""
    if granularity == "layer":
        return {name: name for name in names}
    found = {}
    for tower in walk.towers:
        for block in walk.spec.block_names(walk.model, tower.name):
            for name in names:
                if name == block or name.startswith(f"{block}."):
                    found[name] = tower.name if granularity == "model" else block
    return found


def places_of(walk: LayerWalk, layers: Mapping[str, nn.Module]) -> dict[str, list[str]]:
    """Layer -> the blocks in which its weight is used."""
    blocks = walk.spec.all_block_names(walk.model)
    uses: dict[int, set[str]] = {}
    for name, parameter in walk.model.named_parameters(remove_duplicate=False):
        uses.setdefault(id(parameter), set()).update(b for b in blocks if name.startswith(f"{b}."))
    return {name: sorted(uses[id(layer.weight)]) for name, layer in layers.items()}


def check_names(importance: Mapping[str, float], expected: Mapping[str, int]) -> None:
    """Raise ValueError where an importance is missing, or of something else."""
    missing, unknown = expected.keys() - importance.keys(), importance.keys() - expected.keys()
    if missing or unknown:
        first = min(missing or unknown)
        raise ValueError(f"the importance misses {len(missing)} names and has {len(unknown)} others, first {first}")
