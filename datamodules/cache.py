"""Filling and using a store of frame features on behalf of a DataModule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info

from fulgurite.samples import DataError, Sample, Video
from fulgurite.samples.features import (
    FeatureExtractor,
    FeatureStore,
    StoredFeatures,
    extract_features,
    video_key,
)

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    from fulgurite.datamodules.base import FulguriteDataModule, Split


def fill_features(
    data: FulguriteDataModule, split: Split, samples: Sequence[Sample], extractor: FeatureExtractor
) -> list[Sample]:
    """The samples with ``features[encoder.name]`` from the cache, which is filled first where it lacks some.

    Every process computes its share and waits for the others; each then sees the same failures, so all keep
    the same samples. Samples without a video stay as they are.

    Raises:
        DataError: features cannot be stored, here or in another process.
    """
    encoder, sampling = extractor.encoder, extractor.sampling
    store = FeatureStore(data.feature_cache, data.feature_dtype)
    trainer = data.trainer
    rank, world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
    videos = list(dict.fromkeys(s.video for s in samples if s.video is not None))
    home = next((parameter.device for parameter in encoder.parameters()), "cpu")
    encoder.to(home if trainer is None else trainer.strategy.root_device)
    with nullcontext() if trainer is None else in_step(trainer.strategy, "frame features"):
        extract_features(
            videos,
            encoder,
            sampling,
            store,
            num_workers=data.num_workers,
            progress=_report(f"{split} features by {encoder.name}"),
            rank=rank,
            world=world,
        )
    encoder.to(home)
    reader = store.reader(encoder, sampling)

    def check(video: Video) -> None:
        # What is not stored failed on some process: fail here in the same way.
        if video_key(video) not in reader:
            video.frames(sampling.indices(video))

    filled = []
    for sample in data.readable(split, samples, check):
        if sample.video is not None:
            place = {encoder.name: (reader, video_key(sample.video))}
            given = sample.features.places if isinstance(sample.features, StoredFeatures) else {}
            sample = replace(sample, features=StoredFeatures({**given, **place}))
        filled.append(sample)
    return filled


@contextmanager
def in_step(strategy: Strategy, what: str) -> Iterator[None]:
    """Wait for all processes at the end, and fail in all of them where one has failed."""
    done = False
    try:
        yield
        done = True
    finally:  # also on the way out of an error: the others wait for this process
        everywhere = strategy.reduce_boolean_decision(done, all=True)
    if not everywhere:
        raise DataError(f"{what}: another process failed; its own message says why")


def _report(what: str) -> Callable[[int, int], None]:
    """Says how far it is at every tenth."""

    def progress(done: int, total: int) -> None:
        if done * 10 // total > (done - 1) * 10 // total:
            rank_zero_info(f"{what}: {done} of {total} videos")

    return progress
