"""Embed the videos below a folder once, and keep what a head compares of them, for search."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch.utils.data import DataLoader, Dataset

from fulgurite.checkpoints import remove_leftovers, writing
from fulgurite.methods.retrieval.features import VideoFeatures
from fulgurite.modules.video_text_retrieval import VideoTextRetrieval
from fulgurite.samples import Batch, Collator, DataError, Sample, Video
from fulgurite.samples.features import video_key
from fulgurite.samples.video import SUFFIXES, video_files
from fulgurite.samples.video_index import Listing, Origin, Shards, read_listing, require_index

SHARD_VIDEOS = 256


@dataclass
class Indexed:
    """What a run found and did.

    Attributes:
        files: listed now.
        videos: of different content among them.
        computed: of these in this run.
        moved: old to new path of files whose content lies elsewhere now.
        gone: files that were listed, and whose content is no longer there.
        skipped: file to what is wrong with it.
    """

    files: int = 0
    videos: int = 0
    computed: int = 0
    moved: dict[str, str] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


def index_videos(
    module: VideoTextRetrieval,
    folder: Path,
    out: Path,
    origin: Origin,
    batch_size: int = 16,
    num_workers: int = 0,
    on_bad: Literal["error", "skip"] = "error",
    progress: Callable[[int, int], None] | None = None,
    shard_videos: int = SHARD_VIDEOS,
) -> Indexed:
    """Bring the index ``out`` up to date with the videos below ``folder``.

    What is stored already is not computed again, whatever its file is called now. Files of other folders stay listed
    while they are there. Killed and run again, it makes the same shards as a run that was not: videos come in order of
    their paths, in the same batches. Peak memory: one batch of frames, those that workers hold ready, and one shard.

    Args:
        module: in evaluation mode, on its device.
        folder: holds videos, at any depth.
        out: the index, or a new folder.
        origin: what ``module`` was loaded from, and the type to store.
        batch_size: videos per forward pass.
        num_workers: decoding processes; 0 decodes here.
        on_bad: whether a video that cannot be read stops the run or is left out.
        progress: called with (videos done, videos to do).
        shard_videos: of one shard, at most; as many whole batches as fit.

    Raises:
        DataError: no videos there, or an unreadable one.
        CheckpointError: the index was made by another model, is damaged, or is being written by another process.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: at least 1")
    found = video_files(folder)
    if not found:
        there = f"no file ending in {', '.join(SUFFIXES)}" if folder.is_dir() else "no such folder"
        raise DataError(f"{folder}: {there}")
    require_index(out)
    with writing(out):
        remove_leftovers(out)
        shards, before = Shards(out), read_listing(out)
        if shards.origin is not None:
            shards.origin.require(origin, out)
        result = Indexed()
        files, first = _digests(found, on_bad, result.skipped)
        todo = [(key, path) for key, path in first.items() if key not in shards]
        writer = _Writer(shards, origin, max(shard_videos // batch_size, 1) * batch_size)
        for keys, features in _embedded(module, todo, batch_size, num_workers, on_bad, result.skipped, progress):
            result.computed += len(keys)
            writer.add(keys, features)
        writer.flush()
        listed = {path: key for path, key in files.items() if key in shards}
        for path in files.keys() - listed.keys() - result.skipped.keys():
            result.skipped[path] = f"{path}: its content is that of {first[files[path]]}, which cannot be read"
        listing = _updated(before or Listing(), listed, folder, result)
        if listing != before:
            shards.list_files(listing, origin)
    return result


def _digests(
    found: Sequence[Path], on_bad: Literal["error", "skip"], skipped: dict[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Absolute path to digest of content, and digest to the first such path."""
    files: dict[str, str] = {}
    for path in found:
        name = os.path.abspath(path)
        try:
            name.encode()
            files[name] = video_key(Video(Path(name)))
        except UnicodeEncodeError:
            text = f"{name!r}: the name is not UTF-8, so that it cannot be listed; rename the file"
            _leave_out(repr(name), text, on_bad, skipped)
        except DataError as error:
            _leave_out(name, str(error), on_bad, skipped)
    first: dict[str, str] = {}
    for name, key in files.items():
        first.setdefault(key, name)
    return files, first


def _leave_out(name: str, error: str, on_bad: Literal["error", "skip"], skipped: dict[str, str]) -> None:
    if on_bad == "error":
        raise DataError(f"{error}. To leave such videos out: --on_bad skip")
    skipped[name] = error


class _Decoding(Dataset):
    """Each video as a batch of one; a video that fails comes back as the text of its error."""

    def __init__(self, paths: Sequence[str], collator: Collator) -> None:
        self.paths, self.collator = paths, collator

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Batch | str:
        path = self.paths[index]
        try:
            batch = self.collator([Sample(path, "index", task="retrieval", video=Video(Path(path)))])
        except DataError as error:
            return str(error)
        return {name: batch[name] for name in ("pixels", "frame_mask")}


@torch.no_grad()
def _embedded(
    module: VideoTextRetrieval,
    todo: Sequence[tuple[str, str]],
    batch_size: int,
    num_workers: int,
    on_bad: Literal["error", "skip"],
    skipped: dict[str, str],
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[list[str], VideoFeatures]]:
    """Digests and features of the readable videos, ``batch_size`` at a time and the rest at last."""
    loader = DataLoader(
        _Decoding([path for _, path in todo], module.collator("predict")),
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),
    )
    keys: list[str] = []
    waiting: list[Batch] = []
    for number, ((key, path), batch) in enumerate(zip(todo, loader), start=1):
        if isinstance(batch, str):
            _leave_out(path, batch, on_bad, skipped)
        else:
            keys.append(key)
            waiting.append(batch)
        if waiting and (len(waiting) == batch_size or number == len(todo)):
            yield keys, _embed(module, waiting)
            keys, waiting = [], []
        if progress is not None:
            progress(number, len(todo))


def _embed(module: VideoTextRetrieval, batches: Sequence[Batch]) -> VideoFeatures:
    lengths = {batch["pixels"].shape[1] for batch in batches}
    if len(lengths) > 1:
        raise DataError(
            f"the model looks at {sorted(lengths)} frames of these videos, and an index takes the same number of all: "
            "train with backbone.init_args.num_frames above 0"
        )
    batch = {name: torch.cat([each[name] for each in batches]).to(module.device) for name in batches[0]}
    return module.embed_videos(batch).map(lambda each: each.cpu())


class _Writer:
    """Collects features to whole shards."""

    def __init__(self, shards: Shards, origin: Origin, size: int) -> None:
        self.shards, self.origin, self.size = shards, origin, size
        self.keys: list[str] = []
        self.parts: list[VideoFeatures] = []

    def add(self, keys: Sequence[str], features: VideoFeatures) -> None:
        self.keys += keys
        self.parts.append(features)
        if len(self.keys) >= self.size:
            self.flush()

    def flush(self) -> None:
        if self.keys:
            self.shards.add(self.keys, VideoFeatures.cat(self.parts), self.origin)
            self.keys, self.parts = [], []


def _updated(before: Listing, listed: dict[str, str], folder: Path, result: Indexed) -> Listing:
    """The new listing; fills in what became of the files of the old one."""
    root = Path(os.path.abspath(folder))
    others = {path: key for path, key in before.files.items() if not Path(path).is_relative_to(root)}
    kept = {path: key for path, key in others.items() if os.path.isfile(path)}
    files = dict(sorted((kept | listed).items()))
    homes = {key: path for path, key in reversed(files.items())}
    for path, key in before.files.items():
        if path not in files and key in homes:
            result.moved[path] = homes[key]
        elif path not in files and path not in result.skipped:
            result.gone.append(path)
    skipped = {path: error for path, error in before.skipped.items() if not Path(path).is_relative_to(root)}
    result.files, result.videos = len(files), len(homes)
    return Listing(files, dict(sorted((skipped | result.skipped).items())))
