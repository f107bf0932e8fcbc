"""Ground truth of images: nuclei that people outlined, as label images or as GeoJSON.

A file belongs to an image if it has the image's name, or its stem, before one of SUFFIXES; and to
one image alone.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import shapely
import tifffile
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import label

from patchcl_qupath.config import CORRECTED, TO_CORRECT
from patchcl_qupath.datatypes import ImageEntry, Labels, Polygons, grid_to_level0
from patchcl_qupath.errors import GroundTruthError
from patchcl_qupath.project.drawn import are_ours, nuclei_of_roi_class
from patchcl_qupath.project.outlines import MAX_AREA_UM2
from patchcl_qupath.segmentation.contours import pixel_polygons
from patchcl_qupath.slides.pyramid import IMAGE_SUFFIXES
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.storage.files import readable
from patchcl_qupath.storage.geojson import holds_several, read_objects

GEOJSON = (".geojson", ".geojson.gz")
SUFFIXES = (*GEOJSON, ".png", ".tif", ".tiff", ".npy")
# A mask of a few classes has many pieces of each value; a nucleus is seldom in several.
MAX_CLASSES, MAX_PIECES = 10, 4
MAX_PAGES = 1000  # of a TIFF with labels, which has one
_LARGE = f"true contours left out since they are larger than {MAX_AREA_UM2:,.0f} µm²"
_KINDS = f"a file that ends in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"


@dataclass(frozen=True)
class GroundTruth:
    """The true nuclei of an image: (T,) valid polygons and multipolygons, level 0.

    ``ignored`` (I,) are areas in which nobody says what is a nucleus. ``note`` is a message for
    people, or None.
    """

    polygons: Polygons
    ignored: Polygons = field(default_factory=lambda: np.empty(0, object))
    note: str | None = None


def ground_truth_files(ground_truth: Path, entries: Sequence[ImageEntry]) -> dict[str, list[Path]]:
    """The ground-truth files of each image, by its id: those of a folder, or one file of one image.

    An image may have none. The whole name precedes the stem, of a file as of an image. Raises
    GroundTruthError if no image has one, or where that cannot be told.
    """
    try:
        inside = sorted(ground_truth.iterdir()) if ground_truth.is_dir() else None
        is_file = ground_truth.is_file()
    except OSError as error:
        raise GroundTruthError(
            f"{ground_truth} cannot be read: {error.strerror or error}; mend that, or ask for the "
            "permission"
        ) from error
    if inside is not None:
        named: dict[str, list[Path]] = {}
        for file in inside:
            named.setdefault(readable(_name(file)), []).append(file)
        named.pop("", None)
        whole = {entry.name for entry in entries}
        by_stem = {name: files for name, files in named.items() if name not in whole}
        found = {
            entry.id: named.get(entry.name) or by_stem.get(_stem(entry), []) for entry in entries
        }
        if not any(found.values()):
            raise GroundTruthError(
                f"{ground_truth} holds no ground truth: name files as the images, as "
                f"{entries[0].name}.geojson ({_KINDS})"
            )
        return found
    if not is_file:
        raise GroundTruthError(
            f"{ground_truth} does not exist: give {_KINDS}, or a folder of such files"
        )
    if not _name(ground_truth):
        raise GroundTruthError(f"{ground_truth} cannot be the ground truth: give {_KINDS}")
    if len(entries) > 1:
        raise GroundTruthError(
            f"{ground_truth} is the ground truth of one image: say which one with --image, or give "
            "a folder"
        )
    return {entries[0].id: [ground_truth]}


def check_not_shared(
    entry: ImageEntry, files: Mapping[str, list[Path]], entries: Sequence[ImageEntry]
) -> None:
    """Raise GroundTruthError if a file of ``ground_truth_files`` is that of other images, too."""
    for file in files[entry.id]:
        sharing = [f"{other.name} (id {other.id})" for other in entries if file in files[other.id]]
        if len(sharing) > 1:
            raise GroundTruthError(
                f"{entry.name}: {file.name} is named as several images ({', '.join(sharing)}): "
                "give it the whole name of one, or choose one by its id with --image"
            )


def read_ground_truth(files: Sequence[Path], entry: ImageEntry) -> GroundTruth:
    """The true nuclei of an image from its ground-truth files, of which there must be one.

    GeoJSON is in px at level 0; a polygon that contains several others is a region, and left out,
    as are objects without area, and this program's own annotation and ROIs. Label images, integers
    with 0 for background, may be finer or coarser than level 0 by an integer factor. Of both, what
    is too large for a nucleus is left out where ``entry.mpp`` tells. Raises GroundTruthError for
    several files, a damaged file, labels of another size, or a mask that does not separate nuclei;
    ImageError if the image's size cannot be read.
    """
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise GroundTruthError(
            f"{entry.name} has several ground-truth files ({names}): leave one of them"
        )
    (path,) = files
    if path.name.lower().endswith(GEOJSON):
        return _nuclei(path, entry)
    labels = _labels(path, entry)
    _check_instances(labels, path, entry)
    scale = _scale(path, labels.shape[::-1], entry)
    polygons = grid_to_level0(pixel_polygons(labels), (scale, scale))
    is_large = _are_large(polygons, entry)  # such as background that has a number of its own
    note = f"{_LARGE}: {np.count_nonzero(is_large)}" if is_large.any() else None
    return GroundTruth(polygons[~is_large], note=note)


def is_named_as(file: Path, entry: ImageEntry) -> bool:
    """Whether a ground-truth file has the name of an image, or its stem."""
    return readable(_name(file)) in (entry.name, _stem(entry))


def _name(file: Path) -> str:
    """The name of a ground-truth file without its suffix; empty for other files."""
    for suffix in SUFFIXES:
        if file.name.lower().endswith(suffix):
            return file.name[: -len(suffix)]
    return ""


def _stem(entry: ImageEntry) -> str:
    """The name of an image without the suffix of its file, if it has that of one."""
    name = PurePath(entry.name)
    return name.stem if name.suffix.lower() in IMAGE_SUFFIXES else entry.name


def _nuclei(path: Path, entry: ImageEntry) -> GroundTruth:
    """The nuclei of a GeoJSON file, and what else is in it.

    Analysis regions, which QuPath exports together with the cells in them, are left out.
    """
    try:
        objects = read_objects(path)
    except Exception as error:  # not gzip, not JSON, of any other form
        raise _unreadable(path, entry, error, "export it again") from error
    has_area = ~shapely.is_missing(objects.areas)
    if len(has_area) and not has_area.any():
        raise GroundTruthError(
            f"{entry.name}: {path} holds no polygon: nuclei must be outlined, not marked by points"
        )
    ignored = has_area & np.char.endswith(objects.classes, "*")  # as in QuPath
    tile = has_area & ~ignored & (objects.kinds == "tile")
    ours = has_area & ~ignored & ~tile & are_ours(objects)
    ours &= ~nuclei_of_roi_class(objects, (TO_CORRECT, CORRECTED), _pixel_um2(entry))
    polygons: Polygons = objects.areas[has_area & ~ignored & ~tile & ~ours]
    is_region = holds_several(polygons)
    # A region around one nucleus, or around none, shows by its size alone.
    is_large = ~is_region & _are_large(polygons, entry)
    notes = [
        f"{words}: {count}"
        for words, count in (
            (
                "true contours left out since they contain several others, as regions do",
                np.count_nonzero(is_region),
            ),
            (_LARGE, np.count_nonzero(is_large)),
            ("annotations of PatchCL and its ROIs left out", np.count_nonzero(ours)),
            ("objects without area left out, such as points and lines", (~has_area).sum()),
            ("objects left out of a class that QuPath ignores, such as Ignore*", ignored.sum()),
            ("tiles left out", tile.sum()),
        )
        if count
    ]
    return GroundTruth(
        polygons[~is_region & ~is_large], objects.areas[ignored], "; ".join(notes) or None
    )


def _are_large(polygons: Polygons, entry: ImageEntry) -> NDArray[np.bool_]:
    """(N,) which polygons (N,) at level 0 are too large for nuclei; none without a pixel size."""
    return np.asarray(shapely.area(polygons) * _pixel_um2(entry) > MAX_AREA_UM2, dtype=bool)


def _pixel_um2(entry: ImageEntry) -> float:
    """The area of a pixel at level 0, in µm²; 0 where that is not known."""
    return math.prod(entry.mpp) if entry.mpp else 0.0


def _labels(path: Path, entry: ImageEntry) -> Labels:
    """The pixels (H, W) of a label image."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            pixels = np.load(path, mmap_mode="r")
        elif suffix == ".png":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                pixels = np.asarray(Image.open(path))
        else:
            pixels = _tiff_pixels(path)
    except Exception as error:  # decoders raise anything
        raise _unreadable(path, entry, error, "save it again, or as GeoJSON") from error
    labels: Labels = np.squeeze(pixels)
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise GroundTruthError(
            f"{entry.name}: {path} has no instance labels, but {labels.dtype} of shape "
            f"{labels.shape}: save one channel of integers, 0 for background"
        )
    return labels.astype(labels.dtype.newbyteorder("="), copy=False)


def _tiff_pixels(path: Path) -> NDArray[Any]:
    """The pixels of a TIFF. Raises any Exception for one that is damaged."""
    with tifffile.TiffFile(path) as tiff:
        # A damaged directory may lead anywhere: tifffile would follow it for millions of pages.
        if next(itertools.islice(tiff.pages, MAX_PAGES, None), None) is not None:
            raise ValueError(f"more than {MAX_PAGES:,} pages")
        return np.asarray(tiff.asarray())


def _check_instances(labels: Labels, path: Path, entry: ImageEntry) -> None:
    """Raise GroundTruthError for pixels that are integers, but not a label for each nucleus."""
    if labels.size and labels.min() < 0:
        raise GroundTruthError(
            f"{entry.name}: {path} has negative labels ({labels.min()}): save 0 for background, "
            "and a positive number for each nucleus"
        )
    values = _values(labels)
    if not len(values) or len(values) > MAX_CLASSES:
        return
    pieces = sum(label(labels == value, np.ones((3, 3)))[1] for value in values)
    is_mask = len(values) == 1 and (pieces > 1 or values[0] == np.iinfo(np.uint8).max)
    if is_mask or pieces > MAX_PIECES * len(values):
        raise GroundTruthError(
            f"{entry.name}: {path} is a mask, not instance labels (pieces: {pieces}, values: "
            f"{len(values)}): save another number for each nucleus, or outlines as GeoJSON"
        )


def _values(labels: Labels) -> Labels:
    """The distinct labels, without background; of more than MAX_CLASSES not all."""
    found = labels[:0].ravel()
    for row in range(0, len(labels), 256):
        found = np.union1d(found, labels[row : row + 256])
        if len(found) > MAX_CLASSES + 1:  # soon, in labels of nuclei
            break
    values: Labels = found[found != 0]
    return values


def _scale(path: Path, size: tuple[int, ...], entry: ImageEntry) -> float:
    """Level-0 px per px of a label image of ``size`` (width, height). Raises GroundTruthError."""
    # A slide is opened for its size in px; its pixel size does not matter.
    level0 = entry.size or Slide.open(replace(entry, fallback_mpp=1.0)).size
    coarser, finer = max(1, level0[0] // max(1, size[0])), max(1, size[0] // level0[0])
    if any(n * coarser != n0 * finer for n, n0 in zip(size, level0, strict=True)):
        raise GroundTruthError(
            f"{entry.name} is {level0[0]} x {level0[1]} px, but {path} {size[0]} x {size[1]}: give "
            "labels of that size, or of a whole multiple or fraction of it"
        )
    return coarser / finer


def _unreadable(path: Path, entry: ImageEntry, error: Exception, advice: str) -> GroundTruthError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return GroundTruthError(f"{entry.name}: {path} cannot be read ({reason}): {advice}")
