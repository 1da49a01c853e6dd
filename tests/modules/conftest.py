import functools

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
SPLITS = ("train", "val", "test")


def stream_data(root, domains=DOMAINS, epochs_per_domain=2, batch_size=8, **options):
    files = {split: f"{split}.jsonl" for split in SPLITS}
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
