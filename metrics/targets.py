"""What a batch of questions is judged by, as tensors.

Legend: B batch, A answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fulgurite.samples import Batch, DataInfo


@dataclass(frozen=True)
class Targets:
    """What a batch of questions is judged by.

    Args:
        scores: (B, A) score of every answer.
        domains: (B,) column of the question's domain, -1 where the results have none.
        kinds: (B,) question type, -1 where it has none.
        speech: (B,) whether subtitles came with the video.
        use: (B,) whether the question counts.
    """

    scores: Tensor
    domains: Tensor
    kinds: Tensor
    speech: Tensor
    use: Tensor


def targets_of(batch: Batch, columns: DataInfo, answers: Mapping[str, int], device: torch.device) -> Targets:
    """Targets on ``device``.

    Args:
        batch: with the keys of `sample_fields`.
        columns: its ``domains`` and ``kinds`` are the columns of the results.
        answers: index of every known answer; others are never right.
        device: of the logits.
    """
    domains = {name: i for i, name in enumerate(columns.domains)}
    kinds = {name: i for i, name in enumerate(columns.kinds)}
    scores = torch.zeros(len(batch["id"]), len(answers))
    for row, given in enumerate(batch["answers"]):
        for answer, score in given.items():
            if answer in answers:
                scores[row, answers[answer]] = score
    of_domain = torch.tensor([domains.get(d, -1) for d in batch["domain"]], device=device)
    return Targets(
        scores.to(device),
        of_domain,
        torch.tensor([kinds.get(k, -1) for k in batch["kind"]], device=device),
        batch["speech"].to(device),
        batch["counted"].to(device) & (of_domain >= 0),
    )
