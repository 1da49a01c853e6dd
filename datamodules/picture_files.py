"""Pictures of a folder, whatever lies where in it: what image models are calibrated on."""

from __future__ import annotations

from pathlib import Path

import torch

from fulgurite.samples.errors import DataError
from fulgurite.samples.picture import SUFFIXES, Picture


def drawn_pictures(folder: Path, count: int, seed: int) -> list[Picture]:
    """``count`` pictures below ``folder``, drawn without replacement; the same for the same files and seed.

    Raises:
        DataError: there are fewer.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if len(paths) < count:
        raise DataError(f"{folder} holds {len(paths)} pictures, and {count} are wanted: lower --samples")
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))
    return [Picture(paths[place]) for place in order[:count].tolist()]
