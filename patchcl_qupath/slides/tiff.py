"""TIFF and the slides that are TIFF: the image of the file that a project means, as a pyramid.

Tiles and compressed strips are decoded chunk by chunk, other pixels are read through tifffile's
zarr view; a level that is one single chunk is decoded once and kept.
"""

from __future__ import annotations

import math
import os
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from tifffile import TiffPageSeries
from tiffslide import TiffSlide

from patchcl_qupath.datatypes import Box
from patchcl_qupath.errors import is_damage
from patchcl_qupath.slides.chunks import ChunkedPixels, cut, drawn_from
from patchcl_qupath.slides.colour import ToRGB, alpha_is_unused, to_rgb
from patchcl_qupath.slides.level import (
    AmbiguousPathError,
    Level,
    MissingReaderError,
    Pyramid,
    Selection,
    check_memory,
    is_associated,
    level_scale,
    shown,
)
from patchcl_qupath.slides.pixel_size import tiff_pixel_sizes
from patchcl_qupath.slides.plain_pages import images
from patchcl_qupath.slides.tiled_page import HalfPage, TiledPage, tiled_pages

_LOOK_SIDE_PX = 2048  # about, of the blocks in which alpha is looked for

# Kinds of TIFF whose images tifffile finds by parsing text: with text that does not parse, the
# images are found by their pages alone.
_BY_TEXT = ("is_ome", "is_philips", "is_imagej", "is_svs", "is_shaped", "is_qpi", "is_sis")


def open_tiff(path: Path, selection: Selection) -> Pyramid:
    """The image of a TIFF that ``selection`` names. May raise any exception."""
    slide, found = _open(path)
    try:
        tiff = slide.ts_tifffile
        if tiff.is_scn or tiff.is_bif:
            raise MissingReaderError("Leica SCN and Ventana BIF need OpenSlide")
        all_series = images(found, _arrays)
        number = _choose(all_series, selection)
        series = all_series[number]
        arrays = _arrays(series)
        # Threads may still read when a file is dropped from the cache: the last reader closes it.
        weakref.finalize(arrays[0].store, tiff.close)
        in_file = zip(arrays, series.levels, strict=True)
        finest_first = sorted(in_file, key=lambda pair: -math.prod(_level_size(pair[1])))
        page = finest_first[0][1].keyframe
        has_alpha = _has_alpha(finest_first[-1][0])
        levels: list[Level] = []
        for array, level in finest_first:
            levels.append(_level(array, to_rgb(level.keyframe, has_alpha), level, levels))
        return Pyramid(levels, tiff_pixel_sizes(tiff, page, number), _bounds(slide), number)
    except BaseException:
        slide.close()
        raise


def _open(path: Path) -> tuple[TiffSlide, Sequence[TiffPageSeries]]:
    """An open file and its images, as tifffile finds them.

    Raises AmbiguousPathError for a path that tiffslide takes for two.
    """
    if "::" in str(path):
        raise AmbiguousPathError(path)
    slide = TiffSlide(path)
    try:
        return slide, slide.ts_tifffile.series
    except Exception as error:
        slide.close()
        if not is_damage(error):
            raise
    slide = TiffSlide(path, tifffile_options=dict.fromkeys(_BY_TEXT, False))
    try:
        return slide, slide.ts_tifffile.series
    except BaseException:
        slide.close()
        raise


def _choose(all_series: Sequence[TiffPageSeries], selection: Selection) -> int:
    """The number of the image that is meant: by size and by name, else the one that is shown.

    Raises ValueError for a name or number that no image has.
    """
    sizes = [_size(series) for series in all_series]
    named = _named(all_series, selection)
    if named is not None and selection.size in (None, sizes[named]):
        return named
    of_size = [i for i, size in enumerate(sizes) if size == selection.size]
    if len(of_size) == 1:
        return of_size[0]
    if named is not None:
        return named
    return shown(sizes, [_is_associated(series) for series in all_series])


def _named(all_series: Sequence[TiffPageSeries], selection: Selection) -> int | None:
    """The number of the image that is named by its name or number; None where none is."""
    if selection.name is not None:
        found = [i for i, series in enumerate(all_series) if series.name == selection.name]
        if len(found) == 1:
            return found[0]
        if selection.series is None and selection.size is None:
            names = ", ".join(series.name or "?" for series in all_series)
            raise ValueError(f"it holds no image named {selection.name}, but {names}")
    if selection.series is not None:
        if not 0 <= selection.series < len(all_series):
            raise ValueError(f"it holds {len(all_series)} images, not number {selection.series}")
        return selection.series
    return None


def _is_associated(series: TiffPageSeries) -> bool:
    """Whether an image is no slide, but shows one, or its label."""
    return series.keyframe.is_reduced or is_associated(series.name, len(series.levels))


def _size(series: TiffPageSeries) -> tuple[int, int]:
    """(width, height) of an image at its finest level."""
    return max(map(_level_size, series.levels), key=math.prod)


def _level_size(level: TiffPageSeries) -> tuple[int, int]:
    """(width, height) of a level."""
    return int(level.keyframe.imagewidth), int(level.keyframe.imagelength)


def _arrays(series: TiffPageSeries) -> Sequence[Any]:
    """The levels of an image, as arrays that are decoded as they are read."""
    if pages := tiled_pages(series):
        return pages
    # With fewer threads, as tifffile has it below six cores, the chunks of all workers are decoded
    # in the one thread of zarr's event loop, and workers wait for each other.
    threads = int(os.environ.get("TIFFSLIDE_NUM_DECODE_THREADS") or 2)
    store = series.aszarr(maxworkers=threads)
    opened = zarr.open(store, mode="r")  # of version 2 or 3, as tifffile has it
    if isinstance(opened, zarr.Array):
        return [opened]
    return [opened[str(number)] for number in range(len(series.levels))]


def _has_alpha(coarsest: Any) -> bool:
    """Whether the alpha of an image means anything, as its coarsest level shows.

    All of that is looked at, until there is some: whatever else a person left may be erased.
    """
    if coarsest.ndim != 3 or coarsest.shape[2] != 4:
        return False
    rows, cols = coarsest.shape[:2]
    sides = [side * max(1, _LOOK_SIDE_PX // side) for side in coarsest.chunks[:2]]
    is_readable = False
    for part in cut(Box(0, 0, rows, cols), (sides[0], sides[1])):
        try:
            samples = np.asarray(coarsest[part.row0 : part.row1, part.col0 : part.col1])
        except Exception as error:  # decoders raise anything
            if not is_damage(error):
                raise
            continue
        if not alpha_is_unused(samples):
            return True
        is_readable = True
    return not is_readable


def _level(array: Any, convert: ToRGB, series: TiffPageSeries, finer: Sequence[Level]) -> Level:
    """One level of an image, of which the ``finer`` ones are open."""
    if array.ndim != 3 or array.dtype != np.uint8:
        raise ValueError(f"not 8-bit RGB: axes {series.axes}, {array.dtype}")
    shape, chunk = array.shape[:2], array.chunks[:2]
    missing = _missing(series, (shape, chunk))
    if missing is not None and missing.all() and not finer:
        raise ValueError("it holds no pixels")
    scale = level_scale(shape, finer)
    below = drawn_from(finer[-1], shape, scale) if finer else None
    if chunk[0] >= shape[0] and chunk[1] >= shape[1] and missing is None:
        check_memory(math.prod(shape))
        try:
            return Level(convert(np.asarray(array[:])), (1, 1), scale)
        except Exception as error:  # damaged: all of it is drawn from the finer level
            if below is None or not is_damage(error):
                raise
            missing = np.ones((1, 1), bool)
    pixels = ChunkedPixels(stored=array, chunk=chunk, to_rgb=convert, missing=missing, finer=below)
    return _with_half(Level(pixels, chunk, scale))


def _with_half(level: Level) -> Level:
    """A level with one of half its size beside it, where its tiles can be decoded at half of it.

    What cannot, as a damaged tile, is averaged from the level itself.
    """
    whole = level.pixels
    page = HalfPage.of(whole.stored) if isinstance(whole.stored, TiledPage) else None
    if page is None:
        return level
    scale = 2 * level.scale[0], 2 * level.scale[1]
    chunk = page.chunks[:2]
    pixels = ChunkedPixels(
        stored=page,
        chunk=chunk,
        to_rgb=whole.to_rgb,
        missing=whole.missing,
        finer=drawn_from(level, page.shape[:2], scale),
    )
    return replace(level, half=Level(pixels, chunk, scale))


def _missing(
    series: TiffPageSeries, grid: tuple[tuple[int, int], tuple[int, int]]
) -> NDArray[np.bool_] | None:
    """(chunk rows, chunk columns): which chunks are not in the file; None if all of them are.

    ``grid`` is the shape of the level and that of a chunk. A chunk that is left out has no offset,
    or no bytes; Philips leaves out the last row of the table, too.
    """
    page = series.pages[0]
    if series.dataoffset is not None or page is None:
        return None
    rows, cols = (-(-n // side) for n, side in zip(*grid, strict=True))
    stored = np.zeros(rows * cols, bool)
    table = list(zip(page.dataoffsets, page.databytecounts, strict=False))[: rows * cols]
    stored[: len(table)] = [bool(offset and count) for offset, count in table]
    return None if stored.all() else ~stored.reshape(rows, cols)


def _bounds(slide: TiffSlide) -> tuple[float, ...] | None:
    """The bounds (x, y, width, height) of the scanned area; None without any."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(hamamatsu|.*ventana)-format")
            properties = slide.properties
        names = ("bounds-x", "bounds-y", "bounds-width", "bounds-height")
        return tuple(float(properties[f"tiffslide.{name}"]) for name in names)
    except Exception:  # it parses all of the metadata, and raises anything
        return None
