"""RSQ: rotate, let important tokens count more, quantize (arXiv 2503.01820).

    Rotate().apply(model, spec)
    for block in compressed_blocks(walk, Gptq(bits=3), token_weights=TokenImportance()): ...

`TokenImportance` says how much every calibration token counts in the Gram matrices of a block, from the block's own
inputs, outputs and attention before it is quantized. Attention mass is taken while the block runs, from the queries and
keys of its own `scaled_dot_product_attention`, so that no matrix of all pairs of tokens exists.

B examples, S tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from fulgurite.methods.layer_walk import Block
from fulgurite.methods.quantization.attention_calls import attention_of, readers
from fulgurite.methods.quantization.token_importance import (
    centroid_importance,
    change_importance,
    check,
    chunk_importance,
    dot_importance,
    frequency_importance,
    kmeans,
    norm_importance,
    similarity_importance,
    token_counts,
    token_weights,
)
from fulgurite.methods.statistics.gram import token_shares

Kind = Literal["attention", "norm", "change", "similarity", "dot", "frequency", "centroids", "chunks"]
KINDS = ("attention", "norm", "change", "similarity", "dot", "frequency", "centroids", "chunks")


class TokenImportance:
    """Weights of the tokens of a block, for `compressed_blocks(token_weights=...)`.

    Layers that read the tokens of another tower (keys and values of cross-attention) are not weighted: all of those
    tokens count alike.

    Args:
        kind: what makes a token important; see `token_importance`.
        minimum: weight of the least important token.
        maximum: weight of the most important one; only the ratio of the two matters.
        power: of the importance.
        normalize: by the number of queries that see a token.
        quantile: q, take the quantiles 1 - q and q for smallest and largest.
        masking: share of tokens that get 0, where the others get 1.
        truncate: share of tokens that get 0.
        num_bins: how many steps the weights have.
        chunks: which runs of the sequence count, as ``0_8``; for kind ``chunks`` alone.
        num_centroids: for kind ``centroids``.
        seed: of the centroids.
        ids: entry of a batch that holds the token ids, where it is a dict; for kind ``frequency``.

    Raises:
        ValueError: numbers outside their ranges, or options of another kind.
    """

    def __init__(
        self,
        kind: Kind = "attention",
        minimum: float = 0.005,
        maximum: float = 1.0,
        power: Literal["square", "sqrt"] | None = None,
        normalize: Literal["linear", "sqrt"] | None = None,
        quantile: float | None = None,
        masking: float | None = None,
        truncate: float | None = None,
        num_bins: int | None = None,
        chunks: str | None = None,
        num_centroids: int = 100,
        seed: int = 0,
        ids: str = "input_ids",
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
        check(torch.zeros(1, 1), None, minimum, maximum, quantile, masking, truncate, num_bins)
        if (kind == "chunks") != (chunks is not None):
            raise ValueError(f"kind={kind!r}, chunks={chunks!r}: one needs the other")
        if chunks is not None:
            chunk_importance(chunks, 1, 1)
        if power is not None and kind in ("change", "frequency"):
            raise ValueError(f"kind={kind!r} is negative: leave out power={power!r}")
        if num_centroids < 1:
            raise ValueError(f"num_centroids={num_centroids}: expected at least 1")
        self.kind, self.chunks, self.num_centroids, self.seed, self.ids = kind, chunks, num_centroids, seed, ids
        self.minimum, self.maximum, self.power, self.normalize = minimum, maximum, power, normalize
        self.quantile, self.masking, self.truncate, self.num_bins = quantile, masking, truncate, num_bins

    def __call__(self, block: Block) -> list[Tensor | dict[str, Tensor]]:
        """Weights (B, S) of the tokens of every batch, by layer where not all layers read the block's own tokens.

        They sum to the number of real tokens in every example. All ranks of the walk call it.

        Raises:
            ValueError: the kind cannot be measured on this block, by name.
        """
        own, foreign = agreed(block, lambda: readers(block))
        masks = agreed(block, lambda: masks_of(block, own))
        if self.kind == "centroids":
            raw = self._centroids(block, masks)
        elif self.kind == "frequency":
            raw = self._frequency(block, masks)
        else:
            raw = agreed(block, lambda: self._importance(block, masks, foreign))
        found = agreed(block, lambda: [self.weights(*each) for each in zip(raw, masks)])
        return [dict.fromkeys(own, weights) for weights in found] if foreign else found

    def weights(self, importance: Tensor, mask: Tensor | None) -> Tensor:
        """Weights (B, S) of raw importance; see `token_weights` and `token_shares`."""
        if self.kind != "chunks":
            importance = token_weights(
                importance,
                mask,
                self.minimum,
                self.maximum,
                self.power,
                self.normalize,
                self.quantile,
                self.masking,
                self.truncate,
                self.num_bins,
            )
        return token_shares(importance, mask)

    def _importance(self, block: Block, masks: list[Tensor | None], foreign: list[str]) -> list[Tensor]:
        """Raw importance (B, S) of every batch, of kinds that each process measures on its own."""
        if self.kind == "attention":
            return attention_of(block, masks, foreign)
        xs = [x.flatten(1, -2) for x in block.inputs]
        if self.kind == "norm":
            return [norm_importance(x) for x in xs]
        if self.kind == "change":
            return [change_importance(x, y.to(x.device).flatten(1, -2)) for x, y in zip(xs, block.outputs())]
        if self.kind == "similarity":
            return [similarity_importance(x, mask) for x, mask in zip(xs, masks)]
        if self.kind == "dot":
            return [dot_importance(x, mask) for x, mask in zip(xs, masks)]
        return [chunk_importance(self.chunks, *x.shape[:2]).to(x.device) for x in xs]

    def _centroids(self, block: Block, masks: list[Tensor | None]) -> list[Tensor]:
        """Distance to the nearest centroid. Every rank holds the tokens of all."""
        xs = [x.flatten(1, -2) for x in block.inputs]
        rows = agreed(block, lambda: [x.flatten(0, 1) if mask is None else x[mask != 0] for x, mask in zip(xs, masks)])
        numbered = {place * block.walk.ranks.size + block.walk.ranks.rank: each for place, each in enumerate(rows)}
        everything = {number: each for part in block.walk.ranks.gather(numbered) for number, each in part.items()}
        together = torch.cat([everything[number] for number in sorted(everything)])
        centroids = agreed(block, lambda: kmeans(together, self.num_centroids, seed=self.seed))
        return [centroid_importance(x, centroids) for x in xs]

    def _frequency(self, block: Block, masks: list[Tensor | None]) -> list[Tensor]:
        """Rareness of every token among the calibration data of all ranks."""
        ranks = block.walk.ranks
        batches = agreed(block, lambda: ids_of(block, self.ids))
        vocabulary = max(ranks.gather(max((int(ids.max()) + 1 for ids in batches), default=1)))
        real = [torch.ones_like(ids) if mask is None else mask.cpu() for ids, mask in zip(batches, masks)]
        counts = ranks.total(token_counts(batches, vocabulary, real))
        return [frequency_importance(ids, counts) for ids in batches]


def rolled_copies(ids: Tensor, copies: int) -> Tensor:
    """Every sequence ``copies`` times, each shifted on by another T / copies, so that tokens are seen at all places.

    Args:
        ids: (B, T) token ids, without padding.
        copies: M.

    Returns:
        (B M, T); the copies of a sequence follow each other, itself first.

    Raises:
        ValueError: no copies, or more than tokens.
    """
    length = ids.shape[1]
    if not 1 <= copies <= length:
        raise ValueError(f"copies={copies}: expected 1 to {length}, the length of a sequence")
    return torch.stack([ids.roll(number * length // copies, 1) for number in range(copies)], 1).flatten(0, 1)


def masks_of(block: Block, layers: Sequence[str]) -> list[Tensor | None]:
    """(B, S) the real tokens that a block works on, of every batch; None where there is no padding.

    Args:
        block: of the walk.
        layers: those inside that read its own tokens.

    Raises:
        ValueError: a mask does not fit.
    """
    found: list[Tensor | None] = []
    for batch, x in zip(block.walk.batches, block.inputs):
        known = block.walk.masks(batch, layers) if block.walk.masks is not None else {}
        mask = next(iter(known.values()), None)
        if mask is not None and mask.numel() * x.shape[-1] != x.numel():
            raise ValueError(f"a mask of {tuple(mask.shape)} does not fit hidden states of {tuple(x.shape)}")
        found.append(None if mask is None else mask.reshape(len(x), -1).to(x.device))
    return found


def agreed(block: Block, work: Callable[[], Any]) -> Any:
    """`Ranks.agree` on ``work``, whose ValueErrors name the block."""

    def named() -> Any:
        try:
            return work()
        except ValueError as error:
            raise ValueError(f"{block.name}: {error}") from error

    return block.walk.ranks.agree(named)


def ids_of(block: Block, name: str) -> list[Tensor]:
    """(B, S) the ids of the tokens that a block works on, of every batch, on the CPU.

    Args:
        block: of the walk.
        name: of the entry of a batch that holds them, where it is a dict.

    Raises:
        ValueError: the block's tower reads others.
    """
    tower = block.tower
    if tower.memory is not None:
        raise ValueError(
            f"tower {tower.name!r} reads other tokens than {tower.memory!r}, and kind 'frequency' counts those alone: "
            f"choose another kind of importance, or set towers to leave {tower.name!r} out"
        )
    found = [token_ids(batch, name).cpu() for batch in block.walk.batches]
    for ids, x in zip(found, block.inputs):
        if ids.numel() * x.shape[-1] != x.numel():
            raise ValueError(
                f"token ids {name!r} of {tuple(ids.shape)} are not those of tower {tower.name!r} with hidden states of "
                f"{tuple(x.shape)}: choose another kind of importance than 'frequency', or set towers to leave it out"
            )
    return found


def token_ids(batch: Any, name: str) -> Tensor:
    """(B, S) the token ids of a batch: itself, or its entry ``name``.

    Raises:
        ValueError: there are none.
    """
    ids = batch.get(name) if isinstance(batch, Mapping) else batch
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        raise ValueError(
            f"a batch holds no token ids under {name!r}: set ids to the entry that does, or choose another kind of "
            "importance than 'frequency'"
        )
    return ids
