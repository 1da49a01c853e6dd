"""What a DataModule yields: one question about one piece of media, knowing nothing of any model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fulgurite.samples.fact import Fact
from fulgurite.samples.picture import Picture
from fulgurite.samples.video import Video


@dataclass(frozen=True)
class Sample:
    """One item of a data set.

    Args:
        id: unique within its split; metrics and predictions are keyed by it.
        domain: name of the data set or world that it comes from.
        task: ``"videoqa"`` here; decides which module can take it together with the filled fields. Generative tasks
            are ``"vqa"``, ``"gqa"``, ``"nlvr2"``, ``"caption"``, ``"tvqa"``, ``"how2qa"``, ``"tvc"``, ``"yc2c"``, or
            the name of a GLUE task.
        question: text in, without the prefix that names the task to a model; empty where the picture is all there is.
        text_pair: the second of two texts that are judged together; ``question`` is the first.
        answers: accepted answers with their scores; empty where unknown (prediction).
            Video QA with one annotator has one answer of score 1; iVQA has ``min(count / 2, 1)``.
        human_answers: what each annotator said, where a metric compares with all of them (VQAv2: ten).
        captions: what is said of the video or image; several where several people described it.
        speech: subtitles of the video as one string.
        kind: question type, for accuracy by type.
        video: lazy video file.
        image: (3, H, W) uint8 picture, or the lazy file of one; `pixels_of` reads both.
        images: the pictures in order, each like ``image``, where a question is about several.
        num_images: how many pictures the question is about; features of two are (2N, D), one after the other.
        features: ready features by the name of their encoder, e.g. ``{"clip_vitl14": (N, 768)}``.
        options: candidate answers where the question is multiple choice.
        fact: what belongs to the answer where it is one to delete.
        counted: False for the repeats that keep ranks in step; metrics and losses skip them.
    """

    id: str
    domain: str
    task: str = "videoqa"
    question: str | None = None
    text_pair: str | None = None
    answers: Mapping[str, float] = field(default_factory=dict)
    human_answers: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    speech: str | None = None
    kind: str | None = None
    video: Video | None = None
    image: Tensor | Picture | None = None
    images: tuple[Tensor | Picture, ...] = ()
    num_images: int = 1
    features: Mapping[str, Tensor] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    fact: Fact | None = None
    counted: bool = True

    def has(self, need: str) -> bool:
        """Whether the field ``need`` is filled. ``"features.NAME"`` asks for one encoder, ``a|b`` for either."""
        if "|" in need:
            return any(self.has(part) for part in need.split("|"))
        name, _, encoder = need.partition(".")
        value = getattr(self, name)
        if encoder:
            return encoder in value
        return value is not None and (not isinstance(value, Mapping | tuple) or len(value) > 0)
