"""Opens image files as pyramids of pixels: one dispatch for all readers, and its cache."""

from __future__ import annotations

import threading
import warnings
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from patchcl_qupath.errors import is_damage
from patchcl_qupath.slides.colour import alpha_is_unused, on_white
from patchcl_qupath.slides.level import Level, Pyramid, Selection, check_memory
from patchcl_qupath.slides.ome_zarr import open_ome_zarr
from patchcl_qupath.slides.openslide import FORMATS, open_instead, open_openslide
from patchcl_qupath.slides.signature import slide_files
from patchcl_qupath.slides.tiff import open_tiff

PILLOW_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp"}
# Of files of images, also those that only QuPath reads: what else follows a dot belongs to a name.
IMAGE_SUFFIXES = {*FORMATS, *PILLOW_SUFFIXES, ".svs", ".ndpi", ".tif", ".tiff", ".qptiff", ".zarr"}
IMAGE_SUFFIXES |= {".afi", ".btf", ".gif", ".jp2", ".lif", ".lsm", ".oir", ".tf2", ".tf8", ".vsi"}
ANY = Selection()

_opening = threading.Lock()  # warnings.catch_warnings is not thread-safe


def open_pyramid(path: Path, selection: Selection = ANY) -> Pyramid:
    """The open file of a path: one per process, shared by its threads. May raise any exception.

    A file that was replaced is opened again, and one that was removed raises: workers are
    long-lived.
    """
    stats = slide_files(path).values()
    version = tuple((stat.st_ino, stat.st_mtime_ns, stat.st_size) for stat in stats)
    with _opening:
        return _open(path, selection, version)


def forget_pyramids() -> None:
    """Open files again when they are next read, as after a network error."""
    with _opening:
        _open.cache_clear()


@lru_cache(maxsize=8)  # several images are under way at once
def _open(path: Path, selection: Selection, version: tuple[tuple[int, ...], ...]) -> Pyramid:
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
            check_memory(image.width * image.height)
            pixels = _rgb(image)
    return Pyramid([Level(pixels, (1, 1), (1.0, 1.0))])


def _rgb(image: Image.Image) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) of an image; what is transparent shows the white below it."""
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA"))
        if not alpha_is_unused(rgba):
            return on_white(rgba)
    return np.asarray(image.convert("RGB"))
