import numpy as np
import pytest

from fulgurite.samples import Video
from fulgurite.samples.sampling import FrameSampling, clip4clip, official_dam, per_second, uniform


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


def read_as_published(fps, count, rate, seconds, n):
    """Reads second by second until a read fails, then thins out."""
    fps, read = int(fps), []
    total = int(np.ceil(n / fps))
    for second in range((total if seconds is None else min(seconds, total)) + 1):
        for step in list(range(0, fps, max(fps // rate, 1)))[:rate]:
            if second * fps + step >= n:
                break
            read.append(second * fps + step)
    if len(read) <= count:
        return read
    return [read[int(x)] for x in np.linspace(0, len(read) - 1, num=count)]


@pytest.mark.parametrize("fps", [1, 10, 12.5, 14.985, 23.976, 25, 29.97, 30, 59.94])
@pytest.mark.parametrize("seconds", [None, 0, 3, 31])
@pytest.mark.parametrize(("count", "rate"), [(12, 1), (64, 1), (1, 1), (12, 3), (100, 7)])
def test_clip4clip_at_any_frame_rate(fps, seconds, count, rate):
    for n in (1, 2, 29, 30, 31, 300, 449, 450, 451, 2000):
        assert clip4clip(fps, n, count, rate, seconds) == read_as_published(fps, count, rate, seconds, n)


def test_clip4clip_by_hand():
    # fifteen seconds, of which the published code keeps these twelve
    assert clip4clip(30, 450, 12) == [30 * s for s in (0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 14)]
    assert clip4clip(29.97, 90, 12) == [0, 29, 58, 87]  # int(29.97) frames a second
    assert clip4clip(10, 25, 12) == [0, 10, 20]
    assert clip4clip(10, 25, 12, rate=2) == [0, 5, 10, 15, 20]
    assert clip4clip(30, 2000, 64, seconds=31)[-1] == 930  # the last second belongs to it
    assert clip4clip(0.5, 3, 12) == [0, 1, 2]


@pytest.mark.parametrize(
    "call", [lambda: uniform(0, 3), lambda: official_dam(3, 0), lambda: per_second(0, 9), lambda: clip4clip(9, 0, 1)]
)
def test_impossible_requests(call):
    with pytest.raises(ValueError, match=r"0|positive"):
        call()


def test_rule_as_a_value(videos):
    video = Video(videos["plain.mp4"])
    assert FrameSampling("uniform", 4).indices(video) == [5, 15, 25, 35]
    assert FrameSampling("official_dam", 4).indices(video) == [0, 10, 20, 30]
    assert FrameSampling("per_second", 0).indices(video) == [0, 10, 20, 30]
    assert FrameSampling("per_second", 2).indices(video) == [0, 10]
    assert FrameSampling("clip4clip", 12).indices(video) == [0, 10, 20, 30]
    assert FrameSampling("clip4clip", 12, 2).indices(Video(videos["plain.mp4"], seconds=1)) == [0, 5, 10]
    assert FrameSampling("uniform", 3).indices(Video(videos["plain.mp4"], seconds=1)) == [1, 5, 9]
    rules = [FrameSampling("uniform", 4), FrameSampling("uniform", 5), FrameSampling("clip4clip", 4)]
    assert len({rule.key for rule in [*rules, FrameSampling("clip4clip", 4, 2)]}) == 4
    assert rules[0].key == "uniform-4"  # stored features are found by it
    with pytest.raises(ValueError, match="count"):
        FrameSampling("uniform", 0)
    with pytest.raises(ValueError, match="rate=2 with the rule 'uniform'"):
        FrameSampling("uniform", 4, 2)
