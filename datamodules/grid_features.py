"""Stored features in the files of published releases, read when they are asked for.

Pictures have one HDF5 file each, ``<picture>.h5`` with the data set ``<picture>/features`` (N, D), the grid before the
attention pooling of CLIP in rows (VL-T5, VL-Adapter). Videos have one NumPy archive each, ``<video>.npz`` with the
array ``features`` (T, D), one row per frame (VALUE).

Legend: N grid tokens of a picture, T stored frames, F frames that are used, D width.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fulgurite.samples import DataError


class FeatureFile(Protocol):
    """Where the features of one picture or video are stored."""

    def read(self) -> Tensor:
        """(N, D) float32. Raises `DataError` where the file does not hold such features."""
        ...


@dataclass(frozen=True)
class GridFile:
    """The features of one picture.

    Args:
        path: the HDF5 file.
        name: of the picture, under which the file has them.
        width: D that they must have.
    """

    path: Path
    name: str
    width: int

    def read(self) -> Tensor:
        """(N, D) float32. Raises `DataError`: unreadable file, no such data set, other shape."""
        import h5py

        try:
            with h5py.File(self.path, "r") as file:
                values = np.asarray(file[f"{self.name}/features"][...])
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{self.path}: no data set '{self.name}/features' can be read: {error}") from error
        return _rows(values, self.path, self.width)


@dataclass(frozen=True)
class FramesFile:
    """The features of one video, brought to a fixed number of frames: zeros behind a shorter one, and the largest
    values over stretches of time of a longer one.

    Args:
        path: the NumPy archive.
        width: D that they must have.
        frames: F.
    """

    path: Path
    width: int
    frames: int = 64

    def read(self) -> Tensor:
        """(F, D) float32. Raises `DataError`: unreadable file, no array ``features``, other shape."""
        try:
            with np.load(self.path, allow_pickle=False) as archive:
                values = archive["features"]
        except (OSError, KeyError, ValueError, EOFError, IndexError, BadZipFile) as error:
            raise DataError(f"{self.path}: no array 'features' can be read: {error}") from error
        return resized(_rows(values, self.path, self.width), self.frames)


def resized(features: Tensor, frames: int) -> Tensor:
    """(T, D) to (``frames``, D): zeros are added at the end, or the time is pooled to the maxima of its stretches."""
    if len(features) > frames:
        return F.adaptive_max_pool1d(features.T, frames).T.contiguous()
    return F.pad(features, (0, 0, 0, frames - len(features)))


class FileFeatures(Mapping[str, Tensor]):
    """The ``features`` of a sample: those of one encoder, of its pictures one after the other.

    Args:
        name: of the encoder.
        files: one per picture, or that of the video.
    """

    def __init__(self, name: str, files: Sequence[FeatureFile]) -> None:
        self.name = name
        self.files = tuple(files)

    def __getitem__(self, name: str) -> Tensor:
        if name != self.name:
            raise KeyError(name)
        return torch.cat([file.read() for file in self.files])

    def __contains__(self, name: object) -> bool:
        return name == self.name

    def __iter__(self) -> Iterator[str]:
        yield self.name

    def __len__(self) -> int:
        return 1


class Files:
    """Files by the name that stands before their ending, in one or several folders; each folder is listed once.

    Args:
        folders: where to look, in this order.
        endings: of the files that count, as ``.h5``, in lower case.
        option: of the DataModule, which names the folders.
    """

    def __init__(self, folders: Sequence[Path], endings: Sequence[str], option: str) -> None:
        self.folders = tuple(folders)
        self.endings = tuple(endings)
        self.option = option

    def find(self, name: str, where: str) -> Path:
        """The file of ``name``.

        Args:
            name: without ending.
            where: what needs it, for the message.

        Raises:
            DataError: a folder is missing, or none has the file.
        """
        if name not in self._listed:
            folders = ", ".join(map(str, self.folders))
            raise DataError(
                f"{where}: no file {name}{'|'.join(self.endings)} lies in {folders}; set --data.{self.option}"
            )
        return self._listed[name]

    @cached_property
    def _listed(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for folder in self.folders:
            try:
                names = sorted(os.listdir(folder))
            except OSError as error:
                raise DataError(
                    f"{folder}: cannot list the folder: {error.strerror}; set --data.{self.option}"
                ) from error
            for name in names:
                stem, ending = os.path.splitext(name)
                if ending.lower() in self.endings:
                    found.setdefault(stem, folder / name)
        return found


def _rows(values: np.ndarray, path: Path, width: int) -> Tensor:
    if values.ndim != 2 or len(values) < 1 or values.shape[1] != width or values.dtype.kind not in "fiu":
        raise DataError(
            f"{path}: the features have shape {values.shape} of {values.dtype}, expected (rows, {width}) numbers; if "
            "another encoder made them, set --data.feature_width and --data.features_name"
        )
    return torch.from_numpy(values.astype(np.float32))
