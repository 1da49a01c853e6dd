import copy
import json
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fulgurite.backbones.language_specs import language_spec
from fulgurite.checkpoints import DamagedError
from fulgurite.methods.quantization.hadamard import Rotation
from fulgurite.methods.quantization.norm_fusing import fuse_norms, norm_kind, untie_head
from fulgurite.methods.quantization.rotation import Rotate, rotate
from fulgurite.methods.quantization.rotation_record import (
    RotationRecord,
    install_online,
    named_as_before,
    restore,
)
from fulgurite.methods.structure import ModelSpec, Tower

IDS = torch.randint(3, 37, (2, 9), generator=torch.Generator().manual_seed(1))


def build(family, tied, dtype):
    """A tiny model whose norms, biases and means are far from trivial."""
    shape = {"vocab_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "tie_word_embeddings": tied}
    gated = shape | {"hidden_size": 48, "intermediate_size": 56, "num_key_value_heads": 2, "head_dim": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if family == "llama":  # grouped heads that are narrower than the stream, and biases
            model = LlamaForCausalLM(LlamaConfig(**gated, attention_bias=True, mlp_bias=True))
        elif family == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(**gated))
        elif family == "opt":
            narrow = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 56, "max_position_embeddings": 20}
            model = OPTForCausalLM(OPTConfig(**shape, **narrow))
        else:
            t5 = {"d_model": 32, "d_ff": 56, "d_kv": 8, "num_layers": 2, "num_heads": 4}
            kind = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": tied, "vocab_size": 37}
            model = T5ForConditionalGeneration(T5Config(**t5, **kind))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model = model.to(dtype).eval()
    if dtype == torch.float64:  # transformers' own norms compute in float32
        for name, norm in list(model.named_modules()):
            if hasattr(norm, "variance_epsilon"):
                wide = nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon, dtype=dtype)
                wide.weight = norm.weight
                model.set_submodule(name, wide)
    return model


@torch.no_grad()
def logits(model):
    more = {"decoder_input_ids": IDS.flip(1)} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits


def assert_same(found, expected, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())


FAMILIES = ["llama", "qwen3", "opt", "t5"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_fusing_and_rotating_leave_logits_unchanged(family, tied, dtype):
    model = build(family, tied, dtype)
    before, spec = logits(model), language_spec(model)
    fused = copy.deepcopy(model)
    assert set(fuse_norms(fused, spec).values()) == {"layer" if family == "opt" else "rms"}
    assert_same(logits(fused), before, dtype)
    stream = model.get_submodule(spec.towers[0].embedding).weight.detach().clone()
    rotate(model, spec, seed=3)
    assert_same(logits(model), before, dtype)
    assert (model.get_submodule(spec.towers[0].embedding).weight - stream).abs().max() > 0.01
    assert model.get_submodule(spec.head).weight is not model.get_submodule(spec.towers[0].embedding).weight


@pytest.mark.parametrize("heads", ["none", "merged"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_and_gaussian_rotations_leave_logits_unchanged_too(family, heads):
    model = build(family, False, torch.float64)
    before = logits(model)
    record = rotate(model, language_spec(model), residual="gaussian", heads=heads, feed_forward=False)
    assert not record.online
    assert_same(logits(model), before, torch.float64)
    # Without work at run time the weights alone are the model, unless a norm had to become another.
    if family != "opt":
        fresh = build(family, False, torch.float64)
        untie_head(fresh, language_spec(fresh))  # transformers ties that of T5 always
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(logits(fresh), logits(model))


def test_an_outlier_channel_is_spread():
    model = build("llama", False, torch.float64)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] *= 50
    peak = lambda w: (w.abs().amax(1) / w.square().mean(1).sqrt()).mean()  # noqa: E731
    before = peak(model.model.embed_tokens.weight)
    rotate(model, language_spec(model))
    assert peak(model.model.embed_tokens.weight) < 0.7 * before


def test_what_was_done_is_stored_and_done_again_at_run_time():
    model = build("llama", True, torch.float64)
    record = rotate(model, language_spec(model), seed=11)
    again = RotationRecord.from_data(json.loads(json.dumps(record.data())))
    assert again == record
    assert again.streams[48] == Rotation.hadamard(48, 11 + 48)
    fresh = build("llama", False, torch.float64)
    fresh.load_state_dict(model.state_dict())
    assert (logits(fresh) - logits(model)).abs().max() > 1e-3
    install_online(fresh, again)
    assert torch.equal(logits(fresh), logits(model))
    with pytest.raises(ValueError, match="rotates its input already"):
        install_online(fresh, again)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_from_files_becomes_the_rotated_one(family, tied):
    model, fresh = build(family, tied, torch.float64), build(family, tied, torch.float64)
    state = copy.deepcopy(model.state_dict())
    plan = Rotate().plan(model, language_spec(model))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    record = rotate(model, language_spec(model))
    assert (plan.streams, plan.online, plan.fused) == (record.streams, record.online, record.fused)
    tensors = dict(model.state_dict())
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.fill_(7)
    before = named_as_before(tensors, record)
    assert before.keys() | {"lm_head.weight"} == fresh.state_dict().keys() | {"lm_head.weight"}
    fresh.load_state_dict(before, strict=False)  # a tied head has no tensor of its own
    restore(fresh, record, tensors)
    assert fresh.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in fresh.state_dict().items())
    assert torch.equal(logits(fresh), logits(model))
    if record.added:
        with pytest.raises(DamagedError, match="is missing"):
            named_as_before({n: t for n, t in tensors.items() if n not in record.added}, record)


def test_options_are_checked_before_a_model_is_there():
    one, other = build("llama", False, torch.float64), build("llama", False, torch.float64)
    options = {"residual": "gaussian", "heads": "merged", "feed_forward": False, "seed": 4}
    record = Rotate(**options).apply(one, language_spec(one))
    assert record == rotate(other, language_spec(other), **options)
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in one.state_dict().items())
    for wrong in ({"residual": "random"}, {"heads": "all"}, {"fallback": "none"}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name}='{value}': expected one of"):
            Rotate(**wrong)


def test_hooks_that_come_later_see_the_rotated_input():
    model, seen = build("llama", False, torch.float64), {}
    layer = model.model.layers[0].mlp.down_proj
    layer.register_forward_pre_hook(lambda _, args: seen.__setitem__("before", args[0]))
    record = rotate(model, language_spec(model))
    layer.register_forward_pre_hook(lambda _, args: seen.__setitem__("after", args[0]))
    logits(model)
    rotation = record.online["model.layers.0.mlp.down_proj"]
    torch.testing.assert_close(seen["after"], seen["before"] @ rotation.matrix(), rtol=0, atol=1e-12)


def test_centring_the_embeddings_of_an_rms_model_changes_it_as_the_published_code_does():
    model = build("llama", False, torch.float64)
    before = logits(model)
    fuse_norms(model, language_spec(model), centre_all_embeddings=True)
    assert model.model.embed_tokens.weight.mean(1).abs().max() < 1e-12
    assert (logits(model) - before).abs().max() > 1e-3


def test_norms_are_known_by_what_they_compute():
    class Plus(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.linspace(-1, 1, 8)), 1e-6

        def forward(self, x):
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)

    class Other(Plus):
        def forward(self, x):
            return x * self.weight

    assert norm_kind("n", Plus()) == "rms_plus_one"
    assert norm_kind("n", nn.LayerNorm(8)) == "layer"
    assert norm_kind("n", nn.RMSNorm(8, eps=1e-5)) == "rms"
    with pytest.raises(ValueError, match="n: Other is neither"):
        norm_kind("n", Other())


def test_what_a_spec_leaves_out_is_an_error_before_any_change():
    model = build("llama", False, torch.float32)
    spec, state = language_spec(model), copy.deepcopy(model.state_dict())
    (tower,) = spec.towers

    def changed(pairs=spec.norm_linear_pairs, **parts):
        return ModelSpec((Tower(**{**tower.__dict__, **parts}),), head="lm_head", norm_linear_pairs=pairs)

    with pytest.raises(ValueError, match=r"o_proj is neither read from a norm nor among the writers"):
        rotate(model, changed(writers=tower.writers[1:]))
    with pytest.raises(ValueError, match="heads='none'"):
        rotate(model, changed(attentions=()))
    with pytest.raises(ValueError, match="no Hadamard matrix of size 7"):
        rotate(model, changed(attentions=(replace(tower.attentions[0], head_dim=7),)), heads="merged")
    for wrong in ({"num_key_value_heads": 3}, {"num_heads": 3}):
        with pytest.raises(ValueError, match="wide, and the spec says 3 heads"):
            rotate(model, changed(attentions=(replace(tower.attentions[0], **wrong),)), heads="merged")
    with pytest.raises(LookupError, match="no_such"):
        rotate(model, changed(attentions=(replace(tower.attentions[0], value="no_such"),)), heads="merged")
    with pytest.raises(ValueError, match="feed_forward=False"):
        rotate(model, changed(feed_forward_outputs=None))
    with pytest.raises(LookupError, match="norm_linear"):
        rotate(model, changed(pairs=((r"norm_linear", "lm_head"),)))
    with pytest.raises(ValueError, match="no norm_linear_pairs"):
        rotate(model, changed(pairs=()))
    with pytest.raises(ValueError, match="heads='some'"):
        rotate(model, spec, heads="some")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.config.model_type = "mamba"
    with pytest.raises(ValueError, match="'mamba' has no spec"):
        language_spec(model)
