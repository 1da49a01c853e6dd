"""Random numbers of a place do not depend on how they are asked for."""

import pytest
import torch

from fulgurite.methods.merging.random import uniform

PLACE = (3, "dare", 1, "block.weight")


@pytest.mark.parametrize("start", [0, 1, 3, 7, 8, 9, 250, 999])
@pytest.mark.parametrize("count", [0, 1, 8, 13])
def test_any_piece_is_the_piece_of_the_whole(start, count):
    whole = uniform(*PLACE, 2000)
    assert torch.equal(uniform(*PLACE, count, start), whole[start : start + count])


def test_every_part_of_the_place_counts():
    places = [
        PLACE,
        (4, *PLACE[1:]),
        (3, "della", 1, "block.weight"),
        (3, "dare", 2, "block.weight"),
        (*PLACE[:3], "b"),
    ]
    draws = [uniform(*place, 50) for place in places]
    assert all(not torch.equal(a, b) for i, a in enumerate(draws) for b in draws[:i])


def test_they_are_uniform():
    numbers = uniform(*PLACE, 400_000).double()
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts = torch.histc(numbers, 20, 0, 1)
    assert ((counts - 20_000).abs() < 5 * 20_000**0.5).all()
    assert abs(torch.corrcoef(torch.stack([numbers[:-1], numbers[1:]]))[0, 1]) < 0.01
