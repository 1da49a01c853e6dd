"""A store of features that several processes fill together."""

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fulgurite.datamodules.base import FulguriteDataModule
from fulgurite.datamodules.cache import fill_features
from fulgurite.datamodules.jsonl import JsonlDataModule
from fulgurite.samples import DataError, DataInfo, Picture, Sample
from fulgurite.samples.features import FeatureExtractor, FeatureStore, StoredFeatures, video_key
from fulgurite.samples.sampling import FrameSampling

SAMPLING = FrameSampling("uniform", 2)


def as_floats(frames):
    return frames.float()


class Encoder(torch.nn.Module):
    """Means of the frames, times a factor that half precision may not hold."""

    name, fingerprint, transform = "scaled", "1", staticmethod(as_floats)

    def __init__(self, factor):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(factor))

    def forward(self, pixels):
        return pixels.mean((2, 3)).unsqueeze(1) * self.factor


class Together:
    """What two processes share: each waits for the other's word, at most a few seconds."""

    root_device = torch.device("cpu")

    def __init__(self):
        self.barrier = threading.Barrier(2, timeout=10)
        self.words = []

    def reduce_boolean_decision(self, decision, all=True):
        self.words.append(decision)
        self.barrier.wait()
        return min(self.words)


def test_a_failure_of_one_process_is_one_of_all(folder):
    """The second process gets numbers that half precision cannot hold; the first must not wait for it for ever."""
    together = Together()

    def fill(rank):
        data = JsonlDataModule(folder / "a", feature_cache=folder / "cache")
        data.trainer = SimpleNamespace(strategy=together, global_rank=rank, world_size=2)
        extractor = FeatureExtractor(Encoder(1e9 if rank else 1.0), SAMPLING)
        fill_features(data, "train", data.samples("train"), extractor)

    with ThreadPoolExecutor(2) as pool:
        first, second = (pool.submit(fill, rank) for rank in range(2))
        with pytest.raises(DataError, match="frame features: another process failed"):
            first.result()
        with pytest.raises(DataError, match=r"not finite.*--data\.feature_dtype float32"):
            second.result()


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_store_is_read_in_the_dtype_of_the_option(folder, trainer, watcher, dtype):
    """What was stored beforehand in that dtype is used as it is, and nothing is computed."""
    data = JsonlDataModule(folder / "a", feature_cache=folder / "cache", feature_dtype=dtype)
    encoder = Encoder(0.001)
    watcher.feature_extractor = lambda: FeatureExtractor(encoder, SAMPLING)
    trainer().test(watcher, datamodule=data)
    sample = data.samples("test")[0]
    stored = sample.features["scaled"]
    assert stored.dtype == getattr(torch, dtype)
    exact = encoder(as_floats(sample.video.frames([1, 4]))).detach()
    close = {"atol": 1e-6, "rtol": 1e-6} if dtype == "float32" else {"atol": 1e-3, "rtol": 1e-3}
    torch.testing.assert_close(stored.float(), exact, **close)
    assert video_key(sample.video) in FeatureStore(folder / "cache", dtype).reader(encoder, SAMPLING)


class Reads:
    """A collator that needs a video, or its features."""

    needs = ("features.scaled|video",)

    def __call__(self, samples):
        return {"given": torch.stack([sample.features["scaled"] for sample in samples])}


def test_without_a_trainer_an_attached_extractor_fills_the_cache(folder):
    data = JsonlDataModule(folder / "a", feature_cache=folder / "cache", feature_dtype="float32")
    encoder = Encoder(2.0)
    data.attach(Reads(), FeatureExtractor(encoder, SAMPLING))
    data.setup("fit")
    samples = data.samples("train")
    frames = [as_floats(sample.video.frames(SAMPLING.indices(sample.video))) for sample in samples]
    expected = torch.stack([encoder(each) for each in frames])
    torch.testing.assert_close(Reads()(samples)["given"], expected.detach())


class Album(FulguriteDataModule):
    """One picture, two pictures that share a file with it by content, and one in memory."""

    def __init__(self, folder, **loading):
        super().__init__(**loading)
        self.folder = folder

    def info(self):
        return DataInfo(("album",))

    def read(self, split):
        a, b, copy = (Picture(self.folder / f"{name}.png") for name in ("a", "b", "copy"))
        drawn = torch.full((3, 4, 4), 7, dtype=torch.uint8)
        return [
            Sample("one", "album", image=a),
            Sample("two", "album", images=(b, copy), num_images=2),
            Sample("drawn", "album", image=drawn),
        ]


@pytest.fixture
def album(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 255, (4, 6, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    return tmp_path


def test_pictures_in_files_have_stored_features(album):
    data, encoder = Album(album, feature_cache=album / "cache", feature_dtype="float32"), Encoder(3.0)
    one, two, drawn = fill_features(data, "train", data.samples("train"), FeatureExtractor(encoder, SAMPLING))
    rows = [encoder(Picture(album / f"{name}.png").pixels()[None].float()).detach() for name in "aba"]
    assert torch.equal(one.features["scaled"], rows[0])
    assert torch.equal(two.features["scaled"], torch.cat(rows[1:]))
    assert "scaled" not in drawn.features
    assert isinstance(one.features, StoredFeatures)
    assert len(FeatureStore(album / "cache", "float32").reader(encoder, SAMPLING)) == 2


def test_a_picture_that_cannot_be_read_is_a_bad_sample(album):
    (album / "b.png").write_bytes(b"no picture")
    extractor = FeatureExtractor(Encoder(1.0), SAMPLING)
    data = Album(album, feature_cache=album / "cache", on_bad="skip")
    kept = fill_features(data, "train", data.samples("train"), extractor)
    assert [sample.id for sample in kept] == ["one", "drawn"]
    assert [entry["reason"].partition(":")[0] for entry in data.skipped] == [str(album / "b.png")]
    strict = Album(album, feature_cache=album / "cache")
    with pytest.raises(DataError, match=r"b\.png: cannot read the picture"):
        fill_features(strict, "train", strict.samples("train"), extractor)
