"""What is kept against a slow reference, and kills at every point between the save and the last deletion."""

import math
import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fulgurite.checkpoints import list_checkpoints, newest_good, retain, save_checkpoint_folder
from fulgurite.checkpoints.atomic import (
    FOLDER_FAULT_POINTS,
    REMOVE_FAULT_POINTS,
    inject_faults,
    remove_leftovers,
)
from fulgurite.checkpoints.retention import Candidate, plan

candidates = st.lists(
    st.tuples(st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0, math.nan])), st.booleans()), max_size=7
).map(
    lambda rows: [Candidate(Path(f"c{n}"), f"2026-01-{n:02}", score, finite) for n, (score, finite) in enumerate(rows)]
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(candidates, st.integers(1, 4), st.integers(0, 3), st.sampled_from(["min", "max"]), st.randoms())
def test_plan_keeps_the_newest_the_best_and_the_last_finite(found, last, best, mode, random):
    shuffled = list(found)
    random.shuffle(shuffled)
    doomed = plan(shuffled, last, best, mode)
    assert [c.created for c in doomed] == sorted(c.created for c in doomed)
    kept = [c for c in found if c not in doomed]
    for candidate in found:
        newer = [c for c in found if c.created > candidate.created]
        is_scored = candidate.score is not None and candidate.score == candidate.score
        better = [
            c
            for c in found
            if c.score is not None
            and is_scored
            and (c.score > candidate.score if mode == "max" else c.score < candidate.score)
        ]
        equal_newer = [c for c in newer if is_scored and c.score == candidate.score]
        reasons = [
            len(newer) < last,
            is_scored and len(better) + len(equal_newer) < best,
            candidate.finite and not any(c.finite for c in newer),
        ]
        assert (candidate in kept) == any(reasons)


@pytest.mark.parametrize("wrong", [{"last": 0}, {"best": -1}, {"mode": "most"}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=str(*wrong.values())):
        plan([], **wrong)


def save(folder, step, score=0.0, finite=True):
    facts = {"global_step": step, "finite": finite}
    tensors = {"weights": {"w": torch.full((3,), float(step))}}
    save_checkpoint_folder(folder / f"step={step}", tensors, metrics={"score": score}, facts=facts)


def steps(folder):
    return [manifest.facts["global_step"] for _, manifest in list_checkpoints(folder.parent)]


def damage(folder, step):
    file = folder / f"step={step}" / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "checkpoints"


def test_what_is_kept_on_disk(folder):
    for step, score, finite in ((1, 0.9, True), (2, 0.1, True), (3, 0.5, True), (4, 0.2, False), (5, 0.3, False)):
        save(folder, step, score, finite)
    assert [path.name for path in retain(folder, last=1, best=1, metric="score")] == ["step=2", "step=4"]
    assert steps(folder) == [1, 3, 5]
    assert retain(folder, last=1, best=1, metric="score") == []
    assert [path.name for path in retain(folder)] == ["step=1"]


def test_the_newest_good_one_stays_where_all_that_is_kept_is_damaged(folder):
    for step in (1, 2, 3, 4):
        save(folder, step)
    damage(folder, 4)
    damage(folder, 3)
    assert [path.name for path in retain(folder, last=1)] == ["step=1", "step=3"]
    assert steps(folder) == [2, 4]
    assert newest_good(folder)[1].facts["global_step"] == 2


def test_a_damaged_manifest_is_left_alone(folder):
    for step in (1, 2, 3):
        save(folder, step)
    (folder / "step=1" / "manifest.json").write_bytes(b"{}")
    assert [path.name for path in retain(folder)] == ["step=2"]
    assert (folder / "step=1").is_dir()


POINTS = [*FOLDER_FAULT_POINTS, "tensor_written", "before_manifest", "before_delete", *REMOVE_FAULT_POINTS]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("occurrence", [1, 2])
def test_killed_anywhere_between_save_and_delete_a_good_finite_one_is_left(folder, point, occurrence):
    """Three rounds of save and delete, each killed; then one that goes through."""
    save(folder, 1)
    save(folder, 2)
    survived = 0
    for step in (3, 4, 5):
        child = os.fork()
        if child == 0:
            met = []

            def hook(name, met=met):
                met.append(name)
                if met.count(point) == occurrence:
                    os.kill(os.getpid(), signal.SIGKILL)

            with inject_faults(hook):
                save(folder, step, finite=step < 4)
                retain(folder, last=1)
            os._exit(0)
        survived += not os.WIFSIGNALED(os.waitpid(child, 0)[1])
        path, manifest = newest_good(folder)
        assert manifest.facts["global_step"] >= 2, path
        assert any(m.facts["finite"] for _, m in list_checkpoints(folder.parent))
    remove_leftovers(folder)
    save(folder, 6, finite=False)
    retain(folder, last=1)
    left = steps(folder)
    assert left[-1] == 6
    assert len(left) == 2
    assert {entry.name for entry in folder.iterdir()} == {f"step={step}" for step in left}
    assert survived < 3 or occurrence == 2 or point == "renamed_away"
