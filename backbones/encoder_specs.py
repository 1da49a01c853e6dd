"""Where things are in text encoders of transformers that are built like BERT: norms after each sum.

Their residual stream passes through norms, so there is nothing to fold, and no pairs of norms and their readers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fulgurite.methods.structure import ModelSpec, Tower

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def bert_spec(config: PretrainedConfig, root: str) -> ModelSpec:
    """BERT and RoBERTa.

    Args:
        config: of the model.
        root: what comes before ``encoder.layer`` in the names of modules, as ``bert.``, or nothing.
    """
    queries = ("query", "key", "value")
    return encoder_spec(config, root, queries, shared=[queries])


def deberta_spec(config: PretrainedConfig, root: str) -> ModelSpec:
    """DeBERTa of the second version and later; arguments as of `bert_spec`.

    Where layers are shared with the relative positions, queries and keys also see those, and values do not.
    """
    queries = ("query_proj", "key_proj", "value_proj")
    if not config.relative_attention:
        return encoder_spec(config, root, queries, shared=[queries])
    if getattr(config, "share_att_key", False):
        spec = encoder_spec(config, root, queries, shared=[queries[:2]])
        return replace(spec, position_readers=spec.shared_inputs[0])
    both = [("pos_key_proj", "pos_query_proj")] if {"c2p", "p2c"} <= set(config.pos_att_type) else []
    return encoder_spec(config, root, queries, shared=[queries, *both])


def encoder_spec(
    config: PretrainedConfig, root: str, queries: tuple[str, str, str], shared: Sequence[tuple[str, ...]]
) -> ModelSpec:
    """A stack of blocks as BERT's.

    Args:
        config: of the model.
        root: see `bert_spec`.
        queries: names of the layers of queries, keys and values.
        shared: names of those that receive one input.
    """
    layers, width = config.num_hidden_layers, config.hidden_size
    block = rf"{root}encoder.layer.".replace(".", r"\.") + r"\d+"
    inner = {
        "attention_output": r"attention\.output\.dense",
        "feed_forward_output": r"output\.dense",
        **{point: rf"attention\.self\.{name}" for point, name in zip(("query", "key", "value"), queries)},
        "feed_forward_input": r"intermediate\.dense",
        "attention_norm": r"attention\.output\.LayerNorm",
        "feed_forward_norm": r"output\.LayerNorm",
    }
    return ModelSpec(
        towers=(Tower("text", block, layers, width, embedding=f"{root}embeddings.word_embeddings"),),
        points={point: (rf"{block}\.{name}", layers) for point, name in inner.items()},
        shared_inputs=tuple(tuple(rf"{block}\.attention\.self\.{name}" for name in group) for group in shared),
    )


FAMILIES: dict[str, Callable[[PretrainedConfig, str], ModelSpec]] = {
    "bert": bert_spec,
    "roberta": bert_spec,
    "xlm-roberta": bert_spec,
    "deberta-v2": deberta_spec,
}
