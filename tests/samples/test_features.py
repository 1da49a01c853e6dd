import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fulgurite.checkpoints.errors import CheckpointError
from fulgurite.samples import DataError, Sample, Video
from fulgurite.samples import features as module
from fulgurite.samples.features import FeatureStore, StoredFeatures, extract_features, video_key
from fulgurite.samples.foreign import foreign_features
from fulgurite.samples.sampling import FrameSampling


def small(frames):
    return frames.float()[..., ::8, ::8] / 255


class Encoder(torch.nn.Module):
    """Two tokens per frame: means of the left and of the right half."""

    name = "halves"
    fingerprint = "f1"
    transform = staticmethod(small)

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.frames = 0

    def forward(self, pixels):
        self.frames += len(pixels)
        width = pixels.shape[-1] // 2
        return torch.stack([pixels[..., :width].mean((2, 3)), pixels[..., width:].mean((2, 3))], 1) * self.scale


SAMPLING = FrameSampling("uniform", 3)


def expected(path):
    frames = Video(path).frames([6, 20, 33])
    return Encoder()(small(frames)).detach()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_stored_features_are_the_encoder_s(videos, tmp_path, workers, dtype):
    store = FeatureStore(tmp_path / "store", dtype)
    films = [Video(p) for p in videos.values()]
    steps = []
    failed = extract_features(
        films, Encoder(), SAMPLING, store, workers, batch_frames=7, progress=lambda *s: steps.append(s)
    )
    assert failed == {}
    assert steps[-1] == (len(films), len(films))
    reader = store.reader(Encoder(), SAMPLING)
    for path in videos.values():
        found = reader[video_key(Video(path))]
        assert found.dtype == getattr(torch, dtype)
        assert found.shape == (3, 2, 3)
        torch.testing.assert_close(found.float(), expected(path), atol=1e-3 if dtype == "float16" else 1e-6, rtol=0)


def test_resumes_with_what_misses_and_moves_do_not_matter(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 1)  # a shard per forward pass
    store = FeatureStore(tmp_path / "store")
    paths = list(videos.values())
    first = Encoder()

    def stop(done, total):
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract_features([Video(p) for p in paths], first, SAMPLING, store, batch_frames=3, progress=stop)
    moved = Path(shutil.copytree(paths[0].parent, tmp_path / "elsewhere"))
    second = Encoder()
    films = [Video(moved / p.name) for p in paths]
    extract_features(films, second, SAMPLING, store, batch_frames=3)
    assert second.frames == 3 * len(paths) - 3 * 5
    third = Encoder()
    extract_features(films * 2, third, SAMPLING, store)
    assert third.frames == 0


def test_ranks_share_the_work(videos, tmp_path):
    store = FeatureStore(tmp_path / "store")
    films = [Video(p) for p in videos.values()]
    encoders = [Encoder() for _ in range(3)]
    for rank, encoder in enumerate(encoders):
        extract_features(films, encoder, SAMPLING, store, rank=rank, world=3)
    assert [e.frames for e in encoders] == [9, 9, 6]
    assert len(store.reader(Encoder(), SAMPLING)) == 8


def test_another_encoder_rule_or_type_is_another_place(tmp_path):
    store = FeatureStore(tmp_path)
    other = Encoder()
    other.fingerprint = "f2"
    folders = {
        store.folder(Encoder(), SAMPLING),
        store.folder(other, SAMPLING),
        store.folder(Encoder(), FrameSampling("uniform", 4)),
        FeatureStore(tmp_path, "float32").folder(Encoder(), SAMPLING),
    }
    assert len(folders) == 4


def test_bad_videos_are_named_and_the_others_done(videos, tmp_path):
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(videos["plain.mp4"].read_bytes()[:500])
    films = [Video(bad), Video(tmp_path / "none.mp4"), Video(videos["plain.mp4"])]
    store = FeatureStore(tmp_path / "store")
    failed = extract_features(films, Encoder(), SAMPLING, store)
    assert set(failed) == set(films[:2])
    assert "bad.mp4" in failed[films[0]]
    assert len(store.reader(Encoder(), SAMPLING)) == 1


def test_a_flipped_byte_is_seen(videos, tmp_path):
    store = FeatureStore(tmp_path / "store")
    extract_features([Video(videos["plain.mp4"])], Encoder(), SAMPLING, store)
    file = next(store.folder(Encoder(), SAMPLING).glob("shard-*/features.safetensors"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"features\.safetensors"):
        store.reader(Encoder(), SAMPLING)


def test_samples_travel_without_their_features(videos, tmp_path):
    store = FeatureStore(tmp_path / "store")
    film = Video(videos["plain.mp4"])
    extract_features([film], Encoder(), SAMPLING, store)
    reader = store.reader(Encoder(), SAMPLING)
    sample = Sample("1", "d", video=film, features=StoredFeatures({"halves": (reader, video_key(film))}))
    before = sample.features["halves"].clone()
    again = pickle.loads(pickle.dumps(sample))
    assert again.has("features.halves")
    assert not again.has("features.other")
    assert again.features.places["halves"][0]._open == {}
    assert torch.equal(again.features["halves"], before)


@pytest.fixture
def official(tmp_path):
    def save(content, name="clipvitl14.pth"):
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


def test_official_file_is_converted_once(official, tmp_path):
    content = {7010: torch.randn(4, 6).half(), "aBc_-1": torch.randn(11, 6).half()}
    path = official(content)
    reader = foreign_features(path, 6)
    assert torch.equal(reader["7010"], content[7010])
    assert torch.equal(reader["aBc_-1"], content["aBc_-1"])
    made = next(tmp_path.glob("clipvitl14-*/shard-all/manifest.json"))
    stamp = made.stat().st_mtime_ns
    foreign_features(path, 6)
    assert made.stat().st_mtime_ns == stamp
    official({1: torch.randn(2, 6)})
    assert len(foreign_features(path, 6, cache=tmp_path / "cache")) == 1


class Evil:
    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({1: torch.zeros(2, 5)}, r"\(2, 5\).*\(frames, 6\).*feature_width"),
        ({1: torch.zeros(0, 6)}, r"\(0, 6\)"),
        ({1: "text"}, "str"),
        ([1], "list"),
        ({1: Evil()}, "print"),
    ],
)
def test_official_file_with_other_content(official, content, message, capsys):
    with pytest.raises(DataError, match=message):
        foreign_features(official(content), 6)
    assert "ran" not in capsys.readouterr().out


def test_official_file_missing_or_cut(official, tmp_path):
    with pytest.raises(DataError, match="none"):
        foreign_features(tmp_path / "none.pth", 6)
    path = official({1: torch.zeros(50, 6)})
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match="clipvitl14"):
        foreign_features(path, 6)


def test_numpy_features_are_read(tmp_path):
    path = tmp_path / "f.pkl"
    path.write_bytes(pickle.dumps({"v": np.ones((2, 6), np.float16)}))
    assert foreign_features(path, 6)["v"].sum() == 12


def test_a_video_cut_short_has_features_of_its_own(videos, tmp_path):
    store = FeatureStore(tmp_path / "store", "float32")
    path = videos["plain.mp4"]
    films = [Video(path), Video(path, seconds=1), Video(path, seconds=1.5)]
    assert extract_features(films, Encoder(), SAMPLING, store) == {}
    reader = store.reader(Encoder(), SAMPLING)
    assert len(reader) == len({video_key(film) for film in films}) == 3
    assert video_key(Video(path, seconds=1)) == video_key(Video(path, seconds=1.0))
    first = Encoder()(small(Video(path).frames([1, 5, 9]))).detach()
    assert torch.equal(reader[video_key(films[1])], first)
    assert torch.equal(reader[video_key(films[0])], expected(path))
