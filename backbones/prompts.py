"""What FrozenBiLM reads of a sample: the mask-prompted question and at most ten frame features.

Source: Yang et al., "Zero-Shot Video Question Answering via Frozen Bidirectional Language Models", and the
released code of DAM, which uses the same prompts.

Legend: B batch, N frames of a video, V video tokens, T text tokens, D feature width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fulgurite.samples import Batch, DataError, Sample, sample_fields
from fulgurite.samples.sampling import official_dam

BLANK = "_____"


def mask_prompt(question: str, mask: str, suffix: str = ".", speech: str | None = None) -> str:
    """The question with ``mask`` where the answer goes.

    ``Question: What is this? Answer: [MASK]. Subtitles: hello there``; a sentence with `BLANK` in it is
    filled in place and takes no suffix. Everything after the first letter of the question becomes lower case.
    """
    question = question.capitalize().strip()
    if BLANK in question:
        text = question.replace(BLANK, mask)
    else:
        text = f"Question: {question if question.endswith('?') else question + '?'} Answer: {mask}{suffix}"
    if speech:
        text = f"{text} Subtitles: {speech}"
    return text.strip()


def video_tokens(features: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Sample or pad frame features (N, D) to (``limit``, D) float32, with a bool mask (``limit``,) of the
    real ones.

    A missing video, N = 0, is one zero vector that counts as real.
    """
    count = features.shape[0]
    chosen = features[official_dam(count, limit) if count else []].float()
    video = chosen.new_zeros(limit, features.shape[1])
    video[: chosen.shape[0]] = chosen
    return video, torch.arange(limit) < max(count, 1)


class FrozenBiLMCollator:
    """Token ids and frame features of a batch.

    Args:
        tokenizer: Hugging Face tokenizer with a mask token.
        features: name in `Sample.features`; None makes batches without video. A sample whose video is missing
            has an empty (0, ``feature_dim``) tensor there.
        feature_dim: width that the features must have.
        max_frames: video tokens per sample.
        max_tokens: the text is cut on the right after so many tokens, special ones included.
        suffix: text after the mask.
        use_speech: append the subtitles where a sample has them.
    """

    def __init__(
        self,
        tokenizer: Any,
        features: str | None = "clip_vitl14",
        feature_dim: int = 768,
        max_frames: int = 10,
        max_tokens: int = 256,
        suffix: str = ".",
        use_speech: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.features = features
        self.feature_dim = feature_dim
        self.max_frames = max_frames
        self.max_tokens = max_tokens
        self.suffix = suffix
        self.use_speech = use_speech
        self.needs = ("question",) if features is None else ("question", f"features.{features}")

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """The batch of ``samples``, padded to its longest text.

        Returns:
            The keys of `sample_fields`; ``input_ids`` and ``attention_mask`` (B, T); ``mask_position`` (B,),
            an index into the text; with features also ``video`` (B, V, D) float32 and ``video_mask`` (B, V)
            bool.

        Raises:
            DataError: the features are absent or of another width, or a text does not hold exactly one mask.
        """
        batch = sample_fields(samples)
        batch.update(self._text(samples))
        if self.features is not None:
            video, mask = zip(*(video_tokens(self._frames(s), self.max_frames) for s in samples))
            batch["video"], batch["video_mask"] = torch.stack(video), torch.stack(mask)
        return batch

    def _text(self, samples: Sequence[Sample]) -> Batch:
        prompts = [
            mask_prompt(
                s.question or "",
                self.tokenizer.mask_token,
                self.suffix,
                s.speech if self.use_speech else None,
            )
            for s in samples
        ]
        tokens = self.tokenizer(
            prompts,
            padding="longest",
            padding_side="right",
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        is_mask = ids == self.tokenizer.mask_token_id
        for sample, count in zip(samples, is_mask.sum(1).tolist()):
            if count != 1:
                raise DataError(
                    f"the prompt of sample {sample.id!r} holds {count} {self.tokenizer.mask_token!r} among "
                    f"its first {self.max_tokens} tokens, expected 1. Shorten the question or raise "
                    f"backbone.init_args.max_tokens; question and speech must not hold the mask token itself."
                )
        if not self.suffix and not self.use_speech:
            # The published code hides the end token where no text follows the mask.
            mask = mask.masked_fill(ids == self.tokenizer.sep_token_id, 0)
        return {"input_ids": ids, "attention_mask": mask, "mask_position": is_mask.int().argmax(1)}

    def _frames(self, sample: Sample) -> Tensor:
        if self.features not in sample.features:
            raise DataError(
                f"sample {sample.id!r} has features {sorted(sample.features)}, not {self.features!r}. "
                f"Set backbone.init_args.features, or give an empty tensor for a missing video."
            )
        frames = sample.features[self.features]
        if frames.ndim == 3 and frames.shape[1] == 1:  # an encoder's one token per frame
            frames = frames[:, 0]
        if frames.ndim != 2 or frames.shape[1] != self.feature_dim:
            raise DataError(
                f"features {self.features!r} of sample {sample.id!r} have shape {tuple(frames.shape)}, "
                f"expected (frames, {self.feature_dim}); see backbone.init_args.feature_dim"
            )
        return frames
