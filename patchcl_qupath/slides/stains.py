"""From RGB to stains: optical density, colour deconvolution, and a normaliser for each slide.

All functions work pixel by pixel, by a table of 256 entries and plain sums, so that a pixel has
the same value, to the last bit, in whichever tile it is read.

A. C. Ruifrok, D. A. Johnston, Quantification of histochemical staining by color deconvolution,
Anal Quant Cytol Histol 23 (2001).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.compiled import compiled
from patchcl_qupath.config import NetworkInput
from patchcl_qupath.datatypes import StainVectors
from patchcl_qupath.slides.stain_vectors import H_E

# Hematoxylin, eosin and DAB of Ruifrok & Johnston, for the input of networks. Rows are stains.
RUIFROK_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])

Densities = NDArray[np.floating]

_LEVELS = np.arange(256, dtype=np.float64)
_OD_NETWORK = np.maximum(0, -np.log(np.maximum(_LEVELS, 1) / 245))  # glass is seldom brighter


def _unmixing(stains: NDArray[np.float64]) -> NDArray[np.float64]:
    """The (3, 3) matrix from a row of optical densities to a row of stain amounts.

    ``stains`` is (2 or 3, 3); to two, QuPath's residual is added, their cross product.
    """
    rows = stains / np.linalg.norm(stains, axis=1, keepdims=True)
    if len(rows) == 2:
        residual = np.cross(rows[0], rows[1])
        rows = np.vstack([rows, residual / np.linalg.norm(residual)])
    return np.linalg.inv(rows)


def _tables(stains: NDArray[np.float64], density: NDArray[np.float64]) -> NDArray[np.float32]:
    """(3 colours, 256 levels, 3 stains): the contribution of each level to each stain.

    ``density`` is the optical density of the levels: (256,), or (3, 256) where colours differ.
    """
    return (density[..., None] * _unmixing(stains)[:, None, :]).astype(np.float32)


@cache
def _measured(stains: StainVectors) -> NDArray[np.float32]:
    background = np.array(stains.background)[:, None]
    # As in QuPath, pixels brighter than the background have no density.
    density = np.maximum(0, -np.log10(np.maximum(_LEVELS, 1) / background))  # (3, 256)
    return _tables(np.array(stains.vectors), density)


_HED_TABLES = _tables(RUIFROK_HED, _OD_NETWORK)
_COLOUR_TABLES = _tables(np.eye(3), -np.log10(np.maximum(_LEVELS, 1) / 255))
COLOUR_DENSITIES = _COLOUR_TABLES[0, :, 0]  # (256,) of the levels of a colour


@compiled
def _unmix(rgb: NDArray[np.uint8], tables: NDArray[np.float32]) -> NDArray[np.float32]:
    """From RGB (N, 3) to the stains of the tables, (S, N)."""
    planes = np.empty((tables.shape[-1], len(rgb)), np.float32)
    for stain in range(len(planes)):
        for pixel in range(len(rgb)):
            amount = tables[0, rgb[pixel, 0], stain] + tables[1, rgb[pixel, 1], stain]
            planes[stain, pixel] = amount + tables[2, rgb[pixel, 2], stain]
    return planes


def _planes(rgb: NDArray[np.uint8], tables: NDArray[np.float32]) -> NDArray[np.float32]:
    """From RGB (..., 3) to the stains of the tables, (S, ...)."""
    return _unmix(rgb.reshape(-1, 3), tables).reshape(-1, *rgb.shape[:-1])


def densities(rgb: NDArray[np.uint8], stains: StainVectors = H_E) -> dict[str, NDArray[np.float32]]:
    """From RGB (..., 3) to the optical density (...) of each stain, by its name in QuPath."""
    planes = _planes(rgb, density_tables(stains))
    return dict(zip(stains.names, planes, strict=True))


def density_tables(stains: StainVectors) -> NDArray[np.float32]:
    """(3 colours, 256 levels, S stains): a stain's density is the sum over the colours."""
    return np.ascontiguousarray(_measured(stains)[..., : len(stains.names)])


def colour_densities(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """From RGB (..., 3) to the optical densities of red, green and blue (3, ...), not unmixed."""
    return _planes(rgb, _COLOUR_TABLES)


def hematoxylin_density(red: Densities, green: Densities, blue: Densities) -> Densities:
    """Densities (N,) by QuPath's default vectors, from those of colours, or from means of these."""
    matrix = _unmixing(np.array(H_E.vectors))
    # Plain sums: those of a matrix product may depend on how many there are.
    return np.asarray(red * matrix[0, 0] + green * matrix[1, 0] + blue * matrix[2, 0])


# Of 25,000 nuclei, in H&E, hematoxylin alone, or with DAB, the density of green is at least 0.94 of
# the lesser of red and blue, and that of red at least 0.42 of the lesser of green and blue. Of
# 18,000 that were found, that of red is at most 1.4 of green; where it is above 1.3, that of blue
# is at most 0.75 of green.
_GREEN_INK = 0.9
_RED_INK = 0.35
_CYAN_INK = (1.5, 0.7)  # of red and of blue


def is_green_ink(red: Densities, green: Densities, blue: Densities) -> NDArray[np.bool_]:
    """Whether optical densities (N,) are those of green ink, which no stain of tissue is."""
    return np.asarray(green < _GREEN_INK * np.minimum(red, blue))


def is_cyan_ink(red: Densities, green: Densities, blue: Densities) -> NDArray[np.bool_]:
    """Whether optical densities (N,) are those of cyan or teal ink.

    Hematoxylin that is as blue absorbs less of the blue.
    """
    of_red, of_blue = _CYAN_INK
    return np.asarray((red > of_red * green) & (blue > of_blue * green))


def is_red_ink(red: Densities, green: Densities, blue: Densities) -> NDArray[np.bool_]:
    """Whether optical densities (N,) are those of red ink, and not those of a nucleus.

    Eosin alone may be as red.
    """
    return np.asarray(red < _RED_INK * np.minimum(green, blue))


def unmix_hed(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """From RGB (..., 3) to hematoxylin, eosin, residual (..., 3), not normalised.

    Each stain is contiguous in memory.
    """
    return np.moveaxis(_planes(rgb, _HED_TABLES), 0, -1)


# A slide without nuclei has hardly any hematoxylin: its noise must not be scaled up to the range of
# a stain. In 31 H&E images the 2nd percentile of hematoxylin is between -0.26 and 0.07, the 99th is
# 0.74 or more; red blood cells alone can lower the former.
_LEAST_LOW = np.array([-0.25, -np.inf, -np.inf])
_LEAST_HIGH = np.array([0.6, -np.inf, -np.inf])
_LEAST_RANGE = 0.15
# Of the residual stain, the 99th percentile is 3.2 or more where DAB is; in H&E it is below 1.8,
# but in tissue full of blood, which has even more eosin.
_BROWN = 2.0
STAIN_RANGE = (-0.2, 1.3)  # of normalised stains


def _least_brown(eosin: float) -> float:
    """The 99th percentile of the residual of a brown slide at least, given that of eosin."""
    return max(_BROWN, eosin)


@dataclass(frozen=True)
class StainNormaliser:
    """The percentile stain normaliser of one slide: the range of each stain, scaled to [0, 1].

    It is fitted to a slide, never to a tile: neighbouring tiles must agree in their halo.
    """

    low: tuple[float, float, float]
    high: tuple[float, float, float]

    @classmethod
    def fit(cls, crops: Iterable[NDArray[np.uint8]], *, has_dab: bool = False) -> StainNormaliser:
        """Fit to tissue crops (H, W, 3) of one slide: the 2nd and 99th percentile of each stain.

        Where a person says that it ``has_dab``, the residual has the range of a brown chromogen:
        fewer than one pixel in a hundred may be brown, which no percentile shows.
        """
        pixels = np.concatenate([unmix_hed(crop).reshape(-1, 3) for crop in crops])
        low, high = np.percentile(pixels, [2, 99], axis=0)
        low, high = np.maximum(low, _LEAST_LOW), np.maximum(high, _LEAST_HIGH)
        high = np.maximum(high, low + _LEAST_RANGE)
        if has_dab:
            high[2] = max(_least_brown(high[1]), high[2])
        return cls(tuple(low.tolist()), tuple(high.tolist()))

    @property
    def has_brown(self) -> bool:
        """Whether the slide has a brown chromogen, DAB for one, in place of eosin."""
        _, eosin, residual = self.high
        return residual >= _least_brown(eosin)

    def apply(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """From RGB (..., 3) to normalised hematoxylin, eosin, residual (..., 3) in [-0.2, 1.3]."""
        low = np.asarray(self.low, dtype=np.float32)
        span = np.asarray(self.high, dtype=np.float32) - low
        stains = unmix_hed(rgb)
        stains -= low
        stains /= span
        return np.clip(stains, *STAIN_RANGE, out=stains)

    def network_input(self, rgb: NDArray[np.uint8], kind: NetworkInput) -> NDArray[np.float32]:
        """RGB (..., 3) as the input of a network: normalised stains, or RGB in [0, 1]."""
        if kind == NetworkInput.STAINS:
            return self.apply(rgb)
        return np.asarray(rgb / 255, np.float32)
