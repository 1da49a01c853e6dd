import json

import pytest
import torch

from fulgurite.samples import DataError, Sample, sample_fields
from fulgurite.samples.dataset import SampleDataset
from fulgurite.samples.loader import ResumableLoader
from fulgurite.samples.sampler import GlobalBatchSampler


def collate(samples):
    batch = sample_fields(samples)
    batch["noise"] = torch.rand(())  # what a random transform in a worker would draw
    return batch


def failing(samples):
    raise DataError("film.mp4: frame 3 is damaged")


def make(workers=0, n=11, name="train", world=1, rank=0):
    samples = [Sample(id=str(i), domain="d") for i in range(n)]
    sampler = GlobalBatchSampler(n, 4, rank, world, shuffle=True, seed=5)
    return ResumableLoader(SampleDataset(samples), sampler, collate, workers, name)


def run(loader, epoch=None):
    if epoch is not None:
        loader.batch_sampler.set_epoch(epoch)
    return [(batch["id"], float(batch["noise"])) for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_continues_to_the_batch(workers):
    reference = run(make(workers), epoch=1)
    loader = make(workers)
    loader.batch_sampler.set_epoch(1)
    batches = iter(loader)
    seen = [next(batches)["id"] for _ in range(2)]
    state = json.loads(json.dumps(loader.state_dict()))
    assert seen == [ids for ids, _ in reference[:2]]
    resumed = make(workers)
    resumed.load_state_dict(state)
    assert [ids for ids, _ in run(resumed)] == [ids for ids, _ in reference[2:]]
    assert [ids for ids, _ in run(resumed, epoch=2)] == [ids for ids, _ in run(make(workers), epoch=2)]


def test_a_finished_epoch_goes_on_with_the_next():
    loader = make()
    run(loader, epoch=3)
    resumed = make()
    resumed.load_state_dict(loader.state_dict())
    assert resumed.batch_sampler.epoch == 4
    assert len(run(resumed)) == 3


def test_a_finished_epoch_goes_on_with_other_data_but_a_part_of_one_does_not():
    loader = make()
    run(loader)
    make(n=20, name="next").load_state_dict(loader.state_dict())
    half = make()
    next(iter(half))
    with pytest.raises(DataError, match="batch_size"):
        make(n=20).load_state_dict(half.state_dict())
    with pytest.raises(DataError, match="next"):
        make(name="next").load_state_dict(half.state_dict())


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_state_is_left_alone_by_starting(workers):
    loader = make(workers)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    if workers:
        run(loader)
    else:
        iter(loader)
    assert torch.equal(before, torch.get_rng_state())


def test_repeats_are_uncounted():
    batches = [list(make(world=3, rank=rank)) for rank in range(3)]
    counted = [i for share in batches for b in share for i, c in zip(b["id"], b["counted"]) if c]
    assert sorted(counted, key=int) == [str(i) for i in range(11)]
    assert sum((~b["counted"]).sum() for share in batches for b in share) == 4  # 4, 4, 3 to 6, 6, 3


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_one_short_error(workers):
    sampler = GlobalBatchSampler(2, 2)
    samples = [Sample(id=str(i), domain="d") for i in range(2)]
    loader = ResumableLoader(SampleDataset(samples), sampler, failing, workers)
    with pytest.raises(DataError) as caught:
        next(iter(loader))
    assert str(caught.value) == "film.mp4: frame 3 is damaged"


def test_what_workers_draw_is_a_function_of_the_epoch():
    first, same, other = (run(make(workers=2), epoch) for epoch in (1, 1, 2))
    assert first == same
    assert {noise for _, noise in first}.isdisjoint(noise for _, noise in other)


def test_a_batch_says_which_samples_come_with_speech():
    samples = [Sample(id=str(i), domain="a", speech=speech) for i, speech in enumerate(("a dog barks", None, ""))]
    assert sample_fields(samples)["speech"].tolist() == [True, False, False]
