"""Features of pictures and videos in the files of published releases."""

import pickle

import h5py
import numpy as np
import pytest
import torch

from fulgurite.datamodules.grid_features import FileFeatures, Files, FramesFile, GridFile, resized
from fulgurite.samples import DataError


@pytest.fixture
def grids(tmp_path):
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(49, 8)).astype(np.float16) for name in ("a", "b")}
    for name, value in values.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file[f"{name}/features"] = value
    return values


def test_a_picture_gives_what_its_file_holds_and_a_pair_both_in_order(tmp_path, grids):
    files = [GridFile(tmp_path / f"{name}.h5", name, 8) for name in ("b", "a")]
    features = pickle.loads(pickle.dumps(FileFeatures("clip_rn101", files)))
    expected = torch.from_numpy(np.concatenate([grids["b"], grids["a"]])).float()
    assert features["clip_rn101"].dtype == torch.float32
    assert torch.equal(features["clip_rn101"], expected)
    assert list(features) == ["clip_rn101"]
    assert "other" not in features
    with pytest.raises(KeyError):
        features["other"]


def test_a_short_video_is_followed_by_zeros_and_a_long_one_keeps_the_largest_of_each_stretch(tmp_path):
    short = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    np.savez(tmp_path / "v.npz", features=short)
    read = FramesFile(tmp_path / "v.npz", 4, frames=5).read()
    assert torch.equal(read[:3], torch.from_numpy(short))
    assert read.shape == (5, 4)
    assert not read[3:].any()

    time = torch.randn(13, 4, generator=torch.Generator().manual_seed(0))
    pooled = resized(time, 5)
    for i in range(5):  # stretch i of T frames runs from floor(i T / F) to ceil((i + 1) T / F)
        stretch = time[i * 13 // 5 : -(-(i + 1) * 13 // 5)]
        assert torch.equal(pooled[i], stretch.max(0).values)
    assert torch.equal(resized(time, 13), time)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: GridFile(p / "none.h5", "none", 8), "none/features"),
        (lambda p: GridFile(p / "a.h5", "b", 8), "b/features"),
        (lambda p: GridFile(p / "a.h5", "a", 16), r"\(49, 8\).*feature_width"),
        (lambda p: GridFile(p / "text.h5", "text", 8), "text/features"),
        (lambda p: FramesFile(p / "text.h5", 8), "'features'"),
        (lambda p: FramesFile(p / "other.npz", 8), "'features'"),
        (lambda p: FramesFile(p / "flat.npz", 8), r"\(8,\)"),
        (lambda p: FramesFile(p / "objects.npz", 8), "'features'"),
        (lambda p: FramesFile(p / "cut.npz", 8), "'features'"),
    ],
)
def test_a_file_without_such_features_is_named(tmp_path, grids, make, said):
    (tmp_path / "text.h5").write_text("no features")
    np.savez(tmp_path / "other.npz", feats=np.zeros((2, 8)))
    np.savez(tmp_path / "flat.npz", features=np.zeros(8))
    np.savez(tmp_path / "objects.npz", features=np.array([[None] * 8], dtype=object))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "flat.npz").read_bytes()[:40])
    file = make(tmp_path)
    with pytest.raises(DataError, match=said) as caught:
        file.read()
    assert str(file.path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_first_folder_that_has_a_file_gives_it(tmp_path):
    for folder, name in (("one", "x.PNG"), ("two", "x.jpg"), ("two", "y.jpg"), ("two", "z.txt")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).write_text("")
    files = Files([tmp_path / "one", tmp_path / "two"], (".jpg", ".png"), "images")
    assert files.find("x", "row 1") == tmp_path / "one" / "x.PNG"
    assert files.find("y", "row 1") == tmp_path / "two" / "y.jpg"
    with pytest.raises(DataError, match=r"row 1: no file z\.jpg\|\.png lies in .*--data\.images"):
        files.find("z", "row 1")
    with pytest.raises(DataError, match=r"three: .*--data\.images"):
        Files([tmp_path / "three"], (".jpg",), "images").find("x", "row 1")
