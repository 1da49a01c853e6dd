import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fulgurite import __version__
from fulgurite.cli import COMMANDS, main

ROOT = Path(importlib.import_module("fulgurite").__file__).parent
TOYS = ROOT / "tests" / "commands"


def test_the_commands_are_these():
    assert list(COMMANDS) == [
        "fit",
        "validate",
        "test",
        "predict",
        "index",
        "search",
        "features",
        "data",
        "statistics",
        "merge",
        "prune",
        "quantize",
        "export",
        "verify",
        "inspect",
    ]


@pytest.mark.parametrize("argv", [["--help"], ["-h"], []])
def test_help_names_every_command_and_exit_code(argv, capsys):
    assert main(argv) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {command} " in text for command in COMMANDS)
    assert all(f"\n  {code} " in text for code in (0, 1, 2, 3, 130, 138, 143))


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fulgurite {__version__}\n"


def test_an_unknown_command_is_answered_with_the_nearest(capsys):
    assert main(["tset"]) == 2
    assert "did you mean test" in capsys.readouterr().err


def test_every_command_can_be_imported_and_runs_by_name():
    assert all(callable(importlib.import_module(module).run) for module, _ in COMMANDS.values())


def test_the_script_answers_without_torch_and_without_short_package_names():
    code = (
        "import sys, runpy; sys.argv = ['cli.py', '--help']\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "try: runpy.run_path(sys.path[0] + '/cli.py', run_name='__main__')\n"
        "except SystemExit as end: print(end.code)\n"
        "heavy = [m for m in ('torch', 'numpy', 'yaml', 'lightning') if m in sys.modules]\n"
        f"print(heavy, {str(ROOT)!r} in sys.path)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-2:] == ["0", "[] False"]
    console = subprocess.run([Path(sys.executable).parent / "fulgurite", "--help"], capture_output=True, text=True)
    assert console.stdout == out[: len(console.stdout)]
    assert console.returncode == 0


def test_a_process_ended_by_sigterm_says_143_and_leaves_a_checkpoint(tmp_path):
    (tmp_path / "toy.yaml").write_text(
        "model: toy_project.Slow\ndata: {class_path: toy_project.Data, init_args: {size: 400}}\n"
        "trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false}\n"
    )
    argv = ["fit", "--config", "toy.yaml", "--run", "run", "--allow", "toy_project"]
    with subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *argv],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TOYS)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        next(line for line in process.stdout if line == "step 2\n")
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 143
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "last" / "manifest.json").read_text())
    assert manifest["facts"]["global_step"] in (3, 4)


def test_two_processes_write_one_folder_in_the_order_of_the_data(tmp_path):
    argv = ["predict", "--model", "toy_project.Net", "--data", "toy_project.Data", "--data.batch_size", "2"]
    devices = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    subprocess.run(
        [sys.executable, str(ROOT / "cli.py"), *argv, *devices, "--allow", "toy_project", "--experiment", "two"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(TOYS)},
        check=True,
        capture_output=True,
        timeout=120,
    )
    (folder,) = (tmp_path / "runs" / "two" / "evaluations").iterdir()
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(12))
