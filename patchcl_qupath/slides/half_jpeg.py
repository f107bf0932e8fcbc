"""JPEG decoded at half its size: the averages of 2 x 2 of its pixels.

libjpeg-turbo averages luma as it decodes. Chroma of half the size is decoded at that size, where
full decoding interpolates it; it is smoothed here as if it had been interpolated and averaged.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from patchcl_qupath.compiled import compiled

simplejpeg: Any
try:
    simplejpeg = import_module("simplejpeg")
except ImportError:  # an extra: without it the same pixels take longer
    simplejpeg = None

_START, _END = b"\xff\xd8", b"\xff\xd9"
_APP0, _APP14, _SCAN = 0xE0, 0xEE, 0xDA
_HUFFMAN_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive DCT
_TABLES = (0xDB, 0xC4, 0xDD)  # quantisation, Huffman, restart interval
_FULL_CHROMA = ((1, 1), (1, 1), (1, 1))  # (x, y) samples of each component in a block
_HALF_CHROMA = ((2, 2), (1, 1), (1, 1))
# The marker of a JPEG whose colours are RGB.
_IS_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"


@dataclass(frozen=True)
class _Frame:
    """The frame of a JPEG: its size (rows, cols), and whether chroma has half of it.

    ``markers`` are those of applications before the first scan; ``end`` is where that of the frame
    ends.
    """

    shape: tuple[int, int]
    has_half_chroma: bool
    markers: frozenset[int]
    end: int


@dataclass(frozen=True, kw_only=True)
class HalfJPEG:
    """Decodes JPEGs of one kind at half their size.

    ``inserted`` is what goes before their segments, ``head`` the first bytes of one of them, up to
    the end of its frame.
    """

    frame: _Frame
    inserted: bytes
    head: bytes

    @classmethod
    def of(
        cls, jpeg: bytes, shape: tuple[int, int], *, tables: bytes, is_rgb: bool
    ) -> HalfJPEG | None:
        """The decoder of JPEGs of ``shape`` (rows, cols) such as ``jpeg``; None if there is none.

        ``tables`` is the JPEG of the tables that all of them share, or empty; ``is_rgb`` where a
        tag says that their colours are RGB.
        """
        frame = _frame(jpeg)
        if frame is None or frame.shape != shape or any(side % 2 for side in shape):
            return None
        if is_rgb and (frame.has_half_chroma or frame.markers & {_APP0, _APP14}):
            return None
        if any(marker not in _TABLES for marker, _, _ in _segments(tables)):
            return None
        inserted = (_IS_RGB if is_rgb else b"") + tables[len(_START) : -len(_END)]
        return cls(frame=frame, inserted=inserted, head=jpeg[: frame.end])

    def decode(self, jpeg: bytes) -> NDArray[np.uint8]:
        """RGB (h, w, 3) of a JPEG, the same with simplejpeg and without.

        Raises ValueError for one that is damaged, or of another kind.
        """
        if not jpeg.startswith(self.head):
            frame = _frame(jpeg)
            if frame is None or replace(frame, end=0) != replace(self.frame, end=0):
                raise ValueError("it is of another kind")
        pixels = self._decoded(jpeg[: len(_START)] + self.inserted + jpeg[len(_START) :])
        return _with_smooth_chroma(pixels) if self.frame.has_half_chroma else pixels

    def _decoded(self, jpeg: bytes) -> NDArray[np.uint8]:
        """RGB as libjpeg-turbo makes it."""
        rows, cols = (side // 2 for side in self.frame.shape)
        if simplejpeg is not None:
            try:
                pixels = simplejpeg.decode_jpeg(
                    jpeg, "RGB", min_height=rows, min_width=cols, min_factor=1
                )
                return np.asarray(pixels)
            except ValueError:  # damaged
                pass
        try:  # of damaged ones, Pillow decodes what full decoding does, if the end is marked
            with Image.open(io.BytesIO(jpeg + _END), formats=["JPEG"]) as image:
                image.draft("RGB", (cols, rows))
                return np.array(image)  # which may be written to, as that of simplejpeg
        except OSError as error:  # not one of the file
            raise ValueError(str(error)) from error


def _frame(jpeg: bytes) -> _Frame | None:
    """The frame of a JPEG; None where it is not of 8-bit YCbCr or RGB in Huffman codes.

    Nor may chroma have half the width alone, or half the height: of that, libjpeg-turbo decodes a
    quarter.
    """
    found: tuple[tuple[int, int], bool, int] | None = None
    markers: set[int] = set()
    for marker, start, stop in _segments(jpeg):
        if marker in _HUFFMAN_FRAMES:
            frame = jpeg[start:stop]
            samples = tuple((n >> 4, n & 15) for n in frame[7::3])
            if frame[:1] != b"\x08" or samples not in (_FULL_CHROMA, _HALF_CHROMA):
                return None
            shape = int.from_bytes(frame[1:3]), int.from_bytes(frame[3:5])
            found = shape, samples == _HALF_CHROMA, stop
        elif marker == _SCAN and found is not None:
            shape, has_half_chroma, end = found
            return _Frame(shape, has_half_chroma, frozenset(markers), end)
        elif _APP0 <= marker <= _APP0 + 15:
            markers.add(marker)
    return None


def _segments(jpeg: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of the segments of a JPEG, up to the first scan."""
    at, marker = len(_START), 0
    while at + 4 <= len(jpeg) and jpeg[at] == 0xFF and marker != _SCAN:
        marker, length = jpeg[at + 1], int.from_bytes(jpeg[at + 2 : at + 4])
        if marker == 0xFF:  # fill
            at += 1
            continue
        start, at = at + 4, at + 2 + length
        if not start <= at <= len(jpeg):
            return
        yield marker, start, at


def _with_smooth_chroma(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB (h, w, 3), with chroma as it is where it was interpolated to twice the size.

    Interpolated values are 3/4 of the nearest sample and 1/4 of the next one, so that the mean of
    two is 3/4 of a sample, and 1/8 of both its neighbours.
    """
    rows, cols, _ = pixels.shape
    smooth = np.empty_like(pixels)
    _smooth(pixels.reshape(rows, -1), _luma_weights(cols), smooth.reshape(rows, -1))
    return smooth


@lru_cache(maxsize=8)
def _luma_weights(cols: int) -> NDArray[np.uint16]:
    """(5, 3 cols): how much of values two before to two after each of a row is luma, of 256."""
    weights = np.zeros((5, 3), np.uint16)
    for colour in range(3):
        weights[2 - colour : 5 - colour, colour] = 77, 150, 29  # ITU-R BT.601
    return np.tile(weights, cols)


@compiled
def _smooth(
    pixels: NDArray[np.uint8], luma_weights: NDArray[np.uint16], smooth: NDArray[np.uint8]
) -> None:
    """RGB (h, 3 w) with chroma smoothed by 1, 6, 1 in both directions.

    Beyond an edge, there is what is on it. The types of numbers are such that it is vectorised.
    """
    rows, n = pixels.shape
    weights = luma_weights
    six, round_by, bits = np.int16(6), np.int16(32), np.int16(6)
    chroma = np.empty((rows, n), np.int16)
    line = np.zeros(n + 4, np.uint16)
    for i in range(rows):
        for k in range(n):
            line[k + 2] = pixels[i, k]
        row = chroma[i]
        for k in range(n):
            luma = np.uint16(128)
            luma += weights[0, k] * line[k]
            luma += weights[1, k] * line[k + 1]
            luma += weights[2, k] * line[k + 2]
            luma += weights[3, k] * line[k + 3]
            luma += weights[4, k] * line[k + 4]
            row[k] = line[k + 2] - (luma >> np.uint16(8))
    sums = np.empty(n + 6, np.int16)
    for i in range(rows):
        above, here, below = chroma[max(i - 1, 0)], chroma[i], chroma[min(i + 1, rows - 1)]
        for k in range(n):
            sums[k + 3] = above[k] + six * here[k] + below[k]
        for k in range(3):
            sums[k] = sums[k + 3]
            sums[n + 3 + k] = sums[n + k]
        values, made = pixels[i], smooth[i]
        for k in range(n):
            total = sums[k] + six * sums[k + 3] + sums[k + 6] + round_by
            value = values[k] - here[k] + (total >> bits)
            made[k] = min(max(value, 0), 255)
