"""Small data sets on disk, and a module that only notes what it is given."""

import csv
import json
import pickle

import av
import lightning
import numpy as np
import pytest
import torch

from fulgurite.samples import sample_fields


def write_clip(path, seed=0, count=6):
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(count):
            picture = np.full((32, 32, 3), rng.integers(0, 255, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def folder(tmp_path):
    """Domains ``a`` and ``b``: three clips and 7, 3, 5 questions each, one answer shared."""
    for domain in "ab":
        (tmp_path / domain).mkdir()
        for clip in range(3):
            write_clip(tmp_path / domain / f"{clip}.mp4", seed=clip + 10 * (domain == "b"))
        for split, size in (("train", 7), ("val", 3), ("test", 5)):
            rows = [
                {
                    "video": f"{i % 3}.mp4",
                    "question": f"What is {i}?",
                    "answer": "both" if i == 0 else f"{domain}{i % 3}",
                    "kind": f"kind {domain}",
                }
                for i in range(size)
            ]
            write_jsonl(tmp_path / domain / f"{split}.jsonl", rows)
    return tmp_path


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "a.mp4"
    write_clip(path, count=25)
    return path


@pytest.fixture
def clips(clip_file):
    """Puts the same small clip (25 frames, 10 a second) into a folder under each of some names."""

    def put(folder, names):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(clip_file.read_bytes())

    return put


class MeanCollator:
    needs = ("question", "video|features.mean")

    def __call__(self, samples):
        batch = sample_fields(samples)
        batch["x"] = torch.stack([self.look(s) for s in samples])
        return batch

    def look(self, sample):
        if "mean" in sample.features:
            return sample.features["mean"].float().mean((0, 1))
        return sample.video.frames([0, 5]).float().mean((0, 2, 3)) / 255


class Watcher(lightning.LightningModule):
    """Trains a linear map and notes the ids of every batch under (phase, epoch)."""

    collator_class = MeanCollator

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.map = torch.nn.Linear(3, 1)
        self.seen = []

    def collator(self, stage):
        return self.collator_class()

    def training_step(self, batch, index):
        self.seen.append(("train", self.current_epoch, batch["id"]))
        return self.map(batch["x"]).square().mean()

    def validation_step(self, batch, index):
        self.seen.append(("val", self.current_epoch, batch["id"]))

    def test_step(self, batch, index):
        self.seen.append(("test", self.current_epoch, batch["id"]))

    def predict_step(self, batch, index):
        return batch["id"]

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), 1e-2)

    def ids(self, phase, epoch=None):
        return [i for p, e, ids in self.seen if p == phase and epoch in (None, e) for i in ids]


@pytest.fixture
def watcher():
    return Watcher()


@pytest.fixture
def trainer(tmp_path):
    def make(**options):
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "reload_dataloaders_every_n_epochs": 1,
            "default_root_dir": tmp_path / "run",
        }
        return lightning.Trainer(**{**defaults, **options})

    return make


@pytest.fixture
def official(tmp_path):
    """A folder in the official layout, filled by the caller: rows by file name, features, subtitles."""

    def write(folder, files, features=None, subtitles=None, vocabulary=("cat", "dog", "red")):
        root = tmp_path / "DATA" / folder
        root.mkdir(parents=True)
        for name, rows in files.items():
            with open(root / name, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
        (root / "vocab1000.json").write_text(json.dumps({a: i for i, a in enumerate(vocabulary)}))
        if features is not None:
            torch.save(features, root / "clipvitl14.pth")
        if subtitles is not None:
            (root / "subtitles.pkl").write_bytes(pickle.dumps(subtitles))
        return tmp_path / "DATA"

    return write
