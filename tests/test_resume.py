"""A run stopped anywhere goes on to the same bits; a finished one is evaluated and repeated from its folder."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import torch

from fulgurite.checkpoints import load_document, load_tensors

STEPS = 12  # 3 stages of 2 epochs of 2 steps
EVERY_STEP = ("--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1")
KILLED = """
import os, signal, sys
from fulgurite.cli import main
from fulgurite.modules.continual_video_qa import ContinualVideoQA
train = ContinualVideoQA.training_step
def step(self, batch, batch_idx):
    if self.trainer.global_step == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return train(self, batch, batch_idx)
ContinualVideoQA.training_step = step
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def cli(stream_config, tmp_path_factory):
    """Run a command in this process, one thread, in a folder of its own."""
    from fulgurite.cli import main

    before, threads = os.getcwd(), torch.get_num_threads()
    os.chdir(tmp_path_factory.mktemp("work"))
    torch.set_num_threads(1)

    def run(command, *argv, config=True):
        return main([command, *(("--config", str(stream_config)) if config else ()), *map(str, argv)])

    yield run
    torch.set_num_threads(threads)
    os.chdir(before)


@pytest.fixture(scope="module")
def whole(cli, tmp_path_factory):
    """The unbroken run, with a checkpoint of every step."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert cli("fit", "--run", run, *EVERY_STEP) == 0
    return run


def checkpoint(run, step):
    (path,) = (run / "checkpoints").glob(f"*-step={step}")
    return path


def losses(run):
    """Training loss by step, as written."""
    with (run / "metrics.csv").open() as file:
        return {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]}


def metrics(run):
    return json.loads((run / "metrics.json").read_text())


def state(run):
    document = load_document(run / "checkpoints" / "last", "state")
    kept = ("epoch", "global_step", "loops", "optimizer_states", "lr_schedulers")
    return {name: document[name] for name in kept} | {"random": document["callbacks"]["RandomStates"]}


def assert_bitwise(a, b, where=""):
    """Equal values of equal types; tensors byte by byte."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_bitwise(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for index, pair in enumerate(zip(a, b)):
            assert_bitwise(*pair, f"{where}/{index}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        assert a.numpy().tobytes() == b.numpy().tobytes(), where
    else:
        assert a == b, where


def assert_same_end(run, whole, losses_from=0):
    """Weights of all sets, router sums, optimizer, schedule, loops, random states, losses and metrics."""
    assert_bitwise(load_tensors(run / "checkpoints" / "last"), load_tensors(whole / "checkpoints" / "last"))
    assert_bitwise(state(run), state(whole))
    assert losses(run) == {step: loss for step, loss in losses(whole).items() if step >= losses_from}


def test_the_run_trains_every_set_and_draws_dropout(whole):
    weights = load_tensors(whole / "checkpoints" / "last")
    name = next(n for n in weights if n.startswith("bank.sets.red.") and n.endswith("up.weight"))
    sets = [weights[name.replace(".red.", f".{s}.")] for s in ("initial", "red", "green", "blue")]
    assert not any(torch.equal(a, b) for i, a in enumerate(sets) for b in sets[:i])
    assert weights["router.counts"].tolist() == [20, 20, 20]
    assert len(losses(whole)) == STEPS
    first = [load_document(checkpoint(whole, s), "state")["callbacks"]["RandomStates"] for s in (1, 2)]
    assert not torch.equal(*(r["ranks"][0]["torch"] for r in first))


# Inside an epoch and at its end, inside a stage and at its end; all others take as long again.
@pytest.mark.parametrize(
    "step", [step if step in (1, 4, 6, 9) else pytest.param(step, marks=pytest.mark.slow) for step in range(1, STEPS)]
)
def test_resumed_from_any_step_the_run_ends_the_same(step, whole, cli, tmp_path):
    tested = step in (1, 4)
    argv = ("--ckpt_path", checkpoint(whole, step), "--run", tmp_path / "run", *EVERY_STEP)
    assert cli("fit", *argv, "--test_after_fit", str(tested).lower()) == 0
    assert_same_end(tmp_path / "run", whole, losses_from=step)
    if tested:
        assert metrics(tmp_path / "run") == metrics(whole)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (("--trainer.accumulate_grad_batches", "2", "--data.init_args.batch_size", "6"), (4,)),
        (("--data.init_args.num_workers", "2", "--data.init_args.validate", "every_epoch"), (3,)),
        (
            (
                "--data.init_args.batch_size",
                "6",
                "--trainer.limit_train_batches",
                "3",
                "--trainer.limit_val_batches",
                "1",
            )
            + ("--trainer.gradient_clip_val", "0.01", "--trainer.max_epochs", "4"),
            (3, 7),
        ),
    ],
    ids=["accumulation", "workers", "limits"],
)
def test_also_with_accumulated_gradients_and_with_workers_and_limits(options, steps, cli, tmp_path):
    argv = (*options, *EVERY_STEP, "--test_after_fit", "false")
    assert cli("fit", *argv, "--run", tmp_path / "whole") == 0
    for step in steps:
        run = tmp_path / f"from {step}"
        assert cli("fit", *argv, "--ckpt_path", checkpoint(tmp_path / "whole", step), "--run", run) == 0
        assert_same_end(run, tmp_path / "whole", losses_from=step)
        for later in (run / "checkpoints").glob("*-step=*"):  # no step is overwritten in the middle of the next
            ours, theirs = (load_document(f / "checkpoints" / later.name, "state") for f in (run, tmp_path / "whole"))
            assert_bitwise(ours["loops"]["fit_loop"]["state_dict"], theirs["loops"]["fit_loop"]["state_dict"])


def test_killed_in_the_third_domain(whole, cli, stream_config, tmp_path):
    run = tmp_path / "run"
    argv = ("fit", "--config", stream_config, "--run", run, *EVERY_STEP)
    # Sums over another number of threads differ in their last bits.
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", KILLED.format(at=9), *map(str, argv)]
    child = subprocess.run(command, capture_output=True, text=True, env=threads)
    assert child.returncode == -signal.SIGKILL, child.stderr[-2000:]
    assert not (run / "metrics.json").exists()
    assert cli("fit", "--run", run, "--resume", "auto", *EVERY_STEP) == 0
    assert_same_end(run, whole)
    assert metrics(run) == metrics(whole)
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()
    assert (run / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()


def test_stopped_by_sigterm_and_by_max_steps(whole, cli, monkeypatch, tmp_path):
    from fulgurite.modules.continual_video_qa import ContinualVideoQA

    run, train = tmp_path / "run", ContinualVideoQA.training_step

    def stop(self, batch, batch_idx):
        if self.trainer.global_step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return train(self, batch, batch_idx)

    seldom = ("--run", run, "--resume", "auto", "--checkpoint.every_n_train_steps", "5")
    assert cli("fit", *seldom, "--trainer.max_steps", "3", "--test_after_fit", "false") == 0
    assert state(run)["global_step"] == 3
    with monkeypatch.context() as patch:
        patch.setattr(ContinualVideoQA, "training_step", stop)
        assert cli("fit", *seldom) == 143
    assert state(run)["global_step"] == 7
    assert cli("fit", *seldom) == 0
    assert_same_end(run, whole)  # `last` is at step 12, though 10 is the last multiple of 5
    assert metrics(run) == metrics(whole)


def test_what_is_configured_for_the_optimizer_beats_the_checkpoint(whole, cli, tmp_path):
    """From the checkpoint of step 4 on with another rate, as if the run had had it since then."""
    options = (
        "--model.init_args.optimizer.init_args.lr",
        "0.5",
        "--model.init_args.optimizer.init_args.weight_decay",
        "0.3",
    )
    argv = ("--ckpt_path", checkpoint(whole, 4), "--run", tmp_path / "run", *EVERY_STEP, *options)
    assert cli("fit", *argv, "--test_after_fit", "false") == 0
    (then,), (now,) = (
        load_document(checkpoint(run, 5), "state")["optimizer_states"][0]["param_groups"]
        for run in (whole, tmp_path / "run")
    )
    assert (now["initial_lr"], now["weight_decay"]) == (0.5, 0.3)
    assert now["lr"] / 0.5 == pytest.approx(then["lr"] / then["initial_lr"])
    schedule = load_document(checkpoint(tmp_path / "run", 5), "state")["lr_schedulers"][0]
    assert schedule["base_lrs"] == [0.5]
    assert losses(tmp_path / "run")[5] != losses(whole)[5]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--model.init_args.optimizer", "torch.optim.SGD"), "state of torch.optim.adamw.AdamW"),
        (("--model.init_args.param_groups", "[{pattern: video_projection, lr: 0.1}]"), "param_groups make groups of"),
    ],
)
def test_a_state_of_another_optimizer_is_refused(options, said, whole, cli, capsys, tmp_path):
    argv = ("--ckpt_path", checkpoint(whole, 4), "--run", tmp_path / "run", *options)
    assert cli("fit", *argv) == 2
    assert said in capsys.readouterr().err


def test_with_max_steps_an_epoch_end_is_taken_up_at_the_next_epoch(cli, tmp_path):
    argv = ("--trainer.max_steps", "5", *EVERY_STEP, "--test_after_fit", "false")
    assert cli("fit", *argv, "--run", tmp_path / "whole") == 0
    for step in (2, 3):
        run = tmp_path / f"from {step}"
        assert cli("fit", *argv, "--ckpt_path", checkpoint(tmp_path / "whole", step), "--run", run) == 0
        assert_same_end(run, tmp_path / "whole", losses_from=step)


SELECTING = ("--data.init_args.validate", "every_epoch", "--model.init_args.selection", "best")


@pytest.mark.parametrize(
    ("number", "hook", "step", "options"),
    [
        (signal.SIGTERM, "validation_step", 4, ()),
        (signal.SIGINT, "validation_step", 2, SELECTING),  # in a stage, where this validation alone judges the epoch
        pytest.param(signal.SIGUSR1, "validation_step", 4, SELECTING, marks=pytest.mark.slow),
        (
            signal.SIGINT,
            "training_step",
            1,
            ("--trainer.accumulate_grad_batches", "2", "--data.init_args.batch_size", "6"),
        ),
    ],
    ids=["validation", "best, in a stage", "best, at its end", "accumulation"],
)
def test_stopped_inside_a_validation_or_a_window(number, hook, step, options, cli, monkeypatch, tmp_path):
    """The first of several batches gets the signal; the resumed run does the whole validation, or keeps the sum."""
    from fulgurite.modules.continual_video_qa import ContinualVideoQA

    options = (*options, "--data.init_args.eval_batch_size", "4", "--trainer.num_sanity_val_steps", "0")
    run, real, sent = tmp_path / "run", getattr(ContinualVideoQA, hook), []

    def stop(self, batch, batch_idx, *more):
        out = real(self, batch, batch_idx, *more)
        if self.trainer.global_step == step and not sent:
            sent.append(batch_idx)
            os.kill(os.getpid(), number)
        return out

    assert cli("fit", *options, "--run", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(ContinualVideoQA, hook, stop)
        assert cli("fit", *options, "--run", run) == 128 + number
    assert state(run)["global_step"] == step
    assert not (run / "results.json").exists()
    assert cli("fit", *options, "--run", run, "--resume", "auto") == 0
    assert_same_end(run, tmp_path / "whole")
    assert metrics(run) == metrics(tmp_path / "whole")


def test_a_complete_run_trains_no_further(whole, cli, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "report.html").unlink()
    before = (run / "checkpoints" / "last" / "manifest.json").read_bytes()
    assert cli("fit", "--run", run, "--resume", "auto", *EVERY_STEP) == 0
    assert (run / "checkpoints" / "last" / "manifest.json").read_bytes() == before
    assert metrics(run) == metrics(whole)
    assert losses(run) == losses(whole)
    assert (run / "report.html").is_file()


def test_its_config_repeats_the_run(whole, cli, tmp_path):
    assert cli("fit", "--config", whole / "config.yaml", "--run", tmp_path / "run", config=False) == 0
    assert_same_end(tmp_path / "run", whole)
    assert metrics(tmp_path / "run") == metrics(whole)
    assert (tmp_path / "run" / "config.yaml").read_text() == (whole / "config.yaml").read_text()


@pytest.mark.parametrize("config", [True, False])
def test_evaluation_gives_the_numbers_of_the_run(config, whole, cli, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    argv = ("--config", run / "config.yaml") if config else ()
    assert cli("test", *argv, "--ckpt_path", run / "checkpoints" / "last", config=False) == 0
    (test,) = (run / "evaluations").glob("test-*")
    expected = {name: value for name, value in metrics(run).items() if name.startswith("test/")}
    assert len(expected) > 40
    assert metrics(test) == expected
    assert (test / "answers.jsonl").read_bytes() == (run / "answers.jsonl").read_bytes()
    assert cli("validate", *argv, "--ckpt_path", run / "checkpoints" / "last", config=False) == 0
    (validate,) = (run / "evaluations").glob("validate-*")
    assert metrics(validate) == {name: value for name, value in metrics(run).items() if name.startswith("val/")}


def test_predictions_are_the_answers_of_the_test(whole, cli, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    assert cli("predict", "--ckpt_path", run / "checkpoints" / "last", config=False) == 0
    (predict,) = (run / "evaluations").glob("predict-*")
    rows, answers = (
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in (predict / "predictions.jsonl", run / "answers.jsonl")
    )
    assert [(r["id"], r["answer"]) for r in rows] == [(a["id"], a["answers"]["dynamic"]) for a in answers]
    for row, answer in zip(rows, answers):
        assert row["weights"] == pytest.approx(answer["weights"], abs=1e-4)


def test_a_first_user_sees_no_warning(cli, tmp_path):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        argv = ("--trainer.log_every_n_steps", "50", "--trainer.max_epochs", "3", "--trainer.num_sanity_val_steps", "0")
        assert cli("fit", *argv, "--run", tmp_path / "run", "--test_after_fit", "false") == 0
    # Classes that another test has defined outlive its modules, and jsonargparse says so.
    assert [text for text in (str(warning.message) for warning in seen) if "'my_project'" not in text] == []
