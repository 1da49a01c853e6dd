"""An option into a list is refused, and what a new class has no option for is named."""

import sys

import pytest
import yaml

PLACES = "[{points: [a], kind: nested_project.Kind}, {points: [b], kind: nested_project.Kind}]"


@pytest.fixture
def nested(cli, project):
    """Show the config of the nested project under more options."""
    (project / "nested.yaml").write_text(
        f"model: {{class_path: nested_project.Model, init_args: {{size: 3, places: {PLACES}}}}}\n"
        "data: {class_path: nested_project.Many, init_args: {size: 8}}\n"
        "trainer: {fast_dev_run: true, accelerator: cpu, logger: false}\n"
    )
    yield lambda *argv: cli("fit", "--config", "nested.yaml", "--allow", "nested_project", *argv)
    sys.modules.pop("nested_project", None)


@pytest.mark.parametrize(
    "option", [["--model.places.kind=toy_project.Net"], ["--model.init_args.places.init_args.points", "[c]"]]
)
def test_an_option_into_the_list_of_a_config_is_refused_with_the_list_to_change(option, nested):
    code, _, err = nested(*option)
    assert code == 2
    assert "model.places is a list of 2 (nested.yaml), and this would change its last entry alone" in err
    assert f"--model.places '{PLACES}'" in err


def test_an_option_into_a_list_of_the_command_line_is_refused(nested):
    code, _, err = nested(f"--model.places={PLACES}", "--model.places.points=[c]")
    assert code == 2
    assert "a list of 2 (command line)" in err


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (["--model.places", "[{points"], "--model.places, line"),
        (["--data.init_args.size=[1,"], "--data.size, line"),
        (["--trainer.callbacks+=[{a"], "--trainer.callbacks, line"),
        (["--trainer", "{a: "], '"trainer"'),
    ],
)
def test_a_list_that_is_no_yaml_is_named_with_its_option(option, name, nested):
    code, _, err = nested(*option)
    assert code == 2
    assert name in err


def test_the_whole_list_and_an_entry_added_by_name_can_be_set(nested):
    argv = ("--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=a")
    code, out, _ = nested("--model.places=[{points: [c], kind: nested_project.Kind}]", *argv, "--print_config")
    assert code == 0
    assert "monitor: a" in out
    assert "- a\n" not in out


def test_settings_that_another_class_does_not_have_are_named_once(nested):
    code, out, err = nested("--model", "toy_project.Net")
    lines = [line for line in (out + err).splitlines() if "left out" in line]
    assert code == 0
    assert lines == [
        "model: toy_project.Net (command line) has no size, places; "
        "what the configs set there for another class is left out"
    ]


def test_a_config_that_changes_the_class_is_named(nested, project):
    (project / "other.yaml").write_text("data: {class_path: toy_project.Data, init_args: {width: 4}}\n")
    _, out, err = nested("--config", "other.yaml", "--model", "toy_project.Net", "--model.width=4")
    assert "left out" in out + err
    assert "data: " not in "".join(line for line in (out + err).splitlines() if "left out" in line)
    code, out, err = nested("--data=toy_project.Data", "--data.batch_size=2")
    assert code == 0
    assert "left out" not in out + err


def test_nothing_is_said_where_the_class_stays(cli):
    code, out, err = cli("fit", "--config", "toy.yaml", "--model", "toy_project.Net", "--trainer.fast_dev_run=true")
    assert code == 0
    assert "left out" not in out + err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('{"class_path": "nested_project.Named", "init_args": {"name": null}}', None),
        (r"{class_path: nested_project.Named, init_args: {name: 'blocks\.\d+'}}", r"blocks\.\d+"),
        (r'{"class_path": "nested_project.Named", "init_args": {"name": "one\u0027s \\d é😀"}}', "one's \\d é😀"),
    ],
)
def test_a_class_two_classes_deep_is_read_as_it_is_written(given, expected, nested):
    code, out, err = nested("--model.part=nested_project.Part", f"--model.part.inner={given}", "--print_config")
    assert code == 0, err
    assert yaml.safe_load(out)["model"]["init_args"]["part"]["init_args"]["inner"]["init_args"]["name"] == expected


def test_a_null_two_classes_deep_is_none(nested):
    argv = ("--model.part=nested_project.Part", "--model.part.inner=nested_project.Named")
    code, out, err = nested(*argv, "--model.part.inner.name=null", "--print_config")
    assert code == 0, err
    assert yaml.safe_load(out)["model"]["init_args"]["part"]["init_args"]["inner"]["init_args"]["name"] is None
