"""Video files by the names that data sets give them."""

import pytest

from fulgurite.datamodules.video_folder import VideoFolder
from fulgurite.samples import DataError


@pytest.fixture
def folder(tmp_path):
    for name in ("a.MP4", "in/b.webm", "c.avi", "c.mkv", "d.mp4", "in/d.mp4", "notes.txt", "clip.1.mp4"):
        path = tmp_path / "videos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "e.mov").touch()
    (tmp_path / "videos" / "linked").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "videos"


@pytest.mark.parametrize(
    ("names", "file"),
    [
        (("a",), "a.MP4"),
        (("a.mp4",), "a.MP4"),
        (("none", "b.avi"), "in/b.webm"),
        (("c.avi",), "c.avi"),
        (("c.mkv",), "c.mkv"),
        (("clip.1",), "clip.1.mp4"),
        (("e",), "linked/e.mov"),
    ],
)
def test_a_name_with_any_ending_or_none_finds_its_file(names, file, folder):
    assert VideoFolder(folder).find(names, "here") == folder / file


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("c", "2 files are the video 'c'"),
        ("d.mp4", "2 files are the video 'd.mp4'"),
        ("notes", "no file of the video 'notes' below"),
        ("notes.txt", "no file of the video 'notes.txt' below"),
    ],
)
def test_none_and_several_are_an_error(name, said, folder):
    with pytest.raises(DataError, match=f"here: {said}"):
        VideoFolder(folder).find((name,), "here")
