"""How many bits each matrix gets, so that all together stay within a budget and lose least.

    minimize sum_m error_m(b_m)     subject to     sum_m size_m b_m <= B sum_m size_m

Solved exactly: matrix by matrix, the list of all totals (bits, error) that no other total beats in both. Totals that
cannot beat the best known solution any more are dropped, by the bound that a price per bit gives (Lagrange).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

TIGHT = 1e-12  # relative slack of the bound, for rounding


def allocate_bits(errors: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], budget: float) -> dict[str, int]:
    """Bits of every matrix, of least total error among all choices that fit.

    Time and memory grow with the number of different totals of bits, which is small where sizes are alike.

    Args:
        errors: matrix -> bits -> error, not negative; its output's, say, tr((W - Q) G (W - Q)^T).
        sizes: matrix -> weights.
        budget: B, average bits per weight.

    Raises:
        ValueError: no choice fits, an error is negative or not finite, or a matrix has no choice.
    """
    for name, choices in errors.items():
        if not choices:
            raise ValueError(f"{name} has no bits to choose from")
        if wrong := [bits for bits, error in choices.items() if not 0 <= error < math.inf]:
            raise ValueError(f"the error of {name} in {wrong[0]} bits is {choices[wrong[0]]}")
    names = list(errors)
    bits = [np.array(sorted(errors[name]), dtype=np.int64) for name in names]
    costs = [sizes[name] * each for name, each in zip(names, bits)]
    losses = [np.array([errors[name][int(b)] for b in each]) for name, each in zip(names, bits)]
    total = sum(sizes[name] for name in names)
    capacity = math.floor(budget * total * (1 + TIGHT))
    least = sum(int(cost[0]) for cost in costs)
    if least > capacity:
        raise ValueError(
            f"budget={budget} bits per weight is too small: the fewest on offer take {least / max(total, 1):.4g}"
        )
    chosen = search(costs, losses, capacity)
    return {name: int(each[choice]) for name, each, choice in zip(names, bits, chosen)}


def cheapest(costs: list[np.ndarray], losses: list[np.ndarray], price: float) -> list[int]:
    """The choice of each matrix that is best at a price per bit; the fewer bits where equal."""
    return [int(np.argmin(loss + price * cost)) for cost, loss in zip(costs, losses)]


def fair_price(costs: list[np.ndarray], losses: list[np.ndarray], capacity: int) -> float:
    """A price at which the cheapest choices fit, by bisection, and hardly more than that."""

    def used(price: float) -> int:
        return sum(int(cost[i]) for cost, i in zip(costs, cheapest(costs, losses, price)))

    if used(0.0) <= capacity:
        return 0.0
    low, high = 0.0, 1.0
    while used(high) > capacity:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if used(middle) <= capacity else (middle, high)
    return high


def search(costs: list[np.ndarray], losses: list[np.ndarray], capacity: int) -> list[int]:
    """The choice of each matrix."""
    price = fair_price(costs, losses, capacity)
    known = cheapest(costs, losses, price)
    best = sum(float(loss[i]) for loss, i in zip(losses, known))
    # What the matrices that follow cost at least, at this price, and in bits.
    priced = np.cumsum([0.0] + [float((x + price * c).min()) for c, x in zip(costs[::-1], losses[::-1])])[::-1]
    fewest = np.cumsum([0] + [int(c.min()) for c in costs[::-1]])[::-1]
    slack = TIGHT * (best + price * capacity)
    spent, lost = np.zeros(1, dtype=np.int64), np.zeros(1)
    steps = []
    for number, (cost, loss) in enumerate(zip(costs, losses)):
        new_spent, new_lost = (spent[:, None] + cost).ravel(), (lost[:, None] + loss).ravel()
        left = capacity - new_spent
        bound = new_lost + priced[number + 1] - price * left
        fits = np.flatnonzero((left >= fewest[number + 1]) & (bound <= best + slack))
        order = fits[np.lexsort((new_lost[fits], new_spent[fits]))]
        running = np.minimum.accumulate(new_lost[order])
        better = np.ones(len(order), dtype=bool)
        better[1:] = new_lost[order][1:] < running[:-1]
        kept = order[better]
        steps.append((kept // len(cost), kept % len(cost)))
        spent, lost = new_spent[kept], new_lost[kept]
        if not len(kept):
            return known  # nothing is better than the choices at the fair price
    place, chosen = int(np.argmin(lost)), []
    for parents, choices in reversed(steps):
        chosen.append(int(choices[place]))
        place = int(parents[place])
    return chosen[::-1]
