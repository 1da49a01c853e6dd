"""Reading of published VL-T5 and VL-BART checkpoints: ``torch.save`` files of one state dict of the whole model.

The visual embedding stands inside the language model's encoder there and beside the language model here. Tied tensors
stand there under several names.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fulgurite.backbones.base import StateDict
from fulgurite.backbones.frozenbilm_checkpoint import state_mismatches
from fulgurite.checkpoints.errors import MismatchError
from fulgurite.checkpoints.unpickle import load_pickle

# Of the decoder's first cross-attention, which the published T5 has and never reads.
_UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def read_vl_checkpoint(path: str | Path, visual_home: str) -> StateDict:
    """The tensors of ``path`` under a backbone's names: ``language.`` and ``visual_embedding.``.

    Args:
        path: the file.
        visual_home: what names of the visual embedding begin with in the file, after ``module.`` of a parallel run.

    Raises:
        CheckpointError: the file is absent, damaged, or asks for code to be run.
        MismatchError: it is no state dict.
    """
    content = load_pickle(path)
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise MismatchError(f"{path} is no checkpoint of VL-T5 or VL-BART: expected one mapping of names to tensors")
    out: StateDict = {}
    for name, tensor in content.items():
        # Encoders of the first releases were called so.
        name = name.removeprefix("module.").replace("vis_encoder.", "encoder.", 1)
        if name.startswith(visual_home):
            out[f"visual_embedding.{name.removeprefix(visual_home)}"] = tensor
        elif name != _UNUSED:
            out[f"language.{name}"] = tensor
    return out


@torch.no_grad()
def fill_from_checkpoint(model: nn.Module, path: str | Path, visual_home: str) -> None:
    """Put the tensors of ``path`` into ``model``: all of it but an encoder of pictures, and nothing else.

    The published table of token order is the language model's; a model with a table of its own takes its rows.

    Raises:
        CheckpointError: see `read_vl_checkpoint`.
        MismatchError: a tensor is missing, unknown, of another shape, or differs from one that it is tied to; all are
            listed, and then nothing is changed.
    """
    given = read_vl_checkpoint(path, visual_home)
    own = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if not name.startswith("encoder.")}
    table = model.language.get_input_embeddings().weight
    order = given.pop("visual_embedding.obj_order_embedding.weight", None)
    lines = []
    tied = [name for name, tensor in own.items() if tensor is table]
    found = next((given[name] for name in tied if name in given), None)
    for name in tied:
        if found is not None and not torch.equal(given.setdefault(name, found), found):
            lines.append(f"{name}: other values than {tied[0]}, to which it is tied")
    if order is not None and found is not None and not torch.equal(order, found):
        lines.append(
            "visual_embedding.obj_order_embedding.weight: other values than the token table, to which it is tied"
        )
    own_order = "visual_embedding.obj_order_embedding.weight"
    if own_order in own and found is not None:
        given[own_order] = found.flip(0)[: len(own[own_order])]
    lines += state_mismatches(given, own)
    if lines:
        listed = "\n  ".join(lines)
        raise MismatchError(
            f"{len(lines)} tensors of {path} do not fit this model:\n  {listed}\n"
            "Set backbone.init_args.config, feature_dim and extra_tokens to the shape of the file."
        )
    for name, tensor in own.items():
        tensor.copy_(given[name])
