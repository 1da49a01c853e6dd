"""Soft accuracy of free answers by the rules of the VQA challenge (Antol et al. 2015, arXiv 1505.00468, section 3.3).

An answer is compared, after normalisation, with what each of (usually ten) annotators said:

    accuracy = mean over annotators of min(1, matches among the others / 3)

The answer is always normalised: punctuation, then case, numbers, articles and contractions. Of what people said, only
the punctuation is, and only where they do not all agree, as the evaluation of VL-T5 and VL-Adapter does.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from torch import Tensor

from fulgurite.metrics.answer_accuracy import CreditByKind

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA_BETWEEN_DIGITS = re.compile(r"\d,\d")
PERIOD_NOT_BEFORE_DIGIT = re.compile(r"\.(?!\d)")
NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
ARTICLES = ("a", "an", "the")
# Words are mended that lack one apostrophe of these. Forms that are words without it, as "well", are not among them.
WITH_APOSTROPHE = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
CONTRACTIONS = {
    form[:at] + form[at + 1 :]: form
    for form in WITH_APOSTROPHE.split()
    for at, letter in enumerate(form)
    if letter == "'"
} | {"somebody'd": "somebodyd"}  # the published table has this one the other way round


def without_punctuation(text: str) -> str:
    """Each mark becomes a space, or nothing where it stands beside a space somewhere in the text or the text holds a
    comma between digits; then periods go that are not before a digit."""
    result = text
    together = COMMA_BETWEEN_DIGITS.search(text) is not None
    for mark in PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_space or together else " ")
    return PERIOD_NOT_BEFORE_DIGIT.sub("", result)


def without_articles(text: str) -> str:
    """Lower case, number words up to ten as digits, no articles, apostrophes where words lack one; single spaces."""
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalized_answer(text: str) -> str:
    """The form in which an answer is compared."""
    return without_articles(without_punctuation(_one_line(text)))


def vqa_credit(answer: str, human_answers: Sequence[str]) -> float:
    """Accuracy of one answer, from 0 to 1.

    Args:
        answer: as the model gave it.
        human_answers: what each annotator said.

    Raises:
        ValueError: there are no human answers.
    """
    if not human_answers:
        raise ValueError("vqa_credit needs what people answered, and human_answers is empty")
    said = [_one_line(text) for text in human_answers]
    if len(set(said)) > 1:
        said = [without_punctuation(text) for text in said]
    matches = Counter(said)[normalized_answer(answer)]
    # A person who said it has one match less among the others.
    others = (len(said) - matches) * min(1.0, matches / 3) + matches * min(1.0, max(matches - 1, 0) / 3)
    return others / len(said)


class VQASoftAccuracy(CreditByKind):
    """Mean accuracy over questions in per cent, in all and by kind of answer; see `CreditByKind`."""

    def update(
        self,
        answers: Sequence[str],
        human_answers: Sequence[Sequence[str]],
        kinds: Sequence[str | None] | None = None,
        counted: Tensor | None = None,
    ) -> None:
        """Add B answers; those where ``counted`` (B,) is False are left out."""
        self.add(
            [vqa_credit(answer, said) for answer, said in zip(answers, human_answers, strict=True)], kinds, counted
        )

    def published(self) -> dict[str, float]:
        """What `compute` gives, rounded to two digits as the evaluation of the challenge prints them."""
        return {name: round(value.item(), 2) for name, value in self.compute().items()}


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
