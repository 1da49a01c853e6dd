"""A kill at any point of a write leaves the old or the new version, and refused writes name the path."""

import errno
import json
import os
import resource
import signal
import tempfile
from pathlib import Path

import pytest
import torch

from fulgurite.checkpoints import (
    WriteError,
    audit,
    load_document,
    load_tensors,
    publish_folder,
    read_manifest,
    remove,
    remove_leftovers,
    save_checkpoint_folder,
    verify,
    write_bytes,
    write_json,
    write_text,
)
from fulgurite.checkpoints.atomic import FILE_FAULT_POINTS, FOLDER_FAULT_POINTS, inject_faults, resolve

STORE_POINTS = ("tensor_written", "before_manifest")


def save(path, value):
    tensors = {"weights": {"a": torch.full((5,), float(value)), "b": torch.full((2, 3), value)}}
    return save_checkpoint_folder(path, tensors, {"state": {"value": value}})


def value_of(path):
    """The one value that all parts of a saved folder agree on."""
    assert verify(path).problems == []
    found = {load_document(path, "state")["value"]}
    for tensor in load_tensors(path).values():
        found |= set(tensor.flatten().int().tolist())
    (value,) = found
    return value


def killed(action, point, occurrence=1):
    """Run ``action`` in a child that kills itself the n-th time it meets ``point``; whether it did."""
    child = os.fork()
    if child == 0:
        seen = []

        def hook(name):
            seen.append(name)
            if seen.count(point) == occurrence:
                os.kill(os.getpid(), signal.SIGKILL)

        with inject_faults(hook):
            action()
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def points_met(action):
    seen = []
    with inject_faults(seen.append):
        action()
    return seen


def test_every_fault_point_is_met(tmp_path):
    save(tmp_path / "c", 1)
    assert set(points_met(lambda: save(tmp_path / "c", 2))) == {*FOLDER_FAULT_POINTS, *STORE_POINTS}
    assert tuple(points_met(lambda: write_bytes(tmp_path / "f", b"x"))) == FILE_FAULT_POINTS


@pytest.mark.parametrize("point", [*FOLDER_FAULT_POINTS, *STORE_POINTS])
def test_kill_while_a_checkpoint_is_replaced_leaves_old_or_new(tmp_path, point):
    path = tmp_path / "last"
    save(path, 1)
    assert killed(lambda: save(path, 2), point)
    is_new = point in ("renamed_in", "parent_synced", "old_deleted")
    assert value_of(path) == (2 if is_new else 1)
    remove_leftovers(tmp_path)
    assert value_of(path) == (2 if is_new else 1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["last"]
    save(path, 3)
    assert value_of(path) == 3


@pytest.mark.parametrize("point", [*FOLDER_FAULT_POINTS, *STORE_POINTS])
def test_kill_while_the_first_checkpoint_is_written_leaves_none_or_all(tmp_path, point):
    path = tmp_path / "last"
    if not killed(lambda: save(path, 2), point):
        assert point == "renamed_away"
    if path.exists():
        assert value_of(path) == 2
    else:
        assert point in ("opened", "written", "synced", *STORE_POINTS)


@pytest.mark.parametrize("second", ["renamed_away", "renamed_in"])
def test_two_kills_in_a_row_lose_nothing(tmp_path, second):
    path = tmp_path / "last"
    save(path, 1)
    assert killed(lambda: save(path, 2), "renamed_away")
    assert killed(lambda: save(path, 3), second)
    assert value_of(path) == (3 if second == "renamed_in" else 1)


@pytest.mark.parametrize("point", FILE_FAULT_POINTS)
def test_kill_while_a_file_is_written(tmp_path, point):
    path = tmp_path / "metrics.json"
    write_json(path, {"step": 1})
    assert killed(lambda: write_json(path, {"step": 2}), point)
    assert json.loads(path.read_text())["step"] == (2 if point in ("file_renamed", "file_parent_synced") else 1)
    remove_leftovers(tmp_path)
    assert {entry.name for entry in tmp_path.iterdir()} == {"metrics.json", "digests.json"}
    assert [state.state for state in audit(tmp_path)] == ["good", "good"]
    assert killed(lambda: write_json(path, {"step": 3}), "list_parent_synced")
    assert json.loads(path.read_text())["step"] in (1, 2)
    assert [state.state for state in audit(tmp_path)][:2] == ["good", "good"]


def test_an_error_while_writing_leaves_the_old_and_no_litter(tmp_path):
    path = tmp_path / "c"
    save(path, 1)

    def fail():
        with publish_folder(path) as folder:
            (folder / "half").write_text("x")
            raise KeyError("in the block")

    with pytest.raises(KeyError):
        fail()
    assert value_of(path) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("point", ["tensor_written", "opened", "synced", "renamed_away"])
def test_disk_full_names_the_path_and_keeps_the_old(tmp_path, point):
    path = tmp_path / "last"
    save(path, 1)

    def full(name):
        if name == point:
            raise OSError(errno.ENOSPC, "No space left on device")

    expected = OSError if point == "opened" else WriteError
    with inject_faults(full), pytest.raises(expected) as caught:
        save(path, 2)
    if expected is WriteError:
        assert str(tmp_path) in str(caught.value)
        assert "disk is full" in str(caught.value)
        assert caught.value.errno == errno.ENOSPC
    assert value_of(path) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["last"]


def test_a_real_size_limit_of_the_system(tmp_path):
    save(tmp_path / "c", 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(WriteError, match=r"weights\.safetensors.*file-size limit"):
            save_checkpoint_folder(tmp_path / "c", {"weights": {"x": torch.zeros(4096)}})
        with pytest.raises(WriteError, match="big"):
            write_bytes(tmp_path / "big", bytes(8192))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert value_of(tmp_path / "c") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["c"]


def test_read_only_folder_is_an_error_that_names_it():
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        texts = []
        if os.geteuid() == 0:
            os.setuid(65534)
        for action in (lambda: save(folder / "c", 1), lambda: write_text(folder / "f", "x")):
            try:
                action()
                texts.append("no error")
            except WriteError as error:
                texts.append(f"{error.errno} {error}")
        os.write(write, json.dumps(texts).encode())
        os._exit(0)
    os.waitpid(child, 0)
    texts = json.loads(os.read(read, 10_000))
    folder.chmod(0o755)
    assert list(folder.iterdir()) == []
    folder.rmdir()
    for text, name in zip(texts, ("c", "f"), strict=True):
        assert text.startswith(f"{errno.EACCES} cannot write {folder / name}: Permission denied")


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match="file/c"):
        save(tmp_path / "file" / "c", 1)


def test_a_file_in_the_place_of_a_folder_is_replaced(tmp_path):
    (tmp_path / "last").write_text("an old checkpoint of another program")
    save(tmp_path / "last", 4)
    assert value_of(tmp_path / "last") == 4


def test_remove_and_leftovers_of_the_living(tmp_path):
    save(tmp_path / "c", 1)
    remove(tmp_path / "c")
    remove(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []
    mine = tmp_path / f".x.tmp-{os.getpid()}-0123abcd"
    mine.mkdir()
    (tmp_path / ".hidden.tmp").write_text("not ours")
    assert remove_leftovers(tmp_path) == []
    assert mine.exists()
    assert resolve(tmp_path / "nothing") == tmp_path / "nothing"


def test_created_is_in_order(tmp_path):
    first, second = save(tmp_path / "a", 1), save(tmp_path / "b", 1)
    assert first.created < second.created
    assert read_manifest(tmp_path / "a").created == first.created
