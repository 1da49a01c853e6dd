"""``index``: embed the videos below a folder by a trained model, so that ``search`` finds them by what they show."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import jsonargparse

from fulgurite.commands.errors import DONE, ConfigError
from fulgurite.commands.imports import PARSER_MODE
from fulgurite.commands.options import parsed

if TYPE_CHECKING:
    from fulgurite.modules.video_indexing import Indexed
    from fulgurite.modules.video_text_retrieval import VideoTextRetrieval

DESCRIPTION = """Embed the videos below a folder and store what fulgurite search compares. A call that was cut short
goes on where it stopped; a later one adds what is new, finds files that were moved, and drops those that are gone."""


def run(command: str, argv: list[str]) -> int:
    """Bring an index up to date; returns the exit code.

    Raises:
        ConfigError: an option is wrong, or the model compares no videos with texts.
        DataError: no videos, or an unreadable one.
        CheckpointError: model or index is damaged, or the index is another model's.
    """
    options, allow = parsed(argv, parser_of)
    from fulgurite.checkpoints import read_manifest
    from fulgurite.commands.runs import checkpoint_at
    from fulgurite.modules.video_indexing import index_videos
    from fulgurite.samples.video_index import Origin

    checkpoint = checkpoint_at(options.model, "--model")
    origin = Origin(read_manifest(checkpoint).digest, str(checkpoint.absolute()), options.dtype)
    found = index_videos(
        retrieval_module(checkpoint, allow, options.device),
        Path(options.folder),
        Path(options.out),
        origin,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
        on_bad=options.on_bad,
        progress=show_progress,
    )
    show(options.out, found)
    return DONE


def parser_of() -> jsonargparse.ArgumentParser:
    """Options of the command."""
    parser = jsonargparse.ArgumentParser(
        prog="fulgurite index",
        description=DESCRIPTION,
        exit_on_error=False,
        parser_mode=PARSER_MODE,
        allow_abbrev=False,
    )
    parser.add_argument("folder", type=str, help="with videos, at any depth")
    parser.add_argument("--model", type=str, required=True, help="run or checkpoint of a VideoTextRetrieval")
    parser.add_argument("--out", type=str, required=True, help="the index: a new folder, or one to bring up to date")
    parser.add_argument("--batch_size", type=int, default=16, help="videos per forward pass")
    parser.add_argument("--num_workers", type=int, default=2, help="decoding processes")
    parser.add_argument("--dtype", type=Literal["float16", "float32"], default="float16", help="stored numbers")
    parser.add_argument(
        "--on_bad", type=Literal["error", "skip"], default="error", help="a video that cannot be read: stop, or go on"
    )
    parser.add_argument("--device", type=str, default="auto", help="as cuda:1; auto takes a GPU if any")
    parser.add_argument("--allow", type=str | None, default=None, help="prefix that class paths may come from")
    return parser


def retrieval_module(checkpoint: Path, allow: tuple[str, ...], device: str) -> VideoTextRetrieval:
    """The module of a checkpoint, on its device. Raises ConfigError for one that does something else."""
    from fulgurite.commands.features import device_named
    from fulgurite.commands.loading import load
    from fulgurite.modules.video_text_retrieval import VideoTextRetrieval

    device, module = device_named(device), load(checkpoint, allow)
    if not isinstance(module, VideoTextRetrieval):
        raise ConfigError(f"--model {checkpoint}: a {type(module).__name__}; expected a VideoTextRetrieval")
    return module.to(device)


def show(out: str, found: Indexed) -> None:
    """Say what the index holds, what is new, and what was left out or is gone."""
    print(f"{found.files} files of {found.videos} videos in {out}, {found.computed} of them new")
    for old, new in found.moved.items():
        print(f"moved: {old} is {new}")
    for path in found.gone:
        print(f"gone: {path}")
    if found.skipped:
        print(f"{len(found.skipped)} files cannot be read and are left out", file=sys.stderr)
    for error in found.skipped.values():
        print(error, file=sys.stderr)


def show_progress(done: int, total: int) -> None:
    """One line of stderr that counts videos."""
    print(f"videos {done}/{total}", end="\n" if done == total else "\r", file=sys.stderr, flush=True)
