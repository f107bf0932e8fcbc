"""Coordinates as text: those of contours have two decimals, which a compiled loop writes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.compiled import compiled

_MOST = 24  # bytes of a number with its separator
_LARGEST = 1e12  # of numbers that are written


@compiled
def points_text(
    xy: NDArray[np.float64], first: NDArray[np.int64]
) -> tuple[NDArray[np.uint8], NDArray[np.int32], bool]:
    """The points ``xy[first[k] : first[k + 1]]`` (P, 2) of each k as text: ``x,y],[x,y``.

    All texts after one another, and where each begins and ends (N + 1,). Numbers have as few
    decimals as tell them apart; false if one has more than two, or is too large.
    """
    text = np.empty(2 * _MOST * len(xy) + 16, np.uint8)
    offsets, digits, size = np.zeros(len(first), np.int32), np.empty(_MOST, np.uint8), 0
    for k in range(len(first) - 1):
        for point in range(first[k], first[k + 1]):
            for axis in range(2):
                value = xy[point, axis]
                hundredths = np.rint(value * 100)
                if not (abs(hundredths) < _LARGEST) or hundredths / 100 != value:
                    return text[:0], offsets, False
                rest = np.int64(abs(hundredths))
                if np.signbit(value):
                    text[size] = 45  # -
                    size += 1
                count, decimals = 0, 2
                while decimals and rest % 10 == 0:
                    rest //= 10
                    decimals -= 1
                while rest or count <= decimals:
                    if count == decimals and decimals:
                        digits[count] = 46  # .
                        count += 1
                        decimals = 0
                        if not rest:
                            digits[count] = 48
                            count += 1
                        continue
                    digits[count] = 48 + rest % 10
                    rest //= 10
                    count += 1
                for n in range(count):
                    text[size + n] = digits[count - 1 - n]
                size += count
                if axis == 0:
                    text[size] = 44  # ,
                    size += 1
            if point + 1 < first[k + 1]:
                text[size], text[size + 1], text[size + 2] = 93, 44, 91  # ],[
                size += 3
        offsets[k + 1] = size
    return text[:size], offsets, True
