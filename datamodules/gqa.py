"""GQA: questions about scenes, with one right answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lightning.pytorch.utilities import rank_zero_warn

from fulgurite.datamodules.base import Split
from fulgurite.datamodules.picture_task import PictureTask, label_of, name_of, text_of
from fulgurite.samples import Sample


class Gqa(PictureTask):
    """GQA in the files of VL-T5: trained on train and valid, judged on testdev, for validation too, as published.

    ``root`` holds ``GQA/train.json`` and so on, lists of records
    ``{"img_id": ..., "question_id": ..., "sent": ..., "label": {answer: score}}``. Pictures: those of Visual Genome for
    training (``VG``), GQA's own for testdev.
    """

    usual_name = "gqa"
    task = "gqa"
    files: ClassVar = {
        "train": ("GQA/train.json", "GQA/valid.json"),
        "val": ("GQA/testdev.json",),
        "test": ("GQA/testdev.json",),
        "predict": ("GQA/submit.json",),
    }
    feature_folders = ("VG/clip_features/data_clip_RN101_att", "GQA/clip_features/data_clip_RN101_att")

    def read(self, split: Split) -> list[Sample]:
        """The questions of ``split``; a warning says where validation is on the test."""
        if split == "val" and set(self.paths["val"]) & set(self.paths["test"]):
            rank_zero_warn(
                f"{self.domain}: validation is on the test questions, as published, so that what is chosen by it is "
                "chosen on the test; --data.train '[GQA/train.json]' --data.val '[GQA/valid.json]' keeps them apart"
            )
        return super().read(split)

    def of_record(self, record: Mapping[str, Any], where: str, split: Split) -> Sequence[Sample]:
        """One question."""
        return [
            Sample(
                id=name_of(record, "question_id", where),
                domain=self.domain,
                task=self.task,
                question=text_of(record, ("sent", "question"), where),
                answers=label_of(record, where, needed=split != "predict"),
                **self.media([name_of(record, "img_id", where)], where),
            )
        ]
