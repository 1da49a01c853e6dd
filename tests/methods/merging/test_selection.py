"""The k largest magnitudes against a stable sort."""

import pytest
import torch

from fulgurite.methods.merging.selection import (
    BLOCK,
    SMALL,
    Cut,
    Difference,
    Order,
    Passes,
    blocks,
    cut_of,
    kept_count,
    take,
    trim,
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
@pytest.mark.parametrize("count", [1, 2, 7, SMALL, SMALL + 1, 2 * BLOCK + 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trim_keeps_what_a_stable_sort_keeps(kind, count, dtype):
    values = draw(kind, count, dtype)
    for density in (1e-9, 0.2, 0.5, 0.97, 1.0):
        keep = kept_count(density, count)
        assert torch.equal(trim(values, density), values * sorted_mask(values, keep))
    assert not trim(values, 0.0).any()


def test_kept_count_is_the_floor_and_at_least_one():
    assert [kept_count(d, n) for d, n in ((0.2, 10), (0.29, 10), (0.01, 10), (1.0, 3), (0.0, 5), (0.5, 0))] == [
        2,
        2,
        1,
        3,
        0,
        0,
    ]


def test_pieces_share_the_ties_that_are_left():
    values = draw("tied", 1000)
    cut, pieces = cut_of(values, 333), []
    for piece in values.split(70):
        kept, cut = take(piece, cut)
        pieces.append(kept)
    assert torch.equal(torch.cat(pieces), values * sorted_mask(values, 333))
    assert cut.ties == 0


@pytest.mark.parametrize("count", [1000, SMALL + 1])
def test_all_ties_may_be_kept(count):
    values = draw("tied", count)
    kept, _ = take(values, cut_of(values, count // 3, all_ties=True))
    threshold = values.abs().sort(descending=True).values[count // 3 - 1]
    assert torch.equal(kept, values * (values.abs() >= threshold))


def test_a_difference_is_cut_as_its_values():
    base, expert = draw("plain", SMALL + 9), draw("plain", SMALL + 9).flip(0)
    assert cut_of(Difference(expert, base), 500) == cut_of(expert - base, 500)


@pytest.mark.parametrize("kind", ["plain", "tied", "constant", "sparse"])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("keep", [1, 777, 4000, 8999])
def test_a_cut_over_tensors_is_that_of_all_in_order(kind, mixed, keep):
    parts = dict(zip("abc", draw(kind, 9000).split([5000, 1, 3999])))
    if mixed:
        parts["b"] = parts["b"].double() * (1 + 1e-12)
        parts["c"] = parts["c"].double() / 3
    order = Order()
    for part in parts.values():
        order.count(part.abs())
    order.locate(keep)
    for name, part in parts.items():
        order.refine(name, part.abs())
    cuts = order.cuts(list(parts))
    kept = torch.cat([take(part, cuts[name])[0].double() for name, part in parts.items()])
    whole = torch.cat([part.double() for part in parts.values()])
    assert torch.equal(kept, whole * sorted_mask(whole, keep))


def test_a_threshold_of_doubles_cuts_floats_between_their_values():
    below, above = torch.tensor(1.0), torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    for ties in (0, 1):
        kept, _ = take(torch.stack([below, above]), Cut(1 + 1e-12, ties))
        assert kept.tolist() == [0, above.item()]


def test_blocks_cover_all_once():
    parts = list(blocks(2 * BLOCK + 3))
    assert torch.equal(torch.cat([torch.arange(2 * BLOCK + 3)[p] for p in parts]), torch.arange(2 * BLOCK + 3))
    assert list(blocks(0)) == []


class Sums(Passes):
    """Adds the share of a tensor's first entry in the sum of all."""

    scans = 2

    def see(self, number, name, base, experts):
        self.scanned[number] = self.scanned.get(number, 0.0) + float(base.double().sum())

    def seen(self, number):
        self.scanned.setdefault("ended", []).append(number)

    def merge_tensor(self, name, base, experts, weights):
        return base * 0 + self.results()[1]


def test_passes_show_all_tensors_twice_but_no_running_statistics(base, experts):
    merged = Sums()(experts, base)
    expected = sum(float(t.double().sum()) for n, t in base.items() if t.is_floating_point() and "running" not in n)
    assert merged["scale"].item() == pytest.approx(expected)


def test_a_merger_that_was_shown_too_little_says_so(base, experts):
    merger = Sums()
    merger.begin(1)
    for name in ("a", "b"):
        merger.scan(name, base["scale"], [experts[0]["scale"]])
    with pytest.raises(RuntimeError, match="scans 2 times, was shown 1"):
        merger.merge_tensor("a", base["scale"], [experts[0]["scale"]], [1.0])
