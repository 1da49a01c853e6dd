import itertools
import math
import random

import pytest

from fulgurite.methods.quantization.bit_allocation import allocate_bits


def case(seed, matrices=6):
    source = random.Random(seed)
    sizes = {f"m{number}": source.choice([12, 12, 30, 47]) for number in range(matrices)}
    errors = {
        # Not convex, and at times not even decreasing.
        name: {bits: source.random() * 4.0 ** (-bits + 2 * source.random()) for bits in (2, 3, 4, 8)}
        for name in sizes
    }
    return errors, sizes


def exhaustive(errors, sizes, budget):
    """The least error of all combinations."""
    best = math.inf
    for bits in itertools.product(*(errors[name] for name in errors)):
        if sum(sizes[name] * b for name, b in zip(errors, bits)) <= budget * sum(sizes.values()) + 1e-9:
            best = min(best, sum(errors[name][b] for name, b in zip(errors, bits)))
    return best


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [2.0, 2.4, 3.1, 4.0, 5.5, 8.0, 16.0])
def test_nothing_that_fits_has_a_smaller_error(seed, budget):
    errors, sizes = case(seed)
    found = allocate_bits(errors, sizes, budget)
    assert sum(sizes[name] * bits for name, bits in found.items()) <= budget * sum(sizes.values())
    total = sum(errors[name][bits] for name, bits in found.items())
    assert total == pytest.approx(exhaustive(errors, sizes, budget), rel=1e-12)


def test_hundreds_of_matrices_are_quick_and_use_the_budget():
    source = random.Random(0)
    sizes = {f"m{number}": source.choice([4096 * 4096, 4096 * 1024, 4096 * 14336]) for number in range(224)}
    errors = {name: {b: source.random() * 4.0**-b * sizes[name] for b in (2, 3, 4, 5, 6, 8)} for name in sizes}
    found = allocate_bits(errors, sizes, 3.5)
    used = sum(sizes[name] * bits for name, bits in found.items()) / sum(sizes.values())
    assert 3.499 < used <= 3.5
    assert len(set(found.values())) > 2


def test_what_has_no_solution_is_refused():
    errors, sizes = case(0)
    with pytest.raises(ValueError, match="the fewest on offer take 2"):
        allocate_bits(errors, sizes, 1.9)
    with pytest.raises(ValueError, match="m0 has no bits"):
        allocate_bits({"m0": {}}, {"m0": 3}, 4)
    with pytest.raises(ValueError, match="error of m0 in 2 bits is nan"):
        allocate_bits({"m0": {2: math.nan}}, {"m0": 3}, 4)
