"""Whole answers out of the logit lens: a beam search over the distributions of each layer by itself.

    beams of layer l:   argmax over y_1..y_m of sum_t log P_l(y_t | prompt, y_1..y_{t-1}),  the k best

The published white-box attacks name the first token of an answer, a sub-word; this one spells the answer.

Legend: n items, S layers, k beams, t tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fulgurite.methods.unlearning.attacks.base import WhiteBox
from fulgurite.methods.unlearning.attacks.top_ids import top_ids

NextLens = Callable[[Tensor, Tensor], Mapping[int, Tensor]]


class WholeAnswer(WhiteBox):
    """At most |S| k candidate texts per item.

    Args:
        layers: S.
        k: beams of each layer.
        tokens: that a candidate may have.

    Raises:
        ValueError: as in the base, or ``tokens`` below 1.
    """

    name = "whole answer"

    def __init__(self, layers: Sequence[int] = (25, 29, 30, 31, 32), k: int = 4, tokens: int = 4) -> None:
        super().__init__(layers, k)
        if tokens < 1:
            raise ValueError(f"WholeAnswer: tokens={tokens} must be at least 1")
        self.tokens = tokens

    @property
    def budget(self) -> int:
        """|S| k."""
        return len(self.layers) * self.k

    def candidates(self, lens: Mapping[int, Tensor]) -> Tensor:
        """(n, |S| k): where the beams begin."""
        return torch.cat([top_ids(lens[layer], self.k) for layer in self.layers], dim=1)

    @torch.no_grad()
    def search(self, lens: Mapping[int, Tensor], follow: NextLens, end: int) -> Tensor:
        """(n, |S| k, tokens) long token ids, filled up by ``end``.

        Args:
            lens: probabilities (n, V) by layer at the last position of the prompts.
            follow: ``follow(items, ids)`` gives those after ids (R, t) of items (R,).
            end: token after which an answer ends.
        """
        n, width = len(lens[self.layers[0]]), len(self.layers) * self.k
        ids = self.candidates(lens).view(n, len(self.layers), self.k, 1)
        scores = torch.stack([lens[layer].gather(1, ids[:, s, :, 0]) for s, layer in enumerate(self.layers)], 1).log()
        items = torch.arange(n, device=ids.device).repeat_interleave(width)
        for _ in range(self.tokens - 1):
            ended = (ids == end).any(dim=-1)
            after = follow(items, ids.flatten(0, 2))
            grown, grown_scores = [], []
            for s, layer in enumerate(self.layers):
                own = after[layer].view(n, len(self.layers), self.k, -1)[:, s]
                further = torch.full_like(own, -torch.inf)
                further[..., end] = 0.0
                steps = torch.where(ended[:, s, :, None], further, own.log())
                total = (scores[:, s, :, None] + steps).flatten(1)
                best = top_ids(total, self.k)
                beam, token = best // own.shape[-1], best % own.shape[-1]
                before = ids[:, s].gather(1, beam[..., None].expand(-1, -1, ids.shape[-1]))
                grown.append(torch.cat([before, token[..., None]], dim=-1))
                grown_scores.append(total.gather(1, best))
            ids, scores = torch.stack(grown, 1), torch.stack(grown_scores, 1)
        return ids.flatten(1, 2)
