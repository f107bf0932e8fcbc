"""Pictures and a few figures of an image, gathered when it is done: its preview, and its folder
of the report:

overview.jpg    the whole image: tissue outlined, regions, holes in red
density.png     nuclei per mm2 of tissue, in the same frame
field-0.jpg ... fields worth a look, as they are
figures.json    what there is to say of them: outlines of nuclei, histograms, medians

Memory does not grow with the slide: nuclei are read tile by tile, and only the columns needed.
Which fields are worth a look says the survey.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from patchcl_qupath.datatypes import (
    Box,
    FailedTile,
    Polygons,
    Tile,
    UncertaintyGrid,
    grid_to_level0,
)
from patchcl_qupath.errors import SlideError
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.report.thumbnails import beside, draw_contours, draw_failed_tiles
from patchcl_qupath.segmentation.uncertainty import BIN_STEPS, FieldsOfView, fields_of_view, step_px
from patchcl_qupath.slides.prepare import PreparedImage
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.storage.files import atomic_write, to_jpeg, write_json

PREVIEW_BINS = (3, 4)  # rows and columns of the field that it shows: 192 x 256 um
OVERVIEW_MPP = 16.0  # of the whole image beside it, where there are holes
OVERVIEW_PX = 400  # longest side of the whole image, about
DENSITY_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
CONTOUR_UNITS = 3  # outlines are in whole thirds of a working pixel
_FOV_BINS = (2, 2)  # 128 um: small enough to show at full resolution
_KINDS = ("densest", "most uncertain", "typical", "typical")  # of the fields that are shown
_QUALITY = 62  # of JPEG
_TISSUE = (0, 90, 200)
_REGION = (0, 0, 0)
_UNREADABLE = 128  # grey
_NEAR_UM = 50.0  # no part of a nucleus is farther from its centroid


def write_preview(
    path: Path,
    image: PreparedImage,
    store: TileStore,
    done: Sequence[Tile],
    failed_tiles: Sequence[FailedTile],
    uncertainty: UncertaintyGrid | None,
) -> None:
    """Write a PNG of the field with the most nuclei, outlined; beside it where the holes are.

    ``done`` are the image's finished tiles, ``uncertainty`` what was seen in them, None if
    there are none. An image without nuclei shows its middle.
    """
    slide = image.slide
    box = _fullest(image, uncertainty)
    picture = draw_contours(_pixels(box, image), _nuclei_near(box, image, store, done))
    if failed_tiles:
        whole = draw_failed_tiles(slide.thumbnail(OVERVIEW_MPP), failed_tiles, slide.size)
        picture = beside(picture, whole)
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=1)


def _fullest(image: PreparedImage, uncertainty: UncertaintyGrid | None) -> Box:
    """The field with the most nuclei, or in the middle."""
    slide = image.slide
    if uncertainty is not None and uncertainty.nuclei.any():
        found = fields_of_view(uncertainty, PREVIEW_BINS)
        return _box(found, int(np.argmax(found.nuclei)), slide)
    bin_px = BIN_STEPS * step_px(slide.mpp)
    height, width = (min(n * bin_px, px) for n, px in zip(PREVIEW_BINS, slide.shape, strict=True))
    row, col = (slide.shape[0] - height) // 2, (slide.shape[1] - width) // 2
    return Box(row, col, row + height, col + width)


def write_gallery(
    folder: Path,
    image: PreparedImage,
    store: TileStore,
    done: Sequence[Tile],
    failed_tiles: Sequence[FailedTile],
    uncertainty: UncertaintyGrid | None,
    about: dict[str, Any],
) -> None:
    """Write what the report shows of an image to ``folder``, in place of what was there.

    ``done`` are its finished tiles, ``uncertainty`` what was seen in them, None if there are none.
    ``about`` goes into ``figures.json`` as it is. Raises StorageError; what cannot be read is grey.
    """
    slide = image.slide
    px = max(1, math.ceil(max(slide.shape) / OVERVIEW_PX))  # working px per overview px
    try:
        overview = slide.thumbnail(px * slide.mpp)
    except SlideError:
        overview = np.full((*(-(-n // px) for n in slide.shape), 3), _UNREADABLE, np.uint8)
    mm = [n * mpp / 1000 for n, mpp in zip(slide.size, slide.mpp_level0, strict=True)]
    figures = {**about, "mm": mm, **_measured(image, store, done)}
    with atomic_write(folder) as new:
        new.mkdir()
        picture = _marked(overview, image, px, failed_tiles)
        (new / "overview.jpg").write_bytes(to_jpeg(picture, _QUALITY))
        if uncertainty is not None and uncertainty.points.any():
            density = _Density.of(uncertainty, slide.mpp_level0)
            density.picture(overview.shape[:2], px, slide.downsample).save(
                new / "density.png", optimize=True
            )
            figures["highest_density"] = round(density.highest)
            figures["fields"] = []
            found = fields_of_view(uncertainty, _FOV_BINS)
            for number, (kind, i) in enumerate(_worth_a_look(found)):
                pixels, shown = _fov(found, i, image, store, done)
                name = f"field-{number}.jpg"
                (new / name).write_bytes(to_jpeg(pixels, _QUALITY))
                figures["fields"].append({"kind": kind, "picture": name, **shown})
        write_json(new / "figures.json", figures, compact=True)


class _Histogram:
    """Counts of values in fine steps from 0 to ``highest``; what lies beyond counts at the end."""

    def __init__(self, highest: float, bars: int, fine: int) -> None:
        self._highest, self._bars = highest, bars
        self._counts = np.zeros(bars * fine, dtype=np.int64)

    def add(self, values: NDArray[np.float32]) -> None:
        inside = np.clip(values, 0, self._highest)
        self._counts += np.histogram(inside, len(self._counts), (0, self._highest))[0]

    def figures(self) -> dict[str, Any]:
        """The median, to a fine step; and the counts of ``bars`` coarse ones."""
        below, half = np.cumsum(self._counts), self._counts.sum() / 2
        median = None
        if half:
            i = int(np.searchsorted(below, half))  # the step in which the median lies
            within = (half - (below[i] - self._counts[i])) / self._counts[i]
            median = float((i + within) * self._highest / len(self._counts))
        bars = self._counts.reshape(self._bars, -1).sum(axis=1)
        return {"median": median, "highest": self._highest, "counts": bars.tolist()}


def _measured(image: PreparedImage, store: TileStore, done: Sequence[Tile]) -> dict[str, Any]:
    """Histograms of area and of the first stain, and the mean probability, of all nuclei."""
    stain = image.stains.names[0]  # hematoxylin, in H&E and with DAB
    names = ("Area µm^2", f"{stain}: Mean", "Detection probability")
    area, density = _Histogram(300, 30, 400), _Histogram(1.5, 30, 50)
    count, certain = 0, 0.0
    for measured in store.measurements(done, names):
        area.add(measured[names[0]])
        density.add(measured[names[1]])
        count += len(measured[names[2]])
        certain += float(measured[names[2]].sum(dtype=np.float64))
    return {
        "area": area.figures(),
        "stain": {"name": stain, **density.figures()},
        "probability": certain / count if count else None,
    }


@dataclass(frozen=True)
class _Density:
    """Nuclei per mm2 of tissue, of cells: NaN where there is no tissue."""

    bin_size: tuple[float, float]  # (width, height), level 0
    values: NDArray[np.float64]  # (rows, cols)
    highest: float  # that has a colour of its own

    @classmethod
    def of(cls, uncertainty: UncertaintyGrid, mpp: tuple[float, float]) -> _Density:
        bin_mm2 = math.prod(uncertainty.bin_size) * math.prod(mpp) / 1e6
        # The rim of tissue has cells with a few points of it, too few to divide by.
        points = np.maximum(uncertainty.points, BIN_STEPS**2 // 4)
        values = np.full((uncertainty.rows.max() + 1, uncertainty.cols.max() + 1), np.nan)
        density = uncertainty.nuclei / points * BIN_STEPS**2 / bin_mm2
        values[uncertainty.rows, uncertainty.cols] = density
        return cls(uncertainty.bin_size, values, max(1.0, float(np.percentile(density, 99))))

    def picture(
        self, shape: tuple[int, int], px: int, downsample: tuple[float, float]
    ) -> Image.Image:
        """Of ``shape`` (rows, cols), ``px`` working pixels each; transparent where no tissue is."""
        rows, cols = (
            ((np.arange(n) + 0.5) * px * scale // bin_size).astype(int)
            for n, scale, bin_size in zip(shape, downsample[::-1], self.bin_size[::-1], strict=True)
        )
        outside = np.pad(self.values, ((0, 1), (0, 1)), constant_values=np.nan)
        values = outside[
            np.minimum(rows, self.values.shape[0])[:, None], np.minimum(cols, self.values.shape[1])
        ]
        level = np.nan_to_num(np.clip(values / self.highest, 0, 1) * 254, nan=255)
        picture = Image.fromarray(np.rint(level).astype(np.uint8), mode="P")
        stops = np.linspace(0, 254, len(DENSITY_COLOURS))
        table = [np.interp(np.arange(255), stops, c) for c in zip(*DENSITY_COLOURS, strict=True)]
        colours = np.rint(np.stack(table, axis=1)).astype(np.uint8)  # (255, 3)
        picture.putpalette([*colours.ravel().tolist(), 255, 255, 255])
        picture.info["transparency"] = 255
        return picture


def _marked(
    overview: NDArray[np.uint8], image: PreparedImage, px: int, failed_tiles: Sequence[FailedTile]
) -> NDArray[np.uint8]:
    """The whole image (h, w, 3) with its tissue outlined, its regions, and its holes in red."""
    slide = image.slide
    rows, cols = (np.arange(n) * px // image.tissue_px for n in overview.shape[:2])
    tissue = image.tissue[np.ix_(rows, cols)]  # (h, w)
    inner = tissue.copy()  # two pixels from what is no tissue: a line that shows
    for _ in range(2):
        wide = np.pad(inner, 1)
        inner &= wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    marked = overview.copy()
    marked[tissue & ~inner] = _TISSUE
    picture = draw_failed_tiles(marked, failed_tiles, slide.size)
    pen = ImageDraw.Draw(picture)
    for ring in _rings(image.region):
        pen.line([(x, y) for x, y in (ring / px).tolist()], fill=_REGION, width=2)
    return np.asarray(picture)


def _rings(region: shapely.Geometry | None) -> Iterator[NDArray[np.float64]]:
    for part in [] if region is None else shapely.get_parts(region):
        for ring in shapely.get_rings(part):
            yield shapely.get_coordinates(ring)


def _worth_a_look(found: FieldsOfView) -> list[tuple[str, int]]:
    """The densest field, the most uncertain one and typical ones: kind and index, each once.

    Fields that are half tissue at least, if there are any.
    """
    full = np.flatnonzero(found.tissue >= min(0.5, found.tissue.max()))
    density = found.nuclei[full] / found.tissue[full]
    typical = np.abs(density - np.median(density))
    ranks = {"densest": -density, "most uncertain": -found.entropy[full], "typical": typical}
    chosen: list[tuple[str, int]] = []
    left = np.ones(len(full), dtype=bool)
    for kind in _KINDS[: len(full)]:
        first = np.argmin(np.where(left, ranks[kind], np.inf))
        left[first] = False
        chosen.append((kind, int(full[first])))
    return chosen


def _fov(
    found: FieldsOfView, i: int, image: PreparedImage, store: TileStore, done: Sequence[Tile]
) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """The pixels (H, W, 3) of a field, and what to say of it.

    ``outlines`` are in units of a working pixel from its corner, [x, y, x, y, ...].
    """
    slide, (x, y) = image.slide, image.slide.downsample
    box = _box(found, i, slide)
    height, width = box.shape
    near = _nuclei_near(box, image, store, done)
    nuclei = shapely.contains(shapely.box(0, 0, width, height), shapely.centroid(near)).sum()
    outlines = [
        np.rint(shapely.get_coordinates(polygon)[:-1] * CONTOUR_UNITS).astype(int).ravel().tolist()
        for polygon in shapely.simplify(near, 0.4)
    ]
    mm2 = found.tissue[i] * math.prod(found.size) * math.prod(slide.mpp_level0) / 1e6
    return _pixels(box, image), {
        "x": round(box.col0 * x),
        "y": round(box.row0 * y),
        "width": width,
        "height": height,
        "um": round(width * slide.mpp),
        "nuclei": int(nuclei),
        "density": round(found.nuclei[i] / mm2),
        "doubt": round(float(found.entropy[i]), 3),
        "outlines": outlines,
    }


def _box(found: FieldsOfView, i: int, slide: Slide) -> Box:
    """A field on the working grid; moved in at the image's rim, and as small as it."""
    x, y = slide.downsample
    height, width = (
        min(round(size), n)
        for size, n in zip((found.size[1] / y, found.size[0] / x), slide.shape, strict=True)
    )
    row = min(round(found.y[i] / y), slide.shape[0] - height)
    col = min(round(found.x[i] / x), slide.shape[1] - width)
    return Box(row, col, row + height, col + width)


def _pixels(box: Box, image: PreparedImage) -> NDArray[np.uint8]:
    """Of a box of the working grid, (H, W, 3); what cannot be read is grey."""
    try:
        return image.slide.read(box)
    except SlideError:
        return np.full((*box.shape, 3), _UNREADABLE, np.uint8)


def _nuclei_near(
    box: Box, image: PreparedImage, store: TileStore, done: Sequence[Tile]
) -> Polygons:
    """Outlines of the nuclei that show in a box of the working grid, in its pixels."""
    slide, (x, y) = image.slide, image.slide.downsample
    around = box.grow(math.ceil(_NEAR_UM / slide.mpp), slide.shape)
    frame = shapely.box(box.col0, box.row0, box.col1, box.row1)
    shown = [np.empty(0, dtype=object)]
    for part in store.polygons([tile for tile in done if _meet(tile.write, around)]):
        polygons = grid_to_level0(part, (1 / x, 1 / y))
        shown.append(polygons[shapely.intersects(polygons, frame)])
    moved = shapely.transform(np.concatenate(shown), lambda xy: xy - (box.col0, box.row0))
    return np.asarray(moved)


def _meet(one: Box, other: Box) -> bool:
    return (
        one.row0 < other.row1
        and other.row0 < one.row1
        and one.col0 < other.col1
        and other.col0 < one.col1
    )
