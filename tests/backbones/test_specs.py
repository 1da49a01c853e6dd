"""Specs of every family: all layers of all blocks, who shares an input, and compression from end to end."""

import copy
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from fulgurite.backbones.specs import spec_of
from fulgurite.methods.compression import compressed_blocks, matrices, matrix
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.packed_attention import exposed_attention
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.methods.quantization.norm_fusing import fuse_norms
from fulgurite.methods.quantization.rotation import rotate
from fulgurite.methods.statistics.gram import owners

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {"vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}
PICTURE = {"image_size": 16, "patch_size": 8}


@dataclass
class Case:
    """One tiny model, its arguments by name, and how many blocks its towers have."""

    model: nn.Module
    inputs: dict[str, Any]
    towers: dict[str, int]


def ids(generator):
    return torch.randint(3, 40, (3, 8), generator=generator)


def pixels(generator):
    return torch.randn(3, 3, 16, 16, generator=generator)


def of_transformers(name, config, extra=None, towers=None, text=False, picture=False, **sizes):
    import transformers

    generator = torch.Generator().manual_seed(1)
    model = getattr(transformers, name)(getattr(transformers, config)(**sizes))
    inputs = {"input_ids": ids(generator)} if text else {}
    inputs |= {"pixel_values": pixels(generator)} if picture else {}
    return Case(model, inputs | (extra or {}), towers or {"text": 2})


def of_timm(name, **sizes):
    import timm

    model = timm.create_model(name, img_size=16, patch_size=8, depth=2, num_heads=2, embed_dim=16, **sizes)
    return Case(model, {"x": pixels(torch.Generator().manual_seed(1))}, {"vision": 2})


def of_open_clip(name="CLIP", vision=None, text=None):
    import open_clip

    vision = vision or {"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
    text = text or {"layers": 2, "width": 16, "heads": 2, "context_length": 8, "vocab_size": 40}
    generator = torch.Generator().manual_seed(1)
    model = getattr(open_clip, name)(embed_dim=8, vision_cfg=vision, text_cfg=text)
    return Case(model, {"image": pixels(generator), "text": ids(generator)}, {"vision": 2, "text": 2})


def with_trunk():
    trunk = {"timm_model_name": "test_vit2", "image_size": 16, "timm_pool": "", "timm_proj": "linear"}
    case = of_open_clip("CustomTextCLIP", vision={**trunk, "timm_model_pretrained": False})
    return Case(case.model, case.inputs, {"vision": len(case.model.visual.trunk.blocks), "text": 2})


def with_bert():
    """An open_clip model whose text tower is one of transformers; open_clip itself builds it from the hub alone."""
    from open_clip.hf_model import HFTextEncoder
    from transformers import BertConfig

    case = of_open_clip("CustomTextCLIP")
    case.model.text = HFTextEncoder("", 8, BertConfig(**SIZES, **TEXT), proj_type="linear", pooler_type="mean_pooler")
    return case


BOTH = {"vision": 2, "text": 2}
TWO = {"text_config": SIZES | TEXT, "vision_config": SIZES | PICTURE, "text": True, "picture": True, "towers": BOTH}
DEBERTA = SIZES | TEXT | {"relative_attention": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm"}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, **TEXT}
CASES = {
    "gpt2": lambda: of_transformers("GPT2LMHeadModel", "GPT2Config", {"use_cache": False}, text=True, **GPT2),
    "bert": lambda: of_transformers("BertForMaskedLM", "BertConfig", text=True, **SIZES, **TEXT),
    "bert bare": lambda: of_transformers("BertModel", "BertConfig", text=True, **SIZES, **TEXT),
    "roberta": lambda: of_transformers("RobertaForMaskedLM", "RobertaConfig", text=True, **SIZES, **TEXT),
    "deberta shared": lambda: of_transformers(
        "DebertaV2ForMaskedLM", "DebertaV2Config", text=True, **DEBERTA, share_att_key=True, pos_att_type=["p2c", "c2p"]
    ),
    "deberta": lambda: of_transformers(
        "DebertaV2Model", "DebertaV2Config", text=True, **DEBERTA, pos_att_type=["p2c", "c2p"]
    ),
    "deberta plain": lambda: of_transformers("DebertaV2Model", "DebertaV2Config", text=True, **SIZES, **TEXT),
    "vit": lambda: of_transformers(
        "ViTForImageClassification", "ViTConfig", picture=True, towers={"vision": 2}, **SIZES, **PICTURE
    ),
    "clip": lambda: of_transformers("CLIPModel", "CLIPConfig", projection_dim=8, **TWO),
    "clip vision": lambda: of_transformers(
        "CLIPVisionModel", "CLIPVisionConfig", picture=True, towers={"vision": 2}, **SIZES, **PICTURE
    ),
    "clip vision projected": lambda: of_transformers(
        "CLIPVisionModelWithProjection", "CLIPVisionConfig", picture=True, towers={"vision": 2}, **SIZES, **PICTURE
    ),
    "clip text": lambda: of_transformers("CLIPTextModel", "CLIPTextConfig", text=True, **SIZES, **TEXT),
    "siglip": lambda: of_transformers("SiglipModel", "SiglipConfig", **TWO),
    "siglip vision": lambda: of_transformers(
        "SiglipVisionModel", "SiglipVisionConfig", picture=True, towers={"vision": 2}, **SIZES, **PICTURE
    ),
    "timm vit": lambda: of_timm("vit_tiny_patch16_224", num_classes=3),
    "timm deit": lambda: of_timm("deit_tiny_distilled_patch16_224", num_classes=3),
    "timm eva": lambda: of_timm("eva02_base_patch14_224"),
    "timm relpos": lambda: of_timm("vit_relpos_small_patch16_224", num_classes=3),
    "open_clip": of_open_clip,
    "open_clip custom": lambda: of_open_clip("CustomTextCLIP"),
    "open_clip timm": with_trunk,
    "open_clip bert": with_bert,
}


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request):
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        made = CASES[request.param]()
    spec = spec_of(made.model.eval())
    with exposed_attention(made.model, spec.inside_blocks):
        yield made


def is_linear(module):
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def layers_in_lists(model):
    """Linear layers inside numbered modules, which in these models are blocks: found without a spec."""
    return {n for n, module in model.named_modules() if re.search(r"\.\d+\.", f".{n}.") and is_linear(module)}


def test_every_linear_layer_of_every_block_is_found(case):
    spec = spec_of(case.model)
    assert {tower.name: tower.num_blocks for tower in spec.towers} == case.towers
    found = set(matrices(LayerWalk(case.model, spec, [], lambda batch: None)))
    assert found == layers_in_lists(case.model)
    assert found


def test_widths_are_those_of_the_residual_stream(case):
    seen = {}
    spec = spec_of(case.model)
    for tower in spec.towers:
        module = case.model.get_submodule(spec.block_names(case.model, tower.name)[0])
        module.register_forward_hook(lambda _, args, output, tower=tower: seen.update({tower.name: output}))
    with torch.no_grad():
        case.model(**case.inputs)
    for tower in spec.towers:
        output = seen[tower.name]
        assert (output[0] if isinstance(output, tuple) else output).shape[-1] == tower.width


def test_shared_inputs_are_all_those_that_a_pass_shows(case):
    """Layers of one block that are given the very same tensors, call by call, are one group; and no others."""
    spec, kept = spec_of(case.model), []
    blocks = spec.all_block_names(case.model)
    seen = {
        name: [next(f"{block}." for block in blocks if name.startswith(block))] for name in layers_in_lists(case.model)
    }

    def note(name, x):
        kept.append(x)  # so that no other tensor takes its identity
        seen[name].append(id(x))

    hooks = [
        case.model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name in seen
    ]
    with torch.no_grad():
        case.model(**case.inputs)
    for hook in hooks:
        hook.remove()
    assert all(len(calls) > 1 for calls in seen.values())
    expected = {frozenset(n for n in seen if seen[n] == calls) for calls in seen.values()}
    stated = owners(case.model, list(seen), spec.shared_inputs)
    assert {frozenset(n for n in stated if stated[n] == owner) for owner in stated.values()} == expected
    walk = LayerWalk(case.model, spec, [case.inputs], lambda batch: case.model(**batch))
    assert {frozenset(each) for block in walk for each in block.input_groups(block.linears())} == expected


@pytest.mark.parametrize("compressor", [Wanda(0.5), Gptq(4, 4)], ids=lambda each: type(each).__name__)
def test_every_block_is_compressed_on_its_inputs(case, compressor):
    model = copy.deepcopy(case.model)
    walk = LayerWalk(model, spec_of(model), [case.inputs] * 2, lambda batch: model(**batch))
    compressor.begin(matrices(walk))
    reports = {}
    for done in compressed_blocks(walk, compressor):
        reports |= done.reports
    assert reports.keys() == layers_in_lists(case.model)
    for name, report in reports.items():
        before = matrix(case.model.get_submodule(name))
        assert report.shape == before.shape
        assert not torch.equal(matrix(model.get_submodule(name)), before)
        if isinstance(compressor, Wanda):
            assert report.sparsity == pytest.approx(0.5, abs=0.03)
        else:
            assert report.bits == 4
            assert report.error < 0.1
    rest = {n.removesuffix(".weight") for n, tensor in case.model.state_dict().items() if n.endswith(".weight")}
    for name in rest - reports.keys():
        assert torch.equal(model.get_submodule(name).weight, case.model.get_submodule(name).weight)


@pytest.fixture
def gpt2():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        case = CASES["gpt2"]()
    model = case.model.double().eval()
    for name, parameter in model.named_parameters():
        if "ln_" in name or name.endswith("bias"):  # norms that do something, and shifts to fold
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
    return model, case.inputs


@pytest.mark.parametrize("change", [fuse_norms, lambda model, spec: rotate(model, spec, heads="none")], ids="fr")
@torch.no_grad()
def test_gpt2_computes_the_same_when_its_norms_are_folded_and_its_streams_rotated(gpt2, change):
    model, inputs = gpt2
    before = model(**inputs).logits
    weight = model.transformer.h[0].attn.c_attn.weight.clone()
    change(model, spec_of(model))
    assert not torch.allclose(model.transformer.h[0].attn.c_attn.weight, weight)
    torch.testing.assert_close(model(**inputs).logits, before, rtol=1e-9, atol=1e-9)


def test_gpt2_has_no_layer_of_values_to_rotate(gpt2):
    with pytest.raises(ValueError, match="heads='none'"):
        rotate(gpt2[0], spec_of(gpt2[0]))


def resnet():
    import timm

    return timm.create_model("test_resnet")


def open_clip_resnet():
    return of_open_clip(vision={"layers": [1, 1, 1, 1], "width": 8, "image_size": 32}).model


def classifier():
    return of_transformers("CLIPForImageClassification", "CLIPConfig", **TWO).model


def gpt2_with_memory():
    import transformers

    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, add_cross_attention=True))


def xlnet():
    import transformers

    return transformers.XLNetModel(transformers.XLNetConfig(vocab_size=40, d_model=8, n_layer=1, n_head=2, d_inner=8))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: nn.Linear(2, 2), r"Linear is of no library.*bert, .*Eva.*open_clip"),
        (xlnet, r"'xlnet' has no spec; .*bert, .*clip, .*gpt2, .*vit"),
        (resnet, r"ResNet has no spec; .*Beit, Eva, VisionTransformer"),
        (open_clip_resnet, r"ModifiedResNet has no spec"),
        (gpt2_with_memory, r"cross-attention"),
        (classifier, r"CLIPForImageClassification is not built as its family.*text_model"),
    ],
)
def test_models_without_a_spec_are_refused_by_name(make, names):
    with pytest.raises(ValueError, match=f"(?s){names}"):
        spec_of(make())
