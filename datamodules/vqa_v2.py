"""VQAv2: questions about pictures of COCO, each answered by ten people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from fulgurite.datamodules.base import Split
from fulgurite.datamodules.files import Folder, laid_out, listed, read_json
from fulgurite.datamodules.picture_task import PictureTask, label_of, name_of, text_of
from fulgurite.samples import DataError, DataInfo, Sample

KINDS = ("yes/no", "number", "other")
ANNOTATIONS = [Path(f"vqa/v2_mscoco_{part}2014_annotations.json") for part in ("train", "val")]
ANSWERS = '{"annotations": [{"question_id": ..., "answers": [{"answer": ...}, ...]}, ...]}'


class VqaV2(PictureTask):
    """VQAv2 in the Karpathy splits and files of VL-T5.

    ``root`` holds ``vqa/karpathy_train.json`` and so on, lists of records ``{"img_id": ..., "question_id": ..., "sent":
    ..., "label": {answer: score}, "answers": [{"answer": ...}, ...], "answer_type": ...}``, and the annotations of the
    challenge, which are read where records to be judged come without what people answered.

    Args:
        root: see `PictureTask`.
        annotations: files of the challenge with the answers of all annotators, relative to ``root``; None takes
            ``vqa/v2_mscoco_{train,val}2014_annotations.json``, as far as they are there.
        more: the other options of `PictureTask`; the command line lists them one by one.
    """

    usual_name = "vqa_v2"
    task = "vqa"
    files: ClassVar = {
        "train": ("vqa/karpathy_train.json",),
        "val": ("vqa/karpathy_val.json",),
        "test": ("vqa/karpathy_test.json",),
        "predict": ("vqa/test_4.json",),
    }
    feature_folders = ("COCO/clip_features/data_clip_RN101_att",)

    def __init__(
        self,
        root: Folder,
        annotations: list[Path] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(root, **more)
        self.annotations = [self.root / path for path in (ANNOTATIONS if annotations is None else annotations)]
        self._said: dict[str, Mapping[str, Any]] | None = None

    def info(self) -> DataInfo:
        """The domain, the task and the kinds of answers that the challenge tells apart."""
        return DataInfo((self.domain,), kinds=KINDS, tasks=(self.task,))

    def of_record(self, record: Mapping[str, Any], where: str, split: Split) -> Sequence[Sample]:
        """One question. Training questions carry the scores alone, the others what people answered too."""
        id = name_of(record, "question_id", where)
        if split in ("val", "test") and "answers" not in record:
            record = {**record, **self._annotation(id, where)}
        kind = record.get("answer_type")
        if kind not in (None, *KINDS):
            raise DataError(f"{where}: 'answer_type' is {kind!r}, not one of {list(KINDS)}")
        label = label_of(record, where, needed=split == "train")
        return [
            Sample(
                id=id,
                domain=self.domain,
                task=self.task,
                question=text_of(record, ("sent", "question"), where),
                # Where people agree on nothing, no answer counts, and as published nothing is learned.
                answers=label or {"": 0.0} if split == "train" else label,
                human_answers=human_answers(record, where) if split in ("val", "test") else (),
                kind=kind,
                **self.media([name_of(record, "img_id", where)], where),
            )
        ]

    def _annotation(self, id: str, where: str) -> dict[str, Any]:
        if self._said is None:
            self._said = {}
            usual = [self.root / path for path in ANNOTATIONS]
            for path in self.annotations:
                if path.exists() or path not in usual:
                    with laid_out(path, ANSWERS):
                        self._said |= {
                            str(each["question_id"]): each for each in listed(read_json(path)["annotations"])
                        }
        if id not in self._said:
            files = ", ".join(path.name for path in self.annotations) or "any file"
            raise DataError(
                f"{where}: neither the record nor {files} says what people answered to question {id}; "
                "set --data.annotations"
            )
        return {key: self._said[id][key] for key in ("answers", "answer_type") if key in self._said[id]}


def human_answers(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """What each annotator answered. Raises `DataError` where that is of another form."""
    answers = record["answers"]
    if not isinstance(answers, list) or not answers:
        raise DataError(f"{where}: 'answers' must be a list of what people answered, got {answers!r}")
    for each in answers:
        if not isinstance(each, Mapping) or not isinstance(each.get("answer"), str):
            raise DataError(f"{where}: 'answers' must hold objects with a text 'answer', got {each!r}")
    return tuple(each["answer"] for each in answers)
