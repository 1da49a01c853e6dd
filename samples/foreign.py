"""Feature files of published data sets: one pickled dict for all videos, converted once to mapped, digested
files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fulgurite.checkpoints.errors import CheckpointError
from fulgurite.checkpoints.store import save_checkpoint_folder
from fulgurite.checkpoints.unpickle import load_pickle
from fulgurite.samples.errors import DataError
from fulgurite.samples.features import FeatureReader, video_key
from fulgurite.samples.video import Video


def foreign_features(path: Path, width: int, cache: Path | None = None) -> FeatureReader:
    """Features by video id (as text), (F, D) each, out of a file that holds ``{video id: (F, D) array}``.

    The first call reads the file with the restricted loader (all of it in memory) and writes the converted
    form; later calls map that. A changed file is converted anew.

    Args:
        path: file saved by ``torch.save`` or ``pickle``.
        width: D that every entry must have.
        cache: folder for the converted form; None takes the folder of ``path``.

    Raises:
        DataError: missing, refused or damaged file, an entry of another shape or width.
    """
    path = Path(path)
    key = video_key(Video(path))  # the same cheap check and digest that videos have
    folder = (cache or path.parent) / f"{path.stem}-{key[:16]}"
    if not (folder / "shard-all").is_dir():
        settings = {"source": path.name, "digest": key}
        save_checkpoint_folder(folder / "shard-all", {"features": _read(path, width)}, settings=settings)
    reader = FeatureReader(folder)
    for name, shape in reader.shapes.items():
        _check(path, name, shape, width)
    return reader


def _read(path: Path, width: int) -> dict[str, Tensor]:
    try:
        content = load_pickle(path)
    except CheckpointError as error:
        raise DataError(str(error)) from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"{path}: expected a dict of features by video id, got {type(content).__name__}")
    tensors = {}
    for name, value in content.items():
        tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else value
        if not isinstance(tensor, Tensor):
            raise DataError(f"{path}: the features of video {name} are a {type(value).__name__}, not an array")
        _check(path, str(name), tuple(tensor.shape), width)
        tensors[str(name)] = tensor.clone()
    return tensors


def _check(path: Path, name: str, shape: tuple[int, ...], width: int) -> None:
    if len(shape) != 2 or shape[0] < 1 or shape[1] != width:
        raise DataError(
            f"{path}: the features of video {name} have shape {shape}, expected (frames, {width}); if "
            "another encoder made them, set feature_width"
        )
