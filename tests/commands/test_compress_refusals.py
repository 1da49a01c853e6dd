"""``prune`` and ``quantize`` on files: options that cannot be met, comparisons that do not end, and what is resumed."""

import json
import os
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from fulgurite.backbones import fresh
from fulgurite.callbacks.saved_blocks import SavedBlocks
from fulgurite.checkpoints import read_manifest
from fulgurite.checkpoints.lock import writing
from fulgurite.checkpoints.tensorfile import map_file
from fulgurite.cli import main
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.quantization.storage import COMPRESSED, masks_of

HALF = ("--pruner.sparsity", "0.5")
MAGNITUDE, WANDA = ("--pruner", "Magnitude", *HALF), ("--pruner", "Wanda", *HALF)
RTN = ("--quantizer", "Rtn", "--quantizer.group_size", "16")


@pytest.fixture
def few(llamas):
    return ("--text", str(llamas / "text.txt"), "--samples", "4", "--length", "16", "--device", "cpu")


def test_options_that_cannot_be_met_are_one_message(llamas, few, image_models, pictures, tmp_path, capfd, monkeypatch):
    model, timm, shards = str(llamas / "llama"), str(image_models / "timm"), "--max_shard_size"
    own = (*RTN, "--format", "own")
    budget = ("--budget", "BitBudget", "--budget.average_bits", "16", "--budget.choices", "[4, 16]")
    shown = ("--pictures", str(pictures), "--samples", "2", "--length", "16")
    idle = ("--samples", "3", "--seed", "1", "--batch_size", "2")
    wrong = {
        "is a model of timm: give --format own": ("quantize", timm, *RTN),
        "no option '--sparsity'; did you mean --pruner.sparsity?": (
            "prune", model, "--pruner", "Wanda", "--sparsity", "0.5",
        ),
        "Wanda is a class of the package, but of another kind": ("quantize", model, "--quantizer", "Wanda"),
        "there is nothing to quantize": ("quantize", model, *RTN, "--quantizer.bits", "16"),
        "there is nothing to quantize: give fewer": ("quantize", model, *RTN, "--quantizer.bits_by_name", "{.*: 16}"),
        "bits=16 of all layers": ("quantize", model, *RTN, *budget),
        "--pruner.bits 4: a pruned folder holds dense weights": (
            "prune", model, "--pruner", "SparseGpt", *HALF, "--pruner.bits", "4", *few,
        ),
        "--evaluate_samples 3: there is no --evaluate": ("prune", model, *MAGNITUDE, "--evaluate_samples", "3"),
        "--length 16: there is no --text or --evaluate": ("prune", model, *MAGNITUDE, "--length", "16"),
        "--length 16: there is no --text": ("prune", str(image_models / "vit"), *WANDA, *shown),
        "--samples, --seed, --batch_size: this method measures nothing": ("prune", model, *MAGNITUDE, *idle),
        "--max_shard_size 5GB: weights are written to one file": ("quantize", timm, *own, shards, "5GB"),
        "--max_shard_size 6GB": ("quantize", model, *own, shards, "6GB"),
        "--max_shard_size 5: expected a number and KB": ("prune", model, *MAGNITUDE, shards, "5"),
    }  # fmt: skip
    for message, argv in wrong.items():
        assert main([*argv, "--out", str(tmp_path / "out")]) == 2, message
        assert message in capfd.readouterr().err
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**12, 10**12, 10))
    assert main(["quantize", model, *own, "--out", str(tmp_path / "out")]) == 2
    assert "bytes are needed, 10 are free" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_comparison_that_does_not_end_keeps_the_blocks(llamas, few, tmp_path, capfd, monkeypatch):
    dies = tmp_path / "dies.py"
    dies.write_text("import os; os.kill(os.getpid(), 9)")
    argv, solved = ["prune", str(llamas / "llama"), *WANDA, *few, "--out", str(tmp_path / "out")], []
    compress = Wanda.compress

    def counted(self, name, weight, moment):
        solved.append(name)
        return compress(self, name, weight, moment)

    monkeypatch.setattr(Wanda, "compress", counted)
    with monkeypatch.context() as patched:
        patched.setattr(fresh.reload, "__file__", str(dies))
        assert main(argv) == 2
        assert "was ended by signal 9" in capfd.readouterr().err
        dies.write_text("import time; time.sleep(60)")
        patched.setattr(fresh, "TIMEOUT_S", 0.1)
        assert main(argv) == 2
        assert "did not load" in capfd.readouterr().err
        with writing(tmp_path / "out-partial"):
            assert main(argv) == 2
            assert f"process {os.getpid()}" in capfd.readouterr().err
    assert len(solved) == 14
    assert len(list((tmp_path / "out-partial").iterdir())) == 2
    assert not (tmp_path / "out").exists()


def test_blocks_of_another_configuration_are_not_taken(llamas, few, tmp_path, in_process, monkeypatch):
    model, save = tmp_path / "model", SavedBlocks.save
    shutil.copytree(llamas / "llama", model)

    def dies(self, done):
        save(self, done)
        raise KeyboardInterrupt

    argv = ["prune", str(model), *WANDA, *few, "--out"]
    with monkeypatch.context() as patched:
        patched.setattr(SavedBlocks, "save", dies)
        assert main([*argv, str(tmp_path / "out")]) == 130
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5, "hidden_act": "relu"}))
    assert main([*argv, str(tmp_path / "out")]) == 0
    assert main([*argv, str(tmp_path / "anew")]) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "anew")]
    assert files[0] == files[1]


@pytest.mark.parametrize("what", ["weights", "text"])
def test_blocks_of_other_weights_or_text_are_not_taken(what, llamas, few, tmp_path, in_process, monkeypatch):
    model, text, save = tmp_path / "model", tmp_path / "text.txt", SavedBlocks.save
    shutil.copytree(llamas / "llama", model)
    shutil.copy(llamas / "text.txt", text)

    def dies(self, done):
        save(self, done)
        raise KeyboardInterrupt

    argv = ["prune", str(model), *WANDA, *few, "--text", str(text), "--out"]
    with monkeypatch.context() as patched:
        patched.setattr(SavedBlocks, "save", dies)
        assert main([*argv, str(tmp_path / "out")]) == 130
    if what == "weights":
        tensors = load_file(model / "model.safetensors")
        others = {name: tensor.flip(0).contiguous() for name, tensor in tensors.items()}
        save_file(others, model / "model.safetensors", {"format": "pt"})
    else:
        text.write_text(text.read_text().replace("a", "b"))
    assert main([*argv, str(tmp_path / "out")]) == 0
    assert main([*argv, str(tmp_path / "anew")]) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "anew")]
    assert files[0] == files[1]


@pytest.mark.parametrize("layout", ["own", "compressed-tensors"])
def test_what_was_pruned_beside_the_layers_stays_marked(layout, llamas, tmp_path, in_process):
    if layout == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    assert main(["prune", str(llamas / "llama"), *MAGNITUDE, "--out", str(pruned)]) == 0
    argv = ("--layers", r".*\.mlp\..*", "--format", layout, "--out", str(out))
    assert main(["quantize", str(pruned), *RTN, *argv]) == 0
    before = masks_of(map_file(pruned / "masks.safetensors"), read_manifest(pruned).facts[COMPRESSED])
    facts = read_manifest(out).facts
    file = "weights.safetensors" if layout == "own" else "masks.safetensors"
    after = masks_of(map_file(out / file), facts[COMPRESSED])
    assert after.keys() == before.keys()
    assert all(torch.equal(mask, before[name]) for name, mask in after.items())
    # A mask of a layer is a bit more per weight; those of other layers are none of it.
    scales = {"own": 32 / 16, "compressed-tensors": 32 / 16 + 6 * 128 / 12288}[layout]
    assert facts["totals"]["stored_bits"] == pytest.approx(4 + scales + 1)


def test_a_pruner_of_rounds_ranks_the_weights_of_all_layers(llamas, few, tmp_path, in_process, capfd):
    rounds = ("prune", str(llamas / "llama"), "--pruner", "Iterative", *HALF)
    argv = (*rounds, "--pruner.score", "magnitude", "--out", str(tmp_path / "plain"))
    assert main([*argv]) == 0
    found, given = (load_file(folder / "model.safetensors") for folder in (tmp_path / "plain", llamas / "llama"))
    names = [f"{layer['name']}.weight" for layer in read_manifest(tmp_path / "plain").facts["layers"]]
    limit = torch.cat([given[name].abs().flatten() for name in names]).median()
    assert len(names) == 14
    assert all(torch.equal(found[name], given[name] * (given[name].abs() > limit)) for name in names)
    assert main([*rounds, *few, "--out", str(tmp_path / "gradient")]) == 0
    scored = load_file(tmp_path / "gradient" / "model.safetensors")
    assert sum((scored[name] == 0).sum().item() for name in names) == sum(given[name].numel() for name in names) / 2
    assert any(not torch.equal(scored[name], found[name]) for name in names)
    capfd.readouterr()
    for message, options in {"give --text FILE": (), "is measured on text": ("--pictures", os.devnull)}.items():
        assert main([*rounds, *options, "--out", str(tmp_path / "no")]) == 2
        assert message in capfd.readouterr().err
