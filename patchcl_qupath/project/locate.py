"""Where the file of an image is now, of a project that may have moved."""

from __future__ import annotations

import ntpath
import os
import posixpath
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath, PureWindowsPath

from patchcl_qupath.storage.files import is_file, is_too_long

SEARCH_DEPTH = 4  # folders, the project's included, in which QuPath looks for a lost image


@dataclass(frozen=True, kw_only=True)
class Location:
    """Where a file is: ``path``, None if it is not found.

    Then ``candidates`` are files of its name that may be it or another image; ``denied`` is whether
    its folder may not be read; and ``too_long`` is where it may be, but Windows finds nothing.
    """

    path: Path | None = None
    candidates: tuple[Path, ...] = ()
    denied: bool = False
    too_long: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Locator:
    """Finds the files of a project in ``folder``; ``saved`` is the path of the project file then.

    ``stored`` are the paths of all its images. As QuPath's window does, ``locate`` tries the same
    places in the same order; but it never takes one file for two images of different paths.
    """

    folder: Path
    saved: PurePath | None
    stored: Sequence[PurePath]

    def locate(self, stored: PurePath) -> Location:
        """The present place of a file whose path was ``stored``, one of the paths of the project.

        The same path; the same path relative to the project; a file of the same name in the
        project's folder. Of several such files it is the one that has most folders in common with
        ``stored``, counted from the end. Where images of several paths have this file name, it has
        one at least.
        """
        path = self._in_place(stored)
        found = self._searched[stored] if path is None else Location(path=path)
        if found.path is None and not found.candidates:
            too_long = next(filter(is_too_long, self._places(stored)), None)
            return Location(denied=_denied(stored), too_long=too_long)
        return found

    def _in_place(self, stored: PurePath) -> Path | None:
        """The file at its stored path, or where it moved along with the project."""
        return next(filter(is_file, self._places(stored)), None)

    def _places(self, stored: PurePath) -> Iterator[Path]:
        """The stored path of a file, where this system has such, and where it moved along with the
        project; each in all spellings."""
        if isinstance(stored, PureWindowsPath) == (os.name == "nt"):
            yield from _spellings(Path(stored))
        moved = self._moved_along(stored)
        if moved is not None:
            yield from _spellings(moved)

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
    def _searched(self) -> dict[PurePath, Location]:
        """The locations of all images that are not in place, by their stored paths."""
        places = {path: self._in_place(path) for path in self.stored}
        taken = {os.path.realpath(place) for place in places.values() if place is not None}
        by_name: dict[str, list[PurePath]] = {}
        for path in places:
            by_name.setdefault(_name(path.name, path), []).append(path)
        found = {}
        for paths in by_name.values():
            lost = [path for path in paths if places[path] is None]
            for path in lost:
                files = self._files_named(path)
                best = _best(path, files, alone=len(paths) == 1)
                others = [other for other in lost if other != path]
                if best is None or os.path.realpath(best) in taken or _claimed(best, path, others):
                    found[path] = Location(candidates=tuple(files))
                else:
                    found[path] = Location(path=best)
        return found

    def _files_named(self, stored: PurePath) -> list[Path]:
        """Files of a stored path's name; only where there are none, those of its other spellings.

        They are in the project's folder, and were not made by QuPath or by this program.
        """
        name = _name(stored.name, stored)
        alike = self._files_by_name.get(name.casefold(), [])
        same = [file for file in alike if _name(file.name, stored) == name]
        return [file for file in same if file.name == stored.name] or same

    @cached_property
    def _files_by_name(self) -> dict[str, list[Path]]:
        """Files in the project's folder, by their names as Windows compares them."""
        found: dict[str, list[Path]] = {}
        for file in _walk(self.folder, SEARCH_DEPTH):
            name = _name(file.name, PureWindowsPath())
            found.setdefault(name, []).append(file)
        return found


def _best(stored: PurePath, files: Sequence[Path], alone: bool) -> Path | None:
    """The one of several files of its name that a lost image is; None if it cannot be told.

    ``alone`` is whether no other image of the project has this file name: then the name is enough,
    and of several files the nearest is taken, as in QuPath.
    """
    common = max((_common(file, stored) for file in files), default=0)
    best = [file for file in files if _common(file, stored) == common]
    if alone:
        depth = min((len(file.parts) for file in best), default=0)
        best = [file for file in best if len(file.parts) == depth]
    return best[0] if len(best) == 1 and (alone or common > 1) else None


def _claimed(file: Path, stored: PurePath, others: Sequence[PurePath]) -> bool:
    """Whether a file may as well be another lost image."""
    return any(_common(file, other) >= _common(file, stored) for other in others)


def _common(file: Path, stored: PurePath) -> int:
    """How many parts of two paths are equal, from the end."""
    count = 0
    for one, other in zip(reversed(file.parts), reversed(stored.parts), strict=False):
        if _name(one, stored) != _name(other, stored):
            break
        count += 1
    return count


def _name(name: str, stored: PurePath) -> str:
    """A name of a file or folder as the system of a stored path compares it.

    Windows does not tell a from A. macOS writes é as e and a mark, others as one character.
    """
    name = unicodedata.normalize("NFC", name)
    return name.casefold() if isinstance(stored, PureWindowsPath) else name


def _spellings(path: Path) -> Iterator[Path]:
    """A path, and how it would be written on another system, with letters that have marks."""
    text = str(path)
    for spelled in dict.fromkeys([text, *(unicodedata.normalize(f, text) for f in ("NFC", "NFD"))]):
        yield Path(spelled)


def _denied(stored: PurePath) -> bool:
    """Whether a path may not be looked at."""
    try:
        Path(stored).stat()
    except PermissionError:
        return True
    except (OSError, ValueError):
        pass
    return False


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    """Files and OME-Zarr of a folder, then those of its folders, without hidden ones.

    What QuPath keeps beside a project in ``data``, and this program in ``patchcl``, are no slides.
    """
    try:
        inside = sorted(item for item in folder.iterdir() if not item.name.startswith("."))
    except OSError:
        return
    images = [item for item in inside if is_file(item)]
    yield from images
    ours = {"patchcl"} | ({"data"} if any(_is_project(item) for item in inside) else set())
    if depth > 1:
        for item in inside:
            if item.name not in ours and item not in images and _is_folder(item):
                yield from _walk(item, depth - 1)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _is_project(item: Path) -> bool:
    return item.suffix.lower() == ".qpproj"
