"""Calibration without labels: nuclei that the network finds in every view of a crop are right.

A network is most often sure of what it finds, wrong or not. But what is right it finds again, with
the same outline, when the stain, the focus or the size of the image changes a little. The mean
overlap of a nucleus with what is found in such views is turned into the probability that it is
right; a logistic regression predicts that from a single view, so that it costs nothing in a run.

As the test-time augmentation of G. Wang et al., Aleatoric uncertainty estimation with test-time
augmentation for medical image segmentation with convolutional neural networks, Neurocomputing 338
(2019), but of instances, and learnt by J. Platt's scaling (Probabilistic outputs for support vector
machines, 1999).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import shapely
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage

from patchcl_qupath.config import SegmentConfig
from patchcl_qupath.models import engines
from patchcl_qupath.models.engines import EngineKind
from patchcl_qupath.models.model import Calibration, Confidence, Model, confidence
from patchcl_qupath.overlap import mapped
from patchcl_qupath.progress import ShowCount
from patchcl_qupath.segmentation.instances import instances
from patchcl_qupath.segmentation.probability import nucleus_features
from patchcl_qupath.segmentation.typical_nuclei import CROPS, with_diameter
from patchcl_qupath.slides.prepare import TrainingCrops
from patchcl_qupath.slides.stains import StainNormaliser
from patchcl_qupath.storage.records import CDCLLog

_CROPS = 24  # of all slides, that nuclei are looked for in
_LEAST_NUCLEI = 50
_STAIN_VIEWS = 2
_GAIN, _OFFSET = 0.25, 0.12  # largest changes of a normalised stain
_BLUR_PX = 0.9
_SCALES = (0.8, 1.25)
# On the labelled sets, a nucleus whose views overlap with it by 0.81 is right in half of the cases,
# whatever the set: 0.65: 0.2, 0.75: 0.4, 0.87: 0.65, 0.95: 0.87.
_EVEN, _STEEPNESS = 0.81, 12.0
# A refined network, which knows the stain of the corrected ROIs best, agrees less with its views:
# on two sets its nuclei are right by 0.1 more often at equal overlap.
_EVEN_REFINED = 0.78
_RIDGE = 1e-3  # keeps the weights of the regression finite


def calibrated(model: Model, crops: TrainingCrops, report: ShowCount) -> Model:
    """The model with a calibration, from some of the crops; as it is where these have few nuclei.

    A nucleus counts once, of however many crops of a small image.
    Equal models and crops give equal calibrations on one machine's CPU.
    """
    chosen = crops.some(_CROPS)
    engine = engines.choose(model.config.engine, model.network)
    features, agreement = [], []
    seeds = [(model.config.patchcl.seed, i) for i in range(len(chosen))]
    # What a person sets in [segment] is for runs: equal trainings give equal models.
    separation = {
        slide: separation_of_slide(
            SegmentConfig(), model, crops.select(crops.of_slide(slide)), engine
        )
        for slide in dict.fromkeys(chosen.slides)
    }
    settings = [separation[slide] for slide in chosen.slides]
    of_crop = partial(_of_crop, model, engine)
    for found in mapped(of_crop, chosen.images, chosen.normalisers, settings, seeds):
        features.append(found[0])
        agreement.append(found[1])
        report(len(features), len(chosen))
    x, y = np.concatenate(features), np.concatenate(agreement)
    if len(x) * _distinct(chosen) < _LEAST_NUCLEI:
        return model
    even = _EVEN_REFINED if isinstance(model.training, CDCLLog) else _EVEN
    right = 1 / (1 + np.exp(-_STEEPNESS * (y - even)))
    return replace(model, calibration=logistic_regression(x, right))


def _distinct(crops: TrainingCrops) -> float:
    """The area that crops cover, over the sum of their areas: 1 where none overlap."""
    covered = total = 0.0
    for slide in dict.fromkeys(crops.slides):
        boxes = [crops.boxes[i] for i in crops.of_slide(slide)]
        squares = shapely.box(*np.transpose([(b.col0, b.row0, b.col1, b.row1) for b in boxes]))
        covered += shapely.union_all(squares).area
        total += shapely.area(squares).sum()
    return covered / total


def separation_of_slide(
    config: SegmentConfig, model: Model, crops: TrainingCrops, engine: EngineKind
) -> SegmentConfig:
    """The settings with the typical diameter of the nuclei that a model finds in one slide, of
    which ``crops`` are."""
    some = crops.some(CROPS)
    find = partial(confidence, model, engine=engine)
    return with_diameter(config, model, [*mapped(find, some.images, some.normalisers)], model.mpp)


def _of_crop(
    model: Model,
    engine: EngineKind,
    image: NDArray[np.uint8],
    normaliser: StainNormaliser,
    config: SegmentConfig,
    seed: tuple[int, ...],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The features (N, 5) of the nuclei in a crop, and their mean overlap (N,) with its views."""
    rng = np.random.default_rng(seed)
    found = confidence(model, image, normaliser, engine)
    labels = _instances(model, found, config)
    overlaps = [
        _overlaps(labels, _instances(model, view, config))
        for view in _views(model, image, normaliser, engine, rng)
    ]
    return nucleus_features(labels, found, model.mpp, config), np.mean(overlaps, axis=0)


def logistic_regression(x: NDArray[np.float64], y: NDArray[np.float64]) -> Calibration:
    """The regression of probabilities y (N,) on features x (N, 5), by Newton's method."""
    mean, deviation = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-6)
    design = np.column_stack([np.ones(len(x)), (x - mean) / deviation])
    weights = np.zeros(design.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ weights))
        gradient = design.T @ (p - y) / len(y) + _RIDGE * weights
        hessian = (design.T * (p * (1 - p))) @ design / len(y) + _RIDGE * np.eye(len(weights))
        step = np.linalg.solve(hessian, gradient)
        weights -= step
        if np.abs(step).max() < 1e-9:
            break
    slopes = weights[1:] / deviation
    values = [weights[0] - slopes @ mean, *slopes]
    return Calibration(*(round(float(value), 6) for value in values))


def _views(
    model: Model,
    image: NDArray[np.uint8],
    normaliser: StainNormaliser,
    engine: EngineKind,
    rng: np.random.Generator,
) -> Iterator[Confidence]:
    """What the network makes of a crop (H, W, 3) that is stained, focused or scaled otherwise."""
    for _ in range(_STAIN_VIEWS):
        yield confidence(model, image, _restained(normaliser, rng), engine)
    blurred = ndimage.gaussian_filter(image, (_BLUR_PX, _BLUR_PX, 0))
    yield confidence(model, blurred, normaliser, engine)
    height, width = image.shape[:2]
    for scale in _SCALES:
        scaled = _resized(image, (round(height * scale), round(width * scale)))
        found = confidence(model, np.rint(scaled).astype(np.uint8), normaliser, engine)
        assert found.core is not None
        maps = _resized(np.stack([found.nucleus, found.core], axis=-1), (height, width))
        yield Confidence(maps[..., 0], maps[..., 1])


def _restained(normaliser: StainNormaliser, rng: np.random.Generator) -> StainNormaliser:
    """A normaliser after which each stain has another gain and offset."""
    low, high = np.array(normaliser.low), np.array(normaliser.high)
    span = (high - low) / rng.uniform(1 - _GAIN, 1 + _GAIN, 3)
    low = low - span * rng.uniform(-_OFFSET, _OFFSET, 3)
    return StainNormaliser(tuple(low.tolist()), tuple((low + span).tolist()))


def _resized(image: NDArray[np.generic], shape: tuple[int, int]) -> NDArray[np.float32]:
    """An image (H, W, C) of another height and width, bilinear."""
    x = torch.from_numpy(np.ascontiguousarray(image, np.float32)).permute(2, 0, 1)[None]
    return F.interpolate(x, size=shape, mode="bilinear")[0].permute(1, 2, 0).contiguous().numpy()


def _instances(model: Model, found: Confidence, config: SegmentConfig) -> NDArray[np.int32]:
    """The nuclei of a view, as labels (H, W)."""
    return instances(found.nucleus, model.mpp, config, model.threshold, found.core)


def _overlaps(labels: NDArray[np.int32], others: NDArray[np.int32]) -> NDArray[np.float64]:
    """The largest IoU (N,) of labels 1..N (H, W) with others."""
    count, width = int(labels.max(initial=0)), int(others.max(initial=0)) + 1
    pairs, shared = np.unique(labels.astype(np.int64) * width + others, return_counts=True)
    one, other = pairs // width, pairs % width
    areas, other_areas = np.bincount(one, shared), np.bincount(other, shared)
    iou = np.where(one * other > 0, shared / (areas[one] + other_areas[other] - shared), 0)
    best = np.zeros(count + 1)
    np.maximum.at(best, one, iou)
    return best[1:]
