"""``search``: find videos of an index by what is said of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jsonargparse

from fulgurite.commands.errors import DONE, ConfigError
from fulgurite.commands.imports import PARSER_MODE
from fulgurite.commands.index import retrieval_module
from fulgurite.commands.options import parsed
from fulgurite.commands.tables import console, plain_table

if TYPE_CHECKING:
    from fulgurite.modules.video_search import Hit
    from fulgurite.samples.video_index import VideoIndex

DESCRIPTION = """Find videos of an index (fulgurite index) by what they show. All are ranked by the coarse level of the
model, and the best of them by all its levels."""


def run(command: str, argv: list[str]) -> int:
    """Search, print a table per query and write a page where wanted; returns the exit code.

    Raises:
        ConfigError, ValueError: an option is wrong, or the model is not the one of the index.
        DataError: a query is empty or too long.
        CheckpointError: model or index is damaged or missing.
    """
    options, allow = parsed(argv, parser_of)
    from fulgurite.checkpoints import write_text
    from fulgurite.modules.video_search import search_videos
    from fulgurite.samples.video_index import VideoIndex

    index = VideoIndex(Path(options.index))
    checkpoint = checkpoint_of(index, options.model)
    module = retrieval_module(checkpoint, allow, options.device)
    found = search_videos(module, index, options.queries, options.top, options.candidates)
    out = console()
    for query, hits in zip(options.queries, found):
        out.print(table(query, module.head.levels, hits))
    if options.top > len(index):
        out.print(f"The index has {len(index)} videos: all are shown.")
    if options.report is not None:
        one_stage = len(module.head.levels) == 1 or options.candidates >= len(index)
        ranked = "all videos" if one_stage else f"the best {options.candidates} by {module.head.levels[0]}"
        facts = {
            "index": str(index.path.absolute()),
            "videos": f"{len(index):,}",
            "ranked by all levels": ranked,
            "model": str(checkpoint.absolute()),
            "digest": index.origin.digest,
        }
        write_text(options.report, page(options.queries, module.head.levels, found, facts))
        out.print(f"report: {options.report}", soft_wrap=True)
    return DONE


def parser_of() -> jsonargparse.ArgumentParser:
    """Options of the command."""
    parser = jsonargparse.ArgumentParser(
        prog="fulgurite search",
        description=DESCRIPTION,
        exit_on_error=False,
        parser_mode=PARSER_MODE,
        allow_abbrev=False,
    )
    parser.add_argument("queries", type=str, nargs="+", metavar="QUERY", help="what videos show, each in quotes")
    parser.add_argument("--index", type=str, required=True, help="folder that fulgurite index made")
    parser.add_argument("--top", type=int, default=10, help="videos per query")
    parser.add_argument("--candidates", type=int, default=100, help="videos that all levels are computed of")
    parser.add_argument("--report", type=str | None, default=None, help="HTML page to write, with thumbnails")
    parser.add_argument("--model", type=str | None, default=None, help="the index's checkpoint, where it was moved")
    parser.add_argument("--device", type=str, default="auto", help="as cuda:1; auto takes a GPU if any")
    parser.add_argument("--allow", type=str | None, default=None, help="prefix that class paths may come from")
    return parser


def checkpoint_of(index: VideoIndex, named: str | None) -> Path:
    """The checkpoint that made an index, where it lay or where it is said to lie now.

    Raises:
        ConfigError: it is not there, or another one is.
    """
    from fulgurite.checkpoints import read_manifest
    from fulgurite.commands.runs import checkpoint_at

    if named is None and not os.path.lexists(index.origin.checkpoint):
        raise ConfigError(
            f"{index.path} was made by {index.origin.checkpoint}, which is no longer there: name its place by --model"
        )
    checkpoint = checkpoint_at(named or index.origin.checkpoint, "--model")
    digest = read_manifest(checkpoint).digest
    if digest != index.origin.digest:
        raise ConfigError(
            f"--model {checkpoint} has the digest {digest}, but {index.path} was made by a checkpoint with "
            f"{index.origin.digest}: name that one by --model, or make a new index"
        )
    return checkpoint


def table(query: str, levels: Sequence[str], hits: Sequence[Hit]) -> object:
    """For the terminal; files of equal content share a row."""
    shown = plain_table(query, "rank", "score", *levels, "video")
    for rank, hit in enumerate(hits, start=1):
        numbers = (hit.score, *hit.levels.values())
        shown.add_row(str(rank), *(f"{number:.3f}" for number in numbers), "\n".join(map(str, hit.paths)))
    return shown


def page(queries: Sequence[str], levels: Sequence[str], found: Sequence[Sequence[Hit]], facts: dict[str, str]) -> str:
    """The report as HTML."""
    from fulgurite.reports.page import render_page
    from fulgurite.reports.search import section_of_query

    sections = [section_of_query(query, levels, hits) for query, hits in zip(queries, found)]
    number = f"{len(queries)} queries" if len(queries) > 1 else "1 query"
    return render_page("Video search", f"{number} among {facts['videos']} videos", sections, facts)
