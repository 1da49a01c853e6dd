"""What data sets of videos with subtitles share, in the files of VALUE (arXiv 2106.04632): media, subtitles, splits."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_info

from fulgurite.datamodules.base import FulguriteDataModule, Split
from fulgurite.datamodules.files import Folder, laid_out, listed, read_jsonl, require_root
from fulgurite.datamodules.grid_features import FileFeatures, Files, FramesFile
from fulgurite.datamodules.picture_task import name_of
from fulgurite.datamodules.video_folder import VideoFolder
from fulgurite.samples import DataError, DataInfo, Sample, Video


class SubtitledVideos(FulguriteDataModule):
    """Records about videos. The text in is put together of subtitles and of what a record asks, as VL-Adapter does:
    ``[Subs] ... [Q] ... [TS] (...) [Choices] ...``, without the words that name the task.

    Args:
        root: folder of all data sets (``datasets/video``); paths are relative to it.
        train: file of the training split; None takes the published one.
        val: the same for validation.
        test: the same for the test.
        predict: the same for prediction; what is asked for may be missing there.
        subtitles: JSON lines of ``{"vid_name": ..., "sub": [{"text": ...}, ...]}``; None takes the published file. A
            video that is not in it has none.
        features: folder of ``<video>.npz`` files, see `fulgurite.datamodules.grid_features`; None takes the published
            one, or none where there are ``videos``.
        features_name: encoder name under which samples carry them.
        feature_width: their width.
        num_frames: frames that features are brought to.
        videos: folder of the video files themselves, by name with any ending, or None.
        domain: name of this data set; None takes its usual one.
        loading: the options of `FulguriteDataModule`; the command line lists them one by one.
    """

    usual_name: ClassVar[str]
    source: ClassVar[str]  # whose videos they are, which subtitles and features are called by
    published: ClassVar[tuple[str, str, str, str]]  # what the files of training, validation, test and prediction end in

    def __init__(
        self,
        root: Folder,
        train: Path | None = None,
        val: Path | None = None,
        test: Path | None = None,
        predict: Path | None = None,
        subtitles: Path | None = None,
        features: Path | None = None,
        features_name: str = "clip_vitb32",
        feature_width: int = 512,
        num_frames: int = 64,
        videos: Path | None = None,
        domain: str | None = None,
        **loading: Any,
    ) -> None:
        super().__init__(**loading)
        self.root = Path(root).absolute()
        given: dict[Split, Path | None] = {"train": train, "val": val, "test": test, "predict": predict}
        usual = [f"ann/{self.usual_name}/{self.usual_name}_{ending}.jsonl" for ending in self.published]
        self.paths = {split: self.root / (path or name) for (split, path), name in zip(given.items(), usual)}
        self.subtitles = self.root / (subtitles or f"ann/{self.source}_subtitles.jsonl")
        if features is None and videos is None:
            features = Path(f"vis_features/{self.source}/clip-vit")
        self.features = None if features is None else Files([self.root / features], (".npz",), "features")
        self.features_name = features_name
        self.feature_width = feature_width
        self.num_frames = num_frames
        self.videos = None if videos is None else VideoFolder(self.root / videos)
        self.domain = self.usual_name if domain is None else domain
        self._spoken: dict[str, str] | None = None
        self._media: dict[str, dict[str, Any]] = {}

    @property
    def folders(self) -> list[Path]:
        """The root, and those of features and videos."""
        features = () if self.features is None else self.features.folders
        return [self.root, *features, *([] if self.videos is None else [self.videos.path])]

    def info(self) -> DataInfo:
        """The domain and the task, which has its name."""
        return DataInfo((self.domain,), tasks=(self.usual_name,))

    def place(self, split: Split) -> str:
        """The file of the split."""
        return str(self.paths[split])

    def read(self, split: Split) -> list[Sample]:
        """The samples of all records of ``split``."""
        require_root(self.root)
        path, samples = self.paths[split], []
        for line, record in read_jsonl(path):
            where = f"{path}, line {line}"
            with self.skipping(split, self.domain, where):
                samples.extend(self.of_record(record, where, split))
        spoken = sum(sample.speech is not None for sample in samples)
        if samples:
            rank_zero_info(f"{self.domain} {split}: {spoken / len(samples):.1%} of {len(samples)} with subtitles")
        return samples

    @abstractmethod
    def of_record(self, record: Mapping[str, Any], where: str, split: Split) -> Sequence[Sample]:
        """The samples of one record. Raises `DataError` for one that cannot be used."""

    def common(self, record: Mapping[str, Any], asked: Sequence[str], where: str) -> dict[str, Any]:
        """Domain, task, text and media of the samples of a record.

        Args:
            record: with ``vid_name``.
            asked: what follows the subtitles in the text.
            where: file and line.

        Raises:
            DataError: there is no such video.
        """
        video = name_of(record, "vid_name", where)
        speech = self.spoken().get(video) or None
        words = ["[Subs]", *([] if speech is None else [speech]), *asked]
        return {
            "domain": self.domain,
            "task": self.usual_name,
            "question": " ".join(words),
            "speech": speech,
            **self.media(video, where),
        }

    def spoken(self) -> dict[str, str]:
        """All subtitles of each video as one text."""
        if self._spoken is None:
            spoken = {}
            with laid_out(self.subtitles, '{"vid_name": ..., "sub": [{"text": ...}, ...]} per line'):
                for _, row in read_jsonl(self.subtitles, "--data.subtitles names it"):
                    spoken[row["vid_name"]] = " ".join(each["text"].strip() for each in listed(row["sub"])).strip()
            self._spoken = spoken
        return self._spoken

    def media(self, video: str, where: str) -> dict[str, Any]:
        """The fields of a sample about one video: stored features and the file, as far as there are any.

        Raises:
            DataError: there is no such file.
        """
        if video not in self._media:  # questions about the same video share what is read
            media: dict[str, Any] = {}
            if self.features is not None:
                file = FramesFile(self.features.find(video, where), self.feature_width, self.num_frames)
                media["features"] = FileFeatures(self.features_name, [file])
            if self.videos is not None:
                media["video"] = Video(self.videos.find((video,), where), video)
            self._media[video] = media
        return self._media[video]


def time_of(record: Mapping[str, Any], where: str) -> str:
    """The moment that a record is about, ``ts``, as ``(3.10-9.75)``. Raises `DataError` where it has none."""
    moment = record.get("ts")
    if isinstance(moment, list) and len(moment) == 2:
        moment = f"{moment[0]}-{moment[1]}"
    if not isinstance(moment, str) or not moment.strip():
        raise DataError(f"{where}: the key 'ts' must be a stretch of time as '3.10-9.75', got {moment!r}")
    return f"({moment.strip()})"
