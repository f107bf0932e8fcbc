"""The share of positive nuclei over an image, and histograms of its nuclei by class."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from patchcl_qupath.answers.positivity import Positivity
from patchcl_qupath.datatypes import Box, UncertaintyGrid, centroids_of, name_of_nucleus
from patchcl_qupath.report.density_map import bin_picture
from patchcl_qupath.segmentation.segmented_image import SegmentedImage
from patchcl_qupath.storage.records import ClassHistograms, PositivityFigures

POSITIVITY_COLOURS = (
    (69, 117, 180),
    (171, 217, 233),
    (255, 245, 170),
    (253, 174, 97),
    (215, 48, 39),
)
_BARS = 30
_HIGHEST_AREA = 300  # µm², as in the histogram of all nuclei
_PERCENTILE = 99.5  # of values: higher ones are in the last bar
_BEYOND = 1.5  # the last threshold lies at most so near to the end of the axis


@dataclass(frozen=True, kw_only=True)
class ClassifiedNuclei:
    """What is known of the nuclei (N,) of an image: their classes, by number, values, and places.

    ``centroids`` (N, 2) are (x, y) at level 0.
    """

    positivity: Positivity
    codes: NDArray[np.intp]
    values: NDArray[np.float32]
    areas: NDArray[np.float32]
    centroids: NDArray[np.float64]

    @classmethod
    def of(cls, segmented: SegmentedImage, positivity: Positivity) -> ClassifiedNuclei:
        """The nuclei of an image, which has some."""
        found: list[tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]] = []
        for nuclei in segmented.nuclei():
            if len(nuclei):
                areas = nuclei.measurements[name_of_nucleus("Area µm^2", nuclei.measurements)]
                values = nuclei.measurements[positivity.record.measurement]
                found.append((values, areas, centroids_of(nuclei.polygons)))
        values, areas, centroids = map(np.concatenate, zip(*found, strict=True))
        return cls(
            positivity=positivity,
            codes=positivity.codes(values),
            values=values,
            areas=areas,
            centroids=centroids,
        )

    def record(self) -> PositivityFigures:
        """The histograms by class."""
        record = self.positivity.record
        known = self.values[np.isfinite(self.values)]
        usual = float(np.percentile(known, _PERCENTILE)) if len(known) else 0.0
        highest = _round_up(max(usual, _BEYOND * max(record.thresholds), 1e-3))
        return PositivityFigures(
            measurement=record.measurement,
            thresholds=record.thresholds,
            highest=highest,
            highest_area=_HIGHEST_AREA,
            classes=tuple(
                ClassHistograms(
                    name=name,
                    nuclei=int((self.codes == code).sum()),
                    area=_counts(self.areas[self.codes == code], _HIGHEST_AREA),
                    measurement=_counts(self.values[self.codes == code], highest),
                )
                for code, name in enumerate(self.positivity.class_names)
            ),
        )

    def picture(
        self,
        uncertainty: UncertaintyGrid,
        *,
        shape: tuple[int, int],
        px: int,
        downsample: tuple[float, float],
    ) -> Image.Image:
        """The map as a picture of ``shape`` (rows, cols), transparent where there is no nucleus.

        A pixel is ``px`` working px wide; ``downsample`` is (x, y) level-0 px per working px.
        """
        size = uncertainty.bin_size
        rows, cols = uncertainty.rows.max() + 1, uncertainty.cols.max() + 1
        return bin_picture(
            positive_share(self.codes > 0, self.centroids, size, (int(rows), int(cols))),
            bin_size=size,
            colours=POSITIVITY_COLOURS,
            shape=shape,
            px=px,
            downsample=downsample,
        )


def codes_in(segmented: SegmentedImage, box: Box, positivity: Positivity) -> list[int]:
    """The number of the class of each nucleus whose contour ``contours_in`` has of a box."""
    found: list[int] = []
    for nuclei in segmented.nuclei_in(box):
        if len(nuclei):
            values = nuclei.measurements[positivity.record.measurement]
            found += positivity.codes(values).tolist()
    return found


def positive_share(
    positive: NDArray[np.bool_],
    centroids: NDArray[np.float64],
    bin_size: tuple[float, float],
    shape: tuple[int, int],
) -> NDArray[np.float64]:
    """The share of positive nuclei in each bin and the eight around it; NaN where a bin has none.

    ``positive`` (N,) belong to nuclei with these centroids (N, 2) at level 0; ``shape`` is (rows,
    cols) of bins of ``bin_size`` (width, height).
    """
    cols, rows = np.floor_divide(centroids, bin_size).astype(int).T
    rows, cols = np.clip(rows, 0, shape[0] - 1), np.clip(cols, 0, shape[1] - 1)
    total, of_them = np.zeros(shape), np.zeros(shape)
    np.add.at(total, (rows, cols), 1)
    np.add.at(of_them, (rows, cols), positive)
    around = [
        ndimage.convolve(counts, np.ones((3, 3)), mode="constant") for counts in (of_them, total)
    ]
    return np.where(total > 0, around[0] / np.maximum(around[1], 1), np.nan)


def _counts(values: NDArray[np.float32], highest: float) -> list[int]:
    """How many values (N,) are in each bar; what is no number is in none."""
    known = np.clip(values[np.isfinite(values)], 0, highest)
    return [int(count) for count in np.histogram(known, _BARS, (0, highest))[0]]


def _round_up(value: float) -> float:
    """The next round number."""
    power = 10.0 ** math.floor(math.log10(value))
    return float(
        next(round(m * power, 10) for m in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if m * power >= value)
    )
