"""A user's own callback of one of this project's classes takes the place of ours."""

import json

import pytest

OWN = {
    "RandomStates": "RandomStates",
    "AccumulatedGradients": "AccumulatedGradients",
    "Interruption": "Interruption",
    "RanksAgree": "RanksAgree",
    "FiniteCheck": "{class_path: FiniteCheck, init_args: {action: skip, patience: 3}}",
    "Report": "{class_path: Report, init_args: {title: mine}}",
    "AdapterFolders": "AdapterFolders",
    "ParameterReport": "ParameterReport",
}


@pytest.fixture
def callbacks(monkeypatch):
    """The callbacks of the last Trainer that was made."""
    from fulgurite.commands.train_cli import TrainCLI

    made, build = [], TrainCLI._instantiate_trainer
    monkeypatch.setattr(
        TrainCLI,
        "_instantiate_trainer",
        lambda self, *a: (t := build(self, *a), made.clear(), made.extend(t.callbacks))[0],
    )
    return made


@pytest.mark.parametrize("name", OWN)
def test_there_is_one_of_each_class_whoever_gives_it(cli, callbacks, name):
    assert cli("fit", "--config", "toy.yaml", f"--trainer.callbacks=[{OWN[name]}]", "--run", "run")[0] == 0
    names = [type(c).__name__ for c in callbacks]
    assert {each: names.count(each) for each in (*OWN, "RunFolder")} == dict.fromkeys((*OWN, "RunFolder"), 1)
    (agree,) = (c for c in callbacks if type(c).__name__ == "RanksAgree")
    assert "max_epochs: 1" in agree.config
    assert cli("fit", "--resume", "run", "--trainer.max_epochs", "2")[0] == 0
    assert cli("test", "--ckpt_path", "run")[0] == 0
    assert [type(c).__name__ for c in callbacks].count("Report") == 1


def test_the_users_check_holds_and_an_option_typed_in_vain_is_named(cli, project, callbacks):
    argv = ("--config", "toy.yaml", "--model", "toy_project.Diverging", f"--trainer.callbacks=[{OWN['FiniteCheck']}]")
    code, out, err = cli("fit", *argv, "--run", "run")
    assert code == 0
    assert "not used" not in out + err
    code, out, err = cli("fit", *argv, "--non_finite", "stop", "--run", "other")
    assert code == 0
    assert (out + err).count("--non_finite stop: not used, trainer.callbacks has a FiniteCheck") == 1
    (check,) = (c for c in callbacks if type(c).__name__ == "FiniteCheck")
    assert (check.action, check.patience) == ("skip", 3)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ("[FiniteCheck, FiniteCheck]", "FiniteCheck is there more than once"),
        ("[Interruption, Interruption]", "Interruption is there more than once"),
        ("[{class_path: RunFolder, init_args: {path: x, config: ''}}]", "RunFolder is always there"),
    ],
)
def test_what_cannot_be_is_one_message_and_leaves_no_folder(cli, project, given, part):
    code, _, err = cli("fit", "--config", "toy.yaml", f"--trainer.callbacks={given}")
    assert code == 2
    assert f"trainer.callbacks: {part}" in err
    assert not (project / "runs").exists()


def test_weights_of_nowhere_leave_no_folder(cli, project):
    code, _, err = cli("fit", "--config", "toy.yaml", "--init_from", "nowhere")
    assert code == 2
    assert "--init_from nowhere: does not exist" in err
    assert not (project / "runs").exists()


def test_a_users_report_has_the_users_title(cli, project):
    argv = ("--config", "toy.yaml", f"--trainer.callbacks=[{OWN['Report']}]", "--run", "run", "--test_after_fit")
    assert cli("fit", *argv)[0] == 0
    assert "<title>mine" in (project / "run" / "report.html").read_text()
    assert json.loads((project / "run" / "metrics.json").read_text()).keys() >= {"test/loss"}
