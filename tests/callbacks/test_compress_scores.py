"""What is found out about a whole model before it is compressed at a boundary, against the same by hand."""

import pytest
import torch

import fulgurite
from fulgurite.callbacks.compress_data import (
    CalibrationSamples,
    calibration_batches,
    loss_of,
    walk_over,
)
from fulgurite.callbacks.prune_step import PruneAtCheckpoint
from fulgurite.callbacks.quantize_step import QuantizeAtCheckpoint
from fulgurite.callbacks.saved_blocks import SavedBlocks
from fulgurite.callbacks.steps import Context
from fulgurite.checkpoints import load_tensors, read_manifest
from fulgurite.cli import main
from fulgurite.commands.statistics import data_of
from fulgurite.methods.pruning.ecoflap import Ecoflap
from fulgurite.methods.pruning.iterative import Iterative
from fulgurite.methods.pruning.magnitude import Magnitude
from fulgurite.methods.pruning.wanda import Wanda
from fulgurite.methods.quantization.bit_budget import BitBudget
from fulgurite.methods.quantization.gptq import Gptq
from fulgurite.methods.quantization.rsq import TokenImportance
from fulgurite.methods.quantization.rtn import Rtn
from fulgurite.methods.quantization.storage import load_dense
from fulgurite.methods.quantization.tacq import TaskCircuit
from fulgurite.methods.ranks import Ranks

SAMPLES = CalibrationSamples(10)


@pytest.fixture(scope="module")
def parts(stream_config, tmp_path_factory):
    """A checkpoint of one stage, its module and its data."""
    run = tmp_path_factory.mktemp("fit") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    argv = ("--test_after_fit", "false", "--trainer.num_sanity_val_steps", "0", "--trainer.max_epochs", "1")
    assert main(["fit", "--config", str(stream_config), "--run", str(run), *argv]) == 0
    last = run / "checkpoints" / "last"
    module = fulgurite.load(last)
    yield last, module, data_of(last, None, (), module)
    torch.set_num_threads(threads)


def context_of(parts, out, ranks=None):
    given = {} if ranks is None else {"ranks": ranks}
    return Context(out, builder=fulgurite.load, data=parts[2], **given)


def layers_of(path):
    return {report["name"]: report for report in read_manifest(path).facts["layers"]}


def test_batches_are_dealt_to_processes_whole(parts, tmp_path):
    """Two processes together have the batches of one, in turn; nothing is padded or repeated."""

    told = []

    class Two(Ranks):
        def gather(self, value):
            if not isinstance(value, list):
                return [value]
            told.append(value)  # digests, of the second rank after the first
            return told

    whole, data = calibration_batches(parts[1], CalibrationSamples(23), context_of(parts, tmp_path))
    found = [
        calibration_batches(parts[1], CalibrationSamples(23), context_of(parts, tmp_path, Two(rank, 2)))
        for rank in range(2)
    ]
    shares = [batches for batches, _ in found]
    assert found[1][1] == data
    assert [len(batch["input_ids"]) for batch in whole] == [10, 10, 3]
    assert data["batch"] == 10
    together = [shares[0][0], shares[1][0], shares[0][1]]
    for one, two in zip(whole, together, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one.keys() | two.keys())
    with pytest.raises(ValueError, match="1 samples do not serve 2 processes"):
        calibration_batches(parts[1], CalibrationSamples(1), context_of(parts, tmp_path, Two(0, 2)))


@pytest.mark.parametrize("what", ["answer_targets", "calibration_inputs"])
def test_other_answers_or_pixels_are_other_data(what, parts, tmp_path, monkeypatch):
    module, plain = parts[1], getattr(parts[1], what)

    def other(batch):
        found = plain(batch)
        if what == "answer_targets":
            return found.flip(0)
        return {**found, "input_ids": found["input_ids"].flip(0)}

    digests = [calibration_batches(module, SAMPLES, context_of(parts, tmp_path))[1]["data"] for _ in range(2)]
    monkeypatch.setattr(module, what, other)
    assert calibration_batches(module, SAMPLES, context_of(parts, tmp_path))[1]["data"] != digests[0] == digests[1]


def test_the_loss_is_that_of_training(parts, tmp_path):
    last, module, data = parts
    (batch,), _ = calibration_batches(module, SAMPLES, context_of(parts, tmp_path))
    samples = Context(last, data=data).calibration(10, 0).dataset.samples
    with torch.no_grad():
        loss = loss_of(module, context_of(parts, tmp_path))(batch)
        logs = module(module.collator("validate")(samples)).logits.log_softmax(-1)
    answers = [module.info.answers.index(next(iter(sample.answers))) for sample in samples]
    assert loss.item() == pytest.approx(-logs[range(10), answers].mean().item(), rel=1e-6)


def test_sparsities_follow_the_importance_of_blocks(parts, tmp_path):
    step = PruneAtCheckpoint(
        Magnitude(0.5), calibration=SAMPLES, allocation=Ecoflap(0.5, 0.8, order="first", samples=None)
    )
    out = step([parts[0]], context_of(parts, tmp_path / "out"))
    importance = read_manifest(out).facts["importance"]
    # By hand: mean |gradient| of the one batch, times nothing, summed per block.
    module = fulgurite.load(parts[0])
    (batch,), _ = calibration_batches(module, SAMPLES, context_of(parts, tmp_path))
    weights = {name: module.backbone.get_submodule(name).weight.requires_grad_(True) for name in importance}
    gradients = torch.autograd.grad(loss_of(module, context_of(parts, tmp_path))(batch), list(weights.values()))
    for name, gradient in zip(weights, gradients):
        assert importance[name] == pytest.approx(gradient.abs().double().sum().item(), rel=1e-4)
    found = {name: report["sparsity"] for name, report in layers_of(out).items()}
    blocks = [{found[name] for name in found if f"layer.{number}." in name} for number in range(2)]
    sums = [sum(value for name, value in importance.items() if f"layer.{number}." in name) for number in range(2)]
    assert (min(blocks[0]) > max(blocks[1])) == (sums[0] < sums[1])
    assert read_manifest(out).facts["totals"]["sparsity"] == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("scorer", [Ecoflap, Iterative])
def test_scores_are_not_measured_again_after_a_kill(scorer, parts, tmp_path, monkeypatch):
    how = (Wanda(0.5), Ecoflap(0.5, samples=4)) if scorer is Ecoflap else (Iterative(0.5, rounds=2), None)
    step = PruneAtCheckpoint(how[0], calibration=SAMPLES, allocation=how[1])
    whole = step([parts[0]], context_of(parts, tmp_path / "whole"))
    monkeypatch.setattr(SavedBlocks, "save", lambda self, done: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step([parts[0]], context_of(parts, tmp_path / "again"))
    monkeypatch.undo()
    monkeypatch.setattr(scorer, {Ecoflap: "importance", Iterative: "find"}[scorer], lambda *_: 1 / 0)
    again = step([parts[0]], context_of(parts, tmp_path / "again"))
    one, two = load_tensors(whole), load_tensors(again)
    assert all(one[name].numpy().tobytes() == two[name].numpy().tobytes() for name in one.keys() | two.keys())
    assert read_manifest(whole).facts.get("importance") == read_manifest(again).facts.get("importance")


def test_bits_circuit_and_important_tokens_make_one_model(parts, tmp_path):
    options = {"budget": BitBudget(3.0, [2, 4]), "task_circuit": TaskCircuit(0.01), "importance": TokenImportance()}
    step = QuantizeAtCheckpoint(Gptq(4, 16), calibration=SAMPLES, **options)
    out = step([parts[0]], context_of(parts, tmp_path / "out"))
    reports = layers_of(out)
    assert {report["bits"] for report in reports.values()} == {2, 4}
    sizes = {name: report["shape"][0] * report["shape"][1] for name, report in reports.items()}
    assert sum(sizes[n] * report["bits"] for n, report in reports.items()) <= 3 * sum(sizes.values())
    assert sum(sizes[n] * report["kept"] for n, report in reports.items()) == pytest.approx(
        int(0.01 * sum(sizes.values()))
    )
    assert read_manifest(out).facts["errors"].keys() == reports.keys()
    # The masks are those of the method on the same walk.
    module = fulgurite.load(parts[0])
    context = context_of(parts, tmp_path)
    batches, _ = calibration_batches(module, SAMPLES, context)
    walk, quantizer = walk_over(module, batches, context, None), Gptq(4, 16)
    with torch.no_grad():
        quantizer.assign(options["budget"].bits(walk, quantizer, None, options["importance"]))
        masks = options["task_circuit"].masks(
            walk, loss_of(module, context), quantizer, token_weights=options["importance"]
        )
    counts = {name: int(mask.sum()) for name, mask in masks.items()}
    assert {name: round(report["kept"] * sizes[name]) for name, report in reports.items()} == counts
    # Each option changes the weights.
    dense = load_dense(out)
    for left_out in options:
        rest = {name: value for name, value in options.items() if name != left_out}
        step = QuantizeAtCheckpoint(Gptq(4, 16), calibration=SAMPLES, **rest)
        other = load_dense(step([parts[0]], context_of(parts, tmp_path / left_out)))
        assert any(
            not torch.equal(other[f"backbone.{name}.weight"], dense[f"backbone.{name}.weight"]) for name in sizes
        )


def test_a_pruner_of_rounds_finds_its_masks_in_the_whole_model(parts, tmp_path):
    step = PruneAtCheckpoint(Iterative(0.5, rounds=2), calibration=SAMPLES)
    out = step([parts[0]], context_of(parts, tmp_path / "out"))
    module = fulgurite.load(parts[0])
    context = context_of(parts, tmp_path)
    batches, _ = calibration_batches(module, SAMPLES, context)
    masks = Iterative(0.5, rounds=2).find(walk_over(module, batches, context, None), loss_of(module, context))
    found = load_dense(out)
    for name, mask in masks.items():
        assert torch.equal(found[f"backbone.{name}.weight"], module.backbone.get_parameter(f"{name}.weight") * mask)
    with pytest.raises(ValueError, match="iterative is measured on data: set calibration"):
        PruneAtCheckpoint(Iterative(0.5))
    PruneAtCheckpoint(Iterative(0.5, score="magnitude"))


def test_options_that_would_do_nothing_are_refused():
    with pytest.raises(ValueError, match="Rtn measures none: leave it out"):
        QuantizeAtCheckpoint(Rtn(), importance=TokenImportance())
    with pytest.raises(ValueError, match="leave out the quantizer's bits_by_name"):
        QuantizeAtCheckpoint(Rtn(bits_by_name={"a": 2}), budget=BitBudget(3.0, measure="rounding"))
    with pytest.raises(ValueError, match="rtn is measured on data: set calibration"):
        QuantizeAtCheckpoint(Rtn(), task_circuit=TaskCircuit())
    with pytest.raises(ValueError, match=r"allocation\.target=0\.5 and the pruner's sparsity=0\.4: give the same"):
        PruneAtCheckpoint(Wanda(0.4), calibration=SAMPLES, allocation=Ecoflap(0.5))
    with pytest.raises(ValueError, match="Iterative ranks all together: leave it out"):
        PruneAtCheckpoint(Iterative(0.5), calibration=SAMPLES, allocation=Ecoflap(0.5))
    with pytest.raises(ValueError, match="leave out the pruner's sparsities and scope"):
        PruneAtCheckpoint(Magnitude(0.5, scope="global"), calibration=SAMPLES, allocation=Ecoflap(0.5))
