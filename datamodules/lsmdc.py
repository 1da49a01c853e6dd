"""LSMDC: 118,000 short clips of films with one caption each."""

from __future__ import annotations

from collections.abc import Iterator

from fulgurite.datamodules.base import Split
from fulgurite.datamodules.captioned import CaptionedDataModule, Described
from fulgurite.datamodules.files import read_text
from fulgurite.samples import DataError

TEST = "LSMDC16_challenge_1000_publictect.csv"
FILES: dict[Split, str] = {
    "train": "LSMDC16_annos_training.csv",
    "val": "LSMDC16_annos_val.csv",
    "test": TEST,
    "predict": TEST,
}
COLUMNS = ("clip", "start_aligned", "end_aligned", "start_extracted", "end_extracted", "sentence")


class Lsmdc(CaptionedDataModule):
    """LSMDC with the 1,000 test clips of the challenge of 2016.

    ``root`` holds ``LSMDC16_annos_training.csv``, ``LSMDC16_annos_val.csv`` and
    ``LSMDC16_challenge_1000_publictect.csv``, tab-separated and without a header; they and the clips, in a folder per
    film, are given out by the Max Planck Institute after registration (sites.google.com/site/describingmovies).
    """

    usual_name = "lsmdc"

    def published(self, split: Split) -> Iterator[Described]:
        """One clip and one caption a line."""
        path = self.root / FILES[split]
        for number, line in enumerate(read_text(path).split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            with self.skipping(split, self.domain, where):
                columns = line.split("\t")
                if len(columns) != len(COLUMNS):
                    raise DataError(f"{where}: {len(columns)} values between tabs, expected {', '.join(COLUMNS)}")
                yield Described(columns[0].strip(), [columns[-1]], where)
