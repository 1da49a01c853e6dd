"""Greedy soup (model soups, arXiv 2203.05482, recipe 1): what is merged is chosen by the validation figure.

soup = [best];  for each other model, best first: keep it if score(soup + it) >= score(soup)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

Model = TypeVar("Model")


def greedy_soup(models: Sequence[Model], score: Callable[[list[Model]], float]) -> tuple[list[Model], float]:
    """The models that are kept, in the order given, and their score.

    Args:
        models: at least one, best first.
        score: of the merge of some of them, larger is better; called once per model.
    """
    if not models:
        raise ValueError("a soup of no models")
    soup = [models[0]]
    best = score(soup)
    for model in models[1:]:
        tried = score([*soup, model])
        if tried >= best:
            soup, best = [*soup, model], tried
    return soup, best
