"""Where things are in language models of transformers: one function per family, chosen by the configuration's type.

Pre-norm models only; those whose residual stream passes through norms have nothing to fold.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import PretrainedConfig, PreTrainedModel

from fulgurite.methods.structure import Attention, ModelSpec, Tower


def language_spec(model: PreTrainedModel) -> ModelSpec:
    """The spec of a causal or sequence-to-sequence language model.

    Raises:
        ValueError: a family that has no function here, or one of its variants that is built differently.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise ValueError(f"model_type {kind!r} has no spec; those that have one are {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind](model.config)


def llama_spec(config: PretrainedConfig) -> ModelSpec:
    """Llama and what is built like it: RMSNorm, gated hidden units, grouped key and value heads."""
    block, layers = r"model\.layers\.\d+", config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = rf"{block}\.self_attn\.[qkv]_proj"
    gates = rf"{block}\.mlp\.(gate|up)_proj"
    tower = Tower(
        "text",
        block,
        layers,
        config.hidden_size,
        embedding="model.embed_tokens",
        final_norm="model.norm",
        writers=(rf"{block}\.self_attn\.o_proj", rf"{block}\.mlp\.down_proj"),
        attentions=(
            Attention(
                rf"{block}\.self_attn\.v_proj",
                rf"{block}\.self_attn\.o_proj",
                config.num_attention_heads,
                config.num_key_value_heads,
                head_dim,
            ),
        ),
        feed_forward_outputs=rf"{block}\.mlp\.down_proj",
    )
    return ModelSpec(
        towers=(tower,),
        head="lm_head",
        shared_inputs=(
            tuple(rf"{block}\.self_attn\.{part}_proj" for part in "qkv"),
            (rf"{block}\.mlp\.gate_proj", rf"{block}\.mlp\.up_proj"),
        ),
        norm_linear_pairs=(
            (rf"{block}\.input_layernorm", queries),
            (rf"{block}\.post_attention_layernorm", gates),
            (r"model\.norm", r"lm_head"),
        ),
        tied=(("model.embed_tokens.weight", "lm_head.weight"),) if config.tie_word_embeddings else (),
    )


def opt_spec(config: PretrainedConfig) -> ModelSpec:
    """OPT: LayerNorm, biases, learned positions."""
    if not config.do_layer_norm_before or config.word_embed_proj_dim != config.hidden_size:
        raise ValueError("this OPT has its norms after the sum, or narrower embeddings (as the one of 350M has)")
    block, layers = r"model\.decoder\.layers\.\d+", config.num_hidden_layers
    tower = Tower(
        "text",
        block,
        layers,
        config.hidden_size,
        embedding="model.decoder.embed_tokens",
        final_norm="model.decoder.final_layer_norm",
        writers=(r"model\.decoder\.embed_positions", rf"{block}\.self_attn\.out_proj", rf"{block}\.fc2"),
        attentions=(
            Attention(
                rf"{block}\.self_attn\.v_proj",
                rf"{block}\.self_attn\.out_proj",
                config.num_attention_heads,
                config.num_attention_heads,
                config.hidden_size // config.num_attention_heads,
            ),
        ),
        feed_forward_outputs=rf"{block}\.fc2",
    )
    return ModelSpec(
        towers=(tower,),
        head="lm_head",
        shared_inputs=(tuple(rf"{block}\.self_attn\.{part}_proj" for part in "qkv"),),
        norm_linear_pairs=(
            (rf"{block}\.self_attn_layer_norm", rf"{block}\.self_attn\.[qkv]_proj"),
            (rf"{block}\.final_layer_norm", rf"{block}\.fc1"),
            (r"model\.decoder\.final_layer_norm", r"lm_head"),
        ),
        tied=(("model.decoder.embed_tokens.weight", "lm_head.weight"),) if config.tie_word_embeddings else (),
    )


def gpt2_spec(config: PretrainedConfig) -> ModelSpec:
    """GPT-2: LayerNorm, learned positions, layers that store (in, out), and one for queries, keys and values.

    Its heads cannot be rotated: that layer is none of their values alone.
    """
    if config.add_cross_attention:
        raise ValueError("this GPT-2 has cross-attention, whose states come from outside")
    block = r"transformer\.h\.\d+"
    tower = Tower(
        "text",
        block,
        config.n_layer,
        config.n_embd,
        embedding="transformer.wte",
        final_norm="transformer.ln_f",
        writers=(r"transformer\.wpe", rf"{block}\.attn\.c_proj", rf"{block}\.mlp\.c_proj"),
        feed_forward_outputs=rf"{block}\.mlp\.c_proj",
    )
    return ModelSpec(
        towers=(tower,),
        head="lm_head",
        norm_linear_pairs=(
            (rf"{block}\.ln_1", rf"{block}\.attn\.c_attn"),
            (rf"{block}\.ln_2", rf"{block}\.mlp\.c_fc"),
            (r"transformer\.ln_f", r"lm_head"),
        ),
        tied=(("transformer.wte.weight", "lm_head.weight"),) if config.tie_word_embeddings else (),
    )


def t5_spec(config: PretrainedConfig) -> ModelSpec:
    """T5: an encoder, and a decoder that reads it in every block."""
    encoder = t5_tower(config, "encoder", config.num_layers)
    decoder = t5_tower(config, "decoder", config.num_decoder_layers)
    cross, inner = rf"{decoder.blocks}\.layer\.1\.EncDecAttention", r"DenseReluDense\.(wi|wi_0|wi_1)"
    weights = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    return ModelSpec(
        towers=(encoder, decoder),
        head="lm_head",
        shared_inputs=(
            *(tuple(rf"{t.blocks}\.layer\.0\.SelfAttention\.{part}" for part in "qkv") for t in (encoder, decoder)),
            (rf"{cross}\.k", rf"{cross}\.v"),
        ),
        norm_linear_pairs=(
            *((rf"{t.blocks}\.layer\.0\.layer_norm", rf"{t.blocks}\.layer\.0\..*\.[qkv]") for t in (encoder, decoder)),
            (rf"{encoder.blocks}\.layer\.1\.layer_norm", rf"{encoder.blocks}\.layer\.1\.{inner}"),
            (rf"{decoder.blocks}\.layer\.1\.layer_norm", rf"{cross}\.q"),
            (rf"{decoder.blocks}\.layer\.2\.layer_norm", rf"{decoder.blocks}\.layer\.2\.{inner}"),
            (r"encoder\.final_layer_norm", rf"{cross}\.[kv]"),
            (r"decoder\.final_layer_norm", r"lm_head"),
        ),
        tied=((*weights, "lm_head.weight") if config.tie_word_embeddings else weights,),
    )


def t5_tower(config: PretrainedConfig, name: str, layers: int) -> Tower:
    """The encoder or the decoder."""
    block = rf"{name}\.block\.\d+"
    attentions = [rf"{block}\.layer\.0\.SelfAttention"]
    if name == "decoder":
        attentions.append(rf"{block}\.layer\.1\.EncDecAttention")
    hidden = rf"{block}\.layer\.{len(attentions)}\.DenseReluDense\.wo"
    return Tower(
        name,
        block,
        layers,
        config.d_model,
        embedding=f"{name}.embed_tokens",
        final_norm=f"{name}.final_layer_norm",
        memory="encoder" if name == "decoder" else None,
        writers=(*(rf"{each}\.o" for each in attentions), hidden),
        attentions=tuple(
            Attention(rf"{each}\.v", rf"{each}\.o", config.num_heads, config.num_heads, config.d_kv)
            for each in attentions
        ),
        feed_forward_outputs=hidden,
    )


FAMILIES: dict[str, Callable[[PretrainedConfig], ModelSpec]] = {
    "llama": llama_spec,
    "mistral": llama_spec,
    "qwen2": llama_spec,
    "qwen3": llama_spec,
    "gpt2": gpt2_spec,
    "opt": opt_spec,
    "t5": t5_spec,
}
