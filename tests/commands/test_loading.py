"""A module back in Python equals the one that the trainer had."""

import copy
import json
import logging
import shutil
import sys

import pytest
import torch
import yaml

import fulgurite
from fulgurite.checkpoints import (
    CheckpointError,
    RefusedError,
    load_tensors,
    newest_checkpoint,
    read_manifest,
    save_checkpoint_folder,
)
from fulgurite.cli import main
from fulgurite.commands.errors import ConfigError
from fulgurite.datamodules.continual import ContinualDataModule
from fulgurite.datamodules.jsonl import JsonlDataModule


@pytest.fixture(scope="module")
def stream_run(stream_config, tmp_path_factory):
    """A run, and the answers that its own predict gave with their probabilities."""
    handlers = {name: logging.getLogger(name).handlers for name in ("lightning", "lightning.pytorch")}
    for name in handlers:  # they keep the stream of the test that imported Lightning, which is closed by now
        logging.getLogger(name).handlers = []
    run = tmp_path_factory.mktemp("loading") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        quiet = ("--trainer.logger=false", "--test_after_fit=false", "--data.epochs_per_domain=1")
        assert main(["fit", "--config", str(stream_config), "--run", str(run), *quiet]) == 0
        assert main(["predict", "--ckpt_path", str(run)]) == 0
    finally:
        torch.set_num_threads(threads)
        for name, kept in handlers.items():
            logging.getLogger(name).handlers = kept
    (file,) = run.glob("evaluations/predict-*/predictions.jsonl")
    return run, [json.loads(line) for line in file.read_text().splitlines()]


def answer(module, stream_config):
    """What the loaded module answers to the same questions, without a trainer."""
    parts = [each["init_args"] for each in yaml.safe_load(stream_config.read_text())["data"]["init_args"]["domains"]]
    data = ContinualDataModule([JsonlDataModule(**part) for part in parts], 1)
    samples = data.samples("predict")
    with torch.no_grad():
        return module.predict_step(module.collator("predict")(samples), 0)


def same(found, stored):
    assert [row["id"] for row in found] == [row["id"] for row in stored]
    for a, b in zip(found, stored):
        assert a["answer"] == b["answer"]
        assert [x["answer"] for x in a["top"]] == [x["answer"] for x in b["top"]]
        # Written with six digits; batches of other sizes round differently.
        assert [x["probability"] for x in a["top"]] == pytest.approx([x["probability"] for x in b["top"]], abs=3e-6)
        assert a["weights"] == pytest.approx(b["weights"], abs=3e-6)


def test_run_and_checkpoint_give_the_module_of_the_trainer(stream_run, stream_config):
    run, stored = stream_run
    module = fulgurite.load(run)
    assert not module.training
    same(answer(module, stream_config), stored)
    other = fulgurite.load(newest_checkpoint(run))
    torch.testing.assert_close(module.state_dict(), other.state_dict(), rtol=0, atol=0, equal_nan=True)


def test_predictions_name_their_question_and_video(stream_run, stream_folder):
    _, stored = stream_run
    asked = {
        (folder.name, f"{folder.name}/{row['id']}"): (row["question"], row["video"])
        for folder in stream_folder.iterdir()
        for row in map(json.loads, (folder / "test.jsonl").read_text().splitlines())
    }
    assert len(stored) == len(asked)
    assert {(row["domain"], row["id"]): (row["question"], row["video"]) for row in stored} == asked


def test_a_moved_checkpoint_folder_is_enough(stream_run, stream_config, tmp_path):
    run, stored = stream_run
    moved = shutil.copytree(newest_checkpoint(run), tmp_path / "elsewhere")
    same(answer(fulgurite.load(str(moved)), stream_config), stored)


def test_a_flipped_byte_is_refused_with_its_file(stream_run, tmp_path):
    folder = shutil.copytree(newest_checkpoint(stream_run[0]), tmp_path / "damaged")
    file = max(folder.glob("*.safetensors"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=file.name):
        fulgurite.load(folder)


def test_a_foreign_class_path_runs_nothing(stream_run, tmp_path, monkeypatch):
    (tmp_path / "hostile.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = newest_checkpoint(stream_run[0])
    manifest, tensors = read_manifest(source), load_tensors(source)
    for settings in ({"model": {"class_path": "hostile.Net"}}, hostile_optimizer(manifest.settings)):
        save_checkpoint_folder(tmp_path / "foreign", {"model": tensors}, settings=settings, facts=manifest.facts)
        with pytest.raises(ConfigError, match=r"hostile.*not allowed"):
            fulgurite.load(tmp_path / "foreign")
    assert "hostile" not in sys.modules
    save_checkpoint_folder(tmp_path / "foreign", {"model": tensors}, facts=manifest.facts)
    with pytest.raises(RefusedError, match="not written by the command line"):
        fulgurite.load(tmp_path / "foreign")


def hostile_optimizer(settings):
    changed = copy.deepcopy(settings)
    changed["model"]["init_args"]["optimizer"]["class_path"] = "hostile.SGD"
    return changed


def test_a_setting_that_is_refused_names_the_manifest(stream_run, tmp_path):
    source = newest_checkpoint(stream_run[0])
    manifest = read_manifest(source)
    settings = copy.deepcopy(manifest.settings)
    settings["model"]["init_args"]["second_router"]["init_args"]["temperature"] = 0.0
    tensors = {"model": load_tensors(source)}
    save_checkpoint_folder(tmp_path / "foreign", tensors, settings=settings, facts=manifest.facts)
    with pytest.raises(
        ConfigError, match=r"second_router\.temperature = 0\.0 \(.*manifest\.json\), refused by Centroid"
    ):
        fulgurite.load(tmp_path / "foreign")


def test_nothing_there_is_one_error(tmp_path):
    with pytest.raises(ConfigError, match="expected a checkpoint folder or a run folder"):
        fulgurite.load(tmp_path / "none")
