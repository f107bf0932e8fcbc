"""Uncertainty grids: bins add up to images and to fields of view."""

from __future__ import annotations

import numpy as np
import pytest

from patchcl_qupath.datatypes import Box, UncertaintyGrid
from patchcl_qupath.segmentation.uncertainty import (
    BIN_STEPS,
    bin_px,
    fields_of_view,
    merge_grids,
    predictive_entropy,
    sampling_points,
    step_px,
)


def grid(bin_size: tuple[float, float], *columns: list[int]) -> UncertaintyGrid:
    """A grid of the columns rows, cols, points, entropy and nuclei."""
    rows, cols, points, entropy, nuclei = (np.array(column, np.int64) for column in columns)
    return UncertaintyGrid(
        bin_size=bin_size, rows=rows, cols=cols, points=points, entropy=entropy, nuclei=nuclei
    )


def test_entropy_is_that_of_a_coin() -> None:
    p = np.array([0, 0.11, 0.5, 0.89, 1], dtype=np.float32)
    assert predictive_entropy(p).tolist() == [0, 500, 1000, 500, 0]


def test_sampling_points_are_4_um_apart_at_any_pixel_size() -> None:
    assert [step_px(mpp) for mpp in (0.25, 0.5, 1.0, 8.0)] == [16, 8, 4, 1]
    assert bin_px(0.5) == 8 * BIN_STEPS


def test_sampling_points_do_not_depend_on_the_box() -> None:
    rows, cols = sampling_points(Box(0, 0, 50, 70), mpp=0.5)
    assert {*rows} == {*range(0, 50, 8)}
    assert {*cols} == {*range(0, 70, 8)}
    whole = {*zip(rows.tolist(), cols.tolist(), strict=True)}
    halves = [Box(0, 0, 50, 33), Box(0, 33, 50, 70)]
    split = [
        point
        for box in halves
        for point in zip(*(axis.tolist() for axis in sampling_points(box, 0.5)), strict=True)
    ]
    assert len(split) == len(whole)
    assert {*split} == whole


def test_a_bin_in_several_tiles_is_summed() -> None:
    one = grid((128.0, 128.0), [1, 0], [2, 5], [10, 20], [300, 40], [1, 2])
    other = grid((128.0, 128.0), [1], [2], [7], [70], [4])
    both = merge_grids([one, other])
    assert both.bin_size == (128.0, 128.0)
    assert np.stack([both.rows, both.cols]).tolist() == [[0, 1], [5, 2]]
    assert [both.points.tolist(), both.entropy.tolist()] == [[20, 17], [40, 370]]
    assert both.nuclei.tolist() == [2, 5]


def test_fields_of_view_are_four_bins_wide() -> None:
    full = BIN_STEPS**2
    columns = [[0, 3, 4], [3, 0, 0], [full, full, full // 2], [0, 100 * full, 0], [1, 2, 3]]
    found = fields_of_view(grid((100.0, 50.0), *columns))
    assert found.size == (400.0, 200.0)
    assert len(found) == 2
    assert np.stack([found.x, found.y], axis=1).tolist() == [[0, 0], [0, 200]]
    assert found.tissue.tolist() == [2 / 16, 1 / 32]
    assert found.entropy == pytest.approx([0.05, 0])
    assert found.nuclei.tolist() == [3, 3]
