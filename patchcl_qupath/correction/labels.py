"""Corrected ROIs as labels to train with: as samples, and in place of pseudo-labels."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.config import CORRECTED, TO_CORRECT, Config, SegmentConfig
from patchcl_qupath.datatypes import (
    Box,
    Corrections,
    ImageEntry,
    Polygons,
    level0_to_grid,
    place_text,
)
from patchcl_qupath.errors import ConfigError, ImageError, TrainingError, count_of
from patchcl_qupath.evaluation.metrics import MIN_IOU
from patchcl_qupath.models.model import Model
from patchcl_qupath.progress import ShowCount
from patchcl_qupath.project import Project
from patchcl_qupath.project.outlines import MAX_LENGTH_UM, MIN_ROI_UM
from patchcl_qupath.segmentation.tiling import bounds
from patchcl_qupath.slides.prepare import PreparedImage, TrainingCrops, on_grid, prepare
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.slides.tissue import inside_region
from patchcl_qupath.storage.geojson import class_name
from patchcl_qupath.storage.records import Record
from patchcl_qupath.training.pseudo_labels import PseudoLabels
from patchcl_qupath.training.selftrain import LabelledCrop, pseudo_labelled
from patchcl_qupath.training.supervision import TrainingSample, targets

LabelledImage = tuple[PreparedImage, Corrections]

MAX_ROI_MM2 = 10.0  # the box around a larger ROI does not fit into the memory of a small machine
_LEFT_OUT = {  # what each kind of object is called, one of it and several
    "ignored": ("ignored object", "ignored objects"),
    "regions": ("region or vessel", "regions or vessels"),
    "points": ("point", "points"),
    "lines": ("line", "lines"),
    "tiles": ("tile", "tiles"),
    "cells_without_nucleus": ("cell without a nucleus", "cells without a nucleus"),
    "other_programs": ("detection of another program", "detections of other programs"),
    "specks": ("speck", "specks"),
}


class CorrectedImage(Record, frozen=True, kw_only=True, rename={"rois": "fields"}):
    """What was read from the corrected ROIs of an image.

    ``left_out`` are the numbers of objects in them that are no nuclei, by kind. ``notes`` are
    remarks for people, as on ROIs without a nucleus, which are taken as background.
    """

    id: str
    image: str
    rois: int
    nuclei: int
    left_out: dict[str, int]
    notes: tuple[str, ...] = ()

    @property
    def in_words(self) -> str:
        """A line for people."""
        left_out = [
            f"{count:,} {_LEFT_OUT[kind][count > 1]}"
            for kind, count in self.left_out.items()
            if count
        ]
        others = f"; no nuclei, left out: {', '.join(left_out)}" if left_out else ""
        nuclei = count_of(self.nuclei, "nucleus", "nuclei")
        return f"{count_of(self.rois, 'ROI')} with {nuclei}{others}"


def read_corrected(
    project: Project,
    entries: Sequence[ImageEntry],
    config: Config,
    labels_from: str,
    show_count: ShowCount,
) -> list[LabelledImage]:
    """The images with annotations of class ``labels_from`` in a project, and the nuclei in these.

    Raises ImageError for labels that cannot be trained on, with the problems of all images;
    TrainingError if there are none; ConfigError for the class of ROIs that are still to be
    corrected, whose nuclei are predictions.
    """
    if class_name(labels_from) == TO_CORRECT:
        raise ConfigError(
            f"ROIs of class {TO_CORRECT} are still to be corrected: set the class of those that "
            f"are corrected to {CORRECTED}, save, and refine with --labels-from '{CORRECTED}'"
        )
    labelled: list[LabelledImage] = []
    problems = []
    for done, entry in enumerate(entries):
        show_count(done, len(entries))
        try:
            corrections = project.corrections(entry, labels_from)
        except ImageError as error:  # a person hears of all images at once
            problems.append(str(error))
            continue
        if corrections.rois:
            image = prepare(entry, config)
            labelled.append((image, _with_notes_on_size(corrections, image.slide, config.segment)))
    show_count(len(entries), len(entries))
    if problems:
        raise ImageError("\n".join(problems))
    if not labelled:
        raise TrainingError(
            f"no image has an annotation of class {labels_from}: have some suggested by "
            "`patchcl-qp suggest`, or draw some in QuPath, correct every nucleus in them, set "
            "that class, and save (without a QuPath here, run export_labels.groovy there)"
        )
    if not any(labels.nuclei for _, labels in labelled):
        raise TrainingError(
            f"no ROI of class {labels_from} has a nucleus: correct one with nuclei, too"
        )
    check_agreement(labelled)
    return labelled


def _with_notes_on_size(labels: Corrections, slide: Slide, settings: SegmentConfig) -> Corrections:
    """Labels with remarks on nuclei whose size is such that runs leave them out."""
    um2 = shapely.area(np.array(labels.nuclei, dtype=object)) * math.prod(slide.mpp_level0)
    unlike = {
        f"less than min_area_um2, {settings.min_area_um2:g} µm²": um2 < settings.min_area_um2,
        f"more than max_area_um2, {settings.max_area_um2:g} µm²": um2 > settings.max_area_um2,
    }
    notes = [
        f"{np.count_nonzero(these):,} of {len(um2):,} nuclei have {words}: a run leaves out nuclei "
        "of such a size, unless [segment] of its settings says otherwise"
        for words, these in unlike.items()
        if these.any()
    ]
    return replace(labels, notes=(*labels.notes, *notes))


def corrected_images(
    entries: Sequence[ImageEntry], found: Mapping[str, Corrections]
) -> list[CorrectedImage]:
    """What was ``found`` in the corrected ROIs of images, by id, in numbers and words."""
    return [
        CorrectedImage(
            id=entry.id,
            image=entry.name,
            rois=len(found[entry.id].rois),
            nuclei=len(found[entry.id].nuclei),
            left_out=found[entry.id].left_out,
            notes=found[entry.id].notes,
        )
        for entry in entries
        if entry.id in found
    ]


def check_agreement(images: Sequence[LabelledImage]) -> None:
    """Raise ImageError if two images of a project show one slide, and their labels differ.

    Where ROIs of both overlap, both must have the same nuclei: otherwise the model would be trained
    on the same pixels as nucleus and as background.
    """
    for (one, one_labels), (other, other_labels) in itertools.combinations(images, 2):
        if one.slide.source != other.slide.source:
            continue
        place = _disagreement(_in_file(one_labels, one), _in_file(other_labels, other))
        if place is not None:
            x, y = place.centroid.coords[0] - np.array(one.slide.origin)
            raise ImageError(
                f"{one.slide.name} (id {one.id}) and {other.slide.name} (id {other.id}) show the "
                f"same slide, and ROIs of both have different nuclei {place_text(x, y)} "
                "of the first: correct them, delete the ROI in one of the two, or leave one "
                "out by naming the others with --image ID"
            )


def _in_file(labels: Corrections, image: PreparedImage) -> Corrections:
    """Labels in pixels of the file: two images of one slide may be cropped differently."""
    origin = np.array(image.slide.origin)
    rois, nuclei, ignored = (
        tuple(shapely.transform(area, lambda xy: xy + origin) for area in areas)
        for areas in (labels.rois, labels.nuclei, labels.ignored)
    )
    return Corrections(rois=rois, nuclei=nuclei, ignored=ignored)


def _disagreement(one: Corrections, other: Corrections) -> shapely.Geometry | None:
    """A nucleus, more than half of it in ROIs of both, that only one of the two has; or None."""
    shared = shapely.union_all(one.rois) & shapely.union_all(other.rois)
    shared -= shapely.union_all(one.ignored + other.ignored)
    nuclei = [np.array(labels.nuclei, dtype=object) for labels in (one, other)]
    inside = [shapely.intersection(areas, shared) for areas in nuclei]
    row, col = shapely.STRtree(inside[1]).query(inside[0], predicate="intersects")
    both = shapely.area(shapely.intersection(inside[0][row], inside[1][col]))
    either = shapely.area(inside[0][row]) + shapely.area(inside[1][col]) - both
    same = both > MIN_IOU * either
    for areas, parts, matched in zip(nuclei, inside, (row[same], col[same]), strict=True):
        # Less than half of a nucleus may reach into a ROI by chance.
        unmatched = shapely.area(parts) > shapely.area(areas) / 2
        unmatched[matched] = False
        if unmatched.any():
            return parts[np.argmax(unmatched)]
    return None


def training_samples(image: PreparedImage, labels: Corrections) -> list[TrainingSample]:
    """One training sample for each ROI of an image, at the model's pixel size.

    Pixels of a ROI outside nuclei are background, except in ignored areas; these, and pixels
    outside the ROI, are unlabelled. Raises ImageError for a ROI that is too small, too large or
    outside the image, and for an image with larger pixels than the model's: it would have to be
    interpolated, and would train the model on blur.
    """
    slide = image.slide
    if min(slide.downsample) < 1:
        raise ImageError(
            f"{slide.name} has {max(slide.mpp_level0):.3g} µm/px, too coarse for labelled ROIs: "
            f"the model reads {slide.mpp:.3g} µm/px. Correct the pixel size in QuPath if it is "
            "wrong; else delete the ROIs, or leave the image out by naming the others with --image"
        )
    if image.normaliser is None:
        raise ImageError(f"{slide.name} shows no tissue, but has labelled ROIs: delete them")
    nuclei, ignored = _on_grid(labels.nuclei, slide), _on_grid(labels.ignored, slide)
    samples = []
    for drawn in labels.rois:
        roi = on_grid(drawn, slide)
        box = _bounding_box(roi, slide, place_text(*shapely.centroid(drawn).coords[0]))
        inside = _pixels(roi, box)
        known = inside.copy()
        for area in ignored:
            known &= ~_pixels(area, box)
        # A nucleus that the ROI cuts has its core where the whole one has it.
        reach = math.ceil(MAX_LENGTH_UM / slide.mpp)
        wide = Box(box.row0 - reach, box.col0 - reach, box.row1 + reach, box.col1 + reach)
        painted = _painted(nuclei[shapely.intersects(nuclei, roi)], wide)
        background = np.zeros(wide.shape, dtype=bool)
        background[box.within(wide)] = known
        target = targets(painted, background & (painted == 0))[box.within(wide)]
        target[~inside] = 0
        samples.append(TrainingSample(image.normaliser.apply(slide.read(box)), target))
    return samples


def with_copies(
    images: Sequence[LabelledImage], entries: Sequence[ImageEntry]
) -> list[LabelledImage]:
    """Images with all that was drawn on the same pixels, for crops of them.

    QuPath duplicates an image, for another person to correct. Crops of either have the corrected
    ROIs of both, or a nucleus that was deleted in one would be taught by the other.
    """
    by_id = {image.id: (image, labels) for image, labels in images}
    drawn: dict[tuple[object, ...], list[LabelledImage]] = {}
    for entry in entries:
        if entry.id in by_id:
            drawn.setdefault(entry.pixels, []).append(by_id[entry.id])
    found = []
    for entry in entries:
        own_first = sorted(drawn.get(entry.pixels, ()), key=lambda each: each[0].id != entry.id)
        if own_first:
            labels = functools.reduce(_joined, (labels for _, labels in own_first))
            found.append((replace(own_first[0][0], id=entry.id), labels))
    return found


def _joined(one: Corrections, other: Corrections) -> Corrections:
    """What two people drew; where ROIs of both meet, what the first did.

    They agree there (``check_agreement``), but draw no outline twice the same.
    """
    known = shapely.union_all(one.rois)
    rois = [part for roi in other.rois if not (part := roi - known).is_empty]
    new = shapely.union_all(rois)
    drawn = shapely.STRtree(one.nuclei)

    def is_drawn(nucleus: shapely.Geometry) -> bool:
        """Whether the first drew it as well, as one that reaches out of a ROI."""
        near = drawn.geometries[drawn.query(nucleus, predicate="intersects")]
        return bool(np.any(shapely.area(nucleus & near) > nucleus.area / 2))

    nuclei = [each for each in other.nuclei if each.intersects(new) and not is_drawn(each)]
    return Corrections(
        rois=(*one.rois, *rois),
        nuclei=(*one.nuclei, *nuclei),
        ignored=(*one.ignored, *(each for each in other.ignored if each.intersects(new))),
    )


def corrected_crops(
    labelled: Sequence[LabelledCrop], crops: TrainingCrops, images: Sequence[LabelledImage]
) -> list[LabelledCrop]:
    """Pseudo-labelled crops, in corrected ROIs with what a person drew in place of pseudo-labels.

    A pseudo-labelled nucleus that reaches into a ROI is left out: the rest of it is unlabelled. One
    that a person drew, and that reaches out of the ROI, is labelled as a whole.
    """
    drawn = {image.id: _Drawn.of(image, labels) for image, labels in images}
    corrected = []
    for crop, id_, box in zip(labelled, crops.slides, crops.boxes, strict=True):
        if id_ in drawn:
            crop = crop._replace(labels=_corrected(crop.labels, drawn[id_], box))
        corrected.append(crop)
    return corrected


def pseudo_labelled_samples(
    model: Model, crops: TrainingCrops, images: Sequence[LabelledImage], report: ShowCount
) -> list[TrainingSample]:
    """The crops as samples with a model's pseudo-labels; in corrected ROIs with those of people."""
    found = pseudo_labelled(crops, model, report)
    return [crop.sample for crop in corrected_crops(found, crops, images)]


def drawn_samples(crops: TrainingCrops, images: Sequence[LabelledImage]) -> list[TrainingSample]:
    """The crops as samples that are labelled in corrected ROIs, and nowhere else."""
    found = []
    for image, normaliser in zip(crops.images, crops.normalisers, strict=True):
        shape = image.shape[:2]
        nothing = PseudoLabels(np.zeros(shape, np.int32), np.zeros(shape, np.bool_))
        found.append(LabelledCrop(normaliser.apply(image), nothing))
    return [crop.sample for crop in corrected_crops(found, crops, images)]


class _Drawn(NamedTuple):
    """What a person drew on an image, on the working grid; nuclei (N,) are those in the ROIs."""

    rois: shapely.Geometry
    nuclei: Polygons
    ignored: Polygons

    @classmethod
    def of(cls, image: PreparedImage, labels: Corrections) -> _Drawn:
        """That of an image, at level 0."""
        rois = on_grid(shapely.union_all(labels.rois), image.slide)
        nuclei = _on_grid(labels.nuclei, image.slide)
        inside = nuclei[shapely.intersects(nuclei, rois)]
        return cls(rois, inside, _on_grid(labels.ignored, image.slide))


def _corrected(pseudo: PseudoLabels, person: _Drawn, box: Box) -> PseudoLabels:
    """Pseudo-labels of a box of the working grid with what a person drew in ROIs there."""
    here = shapely.box(box.col0, box.row0, box.col1, box.row1)
    drawn = _painted(person.nuclei[shapely.intersects(person.nuclei, here)], box)
    unknown = np.zeros(box.shape, np.bool_)
    for area in person.ignored:
        unknown |= _pixels(area, box)
    inside = _pixels(person.rois, box) | (drawn > 0)
    reaching = np.unique(pseudo.nuclei[inside])
    nuclei = np.where(np.isin(pseudo.nuclei, reaching), 0, pseudo.nuclei)
    nuclei = np.where(drawn > 0, drawn + nuclei.max(initial=0), nuclei)
    background = np.where(inside, (drawn == 0) & ~unknown, pseudo.background)
    return pseudo._replace(nuclei=nuclei, background=background)


def _on_grid(areas: Sequence[shapely.Geometry], slide: Slide) -> Polygons:
    """Areas (N,) from level 0 to the working grid."""
    return np.array([level0_to_grid(area, slide.downsample) for area in areas], dtype=object)


def _bounding_box(roi: shapely.Geometry, slide: Slide, place: str) -> Box:
    """The box of a ROI on the working grid. Raises ImageError if it is narrow, huge or outside."""
    x0, y0, x1, y1 = roi.bounds if roi.area else (0, 0, 0, 0)
    if min(x1 - x0, y1 - y0) * slide.mpp < MIN_ROI_UM:
        raise ImageError(
            f"{slide.name}: the labelled ROI {place} is less than {MIN_ROI_UM:g} µm wide, or "
            "outside the image: draw it larger, 250 µm say; if it is a nucleus, give it the class "
            "of nuclei"
        )
    mm2 = (x1 - x0) * (y1 - y0) * slide.mpp**2 / 1e6
    if mm2 > MAX_ROI_MM2:
        raise ImageError(
            f"{slide.name}: the labelled ROI {place} needs a box of {mm2:,.0f} mm², more than "
            f"{MAX_ROI_MM2:g}: draw smaller ones, 250 µm wide say"
        )
    return Box(math.floor(y0), math.floor(x0), math.ceil(y1), math.ceil(x1))


def _painted(nuclei: Polygons, box: Box) -> NDArray[np.int32]:
    """Nuclei on the working grid as a label image of a box; of two that overlap, the first wins."""
    painted = np.zeros(box.shape, dtype=np.int32)
    for number, nucleus in enumerate(nuclei, start=1):
        part, inside = _part(nucleus, box)
        here = painted[part]
        here[inside & (here == 0)] = number
    return painted


def _pixels(area: shapely.Geometry, box: Box) -> NDArray[np.bool_]:
    """Which pixels of a box of the working grid have their centre in an area."""
    inside = np.zeros(box.shape, dtype=bool)
    part, pixels = _part(area, box)
    inside[part] = pixels
    return inside


def _part(area: shapely.Geometry, box: Box) -> tuple[tuple[slice, slice], NDArray[np.bool_]]:
    """The smallest part of a box with all its part of an area, and which pixels of it that has."""
    part = bounds(area, box) or Box(box.row0, box.col0, box.row0, box.col0)
    rows, cols = np.mgrid[part.row0 : part.row1, part.col0 : part.col1]
    return part.within(box), inside_region(area, part, rows, cols)
