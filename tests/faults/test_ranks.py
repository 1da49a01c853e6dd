"""Two ranks of one job: whatever happens to one of them, both end in time, and none goes on alone."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fulgurite.callbacks.interruption import end_all
from fulgurite.checkpoints import list_checkpoints, load_tensors, newest_good, verify

HERE = Path(__file__).parent
BOUND = 30.0  # seconds for what takes two or three on a machine without other load
TWO = ("--trainer.devices", "2", "--trainer.strategy", "ddp")


def bytes_of(run):
    return {name: value.numpy().tobytes() for name, value in load_tensors(run / "checkpoints" / "last").items()}


def ended(children):
    """Exit codes, and the seconds until the last of them."""
    start = time.monotonic()
    return [child.wait(BOUND) for child in children], time.monotonic() - start


def texts(children):
    return "\n".join(f"--- rank {rank}\n{child.text[-2500:]}" for rank, child in enumerate(children))


@pytest.fixture(scope="module")
def whole(project):
    """The unbroken run of two ranks."""
    run = project.folder / "whole"
    children = project.pair(project.fit("--run", run, *TWO))
    assert ended(children)[0] == [0, 0], texts(children)
    return run


@pytest.mark.parametrize(
    "fault",
    [
        *("/SIGKILL", "leave"),
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("raise", "/raise", "SIGKILL", "exit", "/exit", "/leave")),
    ],
)
def test_a_rank_that_dies_ends_the_job(fault, project, whole, tally):
    run = project.folder / fault.replace("/", "other-")
    children = project.pair(project.fit("--run", run, *TWO, "--model.fault", fault, "--model.at", 4))
    codes, seconds = ended(children)
    good = newest_good(run / "checkpoints")
    other = codes["/" not in fault]
    survived = other not in (0, 137) and good is not None and good[1].facts["global_step"] == 4
    tally("F1", 1, survived)
    assert survived, (codes, texts(children))
    assert seconds < BOUND
    again = project.pair(project.fit("--run", run, *TWO, "--resume", "auto", "--model.at", -1))
    assert ended(again)[0] == [0, 0], texts(again)
    assert bytes_of(run) == bytes_of(whole)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("/SIGTERM", 143),
        ("/SIGUSR1+SIGUSR1", 138),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("SIGTERM", 143), ("SIGINT", 130), ("/SIGINT", 130))
        ),
        *(pytest.param(f, 143, marks=pytest.mark.slow) for f in ("SIGTERM/SIGTERM", "/SIGTERM+SIGTERM")),
        pytest.param("SIGUSR1/SIGTERM", 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_any_rank_saves_and_ends_all(fault, code, project, whole, tally):
    run = project.folder / f"signal-{fault.replace('/', '-')}"
    children = project.pair(project.fit("--run", run, *TWO, "--model.fault", fault, "--model.at", 4))
    codes, _ = ended(children)
    assert codes == [code, code], (codes, texts(children))
    assert newest_good(run / "checkpoints")[1].facts["global_step"] == 5
    again = project.pair(project.fit("--run", run, *TWO, "--resume", "auto", "--model.at", -1))
    assert ended(again)[0] == [0, 0], texts(again)
    survived = bytes_of(run) == bytes_of(whole)
    tally("I1", 1, survived)
    assert survived


def test_a_rank_that_hangs_ends_the_other_after_the_time_out(project, tally):
    run = project.folder / "hanging"
    (project.folder / "short.yaml").write_text(
        "trainer: {strategy: {class_path: DDPStrategy, init_args: {timeout: '0:00:04'}}}\n"
    )
    argv = (
        "--config",
        "short.yaml",
        "--run",
        run,
        "--trainer.devices",
        2,
        "--model.fault",
        "/SIGSTOP",
        "--model.at",
        4,
    )
    children = project.pair(project.fit(*argv))
    code = children[0].wait(BOUND)
    os.kill(children[1].pid, signal.SIGCONT)
    other = children[1].wait(BOUND)
    good = newest_good(run / "checkpoints")
    survived = code > 0 and other != 0 and good[1].facts["global_step"] == 4
    tally("F1", 1, survived)
    assert survived, (code, other, texts(children))


def disagreeing(project, folder, differ):
    """Two ranks under `RanksAgree` of which the second differs in one thing; rank -> file with what it said."""

    def action():
        import lightning.pytorch as pl
        from faulty_project import Answered, Net

        from fulgurite.callbacks.agreement import RanksAgree
        from fulgurite.checkpoints import MismatchError

        rank = int(os.environ["LOCAL_RANK"])
        other = rank == 1
        pl.seed_everything(4 if other and differ == "seed" else 3)
        trainer = pl.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp",
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
            callbacks=[RanksAgree("lr: 2" if other and differ == "config" else "lr: 1", parameters=True)],
        )
        module = Net()
        said = "nothing"
        try:
            trainer.fit(module, Answered("no" if other and differ == "train data" else "yes"))
        except MismatchError as error:
            said = str(error)
        (folder / f"said-{rank}.json").write_text(json.dumps([said, trainer.global_step]))
        return 0

    return project.pair(action)


def test_ranks_of_other_configs_are_refused_by_the_command_line(project, tally):
    run = project.folder / "other-configs"
    children = project.pair(*(project.fit("--run", run, *TWO, "--model.lr", lr) for lr in (0.1, 0.2)))
    codes, _ = ended(children)
    found = codes == [2, 2] and all("  config: rank 0 " in child.text for child in children)
    tally("F3", 1, found)
    assert found, texts(children)


@pytest.mark.parametrize("differ", ["seed", "config", "train data", "nothing"])
def test_ranks_that_disagree_stop_before_the_first_step(differ, project, tmp_path, tally):
    children = disagreeing(project, tmp_path, differ)
    codes, _ = ended(children)
    assert codes == [0, 0], texts(children)
    said = [json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(2)]
    if differ == "nothing":
        assert said == [["nothing", 3]] * 2
        return
    found = said[0] == said[1] and said[0][1] == 0 and f"  {differ}: rank 0 " in said[0][0]
    tally("F3", 1, found)
    assert found, said


def launched(folder, *argv):
    """A fit as a user starts it, with Lightning starting the second process; its processes and what to wait for."""
    command = [
        sys.executable,
        "-m",
        "fulgurite.cli",
        "fit",
        "--config",
        "faulty.yaml",
        *TWO,
        "--allow",
        "faulty_project",
    ]
    log = open(folder / "log", "w")  # noqa: SIM115
    return subprocess.Popen(
        [*command, *map(str, argv)],
        cwd=folder,
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def alive(session):
    """Pid and state of a session's processes that have not ended."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] not in "ZX":
                found[int(entry.name)] = fields[0]
    return found


def test_a_failed_job_ends_the_processes_that_it_has_started():
    with subprocess.Popen(["sleep", "60"]) as stopped, subprocess.Popen(["true"]) as done:
        done.wait()
        os.kill(stopped.pid, signal.SIGSTOP)
        end_all([done, stopped])
        assert (done.wait(), stopped.wait(5)) == (0, -signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", ["raise", "SIGKILL", "exit", "leave", "SIGSTOP", "SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_launched_job_ends_without_orphans(fault, rank, project, tmp_path, tally):
    """The launcher is rank 0 itself, so nothing is above it that could clear up after it."""
    (tmp_path / "faulty.yaml").write_text((project.folder / "faulty.yaml").read_text())
    (tmp_path / "short.yaml").write_text(
        "trainer: {strategy: {class_path: DDPStrategy, init_args: {timeout: '0:00:30'}}}\n"
    )
    argv = ["--run", "run", "--model.fault", "/" * rank + fault, "--model.at", 4, "--model.pause", 0.1]
    job = launched(tmp_path, *argv, *(("--config", "short.yaml") if fault == "SIGSTOP" else ()))
    # A stopped rank 0 is all that may be left, since it was everyone's parent; it ends when it goes on.
    stopped = {job.pid: "T"} if (fault, rank) == ("SIGSTOP", 0) else {}
    end = time.monotonic() + 120
    while time.monotonic() < end and alive(job.pid) != stopped:
        time.sleep(0.2)
        job.poll()
    orphans = alive(job.pid)
    for pid in orphans:
        os.kill(pid, signal.SIGCONT if stopped == orphans else signal.SIGKILL)
    try:
        code = job.wait(60)
    finally:
        for pid in alive(job.pid):
            os.kill(pid, signal.SIGKILL)
    good = newest_good(tmp_path / "run" / "checkpoints")
    promised = {"SIGTERM": 143, "SIGINT": 130, "SIGUSR1": 138}.get(fault)
    step = good and good[1].facts["global_step"]
    # A rank 0 that says 0 is the job that says 0.
    fine = code == promised if promised else code != 0 or (fault in ("exit", "leave") and rank == 0)
    sound = step == (5 if promised else 4) and all(verify(p).ok for p, _ in list_checkpoints(tmp_path / "run"))
    survived = fine and sound and orphans == stopped
    tally("I1" if promised else "F1", 1, survived)
    assert survived, (code, orphans, step, (tmp_path / "log").read_text()[-3000:])
