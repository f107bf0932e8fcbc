"""A grid over one level of a pyramid, whose pixels are area averages of the level's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Box
from patchcl_qupath.errors import DamagedError
from patchcl_qupath.slides.level import Level, unreadable
from patchcl_qupath.slides.resample import Axis, Span, mean, sums

BLOCK_PX = 2048  # side, about, of the blocks of a level that a whole grid is averaged from


GREY = 128  # of pixels that cannot be decoded


@dataclass(frozen=True, eq=False)
class Overview:
    """The pixels (h, w, 3) uint8 of a whole grid, and which are damaged (h, w): these are grey."""

    pixels: NDArray[np.uint8]
    damaged: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class LevelGrid:
    """A grid of ``shape`` (rows, cols) over a pyramid level.

    ``rows`` and ``cols`` are the positions of its pixels on the level's axes. ``name`` is that of
    the slide, for error messages.
    """

    name: str
    level: Level
    shape: tuple[int, int]
    rows: Axis
    cols: Axis

    @classmethod
    def of(
        cls,
        name: str,
        *,
        level: Level,
        shape: tuple[int, int],
        downsample: tuple[float, float],
        origin: tuple[int, int],
    ) -> LevelGrid:
        """The grid of ``downsample`` (x, y) level-0 px per px that begins at ``origin`` (x, y)."""
        height, width = level.pixels.shape[:2]
        x, y = level.scale
        return cls(
            name=name,
            level=level,
            shape=shape,
            rows=Axis(downsample[1] / y, origin[1] / y, height),
            cols=Axis(downsample[0] / x, origin[0] / x, width),
        )

    def read(self, box: Box) -> NDArray[np.uint8]:
        """The pixels (rows, cols, 3) uint8 of a box, from one slice of the level.

        Raises SlideError for damaged pixels.
        """
        rows = self.rows.covering(box.row0, box.row1)
        cols = self.cols.covering(box.col0, box.col1)
        source = self.rows.source(*rows), self.cols.source(*cols)
        pixels = self._mean(self._sums(rows, cols, source), rows, cols)
        missing = box.row1 - rows[1], box.col1 - cols[1]
        return pixels if missing == (0, 0) else _repeated(pixels, box.shape)

    def read_whole(self) -> Overview:
        """All pixels, with memory for one block of the level at a time.

        Blocks are of whole chunks, so that no chunk is decoded twice. Raises SlideError where none
        of the pixels can be read.
        """
        shape = self.rows.covering(0, self.shape[0])[1], self.cols.covering(0, self.shape[1])[1]
        total = np.zeros((*shape, 3), dtype=np.int64)
        damaged = np.zeros(shape, bool)
        for source in self._blocks(shape):
            self._add(source, total, damaged)
        pixels = self._mean(total, (0, shape[0]), (0, shape[1]))
        pixels[damaged] = GREY
        return Overview(
            pixels=_repeated(pixels, self.shape), damaged=_repeated(damaged, self.shape)
        )

    def _blocks(self, shape: tuple[int, int]) -> Iterator[tuple[Span, Span]]:
        """The level px of a grid of ``shape``, in blocks of rows and columns."""
        for rows in _blocks(self.rows.source(0, shape[0]), self.level.chunk[0], BLOCK_PX):
            for cols in _blocks(self.cols.source(0, shape[1]), self.level.chunk[1], BLOCK_PX):
                yield rows, cols

    def _add(
        self, source: tuple[Span, Span], total: NDArray[np.int64], damaged: NDArray[np.bool_]
    ) -> None:
        """Add level px to sums over the grid; grid px with damaged ones are marked instead."""
        rows = self.rows.touched(*source[0], total.shape[0])
        cols = self.cols.touched(*source[1], total.shape[1])
        at = slice(*rows), slice(*cols)
        try:
            total[at] += self._sums(rows, cols, source)
        except DamagedError:
            chunks = [
                (part_rows, part_cols)
                for part_rows in _blocks(source[0], self.level.chunk[0], 1)
                for part_cols in _blocks(source[1], self.level.chunk[1], 1)
            ]
            if chunks == [source]:
                damaged[at] = True
                if damaged.all():
                    raise
                return
            for part in chunks:
                self._add(part, total, damaged)

    def _sums(self, rows: Span, cols: Span, source: tuple[Span, Span]) -> NDArray[np.integer]:
        """The sums (h, w, 3) over grid px ``rows`` and ``cols`` of level px ``source``."""
        try:  # decoders raise anything
            pixels = np.asarray(self.level.pixels[slice(*source[0]), slice(*source[1])])[..., :3]
        except Exception as error:
            raise unreadable(self.name, error) from error
        return sums(pixels, (self.rows, self.cols), (rows, cols), source)

    def _mean(self, total: NDArray[np.integer], rows: Span, cols: Span) -> NDArray[np.uint8]:
        return mean(total, self.rows.lengths(*rows), self.cols.lengths(*cols))


def _repeated(pixels: NDArray[Any], shape: tuple[int, int]) -> NDArray[Any]:
    """Pixels whose last row and column are repeated until they have a shape.

    The last px of a grid may lie beyond a level, whose size is rounded down.
    """
    more = [(0, n - m) for n, m in zip(shape, pixels.shape[:2], strict=True)]
    if more == [(0, 0), (0, 0)]:
        return pixels
    return np.pad(pixels, [*more, *[(0, 0)] * (pixels.ndim - 2)], mode="edge")


def _blocks(span: Span, chunk: int, at_least: int) -> list[Span]:
    """A span of level px cut at chunk borders into blocks of about ``at_least`` px, or a chunk."""
    start, stop = span
    step = chunk * max(1, at_least // chunk)
    firsts = range(start // step * step, stop, step)
    return [(max(start, first), min(stop, first + step)) for first in firsts]
