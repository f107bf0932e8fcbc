"""Scores of detection and separation of nuclei, on images with ground truth.

    python benchmarks/quality.py [--data DIR] [--mpp UM] [--rows NAME ...] [--images N] [--seeds N]
                                 [--json]

DIR has the folders images and labels; labels are ground truth for `patchcl-qp score` (instance
labels or GeoJSON, named as the images). The default is the MoNuSeg training set. All images are in
one project; each row trains a model on it as `patchcl-qp run` does, and its nuclei are scored as
`patchcl-qp score` does. Labels are only used for scores, except by the rows of CDCL, which train
with a few labelled ROIs. The baseline is Otsu's threshold on hematoxylin, then a watershed of the
distance transform.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does, before torch is imported

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.segmentation import watershed

from patchcl_qupath import pipeline
from patchcl_qupath.config import Config, PatchCLConfig, Recipe
from patchcl_qupath.correction.labels import training_samples
from patchcl_qupath.datatypes import Box, Corrections, ImageEntry, Polygons, grid_to_level0
from patchcl_qupath.evaluation.ground_truth import ground_truth_files, read_ground_truth
from patchcl_qupath.evaluation.metrics import Overlaps
from patchcl_qupath.evaluation.score import SCORES, ImageScore, mean, score
from patchcl_qupath.execution.workers import open_workers
from patchcl_qupath.models.model import Model
from patchcl_qupath.progress import Progress, Stage, counter
from patchcl_qupath.project import NewImage, Project, init_project, open_project
from patchcl_qupath.segmentation.contours import pixel_polygons
from patchcl_qupath.slides.prepare import PreparedImage, prepare, training_crops
from patchcl_qupath.training import cdcl, selftrain
from patchcl_qupath.training.supervision import TrainingSample

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "monuseg_train"
KINDS = ("label-free", "labels alone", "CDCL")

Scores = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class LabelFree:
    """A model trained without labels, its scores, and samples with its pseudo-labels."""

    model: Model
    scores: list[ImageScore]
    samples: list[TrainingSample]


def with_(**settings: Any) -> Callable[[Config], Config]:
    """The default with some settings of the self-training changed."""
    return lambda config: replace(config, selftrain=replace(config.selftrain, **settings))


def paper(config: Config) -> Config:
    """PatchCL with the settings of the paper."""
    settings = PatchCLConfig.paper(seed=config.patchcl.seed)
    return replace(config, recipe=Recipe.PAPER, patchcl=settings)


TRAINED: dict[str, Callable[[Config], Config]] = {
    "paper": paper,
    "patchcl": lambda config: replace(config, recipe=Recipe.PATCHCL),
    "selftrain": lambda config: config,
}
# Numbers of labelled whole images, or of labelled ROIs of 250 px.
LABELLED = {
    **{f"{k}-images": (k, None) for k in (1, 2, 4)},
    **{f"{k}-fields": (k, 250) for k in (2, 4, 8)},
}
ABLATED: dict[str, Callable[[Config], Config]] = {
    "no-gate": with_(min_confidence=0.0),
    "strict-gate": with_(min_confidence=0.8),
    "one-size": with_(scale_jitter=1.0),
    "fragments": with_(min_fragment=0.0),
    "contrast": lambda config: config,  # then CDCL with pseudo-labels in place of labels
}


def main() -> None:
    """Print the table, and with --json the same as one line."""
    rows = ["otsu", *TRAINED, *ABLATED, *LABELLED]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of images and labels")
    parser.add_argument("--mpp", type=float, default=0.25, help="µm per pixel of the images")
    parser.add_argument("--rows", nargs="+", choices=rows, default=["otsu", *TRAINED])
    parser.add_argument("--images", type=int, help="use only the first N")
    parser.add_argument("--seeds", type=int, default=1, help="number of trainings, by seed")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    ground_truth = options.data / "labels"
    if not ground_truth.is_dir():
        sys.exit(f"needs images and their labels in {options.data}")
    paths = sorted((options.data / "images").iterdir())[: options.images]

    print(f"{f'{len(paths)} images, means':<34}" + "".join(f"{name:>16}" for name in SCORES))
    table: dict[str, list[Scores]] = {}
    with temporary_project(paths, options.mpp) as project:
        start = functools.cache(partial(train_label_free, project, ground_truth))
        for row in options.rows:
            if row in LABELLED:
                table |= few_labels(
                    row=row,
                    project=project,
                    ground_truth=ground_truth,
                    draws=options.seeds,
                    start=start(),
                )
            elif row == "otsu":
                table[row] = [baseline(project, ground_truth)]
                show(row, table[row])
            else:
                table[row] = label_free(row, project, ground_truth, options.seeds)
    if options.json:
        print(json.dumps({"images": len(paths), **table}))


def label_free(row: str, project: Project, ground_truth: Path, seeds: int) -> list[Scores]:
    """The scores of models trained without labels, one for each seed."""
    table = []
    for seed in range(seeds):
        config = {**TRAINED, **ABLATED}[row](Config(patchcl=PatchCLConfig(seed=seed)))
        model = pipeline.train(project.images(), config, progress)
        if row == "contrast":
            samples = pseudo_labelled(project, model)
            model = cdcl.refine(model, samples, samples, counter(progress, Stage.REFINING), seed)
        table.append(mean(scored(project, model, ground_truth)))
        show(f"{row}, seed {seed}", table[-1:])
    if seeds > 1:
        show(row, table)
    return table


def few_labels(
    *, row: str, project: Project, ground_truth: Path, draws: int, start: LabelFree
) -> dict[str, list[Scores]]:
    """CDCL compared with the label-free model that it refines, and with training on labels alone.

    Labelled images, or ROIs in images, are drawn ``draws`` times. Scores are those of the images
    without labels.
    """
    count, side = LABELLED[row]
    table: dict[str, list[Scores]] = {f"{row}, {name}": [] for name in KINDS}
    entries = project.images()
    for draw in range(draws):
        rng = np.random.default_rng(draw)
        chosen = rng.choice(len(entries), size=min(count, len(entries) - 1), replace=False)
        labelled = []
        for i in chosen:
            image = prepare(entries[i], start.model.config)
            corrections = corrected(
                entry=entries[i], image=image, ground_truth=ground_truth, side=side, rng=rng
            )
            labelled += training_samples(image, corrections)
        config = start.model.config
        alone = replace(config.selftrain, steps=config.cdcl.steps)
        training = counter(progress, Stage.TRAINING_NETWORK)
        trained = selftrain.train_on(labelled, alone, draw, training)
        refining = counter(progress, Stage.REFINING)
        refined = cdcl.refine(start.model, labelled, start.samples, refining, draw)
        held_out = [entry for i, entry in enumerate(entries) if i not in chosen]
        ids = {entry.id for entry in held_out}
        images = {
            "label-free": [image for image in start.scores if image.id in ids],
            "labels alone": scored(
                project, replace(start.model, network=trained.network), ground_truth, held_out
            ),
            "CDCL": scored(project, refined, ground_truth, held_out),
        }
        for name in KINDS:
            table[f"{row}, {name}"].append(mean(images[name]))
            show(f"{row}, {name}, draw {draw}", table[f"{row}, {name}"][-1:])
    for name, scores in table.items():
        show(name, scores)
    return table


def train_label_free(project: Project, ground_truth: Path) -> LabelFree:
    """Train the model of the default recipe, and score it."""
    model = pipeline.train(project.images(), Config(), progress)
    return LabelFree(
        model=model,
        scores=scored(project, model, ground_truth),
        samples=pseudo_labelled(project, model),
    )


def pseudo_labelled(project: Project, model: Model) -> list[TrainingSample]:
    """Training samples with the model's pseudo-labels, from crops of the images."""
    count = counter(progress, Stage.READING_CROPS)
    crops = training_crops(project.images(), model.config, count)
    count = counter(progress, Stage.CHOOSING_PSEUDO_LABELS)
    return selftrain.pseudo_labelled_samples(crops, model, count)


def corrected(
    *,
    entry: ImageEntry,
    image: PreparedImage,
    ground_truth: Path,
    side: int | None,
    rng: np.random.Generator,
) -> Corrections:
    """A whole image as a ROI, or a random square of ``side`` px that has a nucleus."""
    nuclei = true_nuclei(entry, ground_truth)
    width, height = image.slide.size
    while side:
        x, y = rng.integers(width - side), rng.integers(height - side)
        roi = shapely.box(x, y, x + side, y + side)
        if shapely.intersects(nuclei, roi).any():
            return Corrections(rois=(roi,), nuclei=tuple(nuclei))
    return Corrections(rois=(shapely.box(0, 0, width, height),), nuclei=tuple(nuclei))


def true_nuclei(entry: ImageEntry, ground_truth: Path) -> Polygons:
    """The ground truth of an image, at level 0."""
    return read_ground_truth(ground_truth_files(ground_truth, [entry])[entry.id], entry).polygons


@contextmanager
def temporary_project(paths: Sequence[Path], mpp: float) -> Iterator[Project]:
    """A project of the images, deleted at the end of the block."""
    with tempfile.TemporaryDirectory() as folder:
        images = [NewImage(path.resolve(), [Image.open(path).size], (mpp, mpp)) for path in paths]
        yield open_project(init_project(Path(folder), images), backend="files")


def scored(
    project: Project, model: Model, ground_truth: Path, entries: Sequence[ImageEntry] | None = None
) -> list[ImageScore]:
    """Run the model on some images, or all, and score its nuclei."""
    entries = entries or project.images()
    with open_workers() as client:
        run = pipeline.Run(
            project=project,
            model=model,
            config=model.config,
            workers=client,
            progress=progress,
        )
        for result in run.images(entries):
            assert result.problem is None, result.problem
    images, _ = score(project, entries, ground_truth)
    return images


def baseline(project: Project, ground_truth: Path) -> Scores:
    """The scores of the baseline, at the working resolution of the networks."""
    images = []
    for entry in project.images():
        slide = prepare(entry, Config()).slide
        found = pixel_polygons(otsu(slide.read(Box(0, 0, *slide.shape))))
        found = grid_to_level0(found, slide.downsample)
        overlaps = Overlaps.of_polygons(found, true_nuclei(entry, ground_truth))
        scores = {name: getattr(overlaps, name) for name in SCORES}
        images.append(ImageScore(id=entry.id, image=entry.name, scores=scores))
    return mean(images)


def otsu(rgb: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The baseline's labels; nuclei have centres at least 2.5 µm apart, and at least 8 µm²."""
    hematoxylin = ndimage.gaussian_filter(rgb2hed(rgb)[..., 0], 1)
    threshold = threshold_otsu(hematoxylin)  # type: ignore[no-untyped-call]
    mask = ndimage.binary_opening(hematoxylin > threshold)
    pieces, _ = ndimage.label(mask)
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 1)
    peaks = peak_local_max(depth, min_distance=5, labels=pieces)  # type: ignore[no-untyped-call]
    markers = np.zeros(mask.shape, dtype=np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels: NDArray[np.int32] = watershed(-depth, markers, mask=mask)  # type: ignore[no-untyped-call]
    return np.where(np.bincount(labels.ravel())[labels] >= 32, labels, 0)


def show(name: str, scores: Sequence[Scores]) -> None:
    """Print a row of the table: means, and half the range of several seeds."""
    cells = []
    for key in SCORES:
        values = [s[key] for s in scores]
        spread = f" ±{(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.4f}{spread}")
    print(f"{name:<34}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


def progress(step: Progress) -> None:
    """Show progress on a terminal."""
    if sys.stderr.isatty():
        print(f"\r{step.label}: {step.done} of {step.total} ", end="\r", file=sys.stderr)


if __name__ == "__main__":
    main()
