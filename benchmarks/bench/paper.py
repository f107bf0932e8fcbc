"""PatchCL as its authors evaluate it: by semantic Dice, with start, epoch and channel by labels.

N. Boserup, R. Selvan, Efficient Self-Supervision using Patch-based Contrastive Learning for
Histopathology Image Segmentation, NLDL 2023 (arXiv 2208.10779), and its published code.

There, several networks are trained. The one to use, its epoch and its channel have the largest
Dice of confidences above 0.5 on labelled images. Masks are then opened and closed with discs of 3
and of 1 px of level 0. ``CHOICES`` lead from the choice without labels to that one.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    "by labels + threshold",
)
_PUBLISHED_THRESHOLD = 0.5
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

    def level0(self, mask: Mask) -> Mask:
        """A mask (H, W) at level 0, (H0, W0)."""
        return mask[self.px]

    def dice(self, found: Mask) -> float:
        """The Dice of a mask at level 0, (H0, W0)."""
        total = int(found.sum() + self.true.sum())
        return 2 * int((found & self.true).sum()) / total if total else 1.0


Channel = tuple[int, bool]  # of a network, and whether it is inverted


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A snapshot, and its mean Dice over images: ``published`` (C,) that of each channel where it
    is above 0.5; ``label_free`` that of the channel chosen without labels, opened and closed."""

    snapshot: Snapshot
    published: NDArray[np.float64]
    label_free: float

    @property
    def score(self) -> float:
        """That by which it is chosen without labels."""
        return self.snapshot.score


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
            dice.append(image.dice(opened_and_closed(image.level0(found))))
        return float(np.mean(dice))

    return float(bench.cache.value(key, measure))


def by_choice(
    judged: Sequence[Judged], images: Sequence[_Image], config: Config
) -> dict[str, float]:
    """The Dice by CHOICES of the snapshots of a training."""

    def of_start(start: int) -> list[Judged]:
        return [each for each in judged if each.snapshot.start == start]

    def score(each: Judged) -> float:
        return each.score

    best = max(judged, key=score)
    starts = {each.snapshot.start for each in judged}
    published = max(judged, key=lambda each: float(each.published.max()))
    network, own = best.snapshot.network, _label_free(best.snapshot)
    theirs = (published.snapshot.network, (int(published.published.argmax()), False))
    channels = [(i, inverted) for i in range(len(best.published)) for inverted in (False, True)]
    found = (
        best.label_free,
        max(_dice(network, own, images, config, _THRESHOLDS)),
        max(_dice(network, each, images, config)[0] for each in channels),
        max(each.label_free for each in of_start(best.snapshot.start)),
        max(max(of_start(start), key=score).label_free for start in starts),
        _dice(*theirs, images, config)[0],
        max(_dice(*theirs, images, config, _THRESHOLDS)),
    )
    return dict(zip(CHOICES, found, strict=True))


def judge(snapshot: Snapshot, images: Sequence[_Image], config: Config) -> Judged:
    """Hold a snapshot against labels."""
    plain = []
    for image in images:
        maps = _maps(snapshot.network, image, config)
        masks = [image.level0(channel > _PUBLISHED_THRESHOLD) for channel in maps]
        plain.append([image.dice(mask) for mask in masks])
    return Judged(
        snapshot=snapshot,
        published=np.mean(plain, axis=0),
        label_free=_dice(snapshot.network, _label_free(snapshot), images, config)[0],
    )


def _label_free(snapshot: Snapshot) -> Channel:
    """The channel of a snapshot that is chosen without labels."""
    scores = np.nan_to_num(snapshot.scores)
    channel = int(np.argmax(np.abs(scores)))
    return channel, bool(scores[channel] < 0)


def _dice(
    network: ConfidenceNetwork,
    channel: Channel,
    images: Sequence[_Image],
    config: Config,
    thresholds: Sequence[float] = (_PUBLISHED_THRESHOLD,),
) -> list[float]:
    """The mean Dice over images of a channel above each threshold, opened and closed."""
    index, inverted = channel
    dice = []
    for image in images:
        values = _maps(network, image, config)[index]
        values = 1 - values if inverted else values
        masks = [opened_and_closed(image.level0(values > each)) for each in thresholds]
        dice.append([image.dice(mask) for mask in masks])
    mean: list[float] = np.mean(dice, axis=0).tolist()
    return mean


def opened_and_closed(mask: Mask) -> Mask:
    """A mask (H0, W0) after the post-processing of the authors, whose px are those of level 0."""
    for disc in _DISCS:
        mask = ndimage.binary_opening(mask, disc)
        mask = ndimage.binary_closing(mask, disc)
    return mask


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
