import numpy as np
import pytest
from PIL import Image

from fulgurite.datamodules.image_folder import ImageFolder
from fulgurite.samples import DataError


class Needs:
    needs = ("image", "answers")

    def __call__(self, samples):
        return samples


@pytest.fixture
def root(tmp_path):
    for split, labels in {"train": ("cat", "dog"), "test": ("cat",)}.items():
        for label in labels:
            folder = tmp_path / split / label
            folder.mkdir(parents=True)
            for name in ("b.png", "a.JPG"):
                save(folder / name)
            (folder / "notes.txt").write_text("left alone")
    return tmp_path


def save(path):
    Image.fromarray(np.full((4, 6, 3), 90, np.uint8)).save(path)


def test_labels_are_the_names_of_folders(root):
    data = ImageFolder(root, domain="pets")
    assert data.info().answers == ("cat", "dog")
    assert data.info().domains == ("pets",)
    samples = data.samples("train")
    assert [s.id for s in samples] == ["cat/a.JPG", "cat/b.png", "dog/a.JPG", "dog/b.png"]
    assert [dict(s.answers) for s in samples] == [{"cat": 1.0}] * 2 + [{"dog": 1.0}] * 2
    assert samples[0].image.pixels().shape == (3, 4, 6)
    assert data.samples("val") == []


def test_pictures_to_predict_need_no_label_and_no_training_folder(tmp_path):
    (tmp_path / "predict").mkdir()
    save(tmp_path / "predict" / "x.png")
    data = ImageFolder(tmp_path)
    (sample,) = data.samples("predict")
    assert (sample.id, dict(sample.answers)) == ("x.png", {})
    assert data.info().answers == ()


def test_bad_pictures_stop_or_are_left_out(root):
    (root / "train" / "cat" / "c.png").write_bytes(b"broken")
    save(root / "train" / "loose.png")
    with pytest.raises(DataError, match=r"c\.png: cannot read the picture.*--data\.on_bad skip"):
        ImageFolder(root).samples("train")
    data = ImageFolder(root, on_bad="skip")
    assert len(data.samples("train")) == 4
    assert [entry["where"] for entry in data.skipped] == ["train/cat/c.png", "train/loose.png"]


def test_a_label_that_is_not_trained_is_refused(root):
    (root / "test" / "cow").mkdir()
    save(root / "test" / "cow" / "a.png")
    with pytest.raises(DataError, match="the label 'cow' is in test and not in train"):
        ImageFolder(root).samples("test")


def test_a_missing_root_names_the_option(tmp_path):
    with pytest.raises(DataError, match=r"--data\.root"):
        ImageFolder(tmp_path / "none").samples("train")


def test_batches_come_in_order(root):
    data = ImageFolder(root, batch_size=3)
    data.attach(Needs())
    data.setup("test")
    (batch,) = data.test_dataloader()
    assert [sample.id for sample in batch] == ["cat/a.JPG", "cat/b.png"]
