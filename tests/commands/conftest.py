import logging
import sys
from pathlib import Path

import pytest

TOYS = Path(__file__).parent

CONFIG = """\
model: {class_path: toy_project.Net, init_args: {lr: 1e-3}}
data: {class_path: toy_project.Data}
trainer: {max_epochs: 1, accelerator: cpu, enable_progress_bar: false, log_every_n_steps: 1}
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working folder with toy.yaml, and the toy project on the import path."""
    monkeypatch.syspath_prepend(str(TOYS))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(CONFIG)
    yield tmp_path
    sys.modules.pop("toy_project", None)


@pytest.fixture
def cli(project, capfd, caplog, monkeypatch):
    """Run a command in this process; gives (exit code, stdout, stderr with the log)."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        # Their handlers keep the stream of the test that imported Lightning, which is closed by now.
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    caplog.set_level(logging.INFO, "lightning.pytorch.utilities.rank_zero")
    from fulgurite.cli import main

    def run(command, *argv):
        allow = ("--allow", "toy_project") if command in ("fit", "validate", "test", "predict") else ()
        caplog.clear()
        code = main([command, *argv, *allow])
        out, err = capfd.readouterr()
        return code, out, "\n".join([*caplog.messages, err])

    return run
