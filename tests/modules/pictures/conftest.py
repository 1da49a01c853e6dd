"""Small pictures of which the label is seen at once, tiny encoders, and fits of seconds, for tests of classifiers."""

import functools
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from fulgurite.backbones.frames import TimmFrameEncoder
from fulgurite.callbacks.checkpoint_io import DigestCheckpointIO
from fulgurite.datamodules.base import FulguriteDataModule
from fulgurite.datamodules.unlabelled import UnlabelledTasks
from fulgurite.methods.schedules import Constant
from fulgurite.modules.ada_merging import AdaMerging
from fulgurite.modules.image_classification import ImageClassifier
from fulgurite.modules.optimization import ParamGroup
from fulgurite.samples import DataInfo, Sample

LABELS = {"bars": ("across", "down", "none"), "colours": ("blue", "green")}
SIZES = {"train": 24, "val": 9, "test": 11, "predict": 5}


def picture(domain, label, generator):
    """(3, 40, 40) uint8: stripes of a direction, or a colour, on noise."""
    pixels = torch.randint(0, 60, (3, 40, 40), generator=generator)
    at = int(torch.randint(0, 4, (), generator=generator))
    if domain == "colours":
        pixels[{"blue": 2, "green": 1}[label]] += 150
    elif label == "across":
        pixels[:, at::8] = 255
    elif label == "down":
        pixels[:, :, at::8] = 255
    return pixels.to(torch.uint8)


class Toys(FulguriteDataModule):
    """One domain of `LABELS`, in memory."""

    def __init__(self, domain, **loading):
        super().__init__(**loading)
        self.domain = domain

    def info(self):
        return DataInfo((self.domain,), LABELS[self.domain], tasks=("image_classification",))

    def read(self, split):
        generator = torch.Generator().manual_seed(len(self.domain) * 10 + list(SIZES).index(split))
        labels = [LABELS[self.domain][i % len(LABELS[self.domain])] for i in range(SIZES[split])]
        return [
            Sample(
                f"{split}-{i}",
                self.domain,
                "image_classification",
                answers={} if split == "predict" else {label: 1.0},
                image=picture(self.domain, label, generator),
            )
            for i, label in enumerate(labels)
        ]


def encoder():
    """A network of normalised convolutions with random weights, the same ones in every test."""
    return TimmFrameEncoder("test_efficientnet", weights=None, size=32, grid=0)


def trainer(folder, **settings):
    """A quiet trainer that writes this project's checkpoints."""
    return pl.Trainer(
        default_root_dir=folder,
        plugins=[DigestCheckpointIO()],
        **{
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            **settings,
        },
    )


def classifier(statistics="pretrained", **settings):
    return ImageClassifier(encoder(), statistics, functools.partial(torch.optim.AdamW, lr=3e-3), Constant(), **settings)


def fitted(domain, folder):
    """(module, trainer, checkpoint folder) of a short fit on one domain."""
    module, run = classifier(param_groups=[ParamGroup("^heads", 1e-2)]), trainer(folder, max_epochs=6)
    run.fit(module, datamodule=Toys(domain, batch_size=8))
    run.save_checkpoint(folder / "checkpoint")
    return module, run, folder / "checkpoint"


def tasks(**settings):
    return UnlabelledTasks([Toys(name) for name in LABELS], **{"batch_size": 4, **settings})


def fitted_coefficients(experts, run):
    """A merger of the experts' checkpoints after a fit."""
    module = AdaMerging(encoder(), list(map(str, experts)), optimizer=functools.partial(torch.optim.Adam, lr=2e-2))
    run.fit(module, datamodule=tasks())
    return module


@pytest.fixture(scope="session")
def kit():
    parts = (Toys, encoder, trainer, classifier, tasks, fitted_coefficients)
    return SimpleNamespace(labels=LABELS, **{part.__name__: part for part in parts})


@pytest.fixture(scope="session")
def experts(tmp_path_factory):
    """By domain, a fine-tuned classifier with its trainer and checkpoint."""
    return {domain: fitted(domain, tmp_path_factory.mktemp(domain)) for domain in LABELS}
