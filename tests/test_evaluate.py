import numpy as np
import pytest

from patchcl_qupath.evaluate import aji, dice, f1, pq

NOTHING = np.zeros((4, 6), dtype=np.int32)

# Nucleus 1 is found but for a column; 2 is cut in two equal parts; 7 is missed.
TRUTH = np.array(
    [
        [1, 1, 1, 0, 7, 7],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0],
        [2, 2, 2, 2, 0, 0],
    ]
)
# 5 is nowhere near a nucleus.
PREDICTION = np.array(
    [
        [3, 3, 0, 0, 0, 0],
        [3, 3, 0, 0, 0, 0],
        [0, 0, 0, 0, 5, 5],
        [1, 1, 9, 9, 5, 0],
    ]
)


def test_dice_of_a_case_worked_by_hand():
    assert dice(PREDICTION, TRUTH) == pytest.approx(2 * 8 / (11 + 12))


def test_aji_of_a_case_worked_by_hand():
    # 1 takes 3: 4 of 6. 2 takes 1, the first of two equals: 2 of 4. 7 takes none: 2.
    # Not taken: 9 (2 px) and 5 (3 px).
    assert aji(PREDICTION, TRUTH) == pytest.approx((4 + 2) / (6 + 4 + 2 + 2 + 3))


def test_f1_and_pq_of_a_case_worked_by_hand():
    # One match, 1 with 3, of IoU 4/6; the halves of 2 have IoU 1/2, which is not above it.
    assert f1(PREDICTION, TRUTH) == pytest.approx(2 * 1 / (4 + 3))
    assert pq(PREDICTION, TRUTH) == pytest.approx(2 * 1 / (4 + 3) * 4 / 6)


def test_aji_lets_two_nuclei_take_the_same_prediction():
    truth = np.array([[1, 1, 2, 2]])
    merged = np.array([[1, 1, 1, 1]])
    assert aji(merged, truth) == pytest.approx((2 + 2) / (4 + 4))  # as published


@pytest.mark.parametrize("score", [dice, aji, f1, pq])
def test_scores_are_one_for_the_truth_however_it_is_numbered(score):
    renumbered = np.array([0, 40, 3, 0, 0, 0, 0, 12])[TRUTH].astype(np.uint16)
    assert score(renumbered, TRUTH) == 1
    assert score(NOTHING, NOTHING) == 1


@pytest.mark.parametrize("score", [dice, aji, f1, pq])
def test_scores_are_zero_where_one_side_is_empty(score):
    assert score(NOTHING, TRUTH) == 0
    assert score(TRUTH, NOTHING) == 0


def test_images_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="shapes"):
        aji(TRUTH, TRUTH[:2])
