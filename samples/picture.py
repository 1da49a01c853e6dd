"""A picture in a file, read when it is needed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fulgurite.samples.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class Picture:
    """A lazy picture file: PNG, JPEG, WebP, and whatever else Pillow reads.

    Args:
        path: the file.
    """

    path: Path

    def check(self) -> None:
        """Raise `DataError` where the file is missing or no picture; its header is read, not its pixels."""
        self._read(decode=False)

    @property
    def name(self) -> str:
        """Its path, for messages."""
        return str(self.path)

    @property
    def identity(self) -> tuple[str, int, int]:
        """As of a video, see `file_identity`."""
        return file_identity(self.path, "picture")

    def pixels(self) -> Tensor:
        """(3, H, W) uint8 RGB; what is transparent is white. Raises `DataError` where it cannot be decoded."""
        return torch.from_numpy(np.array(self._read(decode=True))).permute(2, 0, 1).contiguous()

    def _read(self, decode: bool) -> Image:
        from PIL import Image

        try:
            with Image.open(self.path) as image:
                return on_white(image) if decode else image
        # Pillow's readers raise SyntaxError and ValueError too for files that are not what they say.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{self.path}: cannot read the picture: {error}") from error


def on_white(image: Image) -> Image:
    """The picture in RGB, what is transparent in it white."""
    from PIL import Image

    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def pixels_of(image: Tensor | Picture) -> Tensor:
    """(3, H, W) uint8 of what `Sample.image` holds."""
    return image.pixels() if isinstance(image, Picture) else image


def file_identity(path: Path, kind: str) -> tuple[str, int, int]:
    """Path, size in bytes and time of change: equal as long as the file was not written again.

    Args:
        path: of the file.
        kind: what it holds, for the message.

    Raises:
        DataError: it is missing, empty or no file.
    """
    try:
        stat = path.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot read the {kind} file: {error.strerror}") from error
    if not path.is_file():
        raise DataError(f"{path}: not a file, so it cannot be read as a {kind}")
    if stat.st_size == 0:
        raise DataError(f"{path}: the {kind} file is empty (0 bytes)")
    return (os.fspath(path), stat.st_size, stat.st_mtime_ns)
