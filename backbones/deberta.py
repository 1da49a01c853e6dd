"""DeBERTa-v2 as a masked language model: the parts that `transformers` leaves out, and its files.

The encoder is `transformers`' own. Its masked language model has no enhanced mask decoder, and drops the
absolute positions that the decoder needs on load; both are here, under the names of the published
checkpoints.
Source: He et al., "DeBERTa: Decoding-enhanced BERT with Disentangled Attention", section 3.2.

Legend: B batch, S sequence, D width, A rows of an output table.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from fulgurite.backbones.base import StateDict

XLARGE: dict[str, Any] = {
    "vocab_size": 128100,
    "hidden_size": 1536,
    "num_hidden_layers": 24,
    "num_attention_heads": 24,
    "attention_head_size": 64,
    "intermediate_size": 6144,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 0,
    "layer_norm_eps": 1e-7,
    "relative_attention": True,
    "max_relative_positions": -1,
    "position_buckets": 256,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "conv_kernel_size": 3,
    "conv_act": "gelu",
    "pad_token_id": 0,
}
"""Configuration of ``microsoft/deberta-v2-xlarge``, the language model of FrozenBiLM and DAM."""

_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


class LanguageModelHead(nn.Module):
    """``t = LN(gelu(W q + b))``, scored against a table of output embeddings. Holds the vocabulary's bias."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        nn.init.normal_(self.dense.weight, std=config.initializer_range)
        nn.init.zeros_(self.dense.bias)

    def forward(self, states: Tensor, table: Tensor, bias: Tensor) -> Tensor:
        """Scores (..., A) of ``states`` (..., D) against ``table`` (A, D) with ``bias`` (A,)."""
        return F.linear(self.LayerNorm(F.gelu(self.dense(states))), table, bias)


def build_encoder(config: Any) -> nn.Module:
    """A `transformers.DebertaV2Model` with the absolute positions of the mask decoder.

    They are ``embeddings.position_embeddings``, as in the published files; the encoder itself adds none to
    its input.

    Raises:
        ValueError: ``config`` is not of the family that has a mask decoder with positions.
    """
    from transformers import DebertaV2Model

    if config.position_biased_input or not config.relative_attention:
        raise ValueError(
            f"the mask decoder needs position_biased_input=false and relative_attention=true, got "
            f"{config.position_biased_input} and {config.relative_attention}"
        )
    if getattr(config, "embedding_size", config.hidden_size) != config.hidden_size:
        raise ValueError(f"embedding_size={config.embedding_size} must equal hidden_size={config.hidden_size}")
    encoder = DebertaV2Model(config)
    positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
    nn.init.normal_(positions.weight, std=config.initializer_range)
    encoder.embeddings.position_embeddings = positions
    return encoder


def decode_masks(encoder: nn.Module, states: Tensor, mask: Tensor) -> Tensor:
    """The enhanced mask decoder: the last layer applied twice to a query that knows its absolute position.

    ``q = P + h``, then twice ``q = Layer(query=q, key=h, value=h)`` with the residual from the query.

    Args:
        encoder: result of `build_encoder`.
        states: (B, S, D) output ``h`` of the last layer but one.
        mask: (B, S) integer, 1 where a position is real.

    Returns:
        (B, S, D) decoded states.
    """
    stack = encoder.encoder
    pairs = stack.get_attention_mask(mask)
    distances = stack.get_rel_pos(states)
    table = stack.get_rel_embedding()
    query = encoder.embeddings.position_embeddings.weight[: states.shape[1]] + states
    for _ in range(2):
        query, _ = stack.layer[-1](states, pairs, query_states=query, relative_pos=distances, rel_embeddings=table)
    return query


def read_pretrained(source: str) -> StateDict:
    """Tensors of a DeBERTa-v2 masked language model from a folder or hub name; only ``deberta.*`` and
    ``lm_predictions.*`` are returned.

    Raises:
        OSError: no weights are found there.
    """
    from transformers.utils import cached_file

    for name in _FILES:
        path = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            break
    else:
        raise OSError(f"{source} holds none of {', '.join(_FILES)}")
    names = [name]
    if name.endswith(".index.json"):
        names = sorted(set(json.loads(Path(path).read_text())["weight_map"].values()))
    state: StateDict = {}
    for name in names:
        state.update(_read(Path(cached_file(source, name))))
    return {key: value for key, value in state.items() if key.startswith(("deberta.", "lm_predictions."))}


def _read(path: Path) -> StateDict:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
