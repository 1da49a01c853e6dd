"""ActivityNet Captions as paragraphs: all sentences of a video together are its caption."""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from fulgurite.datamodules.base import Split
from fulgurite.datamodules.captioned import Described, HeldOutCaptions
from fulgurite.datamodules.files import laid_out, listed, read_json


class ActivityNet(HeldOutCaptions):
    """ActivityNet Captions with 10,009 training videos and the 4,917 of ``val1`` to test, as published.

    ``root`` holds ``train_ids.json``, ``val_ids.json`` (lists of names that begin with ``v_``), ``train.json`` and
    ``val_1.json`` of the captions (cs.stanford.edu/people/ranjaykrishna/densevid, ``captions.zip``); the videos come on
    request (activity-net.org/download.html), named with ``v_`` or without.
    """

    usual_name = "activity_net"

    def published(self, split: Split) -> Iterator[Described]:
        """A paragraph for each video, of which the stated duration is looked at, rounded up to seconds."""
        ids, said = ("train_ids.json", "train.json") if split == "train" else ("val_ids.json", "val_1.json")
        with laid_out(self.root / said, '{name: {"duration": ..., "sentences": [...]}, ...}'):
            paragraphs = {
                name: (" ".join(sentence.strip() for sentence in listed(entry["sentences"])), ceil(entry["duration"]))
                for name, entry in read_json(self.root / said).items()
            }
        path = self.root / ids
        with laid_out(path, "[name, ...]"):
            names = [str(name) for name in dict.fromkeys(listed(read_json(path)))]
        for number, name in enumerate(names):
            paragraph, seconds = paragraphs.get(name, (None, None))
            yield Described(name, () if paragraph is None else [paragraph], f"{path}, entry {number}", seconds)

    def names(self, video: str) -> tuple[str, ...]:
        """With ``v_`` and without."""
        return (video, video.removeprefix("v_"))
