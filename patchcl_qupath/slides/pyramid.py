"""Opens image files as pyramids of pixels: one dispatch for all readers, and its cache."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from patchcl_qupath.errors import is_damage
from patchcl_qupath.slides.colour import alpha_is_unused, on_white
from patchcl_qupath.slides.level import (
    MAX_IN_MEMORY_PX,
    Level,
    Pyramid,
    Selection,
    check_memory,
)
from patchcl_qupath.slides.ome_zarr import open_ome_zarr
from patchcl_qupath.slides.openslide import FORMATS, open_instead, open_openslide
from patchcl_qupath.slides.signature import slide_files
from patchcl_qupath.slides.tiff import open_tiff

PILLOW_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp"}
# Of files of images, also those that only QuPath reads: what else follows a dot belongs to a name.
IMAGE_SUFFIXES = {*FORMATS, *PILLOW_SUFFIXES, ".svs", ".ndpi", ".tif", ".tiff", ".qptiff", ".zarr"}
IMAGE_SUFFIXES |= {".afi", ".btf", ".gif", ".jp2", ".lif", ".lsm", ".oir", ".tf2", ".tf8", ".vsi"}
ANY = Selection()

MAX_OPEN = 8  # several images are under way at once
MAX_HELD_BYTES = 3 * MAX_IN_MEMORY_PX  # of all open files together, or of the last one alone

_Version = tuple[tuple[int, ...], ...]

_opening = threading.Lock()  # warnings.catch_warnings is not thread-safe
_opened: dict[
    tuple[Path, Selection, int | None, _Version], Pyramid
] = {}  # the one that was read last, last


def open_pyramid(path: Path, selection: Selection = ANY, sample: int | None = None) -> Pyramid:
    """The open file of a path: one per process, shared by its threads. May raise any exception.

    A file that was replaced is opened again, and one that was removed raises: workers are
    long-lived. So is a folder with another ``sample`` of its chunks, which no time or size tells.
    """
    stats = slide_files(path).values()
    version = tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)
    key = path, selection, sample, version
    with _opening:
        pyramid = _opened.pop(key) if key in _opened else _open(path, selection)
        _opened[key] = pyramid
        _forget_some()
    return pyramid


def forget_pyramids() -> None:
    """Open files again when they are next read, as after a network error."""
    with _opening:
        _opened.clear()


def _forget_some() -> None:
    """Forget what was read longest ago: of too many files, and of those that hold too much."""
    oldest, *others = _opened
    if len(others) == MAX_OPEN:
        del _opened[oldest]
    held = {key: pyramid.held_bytes for key, pyramid in _opened.items() if pyramid.held_bytes}
    while len(held) > 1 and sum(held.values()) > MAX_HELD_BYTES:
        oldest = next(iter(held))
        del _opened[oldest], held[oldest]


def _open(path: Path, selection: Selection) -> Pyramid:
    if path.is_dir():
        return open_ome_zarr(path, selection)
    suffix = path.suffix.lower()
    if suffix in FORMATS:
        return open_openslide(path, selection)
    if suffix in PILLOW_SUFFIXES:
        return _open_with_pillow(path)
    if suffix == ".vsi":  # a TIFF, whose pages are previews
        raise ValueError("a VSI keeps its slide in other files, beside a preview of it")
    try:
        pyramid = open_tiff(path, selection)
        pyramid.check_readable()
    except Exception as error:  # readers raise anything
        if not is_damage(error):
            raise
        return open_instead(path, selection, error)
    return pyramid


def _open_with_pillow(path: Path) -> Pyramid:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours is the limit
        with Image.open(path) as image:
            if image.mode not in ("RGB", "RGBA", "P"):
                raise ValueError(f"not RGB: mode {image.mode}")
            if _has_16_bits(image):
                raise ValueError("not 8-bit RGB: 16 bits a channel")
            check_memory(image.width * image.height)
            pixels = _rgb(image)
    return Pyramid([Level(pixels, (1, 1), (1.0, 1.0))])


def _has_16_bits(image: Image.Image) -> bool:
    """Whether the file has 16 bits a channel, of which Pillow reads the upper 8 as RGB.

    Of 12 bits in 16, as cameras have, these are nearly black.
    """
    tiles: Any = getattr(image, "tile", ())  # of what is not decoded yet
    return any(tile[3] in ("RGB;16B", "RGBA;16B") for tile in tiles)


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) of an image; what is transparent shows the white below it."""
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        if not alpha_is_unused(rgba):
            return on_white(rgba)
    return np.asarray(image.convert("RGB"))
