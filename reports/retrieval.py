"""Sections on video-text retrieval: recalls by level and normalisation, and examples with pictures.

Pure functions of what a module keeps of its test.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fulgurite.reports.images import thumbnail_tag
from fulgurite.reports.page import Section
from fulgurite.reports.tables import html_table, plain_table
from fulgurite.samples import DataError, Sample, Video

DIRECTIONS = {"text_to_video": "t2v", "video_to_text": "v2t"}
FIGURES = ("R@1", "R@5", "R@10", "MdR", "MnR")
# What an example stands for: the best rank and its name, in the order in which they take turns.
OUTCOMES = ((1, "found first"), (5, "among the first five"), (10, "among the first ten"), (math.inf, "further down"))
EXAMPLES = 8


def sections_of_retrieval(
    results: Mapping[str, Any], answers: Sequence[Mapping[str, Any]], samples: Sequence[Sample]
) -> list[Section]:
    """The table of variants, and examples.

    Args:
        results: ``variants`` (figures by name, by variant), ``levels``, ``normalizer``, ``mode``, ``videos``,
            ``captions``, ``domains``.
        answers: one row per caption: ``id`` and ``domain`` of its video, ``caption``, ``rank``, ``top``.
        samples: the videos themselves; may be empty.
    """
    header = ["", *(f"{name} {figure}" for name in DIRECTIONS.values() for figure in FIGURES)]
    rows = [[_label(variant, results), *_cells(figures)] for variant, figures in results["variants"].items()]
    rows.append(["chance", *_chance(results["videos"]) * len(DIRECTIONS)])
    title = f"Recall in % and ranks of {results['captions']} captions and {results['videos']} videos"
    note = f"<p>{escape(_note(results))}</p>"
    table = Section(title, note + html_table(header, rows), printed=plain_table(title, header, rows, _legend(results)))
    return [table, *_of_domains(results), Section("Examples", examples_html(answers, samples))]


def _of_domains(results: Mapping[str, Any]) -> list[Section]:
    """R@1 of the texts and videos of each domain, where there are several."""
    domains = results["domains"]
    if len(domains) < 2:
        return []
    header = ["R@1, %", *(f"{name} {domain}" for name in DIRECTIONS.values() for domain in domains)]
    rows = [
        [
            _label(variant, results),
            *(f"{figures[f'{way}/R@1/{domain}']:.1f}" for way in DIRECTIONS for domain in domains),
        ]
        for variant, figures in results["variants"].items()
    ]
    title = "By domain of the query, among the candidates of all domains"
    return [Section(title, html_table(header, rows), printed=plain_table(title, header, rows))]


def _label(variant: str, results: Mapping[str, Any]) -> str:
    """A variant with the numbers of its levels in place of their names; one that has other names as it is."""
    for number, level in enumerate(results["levels"], start=1):
        variant = re.sub(rf"(^|\+){level}(?=\+|$)", rf"\g<1>{number}", variant)
    return variant.replace("+normalized", ", normalised").replace("+", " + ")


def _cells(figures: Mapping[str, float]) -> list[str]:
    return [f"{figures[f'{direction}/{figure}']:.1f}" for direction in DIRECTIONS for figure in FIGURES]


def _chance(candidates: int) -> list[str]:
    recalls = [100 * min(k / candidates, 1) for k in (1, 5, 10)]
    return [f"{value:.1f}" for value in (*recalls, (candidates + 1) / 2, (candidates + 1) / 2)]


def _legend(results: Mapping[str, Any]) -> str:
    """What the rows are called by."""
    if any(name.endswith("*") for name in results["variants"]):
        return "* is the configured mode."
    levels = ", ".join(f"{number} {level}" for number, level in enumerate(results["levels"], start=1))
    return f"Levels: {levels}."


def _note(results: Mapping[str, Any]) -> str:
    error = 50 / math.sqrt(results["captions"])
    text = (
        f"{_legend(results)} t2v: the video of a text, v2t: a text of a video. A row scores by the mean of its levels; "
        "all rows are of one model. Ranks count from 1, equal scores half. "
        f"A recall of 50 % has a standard error of {error:.1f} points here."
    )
    if results["normalizer"] is None:
        return text
    kind = {
        "single-query": "by a bank of training queries, so that a query can be scored alone",
        "transductive": "by the test queries themselves: figures of single queries are no measure for it",
    }[results["mode"]]
    return f"{text} Normalised rows: {results['normalizer']}, {kind}."


def chosen(answers: Sequence[Mapping[str, Any]], number: int = EXAMPLES) -> list[tuple[str, Mapping[str, Any]]]:
    """Examples and their outcomes: those of each outcome in the order of their digests, the outcomes taking turns."""
    queues: dict[str, list[Mapping[str, Any]]] = {name: [] for _, name in OUTCOMES}
    for answer in sorted(answers, key=_digest):
        queues[next(name for best, name in OUTCOMES if answer["rank"] <= best)].append(answer)
    found: list[tuple[str, Mapping[str, Any]]] = []
    while len(found) < number and any(queues.values()):
        found += [(name, queue.pop(0)) for name, queue in queues.items() if queue]
    return found[:number]


def _digest(answer: Mapping[str, Any]) -> str:
    return hashlib.sha256(f"{answer['domain']}/{answer['id']}/{answer['caption']}".encode()).hexdigest()


def examples_html(answers: Sequence[Mapping[str, Any]], samples: Sequence[Sample]) -> str:
    """Captions with the frames of their own video, and a frame of each of the best videos."""
    videos = {(sample.domain, sample.id): sample.video for sample in samples}
    parts = []
    for outcome, answer in chosen(answers):
        own = (answer["domain"], answer["id"])
        found = "".join(
            _figure(videos.get((hit["domain"], hit["id"])), place, hit["score"], (hit["domain"], hit["id"]) == own)
            for place, hit in enumerate(answer["top"], start=1)
        )
        parts.append(
            f'<article class="example"><div class="where">{escape(str(answer["domain"]))} · {escape(outcome)}, rank '
            f'{answer["rank"]:g}</div><div class="question">{escape(answer["caption"])}</div>'
            f'<div class="where">its video</div><div class="frames">{frames_html(videos.get(own), 5)}</div>'
            f'<div class="where">the best videos</div><div class="frames">{found}</div></article>'
        )
    return f'<div class="examples">{"".join(parts)}</div>' if parts else ""


def _figure(video: Video | None, place: int, score: float, right: bool) -> str:
    style, mark = ("right", "✓") if right else ("wrong", "✗")
    return (
        f"<figure>{frames_html(video, 1)}"
        f'<figcaption><span class="{style}">{mark}</span> {place}. {score:.2f}</figcaption></figure>'
    )


def frames_html(video: Video | None, number: int) -> str:
    """Some frames of a video, evenly spread; a note where it is not at hand or cannot be read."""
    if video is None:
        return '<p class="note">no video file</p>'
    try:
        length = video.num_frames
        indices = sorted({(2 * i + 1) * length // (2 * number) for i in range(number)})
        frames = video.frames(indices)
    except DataError as error:
        return f'<p class="note">{escape(str(error))}</p>'
    return "".join(thumbnail_tag(frame, f"frame {i}") for i, frame in zip(indices, frames))
