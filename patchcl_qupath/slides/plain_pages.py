"""Which pages of a plain TIFF are the levels of one image, and which are images of their own.

tifffile takes a page for a level wherever its size is a half, a third or a quarter of that before:
of a scan and a drawing of half its size, the drawing would be read in place of the scan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.errors import is_damage

if TYPE_CHECKING:
    from tifffile import TiffPageSeries

_WINDOWS = 7  # on each axis of a page that is compared with a finer one
_WINDOW_PX = 32  # their side
_BLOCK_PX = 16  # of which means are compared: levels may be decimated, sharpened, or compressed
_UNLIKE = 24  # how far means are apart, in grey values, that are not of one place
_MOST_UNLIKE = 0.01  # fraction of blocks of a level that may be: a stain may be in few of another's

Arrays = Callable[["TiffPageSeries"], Sequence[Any]]  # the levels of an image, as arrays


def images(all_series: Sequence[TiffPageSeries], arrays: Arrays) -> list[TiffPageSeries]:
    """The images of a TIFF, in the order of their pages, each with its own levels alone.

    Pages are levels where they say so (reduced images, SubIFDs), and where they look like a finer
    one: many programs that write pyramids say nothing.
    """
    found = [image for series in all_series for image in _parted(series, arrays)]
    return sorted(found, key=lambda image: image.keyframe.treeindex)


def _parted(series: TiffPageSeries, arrays: Arrays) -> list[TiffPageSeries]:
    """The images of what tifffile takes for the levels of one."""
    first, *others = series.levels
    if series.kind != "generic" or all(map(_is_said_to_be_a_level, others)):
        return [series]
    pixels = arrays(series)
    parts = [[(first, pixels[0])]]
    for page in zip(others, pixels[1:], strict=True):
        is_said = _is_said_to_be_a_level(page[0])
        image = next((part for part in parts if is_said or _is_like(page[1], part[-1][1])), None)
        if image is None:
            parts.append([page])
        else:
            image.append(page)
    for part in parts:
        part[0][0].levels[:] = [level for level, _ in part]
    return [part[0][0] for part in parts]


def _is_said_to_be_a_level(page: TiffPageSeries) -> bool:
    return bool(page.keyframe.is_reduced or page.keyframe.is_subifd)


def _is_like(coarse: Any, fine: Any) -> bool:
    """Whether a page (h, w, S) shows what a finer one does, as far as windows of it tell."""
    factors = [max(1, round(n / m)) for n, m in zip(fine.shape[:2], coarse.shape[:2], strict=True)]
    side = min(_BLOCK_PX, *coarse.shape[:2])
    coarse, fine = _held(coarse), _held(fine)
    far = count = 0
    for row, col in product(*(_starts(n) for n in coarse.shape[:2])):
        at = (slice(row, row + _WINDOW_PX), slice(col, col + _WINDOW_PX))
        below = (
            slice(part.start * factor, part.stop * factor)
            for part, factor in zip(at, factors, strict=True)
        )
        try:
            means = (
                _means(coarse[at], (side, side)),
                _means(fine[tuple(below)], (side * factors[0], side * factors[1])),
            )
        except Exception as error:  # decoders raise anything
            if not is_damage(error):
                raise
            continue
        rows, cols = (min(n) for n in zip(*(part.shape[:2] for part in means), strict=True))
        one, other = (part[:rows, :cols] for part in means)
        stored = one.any(axis=2) & other.any(axis=2)  # else a tile may be left out, and is 0
        far += int(((np.abs(one - other).max(axis=2) > _UNLIKE) & stored).sum())
        count += int(stored.sum())
    return far <= _MOST_UNLIKE * count


def _held(page: Any) -> Any:
    """A page that may be sliced many times: decoded, where each slice would decode all of it."""
    is_one_chunk = all(m >= n for m, n in zip(page.chunks[:2], page.shape[:2], strict=True))
    return np.asarray(page[:]) if is_one_chunk else page


def _starts(n: int) -> list[int]:
    """Where windows begin on an axis of ``n`` px."""
    last = max(0, n - _WINDOW_PX)
    return sorted({last * i // (_WINDOWS - 1) for i in range(_WINDOWS)})


def _means(pixels: Any, block: tuple[int, int]) -> NDArray[np.float64]:
    """The means (h, w, S) of whole blocks of pixels (H, W, S)."""
    pixels = np.asarray(pixels, np.float64)
    rows, cols = (math.floor(n / side) for n, side in zip(pixels.shape[:2], block, strict=True))
    whole = pixels[: rows * block[0], : cols * block[1]]
    return np.asarray(whole.reshape(rows, block[0], cols, block[1], -1).mean(axis=(1, 3)))
