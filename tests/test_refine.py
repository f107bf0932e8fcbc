"""CDCL's losses worked by hand; corrected ROIs as training samples; and refinement with them."""

import json
import math
import os
import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from click.testing import CliRunner
from msgspec import structs
from slides import scene, write_tiff
from test_network import selftraining_log
from test_selftrain import nuclei_images

from patchcl_qupath import cli, library, pipeline
from patchcl_qupath.config import CORRECTED, CDCLConfig, Config, from_dict
from patchcl_qupath.correction import labels
from patchcl_qupath.datatypes import Box, Corrections, ImageEntry
from patchcl_qupath.errors import ConfigError, ImageError, TrainingError
from patchcl_qupath.evaluation.metrics import Overlaps
from patchcl_qupath.models.model import Model, confidence
from patchcl_qupath.models.network import ConfidenceNetwork, NucleusNetwork
from patchcl_qupath.project import drawn, open_project
from patchcl_qupath.segmentation.instances import instances
from patchcl_qupath.slides.prepare import TrainingCrops, prepare
from patchcl_qupath.slides.stains import StainNormaliser
from patchcl_qupath.storage.geojson import read_objects
from patchcl_qupath.storage.records import CDCLLog, SelfTrainingLog
from patchcl_qupath.training import cdcl, selftrain
from patchcl_qupath.training.pseudo_labels import PseudoLabels
from patchcl_qupath.training.selftrain import LabelledCrop
from patchcl_qupath.training.supervision import TrainingSample, distillation_loss, targets

SAMPLE = Path(__file__).parent.parent / "sample_project"
SLIDE = SAMPLE / "CMU-1-Small-Region.svs"
CONFIG = CDCLConfig()
WIDTHS = Config().selftrain.widths
BRIEF = replace(Config().selftrain, steps=120, crop_px=64, widths=(8, 12, 16))  # for discs


# ---------------------------------------------------------------- losses


def test_consistency_counts_only_where_the_teacher_is_confident():
    probability = torch.tensor([0.95, 0.02, 0.6, 0.4]).view(1, 1, 1, 4)
    logits = torch.tensor([2.0, -1.0, -9.0, 9.0]).view(1, 1, 1, 4)
    expected = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-1))) / 2
    assert cdcl.consistency(logits, probability, CONFIG).item() == pytest.approx(expected)
    assert cdcl.consistency(logits, 0 * probability + 0.5, CONFIG).item() == 0


def test_entropy_is_that_of_a_coin():
    assert cdcl.entropy(torch.zeros(3)).item() == pytest.approx(math.log(2))
    assert cdcl.entropy(torch.tensor([30.0, -30.0])).item() == pytest.approx(0, abs=1e-6)


def test_contrast_of_a_case_worked_by_hand():
    """A patch of nucleus, one of background, and an impure one; a bank of one of each kind."""
    points = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0, 1], [1, 1]]), dim=1)
    teacher = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [0.2, 1], [1, 1]]), dim=1)
    fraction = torch.tensor([1.0, 0.0, 0.5])
    bank = cdcl.MemoryBank(CONFIG)
    assert cdcl.contrast(points, teacher, fraction, bank, CONFIG).item() == 0  # no negatives yet
    torch.testing.assert_close(bank.points(True), teacher[:1])
    torch.testing.assert_close(bank.points(False), teacher[1:2])

    loss = cdcl.contrast(points, teacher, fraction, bank, CONFIG)
    terms = []
    for own, other in ((0, 1), (1, 0)):
        positive = float(points[own] @ teacher[own]) / 0.1
        negative = float(points[own] @ teacher[other]) / 0.1
        terms.append(math.log(1 + math.exp(negative - positive)))
    assert loss.item() == pytest.approx(sum(terms) / 2, rel=1e-2)
    assert bank.points(True).shape == (2, 2)


def test_bank_forgets_the_oldest():
    bank = cdcl.MemoryBank(replace(CONFIG, bank_steps=2, bank_patches=3))
    for step in range(4):
        bank.add(torch.full((5, 2), float(step)), is_nucleus=True)
    bank.add(torch.zeros(0, 2), is_nucleus=True)
    assert bank.points(True)[:, 0].tolist() == [2, 2, 2, 3, 3, 3]
    assert bank.points(False) is None


def test_patches_are_unit_vectors_in_the_order_of_their_fractions():
    coarse = torch.zeros(2, 3, 4, 6)
    coarse[0, 0], coarse[1, 1] = 5, 7
    coarse[1, :, :2, 4:] = torch.tensor([0.0, 0, 3]).view(3, 1, 1)
    found = cdcl.patches(coarse, CONFIG)  # of 8 px: 2 x 2 of the coarse map
    assert found.shape == (2 * 2 * 3, 3)
    assert found[:6].argmax(dim=1).tolist() == [0] * 6
    assert found[6:].argmax(dim=1).tolist() == [1, 1, 2, 1, 1, 1]
    torch.testing.assert_close(found.norm(dim=1), torch.ones(12))


# ---------------------------------------------------------------- refinement


def test_corrections_improve_a_model_beyond_its_pseudo_labels():
    """Nuclei are the large discs alone; the model that refinement begins with finds small ones."""
    images, ground_truths = nuclei_images(6)
    normaliser = StainNormaliser.fit(images)
    large = []
    for ground_truth in ground_truths:
        area = np.bincount(ground_truth.ravel())
        keep = area >= np.median(area[1:])
        keep[0] = False
        large.append(np.where(keep[ground_truth], ground_truth, 0).astype(np.int32))
    config = replace(
        Config(),
        selftrain=BRIEF,
        cdcl=replace(CONFIG, steps=80, crop_px=64, pseudo_weight=0.0, distillation_steps=40),
    )
    training_samples = [
        TrainingSample(normaliser.apply(i), targets(t, t == 0))
        for i, t in zip(images, ground_truths, strict=True)
    ]
    trained = selftrain.train_on(training_samples[:4], config.selftrain, 0, lambda *_: None)
    start = Model(network=trained.network, config=config, training=selftraining_log())
    corrected = [TrainingSample(normaliser.apply(images[0]), targets(large[0], large[0] == 0))]
    steps, teachers = [], []

    def pseudo_labelled(model):
        teachers.append(model)
        return training_samples[1:4]

    tissue = [without_labels(sample) for sample in training_samples[1:4]]
    samples = corrected, pseudo_labelled, lambda: tissue
    refined = cdcl.refine(start, *samples, lambda *step: steps.append(step))
    assert steps == [(step, 200) for step in range(1, 201)]
    assert len(refined.training.cdcl) == 160
    assert len(refined.training.distillation) == 40
    assert refined.training.refined_from == start.digest != refined.digest
    assert refined.training.patchcl == start.training.patchcl
    of_rounds, at_end = refined.training.cdcl[-1], refined.training.distillation[-1]
    assert set(of_rounds) == {"labelled", "pseudo", "consistency", "entropy", "contrast"}
    assert set(at_end) == {"labelled", "distillation"}
    assert all(math.isfinite(value) for value in (of_rounds | at_end).values())

    def score(model):
        found = confidence(model, images[5], normaliser)
        predicted = instances(found.nucleus, 0.5, config.segment, 0.5, found.core)
        return Overlaps.of_labels(predicted, large[5]).aji

    first, second = teachers
    assert first is start
    assert start.digest != second.digest != refined.digest
    assert score(refined) > score(start)
    few = replace(config.cdcl, steps=8, distillation_steps=8)
    few = replace(start, config=replace(config, cdcl=few))
    one, other = (cdcl.refine(few, *samples, lambda *step: None).digest for _ in range(2))
    assert one == other != few.digest


def without_labels(sample):
    """A sample in which nobody drew anything."""
    return sample._replace(target=np.zeros_like(sample.target))


def test_a_network_is_fitted_to_a_roi_and_held_elsewhere():
    """The person takes all nuclei of one image for background: nothing else is to change."""
    images, ground_truths = nuclei_images(3)
    normaliser = StainNormaliser.fit(images)
    samples = [
        TrainingSample(normaliser.apply(i), targets(t, t == 0))
        for i, t in zip(images, ground_truths, strict=True)
    ]
    trained = selftrain.train_on(samples, BRIEF, 0, lambda *_: None)
    # Stains of the image that is corrected are like no other: a network can tell it from these.
    odd = samples[0]._replace(stains=samples[0].stains[..., ::-1].copy())
    odd = odd._replace(target=targets(np.zeros_like(ground_truths[0]), ground_truths[0] >= 0))
    tissue = [odd, *map(without_labels, samples[1:])]

    def changes(weight):
        """The mean probability where nothing is, before and after; and by how much others change"""
        few = replace(CONFIG, rounds=1, steps=1, crop_px=64)
        settings = replace(few, distillation_steps=100, distillation_weight=weight)
        config = replace(Config(), selftrain=BRIEF, cdcl=settings)
        start = Model(network=trained.network, config=config, training=selftraining_log())
        fitted = cdcl.refine(start, [odd], lambda _: samples, lambda: tissue, lambda *_: None)
        stains = torch.tensor(np.stack([odd.stains, samples[1].stains])).permute(0, 3, 1, 2)
        with torch.no_grad():
            before, after = (
                torch.sigmoid(model.network.eval()(stains))[:, 0] for model in (start, fitted)
            )
        return before[0].mean(), after[0].mean(), (after[1] - before[1]).abs().mean()

    before, after, elsewhere = changes(CONFIG.distillation_weight)
    assert after < 0.5 * before
    assert elsewhere < 0.5 * changes(0.0)[2]


def test_distillation_is_to_labels_where_there_are_some():
    """A labelled pixel of nucleus, one of background, and two that are the teacher's."""
    probability = torch.full((1, 2, 1, 4), 0.25)
    target = torch.tensor([[1.0, 0, 1, 0], [1, 0, 1, 0], [1, 1, 0, 0]]).view(1, 3, 1, 4)
    logits = torch.full((1, 2, 1, 4), 2.0)
    nucleus, background = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    teacher = 0.25 * nucleus + 0.75 * background
    expected = 2 * (nucleus + background + 2 * teacher) / 4  # of both channels
    found = distillation_loss(logits, probability, target)
    assert found.item() == pytest.approx(expected)


def test_without_labels_a_model_learns_from_what_it_is_sure_of():
    rng = np.random.default_rng(0)
    labels = np.zeros((64, 64), np.int32)
    labels[8:24, 8:24], labels[36:60, 36:60] = 1, 2
    stains = rng.random((64, 64, 3), np.float32)
    config = replace(Config(), cdcl=replace(CONFIG, steps=6))
    network = NucleusNetwork((2, 2, 2)).eval()
    start = Model(network=network, config=config, training=selftraining_log())
    sure = [TrainingSample(stains, targets(labels, labels == 0))]
    one, other = (
        cdcl.refine_without_labels(start, lambda _: sure, lambda *_: None) for _ in range(2)
    )
    assert start.digest != one.digest == other.digest
    assert isinstance(one.training, SelfTrainingLog)
    assert not isinstance(one.training, CDCLLog)  # nobody corrected it
    assert len(one.training.unlabelled_cdcl) == 12  # in two rounds
    names = set().union(*one.training.unlabelled_cdcl)
    assert names == {"pseudo", "consistency", "entropy", "contrast"}  # nothing is labelled


def test_rounds_without_labels_end_where_nothing_is_sure():
    rng = np.random.default_rng(0)
    labels = np.zeros((64, 64), np.int32)
    labels[8:24, 8:24] = 1
    stains = rng.random((64, 64, 3), np.float32)
    config = replace(Config(), cdcl=replace(CONFIG, steps=3))
    network = NucleusNetwork((2, 2, 2)).eval()
    start = Model(network=network, config=config, training=selftraining_log())

    def sure(model):
        models.append(model)
        return [TrainingSample(stains, targets(labels, labels == 0))] if len(models) == 1 else []

    models = []
    once = cdcl.refine_without_labels(start, sure, lambda *_: None)
    assert len(models) == 2
    assert models[0] is start
    assert start.digest != once.digest == models[1].digest
    assert len(once.training.unlabelled_cdcl) == 3
    none = cdcl.refine_without_labels(start, lambda _: [], lambda *_: None)
    assert none.digest == start.digest
    assert none.training.unlabelled_cdcl == []


def test_trainings_that_diverge_are_errors():
    """Else a model would be saved that finds nothing."""
    rng = np.random.default_rng(0)
    labels = np.zeros((64, 64), np.int32)
    labels[8:24, 8:24] = 1
    samples = [TrainingSample(rng.random((64, 64, 3), np.float32), targets(labels, labels == 0))]
    brief = replace(Config().selftrain, steps=4, widths=(2, 2, 2), learning_rate=1e35)
    with pytest.raises(TrainingError, match=r"diverged: lower selftrain\.learning_rate"):
        selftrain.train_on(samples, brief, 0, lambda *_: None)
    config = replace(Config(), cdcl=replace(CONFIG, steps=4, learning_rate=1e35))
    network = NucleusNetwork((2, 2, 2)).eval()
    start = Model(network=network, config=config, training=selftraining_log())
    with pytest.raises(TrainingError, match=r"diverged: lower cdcl\.learning_rate"):
        cdcl.refine(start, samples, lambda _: samples, lambda: samples, lambda *_: None)


def test_a_refined_model_is_the_same_with_any_number_of_cores(monkeypatch):
    """Batches are made one after the other, or ahead: their random numbers are those of a step."""
    rng = np.random.default_rng(0)
    labels = np.zeros((64, 64), np.int32)
    labels[8:24, 8:24], labels[32:60, 32:48] = 1, 2
    stains = rng.random((64, 64, 3), np.float32)
    samples = [TrainingSample(stains, targets(labels, labels == 0))]
    config = replace(Config(), cdcl=replace(CONFIG, steps=4, distillation_steps=4))
    network = NucleusNetwork((2, 2, 2)).eval()
    start = Model(network=network, config=config, training=selftraining_log())
    digests = []
    for cores, seed in ((1, 5), (8, 5), (8, 6)):
        monkeypatch.setattr("dask.system.cpu_count", lambda cores=cores: cores)
        refined = cdcl.refine(
            start, samples, lambda _: samples, lambda: samples, lambda *_: None, seed
        )
        digests.append(refined.digest)
    assert digests[0] == digests[1] != digests[2]


# ---------------------------------------------------------------- ROIs


ROI = shapely.box(400, 500, 900, 1000)
INSIDE = shapely.Point(600, 700).buffer(15)
ACROSS = shapely.Point(900, 800).buffer(20)  # half of it in the ROI
OUTSIDE = shapely.Point(1200, 800).buffer(20)


def prepared():
    return prepare(ImageEntry("1", SLIDE.name, SLIDE), Config())


def test_a_roi_labels_all_its_pixels_and_no_others():
    triangle = shapely.Polygon([(1000, 1000), (1600, 1000), (1000, 1600)])
    corrections = Corrections((ROI, triangle), (INSIDE, ACROSS, OUTSIDE))
    (stains, target), (_, other) = labels.training_samples(prepared(), corrections)
    nucleus, core, valid = np.moveaxis(target, -1, 0)
    assert stains.shape == target.shape == (500, 500, 3)  # 0.499 um/px is read as it is
    assert valid.all()
    expected = INSIDE.area + (ACROSS & ROI).area
    assert nucleus.sum() == pytest.approx(expected, rel=0.01)
    assert nucleus[200, 200] == core[200, 200] == 1
    assert nucleus[200, 218] == 0
    assert other[..., 2].mean() == pytest.approx(0.5, abs=0.01)
    assert other[10, 10, 2] == 1
    assert other[-10, -10, 2] == 0
    assert not other[..., 0].any()


@pytest.mark.parametrize("edge", [700.0, 700.6])
def test_a_nucleus_that_a_roi_cuts_has_the_core_of_the_whole(edge):
    """A ROI's edge may lie between pixels, within its box, or be the edge of its box."""
    nucleus = shapely.Point(700, 750).buffer(14)
    found = []
    for roi in (shapely.box(500.5, 600.5, edge, 900.5), shapely.box(500.5, 600.5, 900.5, 900.5)):
        ((_, target),) = labels.training_samples(prepared(), Corrections((roi,), (nucleus,)))
        found.append(target)
    cut, whole = found
    inside = cut[..., 2] > 0
    assert inside[150].sum() == pytest.approx(edge - 500.5, abs=1)
    assert cut[..., 1].sum() > 50
    assert np.array_equal(cut[inside], whole[:, : cut.shape[1]][inside])


def pseudo_labelled_crop(box, discs):
    """A crop with pseudo-labels: discs (row, col, radius) of the crop, all else is background."""
    rows, cols = np.mgrid[: box.shape[0], : box.shape[1]]
    nuclei = np.zeros(box.shape, np.int32)
    for k, (row, col, radius) in enumerate(discs, start=1):
        nuclei[(rows - row) ** 2 + (cols - col) ** 2 < radius**2] = k
    return LabelledCrop(np.zeros((*box.shape, 3), np.float32), PseudoLabels(nuclei, nuclei == 0))


def test_in_corrected_rois_the_labels_of_crops_are_those_of_the_person():
    box = Box(600, 700, 1000, 1100)  # rows 600 to 1000, columns 700 to 1100: the ROI ends at 900
    blank = np.zeros((*box.shape, 3), np.uint8)
    crops = TrainingCrops((blank,) * 2, (None,) * 2, ("1", "2"), (box,) * 2)
    wrong, reaching, right = (100, 100, 20), (350, 200, 25), (100, 300, 20)
    crop = pseudo_labelled_crop(box, [wrong, reaching, right])
    corrections = Corrections(
        (ROI,), (ACROSS, OUTSIDE), ignored=(shapely.box(700, 900, 750, 1000),)
    )
    found, other = labels.corrected_crops([crop] * 2, crops, [(prepared(), corrections)])
    assert other is crop  # of another slide
    nuclei, background = found.labels.nuclei, found.labels.background
    assert len(np.unique(nuclei)) == 3  # one drawn, and one pseudo-labelled outside the ROI
    assert nuclei[200, 200 - 15] == nuclei[200, 200 + 15] > 0  # drawn; on both sides of the border
    assert nuclei[100, 300] == 3
    assert (nuclei == nuclei[200, 200]).sum() == pytest.approx(ACROSS.area, rel=0.02)
    assert nuclei[100, 100] == 0
    assert background[100, 100]
    assert background[350, 190]
    assert not nuclei[350, 210]
    assert not background[350, 210]  # the rest of a pseudo-labelled nucleus
    assert background[390, 300]
    assert not background[350, 20]  # the person left it open
    assert crop.labels.nuclei[100, 100] == 1  # as it was


def test_what_a_person_drew_is_all_that_is_labelled_in_crops():
    """What is drawn in the ROI, and the whole of a nucleus that reaches out of it."""
    box = Box(600, 700, 1000, 1100)  # the ROI ends at column 900
    image = np.full((*box.shape, 3), 200, np.uint8)
    normaliser = StainNormaliser((0.0,) * 3, (1.0,) * 3)
    crops = TrainingCrops((image,) * 2, (normaliser,) * 2, ("1", "2"), (box,) * 2)
    ignored = shapely.box(700, 900, 750, 1000)
    corrections = Corrections((ROI,), (ACROSS, OUTSIDE), ignored=(ignored,))
    found, other = labels.drawn_samples(crops, [(prepared(), corrections)])
    assert not other.target.any()  # of another slide
    assert np.array_equal(found.stains, normaliser.apply(image))
    assert found.nucleus.sum() == pytest.approx(ACROSS.area, rel=0.02)
    in_roi = (ROI & shapely.box(700, 600, 1100, 1000)) - ignored
    assert found.valid.sum() == pytest.approx((in_roi | ACROSS).area, rel=0.01)


def test_crops_of_a_duplicate_have_what_was_drawn_on_either():
    """QuPath duplicates an image for another person; the slide beside it is another one."""
    one, copy, last = (ImageEntry(id_, id_, SLIDE) for id_ in "123")
    beside = replace(one, id="4", series=1)
    far, near = shapely.box(1500, 600, 1800, 900), shapely.box(600, 700, 1000, 1100)
    drawn = [
        (prepared(), Corrections((ROI,), (INSIDE, ACROSS))),
        (
            replace(prepared(), id="2"),
            Corrections((near, far), (ACROSS, shapely.Point(1600, 700).buffer(9))),
        ),
    ]
    found = labels.with_copies(drawn, [one, copy, last, beside])
    assert [image.id for image, _ in found] == ["1", "2", "3"]
    (_, first), (_, second), (_, third) = found
    # What is in ROIs of both is there once, and what is in one of them, too.
    assert shapely.equals(first.rois, (ROI, near - ROI, far)).all()
    assert first.nuclei == (INSIDE, ACROSS, drawn[1][1].nuclei[1])
    assert shapely.equals(second.rois, (near, far, ROI - near)).all()
    assert second.nuclei == (*drawn[1][1].nuclei, INSIDE)
    assert third == first


def test_what_another_person_deleted_beside_a_shared_strip_is_not_taught():
    """ROIs of two people that overlap a little: a crop of either image has both."""
    one, copy = (ImageEntry(id_, id_, SLIDE) for id_ in "12")
    left, right = shapely.box(600, 700, 800, 900), shapely.box(780, 700, 1000, 900)
    nucleus = shapely.Point(900, 760).buffer(16)
    drawn = [
        (prepared(), Corrections((left,), ())),
        (replace(prepared(), id="2"), Corrections((right,), (nucleus,))),
    ]
    images = labels.with_copies(drawn, [one, copy])
    box = Box(600, 500, 1000, 1100)
    image = np.full((*box.shape, 3), 200, np.uint8)
    normaliser = StainNormaliser((0.0,) * 3, (1.0,) * 3)
    crops = TrainingCrops((image,) * 2, (normaliser,) * 2, ("1", "2"), (box,) * 2)
    for sample in labels.drawn_samples(crops, images):
        assert sample.nucleus.sum() == pytest.approx(nucleus.area, rel=0.02)
        assert sample.valid.sum() == pytest.approx((left | right).area, rel=0.01)


@pytest.mark.parametrize(
    ("roi", "place"),
    [(shapely.box(400, 500, 420, 900), "410, y 700"), (shapely.box(-90, 0, -10, 90), "-50, y 45")],
)
def test_a_roi_that_is_too_small_or_outside_is_refused(roi, place):
    said = f"ROI at x {place} px is less than 16 µm wide, or outside the image: .* is a nucleus"
    with pytest.raises(ImageError, match=said):
        labels.training_samples(prepared(), Corrections((roi,), (INSIDE,)))


@pytest.mark.parametrize(
    ("nuclei", "agree"),
    [
        ((INSIDE, ACROSS), True),
        ((INSIDE.buffer(2), OUTSIDE), True),  # drawn by another hand; ACROSS is not in its ROI
        ((INSIDE.buffer(-8),), False),
        ((INSIDE, shapely.Point(520, 720).buffer(9)), False),
        ((shapely.Point(780, 700).buffer(15),), False),
    ],
)
def test_rois_of_two_images_of_one_slide_must_agree(nuclei, agree):
    one = prepared()
    # The second is cropped, and counts its pixels from there.
    two = replace(one, id="2", slide=replace(one.slide, origin=(100, 50)))
    moved = [shapely.transform(n, lambda xy: xy - (100, 50)) for n in nuclei]
    roi = shapely.box(400, 600, 790, 850)
    another = replace(two.slide, number=1)
    others = Corrections((roi,), (), ())
    labels.check_agreement(  # another image of the same file
        [(one, Corrections((ROI,), (INSIDE, ACROSS))), (replace(two, slide=another), others)]
    )
    corrections = Corrections((ROI,), (INSIDE, ACROSS))
    images = [(one, corrections), (two, Corrections((roi,), tuple(moved)))]
    for pair in (images, images[::-1]):
        if agree:
            labels.check_agreement(pair)
            continue
        message = rf"\(id {pair[0][0].id}\) and .*different nuclei at x"
        with pytest.raises(ImageError, match=message):
            labels.check_agreement(pair)
    aside = Corrections((shapely.box(900, 950, 1200, 1100),), (shapely.Point(1e3, 1e3).buffer(9),))
    labels.check_agreement([(one, corrections), (two, aside)])


def feature(geometry, name, **more):
    return {
        "type": "Feature",
        "geometry": json.loads(shapely.to_geojson(geometry)),
        "properties": {"objectType": "annotation", "classification": {"name": name}},
        **more,
    }


def export(folder, *features, image=1, **more):
    file = folder / "patchcl" / "labels" / f"{image}.geojson"
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"type": "FeatureCollection", "features": features, "patchcl": more}
    file.write_text(json.dumps(content), "utf-8")


def test_labels_are_read(folder):
    project = open_project(folder, "files")
    (entry,) = project.images()
    assert project.corrections(entry, "Done") == Corrections()
    cell = feature(shapely.Point(800, 900).buffer(30), "Tumor")
    cell["nucleusGeometry"] = json.loads(shapely.to_geojson(shapely.box(790, 890, 810, 910)))
    line = feature(shapely.LineString([(0, 0), (9, 9)]), "Nucleus")
    export(folder, feature(ROI, "Done"), feature(INSIDE, "Nucleus"), cell, line)
    found = project.corrections(entry, "Done")
    assert [roi.area for roi in found.rois] == [ROI.area]
    assert [round(nucleus.area) for nucleus in found.nuclei] == [round(INSIDE.area), 400]


def test_a_file_of_labels_is_read_once(folder, monkeypatch):
    """It has all nuclei of all ROIs."""
    project = open_project(folder, "files")
    (entry,) = project.images()
    export(folder, feature(ROI, "Done"), feature(INSIDE, "Nucleus"), roi_class="Done")
    read = []
    monkeypatch.setattr(drawn, "read_objects", lambda path: read.append(path) or read_objects(path))
    assert len(project.corrections(entry, "Done").nuclei) == 1
    assert read == [project.layout.labels(entry.id)]


def test_labels_of_another_class_are_not_those_asked_for(folder):
    """Of a region that a corrected ROI lies in, the export has no other nuclei."""
    project = open_project(folder, "files")
    (entry,) = project.images()
    around = feature(ROI.buffer(2000), "Tumor")
    export(folder, feature(ROI, CORRECTED), around, feature(INSIDE, None), roi_class=CORRECTED)
    assert len(project.corrections(entry, CORRECTED).nuclei) == 1
    with pytest.raises(ImageError, match="not exported for ROIs of class Tumor: set roiClass to"):
        project.corrections(entry, "Tumor")


def test_labels_that_are_older_than_the_image_are_noted(folder):
    project = open_project(folder, "files")
    (entry,) = project.images()
    saved = folder / "data" / entry.id / "data.qpdata"
    saved.parent.mkdir(parents=True)
    saved.touch()
    export(folder, feature(ROI, "Done"), feature(INSIDE, "Nucleus"), roi_class="Done")
    os.utime(saved, ns=(1, 1))
    assert project.corrections(entry, "Done").notes == ()
    os.utime(saved, ns=(2**62, 2**62))
    (note,) = project.corrections(entry, "Done").notes
    assert note.startswith("its ROIs were exported before it was last saved in QuPath")


@pytest.mark.parametrize("saved", [1, 4])
def test_rois_that_are_missing_in_a_copied_export_are_noted(folder, saved):
    """Where a project is copied without the times of its files, an old export seems to be new."""
    project = open_project(folder, "files")
    (entry,) = project.images()
    summary = folder / "data" / entry.id / "summary.json"
    summary.parent.mkdir(parents=True)
    counts = {"hierarchy": {"annotationClassificationCounts": {"Done": saved}}}
    summary.write_text(json.dumps(counts), "utf-8")
    summary.with_name("data.qpdata").touch()
    export(folder, feature(ROI, "Done"), feature(INSIDE, "Nucleus"), roi_class="Done")
    os.utime(summary.with_name("data.qpdata"), ns=(1, 1))
    notes = project.corrections(entry, "Done").notes
    assert [note.split(":")[0] for note in notes] == [
        "4 ROIs of class Done are saved in QuPath, 1 were exported"
    ] * (saved == 4)
    export(folder, roi_class="Done")
    with pytest.raises(ImageError, match=f"{saved} ROIs of class Done were not exported: run"):
        project.corrections(entry, "Done")


def test_corrected_rois_that_were_not_exported_are_missed(folder):
    project = open_project(folder, "files")
    (entry,) = project.images()
    summary = folder / "data" / entry.id / "summary.json"
    summary.parent.mkdir(parents=True)
    counts = {"hierarchy": {"annotationClassificationCounts": {CORRECTED: 3}}}
    summary.write_text(json.dumps(counts), "utf-8")
    assert project.corrections(entry, "Done") == Corrections()
    with pytest.raises(ImageError, match=f"3 ROIs of class {CORRECTED} were not exported: run"):
        project.corrections(entry, CORRECTED)


@pytest.mark.parametrize("roi_class", [CORRECTED, "Done"])
def test_rois_that_were_corrected_after_the_export_are_missed(folder, roi_class):
    """The script exports all images, also those in which nothing is corrected yet."""
    project = open_project(folder, "files")
    (entry,) = project.images()
    export(folder, roi_class=roi_class)
    data = folder / "data" / entry.id / "data.qpdata"
    data.parent.mkdir(parents=True)
    data.touch()
    os.utime(data, ns=(1, 1))
    assert project.corrections(entry, roi_class) == Corrections()
    os.utime(data, ns=(2**62, 2**62))
    for count in (0, 3):
        counts = {"hierarchy": {"annotationClassificationCounts": {roi_class: count, "Tumor": 1}}}
        data.with_name("summary.json").write_text(json.dumps(counts), "utf-8")
        if not count:
            assert project.corrections(entry, roi_class) == Corrections()
    with pytest.raises(ImageError, match=f"3 ROIs of class {roi_class} were not exported: run"):
        project.corrections(entry, roi_class)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([feature(ROI, "Done")], "the ROI at x 650, y 750 px has no nuclei"),
        ([feature(ROI, "Done"), feature(OUTSIDE, "Nucleus")], "has no nuclei"),
        (
            [
                feature(ROI, "Done"),
                feature(INSIDE, "Nucleus"),
                feature(shapely.Point(605, 700).buffer(12), None),
            ],
            r"nuclei overlap in 1 places of the ROI .*: delete one of each.*: at x 60\d, y 700 px",
        ),
        ([{"geometry": 1}], "is damaged: run export_labels.groovy"),
    ],
)
def test_labels_that_cannot_be_trained_on_are_refused(folder, features, message):
    export(folder, *features)
    project = open_project(folder, "files")
    with pytest.raises(ImageError, match=message):
        project.corrections(project.images()[0], "Done")


def test_a_project_without_rois_is_refused(folder, model):
    project = open_project(folder, "files")
    with pytest.raises(TrainingError, match="no image has an annotation of class Done"):
        pipeline.refine(project, project.images(), model, "Done", lambda *_: None)


@pytest.mark.parametrize("command", [("run", "--retrain"), ("train",)])
@pytest.mark.parametrize("has_record", [True, False])
def test_a_refined_model_is_not_replaced_by_one_without_corrections(folder, command, has_record):
    losses = {"cdcl": [{"labelled": 1.0}], "refined_from": "x"}
    log = CDCLLog(**structs.asdict(selftraining_log()), **losses)
    refined = Model(network=NucleusNetwork(WIDTHS).eval(), config=Config(), training=log)
    path = refined.save(folder / "patchcl" / "models", "refined")
    if not has_record:  # of a model that was copied here alone
        path.with_suffix(".json").unlink()
    before = path.read_bytes()
    result = CliRunner().invoke(cli.main, [*command, str(folder), "--model", "refined"])
    assert result.exit_code == 2
    assert "the model refined was made by `patchcl-qp refine`" in result.output
    assert path.read_bytes() == before


def test_a_seed_of_a_model_that_is_there_is_refused(folder, monkeypatch):
    model = Model(network=NucleusNetwork(WIDTHS).eval(), config=Config())
    model.save(folder / "patchcl" / "models", "patchcl")
    result = CliRunner().invoke(cli.main, ["run", str(folder), "--seed", "3"])
    assert result.exit_code == 2
    assert "the model patchcl was trained with patchcl.seed 0, not 3: pass --retrain" in (
        result.output
    )
    assert "`patchcl-qp train --seed 3 --model NAME`" in result.output
    (folder / "patchcl" / "models" / "patchcl.pt").unlink()
    seeds = []

    def train_as(name, project, entries, config, progress):
        seeds.append(config.patchcl.seed)
        raise TrainingError("enough")

    monkeypatch.setattr(pipeline, "train_as", train_as)
    result = CliRunner().invoke(cli.main, ["run", str(folder), "--seed", "3"])
    assert result.exit_code == 1
    assert seeds == [3]


@pytest.mark.parametrize(
    ("settings", "unlike"),
    [
        ('recipe = "patchcl"', "recipe selftrain, not patchcl"),
        ("[selftrain]\nsteps = 2", "selftrain.steps 600, not 2"),
        ("[patchcl]\nexcess_weight = 3", "patchcl.local_contrast_weight 12.0, not 3.0"),  # of 0.1
    ],
)
@pytest.mark.parametrize("has_record", [True, False])
def test_settings_of_another_training_are_refused(
    folder, settings, unlike, has_record, monkeypatch
):
    """They were ignored without a word where a model is there."""
    model = Model(network=NucleusNetwork(WIDTHS).eval(), config=Config())
    path = model.save(folder / "patchcl" / "models", "patchcl")
    if not has_record:  # of a model that was copied here alone
        path.with_suffix(".json").unlink()
    file = folder / "settings.toml"
    file.write_text(settings, "utf-8")

    def stop(*_, **__):
        raise TrainingError("it went on")

    monkeypatch.setattr(cli, "_segmented", stop)
    monkeypatch.setattr(pipeline, "refine_as", stop)
    for command, advice in (
        ("run", "pass --retrain to train it anew"),
        ("refine", "leave that out of the settings"),
    ):
        command = [command, str(folder), "--config", str(file)]
        result = CliRunner().invoke(cli.main, command)
        assert result.exit_code == 2, result.output
        assert f"the model patchcl was trained with {unlike}: {advice}, or" in result.output
    retrained = CliRunner().invoke(
        cli.main, ["run", str(folder), "--config", str(file), "--retrain"]
    )
    assert "Error: it went on" in retrained.output
    with pytest.raises(ConfigError, match=f"the model was trained with {unlike}: leave that out"):
        library.segment(library.open_project(folder), model, settings=tomllib.loads(settings))


def test_settings_of_the_same_training_are_taken(folder, monkeypatch):
    """One file may be for the training and for the runs of its model."""
    given = {"recipe": "patchcl", "patchcl": {"dilations": [1, 2]}, "segment": {"min_area_um2": 9}}
    model = Model(network=NucleusNetwork(WIDTHS).eval(), config=from_dict(given))
    model.save(folder / "patchcl" / "models", "patchcl")
    file = folder / "settings.toml"
    text = 'recipe = "patchcl"\n[patchcl]\ndilations = [1, 2]\n[segment]\nmin_area_um2 = 5\n'
    file.write_text(text, "utf-8")
    areas = []

    def segmented(project, entries, settings, **_):
        areas.append(settings.segment.min_area_um2)
        raise TrainingError("enough")

    monkeypatch.setattr(cli, "_segmented", segmented)
    for options in (["--config", str(file)], []):
        CliRunner().invoke(cli.main, ["run", str(folder), *options])
    assert areas == [5, Config().segment.min_area_um2]


def test_a_model_is_refined_with_the_settings_that_are_asked_for(folder, tmp_path, monkeypatch):
    """Of [segment], it keeps its own where the file has no such table."""
    given = {"engine": "openvino", "cdcl": {"steps": 9}, "segment": {"min_area_um2": 9}}
    config = from_dict(given)
    network = NucleusNetwork(WIDTHS).eval()
    model = Model(network=network, config=config, training=selftraining_log())
    model.save(folder / "patchcl" / "models", "patchcl")
    some, more = tmp_path / "some.toml", tmp_path / "more.toml"
    some.write_text('engine = "torch"\n[cdcl]\nsteps = 7\n')
    more.write_text("[segment]\nmin_area_um2 = 5\n")
    taken = []

    def refine(project, entries, start, *_):
        config = start.config
        taken.append((config.engine, config.cdcl.steps, config.segment.min_area_um2))
        return start, {}

    monkeypatch.setattr(pipeline, "refine", refine)
    for options in ((), ("--config", str(some)), ("--config", str(more))):
        result = CliRunner().invoke(cli.main, ["refine", str(folder), *options])
        assert result.exit_code == 0, result.output
    assert taken == [("auto", CONFIG.steps, 9), ("torch", 7, 9), ("auto", CONFIG.steps, 5)]


def test_a_model_of_patchcl_alone_is_refused(folder, model):
    project = open_project(folder, "files")
    alone = replace(model, network=ConfidenceNetwork.of(Config().patchcl))
    with pytest.raises(ConfigError, match="cannot be refined: train one with recipe"):
        pipeline.refine(project, project.images(), alone, "Done", lambda *_: None)


def test_refine_run_and_status_from_the_command_line(folder, model):
    """A model is refined beside the first, and either can be run."""
    model.save(folder / "patchcl" / "models", "patchcl")
    line = feature(shapely.LineString([(450, 550), (500, 600)]), "Note")
    nuclei = (feature(INSIDE, "Nucleus"), feature(ACROSS, "Nucleus"))
    export(folder, feature(ROI, "Done"), *nuclei, line)
    settings = folder / "settings.toml"
    settings.write_text("[cdcl]\nsteps = 6\ndistillation_steps = 6\n", "utf-8")

    def call(*arguments):
        result = CliRunner().invoke(cli.main, [*map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result

    before = (folder / "patchcl" / "models" / "patchcl.pt").read_bytes()
    shown = call("refine", folder, "--labels-from", "Done", "--config", settings)
    assert "--model refined" in shown.stdout
    assert "is replaced" not in shown.stderr
    assert f"Corrected: {SLIDE.name}: 1 ROI with 2 nuclei; no nuclei, left out: 1 line" in (
        shown.stdout
    )
    assert (folder / "patchcl" / "models" / "patchcl.pt").read_bytes() == before
    by_default = "Note: the model patchcl segments, not the refined one, which takes --model ref"
    assert by_default in call("run", folder).stderr
    for name in ("patchcl", "refined"):
        assert by_default not in call("run", folder, "--model", name).stderr
    (row,) = json.loads(call("status", folder, "--json").stdout)["images"]
    assert (row["state"], row["model"]) == ("done", "refined")
    again = call("refine", folder, "--labels-from", "Done", "--config", settings)
    assert "Note: the model refined of before is replaced; --as NAME keeps both" in again.stderr

    same = CliRunner().invoke(
        cli.main, ["refine", str(folder), "--labels-from", "A", "--as", "PatchCL"]
    )
    assert same.exit_code == 2
    assert "another name" in same.output


def refused(folder, *options):
    """The error message of `refine`."""
    command = ["refine", str(folder), "--labels-from", "Done", *options]
    result = CliRunner().invoke(cli.main, command)
    assert result.exit_code == 1, result.output
    assert not (folder / "patchcl" / "models" / "refined.pt").exists()
    return result.output.splitlines()[-1]


def test_the_same_slide_twice_with_other_nuclei_is_refused(folder, model):
    model.save(folder / "patchcl" / "models", "patchcl")
    path = folder / "project.qpproj"
    content = json.loads(path.read_text("utf-8"))
    content["images"].append({**content["images"][0], "entryID": 2, "imageName": "again.svs"})
    path.write_text(json.dumps(content), "utf-8")
    export(folder, feature(ROI, "Done"), feature(INSIDE, "Nucleus"))
    export(folder, feature(ROI, "Done"), feature(ACROSS, "Nucleus"), image=2)
    message = refused(folder)
    assert f"Error: {SLIDE.name} (id 1) and again.svs (id 2) show the same slide" in message
    assert "have different nuclei at x 600, y 700 px" in message
    assert "delete the ROI in one of the two, or leave one out" in message


@pytest.mark.parametrize(
    ("mpp", "option", "message"),
    [
        (1.0, (), "has 1 µm/px, too coarse for labelled ROIs: the model reads 0.5 µm/px"),
        (None, ("--mpp", "0.8"), "has 0.8 µm/px, too coarse"),
        (None, (), "has no pixel size: pass --mpp"),
        (352.8, (), "has a pixel size of 352.8 µm, which cannot be: pass --mpp"),
    ],
)
def test_rois_of_a_coarser_slide_are_refused(tmp_path, model, mpp, option, message):
    """Interpolated pixels would train the model on blur."""
    size = mpp and (mpp, mpp)
    slide = write_tiff(tmp_path / "coarse.tif", scene(640, 480, (1.0, 1.0)), size)
    folder = tmp_path / "project"
    shown = CliRunner().invoke(cli.main, ["init", str(folder), str(slide), "--mpp", "1"])
    assert shown.exit_code == 0, shown.output
    path = folder / "project.qpproj"
    content = json.loads(path.read_text("utf-8"))
    content["images"][0]["serverBuilder"].pop("metadata", None)  # what init was told
    path.write_text(json.dumps(content), "utf-8")
    model.save(folder / "patchcl" / "models", "patchcl")
    nucleus = shapely.Point(80, 25).buffer(5)
    export(folder, feature(shapely.box(0, 0, 200, 200), "Done"), feature(nucleus, "Nucleus"))
    assert message in refused(folder, *option)
    slide.unlink()
    assert "put the file beside the project" in refused(folder)
