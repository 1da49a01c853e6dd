"""Write frames as a small H.264 file that every browser plays."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np

FPS = 4


def write_video(path: Path, frames: np.ndarray, crf: int = 30) -> None:
    """Write ``frames`` ((F, H, W, 3) uint8 RGB, even H and W) to ``path`` as H.264, yuv420p, 4 frames a second.

    One thread and a fixed preset: the same frames give the same bytes with the same libx264.
    """
    num_frames, height, width, _ = frames.shape
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.options = {"crf": str(crf), "preset": "veryslow", "g": str(num_frames)}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
