"""Prune a whole model in several rounds, each by scores of what the rounds before left (arXiv 2310.02998, baselines).

after round t of T a share p^(T/t) is pruned: little at first, p at the end
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from fulgurite.methods.exact_masks import rounded_count, smallest_of_all

Masks = dict[str, Tensor]


def round_sparsity(target: float, number: int, rounds: int) -> float:
    """p^(T/t): the share of weights that is pruned after round ``number`` (from 1) of ``rounds``.

    Raises:
        ValueError: a target outside [0, 1], or a number outside 1 .. rounds.
    """
    if not 0 <= target <= 1:
        raise ValueError(f"a sparsity of {target} is outside [0, 1]")
    if not 1 <= number <= rounds:
        raise ValueError(f"round {number} of {rounds}")
    return target ** (rounds / number)


def prune_in_rounds(
    scores_after: Callable[[Masks], Callable[[str], Tensor]],
    sizes: Mapping[str, int],
    target: float,
    rounds: int,
) -> Masks:
    """Masks of a model, True where a weight is kept: exactly round(p N) are pruned, and what was pruned stays so.

    Args:
        scores_after: masks so far (none before the first round) -> (name -> scores, not negative). This is where a
            caller zeroes the model's weights and takes gradients anew.
        sizes: name -> entries.
        target: p, the share of all N weights that is pruned in the end.
        rounds: T; 1 is one shot.
    """
    masks: Masks = {}
    total = sum(sizes.values())
    for number in range(1, rounds + 1):
        score_of, known = scores_after(masks), masks

        def left(name: str, score_of: Callable[[str], Tensor] = score_of, known: Masks = known) -> Tensor:
            scores = score_of(name)
            if name not in known:
                return scores
            # What is pruned is below every weight that is left, also those of score 0.
            return scores.to(torch.float32).clamp(min=torch.finfo(torch.float32).tiny) * known[name]

        count = rounded_count(round_sparsity(target, number, rounds), total)
        masks = {name: ~pruned for name, pruned in smallest_of_all(left, sizes, count)}
    return masks
