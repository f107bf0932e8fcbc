"""Fields that a person corrected, as lessons: pixels, and what is a nucleus in them."""

from __future__ import annotations

import math

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Box, Corrections, level0_to_grid
from patchcl_qupath.errors import ImageError
from patchcl_qupath.prepare import PreparedImage
from patchcl_qupath.teaching import Lesson, targets

MIN_FIELD_UM = 16.0  # a narrower field shows no nucleus whole


def lessons(image: PreparedImage, labels: Corrections) -> list[Lesson]:
    """One lesson for each field of an image, at the model's pixel size.

    In a field, what is not in a nucleus is background; outside of it nothing is known. Raises
    ImageError for a field that is too small, or that lies outside the image.
    """
    slide = image.slide
    if image.scale is None:
        raise ImageError(f"{slide.name} shows no tissue, but has fields of labels: delete them")
    nuclei = np.array([level0_to_grid(n, slide.downsample) for n in labels.nuclei], dtype=object)
    made = []
    for field in labels.fields:
        field = level0_to_grid(field, slide.downsample) & shapely.box(0, 0, *slide.shape[::-1])
        x0, y0, x1, y1 = field.bounds if field.area else (0, 0, 0, 0)
        if min(x1 - x0, y1 - y0) * slide.mpp < MIN_FIELD_UM:
            raise ImageError(
                f"{slide.name}: a field of labels is less than {MIN_FIELD_UM:g} um wide, or "
                "outside the image: draw it larger, 250 um say"
            )
        box = Box(math.floor(y0), math.floor(x0), math.ceil(y1), math.ceil(x1))
        known = _pixels(field, box)
        painted = np.zeros(box.shape, dtype=np.int32)
        for number, nucleus in enumerate(nuclei[shapely.intersects(nuclei, field)], start=1):
            painted[_pixels(nucleus, box) & (painted == 0)] = number
        painted[~known] = 0
        rgb = slide.read(box)
        made.append((image.scale.apply(rgb), targets(painted, known & (painted == 0))))
    return made


def _pixels(area: shapely.Geometry, box: Box) -> NDArray[np.bool_]:
    """Which pixels of a box of the working grid have their middle in an area."""
    inside = np.zeros(box.shape, dtype=bool)
    x0, y0, x1, y1 = area.bounds
    rows = np.arange(max(box.row0, math.floor(y0)), min(box.row1, math.ceil(y1)))
    cols = np.arange(max(box.col0, math.floor(x0)), min(box.col1, math.ceil(x1)))
    if len(rows) and len(cols):
        y, x = np.meshgrid(rows + 0.5, cols + 0.5, indexing="ij")
        where = np.ix_(rows - box.row0, cols - box.col0)
        inside[where] = shapely.contains_xy(area, x, y)
    return inside
