from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.samples.sampler import GlobalBatchSampler


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_any_number_of_ranks_sees_the_same_global_batches(n, batch, world, shuffle, epoch):
    def batches(rank, of):
        sampler = GlobalBatchSampler(n, batch, rank, of, shuffle, seed=3)
        sampler.set_epoch(epoch)
        return list(sampler)

    alone = batches(0, 1)
    shares = [batches(rank, world) for rank in range(world)]
    assert sorted(i for b in alone for i in b) == list(range(n))
    assert {len(s) for s in shares} == {len(alone)}
    for step, whole in enumerate(alone):
        parts = [share[step] for share in shares]
        assert len({len(p) for p in parts}) == 1
        counted = [i for p in parts for i in p if i < n]
        assert Counter(counted) == Counter(whole)
        assert all(i - n in whole for p in parts for i in p if i >= n)
        assert len(parts[0]) == -(-len(whole) // world)
        # Rank r holds the items r::W, so the order can be put back together.
        assert [i for i in parts[0] if i < n] == whole[::world]


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        sampler = GlobalBatchSampler(50, 7, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(1, 2) == order(1, 2)
    assert order(1, 2) != order(1, 3)
    assert order(1, 2) != order(2, 2)


def test_skip_holds_for_one_pass():
    sampler = GlobalBatchSampler(10, 3, shuffle=True)
    whole = list(sampler)
    sampler.skip = 2
    assert list(sampler) == whole[2:]
    assert list(sampler) == whole


def test_each_batch_comes_so_many_times_in_a_row():
    once, thrice = (list(GlobalBatchSampler(10, 4, rank=1, world=2, repeats=times)) for times in (1, 3))
    assert thrice == [batch for batch in once for _ in range(3)]
    sampler = GlobalBatchSampler(10, 4, repeats=3)
    assert len(sampler) == 9
    whole = list(sampler)
    sampler.skip = 4
    assert list(sampler) == whole[4:]


def test_bad_settings():
    with pytest.raises(ValueError, match="repeats=0"):
        GlobalBatchSampler(3, 1, repeats=0)
    with pytest.raises(ValueError, match="batch_size"):
        GlobalBatchSampler(3, 0)
    with pytest.raises(ValueError, match="rank"):
        GlobalBatchSampler(3, 1, rank=2, world=2)
