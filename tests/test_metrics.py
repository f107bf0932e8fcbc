"""Scores: worked by hand, of label images and of polygons; and as in published software."""

import numpy as np
import pytest
import shapely

from patchcl_qupath.evaluation.metrics import Kind, Overlaps
from patchcl_qupath.segmentation.contours import pixel_polygons

NOTHING = np.zeros((4, 6), dtype=np.int32)

# Nucleus 1 is found except a column; 2 is split into equal halves; 7 is missed.
GROUND_TRUTH = np.array(
    [
        [1, 1, 1, 0, 7, 7],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [2, 2, 2, 2, 0, 0],
    ]
)
# 5 is far from any nucleus.
PREDICTION = np.array(
    [
        [3, 3, 0, 0, 0, 0],
        [3, 3, 0, 0, 0, 0],
        [0, 0, 0, 0, 5, 5],
        [1, 1, 9, 9, 5, 0],
    ]
)


@pytest.fixture(params=["labels", "polygons"])
def compared(request):
    """Overlaps of two label images, as such or by way of polygons."""
    if request.param == "labels":
        return Overlaps.of_labels
    return lambda *sides: Overlaps.of_polygons(*map(pixel_polygons, sides))


def blobs(seed):
    """Two label images of one scene, whose numbers have gaps: cells split, merged and missed."""
    rng = np.random.default_rng(seed)
    scene = rng.integers(0, 25, (12, 15)).repeat(3, axis=0).repeat(3, axis=1) * (seed + 1)
    other = np.where(rng.random(scene.shape) < 0.8, scene, np.roll(scene, 1, axis=seed % 2))
    merged = np.where(other % 4 == 0, other // 2, other)
    return merged.astype(np.uint16), scene


def test_dice_of_a_case_worked_by_hand(compared):
    assert compared(PREDICTION, GROUND_TRUTH).dice == pytest.approx(2 * 8 / (11 + 12))


def test_aji_of_a_case_worked_by_hand(compared):
    # 1 matches 3: 4 of 6. 2 matches 1, the first of two equals: 2 of 4. 7 matches none: 2.
    # Unmatched: 9 (2 px) and 5 (3 px).
    assert compared(PREDICTION, GROUND_TRUTH).aji == pytest.approx((4 + 2) / (6 + 4 + 2 + 2 + 3))


def test_f1_and_pq_of_a_case_worked_by_hand(compared):
    # One match, 1 with 3, of IoU 4/6; the halves of 2 have IoU 1/2, which is not above it.
    assert compared(PREDICTION, GROUND_TRUTH).f1 == pytest.approx(2 * 1 / (4 + 3))
    assert compared(PREDICTION, GROUND_TRUTH).pq == pytest.approx(2 * 1 / (4 + 3) * 4 / 6)


def test_aji_matches_two_nuclei_to_the_same_prediction(compared):
    ground_truth = np.array([[1, 1, 2, 2]])
    merged = np.array([[1, 1, 1, 1]])
    assert compared(merged, ground_truth).aji == pytest.approx((2 + 2) / (4 + 4))  # as published


@pytest.mark.parametrize("score", ["dice", "aji", "f1", "pq"])
def test_scores_are_one_for_the_ground_truth_however_it_is_numbered(compared, score):
    renumbered = np.array([0, 40, 3, 0, 0, 0, 0, 12])[GROUND_TRUTH].astype(np.uint16)
    assert getattr(compared(renumbered, GROUND_TRUTH), score) == 1
    assert getattr(compared(NOTHING, NOTHING), score) == 1


@pytest.mark.parametrize("score", ["dice", "aji", "f1", "pq"])
def test_scores_are_zero_where_one_side_is_empty(compared, score):
    assert getattr(compared(NOTHING, GROUND_TRUTH), score) == 0
    assert getattr(compared(GROUND_TRUTH, NOTHING), score) == 0


@pytest.mark.parametrize("seed", range(20))
def test_polygons_and_labels_have_the_same_scores(seed):
    sides = blobs(seed)
    labels = Overlaps.of_labels(*sides)
    polygons = Overlaps.of_polygons(*map(pixel_polygons, sides))
    for score in ("dice", "aji", "f1", "pq"):
        assert getattr(polygons, score) == pytest.approx(getattr(labels, score))
    assert 0 < polygons.pq < 1


@pytest.mark.parametrize("seed", range(5))
def test_f1_and_pq_are_as_published(seed):
    published = pytest.importorskip("cellseg_metrics")
    prediction, ground_truth = blobs(seed)
    quality = published.panoptic_quality(ground_truth, prediction)
    overlaps = Overlaps.of_labels(prediction, ground_truth)
    assert overlaps.f1 == pytest.approx(quality["dq"])
    assert overlaps.pq == pytest.approx(quality["pq"])


def test_dice_counts_overlaps_within_one_side_once():
    prediction = shapely.box([0, 3, 20], [0, 0, 0], [5, 8, 22], [4, 4, 1])  # 32 + 2
    ground_truth = shapely.box([0, 1], [0, 0], [6, 6], [4, 2])  # 24
    assert Overlaps.of_polygons(prediction, ground_truth).dice == pytest.approx(2 * 24 / (34 + 24))


def test_nuclei_drawn_twice_match_one_nucleus_once():
    drawn = shapely.box([0, 10], [0, 0], [4, 14], [4, 4])
    twice = Overlaps.of_polygons(drawn, drawn[[0, 0, 1]])
    assert twice.f1 == twice.pq == pytest.approx(2 * 2 / (2 + 3))


def test_nuclei_that_touch_do_not_overlap():
    touching = Overlaps.of_polygons(
        shapely.box([0], [0], [4], [4]), shapely.box([4], [0], [8], [4])
    )
    assert not len(touching.shared)
    assert touching.dice == touching.aji == touching.f1 == 0


def test_images_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        Overlaps.of_labels(GROUND_TRUTH, GROUND_TRUTH[:2])


def errors(seed):
    """Two label images of rectangles, true and predicted ones, with errors of all kinds."""
    rng = np.random.default_rng(seed)
    prediction, ground_truth = np.zeros((2, 60, 60), np.int32)
    for label in range(1, 41):
        row, col = rng.integers(52, size=2)
        height, width = rng.integers(2, 9, size=2)
        ground_truth[row : row + height, col : col + width] = label
        row, col = np.maximum(0, np.add((row, col), rng.integers(-2, 3, size=2)))
        prediction[row : row + height, col : col + width] = label // 2 if label % 5 == 1 else label
        prediction[row : row + height // 2, col : col + width] *= 1 if label % 3 else 50
    prediction[ground_truth % 7 == 3] = 0
    ground_truth[ground_truth == 9] = 0
    return prediction, ground_truth


NO_KIND = dict.fromkeys(map(str, Kind), 0)


def test_kinds_of_a_case_worked_by_hand(compared):
    # 1 is right; 2 holds most of both halves; 7 is missed; 5 lies on nothing.
    kinds = compared(PREDICTION, GROUND_TRUTH).kinds
    assert kinds == NO_KIND | {"right": 1, "split": 1, "missed": 1, "spurious": 1}


@pytest.mark.parametrize(
    ("prediction", "ground_truth", "true_kinds"),
    [
        ([1, 1, 1, 1, 1, 1], [1, 1, 1, 2, 2, 2], ["merged", "merged"]),  # IoU 1/2 is no match
        ([1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 2, 2], ["right", "merged"]),
        ([1, 1, 0, 2, 2, 0], [3, 3, 3, 3, 3, 3], ["split"]),
        ([1, 1, 1, 1, 2, 0], [3, 3, 3, 3, 3, 3], ["right"]),  # although in pieces
        ([1, 0, 0, 0, 0, 0], [3, 3, 3, 3, 3, 3], ["missed"]),  # a sixth of it
        ([1, 1, 0, 0, 0, 0], [3, 3, 3, 3, 3, 3], ["badly_outlined"]),  # a third, in one piece
        ([1, 1, 1, 1, 1, 1], [3, 0, 0, 0, 0, 0], ["badly_outlined"]),  # far too large
    ],
)
def test_kind_of_each_true_nucleus(compared, prediction, ground_truth, true_kinds):
    sides = np.array([prediction]), np.array([ground_truth])
    assert compared(*sides).true_kinds.tolist() == true_kinds


@pytest.mark.parametrize(
    ("prediction", "ground_truth", "spurious"),
    [
        ([1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0], [True]),  # a sixth of it is a nucleus
        ([1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0], [False]),  # a fifth
        ([1, 1, 1, 1, 1, 1], [1, 0, 2, 0, 0, 3], [False]),  # a sixth, three times
        ([1, 1, 1, 0, 2, 2], [1, 1, 1, 0, 0, 0], [False, True]),
    ],
)
def test_spurious_nuclei(compared, prediction, ground_truth, spurious):
    sides = np.array([prediction]), np.array([ground_truth])
    assert compared(*sides).spurious.tolist() == spurious
    assert compared(*sides).kinds["spurious"] == sum(spurious)


def test_kinds_where_one_side_is_empty(compared):
    assert compared(NOTHING, NOTHING).kinds == NO_KIND
    assert compared(NOTHING, GROUND_TRUTH).kinds == NO_KIND | {"missed": 3}
    assert compared(GROUND_TRUTH, NOTHING).kinds == NO_KIND | {"spurious": 3}


@pytest.mark.parametrize("seed", range(20))
def test_kinds_are_those_of_the_definition(seed):
    """Nucleus by nucleus, mask by mask."""
    prediction, ground_truth = errors(seed)
    found = [prediction == label for label in np.unique(prediction[prediction > 0])]
    true = [ground_truth == label for label in np.unique(ground_truth[ground_truth > 0])]
    counts = dict(NO_KIND)
    held = [sum((t & f).sum() > t.sum() / 2 for t in true) for f in found]
    for t in true:
        if any((t & f).sum() > (t | f).sum() / 2 for f in found):
            kind = "right"
        elif any((t & f).sum() > t.sum() / 2 and n > 1 for f, n in zip(found, held, strict=True)):
            kind = "merged"
        elif sum((t & f).sum() > f.sum() / 2 for f in found) > 1:
            kind = "split"
        elif (t & (prediction > 0)).sum() < t.sum() / 5:
            kind = "missed"
        else:
            kind = "badly_outlined"
        counts[kind] += 1
    counts["spurious"] = sum((f & (ground_truth > 0)).sum() < f.sum() / 5 for f in found)
    assert Overlaps.of_labels(prediction, ground_truth).kinds == counts
    assert Overlaps.of_polygons(*map(pixel_polygons, (prediction, ground_truth))).kinds == counts
    assert sum(counts.values()) - counts["spurious"] == len(true)
    assert sum(count > 0 for count in counts.values()) > 3
