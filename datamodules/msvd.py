"""MSVD: 1,970 short videos with about 40 captions each, all of which count in the test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fulgurite.checkpoints.errors import CheckpointError
from fulgurite.checkpoints.unpickle import load_pickle
from fulgurite.datamodules.base import Split
from fulgurite.datamodules.captioned import CaptionedDataModule, Described
from fulgurite.datamodules.files import laid_out, listed, read_names
from fulgurite.samples import DataError


class Msvd(CaptionedDataModule):
    """MSVD with 1,200 videos to train, 100 to validate and 670 to test.

    ``root`` holds ``train_list.txt``, ``val_list.txt``, ``test_list.txt`` and ``raw-captions.pkl``, which come with the
    release ``v0.0`` of CLIP4Clip (github.com/ArrowLuo/CLIP4Clip, ``msvd_data.zip``); the videos are those of
    ``YouTubeClips.tar`` (cs.utexas.edu/users/ml/clamp/videoDescription).
    """

    usual_name = "msvd"

    def published(self, split: Split) -> Iterator[Described]:
        """The videos of a list with all their captions, whose words are joined."""
        captions = self._captions(self.root / "raw-captions.pkl")
        path = self.root / f"{'test' if split == 'predict' else split}_list.txt"
        for name, line in read_names(path).items():
            yield Described(name, captions.get(name, ()), f"{path}, line {line}")

    def _captions(self, path: Path) -> dict[str, list[Any]]:
        try:
            content = load_pickle(path)
        except CheckpointError as error:
            raise DataError(f"{error} It is looked for below --data.root") from error
        with laid_out(path, "{video: [[word, ...], ...]}"):
            return {name: [" ".join(listed(words)) for words in listed(said)] for name, said in content.items()}
