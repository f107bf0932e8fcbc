"""Tissue masks: which pixels of a thumbnail show tissue, and random boxes around them."""

from __future__ import annotations

import math

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy import ndimage
from skimage.morphology import remove_small_holes, remove_small_objects

from patchcl_qupath.datatypes import Box
from patchcl_qupath.errors import ImageError
from patchcl_qupath.slides.void import MAX_VOID

# Fixed thresholds on optical density, not Otsu's: Otsu's finds tissue on blank glass, too.
MIN_COLOUR = 0.03  # densest minus clearest channel, of stain; grey dirt and shade have no colour
MIN_DENSITY = 0.12  # mean of the channels, of tissue without a colour (folds, pigment)
MIN_WHITE = 230  # intensity of glass at least: the palest stroma of a crop is not its glass
MIN_LIGHT = 15  # intensity of the darkest channel of H&E at least; fluorescence is black
MIN_LIGHT_BESIDE_VOID = 35  # in what is left of fluorescence without its black
MIN_BRIGHT = 60  # intensity of the brightest channel of stained tissue at least
MAX_DIM = 0.25  # fraction of an image that may be darker: fluorescence fades into black
MAX_CROP_UM2 = 1e6  # area of an image that may well have no glass
MIN_PINK = 0.008  # optical density of green above that of red and blue; glass has up to 0.006
MIN_SPECKS = 8  # stained specks that are no dirt
SPECKS_UM = 80.0  # radius that joins these
CLOSE_UM = 24.0  # radius that closes gaps in fat and loose stroma
GROW_UM = 16.0  # radius that keeps nuclei on the border whole
AREA_SAMPLES = 250_000  # points, about, at which the area of tissue in a region is sampled


def check_brightfield(thumbnail: NDArray[np.uint8], name: str) -> None:
    """Raise ImageError for a thumbnail (h, w, 3) that is not of brightfield microscopy."""
    void = thumbnail.max(axis=2) <= MAX_VOID
    lit = thumbnail[~void]
    least = MIN_LIGHT_BESIDE_VOID if void.any() else MIN_LIGHT
    is_dark = lit.size == 0 or np.median(lit.min(axis=1)) < least
    if is_dark or (lit.max(axis=1) < MIN_BRIGHT).mean() > MAX_DIM:
        raise ImageError(
            f"{name} is dark all over, as fluorescence is: only brightfield (H&E) images can be "
            "segmented, take it out of the project"
        )


def tissue_mask(
    thumbnail: NDArray[np.uint8], mpp: float, min_tissue_um2: float = 20_000.0
) -> NDArray[np.bool_]:
    """The tissue mask (h, w) of a thumbnail (h, w, 3) of ``mpp`` µm/px.

    Gaps of up to 48 µm are closed. Specks smaller than ``min_tissue_um2``, or than a twentieth of
    the image if that is less, are dropped, and holes smaller than that filled. The rest is dilated
    by 16 µm. Voids of the scanner are no tissue.

    In a crop of up to 1 mm², there may be no glass to compare with. It is all tissue where even its
    brightest pixels are pink, and it is tissue between many stained specks, which are nuclei.
    """
    void = thumbnail.max(axis=2) <= MAX_VOID  # (h, w)
    if void.all():
        return np.zeros_like(void)
    brightest = np.percentile(thumbnail[~void], 99, axis=0)  # (3,)
    is_crop = thumbnail[..., 0].size * mpp**2 <= MAX_CROP_UM2
    is_pink = _is_pink(brightest)
    if is_crop and is_pink:
        return np.asarray(~void)
    white = _white(brightest, may_be_tissue=is_crop or is_pink)
    density = np.log10(white / np.maximum(thumbnail, 1))  # (h, w, 3)
    colour = density.max(axis=2) - density.min(axis=2)
    tissue = ((colour > MIN_COLOUR) | (density.mean(axis=2) > MIN_DENSITY)) & ~void
    if is_crop:
        tissue |= _between_specks(tissue, mpp)
    tissue = ~_dilated(~_dilated(tissue, CLOSE_UM / mpp), CLOSE_UM / mpp)
    smallest_px = min(min_tissue_um2 / mpp**2, tissue.size / 20)
    speck_px = max(0, math.ceil(smallest_px) - 1)  # size of the largest that is dropped
    tissue = remove_small_objects(tissue, max_size=speck_px)
    tissue = remove_small_holes(tissue, max_size=speck_px)
    return np.asarray(_dilated(tissue, GROW_UM / mpp) & ~void)


def _white(brightest: NDArray[np.float64], *, may_be_tissue: bool) -> NDArray[np.float64]:
    """The intensity of glass (R, G, B), from that of the brightest pixels.

    Each channel is as bright as that of glass at least, where the brightest pixels are no tissue
    then. Where they would be, and cannot be that of pale tissue, it is glass with a tint, of the
    lamp or the mounting medium, which is no stain; or that of a lamp that was turned down.
    """
    white = np.maximum(brightest, MIN_WHITE)
    density = np.log10(white / np.maximum(brightest, 1))
    if may_be_tissue:
        return np.asarray(white)
    if density.mean() > MIN_DENSITY:
        return brightest
    if density.max() - density.min() <= MIN_COLOUR:
        return np.asarray(white)
    return np.asarray(brightest * max(1.0, MIN_WHITE / brightest.max()))


def _is_pink(brightest: NDArray[np.float64]) -> bool:
    """Whether the brightest pixels (R, G, B) are of eosin, which glass is not: green is darker."""
    red, green, blue = np.log10(np.maximum(brightest, 1))
    return bool(min(red, blue) - green > MIN_PINK)


def _between_specks(tissue: NDArray[np.bool_], mpp: float) -> NDArray[np.bool_]:
    """The area (h, w) between specks that are near each other, where they are many."""
    specks, speck_count = ndimage.label(tissue)
    if speck_count < MIN_SPECKS:
        return tissue
    labels, count = ndimage.label(_dilated(tissue, SPECKS_UM / mpp))
    pairs = np.unique(np.stack([labels[tissue], specks[tissue]]), axis=1)
    many = np.bincount(pairs[0], minlength=count + 1) >= MIN_SPECKS
    return np.asarray(~_dilated(~(many[labels] & (labels > 0)), SPECKS_UM / mpp))


def _dilated(mask: NDArray[np.bool_], radius_px: float) -> NDArray[np.bool_]:
    """The mask dilated by a disc."""
    # isotropic_dilation and isotropic_closing of scikit-image do not check this: the distances to
    # an empty mask, as that of the glass of a crop that is all tissue, are to a pixel beyond a
    # corner.
    if not mask.any():
        return mask
    return np.asarray(ndimage.distance_transform_edt(~mask) <= radius_px)


def sample_boxes(
    tissue: NDArray[np.bool_],
    tissue_px: int,
    shape: tuple[int, int],
    size_px: int,
    count: int,
    rng: np.random.Generator,
) -> list[Box]:
    """``count`` boxes of ``size_px`` a side around random tissue; none where there is no tissue.

    A px of ``tissue`` is ``tissue_px`` working px wide. Boxes lie inside the working grid of
    ``shape`` (rows, cols): at its edges they are shifted, and where it is smaller, cropped to it.
    """
    pixels = np.argwhere(tissue)  # (n, 2) row, col
    if len(pixels) == 0:
        return []
    chosen = pixels[rng.integers(len(pixels), size=count)]
    centres = (chosen + rng.random(chosen.shape)) * tissue_px
    size = np.minimum(size_px, shape)
    firsts = np.clip((centres - size / 2).astype(int), 0, np.array(shape) - size)
    return [Box(*first, *(first + size).tolist()) for first in firsts.tolist()]


def inside(
    tissue: NDArray[np.bool_], tissue_px: int, rows: NDArray[np.int64], cols: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether pixels (n,) of the working grid lie on tissue: (n,) bool."""
    return np.asarray(tissue[rows // tissue_px, cols // tissue_px])


def inside_region(
    region: shapely.Geometry, box: Box, rows: NDArray[np.int64], cols: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Whether the centres of pixels (n,) of a box of the grid lie in a region: (n,) bool."""
    return np.asarray(shapely.contains_xy(part_of_region(region, box), cols + 0.5, rows + 0.5))


def part_of_region(region: shapely.Geometry, box: Box) -> shapely.Geometry:
    """The part of a region that lies in a box of the grid.

    GEOS builds an index of points in a geometry, which is not thread-safe: so each tile has one of
    its own, which is smaller, too.
    """
    # GEOS's clip_by_rect loses parts of polygons that have corners on the rectangle.
    return shapely.intersection(region, shapely.box(box.col0, box.row0, box.col1, box.row1))


def tissue_area_px(
    tissue: NDArray[np.bool_],
    tissue_px: int,
    shape: tuple[int, int],
    region: shapely.Geometry | None,
) -> float:
    """The area of tissue in the working grid of ``shape`` (rows, cols), in working px.

    With a region of that grid, the area in it. The last px of the mask may reach beyond the grid.
    """
    if region is None:
        heights, widths = (
            np.clip(side - tissue_px * np.arange(count), 0, tissue_px)
            for side, count in zip(shape, tissue.shape, strict=True)
        )
        return float(heights @ tissue @ widths)
    # Each part by itself: in a box around parts that lie far apart, each would have a few points.
    parts = [part for part in shapely.get_parts(region) if part.area]
    samples = AREA_SAMPLES / max(1, len(parts))
    return sum((_part_area_px(tissue, tissue_px, part, samples) for part in parts), 0.0)


def _part_area_px(
    tissue: NDArray[np.bool_], tissue_px: int, region: shapely.Geometry, samples: float
) -> float:
    """The area of tissue in a region of one part, sampled at so many points, about."""
    x0, y0, x1, y1 = (bound / tissue_px for bound in region.bounds)
    row, col = math.floor(y0), math.floor(x0)
    around = tissue[row : math.ceil(y1), col : math.ceil(x1)]
    # Many for each px of the mask where the region is small.
    n = int(np.clip(math.sqrt(samples / max(1, around.size)), 1, 64))
    x = ((np.arange(around.shape[1] * n) + 0.5) / n + col) * tissue_px
    inside_count = tissue_count = 0
    for line in range(around.shape[0] * n):
        found = shapely.contains_xy(region, x, ((line + 0.5) / n + row) * tissue_px)
        inside_count += int(np.count_nonzero(found))
        tissue_count += int(np.count_nonzero(found & np.repeat(around[line // n], n)))
    if not inside_count:  # it lies between the points, as an island of a few pixels may
        x_px, y_px = np.floor(shapely.point_on_surface(region).coords[0] / np.float64(tissue_px))
        return float(region.area * bool(tissue[int(y_px) :, int(x_px) :][:1, :1].any()))
    # As a share of the region: tissue is not larger than the region that it fills.
    return float(region.area * tissue_count / inside_count)
