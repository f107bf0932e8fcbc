"""Fields that a person corrected, as lessons: pixels, and what is a nucleus in them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.config import CORRECTED, TO_CORRECT, Config
from patchcl_qupath.datatypes import Box, Corrections, ImageEntry, level0_to_grid
from patchcl_qupath.errors import ConfigError, ImageError, TrainingError
from patchcl_qupath.progress import ShowCount
from patchcl_qupath.project import Project
from patchcl_qupath.segmentation.tiling import bounds
from patchcl_qupath.slides.prepare import PreparedImage, on_grid, prepare
from patchcl_qupath.slides.tissue import inside_region
from patchcl_qupath.training.supervision import TrainingSample, targets

MIN_ROI_UM = 16.0  # a narrower field shows no nucleus whole
SAME_IOU = 0.5  # above it, two outlines are of one nucleus

LabelledImage = tuple[PreparedImage, Corrections]


def read_corrected_samples(
    project: Project,
    entries: Sequence[ImageEntry],
    config: Config,
    labels_from: str,
    show_count: ShowCount,
) -> list[TrainingSample]:
    """One lesson for each annotation of class ``labels_from`` in a project.

    Raises ImageError for labels that cannot be learnt from, TrainingError where there are none,
    ConfigError for the class of fields that nobody says are done: they would teach a model its own
    mistakes.
    """
    if labels_from == TO_CORRECT:
        raise ConfigError(
            f"fields of class {TO_CORRECT} are still to be corrected: set the class of those that "
            f"are done to {CORRECTED}, save, and refine with --labels-from '{CORRECTED}'"
        )
    labelled = []
    for done, entry in enumerate(entries):
        show_count(done, len(entries))
        corrections = project.corrections(entry, labels_from)
        if corrections.rois:
            labelled.append((prepare(entry, config), corrections))
    show_count(len(entries), len(entries))
    if not labelled:
        raise TrainingError(
            f"no image has an annotation of class {labels_from}: have some suggested by "
            "`patchcl-qp suggest`, or draw some in QuPath, put every nucleus in them right, set "
            "that class, and save (without a QuPath here, run groovy/export_labels.groovy there)"
        )
    check_agreement(labelled)
    return [sample for image, labels in labelled for sample in training_samples(image, labels)]


def check_agreement(images: Sequence[LabelledImage]) -> None:
    """Raise ImageError where two images of a project show one slide, and their fields differ.

    Where fields of both lie on each other, both must have the same nuclei: one would be taught as
    a nucleus and as background.
    """
    for (one, one_says), (other, other_says) in itertools.combinations(images, 2):
        if one.slide.path.resolve() != other.slide.path.resolve():
            continue
        place = _disagreement(_in_file(one_says, one), _in_file(other_says, other))
        if place is not None:
            x, y = place.centroid.coords[0] - np.array(one.slide.origin)
            raise ImageError(
                f"{one.slide.name} (id {one.id}) and {other.slide.name} (id {other.id}) show the "
                f"same slide, and fields of both have different nuclei at x {x:.0f}, y {y:.0f} px "
                "of the first: put them right, delete the field in one of the two, or leave one "
                "out by naming the others with --image ID"
            )


def _in_file(labels: Corrections, image: PreparedImage) -> Corrections:
    """Labels in pixels of the file: of one slide, two images may be cropped differently."""
    origin = np.array(image.slide.origin)
    rois, nuclei = (
        tuple(shapely.transform(area, lambda xy: xy + origin) for area in areas)
        for areas in (labels.rois, labels.nuclei)
    )
    return Corrections(rois, nuclei)


def _disagreement(one: Corrections, other: Corrections) -> shapely.Geometry | None:
    """A nucleus, most of it in fields of both, that only one of the two has; None if none is."""
    shared = shapely.union_all(one.rois) & shapely.union_all(other.rois)
    nuclei = [np.array(labels.nuclei, dtype=object) for labels in (one, other)]
    parts = [shapely.intersection(areas, shared) for areas in nuclei]
    row, col = shapely.STRtree(parts[1]).query(parts[0], predicate="intersects")
    both = shapely.area(shapely.intersection(parts[0][row], parts[1][col]))
    either = shapely.area(parts[0][row]) + shapely.area(parts[1][col]) - both
    same = both > SAME_IOU * either
    for areas, inside, known in zip(nuclei, parts, (row[same], col[same]), strict=True):
        alone = shapely.area(inside) > shapely.area(areas) / 2  # less shows at the rim by chance
        alone[known] = False
        if alone.any():
            return inside[np.argmax(alone)]
    return None


def training_samples(image: PreparedImage, labels: Corrections) -> list[TrainingSample]:
    """One lesson for each field of an image, at the model's pixel size.

    In a field, what is not in a nucleus is background; outside of it nothing is known. Raises
    ImageError for a field that is too small, or that lies outside the image, and for an image with
    larger pixels than the model's, which would be learnt from as if it were blurred.
    """
    slide = image.slide
    if min(slide.downsample) < 1:
        raise ImageError(
            f"{slide.name} has {max(slide.mpp_level0):.3g} um/px, too coarse for fields of labels: "
            f"the model reads {slide.mpp:.3g} um/px. Put the pixel size right in QuPath if it is "
            "wrong; else delete the fields, or leave the image out by naming the others with "
            "--image"
        )
    if image.normaliser is None:
        raise ImageError(f"{slide.name} shows no tissue, but has fields of labels: delete them")
    nuclei = np.array([level0_to_grid(n, slide.downsample) for n in labels.nuclei], dtype=object)
    made = []
    for roi in labels.rois:
        roi = on_grid(roi, slide)
        x0, y0, x1, y1 = roi.bounds if roi.area else (0, 0, 0, 0)
        if min(x1 - x0, y1 - y0) * slide.mpp < MIN_ROI_UM:
            raise ImageError(
                f"{slide.name}: a field of labels is less than {MIN_ROI_UM:g} um wide, or "
                "outside the image: draw it larger, 250 um say"
            )
        box = Box(math.floor(y0), math.floor(x0), math.ceil(y1), math.ceil(x1))
        known = _pixels(roi, box)
        painted = np.zeros(box.shape, dtype=np.int32)
        for number, nucleus in enumerate(nuclei[shapely.intersects(nuclei, roi)], start=1):
            painted[_pixels(nucleus, box) & (painted == 0)] = number
        painted[~known] = 0
        rgb = slide.read(box)
        made.append((image.normaliser.apply(rgb), targets(painted, known & (painted == 0))))
    return made


def _pixels(area: shapely.Geometry, box: Box) -> NDArray[np.bool_]:
    """Which pixels of a box of the working grid have their middle in an area."""
    inside = np.zeros(box.shape, dtype=bool)
    part = bounds(area, box)
    if part is not None:
        rows, cols = np.mgrid[part.row0 : part.row1, part.col0 : part.col1]
        inside[part.within(box)] = inside_region(area, part, rows, cols)
    return inside
