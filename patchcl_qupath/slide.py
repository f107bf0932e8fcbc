"""Slides: any region, at the working resolution, in one read.

``Slide`` holds metadata only, so it is cheap to pickle; each process opens the file when it
first reads from it. Slides and tiled TIFF come through tiffslide's zarr view, chunk by chunk;
an image that is one single chunk (PNG, JPEG, most plain TIFF) is decoded once and kept.

Averages are exact integer sums over areas whose edges depend on the whole grid alone, never on
the box that is read: that is why neighbouring tiles agree on their halo to the last bit.
"""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray
from PIL import Image
from tiffslide import TiffSlide

from patchcl_qupath.datatypes import Box, ImageEntry
from patchcl_qupath.errors import ImageError, SlideError

PILLOW_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp"}
MAX_IN_MEMORY_PX = 400_000_000  # of an image that cannot be read in parts: 1.2 GB
MPP_RANGE = (0.05, 4.0)  # beyond it a pixel size is an export's dpi, not a microscope's
SNAP = 0.1  # how far from the requested mpp a whole number of level-0 pixels may be
QUANTA = 256  # area weights are whole multiples of 1/256 px: sums are exact
BLOCK_PX = 2048  # thumbnails are averaged from blocks of about this side

Pair = tuple[float, float]  # (x, y)


@dataclass(frozen=True)
class Slide:
    """One image: its size, its pixel size, and reads on its working grid.

    ``size`` (width, height) of level 0, after bounds; ``mpp_level0`` (x, y) um/px there;
    ``downsample`` (x, y) level-0 px per working px; ``origin`` (x, y) of the bounds in the file.
    """

    name: str
    path: Path
    size: tuple[int, int]
    mpp_level0: Pair
    downsample: Pair
    origin: tuple[int, int] = (0, 0)

    @classmethod
    def open(cls, entry: ImageEntry, mpp: float = 0.5, override_mpp: float | None = None) -> Slide:
        """The slide of a project's image, on a grid of about ``mpp`` um/px.

        The pixel size is QuPath's, else the file's, else ``override_mpp``: what a person says
        about many images at once is for those of which nothing better is known. Where a whole
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
            file = _file(entry.path)
            # An unknown codec or a damaged file shows up here, not an hour into the run.
            np.asarray(file.levels[-1].pixels[:1, :1])
        except Exception as error:
            raise _unreadable(entry.name, error) from error
        origin, size = _frame(entry, file)
        mpp_level0 = _pixel_size(entry, file.mpp, override_mpp)
        return cls(entry.name, entry.path, size, mpp_level0, _downsample(mpp, mpp_level0), origin)

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the working grid; a part of a pixel at the far edges is left out."""
        (width, height), (x, y) = self.size, self.downsample
        return max(1, math.floor(height / y)), max(1, math.floor(width / x))

    @property
    def mpp(self) -> float:
        """um per working px; its square is the area of a working px in um^2."""
        return math.sqrt(math.prod(self.mpp_level0) * math.prod(self.downsample))

    def read(self, box: Box) -> NDArray[np.uint8]:
        """The pixels (rows, cols, 3) of a box of the working grid, area-averaged.

        One slice of the coarsest pyramid level that is fine enough, so no chunk is decoded twice.
        Raises SlideError for damaged pixels.
        """
        rows, cols = self.shape
        assert 0 <= box.row0 < box.row1 <= rows and 0 <= box.col0 < box.col1 <= cols, box
        try:
            pixels, y, x = _file(self.path).grid(self.downsample, self.origin)
            top, bottom = y.source(box.row0, box.row1)
            left, right = x.source(box.col0, box.col1)
            source = np.asarray(pixels[top:bottom, left:right])[..., :3]
        except Exception as error:
            raise _unreadable(self.name, error) from error
        sums, heights = y.sums(source, (box.row0, box.row1), (top, bottom))
        sums, widths = x.sums(sums.swapaxes(0, 1), (box.col0, box.col1), (left, right))
        return _mean(sums.swapaxes(0, 1), heights, widths)

    def thumbnail_px(self, mpp: float) -> int:
        """Working px per thumbnail px: the whole number nearest to ``mpp`` um."""
        return max(1, round(mpp / self.mpp))

    def thumbnail(self, mpp: float) -> NDArray[np.uint8]:
        """The whole image (h, w, 3) at about ``mpp`` um/px, area-averaged.

        A thumbnail px is ``thumbnail_px(mpp)`` working px wide and high, so (h, w) is ``shape``
        over that, rounded up. Memory does not grow with the slide, nor is a chunk decoded twice:
        blocks of whole chunks are summed one by one. Raises SlideError for damaged pixels.
        """
        px = self.thumbnail_px(mpp)
        h, w = (-(-n // px) for n in self.shape)
        try:
            pixels, y, x = _file(self.path).grid(
                (self.downsample[0] * px, self.downsample[1] * px), self.origin
            )
            total = np.zeros((h, w, 3), dtype=np.int64)
            for top, bottom in _blocks(*y.source(0, h), pixels.chunks[0]):
                for left, right in _blocks(*x.source(0, w), pixels.chunks[1]):
                    block = np.asarray(pixels[top:bottom, left:right])[..., :3]
                    rows, cols = y.covered(top, bottom, h), x.covered(left, right, w)
                    sums, _ = y.sums(block, rows, (top, bottom))
                    sums, _ = x.sums(sums.swapaxes(0, 1), cols, (left, right))
                    total[slice(*rows), slice(*cols)] += sums.swapaxes(0, 1)
        except Exception as error:
            raise _unreadable(self.name, error) from error
        return _mean(total, y.lengths(0, h), x.lengths(0, w))
