"""The pages of a tiled TIFF, decoded tile by tile in the thread that reads them.

tifffile's view for zarr does the same by way of an event loop and threads of its own: a third of
the time, and threads that compete with the workers for cores.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tifffile import TiffPage, TiffPageSeries


class TiffBytes:
    """An open file, from which threads read at once; it is closed when nothing refers to it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)
        self._lock = threading.Lock()  # where one cannot read at an offset, as on Windows

    def read(self, offset: int, count: int) -> bytes:
        """``count`` bytes, fewer where the file ends before. Raises OSError."""
        if not hasattr(os, "pread"):
            with self._lock:
                self._file.seek(offset)
                return self._whole(lambda left, _: self._file.read(left), offset, count)
        return self._whole(lambda left, at: os.pread(self._file.fileno(), left, at), offset, count)

    @staticmethod
    def _whole(read: Any, offset: int, count: int) -> bytes:
        """What ``read`` returns for a number of bytes and an offset, until there is no more."""
        found: bytes = read(count, offset)
        while len(found) < count:
            more = read(count - len(found), offset + len(found))
            if not more:
                break
            found += more
        return found


@dataclass(frozen=True, eq=False, kw_only=True)
class TiledPage:
    """The samples (rows, cols, S) of a page whose tiles are decoded as it is sliced.

    A tile that is not in the file is 0; slicing raises what decoding a damaged one raises.
    """

    page: TiffPage
    store: TiffBytes
    shape: tuple[int, int, int]
    chunks: tuple[int, int, int]

    ndim = 3
    dtype = np.dtype(np.uint8)

    def __getitem__(self, at: slice | tuple[slice, slice]) -> NDArray[np.uint8]:
        """Samples (h, w, S) of rows and columns."""
        rows, cols = at if isinstance(at, tuple) else (at, slice(None))
        (row0, row1, _), (col0, col1, _) = (
            part.indices(side) for part, side in zip((rows, cols), self.shape[:2], strict=True)
        )
        height, width, samples = self.chunks
        pixels = np.zeros((max(0, row1 - row0), max(0, col1 - col0), samples), np.uint8)
        across = -(-self.shape[1] // width)
        for (i, inner_rows, outer_rows), (j, inner_cols, outer_cols) in product(
            _parts(row0, row1, height), _parts(col0, col1, width)
        ):
            tile = self._decoded(i * across + j)
            if tile is not None:
                pixels[outer_rows, outer_cols] = tile[inner_rows, inner_cols]
        return pixels

    def _decoded(self, index: int) -> NDArray[np.uint8] | None:
        """A tile (h, w, S) by its number; None where it is not in the file."""
        offset, count = self._place(index)
        if not (offset and count):
            return None
        decode: Any = self.page.decode
        tables, header = self.page.jpegtables, self.page.jpegheader
        data = self.store.read(offset, count)
        tile = decode(data, index, jpegtables=tables, jpegheader=header, _fullsize=True)[0]
        return np.asarray(tile[0])

    def _place(self, index: int) -> tuple[int, int]:
        """Offset and number of bytes of a tile; the table may end before the last ones."""
        offsets, counts = self.page.dataoffsets, self.page.databytecounts
        return (offsets[index], counts[index]) if index < min(len(offsets), len(counts)) else (0, 0)


def _parts(start: int, stop: int, side: int) -> Iterator[tuple[int, slice, slice]]:
    """The tiles of an axis that [start, stop) touches: number, slice in the tile, in the span."""
    for number in range(start // side, -(-stop // side)):
        first = number * side
        low, high = max(start, first), min(stop, first + side)
        yield number, slice(low - first, high - first), slice(low - start, high - start)


def tiled_pages(series: TiffPageSeries) -> list[TiledPage] | None:
    """The levels of an image; None where one is not a single page of tiles of 8-bit samples."""
    store: TiffBytes | None = None
    pages = []
    for level in series.levels:
        page: Any = level.pages[0] if len(level.pages) == 1 else None
        if (
            page is None
            or level.dataoffset is not None
            or page is not level.keyframe
            or not page.is_tiled
            or page.axes != "YXS"
            or page.dtype != np.uint8
            or int(page.planarconfig) != 1
            or page.tiledepth != 1
            or (int(page.bitspersample), page.parent) != (8, series.levels[0].keyframe.parent)
        ):
            return None
        store = store or TiffBytes(Path(page.parent.filehandle.path))
        samples = int(page.samplesperpixel)
        pages.append(
            TiledPage(
                page=page,
                store=store,
                shape=(int(page.imagelength), int(page.imagewidth), samples),
                chunks=(int(page.tilelength), int(page.tilewidth), samples),
            )
        )
    return pages
