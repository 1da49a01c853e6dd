"""What causal language models of transformers behind a prefix of pictures and text share.

    prefix = [text before ; visual states ; text behind]              padded on the left
    logits of answer token t from [prompt ; prefix ; E(answer tokens before t)]

A model that is given no pictures reads text alone.

Legend: B batch, L text tokens, V visual tokens, T target tokens, P prompt length, D width, f width of features.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fulgurite.backbones.causal_specs import causal_spec
from fulgurite.backbones.decoding import continuation_ids
from fulgurite.backbones.generation import IGNORED, GenerativeBackbone, cut_ids, encoded_pictures, padded
from fulgurite.backbones.generation_collator import VisualInput
from fulgurite.backbones.run_weights import fill_from_run
from fulgurite.backbones.slots import Slot, call_after, call_before
from fulgurite.backbones.sources import filled_later, resolve_source
from fulgurite.checkpoints.digest import digest_of_state
from fulgurite.samples import Batch
from fulgurite.samples.features import FeatureExtractor


class CausalBackbone(GenerativeBackbone):
    """A causal language model that writes behind a prefix.

    A subclass sets what is below, and calls `complete` last.

    Attributes:
        language: of transformers; takes embeddings, and writes.
        tokenizer_source: where its tokenizer is.
        gguf_file: name of a file there that holds it; None for the layout of transformers.
        encoder: makes features (K, N, f) of pixels (K, 3, S, S); None where features come with the data.
        visual: what is read of pictures; None for text alone.
        template: text around the question, which takes the place of ``{}``.
        max_tokens: longest text.
    """

    language: Any
    tokenizer_source: str
    gguf_file: str | None = None
    encoder: Any
    visual: VisualInput | None
    template: str
    max_tokens: int

    def complete(self, source: str, checkpoint: Path | None, projector: str | None) -> None:
        """Slots, spec, weights of a run; then all is frozen.

        Args:
            source: where the weights come from.
            checkpoint: run or checkpoint whose weights take their place; None keeps them.
            projector: name of the module that projects features; None for text alone.
        """
        settings = self.language.config.get_text_config()
        end = settings.eos_token_id
        self.end = end[0] if isinstance(end, list) else end
        from transformers import GenerationConfig

        self.language.generation_config = GenerationConfig(pad_token_id=self.end, eos_token_id=self.end)
        width = settings.hidden_size
        self.decoder_prompt = Slot(width, takes_prompts=True)
        self.decoder_embedded, self.read_out = Slot(width), Slot(width)
        self.spec = causal_spec(self.language, projector, None if projector is None else self.get_submodule(projector))
        call_before(self.get_submodule(self.spec.block_names(self, "decoder")[0]), self.decoder_embedded)
        call_after(self.language.get_decoder(), self.read_out)
        self.language.get_output_embeddings().register_forward_pre_hook(contiguous)
        self.source = str(checkpoint or source)
        if checkpoint is not None and not filled_later():
            fill_from_run(self, checkpoint)
        self.freeze()

    @cached_property
    def tokenizer(self) -> Any:
        """The language model's tokenizer, read at first use. Raises ValueError where it has more tokens."""
        from transformers import AutoTokenizer

        given = {} if self.gguf_file is None else {"gguf_file": self.gguf_file}
        tokenizer = self.fitted(AutoTokenizer.from_pretrained(resolve_source(self.tokenizer_source), **given))
        size = self.language.config.get_text_config().vocab_size
        if len(tokenizer) > size:
            raise ValueError(
                f"the tokenizer of {self.tokenizer_source} has {len(tokenizer)} tokens, the language model {size}"
            )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = self.end
        return tokenizer

    def fitted(self, tokenizer: Any) -> Any:
        """The tokenizer with whatever more the model needs of it."""
        return tokenizer

    def feature_extractor(self) -> FeatureExtractor | None:
        """Features of the sampled frames; None where features come with the data."""
        return None if self.encoder is None else FeatureExtractor(self.encoder, self.visual.sampling)

    def target_batch(self, texts: Sequence[str], max_lengths: Sequence[int | None] | None = None) -> Batch:
        """As in the base; a text stands behind the prompt and a space, and ends with the end token."""
        tokens = [[*ids, self.end] for ids in continuation_ids(self.tokenizer, texts)]
        tokens = [cut_ids(ids, limit) for ids, limit in zip(tokens, max_lengths or [None] * len(tokens), strict=True)]
        return {"targets": padded(tokens, IGNORED)}

    @abstractmethod
    def projected(self, features: Tensor) -> Tensor:
        """Features (B, V, f) as states (B, V, D)."""

    def place_of_pictures(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Of text (B, L), the position (B, 1) that visual states follow, -1 for the start; and (B, L) what is text."""
        return text.new_full((len(text), 1), -1), torch.ones_like(text, dtype=torch.bool)

    def prefix(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What stands before an answer (B, P + V + L, D), and its mask; padding comes before all but prompts."""
        text, mask = batch["text"], batch["text_mask"]
        states = self.language.get_input_embeddings()(text)
        places = torch.arange(text.shape[1], device=text.device).expand_as(text)
        if "picture" in batch:
            real = batch["picture"] >= 0
            if "features" in batch:
                features = batch["features"]
            else:
                features = encoded_pictures(self.encoder, self.visual, batch["pixels"], real)
            visual = self.projected(features.to(states.dtype)).to(states.dtype)
            after, words = self.place_of_pictures(text)
            room = real.shape[1] + 1
            behind = after * room + torch.arange(1, room, device=text.device)
            places = torch.cat([behind, places * room], dim=1)
            states, mask = torch.cat([visual, states], dim=1), torch.cat([real, mask & words], dim=1)
        order = places.masked_fill(~mask, torch.iinfo(places.dtype).min).argsort(dim=1, stable=True)
        states, mask = states.gather(1, order[..., None].expand_as(states)), mask.gather(1, order)
        prompted = self.decoder_prompt(states)
        added = mask.new_ones(len(mask), prompted.shape[1] - states.shape[1])
        return prompted, torch.cat([added, mask], dim=1)

    def forward(self, batch: Batch, targets: Tensor) -> Tensor:
        """As in the base."""
        prefix, mask = self.prefix(batch)
        before = targets[:, :-1]  # the last token is followed by none
        states = torch.cat([prefix, self.language.get_input_embeddings()(before.clamp(min=0))], dim=1)
        mask = torch.cat([mask, before != IGNORED], dim=1).long()
        out = self.language(
            inputs_embeds=states,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            logits_to_keep=targets.shape[1],
        )
        return out.logits

    @torch.no_grad()
    def generate_ids(self, batch: Batch, num_beams: int = 1, max_new_tokens: int = 20) -> Tensor:
        """As in the base."""
        return self.continued(batch, num_beams=num_beams, max_new_tokens=max_new_tokens)

    def continued(self, batch: Batch, **options: Any) -> Tensor:
        """Token ids (B, T) that follow the prefix, by a deterministic search with these options of transformers."""
        prefix, mask = self.prefix(batch)
        return self.language.generate(inputs_embeds=prefix, attention_mask=mask.long(), do_sample=False, **options)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all frozen weights as they are at first use; reads every weight once."""
        return digest_of_state(self.state_dict())

    def refresh(self) -> None:
        """The digests anew, the encoder's too."""
        self.__dict__.pop("fingerprint", None)
        if self.encoder is not None:
            self.encoder.__dict__.pop("fingerprint", None)


def check_template(template: str, option: str, mark: str = "{}", meaning: str = "where the question goes") -> None:
    """Raise ValueError where a text has not one place ``mark``."""
    if template.count(mark) != 1:
        raise ValueError(f"{option}={template!r} must have one {mark}, {meaning}")


def contiguous(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """The last positions of a batch as a tensor of their own, lest they be multiplied row by row, each reading all of
    the output matrix."""
    return (args[0].contiguous(),)
