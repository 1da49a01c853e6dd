"""Accuracy of answers as texts: by the rules of the VQA challenge, and to the letter."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.metrics.answer_accuracy import AnswerAccuracy
from fulgurite.metrics.vqa_official import CONTRACTIONS, VQASoftAccuracy, normalized_answer, vqa_credit


@pytest.mark.parametrize(
    ("given", "normal"),
    [
        ("The bus.", "bus"),
        ("A  dog, an owl", "dog owl"),
        ("Two", "2"),
        ("none", "0"),
        ("two-story house", "2 story house"),  # a mark with no space beside it becomes one
        ("black - white", "black white"),
        ("1,000", "1000"),  # a comma between digits takes all marks away
        ("1,000/day", "1000day"),
        ("3.5 m.", "3.5 m"),
        ("5.", "5"),
        ("u.s.a.", "usa"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),
        ("well", "well"),
        ("its", "its"),
        ("  Red\nand\tblue ", "red and blue"),
        ("what?!", "what"),
        ("", ""),
        ("the", ""),
    ],
)
def test_an_answer_is_normalised_as_the_challenge_does(given, normal):
    assert normalized_answer(given) == normal


def test_the_mended_words_lack_one_apostrophe():
    assert len(CONTRACTIONS) == 114
    assert all(len(right) == len(wrong) + 1 for wrong, right in CONTRACTIONS.items() if wrong != "somebody'd")
    assert {wrong: CONTRACTIONS[wrong] for wrong in ("twas", "maam", "oclock")} == {
        "twas": "'twas",
        "maam": "ma'am",
        "oclock": "o'clock",
    }


def leave_one_out(answer, said):
    """The rule in the words of the paper: each annotator against the answer with the annotator left out."""
    scores = [
        min(1, [other for at, other in enumerate(said) if at != one].count(answer) / 3) for one in range(len(said))
    ]
    return sum(scores) / len(scores)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["red", "blue", "x"]), st.lists(st.sampled_from(["red", "blue", "green"]), min_size=1, max_size=10)
)
def test_the_credit_is_the_mean_over_annotators_left_out(answer, said):
    assert math.isclose(vqa_credit(answer, said), leave_one_out(answer, said), abs_tol=1e-12)


def test_of_what_people_said_only_the_punctuation_is_taken_away_and_only_where_they_differ():
    assert vqa_credit("Yes!", ["yes"] * 10) == 1.0
    assert vqa_credit("yes", ["yes."] * 10) == 0.0
    assert vqa_credit("yes", ["yes."] * 9 + ["no"]) == 1.0
    assert vqa_credit("bus", ["the bus"] * 9 + ["no"]) == 0.0
    with pytest.raises(ValueError, match="human_answers"):
        vqa_credit("yes", [])


def test_accuracy_in_all_and_by_kind_leaves_repeats_out():
    metric = VQASoftAccuracy(("number", "other"))
    said = [["2"] * 10, ["red"] * 2 + ["blue"] * 8, ["no"] * 10]
    counted = torch.tensor([True, True, False])
    metric.update(["two", "red", "no"], said, ["number", "other", "other"], counted)
    metric.update(["a"], [["b"] * 10], [None])
    red = 100 * (8 * 2 / 3 + 2 * 1 / 3) / 10
    figures = metric.compute()
    assert figures["accuracy/number"] == 100
    assert figures["accuracy/other"].item() == pytest.approx(red)
    assert figures["accuracy"].item() == pytest.approx((100 + red) / 3)
    assert metric.published() == {"accuracy": 53.33, "accuracy/number": 100.0, "accuracy/other": 60.0}


def test_answers_to_the_letter_get_the_score_of_the_accepted_one():
    metric = AnswerAccuracy(("a",))
    metric.update(["red", "Red", "blue"], [{"red": 0.3}, {"red": 1.0}, {"red": 0.3, "blue": 1.0}], ["a", None, "b"])
    assert metric.compute()["accuracy"].item() == pytest.approx(100 * 1.3 / 3)
    assert metric.compute()["accuracy/a"].item() == pytest.approx(30)
    assert AnswerAccuracy().compute()["accuracy"].isnan()


def test_states_of_two_processes_add_up():
    answers, said = ["red", "blue", "2"], [["red"] * 9 + ["x"], ["red"] * 9 + ["blue"], ["2", "2", "3"]]
    parts = [VQASoftAccuracy(("k",)) for _ in range(2)]
    parts[0].update(answers[:1], said[:1], ["k"])
    parts[1].update(answers[1:], said[1:], ["k", None])
    whole = VQASoftAccuracy(("k",))
    whole.update(answers, said, ["k", "k", None])
    parts[0].credit += parts[1].credit
    parts[0].count += parts[1].count
    assert parts[0].compute() == whole.compute()
