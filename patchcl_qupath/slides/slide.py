"""Slides: any box of the working grid in one read.

``Slide`` holds metadata only, so it is cheap to pickle; each process opens the file when it
first reads from it.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Box, ImageEntry
from patchcl_qupath.errors import DamagedError, ImageError, SlideError
from patchcl_qupath.slides.level import Pyramid, Selection, unreadable
from patchcl_qupath.slides.level_grid import LevelGrid, Overview
from patchcl_qupath.slides.pixel_size import MPP_RANGE, Pair, PixelSize, PixelSizeSource
from patchcl_qupath.slides.pyramid import forget_pyramids, open_pyramid
from patchcl_qupath.slides.signature import sample_of_chunks, slide_signature
from patchcl_qupath.slides.void import VoidMask, void_blocks
from patchcl_qupath.storage.files import is_file, is_too_long, too_long
from patchcl_qupath.storage.records import FileSignature

MAX_SIDE_MM = 300  # the largest glass, for sections of a whole brain, has 200
MPP_TOLERANCE = 0.1  # relative, within which the working grid is made of whole level-0 pixels


@dataclass(frozen=True, kw_only=True)
class Slide:
    """One image: its size, its pixel size, and reads on its working grid.

    ``size`` is (width, height) of level 0, without what lies outside of the bounds; ``mpp_level0``
    (x, y) µm/px there, and ``mpp_source`` where that is given; ``downsample`` (x, y) level-0 px per
    working px. Of the file: which image was asked for (``selection``) and which it is, from 0
    (``number``), ``origin`` (x, y) of the bounds in px, the size (width, height) of each of its
    pyramid ``levels``, and of a folder a ``sample`` of its chunks as it was opened. Pixels in
    ``void`` are read as glass: a slide that is just opened has none, see ``without_void``.
    """

    name: str
    path: Path
    size: tuple[int, int]
    mpp_level0: Pair
    downsample: Pair
    origin: tuple[int, int]
    levels: tuple[tuple[int, int], ...]
    selection: Selection
    number: int
    mpp_source: PixelSizeSource
    sample: int | None = None
    void: VoidMask | None = None

    def __post_init__(self) -> None:
        """Raise SlideError for a size that no slide has: even its thumbnail would not end."""
        (width, height), (x, y) = self.size, self.mpp_level0
        if max(width * x, height * y) > MAX_SIDE_MM * 1e3:
            raise SlideError(
                f"{self.name} is {width} x {height} px of {max(x, y):.3g} µm, which is larger than "
                "any slide: copy the file again, or correct its pixel size in QuPath"
            )

    @property
    def source(self) -> tuple[Path, int]:
        """The file, and which of its images this is: equal for slides that show the same."""
        return self.path.resolve(), self.number

    @classmethod
    def open(cls, entry: ImageEntry, mpp: float = 0.5) -> Slide:
        """Open an image of a project, with a working grid of about ``mpp`` µm/px.

        The pixel size is QuPath's, else the first usable one of the file's, else
        ``entry.fallback_mpp``. Of several images in a file it is the one that the project names, or
        that QuPath's Bio-Formats shows without a name. Where a whole number of level-0 pixels is
        within 10 % of ``mpp``, working pixels are such blocks (resampling by 1.98 would blur
        periodically); elsewhere they are of exactly ``mpp``.

        Raises ImageError with ``entry.problem``; SlideError for a file that is missing, damaged,
        not 8-bit RGB, another one than QuPath saved, without a usable pixel size, or with one where
        QuPath's is not usable.
        """
        if entry.problem:
            raise ImageError(entry.problem)
        if not is_file(entry.path):
            if is_too_long(entry.path):
                raise SlideError(too_long(entry.name, entry.path))
            raise SlideError(
                f"{entry.name} is not at {entry.path}: open the project in QuPath and fix its path"
            )
        try:
            selection, sample = Selection.of(entry), sample_of_chunks(entry.path)
            pyramid = open_pyramid(entry.path, selection, sample)
            pyramid.check_readable()
        except Exception as error:
            raise unreadable(entry.name, error) from error
        origin, size = _frame(entry, pyramid)
        pixel_size = _pixel_size(entry, pyramid.pixel_sizes)
        return cls(
            name=entry.name,
            path=entry.path,
            size=size,
            mpp_level0=pixel_size.mpp,
            downsample=_downsample(mpp, pixel_size.mpp),
            origin=origin,
            levels=tuple(level.pixels.shape[1::-1] for level in pyramid.levels),
            selection=selection,
            number=pyramid.number,
            mpp_source=pixel_size.source,
            sample=sample,
        )

    @property
    def calibrated(self) -> bool:
        """Whether the pixel size is QuPath's or the file's."""
        return self.mpp_source is not PixelSizeSource.FALLBACK

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, cols) of the working grid; partial pixels at the far edges are left out."""
        (width, height), (x, y) = self.size, self.downsample
        return max(1, math.floor(height / y)), max(1, math.floor(width / x))

    @property
    def mpp(self) -> float:
        """µm per working px; its square is the area of a working px in µm²."""
        return math.sqrt(math.prod(self.grid_mpp))

    @property
    def grid_mpp(self) -> Pair:
        """µm per working px, (x, y)."""
        (x, y), (down_x, down_y) = self.mpp_level0, self.downsample
        return x * down_x, y * down_y

    def read(self, box: Box) -> NDArray[np.uint8]:
        """The area-averaged pixels (rows, cols, 3) uint8 of a box of the working grid.

        Reads one slice of the coarsest pyramid level that is fine enough, or of its half: no chunk
        is decoded twice.
        Raises SlideError for damaged pixels.
        """
        assert box == box.grow(0, self.shape), (box, self.shape)
        with _reopening():
            return self._grid(self.shape, self.downsample, from_half=True).read(box)

    def thumbnail_px(self, mpp: float) -> int:
        """Working px per thumbnail px: the whole number nearest to ``mpp`` µm."""
        return max(1, round(mpp / self.mpp))

    def thumbnail(self, mpp: float) -> NDArray[np.uint8]:
        """The area-averaged pixels (h, w, 3) uint8 of the whole image at about ``mpp`` µm/px.

        Grey where they are damaged; see ``overview``.
        """
        return self.overview(mpp).pixels

    def overview(self, mpp: float) -> Overview:
        """The thumbnail of the whole image at about ``mpp`` µm/px, and where it is damaged.

        A thumbnail px is ``thumbnail_px(mpp)`` working px wide and high, so (h, w) is ``shape``
        divided by that and rounded up. Memory use is independent of the size of the slide, and no
        chunk is decoded twice.
        Raises SlideError where no pixel can be read.
        """
        px = self.thumbnail_px(mpp)
        rows, cols = self.shape
        x, y = self.downsample
        with _reopening():
            return self._grid((-(-rows // px), -(-cols // px)), (x * px, y * px)).read_whole()

    def without_void(self, mpp: float) -> tuple[Slide, Overview]:
        """The slide whose voids are read as glass, and its overview as it is without that.

        Voids are found on the overview at about ``mpp`` µm/px.
        """
        px, raw = self.thumbnail_px(mpp), self.overview(mpp)
        blocks = void_blocks(raw.black, (px * self.mpp) ** 2)
        if not blocks.any():
            return self, raw
        x, y = self.downsample
        return replace(self, void=VoidMask.of(blocks, (x * px, y * px), self.origin)), raw

    def check_same(self, file: FileSignature) -> None:
        """Raise SlideError where the file cannot be read, or is not a copy of ``file``.

        For other machines: what they have at the path of the slide may be another file.
        """
        with _reopening():
            self._pyramid()
        try:
            found = slide_signature(self.path)
        except OSError as error:
            raise unreadable(self.name, error) from error
        if not found.has_content_of(file):
            place = f"{self.path}, as seen from {platform.node()}"
            if found.bytes == file.bytes:
                raise SlideError(
                    f"{self.name}: the file at {place}, has another content: copy it there again, "
                    "and run again"
                )
            raise SlideError(
                f"{self.name}: the file at {place}, has {found.bytes} bytes, not {file.bytes}: "
                "copy it there again, and run again"
            )

    def _grid(
        self, shape: tuple[int, int], downsample: Pair, *, from_half: bool = False
    ) -> LevelGrid:
        """A grid over the image, on the coarsest level that is fine enough.

        ``from_half`` where it may be averaged from that level's half: not where voids are to be
        found, or painted, px by px.
        """
        level = self._pyramid().level_for(downsample)
        if from_half and self.void is None:
            level = level.averaged(downsample, self.origin)
        return LevelGrid.of(
            self.name,
            level=level,
            shape=shape,
            downsample=downsample,
            origin=self.origin,
            void=self.void,
        )

    def _pyramid(self) -> Pyramid:
        """The open file. Raises SlideError."""
        try:
            return open_pyramid(self.path, self.selection, self.sample)
        except FileNotFoundError as error:
            raise SlideError(
                f"{self.name} is not at {self.path}, as seen from {platform.node()}: bring it "
                "back, or share its folder with that machine, and run again"
            ) from error
        except PermissionError as error:
            raise SlideError(
                f"{self.name} is at {self.path}, which may not be read by the user of "
                f"{platform.node()}: give that user the permission, and run again"
            ) from error
        except Exception as error:
            raise unreadable(self.name, error) from error


def _frame(entry: ImageEntry, pyramid: Pyramid) -> tuple[tuple[int, int], tuple[int, int]]:
    """Origin (x, y) in the file, and size (width, height), of the image as QuPath shows it.

    QuPath crops images that OpenSlide reads to the slide's bounds, and saves the resulting size.
    """
    rows, cols = pyramid.levels[0].pixels.shape[:2]
    frames = [((0, 0), (cols, rows))]
    if pyramid.bounds:
        x, y, width, height = map(int, pyramid.bounds)
        frames.insert(0 if entry.use_bounds else 1, ((x, y), (width, height)))
    if entry.size is None:
        return frames[0]
    for origin, size in frames:
        if size == entry.size:
            return origin, size
    raise SlideError(
        f"{entry.name} is {cols} x {rows} px, but QuPath saved {entry.size[0]} x {entry.size[1]}: "
        f"{entry.path} is another image; fix its path in QuPath"
    )


def _pixel_size(entry: ImageEntry, of_file: tuple[PixelSize, ...]) -> PixelSize:
    """The pixel size of level 0: the first usable one of QuPath's, the file's and the fallback.

    QuPath's measurements are made with its own: where that is not usable, the file's is not taken.
    """
    known, usable = list(of_file), [one for one in of_file if one.is_usable]
    if entry.mpp is not None:
        of_qupath = PixelSize(PixelSizeSource.QUPATH, entry.mpp)
        if usable and not of_qupath.is_usable:
            raise SlideError(
                f"{entry.name} has a pixel size of {of_qupath} µm in QuPath, which cannot "
                f"be, and of {usable[0]} µm in its file: set it in QuPath (Image tab, "
                "double-click 'Pixel width')"
            )
        known.insert(0, of_qupath)
    fallback = entry.fallback_mpp
    given = [] if fallback is None else [PixelSize(PixelSizeSource.FALLBACK, (fallback,) * 2)]
    for pixel_size in (*known, *given):
        if pixel_size.is_usable:
            return pixel_size
    found = f"a pixel size of {known[0]} µm, which cannot be" if known else "no pixel size"
    if given:
        least, most = MPP_RANGE
        raise SlideError(
            f"{entry.name} has {found}, and the given one of {given[0]} µm cannot be: "
            f"give one from {least} to {most} µm"
        )
    raise SlideError(
        f"{entry.name} has {found}: pass --mpp (0.25 for most scans at 40x), or set it in QuPath "
        "(Image tab, double-click 'Pixel width')"
    )


@contextmanager
def _reopening() -> Iterator[None]:
    """Where pixels cannot be read, as after a network error, open files again the next time."""
    try:
        yield
    except DamagedError:
        raise
    except SlideError:
        forget_pyramids()
        raise


def _downsample(mpp: float, mpp_level0: Pair) -> Pair:
    """(x, y) level-0 px per working px."""
    x, y = mpp_level0
    if abs(x - y) < 0.02 * x:  # square but for the error of calibration: blocks stay square
        x = y = math.sqrt(x * y)
    return _factor(mpp, x), _factor(mpp, y)


def _factor(mpp: float, mpp_level0: float) -> float:
    """Level-0 px per working px on one axis."""
    whole = max(1, round(mpp / mpp_level0))
    if abs(whole * mpp_level0 - mpp) <= MPP_TOLERANCE * mpp:
        return float(whole)
    return mpp / mpp_level0
