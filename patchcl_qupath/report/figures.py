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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from patchcl_qupath.datatypes import (
    Box,
    UncertaintyGrid,
)
from patchcl_qupath.report.thumbnails import beside, draw_contours, draw_failed_tiles
from patchcl_qupath.segmentation.segmented_image import SegmentedImage
from patchcl_qupath.segmentation.uncertainty import BIN_STEPS, FieldsOfView, fields_of_view, step_px
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.storage.files import atomic_write, to_jpeg
from patchcl_qupath.storage.layout import FIGURES
from patchcl_qupath.storage.records import (
    FieldOfViewRecord,
    FiguresRecord,
    Histogram,
    StainHistogram,
    write_record,
)

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


def write_preview(path: Path, segmented: SegmentedImage) -> None:
    """Write a PNG of the field of view with the most nuclei, with their contours.

    Beside it, where tiles failed, is the whole image with these tiles in red. An image without
    nuclei shows its middle. Raises StorageError.
    """
    box = _fullest(segmented)
    picture = draw_contours(segmented.pixels(box), segmented.contours_in(box))
    if segmented.failed_tiles:
        slide = segmented.image.slide
        overview = segmented.thumbnail(slide.thumbnail_px(OVERVIEW_MPP))
        picture = beside(picture, draw_failed_tiles(overview, segmented.failed_tiles, slide.size))
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=1)


def _fullest(segmented: SegmentedImage) -> Box:
    """The field of view with the most nuclei, or in the middle."""
    slide, uncertainty = segmented.image.slide, segmented.uncertainty
    if uncertainty is not None and uncertainty.nuclei.any():
        found = fields_of_view(uncertainty, PREVIEW_BINS)
        return _box(found, int(np.argmax(found.nuclei)), slide)
    bin_px = BIN_STEPS * step_px(slide.mpp)
    height, width = (min(n * bin_px, px) for n, px in zip(PREVIEW_BINS, slide.shape, strict=True))
    row, col = (slide.shape[0] - height) // 2, (slide.shape[1] - width) // 2
    return Box(row, col, row + height, col + width)


def write_figures(folder: Path, segmented: SegmentedImage, run: str) -> None:
    """Write what the report shows of an image to ``folder``, in place of what was there.

    ``run`` is the run that segmented it. Raises StorageError.
    """
    slide = segmented.image.slide
    px = max(1, math.ceil(max(slide.shape) / OVERVIEW_PX))  # working px per overview px
    overview = segmented.thumbnail(px)
    with atomic_write(folder) as new:
        new.mkdir()
        picture = _marked(overview, px, segmented)
        (new / "overview.jpg").write_bytes(to_jpeg(picture, _QUALITY))
        width_mm, height_mm = (
            n * mpp / 1000 for n, mpp in zip(slide.size, slide.mpp_level0, strict=True)
        )
        area, stain, probability = _measured(segmented)
        figures = FiguresRecord(
            run=run,
            nuclei=segmented.count,
            mm=(width_mm, height_mm),
            area=area,
            stain=stain,
            probability=probability,
        )
        if segmented.uncertainty is not None and segmented.uncertainty.points.any():
            density = _Density.of(segmented.uncertainty, slide.mpp_level0)
            picture_of_density = density.picture(overview.shape[:2], px, slide.downsample)
            picture_of_density.save(new / "density.png", optimize=True)
            figures = msgspec.structs.replace(
                figures,
                highest_density=round(density.highest),
                fields_of_view=_write_fields_of_view(new, segmented, segmented.uncertainty),
            )
        write_record(new / FIGURES, figures, compact=True)


def _write_fields_of_view(
    folder: Path, segmented: SegmentedImage, uncertainty: UncertaintyGrid
) -> tuple[FieldOfViewRecord, ...]:
    """Write a picture of each field of view that is shown; returns what there is to say of it."""
    found = fields_of_view(uncertainty, _FOV_BINS)
    records = []
    for number, (kind, i) in enumerate(_chosen(found)):
        picture = f"field-{number}.jpg"
        box = _box(found, i, segmented.image.slide)
        (folder / picture).write_bytes(to_jpeg(segmented.pixels(box), _QUALITY))
        records.append(_field_of_view(segmented, found, i, kind=kind, picture=picture))
    return tuple(records)


class _Histogram:
    """Counts of values in fine steps from 0 to ``highest``; what lies beyond counts at the end."""

    def __init__(self, highest: float, bars: int, fine: int) -> None:
        self._highest, self._bars = highest, bars
        self._counts = np.zeros(bars * fine, dtype=np.int64)

    def add(self, values: NDArray[np.float32]) -> None:
        inside = np.clip(values, 0, self._highest)
        self._counts += np.histogram(inside, len(self._counts), (0, self._highest))[0]

    def record(self) -> Histogram:
        """The median, to a fine step; and the counts of ``bars`` coarse ones."""
        below, half = np.cumsum(self._counts), self._counts.sum() / 2
        median = None
        if half:
            i = int(np.searchsorted(below, half))  # the step in which the median lies
            within = (half - (below[i] - self._counts[i])) / self._counts[i]
            median = float((i + within) * self._highest / len(self._counts))
        bars = self._counts.reshape(self._bars, -1).sum(axis=1)
        return Histogram(median=median, highest=self._highest, counts=bars.tolist())


def _measured(segmented: SegmentedImage) -> tuple[Histogram, StainHistogram, float | None]:
    """Histograms of area and of the first stain, and the mean probability, of all nuclei."""
    stain = segmented.image.stains.names[0]  # hematoxylin, in H&E and with DAB
    names = ("Area µm^2", f"{stain}: Mean", "Detection probability")
    area, density = _Histogram(300, 30, 400), _Histogram(1.5, 30, 50)
    count, total = 0, 0.0
    for measured in segmented.measurements(names):
        area.add(measured[names[0]])
        density.add(measured[names[1]])
        count += len(measured[names[2]])
        total += float(measured[names[2]].sum(dtype=np.float64))
    of_stain = StainHistogram(name=stain, **msgspec.structs.asdict(density.record()))
    return area.record(), of_stain, total / count if count else None


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


def _marked(overview: NDArray[np.uint8], px: int, segmented: SegmentedImage) -> NDArray[np.uint8]:
    """The whole image (h, w, 3) with its tissue outlined, its regions, and failed tiles in red."""
    image = segmented.image
    rows, cols = (np.arange(n) * px // image.tissue_px for n in overview.shape[:2])
    tissue = image.tissue[np.ix_(rows, cols)]  # (h, w)
    inner = tissue.copy()  # two pixels from what is no tissue: a line that shows
    for _ in range(2):
        wide = np.pad(inner, 1)
        inner &= wide[:-2, 1:-1] & wide[2:, 1:-1] & wide[1:-1, :-2] & wide[1:-1, 2:]
    marked = overview.copy()
    marked[tissue & ~inner] = _TISSUE
    picture = draw_failed_tiles(marked, segmented.failed_tiles, image.slide.size)
    pen = ImageDraw.Draw(picture)
    for ring in _rings(image.region):
        pen.line([(x, y) for x, y in (ring / px).tolist()], fill=_REGION, width=2)
    return np.asarray(picture)


def _rings(region: shapely.Geometry | None) -> Iterator[NDArray[np.float64]]:
    for part in [] if region is None else shapely.get_parts(region):
        for ring in shapely.get_rings(part):
            yield shapely.get_coordinates(ring)


def _chosen(found: FieldsOfView) -> list[tuple[str, int]]:
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


def _field_of_view(
    segmented: SegmentedImage, found: FieldsOfView, i: int, *, kind: str, picture: str
) -> FieldOfViewRecord:
    """What there is to say of a field of view."""
    slide = segmented.image.slide
    box = _box(found, i, slide)
    height, width = box.shape
    contours = segmented.contours_in(box)
    frame = shapely.box(0, 0, width, height)
    mm2 = found.tissue[i] * math.prod(found.size) * math.prod(slide.mpp_level0) / 1e6
    (x, y) = slide.downsample
    return FieldOfViewRecord(
        kind=kind,
        picture=picture,
        x=round(box.col0 * x),
        y=round(box.row0 * y),
        width=width,
        height=height,
        um=round(width * slide.mpp),
        nuclei=int(shapely.contains(frame, shapely.centroid(contours)).sum()),
        density=round(found.nuclei[i] / mm2),
        entropy=round(float(found.entropy[i]), 3),
        contours=[
            np.rint(shapely.get_coordinates(contour)[:-1] * CONTOUR_UNITS)
            .astype(int)
            .ravel()
            .tolist()
            for contour in shapely.simplify(contours, 0.4)
        ],
    )


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
