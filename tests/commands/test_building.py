"""What a constructor refuses is one short message with option and value; a slip keeps its traceback."""

import shutil
import sys

import pytest

KINDS = "[{points: [a], kind: nested_project.Kind}, {points: [b], kind: {class_path: nested_project.Kind, %s}}]"

REFUSED = {
    "module": (
        ["--model.size=0"],
        "model.size = 0 (command line), refused by Model: size=0 must be at least 1",
    ),
    "in a union": (
        ["--model.part=nested_project.Part", "--model.part.size=-2"],
        "model.part.size = -2 (command line), refused by Part: size=-2 must be at least 1",
    ),
    "two deep": (
        [
            "--model.part=nested_project.Part",
            "--model.part.inner={class_path: nested_project.Part, init_args: {size: 0}}",
        ],
        "model.part.inner.size = 0 (command line), refused by Part: size=0 must be at least 1",
    ),
    "callable in a list": (
        ["--model.places=" + KINDS % "init_args: {rank: 0}"],
        "model.places[1].kind.rank = 0 (command line), refused by Kind: no such rank",
    ),
    "data": (
        ["--data.size=0"],
        "data.size = 0 (command line), refused by Many: data.size=0 must be at least 1",
    ),
    "list of the data": (
        ["--data.parts=[{class_path: nested_project.Part}, {class_path: nested_project.Part, init_args: {size: 0}}]"],
        "data.parts[1].size = 0 (command line), refused by Part: size=0 must be at least 1",
    ),
    "callback": (
        ["--trainer.callbacks=[nested_project.Told, {class_path: nested_project.Told, init_args: {size: 0}}]"],
        "trainer.callbacks[1], refused by Told: it is too small",
    ),
    "lookup": (
        ["--model.part=nested_project.Table", "--model.part.name=b"],
        "model.part.name = 'b' (command line), refused by Table: b",
    ),
    "checkpoint": (
        ["--checkpoint.save_top_k=-5"],
        "checkpoint.save_top_k = -5 (command line), refused by PublishedCheckpoint: Invalid value for save_top_k=-5.",
    ),
    "trainer": (
        ["--trainer.limit_train_batches=-3"],
        "trainer, refused by Trainer: You have passed invalid value -3 for limit",
    ),
}


@pytest.fixture
def nested(cli, project):
    """Fit the nested project with more options."""
    (project / "nested.yaml").write_text(
        "model: {class_path: nested_project.Model, init_args: {size: 3}}\n"
        "data: {class_path: nested_project.Many}\n"
        "trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false}\n"
    )
    yield lambda *argv: cli("fit", "--config", "nested.yaml", "--allow", "nested_project", *argv)
    sys.modules.pop("nested_project", None)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_value_is_one_message_with_its_option(name, nested, project):
    argv, expected = REFUSED[name]
    code, _, err = nested(*argv)
    message = err[err.index("fulgurite fit: ") :]
    assert code == 2
    assert message.startswith(f"fulgurite fit: {expected}"), message
    assert len(message.encode()) < 2000
    assert "Union" not in message
    assert "Traceback" not in err
    assert not list((project / "runs").glob("*/*"))


def test_a_refused_value_of_a_config_names_the_file(nested, project):
    (project / "small.yaml").write_text("model: {init_args: {size: 0}}\n")
    assert "model.size = 0 (small.yaml), refused by Model" in nested("--config", "small.yaml")[2]


@pytest.mark.parametrize("depth", ["model.part", "data.parts[0]"])
def test_a_slip_in_a_constructor_is_raised_as_it_is(depth, nested):
    part = "{class_path: nested_project.Table, init_args: {size: 2}}"
    option = f"--{depth}={part}" if "[" not in depth else f"--data.parts=[{part}]"
    with pytest.raises(TypeError, match="unsupported operand") as caught:
        nested(option)
    assert caught.traceback[-1].name == "__init__"


def test_an_optimizer_that_refuses_its_rate_when_the_fit_begins(cli, stream_config, project):
    code, _, err = cli("fit", "--config", str(stream_config), "--model.optimizer.lr=-1")
    assert code == 2
    assert "model.optimizer.lr = -1.0 (command line), refused by AdamW: Invalid learning rate: -1.0" in err
    assert not list((project / "runs").glob("*/*"))


OURS = {
    "backbone": (
        ["--model.backbone.num_frames=0"],
        "model.backbone.num_frames = 0 (command line), refused by PrefixEncoder: ",
    ),
    "batch": (["--data.batch_size=0"], "data.batch_size = 0 (command line), refused by ContinualDataModule: "),
    "router": (
        ["--model.second_router.temperature=0"],
        "model.second_router.temperature = 0.0 (command line), refused by CentroidRouter: ",
    ),
    "rank": (
        ["--model.adapters=[{points: [attention_output], kind: {class_path: LoRA, init_args: {rank: 0}}}]"],
        "model.adapters[0].kind.rank = 0 (command line), refused by LoRA: rank=0 must be at least 1",
    ),
    "reduction": (
        ["--model.adapters=[{points: [attention_output], kind: {class_path: Bottleneck, init_args: {reduction: 99}}}]"],
        "model.adapters[0].kind.reduction = 99 (command line), refused by Bottleneck: ",
    ),
    "point": (["--model.adapters=[{points: [nowhere], kind: LoRA}]"], "model, refused by ContinualVideoQA: "),
    "groups": (
        ["--model.param_groups=[{pattern: nope, lr: 1}]"],
        "model.init_args.param_groups: pattern 'nope' matches none",
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_the_packages_own_classes_are_told_alike(name, cli, stream_config, project):
    argv, expected = OURS[name]
    code, _, err = cli("fit", "--config", str(stream_config), *argv)
    message = err[err.index("fulgurite fit: ") :]
    assert code == 2
    assert message.startswith(f"fulgurite fit: {expected}"), message
    assert len(message.encode()) < 2000
    assert not list((project / "runs").glob("*/*"))


LATE = {
    "stage name": (
        "[{class_path: JsonlDataModule, init_args: {root: %s, domain: live}}]",
        "stage names must differ and not be initial or live",
    ),
    "no training file": (
        "[{class_path: JsonlDataModule, init_args: {root: %s, domain: red, train: null, vocabulary: v.json}}]",
        "no samples to fit with",
    ),
    "missing folder": ("[{class_path: JsonlDataModule, init_args: {root: %s/gone}}]", "no such folder"),
}


@pytest.mark.parametrize("name", LATE)
def test_what_the_data_refuse_at_set_up_leaves_one_message_and_no_folder(
    name, cli, stream_config, stream_folder, project
):
    shutil.copytree(stream_folder / "red", project / "red")
    (project / "red" / "v.json").write_text('["yes"]')
    domains, expected = LATE[name]
    code, _, err = cli("fit", "--config", str(stream_config), f"--data.domains={domains % (project / 'red')}")
    message = err[err.index("fulgurite fit: ") :]
    assert code == 2
    assert expected in message
    assert "Traceback" not in err
    assert "TrainerFn" not in err
    assert not list((project / "runs").glob("*/*"))


def test_settings_that_lightning_refuses_late_are_one_message(cli, project):
    code, _, err = cli("fit", "--config", "toy.yaml", "--checkpoint.monitor=nowhere")
    assert code == 2
    assert "monitor='nowhere'" in err[err.index("fulgurite fit: ") :]
    assert "Traceback" not in err


@pytest.mark.parametrize("how", ["slip", "own", "package", "package slip"])
def test_what_fails_at_set_up_is_bad_input_only_where_the_package_refuses_it(how, nested):
    argv = ("--model", "nested_project.Late", f"--model.how={how}", "--data", "toy_project.Data")
    if how == "package":
        code, _, err = nested(*argv)
        assert code == 2
        assert "pattern 'nope' matches none of the trained tensors" in err
        assert "Traceback" not in err
    else:
        with pytest.raises((ValueError, KeyError)):
            nested(*argv)
