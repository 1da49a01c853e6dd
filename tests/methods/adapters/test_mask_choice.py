"""The choice of a mask's entries against a full sort."""

import pytest
import torch

from fulgurite.methods.adapters.mask_choice import chosen_positions, common_entries, matching, num_chosen, position_type

SIZES = {"a": 7, "head": 5, "b": 20_000, "c": 1}


def scores_of(levels, seed=0):
    """Of few levels, so that many are equal."""
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randint(levels, (size,), generator=generator).double() / 7 for n, size in SIZES.items()}


@pytest.mark.parametrize("levels", [1, 3, 40, 10**9])
@pytest.mark.parametrize("count", [5, 6, 12, 7000, 20_013])
def test_the_highest_scores_win_and_of_equal_ones_the_lowest_position(levels, count):
    scores = scores_of(levels)
    every = torch.cat([scores[name] if name != "head" else torch.full((5,), torch.inf) for name in SIZES]).float()
    expected = every.argsort(descending=True, stable=True)[:count].sort().values
    given = {name: s.view(-1, 100) if name == "b" else s for name, s in scores.items()}
    found = chosen_positions(given, SIZES, count, {"head"})
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), expected)


def test_a_positive_factor_changes_nothing():
    scores = scores_of(10**9)
    doubled = {name: 4 * s for name, s in scores.items()}
    assert torch.equal(chosen_positions(scores, SIZES, 900), chosen_positions(doubled, SIZES, 900))


def test_what_is_no_score_is_refused():
    scores = scores_of(3)
    with pytest.raises(LookupError, match=r"missing \['c'\], unknown \['d'\]"):
        chosen_positions({**{n: s for n, s in scores.items() if n != "c"}, "d": scores["c"]}, SIZES, 3)
    with pytest.raises(ValueError, match="a: negative or NaN"):
        chosen_positions({**scores, "a": torch.full((7,), torch.nan)}, SIZES, 3)
    with pytest.raises(ValueError, match="b: 3 scores, expected 20000"):
        chosen_positions({**scores, "b": torch.ones(3)}, SIZES, 3)


def test_the_count_is_int_p_rho():
    assert num_chosen(100, 0.29, 0) == int(100 * 0.29) == 28
    assert num_chosen(334_000_000, 0.005, 2050) == 1_670_000
    assert (position_type(2**31), position_type(2**31 + 1)) == (torch.int32, torch.int64)
    for density, heads, least in ((0.01, 0, "0.1"), (0.3, 4, "0.4")):
        with pytest.raises(ValueError, match=f"set density to {least} or more"):
            num_chosen(10, density, heads)
    with pytest.raises(ValueError, match=r"density=1\.1: expected"):
        num_chosen(10, 1.1, 0)


def test_whole_tensors_are_named_by_full_patterns():
    names = ["head.weight", "head.weight_g", "my_head.weight"]
    assert matching(names, [r"head\.weight", r"my.*"]) == {"head.weight", "my_head.weight"}
    with pytest.raises(LookupError, match="'tail' matches none of 3"):
        matching(names, ["head.*", "tail"])


def test_the_choice_takes_less_than_another_copy_of_the_scores(peak_bytes):
    """However many are chosen, of tensors that are looked at one by one."""
    scores = {str(i): torch.rand(50_000, generator=torch.Generator().manual_seed(i)) for i in range(16)}
    sizes = {name: len(tensor) for name, tensor in scores.items()}
    peak = peak_bytes(lambda: chosen_positions(scores, sizes, 4000))
    assert 4 * 4000 < peak < sum(4 * size for size in sizes.values())


def test_common_entries_are_those_of_both():
    generator = torch.Generator().manual_seed(0)
    for first, second in ((50, 50), (3, 90), (0, 5), (5, 0)):
        old, new = (torch.randperm(100, generator=generator)[:n].sort().values for n in (first, second))
        of_old, of_new = common_entries(old, new)
        assert torch.equal(old[of_old], new[of_new])
        assert set(old[of_old].tolist()) == set(old.tolist()) & set(new.tolist())
