"""How well instance labels agree with the truth: Dice, AJI, PQ, and F1 at IoU 0.5.

Label images are (H, W) integers; 0 is background, each other value is one nucleus. Two images
without a nucleus agree fully (1.0).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.integer[Any]]


def dice(prediction: Labels, truth: Labels) -> float:
    """Overlap of the foregrounds: 2 |P and T| / (|P| + |T|)."""
    foreground = np.count_nonzero(prediction) + np.count_nonzero(truth)
    both = np.count_nonzero((prediction != 0) & (truth != 0))
    return 2 * both / foreground if foreground else 1.0


def aji(prediction: Labels, truth: Labels) -> float:
    """Aggregated Jaccard index.

    Each true nucleus takes the predicted one with the largest IoU: intersections and unions are
    summed. A true nucleus that nothing overlaps adds its area to the unions, and so does each
    predicted nucleus that none took. As published, several true nuclei may take the same one.

    N. Kumar et al., A Dataset and a Technique for Generalized Nuclear Segmentation for
    Computational Pathology, IEEE Trans Med Imaging 36 (2017), algorithm 1.
    """
    overlap, predicted, true = _overlaps(prediction, truth)
    if not len(true) or not len(predicted):
        return float(len(true) == len(predicted))
    union = predicted[:, None] + true[None] - overlap  # (P, T)
    best = np.argmax(overlap / union, axis=0)  # (T,)
    columns = np.arange(len(true))
    found = overlap[best, columns] > 0  # (T,)
    taken = np.zeros(len(predicted), dtype=bool)
    taken[best[found]] = True
    unions = union[best, columns][found].sum() + true[~found].sum() + predicted[~taken].sum()
    return float(overlap[best, columns].sum() / unions)


def f1(prediction: Labels, truth: Labels) -> float:
    """Detection F1: a true nucleus is found if a predicted one overlaps it with IoU > 0.5."""
    return _detection(prediction, truth)[0]


def pq(prediction: Labels, truth: Labels) -> float:
    """Panoptic quality: detection F1 times the mean IoU of the nuclei that were found.

    A. Kirillov et al., Panoptic Segmentation, CVPR 2019.
    """
    quality, mean_iou = _detection(prediction, truth)
    return quality * mean_iou


def _detection(prediction: Labels, truth: Labels) -> tuple[float, float]:
    """F1 at IoU 0.5, and the mean IoU of matched nuclei. Above 0.5 no nucleus has two matches."""
    overlap, predicted, true = _overlaps(prediction, truth)
    nuclei = len(predicted) + len(true)
    if nuclei == 0:
        return 1.0, 1.0
    iou = overlap / (predicted[:, None] + true[None] - overlap)  # (P, T)
    matched = iou[iou > 0.5]
    return 2 * len(matched) / nuclei, float(matched.mean()) if len(matched) else 0.0


def _overlaps(
    prediction: Labels, truth: Labels
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Shared pixels (P, T) of each predicted with each true nucleus, and their areas (P,), (T,)."""
    if prediction.shape != truth.shape:
        raise ValueError(f"label images of different shapes: {prediction.shape}, {truth.shape}")
    predicted, row = np.unique(prediction, return_inverse=True)
    true, col = np.unique(truth, return_inverse=True)
    pairs = row.ravel() * len(true) + col.ravel()
    table = np.bincount(pairs, minlength=len(predicted) * len(true)).reshape(-1, len(true))
    is_predicted, is_true = predicted != 0, true != 0
    areas = table.sum(axis=1)[is_predicted], table.sum(axis=0)[is_true]
    return table[np.ix_(is_predicted, is_true)], *areas
