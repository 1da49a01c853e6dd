"""Which run and checkpoint a command takes: what is named is used, or refused."""

import shutil

import pytest
import torch

from fulgurite.checkpoints import load_tensors
from fulgurite.commands.errors import ConfigError
from fulgurite.commands.invocation import Invocation
from fulgurite.commands.runs import newest_run


@pytest.fixture
def runs(cli, project):
    """Two finished runs ``a`` and ``b`` of different weights."""
    for name, rate in (("a", "0.1"), ("b", "0.2")):
        assert cli("fit", "--config", "toy.yaml", "--model.lr", rate, "--run", name)[0] == 0
    return project


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
@pytest.mark.parametrize(
    "option", [["--run", "a"], ["--resume=a"], ["--init_from", "a"], ["--init-from", "a"], ["--resume", "auto"]]
)
def test_only_fit_takes_weights_from_its_own_options(cli, project, command, option):
    code, _, err = cli(command, "--config", "toy.yaml", *option)
    assert code == 2
    assert f"an option of fit; give {command} the run or checkpoint as --ckpt_path" in err
    assert not (project / "runs").exists()


def test_a_config_may_say_what_fit_was_told_where_the_checkpoint_is_named(cli, runs):
    argv = ("--config", "toy.yaml", "--init_from", "a", "--run", "c")
    assert cli("fit", *argv)[0] == 0
    assert cli("test", "--ckpt_path", "c")[0] == 0
    assert cli("test", "--config", "c/config.yaml", "--ckpt_path", "c")[0] == 0
    (runs / "mine.yaml").write_text((runs / "toy.yaml").read_text() + "run: c\nresume: auto\n")
    assert cli("test", "--config", "mine.yaml", "--ckpt_path", "c")[0] == 0
    code, _, err = cli("test", "--config", "mine.yaml")
    assert code == 2
    assert "as --ckpt_path" in err


@pytest.mark.parametrize(
    "option",
    [["--ckpt_path", "a"], ["--ckpt_path", "a/checkpoints/last"], ["--resume", "a"], ["--resume=a/checkpoints/last"]],
)
def test_a_run_is_not_continued_in_the_folder_of_another(cli, runs, option):
    before = contents(runs / "b")
    code, _, err = cli("fit", *option, "--run", "b", "--trainer.max_epochs", "2")
    assert code == 2
    assert "--run b: holds a run already, and not that of a/checkpoints/last" in err
    assert contents(runs / "b") == before
    assert cli("fit", *option, "--run", "c", "--trainer.max_epochs", "2")[0] == 0
    assert cli("fit", *option, "--run", str(runs / "a"), "--trainer.max_epochs", "2")[0] == 0


def test_a_run_without_a_checkpoint_cannot_be_resumed_by_name(cli, runs):
    shutil.rmtree(runs / "a" / "checkpoints")
    (runs / "a" / "checkpoints").mkdir()
    code, _, err = cli("fit", "--config", "toy.yaml", "--resume", "a")
    assert code == 2
    assert "--resume a: has no manifest.json" in err
    assert not (runs / "runs").exists()


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
@pytest.mark.parametrize("word", ["best", "last", "hparams", "registry"])
def test_words_of_lightning_are_refused(cli, project, command, word):
    code, _, err = cli(command, "--config", "toy.yaml", "--ckpt_path", word)
    assert code == 2
    assert f"--ckpt_path {word}: expected a checkpoint folder" in err
    assert ("--resume auto" in err) == (command == "fit")
    assert not (project / "runs").exists()


def test_a_checkpoint_folder_that_is_called_as_one_of_them_is_read(cli, runs):
    shutil.copytree(runs / "a" / "checkpoints" / "last", runs / "last")
    for named in ("last", "./last"):
        code, _, err = cli("predict", "--config", "toy.yaml", "--ckpt_path", named, "--experiment", "evaluated")
        assert code == 0
        assert "no last checkpoint" not in err
    state, rows = load_tensors(runs / "last"), torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    rows[:, 0] = torch.arange(12)
    expected = (rows @ state["layer.weight"].T + state["layer.bias"])[1].item()
    files = list((runs / "runs" / "evaluated").rglob("predictions.jsonl"))
    assert len(files) == 2
    assert all(f"{expected:.4f}" in file.read_text() for file in files)


def test_the_newest_run_is_that_of_the_highest_number_in_its_second(tmp_path):
    second = "2025-01-02_03-04-05"
    names = (second, f"{second}-2", f"{second}-10", f"{second}-9", "2025-01-02_03-04-04-11")
    for name in names:
        (tmp_path / name / "checkpoints" / "last").mkdir(parents=True)
        (tmp_path / name / "checkpoints" / "last" / "manifest.json").write_text("damaged, and still a checkpoint")
    assert newest_run(tmp_path).name == f"{second}-10"


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], False),
        (["--resume_from_older"], True),
        (["--resume-from-older"], True),
        (["--resume_from_older", "true", "--run", "x"], True),
        (["--resume_from_older", "--run", "x"], True),
        (["--resume-from-older=false"], False),
        (["--config", "older.yaml"], True),
        (["--config", "older.yaml", "--resume_from_older", "False"], False),
    ],
    ids=str,
)
def test_a_flag_is_read_from_the_command_line_and_from_configs(project, argv, expected):
    (project / "older.yaml").write_text("resume_from_older: true\n")
    assert Invocation.of("fit", argv).flag("resume_from_older") is expected


def test_a_flag_of_another_value_is_refused(project):
    (project / "older.yaml").write_text("resume_from_older: often\n")
    for argv, where in ((["--config", "older.yaml"], "older.yaml"), (["--resume_from_older", "often"], "command line")):
        with pytest.raises(ConfigError, match=rf"resume_from_older: expected true or false, got 'often' \({where}\)"):
            Invocation.of("fit", argv).flag("resume_from_older")


def test_hyphens_are_read_as_underscores_but_in_names_with_dots(project):
    argv = ["--test-after-fit", "--model.some-key", "a-b", "--non-finite=skip-it"]
    typed = ["--test_after_fit=true", "--model.some-key", "a-b", "--non_finite=skip-it"]
    assert list(Invocation.of("fit", argv).typed) == typed
