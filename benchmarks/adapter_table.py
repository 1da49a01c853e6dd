"""Every kind of adapter on one task that runs here, with one budget: accuracy, parameters, memory, stored bytes.

    python benchmarks/adapter_table.py [--folder runs/adapters] [--seeds 0 1 2] [--rows lora lst ..] [--threads 2]

Questions about pictures of shapes (easy-VQA) to frozen EfficientNet-lite0 features and SmolLM2-135M, of which 22 of the
30 blocks are left out to make a row cheap. In every row the projector of the features trains too; the first row is the
projector alone. Each row sees the same training questions for the same number of steps; as many of them ask for a
colour, a shape, and yes or no, and so do those of the test. Rates are in `KINDS`. Rows that are there are kept, so that
a call that was cut short goes on.

Two figures need no training: what is answered most often, and the most frequent answer to each question's very words,
which is all that a model could know that does not see. Memory is the peak of what a training step of 16 questions
allocates, gradients included, and beside it the optimizer's state; stored is what a checkpoint holds of the adapters.
"""

from __future__ import annotations

import argparse
import copy
import functools
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from compressed import Rows
from measure import machine, peak_bytes
from torch import Tensor, nn

from fulgurite.backbones.frames import TimmFrameEncoder
from fulgurite.backbones.llava import Llava
from fulgurite.checkpoints import write_text
from fulgurite.datamodules.base import Split
from fulgurite.datamodules.easy_vqa import KINDS as QUESTION_KINDS
from fulgurite.datamodules.easy_vqa import EasyVqa
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.compacter import Compacter
from fulgurite.methods.adapters.ia3 import IA3
from fulgurite.methods.adapters.ladder import LadderSide
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.adapters.places import Placement
from fulgurite.methods.adapters.replace import Replace
from fulgurite.methods.adapters.soft_prompt import SoftPrompt
from fulgurite.methods.adapters.sparse_mask import SparseMask
from fulgurite.modules.vision_language_generation import VisionLanguageGeneration
from fulgurite.reports.compression import Point, tradeoff_section
from fulgurite.reports.page import Section, render_page
from fulgurite.reports.tables import html_table
from fulgurite.samples import Sample

MIB = 1 << 20
BLOCKS = 30  # of the language model
OUTPUTS = ["self_attention_output", "feed_forward_output"]
# By name: learning rate, points and kind beside the projector; points of None train the whole language model.
KINDS: dict[str, tuple[float, list[str] | None, Callable[..., nn.Module] | None]] = {
    "projector": (1e-3, [], None),
    "LoRA q,v r=8": (1e-3, ["attention_query", "attention_value"], functools.partial(LoRA, rank=8)),
    "LoRA all r=8": (1e-3, ["linears"], functools.partial(LoRA, rank=8)),
    "bottleneck /8": (1e-3, OUTPUTS, functools.partial(Bottleneck, reduction=8)),
    "Compacter /8": (1e-3, OUTPUTS, functools.partial(Compacter, reduction=8, division=4)),
    "IA3": (1e-2, ["attention_key", "attention_value", "feed_forward_output"], IA3),
    "prompt 16": (1e-3, ["decoder_prompt"], functools.partial(SoftPrompt, length=16, hidden=None)),
    "LST /8": (1e-3, ["embedded", "decoder_block", "read_out"], functools.partial(LadderSide, reduction=8)),
    "FISH 0.5 %": (
        1e-3,
        ["parameters"],
        functools.partial(SparseMask, density=0.0235, samples=128, whole=[r"projector\..*"]),  # the projector is 1.85 %
    ),
    "full": (1e-4, None, None),
}


class Drawn(EasyVqa):
    """As many questions of each kind, drawn from those that there are.

    Args:
        num_train: training questions.
        num_test: test questions, the same whatever the seed.
        loading: see `EasyVqa`.
    """

    def __init__(self, num_train: int, num_test: int, **loading: Any) -> None:
        super().__init__(**loading)
        self.counts = {"train": num_train, "val": 0, "test": num_test, "predict": 0}

    def read(self, split: Split) -> list[Sample]:
        """The questions that were drawn."""
        generator = random.Random(self.seed if split == "train" else 0)
        samples = super().read(split) if self.counts[split] else []
        by_kind = [[sample for sample in samples if sample.kind == kind] for kind in QUESTION_KINDS]
        count = self.counts[split] // len(by_kind)
        return [sample for own in by_kind for sample in generator.sample(own, count)] if samples else []


def blind_scores(data: EasyVqa) -> dict[str, float]:
    """Accuracy in per cent of the training questions' most frequent answer, and of the one to each question's words."""
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for sample in data.samples("train"):
        answers[sample.question].update(sample.answers)
    most = sum(answers.values(), Counter()).most_common(1)[0][0]
    said = [(sample, answers[sample.question] or Counter([most])) for sample in data.samples("test")]
    right = [own.most_common(1)[0][0] in sample.answers for sample, own in said]
    return {
        "majority": 100 * statistics.mean(most in sample.answers for sample, _ in said),
        "question alone": 100 * statistics.mean(right),
    }


def module_of(name: str, backbone: Llava, seed: int) -> VisionLanguageGeneration:
    """A module with one kind, its own start of projector and adapters."""
    pl.seed_everything(seed, verbose=False)
    for layer in (backbone.projector[0], backbone.projector[2]):
        layer.reset_parameters()
    rate, points, kind = KINDS[name]
    placements = None
    if points is not None:
        # A mask reaches the projector itself, where it keeps all.
        placements = [] if kind is not None and "parameters" in points else [Placement(["projector"], Replace)]
        placements += [] if kind is None else [Placement(points, kind)]
    return VisionLanguageGeneration(
        backbone,
        placements,
        frozen=[r"encoder\..*"] if points is None else None,
        task_prefixes=False,
        answer_tokens=3,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=rate, weight_decay=0.0),
    )


def row(name: str, backbone: Llava, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Train and test one kind; accuracies are in per cent."""
    start = time.perf_counter()
    module = module_of(name, copy.deepcopy(backbone), seed)
    data = data_of(options, seed)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=options.epochs,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        **dict.fromkeys(("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"), False),
    )
    trainer.fit(module, datamodule=data)
    (optimizer,) = trainer.optimizers
    trained = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    # A scalar per tensor counts its steps.
    state = sum(t.nbytes for own in optimizer.state.values() for t in own.values() if isinstance(t, Tensor) and t.dim())
    batch = next(iter(data.train_dataloader()))
    trainer.test(module, datamodule=data, verbose=False)
    figures = module.test_results["figures"]
    stored = module.trained() if module.tuned else module.bank.sets["live"].state_dict()
    found = {
        "accuracy": figures["accuracy/vqa"],
        **{kind: figures[f"accuracy/vqa/{kind}"] for kind in QUESTION_KINDS},
        "trained": trained,
        "memory": peak_bytes(step_of(module, optimizer, batch)),
        "state": state,
        "stored": sum(t.nbytes for t in stored.values()),
    }
    return {**found, "seconds": time.perf_counter() - start}


def step_of(module: VisionLanguageGeneration, optimizer: torch.optim.Optimizer, batch: Any) -> Callable[[], None]:
    """A training step as a call, by an optimizer that has its state."""
    module.train()
    optimizer.zero_grad()
    inputs = module.example_inputs(batch)

    def call() -> None:
        module.example_losses(inputs).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def data_of(options: argparse.Namespace, seed: int) -> Drawn:
    """The drawn questions."""
    return Drawn(
        options.train, options.test, seed=seed, batch_size=16, eval_batch_size=64, feature_cache=Path(options.cache)
    )


def show(rows: Rows, blind: dict[str, float], machine_line: str) -> None:
    """Mean and spread over seeds of every kind, printed, and as ``report.html`` beside the rows."""
    by_name: dict[str, list[dict[str, float]]] = defaultdict(list)
    for key, figures in rows.found.items():
        by_name[key.rpartition(" | ")[0]].append(figures)
    header = ["kind", "accuracy, %", *QUESTION_KINDS, "seeds", "trained", "memory, MiB", "state, MiB", "stored, MiB"]
    table = [[name, f"{value:.1f}", *[""] * (len(header) - 2)] for name, value in blind.items()]
    points = []
    for name in [name for name in KINDS if name in by_name]:
        found = by_name[name]
        mean = {key: statistics.mean(each[key] for each in found) for key in found[0]}
        spread = f" ± {statistics.stdev(each['accuracy'] for each in found):.1f}" if len(found) > 1 else ""
        kinds = [f"{mean[kind]:.1f}" for kind in QUESTION_KINDS]
        sizes = [f"{mean[key] / MIB:.1f}" for key in ("memory", "state", "stored")]
        table.append(
            [name, f"{mean['accuracy']:.1f}{spread}", *kinds, str(len(found)), f"{mean['trained']:,.0f}", *sizes]
        )
        points.append(Point(name, (mean["memory"] + mean["state"]) / MIB, mean["accuracy"]))
    for line in [header, *table]:
        print("".join(f"{cell:>15}" for cell in line))
    sections = [
        Section("Accuracy", html_table(header, table)),
        tradeoff_section(points, "memory of a training step with the optimizer's state, MiB", "accuracy, %", "Memory"),
    ]
    facts = {**{key: str(value) for key, value in rows.settings.items()}, "machine": machine_line}
    page = rows.file.with_name("report.html")
    write_text(page, render_page("Kinds of adapters on easy-VQA", "", sections, facts))
    print(page)


def main() -> None:
    """Add what is missing, show all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/adapters"))
    parser.add_argument("--cache", default=".cache/features")
    parser.add_argument("--rows", nargs="+", help="words that a row's name begins with; all but full by default")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--first", type=int, default=6, help="blocks of the language model that are kept at its start")
    parser.add_argument("--last", type=int, default=2, help="and at its end")
    parser.add_argument("--grid", type=int, default=3, help="squared, visual tokens of a picture")
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--test", type=int, default=450)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in ("first", "last", "grid", "train", "epochs", "test")}
    wanted = options.rows or [name for name in KINDS if name != "full"]
    rows = Rows(options.folder / "rows.json", settings, wanted)
    kept = [*range(options.first), *range(BLOCKS - options.last, BLOCKS)]
    backbone = Llava(encoder=TimmFrameEncoder(grid=options.grid), kept=kept)
    for seed in options.seeds:
        for name in KINDS:
            if rows.missing(name, seed):
                rows.add(name, seed, row(name, backbone, seed, options))
                print(name, seed, {key: round(value, 3) for key, value in rows.found[f"{name} | {seed}"].items()})
    show(rows, blind_scores(data_of(options, 0)), machine(options.threads))


if __name__ == "__main__":
    main()
