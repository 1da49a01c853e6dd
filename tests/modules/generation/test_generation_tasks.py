from collections import Counter

import pytest
import torch

from fulgurite.modules.generation_tasks import Prefixes, TextCollator, chosen, first_difference, sampled_answers
from fulgurite.samples import DataError, Sample, check_picklable, sample_fields


def sample(task="vqa", question="what is it?", **fields):
    return Sample(id="1", domain="d", task=task, question=question, **fields)


@pytest.mark.parametrize(
    ("task", "question", "text"),
    [
        ("vqa", "what is it?", "vqa: what is it?"),
        ("gqa", "what is it?", "gqa: what is it?"),
        ("nlvr2", "there are two.", "nlvr: there are two."),
        ("caption", "", "caption: "),
        ("tvqa", "[Subs] hi [Choices] a0: a.", "[Subs] hi [Choices] a0: a. tvqa: "),
        ("tvc", "[Subs] hi", "[Subs] hi tvc: "),
        ("counting", "how many?", "counting: how many?"),
    ],
)
def test_each_task_s_prefix(task, question, text):
    assert Prefixes(True, None)(sample(task, question)).question == text
    assert Prefixes(False, None)(sample(task, question)).question == question


def test_a_prefix_can_be_another_one_as_the_published_code_has_it():
    put = Prefixes(True, {"gqa": "gpa: "})
    assert put(sample("gqa")).question == "gpa: what is it?"
    assert put(sample("vqa")).question == "vqa: what is it?"


class Words:
    needs = ("question",)

    def __call__(self, samples):
        return {**sample_fields(samples), "words": [s.question for s in samples]}


def test_a_collator_reads_what_the_model_reads():
    collator = TextCollator(Words(), Prefixes(True, None))
    check_picklable(collator)
    assert collator.needs == ("question",)
    assert collator([sample(), sample("caption", "")])["words"] == ["vqa: what is it?", "caption: "]


def test_answers_are_drawn_in_proportion_to_their_scores_by_seed_epoch_and_sample_alone():
    answers = {"red": 1.0, "maroon": 0.3, "no": 0.0}
    batch = sample_fields([Sample(id=str(i), domain="d", answers=answers) for i in range(2000)])
    texts, scores = sampled_answers(batch, seed=1, epoch=4)
    counts = Counter(texts)
    assert set(counts) == {"red", "maroon"}
    assert abs(counts["red"] / 2000 - 1 / 1.3) < 0.03
    assert scores == [answers[text] for text in texts]
    backwards = sample_fields([Sample(id=str(i), domain="d", answers=answers) for i in reversed(range(2000))])
    assert sampled_answers(backwards, 1, 4)[0] == texts[::-1]
    assert sampled_answers(batch, 1, 5)[0] != texts
    assert sampled_answers(batch, 2, 4)[0] != texts


def test_what_is_learned_of_captions_of_no_right_answer_and_of_nothing():
    batch = sample_fields([sample("caption", "", captions=("a dog runs",)), sample(answers={"cat": 0.0})])
    assert sampled_answers(batch, 0, 0) == (["a dog runs", ""], [1.0, 0.0])
    with pytest.raises(DataError, match="'1' has neither answers nor captions"):
        sampled_answers(sample_fields([sample()]), 0, 0)


def test_a_share_lies_within_the_scores():
    options = {"a": 0.5, "none": 0.0, "b": 0.5}
    assert [chosen(options, share) for share in (0.0, 0.49, 0.5, 1.0)] == ["a", "a", "b", "b"]
    assert chosen({"a": 0.0}, 0.3) is None


def test_choices_are_told_apart_by_their_first_token_that_differs():
    assert first_difference([[5, 1], [7, 1]]) == 0
    assert first_difference([[0, 5, 2], [0, 7, 2]]) == 1
    for rows in ([[5, 1], [5, 1]], [[5, 1], [5, 1, 2]], [[5, 1], [5, 2], [6, 2]]):
        with pytest.raises(DataError, match="told apart"):
            first_difference(torch.tensor(rows).tolist() if len(set(map(len, rows))) == 1 else rows)
