"""CDCL with a few labelled images or ROIs, beside the label-free model and labels alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import shapely

from bench.cache import code
from bench.measure import Bench, Measures, progress, run_key, segment, without
from bench.sets import ImageSet, project_of
from patchcl_qupath.config import Config
from patchcl_qupath.correction.labels import (
    LabelledImage,
    drawn_samples,
    pseudo_labelled_samples,
    training_samples,
)
from patchcl_qupath.datatypes import Corrections, ImageEntry, Polygons
from patchcl_qupath.evaluation.ground_truth import ground_truth_files, read_ground_truth
from patchcl_qupath.evaluation.metrics import Kind, Overlaps
from patchcl_qupath.evaluation.score import mean, per_100_true, score
from patchcl_qupath.models.model import Model
from patchcl_qupath.progress import Stage, counter
from patchcl_qupath.project import Project
from patchcl_qupath.slides.prepare import PreparedImage, prepare, training_crops
from patchcl_qupath.storage.geojson import made_valid
from patchcl_qupath.storage.parquet import read_nuclei
from patchcl_qupath.training import cdcl, selftrain
from patchcl_qupath.training.calibration import calibrated
from patchcl_qupath.training.supervision import TrainingSample

KINDS = ("label-free", "labels alone", "CDCL")
# Numbers, or fractions, of labelled whole images; or numbers of labelled ROIs of 250 px.
LABELLED: dict[str, tuple[int | Fraction, int | None]] = {
    **{f"{k}-images": (k, None) for k in (1, 2, 4)},
    **{f"{k}-fields": (k, 250) for k in (2, 4, 8)},
    **{f"1/{k}-images": (Fraction(1, k), None) for k in (32, 16, 8)},
}


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """The labelled images of a draw, each with its labelled ROI, and their samples."""

    images: list[LabelledImage]
    samples: list[TrainingSample]

    @property
    def corrections(self) -> dict[str, Corrections]:
        """The labelled ROIs, by the ids of their images."""
        return {image.id: labels for image, labels in self.images}


def few_labels(
    bench: Bench, images: ImageSet, row: str, config: Config, draw: int
) -> dict[str, Measures]:
    """Measures by KINDS, on the images without labels; none if that are too few.

    CDCL refines the label-free model; "labels alone" trains the same network on the labelled pixels
    for as many steps. ``roi_recall`` is the fraction of the nuclei in the labelled ROIs that are
    right.
    """
    count, side = LABELLED[row]
    if isinstance(count, Fraction):
        count = max(1, round(count * len(images.images)))
    if count >= len(images.images):
        return {}
    start = bench.trained(images, config)
    key = {
        "few labels": [count, side, draw],
        "labels": images.labels_digest,
        "start": run_key(start, images),
        "config": without(config, ("segment", "result", "engine")),
        **code(
            "pipeline.train",
            "slides.prepare.training_crops",
            "correction.labels.drawn_samples",
            "correction.labels.pseudo_labelled_samples",
            "correction.labels.training_samples",
            "training.cdcl.refine",
            "training.calibration.calibrated",
            "training.selftrain.train_on",
            script=Path(__file__),
        ),
    }

    def measure() -> dict[str, Measures]:
        with project_of(images) as project:
            drawn = _draw(project, images, config, count=count, side=side, draw=draw)
            models = _models(project, start, drawn, draw)
            return {
                kind: _measured(project, images, model, drawn) for kind, model in models.items()
            }

    measures: dict[str, Measures] = bench.cache.value(key, measure)
    return measures


def _draw(
    project: Project,
    images: ImageSet,
    config: Config,
    *,
    count: int,
    side: int | None,
    draw: int,
) -> Drawn:
    """Draw images at random, and in each a ROI."""
    rng = np.random.default_rng(draw)
    entries = project.images()
    drawn: list[LabelledImage] = []
    for i in rng.choice(len(entries), size=count, replace=False):
        image = prepare(entries[i], config)
        nuclei = true_nuclei(entries[i], images)
        roi = _roi(image, nuclei, side, rng)
        drawn.append((image, Corrections(rois=(roi,), nuclei=tuple(nuclei))))
    samples = [sample for each in drawn for sample in training_samples(*each)]
    return Drawn(images=drawn, samples=samples)


def _roi(
    image: PreparedImage, nuclei: Polygons, side: int | None, rng: np.random.Generator
) -> shapely.Geometry:
    """A whole image, or a random square of ``side`` px, at most the image's, that has a nucleus."""
    width, height = image.slide.size
    if side is None or not len(nuclei):
        return shapely.box(0, 0, width, height)
    side = min(side, width, height)
    while True:
        x, y = rng.integers(width - side + 1), rng.integers(height - side + 1)
        roi = shapely.box(x, y, x + side, y + side)
        if shapely.intersects(nuclei, roi).any():
            return roi


def _models(project: Project, start: Model, drawn: Drawn, draw: int) -> dict[str, Model]:
    """The models that are compared, by KINDS."""
    config = start.config
    steps = config.cdcl.rounds * config.cdcl.steps + config.cdcl.distillation_steps
    alone = replace(config.selftrain, steps=steps)
    training = counter(progress, Stage.TRAINING_NETWORK)
    trained = selftrain.train_on(drawn.samples, alone, draw, training)
    crops = training_crops(project.images(), config, counter(progress, Stage.READING_CROPS))
    choosing = counter(progress, Stage.CHOOSING_PSEUDO_LABELS)
    label = partial(pseudo_labelled_samples, crops=crops, images=drawn.images, report=choosing)
    refining = counter(progress, Stage.REFINING)
    of_person = partial(drawn_samples, crops, drawn.images)
    refined = cdcl.refine(start, drawn.samples, label, of_person, refining, draw)
    refined = calibrated(refined, crops, counter(progress, Stage.CALIBRATING))
    # Its views agree little, so that a calibration would leave out half of its nuclei.
    labelled_alone = replace(start, network=trained.network, calibration=None)
    return dict(zip(KINDS, (start, labelled_alone, refined), strict=True))


def _measured(project: Project, images: ImageSet, model: Model, drawn: Drawn) -> Measures:
    """Run a model on all images; score those without labels, and the nuclei in labelled ROIs."""
    assert images.ground_truth is not None
    segment(project, model, project.images())
    held_out = [entry for entry in project.images() if entry.id not in drawn.corrections]
    scored, _ = score(project, held_out, images.ground_truth)
    right, true = 0, 0
    for id_, corrections in drawn.corrections.items():
        found = made_valid(read_nuclei(project.layout.nuclei(id_)).polygons)
        nuclei = np.array(corrections.nuclei)
        drawn_there = nuclei[shapely.covers(corrections.rois[0], shapely.centroid(nuclei))]
        right += Overlaps.of_polygons(found, drawn_there).kinds[Kind.RIGHT]
        true += len(drawn_there)
    recall = {"roi_recall": right / true} if true else {}
    return {**mean(scored), **per_100_true(scored), **recall}


def true_nuclei(entry: ImageEntry, images: ImageSet) -> Polygons:
    """The ground truth of an image, at level 0."""
    assert images.ground_truth is not None
    files = ground_truth_files(images.ground_truth, [entry])
    return read_ground_truth(files[entry.id], entry).polygons
