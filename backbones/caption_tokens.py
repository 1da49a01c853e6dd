"""Captions as the ids that a tower of open_clip reads: cut or refused where they are too long, padded, with a mask.

Legend: T captions, W words, the padded length.
"""

from __future__ import annotations

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from fulgurite.samples import DataError

LongCaptions = Literal["error", "cut"]
PadTo = Literal["max_words", "longest"]

_log = logging.getLogger(__name__)


class Vocabulary(ABC):
    """A tokenizer of open_clip that does not cut or pad by itself. Copies of a model share it.

    Attributes:
        pad: the id of padding.
    """

    pad: int

    @abstractmethod
    def whole(self, captions: Sequence[str]) -> list[list[int]]:
        """Ids of each caption with those that begin and end it."""

    @abstractmethod
    def shortened(self, caption: str, length: int) -> list[int]:
        """The first ``length`` - 1 ids of a longer caption, and that of its end."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Vocabulary:
        return self


class PairVocabulary(Vocabulary):
    """CLIP's byte pairs.

    Args:
        options: of open_clip's `SimpleTokenizer`.
    """

    pad = 0

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.tokenizer = _pair_tokenizer(json.dumps(options))

    def whole(self, captions: Sequence[str]) -> list[list[int]]:
        """As in the base."""
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        return [[start, *self.tokenizer.encode(caption), end] for caption in captions]

    def shortened(self, caption: str, length: int) -> list[int]:
        """As in the base."""
        return [*self.whole([caption])[0][: length - 1], self.tokenizer.eot_token_id]


@lru_cache(maxsize=4)
def _pair_tokenizer(options: str) -> Any:
    """The same for the same options, since it takes a while to read its 49,000 pairs."""
    from open_clip import SimpleTokenizer

    return SimpleTokenizer(**json.loads(options))


class FolderVocabulary(Vocabulary):
    """A tokenizer of transformers, with open_clip's cleaning before it.

    Args:
        source: folder or hub name.
        mode: how open_clip uses it; it must be None.
        options: of open_clip's `HFTokenizer`.

    Raises:
        ValueError: a mode that has ids of its own at fixed places, or a tokenizer that has no id of padding.
    """

    def __init__(self, source: str, mode: str | None, options: Mapping[str, Any]) -> None:
        from open_clip.tokenizer import HFTokenizer

        if mode is not None:
            raise ValueError(f"tokenizer_mode={mode!r} of text_cfg puts a class token behind padding: not supported")
        self.outer = HFTokenizer(source, **options)
        self.tokenizer = self.outer.tokenizer
        pad = self.tokenizer.pad_token_id
        if pad is None:
            raise ValueError(f"the tokenizer {source} has no id of padding")
        self.pad = int(pad)

    def whole(self, captions: Sequence[str]) -> list[list[int]]:
        """As in the base."""
        texts = [self.outer.clean_fn(caption) for caption in captions]
        return [self._stripped(ids) for ids in self.tokenizer(texts, verbose=False)["input_ids"]]

    def shortened(self, caption: str, length: int) -> list[int]:
        """As in the base."""
        text = self.outer.clean_fn(caption)
        return self._stripped(self.tokenizer(text, truncation=True, max_length=length)["input_ids"])

    def _stripped(self, ids: Sequence[int]) -> list[int]:
        if not self.outer.strip_sep_token:
            return list(ids)
        return [0 if token == self.tokenizer.sep_token_id else token for token in ids]


def vocabulary_of(text_cfg: Mapping[str, Any]) -> Vocabulary:
    """The one that a configuration of open_clip's tower for text names; CLIP's where it names none."""
    options = text_cfg.get("tokenizer_kwargs") or {}
    source = text_cfg.get("hf_tokenizer_name")
    if source:
        return FolderVocabulary(source, text_cfg.get("tokenizer_mode"), options)
    return PairVocabulary({key: value for key, value in options.items() if key != "reduction_mask"})


class CaptionTokens:
    """Captions to ids.

    Args:
        vocabulary: of the tower.
        max_words: the most ids of a caption, those of beginning and end among them.
        long_captions: what is done with longer ones. Of those that are cut, the first of a process is reported.
        pad_to: always ``max_words``, or the longest caption of a batch.
    """

    def __init__(self, vocabulary: Vocabulary, max_words: int, long_captions: LongCaptions, pad_to: PadTo) -> None:
        self.vocabulary, self.max_words = vocabulary, max_words
        self.long_captions, self.pad_to = long_captions, pad_to
        self.reported = False

    def __call__(self, captions: Sequence[str], names: Sequence[str]) -> dict[str, Tensor]:
        """``text`` (T, W) long, ``text_mask`` (T, W) True for real ids, ``cut`` (T,) True for captions that were cut.

        Args:
            captions: none of them blank.
            names: of the sample that each belongs to.

        Raises:
            DataError: a caption is blank, or longer than allowed.
        """
        for caption, name in zip(captions, names):
            if not caption.strip():
                raise DataError(f"sample {name!r} has an empty caption")
        rows = self.vocabulary.whole(captions) if captions else []
        cut = torch.tensor([len(ids) > self.max_words for ids in rows], dtype=torch.bool)
        for row in cut.nonzero().flatten().tolist():
            self._long(names[row], len(rows[row]))
            rows[row] = self.vocabulary.shortened(captions[row], self.max_words)
        width = self.max_words if self.pad_to == "max_words" else max(map(len, rows), default=1)
        text = torch.full((len(rows), width), self.vocabulary.pad, dtype=torch.long)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for row, ids in enumerate(rows):
            text[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = True
        return {"text": text, "text_mask": mask, "cut": cut}

    def _long(self, name: str, length: int) -> None:
        said = f"a caption of sample {name!r} has {length} tokens, and backbone.init_args.max_words is {self.max_words}"
        if self.long_captions == "error":
            raise DataError(f"{said}: raise it, or set backbone.init_args.long_captions to cut")
        if not self.reported:
            self.reported = True
            _log.warning("%s: it is cut, as are others that no message names", said)
