import argparse
import json
import logging
import os

import pytest
import torch
from safetensors.torch import save_file

from fulgurite.backbones.frozenbilm import FrozenBiLM
from fulgurite.backbones.frozenbilm_checkpoint import read_frozenbilm
from fulgurite.checkpoints.errors import CheckpointError, MismatchError, RefusedError

CONFIG = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "attention_head_size": 8,
    "intermediate_size": 32,
    "position_buckets": 8,
    "max_position_embeddings": 32,
}
SITES = [f"deberta.encoder.layer.{n}.{part}" for n in (0, 1) for part in ("attention.output", "output")]


def build(**options):
    return FrozenBiLM(**{"feature_dim": 6, "max_frames": 4, "max_tokens": 12, **options})


def random_build(**options):
    return build(pretrained=False, config=CONFIG, **options)


@pytest.fixture
def official():
    """Names and values of a file in the published layout, apart from those of an unfilled model."""
    generator = torch.Generator().manual_seed(3)
    state = {k: torch.randn(v.shape, generator=generator) for k, v in random_build().state_dict().items()}
    for site in SITES:
        for name, shape in (
            ("down.weight", (4, 16)),
            ("down.bias", (4,)),
            ("up.weight", (16, 4)),
            ("up.bias", (16,)),
        ):
            state[f"{site}.adapter.{name}"] = torch.randn(shape, generator=generator)
    state["deberta.embeddings.position_ids"] = torch.arange(32)[None]
    state["answer_embeddings.weight"], state["answer_bias"] = torch.zeros(7, 16), torch.zeros(7)
    return state


def save(path, state, **others):
    torch.save({"model": state, "epoch": 3, "args": argparse.Namespace(lr=5e-5), **others}, path)
    return path


def folder_of(path, state, shards=1):
    """A language model in the layout of the hub: no video projection, no adapters."""
    path.mkdir()
    random_build().deberta.config.save_pretrained(path)
    names = [k for k in state if "adapter" not in k and "linear_video" not in k and k.startswith(("deb", "lm_"))]
    tensors = {k: state[k].half() for k in names} | {"mask_predictions.dense.weight": torch.zeros(2, 2)}
    tensors.pop("deberta.embeddings.position_ids", None)
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    where = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(tensors)}
    for file in set(where.values()):
        save_file({k: v for k, v in tensors.items() if where[k] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return path


def test_a_complete_file_fills_everything_and_comes_back_out(tmp_path, official):
    path = save(tmp_path / "frozenbilm.pth", official)
    imported = read_frozenbilm(path)
    assert set(imported.ignored) == {
        "deberta.embeddings.position_ids",
        "answer_embeddings.weight",
        "answer_bias",
    }
    backbone = random_build(checkpoint=path)
    assert backbone.not_in_checkpoint == ()
    again = dict(backbone.state_dict())
    for site, tensors in backbone.initial_adapters().items():
        again |= {f"{site.removesuffix('.dense')}.adapter.{name}": t for name, t in tensors.items()}
    assert set(again) == set(official) - set(imported.ignored)
    assert all(torch.equal(tensor, official[name]) for name, tensor in again.items())
    assert set(backbone.initial_adapters()) == {
        name
        for point in ("attention_output", "feed_forward_output")
        for name in backbone.spec.point_names(backbone, point)
    }
    assert not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("shards", [1, 3])
def test_trained_tensors_over_a_language_model(tmp_path, official, caplog, shards):
    folder = folder_of(tmp_path / "deberta", official, shards)
    trained = {k: v + 1 for k, v in official.items() if "adapter" in k or "linear_video" in k or "LayerNorm" in k}
    path = save(tmp_path / "tuned.pth", trained)
    with caplog.at_level(logging.INFO):
        backbone = build(model=str(folder), checkpoint=path)
    for name, tensor in backbone.state_dict().items():
        expected = trained.get(name, official[name].half().float())
        assert torch.equal(tensor, expected), name
        assert tensor.dtype == torch.float32
        assert (name in backbone.not_in_checkpoint) == (name not in trained)
    assert "deberta.embeddings.word_embeddings.weight" in caplog.text
    with pytest.raises(MismatchError, match=r"word_embeddings.weight: missing(.|\n)*pretrained: true"):
        random_build(checkpoint=path)


def test_a_language_model_alone_leaves_a_repeatable_projection(tmp_path, official):
    folder = folder_of(tmp_path / "deberta", official)
    backbone = build(model=str(folder))
    assert backbone.initial_adapters() is None
    assert torch.equal(backbone.lm_predictions["lm_head"].bias, official["lm_predictions.lm_head.bias"].half().float())
    assert backbone.fingerprint == build(model=str(folder)).fingerprint
    assert backbone.fingerprint != build(model=str(folder), init_seed=1).fingerprint


def test_a_language_model_without_head_is_refused(tmp_path, official):
    state = {k: v for k, v in official.items() if "lm_head" not in k and "position_embeddings" not in k}
    with pytest.raises(MismatchError, match="6 tensors") as caught:
        build(model=str(folder_of(tmp_path / "deberta", state)))
    assert "deberta.embeddings.position_embeddings.weight: missing" in str(caught.value)
    (tmp_path / "deberta" / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        build(model=str(tmp_path / "deberta"))


def test_all_mismatches_are_listed_at_once(tmp_path, official):
    site = SITES[1]
    del official["lm_predictions.lm_head.bias"], official[f"{site}.adapter.up.bias"]
    del official["deberta.embeddings.linear_video.bias"]
    official[f"{site}.adapter.up.weight"] = torch.zeros(16, 5)
    official["deberta.encoder.conv.conv.bias"] = torch.zeros(3)
    official["deberta.encoder.layer.7.output.dense.bias"] = torch.zeros(16)
    official["deberta.encoder.layer.7.output.adapter.up.bias"] = torch.zeros(16)
    with pytest.raises(MismatchError) as caught:
        random_build(checkpoint=save(tmp_path / "bad.pth", official))
    for line in (
        "7 tensors of",
        "lm_predictions.lm_head.bias: missing, model (40,)",
        "deberta.embeddings.linear_video.bias: missing, model (16,)",
        "deberta.encoder.conv.conv.bias: file (3,), model (16,)",
        "deberta.encoder.layer.7.output.dense.bias: in the file, not in the model",
        "deberta.encoder.layer.7.output.dense: adapter in the file, no such layer",
        f"{site}.dense adapter.up.bias: file missing, model (16,)",
        f"{site}.dense adapter.up.weight: file (16, 5), model (16, 4)",
    ):
        assert line in str(caught.value)


class Bomb:
    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_code_in_a_file_never_runs(tmp_path, official):
    bomb = Bomb()
    bomb.path = str(tmp_path / "ran")
    path = save(tmp_path / "hostile.pth", official, optimizer=bomb)
    with pytest.raises(RefusedError, match=r"hostile\.pth"):
        read_frozenbilm(path)
    assert not (tmp_path / "ran").exists()


def test_other_files_are_refused(tmp_path, official):
    torch.save(official, tmp_path / "bare.pth")
    with pytest.raises(MismatchError, match=r"word_embeddings\.weight: missing"):
        random_build(checkpoint=save(tmp_path / "nothing.pth", {}))
    with pytest.raises(MismatchError, match="'model'"):
        read_frozenbilm(tmp_path / "bare.pth")
    whole = save(tmp_path / "whole.pth", official).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "empty.pth").touch()
    for name in ("cut.pth", "text.pth", "empty.pth", "none.pth"):
        with pytest.raises(CheckpointError, match=name):
            read_frozenbilm(tmp_path / name)
