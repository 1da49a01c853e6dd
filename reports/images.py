"""Pictures as text that a page can hold."""

from __future__ import annotations

import base64
import io
from html import escape
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def png_bytes(figure: Figure, dpi: int = 160) -> bytes:
    """The figure as a PNG file. Equal figures give equal bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def img_tag(figure: Figure, alt: str, dpi: int = 160) -> str:
    """The figure as an ``<img>``, as wide as it was drawn where there is room."""
    width = round(figure.get_figwidth() * 96)
    return _tag("image/png", png_bytes(figure, dpi), alt, f' style="width:{width}px"')


def thumbnail_tag(frame: Tensor, alt: str, height: int = 96) -> str:
    """One picture (3, H, W) uint8 as a small JPEG ``<img>``; never enlarged."""
    from PIL import Image

    picture = Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy(), "RGB")
    if picture.height > height:
        size = max(round(picture.width * height / picture.height), 1), height
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=82)
    return _tag("image/jpeg", buffer.getvalue(), alt, f' width="{picture.width}" height="{picture.height}"')


def _tag(kind: str, data: bytes, alt: str, attributes: str) -> str:
    text = base64.b64encode(data).decode()
    return f'<img src="data:{kind};base64,{text}" alt="{escape(alt)}"{attributes}>'
