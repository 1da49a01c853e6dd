"""Where adapters can attach in a dual encoder of open_clip, and which of its parameters full fine-tuning leaves alone.

Attention of open_clip's own blocks is torch's, which never calls its output layer as a module, so that nothing could
attach there; `call_output_layers` mends that without a change of names or values.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from fulgurite.backbones import encoder_specs
from fulgurite.backbones.picture_specs import joined
from fulgurite.backbones.timm_specs import TIMM, resblocks, timm_spec
from fulgurite.methods.structure import ModelSpec, Tower

Points = dict[str, tuple[str, int]]

OWN = {"attention_output": "attn.out_proj", "feed_forward_input": "mlp.c_fc", "feed_forward_output": "mlp.c_proj"}
OF_TIMM = {
    "attention_output": "attn.proj",
    "query": "attn.q_proj",
    "key": "attn.k_proj",
    "value": "attn.v_proj",
    "feed_forward_input": "mlp.fc1",
    "feed_forward_output": "mlp.fc2",
}
# Published: token embedding, both position embeddings, class embedding, patch convolution and the norm before blocks.
FROZEN = (
    r"(text\.)?token_embedding\.weight",
    r"(text\.)?positional_embedding",
    r"text\.transformer\.embeddings\.(word|position)_embeddings\.weight",
    r"visual\.(positional_embedding|class_embedding)",
    r"visual\.conv1\.weight",
    r"visual\.ln_pre\..*",
    r"visual\.trunk\.(pos_embed|cls_token|reg_token)",
    r"visual\.trunk\.patch_embed\..*",
    r"visual\.trunk\.norm_pre\..*",
)


class CalledAttention(nn.MultiheadAttention):
    """Self-attention over (B, S, D) that calls its output layer."""

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """As torch's for three times the same input; ``attn_mask`` is added to the scores."""
        packed = F.linear(query, self.in_proj_weight, self.in_proj_bias)
        heads = packed.unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)  # (3, B, heads, S, -1)
        out = F.scaled_dot_product_attention(
            *heads, attn_mask=attn_mask, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out_proj(out.transpose(1, 2).flatten(2)), None


def call_output_layers(transformer: nn.Module) -> None:
    """Let the attention of open_clip's own blocks call its output layer, in place."""
    for block in transformer.resblocks:
        if type(block.attn) is nn.MultiheadAttention:
            block.attn.__class__ = CalledAttention


def video_text_spec(model: nn.Module, root: str) -> ModelSpec:
    """Towers and points. A tower that is no stack of known blocks has none of its own.

    Points are those of blocks, by their names for both towers and as ``vision_...`` and ``text_...`` for one, and
    ``vision_projection`` and ``text_projection`` where those are layers.

    Args:
        model: of open_clip, within a backbone.
        root: what comes before the names of its modules, as ``model.``.
    """
    vision, text = _vision_spec(model.visual, f"{root}visual."), _text_spec(model, root)
    points: Points = {}
    for spec, name in ((vision, "vision"), (text, "text")):
        for point, (pattern, count) in spec.points.items():
            points[f"{name}_{point}"] = (pattern, count)
            other, others = points.get(point, ("", 0))
            points[point] = (rf"{other}|{pattern}" if other else pattern, count + others)
    tail = {"vision": model.visual, "text": getattr(model, "text", model)}
    for name, tower in tail.items():
        place = _projection(tower)
        if place is not None:
            inner = {"vision": "visual.", "text": "text." if hasattr(model, "text") else ""}[name]
            points[f"{name}_projection"] = (re.escape(f"{root}{inner}{place}"), 1)
    return replace(joined(vision, text), points=points)


def never_tuned(model: nn.Module, root: str) -> tuple[str, ...]:
    """Those patterns of `FROZEN` that match a parameter of ``model``, whose names begin with ``root``."""
    names = [name for name, _ in model.named_parameters()]
    return tuple(re.escape(root) + p for p in FROZEN if any(re.fullmatch(p, name) for name in names))


def _vision_spec(visual: nn.Module, root: str) -> ModelSpec:
    if hasattr(visual, "transformer"):
        return _own_spec("vision", visual.transformer, f"{root}transformer")
    trunk = getattr(visual, "trunk", None)
    if not {cls.__name__ for cls in type(trunk).__mro__} & set(TIMM):
        return ModelSpec(towers=())
    spec = timm_spec(trunk, f"{root}trunk.")
    return replace(spec, points=_points(spec.towers[0], trunk.blocks, OF_TIMM))


def _text_spec(model: nn.Module, root: str) -> ModelSpec:
    if not hasattr(model, "text"):
        return _own_spec("text", model.transformer, f"{root}transformer")
    inner = model.text.transformer
    if hasattr(inner, "resblocks"):
        return _own_spec("text", inner, f"{root}text.transformer")
    family = encoder_specs.FAMILIES.get(inner.config.model_type)
    return ModelSpec(towers=()) if family is None else family(inner.config, f"{root}text.transformer.")


def _own_spec(name: str, transformer: nn.Module, root: str) -> ModelSpec:
    spec = resblocks(name, transformer, root)
    return replace(spec, points=_points(spec.towers[0], transformer.resblocks, OWN))


def _points(tower: Tower, blocks: nn.ModuleList, names: Mapping[str, str]) -> Points:
    """Those of ``names`` that are linear layers in every block."""
    held = [{name for name, module in block.named_modules() if isinstance(module, nn.Linear)} for block in blocks]
    return {
        point: (rf"{tower.blocks}\.{re.escape(name)}", tower.num_blocks)
        for point, name in names.items()
        if all(name in layers for layers in held)
    }


def _projection(tower: nn.Module) -> str | None:
    """Name in ``tower`` of the linear layer that gives the width shared by both; None where it is none."""
    for part in ("head", "proj", "text_projection"):
        module = getattr(tower, part, None)
        layers = (
            []
            if not isinstance(module, nn.Module)
            else [name for name, each in module.named_modules() if isinstance(each, nn.Linear)]
        )
        if layers:
            return f"{part}.{layers[-1]}".rstrip(".")
    trunk = getattr(tower, "trunk", None)
    classifier = None if trunk is None else trunk.get_classifier()
    if isinstance(classifier, nn.Linear):
        return next(f"trunk.{name}" for name, module in trunk.named_modules() if module is classifier)
    return None
