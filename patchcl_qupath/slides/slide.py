"""Slides: any region, at the working resolution, in one read.

``Slide`` holds metadata only, so it is cheap to pickle; each process opens the file when it
first reads from it.
"""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Box, ImageEntry
from patchcl_qupath.errors import ImageError, SlideError
from patchcl_qupath.slides.level_grid import LevelGrid
from patchcl_qupath.slides.pyramid import Pyramid, open_pyramid, unreadable

MPP_RANGE = (0.05, 4.0)  # beyond it a pixel size is an export's dpi, not a microscope's
SNAP = 0.1  # how far from the requested mpp a whole number of level-0 pixels may be

Pair = tuple[float, float]  # (x, y)


@dataclass(frozen=True)
class Slide:
    """One image: its size, its pixel size, and reads on its working grid.

    ``size`` (width, height) of level 0, after bounds; ``mpp_level0`` (x, y) um/px there, which
    ``calibrated`` is QuPath's or the file's, else a user's word; ``downsample`` (x, y) level-0 px
    per working px. Of the file: ``origin`` (x, y) of the bounds, and ``levels`` (width, height).
    """

    name: str
    path: Path
    size: tuple[int, int]
    mpp_level0: Pair
    downsample: Pair
    origin: tuple[int, int]
    levels: tuple[tuple[int, int], ...]
    calibrated: bool

    @classmethod
    def open(cls, entry: ImageEntry, mpp: float = 0.5) -> Slide:
        """The slide of a project's image, on a grid of about ``mpp`` um/px.

        The pixel size is QuPath's, else the file's, else ``entry.fallback_mpp``. Where a whole
        number of level-0 pixels is within 10 % of ``mpp``, the grid is made of such blocks
        (resampling by 1.98 would blur in beats); elsewhere it is exactly ``mpp``.

        Raises ImageError with ``entry.problem``; SlideError for a file that is missing, damaged,
        not 8-bit RGB, not the one QuPath saved, or without a usable pixel size.
        """
        if entry.problem:
            raise ImageError(entry.problem)
        if not entry.path.is_file():
            raise SlideError(
                f"{entry.name} is not at {entry.path}: open the project in QuPath and fix its path"
            )
        try:
            pyramid = open_pyramid(entry.path)
            # An unknown codec or a damaged file shows up here, not an hour into the run.
            np.asarray(pyramid.levels[-1].pixels[:1, :1])
        except Exception as error:
            raise unreadable(entry.name, error) from error
        origin, size = _frame(entry, pyramid)
        mpp_level0, calibrated = _pixel_size(entry, pyramid.mpp)
        downsample = _downsample(mpp, mpp_level0)
        levels = tuple(level.pixels.shape[1::-1] for level in pyramid.levels)
        return cls(entry.name, entry.path, size, mpp_level0, downsample, origin, levels, calibrated)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the working grid; a part of a pixel at the far edges is left out."""
        (width, height), (x, y) = self.size, self.downsample
        return max(1, math.floor(height / y)), max(1, math.floor(width / x))

    @property
    def mpp(self) -> float:
        """um per working px; its square is the area of a working px in um^2."""
        return math.sqrt(math.prod(self.grid_mpp))

    @property
    def grid_mpp(self) -> Pair:
        """um per working px, (x, y)."""
        (x, y), (down_x, down_y) = self.mpp_level0, self.downsample
        return x * down_x, y * down_y

    def read(self, box: Box) -> NDArray[np.uint8]:
        """The pixels (rows, cols, 3) of a box of the working grid, area-averaged.

        One slice of the coarsest pyramid level that is fine enough, so no chunk is decoded twice.
        Raises SlideError for damaged pixels.
        """
        assert box == box.grow(0, self.shape), (box, self.shape)
        return self._grid(self.shape, self.downsample).read(box)

    def thumbnail_px(self, mpp: float) -> int:
        """Working px per thumbnail px: the whole number nearest to ``mpp`` um."""
        return max(1, round(mpp / self.mpp))

    def thumbnail(self, mpp: float) -> NDArray[np.uint8]:
        """The whole image (h, w, 3) at about ``mpp`` um/px, area-averaged.

        A thumbnail px is ``thumbnail_px(mpp)`` working px wide and high, so (h, w) is ``shape``
        over that, rounded up. Memory does not grow with the slide, nor is a chunk decoded twice.
        Raises SlideError for damaged pixels.
        """
        px = self.thumbnail_px(mpp)
        rows, cols = self.shape
        x, y = self.downsample
        return self._grid((-(-rows // px), -(-cols // px)), (x * px, y * px)).read_whole()

    def _grid(self, shape: tuple[int, int], downsample: Pair) -> LevelGrid:
        """A grid over the image, on the coarsest level that is fine enough."""
        try:
            level = open_pyramid(self.path).level_for(downsample)
        except FileNotFoundError as error:
            raise SlideError(
                f"{self.name} is not at {self.path}, as seen from {platform.node()}: bring it "
                "back, or share its folder with that machine, and run again"
            ) from error
        except Exception as error:
            raise unreadable(self.name, error) from error
        return LevelGrid.of(
            self.name, level=level, shape=shape, downsample=downsample, origin=self.origin
        )


def _frame(entry: ImageEntry, pyramid: Pyramid) -> tuple[tuple[int, int], tuple[int, int]]:
    """Origin (x, y) in the file, and size (width, height), of the image as QuPath shows it.

    QuPath crops what OpenSlide reads to the slide's bounds, and saved the size that resulted.
    """
    rows, cols = pyramid.levels[0].pixels.shape[:2]
    frames = [((0, 0), (cols, rows))]
    if pyramid.bounds:
        x, y, width, height = map(int, pyramid.bounds)
        frames.insert(0 if entry.use_bounds else 1, ((x, y), (width, height)))
    if entry.size is None:
        return frames[0]
    for origin, size in frames:
        if size == entry.size:
            return origin, size
    raise SlideError(
        f"{entry.name} is {cols} x {rows} px, but QuPath saved {entry.size[0]} x {entry.size[1]}: "
        f"{entry.path} is another image; fix its path in QuPath"
    )


def _pixel_size(entry: ImageEntry, file_mpp: tuple[float, ...] | None) -> tuple[Pair, bool]:
    """(x, y) um/px at level 0, the first usable of QuPath's, the file's and the user's; and
    whether it was not the user's."""
    known = [mpp for mpp in (entry.mpp, file_mpp) if mpp is not None]
    for x, y in known:
        if _usable(x) and _usable(y):
            return (x, y), True
    fallback = entry.fallback_mpp
    if fallback is not None and _usable(fallback):
        return (fallback, fallback), False
    found = f"a pixel size of {known[0][0]:.4g} um, which cannot be" if known else "no pixel size"
    raise SlideError(
        f"{entry.name} has {found}: set it in QuPath (Image tab, double-click 'Pixel width'), "
        "or pass --mpp 0.25"
    )


def _usable(mpp: float) -> bool:
    return MPP_RANGE[0] <= mpp <= MPP_RANGE[1]


def _downsample(mpp: float, mpp_level0: Pair) -> Pair:
    """(x, y) level-0 px per working px."""
    x, y = mpp_level0
    if abs(x - y) < 0.02 * x:  # square but for calibration: blocks stay square
        x = y = math.sqrt(x * y)
    return _factor(mpp, x), _factor(mpp, y)


def _factor(mpp: float, mpp_level0: float) -> float:
    whole = max(1, round(mpp / mpp_level0))
    return float(whole) if abs(whole * mpp_level0 - mpp) <= SNAP * mpp else mpp / mpp_level0
