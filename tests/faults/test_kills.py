"""SIGKILL inside the writer, at every named point and at random times: one complete version is always left."""

import gc
import os
import random
import resource
import signal
import time

import pytest
import torch

from fulgurite.checkpoints import (
    list_checkpoints,
    load_document,
    load_tensors,
    newest_good,
    remove_leftovers,
    retain,
    save_checkpoint_folder,
    verify,
)
from fulgurite.checkpoints.atomic import FOLDER_FAULT_POINTS, inject_faults

POINTS = (*FOLDER_FAULT_POINTS, "tensor_written", "before_manifest")
AFTER = ("renamed_in", "parent_synced", "old_deleted")  # the new version is in place


def save(path, value, size=64):
    """Three tensors, a document and the manifest, all of which say ``value``."""
    tensors = {"weights": {"a": torch.full((size,), float(value)), "b": torch.full((2, 3), value)}}
    document = {"value": value, "moment": torch.full((size,), float(value))}
    save_checkpoint_folder(path, tensors, {"state": document}, facts={"global_step": value})


def value_of(path):
    """The one value that every part of the checkpoint agrees on."""
    assert verify(path).ok
    state = load_document(path, "state")
    parts = torch.cat([state["moment"], *(t.flatten().float() for t in load_tensors(path).values())])
    assert parts.eq(state["value"]).all()
    return state["value"]


def forked(action):
    """Pid of a child that runs ``action`` and ends."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    return child


def dies_at(point, occurrence):
    met = []

    def hook(name):
        met.append(name)
        if met.count(point) == occurrence:
            os.kill(os.getpid(), signal.SIGKILL)

    return hook


def test_killed_at_every_point_of_many_saves(tmp_path, tally):
    """Each save goes on from what the kill before it has left."""
    path = tmp_path / "last"
    save(path, 0)
    value = kills = survived = 0
    for turn in range(8):
        for point in random.Random(turn).sample(POINTS, len(POINTS)):
            value += 1
            occurrence = 1 + turn % 3 if point == "tensor_written" else 1

            hook = dies_at(point, occurrence)

            def attempt(value=value, hook=hook):
                with inject_faults(hook):
                    save(path, value)

            before = value_of(path)
            status = os.waitpid(forked(attempt), 0)[1]
            assert os.WIFSIGNALED(status), point
            kills += 1
            survived += value_of(path) == (value if point in AFTER else before)
            if turn % 2:
                remove_leftovers(tmp_path)
                assert [entry.name for entry in tmp_path.iterdir()] == ["last"]
    tally("A2", kills, survived)
    assert survived == kills == 8 * len(POINTS)


def killed_at_random_times(folder, kills, seed):
    """(kills that met a save, good versions found after them) of children that save as fast as they can."""
    generator, path = random.Random(seed), folder / "last"
    save(path, 0, 1 << 18)
    start = time.perf_counter()
    save(path, 0, 1 << 18)
    taken = time.perf_counter() - start
    met = survived = 0
    for turn in range(kills):
        ready, begun = os.pipe()

        def attempt(turn=turn, begun=begun):
            value = 1000 * turn + 1
            os.write(begun, b"1")
            while True:
                save(path, value, 1 << 18)
                value += 1

        before = value_of(path)
        child = forked(attempt)
        os.read(ready, 1)
        time.sleep(generator.uniform(0, 2 * taken))
        os.kill(child, signal.SIGKILL)
        met += os.WIFSIGNALED(os.waitpid(child, 0)[1])
        os.close(ready)
        os.close(begun)
        after = value_of(path)
        survived += after == before or after > 1000 * turn
    return met, survived


def test_killed_at_random_times(tmp_path, tally):
    met, survived = killed_at_random_times(tmp_path, 30, seed=0)
    tally("A2", met, survived)
    assert met == survived == 30


@pytest.mark.slow
def test_killed_at_very_many_random_times(tmp_path, tally):
    met, survived = killed_at_random_times(tmp_path, 200, seed=1)
    tally("A2", met, survived)
    assert met == survived == 200


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second file system")
def test_the_folder_of_temporary_files_is_never_used(tmp_path, monkeypatch, tally):
    """Where a program renames from TMPDIR, another file system there makes its writes copies, which a kill cuts."""
    other = f"/dev/shm/fulgurite-test-{os.getpid()}"
    os.mkdir(other)
    try:
        assert os.stat(other).st_dev != os.stat(tmp_path).st_dev
        monkeypatch.setenv("TMPDIR", other)
        met, survived = killed_at_random_times(tmp_path, 20, seed=2)
        assert os.listdir(other) == []
    finally:
        os.rmdir(other)
    tally("A3", met, survived)
    assert met == survived == 20


def test_killed_at_random_times_between_save_and_delete(tmp_path, tally):
    """Steps are saved and older ones deleted; a kill loses at most the step that was being written."""
    folder, generator, survived = tmp_path / "checkpoints", random.Random(3), 0
    save(folder / "step=0", 0)
    for turn in range(1, 31):
        ready, begun = os.pipe()

        def attempt(turn=turn, begun=begun):
            for step in range(100 * turn, 100 * turn + 100):
                save(folder / f"step={step}", step)
                os.write(begun, step.to_bytes(4, "little"))
                retain(folder, last=2)

        child = forked(attempt)
        time.sleep(generator.uniform(0.002, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(begun)
        said = os.read(ready, 1 << 16)
        os.close(ready)
        found = newest_good(folder)
        published = int.from_bytes(said[-4:], "little")
        survived += found is not None and value_of(found[0]) >= published
        remove_leftovers(folder)
    retain(folder, last=2)
    assert len(list_checkpoints(tmp_path)) == 2
    tally("J1", 30, survived)
    assert survived == 30


def test_two_hundred_saves_and_deletions_leave_nothing_behind(tmp_path, tally):
    """Open files, files on disk, and memory after 50 cycles and after 250."""
    folder, seen = tmp_path / "checkpoints", []
    for step in range(250):
        save(folder / f"step={step:03}", step, 1 << 16)
        retain(folder, last=2)
        assert value_of(newest_good(folder)[0]) == step
        if step in (49, 249):
            gc.collect()
            files = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))
            with open("/proc/self/statm") as statm:
                pages = int(statm.read().split()[1])
            seen.append((len(os.listdir("/proc/self/fd")), len(files), pages * resource.getpagesize()))
    (descriptors, files, memory), (later_descriptors, later_files, later_memory) = seen
    flat = later_descriptors <= descriptors, later_files == files == 2 * 5, later_memory - memory < 8 << 20
    tally("I2", 200, 200 * all(flat))
    assert flat == (True, True, True), seen
