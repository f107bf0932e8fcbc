"""Area averages of pixels, the same to the last bit wherever they are computed.

Sums are exact integers, over areas whose edges depend on the whole grid alone and never on the
part of it that is asked for: that is why neighbouring tiles agree on their halo.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from numpy.typing import NDArray

QUANTA = 256  # a grid edge between two pixels is placed to 1/256 px


@dataclass(frozen=True)
class Axis:
    """Where the pixels of a grid lie on one axis of a pyramid level."""

    scale: float  # level px per grid px
    offset: float  # level px before grid px 0
    size: int  # level px

    @property
    def quanta(self) -> int:
        """Units of length per level px: 1 where every grid edge is an edge of the level."""
        return 1 if self.scale.is_integer() and self.offset.is_integer() else QUANTA

    def edges(self, start: int, stop: int) -> NDArray[np.int64]:
        """(stop - start + 1,) edges of grid px, in quanta: the same from wherever it is asked."""
        at = self.offset + self.scale * np.arange(start, stop + 1)
        quanta = np.rint(at * self.quanta).astype(np.int64)
        clipped: NDArray[np.int64] = quanta.clip(0, self.size * self.quanta)
        return clipped

    def lengths(self, start: int, stop: int) -> NDArray[np.int64]:
        """(stop - start,) how much of the level each grid px covers, in quanta."""
        return np.diff(self.edges(start, stop))

    def source(self, start: int, stop: int) -> tuple[int, int]:
        """The level px that grid px [start, stop) touch."""
        edges = self.edges(start, stop)
        return int(edges[0]) // self.quanta, -(-int(edges[-1]) // self.quanta)

    def touched(self, start: int, stop: int, count: int) -> tuple[int, int]:
        """The grid px, of ``count``, that touch level px [start, stop)."""
        edges = self.edges(0, count) / self.quanta
        first, last = np.searchsorted(edges, start, "right"), np.searchsorted(edges, stop, "left")
        return max(0, int(first) - 1), min(count, int(last))

    def sums(
        self, pixels: NDArray[Any], grid: tuple[int, int], source: tuple[int, int]
    ) -> NDArray[Any]:
        """Level px ``source`` (m, ...) summed into the px of ``grid`` (n, ...), times quanta."""
        edges = self.edges(*grid)
        if self.quanta == 1 and edges[0] == source[0]:
            return _block_sums(pixels, int(self.scale), len(edges) - 1)
        low, high = edges[:-1, None], edges[1:, None]  # (n, 1)
        px = low // self.quanta + np.arange(math.ceil(self.scale) + 1)  # (n, k) that may overlap
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


def _block_sums(pixels: NDArray[Any], side: int, count: int) -> NDArray[Any]:
    """Sums of ``count`` runs of ``side`` px along the first axis; the last run may be short."""
    if side == 1:
        return pixels
    total = "u4" if pixels.dtype.kind == "u" else "i8"
    if pixels.dtype.itemsize <= 2 and side <= 16:  # 16 x 16 px of 255 each, and a half more, fit
        total = "u2"
    sums = np.zeros((count, *pixels.shape[1:]), dtype=total)
    for first in range(side):
        part = pixels[first::side]
        sums[: len(part)] += part
    return sums


def mean(
    sums: NDArray[Any], heights: NDArray[np.int64], widths: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Sums (h, w, 3) over areas of ``heights`` (h,) times ``widths`` (w,), rounded half up."""
    if sums.dtype == np.uint8:  # blocks of one px
        return np.ascontiguousarray(sums)
    areas = (heights[:, None, None] * widths[None, :, None]).astype(sums.dtype)
    area = int(areas.max(initial=1))
    if area.bit_count() == 1 and (areas == area).all():  # a shift is much faster
        means = (sums + sums.dtype.type(area // 2)) >> sums.dtype.type(area.bit_length() - 1)
    else:
        means = (sums + areas // 2) // areas
    return np.asarray(means, np.uint8, order="C")
