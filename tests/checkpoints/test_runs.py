"""Run folders and the newest checkpoint in them."""

from datetime import datetime

import pytest
import torch

from fulgurite.checkpoints import (
    DamagedError,
    WriteError,
    list_checkpoints,
    new_run,
    newest_checkpoint,
    save_checkpoint_folder,
)


def test_runs_of_one_second_do_not_meet(tmp_path):
    time = datetime(2026, 3, 1, 14, 5, 9)
    paths = [new_run(tmp_path, "quickstart", time) for _ in range(3)]
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == [
        "quickstart/2026-03-01_14-05-09",
        "quickstart/2026-03-01_14-05-09-2",
        "quickstart/2026-03-01_14-05-09-3",
    ]
    assert all(path.is_dir() for path in paths)


@pytest.mark.parametrize("name", ["", "..", "a/b", "../x", "a b"])
def test_names_that_are_no_folder_names(tmp_path, name):
    with pytest.raises(ValueError, match="experiment="):
        new_run(tmp_path, name)


def test_root_that_is_a_file(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(WriteError, match="runs"):
        new_run(tmp_path / "runs", "x")


def test_newest_is_by_time_of_writing(tmp_path):
    assert newest_checkpoint(tmp_path) is None
    folder = tmp_path / "checkpoints"
    for name in ("epoch=1-step=20", "epoch=0-step=3", "last"):
        save_checkpoint_folder(folder / name, {"weights": {"a": torch.ones(1)}})
    (folder / "half").mkdir()
    (folder / ".x.tmp-1-00000000").mkdir()
    assert [path.name for path, _ in list_checkpoints(tmp_path)] == [
        "epoch=1-step=20",
        "epoch=0-step=3",
        "last",
    ]
    (folder / "last").rename(folder / ".last.old")
    assert newest_checkpoint(tmp_path) == folder / "last"


def test_a_damaged_manifest_names_the_newest_good_one(tmp_path):
    folder = tmp_path / "checkpoints"
    for name in ("a", "b", "c"):
        save_checkpoint_folder(folder / name, {"weights": {"a": torch.ones(1)}})
    (folder / "c" / "manifest.json").write_text("{}")
    with pytest.raises(
        DamagedError, match=r"c/manifest\.json is damaged.*newest good checkpoint beside it is .*checkpoints/b"
    ):
        newest_checkpoint(tmp_path)
