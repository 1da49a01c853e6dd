"""Every file below a folder has a state: what was written is checked, what was not is never called good."""

import os
import shutil
import signal

import pytest
import torch

from fulgurite.checkpoints import (
    DamagedError,
    MissingError,
    audit,
    digested_folders,
    save_checkpoint_folder,
    write_json,
    write_text,
)
from fulgurite.checkpoints.atomic import inject_faults


def save(path, value=1.0):
    save_checkpoint_folder(path, {"weights": {"a": torch.full((4,), value)}}, {"state": {"step": 1}})


@pytest.fixture
def run(tmp_path):
    """A run folder as a fit and a test leave it."""
    root = tmp_path / "runs" / "quick" / "2026-01-01_00-00-00"
    for name in ("checkpoints/epoch=0", "checkpoints/last", "adapters/red"):
        save(root / name)
    write_text(root / "config.yaml", "seed: 1\n")
    write_json(root / "metrics.json", {"val/accuracy": 0.5})
    write_text(root / "evaluations" / "test-1" / "answers.jsonl", "{}\n")
    (root / "events.out.tfevents.1").write_bytes(b"log")
    return root


def states(path):
    """State by name relative to ``path``."""
    return {state.path.relative_to(path).as_posix(): state.state for state in audit(path)}


CHECKED = {
    f"{folder}/{file}": "good"
    for folder in ("checkpoints/epoch=0", "checkpoints/last", "adapters/red")
    for file in ("manifest.json", "weights.safetensors", "state.json")
} | {
    "digests.json": "good",
    "config.yaml": "good",
    "metrics.json": "good",
    "evaluations/test-1/digests.json": "good",
    "evaluations/test-1/answers.jsonl": "good",
    "events.out.tfevents.1": "not covered",
}


def test_a_run_and_every_folder_above_and_in_it(run):
    assert states(run) == CHECKED
    top = run.parent.parent
    assert states(top) == {f"quick/{run.name}/{name}": state for name, state in CHECKED.items()}
    for part in ("checkpoints", "checkpoints/last", "adapters", "adapters/red"):
        expected = {n.removeprefix(f"{part}/"): s for n, s in CHECKED.items() if n.startswith(f"{part}/")}
        assert states(run / part) == expected


def test_a_flipped_byte_of_any_covered_file_is_found(run):
    for name in (name for name, state in CHECKED.items() if state == "good"):
        file = run / name
        sound = file.read_bytes()
        for place in (0, len(sound) // 2, len(sound) - 1):
            file.write_bytes(sound[:place] + bytes([sound[place] ^ 4]) + sound[place + 1 :])
            found = states(run)
            assert found[name] == "damaged", (name, place)
            # What the damaged file vouched for is then not covered; nothing else is called damaged.
            assert {state for other, state in found.items() if other != name} <= {"good", "not covered"}
        file.write_bytes(sound)
    assert states(run) == CHECKED


def test_a_lost_file_is_missing_and_a_lost_manifest_covers_nothing(run):
    for name in ("config.yaml", "checkpoints/last/weights.safetensors"):
        sound = (run / name).read_bytes()
        (run / name).unlink()
        assert states(run)[name] == "missing"
        (run / name).write_bytes(sound)
    (run / "checkpoints" / "last" / "manifest.json").unlink()
    for path in (run, run / "checkpoints", run / "checkpoints" / "last"):
        found = {state.path.relative_to(run).as_posix(): state.state for state in audit(path)}
        assert found["checkpoints/last/manifest.json"] == "missing"
        assert found["checkpoints/last/weights.safetensors"] == "not covered"
    shutil.copytree(run / "checkpoints" / "last", run.parent / "moved")
    assert states(run.parent / "moved")["manifest.json"] == "missing"
    shutil.rmtree(run / "checkpoints" / "epoch=0")
    (run / "checkpoints" / "epoch=0").mkdir()
    assert states(run)["checkpoints/epoch=0/manifest.json"] == "missing"


def test_a_run_without_its_list_is_not_covered(run):
    (run / "digests.json").unlink()
    assert {states(run)[name] for name in ("config.yaml", "metrics.json")} == {"not covered"}


def test_what_an_interrupted_replace_leaves_is_listed(run):
    folder = run / "checkpoints"
    shutil.copytree(folder / "last", folder / ".last.old")
    for path in (folder, folder / "last"):
        leftover = [state for state in audit(path) if state.state == "leftover"]
        assert [(state.path.name, state.sound) for state in leftover] == [(".last.old", True)]
    shutil.rmtree(folder / "last")
    found = states(folder)
    assert found[".last.old"] == "leftover"
    assert found["last/weights.safetensors"] == "good"
    assert states(folder / "last")["weights.safetensors"] == "good"
    (folder / ".last.old" / "weights.safetensors").write_bytes(b"")
    assert states(folder)["last/weights.safetensors"] == "damaged"
    temporary = folder / ".epoch=1.tmp-4194305-0123abcd"
    temporary.mkdir()
    assert states(folder)[temporary.name] == "leftover"
    assert digested_folders(run) == [run / "adapters/red", folder / "epoch=0", folder / "last"]


def test_more_files_in_a_checkpoint_and_links_are_not_covered(run, tmp_path):
    (run / "checkpoints" / "last" / "extra.pkl").write_bytes(b"x")
    (run / "link").symlink_to(tmp_path)
    assert states(run)["checkpoints/last/extra.pkl"] == "not covered"
    assert states(run)["link"] == "not covered"


@pytest.mark.parametrize("point", ["list_synced", "list_renamed", "list_parent_synced", "file_renamed"])
def test_a_kill_between_list_and_file_is_no_damage(run, point):
    """Twice in a row, since the second write must still know the version that is there."""
    for text in ("seed: 2\n", "seed: 3\n"):
        child = os.fork()
        if child == 0:
            with inject_faults(lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == point else None):
                write_text(run / "config.yaml", text)
            os._exit(1)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert states(run)["config.yaml"] == "good"
    (run / "config.yaml").write_text("seed: 4\n")
    assert states(run)["config.yaml"] == "damaged"


def test_a_damaged_file_does_not_become_good_by_the_next_interrupted_write(run):
    (run / "config.yaml").write_text("seed: 9\n")
    child = os.fork()
    if child == 0:
        with inject_faults(lambda name: os.kill(os.getpid(), signal.SIGKILL) if name == "list_renamed" else None):
            write_text(run / "config.yaml", "seed: 2\n")
        os._exit(1)
    os.waitpid(child, 0)
    assert states(run)["config.yaml"] == "damaged"


def test_a_damaged_list_stops_the_next_write_and_says_how_to_go_on(run):
    file = run / "digests.json"
    file.write_bytes(file.read_bytes().replace(b'"bytes": 8', b'"bytes": 9'))
    with pytest.raises(DamagedError, match=r"digests\.json is damaged.*Delete it"):
        write_text(run / "config.yaml", "seed: 2\n")
    assert (run / "config.yaml").read_text() == "seed: 1\n"
    file.unlink()
    write_text(run / "config.yaml", "seed: 2\n")
    assert states(run)["config.yaml"] == "good"


def test_no_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    for name in ("file", "nowhere"):
        with pytest.raises(MissingError, match=name):
            audit(tmp_path / name)
