"""Scores of captions by the COCO evaluation (`pycocoevalcap`): CIDEr, BLEU, ROUGE-L, and METEOR and SPICE with Java.

CIDEr is CIDEr-D (arXiv 1411.5726) with document frequencies of the references at hand, so it is of a whole corpus and
no mean over its parts: all captions of all ranks come together before anything is counted.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fulgurite.metrics.caption_words import Tokenizer, caption_words, require_java, require_package
from fulgurite.metrics.per_sample import PerSampleMetric

Score = Literal["CIDEr", "BLEU", "ROUGE-L", "METEOR", "SPICE"]
_WITHIN, _BETWEEN = "\x1f", "\x1e"  # between the texts of a sample, and behind each sample


class CaptionScores(PerSampleMetric):
    """Scores of one caption per picture against all that people said of it, times 100.

    Args:
        scores: which. ``"BLEU"`` gives BLEU-1 to BLEU-4. METEOR and SPICE need Java; SPICE besides the Stanford models
            that ``pycocoevalcap`` downloads on its first use, which must be there already.
        tokenizer: what words are; ``"ptb"``, which needs Java, for figures to compare with published ones. See
            `fulgurite.metrics.caption_words`.

    State: the texts of all samples as bytes.

    Raises:
        RuntimeError: the package, Java or models are missing.
        ValueError: no scores, or unknown ones.
    """

    texts: list[Tensor]

    def __init__(self, scores: Sequence[Score] = ("CIDEr", "BLEU", "ROUGE-L"), tokenizer: Tokenizer = "plain") -> None:
        super().__init__()
        known = ("CIDEr", "BLEU", "ROUGE-L", "METEOR", "SPICE")
        if not scores or not set(scores) <= set(known):
            raise ValueError(f"scores={list(scores)}: choose of {list(known)}")
        if tokenizer not in ("plain", "ptb"):
            raise ValueError(f"tokenizer={tokenizer!r}: choose 'plain' or 'ptb'")
        require_package("CaptionScores")
        if tokenizer == "ptb":
            require_java("The tokenizer 'ptb'", "set tokenizer: plain")
        for score in {"METEOR", "SPICE"} & set(scores):
            require_java(score, f"leave {score} out of the scores")
        if "SPICE" in scores:
            _require_models()
        self.scores = tuple(scores)
        self.tokenizer: Tokenizer = tokenizer
        self.keep("texts", torch.uint8)

    def update(
        self, captions: Sequence[str], references: Sequence[Sequence[str]], counted: Tensor | None = None
    ) -> None:
        """Add B captions and what people said; those where ``counted`` (B,) is False are left out.

        Raises:
            ValueError: nothing was said of a picture.
        """
        packed = ""
        use = [True] * len(captions) if counted is None else counted.tolist()
        for caption, said, used in zip(captions, references, use, strict=True):
            if used:
                if not said:
                    raise ValueError(f"CaptionScores needs references, and there are none of the caption {caption!r}")
                texts = [" ".join(text.split()) for text in (caption, *said)]
                packed += _WITHIN.join(texts) + _BETWEEN
        # Bytes and no texts, since ranks can exchange tensors alone; none where all are repeats.
        self.texts.append(torch.tensor(list(packed.encode()), dtype=torch.uint8, device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """The scores by name; NaN where nothing was counted."""
        packed = bytes(self.joined("texts").tolist()).decode()
        samples = [sample.split(_WITHIN) for sample in packed.split(_BETWEEN)[:-1]]
        names = [name for score in self.scores for name in _names(score)]
        if not samples:
            return dict.fromkeys(names, torch.tensor(torch.nan, dtype=torch.float64))
        words = iter(caption_words([text for sample in samples for text in sample], self.tokenizer))
        split = [[next(words) for _ in sample] for sample in samples]
        given = {number: sample[:1] for number, sample in enumerate(split)}
        said = {number: sample[1:] for number, sample in enumerate(split)}
        figures = [100 * value for score in self.scores for value in _values(score, said, given)]
        return dict(zip(names, torch.tensor(figures, dtype=torch.float64)))


def _names(score: Score) -> tuple[str, ...]:
    return tuple(f"BLEU-{n}" for n in range(1, 5)) if score == "BLEU" else (score,)


def _values(score: Score, said: dict[int, list[str]], given: dict[int, list[str]]) -> Sequence[float]:
    if score == "BLEU":
        from pycocoevalcap.bleu.bleu import Bleu

        return Bleu(4).compute_score(said, given, verbose=0)[0]
    if score == "CIDEr":
        from pycocoevalcap.cider.cider import Cider as Scorer
    elif score == "ROUGE-L":
        from pycocoevalcap.rouge.rouge import Rouge as Scorer
    elif score == "METEOR":
        from pycocoevalcap.meteor.meteor import Meteor as Scorer
    else:
        from pycocoevalcap.spice.spice import Spice as Scorer
    return [float(Scorer().compute_score(said, given)[0])]


def _require_models() -> None:
    (folder,) = importlib.util.find_spec("pycocoevalcap").submodule_search_locations
    models = Path(folder) / "spice" / "lib" / "stanford-corenlp-3.6.0.jar"
    if not models.exists():
        raise RuntimeError(
            f"SPICE needs the Stanford CoreNLP models at {models.parent}, which pycocoevalcap downloads by "
            "'python -m pycocoevalcap.spice.get_stanford_models'; or leave SPICE out of the scores"
        )
