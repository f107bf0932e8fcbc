"""Uncertainty grids: predictive entropy and number of nuclei in square bins of an image.

Tissue is sampled at points of the working grid that are ``step_px`` apart. Points and bins begin at
the image's top left corner, so that they do not depend on how the image is cut into tiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Box, UncertaintyGrid

STEP_UM = 4.0  # from one sampling point to the next, about
BIN_STEPS = 16  # width and height of a bin, in steps
FOV_BINS = (4, 4)  # rows and columns of bins in a field of view, unless others are given: 256 µm


def step_px(mpp: float) -> int:
    """Working px from one sampling point to the next."""
    return max(1, round(STEP_UM / mpp))


def bin_px(mpp: float) -> int:
    """Width and height of a bin in working px."""
    return BIN_STEPS * step_px(mpp)


def sampling_points(box: Box, mpp: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The sampling points in a box of the working grid, row by row: (N,) rows and columns."""
    step = step_px(mpp)
    rows, cols = np.mgrid[
        -(-box.row0 // step) * step : box.row1 : step,
        -(-box.col0 // step) * step : box.col1 : step,
    ]
    return rows.ravel(), cols.ravel()


def predictive_entropy(probability: NDArray[np.float32]) -> NDArray[np.int64]:
    """Entropy of the prediction at pixels of some probability of a nucleus, in 0.001 bits.

    Of the shape of ``probability``. Whole numbers add up to the same in any order.
    """
    p = np.clip(probability.astype(np.float64), 1e-9, 1 - 1e-9)
    return np.rint(-1000 * (p * np.log2(p) + (1 - p) * np.log2(1 - p))).astype(np.int64)


def merge_grids(uncertainty_grids: Iterable[UncertaintyGrid]) -> UncertaintyGrid:
    """The sum of one or more grids of bins of one size, such as those of an image's tiles.

    A bin may occur several times, even in one grid; in the sum, each occurs once, row by row.
    """
    grids = list(uncertainty_grids)
    rows = np.concatenate([grid.rows for grid in grids])
    cols = np.concatenate([grid.cols for grid in grids])
    bins, bin_of = np.unique(rows << 32 | cols, return_inverse=True)

    def sums(columns: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        total = np.zeros(len(bins), dtype=np.int64)
        np.add.at(total, bin_of, np.concatenate(columns))
        return total

    return UncertaintyGrid(
        bin_size=grids[0].bin_size,
        rows=bins >> 32,
        cols=bins & 0xFFFFFFFF,
        points=sums([grid.points for grid in grids]),
        entropy=sums([grid.entropy for grid in grids]),
        nuclei=sums([grid.nuclei for grid in grids]),
    )


@dataclass(frozen=True, kw_only=True)
class FieldsOfView:
    """Fields of view (FOVs) of an image, side by side; (N,) each.

    ``x``, ``y`` of their top left corners and ``size`` (width, height) are in px at level 0.
    ``tissue`` is the tissue fraction of each, ``entropy`` the mean predictive entropy of its tissue
    in bits, ``nuclei`` the number of its nuclei.
    """

    size: tuple[float, float]
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    tissue: NDArray[np.float64]
    entropy: NDArray[np.float64]
    nuclei: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.x)


def fields_of_view(uncertainty: UncertaintyGrid, bins: tuple[int, int] = FOV_BINS) -> FieldsOfView:
    """The fields of view of an image that have tissue, row by row.

    ``bins`` are the (rows, columns) of bins in each.
    """
    rows, cols = bins
    width, height = uncertainty.bin_size
    whole = merge_grids(
        [
            replace(
                uncertainty,
                bin_size=(width * cols, height * rows),
                rows=uncertainty.rows // rows,
                cols=uncertainty.cols // cols,
            )
        ]
    )
    width, height = whole.bin_size
    return FieldsOfView(
        size=whole.bin_size,
        x=(whole.cols * width).astype(np.float64),
        y=(whole.rows * height).astype(np.float64),
        tissue=whole.points / (BIN_STEPS**2 * rows * cols),
        entropy=whole.entropy / np.maximum(whole.points, 1) / 1000,
        nuclei=whole.nuclei,
    )
