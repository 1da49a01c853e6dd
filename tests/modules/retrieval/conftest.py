"""A small set of captioned videos, and a tiny CLIP with the head of UCoFiA that trains on it."""

import functools
import json

import av
import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from fulgurite.backbones.open_clip_video_text import OpenClipVideoText
from fulgurite.datamodules.captioned_videos import CaptionedVideos
from fulgurite.methods.retrieval.sinkhorn import Sinkhorn
from fulgurite.methods.retrieval.ucofia import Ucofia
from fulgurite.modules.video_text_retrieval import VideoTextRetrieval

COLOURS = {"red": 0, "green": 1, "blue": 2}
SIZES = {"train": 12, "val": 6, "test": 7}
TINY = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def write_video(path, seed):
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for t in range(3):
            picture = rng.integers(0, 80, (32, 32, 3), dtype=np.uint8)
            picture[4 * t : 4 * t + 12, :, seed % 3] = 250
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="package")
def captioned(tmp_path_factory):
    """Each test video has one to three captions; 23 belong to the videos of training."""
    root = tmp_path_factory.mktemp("captioned")
    (root / "videos").mkdir()
    number = 0
    for split, size in SIZES.items():
        rows = []
        for i in range(size):
            name = f"{split}{i}.mp4"
            write_video(root / "videos" / name, number)
            colour = list(COLOURS)[number % 3]
            said = [f"a {colour} box number {number}", f"something {colour}, {number} it is", f"{number} boxes"]
            count = 1 + i % 3 if split == "test" else 1 if number == 0 else 2
            rows.append({"video": f"videos/{name}", "captions": said[:count]})
            number += 1
        (root / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def tiny_backbone(**options):
    given = {"num_frames": 3, "frame_rule": "uniform", "max_words": 12, "patch_shift": [1], **options}
    return OpenClipVideoText(TINY, pretrained=None, **given)


def tiny_module(adapters=None, head=None, lr=1e-3, optimizer=torch.optim.AdamW, backbone=None, **options):
    torch.manual_seed(0)
    backbone = backbone or tiny_backbone()
    head = head or Ucofia(max_frames=3, max_words=12, temporal_layers=1, samples=20)
    module = VideoTextRetrieval(backbone, head, adapters, optimizer=functools.partial(optimizer, lr=lr), **options)
    with torch.no_grad():  # towers with random weights give all videos nearly the same features
        for parameter in module.head.parameters():
            if parameter.dim() == 2:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return module


def tiny_data(root, batch_size=6, **options):
    return CaptionedVideos(root, batch_size=batch_size, eval_batch_size=4, **options)


def tiny_trainer(folder, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "max_epochs": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "num_sanity_val_steps": 0,
        "default_root_dir": str(folder),
    }
    return pl.Trainer(**{**defaults, **options})


class Gradients(pl.Callback):
    """Whole gradients and the loss of every step."""

    def __init__(self):
        self.seen, self.losses = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        found = {name: value.grad for name, value in pl_module.named_parameters() if value.grad is not None}
        self.seen.append({n: (g.full_tensor() if hasattr(g, "full_tensor") else g).clone() for n, g in found.items()})

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


def trained_and_tested(folder, root, **options):
    """Two steps of 23 pairs, of which two processes repeat one, and a test of seven videos with normalised scores."""
    module = tiny_module(optimizer=torch.optim.SGD, lr=1e-2, normalizer=Sinkhorn(), bank_texts=9, bank_videos=5)
    watcher, data = Gradients(), tiny_data(root, batch_size=24)
    run = tiny_trainer(folder, callbacks=[watcher], max_epochs=2, **options)
    run.fit(module, datamodule=data)
    run.test(module, datamodule=data, verbose=False)
    answers = {row["caption"]: row["rank"] for row in module.test_answers}
    return {
        "losses": watcher.losses,
        "gradients": watcher.seen,
        "variants": module.test_results["variants"],
        "ranks": answers,
        "logged": {name: float(value) for name, value in run.callback_metrics.items()},
    }


@pytest.fixture(scope="package")
def run_alone():
    return trained_and_tested


@pytest.fixture
def module():
    return tiny_module


@pytest.fixture
def backbone():
    return tiny_backbone


@pytest.fixture
def data(captioned):
    return functools.partial(tiny_data, captioned)


@pytest.fixture
def trainer(tmp_path):
    return functools.partial(tiny_trainer, tmp_path)
