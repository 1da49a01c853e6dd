"""Runs through the command line that are killed, or whose disk fails: each goes on to the bits of the unbroken."""

import json
import os
import random
import resource
import shutil
import signal
import sys
import time

import pytest
import yaml

from fulgurite.checkpoints import (
    list_checkpoints,
    load_document,
    load_tensors,
    newest_good,
    read_manifest,
    save_checkpoint_folder,
    verify,
)
from fulgurite.checkpoints.atomic import inject_faults

STEPS = 9  # 3 epochs of 3 steps


def fingerprint(run):
    """Bytes of all weights, and what the optimizer, the loops and the random states ended with."""
    weights = load_tensors(run / "checkpoints" / "last")
    state = load_document(run / "checkpoints" / "last", "state")
    moments = {
        f"{index}/{name}": value
        for index, entry in state["optimizer_states"][0]["state"].items()
        for name, value in entry.items()
    }
    (random_state,) = state["callbacks"]["RandomStates"]["ranks"]
    tensors = {**weights, **moments, "random": random_state["torch"]}
    return {name: value.numpy().tobytes() for name, value in tensors.items()} | {"loops": state["loops"]}


@pytest.fixture(scope="module")
def whole(project):
    """The unbroken run, with all of its checkpoints."""
    run = project.folder / "whole"
    child = project.start(project.fit("--run", run, "--checkpoint.save_top_k", "-1"))
    assert child.wait() == 0, child.text
    return run


def checkpoint(run, step):
    (path,) = (run / "checkpoints").glob(f"*-step={step}")
    return path


def test_a_linear_model_resumed_from_every_step_ends_the_same(project, whole, tally):
    runs = {step: project.folder / f"from-{step}" for step in range(1, STEPS)}
    fits = [project.fit("--run", run, "--ckpt_path", checkpoint(whole, step)) for step, run in runs.items()]
    child = project.start(lambda: max(fit() for fit in fits))
    assert child.wait() == 0, child.text
    same = sum(fingerprint(run) == fingerprint(whole) for run in runs.values())
    tally("G1", STEPS - 1, same)
    assert same == STEPS - 1


def killed_and_resumed(project, run, argv, kills, seed, config="faulty.yaml"):
    """(kills that met the running fit, kills that left a good checkpoint not older than the one before)."""
    generator, met, survived, longest = random.Random(seed), 0, 0, 2.0
    while met < kills:
        found = newest_good(run / "checkpoints")
        before = -1 if found is None else found[1].facts["global_step"]
        child = project.start(project.fit("--run", run, "--resume", "auto", *argv, config=config))
        time.sleep(generator.uniform(0.2, longest))
        os.kill(child.pid, signal.SIGKILL)
        code = child.wait()
        found = newest_good(run / "checkpoints")
        if code == -signal.SIGKILL:
            met += 1
            survived += before <= (-1 if found is None else found[1].facts["global_step"])
        else:
            assert code == 0, child.text
            longest = max(longest - 0.3, 1.0)
        if code == 0 and met < kills:
            # Finished too soon: the rest of the kills happen to the same run, begun anew.
            shutil.rmtree(run)
    child = project.start(project.fit("--run", run, "--resume", "auto", *argv, config=config))
    assert child.wait(60) == 0, child.text
    return met, survived


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_times_and_resumed(kills, project, tally):
    slowly = ("--model.pause", "0.1", "--checkpoint.save_top_k", "2")
    one, other = project.folder / f"slow-{kills}", project.folder / f"killed-{kills}"
    assert project.start(project.fit("--run", one, *slowly)).wait() == 0
    met, survived = killed_and_resumed(project, other, slowly, kills, seed=kills)
    same = fingerprint(other) == fingerprint(one)
    tally("A1", met, survived * same)
    assert same
    assert survived == met == kills
    assert not [entry for entry in (other / "checkpoints").iterdir() if entry.name.startswith(".")]


@pytest.mark.slow
def test_a_continual_run_killed_at_random_times_and_resumed(project, stream_config, tally):
    argv = ("--checkpoint.every_n_train_steps", "1", "--test_after_fit", "false")
    one, other = project.folder / "stream", project.folder / "stream-killed"
    child = project.start(project.fit("--run", one, *argv, config=stream_config))
    assert child.wait(120) == 0, child.text
    met, survived = killed_and_resumed(project, other, argv, 10, seed=5, config=stream_config)
    same = fingerprint(other) == fingerprint(one)
    tally("A1", met, survived * same)
    assert same
    assert survived == met == 10


def failing(project, run, name, prepare, step=4):
    """A fit that ``prepare`` spoils in ``step``; its child and exit code."""

    def hook():
        import faulty_project

        def meet(fault):
            assert fault == name
            prepare()

        faulty_project.meet = meet

    argv = ("fit", "--config", "faulty.yaml", "--run", run, "--model.fault", name, "--model.at", step)
    child = project.start(project.command(*argv, prepare=hook))
    return child, child.wait()


def limit_files():
    """Files cannot grow beyond what has been said so far and what is still to be said of it."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sys.stdout.flush()
    resource.setrlimit(resource.RLIMIT_FSIZE, (os.fstat(1).st_size + 1024, resource.RLIM_INFINITY))


def spoil(kind, folder):
    if kind == "full":
        limit_files()
    elif kind == "read-only":
        folder.chmod(0o555)
        if os.geteuid() == 0:
            os.setuid(65534)
    elif kind == "removed":
        shutil.rmtree(folder)
    elif kind == "a file":
        shutil.rmtree(folder)
        folder.write_text("in the way")


@pytest.mark.parametrize("kind", ["full", "read-only", "removed", "a file"])
def test_a_disk_that_fails_in_the_middle_of_a_fit(kind, project, whole, tally):
    """One message with the path and exit code 2, or the folder made anew; the last checkpoint good; no litter after."""
    run = project.folder / kind.replace(" ", "-")
    folder = run / "checkpoints"
    for parent in (project.folder, *project.folder.parents[:3]):
        parent.chmod(parent.stat().st_mode | 0o055)
    child, code = failing(project, run, "disk", lambda: spoil(kind, folder))
    if kind == "removed":
        good = code == 0 and newest_good(folder)[1].facts["global_step"] == STEPS
        tally("C2", 1, good)
        assert good, child.text
        return
    if kind == "a file":
        good = code == 2 and f"cannot write {folder}" in child.text and folder.read_text() == "in the way"
        tally("C2", 1, good)
        assert good, child.text
        return
    folder.chmod(0o755)
    good = code == 2 and "cannot write " in child.text and str(run) in child.text
    good = (
        good
        and newest_good(folder)[1].facts["global_step"] >= 3
        and all(verify(p).ok for p, _ in list_checkpoints(run))
    )
    assert good, (code, child.text)
    again = project.start(project.fit("--run", run, "--resume", "auto"))
    assert again.wait() == 0, again.text
    good = fingerprint(run) == fingerprint(whole) and not list(run.rglob(".*.tmp-*"))
    tally("C1" if kind == "full" else "C2", 1, good)
    assert good


def test_two_processes_that_resume_one_run(project, tally):
    """The second one is refused; the first goes on as if it were alone."""
    run = project.folder / "shared"
    both = ("--run", run, "--resume", "auto", "--model.pause", "0.1")
    first = project.start(project.fit(*both))
    first.halt_at(run / ".lock")  # so that it cannot end before the second one has begun
    try:
        second = project.start(project.fit(*both))
        refused = second.wait()
    finally:
        os.kill(first.pid, signal.SIGCONT)
    codes = [first.wait(), refused]
    sound = all(verify(path).ok for path, _ in list_checkpoints(run))
    tally("A4", 1, sound and codes == [0, 2])
    assert codes == [0, 2], f"{first.text[-1500:]}\n{second.text[-1500:]}"
    assert "is being written by process" in second.text
    assert "is being written by process" not in first.text
    assert sound


HOSTILE = {
    "instantiator": {"_instantiator": "os.system", "_class_path": "os.system", "command": "touch {marker}"},
    "class path": {"class_path": "subprocess.Popen", "init_args": {"args": ["touch", "{marker}"]}},
    "module": {"class_path": "hostile_module.Net", "init_args": {}},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_hyper_parameters_run_nothing(kind, project, whole, tmp_path, tally):
    """Well signed: as hyper-parameters of Lightning, as settings of the manifest, and as the run's config."""
    marker = tmp_path / "marker"
    bad = json.loads(json.dumps(HOSTILE[kind]).replace("{marker}", str(marker)))
    (tmp_path / "hostile_module.py").write_text(f"open({str(marker)!r}, 'w')\nNet = object\n")
    run = shutil.copytree(whole, tmp_path / "run")
    last = run / "checkpoints" / "last"
    state, weights, manifest = load_document(last, "state"), load_tensors(last), read_manifest(last)
    state |= {"hyper_parameters": bad, "hparams_name": "kwargs", "datamodule_hyper_parameters": bad}
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"model": bad}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    settings = {**manifest.settings, "model": bad}
    save_checkpoint_folder(last, {"weights": weights}, {"state": state}, settings=settings, facts=manifest.facts)

    def prepare():
        import sys

        sys.path.insert(0, str(tmp_path))

    def lightning():
        from faulty_project import Net

        from fulgurite.callbacks.checkpoint_io import DigestCheckpointIO

        prepare()
        Net.load_from_checkpoint(last)
        DigestCheckpointIO().load_checkpoint(last)
        return 0

    def python():
        import fulgurite

        prepare()
        fulgurite.load(run, allow=("faulty_project",))
        return 0

    calls = [
        project.command("fit", "--run", run, "--resume", "auto", prepare=prepare),
        project.command("validate", "--ckpt_path", last, prepare=prepare),
        project.command("validate", "--config", project.folder / "faulty.yaml", "--ckpt_path", last, prepare=prepare),
        project.command("inspect", run, prepare=prepare),
        python,
        lightning,
    ]
    children = [project.start(call) for call in calls]
    codes = [child.wait(60) for child in children]
    tally("D2", len(calls), len(calls) * (not marker.exists()))
    assert not marker.exists()
    assert codes[:3] == [2, 2, 0], [child.text[-800:] for child in children]


POINTS = ("opened", "tensor_written", "before_manifest", "synced", "renamed_away", "old_deleted")
EVERYWHERE = [(point, number) for point in POINTS for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]


@pytest.mark.parametrize("cases", [EVERYWHERE[1::8], pytest.param(EVERYWHERE, marks=pytest.mark.slow)], ids=len)
def test_a_signal_inside_a_save(cases, project, whole, tally):
    """The save is finished, the run ends with its code, and the resumed one ends as the unbroken."""
    good = 0
    for point, number in cases:
        run = project.folder / "signalled"

        def action(point=point, number=number, run=run):
            met = []

            def hook(name):
                met.append(name)
                if met.count(point) == 3 and name == point:
                    os.kill(os.getpid(), number)

            with inject_faults(hook):
                return project.fit("--run", run)()

        child = project.start(action)
        code = child.wait()
        assert code == 128 + number, (point, number, code, child.text)
        assert all(verify(path).ok for path, _ in list_checkpoints(run))
        step = newest_good(run / "checkpoints")[1].facts["global_step"]
        again = project.start(project.fit("--run", run, "--resume", "auto"))
        assert again.wait() == 0, again.text
        good += step < STEPS and fingerprint(run) == fingerprint(whole)
        shutil.rmtree(run)
    tally("I1", len(cases), good)
    assert good == len(cases)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ("SIGINT", 130),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("SIGTERM", 143), ("SIGUSR1", 138))),
        pytest.param("SIGTERM+SIGTERM", 143, marks=pytest.mark.slow),
    ],
)
def test_a_signal_while_data_are_read_or_in_a_step(fault, code, project, whole, tally):
    good = 0
    for where in ("data", "model"):
        run = project.folder / f"{fault}-{where}"
        at = 10 if where == "data" else 1
        child = project.start(project.fit("--run", run, f"--{where}.fault", fault, f"--{where}.at", at))
        assert child.wait() == code, child.text
        assert newest_good(run / "checkpoints")[1].facts["global_step"] == 2
        again = project.start(project.fit("--run", run, "--resume", "auto"))
        assert again.wait() == 0, again.text
        good += fingerprint(run) == fingerprint(whole)
    tally("I1", 2, good)
    assert good == 2
