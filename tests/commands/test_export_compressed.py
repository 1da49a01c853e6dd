"""``export`` of what ``quantize --format own`` has written: the dense model that its library loads."""

import json
import shutil

import torch
import transformers

import fulgurite
from fulgurite.backbones.foreign_models import write_model
from fulgurite.checkpoints import read_manifest, verify
from fulgurite.cli import main

IDS = torch.randint(1, 12, (2, 9), generator=torch.Generator().manual_seed(1))
RTN = ("--quantizer", "Rtn", "--quantizer.bits", "3", "--quantizer.group_size", "16", "--format", "own")
MERGED = ("--rotation", "Rotate", "--rotation.heads", "merged", "--rotation.feed_forward", "false")


def quantized(model, out, *options):
    assert main(["quantize", str(model), *RTN, *options, "--device", "cpu", "--out", str(out)]) == 0
    return out


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def test_a_fresh_process_loads_the_weights_that_quantization_left(llamas, tmp_path, in_process):
    pruned = tmp_path / "pruned"
    assert (
        main(
            ["prune", str(llamas / "llama"), "--pruner", "Magnitude", "--pruner.sparsity", "0.5", "--out", str(pruned)]
        )
        == 0
    )
    source, out = quantized(pruned, tmp_path / "three"), tmp_path / "out"
    assert main(["export", str(source), "--to", "hf", "--out", str(out)]) == 0
    assert verify(out).ok
    own, found = fulgurite.load_model(source), transformers.AutoModelForCausalLM.from_pretrained(out)
    expected = own.state_dict()
    assert found.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.state_dict().items())
    assert not hasattr(found.config, "quantization_config")
    name = "model.layers.0.mlp.up_proj.weight"
    groups = expected[name].reshape(-1, 16)
    assert max(len(row.unique()) for row in groups) <= 8  # of three bits
    assert (expected[name] == 0).float().mean() >= 0.5
    assert transformers.AutoTokenizer.from_pretrained(out)("a bad cab")["input_ids"]
    manifest = read_manifest(out)
    assert manifest.parents == [{"path": str(source), "digest": read_manifest(source).digest}]
    assert "compressed" not in manifest.facts
    # It is a model like any other now.
    assert (
        main(["prune", str(out), "--pruner", "Magnitude", "--pruner.sparsity", "0.9", "--out", str(tmp_path / "on")])
        == 0
    )


def test_a_model_of_timm(tmp_path, in_process, compared_in_process):
    import timm

    (tmp_path / "vit").mkdir()
    torch.manual_seed(0)
    write_model("timm", timm.create_model("test_vit").eval(), tmp_path / "vit", architecture="test_vit")
    source, out = quantized(tmp_path / "vit", tmp_path / "three"), tmp_path / "out"
    assert main(["export", str(source), "--to", "timm", "--out", str(out)]) == 0
    found, expected = timm.create_model(f"local-dir:{out}", pretrained=True), fulgurite.load_model(source)
    assert all(torch.equal(tensor, expected.state_dict()[name]) for name, tensor in found.state_dict().items())


def test_of_rotated_models_those_that_the_library_computes(llamas, tmp_path, in_process, compared_in_process, capfd):
    source, out = quantized(llamas / "llama", tmp_path / "merged", *MERGED), tmp_path / "out"
    assert main(["export", str(source), "--to", "hf", "--out", str(out)]) == 0
    found = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits(found), logits(fulgurite.load_model(source)))
    assert not found.config.tie_word_embeddings
    assert read_manifest(out).facts["rotation"] == read_manifest(source).facts["rotation"]
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 2}
    config = transformers.OPTConfig(vocab_size=32, num_attention_heads=4, max_position_embeddings=64, **sizes)
    transformers.OPTForCausalLM(config).save_pretrained(tmp_path / "opt")
    refused = {
        "layers.0.self_attn.o_proj rotates its input": quantized(
            llamas / "llama", tmp_path / "on", "--rotation", "Rotate"
        ),
        "self_attn_layer_norm is another norm now": quantized(tmp_path / "opt", tmp_path / "norms", *MERGED),
    }
    capfd.readouterr()
    for message, path in refused.items():
        assert main(["export", str(path), "--to", "hf", "--out", str(tmp_path / "no")]) == 2
        assert message in capfd.readouterr().err
    assert not (tmp_path / "no").exists()


def test_wrong_options_are_one_message(llamas, tmp_path, in_process, capfd):
    source, packed = quantized(llamas / "llama", tmp_path / "three"), tmp_path / "packed"
    shutil.copytree(llamas / "llama", packed)
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {}}))
    assert main(["export", str(packed), "--to", "hf", "--out", str(tmp_path / "no")]) == 2
    assert "load it by transformers itself" in capfd.readouterr().err
    for message, argv in {
        "not converted to timm": ("--to", "timm"),
        "no adapter set": ("--to", "peft"),
        "leave it out": ("--to", "hf", "--like", str(source), "--architecture", "llama"),
    }.items():
        capfd.readouterr()
        assert main(["export", str(source), *argv, "--out", str(tmp_path / "no")]) == 2
        assert message in capfd.readouterr().err
