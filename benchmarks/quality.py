"""How well nuclei are found and parted without labels, on images whose nuclei were outlined.

    python benchmarks/quality.py [--images N] [--seeds N] [--json]

Trains on the images of the MoNuSeg training set (40x, area-averaged to 0.5 um/px) without their
labels, segments them, and compares with the labels at full resolution. The baseline is what one
writes in ten lines: Otsu's threshold on hematoxylin, then a watershed of the distance.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2hed
from skimage.feature import peak_local_max
from skimage.filters import threshold_otsu
from skimage.segmentation import watershed

from patchcl_qupath import patchcl
from patchcl_qupath.config import Config
from patchcl_qupath.evaluate import aji, dice, f1, pq
from patchcl_qupath.model import confidence
from patchcl_qupath.segment import instances
from patchcl_qupath.stains import StainScale

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "monuseg_train"
SCORES = {"dice": dice, "aji": aji, "pq": pq, "f1": f1}

Rgb = NDArray[np.uint8]
Labels = NDArray[np.int32]
Method = Callable[[Rgb], Labels]


def main() -> None:
    """Print the table, and with --json the same as one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, help="use the first so many only")
    parser.add_argument("--seeds", type=int, default=1, help="train so often, with other seeds")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    options = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"needs the images and labels of the MoNuSeg training set in {DATA}")
    paths = sorted((DATA / "images").glob("*.png"))[: options.images]
    images = [halved(np.asarray(Image.open(path).convert("RGB"))) for path in paths]
    truths = [np.asarray(Image.open(DATA / "labels" / path.name), np.int32) for path in paths]

    print(f"{len(images)} images, means{'':18}" + "".join(f"{name:>8}" for name in SCORES))
    methods: dict[str, Callable[[], Method]] = {"Otsu + distance watershed": lambda: otsu}
    for seed in range(options.seeds):
        methods[f"PatchCL, seed {seed}"] = partial(trained, images, seed)
    rows = {}
    for name, made in methods.items():
        rows[name] = scored(map(made(), images), truths)
        show(name, rows[name])
    if options.json:
        print(json.dumps({"images": len(images), **rows}))


def halved(rgb: Rgb) -> Rgb:
    """0.25 to 0.5 um/px: the mean of each 2 x 2 pixels."""
    height, width = rgb.shape[0] // 2, rgb.shape[1] // 2
    blocks = rgb[: 2 * height, : 2 * width].reshape(height, 2, width, 2, 3)
    return np.asarray(np.round(blocks.mean(axis=(1, 3))), np.uint8)


def otsu(rgb: Rgb) -> Labels:
    """The baseline; its nuclei have their centres at least 2.5 um apart, and 8 um2 each."""
    hematoxylin = ndimage.gaussian_filter(rgb2hed(rgb)[..., 0], 1)
    threshold = threshold_otsu(hematoxylin)  # type: ignore[no-untyped-call]
    mask = ndimage.binary_opening(hematoxylin > threshold)
    pieces, _ = ndimage.label(mask)
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 1)
    peaks = peak_local_max(depth, min_distance=5, labels=pieces)  # type: ignore[no-untyped-call]
    markers = np.zeros(mask.shape, dtype=np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels: Labels = watershed(-depth, markers, mask=mask)  # type: ignore[no-untyped-call]
    return np.where(np.bincount(labels.ravel())[labels] >= 32, labels, 0)


def trained(images: list[Rgb], seed: int) -> Method:
    """Train on the images themselves, as a project does; returns what segments one."""
    config = replace(Config(), patchcl=replace(Config().patchcl, seed=seed))
    scales = [StainScale.fit([image]) for image in images]
    model = patchcl.train(images, scales, config, progress)

    def segmented(rgb: Rgb) -> Labels:
        nuclei = confidence(model, rgb, StainScale.fit([rgb]))
        return instances(nuclei, model.mpp, config.segment, model.threshold)

    return segmented


def scored(predictions: Iterable[Labels], truths: list[Labels]) -> dict[str, float]:
    """Mean of each score over the images, at the resolution of the labels."""
    each: dict[str, list[float]] = {name: [] for name in SCORES}
    for prediction, truth in zip(predictions, truths, strict=True):
        full = prediction.repeat(2, axis=0).repeat(2, axis=1)
        for name, score in SCORES.items():
            each[name].append(score(full, truth))
    return {name: float(np.mean(values)) for name, values in each.items()}


def show(name: str, scores: dict[str, float]) -> None:
    """Print a row of the table."""
    print(f"{name:<34}" + "".join(f"{value:>8.3f}" for value in scores.values()), flush=True)


def progress(step: int, last: int) -> None:
    """Count the steps where a person watches."""
    if sys.stderr.isatty():
        print(f"\rlearning: step {step} of {last} ", end="\r", file=sys.stderr)


if __name__ == "__main__":
    main()
