"""Boundaries of a continual run from the command line: what they make, when, and that the fit does not feel them."""

import csv
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

import fulgurite
from fulgurite.checkpoints import load_document, load_tensors, read_manifest, verify
from fulgurite.checkpoints.atomic import inject_faults
from fulgurite.cli import main
from fulgurite.methods.merging.linear import Average
from fulgurite.methods.merging.model_stock import ModelStock
from fulgurite.methods.merging.opcm import Opcm
from fulgurite.methods.merging.ties import Ties

EVERY_STEP = ("--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1")
STAGES = ("red", "green", "blue")
BOUNDARIES = """\
test_after_fit: false
data: {init_args: {epochs_per_domain: 1}}
trainer:
  num_sanity_val_steps: 0
  callbacks:
    - class_path: Boundary
      init_args:
        evaluate: [val, test]
        steps: [{class_path: MergeAtCheckpoint, init_args: {merger: Average}}]
    - class_path: Boundary
      init_args:
        evaluate: null
        steps: [{class_path: MergeAtCheckpoint, init_args: {merger: Opcm, sources: stream, name: stream}}]
    - class_path: Boundary
      init_args:
        at: checkpoint
        every: 3
        evaluate: null
        steps:
          - class_path: MergeAtCheckpoint
            init_args: {merger: ModelStock, sources: {last: 2}, base: before, name: stock}
    - class_path: Boundary
      init_args:
        at: fit_end
        steps:
          - class_path: MergeAtCheckpoint
            init_args: {merger: {class_path: Ties, init_args: {density: 0.2}}, name: ties}
"""
MADE = [
    *(f"merged-average-{stage}" for stage in sorted(STAGES)),
    *(f"merged-stock-step={step}" for step in (3, 6)),
    *(f"merged-stream-{stage}" for stage in sorted(STAGES)),
    "merged-ties-step=6",
]


@pytest.fixture(scope="module")
def fit(stream_config, tmp_path_factory):
    """Run ``fit`` of the stream with boundaries, in this process on one thread."""
    overlay = tmp_path_factory.mktemp("overlay") / "boundaries.yaml"
    overlay.write_text(BOUNDARIES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(folder, *argv, boundaries=True):
        configs = ("--config", str(stream_config), *(("--config", str(overlay)) if boundaries else ()))
        return main(["fit", *configs, "--run", str(folder), *EVERY_STEP, *map(str, argv)])

    yield run
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(fit, tmp_path_factory):
    """The undisturbed run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert fit(run) == 0
    return run


def bytes_of(path):
    return {name: tensor.numpy().tobytes() for name, tensor in load_tensors(path).items()}


def set_of(path, name):
    prefix = f"bank.sets.{name}."
    return {n.removeprefix(prefix): t for n, t in load_tensors(path).items() if n.startswith(prefix)}


def checkpoint(run, step):
    (path,) = (run / "checkpoints").glob(f"*-step={step}")
    return path


def scores(run):
    return {
        name: entry["scores"] for name, entry in json.loads((run / "artefacts" / "scores.json").read_text()).items()
    }


def rows(run):
    """Of metrics.csv: what training and validation have logged."""
    with (run / "metrics.csv").open() as file:
        kept = [{n: v for n, v in row.items() if v and not n.startswith("merged/")} for row in csv.DictReader(file)]
    return [row for row in kept if row.keys() - {"step", "epoch"}]


def equal(a, b):
    assert a.keys() == b.keys()
    return all(torch.equal(a[name], b[name]) for name in a)


def test_every_artefact_is_made_at_its_boundary_and_sound(whole):
    assert sorted(p.name for p in (whole / "artefacts").iterdir() if p.is_dir()) == MADE
    assert all(verify(whole / "artefacts" / name).ok for name in MADE)
    for stage, step in zip(STAGES, (2, 4, 6)):
        (parent,) = read_manifest(whole / "artefacts" / f"merged-average-{stage}").parents
        assert parent == {
            "path": str(checkpoint(whole, step)),
            "digest": read_manifest(checkpoint(whole, step)).digest,
        }


def test_the_fit_does_not_feel_them(whole, fit, tmp_path):
    plain = tmp_path / "plain"
    argv = ("--data.init_args.epochs_per_domain", "1", "--trainer.num_sanity_val_steps", "0")
    assert fit(plain, "--test_after_fit", "false", *argv, boundaries=False) == 0
    for step in range(1, 7):
        ours, theirs = checkpoint(whole, step), checkpoint(plain, step)
        assert bytes_of(ours) == bytes_of(theirs)
        assert read_manifest(ours).metrics == read_manifest(theirs).metrics
        states = [load_document(path, "state") for path in (ours, theirs)]
        random = [state["callbacks"]["RandomStates"]["ranks"][0] for state in states]
        assert torch.equal(random[0]["torch"], random[1]["torch"])
        assert torch.equal(random[0]["python"]["words"], random[1]["python"]["words"])
        assert torch.equal(random[0]["numpy"]["keys"], random[1]["numpy"]["keys"])
        assert states[0]["loops"] == states[1]["loops"]
        moments = [state["optimizer_states"][0]["state"] for state in states]
        assert all(torch.equal(moments[0][i]["exp_avg"], moments[1][i]["exp_avg"]) for i in moments[0])
    assert rows(whole) == rows(plain)
    assert json.loads((whole / "metrics.json").read_text()) == json.loads((plain / "metrics.json").read_text())


def test_stages_are_merged_into_every_set_that_answers(whole):
    last = checkpoint(whole, 4)
    expected = Average()([set_of(last, "red"), set_of(last, "live")])
    artefact = whole / "artefacts" / "merged-average-green"
    assert all(equal(set_of(artefact, name), expected) for name in ("red", "green", "live"))
    merged = load_tensors(artefact)
    for name, tensor in load_tensors(last).items():
        if not name.startswith(("bank.sets.red.", "bank.sets.green.", "bank.sets.live.")):
            assert merged[name].numpy().tobytes() == tensor.numpy().tobytes(), name
    base = set_of(last := checkpoint(whole, 6), "initial")
    expected = Ties(density=0.2)([set_of(last, name) for name in ("red", "green", "live")], base)
    assert equal(set_of(whole / "artefacts" / "merged-ties-step=6", "live"), expected)


def test_checkpoints_are_merged_from_the_one_before_them(whole):
    for step in (3, 6):
        live = [set_of(checkpoint(whole, s), "live") for s in (step - 2, step - 1, step)]
        artefact = whole / "artefacts" / f"merged-stock-step={step}"
        assert equal(set_of(artefact, "live"), ModelStock()(live[1:], live[0]))
        assert [Path(p["path"]) for p in read_manifest(artefact).parents] == [
            checkpoint(whole, s) for s in (step - 2, step - 1, step)
        ]


def test_a_stream_keeps_one_model_and_gives_the_merge_of_all(whole):
    last = checkpoint(whole, 6)
    expected = Opcm()([set_of(last, name) for name in ("red", "green", "live")], set_of(last, "initial"))
    found = set_of(whole / "artefacts" / "merged-stream-blue", "live")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert len(read_manifest(whole / "artefacts" / "merged-stream-blue").parents) == 2


@pytest.mark.parametrize(("command", "split"), [("validate", "val"), ("test", "test")])
def test_scores_within_the_fit_are_those_of_the_artefact(command, split, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert main([command, "--ckpt_path", str(run / "artefacts" / "merged-average-green")]) == 0
    (evaluation,) = (run / "evaluations").iterdir()
    found = json.loads((evaluation / "metrics.json").read_text())
    own = scores(whole)["merged-average-green"]
    assert own[f"{split}/accuracy"] == pytest.approx(found[f"{split}/accuracy"], abs=1e-6)
    named = [f"{split}/{'dynamic/' if split == 'test' else ''}accuracy/{stage}" for stage in STAGES]
    assert [own[f"{split}/accuracy/{stage}"] for stage in STAGES] == pytest.approx([found[n] for n in named], abs=1e-6)
    logged = [row for row in csv.DictReader((whole / "metrics.csv").open()) if row[f"merged/average/{split}/accuracy"]]
    assert [row["step"] for row in logged] == ["2", "4", "6"]
    assert float(logged[1][f"merged/average/{split}/accuracy"]) == pytest.approx(own[f"{split}/accuracy"])


def test_an_artefact_loads_and_starts_a_run(whole, fit, tmp_path):
    artefact = whole / "artefacts" / "merged-ties-step=6"
    state = fulgurite.load(artefact).state_dict()
    assert all(tensor.numpy().tobytes() == state[n].numpy().tobytes() for n, tensor in load_tensors(artefact).items())
    argv = ("--init_from", artefact, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "0")
    assert fit(tmp_path / "next", *argv, "--test_after_fit", "false", boundaries=False) == 0


def test_done_again_nothing_is_made_and_damage_is_mended(whole, fit, tmp_path, caplog):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = {name: read_manifest(run / "artefacts" / name).digest for name in MADE}
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    assert fit(run, "--resume", "auto") == 0
    assert {name: read_manifest(run / "artefacts" / name).digest for name in MADE} == before
    there = [m for m in caplog.messages if m.endswith("is there already, of the same sources and settings")]
    assert len(there) == 4
    damaged = run / "artefacts" / "merged-ties-step=6"
    data = bytearray((damaged / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "weights.safetensors").write_bytes(data)
    assert fit(run, "--resume", "auto") == 0
    assert verify(damaged).ok
    assert bytes_of(damaged) == bytes_of(whole / "artefacts" / "merged-ties-step=6")
    assert scores(run) == scores(whole)


def test_resumed_in_the_middle_the_boundaries_go_on(whole, fit, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for step in range(4, 7):
        shutil.rmtree(checkpoint(run, step))
    shutil.rmtree(run / "checkpoints" / "last")
    shutil.rmtree(run / "artefacts" / "merged-average-red")  # not due at the checkpoint of step 3
    for name in MADE:
        if name.endswith(("green", "blue", "=6")):
            shutil.rmtree(run / "artefacts" / name)
    assert fit(run, "--resume", "auto") == 0
    made = [name for name in MADE if name != "merged-average-red"]
    assert sorted(p.name for p in (run / "artefacts").iterdir() if p.is_dir()) == made
    assert all(bytes_of(run / "artefacts" / name) == bytes_of(whole / "artefacts" / name) for name in made)


@pytest.mark.parametrize(
    "name", ["merged-average-green", "merged-ties-step=6", pytest.param("merged-stock-step=3", marks=pytest.mark.slow)]
)
def test_killed_inside_a_merge_the_run_goes_on_to_the_same_bits(name, whole, fit, tmp_path):
    run = tmp_path / "run"

    def hook(point):
        if point == "before_manifest" and any((run / "artefacts").glob(f".{name}.tmp-*")):
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            with inject_faults(hook):
                fit(run)
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not (run / "artefacts" / name).exists()
    assert fit(run, "--resume", "auto") == 0
    assert sorted(p.name for p in (run / "artefacts").iterdir() if p.is_dir()) == MADE
    assert all(bytes_of(run / "artefacts" / each) == bytes_of(whole / "artefacts" / each) for each in MADE)
    assert bytes_of(run / "checkpoints" / "last") == bytes_of(whole / "checkpoints" / "last")
    assert scores(run) == scores(whole)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (
            ("--checkpoint.save_top_k", "2"),
            "some would be deleted before, with save_top_k=2: set --checkpoint.save_top_k 3",
        ),
        (("--checkpoint.every_n_train_steps", "3"), "set --checkpoint.every_n_epochs 1"),
    ],
)
def test_what_cannot_work_is_one_message(options, part, fit, tmp_path, capfd):
    assert fit(tmp_path / "run", *options) == 2
    assert part in capfd.readouterr().err


def test_a_module_without_sets_of_stages_is_refused(stream_config, tmp_path, capfd):
    text = stream_config.read_text().replace("ContinualVideoQA", "VideoQA")
    plain, merging = tmp_path / "plain.yaml", tmp_path / "merging.yaml"
    plain.write_text("".join(line for line in text.splitlines(True) if "second_router" not in line))
    merging.write_text(BOUNDARIES)
    argv = ["fit", "--config", str(plain), "--config", str(merging), "--run", str(tmp_path / "run"), *EVERY_STEP]
    assert main(argv) == 2
    assert "average: VideoQA keeps no adapter set per stage" in capfd.readouterr().err


def test_a_fast_run_writes_nothing(fit, tmp_path):
    assert fit(tmp_path / "run", "--trainer.fast_dev_run", "1") == 0
    assert not (tmp_path / "run" / "artefacts").exists()
