"""Random crops for training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


def draw(
    layers: Sequence[NDArray[Any]], side_px: int, rng: np.random.Generator
) -> list[NDArray[Any]]:
    """A random crop (side_px, side_px, ...), turned and mirrored at random.

    ``layers`` are images (H, W, ...) that lie over each other: all are cut and turned alike. What
    a small image lacks is mirrored.
    """
    height, width = layers[0].shape[:2]
    row, col = (int(rng.integers(max(0, size - side_px) + 1)) for size in (height, width))
    turns, mirror = int(rng.integers(4)), bool(rng.integers(2))
    crops = []
    for layer in layers:
        crop = layer[row : row + side_px, col : col + side_px]
        lacks = [(0, side_px - crop.shape[0]), (0, side_px - crop.shape[1])]
        crop = np.pad(crop, [*lacks, *[(0, 0)] * (crop.ndim - 2)], mode="symmetric")
        crop = np.rot90(crop, turns)
        crops.append(crop[:, ::-1] if mirror else crop)
    return crops
