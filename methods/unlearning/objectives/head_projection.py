"""Head Projection Defence (Patil et al., 2024, arXiv 2309.17410): the answer leaves the extremes of every lens.

    L = mean_{l in S, r} max(0, P_l[y_1] - s_l(V-k+1)) + mean_{l in S, r} max(0, s_l(k) - P_l[y_1])

P_l is the logit lens of layer l at the last position of the prompt, s_l(1) <= ... <= s_l(V) its sorted entries, y_1 the
first token of the answer. It is 0 where no layer has y_1 among its k - 1 largest or k - 1 smallest entries.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fulgurite.methods.unlearning.objectives.base import Objective, Terms, View, per_row


class HeadProjectionDefence(Objective):
    """Hinges on the lens of some layers, with gradient through the token and through the k-th entries.

    Args:
        layers: S; published for 32 blocks: 22 to 32.
        k: up to which entry from either end the token may not be beyond.

    Raises:
        ValueError: no layers, or ``k`` below 1.
    """

    needs_logits = False

    def __init__(self, layers: Sequence[int], k: int = 4) -> None:
        if not layers or k < 1:
            raise ValueError(f"HeadProjectionDefence: layers={list(layers)} must name some, and k={k} be at least 1")
        self.layers = tuple(layers)
        self.k = k

    def __call__(self, views: Sequence[View], references: Sequence[View | None]) -> Terms:
        """The loss of the one target, by rows."""
        (view,) = views
        probabilities = view.lens.exp()
        if self.k > probabilities.shape[-1]:
            raise ValueError(f"k={self.k} is more than the vocabulary of {probabilities.shape[-1]}")
        token = first_tokens(view)[:, None, None].expand(-1, probabilities.shape[1], 1)
        own = probabilities.gather(-1, token)[..., 0]
        largest = probabilities.topk(self.k, dim=-1).values[..., -1]
        smallest = probabilities.topk(self.k, dim=-1, largest=False).values[..., -1]
        hinges = (own - largest).relu() + (smallest - own).relu()
        return per_row(hinges.mean(1), view)


def first_tokens(view: View) -> Tensor:
    """(R,) id of each answer's first token; 0 where there is none."""
    first = view.labelled.to(torch.uint8).argmax(1, keepdim=True)
    return view.labels.gather(1, first)[:, 0].clamp(min=0)
