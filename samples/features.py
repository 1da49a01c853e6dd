"""Features of frames and pictures on disk: computed once per encoder, rule and file, read by mapping.

A store is a folder with one folder per (encoder, frame rule, type), and in it shards, each a digested
checkpoint folder written at once. What a crash leaves behind is whole shards, so an extraction goes on with
the files that miss. Videos and pictures are known by the digest of their content: a moved or renamed file keeps
its features. A picture is a video of one frame, whatever the rule.

Legend: F frames of a video, 1 of a picture, P tokens of a frame, D width.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fulgurite.checkpoints.atomic import is_leftover
from fulgurite.checkpoints.digest import digest_of_file, digest_of_json
from fulgurite.checkpoints.manifest import read_manifest
from fulgurite.checkpoints.store import load_tensors, save_checkpoint_folder
from fulgurite.samples.errors import DataError
from fulgurite.samples.picture import Picture
from fulgurite.samples.sample import Sample
from fulgurite.samples.sampling import FrameSampling
from fulgurite.samples.video import Video

Media = Video | Picture
SHARD_BYTES = 32 << 20
DTYPES = {"float16": torch.float16, "float32": torch.float32}


class Encoder(Protocol):
    """What turns frames into features; `fulgurite.backbones.frames.FrameEncoder` is one."""

    name: str
    transform: Callable[[Tensor], Tensor]

    @property
    def fingerprint(self) -> str:
        """Digest of weights and settings."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """(N, 3, H, W) to (N, P, D)."""
        ...


@dataclass(frozen=True)
class FeatureExtractor:
    """What a module wants to be stored per video or picture.

    Args:
        encoder: frames to tokens.
        sampling: which frames.
    """

    encoder: Any
    sampling: FrameSampling


class StoredFeatures(Mapping[str, Tensor]):
    """The ``features`` of a sample, read when asked for: by encoder name those of one file or, with several keys, of
    several files one after the other.

    Args:
        places: (reader, key, ...) by encoder name.
    """

    def __init__(self, places: Mapping[str, tuple[Any, ...]]) -> None:
        self.places = dict(places)

    def __getitem__(self, name: str) -> Tensor:
        reader, *keys = self.places[name]
        return reader[keys[0]] if len(keys) == 1 else torch.cat([reader[key] for key in keys])

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


class FeatureReader:
    """Read access to the shards of one folder. Travels to workers without the data; each process maps anew.

    Args:
        folder: holds shards.
        verify: check every shard's digest now.

    Raises:
        CheckpointError: a shard is damaged.
    """

    def __init__(self, folder: Path, verify: bool = True) -> None:
        self.folder = Path(folder)
        self.shards: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[str, dict[str, Tensor]] = {}
        self.refresh(verify)

    def refresh(self, verify: bool = True) -> None:
        """Take in shards written since."""
        known = set(self.shards.values())
        for shard in sorted(self.folder.glob("shard-*")) if self.folder.is_dir() else ():
            if shard.name in known or is_leftover(shard):
                continue
            if verify:
                load_tensors(shard, "features")
            for key, record in read_manifest(shard).tensors["features.safetensors"].items():
                self.shards[key] = shard.name
                self.shapes[key] = tuple(record.shape)

    def __contains__(self, key: object) -> bool:
        return key in self.shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, key: str) -> Tensor:
        """The features stored under ``key``, (F, P, D) or (F, D), mapped: do not write to them."""
        shard = self.shards[key]
        if shard not in self._open:
            self._open[shard] = load_tensors(self.folder / shard, "features", verify=False)
        return self._open[shard][key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


class FeatureStore:
    """Features by encoder and frame rule.

    Args:
        path: the folder; made when something is written.
        dtype: of the stored numbers, where they are no integers; readers give it back as it is.
    """

    def __init__(self, path: Path, dtype: Literal["float16", "float32"] = "float16") -> None:
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: choose one of {sorted(DTYPES)}")
        self.path = Path(path)
        self.dtype = dtype

    def folder(self, encoder: Encoder, sampling: FrameSampling) -> Path:
        """Where the features of ``encoder`` over ``sampling`` are."""
        key = digest_of_json({**self.settings(encoder, sampling)}).partition(":")[2]
        return self.path / f"{encoder.name}-{key[:16]}"

    def settings(self, encoder: Encoder, sampling: FrameSampling) -> dict[str, str]:
        """What features depend on besides the file."""
        return {"encoder": encoder.fingerprint, "sampling": sampling.key, "dtype": self.dtype}

    def reader(self, encoder: Encoder, sampling: FrameSampling) -> FeatureReader:
        """The stored features, by `media_key`."""
        return FeatureReader(self.folder(encoder, sampling))


def media_of(sample: Sample) -> tuple[Media, ...]:
    """The files whose features a sample can have: its video, or its pictures where they all lie in files."""
    if sample.video is not None:
        return (sample.video,)
    pictures = sample.images or (sample.image,)
    return pictures if all(isinstance(picture, Picture) for picture in pictures) else ()


def frames_of(media: Media, sampling: FrameSampling) -> Tensor:
    """(F, 3, H, W) uint8. Raises `DataError` where the file cannot be read."""
    return media.pixels()[None] if isinstance(media, Picture) else media.frames(sampling.indices(media))


def media_key(media: Media) -> str:
    """`video_key` of a video; of a picture the digest of its file. Raises `DataError`: the file cannot be read."""
    return _file_key(media.identity) if isinstance(media, Picture) else video_key(media)


def video_key(video: Video) -> str:
    """Digest of the file's content, remembered as long as the file does not change, and how much of it is looked at.

    Raises:
        DataError: the file cannot be read.
    """
    key = _file_key(video.identity)
    return key if video.seconds is None else f"{key}-{float(video.seconds)}s"


@lru_cache(maxsize=1 << 17)
def _file_key(identity: tuple[str, int, int]) -> str:
    return digest_of_file(identity[0]).partition(":")[2]


class _Decoding(Dataset):
    """Transformed frames of files; a file that fails comes back as the text of its error."""

    def __init__(self, media: Sequence[tuple[str, Media]], sampling: FrameSampling, transform: Callable) -> None:
        self.media, self.sampling, self.transform = media, sampling, transform

    def __len__(self) -> int:
        return len(self.media)

    def __getitem__(self, index: int) -> tuple[int, Tensor | str]:
        try:
            return index, self.transform(frames_of(self.media[index][1], self.sampling))
        except DataError as error:
            return index, str(error)


def extract_features(
    media: Sequence[Media],
    encoder: Encoder,
    sampling: FrameSampling,
    store: FeatureStore,
    num_workers: int = 0,
    batch_frames: int = 48,
    progress: Callable[[int, int], None] | None = None,
    rank: int = 0,
    world: int = 1,
) -> dict[Media, str]:
    """Compute and store what is missing of ``media``; the encoder runs here, decoding in workers.

    Peak memory: ``batch_frames`` transformed frames, the files that workers hold ready, and one shard (32
    MiB).

    Args:
        media: any order, repeats allowed; files of equal content are computed once.
        encoder: in evaluation mode, on its device.
        sampling: frames per video.
        store: where to.
        num_workers: decoding processes; 0 decodes here.
        batch_frames: frames per forward pass.
        progress: called with (files done, files to do).
        rank: this process; it takes every ``world``-th file.
        world: processes that extract together.

    Returns:
        The error of each file of this process that could not be read; the caller decides what that means.
    """
    failed: dict[Media, str] = {}
    keyed: dict[str, Media] = {}
    for each in dict.fromkeys(media):
        try:
            keyed.setdefault(media_key(each), each)
        except DataError as error:
            failed[each] = str(error)
    present = store.reader(encoder, sampling)
    todo = [(key, keyed[key]) for key in sorted(keyed)[rank::world] if key not in present]
    if not todo:
        return failed
    writer = _ShardWriter(store, encoder, sampling)
    loader = DataLoader(
        _Decoding(todo, sampling, encoder.transform),
        batch_size=None,
        num_workers=num_workers,
        generator=torch.Generator().manual_seed(0),
    )
    waiting: list[tuple[str, Tensor]] = []
    for done, (index, frames) in enumerate(loader, start=1):
        key, each = todo[index]
        if isinstance(frames, str):
            failed[each] = frames
        else:
            waiting.append((key, frames))
        if sum(len(f) for _, f in waiting) >= batch_frames:
            writer.add(_encode(encoder, waiting, batch_frames))
            waiting = []
        if progress is not None:
            progress(done, len(todo))
    writer.add(_encode(encoder, waiting, batch_frames))
    writer.flush()
    return failed


@torch.inference_mode()
def _encode(encoder: Encoder, waiting: Sequence[tuple[str, Tensor]], batch_frames: int) -> dict[str, Tensor]:
    if not waiting:
        return {}
    device = next((p.device for p in encoder.parameters()), None) if hasattr(encoder, "parameters") else None
    pixels = torch.cat([frames for _, frames in waiting])
    tokens = torch.cat([encoder(part.to(device)).cpu() for part in pixels.split(batch_frames)])
    return dict(zip((key for key, _ in waiting), tokens.split([len(frames) for _, frames in waiting])))


class _ShardWriter:
    def __init__(self, store: FeatureStore, encoder: Encoder, sampling: FrameSampling) -> None:
        self.folder = store.folder(encoder, sampling)
        self.settings = {**store.settings(encoder, sampling), "name": encoder.name}
        self.dtype = DTYPES[store.dtype]
        self.tensors: dict[str, Tensor] = {}

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            self.tensors[key] = tensor.to(self.dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
            if not torch.isfinite(self.tensors[key]).all():
                raise DataError(
                    f"features of the file with digest {key} are not finite in {self.dtype}; store them as float32: "
                    "--data.feature_dtype float32, or --dtype float32 of the features command"
                )
        if sum(t.nbytes for t in self.tensors.values()) >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.tensors:
            write_shard(self.folder, self.tensors, self.settings)
            self.tensors = {}


def write_shard(folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Publish ``tensors`` as one more shard of ``folder``; several processes may do so at once."""
    save_checkpoint_folder(folder / f"shard-{secrets.token_hex(6)}", {"features": tensors}, settings=settings)
