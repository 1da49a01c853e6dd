"""Figures over all items of all ranks, from the rows of this one's: attacks, scores, damage, layers.

Legend: N items.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from fulgurite.methods.unlearning.answers import says
from fulgurite.methods.unlearning.attacks.base import Attack
from fulgurite.metrics.item_figures import ItemFigures
from fulgurite.metrics.unlearning import SETS, AttackSuccess, UnlearningScores

WHEN = ("before", "after")
MEMORY = ("probability", "exact_memorisation", "min_k")


def summary(
    rows: Sequence[Mapping[str, Any]], attacks: Sequence[Attack], injects: bool, depth: int, device: torch.device
) -> dict[str, Any]:
    """What the log and the report need; equal on all ranks, which all call it.

    Args:
        rows: of this rank's items, see `item_figures`, each with ``domain``, ``id``, ``target``, ``before``, ``after``.
        attacks: that were run.
        injects: whether the edit makes the model say another text, of which scores are.
        depth: blocks of the model.
        device: for the exchange between ranks.
    """
    ids = [f"{row['domain']}/{row['id']}" for row in rows]
    success = AttackSuccess({key_of(attack): attack.budget for attack in attacks}).to(device)
    for attack in attacks:
        shares = [tensor([row[when]["attacks"][attack.title] for row in rows]) for when in WHEN]
        success.update(ids, key_of(attack), after=shares[1], before=shares[0])
    scores = UnlearningScores("injection" if injects else "erasure").to(device)
    asked = "target" if injects else "answer"
    probabilities = [torch.tensor([[*row[when][asked].values()] for row in rows]).view(-1, 3) for when in WHEN]
    right = {name: tuple(tensor([mean(row[when]["right"][name]) for row in rows]) for when in WHEN) for name in SETS}
    scores.update(ids, *probabilities, accuracies=right)
    said = ItemFigures([f"answered_{when}" for when in WHEN]).to(device)
    right = [tensor([100.0 * says(row[when]["written"], row["gold"]) for row in rows]) for when in WHEN]
    said.update(ids, {f"answered_{when}": values for when, values in zip(WHEN, right)})
    kept = ItemFigures([f"{name}_{when}" for name in MEMORY for when in WHEN]).to(device)
    kept.update(
        ids, {f"{name}_{when}": tensor([row[when]["memory"][name] for row in rows]) for name in MEMORY for when in WHEN}
    )
    layers = ItemFigures([f"{when}/{layer}" for when in WHEN for layer in range(depth + 1)]).to(device)
    layers.update(
        ids,
        {
            f"{when}/{layer}": tensor([row[when]["layers"][layer] for row in rows])
            for when in WHEN
            for layer in range(depth + 1)
        },
    )
    figures = {name: float(value) for part in (success, scores, said, kept) for name, value in part.compute().items()}
    found = {name: float(value) for name, value in layers.compute().items()}
    return {
        "figures": figures,
        "known": figures["answered_before"] > 0,
        "attacks": {attack.title: key_of(attack) for attack in attacks},
        "layers": {when: [found[f"{when}/{layer}"] for layer in range(depth + 1)] for when in WHEN},
    }


def key_of(attack: Attack) -> str:
    """Its title as part of a figure's name."""
    return attack.title.replace(", ", "_").replace("+", "_").replace(" ", "_")


def tensor(values: Sequence[float]) -> Tensor:
    """(N,) float64."""
    return torch.tensor(values, dtype=torch.float64)


def mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return fmean(values) if values else math.nan
