import json
from collections import Counter

import pytest
import torch

from fulgurite.samples import Sample, sample_fields
from fulgurite.samples.dataset import SampleDataset
from fulgurite.samples.loader import ResumableLoader
from fulgurite.samples.task_sampler import MixedTaskSampler, TaskBatchSampler, permutation, shares

GROUPS = [list(range(0, 9)), list(range(9, 14)), [], list(range(14, 21))]
SIZES = [2, 4, 3, 3]


def make(rank=0, world=1, counts=None, epoch=3, shuffle=True, seed=5):
    sampler = TaskBatchSampler(GROUPS, SIZES, counts, rank, world, shuffle, seed)
    sampler.set_epoch(epoch)
    return sampler


def mixed(counts=(9, 5, 0, 7), rank=0, world=1, epoch=3):
    sampler = MixedTaskSampler(GROUPS, 4, counts, rank, world, seed=5)
    sampler.set_epoch(epoch)
    return sampler


def tasks_in(batch):
    return {task for task, group in enumerate(GROUPS) for index in batch if index % 21 in group}


def test_the_published_order():
    """Of 3, 2 and 1 batches in epoch 1, by ``random.Random(1)``: [0, 0, 0, 1, 1, 2] shuffled, taken from its end."""
    sampler = TaskBatchSampler([[0, 1, 2], [3, 4], [5]], [1, 1, 1], shuffle=True)
    sampler.set_epoch(1)
    assert sampler.turns() == [0, 1, 0, 2, 1, 0]
    assert [tasks[0] for tasks in ([t for t, g in enumerate(sampler.groups) if b[0] in g] for b in sampler)] == (
        sampler.turns()
    )


def test_an_epoch_has_each_batch_of_each_task_once_and_no_batch_of_two_tasks():
    batches = list(make())
    assert len(batches) == len(make()) == 5 + 2 + 0 + 3
    assert all(len(tasks_in(batch)) == 1 for batch in batches)
    assert sorted(i for batch in batches for i in batch) == list(range(21))
    assert sorted(map(len, batches)) == [1, 1, 1, 2, 2, 2, 2, 3, 3, 4]
    assert batches != list(make(epoch=4))
    assert batches != list(make(seed=6))
    assert [tasks_in(b) for b in batches] == [tasks_in(b) for b in make(seed=6)]  # the published order knows no seed


def test_without_shuffling_tasks_follow_one_another_in_the_order_of_the_data():
    assert [i for batch in make(shuffle=False) for i in batch] == list(range(21))


@pytest.mark.parametrize("factory", [make, mixed])
def test_ranks_share_the_same_batches(factory):
    alone = list(factory())
    ranks = [list(factory(rank=rank, world=2)) for rank in range(2)]
    for step, whole in enumerate(alone):
        parts = [share[step] for share in ranks]
        assert len(parts[0]) == len(parts[1])
        assert Counter(i for part in parts for i in part if i < 21) == Counter(whole)


def test_a_task_that_needs_more_batches_begins_anew_and_one_that_needs_fewer_changes_by_epoch():
    sampler = make(counts=[2, 5, 0, 3])
    seen = Counter(i for batch in sampler for i in batch)
    assert sum(seen[i] for i in GROUPS[0]) == 4
    assert all(seen[i] >= 2 for i in GROUPS[1])  # two whole passes in 4 of 5 batches
    first, second = ({i for b in make(counts=[2, 5, 0, 3], epoch=e) for i in b if i in GROUPS[0]} for e in (0, 1))
    assert first != second


def test_mixed_batches_hold_so_many_samples_of_each_task():
    batches = list(mixed())
    assert sorted(i for batch in batches for i in batch) == list(range(21))
    assert len(batches) == len(mixed()) == 6
    assert any(len(tasks_in(batch)) > 1 for batch in batches)
    many = Counter(task for batch in mixed(counts=(4, 10, 0, 7)) for i in batch for task in tasks_in([i]))
    assert many == {0: 4, 1: 10, 3: 7}
    assert batches != list(mixed(epoch=4))


@pytest.mark.parametrize("factory", [make, mixed])
def test_a_loader_goes_on_in_the_middle_of_an_epoch_and_refuses_other_tasks(factory):
    samples = [Sample(id=str(i), domain="d") for i in range(21)]

    def loader(**options):
        return ResumableLoader(SampleDataset(samples), factory(**options), sample_fields, name="train")

    whole = [batch["id"] for batch in loader()]
    half = loader()
    batches = iter(half)
    assert [next(batches)["id"] for _ in range(3)] == whole[:3]
    resumed = loader(epoch=0)
    resumed.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert [batch["id"] for batch in resumed] == whole[3:]
    with pytest.raises(ValueError, match="same data and batch_size"):
        loader(counts=[2, 5, 0, 4]).load_state_dict(half.state_dict())
    for _ in batches:
        pass
    loader(counts=[2, 5, 0, 4]).load_state_dict(half.state_dict())  # at the end of an epoch other data may follow


def test_shares():
    assert shares([10, 3, 0, 7], None) == [6, 6, 0, 6]
    assert shares([10, 3, 0, 7], 1.0) == [10, 3, 0, 7]
    assert shares([16, 4, 4], 2.0) == [12, 6, 6]  # 4 : 2 : 2
    assert shares([1000, 1], 1.5) == [991, 10]  # 100 : 1
    assert shares([50, 1], 0.1) == [51, 1]  # never none
    assert shares([100, 100, 1], 1e9) == [67, 67, 67]


def test_a_permutation_depends_on_all_it_is_named_by():
    assert sorted(permutation(8, 0, 0, "a")) == list(range(8))
    others = [(1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    assert all(permutation(30, 0, 0, "a") != permutation(30, *other) for other in others)
    state = torch.get_rng_state()
    permutation(8, 0, 0, "a")
    assert torch.equal(state, torch.get_rng_state())
