"""Every shipped record of ``prune`` and ``quantize`` says where its figure is from, and gives what it says."""

import importlib
import inspect
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import yaml

import fulgurite
from fulgurite.checkpoints import read_manifest
from fulgurite.checkpoints.tensorfile import map_file
from fulgurite.cli import main
from fulgurite.commands import prune, quantize
from fulgurite.commands.compress import common_parser
from fulgurite.commands.imports import imports_allowed
from fulgurite.commands.names import class_table
from fulgurite.methods.quantization.rotation_record import ROTATION
from fulgurite.methods.quantization.storage import COMPRESSED, masks_of

FOLDER = Path(fulgurite.__file__).parent / "configs" / "compress"
VERBS = {"prune": prune, "quantize": quantize}
# What the manifest must say of the whole model; the family that stands for the record's.
EXPECTED = {
    "wanda_50": ("llama", {"sparsity": 0.5}),
    "wanda_2_4": ("llama", {"sparsity": 0.5}),
    "sparsegpt_50": ("llama", {"sparsity": 0.5}),
    "magnitude_50": ("llama", {"sparsity": 0.5}),
    "gptq_4": ("llama", {"bits": 4}),
    "gptq_3": ("llama", {"bits": 3}),
    "rsq_3": ("llama", {"bits": 3}),
    "tacq_3": ("llama", {"bits": 3 + 29 * 0.0035}),
    "tacq_2": ("llama", {"bits": 2 + 30 * 0.0035}),
    "ecoflap_llama": ("llama", {"sparsity": 0.6}),
    "ecoflap_flan_t5": ("t5", {"sparsity": 0.5}),
    "ecoflap_clip": ("clip", {"sparsity": 0.4}),
}


@pytest.fixture(scope="module")
def t5(llamas, tmp_path_factory):
    """A folder of a tiny T5 with the tokenizer of letters."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    T5ForConditionalGeneration(T5Config(vocab_size=32, **sizes, decoder_start_token_id=0)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(llamas / "llama" / name, folder / name)
    return folder


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(llamas, t5, image_models, pictures, tmp_path, in_process):
    """Runs the command of a record's header with a tiny model and little data; gives the folder and its manifest."""
    models = {"llama": llamas / "llama", "t5": t5, "clip": image_models / "clip"}

    def of(name, *more):
        argv, family = command(name), EXPECTED[name][0]
        argv[1] = str(models[family])
        put(argv, "--config", FOLDER / f"{name}.yaml")
        put(argv, "--out", tmp_path / "out")
        for option in ("--text", "--evaluate"):
            put(argv, option, llamas / "text.txt")
        put(argv, "--pairs", pictures / "pairs.jsonl")
        few = () if name == "magnitude_50" else ("--samples", "4")
        short = () if family == "clip" else ("--length", "16")
        assert main([*argv, *few, *short, "--device", "cpu", *more]) == 0
        return tmp_path / "out", read_manifest(tmp_path / "out")

    return of


def header(name):
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").split("\n")
    return [line.removeprefix("#").strip() for line in lines if line.startswith("#")]


def command(name):
    """The arguments of the command in the header."""
    return shlex.split(" ".join(header(name)).partition("Run: python cli.py ")[2])


def put(argv, option, value):
    if option in argv:
        argv[argv.index(option) + 1] = str(value)


def test_no_record_is_left_out():
    found = {path.stem for path in FOLDER.glob("*.yaml") if not re.search(r"cli\.py fit", path.read_text())}
    assert found == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_record_says_what_it_is_and_repeats_no_default(name):
    text = " ".join(header(name))
    assert 3 <= len(header(name)) <= 6
    assert re.search(r"arXiv \d{4}\.\d{5}", text)
    assert "Not run here" in text
    verb, _, *rest = command(name)
    assert rest[rest.index("--config") + 1] == f"configs/compress/{name}.yaml"
    with imports_allowed(()):
        parser = common_parser(verb)
        VERBS[verb].add_method(parser)
        defaults = parser.get_defaults()
    for option, value in yaml.safe_load((FOLDER / f"{name}.yaml").read_text()).items():
        assert value != defaults[option], option
        for argument, given in value.get("init_args", {}).items() if isinstance(value, dict) else ():
            (module,) = class_table()[value["class_path"]]
            signature = inspect.signature(getattr(importlib.import_module(module), value["class_path"]))
            assert given != signature.parameters[argument].default, argument


@pytest.mark.parametrize("name", EXPECTED)
def test_the_command_of_the_header_gives_what_the_record_says(name, run):
    out, manifest = run(name)
    layers, totals = manifest.facts["layers"], manifest.facts["totals"]
    for key, value in EXPECTED[name][1].items():
        # Rows hold whole weights, and a row here as few as 16 of them; a kept weight is one of 18,432.
        assert totals[key] == pytest.approx(value, abs=0.02 if "ecoflap" in name else 1e-3), key
    if "--evaluate" in command(name):
        assert manifest.metrics["perplexity"] > 1
    if "ecoflap" in name:
        assert max(layer["sparsity"] for layer in layers) <= EXPECTED[name][1]["sparsity"] + 0.1 + 1e-6
        assert len({layer["sparsity"] for layer in layers}) > 1
        assert {layer["tower"] for layer in layers} == {
            "ecoflap_llama": {"text"},
            "ecoflap_flan_t5": {"encoder", "decoder"},
            "ecoflap_clip": {"vision", "text"},
        }[name]
    elif "sparsity" in totals and manifest.settings.get("prune"):
        assert {layer["sparsity"] for layer in layers} == {0.5}
    if name != "magnitude_50":  # which has no paper of its own
        assert set(re.findall(r"arXiv \d{4}\.\d{5}", " ".join(header(name)))) <= set(manifest.facts["papers"])
    assert (ROTATION in manifest.facts) == (name == "rsq_3")
    if name.startswith("tacq"):
        assert sum(round(layer["kept"] * size(layer)) for layer in layers) == int(0.0035 * sum(map(size, layers)))
    if name == "wanda_2_4":
        masks = masks_of(map_file(out / "masks.safetensors"), manifest.facts[COMPRESSED])
        assert all((mask.unflatten(1, (-1, 4)).sum(2) == 2).all() for mask in masks.values())


def size(layer):
    return layer["shape"][0] * layer["shape"][1]


def test_groups_of_gptq_are_one_option_more(run):
    _, manifest = run("gptq_3", "--quantizer.group_size", "16")
    assert manifest.facts["totals"]["bits"] == 3
    assert manifest.facts["totals"]["stored_bits"] > 3 + 32 / 16  # scales of float32, and zeros
    assert manifest.settings["quantize"]["init_args"]["groups"] == "stale"
