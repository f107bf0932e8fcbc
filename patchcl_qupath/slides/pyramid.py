"""Image files as pyramids of pixels.

Slides and tiled TIFF come through tiffslide's zarr view, chunk by chunk; a level that is one
single chunk (PNG, JPEG, most plain TIFF) is decoded once and kept.
"""

from __future__ import annotations

import math
import os
import threading
import warnings
import weakref
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from PIL import Image
from tiffslide import TiffSlide

from patchcl_qupath.errors import SlideError

PILLOW_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp"}
MAX_IN_MEMORY_PX = 178_000_000  # of a level that cannot be read in parts: 0.5 GB, Pillow's limit


@dataclass(frozen=True)
class Level:
    """One level of a pyramid."""

    pixels: Any  # uint8 (rows, cols, 3 or 4): a zarr array, or a numpy array in memory
    chunk: tuple[int, int]  # (rows, cols) that are decoded together
    scale: tuple[float, float]  # (x, y) level-0 px per px of this level


@dataclass(frozen=True, eq=False)
class Pyramid:
    """An open image: its levels, finest first; pixel size in µm and bounds in level-0 px."""

    levels: list[Level]
    mpp: tuple[float, ...] | None = None  # x, y
    bounds: tuple[float, ...] | None = None  # x, y, width, height

    def level_for(self, downsample: tuple[float, float]) -> Level:
        """The coarsest level that is fine enough for ``downsample`` (x, y) level-0 px per px."""
        fine_enough = [
            level
            for level in self.levels[1:]
            if all(s <= d * 1.01 for s, d in zip(level.scale, downsample, strict=True))
        ]
        return [self.levels[0], *fine_enough][-1]


_opening = threading.Lock()  # warnings.catch_warnings is not thread-safe


def open_pyramid(path: Path) -> Pyramid:
    """The open file of a path: one per process, shared by its threads. May raise any exception.

    A file that was replaced is opened again, and one that was removed raises: workers are
    long-lived.
    """
    stat = path.stat()
    with _opening:
        return _open(path, (stat.st_ino, stat.st_mtime_ns, stat.st_size))


def forget_pyramids() -> None:
    """Open files again when they are next read, as after a network error."""
    with _opening:
        _open.cache_clear()


def unreadable(name: str, error: Exception) -> SlideError:
    """The error, with advice, for a file that cannot be opened or decoded."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return SlideError(
        f"{name} cannot be read ({reason}): if QuPath shows it, export it as OME-TIFF (rendered "
        "RGB) and add that; if not, copy the file again"
    )


@lru_cache(maxsize=4)
def _open(path: Path, version: tuple[int, ...]) -> Pyramid:
    if path.suffix.lower() in PILLOW_SUFFIXES:
        return _open_with_pillow(path)
    slide = TiffSlide(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(hamamatsu|.*ventana)-format")
            properties = slide.properties
        if slide.ts_tifffile.is_scn or slide.ts_tifffile.is_bif:
            raise ValueError("Leica SCN and Ventana BIF hold several overlapping parts")
        group = _zarr_group(slide)
        arrays = [group[str(level)] for level in range(slide.level_count)]
        # Threads may still read when a file is dropped from the cache: the last reader closes it.
        weakref.finalize(group.store, slide.ts_tifffile.close)
        axes = properties["tiffslide.series-axes"]
        return Pyramid(
            [_level(array, axes, arrays[0]) for array in arrays],
            _numbers(properties, "mpp-x", "mpp-y"),
            _numbers(properties, "bounds-x", "bounds-y", "bounds-width", "bounds-height"),
        )
    except BaseException:
        slide.close()
        raise


def _zarr_group(slide: TiffSlide) -> zarr.Group:
    """The levels of an open file, as arrays that are decoded as they are read."""
    # With fewer threads, as tifffile has it below six cores, the chunks of all workers are decoded
    # in the one thread of zarr's event loop, and workers wait for each other. tiffslide reads the
    # variable here, once for each file.
    os.environ.setdefault("TIFFSLIDE_NUM_DECODE_THREADS", "2")
    return slide.zarr_group


def _open_with_pillow(path: Path) -> Pyramid:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is the limit
        with Image.open(path) as image:
            if image.mode not in ("RGB", "RGBA", "P"):
                raise ValueError(f"not RGB: mode {image.mode}")
            _check_memory(image.width * image.height)
            pixels = np.asarray(image.convert("RGB"))
    return Pyramid([Level(pixels, (1, 1), (1.0, 1.0))])


def _level(array: Any, axes: str, level0: Any) -> Level:
    """One level of a TIFF; decoded at once where it is a single chunk."""
    if axes != "YXS" or array.dtype != np.uint8 or array.shape[2] not in (3, 4):
        raise ValueError(f"not 8-bit RGB: axes {axes}, {array.dtype}")
    shape, chunk = array.shape[:2], array.chunks[:2]
    if chunk[0] >= shape[0] and chunk[1] >= shape[1]:
        _check_memory(math.prod(shape))
        array, chunk = np.asarray(array[:]), (1, 1)
    # A level of 62 px below one of 250 is a truncated quarter, not 1 / 4.03 of it: QuPath, too,
    # takes the whole number wherever less than one px is missing.
    y, x = (
        whole if abs(n0 / (whole := max(1, round(n0 / n))) - n) < 1 else n0 / n
        for n0, n in zip(level0.shape[:2], shape, strict=True)
    )
    return Level(array, chunk, (float(x), float(y)))


def _check_memory(px: int) -> None:
    if px > MAX_IN_MEMORY_PX:
        raise ValueError(f"{px / 1e6:.0f} megapixels in one piece: it needs tiles to be read")


def _numbers(properties: dict[str, Any], *names: str) -> tuple[float, ...] | None:
    """Some of tiffslide's properties, or None where one of them is missing."""
    values = [properties.get(f"tiffslide.{name}") for name in names]
    return None if None in values else tuple(float(value) for value in values if value is not None)
