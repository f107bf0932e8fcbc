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
from patchcl_qupath.slides.void import MARGIN_PX, VoidMask, black, painted

BLOCK_PX = 2048  # side, about, of the blocks of a level that a whole grid is averaged from


MIN_BLACK = 0.0005  # fraction of a block's pixels that are black: nuclei have fewer
GREY = 128  # of pixels that cannot be decoded


@dataclass(frozen=True, eq=False)
class Overview:
    """The pixels (h, w, 3) uint8 of a whole grid; which are damaged (h, w): these are grey.

    ``black`` (h, w) is the fraction of each pixel that is as black as a void.
    """

    pixels: NDArray[np.uint8]
    damaged: NDArray[np.bool_]
    black: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over grid px: of colours (h, w, 3), and of black level px (h, w, 1)."""

    colours: NDArray[np.int64]
    black: NDArray[np.int64]
    damaged: NDArray[np.bool_]

    @classmethod
    def zero(cls, shape: tuple[int, int]) -> _Sums:
        """Those of nothing."""
        return cls(
            np.zeros((*shape, 3), np.int64), np.zeros((*shape, 1), np.int64), np.zeros(shape, bool)
        )


@dataclass(frozen=True, kw_only=True)
class LevelGrid:
    """A grid of ``shape`` (rows, cols) over a pyramid level.

    ``rows`` and ``cols`` are the positions of its pixels on the level's axes. ``name`` is that of
    the slide, for error messages. Pixels of the level in ``void`` are read as glass.
    """

    name: str
    level: Level
    shape: tuple[int, int]
    rows: Axis
    cols: Axis
    void: VoidMask | None = None

    @classmethod
    def of(
        cls,
        name: str,
        *,
        level: Level,
        shape: tuple[int, int],
        downsample: tuple[float, float],
        origin: tuple[int, int],
        void: VoidMask | None = None,
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
            void=void,
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
        total = _Sums.zero(shape)
        for source in self._blocks(shape):
            self._add(source, total)
        spans = (0, shape[0]), (0, shape[1])
        pixels = self._mean(total.colours, *spans)
        pixels[total.damaged] = GREY
        areas = np.outer(self.rows.lengths(*spans[0]), self.cols.lengths(*spans[1]))
        return Overview(
            pixels=_repeated(pixels, self.shape),
            damaged=_repeated(total.damaged, self.shape),
            black=_repeated(total.black[..., 0] / areas, self.shape),
        )

    def _blocks(self, shape: tuple[int, int]) -> Iterator[tuple[Span, Span]]:
        """The level px of a grid of ``shape``, in blocks of rows and columns."""
        for rows in _blocks(self.rows.source(0, shape[0]), self.level.chunk[0], BLOCK_PX):
            for cols in _blocks(self.cols.source(0, shape[1]), self.level.chunk[1], BLOCK_PX):
                yield rows, cols

    def _add(self, source: tuple[Span, Span], total: _Sums) -> None:
        """Add level px to sums over the grid; grid px with damaged ones are marked instead."""
        rows = self.rows.touched(*source[0], total.damaged.shape[0])
        cols = self.cols.touched(*source[1], total.damaged.shape[1])
        at = slice(*rows), slice(*cols)
        try:
            pixels = self._pixels(source)
        except DamagedError:
            chunks = [
                (part_rows, part_cols)
                for part_rows in _blocks(source[0], self.level.chunk[0], 1)
                for part_cols in _blocks(source[1], self.level.chunk[1], 1)
            ]
            if chunks == [source]:
                total.damaged[at] = True
                if total.damaged.all():
                    raise
                return
            for part in chunks:
                self._add(part, total)
            return
        axes = self.rows, self.cols
        total.colours[at] += sums(pixels, axes, (rows, cols), source)
        is_black = np.empty((*pixels.shape[:2], 1), np.uint8)
        if black(pixels, is_black) > MIN_BLACK * is_black.size:
            total.black[at] += sums(is_black, axes, (rows, cols), source)

    def _sums(self, rows: Span, cols: Span, source: tuple[Span, Span]) -> NDArray[np.integer]:
        """The sums (h, w, 3) over grid px ``rows`` and ``cols`` of level px ``source``."""
        return sums(self._pixels(source), (self.rows, self.cols), (rows, cols), source)

    def _pixels(self, source: tuple[Span, Span]) -> NDArray[np.uint8]:
        """Level px (h, w, 3) of rows and columns; voids are glass.

        Damaged px around them have no part in which are void.
        """
        if self.void is None or self.void.within(source, self.level.scale) is None:
            return self._stored(source)
        rows, cols = (
            (max(0, start - MARGIN_PX), min(axis.size, stop + MARGIN_PX))
            for axis, (start, stop) in zip((self.rows, self.cols), source, strict=True)
        )
        try:
            pixels = self._painted((rows, cols))
        except DamagedError:
            return self._painted(source)
        inner = (slice(a - b[0], z - b[0]) for (a, z), b in zip(source, (rows, cols), strict=True))
        return pixels[tuple(inner)]

    def _painted(self, source: tuple[Span, Span]) -> NDArray[np.uint8]:
        """Level px (h, w, 3) of rows and columns, of which void ones are glass: see ``painted``."""
        assert self.void is not None
        blocks = self.void.within(source, self.level.scale)
        assert blocks is not None
        return painted(self._stored(source), blocks)

    def _stored(self, source: tuple[Span, Span]) -> NDArray[np.uint8]:
        """Level px (h, w, 3) of rows and columns, as they are in the file."""
        try:  # decoders raise anything
            return np.asarray(self.level.pixels[slice(*source[0]), slice(*source[1])])
        except Exception as error:
            raise unreadable(self.name, error) from error

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
