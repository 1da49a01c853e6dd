"""Modules that train all of an image encoder, and packed attention, in the steps that prune and quantize."""

import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch.nn import functional

import fulgurite
from fulgurite.backbones.picture_specs import joined
from fulgurite.backbones.timm_specs import picture_tower_spec
from fulgurite.callbacks.compress_data import CalibrationSamples, calibration_batches, loss_of
from fulgurite.callbacks.prune_step import PruneAtCheckpoint
from fulgurite.callbacks.quantize_step import QuantizeAtCheckpoint
from fulgurite.callbacks.steps import Context
from fulgurite.checkpoints import load_tensors, read_manifest, verify
from fulgurite.cli import main
from fulgurite.commands.statistics import data_of
from fulgurite.methods.pruning.ecoflap import Ecoflap
from fulgurite.methods.pruning.magnitude import Magnitude
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.methods.quantization.storage import load_dense
from fulgurite.methods.quantization.tacq import TaskCircuit

VIT = {"class_path": "TimmFrameEncoder", "init_args": {"model": "test_vit", "weights": None, "size": 32, "grid": 0}}
CLIP = {"class_path": "OpenClipFrameEncoder", "init_args": {"model": "fulgurite-tiny", "pretrained": None, "grid": 0}}
WANDA = {"class_path": "Wanda", "init_args": {"sparsity": 0.5}}
GPTQ = {"class_path": "Gptq", "init_args": {"bits": 4, "group_size": 16}}
# A packed projection, what its input comes from, and a layer of the last block.
LAYERS = {
    "timm": ("blocks.0.attn.qkv", "blocks.0.norm1", "blocks.5.mlp.fc2", 24),
    "open_clip": (
        "transformer.resblocks.0.attn.in_proj",
        "transformer.resblocks.0.ln_1",
        "transformer.resblocks.1.mlp.c_proj",
        8,
    ),
}
ROOT = "encoder.model."


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def tiny_clip(tmp_path_factory):
    """A model of open_clip of two blocks, whose attention is torch's."""
    import open_clip

    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"layers": 1, "width": 16, "heads": 2, "context_length": 8, "vocab_size": 100}
    path = tmp_path_factory.mktemp("open_clip") / "fulgurite-tiny.json"
    path.write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three labels, told apart by a colour."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3), ("test", 4)):
        for channel, label in enumerate(("blue", "green", "red")):
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 120, (32, 32, 3), dtype=np.uint8)
                pixels[..., 2 - channel] += 100
                Image.fromarray(pixels).save(root / split / label / f"{number}.png")
    return root


def record(folder, pictures, encoder, steps=(), **trainer):
    boundary = {"class_path": "Boundary", "init_args": {"at": "fit_end", "evaluate": ["val", "test"], "steps": steps}}
    callbacks = [*trainer.pop("callbacks", []), *([boundary] if steps else [])]
    document = {
        "seed_everything": 0,
        "test_after_fit": True,
        "trainer": {"accelerator": "cpu", "devices": 1, "max_steps": 4, "callbacks": callbacks, **trainer},
        "model": {"class_path": "ImageClassifier", "init_args": {"encoder": encoder}},
        "data": {"class_path": "ImageFolder", "init_args": {"root": str(pictures), "domain": "hues", "batch_size": 6}},
    }
    (folder / "record.yaml").write_text(yaml.safe_dump(document))
    return ["--config", str(folder / "record.yaml"), "--run", str(folder / "run")]


@pytest.fixture(scope="module", params=["timm", "open_clip"])
def made(request, pictures, tmp_path_factory):
    """Library of the encoder, and a run whose classifier was pruned and quantized at the end."""
    folder = tmp_path_factory.mktemp(request.param)
    steps = [
        {"class_path": "PruneAtCheckpoint", "init_args": {"pruner": WANDA, "calibration": {"samples": 12}}},
        {"class_path": "QuantizeAtCheckpoint", "init_args": {"quantizer": GPTQ, "calibration": {"samples": 12}}},
    ]
    encoder = {"timm": VIT, "open_clip": CLIP}[request.param]
    assert main(["fit", *record(folder, pictures, encoder, steps)]) == 0
    return request.param, folder / "run"


def artefact(run, kind):
    (found,) = (run / "artefacts").glob(f"{kind}-*")
    return found


def weight_of(layer):
    return ROOT + (f"{layer}_weight" if layer.endswith("in_proj") else f"{layer}.weight")


def test_artefacts_keep_the_names_and_load(made):
    library, run = made
    source = run / "checkpoints" / "last"
    pruned, quantized = artefact(run, "pruned"), artefact(run, "quantized")
    own, layers = load_tensors(source), read_manifest(pruned).facts["layers"]
    assert len(layers) == LAYERS[library][-1]
    names = {weight_of(layer["name"]) for layer in layers}
    assert names <= own.keys()
    assert load_tensors(pruned).keys() == own.keys() | {f"{name}.mask" for name in names}
    assert load_dense(quantized).keys() - {f"{name}.mask" for name in names} == own.keys()
    for path in (pruned, quantized):
        manifest = read_manifest(path)
        assert verify(path).ok
        assert (manifest.kind, manifest.base) == ("self-contained", None)
        assert manifest.facts["classes"] == read_manifest(source).facts["classes"]
        assert "backbone_digest" not in manifest.facts
        assert manifest.facts["compressed"].keys() == names
        module, stored = fulgurite.load(path), load_dense(path)
        assert all(torch.equal(tensor, stored[name]) for name, tensor in module.state_dict().items())
    zeros, grid = load_dense(pruned), load_dense(quantized)
    for name in names:
        assert (zeros[name] == 0).float().mean() == pytest.approx(0.5, abs=0.02)
        assert not grid[name][zeros[name] == 0].any()
        assert not torch.equal(grid[name], zeros[name])
    assert all(torch.equal(own[name], zeros[name]) for name in own.keys() - names)


def rows_into(run, path, norm):
    """What the norm before a layer gives for the calibration samples, one picture at a time."""
    module, rows = fulgurite.load(path), []
    samples = calibration_samples(run, module)
    hook = module.get_submodule(ROOT + norm).register_forward_hook(
        lambda _, args, output: rows.append(output.double().flatten(0, 1))
    )
    with torch.no_grad():
        for sample in samples:
            module(module.collator("validate")([sample]))
    hook.remove()
    return torch.cat(rows)


def calibration_samples(run, module, count=12):
    context = Context(run, data=data_of(run / "checkpoints" / "last", None, (), module))
    return context.calibration(count, 0).dataset.samples


def test_wanda_prunes_by_the_inputs_of_pictures_seen_one_at_a_time(made):
    library, run = made
    layer, norm, *_ = LAYERS[library]
    source = run / "checkpoints" / "last"
    weight = load_tensors(source)[weight_of(layer)]
    scores = weight.double().abs() * rows_into(run, source, norm).square().sum(0).sqrt()
    half = weight.shape[1] // 2
    expected = torch.ones_like(scores, dtype=torch.bool).scatter_(1, scores.argsort(1)[:, :half], False)
    found = load_dense(artefact(run, "pruned"))[weight_of(layer)]
    assert torch.equal(found != 0, expected)
    assert torch.equal(found[expected], weight[expected])


def test_the_command_line_scores_and_makes_the_same(made, tmp_path):
    _, run = made
    copied = shutil.copytree(run, tmp_path / "run")
    path = artefact(copied, "quantized")
    assert main(["test", "--ckpt_path", str(path)]) == 0
    (evaluation,) = (copied / "evaluations").iterdir()
    found = json.loads((evaluation / "metrics.json").read_text())
    own = json.loads((run / "artefacts" / "scores.json").read_text())[path.name]["scores"]
    assert own["test/accuracy"] == pytest.approx(found["test/accuracy"], abs=1e-6)
    page = (run / "report.html").read_text().rpartition("Score against size</h2>")[2]
    assert all(name in page for name in ("trained weights", "pruned wanda", "quantized gptq"))
    argv = ["--pruner", "Wanda", "--pruner.sparsity", "0.5", "--samples", "12", "--device", "cpu"]
    assert main(["prune", str(run), *argv, "--out", str(tmp_path / "pruned")]) == 0
    expected, again = load_tensors(artefact(run, "pruned")), load_tensors(tmp_path / "pruned")
    assert expected.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in expected.items())


def test_training_goes_on_with_the_zeros_kept(made, pictures, tmp_path):
    library, run = made
    encoder = {"timm": VIT, "open_clip": CLIP}[library]
    argv = record(tmp_path, pictures, encoder, callbacks=[{"class_path": "KeepMasks"}])
    path = artefact(run, "pruned")
    assert main(["fit", *argv, "--init_from", str(path)]) == 0
    before, after = load_dense(path), load_tensors(tmp_path / "run" / "checkpoints" / "last")
    names = read_manifest(path).facts["compressed"]
    for name in names:
        pruned = before[name] == 0
        assert not after[name][pruned].any()
        assert not torch.equal(after[name], before[name])
    assert weight_of(LAYERS[library][0]) in names
    assert after.keys() == before.keys() - {f"{name}.mask" for name in names}


def test_the_loss_of_answers_is_that_of_each_picture_s_own_head(made, pictures, tmp_path):
    _, run = made
    module = fulgurite.load(run)
    module.build_heads(module.classes)
    module.heads["other"], module.classes = (
        torch.nn.Linear(module.encoder.width, 2),
        {
            **module.classes,
            "other": ("a", "b"),
        },
    )
    samples = calibration_samples(run, module, 5)
    batch = module.collator("fit")(samples) | {"counted": torch.ones(5, dtype=torch.bool)}
    batch["answers"][4] = {"violet": 1.0}  # which no head knows
    targets = module.answer_targets(batch)
    assert targets.shape == (5, 5)
    with torch.no_grad():
        scores = module.heads["hues"](module.features(batch["pixels"]))[:4]
    labels = torch.tensor([module.classes["hues"].index(max(a)) for a in batch["answers"][:4]])
    expected = functional.cross_entropy(scores, labels, reduction="sum") / 5
    inputs = module.calibration_inputs(batch) | {"answer_targets": targets}
    with torch.no_grad():
        found = loss_of(module, Context(tmp_path))(inputs)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["allocation", "circuit"])
def test_whole_models_are_scored_by_their_answers(kind, made, tmp_path):
    _, run = made
    source = run / "checkpoints" / "last"
    module, samples = fulgurite.load(source), CalibrationSamples(6)
    context = Context(tmp_path / "out", builder=fulgurite.load, data=data_of(source, None, (), module))
    if kind == "allocation":
        step = PruneAtCheckpoint(Wanda(0.5), calibration=samples, allocation=Ecoflap(0.5, max_sparsity=0.7))
        facts = read_manifest(step([source], context)).facts
        assert all(value > 0 for value in facts["importance"].values())
        sparsities = [each["sparsity"] for each in facts["layers"]]
        assert len({round(sparsity, 2) for sparsity in sparsities}) > 1
        assert max(sparsities) <= 0.7
        # Wanda prunes each row on its own, and the shortest have 32 weights.
        assert facts["totals"]["sparsity"] == pytest.approx(0.5, abs=1 / 32)
        return
    step = QuantizeAtCheckpoint(Gptq(3, 16), calibration=samples, task_circuit=TaskCircuit(0.01))
    out = step([source], context)
    batches, _ = calibration_batches(module, samples, context)
    assert len(batches) == 1
    sizes = [each["shape"][0] * each["shape"][1] for each in read_manifest(out).facts["layers"]]
    kept = [tensor.numel() for name, tensor in load_tensors(out).items() if name.endswith(".kept_values")]
    assert sum(kept) == int(0.01 * sum(sizes))


def test_packed_attention_of_a_frozen_backbone_is_compressed(stream_config, tmp_path):
    """A frame encoder's blocks beside those for text; their attention hands its weights to a function."""
    (tmp_path / "encoder.yaml").write_text(
        yaml.safe_dump({"model": {"init_args": {"backbone": {"init_args": {"frame_encoder": CLIP}}}}})
    )
    argv = ["fit", "--config", str(stream_config), "--config", str(tmp_path / "encoder.yaml")]
    argv += ["--test_after_fit", "false", "--trainer.max_steps", "1"]
    argv += ["--data.epochs_per_domain", "1", "--trainer.num_sanity_val_steps", "0", "--run", str(tmp_path / "run")]
    assert main(argv) == 0
    source = tmp_path / "run" / "checkpoints" / "last"

    def build(path):
        module = fulgurite.load(path)
        tower = picture_tower_spec(module.backbone.frame_encoder.model, "frame_encoder.model.")
        module.backbone.spec = joined(tower, module.backbone.spec)
        return module

    data = data_of(source, None, (), fulgurite.load(source))
    pruned = PruneAtCheckpoint(Wanda(0.5), calibration=CalibrationSamples(5), towers=["vision"])(
        [source], Context(tmp_path / "pruned", builder=build, data=data)
    )
    out = QuantizeAtCheckpoint(Gptq(4, 16), calibration=CalibrationSamples(5))(
        [pruned], Context(tmp_path / "out", builder=build, data=data)
    )
    module, dense = fulgurite.load(out), build(source).backbone.state_dict()
    name = "frame_encoder.model.transformer.resblocks.0.attn.in_proj_weight"
    found = module.backbone.state_dict()
    assert found.keys() == dense.keys()
    zeros = load_dense(pruned)[f"backbone.{name}"] == 0
    assert zeros.float().mean() == 0.5
    assert not found[name][zeros].any()
    assert not torch.equal(found[name], dense[name])
    stored = load_tensors(out)
    assert stored[f"backbone.{name}.mask"].numel() == dense[name].numel() // 8
    assert f"backbone.{name}" not in stored
    assert read_manifest(out).facts["backbone_digest"] == module.backbone.fingerprint
    with pytest.raises(ValueError, match=r"8 layers of .* are quantized"):
        PruneAtCheckpoint(Magnitude(0.5), towers=["vision"])([out], Context(tmp_path / "no", builder=build))


def test_an_encoder_of_convolutions_is_refused_in_one_line(pictures, tmp_path, capfd):
    encoder = {**VIT, "init_args": {**VIT["init_args"], "model": "test_efficientnet"}}
    steps = [{"class_path": "PruneAtCheckpoint", "init_args": {"pruner": {"class_path": "Magnitude"}}}]
    steps[0]["init_args"]["pruner"]["init_args"] = {"sparsity": 0.5}
    assert main(["fit", *record(tmp_path, pictures, encoder, steps)]) == 2
    message = "ImageClassifier has no blocks that can be compressed: timm's EfficientNet has no spec"
    assert message in capfd.readouterr().err
    assert main(["fit", *record(tmp_path, pictures, encoder, max_steps=1)]) == 0
    argv = ["prune", str(tmp_path / "run"), "--pruner", "Magnitude", "--pruner.sparsity", "0.5"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert message in capfd.readouterr().err
    assert not (tmp_path / "out").exists()
