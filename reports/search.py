"""What a search found, with thumbnails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Protocol

from fulgurite.reports.page import Section
from fulgurite.reports.retrieval import frames_html
from fulgurite.samples import DataError, Video
from fulgurite.samples.features import video_key

THUMBNAILS = 4  # of each video


class Hit(Protocol):
    """A video that was found, see `fulgurite.modules.video_search.Hit`."""

    score: float
    levels: Mapping[str, float]
    key: str
    paths: Sequence[Path]


def section_of_query(query: str, levels: Sequence[str], hits: Sequence[Hit]) -> Section:
    """A card per video, best first: frames, scores, files.

    Args:
        query: heading.
        levels: names, for the note.
        hits: what was found.
    """
    made_of = "" if len(levels) == 1 else f", the mean of {', '.join(levels)}"
    note = f'<p class="note">Best first, by score{escape(made_of)}.</p>'
    cards = "".join(_card(rank, hit) for rank, hit in enumerate(hits, start=1))
    return Section(query, f'{note}<div class="examples">{cards}</div>')


def _card(rank: int, hit: Hit) -> str:
    levels = "" if len(hit.levels) == 1 else f" ({' · '.join(f'{score:.2f}' for score in hit.levels.values())})"
    files = "".join(f'<div class="where">{escape(str(path))}</div>' for path in hit.paths)
    return (
        f'<article class="example"><div class="question">{rank}. {hit.score:.2f}'
        f'<span class="note">{levels}</span></div><div class="frames">{_frames(hit)}</div>{files}</article>'
    )


def _frames(hit: Hit) -> str:
    """Of the first file that still has the content that was found; a note where none has."""
    problem = ""
    for path in hit.paths:
        video = Video(path)
        try:
            if video_key(video) == hit.key:
                return frames_html(video, THUMBNAILS)
            problem = problem or f"{path}: the file has changed since it was indexed"
        except DataError as error:
            problem = problem or str(error)
    return f'<p class="note">{escape(problem)}</p>'
