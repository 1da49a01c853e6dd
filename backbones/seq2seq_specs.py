"""Where things are in VL-BART and VL-T5, under the public names that adapters attach by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fulgurite.methods.structure import ModelSpec, Tower

if TYPE_CHECKING:
    from transformers import PretrainedConfig

Points = dict[str, tuple[str, int]]
SLOTS: Points = {
    "encoder_prompt": (r"encoder_prompt", 1),
    "decoder_prompt": (r"decoder_prompt", 1),
    "embedded": (r"(en|de)coder_embedded", 2),
    "read_out": (r"read_out", 1),
}
_VISUAL_LEAVES = r"visual_embedding\.(?:\w+_order_embedding|(?:feat|absolute_vis_pos)_embedding\.[01])"


def bart_spec(config: PretrainedConfig, visual_parts: int) -> ModelSpec:
    """VL-BART.

    Args:
        config: of the language model.
        visual_parts: modules directly in the visual embedding; 0 where there is none.
    """
    root = r"language\.model\."
    block = rf"{root}(?:en|de)coder\.layers\.\d+"
    encoder, decoder = config.encoder_layers, config.decoder_layers
    attentions, blocks = encoder + 2 * decoder, encoder + decoder
    norms = 2 * encoder + 3 * decoder + 2
    linears = 4 * attentions + 2 * blocks
    norm, linear = r"(?:\w+_layer_norm|layernorm_embedding)", r"(?:[qkv]_proj|out_proj|fc[12])"
    tables = r"language\.(?:lm_head|model\.shared|model\.(?:en|de)coder\.embed_(?:tokens|positions))"
    points: Points = {
        "attention_query": (rf"{block}\.\w+_attn\.q_proj", attentions),
        "attention_key": (rf"{block}\.\w+_attn\.k_proj", attentions),
        "attention_value": (rf"{block}\.\w+_attn\.v_proj", attentions),
        "self_attention_output": (rf"{block}\.self_attn\.out_proj", blocks),
        "cross_attention_output": (rf"{block}\.encoder_attn\.out_proj", decoder),
        "feed_forward_input": (rf"{block}\.fc1", blocks),
        "feed_forward_output": (rf"{block}\.fc2", blocks),
        "linears": (rf"{block}\..*{linear}", linears),
        "layer_norms": (rf"{root}.*\.{norm}", norms),
        "biased": (rf"{root}.*\.(?:{linear}|{norm})", linears + norms),
        "encoder_block": (rf"{root}encoder\.layers\.\d+", encoder),
        "decoder_block": (rf"{root}decoder\.layers\.\d+", decoder),
    }
    return _spec(
        config,
        {**points, **visual_points(visual_parts)},
        parameters=(rf"{root}.*\.(?:{linear}|{norm})|{tables}", linears + norms + 6, visual_parts),
        blocks=(rf"{root}encoder\.layers\.\d+", encoder, rf"{root}decoder\.layers\.\d+", decoder),
        root="language.model.",
        final_norm=None,
        shared_inputs=(
            tuple(rf"{block}\.self_attn\.{part}_proj" for part in "qkv"),
            tuple(rf"{block}\.encoder_attn\.{part}_proj" for part in "kv"),
        ),
    )


def t5_spec(config: PretrainedConfig, visual_parts: int) -> ModelSpec:
    """VL-T5, which has no biases; arguments as of `bart_spec`."""
    root = r"language\."
    block = rf"{root}(?:en|de)coder\.block\.\d+"
    encoder, decoder = config.num_layers, config.num_decoder_layers
    attentions, blocks = encoder + 2 * decoder, encoder + decoder
    norms = 2 * encoder + 3 * decoder + 2
    inner = 2 if config.is_gated_act else 1
    linears = 4 * attentions + (inner + 1) * blocks
    norm, linear = r"(?:final_)?layer_norm", r"(?:(?:Self|EncDec)Attention\.[qkvo]|DenseReluDense\.w(?:i|i_[01]|o))"
    others = rf"{block}\.layer\.0\.SelfAttention\.relative_attention_bias"
    tables = r"language\.(?:lm_head|shared|(?:en|de)coder\.embed_tokens)"
    points: Points = {
        "attention_query": (rf"{block}\.layer\.\d\.\w+Attention\.q", attentions),
        "attention_key": (rf"{block}\.layer\.\d\.\w+Attention\.k", attentions),
        "attention_value": (rf"{block}\.layer\.\d\.\w+Attention\.v", attentions),
        "self_attention_output": (rf"{block}\.layer\.0\.SelfAttention\.o", blocks),
        "cross_attention_output": (rf"{block}\.layer\.1\.EncDecAttention\.o", decoder),
        "feed_forward_input": (rf"{block}\.layer\.\d\.DenseReluDense\.wi(?:_[01])?", inner * blocks),
        "feed_forward_output": (rf"{block}\.layer\.\d\.DenseReluDense\.wo", blocks),
        "linears": (rf"{block}\.layer\.\d\.{linear}", linears),
        "layer_norms": (rf"{root}.*\.{norm}", norms),
        "encoder_block": (rf"{root}encoder\.block\.\d+", encoder),
        "decoder_block": (rf"{root}decoder\.block\.\d+", decoder),
    }
    everything = rf"{root}.*\.{norm}|{block}\.layer\.\d\.{linear}|{others}|{tables}"
    return _spec(
        config,
        {**points, **visual_points(visual_parts)},
        parameters=(everything, norms + linears + 2 + 4, visual_parts),
        blocks=(rf"{root}encoder\.block\.\d+", encoder, rf"{root}decoder\.block\.\d+", decoder),
        root="language.",
        final_norm="final_layer_norm",
        shared_inputs=(
            tuple(rf"{block}\.layer\.0\.SelfAttention\.{part}" for part in "qkv"),
            tuple(rf"{block}\.layer\.1\.EncDecAttention\.{part}" for part in "kv"),
        ),
    )


def visual_points(parts: int) -> Points:
    """The parts of the visual embedding that take one tensor each."""
    return {"visual_embedding": (r"visual_embedding\.\w+", parts)} if parts else {}


def _spec(
    config: PretrainedConfig,
    points: Points,
    parameters: tuple[str, int, int],
    blocks: tuple[str, int, str, int],
    root: str,
    final_norm: str | None,
    shared_inputs: tuple[tuple[str, ...], ...],
) -> ModelSpec:
    """An encoder and a decoder that reads it.

    Args:
        config: of the language model.
        points: without slots and `parameters`.
        parameters: pattern and number of the language model's modules with parameters, and parts of the visual
            embedding, two of which hold two modules each.
        blocks: pattern and number of blocks, of the encoder and of the decoder.
        root: of encoder and decoder.
        final_norm: name of the norm after the last block.
        shared_inputs: see `ModelSpec`.
    """
    pattern, count, parts = parameters
    everything = (f"{pattern}|{_VISUAL_LEAVES}", count + parts + 2) if parts else (pattern, count)
    towers = tuple(
        Tower(
            name,
            blocks[2 * number],
            blocks[2 * number + 1],
            config.d_model,
            embedding=f"{root}{name}.embed_tokens",
            final_norm=final_norm and f"{root}{name}.{final_norm}",
            memory="encoder" if name == "decoder" else None,
        )
        for number, name in enumerate(("encoder", "decoder"))
    )
    names = (f"{root}shared", f"{root}encoder.embed_tokens", f"{root}decoder.embed_tokens", "language.lm_head")
    return ModelSpec(
        towers=towers,
        head="language.lm_head",
        points={**points, "parameters": everything, "head": (r"language\.lm_head", 1), **SLOTS},
        shared_inputs=shared_inputs,
        tied=(tuple(f"{name}.weight" for name in names),),
    )
