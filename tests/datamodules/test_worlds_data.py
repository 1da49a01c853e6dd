import pytest

from fulgurite.datamodules.worlds import DOMAINS, SPLITS
from fulgurite.datamodules.worlds_data import Worlds
from fulgurite.samples import DataError


def test_all_worlds_in_their_order_with_existing_videos():
    data = Worlds(epochs_per_domain=2, batch_size=16)
    assert data.info().domains == DOMAINS
    assert [(s.name, s.epochs) for s in data.stages()] == [(name, 2) for name in DOMAINS]
    known = set(data.info().answers)
    for split in SPLITS:
        samples = data.samples(split)
        assert len({s.id for s in samples}) == len(samples)
        assert all(set(s.answers) <= known and s.video.path.is_file() for s in samples)
        assert all(s.video.name == f"videos/{s.video.path.name}" for s in samples)


def test_some_worlds():
    data = Worlds(worlds=["grid", "doom"], joint=True)
    assert data.info().domains == ("grid", "doom")
    assert len(data.stages()) == 1
    with pytest.raises(DataError, match=r"\['mars'\].*'doom'"):
        Worlds(worlds=["mars"])
