"""What is measured of n items in one state of the weights: probabilities, answers, attacks, and what stands beside.

The terms are those of UnLOK-VQA (arXiv 2505.01456). Rows are plain numbers and texts, so that they can be stored,
gathered over ranks and put in the order of the data.

Legend: n items, R rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from fulgurite.methods.random import digest_of
from fulgurite.methods.unlearning.answers import says
from fulgurite.metrics.unlearning import SETS
from fulgurite.modules.edited_state import EditedState, item_rows
from fulgurite.modules.extraction import attacked
from fulgurite.modules.item_questions import answer_of
from fulgurite.samples import Sample


def figures_of(module: Any, samples: Sequence[Sample], state: EditedState, inner: bool) -> list[dict[str, Any]]:
    """A row per item.

    ``answer`` holds the probabilities of the deleted answer to the question, its first rephrasing and its first
    neighbour question, ``target`` those of the text that takes its place, where there is one; ``written`` is what the
    model says; ``memory`` how well the answer is known by heart; ``right`` has lists of right (1) and wrong (0) answers
    by `SETS`; ``attacks`` the share of candidates that are the answer, by title; ``layers`` the probability of the
    answer's first token by layer.

    Args:
        module: `MultimodalUnlearning`.
        samples: n items.
        state: the weights.
        inner: whether attacks that change the model are run; otherwise the attack that they wrap is run in their place.
    """
    rows: list[dict[str, Any]] = [{} for _ in samples]
    probabilities(module, samples, state, rows, "answer", [answer_of(sample) for sample in samples])
    if module.objective.injects:
        probabilities(module, samples, state, rows, "target", [module.new_target(sample) for sample in samples])
    written_answers(module, samples, state, rows)
    attacks = {attack.title: attack if inner else getattr(attack, "then", attack) for attack in module.attacks}
    outcomes = attacked(module, attacks, samples, state)
    for number, row in enumerate(rows):
        row["attacks"] = {title: shares[number] for title, shares in outcomes.items()}
    layers(module, samples, state, rows)
    return rows


def probabilities(
    module: Any,
    samples: Sequence[Sample],
    state: EditedState,
    rows: list[dict[str, Any]],
    name: str,
    texts: Sequence[str],
) -> None:
    """Of each item's text to its question, its first rephrasing and its first neighbour question."""
    asked, said, counts = [], [], []
    for sample, text in zip(samples, texts, strict=True):
        fact = sample.fact
        questions = [sample.question, *fact.rephrased_questions[:1], *[q for q, _ in fact.neighbour_questions[:1]]]
        asked += [module.question(sample, question) for question in questions]
        said += [text] * len(questions)
        counts.append(len(questions))
    scored = module.scored(asked, said, item_rows(counts, module.device), state)
    found, memory = scored.pop("log_probability").exp().tolist(), scored
    start = 0
    for sample, row, count in zip(samples, rows, counts):
        own = iter(found[start : start + count])
        if name == "answer":
            row["memory"] = {figure: float(values[start]) for figure, values in memory.items()}
        start += count
        row[name] = {
            "question": next(own),
            "rephrased": next(own) if sample.fact.rephrased_questions else math.nan,
            "neighbour": next(own) if sample.fact.neighbour_questions else math.nan,
        }


def written_answers(module: Any, samples: Sequence[Sample], state: EditedState, rows: list[dict[str, Any]]) -> None:
    """What is written to the question, and how much is right beside it."""
    asked: list[Sample] = []
    expected: list[tuple[int, str, str]] = []
    drawn: list[Sample] = []
    drawn_expected: list[tuple[int, str, str]] = []
    seeds: list[int] = []
    for number, sample in enumerate(samples):
        asked.append(sample)
        expected.append((number, "", ""))
        for other in module.others(sample):
            asked.append(other)
            expected.append((number, SETS[0], answer_of(other)))
        for question, answer in sample.fact.neighbour_questions:
            asked.append(module.question(sample, question))
            expected.append((number, SETS[1], answer))
        for place, (picture, answer) in enumerate(neighbours(sample)):
            drawn.append(module.question(sample, sample.question, picture))
            drawn_expected.append((number, SETS[2], answer))
            seeds.append(digest_of(module.attack_seed, "neighbour image", place, f"{sample.domain} {sample.id}"))
        rows[number]["right"] = {name: [] for name in SETS}
    items = torch.tensor([number for number, *_ in expected], device=module.device)
    texts = module.written(asked, items, state)
    items = torch.tensor([number for number, *_ in drawn_expected], dtype=torch.long, device=module.device)
    texts += module.drawn(drawn, items, state, seeds, 1.0, module.answer_tokens)
    for (number, name, answer), text in zip([*expected, *drawn_expected], texts, strict=True):
        if name:
            rows[number]["right"][name].append(float(says(text, answer)))
        else:
            rows[number]["written"] = text


def neighbours(sample: Sample) -> Iterator[tuple[Any, str]]:
    """The neighbour pictures of all levels with their right answers."""
    for found in sample.fact.neighbour_images.values():
        yield from found


@torch.no_grad()
def layers(module: Any, samples: Sequence[Sample], state: EditedState, rows: list[dict[str, Any]]) -> None:
    """Probability of the first token of the answer at the last position of the prompt, layer by layer."""
    first = module.labels_of([answer_of(sample) for sample in samples])[:, :1]
    batch = module.encoded(samples)
    with state.over(item_rows([1] * len(samples), module.device)):
        lens = module.lens(batch, range(len(module.blocks) + 1))
    for number, row in enumerate(rows):
        row["layers"] = [float(each[number, first[number, 0]]) for each in lens.values()]
