"""PatchCL as its authors evaluate it: by semantic Dice, with start, epoch and channel by labels.

N. Boserup, R. Selvan, Efficient Self-Supervision using Patch-based Contrastive Learning for
Histopathology Image Segmentation, NLDL 2023 (arXiv 2208.10779), and its published code.

There, several networks are trained. The one to use, its epoch and its channel have the largest
Dice of confidences above 0.5 on labelled images. Masks are then opened and closed with discs of 3
and of 1 px. ``CHOICES`` lead from the choice without labels to that one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage.morphology import disk

from bench.cache import code
from bench.measure import Bench, progress, run_key, training_key
from bench.pseudo import level0
from bench.sets import ImageSet, project_of
from patchcl_qupath.config import Config
from patchcl_qupath.datatypes import Box
from patchcl_qupath.evaluation.ground_truth import ground_truth_files
from patchcl_qupath.models.model import Model, confidence
from patchcl_qupath.models.network import ConfidenceNetwork, device, folded
from patchcl_qupath.progress import Stage, counter
from patchcl_qupath.slides.prepare import prepare, training_crops
from patchcl_qupath.slides.stains import StainNormaliser
from patchcl_qupath.training import patchcl
from patchcl_qupath.training.patchcl import Snapshot

LABEL_FREE, PUBLISHED = "label-free", "by labels"
# What is chosen by labels; all else is chosen without.
CHOICES = (
    LABEL_FREE,
    "threshold by labels",
    "channel by labels",
    "stopping by labels",
    "start by labels",
    PUBLISHED,  # start, stopping and channel, by labels
    "by labels, threshold too",
)
_THRESHOLDS = tuple(np.linspace(0.1, 0.9, 17).round(2).tolist())
_DISCS = tuple(disk(radius) for radius in (3, 1))  # type: ignore[no-untyped-call]

Mask = NDArray[np.bool_]


class _Image(NamedTuple):
    """Pixels (H, W, 3) at the working resolution, their normaliser, and the true mask (H0, W0) at
    level 0, whose px lie at ``px`` in an array (H, W)."""

    rgb: NDArray[np.uint8]
    normaliser: StainNormaliser
    true: Mask
    px: tuple[NDArray[np.intp], ...]

    def dice(self, mask: Mask) -> float:
        """The Dice of a mask (H, W)."""
        found = mask[self.px]
        total = int(found.sum() + self.true.sum())
        return 2 * int((found & self.true).sum()) / total if total else 1.0


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A snapshot, and the mean Dice (C, 2) over images of its channels, as they are and inverted:
    of confidences above 0.5, and of these masks opened and closed."""

    snapshot: Snapshot
    plain: NDArray[np.float64]
    opened: NDArray[np.float64]

    @property
    def channel(self) -> tuple[int, int]:
        """The channel that is chosen without labels, and whether it is inverted."""
        scores = np.nan_to_num(self.snapshot.scores)
        channel = int(np.argmax(np.abs(scores)))
        return channel, int(scores[channel] < 0)


def choices(bench: Bench, images: ImageSet, config: Config) -> dict[str, float]:
    """The semantic Dice of a training with the settings of the paper, by CHOICES."""
    key = {
        "choices": training_key(images, config),
        "labels": images.labels_digest,
        **code("slides.prepare.prepare", script=Path(__file__)),
    }

    def measure() -> dict[str, float]:
        snapshots: list[Snapshot] = []
        with project_of(images) as project:
            entries = project.images()
            crops = training_crops(entries, config, counter(progress, Stage.READING_CROPS))
        training = counter(progress, Stage.TRAINING_PATCHCL)
        model = patchcl.train(crops, config, training, snapshots.append)
        bench.cache.model(training_key(images, config), config, lambda: model)
        read = _read(images, config)
        return by_choice([judge(snapshot, read, config) for snapshot in snapshots], read, config)

    found: dict[str, float] = bench.cache.value(key, measure)
    return found


def semantic_dice(bench: Bench, images: ImageSet, model: Model) -> float:
    """The mean Dice of a model's masks, opened and closed, without separation of nuclei."""
    key = {
        "semantic": run_key(model, images),
        "labels": images.labels_digest,
        **code("slides.prepare.prepare", "models.model.confidence", script=Path(__file__)),
    }

    def measure() -> float:
        dice = []
        for image in _read(images, model.config):
            found = confidence(model, image.rgb, image.normaliser).nucleus > model.threshold
            dice.append(image.dice(opened_and_closed(found)))
        return float(np.mean(dice))

    return float(bench.cache.value(key, measure))


def by_choice(
    judged: Sequence[Judged], images: Sequence[_Image], config: Config
) -> dict[str, float]:
    """The Dice by CHOICES of the snapshots of a training."""
    best = max(judged, key=lambda each: each.snapshot.score)
    stopped = [each for each in judged if each.snapshot.start == best.snapshot.start]
    starts = {each.snapshot.start for each in judged}
    of_starts = [
        max(
            (each for each in judged if each.snapshot.start == start),
            key=lambda each: each.snapshot.score,
        )
        for start in starts
    ]
    published = max(judged, key=lambda each: each.plain[:, 0].max())
    channel = int(published.plain[:, 0].argmax())
    dice = (
        best.opened[best.channel],
        _at_best_threshold(best.snapshot.network, best.channel, images, config),
        best.opened.max(),
        max(each.opened[each.channel] for each in stopped),
        max(each.opened[each.channel] for each in of_starts),
        published.opened[channel, 0],
        _at_best_threshold(published.snapshot.network, (channel, 0), images, config),
    )
    return dict(zip(CHOICES, map(float, dice), strict=True))


def judge(snapshot: Snapshot, images: Sequence[_Image], config: Config) -> Judged:
    """The Dice of each channel of a snapshot."""

    def both(image: _Image, channel: NDArray[np.float32], change: Callable[[Mask], Mask]) -> object:
        return [image.dice(change(mask)) for mask in (channel > 0.5, channel < 0.5)]

    plain, opened = [], []
    for image in images:
        maps = _maps(snapshot.network, image, config)
        plain.append([both(image, channel, lambda mask: mask) for channel in maps])
        opened.append([both(image, channel, opened_and_closed) for channel in maps])
    return Judged(
        snapshot=snapshot,
        plain=np.mean(np.array(plain, np.float64), axis=0),
        opened=np.mean(np.array(opened, np.float64), axis=0),
    )


def opened_and_closed(mask: Mask) -> Mask:
    """A mask (H, W) after the post-processing of the authors."""
    for disc in _DISCS:
        mask = ndimage.binary_opening(mask, disc)
        mask = ndimage.binary_closing(mask, disc)
    return mask


def _at_best_threshold(
    network: ConfidenceNetwork, channel: tuple[int, int], images: Sequence[_Image], config: Config
) -> float:
    """The largest Dice over thresholds of a channel, which may be inverted."""
    index, inverted = channel
    dice = []
    for image in images:
        values = _maps(network, image, config)[index]
        values = 1 - values if inverted else values
        dice.append([image.dice(opened_and_closed(values > each)) for each in _THRESHOLDS])
    return float(np.mean(dice, axis=0).max())


def _maps(network: ConfidenceNetwork, image: _Image, config: Config) -> NDArray[np.float32]:
    """The confidences (C, H, W) of an image."""
    pixels = image.normaliser.network_input(image.rgb, config.patchcl.input)
    x = torch.from_numpy(pixels).to(device()).permute(2, 0, 1)[None]  # (1, 3, H, W)
    with torch.inference_mode():
        maps: NDArray[np.float32] = folded(network).to(device())(x)[0].cpu().numpy()
    return maps


def _read(images: ImageSet, config: Config) -> list[_Image]:
    """The images of a set that have tissue, with their true masks."""
    assert images.ground_truth is not None
    found = []
    with project_of(images) as project:
        entries = project.images()
        files = ground_truth_files(images.ground_truth, entries)
        for entry in entries:
            image = prepare(entry, config)
            if image.normaliser is None:
                continue
            (height, width), (x, y) = image.slide.shape, image.slide.downsample
            true = np.asarray(Image.open(files[entry.id][0])) > 0
            rows, cols = level0(0, height, y)[1], level0(0, width, x)[1]
            found.append(
                _Image(
                    rgb=image.slide.read(Box(0, 0, height, width)),
                    normaliser=image.normaliser,
                    true=true[: len(rows), : len(cols)],
                    px=np.ix_(rows[: len(true)], cols[: true.shape[1]]),
                )
            )
    return found
