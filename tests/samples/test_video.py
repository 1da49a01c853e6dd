import pickle

import av
import numpy as np
import pytest
import torch

from fulgurite.samples import DataError, Video
from fulgurite.samples.video import FRAMES, FrameCache

NAMES = [
    "plain.mp4",
    "open_gop.mp4",
    "open_gop.mkv",
    "variable_rate.mp4",
    "old.avi",
    "stream.ts",
    "web.webm",
    "untimed.h264",
]


@pytest.fixture(autouse=True)
def _cold():
    FRAMES.clear()


def decode_all(path):
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", NAMES)
def test_every_single_frame_equals_a_full_decode(videos, name):
    full = decode_all(videos[name])
    video = Video(videos[name])
    assert video.num_frames == len(full) == 40
    for i in range(len(full)):
        FRAMES.clear()
        assert torch.equal(video.frames([i])[0], full[i]), f"frame {i}"


@pytest.mark.parametrize("name", NAMES)
def test_any_order_and_repeats(videos, name):
    full = decode_all(videos[name])
    indices = [33, 2, 2, 17, 39, 0, 18]
    assert torch.equal(Video(videos[name]).frames(indices), full[indices])


def test_only_the_needed_part_is_decoded(videos, monkeypatch):
    import fulgurite.samples.video as module

    decoded = []
    original = module._from_key

    def counting(*args):
        for frame in original(*args):
            decoded.append(frame.pts)
            yield frame

    monkeypatch.setattr(module, "_from_key", counting)
    Video(videos["plain.mp4"]).frames([25])
    assert 1 <= len(decoded) <= 12  # key frames are 12 apart
    Video(videos["plain.mp4"]).frames([25])
    assert len(decoded) <= 12  # from the cache


def test_frame_rate_and_shape(videos):
    video = Video(videos["plain.mp4"])
    assert video.fps == 10
    assert video.frames([0]).shape == (1, 3, 48, 64)
    assert video.frames([]).shape == (0, 3, 48, 64)
    assert video.frames([0]).dtype == torch.uint8


def test_a_video_is_a_value(videos):
    video = Video(videos["plain.mp4"])
    video.frames([3])
    again = pickle.loads(pickle.dumps(video))
    assert again == video
    assert hash(again) == hash(video)
    assert len(pickle.dumps(video)) < 500


def test_rotated_video_comes_upright(tmp_path, write_video):
    # The noise is in the top rows of what is stored; turned counterclockwise by 90 degrees it is on the left.
    stored = Video(write_video(tmp_path / "s.mp4", count=2)).frames([0])[0].float()
    turned = Video(write_video(tmp_path / "r.mp4", count=2, rotation=90)).frames([0])[0].float()
    assert stored.shape == (3, 48, 64)
    assert turned.shape == (3, 64, 48)
    assert turned[0, :, :8].std() > 5 * turned[0, :, 16:].std()


@pytest.mark.parametrize(("cut", "left"), [(5, 35), (14, 26)])
def test_trimmed_by_an_edit_list(tmp_path, videos, cut, left):
    """A file whose first pictures are there but not shown, as trimming on a phone makes it."""
    path = tmp_path / "trimmed.mp4"
    with (
        av.open(str(videos["plain.mp4"])) as source,
        av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        step = source.streams.video[0].duration // source.streams.video[0].frames
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - cut * step, packet.dts - cut * step, stream
                target.mux(packet)
    full = decode_all(path)
    assert Video(path).num_frames == len(full) == left
    for i in range(left):
        FRAMES.clear()
        assert torch.equal(Video(path).frames([i])[0], full[i])


def test_sound_does_not_hide_a_cut(tmp_path):
    path = tmp_path / "talk.mkv"
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        pictures, sound = container.add_stream("libx264", rate=10), container.add_stream("aac", rate=8000)
        pictures.width, pictures.height, pictures.pix_fmt = 32, 32, "yuv420p"
        for i in range(30):
            noise = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(noise, format="rgb24")))
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 8000, i * 800
            container.mux(sound.encode(silence))
        container.mux(pictures.encode())
        container.mux(sound.encode())
    assert Video(path).num_frames == 30
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="truncated"):
        Video(path).check()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.95])
@pytest.mark.parametrize("name", ["plain.mp4", "open_gop.mkv", "old.avi", "web.webm"])
def test_truncated_or_empty(videos, tmp_path, name, share):
    content = videos[name].read_bytes()
    path = tmp_path / name
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=name):
        Video(path).check()


def test_fast_start_file_cut_in_its_data(tmp_path, videos):
    whole = tmp_path / "whole.mp4"
    options = {"movflags": "faststart"}
    with av.open(str(videos["plain.mp4"])) as source, av.open(str(whole), "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    assert Video(whole).num_frames == 40
    content = whole.read_bytes()
    for share in (0.5, 0.9):
        path = tmp_path / f"cut{share}.mp4"
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(DataError, match="truncated"):
            Video(path).check()


def test_other_bad_files(tmp_path, videos):
    with pytest.raises(DataError, match=r"missing\.mp4"):
        Video(tmp_path / "missing.mp4").check()
    with pytest.raises(DataError, match="not a file"):
        Video(tmp_path).check()
    (tmp_path / "text.mp4").write_text("not a video at all")
    with pytest.raises(DataError, match=r"text\.mp4"):
        Video(tmp_path / "text.mp4").num_frames  # noqa: B018
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(DataError, match="no video stream"):
        Video(sound).check()
    with pytest.raises(DataError, match="frames 0 to 39"):
        Video(videos["plain.mp4"]).frames([40])


def test_a_rewritten_file_is_read_anew(tmp_path, videos):
    import os
    import shutil

    path = tmp_path / "v.mp4"
    shutil.copy(videos["plain.mp4"], path)
    first = Video(path).frames([5])
    shutil.copy(videos["variable_rate.mp4"], path)
    os.utime(path, ns=(1, 1))
    assert torch.equal(Video(path).frames([5])[0], decode_all(path)[5])
    assert first.shape == (1, 3, 48, 64)


def test_cache_is_bounded_and_forgets_the_least_used():
    cache = FrameCache(limit=25)
    for key in "ab":
        cache.put((key,), torch.zeros(10, dtype=torch.uint8))
    cache.get(("a",))
    cache.put(("c",), torch.zeros(10, dtype=torch.uint8))
    assert cache.get(("b",)) is None
    assert cache.get(("a",)) is not None
    assert cache.size == 20
    cache.put(("big",), torch.zeros(26, dtype=torch.uint8))
    assert cache.get(("big",)) is None


def test_a_name_is_for_reading_and_makes_no_other_video(tmp_path):
    plain, named = Video(tmp_path / "a.mp4"), Video(tmp_path / "a.mp4", "clips/a.mp4")
    assert (plain.name, named.name) == (str(tmp_path / "a.mp4"), "clips/a.mp4")
    assert len({plain, named}) == 1


def test_only_the_start_of_a_video(videos):
    path = videos["plain.mp4"]  # 40 frames, 10 a second
    assert [Video(path, seconds=s).num_frames for s in (0, 1, 1.55, 3.9, 400)] == [1, 11, 16, 40, 40]
    assert Video(path, seconds=1) != Video(path)
    assert torch.equal(Video(path, seconds=1).frames([10]), Video(path).frames([10]))
    with pytest.raises(DataError, match=r"frames \[11\] asked for, but it has frames 0 to 10"):
        Video(path, seconds=1).frames([11])
