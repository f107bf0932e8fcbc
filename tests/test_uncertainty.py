"""Cells add up to images and to fields."""

import numpy as np
import pytest

from patchcl_qupath.datatypes import UncertaintyGrid
from patchcl_qupath.segmentation.uncertainty import (
    BIN_STEPS,
    fields_of_view,
    merge_grids,
    predictive_entropy,
    step_px,
)


def test_entropy_is_that_of_a_coin():
    p = np.array([0, 0.11, 0.5, 0.89, 1], dtype=np.float32)
    assert predictive_entropy(p).tolist() == [0, 500, 1000, 500, 0]


def test_points_are_some_um_apart_at_any_pixel_size():
    assert [step_px(mpp) for mpp in (0.25, 0.5, 1.0, 8.0)] == [16, 8, 4, 1]


def test_a_cell_in_several_tiles_is_added_up():
    one = UncertaintyGrid((128.0, 128.0), *np.array([[1, 0], [2, 5], [10, 20], [300, 40], [1, 2]]))
    other = UncertaintyGrid((128.0, 128.0), *np.array([[1], [2], [7], [70], [4]]))
    both = merge_grids([one, other])
    assert both.bin_size == (128.0, 128.0)
    assert np.stack([both.rows, both.cols]).tolist() == [[0, 1], [5, 2]]
    assert [both.points.tolist(), both.entropy.tolist()] == [[20, 17], [40, 370]]
    assert both.nuclei.tolist() == [2, 5]


def test_fields_are_four_cells_wide():
    full = BIN_STEPS**2
    columns = [[0, 3, 4], [3, 0, 0], [full, full, full // 2], [0, 100 * full, 0], [1, 2, 3]]
    found = fields_of_view(UncertaintyGrid((100.0, 50.0), *np.array(columns)))
    assert found.size == (400.0, 200.0)
    assert len(found) == 2
    assert np.stack([found.x, found.y], axis=1).tolist() == [[0, 0], [0, 200]]
    assert found.tissue.tolist() == [2 / 16, 1 / 32]
    assert found.entropy == pytest.approx([0.05, 0])
    assert found.nuclei.tolist() == [3, 3]
