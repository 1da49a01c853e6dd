import functools
import json

import av
import numpy as np
import pytest
import torch

from fulgurite.backbones.frames import TimmFrameEncoder
from fulgurite.backbones.prefix_encoder import PrefixEncoder
from fulgurite.datamodules.continual import ContinualDataModule
from fulgurite.datamodules.jsonl import JsonlDataModule
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.replace import Replace
from fulgurite.methods.routing.centroid import CentroidRouter
from fulgurite.modules.continual_video_qa import ContinualVideoQA

DOMAINS = ("red", "green", "blue")
SIZES = {"train": 20, "val": 6, "test": 7}


def write_clip(path, channel, seed):
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=4)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for t in range(4):
            picture = rng.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            picture[8 * t : 8 * t + 24, 8 : 32 + 8 * (seed % 3), channel] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="session")
def stream_folder(tmp_path_factory):
    """Three domains of little videos with questions, in the layout of JsonlDataModule."""
    root = tmp_path_factory.mktemp("stream")
    for channel, domain in enumerate(DOMAINS):
        folder = root / domain
        folder.mkdir()
        for clip in range(6):
            write_clip(folder / f"{clip}.mp4", channel, clip)
        for split, size in SIZES.items():
            rows = [
                {
                    "id": f"{split}{i}",
                    "video": f"{i % 6}.mp4",
                    "question": f"How wide is the {domain} box?" if i % 2 else f"Is the {domain} box wide?",
                    "answer": f"size {i % 3}" if i % 2 else ("yes" if i % 3 else f"no {domain}"),
                    "kind": "size" if i % 2 else "yesno",
                }
                for i in range(size)
            ]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def stream_data(root, domains=DOMAINS, epochs_per_domain=2, batch_size=8, **options):
    files = {split: f"{split}.jsonl" for split in SIZES}
    parts = [JsonlDataModule(root / d, domain=d, **files) for d in domains]
    return ContinualDataModule(parts, epochs_per_domain, batch_size=batch_size, **options)


def tiny_backbone():
    torch.manual_seed(0)
    return PrefixEncoder(
        frame_encoder=TimmFrameEncoder("test_efficientnet", weights=None, size=64, grid=2),
        num_frames=2,
        pretrained=False,
        text_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        routing_layer=-2,
    )


def stream_module(cls=ContinualVideoQA, lr=1e-2, **options):
    backbone = tiny_backbone()
    torch.manual_seed(0)
    placements = [
        Placement(["attention_output", "feed_forward_output"], functools.partial(Bottleneck, reduction=8)),
        Placement(["video_projection"], Replace),
    ]
    if cls is ContinualVideoQA:
        options.setdefault("second_router", CentroidRouter(normalize_parts=True))
    return cls(backbone, placements, optimizer=functools.partial(torch.optim.AdamW, lr=lr), **options)


@pytest.fixture
def make_data(stream_folder):
    return functools.partial(stream_data, stream_folder)


@pytest.fixture
def make_module():
    return stream_module


@pytest.fixture
def make_trainer(tmp_path):
    import lightning.pytorch as pl

    def make(**options):
        defaults = {
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "max_epochs": -1,
            "reload_dataloaders_every_n_epochs": 1,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": str(tmp_path),
        }
        return pl.Trainer(**{**defaults, **options})

    return make


def run(trainer, root):
    """Fit and test; losses, accuracy matrices, router sums and the trained sets as whole tensors."""
    module = stream_module()
    data = stream_data(root)
    trainer.fit(module, datamodule=data)
    trainer.test(module, datamodule=data, verbose=False)
    state = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in module.state_dict().items()}
    return {
        "losses": trainer.callbacks[0].seen,
        "results": module.test_results,
        "state": {k: v.detach().clone() for k, v in state.items()},
        "metrics": {k: v.item() for k, v in trainer.callback_metrics.items()},
    }


@pytest.fixture(scope="session")
def stream_helpers():
    return run
