"""Statistics at a boundary: merges against slow plain references, resumed after a kill, and what is refused."""

import os
import signal
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

import fulgurite
from fulgurite.backbones.frozenbilm import FrozenBiLM
from fulgurite.callbacks import merge_statistics
from fulgurite.callbacks.merge_statistics import Calibration, Expert, statistic_of, statistics_folder
from fulgurite.callbacks.merge_step import MergeAtCheckpoint
from fulgurite.callbacks.steps import Context
from fulgurite.checkpoints import load_tensors, read_manifest, verify
from fulgurite.cli import main
from fulgurite.commands.statistics import data_of
from fulgurite.methods.adapters.bank import Placement
from fulgurite.methods.adapters.bottleneck import Bottleneck
from fulgurite.methods.merging.fisher import Fisher
from fulgurite.methods.merging.linear import Average
from fulgurite.methods.merging.regmean import RegMean
from fulgurite.modules.calibration import masks_by_layer
from fulgurite.modules.video_qa import VideoQA

STAGES = ("red", "green", "blue")
SETS = (("red", "red"), ("green", "green"), ("blue", "live"))
OVERLAY = """\
test_after_fit: false
data: {init_args: {epochs_per_domain: 1}}
trainer:
  num_sanity_val_steps: 0
  callbacks:
    - class_path: Boundary
      init_args:
        at: fit_end
        evaluate: null
        steps: [{class_path: MergeAtCheckpoint, init_args: {merger: RegMean, calibration: {samples: %s}}}]
    - class_path: Boundary
      init_args:
        at: fit_end
        steps: [{class_path: MergeAtCheckpoint, init_args: {merger: Fisher, calibration: {samples: 6, seed: 1}}}]
"""
DOWN = "text/encoder/layer/1/output/dense.down"
PROJECTION = "video_projection.module"


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def configs(stream_config, tmp_path_factory):
    """Options of a fit that merges by both, with a number of samples for RegMean."""
    folder = tmp_path_factory.mktemp("overlay")

    def of(samples):
        (folder / f"{samples}.yaml").write_text(OVERLAY % samples)
        return ("--config", str(stream_config), "--config", str(folder / f"{samples}.yaml"))

    return of


@pytest.fixture(scope="module")
def run(configs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit") / "run"
    assert main(["fit", *configs(15), "--run", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def parts(run):
    """The last checkpoint, its module and its data."""
    (last,) = (run / "checkpoints").glob("*-step=6")
    module = fulgurite.load(last)
    return last, module, data_of(last, None, (), module)


def one_by_one(parts, stage, samples, seed):
    """Batches of one example: the calibration samples of a stage, which then have no padding."""
    last, module, data = parts
    chosen = Context(last, data=data).calibration(samples, seed, (stage,)).dataset.samples
    assert len({sample.id for sample in chosen}) == samples
    assert {sample.domain for sample in chosen} == {stage}
    return [module.collator("validate")([sample]) for sample in chosen]


def set_of(path, name):
    prefix = f"bank.sets.{name}."
    return {n.removeprefix(prefix): t for n, t in load_tensors(path).items() if n.startswith(prefix)}


def context_of(parts, out):
    return Context(out, builder=fulgurite.load, data=parts[2])


def test_regmean_is_that_of_inputs_seen_one_example_at_a_time(run, parts):
    last, module, _ = parts
    (artefact,) = (run / "artefacts").glob("merged-regmean-*")
    assert verify(artefact).ok
    merged = set_of(artefact, "live")
    for layer in (DOWN, PROJECTION):
        total, right = 0, 0
        for stage, name in SETS:
            rows = []
            hook = module.get_submodule(f"bank.sets.{name}.{layer}").register_forward_pre_hook(
                lambda _, args, rows=rows: rows.append(args[0].detach().double().flatten(0, 1))
            )
            with torch.no_grad():
                for batch in one_by_one(parts, stage, 15, 0):
                    module(batch, name)
            hook.remove()
            x = torch.cat(rows)
            gram = x.T @ x / len(x)
            gram = 0.9 * gram + 0.1 * gram.diagonal().diag()
            total, right = total + gram, right + gram @ set_of(last, name)[f"{layer}.weight"].double().T
        expected = torch.linalg.solve(total, right).T.float()
        torch.testing.assert_close(merged[f"{layer}.weight"], expected, rtol=1e-4, atol=1e-5)  # inputs are float32
    bias = torch.stack([set_of(last, name)[f"{DOWN}.bias"] for _, name in SETS]).mean(0)
    torch.testing.assert_close(merged[f"{DOWN}.bias"], bias)
    assert [entry["samples"] for entry in read_manifest(artefact).facts["statistics"]] == [15] * 3


def test_fisher_is_that_of_one_gradient_after_the_other(run, parts):
    last, module, _ = parts
    (artefact,) = (run / "artefacts").glob("merged-fisher-*")
    fishers = []
    for stage, name in SETS:
        parameters = dict(module.bank.sets[name].named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in parameters.items()}
        for batch in one_by_one(parts, stage, 6, 1):
            beliefs = module(batch, name).logits.log_softmax(-1)[0]
            for belief in beliefs:
                gradients = torch.autograd.grad(belief, list(parameters.values()), retain_graph=True)
                for total, gradient in zip(sums.values(), gradients):
                    total += belief.exp().detach().double() * gradient.double() ** 2 / 6
        fishers.append(sums)
    norms = [sum(f.square().sum() for f in fisher.values()).sqrt() for fisher in fishers]
    fishers[0] = {n: f.clamp(min=1e-6) for n, f in fishers[0].items()}
    merged, sets = set_of(artefact, "live"), [set_of(last, name) for _, name in SETS]
    for name in merged:
        shares = [fisher[name] / norm for fisher, norm in zip(fishers, norms)]
        expected = sum(s * t[name] for s, t in zip(shares, sets)) / sum(shares)
        torch.testing.assert_close(merged[name], expected.float(), rtol=1e-3, atol=1e-5)  # gradients are float32


def test_the_samples_of_a_stage_do_not_stay_behind_and_are_not_those_of_others(run):
    (artefact,) = (run / "artefacts").glob("merged-fisher-*")
    assert [entry["domains"] for entry in read_manifest(artefact).facts["statistics"]] == [[s] for s in STAGES]
    assert not list((run / "artefacts").glob("*-statistics"))


def test_a_kill_in_the_middle_of_an_expert_changes_nothing(parts, tmp_path, monkeypatch):
    last = parts[0]
    step = MergeAtCheckpoint(RegMean(), calibration=Calibration(15))
    whole = step([last], context_of(parts, tmp_path / "whole"))
    monkeypatch.setattr(merge_statistics, "SAVE_EVERY_S", 0.0)
    plain, calls = merge_statistics.add, []

    def add(*args):
        if len(calls) == 3:  # two batches of the first expert and one of the second are saved
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(args[3].label)
        plain(*args)

    out, child = tmp_path / "killed", os.fork()
    if child == 0:
        monkeypatch.setattr(merge_statistics, "add", add)
        step([last], context_of(parts, out))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert sorted(p.name for p in statistics_folder(out).iterdir()) == ["green-partial-0", "red"]
    assert not out.exists()

    def counted(*args):
        calls.append(args[3].label)
        plain(*args)

    monkeypatch.setattr(merge_statistics, "add", counted)
    step([last], context_of(parts, out))
    assert calls == ["green", "blue", "blue"]
    first, again = load_tensors(whole), load_tensors(out)
    assert all(torch.equal(first[name], again[name]) for name in first.keys() | again.keys())
    assert read_manifest(whole).facts["statistics"] == read_manifest(out).facts["statistics"]
    assert not statistics_folder(out).exists()


def test_what_was_measured_of_something_else_is_measured_again(parts, tmp_path, monkeypatch):
    last, seen, plain = parts[0], [], merge_statistics.add
    monkeypatch.setattr(merge_statistics, "add", lambda *args: (seen.append(args[3].label), plain(*args)))
    monkeypatch.setattr(merge_statistics, "remove", lambda path: None)
    out = tmp_path / "out"
    for samples, expected in ((4, 3), (5, 3)):
        merge_statistics.measure_experts(
            RegMean(),
            MergeAtCheckpoint(RegMean(), calibration=Calibration(samples))._experts([last], read_manifest(last)),
            Calibration(samples),
            context_of(parts, out),
        )
        assert len(seen) == expected
        seen.clear()


def test_what_cannot_be_measured_is_refused_before_anything_is_trained(configs, tmp_path, capfd):
    assert main(["fit", *configs(21), "--run", str(tmp_path / "run")]) == 2
    assert "set calibration.samples to 20 or fewer" in capfd.readouterr().err
    with pytest.raises(ValueError, match="RegMean needs statistics of each expert: set calibration"):
        MergeAtCheckpoint(RegMean())
    with pytest.raises(ValueError, match="Average takes no statistics: leave out calibration"):
        MergeAtCheckpoint(Average(), calibration=Calibration())
    with pytest.raises(ValueError, match="samples=0"):
        Calibration(samples=0)


def test_a_module_that_says_nothing_of_its_answers_is_refused(parts, tmp_path):
    context = Context(tmp_path / "out", builder=lambda path: pl.LightningModule(), data=parts[2])
    with pytest.raises(ValueError, match="LightningModule does not say what its inputs and answers are"):
        MergeAtCheckpoint(Fisher(), calibration=Calibration(4))([parts[0]], context)
    with pytest.raises(LookupError, match="this step needs a builder"):
        MergeAtCheckpoint(Fisher(), calibration=Calibration(4))([parts[0]], Context(tmp_path / "out", data=parts[2]))


def test_adapters_of_layers_that_read_positions_too_count_tokens_alone():
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"attention_head_size": 8, "intermediate_size": 32, "position_buckets": 8, "max_position_embeddings": 32}
    backbone = FrozenBiLM(pretrained=False, config=sizes, max_frames=4, max_tokens=12)
    module = VideoQA(backbone, [Placement(["query", "feed_forward_output"], partial(Bottleneck, reduction=4))]).eval()
    statistic = statistic_of("gram", module, Expert("one", Path("one"), "live"), Calibration(2))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 40, (2, 8), generator=generator)  # as many as there are positions
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(8) < torch.tensor([[8], [5]])).long()}
    name = "bank.sets.live.deberta/encoder/layer/0/attention/self/query_proj.down"
    rows = []
    hook = module.get_submodule(name).register_forward_pre_hook(lambda _, args: rows.append(args[0]))
    with torch.no_grad(), statistic.watch(masks_by_layer(module, statistic.modules, inputs)):
        backbone.pass_blocks(inputs)
    hook.remove()
    tokens, positions = rows
    assert positions.shape[:2] == (1, 16)
    real = tokens[inputs["attention_mask"].bool()].double()
    torch.testing.assert_close(statistic.means()[name], real.T @ real / 13, rtol=1e-5, atol=1e-8)
