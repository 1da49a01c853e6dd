"""FrozenBiLM: a frozen DeBERTa-v2 that reads frame features in front of a mask-prompted question.

Source: Yang et al., "Zero-Shot Video Question Answering via Frozen Bidirectional Language Models" (NeurIPS
2022), the backbone of DAM.

    X = [W_v f + b_v ; E(ids)]                      video first, padded frames masked
    h_0 .. h_n = DeBERTa(X)                         adapters after both dense layers of every block, by hooks
    q = P + h_(n-1); twice q = Layer_n(q, h_(n-1))  enhanced mask decoder
    logits = LN(gelu(W_d q + b_d)) R^T + r          at the mask; R: mean token embeddings of the answers

Legend: B batch, V video tokens, T text tokens, S = V + T, D width, A answers.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fulgurite.backbones.base import QAOutput, StateDict, VideoQABackbone, masked_mean
from fulgurite.backbones.deberta import (
    XLARGE,
    LanguageModelHead,
    build_encoder,
    decode_masks,
    read_pretrained,
)
from fulgurite.backbones.encoder_specs import deberta_spec
from fulgurite.backbones.frames import FrameEncoder
from fulgurite.backbones.frozenbilm_checkpoint import (
    ImportedWeights,
    adapter_mismatches,
    read_frozenbilm,
    state_mismatches,
)
from fulgurite.backbones.parts import Part
from fulgurite.backbones.prompts import FrozenBiLMCollator
from fulgurite.backbones.sources import resolve_source
from fulgurite.checkpoints.digest import digest_of_state
from fulgurite.checkpoints.errors import MismatchError
from fulgurite.methods.structure import ModelSpec
from fulgurite.samples import Batch
from fulgurite.samples.features import FeatureExtractor
from fulgurite.samples.sampling import FrameSampling

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_log = logging.getLogger(__name__)
_PROJECTION = r"deberta\.embeddings\.linear_video\.(weight|bias)"


class FrozenBiLM(VideoQABackbone):
    """The frozen video-language model of FrozenBiLM and DAM, without its adapters.

    Args:
        model: folder, hub name or ``package:NAME/path`` of a DeBERTa-v2 masked language model and its
            tokenizer.
        pretrained: read the language model's weights from ``model``. False starts from random weights; a
            complete ``checkpoint`` may then fill all of them.
        config: with ``pretrained: false``, the fields in which the configuration differs from
            `deberta.XLARGE`.
        checkpoint: published FrozenBiLM or DAM file. One that holds only trained tensors is laid over
            ``model``.
        tokenizer: where the tokenizer is, if not with ``model``.
        features: name of the frame features in `Sample.features`; None reads the question alone.
        feature_dim: width of the frame features.
        frame_encoder: makes the features of raw videos, one vector per second, through the DataModule's
            ``feature_cache``; sets ``features`` and ``feature_dim``. The published ones are CLIP ViT-L/14.
        max_frames: video tokens per question.
        max_tokens: the prompt is cut after so many tokens.
        max_answer_tokens: an answer is embedded by its first so many tokens.
        suffix: text after the mask.
        suffix_quoted: put the suffix in double quotes, as the scripts of the released DAM runs did by
            accident.
        use_speech: append subtitles to the prompt.
        answer_bias: ``"zero"`` as in all published numbers, where setting the bias had no effect; ``"mean"``,
            what was meant, is the mean vocabulary bias of the answer's tokens.
        routing_layer: index into the hidden states (embedding output first) for the text part of the routing
            feature.
        init_seed: seed of whatever no file fills: the video projection without ``checkpoint``, and all
            weights with ``pretrained: false``.
        train_dropout: see `VideoQABackbone`.
        recompute: see `VideoQABackbone`.

    Note:
        Keys and queries also project the table of relative positions, which has no batch dimension. So
        adapters at the points ``query`` and ``key`` serve one set per batch; the bank refuses per-sample
        mixing there.

    Raises:
        MismatchError: tensors of the files do not fit; all of them are listed.
    """

    derived = ("answer_table", "answer_offset")

    def __init__(
        self,
        model: str = "microsoft/deberta-v2-xlarge",
        pretrained: bool = True,
        config: dict[str, Any] | None = None,
        checkpoint: Path | None = None,
        tokenizer: str | None = None,
        features: str | None = "clip_vitl14",
        feature_dim: int = 768,
        frame_encoder: FrameEncoder | None = None,
        max_frames: int = 10,
        max_tokens: int = 256,
        max_answer_tokens: int = 5,
        suffix: str = ".",
        suffix_quoted: bool = False,
        use_speech: bool = True,
        answer_bias: Literal["zero", "mean"] = "zero",
        routing_layer: int = -4,
        init_seed: int = 0,
        train_dropout: Literal["official", "off"] = "official",
        recompute: bool = False,
    ) -> None:
        super().__init__(train_dropout, recompute)
        from transformers import DebertaV2Config
        from transformers.initialization import no_init_weights

        if pretrained and config:
            raise ValueError("config changes the language model's shape: set pretrained: false with it")
        source = resolve_source(model)
        self.tokenizer_source = source if tokenizer is None else resolve_source(tokenizer)
        settings = DebertaV2Config.from_pretrained(source) if pretrained else DebertaV2Config(**XLARGE | (config or {}))
        if max_frames + max_tokens > settings.max_position_embeddings:
            raise ValueError(
                f"max_frames={max_frames} and max_tokens={max_tokens} together pass the "
                f"{settings.max_position_embeddings} positions of {model}"
            )
        if frame_encoder is not None:
            if frame_encoder.tokens != 1:
                raise ValueError(f"frame_encoder gives {frame_encoder.tokens} tokens per frame; set its grid to 0")
            features, feature_dim = frame_encoder.name, frame_encoder.width
        self.source = str(checkpoint or model)
        self.features, self.feature_dim, self.max_frames = features, feature_dim, max_frames
        self.max_tokens, self.max_answer_tokens = max_tokens, max_answer_tokens
        self.suffix = f'"{suffix}"' if suffix_quoted else suffix
        self.use_speech, self.answer_bias, self.routing_layer = use_speech, answer_bias, routing_layer
        width = settings.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init_seed)
            # Random values that a file replaces would take most of the time that building takes.
            with no_init_weights() if pretrained or checkpoint is not None else nullcontext():
                self.deberta = build_encoder(settings)
                self.lm_predictions = nn.ModuleDict({"lm_head": LanguageModelHead(settings)})
            projection = nn.Linear(feature_dim, width)
            nn.init.normal_(projection.weight, std=settings.initializer_range)
            nn.init.zeros_(projection.bias)
        self.deberta.embeddings.linear_video = projection
        self.register_buffer("answer_table", torch.zeros(0, width), persistent=False)
        self.register_buffer("answer_offset", torch.zeros(0), persistent=False)
        self.spec = _spec(settings)
        self.not_in_checkpoint: tuple[str, ...] = ()
        self._adapters: dict[str, StateDict] | None = None
        self._load(source if pretrained else None, checkpoint)
        self.frame_encoder = frame_encoder
        self.freeze()

    def _load(self, source: str | None, checkpoint: Path | None) -> None:
        if source is None and checkpoint is None:
            return
        imported = ImportedWeights({}, {}) if checkpoint is None else read_frozenbilm(checkpoint)
        own = self.state_dict()
        self.not_in_checkpoint = tuple(name for name in own if name not in imported.backbone)
        state = {}
        if source is not None and self.not_in_checkpoint:
            state.update(read_pretrained(source))
        state.update(imported.backbone)
        lines = state_mismatches(state, own, optional=_PROJECTION if checkpoint is None else "")
        if imported.adapters:
            sites = {
                name: self.get_submodule(name)
                for point in ("attention_output", "feed_forward_output")
                for name in self.spec.point_names(self, point)
            }
            lines += adapter_mismatches(imported.adapters, sites)
            self._adapters = imported.adapters
        if lines:
            files = " and ".join(str(file) for file in (checkpoint, source) if file is not None)
            listed = "\n  ".join(lines)
            raise MismatchError(
                f"{len(lines)} tensors of {files} do not fit this model:\n  {listed}\n"
                f"Set backbone.init_args.config or model to the shape of the file; a file of trained tensors "
                f"alone needs pretrained: true."
            )
        # Assigned, not copied: a language model of gigabytes is in memory once.
        fitting = {name: tensor.to(own[name].device, own[name].dtype) for name, tensor in state.items()}
        # All names and shapes were compared above; what may be missing is in not_in_checkpoint.
        self.load_state_dict(fitting, strict=False, assign=True)
        if checkpoint is not None and self.not_in_checkpoint:
            names = ", ".join(self.not_in_checkpoint)
            _log.info(
                "%s lacks %d tensors, taken from %s: %s",
                checkpoint,
                len(self.not_in_checkpoint),
                source,
                names,
            )

    def initial_adapters(self) -> dict[str, StateDict] | None:
        """Adapters of ``checkpoint`` by site, with the tensors of `ImportedWeights`; None if it has none."""
        return self._adapters

    def feature_extractor(self) -> FeatureExtractor | None:
        """One vector per second of a video; None where features come with the data."""
        if self.frame_encoder is None:
            return None
        return FeatureExtractor(self.frame_encoder, FrameSampling("per_second", count=0))

    @cached_property
    def tokenizer(self) -> Any:
        """The language model's tokenizer, read at first use.

        Raises:
            ValueError: it has no mask token, or more tokens than the language model.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_source)
        size = self.deberta.config.vocab_size
        if tokenizer.mask_token is None or tokenizer.pad_token is None:
            raise ValueError(f"the tokenizer of {self.tokenizer_source} needs a mask and a padding token")
        if len(tokenizer) > size:
            raise ValueError(f"{self.tokenizer_source} has {len(tokenizer)} tokens, the language model {size}")
        return tokenizer

    def collator(self, stage: str) -> FrozenBiLMCollator:
        """The same batches in every stage."""
        return FrozenBiLMCollator(
            self.tokenizer,
            self.features,
            self.feature_dim,
            self.max_frames,
            self.max_tokens,
            self.suffix,
            self.use_speech,
        )

    @torch.no_grad()
    def set_answers(self, answers: Sequence[str]) -> None:
        """Means of the token embeddings of each answer, (A, D), and biases, (A,)."""
        repeated = [answer for answer, count in Counter(answers).items() if count > 1]
        if not answers or repeated:
            raise ValueError(f"the answer vocabulary must be non-empty and without repeats; repeated: {repeated[:5]}")
        tokens = self.tokenizer(
            list(answers), add_special_tokens=False, truncation=True, max_length=self.max_answer_tokens
        )["input_ids"]
        embedding, bias = self.deberta.embeddings.word_embeddings.weight, self.lm_predictions["lm_head"].bias
        width = max(map(len, tokens))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in tokens], device=embedding.device)
        real = torch.arange(width, device=embedding.device) < ids.new_tensor([len(row) for row in tokens])[:, None]
        count = real.sum(1).clamp(min=1)
        self.answers = tuple(answers)
        self.answer_table = (embedding[ids] * real[..., None]).sum(1) / count[:, None]
        mean_bias = (bias[ids] * real).sum(1) / count
        self.answer_offset = mean_bias if self.answer_bias == "mean" else torch.zeros_like(mean_bias)

    def encode(self, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Run the language model with its mask decoder.

        Returns:
            Decoded states (B, S, D); hidden states of the encoder, embedding output first, each (B, S, D);
            mask (B, S) integer. Values at masked positions mean nothing.
        """
        hidden, mask = self._hidden(batch)
        return decode_masks(self.deberta, hidden[-2], mask), hidden, mask

    def _hidden(self, batch: Batch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Hidden states of the encoder, and the mask."""
        embeds = self.deberta.embeddings.word_embeddings(batch["input_ids"])  # (B, T, D)
        mask = _mask(batch)
        if batch.get("video") is not None:
            video = self.deberta.embeddings.linear_video(batch["video"].to(embeds.dtype))  # (B, V, D)
            embeds = torch.cat([video.to(embeds.dtype), embeds], dim=1)
        hidden = self.deberta(
            inputs_embeds=embeds, attention_mask=mask, output_hidden_states=True, return_dict=True
        ).hidden_states
        return hidden, mask

    def pass_blocks(self, batch: Batch) -> None:
        """The encoder alone: the mask decoder runs its last block twice more."""
        self._hidden(batch)

    def forward(self, batch: Batch) -> QAOutput:
        """Score the answers at the mask.

        The routing parts are the mean of the raw frame features (B, ``feature_dim``), zeros without video,
        and the mean over all real positions of the hidden states of ``routing_layer`` (B, D).
        """
        if not self.answers:
            raise RuntimeError("no answers to score: call set_answers first")
        states, hidden, mask = self.encode(batch)
        position = batch["mask_position"] + states.shape[1] - batch["input_ids"].shape[1]
        at_mask = states[torch.arange(states.shape[0], device=states.device), position]  # (B, D)
        logits = self.lm_predictions["lm_head"](at_mask, self.answer_table, self.answer_offset)
        if batch.get("video") is not None:
            frames = masked_mean(batch["video"].float(), batch["video_mask"])
        else:
            frames = states.new_zeros(states.shape[0], self.feature_dim, dtype=torch.float32)
        return QAOutput(logits, (frames, masked_mean(hidden[self.routing_layer].float(), mask)))

    def token_masks(self, batch: Batch) -> dict[str, Tensor]:
        """Of the blocks and, where there is video, of its projection. The mask's own position has no padding.

        Query and key layers also see relative positions, which are no tokens (see `ModelSpec.position_readers`), or
        layers of their own see them, which have no padding.
        """
        video = {} if batch.get("video") is None else {r"deberta\.embeddings\.linear_video": batch["video_mask"]}
        return {r"deberta\.encoder\.layer\.(?!.*\.pos_(key|query)_proj$).*": _mask(batch), **video}

    def parts(self) -> tuple[Part, ...]:
        """The masked language model as transformers has it, without the mask decoder, and the frame encoder."""
        language = Part(
            "text",
            "hf",
            self._bare_language_model,
            {"deberta": "deberta", "lm_predictions": "lm_predictions"},
            self._vocabulary_logits,
            self.tokenizer,
        )
        frames = () if self.frame_encoder is None else self.frame_encoder.parts("frame_encoder")
        return (language, *frames)

    def _bare_language_model(self) -> nn.Module:
        from transformers import DebertaV2Config, DebertaV2ForMaskedLM

        return DebertaV2ForMaskedLM(DebertaV2Config.from_dict({**self.deberta.config.to_dict(), "legacy": False}))

    def _vocabulary_logits(self, **inputs: Tensor) -> dict[str, Tensor]:
        states, head = self.deberta(**inputs).last_hidden_state, self.lm_predictions["lm_head"]
        return {"logits": head(states, self.deberta.embeddings.word_embeddings.weight, head.bias)}

    @property
    def routing_widths(self) -> tuple[int, ...]:
        """Width of the frame features and of the hidden states."""
        return (self.feature_dim, self.deberta.config.hidden_size)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all frozen weights as they are at first use; reads every weight once."""
        return digest_of_state(self.state_dict())

    def refresh(self) -> None:
        """As in the base, and the digest."""
        self.__dict__.pop("fingerprint", None)
        super().refresh()


def _mask(batch: Batch) -> Tensor:
    """(B, S) integer, 1 where a position is real."""
    mask = batch["attention_mask"].long()
    return mask if batch.get("video") is None else torch.cat([batch["video_mask"].long(), mask], dim=1)


def _spec(config: PretrainedConfig) -> ModelSpec:
    spec = deberta_spec(config, "deberta.")
    others = {
        "embedding_norm": (r"deberta\.embeddings\.LayerNorm", 1),
        "position_norm": (r"deberta\.encoder\.LayerNorm", 1),
        "convolution_norm": (r"deberta\.encoder\.conv\.LayerNorm", 1),
        "head_norm": (r"lm_predictions\.lm_head\.LayerNorm", 1),
        "video_projection": (r"deberta\.embeddings\.linear_video", 1),
    }
    return replace(spec, head="lm_predictions.lm_head", points={**spec.points, **others})
