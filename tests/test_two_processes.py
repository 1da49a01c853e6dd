"""The command line on two processes, DDP and FSDP2: one run folder, the numbers of one process, bitwise resume."""

import csv
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from fulgurite.checkpoints import load_document, load_tensors

STRATEGIES = ("ddp", "fsdp2")
EVERY_STEP = ("--checkpoint.every_n_train_steps", "1", "--checkpoint.save_top_k", "-1")
QUESTION = 1 / 7 + 1e-6  # a domain has 7 test questions
# Several commands one after the other in each of the two processes.
RANK = """
import json, sys
from fulgurite.cli import main
sys.exit(max(main(argv) for argv in json.loads(sys.argv[1])))
"""


@pytest.fixture(scope="module")
def config(stream_config, tmp_path_factory):
    """Without dropout, whose draws depend on the number of processes."""
    path = tmp_path_factory.mktemp("plain") / "plain.yaml"
    path.write_text(stream_config.read_text().replace("dropout: 0.2", "dropout: 0.0"))
    return path


@pytest.fixture(scope="module")
def single(config, tmp_path_factory):
    """The run on one process."""
    from fulgurite.cli import main

    run, threads = tmp_path_factory.mktemp("single") / "run", torch.get_num_threads()
    torch.set_num_threads(1)
    assert main(["fit", "--config", str(config), "--run", str(run)]) == 0
    torch.set_num_threads(threads)
    return run


@pytest.fixture(scope="module")
def launched(config, pair, tmp_path_factory):
    """A run of one command for each strategy: one as a user types it, where Lightning starts the second process."""
    root = tmp_path_factory.mktemp("ddp")
    argv = ["fit", "--config", str(config), "--trainer.devices", "2", *EVERY_STEP, "--trainer.strategy"]
    command = [sys.executable, "-m", "fulgurite.cli", *argv, "ddp", "--runs", str(root)]
    child = subprocess.run(command, capture_output=True, text=True, env=one_thread(), timeout=240)
    assert child.returncode == 0, child.stderr[-3000:]
    assert child.stdout.count("dynamic merging *") == 1
    (run,) = (root / "plain").iterdir()
    sharded = tmp_path_factory.mktemp("fsdp2") / "run"
    texts = in_two_processes(pair, sharded.parent, [[*argv, "fsdp2", "--run", str(sharded)]])
    assert [text.count("dynamic merging *") for text in texts] == [1, 0]
    return {"ddp": run, "fsdp2": sharded}


@pytest.fixture(scope="module")
def continued(stream_config, config, launched, tmp_path_factory, pair):
    """What two processes do from the launched runs' checkpoints: resume and predict; and, with dropout, a run and its
    resume in the middle of the second stage."""
    root = tmp_path_factory.mktemp("continued")
    two = ("--trainer.devices", "2", "--trainer.strategy")
    dropout = ["fit", "--config", str(stream_config), *two, "ddp", *EVERY_STEP, "--test_after_fit", "false"]
    commands = [
        [*dropout, "--run", str(root / "whole")],
        [*dropout, "--run", str(root / "resumed"), "--ckpt_path", str(root / "whole/checkpoints/epoch=2-step=5")],
    ]
    for strategy in STRATEGIES:
        shutil.copytree(launched[strategy], root / strategy)
        resume = [
            "fit",
            "--config",
            str(config),
            *two,
            strategy,
            *EVERY_STEP,
            "--run",
            str(root / f"{strategy}-resumed"),
        ]
        start = root / strategy / "checkpoints/epoch=4-step=9"
        commands.append([*resume, "--ckpt_path", str(start), "--test_after_fit", "false"])
        commands.append(["predict", "--ckpt_path", str(root / strategy)])
    in_two_processes(pair, root, commands)
    return root


def one_thread():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def in_two_processes(pair, folder, commands):
    """What both ranks have written."""
    script = folder / "commands.py"
    script.write_text(RANK)
    return pair.run(script, json.dumps(commands))


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def losses(run):
    with (run / "metrics.csv").open() as file:
        return {int(row["step"]): row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]}


def assert_same_metrics(a, b):
    """The loss to five digits; an accuracy by at most one question at a tie, which sums in another order may turn."""
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-6 if name == "train/loss" else QUESTION), name


def assert_same_answers(a, b):
    """All questions in the order of the data, and at most two of their 147 answers different."""
    assert [(r["id"], r["gold"]) for r in a] == [(r["id"], r["gold"]) for r in b]
    assert sum(x["answers"][mode] != y["answers"][mode] for x, y in zip(a, b) for mode in x["answers"]) <= 2


def assert_bitwise(run, whole, first):
    weights, expected = (load_tensors(folder / "checkpoints" / "last") for folder in (run, whole))
    states = [load_document(folder / "checkpoints" / "last", "state") for folder in (run, whole)]
    moments = [
        {
            f"{index}/{key}": value
            for index, entry in s["optimizer_states"][0]["state"].items()
            for key, value in entry.items()
        }
        for s in states
    ]
    for a, b in ((weights, expected), moments):
        assert a.keys() == b.keys()
        assert [name for name in a if a[name].numpy().tobytes() != b[name].numpy().tobytes()] == []
    assert losses(run) == {step: loss for step, loss in losses(whole).items() if step >= first}
    assert len(losses(run)) == 12 - first


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_give_the_numbers_of_one(strategy, launched, single):
    run = launched[strategy]
    assert_same_metrics(metrics(run), metrics(single))
    assert [float(v) for v in losses(run).values()] == pytest.approx(
        [float(v) for v in losses(single).values()], rel=1e-3
    )
    ours, theirs = (load_tensors(folder / "checkpoints" / "last") for folder in (run, single))
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-3, equal_nan=True)
    assert torch.equal(ours["router.counts"], theirs["router.counts"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_question_is_answered_once_in_the_order_of_the_data(strategy, launched, single):
    answers = rows(launched[strategy] / "answers.jsonl")
    assert len({row["id"] for row in answers}) == len(answers) == 21
    assert_same_answers(answers, rows(single / "answers.jsonl"))
    assert (launched[strategy] / "report.html").is_file()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_process_loads_what_two_have_written(strategy, launched, tmp_path):
    from fulgurite.cli import main

    run = tmp_path / "run"
    shutil.copytree(launched[strategy], run)
    argv = ("--ckpt_path", str(run / "checkpoints" / "last"), "--trainer.devices", "1", "--trainer.strategy", "auto")
    assert main(["test", *argv]) == 0
    (test,) = (run / "evaluations").iterdir()
    assert_same_metrics(metrics(test), {n: v for n, v in metrics(run).items() if n.startswith("test/")})
    assert_same_answers(rows(test / "answers.jsonl"), rows(run / "answers.jsonl"))


def test_resumed_with_dropout_both_processes_draw_the_same(continued):
    states = load_document(continued / "whole" / "checkpoints" / "last", "state")["callbacks"]["RandomStates"]["ranks"]
    assert len(states) == 2
    assert_bitwise(continued / "resumed", continued / "whole", first=5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_resumed_in_the_third_stage_the_run_ends_the_same(strategy, continued, launched):
    assert_bitwise(continued / f"{strategy}-resumed", launched[strategy], first=9)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_predictions_of_two_processes_are_the_answers_of_the_test(strategy, continued):
    (predict,) = (continued / strategy / "evaluations").iterdir()
    predictions, answers = rows(predict / "predictions.jsonl"), rows(continued / strategy / "answers.jsonl")
    assert [p["id"] for p in predictions] == [a["id"] for a in answers]
    assert sum(p["answer"] != a["answers"]["dynamic"] for p, a in zip(predictions, answers)) <= 1
