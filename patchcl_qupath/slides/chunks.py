"""The pixels of a level as they are in its file, chunk by chunk, with gaps filled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Box
from patchcl_qupath.errors import is_damage
from patchcl_qupath.slides.colour import ToRGB
from patchcl_qupath.slides.level import Level
from patchcl_qupath.slides.level_grid import LevelGrid
from patchcl_qupath.slides.void import GLASS

_PIECE_PX = 512  # side of what is drawn at once from a finer level


class Reader(Protocol):
    """What draws a level from a finer one."""

    def read(self, box: Box) -> NDArray[np.uint8]:
        """The pixels (rows, cols, 3) of a box of the level."""


class ChunkTable(Protocol):
    """A table (chunk rows, chunk columns) of bool, as an array, or made as it is sliced."""

    def __getitem__(self, at: tuple[slice, slice], /) -> NDArray[np.bool_]:
        """A part of the table."""


@dataclass(frozen=True, eq=False, kw_only=True)
class ChunkedPixels:
    """The RGB pixels of a level, whose chunks may be missing or damaged.

    ``stored`` (rows, cols, S) decodes chunks of ``chunk`` (rows, cols) as it is sliced, and
    ``to_rgb`` makes RGB of them. ``missing`` (chunk rows, chunk columns) has no chunk in the file;
    None where all have. What is missing or damaged is drawn from ``finer``, as QuPath and OpenSlide
    do. At level 0, where there is no finer one, missing chunks are glass, and damaged ones raise.
    """

    stored: Any
    chunk: tuple[int, int]
    to_rgb: ToRGB
    missing: ChunkTable | None
    finer: Reader | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(rows, cols, 3)."""
        rows, cols = self.stored.shape[:2]
        return rows, cols, 3

    def __getitem__(self, at: slice | tuple[slice, slice]) -> NDArray[np.uint8]:
        """Pixels (h, w, 3) of rows and columns."""
        rows, cols = at if isinstance(at, tuple) else (at, slice(None))
        (row0, row1, _), (col0, col1, _) = map(slice.indices, (rows, cols), self.shape[:2])
        box = Box(row0, col0, row1, col1)
        if self.missing is not None and self._missing_in(box).all():
            return self._drawn(box)
        try:
            pixels = self._decoded(box)
        except Exception as error:  # decoders raise anything
            if self.finer is None or not is_damage(error):
                raise
            return self._mended(box)
        if self.missing is not None and self._missing_in(box).any():
            pixels = np.array(pixels)
            for part in self._parts(box):
                if self._missing_in(part).all():
                    pixels[part.within(box)] = self._drawn(part)
        return pixels

    def _decoded(self, box: Box) -> NDArray[np.uint8]:
        return self.to_rgb(np.asarray(self.stored[box.row0 : box.row1, box.col0 : box.col1]))

    def _mended(self, box: Box) -> NDArray[np.uint8]:
        """A box with damaged chunks, which are drawn from the finer level."""
        pixels = np.empty((*box.shape, 3), np.uint8)
        for part in self._parts(box):
            try:
                if self.missing is not None and self._missing_in(part).all():
                    raise LookupError
                pixels[part.within(box)] = self._decoded(part)
            except Exception as error:
                if not is_damage(error):
                    raise
                pixels[part.within(box)] = self._drawn(part)
        return pixels

    def _drawn(self, box: Box) -> NDArray[np.uint8]:
        """A box without what is stored."""
        pixels = np.full((*box.shape, 3), GLASS, np.uint8)
        if self.finer is not None:
            for part in cut(box, (_PIECE_PX, _PIECE_PX)):
                pixels[part.within(box)] = self.finer.read(part)
        return pixels

    def _missing_in(self, box: Box) -> NDArray[np.bool_]:
        """The part of ``missing`` that a box touches."""
        assert self.missing is not None
        height, width = self.chunk
        return self.missing[
            box.row0 // height : -(-box.row1 // height), box.col0 // width : -(-box.col1 // width)
        ]

    def _parts(self, box: Box) -> Iterator[Box]:
        """A box cut at the borders of chunks."""
        return cut(box, self.chunk)


def drawn_from(finer: Level, shape: tuple[int, int], scale: tuple[float, float]) -> LevelGrid:
    """A level as a grid over a finer one."""
    return LevelGrid.of("it", level=finer, shape=shape, downsample=scale, origin=(0, 0))


def cut(box: Box, sides: tuple[int, int]) -> Iterator[Box]:
    """A box cut at whole multiples of ``sides`` (rows, cols)."""
    height, width = sides
    for row in range(box.row0 // height * height, box.row1, height):
        for col in range(box.col0 // width * width, box.col1, width):
            yield Box(
                max(row, box.row0),
                max(col, box.col0),
                min(row + height, box.row1),
                min(col + width, box.col1),
            )
