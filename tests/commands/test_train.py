import json
import os
import shutil
import signal
import sys
import warnings

import pytest
import torch
import yaml

from fulgurite.checkpoints import load_document, load_tensors, read_manifest, save_checkpoint_folder, writing


@pytest.fixture
def trained(cli):
    """A finished run in ``run``."""
    assert cli("fit", "--config", "toy.yaml", "--model.lr", "0.123", "--run", "run")[0] == 0
    return "run"


def weights(run):
    return load_tensors(f"{run}/checkpoints/last")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_fit_leaves_a_run_folder_whose_config_repeats_it(cli, project):
    code, _, err = cli("fit", "--config", "toy.yaml")
    assert code == 0
    (run,) = (project / "runs" / "toy").iterdir()
    assert str(run.relative_to(project)) in err
    for name in ("config.yaml", "metrics.json", "metrics.csv", "checkpoints/last/manifest.json"):
        assert (run / name).is_file(), name
    assert list(run.glob("events.out.tfevents*"))
    assert cli("fit", "--config", str(run / "config.yaml"))[0] == 0
    again = next(other for other in run.parent.iterdir() if other != run)
    assert equal(weights(run), weights(again))
    assert json.loads((run / "metrics.json").read_text()) == json.loads((again / "metrics.json").read_text())
    assert (run / "config.yaml").read_text() == (again / "config.yaml").read_text()


def test_configs_merge_left_to_right_and_the_command_line_wins(cli, project):
    (project / "b.yaml").write_text("model: {init_args: {lr: 2, width: 5}}\ndata: {init_args: {width: 5}}\n")
    argv = ("--config", "toy.yaml", "--config", "b.yaml", "--model.lr", "3", "--print_config")
    code, out, _ = cli("fit", *argv)
    printed = yaml.safe_load(out)
    assert code == 0
    assert printed["model"]["init_args"] == {"width": 5, "lr": 3.0, "activation": None, "refuse": False}
    assert printed["trainer"]["max_epochs"] == 1
    assert not (project / "runs").exists()
    (project / "printed.yaml").write_text(out)
    code, again, _ = cli("fit", "--config", "printed.yaml", "--print_config")
    assert (code, again) == (0, out)
    assert cli("fit", "--config", "printed.yaml", "--run", "printed")[0] == 0


def test_a_checkpoint_alone_is_enough_to_evaluate(cli, project, trained):
    code, out, err = cli("test", "--ckpt_path", f"{trained}/checkpoints/last")
    assert code == 0
    assert "checkpoint was made with" not in out + err
    (folder,) = (project / trained / "evaluations").iterdir()
    assert folder.name.startswith("test-")
    assert (folder / "report.html").is_file()
    rows = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    rows[:, 0] = torch.arange(12)
    state = weights(trained)
    loss = (rows @ state["layer.weight"].T + state["layer.bias"]).square().mean().item()
    assert json.loads((folder / "metrics.json").read_text())["test/loss"] == pytest.approx(loss, rel=1e-5)
    assert cli("test", "--config", f"{trained}/config.yaml", "--ckpt_path", trained)[0] == 0


def test_what_the_user_writes_wins_over_the_checkpoint_and_both_are_named(cli, project, trained):
    code, out, err = cli("validate", "--ckpt_path", trained, "--model.lr", "0.5", "--data.init_args.batch_size=2")
    assert code == 0
    lines = [line for line in (out + err).splitlines() if "checkpoint was made with" in line]
    assert lines == [
        "model.init_args.lr: using 0.5 (command line), checkpoint was made with 0.123",
        "data.init_args.batch_size: using 2 (command line), checkpoint was made with 4",
    ]
    (folder,) = (project / trained / "evaluations").iterdir()
    used = yaml.safe_load((folder / "config.yaml").read_text())
    assert used["model"]["init_args"]["lr"] == 0.5
    _, out, err = cli("validate", "--config", "toy.yaml", "--ckpt_path", trained)
    assert "model.init_args.lr: using 0.001 (toy.yaml), checkpoint was made with 0.123" in out + err


def test_predictions_are_written_in_the_order_of_the_data(cli, project, trained):
    assert cli("predict", "--ckpt_path", trained, "--data.batch_size", "5")[0] == 0
    (file,) = (project / trained / "evaluations").glob("predict-*/predictions.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(12))
    assert isinstance(rows[0]["answer"], float)
    with pytest.raises(TypeError, match="list of dicts"):
        cli("predict", "--config", "toy.yaml", "--model", "toy_project.Tuples")


def test_resume_continues_in_the_same_folder_to_the_same_weights(cli, project):
    assert cli("fit", "--config", "toy.yaml", "--trainer.max_epochs", "3", "--run", "whole")[0] == 0
    assert cli("fit", "--config", "toy.yaml")[0] == 0
    (run,) = (project / "runs" / "toy").iterdir()
    assert cli("fit", "--config", "toy.yaml", "--trainer.max_epochs", "3", "--resume", "auto")[0] == 0
    assert [*(project / "runs" / "toy").iterdir()] == [run]
    assert equal(weights(run), weights("whole"))
    steps = [
        [line.split(",")[0] for line in (folder / "metrics.csv").read_text().splitlines()]
        for folder in (project / "whole", run)
    ]
    assert steps[0] == steps[1]


def test_resume_by_path_needs_no_config(cli, project, trained):
    assert cli("fit", "--resume", f"{trained}/checkpoints/last", "--trainer.max_epochs", "2")[0] == 0
    assert yaml.safe_load((project / trained / "config.yaml").read_text())["trainer"]["max_epochs"] == 2
    assert cli("fit", "--run", trained, "--resume", "auto", "--trainer.max_epochs", "3")[0] == 0
    state = json.loads((project / trained / "checkpoints" / "last" / "manifest.json").read_text())
    assert state["facts"]["global_step"] == 9


def test_a_run_is_not_overwritten_by_accident(cli, trained):
    code, _, err = cli("fit", "--config", "toy.yaml", "--run", trained)
    assert code == 2
    assert "--resume auto" in err


def test_a_damaged_newest_checkpoint_is_named_and_an_older_one_taken_on_demand_only(cli, project):
    argv = ("fit", "--config", "toy.yaml", "--checkpoint.save_top_k", "2")
    assert cli(*argv, "--run", "whole", "--trainer.max_epochs", "3")[0] == 0
    assert cli(*argv, "--run", "run", "--trainer.max_epochs", "2")[0] == 0
    (newest,) = (project / "run" / "checkpoints").glob("*step=6")
    for folder in (newest, newest.with_name("last")):
        file = folder / "weights.safetensors"
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    again = ("fit", "--run", "run", "--resume", "auto", "--trainer.max_epochs", "3")
    code, _, err = cli(*again)
    assert code == 2
    for part in ("weights.safetensors", "layer.", "step=3 (step 3)", "--resume_from_older goes on"):
        assert part in err, part
    code, out, err = cli(*again, "--resume-from-older")
    assert code == 0
    assert "step=3 (step 3)" in out + err
    assert equal(weights("run"), weights("whole"))


def test_a_changed_structure_is_rebuilt_trained_on_and_kept(cli, project, trained):
    """A head without a bias, as a step would write it: evaluated, resumed, and loaded in Python."""
    import fulgurite

    folder = project / trained / "checkpoints" / "last"
    manifest, tensors = read_manifest(folder), load_tensors(folder)
    state = load_document(folder, "state")
    del tensors["layer.bias"]
    state["optimizer_states"][0]["param_groups"][0]["params"] = [0]
    changed = {"layer": {"class": "torch.nn.modules.linear.Linear", "arguments": {"in_features": 4, "out_features": 1}}}
    changed["layer"]["arguments"]["bias"] = False
    facts = {"settings": manifest.settings, "facts": manifest.facts, "structure": {"modules": changed}}
    save_checkpoint_folder(folder, {"weights": tensors}, {"state": state}, **facts)
    for other in (project / trained / "checkpoints").glob("epoch*"):
        shutil.rmtree(other)
    assert cli("test", "--ckpt_path", trained)[0] == 0
    assert fulgurite.load(trained, allow=["toy_project"]).layer.bias is None
    assert cli("fit", "--run", trained, "--resume", "auto", "--trainer.max_epochs", "2")[0] == 0
    assert weights(trained).keys() == {"layer.weight"}
    assert read_manifest(folder).structure["modules"] == changed
    assert cli("validate", "--ckpt_path", trained)[0] == 0


def test_a_checkpoint_that_lost_its_manifest_is_not_passed_over(cli, project, trained):
    (project / trained / "checkpoints" / "last" / "manifest.json").unlink()
    code, _, err = cli("fit", "--run", trained, "--resume", "auto", "--trainer.max_epochs", "2")
    assert code == 2
    assert "no manifest.json" in err
    assert "--resume_from_older" in err


def test_a_run_that_another_process_writes_is_refused(cli, project, trained):
    with writing(project / trained):
        code, _, err = cli("fit", "--run", trained, "--resume", "auto", "--trainer.max_epochs", "2")
    assert code == 2
    assert f"process {os.getpid()} on " in err


def test_what_is_not_finite_ends_with_3_or_is_left_out(cli, project):
    code, _, err = cli("fit", "--config", "toy.yaml", "--model", "toy_project.Diverging", "--run", "run")
    assert code == 3
    assert "step 1: not finite" in err
    assert "Traceback" not in err
    argv = ("--model", "toy_project.Diverging", "--non_finite", "skip", "--run", "other", "--trainer.max_steps", "4")
    assert cli("fit", "--config", "toy.yaml", *argv)[0] == 0
    assert all(value.isfinite().all() for value in weights("other").values())


def test_resume_auto_without_a_run_starts_one(cli, project):
    code, out, err = cli("fit", "--config", "toy.yaml", "--resume", "auto", "--experiment", "fresh")
    assert code == 0
    assert "nothing to continue" in out + err
    assert len([*(project / "runs" / "fresh").iterdir()]) == 1


def test_initial_weights_start_a_new_run(cli, project, trained):
    argv = ("--config", "toy.yaml", "--init_from", trained, "--model.lr", "0", "--run", "started")
    assert cli("fit", *argv)[0] == 0
    assert equal(weights("started"), weights(trained))
    code, _, err = cli("fit", "--config", "toy.yaml", "--init_from", trained, "--model.width=5", "--data.width=5")
    assert code == 2
    assert "layer.weight: file (1, 4), module (1, 5)" in err


def test_test_after_fit_adds_its_metrics(cli, project):
    assert cli("fit", "--config", "toy.yaml", "--test_after_fit", "true", "--run", "run")[0] == 0
    metrics = json.loads((project / "run" / "metrics.json").read_text())
    assert metrics.keys() == {"train/loss", "val/loss", "test/loss"}
    assert metrics["test/loss"] == pytest.approx(metrics["val/loss"])


def test_each_figure_is_printed_once_in_this_projects_table(cli, trained):
    for command, name in (("test", "test/loss"), ("validate", "val/loss")):
        code, out, _ = cli(command, "--ckpt_path", trained)
        assert code == 0
        assert out.count(name) == 1
        assert "Metrics" in out


def test_nothing_untrue_is_said_of_folders(cli, project):
    code, out, err = cli("fit", "--config", "toy.yaml", "--test_after_fit", "true", "--run", "run")
    assert code == 0
    assert (out + err).count("run folder: ") == 1
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert cli("test", "--ckpt_path", "run")[0] == 0
        assert cli("fit", "--resume", "run", "--trainer.max_epochs", "2")[0] == 0
    texts = [str(warning.message) for warning in said]
    assert not [text for text in texts if "dirpath has changed" in text or "is not empty" in text]


def test_a_checkpoint_folder_of_something_else_is_still_warned_of(cli, project):
    (project / "full").mkdir()
    (project / "full" / "x").touch()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert cli("fit", "--config", "toy.yaml", "--checkpoint.dirpath", "full")[0] == 0
    assert [warning for warning in said if "is not empty" in str(warning.message)]


def test_no_empty_file_of_hyper_parameters_is_written(cli, project):
    assert cli("fit", "--config", "toy.yaml", "--model", "toy_project.Plain", "--run", "plain")[0] == 0
    assert list((project / "plain").glob("events.out.tfevents*"))
    assert not (project / "plain" / "hparams.yaml").exists()
    assert cli("fit", "--config", "toy.yaml", "--run", "saved")[0] == 0
    assert "lr: 0.001" in (project / "saved" / "hparams.yaml").read_text()


def test_lightnings_flags_keep_their_meaning(cli, project):
    assert cli("fit", "--config", "toy.yaml", "--trainer.fast_dev_run", "true")[0] == 0
    assert not list((project / "runs").rglob("*.json"))
    argv = ("--trainer.max_steps", "2", "--trainer.logger", "false", "--trainer.limit_val_batches", "0")
    assert cli("fit", "--config", "toy.yaml", *argv, "--run", "short")[0] == 0
    files = {file.name for file in (project / "short").iterdir()}
    assert files == {"config.yaml", "digests.json", "metrics.json", "checkpoints"}
    manifest = json.loads((project / "short" / "checkpoints" / "last" / "manifest.json").read_text())
    assert manifest["facts"]["global_step"] == 2
    argv = ("--trainer.enable_checkpointing", "false", "--trainer.default_root_dir", "elsewhere")
    assert cli("fit", "--config", "toy.yaml", *argv)[0] == 0
    assert not list((project / "elsewhere" / "toy").glob("*/checkpoints"))
    assert list((project / "elsewhere" / "toy").glob("*/metrics.json"))


def test_a_users_logger_replaces_the_defaults(cli, project):
    assert cli("fit", "--config", "toy.yaml", "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir=l")[0] == 0
    assert list((project / "l").rglob("metrics.csv"))
    assert not list((project / "runs").rglob("metrics.csv"))


def test_no_module_of_a_family_is_imported_that_no_config_names(cli):
    before = {name for name in ("open_clip", "peft", "timm") if name in sys.modules}
    assert cli("fit", "--config", "toy.yaml", "--trainer.fast_dev_run", "true")[0] == 0
    assert {name for name in ("open_clip", "peft", "timm") if name in sys.modules} == before


def test_allowing_a_prefix_lasts_for_one_call(cli):
    from fulgurite.cli import main

    assert cli("fit", "--config", "toy.yaml", "--print_config")[0] == 0
    assert main(["fit", "--config", "toy.yaml", "--print_config"]) == 2


def test_ctrl_c_gives_130(cli):
    before = signal.getsignal(signal.SIGINT)
    try:
        code, _, err = cli("fit", "--config", "toy.yaml", "--model", "toy_project.Interrupted")
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning has told it to be ignored
    assert code == 130
    assert "Traceback" not in err


def test_sigterm_in_an_evaluation_gives_143(cli, trained):
    argv = ("--model", "toy_project.Terminated", "--ckpt_path", trained)
    assert cli("test", "--config", "toy.yaml", *argv)[0] == 143


def test_sigterm_in_fit_saves_where_it_is_and_resumes_there(cli, project):
    argv = ("--model", "toy_project.Terminated", "--model.at_step", "1", "--run", "run")
    assert cli("fit", "--config", "toy.yaml", "--test_after_fit", "true", *argv)[0] == 143
    manifest = json.loads((project / "run" / "checkpoints" / "last" / "manifest.json").read_text())
    assert manifest["facts"]["global_step"] == 2
    assert not (project / "run" / "metrics.json").exists()
    assert cli("fit", "--resume", "run", "--model.at_step=-1", "--test_after_fit=false")[0] == 0
    manifest = json.loads((project / "run" / "checkpoints" / "last" / "manifest.json").read_text())
    assert manifest["facts"]["global_step"] == 3


def left(project):
    return [path for path in project.rglob("*") if path.is_file() and path.suffix not in (".pyc", ".py")]


def test_a_fit_that_fails_before_its_first_step_leaves_no_folder(cli, project):
    with pytest.raises(RuntimeError):
        cli("fit", "--config", "toy.yaml", "--model", "toy_project.Broken")
    assert left(project) == [project / "toy.yaml"]
    assert not list((project / "runs").glob("*/*"))
    (project / "mine").mkdir()
    (project / "mine" / "note.txt").write_text("kept")
    with pytest.raises(RuntimeError):
        cli("fit", "--config", "toy.yaml", "--model", "toy_project.Broken", "--run", "mine")
    assert sorted(left(project)) == [project / "mine" / "note.txt", project / "toy.yaml"]


def test_a_fit_that_fails_later_keeps_its_folder(cli, project, trained):
    with pytest.raises(RuntimeError):
        cli("fit", "--config", "toy.yaml", "--model=toy_project.Broken", "--model.at_step=1", "--run=late")
    assert (project / "late" / "config.yaml").is_file()
    before = sorted(left(project / trained))
    with pytest.raises(RuntimeError):
        cli("fit", "--resume", trained, "--model=toy_project.Broken", "--trainer.max_epochs=2")
    assert {file.name for file in left(project / trained)} >= {file.name for file in before}


def test_a_test_that_fails_leaves_no_folder(cli, project, trained):
    with pytest.raises(RuntimeError):
        cli("test", "--ckpt_path", trained, "--model", "toy_project.Broken")
    assert not (project / trained / "evaluations").exists()
