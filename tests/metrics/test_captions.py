"""Scores of captions against the formulas of their papers, written out."""

import math
from collections import Counter

import pytest
import torch

from fulgurite.metrics import caption_words as words_module
from fulgurite.metrics.caption_words import caption_words
from fulgurite.metrics.captions import CaptionScores

SAID = [
    ["a dog runs on grass", "the dog is running on green grass", "a brown dog outside"],
    ["two men ride a red bus", "people on a bus", "a bus with two men"],
    ["a cat sleeps on the sofa", "the cat is asleep", "a sleeping cat"],
    ["a plate of food", "food on a plate on the table"],
]
GIVEN = ["a dog runs on the green grass", "two men on a bus", "a dog on the sofa", "a table"]


def grams(text, n):
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider_d(given, said):
    """Equations 1 to 5 of CIDEr with clipping and the penalty on lengths (sigma 6), times 10."""
    total = 0.0
    for n in range(1, 5):
        seen = Counter(gram for refs in said for gram in set().union(*(grams(ref, n) for ref in refs)))

        def weights(text, n=n, seen=seen):
            return {g: c * math.log(len(said) / max(1, seen[g])) for g, c in grams(text, n).items()}

        def norm(vector):
            return math.sqrt(sum(v * v for v in vector.values()))

        for text, refs in zip(given, said):
            mine = weights(text)
            for ref in refs:
                theirs = weights(ref)
                if norm(mine) and norm(theirs):
                    # The published scorer counts pairs of words where it says length.
                    apart = sum(grams(text, 2).values()) - sum(grams(ref, 2).values())
                    dot = sum(min(v, theirs.get(g, 0)) * theirs.get(g, 0) for g, v in mine.items())
                    total += dot / norm(mine) / norm(theirs) * math.exp(-(apart**2) / 72) / len(refs)
    return 10 * total / 4 / len(given)


def bleu(given, said, order):
    logs = []
    for n in range(1, order + 1):
        right = sum(
            min(c, max(grams(ref, n)[g] for ref in refs))
            for text, refs in zip(given, said)
            for g, c in grams(text, n).items()
        )
        logs.append(math.log(right / sum(sum(grams(text, n).values()) for text in given)))
    lengths = [len(text.split()) for text in given]
    closest = [min((abs(len(r.split()) - k), len(r.split())) for r in refs)[1] for k, refs in zip(lengths, said)]
    brevity = min(0, 1 - sum(closest) / sum(lengths))
    return math.exp(brevity + sum(logs) / order)


def longest(a, b):
    if not a or not b:
        return 0
    if a[-1] == b[-1]:
        return 1 + longest(a[:-1], b[:-1])
    return max(longest(a[:-1], b), longest(a, b[:-1]))


def rouge(text, refs):
    common = [longest(text.split(), ref.split()) for ref in refs]
    precision = max(common) / len(text.split())
    recall = max(c / len(ref.split()) for c, ref in zip(common, refs))
    return (1 + 1.44) * precision * recall / (recall + 1.44 * precision) if common else 0.0


def test_scores_are_those_of_the_papers():
    metric = CaptionScores()
    metric.update(GIVEN[:1], SAID[:1])
    metric.update(GIVEN[1:], SAID[1:])
    figures = {name: value.item() for name, value in metric.compute().items()}
    assert figures["CIDEr"] == pytest.approx(100 * cider_d(GIVEN, SAID), rel=1e-6)
    for order in (1, 2, 3):
        assert figures[f"BLEU-{order}"] == pytest.approx(100 * bleu(GIVEN, SAID, order), rel=1e-6)
    mean = sum(rouge(text, refs) for text, refs in zip(GIVEN, SAID)) / 4
    assert figures["ROUGE-L"] == pytest.approx(100 * mean, rel=1e-6)
    assert list(figures) == ["CIDEr", "BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "ROUGE-L"]


def test_repeats_are_left_out_and_ranks_join():
    whole, one, two = (CaptionScores(("CIDEr", "ROUGE-L")) for _ in range(3))
    whole.update(GIVEN, SAID)
    one.update(GIVEN[:2], SAID[:2])
    two.update([*GIVEN[2:], GIVEN[0]], [*SAID[2:], SAID[0]], torch.tensor([True, True, False]))
    two.update(GIVEN[:1], SAID[:1], torch.tensor([False]))
    one.texts = torch.cat([*one.texts, *two.texts])  # as torchmetrics leaves the states of all ranks
    assert one.compute() == whole.compute()
    assert CaptionScores(("CIDEr",)).compute()["CIDEr"].isnan()


def test_marks_of_other_alphabets_and_lines_survive():
    metric = CaptionScores(("ROUGE-L",))
    metric.update(["un café\n à  Paris"], [["un café à paris"]])
    assert metric.compute()["ROUGE-L"].item() == pytest.approx(100)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A man, who isn't old.", "a man who is n't old"),
        ("The dog's ball -- it's red!", "the dog 's ball it 's red"),
        ("A black-and-white cat at 10:30...", "a black-and-white cat at 10:30"),
        ("They can't pay 1,000 in the U.S.", "they ca n't pay 1,000 in the u.s."),
        ("we'll say \u201cno\u201d", "we 'll say no"),
        ("A half/half T-shirt of the 2nd person, $10", "a half/half t-shirt of the 2nd person $ 10"),
        ("", ""),
    ],
)
def test_plain_words(text, words):
    assert caption_words([text]) == [words]


def test_what_is_missing_is_said_before_anything_is_counted(monkeypatch):
    with pytest.raises(ValueError, match="scores="):
        CaptionScores(("CIDER",))
    monkeypatch.setenv("PATH", "")
    for options, what in (
        ({"tokenizer": "ptb"}, "tokenizer: plain"),
        ({"scores": ("METEOR",)}, "leave METEOR out"),
        ({"scores": ("SPICE",)}, "leave SPICE out"),
    ):
        with pytest.raises(RuntimeError, match=f"needs Java.*{what}") as caught:
            CaptionScores(**options)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(words_module, "require_package", lambda what: (_ for _ in ()).throw(RuntimeError(what)))
    with pytest.raises(ValueError, match="there are none of the caption 'a'"):
        CaptionScores(("CIDEr",)).update(["a"], [[]])
