"""A merge of Hugging Face folders is a checkpoint and a Hugging Face folder; so is what is merged of it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from fulgurite.checkpoints import load_tensors, read_manifest, verify
from fulgurite.checkpoints.sources import open_source
from fulgurite.cli import main

VOCABULARY = {"a": 0, "b": 1, "c": 2}


@pytest.fixture(scope="module")
def llamas(tmp_path_factory):
    """Folders ``base``, ``one``, ``two`` of tiny llamas, and ``wide`` with more rows of its vocabulary."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    root = tmp_path_factory.mktemp("llamas")
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 1}
    for seed, name in enumerate(("base", "one", "two", "wide")):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=24 if name == "wide" else 20, num_hidden_layers=3, tie_word_embeddings=True, **sizes
        )
        model = LlamaForCausalLM(config)
        model.generation_config = GenerationConfig(max_new_tokens=5)
        model.save_pretrained(root / name)
        (root / name / "tokenizer.json").write_text(json.dumps({"model": {"vocab": VOCABULARY}, "added_tokens": []}))
        (root / name / "README.md").write_text("another model")
    return root


def loaded(path, **given):
    from transformers import LlamaForCausalLM

    model, info = LlamaForCausalLM.from_pretrained(path, output_loading_info=True, **given)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def merge(llamas, out, *more, sources=("one", "two"), base="base"):
    given = [str(llamas / name) for name in sources]
    based = [] if base is None else ["--base", str(llamas / base)]
    return main(["merge", "--sources", json.dumps(given), *based, "--out", str(out), *more])


TASKS = ("--merger", "TaskArithmetic", "--merger.lam", "0.5")


def test_the_result_loads_and_is_a_checkpoint_too(llamas, tmp_path):
    out = tmp_path / "out"
    assert merge(llamas, out, *TASKS) == 0
    base, one, two = (load_file(llamas / name / "model.safetensors") for name in ("base", "one", "two"))
    assert "lm_head.weight" not in base  # tied
    found = loaded(out).state_dict()
    for name, tensor in base.items():
        torch.testing.assert_close(found[name], tensor + 0.5 * (one[name] - tensor + two[name] - tensor))
    assert verify(out).ok
    assert not verify(out).extra
    names = ("config.json", "generation_config.json", "tokenizer.json", "model.safetensors", "README.md")
    assert set(read_manifest(out).files) == set(names)
    assert (out / "tokenizer.json").read_bytes() == (llamas / "base" / "tokenizer.json").read_bytes()
    assert "TaskArithmetic" in (out / "README.md").read_text()
    assert loaded(out).generation_config.max_new_tokens == 5


def test_shards_load_and_are_a_source_again(llamas, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    assert merge(llamas, out, *TASKS, "--max_shard_size", "2KB") == 0
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert all(name in load_file(out / file) for name, file in index["weight_map"].items())
    assert merge(llamas, tmp_path / "whole", *TASKS) == 0
    whole = load_tensors(tmp_path / "whole", "model")
    assert all(torch.equal(tensor, whole[name]) for name, tensor in loaded(out).state_dict().items() if name in whole)
    assert main(["merge", "--sources", json.dumps([str(out)]), "--merger", "Average", "--out", str(again)]) == 0
    found = open_source(again).tensors
    assert all(torch.equal(tensor, whole[name]) for name, tensor in found.items())
    assert (again / "model.safetensors").is_file()  # shards are a choice of each merge
    assert loaded(again) is not None


def test_the_type_stands_in_the_configuration(llamas, tmp_path):
    out = tmp_path / "out"
    assert merge(llamas, out, *TASKS, "--dtype", "bfloat16") == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert loaded(out, dtype="auto").dtype == torch.bfloat16


def test_rows_that_are_cut_change_the_vocabulary(llamas, tmp_path, capsys):
    out = tmp_path / "out"
    average = ("--merger", "Average", "--rows", "common", "--strict", "false")
    assert merge(llamas, out, *average, sources=("wide", "one"), base=None) == 0
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 20
    assert loaded(out).model.embed_tokens.weight.shape == (20, 8)


def test_files_of_another_folder(llamas, tmp_path, capsys):
    out = tmp_path / "out"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_bytes((llamas / "one" / "config.json").read_bytes())
    (tmp_path / "mine" / "chat_template.jinja").write_text("hello")
    assert merge(llamas, out, *TASKS, "--like", str(tmp_path / "mine")) == 0
    assert (out / "chat_template.jinja").read_text() == "hello"
    assert not (out / "tokenizer.json").exists()
    assert loaded(out) is not None
    assert merge(llamas, tmp_path / "no", *TASKS, "--like", str(tmp_path)) == 2
    assert "config.json" in capsys.readouterr().err


def test_a_dry_run_counts_what_is_copied(llamas, tmp_path, capsys):
    assert merge(llamas, tmp_path / "out", *TASKS, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "tokenizer.json" in printed
    assert "model.safetensors" in printed
    assert not (tmp_path / "out").exists()


def test_peft_loads_merged_adapters(llamas, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    name = "model.layers.1.self_attn.q_proj.weight"
    plain, paths, moved = loaded(llamas / "base").get_parameter(name), [], []
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        adapted = get_peft_model(loaded(llamas / "base"), config)
        paths.append(str(tmp_path / str(seed)))
        adapted.save_pretrained(paths[-1])
        moved.append(adapted.merge_and_unload().get_parameter(name) - plain)
    merging = ("merge", "--sources", json.dumps(paths), "--merger", "MergeLoRA", "--out", str(tmp_path / "out"))
    assert main(list(merging)) == 0
    merged = PeftModel.from_pretrained(loaded(llamas / "base"), tmp_path / "out").merge_and_unload()
    torch.testing.assert_close(merged.get_parameter(name) - plain, sum(moved))


def test_stacked_layers_load(llamas, tmp_path):
    parts = (("one", 0, 2), ("two", 1, 3), ("one", 2, 3))
    sources = [f"  - sources: [{{model: {llamas / name}, layer_range: [{i}, {j}]}}]" for name, i, j in parts]
    (tmp_path / "stack.yml").write_text("\n".join(["slices:", *sources, "merge_method: passthrough"]))
    assert main(["merge", "--mergekit", str(tmp_path / "stack.yml"), "--out", str(tmp_path / "out")]) == 0
    model = loaded(tmp_path / "out")
    assert model.config.num_hidden_layers == len(model.model.layers) == 5
    old = loaded(llamas / "two").get_parameter("model.layers.2.mlp.up_proj.weight")
    assert torch.equal(model.get_parameter("model.layers.3.mlp.up_proj.weight"), old)
