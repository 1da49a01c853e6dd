"""What VL-BART and VL-T5 share: an encoder that reads text and visual tokens, and the library's decoder.

The encoder is a short loop over the library's own blocks, since visual tokens join the text in the middle of what the
library's encoder does. The decoder, the head and the search for a text are the library's.

    [prompt ; text]  ->  encoder_prompt  ->  + visual tokens  ->  encoder_embedded  ->  blocks  ->  states
    decoder_prompt, then the tokens so far  ->  decoder_embedded  ->  blocks  ->  read_out  ->  head

A decoder prompt takes the first positions of the decoder, before the start token: its keys and values are those that
running it through the decoder alone leaves behind.

Legend: B batch, L text positions with prompts, V visual tokens, T target tokens, P prompt length, D width.
"""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fulgurite.backbones.frames import FrameEncoder
from fulgurite.backbones.generation import GenerativeBackbone, encoded_pictures
from fulgurite.backbones.generation_collator import GenerationCollator, VisualInput
from fulgurite.backbones.slots import Slot, call_after, call_before
from fulgurite.backbones.sources import resolve_source
from fulgurite.backbones.visual_embedding import ORDERS, VisualEmbedding, orders_of
from fulgurite.backbones.vl_checkpoints import fill_from_checkpoint
from fulgurite.checkpoints.digest import digest_of_state
from fulgurite.samples import Batch
from fulgurite.samples.features import FeatureExtractor


class VisionLanguageSeq2Seq(GenerativeBackbone):
    """An encoder-decoder of transformers with a visual embedding; a subclass says which.

    Args:
        model: folder, hub name or ``package:NAME/path`` of the language model and its tokenizer.
        pretrained: read the language model's weights from ``model``. False starts from random weights; a
            ``checkpoint`` may then fill all of them.
        config: with ``pretrained: false``, the fields in which the configuration differs from the base size.
        checkpoint: published VL-T5 or VL-BART file, of all weights.
        tokenizer: where the tokenizer is, if not with ``model``.
        extra_tokens: rows added to the token table; the last 100 rows of the table say the order of visual tokens.
        features: name of the features in `Sample.features`; None reads text alone.
        feature_dim: width of the features.
        grid: side to which a grid of features is max-pooled; None takes all of its tokens.
        encoder: makes the features of raw pictures and videos; sets ``features`` and ``feature_dim``.
        num_frames: frames that ``encoder`` takes of a video.
        train_order: have a table of its own for the order of visual tokens, which trains with the rest of the visual
            embedding; the published code uses the language model's frozen rows.
        max_tokens: longest text in tokens.
        long_text: what happens to a longer one.
        init_seed: seed of what no file fills.
        train_dropout: see `FrozenBackbone`.
        recompute: see `FrozenBackbone`.

    Raises:
        ValueError: options that exclude each other.
        MismatchError: tensors of ``checkpoint`` do not fit; all of them are listed.
    """

    base_config: dict[str, Any]

    def __init__(
        self,
        model: str,
        pretrained: bool = True,
        config: dict[str, Any] | None = None,
        checkpoint: Path | None = None,
        tokenizer: str | None = None,
        extra_tokens: int = 200,
        features: str | None = "clip_rn101",
        feature_dim: int = 2048,
        grid: int | None = 6,
        encoder: FrameEncoder | None = None,
        num_frames: int = 8,
        train_order: bool = False,
        max_tokens: int = 20,
        long_text: Literal["error", "cut"] = "error",
        init_seed: int = 0,
        train_dropout: Literal["official", "off"] = "official",
        recompute: bool = False,
    ) -> None:
        super().__init__(train_dropout, recompute)
        from transformers import GenerationConfig

        if pretrained and config:
            raise ValueError("config changes the language model's shape: set pretrained: false with it")
        if extra_tokens < 0:
            raise ValueError(f"extra_tokens={extra_tokens} must not be negative")
        source = resolve_source(model) if pretrained or tokenizer is None else model
        self.source = str(checkpoint or model)
        self.tokenizer_source = source if tokenizer is None else resolve_source(tokenizer)
        self.max_tokens, self.long_text = max_tokens, long_text
        if encoder is not None:
            self.visual: VisualInput | None = VisualInput.of(encoder, grid, num_frames)
        else:
            self.visual = None if features is None else VisualInput(features, feature_dim, grid)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init_seed)
            self.language = self._language_model(source, pretrained, config or {}, extra_tokens)
            settings = self.language.config
            width = settings.d_model
            if self.visual is not None:
                orders = self.token_table.flip(0)[:ORDERS].detach() if train_order else self.token_table[:0]
                self.visual_embedding = VisualEmbedding(self.visual.width, width, self.norm, len(orders))
                self.visual_embedding.reset_parameters(self.visual_std)
                if train_order:
                    self.visual_embedding.obj_order_embedding.weight.data.copy_(orders)
        if checkpoint is not None:
            fill_from_checkpoint(self, checkpoint, self.visual_home)
        # Nothing of what the source prescribes for writing: beams and lengths are this call's own.
        self.language.generation_config = GenerationConfig(
            pad_token_id=settings.pad_token_id,
            eos_token_id=settings.eos_token_id,
            decoder_start_token_id=settings.decoder_start_token_id,
        )
        self.encoder_prompt, self.decoder_prompt = Slot(width, takes_prompts=True), Slot(width, takes_prompts=True)
        self.encoder_embedded, self.decoder_embedded = Slot(width), Slot(width)
        self.read_out = Slot(width)
        call_before(self.decoder_blocks[0], self.decoder_embedded)
        call_after(self.decoder, self.read_out)
        self.encoder = encoder
        self.build_spec()
        self.freeze()

    visual_home: str  # what the published names of the visual embedding begin with

    @abstractmethod
    def norm(self, width: int) -> nn.Module:
        """The norm of the visual embedding."""

    @property
    @abstractmethod
    def visual_std(self) -> float:
        """Of a fresh visual embedding."""

    @property
    @abstractmethod
    def decoder(self) -> nn.Module:
        """The library's decoder."""

    @property
    @abstractmethod
    def decoder_blocks(self) -> nn.ModuleList:
        """Its blocks."""

    @abstractmethod
    def new_language_model(self, config: dict[str, Any]) -> nn.Module:
        """The library's model with random weights, of `base_config` but for ``config``."""

    @abstractmethod
    def read_language_model(self, source: str) -> nn.Module:
        """The library's model with the weights of ``source``."""

    @abstractmethod
    def embed(self, text: Tensor) -> Tensor:
        """(B, L, D) of tokens (B, L), before prompts."""

    @abstractmethod
    def run_encoder(self, text: Tensor, visual: Tensor | None, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks over [text ; visual].

        Args:
            text: (B, L, D) with prompts.
            visual: (B, V, D), or None.
            mask: (B, L + V) True for real positions.

        Returns:
            States (B, S, D) and their mask, S = L + V, or L where `encoder_embedded` leaves the text alone.
        """

    @abstractmethod
    def build_spec(self) -> None:
        """Fill `spec`."""

    def _language_model(self, source: str, pretrained: bool, config: dict[str, Any], extra_tokens: int) -> nn.Module:
        if pretrained:
            language = self.read_language_model(source)
            if extra_tokens:
                size = language.config.vocab_size + extra_tokens
                language.resize_token_embeddings(size, mean_resizing=False)
            return language
        given = {**self.base_config, **config}
        return self.new_language_model({**given, "vocab_size": given["vocab_size"] + extra_tokens})

    @property
    def visual_parts(self) -> int:
        """Modules directly in the visual embedding; 0 where there is none."""
        return len(list(self.visual_embedding.children())) if self.visual is not None else 0

    @property
    def token_table(self) -> Tensor:
        """(vocabulary, D), tied to the head."""
        return self.language.get_input_embeddings().weight

    @cached_property
    def tokenizer(self) -> Any:
        """The language model's tokenizer, read at first use.

        Raises:
            ValueError: it has more tokens than the table has rows, or pads with another one.
        """
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_source)
        settings = self.language.config
        if len(tokenizer) > settings.vocab_size:
            raise ValueError(
                f"{self.tokenizer_source} has {len(tokenizer)} tokens, the language model {settings.vocab_size}"
            )
        if tokenizer.pad_token_id != settings.pad_token_id:
            raise ValueError(
                f"{self.tokenizer_source} pads with token {tokenizer.pad_token_id}, the language model with "
                f"{settings.pad_token_id}: set pad_token_id, and with it the other special ones, in "
                "backbone.init_args.config"
            )
        return tokenizer

    def collator(self, stage: str) -> GenerationCollator:
        """The same batches in every stage."""
        return GenerationCollator(self.tokenizer, self.visual, self.max_tokens, self.long_text)

    def feature_extractor(self) -> FeatureExtractor | None:
        """Grids of the sampled frames; None where features come with the data."""
        return None if self.encoder is None else FeatureExtractor(self.encoder, self.visual.sampling)

    def visual_tokens(self, batch: Batch) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Embedded visual tokens (B, V, D) and their mask (B, V); None where the batch has none.

        A batch may say by ``order`` (B, V) another order of its tokens than that in which they stand.
        """
        if "picture" not in batch:
            return None, None
        picture = batch["picture"]
        real = picture >= 0
        if "features" in batch:
            features = batch["features"]
        else:
            features = encoded_pictures(self.encoder, self.visual, batch["pixels"], real)
        order = batch["order"] if "order" in batch else orders_of(picture)
        return self.visual_embedding(features, picture.clamp(min=0), order, self.token_table), real

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """States of the encoder (B, S, D) and the mask (B, S) of the real ones."""
        embeds = self.embed(batch["text"])
        text = self.encoder_prompt(embeds)
        mask = batch["text_mask"]
        if (prompts := text.shape[1] - embeds.shape[1]) > 0:
            mask = torch.cat([mask.new_ones(len(mask), prompts), mask], dim=1)
        visual, real = self.visual_tokens(batch)
        if visual is not None:
            mask = torch.cat([mask, real], dim=1)
        return self.run_encoder(text, visual, mask)

    def embedded(self, states: Tensor, mask: Tensor, text_length: int) -> tuple[Tensor, Tensor]:
        """What the first block reads of ``states`` (B, L + V, D), and its mask, through the slot.

        Raises:
            ValueError: neither all positions nor the text came back.
        """
        kept = self.encoder_embedded(states, text_length=text_length, mask=mask)
        if kept.shape[1] not in (states.shape[1], text_length):
            raise ValueError(
                f"encoder_embedded gives {kept.shape[1]} positions of {states.shape[1]}: it may leave the "
                f"{text_length} of the text alone, or all"
            )
        return kept, mask[:, : kept.shape[1]]

    def forward(self, batch: Batch, targets: Tensor) -> Tensor:
        """As in the base."""
        from transformers.modeling_outputs import BaseModelOutput

        states, mask = self.encode(batch)
        ids = self.language.prepare_decoder_input_ids_from_labels(targets)
        with self._prompted(ids) as ids:
            logits = self.language(
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                attention_mask=mask,
                decoder_input_ids=ids,
                use_cache=False,
            ).logits
        return logits[:, -targets.shape[1] :]

    @torch.no_grad()
    def generate_ids(self, batch: Batch, num_beams: int = 1, max_new_tokens: int = 20) -> Tensor:
        """As in the base."""
        from transformers.modeling_outputs import BaseModelOutput

        states, mask = self.encode(batch)
        start = self.language.config.decoder_start_token_id
        with self._prompted(torch.full((len(states), 1), start, device=states.device)) as ids:
            written = self.language.generate(
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                attention_mask=mask.long(),
                decoder_input_ids=ids,
                num_beams=num_beams,
                max_new_tokens=max_new_tokens,
                do_sample=False,
            )
        return written[:, ids.shape[1] :]

    @contextmanager
    def _prompted(self, ids: Tensor) -> Iterator[Tensor]:
        """Token ids (B, T) with places in front for the decoder's prompts, which stand there until the block ends."""
        table = self.decoder.embed_tokens
        width = table.weight.shape[1]
        prompts = self.decoder_prompt(table.weight.new_zeros(len(ids), 0, width))
        if prompts.shape[1] == 0:
            yield ids
            return
        handle = table.register_forward_hook(functools.partial(_with_prompts, prompts))
        try:
            yield torch.cat([ids[:, :1].expand(-1, prompts.shape[1]), ids], dim=1)
        finally:
            handle.remove()

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all frozen weights as they are at first use; reads every weight once."""
        return digest_of_state(self.state_dict())

    def refresh(self) -> None:
        """The digest anew."""
        self.__dict__.pop("fingerprint", None)


def _with_prompts(prompts: Tensor, table: nn.Module, args: tuple[Any, ...], embeds: Tensor) -> Tensor:
    """Prompts (B, P, D) at the first places of embedded tokens (R, T, D), R rows of beams per sample.

    A later step of writing embeds its one new token alone.
    """
    length = prompts.shape[1]
    if embeds.shape[1] <= length:
        return embeds
    rows = prompts.repeat_interleave(len(embeds) // len(prompts), dim=0)
    return torch.cat([rows.to(embeds.dtype), embeds[:, length:]], dim=1)
