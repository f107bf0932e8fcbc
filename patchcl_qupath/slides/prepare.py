"""Prepared images, with tissue mask and stain normaliser; random tissue crops for training."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.config import Config
from patchcl_qupath.datatypes import Box, ImageEntry, StainVectors, level0_to_grid
from patchcl_qupath.errors import DamagedError, ImageError, SlideError, TrainingError, count_of
from patchcl_qupath.overlap import Stop, overlapped, usable_cores
from patchcl_qupath.progress import ShowCount
from patchcl_qupath.slides.signature import quick_signature, slide_signature
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.slides.stain_vectors import dab_of, stains_to_measure
from patchcl_qupath.slides.stains import StainNormaliser, colour_densities, is_green_ink
from patchcl_qupath.slides.tissue import (
    check_brightfield,
    sample_boxes,
    tissue_area_px,
    tissue_mask,
)
from patchcl_qupath.storage.files import digest, readable
from patchcl_qupath.storage.records import TILE_FORMAT, FileSignature, to_plain

logger = logging.getLogger(__name__)

_NORMALISER_CROPS = 24  # crops that the normaliser is fitted to
_NORMALISER_CROP_PX = 256
_STAINED = 0.15  # mean optical density of the colours
# How far these differ, relative to their mean, by the median of an image: of 146 images of six sets
# it is 0.33 at least.
_GREY = 0.1
_READ_AT_ONCE = 4  # slides, for training crops
_REASONS = 5  # that are told of images that cannot be used


@dataclass(frozen=True, kw_only=True)
class PreparedImage:
    """An image that is ready to be trained on or segmented.

    ``tissue`` (h, w) is its mask, whose px are ``tissue_px`` working px wide. ``normaliser`` is
    fitted to all tissue, in the analysis region or not; None where there is no tissue. ``region``
    is the analysis region on the working grid; None for the whole image. ``stains`` are measured.
    ``is_green`` where most of the tissue has the colour of green ink, ``is_grey`` where most has no
    colour. ``file`` is the slide's file as it was.
    """

    id: str
    slide: Slide
    file: FileSignature
    tissue: NDArray[np.bool_]
    tissue_px: int
    normaliser: StainNormaliser | None
    region: shapely.Geometry | None
    stains: StainVectors
    is_green: bool = False
    is_grey: bool = False

    def tissue_mm2(self, region: shapely.Geometry | None = None) -> float:
        """Area of the tissue in a region (level 0), or in the analysis region, in mm²."""
        part = self.region if region is None else on_grid(region, self.slide)
        px = tissue_area_px(self.tissue, self.tissue_px, self.slide.shape, part)
        return px * self.slide.mpp**2 / 1e6

    def area_mm2(self, region: shapely.Geometry | None = None) -> float:
        """Area of the part of a region (level 0) that is in the image, in mm².

        Without one, that of the analysis region, or of the whole image.
        """
        rows, cols = self.slide.shape
        part = self.region if region is None else on_grid(region, self.slide)
        area_px = rows * cols if part is None else part.area
        return float(area_px * self.slide.mpp**2 / 1e6)

    def crops(self, n: int, side_px: int, seed: int) -> Iterator[tuple[Box, NDArray[np.uint8]]]:
        """``n`` random tissue crops (side_px, side_px, 3), smaller where the image is.

        Each comes with its box of the working grid. Those with damaged pixels are left out. Raises
        SlideError if there are no others.
        """
        rng, shape = np.random.default_rng(seed), self.slide.shape
        damaged, count = None, 0
        read: dict[Box, NDArray[np.uint8]] = {}  # in a small image, many boxes are the same
        for box in sample_boxes(self.tissue, self.tissue_px, shape, side_px, n, rng):
            try:
                crop = read.get(box)
                if crop is None:
                    crop = read[box] = self.slide.read(box)
            except DamagedError as error:
                damaged = error
                continue
            count += 1
            yield box, crop
        if damaged is not None and not count:
            raise damaged

    def typical_crops(self) -> Iterator[NDArray[np.uint8]]:
        """The tissue crops that the normaliser is fitted to: of all tissue, in any region."""
        return (crop for _, crop in self.crops(_NORMALISER_CROPS, _NORMALISER_CROP_PX, seed=0))

    def fingerprint(self) -> dict[str, Any]:
        """What the nuclei of a tile depend on, beside model and settings: pixels and their frame.

        Neither the path is part of it, nor what the project says of image and pixel size: a project
        that was moved, or saved in QuPath, keeps its finished tiles.
        """
        slide = self.slide
        return {
            "image": slide.number,
            "size": slide.size,
            "origin": slide.origin,
            "levels": slide.levels,
            "mpp_level0": [*map(_digits, slide.mpp_level0)],
            "downsample": [*map(_digits, slide.downsample)],
            "void": None if slide.void is None else slide.void.packed.hex(),
            "form": TILE_FORMAT,
            **to_plain(self.file),
            "region": None
            if self.region is None
            else digest(shapely.to_wkb(self.region, hex=True)),
            "stains": asdict(self.stains),
        }

    def check_unchanged(self) -> None:
        """Raise SlideError where the slide's file is no longer there, or another one is."""
        path = self.slide.path
        try:
            found = slide_signature(path)
        except OSError as error:
            raise SlideError(
                f"{self.slide.name}: {path} can no longer be read ({readable(str(error))}): run "
                "again when it is there; finished tiles are kept"
            ) from error
        self._check_file(found)

    def check_not_replaced(self) -> None:
        """Raise SlideError where another file is at the slide's path, by its size and time alone.

        Of a file that is gone, what was read before is right.
        """
        with suppress(OSError):
            self._check_file(quick_signature(self.slide.path))

    def _check_file(self, found: FileSignature) -> None:
        if not found.is_of(self.file):
            name, path = self.slide.name, self.slide.path
            raise SlideError(f"{name}: {path} changed while it was segmented: run again")


def _digits(length: float) -> float:
    """A length in as many digits as tell: QuPath may have the last ones of a file's otherwise."""
    return float(f"{length:.6g}")


def prepare(entry: ImageEntry, config: Config) -> PreparedImage:
    """Open an image, find its tissue, and fit its stain normaliser to random crops of it.

    It has brown nuclei where its type in QuPath, or the settings, say so, be they ever so few.

    Raises ImageError for an image that cannot be used.
    """
    slide = Slide.open(entry, config.slide.mpp)
    file = slide_signature(slide.path)
    px = slide.thumbnail_px(config.slide.tissue_mpp)
    slide, overview = slide.without_void(config.slide.tissue_mpp)
    check_brightfield(overview.pixels, entry.name)
    if slide.void is not None:
        overview = slide.overview(config.slide.tissue_mpp)
    tissue = tissue_mask(overview.pixels, px * slide.mpp, config.slide.min_tissue_um2)
    tissue |= overview.damaged  # its tiles fail, and are reported, wherever there is tissue or not
    image = PreparedImage(
        id=entry.id,
        slide=slide,
        file=file,
        tissue=tissue,
        tissue_px=px,
        normaliser=None,
        region=_region(entry, slide),
        stains=stains_to_measure(entry.stains, config.slide.stain),
    )
    if not tissue.any():
        return image
    crops = [*image.typical_crops()]
    density = _stained_densities(crops)
    return replace(
        image,
        normaliser=StainNormaliser.fit(crops, has_dab=dab_of(image.stains) is not None),
        is_green=bool(density.size and is_green_ink(*density).mean() > 0.5),
        is_grey=bool(
            density.size and np.median(np.ptp(density, axis=0) / density.mean(axis=0)) < _GREY
        ),
    )


def _stained_densities(crops: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """Optical densities of red, green and blue (3, N) of the stained pixels of crops (H, W, 3)."""
    density = np.concatenate([colour_densities(crop).reshape(3, -1) for crop in crops], axis=1)
    return np.asarray(density[:, density.mean(axis=0) > _STAINED])


def _region(entry: ImageEntry, slide: Slide) -> shapely.Geometry | None:
    """An image's analysis regions as one geometry on the working grid, clipped to it."""
    if not entry.regions:
        return None
    region = on_grid(shapely.union_all(entry.regions), slide)
    if not region.area:
        raise ImageError(
            f"{entry.name}: its regions lie outside the image, which has "
            f"{slide.size[0]} x {slide.size[1]} px: export them anew from this very image"
        )
    return region


def on_grid(geometry: shapely.Geometry, slide: Slide) -> shapely.Geometry:
    """A geometry from level 0 to the working grid, clipped to it."""
    rows, cols = slide.shape
    return level0_to_grid(geometry, slide.downsample) & shapely.box(0, 0, cols, rows)


@dataclass(frozen=True)
class TrainingCrops:
    """Random tissue crops of several slides; the tuples have one item for each crop.

    ``images`` are RGB (H, W, 3); ``normalisers`` those of each crop's slide; ``slides`` the ids of
    these in the project: equal for crops of one slide, and for these alone; ``boxes`` those of the
    crops on the working grids of their slides.
    """

    images: tuple[NDArray[np.uint8], ...]
    normalisers: tuple[StainNormaliser, ...]
    slides: tuple[str, ...]
    boxes: tuple[Box, ...]

    def __len__(self) -> int:
        return len(self.images)

    def of_slide(self, slide: str) -> list[int]:
        """The indices of the crops of one slide."""
        return [i for i, of in enumerate(self.slides) if of == slide]

    def some(self, most: int) -> TrainingCrops:
        """At most so many of the crops, evenly spaced in their order."""
        indices = np.linspace(0, len(self) - 1, min(len(self), most)).astype(int)
        return self.select(indices.tolist())

    def select(self, indices: Sequence[int]) -> TrainingCrops:
        """Some of the crops, in the order of their indices."""
        return TrainingCrops(
            tuple(self.images[i] for i in indices),
            tuple(self.normalisers[i] for i in indices),
            tuple(self.slides[i] for i in indices),
            tuple(self.boxes[i] for i in indices),
        )


class _ImageCrops(NamedTuple):
    """Tissue crops of an image, with their boxes; its id in the project, and its normaliser."""

    id: str
    normaliser: StainNormaliser
    crops: list[tuple[Box, NDArray[np.uint8]]]


def _crops_of(entry: ImageEntry, config: Config, count: int) -> _ImageCrops:
    """So many crops of an image. Raises ImageError."""
    image, settings = prepare(entry, config), config.patchcl
    if image.normaliser is None:
        raise ImageError(f"{entry.name} shows no tissue")
    crops = image.crops(count, settings.source_px, settings.seed + 1)
    return _ImageCrops(image.id, image.normaliser, [*crops])


def training_crops(
    entries: Sequence[ImageEntry],
    config: Config,
    show_count: ShowCount,
) -> TrainingCrops:
    """Random tissue crops of up to ``config.patchcl.slides`` images, some read at once.

    Of an image and its duplicates in QuPath one is read. Images that cannot be used are left out,
    with a warning, and more crops of the others are read. Raises TrainingError, with the reasons,
    if none is left.
    """
    settings = config.patchcl
    order = np.random.default_rng(settings.seed).permutation(len(entries))
    different: dict[object, ImageEntry] = {}
    for i in order:
        # A duplicate that is rotated cannot be used, but the image can.
        different.setdefault((entries[i].pixels, entries[i].problem), entries[i])
    shuffled = [*different.values()]
    wanted = min(len(shuffled), settings.slides)
    crops_each = math.ceil(settings.crops / max(1, wanted))
    usable: list[ImageEntry] = []
    found: list[_ImageCrops] = []
    problems: list[str] = []
    at_once = max(1, min(wanted, usable_cores(), _READ_AT_ONCE))
    read = partial(_crops_of, config=config, count=crops_each)
    show_count(0, wanted)
    results = overlapped(read, shuffled, at_once, Stop())
    for entry, result in zip(shuffled, results, strict=True):
        try:
            found.append(result.result())
        except ImageError as error:
            problems.append(str(error))
            continue
        usable.append(entry)
        show_count(len(usable), wanted)
        if len(usable) == wanted:
            break
    reasons = "; ".join([*problems[:_REASONS], *["and others"][: len(problems) > _REASONS]])
    if not usable:
        advice = "add some to the project in QuPath"
        raise TrainingError(f"no image to train on: {reasons or advice}")
    if problems:
        left_out = count_of(len(problems), "image")
        logger.warning("not trained on %s that cannot be used: %s", left_out, reasons)
    if len(usable) < wanted:  # which must yield the crops of all
        return training_crops(usable, config, show_count)
    show_count(wanted, wanted)
    return TrainingCrops(
        images=tuple(crop for image in found for _, crop in image.crops),
        normalisers=tuple(image.normaliser for image in found for _ in image.crops),
        slides=tuple(image.id for image in found for _ in image.crops),
        boxes=tuple(box for image in found for box, _ in image.crops),
    )
