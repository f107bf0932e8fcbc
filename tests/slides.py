"""Generated slides: ramps that differ in x and y, so that a swapped axis fails, and dark blue
discs in known places."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray

# (x, y, radius) in µm, from the top left corner; no symmetry maps them onto each other.
DISCS_UM = ((30.0, 20.0, 4.0), (80.0, 25.0, 5.0), (45.0, 70.0, 6.0), (110.0, 60.0, 3.0))
BLUE = (60, 40, 120)


def scene(width: int, height: int, mpp: tuple[float, float]) -> NDArray[np.uint8]:
    """Pixels (height, width, 3) of ``mpp`` (x, y) µm: red grows with x, green falls with y."""
    x = (np.arange(width) + 0.5)[None, :] * mpp[0]  # (1, width) µm
    y = (np.arange(height) + 0.5)[:, None] * mpp[1]  # (height, 1) µm
    pixels = np.empty((height, width, 3))
    pixels[..., 0] = 150 + 90 * x / x.max()
    pixels[..., 1] = 220 - 70 * y / y.max()
    pixels[..., 2] = 200 + 10 * np.sin(x / 3) * np.cos(y / 5)
    for disc_x, disc_y, radius in DISCS_UM:
        pixels[(x - disc_x) ** 2 + (y - disc_y) ** 2 <= radius**2] = BLUE
    return np.rint(pixels).astype(np.uint8)


def shrunk(pixels: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """The mean of whole blocks; rows and columns that do not fill one are cut, as scanners do."""
    height, width = (n // factor for n in pixels.shape[:2])
    blocks = pixels[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.rint(blocks.mean(axis=(1, 3))).astype(np.uint8)


def write_tiff(
    path: Path,
    pixels: NDArray[np.uint8],
    mpp: tuple[float, float] | None = None,
    factors: Sequence[int] = (1,),
    tile_px: int | None = 64,
) -> Path:
    """A TIFF pyramid, each level ``factors`` times smaller; plain strips without ``tile_px``."""
    resolution = {} if mpp is None else {"resolution": (1e4 / mpp[0], 1e4 / mpp[1])}
    with tifffile.TiffWriter(path) as tiff:
        for factor in factors:
            tiff.write(
                shrunk(pixels, factor) if factor > 1 else pixels,
                photometric="rgb",
                tile=tile_px and (tile_px, tile_px),
                compression="deflate",
                subifds=len(factors) - 1 if factor == 1 else None,
                subfiletype=0 if factor == 1 else 1,
                resolutionunit="NONE" if mpp is None else "CENTIMETER",
                metadata=None,
                **resolution,
            )
    return path


def write_svs(
    path: Path, pixels: NDArray[np.uint8], mpp: float, factors: Sequence[int] = (1, 4)
) -> Path:
    """An Aperio SVS: JPEG tiles, a thumbnail as the second page, the pixel size in the text."""
    text = f"Aperio Image Library v11.2.1\r\nmade for a test|AppMag = 40|MPP = {mpp}"
    with tifffile.TiffWriter(path) as tiff:
        for factor in factors:
            tiff.write(
                shrunk(pixels, factor) if factor > 1 else pixels,
                photometric="rgb",
                tile=(128, 128),
                compression="jpeg",
                compressionargs={"level": 95},
                description=text,
                metadata=None,
            )
            if factor == 1:
                tiff.write(shrunk(pixels, 16), photometric="rgb", description=text, metadata=None)
    return path
