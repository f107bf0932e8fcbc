"""From RGB to stains: optical density, colour deconvolution, and one scale per slide.

Everything here works pixel by pixel through a 256-entry table and plain sums, so that a pixel
has the same value, to the last bit, in whichever tile it is read.

A. C. Ruifrok, D. A. Johnston, Quantification of histochemical staining by color deconvolution,
Anal Quant Cytol Histol 23 (2001).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Rows are stains, columns R, G, B. QuPath's defaults for H&E; the third stain is QuPath's
# residual, the cross product of the two. Measurements use these, as QuPath's own do.
QUPATH_H_E = np.array([[0.65111, 0.70119, 0.29049], [0.2159, 0.8012, 0.5581]])
QUPATH_H_DAB = np.array([[0.65111, 0.70119, 0.29049], [0.26917, 0.56824, 0.77759]])
# Ruifrok & Johnston's hematoxylin, eosin and DAB: what the networks see.
RUIFROK_HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])

_LEVELS = np.arange(256, dtype=np.float64)
_OD_QUPATH = -np.log10(np.maximum(_LEVELS, 1) / 255)  # QuPath's optical density, white 255
_OD_NETWORK = np.maximum(0, -np.log(np.maximum(_LEVELS, 1) / 245))  # glass is seldom whiter


def _unmixing(stains: NDArray[np.float64]) -> NDArray[np.float64]:
    """(3, 3) matrix that turns a row of optical densities into a row of stain amounts."""
    rows = stains / np.linalg.norm(stains, axis=1, keepdims=True)
    if len(rows) == 2:
        residual = np.cross(rows[0], rows[1])
        rows = np.vstack([rows, residual / np.linalg.norm(residual)])
    return np.linalg.inv(rows)


def _tables(stains: NDArray[np.float64], density: NDArray[np.float64]) -> NDArray[np.float32]:
    """(3 colours, 256 levels, 3 stains): what each colour level adds to each stain."""
    return (density[None, :, None] * _unmixing(stains)[:, None, :]).astype(np.float32)


_MEASURED = {  # what the two stains of a slide are called in QuPath, and how they are parted
    "h-e": (("Hematoxylin", "Eosin"), _tables(QUPATH_H_E, _OD_QUPATH)),
    "h-dab": (("Hematoxylin", "DAB"), _tables(QUPATH_H_DAB, _OD_QUPATH)),
}
_HED_TABLES = _tables(RUIFROK_HED, _OD_NETWORK)


def _unmix(rgb: NDArray[np.uint8], tables: NDArray[np.float32]) -> NDArray[np.float32]:
    """RGB (..., 3) to stains (..., 3), each one contiguous in memory."""
    red, green, blue = (np.ascontiguousarray(rgb[..., colour]) for colour in range(3))
    planes = np.empty((3, *red.shape), np.float32)
    for stain, plane in enumerate(planes):
        plane[...] = tables[0, :, stain][red]
        plane += tables[1, :, stain][green]
        plane += tables[2, :, stain][blue]
    return np.moveaxis(planes, 0, -1)


def densities(rgb: NDArray[np.uint8], stain: str = "h-e") -> dict[str, NDArray[np.float32]]:
    """RGB (..., 3) to the optical density (...) of each of two stains, by QuPath's name of it.

    ``stain`` is "h-e" or "h-dab"; stains are those that QuPath begins with.
    """
    names, tables = _MEASURED[stain]
    unmixed = _unmix(rgb, tables)
    return {name: unmixed[..., i] for i, name in enumerate(names)}


def unmix_hed(rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
    """RGB (..., 3) to hematoxylin, eosin, residual (..., 3): unscaled input of the networks."""
    return _unmix(rgb, _HED_TABLES)


# A slide without nuclei has no hematoxylin to speak of: its noise must not be scaled up until it
# looks like some. In 31 real H&E images hematoxylin ranges from -0.26 to 0.07 at its lowest to 0.74
# and more at its highest; red cells alone can pull the lowest down.
_LEAST_LOW = np.array([-0.25, -np.inf, -np.inf])
_LEAST_HIGH = np.array([0.6, -np.inf, -np.inf])
_LEAST_RANGE = 0.15


@dataclass(frozen=True)
class StainScale:
    """One slide's stain range: what the networks need to see slides of any stain alike.

    It belongs to the slide, never to a tile: neighbouring tiles must agree on their halo.
    """

    low: tuple[float, float, float]
    high: tuple[float, float, float]

    @classmethod
    def fit(cls, crops: Iterable[NDArray[np.uint8]]) -> StainScale:
        """From tissue crops (H, W, 3) of one slide: the 2nd and 99th percentile of each stain."""
        pixels = np.concatenate([unmix_hed(crop).reshape(-1, 3) for crop in crops])
        low, high = np.percentile(pixels, [2, 99], axis=0)
        low, high = np.maximum(low, _LEAST_LOW), np.maximum(high, _LEAST_HIGH)
        high = np.maximum(high, low + _LEAST_RANGE)
        return cls(tuple(low.tolist()), tuple(high.tolist()))

    def apply(self, rgb: NDArray[np.uint8]) -> NDArray[np.float32]:
        """RGB (..., 3) to scaled hematoxylin, eosin, residual (..., 3) in [-0.2, 1.3]."""
        low = np.asarray(self.low, dtype=np.float32)
        span = np.asarray(self.high, dtype=np.float32) - low
        stains = unmix_hed(rgb)
        stains -= low
        stains /= span
        return np.clip(stains, -0.2, 1.3, out=stains)

    def network_input(self, rgb: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
        """RGB (..., 3) as a network takes it: its scaled "stains", or "rgb" in [0, 1]."""
        return self.apply(rgb) if kind == "stains" else np.asarray(rgb / 255, np.float32)
