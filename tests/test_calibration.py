"""The probability of a nucleus: calibrated without labels, by views that agree."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from slides import crops_of
from test_network import selftraining_log
from torch import Tensor

from patchcl_qupath.config import Config, EngineChoice, SegmentConfig
from patchcl_qupath.datatypes import Box
from patchcl_qupath.models.model import Calibration, Confidence, Model, features_of
from patchcl_qupath.models.network import NucleusNetwork, SegmentationNetwork
from patchcl_qupath.segmentation.probability import (
    is_probable,
    nucleus_features,
    nucleus_probability,
)
from patchcl_qupath.slides.stains import StainNormaliser, unmix_hed
from patchcl_qupath.storage.records import to_plain, training_log
from patchcl_qupath.training.calibration import calibrated, logistic_regression
from patchcl_qupath.training.selftrain import pseudo_labelled

SIDE = 240
TORCH = Config(engine=EngineChoice.TORCH)


class _Threshold(SegmentationNetwork):
    """Nuclei are where hematoxylin is above 0.5: what is far above stays so in each view."""

    receptive_radius_px = 0
    core_channel = 1

    def __init__(self) -> None:
        super().__init__()
        self.steepness = torch.nn.Parameter(torch.tensor(20.0))

    def probabilities(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.steepness * (x[:, [0, 0]] - 0.5))

    forward = probabilities


def places(count: int = 8) -> list[tuple[int, int]]:
    return [(15 + 30 * row, 15 + 30 * col) for row in range(count) for col in range(count)]


def slide() -> tuple[NDArray[np.uint8], StainNormaliser, NDArray[np.bool_]]:
    """A crop of dark and of pale discs, in turn; its normaliser; where the dark ones are."""
    rows, cols = np.mgrid[:SIDE, :SIDE]
    grey, dark = np.full((SIDE, SIDE), 240.0), np.zeros((SIDE, SIDE), np.bool_)
    for k, (row, col) in enumerate(places()):
        disc = np.hypot(rows - row, cols - col) < 8
        grey[disc] = 60 if k % 2 else 120
        dark |= disc & bool(k % 2)
    image = ndimage.gaussian_filter(grey, 0.7).astype(np.uint8)[..., None].repeat(3, axis=-1)
    hematoxylin = unmix_hed(image)[..., 0]
    low, pale = float(hematoxylin.min()), float(hematoxylin[15, 15])
    high = low + (pale - low) / 0.55  # pale discs are just above the network's threshold
    return image, StainNormaliser((low, 0.0, 0.0), (high, 1.0, 1.0)), dark


def test_what_is_found_in_every_view_is_more_probable() -> None:
    image, normaliser, dark = slide()
    model = Model(network=_Threshold().eval(), config=TORCH)
    reported: list[tuple[int, int]] = []
    crops = crops_of([image, image], normaliser)
    trained = calibrated(model, crops, lambda *count: reported.append(count))
    assert reported == [(1, 2), (2, 2)]
    assert trained.calibration is not None
    stains = torch.from_numpy(normaliser.apply(image)).permute(2, 0, 1)[None]
    maps = model.network.probabilities(stains)
    found = Confidence(*maps[0].detach().numpy())
    labels = ndimage.label(found.nucleus > 0.5)[0].astype(np.int32)
    probability = nucleus_probability(trained, labels, found, trained.mpp, SegmentConfig())
    assert len(probability) == 64
    is_dark = np.array([dark[labels == k].any() for k in range(1, 65)])
    assert probability[is_dark].min() > probability[~is_dark].max() + 0.2
    assert calibrated(model, crops, lambda *count: None).calibration == trained.calibration


def test_nuclei_of_a_small_image_count_once_for_a_calibration() -> None:
    """Each crop of a small image is all of it: of 16 nuclei, 96 seemed to be there."""
    image, normaliser, _ = slide()
    corner = image[:120, :120]
    model = Model(network=_Threshold().eval(), config=TORCH)
    apart = crops_of([corner] * 6, normaliser)
    same = replace(apart, boxes=(Box(0, 0, 120, 120),) * 6)
    nearly = replace(same, boxes=tuple(Box(0, 9 * k, 120, 9 * k + 120) for k in range(6)))
    of_others = replace(same, slides=tuple("123456"))
    for crops, is_enough in ((same, False), (nearly, False), (apart, True), (of_others, True)):
        calibration = calibrated(model, crops, lambda *count: None).calibration
        assert (calibration is not None) == is_enough


def test_a_calibration_does_not_depend_on_the_settings_of_runs() -> None:
    image, normaliser, _ = slide()
    crops = crops_of([image, image], normaliser)
    segment = SegmentConfig(smooth_um=1.5, join_diameter=1.2, min_area_um2=60)
    by_default, by_hand = (
        calibrated(Model(network=_Threshold().eval(), config=config), crops, lambda *count: None)
        for config in (TORCH, replace(TORCH, segment=segment))
    )
    assert by_default.calibration == by_hand.calibration is not None


def test_nuclei_of_a_refined_model_are_more_probable_where_views_agree_as_much() -> None:
    image, normaliser, _ = slide()
    plain = Model(network=_Threshold().eval(), config=TORCH)
    log = training_log(
        to_plain(selftraining_log()) | {"cdcl": [{"labelled": 1.0}], "refined_from": "0"}
    )
    crops = crops_of([image, image], normaliser)
    features = features_of(*(np.full(3, value) for value in (0.8, 0.9, 0.95, 1.0)))
    probabilities = []
    for model in (plain, replace(plain, training=log)):
        calibration = calibrated(model, crops, lambda *count: None).calibration
        assert calibration is not None
        probabilities.append(calibration(features))
    assert (probabilities[1] > probabilities[0] + 0.01).all()


def test_nuclei_that_a_calibrated_model_is_not_sure_of_are_unlabelled() -> None:
    image, normaliser, dark = slide()
    crops = crops_of([image, image], normaliser)
    model = Model(network=_Threshold().eval(), config=TORCH)
    sure = calibrated(model, crops, lambda *count: None)
    (every, _), (some, _) = (
        [crop.labels for crop in pseudo_labelled(crops, teacher, lambda *count: None)]
        for teacher in (model, sure)
    )
    assert len(np.unique(every.nuclei)) == 65
    assert len(np.unique(some.nuclei)) == 33
    np.testing.assert_array_equal(some.nuclei > 0, (every.nuclei > 0) & dark)
    np.testing.assert_array_equal(every.background, every.nuclei == 0)
    to_sure = ndimage.distance_transform_edt(some.nuclei == 0)
    to_unsure = ndimage.distance_transform_edt((every.nuclei == 0) | (some.nuclei > 0))
    decided = to_sure != to_unsure
    near = every.background & (to_sure < to_unsure)
    np.testing.assert_array_equal(some.background[decided], near[decided])
    assert 0.3 < near.mean() < 0.7


def test_few_nuclei_are_no_ground_for_a_calibration() -> None:
    image, normaliser, _ = slide()
    model = Model(network=_Threshold().eval(), config=TORCH)
    crops = crops_of([image[:90, :90]], normaliser)
    assert calibrated(model, crops, lambda *count: None) is model


def test_regression_recovers_the_probabilities_it_was_given() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(4000, 5)) * [1.0, 2.0, 0.5, 0.3, 0.6]
    true = Calibration(0.3, 1.2, 0.4, -0.8, 0.6, -1.0)
    fitted = logistic_regression(features, true(features))
    assert np.abs(fitted(features) - true(features)).max() < 0.02


def test_regression_on_features_that_do_not_differ_is_their_mean() -> None:
    fitted = logistic_regression(np.ones((100, 5)), np.full(100, 0.7))
    assert fitted(np.ones((1, 5)))[0] == pytest.approx(0.7, abs=0.01)


def test_features_are_log_odds_shape_and_relative_size() -> None:
    labels = np.array([[1, 1, 0, 0, 0], [1, 1, 2, 2, 2]], np.int32)
    nucleus = np.array([[0.6, 0.8, 0.1, 0, 0], [0.6, 0.8, 1, 1, 1]], np.float32)
    core = np.array([[0.1, 0.9, 0, 0, 0], [0.2, 0.3, 0.1, 0.5, 0]], np.float32)
    config = SegmentConfig(nucleus_diameter_um=4.0)
    features = nucleus_features(labels, Confidence(nucleus, core), 0.5, config)
    lacks = np.log(1.02 - 3 / np.pi)  # a rectangle is 3 / pi of the ellipse with its moments
    size = np.log(np.sqrt(4 / np.pi * 4) * 0.5 / 4.0)
    assert features[0] == pytest.approx(
        [np.log(0.7 / 0.3), np.log(9), lacks, size, size**2], abs=1e-5
    )
    size = np.log(np.sqrt(4 / np.pi * 3) * 0.5 / 4.0)
    assert features[1] == pytest.approx([np.log(999), 0, lacks, size, size**2], abs=1e-5)
    assert np.isfinite(features_of(*np.zeros((4, 1)))).all()
    assert np.isfinite(features_of(*np.ones((4, 1)))).all()


def test_without_calibration_the_probability_is_the_mean_of_the_pixels() -> None:
    labels = np.array([[1, 1, 0]], np.int32)
    found = Confidence(np.array([[0.6, 0.8, 0.1]], np.float32), None)
    model = Model(network=NucleusNetwork((2, 2, 2)).eval(), config=Config())
    assert nucleus_probability(model, labels, found, 0.5, SegmentConfig()) == pytest.approx([0.7])


def test_nuclei_must_be_probable_if_the_model_is_calibrated() -> None:
    plain = Model(network=NucleusNetwork((2, 2, 2)).eval(), config=Config())
    model = replace(plain, calibration=Calibration(0.5, 1.0, 2.0, -1.0, 0.5, -0.5))
    config = SegmentConfig(min_probability=0.3)
    probability = np.array([0.2, 0.3, 0.6])
    assert is_probable(model, probability, config).tolist() == [False, True, True]
    assert is_probable(plain, probability, config).all()


def test_model_keeps_its_calibration(tmp_path: Path) -> None:
    config = replace(Config(), selftrain=replace(Config().selftrain, widths=(2, 2, 2)))
    plain = Model(network=NucleusNetwork((2, 2, 2)).eval(), config=config)
    model = replace(plain, calibration=Calibration(0.5, 1.0, 2.0, -1.0, 0.5, -0.5))
    loaded = Model.load(model.save(tmp_path, "one"))
    assert loaded.calibration == model.calibration
    assert loaded.digest == model.digest != plain.digest
    assert Model.load(plain.save(tmp_path, "two")).calibration is None
