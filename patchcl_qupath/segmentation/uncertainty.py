"""Which parts of an image deserve a look: where nuclei are many, few, or in doubt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.datatypes import UncertaintyGrid

STEP_UM = 4.0  # from one point that is looked at to the next, about
BIN_STEPS = 16  # a cell is so many steps wide, ...
FOV_BINS = (4, 4)  # rows and columns of them in a field, unless others are asked for: 256 um


def step_px(mpp: float) -> int:
    """Working px from one point that is looked at to the next."""
    return max(1, round(STEP_UM / mpp))


def predictive_entropy(probability: NDArray[np.float32]) -> NDArray[np.int64]:
    """What is not known of pixels that are nucleus with a probability, in thousandths of a bit."""
    p = np.clip(probability.astype(np.float64), 1e-9, 1 - 1e-9)
    return np.rint(-1000 * (p * np.log2(p) + (1 - p) * np.log2(1 - p))).astype(np.int64)


def merge_grids(uncertainty_grids: Iterable[UncertaintyGrid]) -> UncertaintyGrid:
    """One survey from several, as an image's from those of its tiles: at least one.

    A cell may occur several times. Cells come row by row.
    """
    parts = list(uncertainty_grids)
    rows, cols, *sums = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("rows", "cols", "points", "entropy", "nuclei")
    )
    bins, which = np.unique(rows << 32 | cols, return_inverse=True)
    totals = np.zeros((len(sums), len(bins)), dtype=np.int64)
    for total, values in zip(totals, sums, strict=True):
        np.add.at(total, which, values)
    return UncertaintyGrid(parts[0].bin_size, bins >> 32, bins & 0xFFFFFFFF, *totals)


@dataclass(frozen=True)
class FieldsOfView:
    """Fields of an image, side by side; (N,) each.

    ``x``, ``y`` of their top left corners and ``size`` (width, height) are in px at level 0.
    ``tissue`` is the share of each that is tissue; ``entropy`` the mean predictive entropy of
    tissue in it, in bits; ``nuclei`` their number.
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
    """The fields with tissue of an image, row by row; each has so many (rows, columns) of cells."""
    down, across = bins
    whole = merge_grids(
        [
            UncertaintyGrid(
                (uncertainty.bin_size[0] * across, uncertainty.bin_size[1] * down),
                uncertainty.rows // down,
                uncertainty.cols // across,
                uncertainty.points,
                uncertainty.entropy,
                uncertainty.nuclei,
            )
        ]
    )
    width, height = whole.bin_size
    return FieldsOfView(
        whole.bin_size,
        (whole.cols * width).astype(np.float64),
        (whole.rows * height).astype(np.float64),
        whole.points / (BIN_STEPS**2 * down * across),
        whole.entropy / np.maximum(whole.points, 1) / 1000,
        whole.nuclei,
    )
