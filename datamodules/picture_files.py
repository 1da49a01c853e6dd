"""Pictures of a folder, whatever lies where in it: what image models are calibrated on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from fulgurite.samples.errors import DataError
from fulgurite.samples.picture import SUFFIXES, Picture

T = TypeVar("T")


def drawn_pictures(folder: Path, count: int, seed: int) -> list[Picture]:
    """``count`` pictures below ``folder``, drawn without replacement; the same for the same files and seed.

    Raises:
        DataError: there is no such folder, or there are fewer.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; --pictures names one with pictures")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return [Picture(path) for path in drawn(paths, count, seed, f"{folder} holds {len(paths)} pictures")]


def drawn(items: Sequence[T], count: int, seed: int, found: str) -> list[T]:
    """``count`` of ``items``, drawn without replacement. Raises DataError, which begins with ``found``: too few."""
    if len(items) < count:
        raise DataError(f"{found}, and {count} are wanted: lower --samples")
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))
    return [items[place] for place in order[:count].tolist()]
