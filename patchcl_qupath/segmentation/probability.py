"""The probability of a nucleus: how often what looks like it to the network is right."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.config import SegmentConfig
from patchcl_qupath.models.model import Confidence, Model, features_of
from patchcl_qupath.segmentation.instances import ellipticities
from patchcl_qupath.segmentation.measurements import counts, maxima, means, runs_of


def nucleus_probability(
    model: Model,
    labels: NDArray[np.int32],
    found: Confidence,
    mpp: float,
    config: SegmentConfig,
) -> NDArray[np.float64]:
    """The probability (N,) that labels 1..N (H, W) are nuclei, with the right outline.

    ``found`` is what the model made of the same pixels, at ``mpp`` µm per pixel; ``config`` are the
    settings by which they were separated, with the typical diameter of the image. By a model
    without calibration, the mean probability of its pixels.
    """
    if model.calibration is None:
        return means(runs_of(labels), int(labels.max(initial=0)), found.nucleus)
    return model.calibration(nucleus_features(labels, found, mpp, config))


def is_probable(
    model: Model, probability: NDArray[np.float64], config: SegmentConfig
) -> NDArray[np.bool_]:
    """(N,) which are probable enough to be kept.

    All are where the model has no calibration: a mean of pixels is no probability of a nucleus.
    """
    if model.calibration is None:
        return np.ones(len(probability), np.bool_)
    return np.asarray(probability >= config.min_probability)


def nucleus_features(
    labels: NDArray[np.int32], found: Confidence, mpp: float, config: SegmentConfig
) -> NDArray[np.float64]:
    """What a calibration sees of labels 1..N (H, W), (N, 5)."""
    assert found.core is not None, "a network without cores is not calibrated"
    count, runs = int(labels.max(initial=0)), runs_of(labels)
    return features_of(
        mean_probability=means(runs, count, found.nucleus),
        largest_core=maxima(runs, count, found.core),
        ellipticity=ellipticities(labels),
        diameter=np.sqrt(4 / np.pi * counts(runs, count)) * mpp / config.typical_um,
    )
