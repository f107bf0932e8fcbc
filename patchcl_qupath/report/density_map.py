"""Maps of the density of nuclei: nuclei per mm² of tissue, in each bin of an uncertainty grid."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from patchcl_qupath.datatypes import UncertaintyGrid
from patchcl_qupath.segmentation.uncertainty import BIN_STEPS

Colours = tuple[tuple[int, int, int], ...]
DENSITY_COLOURS = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_MIN_POINTS = BIN_STEPS**2 // 4  # bins on the rim of tissue have too few points to divide by
_PERCENTILE = 99  # of bins: denser ones have the same colour
_TRANSPARENT = 255  # the index of the palette after those of colours


@dataclass(frozen=True, kw_only=True)
class DensityMap:
    """Nuclei per mm² of tissue, by bin.

    ``values`` (rows, cols) are NaN where there is no tissue; ``bin_size`` is (width, height) at
    level 0; ``highest`` is the density that has the last colour.
    """

    values: NDArray[np.float64]
    bin_size: tuple[float, float]
    highest: float

    @classmethod
    def of(cls, uncertainty: UncertaintyGrid, mpp: tuple[float, float]) -> DensityMap:
        """The map of an image with tissue; ``mpp`` is (x, y) µm/px at level 0."""
        rows, cols = uncertainty.rows, uncertainty.cols
        bin_mm2 = math.prod(uncertainty.bin_size) * math.prod(mpp) / 1e6
        points = np.maximum(uncertainty.points, _MIN_POINTS)
        density = uncertainty.nuclei / points * BIN_STEPS**2 / bin_mm2
        values = np.full((rows.max() + 1, cols.max() + 1), np.nan)
        values[rows, cols] = density
        highest = max(1.0, float(np.percentile(density, _PERCENTILE)))
        return cls(values=values, bin_size=uncertainty.bin_size, highest=highest)

    def picture(
        self, shape: tuple[int, int], px: int, downsample: tuple[float, float]
    ) -> Image.Image:
        """The map as a picture of ``shape`` (rows, cols), transparent where there is no tissue.

        A pixel is ``px`` working px wide; ``downsample`` is (x, y) level-0 px per working px.
        """
        return bin_picture(
            self.values / self.highest,
            bin_size=self.bin_size,
            colours=DENSITY_COLOURS,
            shape=shape,
            px=px,
            downsample=downsample,
        )


def bin_picture(
    values: NDArray[np.float64],
    *,
    bin_size: tuple[float, float],
    colours: Colours,
    shape: tuple[int, int],
    px: int,
    downsample: tuple[float, float],
) -> Image.Image:
    """Values (rows, cols) of bins, 0 to 1, as a picture of ``shape``, transparent where NaN.

    ``bin_size`` is (width, height) at level 0; ``colours`` are those from 0 to 1. A pixel is ``px``
    working px wide; ``downsample`` is (x, y) level-0 px per working px.
    """
    (bin_width, bin_height), (x, y) = bin_size, downsample
    rows = ((np.arange(shape[0]) + 0.5) * px * y // bin_height).astype(int)
    cols = ((np.arange(shape[1]) + 0.5) * px * x // bin_width).astype(int)
    height, width = values.shape
    padded = np.pad(values, ((0, 1), (0, 1)), constant_values=np.nan)
    shown = padded[np.minimum(rows, height)[:, None], np.minimum(cols, width)]
    last = _TRANSPARENT - 1
    level = np.nan_to_num(np.clip(shown, 0, 1) * last, nan=_TRANSPARENT)
    picture = Image.fromarray(np.rint(level).astype(np.uint8), mode="P")
    picture.putpalette([*_colours(colours, _TRANSPARENT).ravel().tolist(), 255, 255, 255])
    picture.info["transparency"] = _TRANSPARENT
    return picture


def _colours(stops: Colours, count: int) -> NDArray[np.uint8]:
    """``count`` colours (count, 3) from the first to the last."""
    at = np.linspace(0, count - 1, len(stops))
    channels = [np.interp(np.arange(count), at, channel) for channel in zip(*stops, strict=True)]
    return np.asarray(np.rint(np.stack(channels, axis=1)), np.uint8)
