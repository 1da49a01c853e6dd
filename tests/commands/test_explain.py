"""Every wrong config gives code 2 and one short message without traceback or usage."""

import sys

import pytest

WRONG = {
    "unknown argument": (["--model.lrr", "3"], ["model.lrr", "'3'", "did you mean lr?", "command line"]),
    "unknown argument in full": (["--model.init_args.lrr", "3"], ["model.lrr", "did you mean lr?"]),
    "wrong type": (["--data.batch_size", "many"], ["data.batch_size", "int", "'many'"]),
    "wrong trainer value": (["--trainer.max_epochs", "x"], ["trainer.max_epochs", "int", "'x'"]),
    "wrong choice": (["--trainer.precision", "bf61-mixed"], ["one of", "did you mean bf16-mixed"]),
    "unknown trainer option": (["--trainer.max_epoch", "3"], ["did you mean trainer.max_epochs"]),
    "unknown group": (["--trainr.max_epochs", "3"], ["trainr.max_epochs", "trainer.max_epochs"]),
    "unknown class": (["--model", "ContinualVidoQA"], ["model", "did you mean ContinualVideoQA"]),
    "unknown Lightning class": (
        ["--trainer.callbacks", "[{class_path: EarlyStoping}]"],
        ["trainer.callbacks", "did you mean EarlyStopping"],
    ),
    "no such class in a module": (
        ["--model", "toy_project.Nett"],
        ["toy_project", "'Nett'", "did you mean Net"],
    ),
    "not a module": (["--model", "toy_project.Data"], ["toy_project.Data", "LightningModule"]),
    "foreign class": (["--model", "subprocess.Popen"], ["subprocess.Popen", "not allowed", "--allow"]),
    "foreign callable": (["--model.activation", "os.system"], ["os.system", "not allowed"]),
    "all of torch": (["--model.activation", "torch.hub.load"], ["torch.hub.load", "not allowed"]),
    "foreign callback": (["--trainer.callbacks", "[{class_path: subprocess.Popen}]"], ["subprocess.Popen"]),
    "constructor": (["--model.refuse", "true"], ["refuse=True is refused"]),
    "strategy": (["--trainer.strategy", "nowhere"], ["nowhere"]),
    "bad name": (["--experiment", "../up"], ["../up"]),
    "no checkpoint": (["--resume", "nowhere"], ["nowhere", "does not exist"]),
    "two to continue": (["--resume", "auto", "--ckpt_path", "x"], ["--resume", "--ckpt_path"]),
    "allow": (["--allow", "no-package"], ["no-package"]),
    "no config": (["--config", "missing.yaml"], ["missing.yaml"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name, cli, project):
    argv, parts = WRONG[name]
    code, _, err = cli("fit", "--config", "toy.yaml", *argv)
    message = err[err.index("fulgurite fit:") :]
    assert code == 2
    assert all(part in message for part in parts), message
    assert len(message.encode()) < 2000
    assert "Traceback" not in err
    assert "usage:" not in err
    assert not list((project / "runs").glob("*/*"))


def test_wrong_keys_in_a_config_name_the_file(cli, project):
    (project / "wrong.yaml").write_text("model: {init_args: {widht: 4}}\n")
    code, _, err = cli("fit", "--config", "toy.yaml", "--config", "wrong.yaml")
    assert code == 2
    assert "model.widht: toy_project.Net has no option 'widht' = '4' (wrong.yaml); did you mean width?" in err


def test_a_large_wrong_value_is_cut(cli, project):
    (project / "wrong.yaml").write_text(f"model: {{init_args: {{width: [{', '.join(['1'] * 30_000)}]}}}}\n")
    code, _, err = cli("fit", "--config", "toy.yaml", "--config", "wrong.yaml")
    assert code == 2
    assert "model.width" in err
    assert len(err.encode()) < 2000


def test_missing_model_and_data(cli):
    code, _, err = cli("fit")
    assert code == 2
    assert "data and model: required" in err


@pytest.mark.parametrize("place", ["--model", "--trainer.callbacks+", "--model.activation", "--data"])
def test_a_foreign_module_is_refused_before_its_import(place, cli, project, monkeypatch):
    monkeypatch.delitem(sys.modules, "marker", raising=False)
    (project / "marker.py").write_text("open('imported', 'w').close()\nclass X: ...\n")
    code, _, err = cli("fit", "--config", "toy.yaml", f"{place}=marker.X")
    assert code == 2
    assert "not allowed" in err
    assert not (project / "imported").exists()
    assert cli("fit", "--config", "toy.yaml", f"{place}=marker.X", "--allow", "marker")[0] == 2
    assert (project / "imported").exists()  # the marker would have shown an import
