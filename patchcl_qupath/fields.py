"""Fields that a person corrected, as lessons: pixels, and what is a nucleus in them."""

from __future__ import annotations

import math

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Box, Corrections, level0_to_grid
from patchcl_qupath.errors import ImageError
from patchcl_qupath.prepare import PreparedImage, on_grid
from patchcl_qupath.teaching import Lesson, targets
from patchcl_qupath.tiles import bounds, inside_region

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
        field = on_grid(field, slide)
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
    part = bounds(area, box)
    if part is not None:
        rows, cols = np.mgrid[part.row0 : part.row1, part.col0 : part.col1]
        inside[part.within(box)] = inside_region(area, part, rows, cols)
    return inside
