"""Causal language models that are not named as Llama: the same backbone, against each library model by itself."""

import pytest
import torch
from torch.nn import functional as F

from fulgurite.backbones.decoding import decoder_blocks, decoder_tower, lens_parts, sampled_ids
from fulgurite.backbones.generation import IGNORED
from fulgurite.backbones.llava import Llava
from fulgurite.methods.adapters.bank import AdapterBank, Placement
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.structure import sites
from fulgurite.methods.unlearning.lens import LogitLens, layer_states

pytestmark = pytest.mark.usefixtures("one_thread")
ENDS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
LAYERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "initializer_range": 0.5}
WIDE = {**LAYERS, "intermediate_size": 24}
FAMILIES = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 32, "initializer_range": 0.5},
    "gpt_neox": {**WIDE, "max_position_embeddings": 32},
    "opt": {**LAYERS, "ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 32, "init_std": 0.5},
    "qwen3": {**WIDE, "num_key_value_heads": 2, "head_dim": 4},
    "gemma": {**WIDE, "num_key_value_heads": 2, "head_dim": 4},
}
WRITERS = {  # into the residual stream, in a block
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h"),
    "opt": ("self_attn.out_proj", "fc2"),
    "qwen3": ("self_attn.o_proj", "mlp.down_proj"),
    "gemma": ("self_attn.o_proj", "mlp.down_proj"),
}
QUERIES, GATES = [f"self_attn.{part}_proj" for part in "qkv"], ["mlp.gate_proj", "mlp.up_proj"]
SHARED = {"opt": [QUERIES], "qwen3": [QUERIES, GATES], "gemma": [QUERIES, GATES]}  # what reads one input
TARGETS = torch.tensor([[7, 8, 9], [5, IGNORED, IGNORED], [6, 6, IGNORED]])


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def model(family):
    return Llava(pretrained=False, config={"model_type": family, **ENDS, **FAMILIES[family]})


def batch_of():
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    text = torch.randint(4, 40, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"text": text.masked_fill(~mask, 1), "text_mask": mask}


def plain_logits(model, batch, row, answer):
    """Logits that predict the tokens of an answer, of one row without padding."""
    ids = torch.cat([batch["text"][row, batch["text_mask"][row]], answer[:-1]])[None]
    return model.language(input_ids=ids, use_cache=False).logits[0, -len(answer) :]


@torch.no_grad()
def test_logits_and_lens_are_those_of_the_library_model(model):
    batch, blocks = batch_of(), decoder_blocks(model)
    states, found = layer_states(blocks, [2], slice(-3, -2), lambda: model(batch, TARGETS))
    lens = LogitLens(*lens_parts(model), len(blocks)).probabilities({2: states[2][:, 0]})[2]
    for row, answer in enumerate(TARGETS):
        expected = plain_logits(model, batch, row, answer[answer >= 0])
        torch.testing.assert_close(found[row, : len(expected)], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lens[row], expected[0].softmax(-1), atol=1e-6, rtol=1e-5)


def test_what_is_written_is_the_likeliest_or_a_sample(model):
    batch = batch_of()
    found = model.generate_ids(batch, max_new_tokens=4)
    for row in range(3):
        written = found[row, : (found[row].tolist() + [2]).index(2) + 1]
        with torch.no_grad():
            assert torch.equal(plain_logits(model, batch, row, written).argmax(-1), written)
    drawn = sampled_ids(model, batch, [1, 2, 3], max_new_tokens=4)
    one = {name: value[1:2, :2] for name, value in batch.items()}
    alone = sampled_ids(model, one, [2], max_new_tokens=4)
    assert torch.equal(alone[0], drawn[1, : alone.shape[1]])


def test_every_place_is_found(model, family):
    spec = model.spec
    for point in spec.points:
        assert spec.point_names(model, point)
    owners = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    assert spec.point_names(model, "parameters") == owners
    blocks = spec.block_names(model, "decoder")
    for point, name in zip(("self_attention_output", "feed_forward_output"), WRITERS[family]):
        assert spec.point_names(model, point) == [f"{block}.{name}" for block in blocks]
    assert ("attention_query" in spec.points) == (family not in ("gpt2", "gpt_neox"))
    shared = [
        [sites(model, each, 2)[0].removeprefix(f"{blocks[0]}.") for each in group] for group in spec.shared_inputs
    ]
    assert shared == SHARED.get(family, [])


@pytest.mark.parametrize(
    "family", [family for family in FAMILIES if family != "gpt2"], indirect=True
)  # no linear layer
def test_adapters_train_at_the_hidden_units(model):
    bank = AdapterBank(model, [Placement(["feed_forward_output"], LoRA)], sets=[])
    logits = model(batch_of(), TARGETS)
    F.cross_entropy(logits.flatten(0, 1), TARGETS.flatten(), ignore_index=IGNORED).backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in bank.parameters_of("live"))
    assert all(p.grad is None for p in model.parameters())


def test_blocks_are_left_out_of_llama_alone():
    with pytest.raises(ValueError, match="GPT2LMHeadModel is not built like Llama"):
        Llava(pretrained=False, kept=[0], config={"model_type": "gpt2", **ENDS, **FAMILIES["gpt2"]})


def test_a_model_without_a_final_norm_has_no_lens():
    config = {"model_type": "opt", **ENDS, **FAMILIES["opt"], "do_layer_norm_before": False}
    with pytest.raises(LookupError, match="no decoder alone with a norm"):
        decoder_tower(Llava(pretrained=False, config=config))
