"""A trained stream on a user's own folder: questions without answers, unknown answers, new domains."""

import json
import shutil

import pytest
import torch

from fulgurite.checkpoints import load_tensors, newest_checkpoint, read_manifest
from fulgurite.datamodules.worlds import clips_folder

OWN = "--data.class_path=JsonlDataModule"


def facts(run):
    return read_manifest(newest_checkpoint(run)).facts


def evaluation(run, command):
    (folder,) = run.glob(f"evaluations/{command}-*")
    return folder


@pytest.fixture
def run(worlds_run, tmp_path):
    """The trained run under a path of its own, so that evaluations of other tests do not mix."""
    return shutil.copytree(worlds_run, tmp_path / "run", ignore=shutil.ignore_patterns("evaluations"))


def test_prediction_needs_no_answers_and_tells_the_mixing(command, run, own_root):
    argv = (OWN, f"--data.root={own_root}", "--data.predict=questions.jsonl")
    assert command("predict", "--ckpt_path", run, *argv) == 0
    rows = [json.loads(line) for line in (evaluation(run, "predict") / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["1", "2", "3"]
    known = set(facts(run)["info"]["answers"])
    for row in rows:
        assert row["answer"] == row["top"][0]["answer"]
        assert row["probability"] == max(best["probability"] for best in row["top"])
        assert {best["answer"] for best in row["top"]} <= known
        assert row["weights"].keys() <= {"grid", "doom"}
        assert sum(row["weights"].values()) == pytest.approx(1, abs=1e-5)


def test_unknown_answers_are_wrong_and_unknown_domains_have_a_column(command, run, own_root, tmp_path, caplog):
    known = facts(run)["info"]["answers"]
    rows = [
        {"id": str(i), "video": str(own_root / f"{i % 3}.mp4"), "question": "What moves?", "answer": answer}
        for i, answer in enumerate(["no such answer", known[0], "nor this one", *known[:2]])
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    caplog.set_level("INFO", "lightning.pytorch.utilities.rank_zero")
    argv = (OWN, f"--data.root={tmp_path}", "--data.test=test.jsonl", "--data.domain=mine", "--model.mode=last")
    assert command("test", "--ckpt_path", run, *argv, "--trainer.limit_test_batches=null") == 0
    (line,) = [m for m in caplog.messages if "count as wrong" in m]
    assert line.startswith(f"2 of 5 test questions have no answer among the {len(known)}")
    folder = evaluation(run, "test")
    metrics = json.loads((folder / "metrics.json").read_text())
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    right = sum(row["answers"]["last"] in row["gold"] for row in answers) / 5
    assert metrics["test/accuracy"] == metrics["test/last/accuracy/mine"] == pytest.approx(right)
    assert metrics["test/last/unseen"] == pytest.approx(right)
    assert not [name for name in metrics if name.endswith(("grid", "doom", "average"))]
    assert "mine" in (folder / "report.html").read_text()


def test_known_domains_keep_their_numbers_beside_unknown_ones(command, run, own_root, tmp_path):
    """Accuracy on a trained world is the same with and without a new domain in the data."""
    everything = ("--trainer.limit_test_batches=null", "--data.eval_batch_size=64", "--model.modes=[dynamic]")
    assert command("test", "--ckpt_path", run, "--data.worlds=[grid]", *everything) == 0
    alone = json.loads((evaluation(run, "test") / "metrics.json").read_text())
    grid = clips_folder() / "grid"
    parts = [
        {"class_path": "JsonlDataModule", "init_args": {"root": str(root), "domain": name, "test": "test.jsonl"}}
        for name, root in (("mine", own_root), ("grid", grid))
    ]
    stream = {"class_path": "ContinualDataModule", "init_args": {"domains": parts, "epochs_per_domain": 1}}
    (tmp_path / "both.yaml").write_text(json.dumps({"data": stream}))
    argv = ("--config", run / "config.yaml", "--config", tmp_path / "both.yaml")
    other = tmp_path / "other"
    assert command("test", *argv, "--ckpt_path", run, "--runs", other, *everything) == 0
    both = json.loads(max(run.glob("evaluations/test-*/metrics.json"), key=lambda p: p.stat().st_mtime_ns).read_text())
    assert both["test/dynamic/accuracy/grid"] == alone["test/dynamic/accuracy/grid"]
    assert both["test/dynamic/unseen"] == both["test/dynamic/accuracy/mine"]


def test_evaluating_without_answers_or_checkpoint_is_one_error(command, configs, own_root, tmp_path, capfd):
    argv = ("--config", configs / "own_videos.yaml", "--config", configs / "tiny" / "prefix_encoder.yaml")
    own = (f"--data.root={own_root}", "--data.train=null", "--data.val=null", "--runs", tmp_path)
    for name in ("test", "predict"):
        assert command(name, *argv, *own) == 2
        assert "has no answers to choose from: give the checkpoint" in capfd.readouterr().err


def test_a_fit_on_own_videos_needs_an_end(command, configs, own_root, tmp_path, capfd):
    argv = ("--config", configs / "own_videos.yaml", "--config", configs / "tiny" / "prefix_encoder.yaml")
    own = (f"--data.root={own_root}", "--runs", tmp_path)
    for value in ("null", "-1"):
        assert command("fit", *argv, *own, f"--trainer.max_epochs={value}") == 2
        assert "set trainer.max_epochs or trainer.max_steps" in capfd.readouterr().err
    run = tmp_path / "run"
    steps = ("--trainer.max_epochs=null", "--trainer.max_steps=5", "--run", run)
    assert command("fit", *argv, *own, *steps) == 0
    assert facts(run)["global_step"] == 5
    assert facts(run)["stages"][0]["epochs"] == 3  # of two steps each


def test_a_new_stream_starts_from_a_trained_one(command, configs, run, own_root, tmp_path):
    parts = [
        {
            "class_path": "JsonlDataModule",
            "init_args": {"root": str(own_root), "domain": name, "train": "train.jsonl", "test": "test.jsonl"},
        }
        for name in ("one", "two")
    ]
    stream = {"class_path": "ContinualDataModule", "init_args": {"domains": parts, "epochs_per_domain": 1}}
    base = [str(configs / "quickstart.yaml"), str(configs / "tiny" / "prefix_encoder.yaml")]
    document = {"data": stream}
    (tmp_path / "other.yaml").write_text(json.dumps(document))
    argv = [part for path in (*base, tmp_path / "other.yaml") for part in ("--config", path)]
    started = tmp_path / "started"
    frozen = ("--model.optimizer.lr=0.0", "--init_from", run, "--run", started)
    assert command("fit", *argv, *frozen) == 0
    before, after = load_tensors(newest_checkpoint(run)), load_tensors(newest_checkpoint(started))
    assert facts(started)["info"]["domains"] == ("one", "two")
    trained = [name for name in before if name.startswith("bank.sets.live.")]
    assert trained
    for name in trained:
        for target in ("live", "initial", "one", "two"):
            assert torch.equal(after[name.replace(".live.", f".{target}.")], before[name])
