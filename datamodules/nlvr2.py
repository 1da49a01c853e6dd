"""NLVR2: whether a sentence is true of a pair of pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fulgurite.datamodules.base import Split
from fulgurite.datamodules.picture_task import PictureTask, name_of, text_of
from fulgurite.samples import DataError, DataInfo, Sample

ANSWERS = ("false", "true")


class Nlvr2(PictureTask):
    """NLVR2 in the files of VL-T5; the test is test-P.

    ``root`` holds ``nlvr/{train,valid,test}.json``, lists of records ``{"uid": ..., "img0": ..., "img1": ..., "sent":
    ..., "label": 0 or 1}``. The answer is ``"true"`` or ``"false"``. Features of the pictures come one after the other.
    """

    usual_name = "nlvr2"
    task = "nlvr2"
    files: ClassVar = {
        "train": ("nlvr/train.json",),
        "val": ("nlvr/valid.json",),
        "test": ("nlvr/test.json",),
        "predict": ("nlvr/test.json",),
    }
    feature_folders = ("nlvr/clip_features/data_clip_RN101_att",)

    def info(self) -> DataInfo:
        """The domain, the task and both answers."""
        return DataInfo((self.domain,), ANSWERS, tasks=(self.task,))

    def of_record(self, record: Mapping[str, Any], where: str, split: Split) -> Sequence[Sample]:
        """One sentence."""
        label = record.get("label")
        if label not in (0, 1) and not (split == "predict" and label is None):
            raise DataError(f"{where}: the key 'label' must be 0 or 1, got {label!r}")
        return [
            Sample(
                id=name_of(record, "uid", where),
                domain=self.domain,
                task=self.task,
                question=text_of(record, ("sent", "question"), where),
                answers={} if label is None else {ANSWERS[int(label)]: 1.0},
                **self.media([name_of(record, key, where) for key in ("img0", "img1")], where),
            )
        ]
