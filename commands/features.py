"""``features``: extract frame features of videos once, and store them where DataModules look for them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import jsonargparse

from fulgurite.commands.errors import BAD_INPUT, DONE, ConfigError
from fulgurite.commands.explain import explain
from fulgurite.commands.imports import EPILOG, PARSER_MODE, imports_allowed
from fulgurite.commands.invocation import Invocation
from fulgurite.commands.names import import_named
from fulgurite.samples.errors import DataError

SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".gif", ".mpg", ".mpeg")


def run(command: str, argv: list[str]) -> int:
    """Extract what the store does not hold yet; 2 if some videos could not be read, after all others are
    done.
    """
    from fulgurite.samples.features import FeatureStore, extract_features
    from fulgurite.samples.video import Video

    invocation = Invocation.of(command, argv)
    with imports_allowed(invocation.allow):
        import_named(invocation.typed, invocation.documents)
        parser = _parser()
        try:
            options = parser.parse_args(list(invocation.arguments))
            built = parser.instantiate_classes(options)
        except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
            raise explain(error, parser, invocation) from error
    videos = [Video(path) for path in _video_files(options.videos)]
    failed = extract_features(
        videos,
        built.encoder.eval(),
        built.sampling,
        FeatureStore(Path(options.store), options.dtype),
        num_workers=options.num_workers,
        batch_frames=options.batch_frames,
        progress=_show,
    )
    print(f"{len(videos) - len(failed)} of {len(videos)} videos have features in {options.store}")
    for video, error in failed.items():
        print(f"{video.path}: {error}", file=sys.stderr)
    return BAD_INPUT if failed else DONE


def _parser() -> jsonargparse.ArgumentParser:
    from fulgurite.backbones.frames import FrameEncoder
    from fulgurite.samples.sampling import FrameSampling

    parser = jsonargparse.ArgumentParser(
        prog="fulgurite features",
        description="Extract and store frame features; a call that was cut short goes on where it stopped.",
        epilog=EPILOG,
        parser_mode=PARSER_MODE,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with these options")
    parser.add_argument("--videos", type=list[str], required=True, help="files and folders, as [a.mp4, folder]")
    parser.add_argument("--encoder", type=FrameEncoder, required=True, help="as TimmFrameEncoder")
    parser.add_argument("--sampling", type=FrameSampling, default=FrameSampling(), help="which frames")
    parser.add_argument("--store", type=str, default=".cache/features", help="folder of the stored features")
    parser.add_argument("--dtype", type=Literal["float16", "float32"], default="float16", help="stored numbers")
    parser.add_argument("--num_workers", type=int, default=2, help="decoding processes")
    parser.add_argument("--batch_frames", type=int, default=48, help="frames per forward pass")
    return parser


def _video_files(named: list[str]) -> Iterator[Path]:
    for name in named:
        path = Path(name)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
            if not found:
                raise DataError(f"--videos {name}: no file ending in {', '.join(SUFFIXES)}")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise ConfigError(f"--videos {name}: no such file or folder")


def _show(done: int, total: int) -> None:
    end = "\n" if done == total else "\r"
    print(f"features {done}/{total}", end=end, file=sys.stderr, flush=True)
