"""A grid over one level of a pyramid, whose pixels are area averages of the level's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Box
from patchcl_qupath.slides.pyramid import Level, forget_pyramids, unreadable
from patchcl_qupath.slides.resample import Axis, Span, mean, sums

BLOCK_PX = 2048  # side, about, of the blocks of a level that a whole grid is averaged from


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
        rows, cols = (box.row0, box.row1), (box.col0, box.col1)
        source = self.rows.source(*rows), self.cols.source(*cols)
        return self._mean(self._sums(rows, cols, source), rows, cols)

    def read_whole(self) -> NDArray[np.uint8]:
        """All pixels (rows, cols, 3) uint8, with memory for one block of the level at a time.

        Blocks are of whole chunks, so that no chunk is decoded twice. Raises SlideError for damaged
        pixels.
        """
        height, width = self.shape
        total = np.zeros((height, width, 3), dtype=np.int64)
        for source_rows in _blocks(self.rows.source(0, height), self.level.chunk[0]):
            for source_cols in _blocks(self.cols.source(0, width), self.level.chunk[1]):
                rows = self.rows.touched(*source_rows, height)
                cols = self.cols.touched(*source_cols, width)
                total[slice(*rows), slice(*cols)] += self._sums(
                    rows, cols, (source_rows, source_cols)
                )
        return self._mean(total, (0, height), (0, width))

    def _sums(self, rows: Span, cols: Span, source: tuple[Span, Span]) -> NDArray[np.integer]:
        """The sums (h, w, 3) over grid px ``rows`` and ``cols`` of level px ``source``."""
        try:  # decoders raise anything
            pixels = np.asarray(self.level.pixels[slice(*source[0]), slice(*source[1])])[..., :3]
        except Exception as error:
            forget_pyramids()
            raise unreadable(self.name, error) from error
        return sums(pixels, (self.rows, self.cols), (rows, cols), source)

    def _mean(self, total: NDArray[np.integer], rows: Span, cols: Span) -> NDArray[np.uint8]:
        return mean(total, self.rows.lengths(*rows), self.cols.lengths(*cols))


def _blocks(span: Span, chunk: int) -> list[Span]:
    """A span of level px cut at chunk borders into blocks of about BLOCK_PX."""
    start, stop = span
    step = chunk * max(1, BLOCK_PX // chunk)
    firsts = range(start // step * step, stop, step)
    return [(max(start, first), min(stop, first + step)) for first in firsts]
