"""Batches of video frames from files and from a cache of 8-bit frames, as towers that train read them.

    python benchmarks/frame_cache.py [--videos 120] [--rounds 3] [--threads 1]

Both ways in turn make the same batches of the captioned worlds, at 224 pixels a side, with the frames kept in memory
forgotten before each. A way's time is its minimum over the rounds.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from measure import load, machine

from fulgurite.backbones.caption_tokens import CaptionTokens, vocabulary_of
from fulgurite.backbones.frame_pixels import StoredPixels
from fulgurite.backbones.frames import FrameTransform
from fulgurite.backbones.video_text_collator import VideoTextCollator
from fulgurite.datamodules.captioned_videos import CaptionedVideos
from fulgurite.datamodules.worlds import captioned_folder
from fulgurite.samples.features import FeatureExtractor
from fulgurite.samples.sampling import FrameSampling
from fulgurite.samples.video import FRAMES

TRANSFORM = FrameTransform(224, (0.481, 0.458, 0.408), (0.269, 0.261, 0.276), "crop")
SAMPLING = FrameSampling("uniform", 12)


def batches(cache: Path | None, videos: int) -> float:
    """Seconds to make all batches of 16 once; the cache is filled before."""
    encoder = StoredPixels(TRANSFORM)
    tokens = CaptionTokens(vocabulary_of({}), 32, "error", "max_words")
    collator = VideoTextCollator(tokens, SAMPLING, TRANSFORM, encoder.name, stored="pixels")
    data = CaptionedVideos(captioned_folder() / "emoji_living", batch_size=16, feature_cache=cache)
    data.attach(collator, FeatureExtractor(encoder, SAMPLING))
    data.setup("test")
    FRAMES.clear()
    loader, began = data.loader("test", data.samples("test")[:videos]), time.perf_counter()
    for _ in loader:
        pass
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=120)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(machine(options.threads))
    with tempfile.TemporaryDirectory() as folder:
        ways = {"files": None, "cache": Path(folder)}
        times = {name: [] for name in ways}
        for _ in range(options.rounds):
            for name, cache in ways.items():
                times[name].append(batches(cache, options.videos))
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    files, cached = (min(times[name]) for name in ways)
    ratio = f"files {files:.2f} s, cache {cached:.2f} s: {cached / files:.2f} x"
    print(f"{options.videos} videos of {SAMPLING.count} frames: {ratio}")
    print(f"cache {size / 1e6:.0f} MB; at the end: {load()}")


if __name__ == "__main__":
    main()
