"""What the samples of a TIFF's page mean: how they become RGB, or why they cannot."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from tifffile import COMPRESSION, TiffPage

from patchcl_qupath.slides.pixel_size import description

ToRGB = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]

_RGB, _YCBCR = 2, 6  # TIFF's photometric interpretations
_NAMES = {
    0: "greyscale",
    1: "greyscale",
    2: "RGB",
    3: "palette",
    4: "a mask",
    5: "CMYK",
    6: "YCbCr",
    8: "CIE L*a*b*",
    9: "ICC L*a*b*",
    10: "ITU L*a*b*",
}
_JPEG = {6, 7, 33007, 34892}  # compressions; their codec converts YCbCr
_LOSSLESS = {1, 5, 8, 32773, 32946, 34925, 50000}  # samples are those that were written
# JPEG 2000: in Aperio's files of YCbCr, whatever the photometric interpretation is (OpenSlide); in
# those of Bio-Formats, and so in exports of QuPath, of RGB.
_APERIO_YCBCR = 33003
_ASSOCIATED, _UNASSOCIATED = 1, 2  # kinds of alpha: colours are multiplied by it, or not
_COEFFICIENTS = 0.299, 0.587, 0.114  # ITU-R BT.601, which are TIFF's default


def to_rgb(page: TiffPage, has_alpha: bool = True) -> ToRGB:
    """What makes RGB (H, W, 3) of the decoded samples (H, W, S) of a page.

    What is transparent shows white, if alpha means anything: see ``alpha_is_unused``. Raises
    ValueError, which names what it is, for other samples than 8-bit RGB, or YCbCr without
    subsampling or as JPEG.
    """
    samples, photometric = page.samplesperpixel, int(page.photometric)
    is_ycbcr = photometric == _YCBCR or _is_aperio_ycbcr(page)
    if (
        page.axes != "YXS"
        or page.dtype != np.uint8
        or page.bitspersample != 8
        or samples not in (3, 4)
        or photometric not in (_RGB, _YCBCR)
        or (is_ycbcr and samples == 4)
    ):
        raise _not_rgb(page)
    if is_ycbcr and int(page.compression) not in _JPEG:
        return _ycbcr(page)
    alpha = int(page.extrasamples[0]) if samples == 4 and page.extrasamples else 0
    if not has_alpha or alpha not in (_ASSOCIATED, _UNASSOCIATED):
        return _without_extra_samples
    return on_white if alpha == _UNASSOCIATED else _associated_on_white


def alpha_is_unused(samples: NDArray[np.uint8]) -> bool:
    """Whether pixels (..., 3 or 4) have no alpha that means anything: none, or 0 all over.

    Programs that know no alpha write such a fourth sample; its pixels are opaque.
    """
    return samples.shape[-1] < 4 or not samples[..., 3].any()


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGBA (..., 4), with colours that are not multiplied by alpha, on white: RGB (..., 3)."""
    rgb, alpha = rgba[..., :3], rgba[..., 3:].astype(np.uint16)
    if (alpha == 255).all():
        return np.ascontiguousarray(rgb)
    return np.asarray((rgb * alpha + 255 * (255 - alpha) + 127) // 255, np.uint8)


def _associated_on_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    white = 255 - rgba[..., 3:].astype(np.uint16)
    return np.asarray(np.minimum(rgba[..., :3] + white, 255), np.uint8)


def _without_extra_samples(samples: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return samples[..., :3]


def _ycbcr(page: TiffPage) -> ToRGB:
    """The conversion of YCbCr that no codec converts."""
    is_lossless = int(page.compression) in _LOSSLESS and not page.is_subsampled
    given = page.tags.valueof(529), page.tags.valueof(532)
    if not (is_lossless or _is_aperio_ycbcr(page)) or given != (None, None):
        raise _not_rgb(page)
    return _rgb_of_ycbcr


def _is_aperio_ycbcr(page: TiffPage) -> bool:
    """Whether a page is JPEG 2000 of YCbCr, as Aperio writes it."""
    is_aperio = description(page.parent.pages.first).startswith("Aperio")
    return is_aperio and int(page.compression) == _APERIO_YCBCR


def _rgb_of_ycbcr(ycbcr: NDArray[np.uint8]) -> NDArray[np.uint8]:
    red, green, blue = _COEFFICIENTS
    y, cb, cr = (ycbcr[..., i].astype(np.float64) for i in range(3))
    r = y + (2 - 2 * red) * (cr - 128)
    b = y + (2 - 2 * blue) * (cb - 128)
    g = (y - red * r - blue * b) / green
    rgb = np.rint(np.stack([r, g, b], axis=-1)).clip(0, 255)
    return np.asarray(rgb, np.uint8)


def _not_rgb(page: TiffPage) -> ValueError:
    photometric = int(page.photometric)
    name = _NAMES.get(photometric, f"photometric interpretation {photometric}")
    code = int(page.compression)
    codec = COMPRESSION(code).name if code in list(COMPRESSION) else str(code)
    return ValueError(f"not 8-bit RGB: {name}, axes {page.axes}, {page.dtype}, {codec}")
