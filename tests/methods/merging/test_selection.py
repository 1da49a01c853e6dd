"""The k largest magnitudes against a stable sort."""

import pytest
import torch

from fulgurite.methods.merging.plan import Operands
from fulgurite.methods.merging.selection import (
    SMALL,
    Cut,
    Split,
    bits_of,
    cuts_of,
    kept_count,
    locate,
    lower_histogram,
    take,
    trim,
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
@pytest.mark.parametrize("count", [1, 2, 7, SMALL, SMALL + 1, 2**17 + 5])
def test_trim_keeps_what_a_stable_sort_keeps(kind, count):
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


@pytest.mark.parametrize("kind", ["plain", "tied", "constant", "sparse"])
@pytest.mark.parametrize("keep", [1, 777, 4000, 8999])
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


def test_a_cut_without_ties_left_takes_what_is_above():
    kept, cut = take(torch.tensor([1.0, -1.0, 2.0, 1.0]), Cut(1.0, 2))
    assert kept.tolist() == [1, -1, 2, 0]
    assert take(torch.tensor([1.0, 3.0]), cut)[0].tolist() == [0, 3]
