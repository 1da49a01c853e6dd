"""Methods that look at the whole model first, on files; and checkpoints of runs, which the step of a fit compresses."""

import pytest
import torch

import fulgurite
from fulgurite.backbones.library_models import open_library_model
from fulgurite.callbacks.compress_data import CalibrationSamples
from fulgurite.callbacks.quantize_step import QuantizeAtCheckpoint
from fulgurite.callbacks.steps import Context
from fulgurite.checkpoints import load_tensors, read_manifest, verify
from fulgurite.checkpoints.sources import open_source
from fulgurite.cli import main
from fulgurite.commands.statistics import data_of
from fulgurite.datamodules.text_windows import random_windows, token_ids
from fulgurite.methods.compression import compressed_blocks, matrices
from fulgurite.methods.layer_walk import LayerWalk
from fulgurite.methods.pruning.ecoflap import Ecoflap
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.quantization.bit_budget import BitBudget
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.methods.quantization.rsq import TokenImportance
from fulgurite.methods.quantization.tacq import TaskCircuit

GPTQ = ("--quantizer", "Gptq", "--quantizer.bits", "3", "--quantizer.group_size", "16", "--format", "own")
ECOFLAP = ("--pruner", "Wanda", "--pruner.sparsity", "0.5", "--allocation", "Ecoflap", "--allocation.target", "0.5")
BUDGET = ("--budget", "BitBudget", "--budget.average_bits", "3.5", "--budget.choices", "[2, 4, 8]")
CIRCUIT = ("--task_circuit", "TaskCircuit", "--task_circuit.ratio", "0.01")


pytestmark = pytest.mark.usefixtures("one_thread")


def settle(opened, walk, compressor, method):
    """What a method tells the compressor about the whole model; weights of tokens, if any."""
    with torch.no_grad():
        if method == "allocation":
            compressor.assign(Ecoflap(0.5).sparsities(walk, opened.loss))
        if method == "budget":
            compressor.assign(BitBudget(3.5, [2, 4, 8]).bits(walk, compressor))
        if method == "circuit":
            compressor.keep(TaskCircuit(0.01).masks(walk, opened.loss, compressor))
    return TokenImportance() if method == "importance" else None


@pytest.mark.parametrize(
    ("method", "compressor", "argv"),
    [
        ("allocation", Wanda(0.5), ("prune", *ECOFLAP)),
        ("importance", Gptq(3, 16), ("quantize", *GPTQ, "--importance", "TokenImportance")),
        ("budget", Gptq(3, 16), ("quantize", *GPTQ, *BUDGET)),
        ("circuit", Gptq(3, 16), ("quantize", *GPTQ, *CIRCUIT)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_method_is_what_the_library_gives(method, compressor, argv, llamas, tmp_path, in_process):
    folder, text, out = llamas / "llama", llamas / "text.txt", tmp_path / "out"
    few = ("--text", str(text), "--samples", "4", "--length", "16", "--device", "cpu")
    assert main([argv[0], str(folder), *argv[1:], *few, "--out", str(out)]) == 0
    opened = open_library_model(open_source(folder))
    windows = random_windows(token_ids([text], opened.tokenize), 4, 16, 0)
    walk = LayerWalk(opened.model, opened.spec, [opened.text_inputs(windows)], opened.forward)
    weights = settle(opened, walk, compressor, method)
    compressor.begin(matrices(walk))
    with torch.no_grad():
        for _ in compressed_blocks(walk, compressor, token_weights=weights):
            pass
    found = fulgurite.load_model(out) if argv[0] == "quantize" else open_library_model(open_source(out)).model
    state = found.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in opened.model.state_dict().items())
    manifest = read_manifest(out)
    layers = manifest.facts["layers"]
    if method == "allocation":
        assert len({round(layer["sparsity"], 3) for layer in layers}) > 2
        assert manifest.facts["totals"]["sparsity"] == pytest.approx(0.5, abs=0.02)  # whole weights of each row
        assert manifest.settings["allocation"]["init_args"]["target"] == 0.5
    if method == "budget":
        assert len({layer["bits"] for layer in layers}) > 1
    if method == "circuit":
        assert sum(layer["kept"] > 0 for layer in layers) > 1


def test_what_cannot_be_together_is_one_message(llamas, tmp_path, capfd):
    model, text = str(llamas / "llama"), ("--text", str(llamas / "text.txt"))
    few = (*text, "--samples", "4", "--length", "16", "--device", "cpu", "--out", str(tmp_path / "out"))
    gptq = ("quantize", model, "--quantizer", "Gptq", "--quantizer.group_size", "16")
    wrong = {
        "give --format own": (*gptq, *CIRCUIT),
        "bits=3": (*gptq, *BUDGET[:-1], "[2, 3, 8]"),
        "give the same": ("prune", model, *ECOFLAP[:-1], "0.6"),
    }
    for message, argv in wrong.items():
        assert main([*argv, *few]) == 2
        assert message in capfd.readouterr().err
    assert main(["prune", model, *ECOFLAP, "--out", str(tmp_path / "out")]) == 2
    assert "give --text FILE" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def run(stream_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "run"
    short = ("--data.epochs_per_domain", "1", "--data.joint", "true", "--test_after_fit", "false")
    assert main(["fit", "--config", str(stream_config), *short, "--run", str(folder)]) == 0
    return folder


def test_a_run_is_compressed_by_the_step_of_a_fit_on_its_own_data(run, tmp_path, capfd):
    out, gptq = tmp_path / "out", ("--quantizer", "Gptq", "--quantizer.group_size", "16")
    argv = ["quantize", str(run), *gptq, "--samples", "5", "--device", "cpu", "--out"]
    assert main([*argv, str(out)]) == 0
    assert verify(out).ok
    source = run / "checkpoints" / "last"
    module = fulgurite.load(source)
    context = Context(tmp_path / "step", builder=lambda _: module, data=data_of(source, None, (), module))
    QuantizeAtCheckpoint(Gptq(4, 16), calibration=CalibrationSamples(5))([source], context)
    found, expected = load_tensors(out), load_tensors(tmp_path / "step")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {path.name for path in tmp_path.iterdir()} == {"out", "step"}
    capfd.readouterr()
    assert main([*argv, str(tmp_path / "no"), "--dry_run"]) == 0
    assert "with 5 samples" in capfd.readouterr().out
    wrong = {
        "choose fewer": (*argv, str(tmp_path / "no"), "--dry_run", "--samples", "10000"),
        "matches no linear layer": (*argv, str(tmp_path / "no"), "--dry_run", "--layers", "nothing"),
        "this model has": (*argv, str(tmp_path / "no"), "--dry_run", "--towers", "[sound]"),
        "--record: this method measures nothing": (
            "quantize", str(run), "--quantizer", "Rtn", "--record", "a.yaml", "--out", str(tmp_path / "no"),
        ),
    }  # fmt: skip
    for message, line in wrong.items():
        assert main([*line]) == 2, message
        assert message in capfd.readouterr().err
    assert main([*argv, str(tmp_path / "no"), "--text", "a.txt", "--format", "own", "--rotation", "Rotate"]) == 2
    assert "--text, --format, --rotation: " in capfd.readouterr().err
    assert not (tmp_path / "no").exists()
