"""The six video question answering sets of FrozenBiLM and DAM as one stream, from one root folder."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fulgurite.datamodules.continual import ContinualDataModule
from fulgurite.datamodules.video_qa import LAYOUTS, VideoQADataModule
from fulgurite.samples import DataError


class SixDomains(ContinualDataModule):
    """iVQA, MSVD-QA, MSRVTT-QA, LSMDC-FiB, ActivityNet-QA and TGIF-FrameQA, one stage each, in DAM's order.

    Args:
        root: folder that holds ``iVQA``, ``MSVD-QA`` and so on, and the vocabulary.
        vocabulary: JSON of the answers of all sets together, relative to ``root``.
        datasets: names and order of the sets, as `VideoQADataModule` calls them; None takes all.
        features_file: see `VideoQADataModule`.
        features_name: see `VideoQADataModule`.
        feature_width: see `VideoQADataModule`.
        missing_features: see `VideoQADataModule`.
        videos: see `VideoQADataModule`; the folder has the same name in every set.
        video_suffix: see `VideoQADataModule`.
        subtitles: see `VideoQADataModule`.
        held_out: see `VideoQADataModule`.
        unknown_answers: see `VideoQADataModule`.
        epochs_per_domain: see `ContinualDataModule`.
        joint: see `ContinualDataModule`.
        validate: see `ContinualDataModule`.
        batch_size: see `FulguriteDataModule`.
        eval_batch_size: see `FulguriteDataModule`.
        num_workers: see `FulguriteDataModule`.
        seed: see `FulguriteDataModule`.
        on_bad: see `FulguriteDataModule`.
        feature_cache: see `VideoQADataModule`.
    """

    def __init__(
        self,
        root: Path,
        vocabulary: Path = Path("vocab_6db.json"),
        datasets: list[str] | None = None,
        features_file: Path | None = Path("clipvitl14.pth"),
        features_name: str = "clip_vitl14",
        feature_width: int = 768,
        missing_features: Literal["error", "zeros"] = "error",
        videos: Path | None = None,
        video_suffix: str = ".mp4",
        subtitles: Path | None = Path("subtitles.pkl"),
        held_out: float = 0.1,
        unknown_answers: Literal["keep", "error"] = "keep",
        epochs_per_domain: int | list[int] = 20,
        joint: bool = False,
        validate: Literal["stage_end", "every_epoch"] = "stage_end",
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        on_bad: Literal["error", "skip"] = "error",
        feature_cache: Path | None = None,
    ) -> None:
        unknown = [name for name in datasets or () if name not in LAYOUTS]
        if unknown:
            raise DataError(f"There are no data sets {unknown}; choose among {list(LAYOUTS)}")
        domains = [
            VideoQADataModule(
                root,
                name,
                vocabulary,
                features_file,
                features_name,
                feature_width,
                missing_features,
                videos,
                video_suffix,
                subtitles,
                held_out,
                unknown_answers,
                feature_cache=None if feature_cache is None else Path(feature_cache) / name,
            )
            for name in datasets or LAYOUTS
        ]
        super().__init__(
            domains,
            epochs_per_domain,
            joint,
            validate,
            batch_size,
            eval_batch_size,
            num_workers,
            seed,
            on_bad,
            feature_cache,
        )
