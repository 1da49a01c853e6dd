"""``merge --mergekit`` on folders: names, layers, types and tokenizers of the result, and what is refused."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fulgurite.checkpoints import read_manifest, verify
from fulgurite.cli import main

TOKENS = {f"t{n}": n for n in range(6)}
ROWS, LAYERS = 8, 3


def write_model(folder, seed, rows=ROWS, tokens=TOKENS):
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    names = {"model.embed_tokens.weight": (rows, 4), "model.norm.weight": (rows,), "lm_head.weight": (rows, 4)}
    names |= {f"model.layers.{n}.mlp.weight": (4, 4) for n in range(LAYERS)}
    save_file(
        {name: torch.randn(shape, generator=generator) for name, shape in names.items()}, folder / "model.safetensors"
    )
    config = {"model_type": "llama", "dtype": "float32", "num_hidden_layers": LAYERS, "vocab_size": rows}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"from": folder.name}))


@pytest.fixture
def models(tmp_path, monkeypatch):
    """Folders a, b, with HF's names; an empty cache of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    write_model(tmp_path / "a", 1)
    write_model(tmp_path / "b", 2)
    return {name: load_file(tmp_path / name / "model.safetensors") for name in "ab"}


def run(value, *more, out="out"):
    with open("merge.yml", "w") as file:
        yaml.safe_dump(value, file)
    return main(["merge", "--mergekit", "merge.yml", "--out", out, *more])


LINEAR = {"models": [{"model": "a"}, {"model": "b"}], "merge_method": "linear", "parameters": {"weight": 1}}


def test_a_merge(models, tmp_path):
    assert run({**LINEAR, "out_dtype": "float16"}) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    for name, tensor in found.items():
        assert torch.equal(tensor, ((models["a"][name] + models["b"][name]) / 2).half())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    assert verify("out").ok
    manifest = read_manifest("out")
    assert manifest.settings["merger"] == "linear"
    assert manifest.settings["mergekit"]["models"] == LINEAR["models"]
    assert "linear" in (tmp_path / "out" / "README.md").read_text()


def test_stacked_layers_change_their_number(models, tmp_path):
    slices = [{"sources": [{"model": m, "layer_range": r}]} for m, r in (("a", [0, 2]), ("b", [1, 3]))]
    assert run({"slices": slices, "merge_method": "passthrough"}) == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(found["model.layers.3.mlp.weight"], models["b"]["model.layers.2.mlp.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4


def test_one_model_at_full_weight_comes_back_and_is_no_mistake(models, tmp_path, capsys):
    value = {"models": [{"model": "a"}], "merge_method": "ties", "base_model": "b", "parameters": {"weight": 0.5}}
    assert run(value) == 0
    assert torch.equal(load_file("out/model.safetensors")["lm_head.weight"], models["a"]["lm_head.weight"])
    write_model(tmp_path / "c", 1)
    value["models"].append({"model": "c"})  # another folder, the same numbers
    assert run(value, out="again") == 2
    assert "the sources are the same" in capsys.readouterr().err


def test_layers_of_one_model_twice_are_no_mistake(models, tmp_path):
    slices = [{"sources": [{"model": "a", "layer_range": [0, end]}]} for end in (3, 2)]
    assert run({"slices": slices, "merge_method": "passthrough"}) == 0


def test_a_tokenizer_of_another_model_cuts_rows_without_a_token(models, tmp_path):
    assert run({**LINEAR, "tokenizer_source": "b"}) == 0
    out = tmp_path / "out"
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"from": "b"}
    assert json.loads((out / "config.json").read_text())["vocab_size"] == len(TOKENS)
    found = load_file(out / "model.safetensors")
    assert found["model.embed_tokens.weight"].shape == found["lm_head.weight"].shape == (len(TOKENS), 4)
    assert found["model.norm.weight"].shape == (ROWS,)


def test_a_longer_vocabulary_is_cut_too(models, tmp_path):
    write_model(tmp_path / "long", 3, rows=9)
    value = {"models": [{"model": "a"}, {"model": "long"}], "merge_method": "linear", "parameters": {"weight": 1}}
    # Not the norm: its length is no vocabulary.
    tensors = load_file("long/model.safetensors")
    save_file({**tensors, "model.norm.weight": models["a"]["model.norm.weight"]}, "long/model.safetensors")
    assert run(value) == 2
    assert run({**value, "tokenizer_source": "base"}) == 0
    assert load_file(tmp_path / "out" / "model.safetensors")["lm_head.weight"].shape == (len(TOKENS), 4)


def test_tokens_at_other_places_are_refused(models, tmp_path, capsys):
    write_model(tmp_path / "other", 3, tokens={**TOKENS, "t0": 1, "t1": 0})
    value = {"models": [{"model": "a"}, {"model": "other"}], "merge_method": "linear", "tokenizer_source": "base"}
    assert run(value) == 2
    assert "2 tokens of a have other numbers" in capsys.readouterr().err


def test_a_model_of_the_hub_that_was_downloaded(models, tmp_path):
    write_model(tmp_path / "hub" / "models--owner--c" / "snapshots" / "123", 3)
    (tmp_path / "hub" / "models--owner--c" / "refs").mkdir()
    (tmp_path / "hub" / "models--owner--c" / "refs" / "main").write_text("123")
    assert run({**LINEAR, "models": [{"model": "a"}, {"model": "owner/c"}]}) == 0


def test_a_dry_run_and_remarks(models, tmp_path, capsys):
    assert run({**LINEAR, "parameters": {"weight": 1, "density": 0.5}}, "--dry-run") == 0
    printed = capsys.readouterr().out
    for part in ("density has no effect on linear", "linear into out", "6 tensors are merged", "tokenizer.json"):
        assert part in printed
    assert not (tmp_path / "out").exists()


def test_all_that_is_wrong_is_said_at_once(models, capsys):
    wrong = {"models": [{"model": "a"}, {"model": "none/there"}, {"model": "a"}], "merge_method": "slerp"}
    assert run({**wrong, "parameters": {"wieght": 1}, "chat_template": "auto"}) == 2
    err = capsys.readouterr().err
    parts = ("none/there: no such", "a is named twice", "3 models, it takes 2", "wieght", "chat_template")
    for part in (*parts, "no base_model"):
        assert part in err


@pytest.mark.parametrize(
    ("value", "more", "said"),
    [
        ({**LINEAR, "models": [{"model": "a"}, {"model": "owner/none"}]}, (), "owner/none: no such folder"),
        ({**LINEAR, "tokenizer_source": "union"}, (), "union is not supported"),
        (LINEAR, ("--base", "a", "--dtype", "float16"), "--base, --dtype"),
        (LINEAR, ("--merger", "Average"), "--merger"),
        (LINEAR, ("--rows", "common"), "--rows"),
        ({**LINEAR, "parameters": {}}, (), "weight is missing for a"),
    ],
)
def test_what_is_refused_leaves_nothing(value, more, said, models, tmp_path, capsys):
    assert run(value, *more) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_tokens_without_a_row_are_refused(models, tmp_path, capsys):
    write_model(tmp_path / "short", 3, rows=5)
    value = {"models": [{"model": "a"}, {"model": "short"}], "merge_method": "linear", "tokenizer_source": "base"}
    assert run({**value, "parameters": {"weight": 1}}) == 2
    assert "short: 5 rows" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    whole = {**LINEAR, "models": [{"model": "short"}], "tokenizer_source": "short"}
    assert run(whole) == 2
    assert "too few for the tokens of short, which need 6" in capsys.readouterr().err
