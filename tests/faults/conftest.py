"""The table of faults: what was done to runs and checkpoints, and what was left of them.

A test takes `tally` and says how many faults it injected, and how many were survived (a good version is left) or
detected (a typed error that names the place). Other tests that inject faults are listed in `ROWS`: each counts as one.
`make test-faults` runs them all and prints the table.
"""

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ATOMIC, STORE, FINITE = "checkpoints/test_atomic.py", "checkpoints/test_store.py", "callbacks/test_finite.py"
# Row: what, and the tests elsewhere that belong to it, by the beginning of their path below tests/.
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "A1": ("kill -9 anywhere in a run, resumed to the same weights", ("test_resume.py::test_killed_in",)),
    "A2": ("kill -9 inside the writer, at every point and time", (f"{ATOMIC}::test_kill", f"{ATOMIC}::test_two_kills")),
    "A3": ("kill -9 with TMPDIR on another file system", ()),
    "A4": ("two writers in one folder", ("checkpoints/test_lock.py::",)),
    "B1": ("files cut short or made longer", (f"{STORE}::test_every_truncation",)),
    "B2": (
        "one bit flipped in any file",
        (f"{STORE}::test_every_changed", "checkpoints/test_audit.py::test_a_flipped"),
    ),
    "B3": (
        "swapped, foreign, missing, doubled files and tensors",
        (f"{STORE}::test_swapped", f"{STORE}::test_missing"),
    ),
    "B4": (
        "weights of another shape, set, backbone or data",
        (
            "checkpoints/test_tensorfile.py::test_records_of_another",
            "checkpoints/test_manifest.py::test_another_base",
            "commands/test_train.py::test_initial_weights",
            "modules/test_continual_video_qa.py::test_other_",
            "callbacks/test_adapter_files.py::test_another_backbone",
        ),
    ),
    "C1": ("disk full", (f"{ATOMIC}::test_disk_full", f"{ATOMIC}::test_a_real_size")),
    "C2": ("folder read-only, removed or replaced", (f"{ATOMIC}::test_read_only", f"{ATOMIC}::test_a_parent")),
    "D1": ("hostile pickles in every file that is read", ("checkpoints/test_unpickle.py::",)),
    "D2": ("hostile class paths in settings", ("commands/test_loading.py::test_a_foreign",)),
    "D3": ("hostile YAML", ("commands/test_yaml_loader.py::test_hostile", "commands/test_explain.py::test_a_foreign")),
    "D4": (
        "zip bombs, links and paths that leave the folder",
        (f"{STORE}::test_a_link", f"{STORE}::test_names_that", "checkpoints/test_manifest.py::test_wrong"),
    ),
    "E1": ("NaN or infinity in loss, gradient or weights", (f"{FINITE}::",)),
    "F1": ("a rank raises, dies, leaves or hangs", ()),
    "F2": ("uneven data on two ranks", ("test_two_processes.py::test_every_question", "modules/test_ranks.py::")),
    "F3": ("ranks with another seed, config or data", ()),
    "G1": ("resume from every step, bitwise", ("test_resume.py::test_resumed", "test_resume.py::test_also")),
    "G2": (
        "another number of ranks, another strategy",
        ("callbacks/test_strategy.py::", "test_two_processes.py::test_one"),
    ),
    "G3": ("checkpoints of released formats", ()),
    "H1": ("readers fed with mutated files", ("checkpoints/test_tensorfile.py::test_only_typed",)),
    "H2": (
        "round trips of arbitrary values",
        (f"{STORE}::test_round", f"{STORE}::test_ten_thousand", "checkpoints/test_treejson.py::test_round"),
    ),
    "I1": (
        "SIGTERM, SIGINT, SIGUSR1, once and twice",
        ("test_resume.py::test_stopped", "test_cli.py::test_a_process_ended"),
    ),
    "I2": ("saves and deletions without end", ()),
    "J1": ("kills between save and delete", ("checkpoints/test_retention.py::test_killed",)),
}


HERE = Path(__file__).parent
CONFIG = """\
seed_everything: 3
model: {class_path: faulty_project.Net}
data: {class_path: faulty_project.Data}
checkpoint: {every_n_train_steps: 1, save_top_k: 3, monitor: step, mode: max}
trainer: {max_epochs: 3, accelerator: cpu, devices: 1, enable_progress_bar: false, log_every_n_steps: 1,
  use_distributed_sampler: false, num_sanity_val_steps: 0}
"""


@dataclass
class Tally:
    """Adds to a row of the table; what is neither survived nor detected is lost."""

    properties: list

    def __call__(self, row: str, injected: int, survived: int) -> None:
        assert row in ROWS
        self.properties.append(("fault", (row, injected, survived)))


class Child:
    """A fork of this process, which has all libraries loaded, that runs ``action`` in ``folder`` and ends.

    Its exit code is what ``action`` returns; 1 after an exception, whose traceback is in the text.
    """

    def __init__(self, action: Callable[[], int], folder: Path, log: Path, env: dict[str, str]) -> None:
        self.log, self.began = log, time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                self._become(folder, env)
                code = action()
            except SystemExit as ended:
                code = int(ended.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(OSError):  # never on with the tests in this process
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)

    def _become(self, folder: Path, env: dict[str, str]) -> None:
        import torch

        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        torch.set_num_threads(1)
        os.chdir(folder)
        os.environ.update(env)
        sys.path.insert(0, str(HERE))

    def wait(self, timeout: float = 30.0) -> int:
        """Its exit code, negative for a signal; past ``timeout`` seconds it is killed, and TimeoutError."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.kill(self.pid, 9)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"still running after {timeout} s: {self.text[-3000:]}")

    def halt_at(self, path: Path, timeout: float = 30.0) -> None:
        """Stop it by SIGSTOP once ``path`` holds something; TimeoutError past ``timeout`` seconds."""
        end = time.monotonic() + timeout
        while not (path.exists() and path.stat().st_size):
            if time.monotonic() > end:
                raise TimeoutError(f"no {path} in {timeout} s")
            time.sleep(0.01)
        os.kill(self.pid, signal.SIGSTOP)

    @property
    def text(self) -> str:
        """What it has written to stdout and stderr."""
        return self.log.read_text()


class Project:
    """A folder with ``faulty.yaml``, in which commands run in forked processes."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder, 0
        (folder / "faulty.yaml").write_text(CONFIG)

    def start(self, action: Callable[[], int], **env: str) -> Child:
        """Run a function."""
        self.count += 1
        return Child(action, self.folder, self.folder / f"log-{self.count}", env)

    def command(self, *argv: object, prepare: Callable[[], object] = lambda: None) -> Callable[[], int]:
        """The call of a command, after ``prepare`` in the same process."""

        def action() -> int:
            from fulgurite.cli import main

            prepare()
            allow = ("--allow", "faulty_project")
            return main([str(word) for word in (*argv, *allow)])

        return action

    def fit(self, *argv: object, config: str = "faulty.yaml") -> Callable[[], int]:
        """The call of ``fit`` with the config."""
        return self.command("fit", "--config", config, *argv)

    def pair(self, *actions: Callable[[], int]) -> list[Child]:
        """Two ranks of one job; one action for both, or one for each."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
        return [self.start(action, **env, LOCAL_RANK=str(rank)) for rank, action in enumerate((actions * 2)[:2])]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """One folder per module of tests; forks are cheap where everything is imported before."""
    import fulgurite.callbacks.report
    import fulgurite.commands.train  # noqa: F401

    return Project(tmp_path_factory.mktemp("project"))


@pytest.fixture
def tally(request):
    return Tally(request.node.user_properties)


def row_of(test):
    """The row that a test elsewhere belongs to, by its id."""
    path = test.removeprefix("tests/")
    return next((row for row, (_, tests) in ROWS.items() if path.startswith(tests or ("/",))), None)


def pytest_addoption(parser):
    parser.addoption("--faults", action="store_true", help="run only the tests of the table of faults, and print it")


def pytest_collection_modifyitems(config, items):
    """With ``--faults``, leave out what is not in the table."""
    if config.getoption("--faults", False):
        for row, (_, tests) in ROWS.items():
            if lost := [t for t in tests if not any(i.nodeid.removeprefix("tests/").startswith(t) for i in items)]:
                raise pytest.UsageError(f"row {row} of the table of faults names {lost}, and there are no such tests")
        chosen = [item for item in items if HERE in item.path.parents or row_of(item.nodeid)]
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen


def pytest_terminal_summary(terminalreporter, config):
    """With ``--faults``, print the table."""
    if not config.getoption("--faults", False):
        return
    counts = {row: [0, 0, 0, 0.0] for row in ROWS}
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        if report.when != "call":
            continue
        told = [value for name, value in report.user_properties if name == "fault"]
        row = told[0][0] if told else row_of(report.nodeid)
        if row is None:
            continue
        for name, injected, survived in told or [(row, 1, int(report.passed))]:
            counts[name][0] += injected
            counts[name][1] += survived
        counts[row][2] += report.failed
        counts[row][3] += report.duration
    write = terminalreporter.write_line
    terminalreporter.section("faults")
    write(f"{'row':4}{'what':58}{'injected':>9}{'survived':>9}{'lost':>6}{'seconds':>9}")
    for row, (injected, survived, failed, seconds) in counts.items():
        lost = injected - survived
        note = f"  {failed} failed" if failed else "" if injected else "  not run"
        write(f"{row:4}{ROWS[row][0]:58}{injected:9,}{survived:9,}{lost:6,}{seconds:9.1f}{note}")
    total, good = (sum(entry[i] for entry in counts.values()) for i in (0, 1))
    write(f"{'':4}{'together':58}{total:9,}{good:9,}{total - good:6,}{sum(e[3] for e in counts.values()):9.1f}")
