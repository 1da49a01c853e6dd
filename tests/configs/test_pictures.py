"""Records of image classification, and its modules x DataModules, from YAML alone with a tiny encoder."""

import json

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import fulgurite
from fulgurite.checkpoints import load_tensors, read_manifest, verify

ENCODER = {"class_path": "TimmFrameEncoder", "init_args": {"model": "test_efficientnet", "weights": None, "size": 32}}
ENCODER["init_args"]["grid"] = 0
TRAINER = {"accelerator": "cpu", "devices": 1, "max_steps": 2, "limit_val_batches": 1, "limit_test_batches": 1}
SETS = ("grid", "letters")
SHORT = ("--trainer.limit_val_batches=2", "--trainer.limit_test_batches=2")


@pytest.fixture(scope="module")
def experts(command, configs, tmp_path_factory):
    """Runs of the expert's record on two sets, by the set."""
    argv = ("--config", configs / "merge" / "picture_expert.yaml", "--config", configs / "tiny" / "image_encoder.yaml")
    runs = {name: tmp_path_factory.mktemp("experts") / name for name in SETS}
    for name, run in runs.items():
        assert command("fit", *argv, f"--data.dataset={name}", *SHORT, "--run", run) == 0
    return runs


@pytest.fixture
def sets(tmp_path):
    """Init arguments of every DataModule of pictures, of the experts' domains."""
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for label in ("ball", "box", "door", "key"):
            (tmp_path / "own" / split / label).mkdir(parents=True)
            Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(
                tmp_path / "own" / split / label / "a.png"
            )
    pictures = [{"class_path": "Pictures", "init_args": {"dataset": name}} for name in SETS]
    return {
        "ImageFolder": {"root": str(tmp_path / "own"), "domain": "grid"},
        "Pictures": {"dataset": "grid"},
        "UnlabelledTasks": {"domains": pictures, "adapt_to": "test"},
        "ContinualDataModule": {"domains": pictures, "epochs_per_domain": 1, "joint": True},
        "Worlds": {"worlds": ["grid"], "epochs_per_domain": 1},
    }


@pytest.fixture
def fit(command, sets, experts, tmp_path):
    """Run one module on one DataModule; gives (exit code, run folder)."""

    def run(module, data, **arguments):
        given = {"encoder": ENCODER}
        if module == "AdaMerging":
            given["experts"] = [str(run) for run in experts.values()]
        document = {
            "seed_everything": 0,
            "test_after_fit": True,
            "trainer": TRAINER,
            "model": {"class_path": module, "init_args": {**given, **arguments}},
            "data": {"class_path": data, "init_args": {**sets[data], "batch_size": 4, "eval_batch_size": 8}},
        }
        (tmp_path / "record.yaml").write_text(yaml.safe_dump(document))
        return command("fit", "--config", tmp_path / "record.yaml", "--run", tmp_path / "run"), tmp_path / "run"

    return run


@pytest.mark.parametrize(
    ("module", "data"),
    [
        ("ImageClassifier", "Pictures"),
        ("ImageClassifier", "ImageFolder"),
        ("ImageClassifier", "ContinualDataModule"),
        ("AdaMerging", "UnlabelledTasks"),
        ("AdaMerging", "ImageFolder"),
    ],
)
def test_a_pair_runs_a_step_of_training_validation_and_test(module, data, fit):
    code, run = fit(module, data)
    assert code == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"train/loss", "test/accuracy", "test/accuracy/grid"} <= metrics.keys()
    assert 0 < metrics["train/loss"] < 20
    assert "Accuracy on test pictures" in (run / "report.html").read_text()
    assert (run / "answers.jsonl").read_text().count('"gold"') >= 4


@pytest.mark.parametrize(
    ("module", "data", "text"),
    [
        ("ImageClassifier", "Worlds", "ImageClassifier needs the field 'image'"),
        ("ImageClassifier", "UnlabelledTasks", "ImageClassifier needs the field 'answers'"),
        ("AdaMerging", "Worlds", "AdaMerging needs the field 'image'"),
    ],
)
def test_a_pair_that_lacks_a_field_is_one_clear_error(module, data, text, fit, capfd):
    code, _ = fit(module, data)
    assert code == 2
    assert text in capfd.readouterr().err


def test_an_expert_is_a_classifier_that_stands_alone(experts):
    module = fulgurite.load(experts["grid"])
    assert module.classes == {"grid": ("ball", "box", "door", "key")}
    assert not module.training
    assert read_manifest(experts["grid"] / "checkpoints" / "last").kind == "self-contained"


def test_the_record_of_the_fitted_merger_writes_a_classifier_for_all(command, configs, experts, sets, tmp_path):
    argv = ("--config", configs / "merge" / "ada_merging.yaml", "--config", configs / "tiny" / "image_encoder.yaml")
    chosen = [f"--data.domains={json.dumps(sets['UnlabelledTasks']['domains'])}"]
    chosen += [f"--model.experts=[{', '.join(map(str, experts.values()))}]", "--model.density=0.2", *SHORT]
    assert command("fit", *argv, *chosen, "--run", tmp_path / "run") == 0
    artefact = tmp_path / "run" / "artefacts" / "merged-ada_merging"
    assert verify(artefact).ok
    manifest = read_manifest(artefact)
    assert manifest.facts["adapted_to"] == "val pictures, without their labels"
    assert manifest.facts["density"] == 0.2
    module = fulgurite.load(artefact)
    assert list(module.classes) == list(SETS)
    own = load_tensors(experts["letters"] / "checkpoints" / "last")["heads.letters.weight"]
    assert torch.equal(module.heads["letters"].weight, own)
    fitted = fulgurite.load(tmp_path / "run").eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module.features(pixels), fitted.features(pixels), rtol=1e-4, atol=1e-5)


def test_experts_merge_by_the_command_and_keep_their_heads(command, experts, tmp_path):
    from fulgurite.cli import main

    sources = ", ".join(str(run / "checkpoints" / "last") for run in experts.values())
    argv = ["merge", "--sources", f"[{sources}]", "--merger", "Average", "--strict", "false", "--donor", "0"]
    assert main([*argv, "--out", str(tmp_path / "merged")]) == 0
    merged = load_tensors(tmp_path / "merged")
    each = {name: load_tensors(run / "checkpoints" / "last") for name, run in experts.items()}
    name = "encoder.model.conv_stem.weight"
    torch.testing.assert_close(merged[name], (each["grid"][name] + each["letters"][name]) / 2)
    for domain in SETS:
        assert torch.equal(merged[f"heads.{domain}.weight"], each[domain][f"heads.{domain}.weight"])


def test_own_pictures_are_told_apart_by_a_finished_run(command, experts, sets, tmp_path):
    argv = ("--data.class_path=ImageFolder", f"--data.root={sets['ImageFolder']['root']}", "--data.domain=grid")
    (tmp_path / "own" / "predict").mkdir()
    (tmp_path / "own" / "train" / "key" / "a.png").rename(tmp_path / "own" / "predict" / "b.png")
    assert command("predict", "--ckpt_path", experts["grid"], *argv) == 0
    (file,) = experts["grid"].rglob("predictions.jsonl")
    (row,) = map(json.loads, file.read_text().splitlines())
    assert row["id"] == "b.png"
    assert row["answer"] in ("ball", "box", "door", "key")


def test_a_fit_of_coefficients_goes_on_in_the_middle_of_an_epoch(command, configs, experts, sets, tmp_path):
    argv = ["--config", configs / "merge" / "ada_merging.yaml", "--config", configs / "tiny" / "image_encoder.yaml"]
    argv += [f"--data.domains={json.dumps(sets['UnlabelledTasks']['domains'])}", "--data.adapt_to=val", *SHORT]
    argv += [f"--model.experts=[{', '.join(map(str, experts.values()))}]", "--test_after_fit=false"]
    argv += ["--checkpoint.every_n_train_steps=1", "--checkpoint.save_top_k=-1", "--trainer.max_steps=4"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert command("fit", *argv, "--run", whole) == 0
    assert command("fit", *argv, "--run", resumed, "--ckpt_path", whole / "checkpoints" / "epoch=0-step=2") == 0
    first, second = (load_tensors(run / "checkpoints" / "last")["coefficients"] for run in (whole, resumed))
    assert torch.equal(first, second)
    assert not torch.equal(first, load_tensors(whole / "checkpoints" / "epoch=0-step=2")["coefficients"])
