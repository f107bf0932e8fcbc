"""Pictures and figures of a segmented image: its preview, and its folder of the report.

overview.jpg    the whole image: tissue outlined, analysis regions, failed tiles in red
density.png     nuclei per mm² of tissue, in the same frame
positivity.png  the share of positive nuclei, in the same frame, where nuclei have classes
field-0.jpg ... fields of view at the working resolution, without contours
figures.json    histograms and medians of all nuclei; the contours in the fields of view

Memory does not grow with the slide: nuclei are read tile by tile, and only the columns needed.
Which fields of view are shown follows from the uncertainty grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import ImageDraw
from scipy import ndimage

from patchcl_qupath.answers.positivity import Positivity
from patchcl_qupath.datatypes import Box, UncertaintyGrid
from patchcl_qupath.report.density_map import DensityMap
from patchcl_qupath.report.positivity_map import ClassifiedNuclei, codes_in
from patchcl_qupath.report.thumbnails import beside, draw_contours, draw_failed_tiles
from patchcl_qupath.segmentation.measurements import PROBABILITY
from patchcl_qupath.segmentation.segmented_image import SegmentedImage
from patchcl_qupath.segmentation.uncertainty import (
    BIN_STEPS,
    FieldsOfView,
    bin_px,
    fields_of_view,
    sampling_points,
)
from patchcl_qupath.slides.prepare import PreparedImage
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.slides.stain_vectors import hematoxylin_of
from patchcl_qupath.storage.files import atomic_write, to_jpeg
from patchcl_qupath.storage.layout import FIGURES, Layout
from patchcl_qupath.storage.records import (
    FieldOfViewRecord,
    FiguresRecord,
    Histogram,
    ResultRecord,
    StainHistogram,
    write_record,
)

PREVIEW_BINS = (3, 4)  # rows and columns of bins in a preview: 192 x 256 µm
OVERVIEW_MPP = 16.0  # of the whole image beside a preview, where tiles failed
OVERVIEW_PX = 400  # longest side of overview.jpg, about
CONTOUR_UNITS = 3  # contours are in whole thirds of a working px
_FOV_BINS = (2, 2)  # 128 µm: small enough to show at full resolution
_FULL = 0.5  # tissue fraction of the fields of view that are shown, if any has so much
_KINDS = ("densest", "most uncertain", "typical", "typical")  # why fields of view are shown
_SIMPLIFY_PX = 0.4  # how far a contour that is shown may lie from the nucleus's own
_JPEG_QUALITY = 62
_BEYOND = 4  # times the end of a histogram, up to where medians are found
_BELOW = 1  # times the same, below 0: deconvolution has stains of less than nothing
_TISSUE_COLOUR = (0, 90, 200)
_REGION_COLOUR = (0, 0, 0)


def write_pictures(layout: Layout, segmented: SegmentedImage, result: ResultRecord) -> None:
    """Write the preview of an image, and what the report shows of it. Raises StorageError."""
    write_preview(layout.preview(segmented.image.id), segmented)
    write_figures(layout.figures(segmented.image.id), segmented, result)


def write_preview(path: Path, segmented: SegmentedImage) -> None:
    """Write a PNG of the field of view with the most nuclei, with their contours and cells.

    Beside it, where tiles failed, is the whole image with these tiles in red. An image without
    nuclei shows its middle. Raises StorageError.
    """
    box = _fullest(segmented)
    cells = segmented.contours_in(box, of_cells=True)
    picture = draw_contours(segmented.pixels(box), segmented.contours_in(box), cells=cells)
    if segmented.failed_tiles:
        slide = segmented.image.slide
        overview = segmented.thumbnail(slide.thumbnail_px(OVERVIEW_MPP))
        picture = beside(picture, draw_failed_tiles(overview, segmented.failed_tiles, slide.size))
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=1)


def write_figures(folder: Path, segmented: SegmentedImage, result: ResultRecord) -> None:
    """Write what the report shows of an image to ``folder``, in place of what was there.

    ``result`` is the record of its nuclei. Raises StorageError.
    """
    positivity = _positivity(result)
    slide, uncertainty = segmented.image.slide, segmented.uncertainty
    px = max(1, math.ceil(max(slide.shape) / OVERVIEW_PX))  # working px per overview px
    overview = segmented.thumbnail(px)
    with atomic_write(folder) as new:
        new.mkdir()
        picture = _overview(overview, px, segmented)
        (new / "overview.jpg").write_bytes(to_jpeg(picture, _JPEG_QUALITY))
        figures = _measured(segmented, result)
        if uncertainty is not None and uncertainty.points.any():
            density = DensityMap.of(uncertainty, slide.mpp_level0)
            density_picture = density.picture(overview.shape[:2], px, slide.downsample)
            density_picture.save(new / "density.png", optimize=True)
            figures = msgspec.structs.replace(
                figures,
                highest_density=round(density.highest),
                fields_of_view=_write_fields_of_view(new, segmented, uncertainty, positivity),
            )
            if positivity is not None and segmented.count:
                nuclei = ClassifiedNuclei.of(segmented, positivity)
                shape = (overview.shape[0], overview.shape[1])
                share = nuclei.picture(uncertainty, shape=shape, px=px, downsample=slide.downsample)
                share.save(new / "positivity.png", optimize=True)
                figures = msgspec.structs.replace(figures, positivity=nuclei.record())
        write_record(new / FIGURES, figures, compact=True)


def _positivity(result: ResultRecord) -> Positivity | None:
    """What made classes of positive and negative nuclei, if anything did."""
    if result.positivity is None:
        return None
    return Positivity(record=result.positivity, base_class=result.config["result"]["class_name"])


def _fullest(segmented: SegmentedImage) -> Box:
    """The field of view with the most nuclei; without nuclei, the one in the middle."""
    slide, uncertainty = segmented.image.slide, segmented.uncertainty
    rows, cols = slide.shape
    height = min(PREVIEW_BINS[0] * bin_px(slide.mpp), rows)
    width = min(PREVIEW_BINS[1] * bin_px(slide.mpp), cols)
    row, col = (rows - height) // 2, (cols - width) // 2
    if uncertainty is not None and uncertainty.nuclei.any():
        found = fields_of_view(uncertainty, PREVIEW_BINS)
        box = _box(found, int(np.argmax(found.nuclei)), slide)
        row, col = min(box.row0, rows - height), min(box.col0, cols - width)  # not cut by an edge
    return Box(row, col, row + height, col + width)


class _RunningHistogram:
    """Counts of values from 0 to ``highest``, taken a part at a time.

    A record has ``bars`` counts: the first one has what is below 0, too, the last one what is
    larger. The median is that of ``fine`` times as many, from below 0 up to four times as high:
    nuclei of some slides are larger than the bars show.
    """

    def __init__(self, *, highest: float, bars: int, fine: int) -> None:
        self._highest, self._bars, self._fine = highest, bars, fine
        self._counts = np.zeros((_BELOW + _BEYOND) * bars * fine, dtype=np.int64)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count values (N,)."""
        ends = -_BELOW * self._highest, _BEYOND * self._highest
        self._counts += np.histogram(np.clip(values, *ends), len(self._counts), ends)[0]

    def record(self) -> Histogram:
        """The histogram and the median of all values that were counted."""
        bars = self._counts.reshape(-1, self._fine).sum(axis=1)
        first = _BELOW * self._bars
        inner = bars[first + 1 : first + self._bars - 1]
        shown = [bars[: first + 1].sum(), *inner, bars[first + self._bars - 1 :].sum()]
        return Histogram(
            median=self._median(), highest=self._highest, counts=[int(count) for count in shown]
        )

    def _median(self) -> float | None:
        """The middle value, or the mean of the middle two; None without values."""
        count = int(self._counts.sum())
        if not count:
            return None
        return (self._value((count + 1) // 2) + self._value(count // 2 + 1)) / 2

    def _value(self, rank: int) -> float:
        """The ``rank``-th smallest value, the first is 1: interpolated in its fine bin."""
        up_to = np.cumsum(self._counts)
        i = int(np.searchsorted(up_to, rank))
        part = (rank - 0.5 - (up_to[i] - self._counts[i])) / self._counts[i]
        return float(
            (i + part) * self._highest / (self._bars * self._fine) - _BELOW * self._highest
        )


def _measured(segmented: SegmentedImage, result: ResultRecord) -> FiguresRecord:
    """Size of the image; histograms of area and hematoxylin, mean probability of nuclei."""
    slide = segmented.image.slide
    stain_name = hematoxylin_of(segmented.image.stains)
    names = ("Area µm^2", f"{stain_name}: Mean", PROBABILITY)
    area = _RunningHistogram(highest=300, bars=30, fine=400)
    stain = _RunningHistogram(highest=1.5, bars=30, fine=50)
    count, probability = 0, 0.0
    for measured in segmented.measurements(names):
        of_area, of_stain, of_probability = (measured[name] for name in names)
        area.add(of_area)
        stain.add(of_stain)
        count += len(of_probability)
        probability += float(of_probability.sum(dtype=np.float64))
    (width, height), (x, y) = slide.size, slide.mpp_level0
    return FiguresRecord(
        run=result.run,
        nuclei=segmented.count,
        drawn_from=result.drawn_from,
        mm=(width * x / 1000, height * y / 1000),
        area=area.record(),
        stain=StainHistogram(name=stain_name, **msgspec.structs.asdict(stain.record())),
        probability=probability / count if count else None,
    )


def _overview(
    thumbnail: NDArray[np.uint8], px: int, segmented: SegmentedImage
) -> NDArray[np.uint8]:
    """The thumbnail (h, w, 3) with tissue outlined, analysis regions, and failed tiles in red.

    ``px`` are its working px per pixel.
    """
    image = segmented.image
    marked = thumbnail.copy()
    marked[_tissue_outline(image, thumbnail.shape[:2], px)] = _TISSUE_COLOUR
    picture = draw_failed_tiles(marked, segmented.failed_tiles, image.slide.size)
    pen = ImageDraw.Draw(picture)
    for ring in _rings(image.region):
        pen.line([(x, y) for x, y in (ring / px).tolist()], fill=_REGION_COLOUR, width=2)
    return np.asarray(picture)


def _tissue_outline(image: PreparedImage, shape: tuple[int, int], px: int) -> NDArray[np.bool_]:
    """(h, w) the rim of the tissue, two pixels wide, on a thumbnail of ``px`` working px each."""
    rows, cols = (np.arange(n) * px // image.tissue_px for n in shape)
    tissue = image.tissue[np.ix_(rows, cols)]  # (h, w)
    return np.asarray(tissue & ~ndimage.binary_erosion(tissue, iterations=2))


def _rings(region: shapely.Geometry | None) -> Iterator[NDArray[np.float64]]:
    """The rings (N, 2) of a region, in its frame."""
    for part in [] if region is None else shapely.get_parts(region):
        for ring in shapely.get_rings(part):
            yield shapely.get_coordinates(ring)


def _write_fields_of_view(
    folder: Path,
    segmented: SegmentedImage,
    uncertainty: UncertaintyGrid,
    positivity: Positivity | None,
) -> tuple[FieldOfViewRecord, ...]:
    """Write a picture of each field of view that is shown; returns their records."""
    found = fields_of_view(uncertainty, _FOV_BINS)
    records = []
    for number, (kind, i) in enumerate(_chosen(found, segmented.image.slide)):
        picture = f"field-{number}.jpg"
        box = _box(found, i, segmented.image.slide)
        (folder / picture).write_bytes(to_jpeg(segmented.pixels(box), _JPEG_QUALITY))
        record = _field_of_view(segmented, found, i, kind=kind, picture=picture)
        if positivity is not None:
            codes = codes_in(segmented, box, positivity)
            record = msgspec.structs.replace(record, classes=codes)
        records.append(record)
    return tuple(records)


def _chosen(found: FieldsOfView, slide: Slide) -> list[tuple[str, int]]:
    """The densest field of view, the most uncertain one and typical ones: kind and index.

    Each is chosen once, and only those with enough tissue are, if there are any.
    """
    full = np.flatnonzero(found.tissue >= min(_FULL, found.tissue.max()))
    density = found.nuclei[full] / [_tissue_mm2(found, i, slide) for i in full.tolist()]
    ranks = {
        "densest": -density,
        "most uncertain": -found.entropy[full],
        "typical": np.abs(density - np.median(density)),
    }
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
    """The record of field of view ``i``."""
    slide = segmented.image.slide
    box = _box(found, i, slide)
    height, width = box.shape
    contours, cells = segmented.contours_in(box), segmented.contours_in(box, of_cells=True)
    frame = shapely.box(0, 0, width, height)
    x, y = slide.downsample
    return FieldOfViewRecord(
        kind=kind,
        picture=picture,
        x=round(box.col0 * x),
        y=round(box.row0 * y),
        width=width,
        height=height,
        um=round(width * slide.grid_mpp[0]),
        nuclei=int(shapely.contains(frame, shapely.centroid(contours)).sum()),
        density=round(found.nuclei[i] / _tissue_mm2(found, i, slide)),
        entropy=round(float(found.entropy[i]), 3),
        contours=[_units(contour) for contour in shapely.simplify(contours, _SIMPLIFY_PX)],
        cells=[_units(cell) for cell in shapely.simplify(cells, _SIMPLIFY_PX)],
    )


def _tissue_mm2(found: FieldsOfView, i: int, slide: Slide) -> float:
    """The tissue of the part of field of view ``i`` that is in the image, its ``_box``."""
    box = _box(found, i, slide)
    points = found.tissue[i] * BIN_STEPS**2 * math.prod(_FOV_BINS)
    fraction = points / len(sampling_points(box, slide.mpp)[0])
    return float(fraction * math.prod(box.shape) * slide.mpp**2 / 1e6)


def _units(contour: shapely.Geometry) -> list[int]:
    """The corners of a contour, [x, y, x, y, ...], in ``CONTOUR_UNITS``."""
    xy = shapely.get_coordinates(contour)[:-1] * CONTOUR_UNITS
    return [int(value) for value in np.rint(xy).ravel()]


def _box(found: FieldsOfView, i: int, slide: Slide) -> Box:
    """The part of field of view ``i`` that is in the image, on the working grid."""
    (x, y), (rows, cols) = slide.downsample, slide.shape
    row, col = round(found.y[i] / y), round(found.x[i] / x)
    height, width = round(found.size[1] / y), round(found.size[0] / x)
    return Box(row, col, min(row + height, rows), min(col + width, cols))
