"""A video file that is opened when its frames are asked for, and gives exactly the frames asked for.

Frame ``i`` is the i-th picture in presentation order, whatever the frame rate does and however the codec
reorders pictures. One pass over the packets (no decoding) gives the presentation time of every picture; a
request then starts at the last usable key frame before each wanted picture and decodes no further than it
must.
"""

from __future__ import annotations

import bisect
import os
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fulgurite.samples.errors import DataError
from fulgurite.samples.picture import file_identity

if TYPE_CHECKING:
    import av
    from av.container import InputContainer


SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".gif", ".mpg", ".mpeg")


def video_files(folder: Path) -> list[Path]:
    """Files below ``folder``, at any depth, that end like videos, sorted."""
    return sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and not file.is_dir())


@dataclass(frozen=True)
class Video:
    """A lazy video file. Holds nothing but where it is, so it is hashable and cheap to send to a worker.

    Args:
        path: the file; anything that FFmpeg reads.
        name: what the data call it, for results that are read on other machines; empty takes the path.
        seconds: only so much of the file's start is looked at, by its mean frame rate; the picture that begins at
            its very end belongs to it. None takes all.
    """

    path: Path
    name: str = field(default="", compare=False)
    seconds: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        object.__setattr__(self, "name", self.name or str(self.path))

    @property
    def num_frames(self) -> int:
        """Number of pictures, within ``seconds``. Raises `DataError` where the file cannot be read or holds none."""
        index = self._index()
        if self.seconds is None:
            return len(index.times)
        if index.fps <= 0:
            raise DataError(f"{self.path}: it tells no frame rate, so that its first {self.seconds:g} s are not known")
        return min(len(index.times), int(self.seconds * index.fps) + 1)

    @property
    def fps(self) -> float:
        """Mean frame rate in pictures per second."""
        return self._index().fps

    def frames(self, indices: Sequence[int]) -> Tensor:
        """The pictures at ``indices`` (any order, repeats allowed) as (N, 3, H, W) uint8 RGB.

        Raises:
            DataError: missing, empty or damaged file, no video stream, or an index outside ``num_frames``.
        """
        index = self._index()
        wanted = [int(i) for i in indices]
        count = self.num_frames
        outside = [i for i in wanted if not 0 <= i < count]
        if outside:
            raise DataError(f"{self.path}: frames {outside} asked for, but it has frames 0 to {count - 1}")
        if not wanted:
            return torch.empty(0, 3, index.height, index.width, dtype=torch.uint8)
        found = {i: frame for i in set(wanted) if (frame := FRAMES.get((index.identity, i))) is not None}
        missing = sorted(set(wanted) - found.keys())
        if missing:
            for i, frame in _decode(self.path, index, missing):
                found[i] = frame
                FRAMES.put((index.identity, i), frame)
        shapes = {tuple(frame.shape) for frame in found.values()}
        if len(shapes) > 1:
            raise DataError(f"{self.path}: the picture size changes within the file: {sorted(shapes)}")
        return torch.stack([found[i] for i in wanted])

    def check(self) -> None:
        """Raise `DataError` if the file is missing, empty, truncated or holds no video. Decodes nothing."""
        _ = self.num_frames

    @property
    def identity(self) -> tuple[str, int, int]:
        """Path, size in bytes and time of change: equal as long as the file was not written again."""
        return file_identity(self.path, "video")

    def _index(self) -> _Index:
        return _read_index(self.identity)


class _Packet(NamedTuple):
    time: int | None
    key: bool
    hidden: bool


class FrameCache:
    """Least recently used frames of one process, bounded by bytes.

    Args:
        limit: bytes held at most; 0 keeps nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._frames: OrderedDict[tuple, Tensor] = OrderedDict()

    def get(self, key: tuple) -> Tensor | None:
        """The frame stored under ``key``, or None."""
        frame = self._frames.get(key)
        if frame is not None:
            self._frames.move_to_end(key)
        return frame

    def put(self, key: tuple, frame: Tensor) -> None:
        """Store ``frame``; the frames not used for longest make room. A frame above the limit is not
        stored."""
        if frame.nbytes > self.limit or key in self._frames:
            return
        self._frames[key] = frame
        self.size += frame.nbytes
        while self.size > self.limit:
            self.size -= self._frames.popitem(last=False)[1].nbytes

    def clear(self) -> None:
        """Forget all frames."""
        self._frames.clear()
        self.size = 0


FRAMES = FrameCache(limit=128 << 20)
"""The frames of this process. Every worker has its own."""


@dataclass(frozen=True)
class _Index:
    """Where the pictures of a file are.

    Args:
        times: presentation times in display order, in the stream's time base; where the file is not
            ``timed``, the numbers of the pictures.
        order: decoding position of each picture, in display order.
        keys: decoding positions of key frames, ascending.
        key_times: their presentation times.
        hidden: presentation time to decoding position of pictures that are decoded but not shown (edit lists).
        timed: False where the container gives no usable times, so that pictures are counted from the start.
    """

    identity: tuple[str, int, int]
    stream: int
    fps: float
    height: int
    width: int
    timed: bool
    times: Sequence[int]
    order: Sequence[int] = ()
    keys: tuple[int, ...] = ()
    key_times: tuple[int, ...] = ()
    hidden: Mapping[int, int] = field(default_factory=dict)

    def start_of(self, i: int) -> int:
        """Which key frame (number in ``keys``) to start from for picture ``i``: the last one that comes
        before it both in the file and on the screen (pictures between may lean on an earlier key frame)."""
        k = bisect.bisect_right(self.keys, self.order[i]) - 1
        while k > 0 and self.key_times[k] > self.times[i]:
            k -= 1
        return max(k, 0)

    def position(self, time: int | None) -> int | None:
        """Decoding position of the packet with presentation time ``time``, None where there is none."""
        if time is None or time in self.hidden:
            return self.hidden.get(time)
        i = bisect.bisect_left(self.times, time)
        return self.order[i] if i < len(self.times) and self.times[i] == time else None


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Turns what FFmpeg raises into a `DataError` that names the file."""
    import av

    try:
        yield
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"{path}: damaged or truncated video ({error.strerror})") from error


def _open(path: str | Path, **options: str) -> InputContainer:
    import av

    try:
        return av.open(os.fspath(path), metadata_errors="ignore", options=options)
    except (av.error.FFmpegError, OSError) as error:
        raise DataError(f"{path}: not a readable video; the file may be truncated ({error.strerror})") from error


@lru_cache(maxsize=1024)
def _read_index(identity: tuple[str, int, int]) -> _Index:
    path = identity[0]
    with _open(path) as container:
        if not container.streams.video:
            raise DataError(f"{path}: the file has no video stream")
        stream = container.streams.video[0]
        # Matroska announces a length in its head; a file that was cut ends before it without any error.
        announced = (container.duration or 0) / 1_000_000 if container.format.name.startswith("matroska") else 0.0
        end = 0.0
        packets: list[_Packet] = []
        damaged = False
        with _naming(path):
            for p in container.demux() if announced else container.demux(stream):
                if p.pts is not None:
                    end = max(end, float((p.pts + (p.duration or 0)) * p.time_base))
                if p.size and p.stream.index == stream.index:
                    packets.append(_Packet(p.pts, p.is_keyframe, p.is_discard))
                    damaged |= p.is_corrupt
        if damaged or (stream.frames > len(packets) and stream.frames > (found := _count_without_edits(path))):
            found = len(packets) if damaged else found
            raise DataError(f"{path}: damaged or truncated video: {stream.frames} frames announced, {found} found")
        if not packets:
            raise DataError(f"{path}: the video stream has no frames")
        if end < announced - max(1.5 * announced / len(packets), 0.002):
            raise DataError(f"{path}: truncated video: {announced:.3f} s announced, it ends at {end:.3f} s")
        shown = sorted((p.time, at) for at, p in enumerate(packets) if p.time is not None and not p.hidden)
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        facts = (identity, stream.index, float(rate) if rate else 0.0)
        size = (stream.codec_context.height, stream.codec_context.width)
        timed = all(p.time is not None for p in packets) and len({time for time, _ in shown}) == len(shown)
        if not timed or not packets[0].key:
            count = sum(1 for _ in _decode_all(path, stream.index))
            if count == 0:
                raise DataError(f"{path}: the video stream has no frames")
            return _Index(*facts, *size, timed=False, times=range(count))
        keys = [at for at, p in enumerate(packets) if p.key]
        return _Index(
            *facts,
            *size,
            timed=True,
            times=array("q", (time for time, _ in shown)),
            order=array("q", (at for _, at in shown)),
            keys=tuple(keys),
            key_times=tuple(packets[at].time for at in keys),
            hidden={p.time: at for at, p in enumerate(packets) if p.hidden},
        )


def _count_without_edits(path: str) -> int:
    """Packets in the file, those included that its edit list cuts away (they are announced all the same)."""
    with _open(path, ignore_editlist="1") as container, _naming(path):
        return sum(1 for p in container.demux(container.streams.video[0]) if p.size)


def _decode_all(path: str | Path, stream: int) -> Iterator[av.VideoFrame]:
    with _open(path) as container, _naming(path):
        yield from container.decode(container.streams[stream])


def _decode(path: Path, index: _Index, wanted: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    """The pictures ``wanted`` (ascending), each decoded once."""
    if index.timed:
        with _open(path) as container:
            yield from _decode_timed(container, container.streams[index.stream], path, index, wanted)
        return
    left = set(wanted)
    for i, frame in enumerate(_decode_all(path, index.stream)):
        if i in left:
            left.discard(i)
            yield i, _picture(frame, path, i)
        if not left:
            return
    raise DataError(f"{path}: frames {sorted(left)} could not be decoded; the video is damaged")


def _decode_timed(
    container: InputContainer, stream: av.VideoStream, path: Path, index: _Index, wanted: Sequence[int]
) -> Iterator[tuple[int, Tensor]]:
    at_time = {index.times[i]: i for i in wanted}
    groups: OrderedDict[int, set[int]] = OrderedDict()
    for i in wanted:
        groups.setdefault(index.start_of(i), set()).add(index.times[i])
    with _naming(path):
        for start, times in groups.items():
            for frame in _from_key(container, stream, index, start):
                if frame.pts in times:
                    times.discard(frame.pts)
                    i = at_time[frame.pts]
                    yield i, _picture(frame, path, i)
                if not times:
                    break
            if times:
                lost = sorted(at_time[t] for t in times)
                raise DataError(f"{path}: frames {lost} could not be decoded; the video is damaged")


def _from_key(container: InputContainer, stream: av.VideoStream, index: _Index, start: int) -> Iterator[av.VideoFrame]:
    """Decode onwards from key frame number ``start``, whatever the container's own seek thinks of it."""
    for k in range(start, -1, -1):
        container.seek(index.key_times[k], stream=stream, backward=True)
        packets = (p for p in container.demux(stream))
        first = next(packets)
        position = index.position(first.pts)
        if position is not None and position <= index.keys[start]:
            break
    else:
        container.seek(min(index.key_times[0], 0), stream=stream, backward=True)
        packets = (p for p in container.demux(stream))
        first = next(packets)
    yield from first.decode()
    for packet in packets:
        yield from packet.decode()


def _picture(frame: av.VideoFrame, path: Path, i: int) -> Tensor:
    """(3, H, W) uint8, turned upright where the file asks for it."""
    if frame.is_corrupt:
        raise DataError(f"{path}: frame {i} is damaged")
    picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    turns = round(frame.rotation / 90) % 4
    return torch.rot90(picture, turns, dims=(0, 1)).permute(2, 0, 1).contiguous()
