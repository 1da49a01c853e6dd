"""TVQA and How2QA: questions with choices about a moment of a video with subtitles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from fulgurite.datamodules.base import SPLITS_OF_STAGE, Split
from fulgurite.datamodules.picture_task import name_of, text_of
from fulgurite.datamodules.subtitled import SubtitledVideos, time_of
from fulgurite.samples import DataError, DataInfo, Sample


class Tvqa(SubtitledVideos):
    """TVQA in the files of VALUE: ``ann/tvqa``, ``ann/tv_subtitles.jsonl``, ``vis_features/tv/clip-vit``.

    Records are ``{"qid": ..., "q": ..., "a0": ..., "answer_idx": 2, "ts": "3.10-9.75", "vid_name": ...}``, with five
    choices. The right answer is ``"a2"``, and so on; what the choices say stands in the text and in ``options``.
    ``type``, where records have it, is the kind.
    """

    usual_name = "tvqa"
    num_choices: ClassVar[int] = 5
    source = "tv"
    published = ("train", "val", "test_public", "test_release")

    def info(self) -> DataInfo:
        """The domain, the names of the choices and the types of the questions that are read."""
        splits = SPLITS_OF_STAGE.get(self.stage, ("train",))
        kinds = {sample.kind for split in splits for sample in self.samples(split)}
        answers = tuple(f"a{i}" for i in range(self.num_choices))
        return DataInfo((self.domain,), answers, tuple(sorted(kinds - {None})), (self.usual_name,))

    def of_record(self, record: Mapping[str, Any], where: str, split: Split) -> Sequence[Sample]:
        """One question."""
        options = tuple(text_of(record, (f"a{i}",), where).rstrip(". ") for i in range(self.num_choices))
        right = record.get("answer_idx")
        if isinstance(right, str) and right.isdecimal():
            right = int(right)
        if right is None and split == "predict":
            answers = {}
        elif isinstance(right, bool) or right not in range(self.num_choices):
            raise DataError(
                f"{where}: the key 'answer_idx' must be 0 to {self.num_choices - 1}, got {right!r}; where answers are "
                "not published, use the file as --data.predict"
            )
        else:
            answers = {f"a{right}": 1.0}
        choices = [f"a{i}: {option}." for i, option in enumerate(options)]
        asked = ["[Q]", text_of(record, ("q",), where), "[TS]", time_of(record, where), "[Choices]", *choices]
        kind = record.get("type")
        if kind is not None and not isinstance(kind, str):
            raise DataError(f"{where}: the key 'type' must be a text, got {kind!r}")
        id = name_of(record, "qid", where)
        return [Sample(id=id, answers=answers, options=options, kind=kind, **self.common(record, asked, where))]


class How2Qa(Tvqa):
    """How2QA, in the form of `Tvqa` with four choices: ``ann/how2qa``, ``ann/how2_subtitles.jsonl``,
    ``vis_features/how2/clip-vit``."""

    usual_name = "how2qa"
    num_choices = 4
    source = "how2"
    published = ("train_release", "val_release", "test_public_release", "test_public_release")
