"""``prune`` and ``quantize`` of language models in files: what lies there, who loads it, resuming, and refusals."""

import csv
import json
import math
import random
import re

import pytest
import torch
from safetensors.torch import load_file

import fulgurite
from fulgurite.backbones.fresh import DifferenceError
from fulgurite.backbones.language_specs import language_spec
from fulgurite.callbacks.saved_blocks import SavedBlocks
from fulgurite.checkpoints import read_manifest, verify
from fulgurite.checkpoints.tensorfile import map_file
from fulgurite.cli import main
from fulgurite.methods.compression import compressed_blocks, matrices
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.methods.quantization.rtn import quantize_rtn
from fulgurite.methods.quantization.storage import COMPRESSED, masks_of
from fulgurite.modules import compressed_files

LETTERS = "abcdefgh ."
WANDA = ("--pruner", "Wanda", "--pruner.sparsity", "0.5")
GPTQ = ("--quantizer", "Gptq", "--quantizer.bits", "4", "--quantizer.group_size", "16")


pytestmark = pytest.mark.usefixtures("one_thread")


def text(llamas):
    few = ("--samples", "6", "--length", "32", "--device", "cpu")
    return ("--text", str(llamas / "text.txt"), *few)


def evaluate(llamas):
    return ("--evaluate", str(llamas / "text.txt"), "--evaluate_samples", "5")


def windows(llamas):
    """Those that GPTQ's published code takes of these tokens."""
    numbers = {letter: number for number, letter in enumerate(["<unk>", *LETTERS, "\n"])}
    ids = torch.tensor([numbers[letter] for letter in (llamas / "text.txt").read_text()])
    random.seed(0)
    starts = [random.randint(0, len(ids) - 32 - 1) for _ in range(6)]
    return torch.stack([ids[start : start + 32] for start in starts]), ids


def by_hand(folder, compressor, batches):
    """The model compressed by the library's functions."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype="auto").eval()
    walk = LayerWalk(model, language_spec(model), [batches], lambda batch: model(batch, use_cache=False))
    compressor.begin(matrices(walk))
    for _ in compressed_blocks(walk, compressor):
        pass
    return model


def loss(model, ids):
    """exp of the mean loss of five windows, by transformers' own loss."""
    with torch.no_grad():
        rows = ids[: 5 * 32].view(5, 32)
        return math.exp(sum(model(row[None], labels=row[None]).loss.item() for row in rows) / 5)


def test_a_pruned_folder_is_what_the_library_loads_and_a_checkpoint_with_masks(llamas, tmp_path, in_process, capfd):
    from transformers import LlamaForCausalLM

    out = tmp_path / "out"
    argv = (
        "prune",
        str(llamas / "llama"),
        "--out",
        str(out),
        *WANDA,
        *text(llamas),
        *evaluate(llamas),
        "--report",
    )
    assert main(list(argv)) == 0
    printed = capfd.readouterr().out
    batches, ids = windows(llamas)
    expected = by_hand(llamas / "llama", Wanda(0.5), batches)
    found = LlamaForCausalLM.from_pretrained(out).eval()
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in expected.state_dict().items())
    assert verify(out).ok
    manifest = read_manifest(out)
    masks = masks_of(map_file(out / "masks.safetensors"), manifest.facts[COMPRESSED])
    assert len(masks) == 14
    for name, mask in masks.items():
        assert torch.equal(mask, found.get_parameter(name) != 0)
        assert mask.float().mean() == 0.5
    assert (out / "tokenizer.json").read_bytes() == (llamas / "llama" / "tokenizer.json").read_bytes()
    assert "Wanda" in (out / "README.md").read_text()
    before = LlamaForCausalLM.from_pretrained(llamas / "llama").eval()
    assert manifest.metrics["perplexity_before"] == pytest.approx(loss(before, ids), rel=1e-5)
    assert manifest.metrics["perplexity"] == pytest.approx(loss(found, ids), rel=1e-5)
    assert f"{loss(found, ids):.4g} after, on 155 tokens" in printed
    assert "50.0 %" in printed
    rows = list(csv.DictReader((out / "layers.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == [layer["name"] for layer in manifest.facts["layers"]]
    assert all(float(row["sparsity"]) == 0.5 and float(row["error"]) > 0 for row in rows)
    assert "model.layers.1.mlp.up_proj" in (out / "report.html").read_text()
    assert not list(tmp_path.glob("*-partial"))


def test_transformers_loads_what_was_quantized(llamas, tmp_path):
    """In a fresh process once, and here as a user does, without dequantizing first."""
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    assert main(["quantize", str(llamas / "bfloat16"), "--out", str(out), *GPTQ, *text(llamas)]) == 0
    expected = by_hand(llamas / "bfloat16", Gptq(4, 16), windows(llamas)[0])
    found = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    inputs = torch.arange(1, 12)[None]
    with torch.no_grad():
        assert torch.equal(found(inputs).logits, expected(inputs).logits)
    stored = load_file(out / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight_packed"].shape == (64, 32 * 4 // 32)
    assert stored["model.layers.0.mlp.up_proj.weight_scale"].dtype == torch.bfloat16
    assert "lm_head.weight" not in stored
    manifest = read_manifest(out)
    assert max(manifest.facts["errors"].values()) < 1e-5
    assert "transformers" in manifest.facts["reloaded"]
    assert manifest.facts["totals"]["bits"] == 4
    # 16 entries of 4 bits share a scale of 16; a shape of 128 bits is stored per layer.
    assert manifest.facts["totals"]["stored_bits"] == pytest.approx(5 + 14 * 128 / 18432)
    assert main(["quantize", str(out), "--out", str(tmp_path / "again"), *GPTQ, *text(llamas)]) == 2


def test_bits_by_name_go_into_groups_of_the_configuration(llamas, tmp_path, in_process):
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    names = '{".*mlp.*": 8, ".*layers.0.*q_proj": 16}'
    assert main(["quantize", str(llamas / "llama"), "--out", str(out), "--quantizer", "Rtn", "--device", "cpu",
                 "--quantizer.bits_by_name", names]) == 0  # fmt: skip
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert [group["weights"]["num_bits"] for group in config["config_groups"].values()] == [4, 8]
    assert set(config["ignore"]) == {"lm_head", "model.layers.0.self_attn.q_proj"}
    plain = load_file(llamas / "llama" / "model.safetensors")
    found = AutoModelForCausalLM.from_pretrained(out)
    found(torch.arange(3)[None])  # decompresses
    for name, bits in (("mlp.up_proj", 8), ("self_attn.k_proj", 4), ("self_attn.q_proj", 16)):
        name = f"model.layers.0.{name}.weight"
        expected = quantize_rtn(plain[name], bits, 128, "symmetric").weight
        assert torch.equal(found.get_parameter(name), expected), name


def test_our_own_layout_holds_any_bits_and_the_zeros_of_pruning(llamas, tmp_path, in_process, capfd):
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    assert main(["prune", str(llamas / "llama"), "--out", str(pruned), *WANDA, *text(llamas)]) == 0
    three = ("--quantizer", "Gptq", "--quantizer.bits", "3", "--quantizer.scheme", "asymmetric", "--format", "own")
    assert main(["quantize", str(pruned), "--out", str(out), *three, *text(llamas)]) == 0
    compressor = Gptq(3, scheme="asymmetric")
    masks = masks_of(map_file(pruned / "masks.safetensors"), read_manifest(pruned).facts[COMPRESSED])
    compressor.keep_zeros({name.removesuffix(".weight"): mask for name, mask in masks.items()})
    expected = by_hand(pruned, compressor, windows(llamas)[0])
    found = fulgurite.load_model(out)
    assert all(torch.equal(tensor, found.state_dict()[name]) for name, tensor in expected.state_dict().items())
    assert all((found.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())
    assert "fulgurite.load_model" in (out / "README.md").read_text()
    assert (out / "weights.safetensors").stat().st_size < (pruned / "model.safetensors").stat().st_size / 3
    capfd.readouterr()
    again = ("--pruner", "Magnitude", "--pruner.sparsity", "0.9", "--out", str(tmp_path / "again"))
    for source, why in ((pruned, "is pruned already"), (out, "is quantized already")):
        assert main(["prune", str(source), *again]) == 2
        assert why in capfd.readouterr().err


def test_what_was_interrupted_goes_on_and_gives_the_same_bytes(llamas, tmp_path, in_process, monkeypatch, capsys):
    pytest.importorskip("compressed_tensors")
    argv = ["quantize", str(llamas / "llama"), *GPTQ, *text(llamas), "--out"]
    assert main([*argv, str(tmp_path / "whole")]) == 0
    save, compress, solved = SavedBlocks.save, Gptq.compress, []

    def dies_after_a_block(self, done):
        save(self, done)
        raise KeyboardInterrupt

    def counted(self, name, weight, moment):
        solved.append(name)
        return compress(self, name, weight, moment)

    monkeypatch.setattr(SavedBlocks, "save", dies_after_a_block)
    assert main([*argv, str(tmp_path / "out")]) == 130
    assert (tmp_path / "out-partial").is_dir()
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(SavedBlocks, "save", save)
    monkeypatch.setattr(Gptq, "compress", counted)
    assert main([*argv, str(tmp_path / "out")]) == 0
    assert {name.split(".")[2] for name in solved} == {"1"}
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("quantize: block 2 of 2, model.layers.1") == 2
    assert printed.count("going on after block 1 of 2") == 1
    assert "LlamaForCausalLM.from_pretrained('out')" in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    assert len(read_manifest(tmp_path / "out").facts["layers"]) == 14
    assert not (tmp_path / "out-partial").exists()


def test_blocks_of_other_settings_are_not_taken(llamas, tmp_path, in_process, monkeypatch):
    argv = [
        "prune",
        str(llamas / "llama"),
        *text(llamas),
        "--out",
        str(tmp_path / "out"),
        "--pruner",
        "Wanda",
    ]
    save = SavedBlocks.save

    def dies(self, done):
        save(self, done)
        raise KeyboardInterrupt

    monkeypatch.setattr(SavedBlocks, "save", dies)
    assert main([*argv, "--pruner.sparsity", "0.25"]) == 130
    monkeypatch.setattr(SavedBlocks, "save", save)
    assert main([*argv, "--pruner.sparsity", "0.5"]) == 0
    assert all(layer["sparsity"] == 0.5 for layer in read_manifest(tmp_path / "out").facts["layers"])


def test_a_difference_leaves_nothing(llamas, tmp_path, monkeypatch, capfd):
    def other(*given, **more):
        raise DifferenceError("what was written is not the model")

    monkeypatch.setattr(compressed_files, "compare_fresh", other)
    assert main(["prune", str(llamas / "llama"), *WANDA, *text(llamas), "--out", str(tmp_path / "out")]) == 2
    assert "is not the model" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_dry_run_writes_nothing(llamas, tmp_path, capfd):
    argv = (
        "prune",
        str(llamas / "llama"),
        *WANDA,
        *text(llamas),
        "--out",
        str(tmp_path / "out"),
        "--dry-run",
    )
    assert main([*argv, "--layers", r".*mlp.*"]) == 0
    printed = capfd.readouterr().out
    assert "6 with 12,288 weights" in printed
    assert "6 x 32 tokens" in printed
    assert not list(tmp_path.iterdir())


def test_wrong_usage_is_one_message_before_any_work(llamas, tmp_path, capfd):
    out, model = tmp_path / "out", str(llamas / "llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "short.txt").write_text("abc")
    (tmp_path / "rows.jsonl").write_text('{"words": "abc"}\n')
    rtn, magnitude = ("--quantizer", "Rtn"), ("--pruner", "Magnitude", "--pruner.sparsity", "0.5")
    wrong = {
        "measures a model on data: give --text": ("prune", model, *WANDA),
        "needs no data: leave out --text": ("prune", model, *magnitude, *text(llamas)),
        "a sparsity of 1.5 is outside [0, 1]": ("prune", model, "--pruner", "Wanda", "--pruner.sparsity", "1.5"),
        "did you mean Wanda": ("prune", model, "--pruner", "Wandaa"),
        "matches no linear layer": ("prune", model, *magnitude, "--layers", "nothing"),
        "this model has ['text']": ("prune", model, *magnitude, "--towers", "[picture]"),
        "3 tokens of text are too few": ("prune", model, *WANDA, *text(llamas), "--text", str(tmp_path / "short.txt")),
        "field 'text'": ("prune", model, *WANDA, *text(llamas), "--text", str(tmp_path / "rows.jsonl")),
        "reads at most 64 tokens": ("prune", model, *WANDA, *text(llamas), "--length", "65"),
        "bits=3: compressed-tensors": ("quantize", model, *rtn, "--quantizer.bits", "3"),
        "does not divide its 32 columns": ("quantize", model, *rtn, "--quantizer.group_size", "24"),
        "stored zeros": ("quantize", model, *rtn, "--quantizer.scheme", "asymmetric"),
        "bits_by_name: 'nothing' matches none": ("quantize", model, *rtn, "--quantizer.bits_by_name", "{nothing: 8}"),
        "no model at": ("quantize", str(tmp_path / "missing"), *rtn),
        "--samples 0": ("prune", model, *WANDA, *text(llamas), "--samples", "0"),
        "is no checkpoint of a run": ("prune", model, *magnitude, "--record", "c.yaml"),
    }  # fmt: skip
    for message, argv in wrong.items():
        assert main([*argv, "--out", str(out)]) == 2, message
        said = capfd.readouterr().err
        assert message in said
        assert len(re.findall(r"^fulgurite (?:prune|quantize): ", said, re.MULTILINE)) == 1
        assert not out.exists()
    assert main(["prune", model, *magnitude, "--out", str(tmp_path / "full")]) == 2
    assert "not an empty folder" in capfd.readouterr().err
