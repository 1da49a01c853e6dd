"""What written answers are worth, task by task and one by one."""

import pytest
import torch
from torchmetrics import Metric

from fulgurite.modules.generation_scores import WrittenScores, answer_rows
from fulgurite.samples import DataInfo, Sample, sample_fields

CPU = torch.device("cpu")
SAID = ("red",) * 7 + ("dark",) * 3
SAMPLES = [
    Sample(id="v1", domain="d", task="vqa", kind="colour", human_answers=SAID, answers={"red": 1.0}),
    Sample(id="v2", domain="d", task="vqa", kind="colour", human_answers=SAID, counted=False),
    Sample(id="g1", domain="d", task="gqa", kind="other", answers={"yes": 1.0, "maybe": 0.4}),
    Sample(id="g2", domain="d", task="gqa", answers={"yes": 1.0}),
    Sample(id="c1", domain="d", task="caption", captions=("a dog", "dogs")),
    Sample(id="s1", domain="d", task="sst2", answers={"0": 0.2, "1": 0.8}),
]
ANSWERS = ["dark", "red", "maybe", "no", "a dog", "1"]


class Captions(Metric):
    """Notes what it is given."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def update(self, given, right):
        self.seen += zip(given, right)

    def compute(self):
        return {"CIDEr": torch.tensor(30.0), "BLEU": torch.tensor(5.0)}


def test_figures_are_by_task_and_kind_and_their_mean_is_of_what_was_counted():
    info = DataInfo(("d",), kinds=("colour", "other"), tasks=("vqa", "gqa", "nlvr2", "caption", "sst2"))
    scores = WrittenScores(info, CPU, Captions)
    scores.add(ANSWERS, sample_fields(SAMPLES))
    assert scores.figures() == pytest.approx(
        {
            "score": (90 + 20 + 30 + 100) / 4,  # of no sentence of nlvr2
            "accuracy/vqa": 90,  # of ten people seven see three others, and three see two
            "accuracy/vqa/colour": 90,
            "accuracy/gqa": 20,
            "accuracy/gqa/other": 40,
            "CIDEr/caption": 30,
            "BLEU/caption": 5,
            "accuracy/sst2": 100,
            "average/sst2": 100,
        }
    )
    assert scores.metrics["caption"].seen == [("a dog", ("a dog", "dogs"))]
    assert WrittenScores(DataInfo(("d",), tasks=("gqa",)), CPU).figures() == {}


def test_a_task_that_the_data_do_not_name_is_an_error():
    with pytest.raises(LookupError, match=r"task 'vqa', but name the tasks \['gqa'\]"):
        WrittenScores(DataInfo(("d",), tasks=("gqa",)), CPU).add(ANSWERS, sample_fields(SAMPLES))


def test_a_row_says_what_is_right_and_what_the_answer_is_worth():
    unknown = Sample(id="g3", domain="d", task="gqa")
    rows = answer_rows([*ANSWERS, "x"], sample_fields([*SAMPLES, unknown]))
    assert [(row["id"], row["answer"], row["credit"]) for row in rows] == [
        ("v1", "dark", pytest.approx(0.9)),
        ("g1", "maybe", 0.4),
        ("g2", "no", 0.0),
        ("c1", "a dog", None),
        ("s1", "1", 0.8),
        ("g3", "x", None),
    ]
    assert rows[0]["gold"] == {"red": 0.7, "dark": 0.3}
    near = Sample(id="t1", domain="d", task="stsb", answers={"3.8": 1.0})
    assert [row["credit"] for row in answer_rows(["3.6"], sample_fields([near]))] == [None]
    assert [row["gold"] for row in rows[1:4:2]] == [{"yes": 1.0, "maybe": 0.4}, {"a dog": 1.0, "dogs": 1.0}]
    assert [rows[0][name] for name in ("domain", "task", "kind")] == ["d", "vqa", "colour"]
