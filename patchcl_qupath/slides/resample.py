"""Area averages of pixels, the same to the last bit in whichever box they are computed.

Sums are exact integers, over areas whose edges depend on the whole grid alone and never on the
box that is read: that is why neighbouring tiles agree in their halo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

from patchcl_qupath.compiled import compiled

Span = tuple[int, int]  # [start, stop)

QUANTA = 256  # a grid edge between two pixels is placed to 1/256 px


@dataclass(frozen=True)
class Axis:
    """The positions of the pixels of a grid on one axis of a pyramid level."""

    scale: float  # level px per grid px
    offset: float  # level px before grid px 0
    size: int  # level px

    @property
    def quanta(self) -> int:
        """Units of length per level px: 1 where every grid edge is an edge of the level."""
        return 1 if self.scale.is_integer() and self.offset.is_integer() else QUANTA

    def edges(self, start: int, stop: int) -> NDArray[np.int64]:
        """(stop - start + 1,) edges of grid px, in quanta; an edge is the same in any span."""
        at = self.offset + self.scale * np.arange(start, stop + 1)
        quanta = np.rint(at * self.quanta).astype(np.int64)
        clipped: NDArray[np.int64] = quanta.clip(0, self.size * self.quanta)
        return clipped

    def lengths(self, start: int, stop: int) -> NDArray[np.int64]:
        """(stop - start,) lengths of grid px on the level, in quanta."""
        return np.diff(self.edges(start, stop))

    def source(self, start: int, stop: int) -> tuple[int, int]:
        """The span of level px that overlap grid px [start, stop)."""
        edges = self.edges(start, stop)
        return int(edges[0]) // self.quanta, -(-int(edges[-1]) // self.quanta)

    def covering(self, start: int, stop: int) -> Span:
        """The span of grid px to read for grid px [start, stop): those that cover level px.

        Without those at the end that lie beyond the level; where all do, the last before them.
        """
        while stop > 1 and not self.lengths(stop - 1, stop)[0]:
            stop -= 1
        return min(start, stop - 1), stop

    def touched(self, start: int, stop: int, count: int) -> tuple[int, int]:
        """The span of grid px, of ``count``, that overlap level px [start, stop)."""
        edges = self.edges(0, count) / self.quanta
        first, last = np.searchsorted(edges, start, "right"), np.searchsorted(edges, stop, "left")
        return max(0, int(first) - 1), min(count, int(last))

    def begins_whole(self, grid: Span, source: Span) -> bool:
        """Whether grid px are of whole level px, of which ``source`` begins with the first."""
        return self.quanta == 1 and int(self.edges(*grid)[0]) == source[0]

    def sums(self, pixels: NDArray[Any], grid: Span, source: Span) -> NDArray[Any]:
        """Sums (n, ...) over grid px of level px ``source`` (m, ...), weighted by quanta."""
        edges = self.edges(*grid)
        low, high = edges[:-1, None], edges[1:, None]  # (n, 1)
        px = low // self.quanta + np.arange(math.ceil(self.scale) + 1)  # (n, k) that can overlap
        overlap = np.minimum(high, (px + 1) * self.quanta) - np.maximum(low, px * self.quanta)
        overlap[(overlap < 0) | (px < source[0]) | (px >= source[1])] = 0
        weights = scipy.sparse.csr_array(
            (
                overlap.ravel().astype(np.int32 if pixels.dtype == np.uint8 else np.int64),
                (px - source[0]).clip(0, len(pixels) - 1).ravel(),
                np.arange(len(px) + 1) * px.shape[1],
            ),
            shape=(len(px), len(pixels)),
        )
        sums = weights @ pixels.reshape(len(pixels), -1)
        return np.asarray(sums).reshape(len(px), *pixels.shape[1:])


def sums(
    pixels: NDArray[np.uint8],
    axes: tuple[Axis, Axis],
    grid: tuple[Span, Span],
    source: tuple[Span, Span],
) -> NDArray[Any]:
    """Sums (h, w, 3) over grid px of level px ``source`` (m, n, 3), weighted by quanta.

    ``axes``, ``grid`` and ``source`` are each of rows and columns.
    """
    if all(map(Axis.begins_whole, axes, grid, source)):
        sides = int(axes[0].scale), int(axes[1].scale)
        if sides == (1, 1):
            return pixels
        shape = grid[0][1] - grid[0][0], grid[1][1] - grid[1][0], pixels.shape[-1]
        fits = math.prod(sides) <= 256  # sums of so many px, and half an area to round by
        blocks = np.zeros(shape, np.uint16 if fits else np.int64)
        _add_blocks(np.ascontiguousarray(pixels), *sides, blocks)
        return blocks
    (y, x), (rows, cols), (source_rows, source_cols) = axes, grid, source
    of_rows = y.sums(pixels, rows, source_rows).swapaxes(0, 1)
    return x.sums(of_rows, cols, source_cols).swapaxes(0, 1)


@compiled
def _add_blocks(pixels: NDArray[np.uint8], height: int, width: int, sums: NDArray[Any]) -> None:
    """Add pixels (m, n, C) to the sums (h, w, C) of blocks; the last blocks may be incomplete."""
    rows, cols, colours = pixels.shape
    lines = pixels.reshape(rows, -1)
    line = np.empty((cols, colours), sums.dtype)  # sums over the rows of a row of blocks
    flat = line.reshape(-1)
    for i in range(len(sums)):
        flat[:] = 0
        for row in range(i * height, min((i + 1) * height, rows)):
            for k in range(len(flat)):  # contiguous, so that it is vectorised
                flat[k] += lines[row, k]
        for first in range(width):
            part = line[first::width]
            for colour in range(colours):
                for j in range(len(part)):
                    sums[i, j, colour] += part[j, colour]


def mean(
    sums: NDArray[Any], heights: NDArray[np.int64], widths: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Sums (h, w, 3) over areas of ``heights`` (h,) times ``widths`` (w,), rounded half up."""
    if sums.dtype == np.uint8:  # blocks of one px
        return np.ascontiguousarray(sums)
    area = int(heights.max(initial=1) * widths.max(initial=1))
    are_equal = (heights == heights.max(initial=1)).all() and (
        widths == widths.max(initial=1)
    ).all()
    if are_equal and area.bit_count() == 1:  # a shift is much faster
        means = np.empty(sums.shape, np.uint8)
        _shift(np.ascontiguousarray(sums).reshape(-1), area.bit_length() - 1, means.reshape(-1))
        return means
    areas = (heights[:, None, None] * widths[None, :, None]).astype(sums.dtype)
    return np.asarray((sums + areas // 2) // areas, np.uint8, order="C")


@compiled
def _shift(sums: NDArray[Any], bits: int, means: NDArray[np.uint8]) -> None:
    """Sums (n,) divided by a power of 2, rounded half up."""
    half = (1 << bits) >> 1
    for k in range(len(sums)):
        means[k] = (sums[k] + half) >> bits
