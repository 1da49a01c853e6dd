"""``quantize --rotation`` on files: what is written, who loads it, resuming, and refusals."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import fulgurite
from fulgurite.backbones import rotated_models
from fulgurite.backbones.library_models import open_library_model
from fulgurite.callbacks.saved_blocks import SavedBlocks
from fulgurite.checkpoints import read_manifest
from fulgurite.checkpoints.sources import open_source
from fulgurite.cli import main
from fulgurite.datamodules.text_windows import random_windows, token_ids
from fulgurite.methods.compression import compressed_blocks, matrices
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.methods.quantization.rotation import Rotate
from fulgurite.methods.quantization.rotation_record import RotationRecord
from fulgurite.methods.quantization.rsq import TokenImportance

IDS = torch.randint(1, 12, (2, 9), generator=torch.Generator().manual_seed(1))
SHAPE = {"vocab_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = SHAPE | {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
OPT = SHAPE | {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "max_position_embeddings": 64}
T5 = {"vocab_size": 32, "d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
GPT2 = {"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES = {
    "untied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=False, attention_bias=True)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
    "opt_without_bias": lambda: OPTForCausalLM(OPTConfig(**OPT, enable_bias=False, tie_word_embeddings=False)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5, decoder_start_token_id=0, pad_token_id=0)),
    "bert": lambda: BertLMHeadModel(BertConfig(**SHAPE, hidden_size=32, intermediate_size=48, is_decoder=True)),
}  # fmt: skip
MERGED = ("--rotation", "Rotate", "--rotation.heads", "merged", "--rotation.feed_forward", "false")
NONE = ("--rotation", "Rotate", "--rotation.heads", "none")
GPTQ = ("--quantizer", "Gptq", "--quantizer.group_size", "16", "--quantizer.bits")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folders(llamas, tmp_path_factory):
    """A folder per family, whose norms, biases and means are far from trivial, with a tokenizer."""
    root = tmp_path_factory.mktemp("families")
    for name, make in FAMILIES.items():
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(root / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(llamas / "llama" / file, root / name / file)
    return root


@pytest.fixture
def few(llamas):
    return ("--text", str(llamas / "text.txt"), "--samples", "4", "--length", "16", "--device", "cpu")


@torch.no_grad()
def logits(model):
    more = {"decoder_input_ids": IDS.flip(1)} if model.config.is_encoder_decoder else {}
    return model(input_ids=IDS, **more).logits


def as_given(folder):
    return open_library_model(open_source(folder)).model


@torch.no_grad()
def by_hand(folder, rotation, quantizer, text, copies=1, importance=None):
    """The live model, rotated, measured and quantized by the library's functions, and the record of its rotation."""
    opened = open_library_model(open_source(folder))
    record = rotation.apply(opened.model, opened.spec)
    windows = random_windows(token_ids([Path(text)], opened.tokenize), 4, 16, 0)
    rolled = [window.roll(number * 16 // copies) for window in windows for number in range(copies)]
    walk = LayerWalk(opened.model, opened.spec, [opened.text_inputs(torch.stack(rolled))], opened.forward)
    quantizer.begin(matrices(walk))
    for _ in compressed_blocks(walk, quantizer, token_weights=importance):
        pass
    return opened.model, record


@pytest.mark.parametrize(
    ("family", "rotation"),
    [
        ("untied", ("--rotation", "Rotate", "--rotation.residual", "gaussian")),
        ("tied", ("--rotation", "Rotate")),
        ("opt", ("--rotation", "Rotate")),
        ("opt_without_bias", ("--rotation", "Rotate", "--rotation.seed", "3")),
        ("gpt2", NONE),
        ("t5", ("--rotation", "Rotate")),
    ],
)
def test_a_rotated_model_without_rounding_computes_what_it_did(family, rotation, folders, few, tmp_path, in_process):
    out, text = tmp_path / "out", few[1]
    argv = ("--quantizer", "Rtn", "--quantizer.bits", "16", "--format", "own", *rotation, "--out", str(out))
    scored = ("--evaluate", text, "--evaluate_samples", "5", "--length", "16", "--device", "cpu")
    assert main(["quantize", str(folders / family), *argv, *scored]) == 0
    before, found = as_given(folders / family), fulgurite.load_model(out)
    torch.testing.assert_close(logits(found), logits(before), rtol=0, atol=1e-4 * logits(before).abs().max().item())
    embedding = before.get_input_embeddings().weight
    assert (found.get_input_embeddings().weight - embedding).abs().max() > 0.1
    assert found.get_output_embeddings().weight is not found.get_input_embeddings().weight
    metrics = read_manifest(out).metrics
    assert metrics["perplexity"] == pytest.approx(metrics["perplexity_before"], rel=1e-4)


def test_a_rotated_and_quantized_folder_is_what_the_library_gives(folders, few, tmp_path, in_process):
    out, folder, text = tmp_path / "out", folders / "tied", few[1]
    rsq = ("--rotation", "Rotate", "--importance", "TokenImportance", "--rolled_copies", "4", "--format", "own")
    scored = ("--evaluate", text, "--evaluate_samples", "5", "--report")
    assert main(["quantize", str(folder), *GPTQ, "3", *rsq, *few, *scored, "--out", str(out)]) == 0
    expected, record = by_hand(folder, Rotate(), Gptq(3, 16), text, 4, TokenImportance())
    found, manifest = fulgurite.load_model(out), read_manifest(out)
    assert found.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in expected.state_dict().items())
    assert torch.equal(logits(found), logits(expected))
    assert RotationRecord.from_data(manifest.facts["rotation"]) == record
    assert len(record.online) == 4
    assert manifest.settings["rotation"]["init_args"]["heads"] == "online"
    assert manifest.settings["calibration"]["rolled_copies"] == 4
    assert "arXiv 2404.00456" in manifest.facts["papers"]
    with torch.no_grad():
        rows = token_ids([Path(text)], open_library_model(open_source(folder)).tokenize)[: 5 * 16].view(5, 16)
        losses = [as_given(folder)(row[None], labels=row[None]).loss.item() for row in rows]
    assert manifest.metrics["perplexity_before"] == pytest.approx(math.exp(sum(losses) / 5), rel=1e-5)
    assert found(IDS, labels=IDS).loss.requires_grad


def test_a_fresh_process_loads_norms_that_are_others_now(folders, few, tmp_path):
    out = tmp_path / "out"
    argv = (*GPTQ, "3", "--rotation", "Rotate", "--format", "own", *few, "--out", str(out))
    assert main(["quantize", str(folders / "opt"), *argv]) == 0
    expected, _ = by_hand(folders / "opt", Rotate(), Gptq(3, 16), few[1])
    assert torch.equal(logits(fulgurite.load_model(out)), logits(expected))
    assert max(read_manifest(out).facts["errors"].values()) < 1e-5


def test_a_reload_whose_outputs_alone_differ_leaves_nothing(folders, few, tmp_path, in_process, monkeypatch, capfd):
    """Its inputs are not rotated, and its tensors are those of the live model."""
    restore = rotated_models.restore
    monkeypatch.setattr(
        rotated_models, "restore", lambda model, record, *rest: restore(model, replace(record, online={}), *rest)
    )
    argv = (*GPTQ, "3", "--rotation", "Rotate", "--format", "own", *few, "--out", str(tmp_path / "out"))
    assert main(["quantize", str(folders / "tied"), *argv]) == 2
    said = capfd.readouterr().err
    assert "is not the model, 1 differences" in said
    assert "output logits: differs by" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["tied", "untied"])
def test_transformers_loads_what_is_rotated_within_its_weights(family, folders, few, tmp_path, in_process):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    assert main(["quantize", str(folders / family), *GPTQ, "4", *MERGED, *few, "--out", str(out)]) == 0
    expected, _ = by_hand(folders / family, Rotate(heads="merged", feed_forward=False), Gptq(4, 16), few[1])
    found = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert torch.equal(logits(found), logits(expected))
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    stored = load_file(out / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], expected.lm_head.weight)
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert all((tensor == 1).all() for name, tensor in stored.items() if "norm" in name)


def test_what_was_interrupted_goes_on_with_its_own_rotation(folders, few, tmp_path, in_process, monkeypatch):
    argv = ["quantize", str(folders / "opt"), *GPTQ, "3", "--rotation", "Rotate", "--format", "own", *few]
    save, compress, solved = SavedBlocks.save, Gptq.compress, set()

    def dies_after_a_block(self, done):
        save(self, done)
        raise KeyboardInterrupt

    def counted(self, name, weight, moment):
        solved.add(name.split(".")[3])
        return compress(self, name, weight, moment)

    def interrupted_and_resumed(out, seed):
        monkeypatch.setattr(SavedBlocks, "save", dies_after_a_block)
        assert main([*argv, "--out", str(tmp_path / out)]) == 130
        monkeypatch.setattr(SavedBlocks, "save", save)
        solved.clear()
        assert main([*argv, "--rotation.seed", seed, "--out", str(tmp_path / out)]) == 0
        return (tmp_path / out / "weights.safetensors").read_bytes()

    monkeypatch.setattr(Gptq, "compress", counted)
    assert main([*argv, "--out", str(tmp_path / "whole")]) == 0
    whole = (tmp_path / "whole" / "weights.safetensors").read_bytes()
    assert interrupted_and_resumed("same", "0") == whole
    assert solved == {"1"}
    assert interrupted_and_resumed("other", "1") != whole
    assert solved == {"0", "1"}


def test_what_is_rotated_is_not_taken_for_the_model_of_its_library(folders, tmp_path, in_process, capfd):
    rotated, again = tmp_path / "rotated", ("--out", str(tmp_path / "again"))
    sixteen = ("--quantizer", "Rtn", "--quantizer.bits", "16", "--format", "own", "--device", "cpu")
    argv = ("--rotation", "Rotate", "--out", str(rotated))
    assert main(["quantize", str(folders / "untied"), *sixteen, *argv]) == 0
    capfd.readouterr()
    wrong = {
        "is rotated already": ("quantize", str(rotated), *sixteen, *again),
        f"{rotated} is rotated, so that": ("export", str(rotated), "--to", "hf", *again),
        "compress after merging": ("merge", "--sources", f"[{rotated}, {rotated}]", "--merger", "Average", *again),
    }
    for message, line in wrong.items():
        assert main([*line]) == 2, message
        assert message in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rotated"]


def test_what_cannot_be_rotated_is_one_message_before_any_work(folders, few, tmp_path, capfd, monkeypatch):
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    argv = ("--pruner", "Magnitude", "--pruner.sparsity", "0.5", "--out", str(pruned))
    assert main(["prune", str(folders / "tied"), *argv]) == 0
    capfd.readouterr()
    monkeypatch.setattr("fulgurite.methods.quantization.rotation.rotate", None)
    online, own, four = ("--rotation", "Rotate"), ("--format", "own"), (*GPTQ, "4")
    runs = "--rotation.heads merged --rotation.feed_forward false, or give --format own"
    wrong = {
        f"rotates inputs of 4 layers at run time, which transformers does not: set {runs}": ("tied", *online),
        "rotates inputs of 2 layers at run time": ("tied", *NONE),
        "OPTForCausalLM has LayerNorms, as model.decoder.layers.0.self_attn_layer_norm": ("opt", *MERGED),
        "ties in every T5ForConditionalGeneration: give --format own": ("t5", *MERGED),
        "BertLMHeadModel of": ("bert", *online, *own),
        "rotated are language models whose blocks start with norms, gpt2, llama": ("bert", *online, *own),
        "choose --rotation.heads none": ("gpt2", *online, *own),
        "is pruned, and rotated weights are no longer 0": (pruned, *online, *own),
        "expected one of none, merged, online": ("tied", *online, "--rotation.heads", "all"),
        "copies=17: expected 1 to 16": ("tied", "--rolled_copies", "17"),
    }
    for message, (family, *options) in wrong.items():
        assert main(["quantize", str(folders / family), *four, *options, *few, "--out", str(out)]) == 2, message
        said = capfd.readouterr().err
        assert message in said
        assert said.count("fulgurite quantize: ") == 1
    rtn = ("--quantizer", "Rtn", "--rolled_copies", "2", "--out", str(out))
    assert main(["quantize", str(folders / "tied"), *rtn]) == 2
    assert "there is no --text" in capfd.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["pruned"]


def test_a_dry_run_names_the_rotation(folders, few, tmp_path, capfd):
    argv = ("quantize", str(folders / "tied"), *GPTQ, "4", *MERGED, *few, "--out", str(tmp_path / "out"), "--dry-run")
    assert main([*argv]) == 0
    assert "Rotate, heads merged" in capfd.readouterr().out
    assert not list(tmp_path.iterdir())
