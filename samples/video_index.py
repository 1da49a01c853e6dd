"""What a head compares of videos, stored once for search, and where the files of these videos lie.

    INDEX/shard-00000, ...   features of some videos, stacked, and the digests of their contents
    INDEX/listing            paths of files, and the digest of the content of each

Each is a digested folder that is written at once. A listing is replaced when a run ends; shards are only added, so what
a crash leaves is whole shards, with which the next run goes on. Videos are known by the digest of their content.

Legend: V videos, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fulgurite.checkpoints import (
    DamagedError,
    MismatchError,
    MissingError,
    RefusedError,
    load_document,
    load_tensors,
    read_manifest,
    save_checkpoint_folder,
)
from fulgurite.checkpoints.atomic import resolve
from fulgurite.methods.retrieval.features import VideoFeatures
from fulgurite.samples.errors import DataError
from fulgurite.samples.features import DTYPES

LISTING, SHARD = "listing", "shard-"


@dataclass(frozen=True)
class Origin:
    """What features of an index depend on besides the video.

    Args:
        digest: of the checkpoint that embeds, see `Manifest.digest`.
        checkpoint: where it lay; of no consequence for the features.
        dtype: of the stored numbers, ``"float16"`` or ``"float32"``.
    """

    digest: str
    checkpoint: str = field(compare=False)
    dtype: str = "float16"

    def require(self, other: Origin, where: Path) -> None:
        """Raise `MismatchError` if ``other`` is not what the index ``where`` was made by."""
        if other.digest != self.digest:
            raise MismatchError(
                f"{where} was made by {self.checkpoint} ({self.digest}), not by {other.checkpoint} ({other.digest}): "
                "features of two models cannot be compared. Give that checkpoint as --model, or another --out"
            )
        if other.dtype != self.dtype:
            raise MismatchError(f"{where} holds {self.dtype}, not {other.dtype}: set --dtype {self.dtype}")


@dataclass(frozen=True)
class Listing:
    """Which files an index knows.

    Args:
        files: absolute path to digest of content, in order of paths.
        skipped: absolute path to what was wrong with it, of files that were left out.
    """

    files: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)


class Shards:
    """All features in a folder, mapped into memory, every byte verified.

    Args:
        path: the index; may be missing.

    Raises:
        DamagedError: a shard is damaged; names the file, and what to do.
        MismatchError: shards of several models, or of other shapes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.origin: Origin | None = None
        self.names: list[str] = []
        self.parts: list[VideoFeatures] = []
        self.places: dict[str, tuple[int, int]] = {}  # digest of content to shard and row
        for folder in sorted(path.glob(f"{SHARD}*")) if path.is_dir() else []:
            self._take(folder)

    def _take(self, folder: Path) -> None:
        try:
            part = VideoFeatures.from_tensors(load_tensors(folder, "features"))
            keys = load_document(folder, "videos")
            origin = origin_of(folder)
        except (DamagedError, MissingError) as error:
            advice = f"Remove {folder} and run fulgurite index again: what it held is computed anew"
            raise DamagedError(f"{error} {advice}") from error
        if self.origin is None:
            self.origin = origin
        self.origin.require(origin, folder)
        first = self.parts[0] if self.parts else part
        if _shapes(part) != _shapes(first):
            raise MismatchError(f"{folder} holds features {_shapes(part)}, {self.names[0]} holds {_shapes(first)}")
        for row, key in enumerate(keys):
            self.places.setdefault(key, (len(self.parts), row))
        self.names.append(folder.name)
        self.parts.append(part)

    def __contains__(self, key: object) -> bool:
        return key in self.places

    def add(self, keys: Sequence[str], features: VideoFeatures, origin: Origin) -> None:
        """Store features (V, ...) of videos as one more shard. One process may do so at a time.

        Raises:
            DataError: they are not finite in the type of ``origin``.
        """
        name = f"{SHARD}{1 + max((int(name.removeprefix(SHARD)) for name in self.names), default=-1):05d}"
        stored = features.map(lambda each: each.to(DTYPES[origin.dtype]) if each.is_floating_point() else each)
        for what, tensor in stored.tensors().items():
            good = torch.isfinite(tensor).flatten(1).all(1)
            if not good.all():
                raise DataError(
                    f"features ({what}) of the video with digest {keys[int((~good).nonzero()[0])]} are not finite in "
                    f"{origin.dtype}" + ("; set --dtype float32" if origin.dtype == "float16" else "")
                )
        self._save(name, {"features": stored.tensors()}, list(keys), origin, {"videos": len(keys)})
        self._take(self.path / name)

    def _save(
        self, name: str, tensors: Mapping[str, Any], videos: Any, origin: Origin, facts: Mapping[str, Any]
    ) -> None:
        save_checkpoint_folder(
            self.path / name,
            tensors,
            {"videos": videos},
            parents=[{"path": origin.checkpoint, "digest": origin.digest}],
            settings={"index": asdict(origin)},
            facts=facts,
        )

    def list_files(self, listing: Listing, origin: Origin) -> None:
        """Replace the listing."""
        holds = f"names of {len(listing.files)} files of {len(set(listing.files.values()))} videos"
        self._save(LISTING, {}, asdict(listing), origin, {"holds": holds})


class VideoIndex:
    """A finished index for search.

    Attributes:
        origin: what made it.
        keys: digest of content of each video that has a file, in order of their features.
        paths: by digest, the files of that content, sorted.

    Args:
        path: the folder.

    Raises:
        MissingError: no index there, an unfinished one, or shards are gone.
        DamagedError: bytes are not as they were written; names the file.
        MismatchError: see `Shards`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shards = Shards(path)
        listing = read_listing(path)
        if listing is None:
            there = "its making was cut short" if self.shards.names else "no index there"
            raise MissingError(f"{path}: {there}; run fulgurite index FOLDER --model MODEL --out {path}")
        self.paths: dict[str, list[Path]] = {}
        for file, key in listing.files.items():
            self.paths.setdefault(key, []).append(Path(file))
        lost = [file for file, key in listing.files.items() if key not in self.shards]
        if lost:
            raise MissingError(
                f"{path}: no shard has the features of {len(lost)} of {len(listing.files)} listed files, {lost[0]} "
                "among them; run fulgurite index again, which computes what is missing"
            )
        if not listing.files:
            raise MissingError(f"{path}: the index lists no video; run fulgurite index on a folder that has some")
        self.origin: Origin = self.shards.origin
        self.origin.require(origin_of(path / LISTING), path)
        self._rows = [[] for _ in self.shards.parts]
        self.keys: list[str] = []
        for key, (shard, row) in sorted(self.shards.places.items(), key=lambda item: item[1]):
            if key in self.paths:
                self._rows[shard].append(row)
                self.keys.append(key)

    def __len__(self) -> int:
        return len(self.keys)

    def coarse_blocks(self) -> Iterator[Tensor]:
        """(V, D) vectors of all videos, shard by shard, in order of `keys`, as they are stored."""
        for part, rows in zip(self.shards.parts, self._rows):
            yield part.video if len(rows) == len(part) else part.video[rows]

    def features(self, columns: Tensor) -> VideoFeatures:
        """All features of some videos, by their places in `keys` (V,), as float32."""
        places = [self.shards.places[self.keys[column]] for column in columns.tolist()]
        rows = [self.shards.parts[shard][row : row + 1] for shard, row in places]
        return VideoFeatures.cat(rows).map(lambda each: each.float() if each.is_floating_point() else each)


def read_listing(path: Path) -> Listing | None:
    """The listing of an index; None where there is none.

    Raises:
        DamagedError: bytes are not as they were written.
    """
    if not resolve(path / LISTING).is_dir():
        return None
    try:
        return Listing(**load_document(path / LISTING, "videos"))
    except (DamagedError, MissingError) as error:
        advice = f"Remove {path / LISTING} and run fulgurite index again: the features stay"
        raise DamagedError(f"{error} {advice}") from error


def require_index(path: Path) -> None:
    """Raise `RefusedError` if a folder holds something that is no part of an index."""
    entries = sorted(path.iterdir()) if path.is_dir() else [path] if path.exists() else []
    for entry in entries:
        if not entry.name.startswith((SHARD, LISTING, ".")):
            raise RefusedError(f"{path} holds {entry.name}, which is no part of an index; give an empty or new --out")


def origin_of(folder: Path) -> Origin:
    """What made a part of an index."""
    settings = read_manifest(folder).settings
    if "index" not in settings:
        raise RefusedError(f"{folder} is no part of an index: it was made by another command; give another --out")
    return Origin(**settings["index"])


def _shapes(part: VideoFeatures) -> dict[str, tuple[int, ...]]:
    """Of one video."""
    return {name: tuple(tensor.shape[1:]) for name, tensor in part.tensors().items()}
