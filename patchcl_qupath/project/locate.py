"""Where the file of an image is now, of a project that may have moved."""

from __future__ import annotations

import ntpath
import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath, PureWindowsPath

from patchcl_qupath.storage.files import content_file

SEARCH_DEPTH = 4  # folders, the project's included, in which QuPath looks for a lost image


@dataclass(frozen=True, kw_only=True)
class Locator:
    """Finds the files of a project in ``folder``; ``saved`` is the path of the project file then.

    As QuPath's window does: ``locate`` tries the same places, in the same order.
    """

    folder: Path
    saved: PurePath | None

    def locate(self, stored: PurePath) -> Path | None:
        """The present path of a file whose path was ``stored``; None if it is not found.

        The same path; the same path relative to the project; a file of the same name in the
        project's folder.
        """
        if isinstance(stored, PureWindowsPath) == (os.name == "nt") and _is_image(Path(stored)):
            return Path(stored)
        moved = self._moved_along(stored)
        if moved is not None and _is_image(moved):
            return moved
        return self._files_by_name.get(stored.name)

    def _moved_along(self, stored: PurePath) -> Path | None:
        """The path of a file that moved along with the project; None if it cannot be told."""
        if self.saved is None or type(self.saved) is not type(stored):
            return None
        flavour = ntpath if isinstance(stored, PureWindowsPath) else posixpath
        try:
            relative = flavour.relpath(str(stored), str(self.saved.parent))
        except ValueError:  # another drive
            return None
        return Path(os.path.normpath(self.folder.joinpath(*relative.split(flavour.sep))))

    @cached_property
    def _files_by_name(self) -> dict[str, Path]:
        """Files in the project's folder; of several with one name the first, as in QuPath."""
        found: dict[str, Path] = {}
        for file in _walk(self.folder, SEARCH_DEPTH):
            found.setdefault(file.name, file)
        return found


def _is_image(path: Path) -> bool:
    """Whether a path is that of a file, or of an OME-Zarr."""
    return content_file(path).is_file()


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    """Files and OME-Zarr of a folder, then those of its folders, without hidden ones."""
    try:
        inside = sorted(item for item in folder.iterdir() if not item.name.startswith("."))
    except OSError:
        return
    images = [item for item in inside if _is_image(item)]
    yield from images
    if depth > 1:
        for item in inside:
            if item.is_dir() and item not in images:
                yield from _walk(item, depth - 1)
