"""How well nuclei are found and parted, on images whose nuclei were outlined.

    python benchmarks/quality.py [--data DIR] [--rows NAME ...] [--images N] [--seeds N] [--json]

DIR has images/NAME.png and labels/NAME.png (instance labels); by default it is the MoNuSeg training
set. All images are one project, at 0.25 um/px; each row trains on it as `patchcl-qp run` does, and
its nuclei are scored as `patchcl-qp score` does. Labels judge and never train, but for the few
fields that the rows of CDCL name. The baseline is what one writes in ten lines: Otsu's threshold on
hematoxylin, then a watershed of the distance.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.segmentation import watershed

from patchcl_qupath import cdcl, cli, pipeline, runs, selftrain
from patchcl_qupath.config import Config, PatchCLConfig
from patchcl_qupath.datatypes import Corrections, ImageEntry
from patchcl_qupath.evaluate import Overlaps
from patchcl_qupath.fields import lessons
from patchcl_qupath.model import Model
from patchcl_qupath.nuclei import footprints
from patchcl_qupath.prepare import prepare, training_crops
from patchcl_qupath.project import NewImage, Project, init_project, open_project
from patchcl_qupath.score import SCORES, mean, score

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "monuseg_train"
MPP = 0.25
KINDS = ("label-free", "labels alone", "CDCL")
assert cli, "imported before torch is: it says how torch's threads wait"

Scores = dict[str, float]


def with_(**settings: Any) -> Callable[[Config], Config]:
    """The default with some settings of the self-training changed."""
    return lambda config: replace(config, selftrain=replace(config.selftrain, **settings))


def paper(config: Config) -> Config:
    """PatchCL with the settings of the paper."""
    settings = PatchCLConfig.paper(seed=config.patchcl.seed)
    return replace(config, recipe="paper", patchcl=settings)


TRAINED: dict[str, Callable[[Config], Config]] = {
    "paper": paper,
    "patchcl": lambda config: replace(config, recipe="patchcl"),
    "selftrain": lambda config: config,
}
# Whole images, or fields of 250 px, that are labelled.
LABELLED = {
    **{f"{k}-images": (k, None) for k in (1, 2, 4)},
    **{f"{k}-fields": (k, 250) for k in (2, 4, 8)},
}
ABLATED = {
    "no-gate": with_(min_confidence=0.0),
    "strict-gate": with_(min_confidence=0.8),
    "one-size": with_(varied_size=1.0),
    "fragments": with_(min_fragment=0.0),
}


def main() -> None:
    """Print the table, and with --json the same as one line."""
    rows = ["otsu", *TRAINED, *ABLATED, *LABELLED]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder of images and labels")
    parser.add_argument("--rows", nargs="+", choices=rows, default=["otsu", *TRAINED])
    parser.add_argument("--images", type=int, help="use the first so many only")
    parser.add_argument("--seeds", type=int, default=1, help="train so often, with other seeds")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    if not (options.data / "images").is_dir():
        sys.exit(f"needs images and their labels in {options.data}")
    paths = sorted((options.data / "images").glob("*.png"))[: options.images]

    print(f"{f'{len(paths)} images, means':<34}" + "".join(f"{name:>16}" for name in SCORES))
    table: dict[str, list[Scores]] = {}
    for row in options.rows:
        if row in LABELLED:
            table |= few_labels(row, paths, options.data / "labels", options.seeds)
            continue
        table[row] = []
        for seed in range(1 if row == "otsu" else options.seeds):
            if row == "otsu":
                table[row].append(baseline(paths, options.data / "labels"))
            else:
                config = Config(patchcl=PatchCLConfig(seed=seed))
                config = {**TRAINED, **ABLATED}[row](config)
                with a_project(paths) as project:
                    model = pipeline.train(project.images(), config, progress)
                    table[row].append(scored(project, model, options.data / "labels"))
            show(f"{row}, seed {seed}", [table[row][-1]])
        if options.seeds > 1 and row != "otsu":
            show(row, table[row])
    if options.json:
        print(json.dumps({"images": len(paths), **table}))


def few_labels(row: str, paths: Sequence[Path], truth: Path, draws: int) -> dict[str, list[Scores]]:
    """CDCL against the label-free model that it starts from, and against the labels alone.

    Scores are those of the images without labels.
    """
    count, side = LABELLED[row]
    table: dict[str, list[Scores]] = {f"{row}, {name}": [] for name in KINDS}
    with a_project(paths) as project:
        entries = project.images()
        start = start_model(tuple(paths))
        images, scales = training_crops(entries, start.config, progress)
        unlabelled = selftrain.make_lessons(images, scales, start, partial(progress, "lessons"))
        for draw in range(draws):
            rng = np.random.default_rng(draw)
            chosen = rng.choice(len(entries), size=min(count, len(entries) - 1), replace=False)
            labelled = []
            for i in chosen:
                image = prepare(entries[i], start.config)
                labelled += lessons(image, corrected(entries[i], truth, side, rng))
            alone = replace(start.config.selftrain, steps=start.config.cdcl.steps)
            network, _ = selftrain.teach(labelled, alone, draw, partial(progress, "labels alone"))
            models = {
                "label-free": start,
                "labels alone": replace(start, network=network),
                "CDCL": cdcl.refine(start, labelled, unlabelled, progress, draw),
            }
            held_out = [entry for i, entry in enumerate(entries) if i not in chosen]
            for name, model in models.items():
                table[f"{row}, {name}"].append(scored(project, model, truth, held_out))
                show(f"{row}, {name}, draw {draw}", table[f"{row}, {name}"][-1:])
    for name, scores in table.items():
        show(name, scores)
    return table


@functools.cache
def start_model(paths: tuple[Path, ...]) -> Model:
    """The label-free model of the default recipe."""
    with a_project(paths) as project:
        return pipeline.train(project.images(), Config(), progress)


def corrected(
    entry: ImageEntry, truth: Path, side: int | None, rng: np.random.Generator
) -> Corrections:
    """A whole image as a field, or a random square of ``side`` px that has a nucleus."""
    nuclei = footprints(np.asarray(Image.open(truth / entry.name), np.int32))
    width, height = Image.open(entry.path).size
    while side:
        x, y = rng.integers(width - side), rng.integers(height - side)
        field = shapely.box(x, y, x + side, y + side)
        if shapely.intersects(nuclei, field).any():
            return Corrections((field,), tuple(nuclei))
    return Corrections((shapely.box(0, 0, width, height),), tuple(nuclei))


@contextmanager
def a_project(paths: Sequence[Path]) -> Iterator[Project]:
    """A project of the images, for as long as it is needed."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = [Image.open(path).size for path in paths]
        images = [
            NewImage(path.resolve(), [size], (MPP, MPP))
            for path, size in zip(paths, sizes, strict=True)
        ]
        yield open_project(init_project(Path(folder), images), backend="files")


def scored(
    project: Project, model: Model, truth: Path, entries: Sequence[ImageEntry] | None = None
) -> Scores:
    """Run the model on some images, or all, and score what it leaves."""
    entries = entries or project.images()
    with runs.workers() as client:
        run = pipeline.Run(project, model, model.config, client, progress)
        for result in run.images(entries):
            assert result.problem is None, result.problem
    images, _ = score(project, entries, truth)
    return mean(images)


def baseline(paths: Sequence[Path], truth: Path) -> Scores:
    """The scores of Otsu's threshold, on images averaged to 0.5 um/px."""
    each = []
    for path in paths:
        found = otsu(halved(np.asarray(Image.open(path).convert("RGB"))))
        found = found.repeat(2, axis=0).repeat(2, axis=1)
        true = np.asarray(Image.open(truth / path.name), np.int32)
        overlaps = Overlaps.of_polygons(footprints(found), footprints(true))
        each.append({name: getattr(overlaps, name) for name in SCORES})
    return {name: float(np.mean([scores[name] for scores in each])) for name in SCORES}


def halved(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """0.25 to 0.5 um/px: the mean of each 2 x 2 pixels."""
    height, width = rgb.shape[0] // 2, rgb.shape[1] // 2
    blocks = rgb[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3)
    return np.asarray(np.round(blocks.mean(axis=(1, 3))), np.uint8)


def otsu(rgb: NDArray[np.uint8]) -> NDArray[np.int32]:
    """The baseline; its nuclei have their centres at least 2.5 um apart, and 8 um2 each."""
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
    """Print a row of the table: means, and the spread of several seeds."""
    cells = []
    for key in SCORES:
        values = [s[key] for s in scores]
        spread = f" ±{(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
        cells.append(f"{np.mean(values):.4f}{spread}")
    print(f"{name:<34}" + "".join(f"{cell:>16}" for cell in cells), flush=True)


def progress(stage: str, done: int, total: int) -> None:
    """Count where a person watches."""
    if sys.stderr.isatty():
        print(f"\r{stage}: {done} of {total} ", end="\r", file=sys.stderr)


if __name__ == "__main__":
    main()
