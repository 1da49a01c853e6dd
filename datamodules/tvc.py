"""TVC and YC2C: captions of stretches of a video with subtitles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fulgurite.datamodules.base import Split
from fulgurite.datamodules.picture_task import name_of, text_of
from fulgurite.datamodules.subtitled import SubtitledVideos, time_of
from fulgurite.samples import DataError, Sample


class Tvc(SubtitledVideos):
    """TVC in the files of VALUE: ``ann/tvc``, ``ann/tv_subtitles.jsonl``, ``vis_features/tv/clip-vit``.

    Records are ``{"vid_name": ..., "clip_id": ..., "ts": "3.10-9.75", "descs": [{"desc": ...}, ...]}``. Training has
    one sample per caption, called ``clip/number``; validation, test and prediction have one per clip, with all its
    captions.
    """

    usual_name = "tvc"
    timed: ClassVar[bool] = True
    source = "tv"
    published = ("train_release", "val_release", "test_release", "test_release")

    def of_record(self, record: Mapping[str, Any], where: str, split: Split) -> Sequence[Sample]:
        """One clip: a sample, or in training one per caption."""
        captions = captions_of(record, where, needed=split != "predict")
        asked = ["[TS]", time_of(record, where)] if self.timed else []
        fields = self.common(record, asked, where)
        clip = name_of(record, "clip_id", where)
        if split != "train":
            return [Sample(id=clip, captions=captions, **fields)]
        return [Sample(id=f"{clip}/{n}", captions=(caption,), **fields) for n, caption in enumerate(captions)]


class Yc2c(Tvc):
    """YouCook2 captions, in the form of `Tvc` without ``ts``: ``ann/yc2c``, ``ann/yc2_subtitles.jsonl``,
    ``vis_features/yc2/clip-vit``."""

    usual_name = "yc2c"
    timed = False
    source = "yc2"


def captions_of(record: Mapping[str, Any], where: str, needed: bool) -> tuple[str, ...]:
    """The captions of a record, ``descs``. Raises `DataError`: they are of another form, or missing and ``needed``."""
    said = record.get("descs")
    if said is None and not needed:
        return ()
    if not isinstance(said, list) or not said or not all(isinstance(each, Mapping) for each in said):
        raise DataError(
            f"{where}: the key 'descs' must be a list of objects with a text 'desc', got {said!r}; where captions are "
            "not published, use the file as --data.predict"
        )
    return tuple(text_of(each, ("desc",), where) for each in said)
