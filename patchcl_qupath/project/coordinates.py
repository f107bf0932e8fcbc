"""Coordinates as text: those of contours have two decimals, which a compiled loop writes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.compiled import compiled

_MOST = 24  # bytes of a number with its separator
_LARGEST = 1e12  # of numbers that are written
# Unsigned: divisions of signed numbers round down in Python, which takes longer.
_ZERO, _TEN, _HUNDRED = np.uint64(ord("0")), np.uint64(10), np.uint64(100)


@compiled
def points_text(
    xy: NDArray[np.float64], first: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int32], bool]:
    """The points ``xy[first[k] : first[k + 1]]`` (P, 2) of each k as text: ``x,y],[x,y``.

    All texts after one another, and where each begins and ends (N + 1,). Numbers have as few
    decimals as tell them apart; false if one has more than two, or is too large.
    """
    text = np.empty(2 * _MOST * len(xy) + 16, np.uint8)
    offsets, size = np.zeros(len(first), np.int32), 0
    for k in range(len(first) - 1):
        for point in range(first[k], first[k + 1]):
            for axis in range(2):
                value = xy[point, axis]
                hundredths = np.rint(value * 100)
                if not (abs(hundredths) < _LARGEST) or hundredths / 100 != value:
                    return text[:0], offsets, False
                if np.signbit(value):
                    text[size] = 45  # -
                    size += 1
                size = _write(np.uint64(abs(hundredths)), text, size)
                if axis == 0:
                    text[size] = 44  # ,
                    size += 1
            if point + 1 < first[k + 1]:
                text[size], text[size + 1], text[size + 2] = 93, 44, 91  # ],[
                size += 3
        offsets[k + 1] = size
    return text[:size], offsets, True


@compiled
def _write(hundredths: np.uint64, text: NDArray[np.uint8], begin: int) -> int:
    """Write a number of hundredths from ``begin`` on, without zeros at its end; returns the end."""
    whole = hundredths // _HUNDRED
    part = hundredths - whole * _HUNDRED
    end, bound = begin + 1, _TEN
    while whole >= bound:
        bound *= _TEN
        end += 1
    for place in range(end - 1, begin - 1, -1):
        tens = whole // _TEN
        text[place] = _ZERO + (whole - tens * _TEN)
        whole = tens
    if part:
        tenths = part // _TEN
        rest = part - tenths * _TEN
        text[end] = 46  # .
        text[end + 1], text[end + 2] = _ZERO + tenths, _ZERO + rest
        end += 3 if rest else 2
    return end
