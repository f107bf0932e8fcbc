"""What an open image file is: a pyramid of levels, whose pixels are sliced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.errors import DamagedError, SlideError, is_damage, too_little_memory
from patchcl_qupath.slides.pixel_size import PixelSize

MAX_IN_MEMORY_PX = 178_000_000  # of a level that cannot be read in parts: 0.5 GB, Pillow's limit

# Names of images that show the whole slide, or its label: those of QuPath's BioFormatsImageServer.
_ASSOCIATED = {
    "label",
    "label image",
    "macro",
    "macro image",
    "macro mask image",
    "overview",
    "overview image",
    "thumbnail",
    "thumbnail image",
}
_MUCH_LARGER = 4  # times the pixels of the first image, there, too


@dataclass(frozen=True)
class Level:
    """One level of a pyramid.

    ``half`` is the same at half its size, decoded at that size: averages of 2 x 2 px within a grey
    value or so. None where it cannot be decoded so.
    """

    pixels: Any  # sliced by rows and columns: uint8 (rows, cols, 3), as a numpy array
    chunk: tuple[int, int]  # (rows, cols) that are decoded together
    scale: tuple[float, float]  # (x, y) level-0 px per px of this level
    half: Level | None = None

    def averaged(self, downsample: tuple[float, float], origin: tuple[int, int]) -> Level:
        """The level to average the px of a grid from: ``half`` where they are blocks of its px.

        The grid has ``downsample`` (x, y) level-0 px per px, and begins at ``origin`` (x, y).
        """
        if self.half is None:
            return self
        lengths = zip((*downsample, *origin), 2 * self.half.scale, strict=True)
        return self.half if all(n % scale == 0 for n, scale in lengths) else self


@dataclass(frozen=True, eq=False)
class Pyramid:
    """An open image: its levels, finest first; its bounds in level-0 px.

    ``pixel_sizes`` are those that the file has, the most trusted first. ``number`` is that of the
    image in its file, from 0.
    """

    levels: list[Level]
    pixel_sizes: tuple[PixelSize, ...] = ()
    bounds: tuple[float, ...] | None = None  # x, y, width, height
    number: int = 0

    @property
    def held_bytes(self) -> int:
        """Memory of its decoded pixels, of levels that cannot be read in parts."""
        held = (level.pixels for level in self.levels if isinstance(level.pixels, np.ndarray))
        return sum(pixels.nbytes for pixels in held)

    def level_for(self, downsample: tuple[float, float]) -> Level:
        """The coarsest level that is fine enough for ``downsample`` (x, y) level-0 px per px."""
        fine_enough = [
            level
            for level in self.levels[1:]
            if all(s <= d * 1.01 for s, d in zip(level.scale, downsample, strict=True))
        ]
        return [self.levels[0], *fine_enough][-1]

    def check_readable(self) -> None:
        """Raise what decoding raises, if not one of some pixels of the image can be decoded.

        An unknown codec raises here, not an hour into the run; a damaged corner does not.
        """
        errors: list[Exception] = []
        for level in self.levels[::-1]:
            rows, cols = level.pixels.shape[:2]
            for row, col in ((0, 0), (rows // 2, cols // 2), (rows - 1, cols - 1)):
                try:
                    level.pixels[row : row + 1, col : col + 1]
                except Exception as error:  # decoders raise anything
                    if not is_damage(error):
                        raise
                    errors.append(error)
                else:
                    return
        raise errors[0]


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which image of a file is meant: by its number, its name, or its size (width, height).

    Without any, it is the one that QuPath's Bio-Formats shows (see ``shown``).
    """

    series: int | None = None
    name: str | None = None
    size: tuple[int, int] | None = None

    @classmethod
    def of(cls, entry: ImageEntry) -> Selection:
        """What a project says of an image."""
        return cls(series=entry.series, name=entry.series_name, size=entry.size)


def is_associated(name: str, levels: int) -> bool:
    """Whether an image of that name and number of levels only shows a slide, or its label."""
    return levels == 1 and name.lower() in _ASSOCIATED


def shown(sizes: Sequence[tuple[int, int]], associated: Sequence[bool]) -> int:
    """The number of the image of a file that QuPath's Bio-Formats shows where none is named.

    It is the first that is not associated, unless the largest has more than 4 times its pixels.
    ``sizes`` are the (width, height) of all images.
    """
    possible = [number for number, is_no_slide in enumerate(associated) if not is_no_slide]
    possible = possible or list(range(len(sizes)))
    first, largest = possible[0], max(possible, key=lambda number: math.prod(sizes[number]))
    is_much_larger = math.prod(sizes[largest]) > _MUCH_LARGER * math.prod(sizes[first])
    return largest if is_much_larger else first


class MissingReaderError(Exception):
    """A format that is read by OpenSlide, which is not installed."""


class AmbiguousPathError(ValueError):
    """A path that a reader takes for several: one with ``::``."""


def level_scale(shape: tuple[int, int], finer: Sequence[Level]) -> tuple[float, float]:
    """(x, y) level-0 px per px of a level of ``shape``."""
    # A level of 62 px below one of 250 is a truncated quarter, not 1 / 4.03 of it: QuPath, too,
    # takes the whole number wherever less than one px is missing.
    level0 = finer[0].pixels.shape[:2] if finer else shape
    y, x = (
        whole if abs(n0 / (whole := max(1, round(n0 / n))) - n) < 1 else n0 / n
        for n0, n in zip(level0, shape, strict=True)
    )
    return float(x), float(y)


def check_memory(px: int) -> None:
    """Raise ValueError for a level that must be read in one piece, and is too large for that."""
    if px > MAX_IN_MEMORY_PX:
        raise ValueError(f"{px / 1e6:.0f} megapixels in one piece: it needs tiles to be read")


def unreadable(name: str, error: Exception) -> SlideError:
    """The error, with advice, for a file that cannot be opened or decoded."""
    if isinstance(error, MemoryError):
        return SlideError(too_little_memory(f"read {name}", error))
    known = error.reason if isinstance(error, DamagedError) else str(error)
    reason = " ".join(known.split()) or type(error).__name__
    if isinstance(error, MissingReaderError):
        return SlideError(
            f"{name} cannot be read ({reason}): pip install 'patchcl-qupath[openslide]'"
        )
    if isinstance(error, AmbiguousPathError):
        return SlideError(
            f"{name} cannot be read: rename the folder or file that has :: in its name"
        )
    if isinstance(error, PermissionError):
        return SlideError(f"{name} may not be read from here: ask for the permission")
    message = (
        f"{name} cannot be read ({reason}): if QuPath shows it, export it as OME-TIFF (rendered "
        "RGB) and add that; if not, copy the file again"
    )
    return DamagedError(message, reason) if is_damage(error) else SlideError(message)
