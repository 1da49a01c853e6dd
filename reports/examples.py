"""Example questions with frames and every mode's answer, chosen by a fixed rule.

The questions of a domain stand in the order of the SHA-256 of their ids, and fall into groups by who was
right. The domains take turns, and each gives the next question of the next group that has one, going
through the groups in a cycle. Every domain begins one group further than the one before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from fulgurite.reports.images import thumbnail_tag
from fulgurite.samples import DataError, Sample, pixels_of

Answer = Mapping[str, Any]
Key = tuple[str, str]


@dataclass(frozen=True)
class Group:
    """Questions with the same outcome.

    Args:
        name: what was right and what wrong, in words.
        holds: whether an answer belongs here, asked of the groups in order.
    """

    name: str
    holds: Callable[[Answer], bool]


def credit(answer: Answer, mode: str) -> float:
    """Score in [0, 1] of a mode's answer; 0 where it is not among the accepted ones."""
    return float(answer["gold"].get(answer["answers"][mode], 0.0))


def outcome_groups(mode: str, modes: Sequence[str], names: Mapping[str, str]) -> list[Group]:
    """Groups that hold every answer once, by the mode looked at and the nearest other one.

    Args:
        mode: the configured mode.
        modes: all modes with answers.
        names: how modes are called.
    """
    order = ("router", "dynamic", "average", "last", "zero_shot", "second_router", "oracle")
    other = next((m for m in order if m in modes and m != mode), None)

    def right(m: str) -> Callable[[Answer], bool]:
        return lambda a: credit(a, m) > 0

    if other is None:
        return [Group(f"{names[mode]} right", right(mode)), Group(f"{names[mode]} wrong", lambda a: True)]
    one, two, first, second = right(mode), right(other), names[mode], names[other]
    rest = [m for m in modes if m not in (mode, other, "zero_shot")]

    def any_right(a: Answer) -> bool:
        return any(credit(a, m) > 0 for m in rest)

    def all_right(a: Answer) -> bool:
        return all(credit(a, m) > 0 for m in rest)

    return [
        Group(f"{first} right, {second} wrong", lambda a: one(a) and not two(a)),
        Group(f"{first} wrong, {second} right", lambda a: two(a) and not one(a)),
        Group("both right, another trained mode wrong", lambda a: one(a) and not all_right(a)),
        Group("all trained modes right", one),
        Group("both wrong, another trained mode right", any_right),
        Group("all trained modes wrong", lambda a: True),
    ]


def group_of(answer: Answer, groups: Sequence[Group]) -> int:
    """Index of the first group that holds ``answer``."""
    return next(i for i, group in enumerate(groups) if group.holds(answer))


def choose(answers: Sequence[Answer], domains: Sequence[str], groups: Sequence[Group], number: int) -> list[Answer]:
    """Examples by the rule at the top of this file; ``number`` of them unless there are fewer questions."""
    queues = {
        d: [[a for a in _shuffled(answers, d) if group_of(a, groups) == g] for g in range(len(groups))] for d in domains
    }
    next_group = {d: i for i, d in enumerate(domains)}
    chosen: list[Answer] = []
    while len(chosen) < number and any(any(q) for q in queues.values()):
        for domain in domains:
            for _ in groups:
                queue = queues[domain][next_group[domain] % len(groups)]
                next_group[domain] += 1
                if queue:
                    chosen.append(queue.pop(0))
                    break
    return chosen[:number]


def _shuffled(answers: Sequence[Answer], domain: str) -> list[Answer]:
    mine = [a for a in answers if a["domain"] == domain]
    return sorted(mine, key=lambda a: hashlib.sha256(str(a["id"]).encode()).hexdigest())


def example_html(answer: Answer, sample: Sample | None, modes: Mapping[str, str], outcome: str, frames: int = 5) -> str:
    """One question: frames, accepted answers, each mode's answer marked right or wrong, mixing weights.

    Args:
        answer: as in ``module.test_answers``.
        sample: where question and video come from; None where the data is not at hand.
        modes: names of the modes shown, by mode, in order.
        outcome: group it stands for.
        frames: pictures, evenly spread over the video.
    """
    question = (sample.question if sample is not None else None) or f"Question {answer['id']}"
    where = " · ".join(str(part) for part in (answer["domain"], answer["kind"], outcome) if part)
    lines = [f"<dt>accepted</dt><dd>{escape(accepted(answer['gold']))}</dd>"]
    for mode, name in modes.items():
        score = credit(answer, mode)
        style, mark = ("right", "✓") if score > 0 else ("wrong", "✗")
        partial = f" ({100 * score:.0f} %)" if 0 < score < 1 else ""
        text = f"{mark} {answer['answers'][mode]}{partial}"
        lines.append(f'<dt>{escape(name)}</dt><dd><span class="{style}">{escape(text)}</span></dd>')
    return (
        f'<article class="example"><div class="where">{escape(where)}</div>'
        f'<div class="question">{escape(question)}</div>{media_html(sample, frames)}'
        f'<dl class="answers">{"".join(lines)}</dl>{_weights(answer["weights"])}</article>'
    )


def evenly_spread(length: int, number: int) -> list[int]:
    """Middles of ``number`` equal stretches of ``length`` frames, each once."""
    number = min(number, length)
    return [(2 * i + 1) * length // (2 * number) for i in range(number)]


def accepted(gold: Mapping[str, float]) -> str:
    """The best four of some answers, with scores that are not whole."""
    best = sorted(gold.items(), key=lambda item: -item[1])[:4]
    return ", ".join(a if s >= 1 else f"{a} ({100 * s:.0f} %)" for a, s in best) or "none known"


def media_html(sample: Sample | None, number: int = 5) -> str:
    """The pictures of a sample, or some frames of its video; a note where they are not at hand or cannot be read."""
    if sample is None or (sample.video is None and not sample.has("image|images")):
        return '<p class="note">No video or picture file behind this question.</p>'
    try:
        if sample.video is not None:
            indices = evenly_spread(sample.video.num_frames, number)
            pictures = list(zip([f"frame {i}" for i in indices], sample.video.frames(indices)))
        else:
            images = sample.images or (sample.image,)
            pictures = [(f"picture {i}", pixels_of(image)) for i, image in enumerate(images, start=1)]
    except DataError as error:
        return f'<p class="note">The pictures could not be read: {escape(str(error))}</p>'
    return f'<div class="frames">{"".join(thumbnail_tag(picture, name) for name, picture in pictures)}</div>'


def _weights(weights: Mapping[str, float]) -> str:
    bars = "".join(
        f'<div class="weight"><span>{escape(name)}</span><span class="bar">'
        f'<i style="width:{100 * w:.1f}%"></i></span><span>{w:.2f}</span></div>'
        for name, w in sorted(weights.items(), key=lambda item: -item[1])[:4]
    )
    return f'<div class="weights">mixing weights{bars}</div>' if bars else ""
