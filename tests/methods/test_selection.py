"""The k largest magnitudes against a stable sort."""

import pytest
import torch

from fulgurite.methods.merging.plan import Operands
from fulgurite.methods.merging.trimming import cuts_of, trim
from fulgurite.methods.selection import (
    SMALL,
    Cut,
    Split,
    bits_of,
    cuts_at,
    kept_count,
    locate,
    lower_histogram,
    places_of,
    take,
    take_between,
    upper_histogram,
    value_of,
)


def sorted_mask(values, keep):
    """A stable descending sort keeps equal magnitudes in the order of their index."""
    mask = torch.zeros(values.numel(), dtype=torch.bool)
    mask[values.abs().flatten().sort(descending=True, stable=True).indices[:keep]] = True
    return mask.view_as(values)


def draw(kind, count, dtype=torch.float32):
    values = torch.randn(count, generator=torch.Generator().manual_seed(count), dtype=dtype)
    if kind == "tied":
        return (values * 3).round()
    if kind == "constant":
        return values.sign()
    if kind == "sparse":
        return values * (values > 1.5)
    if kind == "tiny":
        return values * 1e-41
    return values * 1e-3


@pytest.mark.parametrize("kind", ["plain", "tied", "constant", "sparse", "tiny"])
def test_trim_keeps_what_a_stable_sort_keeps(kind):
    for count in (1, 2, 7, SMALL, SMALL + 1, 2**16 + 5):
        values = draw(kind, count)
        for density in (1e-9, 0.2, 0.5, 0.97, 1.0):
            keep = kept_count(density, count)
            assert torch.equal(trim(values, density), values * sorted_mask(values, keep))
        assert not trim(values, 0.0).any()


@pytest.mark.parametrize("count", [7, SMALL + 1])
def test_doubles_are_kept_whole_and_compared_as_floats(count):
    values = draw("plain", count, torch.float64)
    keep = kept_count(0.3, count)
    assert torch.equal(trim(values, 0.3), values * sorted_mask(values.float(), keep))


def test_kept_count_is_the_floor_and_at_least_one():
    cases = {(0.2, 10): 2, (0.29, 10): 2, (0.01, 10): 1, (1.0, 3): 3, (0.0, 5): 0, (0.5, 0): 0}
    assert {case: kept_count(*case) for case in cases} == cases


@pytest.mark.parametrize("count", [1000, SMALL + 1])
def test_all_ties_may_be_kept(count):
    values = draw("tied", count)
    (cut,) = cuts_of(Operands("x", [torch.zeros(count), values], True), [count // 3], all_ties=True)
    kept, _ = take(values, cut)
    threshold = values.abs().sort(descending=True).values[count // 3 - 1]
    assert torch.equal(kept, values * (values.abs() >= threshold))


def test_pieces_share_the_ties_that_are_left_and_do_not_change_the_cut():
    base, values = draw("plain", 9000), draw("tied", 9000)
    cuts = [cuts_of(Operands("x", [base * 0, values, base], True, size=size), [3333] * 2) for size in (70, 9000)]
    assert cuts[0] == cuts[1]
    cut, pieces = cuts[0][0], []
    for piece in values.split(70):
        kept, cut = take(piece, cut)
        pieces.append(kept)
    assert torch.equal(torch.cat(pieces), values * sorted_mask(values, 3333))
    assert cut.ties == 0


@pytest.mark.parametrize("kind", ["tied", "constant", "sparse"])
@pytest.mark.parametrize("keep", [1, 4000, 8999])
def test_a_cut_over_tensors_is_that_of_all_in_order(kind, keep):
    parts = dict(zip("abc", draw(kind, 9000).split([5000, 1, 3999])))
    bits = {name: bits_of(part) for name, part in parts.items()}
    upper, rank, _ = locate(sum(map(upper_histogram, bits.values())), keep)
    lower, ties, equal = locate(sum(lower_histogram(each, upper) for each in bits.values()), rank)
    split = Split([value_of(upper, lower)], [ties], [equal])
    counts = {name: [int((part.abs() == split.values[0]).sum())] for name, part in parts.items()}
    assert sum(count for (count,) in counts.values()) == equal
    cuts = split.cuts(list(parts), counts if split.is_open else None)
    kept = torch.cat([take(part, cuts[name][0])[0] for name, part in parts.items()])
    whole = torch.cat(list(parts.values()))
    assert torch.equal(kept, whole * sorted_mask(whole, keep))


@pytest.mark.parametrize("count", [500, SMALL + 1])
def test_several_ranks_of_several_vectors_are_cut_in_one_go(count):
    vectors, ranks = [draw("tied", count), draw("plain", count)], [[0, count // 9, count // 2, count], [3]]
    pieces = [[vector.split(300)[i] for vector in vectors] for i in range(-(-count // 300))]
    cuts = cuts_at(lambda: iter(pieces), count, ranks)
    for vector, own, found in zip(vectors, ranks, cuts):
        for rank, cut in zip(own, found):
            assert torch.equal(take(vector, cut)[0], vector * sorted_mask(vector, rank))
    kept, _, _ = take_between(vectors[0], cuts[0][2], cuts[0][1])
    band = sorted_mask(vectors[0], count // 2) & ~sorted_mask(vectors[0], count // 9)
    assert torch.equal(kept, vectors[0] * band)
    places = places_of(lambda: iter(pieces), count, [[count // 2, count], [1]])
    ordered = [vector.abs().sort(descending=True).values for vector in vectors]
    assert [places[0][count // 2].value, places[0][count].value] == ordered[0][[count // 2 - 1, -1]].tolist()
    assert places[1][1].value == ordered[1][0].item()


def test_a_cut_without_ties_left_takes_what_is_above():
    kept, cut = take(torch.tensor([1.0, -1.0, 2.0, 1.0]), Cut(1.0, 2))
    assert kept.tolist() == [1, -1, 2, 0]
    assert take(torch.tensor([1.0, 3.0]), cut)[0].tolist() == [0, 3]
