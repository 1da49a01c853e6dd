"""VATEX: videos of ten seconds with ten captions each, all of which count in the test."""

from __future__ import annotations

from collections.abc import Iterator

from fulgurite.datamodules.base import Split
from fulgurite.datamodules.captioned import Described, HeldOutCaptions
from fulgurite.datamodules.files import laid_out, listed, read_json, read_names


class Vatex(HeldOutCaptions):
    """VATEX in its English captions, in the order of its lists.

    ``root`` holds ``train_list.txt``, ``test_list.txt`` and ``ref_captions.json``, in the splits of HGR (25,991 and
    1,500 videos; github.com/cshizhe/hgr_v2t); captions and names of the videos: eric-xw.github.io/vatex-website.
    """

    usual_name = "vatex"

    def published(self, split: Split) -> Iterator[Described]:
        """The listed videos with all their captions."""
        said = self.root / "ref_captions.json"
        with laid_out(said, "{name: [caption, ...], ...}"):
            captions = {name: listed(texts) for name, texts in read_json(said).items()}
        path = self.root / ("train_list.txt" if split == "train" else "test_list.txt")
        for name, line in read_names(path).items():
            yield Described(name, captions.get(name, ()), f"{path}, line {line}")
