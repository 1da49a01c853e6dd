import numpy as np
import pytest

from fulgurite.samples import Video
from fulgurite.samples.sampling import FrameSampling, official_dam, per_second, uniform


@pytest.mark.parametrize("n", [1, 2, 7, 10, 11, 600])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_uniform_takes_the_centres(n, k):
    centres = (np.arange(k) + 0.5) * n / k
    assert uniform(n, k) == [int(np.floor(c)) for c in centres]


def test_official_rule():
    assert official_dam(1, 10) == [0]
    assert official_dam(10, 10) == list(range(10))
    assert official_dam(11, 10) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert official_dam(600, 10) == [60 * j for j in range(10)]
    assert 18 not in official_dam(19, 10)  # never the last frame


def test_per_second():
    assert per_second(10, 25) == [0, 10, 20]
    assert per_second(29.97, 61) == [0, 30, 60]
    assert per_second(0.5, 3) == [0, 1, 2]


@pytest.mark.parametrize("call", [lambda: uniform(0, 3), lambda: official_dam(3, 0), lambda: per_second(0, 9)])
def test_impossible_requests(call):
    with pytest.raises(ValueError, match=r"0|positive"):
        call()


def test_rule_as_a_value(videos):
    video = Video(videos["plain.mp4"])
    assert FrameSampling("uniform", 4).indices(video) == [5, 15, 25, 35]
    assert FrameSampling("official_dam", 4).indices(video) == [0, 10, 20, 30]
    assert FrameSampling("per_second", 0).indices(video) == [0, 10, 20, 30]
    assert FrameSampling("per_second", 2).indices(video) == [0, 10]
    assert FrameSampling("uniform", 4).key != FrameSampling("uniform", 5).key
    with pytest.raises(ValueError, match="count"):
        FrameSampling("uniform", 0)
