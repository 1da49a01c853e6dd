"""``merge`` of peft's folders: the change of every weight is what the merger says, and what has no sum is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fulgurite.checkpoints import read_manifest, verify
from fulgurite.cli import main

SITES = ("layers.0.q_proj", "layers.1.q_proj")
PREFIX = "base_model.model."


def write_adapter(folder, seed, rank, **config):
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in SITES:
        tensors[f"{PREFIX}{site}.lora_A.weight"] = torch.randn(rank, 6, generator=generator)
        tensors[f"{PREFIX}{site}.lora_B.weight"] = torch.randn(5, rank, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    own = {
        "peft_type": "LORA",
        "base_model_name_or_path": "llama",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps({**own, **config}))


def changes(folder):
    """s B A of every layer, from peft's rule."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    root = config["r"] ** 0.5 if config.get("use_rslora") else config["r"]
    assert not config.get("rank_pattern")
    assert not config.get("alpha_pattern")
    return {
        site: config["lora_alpha"]
        / root
        * tensors[f"{PREFIX}{site}.lora_B.weight"]
        @ tensors[f"{PREFIX}{site}.lora_A.weight"]
        for site in SITES
    }


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Adapters of ranks 2 and 3, the second with rank-stabilised scales."""
    monkeypatch.chdir(tmp_path)
    write_adapter(tmp_path / "a1", 1, 2)
    write_adapter(tmp_path / "a2", 2, 3, use_rslora=True)
    return tmp_path


def merge(*more, sources="[a1, a2]", merger="MergeLoRA"):
    return main(["merge", "--sources", sources, "--merger", merger, "--out", "out", *more])


def test_the_sum_of_changes(folders, capsys):
    assert merge("--weights", "[1, 0.5]", sources="[a*]") == 0
    first, second, found = (changes(folders / name) for name in ("a1", "a2", "out"))
    for site in SITES:
        torch.testing.assert_close(found[site], first[site] + 0.5 * second[site])
    assert verify("out").ok
    manifest = read_manifest("out")
    assert manifest.kind == "delta"
    assert manifest.base == {"source": "llama", "digest": "unknown"}
    assert set(manifest.files) == {"adapter_model.safetensors", "adapter_config.json", "README.md"}
    moved = (0.5 * second[SITES[0]]).norm() / first[SITES[0]].norm()
    assert manifest.facts["change"][SITES[0]] == pytest.approx(float(moved), rel=1e-5)
    assert "merged 2 adapters" in capsys.readouterr().out
    config = json.loads((folders / "out" / "adapter_config.json").read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "llama")


def test_a_rank_and_a_type(folders):
    assert merge("--merger.form", "svd", "--merger.rank", "2", "--dtype", "bfloat16") == 0
    tensors = load_file("out/adapter_model.safetensors")
    assert all(tensor.dtype == torch.bfloat16 and 2 in tensor.shape for tensor in tensors.values())


def test_knots_and_the_result_as_a_source(folders):
    assert merge(merger="MergeKnOTS") == 0
    assert main(["merge", "--sources", "[out, a1]", "--merger", "MergeLoRA", "--out", "again"]) == 0
    assert read_manifest("again").parents[0]["digest"] == read_manifest("out").digest


def test_a_dry_run(folders, capsys):
    assert merge("--dry-run") == 0
    printed = capsys.readouterr().out
    assert "2 layers are merged" in printed
    assert "adapter_model.safetensors" in printed
    assert not (folders / "out").exists()


@pytest.mark.parametrize(
    ("config", "more", "said"),
    [
        ({"use_dora": True}, (), "use_dora=True"),
        ({"bias": "all"}, (), "bias='all'"),
        ({"base_model_name_or_path": "other"}, (), "different models: 'llama', 'other'"),
        ({"task_type": "SEQ_CLS"}, (), "different tasks"),
        ({"r": 4}, (), "in the configuration 4"),
        ({}, ("--base", "a1"), "--base: only for models"),
        ({}, ("--rows", "common"), "--rows"),
        ({}, ("--threads", "2", "--max_shard_size", "5MB"), "--threads, --max_shard_size: only for models"),
        ({}, ("--merger", "Average"), "no sum of their changes"),
    ],
)
def test_what_is_refused(config, more, said, folders, capsys):
    write_adapter(folders / "b", 3, 2, **config)
    assert merge(*more, sources="[a1, b]") == 2
    assert said in capsys.readouterr().err
    assert not (folders / "out").exists()


def test_models_and_adapters_are_not_mixed(folders, capsys):
    save_file({"w": torch.ones(2)}, "m.safetensors")
    assert merge(sources="[a1, m.safetensors]") == 2
    assert "which m.safetensors is not" in capsys.readouterr().err


def test_a_result_that_is_a_source_is_refused(folders, capsys):
    assert merge(sources="[a1, a1]", merger="MergeLoRA") == 0  # twice the change
    (folders / "out").rename(folders / "twice")
    assert merge("--merger.form", "mean", sources="[a1, a1]") == 2
    assert "equals a1" in capsys.readouterr().err


def test_damage_is_seen(folders, capsys):
    assert merge() == 0
    data = bytearray((folders / "out" / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (folders / "out" / "adapter_model.safetensors").write_bytes(data)
    assert main(["merge", "--sources", "[out, a1]", "--merger", "MergeLoRA", "--out", "again"]) == 2
    assert "damaged" in capsys.readouterr().err
    (folders / "a1" / "adapter_config.json").write_text("[")
    assert main(["merge", "--sources", "[a1]", "--merger", "MergeLoRA", "--out", "again"]) == 2
    assert "no configuration of peft" in capsys.readouterr().err
