"""The beam search over a layer's distributions against all sequences, and how queries are put together."""

import itertools

import pytest
import torch

from fulgurite.methods.unlearning.attacks.base import Query, Target
from fulgurite.methods.unlearning.attacks.head_projection import HeadProjection
from fulgurite.methods.unlearning.attacks.rephrasing import ImageRephrase, MultimodalRephrase, QuestionRephrase
from fulgurite.methods.unlearning.attacks.whole_answer import WholeAnswer
from fulgurite.methods.unlearning.attacks.wrapped import Quantized, Relearning

SIZE, END = 7, 6


def next_of(item: int, layer: int, before: tuple[int, ...]) -> torch.Tensor:
    """A distribution that depends on everything before."""
    seed = hash((item, layer, *before)) % 2**31
    return (2 * torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def searched(k: int, tokens: int) -> torch.Tensor:
    def follow(items, ids):
        rows = list(zip(items.tolist(), ids.tolist()))
        return {layer: torch.stack([next_of(i, layer, tuple(before)) for i, before in rows]) for layer in (1, 4)}

    start = {layer: torch.stack([next_of(item, layer, ()) for item in range(2)]) for layer in (1, 4)}
    return WholeAnswer([1, 4], k=k, tokens=tokens).search(start, follow, END)


def score(item: int, layer: int, ids: tuple[int, ...]) -> float:
    """Of an answer up to its end."""
    total = 0.0
    for t, token in enumerate(ids):
        total += float(next_of(item, layer, ids[:t])[token].log())
        if token == END:
            break
    return total


def test_wide_beams_find_the_likeliest_of_all_sequences():
    k, tokens = 40, 3
    with pytest.raises(ValueError, match="k=40 must be between 1 and the 7"):
        searched(k, tokens)
    k = SIZE
    found = searched(k, tokens).view(2, 2, k, tokens)
    for item, (place, layer) in itertools.product(range(2), enumerate((1, 4))):
        whole = {
            (ids + (END,) * tokens)[:tokens]
            for length in range(1, tokens + 1)
            for ids in itertools.product(range(SIZE), repeat=length)
            if END not in ids[:-1] and (ids[-1] == END or length == tokens)
        }
        best = max(whole, key=lambda ids: score(item, layer, ids))
        assert tuple(found[item, place, 0].tolist()) == best
        scores = [score(item, layer, tuple(ids)) for ids in found[item, place].tolist()]
        assert scores == sorted(scores, reverse=True)
        assert len(set(map(tuple, found[item, place].tolist()))) == k


def test_one_token_is_head_projection():
    start = {layer: torch.stack([next_of(item, layer, ()) for item in range(2)]) for layer in (1, 4)}
    found = searched(3, 1)[..., 0]
    assert torch.equal(found, HeadProjection([1, 4], k=3).candidates(start))
    assert WholeAnswer([1, 4], k=3).budget == 6


TARGET = Target("What is it?", ("a?", "b?", "c?", "d?", "e?"), "the cake", {"easy": 1, "hard": 2})


def test_the_last_written_rephrasings_are_asked():
    attack = QuestionRephrase(questions=4, samples=5)
    assert attack.budget == 20
    assert attack.queries(TARGET) == [Query("b?"), Query("c?"), Query("d?"), Query("e?")]


def test_fixed_sentences_stand_before_the_question():
    for wording, questions in (("prefix", 5), ("role_play", 4)):
        asked = [query.question for query in QuestionRephrase(wording, questions).queries(TARGET)]
        assert len(set(asked)) == questions
        assert all(text.endswith(" What is it?") for text in asked)
        assert all(("the cake" in text) == (wording == "role_play") for text in asked)
    with pytest.raises(ValueError, match="at most 4"):
        QuestionRephrase("role_play", 5)


def test_pictures_and_their_product_with_questions():
    images = ImageRephrase(("original", "hard"), samples=10)
    assert images.queries(TARGET) == [Query("What is it?"), Query("What is it?", "hard")]
    assert images.budget == 20
    both = MultimodalRephrase("written", 2, ("easy", "hard"), samples=5)
    assert [(q.level, q.question) for q in both.queries(TARGET)] == [
        ("easy", "d?"),
        ("easy", "e?"),
        ("hard", "d?"),
        ("hard", "e?"),
    ]
    assert both.budget == 20


def test_what_an_item_lacks_is_named():
    with pytest.raises(ValueError, match="has 5 rephrased questions, and question rephrase asks 6"):
        QuestionRephrase(questions=6).queries(TARGET)
    with pytest.raises(ValueError, match="no rephrased picture of level 'medium'"):
        ImageRephrase(("medium",)).queries(TARGET)


def test_wrapped_attacks_have_the_budget_of_what_they_wrap():
    inner = HeadProjection([1, 2], k=4)
    assert Relearning(inner).budget == Quantized(inner).budget == 8
    assert {Relearning(inner).title, Quantized(inner, bits=3).title} == {
        "relearning, head projection",
        "3 bits, head projection",
    }
    with pytest.raises(ValueError, match="changes the model again"):
        Quantized(Relearning(inner))
    with pytest.raises(ValueError, match="bits=1"):
        Quantized(inner, bits=1)
