"""Filling and using a store of features of frames and pictures on behalf of a DataModule."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info

from fulgurite.samples import DataError, Sample
from fulgurite.samples.features import (
    FeatureExtractor,
    FeatureStore,
    Media,
    StoredFeatures,
    extract_features,
    frames_of,
    media_key,
    media_of,
)

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy

    from fulgurite.datamodules.base import FulguriteDataModule, Split


def fill_features(
    data: FulguriteDataModule, split: Split, samples: Sequence[Sample], extractor: FeatureExtractor
) -> list[Sample]:
    """The samples with ``features[encoder.name]`` from the cache, which is filled first where it lacks some.

    Every process computes its share and waits for the others; each then sees the same failures, so all keep
    the same samples. Samples without a video or pictures in files stay as they are.

    Raises:
        DataError: features cannot be stored, here or in another process.
    """
    encoder, sampling = extractor.encoder, extractor.sampling
    store = FeatureStore(data.feature_cache, data.feature_dtype)
    trainer = data.trainer
    rank, world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
    media = list(dict.fromkeys(each for sample in samples for each in media_of(sample)))
    home = next((parameter.device for parameter in encoder.parameters()), "cpu")
    encoder.to(home if trainer is None else trainer.strategy.root_device)
    with nullcontext() if trainer is None else in_step(trainer.strategy, "frame features"):
        extract_features(
            media,
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

    def check(each: Media) -> None:
        # What is not stored failed on some process: fail here in the same way.
        if media_key(each) not in reader:
            frames_of(each, sampling)

    filled = []
    for sample in data.readable(split, samples, check):
        if keys := [media_key(each) for each in media_of(sample)]:
            place = {encoder.name: (reader, *keys)}
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
            rank_zero_info(f"{what}: {done} of {total} files")

    return progress
