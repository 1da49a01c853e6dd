"""COCO captions: what five people say of a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fulgurite.datamodules.base import Split
from fulgurite.datamodules.files import laid_out, listed, read_json
from fulgurite.datamodules.picture_task import PictureTask, name_of, text_of
from fulgurite.samples import DataError, Sample

SPLITS: dict[str, Split] = {"train": "train", "restval": "train", "val": "val", "test": "test"}


class CocoCaptions(PictureTask):
    """COCO in the splits of Karpathy and Fei-Fei (arXiv 1412.2306): 113,287 pictures to train on, 5,000 to validate and
    5,000 to test.

    ``root`` holds ``COCO/dataset_coco.json``:
    ``{"images": [{"filename": ..., "split": ..., "sentences": [{"raw": ...}, ...]}, ...]}``.
    Training has one sample per sentence, called ``picture/number``; validation, test and prediction (of the test
    pictures) have one per picture, with all its sentences. The text in is empty.
    """

    usual_name = "coco_captions"
    task = "caption"
    files = dict.fromkeys(("train", "val", "test", "predict"), ("COCO/dataset_coco.json",))
    feature_folders = ("COCO/clip_features/data_clip_RN101_att",)

    def records(self, split: Split) -> Iterator[tuple[str, Any]]:
        """Those of the split; its files hold all of them."""
        wanted = "test" if split == "predict" else split
        for path in self.paths[split]:
            with laid_out(path, '{"images": [{"filename": ..., "split": ..., "sentences": [...]}, ...]}'):
                for number, record in enumerate(listed(read_json(path)["images"]), start=1):
                    if record["split"] not in SPLITS:
                        raise DataError(
                            f"{path}, picture {number}: split {record['split']!r} is none of {list(SPLITS)}"
                        )
                    if SPLITS[record["split"]] == wanted:
                        yield f"{path}, picture {number}", record

    def of_record(self, record: Mapping[str, Any], where: str, split: Split) -> Sequence[Sample]:
        """One picture: a sample, or in training one per sentence."""
        name = Path(name_of(record, "filename", where)).stem
        sentences = record.get("sentences")
        if not isinstance(sentences, list) or not sentences or not all(isinstance(each, Mapping) for each in sentences):
            raise DataError(f"{where}: 'sentences' must be a list of objects with a text 'raw', got {sentences!r}")
        captions = tuple(text_of(each, ("raw",), where) for each in sentences)
        fields = {"domain": self.domain, "task": self.task, "question": "", **self.media([name], where)}
        if split != "train":
            return [Sample(id=name, captions=captions, **fields)]
        return [Sample(id=f"{name}/{n}", captions=(caption,), **fields) for n, caption in enumerate(captions)]
