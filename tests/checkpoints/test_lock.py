"""One writer per folder, whatever dies when; shown with real processes."""

import json
import os
import signal
import socket
import time

import pytest

from fulgurite.checkpoints import LockedError, WriteError, writing


class Child:
    """A forked process that says when it holds the lock, and keeps it until it is told to end."""

    def __init__(self, run, with_child=False):
        ready, self.ready = os.pipe()
        self.go, go = os.pipe()[::-1]
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.go)
            with writing(run):
                worker = os.fork() if with_child else None
                if worker == 0:  # a worker that outlives its parent
                    os.read(go, 1)
                    os._exit(0)
                os.write(self.ready, b"1")
                os.read(go, 1)
            os._exit(0)
        os.close(go)
        assert os.read(ready, 1) == b"1"
        os.close(ready)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def end(self):
        os.close(self.go)
        os.waitpid(self.pid, 0)


def test_a_second_process_is_refused_and_told_who_writes(tmp_path):
    run = tmp_path / "new" / "run"
    owner = Child(run)
    match = rf"run is being written by process {owner.pid} on {socket.gethostname()} since 20.*another folder"
    with pytest.raises(LockedError, match=match), writing(run):
        pass
    owner.end()
    with writing(run):
        assert json.loads((run / ".lock").read_bytes())["pid"] == os.getpid()
    assert list(run.iterdir()) == []


@pytest.mark.parametrize("with_child", [False, True])
def test_a_killed_owner_blocks_nobody(tmp_path, with_child):
    owner = Child(tmp_path, with_child)
    owner.kill()
    assert (tmp_path / ".lock").exists()
    with writing(tmp_path):
        assert json.loads((tmp_path / ".lock").read_bytes())["pid"] == os.getpid()
    owner.go and os.close(owner.go)


def test_a_worker_that_ends_does_not_free_its_parents_lock(tmp_path):
    with writing(tmp_path):
        worker = os.fork()
        if worker == 0:
            os._exit(0)
        os.waitpid(worker, 0)
        with pytest.raises(LockedError, match=f"process {os.getpid()} "), writing(tmp_path):
            pass
    with writing(tmp_path):
        pass


def test_an_error_in_the_block_frees_it(tmp_path):
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError("x")
    with writing(tmp_path):
        pass


def test_an_error_in_the_block_is_not_hidden_by_a_folder_that_has_gone(tmp_path):
    def fail():
        with writing(tmp_path / "run"):
            (tmp_path / "run").rename(tmp_path / "moved")
            (tmp_path / "run").touch()
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
    with writing(tmp_path / "moved"):
        pass


@pytest.mark.parametrize("junk", [b"", b"{", b"[1]", b'{"pid": 1}', b"\xff"])
def test_what_the_file_holds_decides_nothing(tmp_path, junk):
    (tmp_path / ".lock").write_bytes(junk)
    with writing(tmp_path):
        (tmp_path / ".lock").write_bytes(junk)
        with pytest.raises(LockedError, match="written by another process"), writing(tmp_path):
            pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="file/run"), writing(tmp_path / "file" / "run"):
        pass


def test_never_two_owners_in_a_crowd(tmp_path):
    """Six processes take and free the lock as fast as they can; inside it, a file that must not be there."""
    run, inside, end = tmp_path / "run", tmp_path / "inside", time.monotonic() + 1.0
    children = []
    for _ in range(6):
        child = os.fork()
        if child == 0:
            turns = 0
            while time.monotonic() < end:
                try:
                    with writing(run):
                        os.close(os.open(inside, os.O_CREAT | os.O_EXCL))
                        inside.unlink()
                        turns += 1
                except LockedError:
                    pass
                except FileExistsError:
                    os._exit(2)
            os._exit(0 if turns else 1)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert 2 not in codes
    assert codes.count(0) >= 2
