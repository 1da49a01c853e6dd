"""Tiny videos of every awkward kind, written once."""

from pathlib import Path

import av
import numpy as np
import pytest

KINDS = {
    "plain.mp4": ("libx264", {"g": "12", "bf": "3"}, False),
    "open_gop.mp4": ("libx264", {"x264-params": "open-gop=1:keyint=10:bframes=3:b-pyramid=2"}, False),
    "open_gop.mkv": ("libx264", {"x264-params": "open-gop=1:keyint=10:bframes=3"}, False),
    "variable_rate.mp4": ("libx264", {"g": "12", "bf": "2"}, True),
    "old.avi": ("mpeg4", {"bf": "2", "g": "12"}, False),
    "stream.ts": ("libx264", {"g": "12", "bf": "3"}, False),
    "web.webm": ("libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16"}, False),
    "untimed.h264": ("libx264", {"g": "12", "bf": "3"}, False),
}


def write(path: Path, count=40, codec="libx264", options=None, variable_rate=False, rotation=0, seed=0) -> Path:
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = options or {}
        if rotation:
            stream.set_display_rotation(rotation)
        for i in range(count):
            picture = np.full((48, 64, 3), (i * 6 % 256, 255 - i * 6 % 256, i * 37 % 256), np.uint8)
            picture[:8] = rng.integers(0, 255, (8, 64, 3))
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = i * i + 3 * i if variable_rate else i
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="session")
def write_video():
    return write


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("videos")
    return {
        name: write(folder / name, codec=codec, options=options, variable_rate=variable)
        for name, (codec, options, variable) in KINDS.items()
    }
