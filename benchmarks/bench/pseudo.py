"""What pseudo-labels are worth: those that self-training learns from, held against true labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bench.cache import code
from bench.measure import (
    Bench,
    Measures,
    progress,
    without,
)
from bench.sets import ImageSet, project_of
from patchcl_qupath import pipeline
from patchcl_qupath.config import Config, Recipe
from patchcl_qupath.datatypes import Labels
from patchcl_qupath.evaluation.ground_truth import ground_truth_files
from patchcl_qupath.evaluation.metrics import MIN_IOU, Overlaps
from patchcl_qupath.models.model import Model
from patchcl_qupath.progress import Stage, counter
from patchcl_qupath.project import Project
from patchcl_qupath.slides.prepare import TrainingCrops, prepare, training_crops
from patchcl_qupath.training import selftrain

# Names of the measures, and what they are.
MEASURES = {
    "nucleus": "pixels labelled nucleus that are",
    "background": "pixels labelled background that are",
    "unlabelled": "pixels left out of the loss",
    "iou_50": "instances with an IoU above 0.5",
    "iou_70": "instances with an IoU above 0.7",
    "on_nothing": "instances on nothing",
    "several": "instances that hold several nuclei",
    "covered": "true nucleus pixels that they cover",
    "aji": "AJI as a segmentation of the crops",
    "pq": "PQ as a segmentation of the crops",
}


class PseudoLabelled(NamedTuple):
    """Pseudo-labelled instances 1..N of a crop (H, W), and which of its pixels are labelled."""

    nuclei: Labels
    valid: NDArray[np.bool_]


class TrueLabels(NamedTuple):
    """True labels (H0, W0) in a crop, at level 0, and the index of each px in an array (H, W).

    They are compared at level 0: to take every second pixel shifts nuclei by half a pixel, which
    costs a tenth of the instances with an IoU above 0.7.
    """

    labels: Labels
    px: tuple[NDArray[np.intp], ...]


def pseudo_label_measures(bench: Bench, images: ImageSet, config: Config) -> Measures:
    """The MEASURES of the pseudo-labels in the crops that a training on a set learns from."""
    key = {
        "pseudo": images.digest,
        "labels": images.labels_digest,
        "config": without(config, ("segment", "result", "cdcl", "engine")),
        **code("pipeline.train", script=Path(__file__)),
    }

    def measure() -> Measures:
        with project_of(images) as project:
            entries = project.images()
            with bench.patchcl_kept():
                alone = replace(config, recipe=Recipe.PATCHCL)
                teacher = replace(pipeline.train(entries, alone, progress), config=config)
            crops = training_crops(entries, config, counter(progress, Stage.READING_CROPS))
            found = pseudo_labelled(crops, teacher)
            return _measures(zip(found, _true_crops(project, images, crops, config), strict=True))

    measures: Measures = bench.cache.value(key, measure)
    return measures


def pseudo_labelled(crops: TrainingCrops, teacher: Model) -> list[PseudoLabelled]:
    """The pseudo-labels of crops, as the first network of self-training is taught them."""
    choosing = counter(progress, Stage.CHOOSING_PSEUDO_LABELS)
    labelled = selftrain.pseudo_labelled(crops, teacher, choosing)
    return [PseudoLabelled(crop.labels.nuclei, crop.sample.valid > 0) for crop in labelled]


def _true_crops(
    project: Project, images: ImageSet, crops: TrainingCrops, config: Config
) -> Iterator[TrueLabels]:
    """The true labels of each crop, in their order."""
    assert images.ground_truth is not None
    entries = {entry.id: entry for entry in project.images()}
    files = ground_truth_files(images.ground_truth, [*entries.values()])
    labels = {slide: np.asarray(Image.open(files[slide][0])) for slide in {*crops.slides}}
    downsample = {
        slide: prepare(entries[slide], config).slide.downsample for slide in {*crops.slides}
    }
    for slide, box in zip(crops.slides, crops.boxes, strict=True):
        x, y = downsample[slide]
        top, rows = level0(box.row0, box.row1, y)
        left, cols = level0(box.col0, box.col1, x)
        inside = labels[slide][top : top + len(rows), left : left + len(cols)]
        yield TrueLabels(inside, np.ix_(rows, cols))


def level0(first: int, last: int, downsample: float) -> tuple[int, NDArray[np.intp]]:
    """The first level-0 px of working px ``first`` to ``last``; of each, its working px in them.

    A level-0 px belongs to the working px that its centre lies in.
    """
    begin, end = (math.ceil(px * downsample - 0.5) for px in (first, last))
    return begin, np.floor((np.arange(begin, end) + 0.5) / downsample).astype(np.intp) - first


def _measures(pairs: Iterable[tuple[PseudoLabelled, TrueLabels]]) -> Measures:
    """The MEASURES of all crops together."""
    overlaps = []
    table = np.zeros((3, 2))  # pixels labelled nucleus, background or not; in no nucleus or in one
    for found, true in pairs:
        nuclei, valid = found.nuclei[true.px], found.valid[true.px]
        overlaps.append(Overlaps.of_labels(nuclei, true.labels))
        kind = np.where(nuclei > 0, 0, np.where(valid, 1, 2))
        table += np.bincount((2 * kind + (true.labels > 0)).ravel(), minlength=6).reshape(3, 2)
    iou = np.concatenate([each.predicted_iou for each in overlaps])
    held = np.concatenate([each.held for each in overlaps])
    nothing = np.concatenate([each.spurious for each in overlaps])
    return {
        "nucleus": _ratio(table[0, 1], table[0].sum()),
        "background": _ratio(table[1, 0], table[1].sum()),
        "unlabelled": _ratio(table[2].sum(), table.sum()),
        "iou_50": _mean(iou > MIN_IOU),
        "iou_70": _mean(iou > 0.7),
        "on_nothing": _mean(nothing),
        "several": _mean(held > 1),
        "covered": _ratio(table[0, 1], table[:, 1].sum()),
        "aji": float(np.mean([each.aji for each in overlaps])),
        "pq": float(np.mean([each.pq for each in overlaps])),
    }


def _mean(values: NDArray[np.bool_]) -> float:
    return float(values.mean()) if len(values) else 0.0


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
