"""DiDeMo as paragraphs: all descriptions of a video's moments together are its caption."""

from __future__ import annotations

from collections.abc import Iterator

from fulgurite.datamodules.base import Split
from fulgurite.datamodules.captioned import CaptionedDataModule, Described
from fulgurite.datamodules.files import laid_out, read_json, read_names
from fulgurite.datamodules.video_folder import bare

SECONDS = 31
"""What is looked at of a video, as published; the descriptions are of its first 30 seconds."""


class Didemo(CaptionedDataModule):
    """DiDeMo with 8,395 videos to train, 1,065 to validate and 1,004 to test.

    ``root`` holds ``train_list.txt``, ``val_list.txt``, ``test_list.txt`` and ``train_data.json``, ``val_data.json``,
    ``test_data.json`` (github.com/LisaAnne/LocalizingMoments; the lists are those of
    github.com/albanie/collaborative-experts), which says where to get the videos, too.
    """

    usual_name = "didemo"

    def published(self, split: Split) -> Iterator[Described]:
        """The listed videos, their descriptions joined in the order of the file."""
        split = "test" if split == "predict" else split
        data = self.root / f"{split}_data.json"
        moments: dict[str, list[str]] = {}
        with laid_out(data, '[{"video": ..., "description": ...}, ...]'):
            for moment in read_json(data):
                moments.setdefault(bare(moment["video"]), []).append(moment["description"].strip())
        path = self.root / f"{split}_list.txt"
        for name, line in read_names(path).items():
            said = moments.get(bare(name))
            yield Described(name, () if said is None else [" ".join(said)], f"{path}, line {line}", SECONDS)
