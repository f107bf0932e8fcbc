"""The pages of a TIFF, decoded tile by tile in the thread that reads them; strips are tiles, too.

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

from patchcl_qupath.slides.half_jpeg import HalfJPEG

if TYPE_CHECKING:
    from tifffile import TiffPage, TiffPageSeries

_JPEG, _RGB, _YCBCR = 7, 2, 6  # TIFF's compression, and photometric interpretations
_END = b"\xff\xd9"  # of a JPEG


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


class Tiles:
    """Samples (rows, cols, S) in tiles, which are decoded as it is sliced.

    A tile that is not in the file is 0; slicing raises what decoding a damaged one raises.
    """

    shape: tuple[int, int, int]
    chunks: tuple[int, int, int]  # of a tile
    ndim = 3
    dtype = np.dtype(np.uint8)

    @property
    def across(self) -> int:
        """The number of tiles in a row of tiles."""
        return -(-self.shape[1] // self.chunks[1])

    def decoded(self, index: int) -> NDArray[np.uint8] | None:
        """A tile (h, w, S) by its number; None where it is not in the file."""
        raise NotImplementedError

    def __getitem__(self, at: slice | tuple[slice, slice]) -> NDArray[np.uint8]:
        """Samples (h, w, S) of rows and columns."""
        rows, cols = at if isinstance(at, tuple) else (at, slice(None))
        (row0, row1, _), (col0, col1, _) = (
            part.indices(side) for part, side in zip((rows, cols), self.shape[:2], strict=True)
        )
        height, width, samples = self.chunks
        pixels = np.zeros((max(0, row1 - row0), max(0, col1 - col0), samples), np.uint8)
        for (i, inner_rows, outer_rows), (j, inner_cols, outer_cols) in product(
            _parts(row0, row1, height), _parts(col0, col1, width)
        ):
            tile = self.decoded(i * self.across + j)
            if tile is not None:
                pixels[outer_rows, outer_cols] = tile[inner_rows, inner_cols]
        return pixels


@dataclass(frozen=True, eq=False, kw_only=True)
class TiledPage(Tiles):
    """The samples of a page."""

    page: TiffPage
    store: TiffBytes
    shape: tuple[int, int, int]
    chunks: tuple[int, int, int]

    def decoded(self, index: int) -> NDArray[np.uint8] | None:
        """A tile (h, w, S) by its number; None where it is not in the file."""
        data = self.encoded(index)
        if data is None:
            return None
        decode: Any = self.page.decode
        tables, header = self.page.jpegtables, self.page.jpegheader
        tile = decode(data, index, jpegtables=tables, jpegheader=header, _fullsize=True)[0]
        return np.asarray(tile[0])

    def encoded(self, index: int) -> bytes | None:
        """A tile as it is in the file; None where it is not there.

        Raises ValueError where the file ends before it does: JPEG decoders draw what is left out in
        grey.
        """
        offset, count = self._place(index)
        if not offset or not count:
            return None
        data = self.store.read(offset, count)
        if len(data) < count and not data.endswith(_END):
            raise ValueError(f"the file ends {count - len(data):,} bytes before tile {index} does")
        return data

    def first(self) -> bytes | None:
        """The first tile in the file, or what there is of it; None where there is none."""
        places = zip(self.page.dataoffsets, self.page.databytecounts, strict=False)
        stored = next((place for place in places if all(place)), None)
        return None if stored is None else self.store.read(*stored)

    def _place(self, index: int) -> tuple[int, int]:
        """Offset and number of bytes of a tile; the table may end before the last ones."""
        offsets, counts = self.page.dataoffsets, self.page.databytecounts
        return (offsets[index], counts[index]) if index < min(len(offsets), len(counts)) else (0, 0)


@dataclass(frozen=True, eq=False, kw_only=True)
class HalfPage(Tiles):
    """A page at half its size: the pixels (rows, cols, 3) of its JPEG tiles, decoded at that size.

    Slicing raises ValueError for a tile that cannot be decoded so.
    """

    whole: TiledPage
    decoder: HalfJPEG
    shape: tuple[int, int, int]
    chunks: tuple[int, int, int]

    @classmethod
    def of(cls, whole: TiledPage) -> HalfPage | None:
        """A page at half its size; None where its tiles cannot be decoded so."""
        (rows, cols, samples), (height, width, _) = whole.shape, whole.chunks
        decoder = _half_decoder(whole) if samples == 3 and min(rows, cols) > 1 else None
        if decoder is None:
            return None
        shape, chunks = (rows // 2, cols // 2, 3), (height // 2, width // 2, 3)
        return cls(whole=whole, decoder=decoder, shape=shape, chunks=chunks)

    @property
    def across(self) -> int:
        """The number of tiles in a row of tiles, of which the last may lie beyond the shape."""
        return self.whole.across

    def decoded(self, index: int) -> NDArray[np.uint8] | None:
        """A tile (h, w, 3) by its number; None where it is not in the file."""
        data = self.whole.encoded(index)
        return None if data is None else self.decoder.decode(_headed(self.whole.page, data))


def _half_decoder(whole: TiledPage) -> HalfJPEG | None:
    """What decodes tiles such as the first one in the file at half their size, if anything does."""
    page: Any = whole.page
    photometric, first = int(page.photometric), whole.first()
    if int(page.compression) != _JPEG or photometric not in (_RGB, _YCBCR) or first is None:
        return None
    return HalfJPEG.of(
        _headed(page, first),
        whole.chunks[:2],
        tables=page.jpegtables or b"",
        is_rgb=photometric == _RGB and not page.is_jfif,
    )


def _headed(page: Any, data: bytes) -> bytes:
    """A tile with its header, where there is one JPEG header for all, as in Hamamatsu's."""
    return page.jpegheader + data + _END if page.jpegheader else data


def _parts(start: int, stop: int, side: int) -> Iterator[tuple[int, slice, slice]]:
    """The tiles of an axis that [start, stop) touches: number, slice in the tile, in the span."""
    for number in range(start // side, -(-stop // side)):
        first = number * side
        low, high = max(start, first), min(stop, first + side)
        yield number, slice(low - first, high - first), slice(low - start, high - start)


def tiled_pages(series: TiffPageSeries) -> list[TiledPage] | None:
    """The levels of an image; None where one is not a single page of tiles of 8-bit samples.

    Strips are tiles of the image's width. None, too, where the samples of a level are one piece of
    the file, which needs no decoder.
    """
    store: TiffBytes | None = None
    pages = []
    for level in series.levels:
        page: Any = level.pages[0] if len(level.pages) == 1 else None
        if (
            page is None
            or level.dataoffset is not None
            or page is not level.keyframe
            or page.axes != "YXS"
            or page.dtype != np.uint8
            or int(page.planarconfig) != 1
            or (page.is_tiled and page.tiledepth != 1)
            or (int(page.bitspersample), page.parent) != (8, series.levels[0].keyframe.parent)
        ):
            return None
        store = store or TiffBytes(Path(page.parent.filehandle.path))
        rows, cols, samples = map(int, page.shape)
        height, width, _ = map(int, page.chunks)
        pages.append(
            TiledPage(
                page=page,
                store=store,
                shape=(rows, cols, samples),
                chunks=(height, width, samples),
            )
        )
    return pages
