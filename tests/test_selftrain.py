"""Pseudo-labels of shapes whose ground truth is known, and networks trained on them."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from slides import crops_of
from test_network import patchcl_log

from patchcl_qupath.config import CDCLConfig, Config, SegmentConfig, SelfTrainConfig
from patchcl_qupath.errors import TrainingError
from patchcl_qupath.evaluation.metrics import Overlaps
from patchcl_qupath.models.model import Calibration, Model, confidence
from patchcl_qupath.models.network import ConfidenceNetwork, NucleusNetwork
from patchcl_qupath.progress import Progress, Stage, hide_progress
from patchcl_qupath.segmentation.instances import instances
from patchcl_qupath.slides.stains import StainNormaliser
from patchcl_qupath.training import selftrain, supervision
from patchcl_qupath.training.pseudo_labels import (
    PseudoLabels,
    is_glass,
    keep_labels,
    only_sure,
    pseudo_labels,
    separated,
)
from patchcl_qupath.training.selftrain import (
    LabelledCrop,
    of_sure_nuclei,
    without_other_colours,
)
from patchcl_qupath.training.supervision import (
    TrainingSample,
    bce_dice_loss,
    ema_model,
    random_window,
    targets,
)
from patchcl_qupath.training.touching import with_touching_nuclei

MPP = 0.5
CONFIG = SelfTrainConfig()
BY_TORCH = replace(Config(), engine="torch")  # networks made up here have other operations


def discs(shape, centres_radii):
    """Labels 1..N of discs (row, col, radius in px)."""
    rows, cols = np.mgrid[: shape[0], : shape[1]] + 0.5
    labels = np.zeros(shape, np.int32)
    for k, (row, col, radius) in enumerate(centres_radii, start=1):
        labels[(rows - row) ** 2 + (cols - col) ** 2 < radius**2] = k
    return labels


def tissue(labels, depth=1.0):
    """Normalised stains of nuclei that are darker in their middle, and PatchCL's confidence."""
    inside = ndimage.distance_transform_edt(labels > 0)
    hematoxylin = 0.2 + depth * np.where(labels > 0, 0.5 + 0.05 * np.minimum(inside, 6), 0)
    hematoxylin = ndimage.gaussian_filter(hematoxylin, 0.7)
    stains = np.stack([hematoxylin, 0.4 + 0 * hematoxylin, 0 * hematoxylin], axis=-1)
    prediction = np.where(hematoxylin > 0.45, 0.95, 0.05)
    return stains.astype(np.float32), prediction.astype(np.float32)


def find(stains, prediction, config=CONFIG, glass=None):
    """Pseudo-labels of a slide of one crop, all tissue but for ``glass``."""
    glass = np.zeros(prediction.shape, bool) if glass is None else glass
    (found,) = pseudo_labels([stains], [glass], [prediction], MPP, config)
    return found.nuclei, found.background


def test_clear_nuclei_are_labelled_and_the_rest_is_background():
    ground_truth = discs((120, 160), [(30, 30, 8), (60, 100, 10), (95, 50, 6), (25, 120, 9)])
    labels, background = find(*tissue(ground_truth))
    assert Overlaps.of_labels(labels, ground_truth).f1 == 1
    assert not (background & (ground_truth > 0)).any()
    assert background[ground_truth == 0].mean() > 0.9


def test_a_clump_is_split_into_its_nuclei_and_a_strand_is_unlabelled():
    places = [(30, 30), (30, 47), (47, 47), (64, 47)]
    ground_truth = discs((100, 160), [(row, col, 8) for row, col in places])
    strand = np.zeros(ground_truth.shape, bool)
    rows, cols = np.mgrid[:100, :160]
    strand[np.abs(np.hypot(rows - 50, cols - 120) - 22) < 3] = True  # a ring, as of a follicle
    stains, prediction = tissue(np.where(strand, 9, ground_truth).astype(np.int32))
    labels, background = find(stains, prediction)
    assert len({int(labels[place]) for place in places} - {0}) == 4
    assert not (labels > 0)[strand].any()
    assert not background[ndimage.binary_erosion(strand)].any()


def test_a_dark_clump_that_does_not_split_into_nuclei_is_background():
    """Keratin, ink, a fold: an evenly dark band, with a nucleus beside it."""
    ground_truth = discs((120, 200), [(20, 40, 8), (100, 150, 8)])
    band = np.zeros(ground_truth.shape, bool)
    rows, cols = np.mgrid[:120, :200]
    band[np.abs(rows - 60 - 10 * np.sin(cols / 9)) < 9] = True
    stains, prediction = tissue(np.where(band, 9, ground_truth).astype(np.int32))
    labels, background = find(stains, prediction)
    assert sorted(np.unique(labels[ground_truth > 0]).tolist()) in ([0, 1, 2], [1, 2])
    assert labels.max() == 2
    assert background[ndimage.binary_erosion(band, iterations=2)].all()
    _, background = find(stains, prediction, replace(CONFIG, min_covered=0.0))
    assert not background[ndimage.binary_erosion(band, iterations=2)].any()


def test_clumps_have_room_for_many_nuclei():
    ground_truth = discs((140, 240), [(20, 40, 8), (110, 50, 8)])
    rows, cols = np.mgrid[:140, :240]
    large = (np.abs(rows - 70) < 50) & (np.abs(cols - 150) < 50)  # 2,450 µm²
    small = (np.abs(rows - 70) < 30) & (np.abs(cols - 220) < 15)
    stains, prediction = tissue(np.where(large | small, 9, ground_truth).astype(np.int32))
    glass = np.zeros(ground_truth.shape, np.bool_)
    (labels,) = pseudo_labels([stains], [glass], [prediction], MPP, CONFIG)
    assert labels.clumps.max() == 1
    inside, beside = ndimage.binary_erosion(large, iterations=3), ~ndimage.binary_dilation(large)
    assert labels.clumps[inside].all()
    assert not labels.clumps[beside].any()


def test_a_strand_on_glass_is_background():
    """Keratin: a dark strand with knots that look like nuclei, beside nuclei in tissue."""
    ground_truth = discs((140, 220), [(20, 40, 9), (120, 150, 9), (25, 170, 8)])
    rows, cols = np.mgrid[:140, :220]
    course = 70 + 16 * np.sin(cols / 16)
    strand = (np.abs(rows - course) < 3.5) & (cols > 5) & (cols < 215)
    knots = [(float(course[0, col]), float(col), 3.2) for col in range(12, 212, 24)]
    stains, prediction = tissue(np.where(strand, 9, ground_truth).astype(np.int32))
    stains[..., 0] += 0.4 * ndimage.gaussian_filter(
        (discs(ground_truth.shape, knots) > 0) * 1.0, 0.7
    )
    glass = ~strand & (np.abs(rows - course) < 15)
    labels, background = find(stains, prediction, glass=glass)
    assert labels.max() == 3
    assert background[strand].mean() > 0.95
    _, background = find(stains, prediction)  # in tissue: perhaps a row of spindle nuclei
    assert background[strand].mean() < 0.05


def test_nuclei_on_glass_stay_nuclei():
    """A strand of cells, as in a smear: it splits into nuclei."""
    places = [(60 + 6 * (i % 2), 15 + 17 * i, 8) for i in range(11)]
    ground_truth = discs((120, 210), places)
    stains, prediction = tissue(ground_truth)
    labels, background = find(stains, prediction, glass=ground_truth == 0)
    assert labels.max() == len(places)
    assert not background[ground_truth > 0].any()


def test_glass_is_where_light_passes():
    rgb = np.full((40, 60, 3), (244, 243, 246), np.uint8)
    rgb[:, 30:] = (200, 150, 190)
    glass = is_glass(rgb, MPP, CONFIG)
    assert glass[:, :28].all()
    assert not glass[:, 32:].any()


def test_a_nucleus_without_confidence_is_no_pseudo_label():
    ground_truth = discs((100, 100), [(50, 50, 9)])
    stains, prediction = tissue(ground_truth)
    labels, background = find(stains, 0 * prediction)
    assert labels.max() == 0
    assert background[ground_truth == 0].mean() > 0.9
    inside = ndimage.binary_erosion(ground_truth > 0)
    assert not background[inside].any()  # it has hematoxylin: unlabelled


def test_a_crop_without_nuclei_finds_none_beside_those_with():
    """Alone, each crop would find its own darkest spots."""
    ground_truth = discs((120, 160), [(30, 30, 8), (60, 100, 10), (95, 50, 6), (25, 120, 9)])
    stains, prediction = tissue(ground_truth)
    spots = stains * 0.3  # pale spots of the same shape: of stroma, say
    confident = np.ones(ground_truth.shape, np.float32)
    no_glass = np.zeros(ground_truth.shape, bool)
    both = pseudo_labels([stains, spots], [no_glass] * 2, [prediction, confident], MPP, CONFIG)
    assert both[0].nuclei.max() == 4
    assert both[1].nuclei.max() == 0
    assert both[1].background.mean() > 0.95


def test_fragments_are_unlabelled():
    ground_truth = discs((120, 160), [(30, 30, 12), (60, 100, 12), (95, 50, 12), (25, 120, 3)])
    labels, background = find(*tissue(ground_truth))
    assert labels.max() == 3
    assert not background[ground_truth == 4].any()
    labels, _ = find(*tissue(ground_truth), replace(CONFIG, min_fragment=0.0))
    assert labels.max() == 4


@pytest.mark.parametrize("shape", [(40, 50), (3, 3)])
def test_blank_crops_have_none(shape):
    stains = np.full((*shape, 3), 0.3, np.float32)
    for prediction in (0.0, 1.0):
        labels, _ = find(stains, np.full(shape, prediction, np.float32))
        assert labels.max() == 0


def test_targets_separate_touching_nuclei():
    labels = np.zeros((20, 40), np.int32)
    labels[5:15, 5:15] = 1
    labels[5:15, 15:25] = 2
    background = np.zeros(labels.shape, bool)
    background[:, 30:] = True
    sample = TrainingSample(np.zeros((20, 40, 3), np.float32), targets(labels, background))
    nucleus, core = sample.nucleus, sample.core
    assert (nucleus > 0).sum() == 200
    pieces, count = ndimage.label(core)
    assert count == 2
    assert pieces[10, 10] != pieces[10, 20]
    assert core[5, 5] == core[10, 14] == core[10, 15] == 0
    np.testing.assert_array_equal(sample.valid > 0, (labels > 0) | background)


def test_background_beside_an_unsure_nucleus_is_unlabelled_too():
    nuclei = np.zeros((20, 60), np.int32)
    nuclei[5:15, 5:15], nuclei[5:15, 25:35], nuclei[5:15, 45:55] = 1, 2, 3
    border = np.zeros(nuclei.shape, np.bool_)
    border[:, 4] = True  # neither, as before
    labels = PseudoLabels(nuclei, (nuclei == 0) & ~border)
    every = np.ones(3, np.bool_)
    sure = only_sure(labels, is_sure=np.array([True, False, True]), is_single=every)
    column = np.arange(60)[None]
    # Columns 19.5 and 39.5 are halfway between the nuclei.
    near = (column < 20) | (column >= 40)
    np.testing.assert_array_equal(sure.nuclei > 0, (nuclei > 0) & near)
    assert sure.nuclei.max() == 2
    np.testing.assert_array_equal(sure.background, labels.background & near)
    np.testing.assert_array_equal(sure.doubtful, labels.background & ~near)
    of_none = only_sure(labels, is_sure=~every, is_single=every)
    assert not of_none.nuclei.any()
    assert not of_none.background.any()


def test_background_beside_a_sure_nucleus_that_may_be_several_is_taught():
    nuclei = np.zeros((20, 60), np.int32)
    nuclei[5:15, 5:15], nuclei[5:15, 25:35], nuclei[5:15, 45:55] = 1, 2, 3
    labels = PseudoLabels(nuclei, nuclei == 0)
    is_sure, is_single = np.array([True, True, False]), np.array([True, False, True])
    found = only_sure(labels, is_sure, is_single)
    np.testing.assert_array_equal(found.nuclei, np.where(nuclei == 1, 1, 0))
    near = np.arange(60)[None] < 40  # 39.5 is halfway between the second and the third
    np.testing.assert_array_equal(found.background, labels.background & near)


def test_background_without_a_nucleus_is_sure():
    labels = PseudoLabels(np.zeros((9, 9), np.int32), np.eye(9, dtype=np.bool_))
    none = np.zeros(0, np.bool_)
    sure = only_sure(labels, is_sure=none, is_single=none)
    np.testing.assert_array_equal(sure.background, labels.background)
    assert not sure.nuclei.any()


@pytest.mark.parametrize(("sure_px", "is_taught"), [(0, True), (59, True), (61, False)])
def test_doubtful_background_is_taught_in_clumps_without_sure_nuclei(sure_px, is_taught):
    stains = np.zeros((60, 80, 3), np.float32)
    clumps = np.zeros((60, 80), np.int32)
    clumps[5:55, 5:45], clumps[5:55, 50:70] = 1, 2  # of 2,000 and 1,000 px, of which 3 % are 60, 30
    nuclei, doubtful = np.zeros(clumps.shape, np.int32), clumps == 0
    doubtful[10:50, 10:40], doubtful[10:50, 52:68] = True, True
    nuclei[5:10, 5:45].flat[:sure_px] = 1  # in what is not doubtful
    nuclei[5:10, 50:60] = 2
    none = np.zeros(clumps.shape, np.bool_)
    found = LabelledCrop(stains, PseudoLabels(nuclei, none, doubtful=doubtful))
    before = LabelledCrop(stains, PseudoLabels(nuclei, none, none, clumps))
    taught = of_sure_nuclei(found, before).labels
    np.testing.assert_array_equal(taught.nuclei, nuclei)
    # Neither beside the clumps, nor in the second one, nor what may be a nucleus in the first.
    np.testing.assert_array_equal(taught.background, doubtful & (clumps == 1) & is_taught)
    without = before._replace(labels=before.labels._replace(clumps=None))
    assert not of_sure_nuclei(found, without).labels.background.any()


def test_loss_ignores_unlabelled_pixels():
    target = torch.zeros(2, 3, 8, 8)
    target[:, :2, 2:6, 2:6] = 1
    target[:, 2, :, :4] = 1
    right = (target[:, :2] * 2 - 1) * 20
    wrong_where_unlabelled = right.clone()
    wrong_where_unlabelled[..., 4:] *= -1
    assert bce_dice_loss(right, target) < 0.1
    assert bce_dice_loss(wrong_where_unlabelled, target) == bce_dice_loss(right, target)
    assert bce_dice_loss(-right, target) > 10
    assert bce_dice_loss(right, 0 * target).isfinite()


def test_layers_are_cut_alike():
    first = np.arange(30 * 40, dtype=float).reshape(30, 40, 1)
    a, b = random_window([first, first[..., 0]], 50, np.random.default_rng(2))
    assert a.shape == (50, 50, 1)
    np.testing.assert_array_equal(a[..., 0], b)
    assert set(np.unique(b)) == set(range(1200))


class Prediction(ConfidenceNetwork):
    """PatchCL as it might be: confident wherever there is some hematoxylin."""

    def __init__(self):
        super().__init__(1, 1, (1,))

    def forward(self, x):
        return torch.sigmoid(20 * (x[:, :1] - 0.5))


def nuclei_images(n):
    """RGB images of purple discs on pink, and their ground truths."""
    rng = np.random.default_rng(5)
    images, ground_truths = [], []
    for _ in range(n):
        spots = rng.uniform([10, 10, 6], [150, 150, 10], (14, 3))
        ground_truth = discs((160, 160), spots)
        rgb = np.full((160, 160, 3), (225, 180, 205), float)
        rgb[ground_truth > 0] = (110, 70, 150)
        rgb = ndimage.gaussian_filter(rgb, (1, 1, 0)) + rng.normal(0, 4, rgb.shape)
        images.append(np.clip(rgb, 0, 255).astype(np.uint8))
        ground_truths.append(ground_truth)
    return images, ground_truths


def test_a_network_is_trained_on_the_pseudo_labels_of_patchcl():
    images, ground_truths = nuclei_images(9)
    normaliser = StainNormaliser.fit(images)
    crops = crops_of(images[:8], normaliser)
    quick = replace(
        CONFIG, first_steps=100, steps=150, cdcl_steps=12, crop_px=64, widths=(8, 12, 16)
    )
    config = replace(BY_TORCH, selftrain=quick)
    teacher = Model(network=Prediction(), config=config, training=patchcl_log())
    steps = []
    model = selftrain.train(crops, teacher, steps.append)
    training = [step for step in steps if step.stage is Stage.TRAINING_NETWORK]
    assert [step.done for step in training] == list(range(1, 251))
    assert training[-1] == Progress(stage=Stage.TRAINING_NETWORK, done=250, total=250)
    log = model.training
    assert log.patchcl == patchcl_log()
    # The first network labels all pixels, but for the borders of what it is not sure of.
    assert 0 < log.nucleus_fraction < 0.95 < log.labelled_fraction <= 1
    assert len(log.loss) == 250
    assert log.loss[-1] < log.loss[0]
    refining = [step.done for step in steps if step.stage is Stage.REFINING]
    assert refining == list(range(1, 25))
    assert len(log.unlabelled_cdcl) == 24  # two rounds
    assert "contrast" in log.unlabelled_cdcl[-1]
    assert model.calibration is None  # that of the network before
    found = confidence(model, images[8], normaliser)  # never seen
    labels = instances(found.nucleus, MPP, Config().segment, 0.5, found.core)
    assert Overlaps.of_labels(labels, ground_truths[8]).f1 > 0.7


def test_equal_trainings_give_equal_weights():
    images, _ = nuclei_images(8)
    crops = crops_of(images, StainNormaliser.fit(images))
    few = replace(CONFIG, first_steps=20, steps=20, cdcl_steps=5, widths=(8, 12, 16))
    config = replace(BY_TORCH, selftrain=few)
    teacher = Model(network=Prediction(), config=config, training=patchcl_log())
    once, again = (selftrain.train(crops, teacher, hide_progress) for _ in range(2))
    assert once.digest == again.digest


def test_settings_of_refinement_are_not_those_of_cdcl_without_labels(monkeypatch):
    images, _ = nuclei_images(2)
    quick = replace(CONFIG, first_steps=1, steps=2, cdcl_steps=7, widths=(2, 2, 2))
    config = replace(
        BY_TORCH,
        selftrain=quick,
        cdcl=CDCLConfig(steps=5, min_probability=1.0),
    )
    teacher = Model(network=Prediction(), config=config, training=patchcl_log())
    used = []

    def note(model, sure, report):
        used.append(model.config)
        return model

    monkeypatch.setattr(selftrain.cdcl, "refine_without_labels", note)
    model = selftrain.train(crops_of(images), teacher, hide_progress)
    by_defaults = CDCLConfig(steps=7)
    assert used == [replace(config, cdcl=by_defaults)]
    assert model.config == config


def test_what_no_run_takes_for_a_nucleus_is_background_of_the_pseudo_labels():
    image = np.full((60, 60, 3), 235, np.uint8)
    nuclei = np.zeros((60, 60), np.int32)
    for label, (row, colour) in enumerate([(5, (90, 50, 130)), (35, (30, 160, 90))], start=1):
        image[row : row + 16, 20:36] = colour  # of a nucleus; of green ink
        nuclei[row : row + 16, 20:36] = label
    labels = PseudoLabels(nuclei, np.zeros((60, 60), np.bool_), nuclei < 0)
    found = without_other_colours(labels, image, StainNormaliser.fit([image]), 0.5)
    assert found.nuclei.tolist() == np.where(nuclei == 1, 1, 0).tolist()
    assert found.background.tolist() == (nuclei == 2).tolist()
    assert found.artefacts.tolist() == (nuclei == 2).tolist()


def test_large_pseudo_labels_do_not_end_a_training_with_a_setting_of_runs():
    settings = replace(CONFIG, min_area_um2=450.0, max_area_um2=900.0)
    separation = selftrain._separation(settings)
    assert (separation.min_area_um2, separation.max_area_um2) == (450, 900)
    assert selftrain._separation(CONFIG).max_area_um2 == SegmentConfig().max_area_um2


class Halves(NucleusNetwork):
    """Finds nuclei where hematoxylin is above one half: in the left half of what it sees at 0.6, in
    the right one at 0.8, so that it answers differently when the image is turned."""

    def __init__(self):
        super().__init__((2, 2, 2))

    def probabilities(self, x):
        inside = (x[:, :1] > 0.5).float()
        side = torch.linspace(0, 1, x.shape[3]).round() * 0.2 + 0.6
        return (inside * side).expand(-1, 2, -1, -1)


def test_what_was_an_artefact_is_no_nucleus_in_cdcl_without_labels(monkeypatch):
    images, _ = nuclei_images(2)
    teacher = Model(network=Prediction(), config=BY_TORCH, training=patchcl_log())
    given = sure_samples(monkeypatch, 0.99)
    selftrain.train(crops_of(images), teacher, hide_progress)

    def without_the_first(crop, _):
        nuclei = crop.labels.nuclei
        return keep_labels(nuclei, np.arange(nuclei.max() + 1) > 1)

    monkeypatch.setattr(selftrain, "outside_artefacts", without_the_first)
    selftrain.train(crops_of(images), teacher, hide_progress)
    for sample, without in zip(*given, strict=True):
        lost = (sample.nucleus > 0) & ~(without.nucleus > 0)
        assert lost.any()
        # What is left out is unlabelled, not background.
        np.testing.assert_array_equal(without.valid, sample.valid & ~lost)


def sure_samples(monkeypatch, probability):
    """A list of what rounds of CDCL without labels are given; each nucleus has that probability."""
    given = []

    def note(model, sure, report):
        given.append(sure(model))
        return model

    monkeypatch.setattr(selftrain, "train_on", lambda *_: selftrain.Trained(Halves(), [], 0, 0))
    monkeypatch.setattr(selftrain, "calibrated", calibrated_to(probability))
    monkeypatch.setattr(selftrain.cdcl, "refine_without_labels", note)
    return given


def calibrated_to(probability):
    """As ``calibrated``, but each nucleus has the same probability; None is no calibration."""
    logit = None if probability is None else float(np.log(probability / (1 - probability)))
    calibration = None if logit is None else Calibration(logit, 0, 0, 0, 0, 0)
    return lambda model, *_: replace(model, calibration=calibration)


@pytest.mark.parametrize(("probability", "is_sure"), [(None, False), (0.59, False), (0.61, True)])
def test_cdcl_without_labels_needs_nuclei_that_are_sure(monkeypatch, probability, is_sure):
    """Background alone, which all of a crop without nuclei is, would unlearn nuclei."""
    images, _ = nuclei_images(2)
    empty = np.full_like(images[0], 240)
    teacher = Model(network=Prediction(), config=BY_TORCH, training=patchcl_log())
    given = sure_samples(monkeypatch, probability)
    normaliser = StainNormaliser.fit(images)
    selftrain.train(crops_of([*images, empty], normaliser), teacher, hide_progress)
    assert len(given[0]) == (3 if is_sure else 0)


def test_a_first_network_that_finds_nothing_teaches_nothing(monkeypatch):
    """The second learns from what the first one did: as if there were no first."""
    images, _ = nuclei_images(2)
    crops = crops_of(images)
    quick = replace(CONFIG, first_steps=1, steps=2, cdcl_steps=0, widths=(2, 2, 2))
    config = replace(BY_TORCH, selftrain=quick)
    teacher = Model(network=Prediction(), config=config, training=patchcl_log())
    taught = []

    def note(samples, settings, *rest):
        taught.append(samples)
        return train_on(samples, settings, *rest)

    train_on = selftrain.train_on
    monkeypatch.setattr(selftrain, "train_on", note)
    model = selftrain.train(crops, teacher, hide_progress)
    first, second = taught
    for before, after in zip(first, second, strict=True):
        np.testing.assert_array_equal(before.target, after.target)
    assert model.training.nucleus_fraction > 0


def test_batches_made_ahead_are_those_of_one_core(monkeypatch):
    """In their order, and equal: so are the weights, whatever the number of cores."""
    images, ground_truths = nuclei_images(2)
    normaliser = StainNormaliser.fit(images)
    samples = [
        TrainingSample(normaliser.apply(image), targets(labels, labels == 0))
        for image, labels in zip(images, ground_truths, strict=True)
    ]
    quick = replace(CONFIG, steps=6, crop_px=32, widths=(2, 2, 2))
    found = []
    for cores in (1, 8):
        monkeypatch.setattr("dask.system.cpu_count", lambda cores=cores: cores)
        found.append(selftrain.train_on(samples, quick, 3, lambda *_: None))
    assert found[0].loss == found[1].loss
    assert len(set(found[0].loss)) == 6
    other = selftrain.train_on(samples, quick, 4, lambda *_: None)
    assert other.loss != found[0].loss


@pytest.mark.parametrize(("cores", "ahead"), [(1, False), (2, False), (3, True), (8, True)])
def test_batches_are_made_ahead_where_the_network_leaves_cores(monkeypatch, cores, ahead):
    monkeypatch.setattr("dask.system.cpu_count", lambda: cores)
    monkeypatch.setattr(supervision, "device", lambda: torch.device("cpu"))
    made = [*supervision.made_ahead(lambda step: (step, threading.get_ident()), 9)]
    assert [step for step, _ in made] == [*range(9)]
    assert all((thread != threading.get_ident()) == ahead for _, thread in made)


def test_the_nuclei_of_a_network_and_all_else_as_background_are_its_pseudo_labels():
    rgb = np.full((80, 80, 3), (225, 180, 205), np.uint8)
    ground_truth = discs((80, 80), [(25, 20, 8), (50, 60, 9)])
    rgb[ground_truth > 0] = (110, 70, 150)
    crops = crops_of([rgb])
    model = Model(network=Halves(), config=BY_TORCH, threshold=0.65)
    ((stains, labels),) = selftrain.pseudo_labelled(crops, model, lambda *_: None)
    np.testing.assert_array_equal(stains, crops.normalisers[0].apply(rgb))
    # The mean over four turns is 0.7 everywhere; at one turn, half of the nuclei would be missing.
    assert Overlaps.of_labels(labels.nuclei, ground_truth).f1 == 1
    np.testing.assert_array_equal(labels.background, labels.nuclei == 0)


def test_several_nuclei_in_one_are_no_pseudo_label_unless_a_network_is_very_sure(monkeypatch):
    rgb = np.full((60, 160, 3), (225, 180, 205), np.uint8)
    three = [(20, 125, 9), (36, 125, 9), (36, 141, 9)]
    nuclei = discs((60, 160), [(20, 15, 9), (45, 15, 9), (30, 60, 14), (30, 90, 9), *three])
    nuclei = np.minimum(nuclei, 5)  # three in one; the third is as large
    rgb[nuclei > 0] = (110, 70, 150)
    monkeypatch.setattr(selftrain, "instances", lambda *_: nuclei)
    crops, without = crops_of([rgb]), np.where(nuclei < 5, nuclei, 0)

    def taught(probability, **settings):
        config = replace(BY_TORCH, cdcl=CDCLConfig(**settings))
        model = Model(network=Halves(), config=config, threshold=0.65)
        model = calibrated_to(probability)(model)
        ((_, labels),) = selftrain.pseudo_labelled(crops, model, lambda *_: None)
        return labels

    for probability, expected in [(0.59, 0 * nuclei), (0.61, without), (0.79, without)]:
        np.testing.assert_array_equal(taught(probability).nuclei, expected)
    np.testing.assert_array_equal(taught(0.81).nuclei, nuclei)
    np.testing.assert_array_equal(taught(0.79).background, taught(0.81).background)
    np.testing.assert_array_equal(taught(0.61, min_solidity=0).nuclei, nuclei)
    np.testing.assert_array_equal(taught(0.61, large_area=9).nuclei, nuclei)
    np.testing.assert_array_equal(taught(0.95, min_probability_of_several=1).nuclei, without)


def test_what_a_network_finds_in_an_artefact_is_taught_as_background():
    nuclei = discs((60, 110), [(30, 20, 8), (30, 60, 8), (30, 90, 8)])
    artefacts = np.zeros((60, 110), bool)
    artefacts[:, 55:84] = True  # all of the second nucleus, and a piece of the third
    stains, _ = tissue(nuclei)
    nothing = PseudoLabels(0 * nuclei, artefacts, artefacts, clumps=1 * artefacts)
    found = LabelledCrop(stains, PseudoLabels(nuclei, nuclei == 0))
    labels = selftrain.without_artefacts(found, LabelledCrop(stains, nothing)).labels
    np.testing.assert_array_equal(labels.nuclei > 0, (nuclei == 1) | (nuclei == 3))
    assert len(np.unique(labels.nuclei)) == 3
    beside = (nuclei == 2) & ~artefacts  # what is left of the second one is unlabelled
    np.testing.assert_array_equal(labels.background, (labels.nuclei == 0) & ~beside)
    assert labels.artefacts is artefacts  # for the next round
    assert labels.clumps is nothing.clumps
    outside = selftrain.outside_artefacts(found, LabelledCrop(stains, nothing))
    np.testing.assert_array_equal(outside, labels.nuclei)
    assert selftrain.without_artefacts(found, found) is found


def test_a_component_of_two_nuclei_is_separated_and_one_nucleus_is_not():
    two = discs((60, 110), [(30, 25, 8), (30, 39, 8)]) > 0
    one = discs((60, 110), [(30, 80, 8)]) > 0
    labels = separated((two * 1 + one * 2).astype(np.int32), MPP)
    assert labels.max() == 3
    assert labels[30, 25] != labels[30, 39]
    assert len(np.unique(labels[one])) == 1
    np.testing.assert_array_equal(labels > 0, two | one)  # no pixel is lost


def test_components_that_touch_stay_apart():
    labels = np.zeros((40, 60), np.int32)
    labels[10:30, 10:25], labels[10:30, 25:40] = 1, 2  # one square block
    found = separated(labels, MPP)
    assert not np.intersect1d(found[labels == 1], found[labels == 2]).size
    np.testing.assert_array_equal(found > 0, labels > 0)


def touching_scene():
    """Stains and pseudo-labels of twelve nuclei that lie apart, in background."""
    centres = [(row, col, 7) for row in (20, 60, 100) for col in (20, 60, 100, 140)]
    nuclei = discs((120, 160), centres)
    stains, _ = tissue(nuclei)
    return stains, PseudoLabels(nuclei, nuclei == 0)


def test_pasted_nuclei_touch_others_and_have_the_outlines_of_their_originals():
    stains, labels = touching_scene()
    kept = stains.copy(), labels.nuclei.copy(), labels.background.copy()
    pasted, found = with_touching_nuclei(stains, labels, 0.5, np.random.default_rng(0))
    for before, now in zip(kept, (stains, labels.nuclei, labels.background), strict=True):
        np.testing.assert_array_equal(before, now)  # what was given stays
    new = found.nuclei.max() - 12
    assert 1 <= new <= 6
    np.testing.assert_array_equal(found.background, found.nuclei == 0)
    sizes = np.bincount(found.nuclei.ravel())[1:]
    whole = np.bincount(labels.nuclei.ravel())[1:]
    assert sizes[-1] in whole  # the last one covers others, and nothing covers it
    bordered = 0
    for label in range(13, found.nuclei.max() + 1):
        around = ndimage.binary_dilation(found.nuclei == label, iterations=2)
        bordered += bool(set(np.unique(found.nuclei[around])) - {0, label})
    assert bordered >= new - 1  # beside another nucleus, or on a nucleus that it hides
    changed = np.abs(pasted - stains).max(axis=-1) > 1e-3
    assert not changed[ndimage.binary_dilation(found.nuclei > 0, iterations=4) == 0].any()
    again = with_touching_nuclei(stains, labels, 0.5, np.random.default_rng(0))
    np.testing.assert_array_equal(again[1].nuclei, found.nuclei)


def test_a_nucleus_that_a_copy_hides_is_unlabelled():
    stains, labels = touching_scene()
    for seed in range(20):
        _, found = with_touching_nuclei(stains, labels, 3.0, np.random.default_rng(seed))
        assert not (found.background & (found.nuclei > 0)).any()
        sizes = np.bincount(found.nuclei.ravel())[1:]
        assert (sizes > 0).all()
        original = labels.nuclei > 0
        assert not found.background[original].any()


def test_a_crop_with_few_clear_nuclei_stays_as_it_is():
    nuclei = discs((80, 80), [(20, 20, 7), (60, 60, 7)])
    labels = PseudoLabels(nuclei, nuclei == 0)
    stains, _ = tissue(nuclei)
    same = with_touching_nuclei(stains, labels, 0.5, np.random.default_rng(0))
    assert same[0] is stains
    assert same[1] is labels


def test_nuclei_are_pasted_into_every_other_crop():
    stains, labels = touching_scene()
    crops = [LabelledCrop(stains, labels)] * 4
    samples = selftrain.training_samples(crops, 0.5, 0)
    changed = [not np.array_equal(sample.stains, stains) for sample in samples]
    assert changed == [False, True, False, True]
    samples = selftrain.training_samples(crops, 0.0, 0)
    assert all(np.array_equal(sample.target, samples[0].target) for sample in samples)


def test_the_average_of_weights_keeps_more_with_each_step_and_at_most_99_percent():
    network = torch.nn.BatchNorm1d(1)
    average = ema_model(network, warmup_steps=2)
    mean = 0.0
    for step in range(200):
        with torch.no_grad():
            network.weight.fill_(step)
            network.running_mean.fill_(step)
            network.num_batches_tracked.fill_(step)
        average.update_parameters(network)
        decay = min(0.99, 1 - 1 / (step + 2)) if step else 0  # the first is a copy
        mean = decay * mean + (1 - decay) * step
        found = average.module
        assert found.weight.item() == pytest.approx(mean, rel=1e-4)
        assert found.running_mean.item() == pytest.approx(mean, rel=1e-4)
        assert found.num_batches_tracked.item() == step


def test_the_learning_rate_warms_up_and_falls_to_0():
    settings = SelfTrainConfig(steps=100, learning_rate=1.0)
    rates = [selftrain.learning_rate(step, settings) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 20)
    assert max(rates) == pytest.approx(max(rates[17:21]))
    assert rates[50] == pytest.approx(0.5)
    assert rates[100] == pytest.approx(0)


def test_batches_are_small_in_the_first_steps_and_large_in_the_last(monkeypatch):
    """Those of the first network are all small."""
    images, _ = nuclei_images(2)
    quick = replace(CONFIG, first_steps=3, steps=5, widths=(2, 2, 2), crop_px=32, batch=6)
    quick = replace(quick, first_batch=2, small_batches=0.6, cdcl_steps=0)
    config = replace(BY_TORCH, selftrain=quick)
    teacher = Model(network=Prediction(), config=config, training=patchcl_log())
    sizes = []

    def note(stains):
        sizes.append(len(stains))
        return to_batch(stains)

    to_batch = selftrain.to_batch
    monkeypatch.setattr(selftrain, "to_batch", note)
    monkeypatch.setattr("dask.system.cpu_count", lambda: 1)  # batches are made in their order
    selftrain.train(crops_of(images), teacher, hide_progress)
    of_stains_and_targets = np.array(sizes).reshape(-1, 2)
    assert (of_stains_and_targets[:, 0] == of_stains_and_targets[:, 1]).all()
    assert of_stains_and_targets[:, 0].tolist() == [2, 2, 2, 2, 2, 2, 6, 6]


@pytest.mark.parametrize(("fraction", "small"), [(0.0, 0), (0.25, 25), (1.0, 100)])
def test_the_fraction_of_small_batches_is_that_of_all_steps(fraction, small):
    settings = SelfTrainConfig(steps=100, first_batch=3, batch=7, small_batches=fraction)
    sizes = [selftrain.batch_size(step, settings) for step in range(100)]
    assert sizes == [3] * small + [7] * (100 - small)


def test_first_batches_are_never_larger_than_the_last():
    """Also where only these were made smaller, or a model is from before there were others."""
    settings = SelfTrainConfig(steps=10, batch=2)
    assert {selftrain.batch_size(step, settings) for step in range(10)} == {2}


def test_crops_are_of_one_slide_by_its_id_and_not_by_its_stains():
    """Two slides may have equal normalisers; samples stay in the order of the crops."""
    ground_truth = discs((120, 160), [(30, 30, 8), (60, 100, 10), (95, 50, 6), (25, 120, 9)])
    rgb = np.full((120, 160, 3), (225, 180, 205), np.uint8)
    rgb[ground_truth > 0] = (110, 70, 150)
    images = (rgb, rgb[:, :80], rgb[::-1])
    normaliser = StainNormaliser.fit(images)
    teacher = Model(network=Prediction(), config=BY_TORCH)
    done = []
    crops = crops_of(images, normaliser, ("1", "2", "1"))
    labelled = selftrain.pseudo_labelled(crops, teacher, lambda *n: done.append(n))
    assert done == [(2, 3), (3, 3)]
    for crop, image in zip(labelled, images, strict=True):
        np.testing.assert_array_equal(crop.stains, normaliser.apply(image))


def test_no_nucleus_to_train_on_is_an_error():
    blank = np.full((200, 200, 3), 240, np.uint8)
    normaliser = StainNormaliser.fit(nuclei_images(1)[0])
    teacher = Model(network=Prediction(), config=BY_TORCH, training=patchcl_log())
    with pytest.raises(TrainingError, match="no clear nucleus was found"):
        selftrain.train(crops_of([blank], normaliser), teacher, hide_progress)
