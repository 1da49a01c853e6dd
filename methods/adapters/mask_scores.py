"""Scores of a sparse mask from data: moments of the gradients of single examples (arXiv 2111.09839).

    label    sum_n (d loss_n / d theta)^2, with the data's own labels: the empirical Fisher information
    expect   sum_n sum_c p(c|x_n) (d -log p(c|x_n) / d theta)^2, exactly, of examples that have one label
    sampled  the same, with one label drawn from the model per example

Example by example, so that batches do not matter, and summed over processes. With absolute values for the squares in
``label_absolute`` and ``expect_absolute``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.methods.adapters.sparse_mask import SparseMask
from fulgurite.methods.ranks import Ranks
from fulgurite.methods.statistics.fisher import FisherStatistics

ALL_CLASSES = 2**62
MOMENTS: dict[str, dict[str, Any]] = {
    "label": {"kind": "empirical"},
    "label_absolute": {"kind": "empirical", "moment": "absolute"},
    "expect": {"kind": "expected", "max_exact": ALL_CLASSES},
    "expect_absolute": {"kind": "expected", "max_exact": ALL_CLASSES, "moment": "absolute"},
    "sampled": {"kind": "expected", "max_exact": 0},
}


def data_scores(
    mask: SparseMask,
    backbone: nn.Module,
    function: Callable[[nn.Module, Any], Tensor | tuple[Tensor, Tensor]],
    batches: Iterable[Any],
    indices: Iterable[Tensor] | None = None,
    ranks: Ranks | None = None,
    chunk: int = 16,
    vectorize: bool = True,
) -> dict[str, Tensor]:
    """Scores for `SparseMask.set_scores`, at the mask's present values, in evaluation mode.

        mask.set_scores(data_scores(mask, module.backbone, losses, batches, ranks=ranks))

    Call it before a strategy wraps the model. Memory and time: as `FisherStatistics`.

    Args:
        mask: attached to ``backbone``.
        backbone: the model that the mask's sites are in.
        function: (backbone, batch) -> losses (B,) for the label scores, else logits (B, C), or (B, T, C) of T labels
            with a mask (B, T). It may call what holds the backbone. It sees one example at a time, with B = 1.
        batches: this process's; of all processes together the examples that scores are summed over.
        indices: (B,) numbers of the examples of every batch, where labels are drawn and several processes share them.
        ranks: the processes; this one alone where None.
        chunk: most gradients at once.
        vectorize: by `torch.func.vmap`; False for models that it cannot run.

    Returns:
        name of a tensor -> sums, in its shape, the same on all processes.

    Raises:
        ValueError: the mask's score needs no data, or is an expectation and an example has several labels, or an
            example's gradient goes to a tensor whose module was not called, so that it could not train; and as
            `FisherStatistics`.
    """
    if mask.score not in MOMENTS:
        raise ValueError(f'score="{mask.score}" needs no data: use SparseMask.own_scores')
    names = list(mask.sizes)
    with mask.applied():
        statistic = FisherStatistics(
            backbone,
            functools.partial(_one_label, mask.score, function) if mask.score.startswith("expect") else function,
            pattern="|".join(map(re.escape, names)),
            expected=len(names),
            generator=torch.Generator().manual_seed(mask.seed) if mask.score == "sampled" else None,
            chunk=chunk,
            vectorize=vectorize,
            **MOMENTS[mask.score],
        )
        numbered = ((batch, None) for batch in batches) if indices is None else zip(batches, indices, strict=True)
        for batch, numbers in numbered:
            statistic.update(batch, numbers)
    ranks = ranks or Ranks()
    statistic.reduce(ranks.total)
    if not statistic.counts["examples"] > 0:
        raise ValueError("there is no example to score the mask with")
    unseen = set(names).intersection(*ranks.gather(mask.unseen()))
    lost = [name for name in names if name in unseen and statistic.sums[name].any()]
    if lost:
        raise ValueError(
            f"the model reads {lost[0]} and {len(lost) - 1} more tensors without calling the modules that own them, so "
            "that a mask cannot train them: leave these modules out of the placement's points"
        )
    return statistic.sums


def _one_label(score: str, function: Callable[[nn.Module, Any], Any], backbone: nn.Module, batch: Any) -> Any:
    """What ``function`` gives, where that is of one label per example."""
    output = function(backbone, batch)
    logits = output[0] if isinstance(output, tuple) else output
    if logits.dim() == 3 and logits.shape[1] > 1:
        raise ValueError(
            f'score="{score}" is an exact expectation over one label, and an example of this model has '
            f'{logits.shape[1]}: set score="sampled", or "label"'
        )
    return output
