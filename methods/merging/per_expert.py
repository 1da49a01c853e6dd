"""Settings that are one number for all experts, or one for each."""

from __future__ import annotations

from collections.abc import Sequence

PerExpert = float | list[float]


def each(value: PerExpert) -> list[float]:
    """The numbers that were given, one or several."""
    return list(value) if isinstance(value, Sequence) else [value]


def for_each(name: str, value: PerExpert, num_experts: int) -> list[float]:
    """One number for each of the experts.

    Raises:
        ValueError: there are several, and not as many as experts.
    """
    values = each(value)
    if isinstance(value, Sequence) and len(values) != num_experts:
        raise ValueError(f"{name} has {len(values)} values for {num_experts} models: give one, or one for each")
    return values if isinstance(value, Sequence) else values * num_experts


def check_fractions(name: str, value: PerExpert) -> PerExpert:
    """The value, if all its numbers lie in [0, 1].

    Raises:
        ValueError: one does not, or there is none.
    """
    if not each(value) or not all(0 <= number <= 1 for number in each(value)):
        raise ValueError(f"{name} lies between 0 and 1, got {value}")
    return value


def refuse_weights(merger: str, weights: Sequence[float]) -> list[float]:
    """The weights, if they are equal.

    Raises:
        ValueError: they differ, and this merger finds out by itself how much each expert counts.
    """
    if len(set(weights)) > 1:
        raise ValueError(f"{merger} weighs its models by itself; leave out the weights {list(weights)}")
    return list(weights)


def refuse_several(merger: str, weights: Sequence[float]) -> list[float]:
    """The weight of one expert, if it is 1.

    Raises:
        ValueError: there are several, or it is not: how much of the expert is taken is the merger's to say.
    """
    if len(weights) > 1:
        raise ValueError(f"{merger} merges one model into its base, got {len(weights)}")
    if weights[0] != 1:
        raise ValueError(f"{merger} weighs its model by itself; leave out the weight {weights[0]}")
    return list(weights)
