"""Side blocks of the families besides T5: a whole copy is the backbone, widths are divided, caches work."""

import dataclasses
from functools import partial

import pytest
import timm
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    ViTConfig,
    ViTModel,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fulgurite.backbones.side_blocks import side_blocks_of
from fulgurite.backbones.specs import spec_of
from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.ladder import LadderSide
from fulgurite.methods.adapters.ladder_start import copy_pruned
from fulgurite.methods.structure import ModelSpec, Tower

IDS = torch.randint(3, 30, (3, 6), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0]])
PICTURE = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 2, "intermediate_size": 36}
DECODER = SIZES | {"vocab_size": 30, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}


def bart():
    sides = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             (("layers", 2), ("attention_heads", 3), ("ffn_dim", 36))}  # fmt: skip
    model = BartForConditionalGeneration(BartConfig(d_model=24, vocab_size=30, max_position_embeddings=12, **sides))
    towers = [
        Tower(s, rf"model\.{s}\.layers\.\d+", 2, 24, embedding=f"model.{s}.embed_tokens")
        for s in ("encoder", "decoder")
    ]
    return model, ModelSpec(tuple(towers)), None, lambda: model(IDS, MASK, decoder_input_ids=IDS[:, :4]).logits


def llama():
    model = LlamaForCausalLM(LlamaConfig(**DECODER))
    return model, spec_of(model), "model.norm", lambda: model(IDS, MASK).logits


def qwen():
    model = Qwen3ForCausalLM(Qwen3Config(**DECODER))
    return model, spec_of(model), "model.norm", lambda: model(IDS, MASK).logits


def bert():
    model = BertModel(BertConfig(**SIZES, vocab_size=30))
    return model, spec_of(model), None, lambda: model(IDS, MASK).last_hidden_state


def vit():
    model = ViTModel(ViTConfig(**SIZES, image_size=8, patch_size=4), add_pooling_layer=False)
    return model, spec_of(model), "layernorm", lambda: model(PICTURE).last_hidden_state


def timm_vit():
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 3, "img_size": 8, "patch_size": 4, "init_values": 0.5}
    model = timm.models.vision_transformer.VisionTransformer(**sizes, num_classes=0, global_pool="")
    return model, spec_of(model), "norm", lambda: model(PICTURE)


FAMILIES = {f.__name__: f for f in (bart, llama, qwen, bert, vit, timm_vit)}


def build(family, read_out=True, **options):
    """Model, its spec, what runs it, and its ladder."""
    torch.manual_seed(0)
    model, spec, norm, run = FAMILIES[family]()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0 if parameter.dim() > 1 else 1.0, 0.3)
    model.requires_grad_(False).eval()
    points = {tower.name: (tower.blocks, tower.num_blocks) for tower in spec.towers}
    if norm is not None:
        points["read_out"] = (norm, 1)
        spec = dataclasses.replace(spec, towers=(dataclasses.replace(spec.towers[0], final_norm=norm),))
    spec = dataclasses.replace(spec, points=points)
    plain = run()
    kind = partial(LadderSide, side_blocks=side_blocks_of, **options)
    names = [name for name in points if read_out or name != "read_out"]
    bank = AdapterBank(model, [Placement(names, kind)], sets=(), spec=spec).eval()
    return model, spec, run, plain, bank.adapters_of("live")["placement-0"]


def eye(layer):
    with torch.no_grad():
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("read_out", [True, False])
def test_a_whole_copy_is_the_backbone(family, read_out):
    model, spec, run, plain, ladder = build(family, read_out, reduction=1, gate="one")
    copy_pruned(ladder, model, spec)
    for layer in (*(stack.first_down for stack in ladder.stacks), ladder.up):
        eye(layer)
    torch.testing.assert_close(run(), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_quarter_as_wide_trains_alone(family):
    model, _, run, plain, ladder = build(family, reduction=4)
    out = run()
    assert out.shape == plain.shape
    out.square().mean().backward()
    assert all(p.grad is not None for p in ladder.parameters())
    assert all(p.grad is None for p in model.parameters())
    for stack in ladder.stacks:
        assert {p.shape[-1] for p in stack.downs.parameters()} == {24, 6}
        for block in stack.blocks.values():
            linear = [m for m in block.modules() if isinstance(m, nn.Linear)]
            assert {m.in_features for m in linear} <= {6, 9, 12, 24}
            assert all(torch.isfinite(p).all() for p in block.parameters())


@pytest.mark.parametrize("family", ["bart", "llama", "qwen"])
@pytest.mark.parametrize("beams", [1, 2])
def test_decoding_with_caches_is_decoding_anew(family, beams):
    model, *_ = build(family, reduction=4)
    options = {"num_beams": beams, "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 1}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    ids, mask = (IDS, MASK) if family == "bart" else (IDS, MASK.flip(1))
    cached = model.generate(ids, attention_mask=mask, use_cache=True, **options)
    anew = model.generate(ids, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached.sequences, anew.sequences)
    for one, other in zip(cached.scores, anew.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_heads_turn_as_those_of_a_small_model():
    _, _, run, _, ladder = build("llama", reduction=2)
    seen = []
    attention = ladder.stacks[0].blocks["1"].self_attn
    attention.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    run()
    small = LlamaRotaryEmbedding(LlamaConfig(**DECODER | {"head_dim": 4}))
    for found, expected in zip(seen[0], small(IDS.float(), torch.arange(6)[None])):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_refuses_a_reduction_that_does_not_divide(family):
    with pytest.raises(ValueError, match="no multiple of reduction=5"):
        build(family, reduction=5)


def test_refuses_a_family_without_side_blocks():
    with pytest.raises(ValueError, match="a Linear cannot be made small; those that can are"):
        side_blocks_of(nn.Linear(2, 2))
