"""Video files by the names that a data set gives them, whatever their endings."""

from __future__ import annotations

import os
from pathlib import Path

from fulgurite.samples import DataError
from fulgurite.samples.video import SUFFIXES


def bare(name: str) -> str:
    """A name without the ending of a video file, where it has one."""
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in SUFFIXES else name


class VideoFolder:
    """The video files of a folder and of the folders below it; listed once, when first asked for.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files: dict[str, list[Path]] | None = None

    @property
    def files(self) -> dict[str, list[Path]]:
        """Files by their names without ending."""
        if self._files is None:
            self._files = {}
            for folder, _, names in os.walk(self.path, followlinks=True):
                for name in names:
                    if bare(name) != name:
                        self._files.setdefault(bare(name), []).append(Path(folder, name))
        return self._files

    def find(self, names: tuple[str, ...], where: str) -> Path:
        """The file that has one of ``names``, with or without ending.

        Args:
            names: the first that there is holds.
            where: what names the video, for messages.

        Raises:
            DataError: there is none, or there are several and none has the very name.
        """
        for name in names:
            found = self.files.get(bare(name), [])
            exact = [path for path in found if path.name == name]
            if len(found) > 1 and len(exact) != 1:
                raise DataError(f"{where}: {len(found)} files are the video {name!r}: {sorted(map(str, found))[:3]}")
            if found:
                return (exact or found)[0]
        raise DataError(
            f"{where}: no file of the video {' or '.join(map(repr, names))} below {self.path}; endings looked for are "
            f"{' '.join(SUFFIXES)}, set --data.videos for another folder"
        )
