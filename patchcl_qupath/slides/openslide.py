"""Slides that OpenSlide reads: those of ``FORMATS``, and TIFF that tiffslide cannot read.

OpenSlide is an extra. It draws any region of a level; here, its levels are sliced like others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Box
from patchcl_qupath.slides.chunks import ChunkedPixels, cut, drawn_from
from patchcl_qupath.slides.colour import on_white
from patchcl_qupath.slides.level import Level, MissingReaderError, Pyramid, Selection, level_scale
from patchcl_qupath.slides.pixel_size import PixelSize, PixelSizeSource, positive

FORMATS = {  # suffixes of formats that no other reader here reads
    ".bif": "Ventana BIF",
    ".czi": "Zeiss CZI",
    ".dcm": "DICOM",
    ".mrxs": "MRXS",
    ".scn": "Leica SCN",
    ".svslide": "Sakura SVSLIDE",
    ".vms": "Hamamatsu VMS",
    ".vmu": "Hamamatsu VMU",
}
_GENERIC = {None, "generic-tiff", "synthetic"}  # vendors whose colours OpenSlide does not check
_CHUNK_PX = 256  # least side of what is drawn at once

Properties = Mapping[str, str]


def open_openslide(path: Path, selection: Selection) -> Pyramid:
    """The slide in a file, as OpenSlide finds it. May raise any exception.

    Raises MissingReaderError where OpenSlide is not installed.
    """
    if selection.size is None and (selection.series or selection.name):
        image = selection.name or f"number {selection.series}"
        raise ValueError(f"OpenSlide shows one image of the file, which need not be {image}")
    library = _library(FORMATS.get(path.suffix.lower(), "it"))
    reader = _Reader(path, library)
    slide = reader.slide()
    properties = dict(slide.properties)
    levels: list[Level] = []
    for number in range(slide.level_count):
        levels.append(_level(reader, number, levels))
    return Pyramid(
        levels,
        _pixel_sizes(properties),
        _numbers(properties, "bounds-x", "bounds-y", "bounds-width", "bounds-height"),
    )


def open_instead(path: Path, selection: Selection, error: Exception) -> Pyramid:
    """A slide that another reader cannot read, whose ``error`` is raised if OpenSlide cannot.

    A TIFF of no known scanner is left to the other reader, which checks its colours.
    """
    try:
        vendor = _library("it").OpenSlide.detect_format(path)
    except MissingReaderError:
        raise error from None
    if vendor in _GENERIC:
        raise error
    try:
        pyramid = open_openslide(path, selection)
        pyramid.check_readable()
    except Exception as own:  # OpenSlide's errors, and those of the system
        raise own if isinstance(error, MissingReaderError) else error from own
    return pyramid


def one_of_each_slide(paths: Iterable[Path]) -> Iterator[Path]:
    """Image files, without those named before, and without further ones of a DICOM slide: each of
    its files stands for all."""
    seen: set[str | Path] = set()
    for path in paths:
        series = _dicom_series(path) if path.suffix.lower() == ".dcm" else None
        slide = series or path.resolve()
        if slide not in seen:
            yield path
        seen.add(slide)


def _dicom_series(path: Path) -> str | None:
    """The id of the series that a DICOM file belongs to; None if it is no slide, or OpenSlide's."""
    try:
        with _library("it").OpenSlide(path) as slide:
            return str(slide.properties["dicom.SeriesInstanceUID"])
    except Exception:  # it is opened again, where its error is raised
        return None


def openslide_version() -> str:
    """The versions of openslide-python and of OpenSlide. Raises MissingReaderError."""
    library = _library("it")
    return f"openslide-python {library.__version__}, OpenSlide {library.__library_version__}"


def _library(name: str) -> ModuleType:
    """OpenSlide, for a file of a format of that name."""
    try:
        import openslide as library
    except (ImportError, OSError) as error:  # of openslide-python, or of its library
        raise MissingReaderError(f"{name} needs OpenSlide") from error
    found: ModuleType = library
    return found


class _Reader:
    """Draws regions of a slide, for many threads at once."""

    def __init__(self, path: Path, library: ModuleType) -> None:
        self._path, self._library = path, library
        self._slide: Any = None

    def slide(self) -> Any:
        """The open slide."""
        slide = self._slide
        if slide is None:
            slide = self._slide = self._library.OpenSlide(self._path)
        return slide

    def region(
        self, level: int, location: tuple[int, int], size: tuple[int, int]
    ) -> NDArray[np.uint8]:
        """RGBA (rows, cols, 4) of a region: ``location`` (x, y) in level-0 px, ``size`` in px."""
        shared = self.slide()
        try:
            return np.asarray(shared.read_region(location, level, size))
        except self._library.OpenSlideError:
            # After one error, an open slide raises it for all regions, and in all threads: a slide
            # of its own shows whether it is of this region.
            if self._slide is shared:
                self._slide = None
            alone = self._library.OpenSlide(self._path)
            return np.asarray(alone.read_region(location, level, size))


@dataclass(frozen=True, eq=False, kw_only=True)
class _Region:
    """One level of a slide as RGBA (rows, cols, 4), drawn as it is sliced."""

    reader: _Reader
    number: int
    shape: tuple[int, int, int]
    chunk: tuple[int, int]
    downsample: float = field(default=1.0)

    def __getitem__(self, at: tuple[slice, slice]) -> NDArray[np.uint8]:
        """Pixels (h, w, 4) of rows and columns."""
        box = Box(at[0].start, at[1].start, at[0].stop, at[1].stop)
        if self.downsample.is_integer():
            return self._drawn(box, (box.row0, box.col0))
        # Between level-0 px, OpenSlide interpolates, by less than half of one. That a pixel is the
        # same in any box, each chunk is drawn from its corner.
        pixels = np.empty((*box.shape, 4), np.uint8)
        height, width = self.chunk
        for part in cut(box, self.chunk):
            corner = part.row0 // height * height, part.col0 // width * width
            pixels[part.within(box)] = self._drawn(part, corner)
        return pixels

    def _drawn(self, box: Box, corner: tuple[int, int]) -> NDArray[np.uint8]:
        """A box, drawn from a ``corner`` (row, col) at or before its own."""
        row, col = corner
        pixels = self.reader.region(
            self.number,
            location=(round(col * self.downsample), round(row * self.downsample)),
            size=(box.col1 - col, box.row1 - row),
        )
        return pixels[box.row0 - row :, box.col0 - col :]


def _level(reader: _Reader, number: int, finer: Sequence[Level]) -> Level:
    """One level of a slide, of which the ``finer`` ones are open."""
    slide = reader.slide()
    cols, rows = slide.level_dimensions[number]
    chunk = _chunk(slide.properties, number)
    region = _Region(
        reader=reader,
        number=number,
        shape=(rows, cols, 4),
        chunk=chunk,
        downsample=slide.level_downsamples[number],
    )
    scale = level_scale((rows, cols), finer)
    pixels = ChunkedPixels(
        stored=region,
        chunk=chunk,
        to_rgb=on_white,
        missing=None,
        finer=drawn_from(finer[-1], (rows, cols), scale) if finer else None,
    )
    return Level(pixels, chunk, scale)


def _chunk(properties: Properties, number: int) -> tuple[int, int]:
    """(rows, cols) of whole tiles of a level, or of any px where OpenSlide has no tiles."""
    names = (f"openslide.level[{number}].tile-{side}" for side in ("height", "width"))
    rows, cols = (int(positive(properties.get(name)) or _CHUNK_PX) for name in names)
    return math.ceil(_CHUNK_PX / rows) * rows, math.ceil(_CHUNK_PX / cols) * cols


def _pixel_sizes(properties: Properties) -> tuple[PixelSize, ...]:
    mpp = _numbers(properties, "mpp-x", "mpp-y")
    return () if mpp is None else (PixelSize(PixelSizeSource.VENDOR, (mpp[0], mpp[1])),)


def _numbers(properties: Properties, *names: str) -> tuple[float, ...] | None:
    """Some of OpenSlide's properties, or None where one of them is missing or no number."""
    try:
        return tuple(float(properties[f"openslide.{name}"]) for name in names)
    except (KeyError, ValueError):
        return None
