"""``features``: extract features of videos and pictures once, and store them where DataModules look for them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import jsonargparse

from fulgurite.commands.building import Building, build
from fulgurite.commands.errors import BAD_INPUT, DONE, ConfigError
from fulgurite.commands.explain import explain
from fulgurite.commands.imports import EPILOG, PARSER_MODE, imports_allowed
from fulgurite.commands.invocation import Invocation
from fulgurite.commands.names import import_named
from fulgurite.commands.plain import PlainParser
from fulgurite.samples.errors import DataError

if TYPE_CHECKING:
    from fulgurite.samples.features import FeatureExtractor, FeatureStore, Media

DESCRIPTION = """Extract and store frame features; a call that was cut short goes on where it stopped. With the config
of an experiment (--config configs/quickstart.yaml, and any option of fit) it takes encoder, frames, files, store and
dtype from there, so that a fit with the same options finds all its features; of the options here --device,
--num_workers and --batch_frames then hold. Without one, name --videos and --encoder."""


@dataclass(frozen=True)
class Job:
    """What to extract and where to.

    Args:
        media: videos and pictures, in any order.
        extractor: encoder and frame rule.
        store: where features go.
        tolerant: whether files that cannot be read are no failure.
    """

    media: list[Media]
    extractor: FeatureExtractor
    store: FeatureStore
    tolerant: bool = False


def run(command: str, argv: list[str]) -> int:
    """Extract what the store does not hold yet; 2 if some files could not be read, after all others are
    done.
    """
    invocation = Invocation.of(command, argv)
    with imports_allowed(invocation.allow):
        import_named(invocation.typed, invocation.documents)
        if names_a_record(invocation):
            shared = _shared(PlainParser(prog="fulgurite features", description=DESCRIPTION))
            options, rest = shared.parse_known_args(invocation.typed)
            job = job_of_record(Invocation.of("fit", rest))
        else:
            options, job = job_of_flags(invocation)
    from fulgurite.samples.features import extract_features

    failed = extract_features(
        job.media,
        job.extractor.encoder.eval().to(device_named(options.device)),
        job.extractor.sampling,
        job.store,
        num_workers=options.num_workers,
        batch_frames=options.batch_frames,
        progress=_show,
    )
    print(f"{len(job.media) - len(failed)} of {len(job.media)} files have features in {job.store.path}")
    for each, error in failed.items():
        print(f"{each.path}: {error}", file=sys.stderr)
    return BAD_INPUT if failed and not job.tolerant else DONE


def names_a_record(invocation: Invocation) -> bool:
    """Whether a config or an option speaks of a model or of data, as those of ``fit`` do."""
    keys = {str(key).partition(".")[0] for document in invocation.documents for key in document}
    typed = (argument.partition("=")[0] for argument in invocation.typed if argument.startswith("--"))
    keys |= {name.removeprefix("--").rstrip("+").partition(".")[0] for name in typed}
    return bool(keys & {"model", "data"})


def job_of_record(invocation: Invocation) -> Job:
    """Every video and picture of the record's data, encoded as its module wants it, into its feature cache."""

    from fulgurite.commands.record import RecordCLI
    from fulgurite.datamodules.base import FulguriteDataModule, Split
    from fulgurite.samples.features import FeatureStore, media_of

    record = RecordCLI(invocation)
    data, ask = record.datamodule, getattr(record.model, "feature_extractor", None)
    extractor = None if ask is None else ask()
    if extractor is None:
        raise ConfigError(f"model: this {type(record.model).__name__} looks at no frames, so it needs no features")
    if not isinstance(data, FulguriteDataModule):
        raise ConfigError(f"data: {type(data).__name__} keeps no features; expected a DataModule of fulgurite")
    if data.feature_cache is None:
        raise ConfigError("data.feature_cache: not set, so that a fit would not look there; set --data.feature_cache")
    data.prepare_data()
    samples = [sample for split in get_args(Split) for sample in data.samples(split)]
    media = list(dict.fromkeys(each for sample in samples for each in media_of(sample)))
    if not media:
        raise ConfigError(f"data: {type(data).__name__} gives no files of videos or pictures with these options")
    if data.skipped:
        print(f"{len(data.skipped)} unusable rows are left out", file=sys.stderr)
    store = FeatureStore(data.feature_cache, data.feature_dtype)
    return Job(media, extractor, store, tolerant=data.on_bad == "skip")


def job_of_flags(invocation: Invocation) -> tuple[jsonargparse.Namespace, Job]:
    """The options, and the named files with the named encoder."""
    from fulgurite.samples.features import FeatureExtractor, FeatureStore
    from fulgurite.samples.video import Video

    parser = _parser()
    try:
        options = parser.parse_args(list(invocation.arguments))
    except (jsonargparse.ArgumentError, TypeError, ValueError) as error:
        raise explain(error, parser, invocation) from error
    with Building(options, invocation) as building:
        built = parser.instantiate(options, instantiators=[(building.through(build), object, True)])
    videos = [Video(path) for path in _video_files(options.videos)]
    store = FeatureStore(Path(options.store), options.dtype)
    return options, Job(videos, FeatureExtractor(built.encoder, built.sampling), store)


def _parser() -> jsonargparse.ArgumentParser:
    from fulgurite.backbones.frames import FrameEncoder
    from fulgurite.samples.sampling import FrameSampling

    parser = jsonargparse.ArgumentParser(
        prog="fulgurite features",
        description=DESCRIPTION,
        epilog=EPILOG,
        parser_mode=PARSER_MODE,
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("-c", "--config", action="config", help="YAML file with these options, or of an experiment")
    parser.add_argument("--videos", type=list[str], required=True, help="files and folders, as [a.mp4, folder]")
    parser.add_argument("--encoder", type=FrameEncoder, required=True, help="as TimmFrameEncoder")
    parser.add_argument("--sampling", type=FrameSampling, default=FrameSampling(), help="which frames")
    parser.add_argument("--store", type=str, default=".cache/features", help="folder, as data.feature_cache of a fit")
    parser.add_argument(
        "--dtype",
        type=Literal["float16", "float32"],
        default="float16",
        help="stored numbers, as data.feature_dtype of a fit",
    )
    return _shared(parser)


def _shared(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    parser.add_argument("--device", type=str, default="auto", help="of the encoder, as cuda:1; auto takes a GPU if any")
    parser.add_argument("--num_workers", type=int, default=2, help="decoding processes")
    parser.add_argument("--batch_frames", type=int, default=48, help="frames per forward pass")
    return parser


def device_named(name: str) -> str:
    """A device of torch: that name, or with ``auto`` a GPU if any. Raises ``ConfigError`` where there is none."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0]
        raise ConfigError(f"--device {name}: {reason}; expected auto, cpu or cuda") from error
    return name


def _video_files(named: list[str]) -> Iterator[Path]:
    from fulgurite.samples.video import SUFFIXES, video_files

    for name in named:
        path = Path(name)
        if path.is_dir():
            found = video_files(path)
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
