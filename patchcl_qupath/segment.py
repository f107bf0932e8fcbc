"""From a confidence map to instance labels: one label for each nucleus.

Touching nuclei are separated by hill climbing. Each pixel of the mask steps to its highest
neighbour on a map of the distance to the background, again and again, until it reaches a summit;
pixels that share a summit share a nucleus. It is the watershed of that map, but unlike flooding
from a queue it depends on nothing farther away than the nucleus itself, so that a nucleus gets
the same pixels in each tile that sees it whole. No step here looks at the tile as a whole.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from patchcl_qupath.config import SegmentConfig

_CROSS = ndimage.generate_binary_structure(2, 1)  # pixels connect by edges, not by corners


def context_um(config: SegmentConfig) -> float:
    """How far outside its tile's write box a nucleus that the tile owns can depend on pixels.

    A convex shape reaches at most two thirds of its diameter from its centroid; the height of
    its outermost pixels depends on the mask up to ``max_depth_um`` farther, and smoothing and the
    search for a higher summit look a little beyond that.
    """
    look = 4 * config.smooth_um + config.marker_radius_um + 2 * config.open_radius_um
    return 2 / 3 * config.max_diameter_um + config.max_depth_um + look


def instances(
    confidence: NDArray[np.float32],
    mpp: float,
    config: SegmentConfig,
    threshold: float = 0.5,
    core: NDArray[np.float32] | None = None,
) -> NDArray[np.int32]:
    """Nuclei of a confidence map (H, W) in [0, 1], as labels (H, W): 0 is background, 1..N nuclei.

    ``core`` (H, W) in [0, 1], where the network tells it, is high in the middle of each nucleus:
    it parts nuclei that touch, and blobs without a core are no nuclei.

    ``mpp`` is in um per pixel. Labels are numbered by the position of the nucleus's summit, row by
    row. Pieces below ``min_area_um2``, and blobs above ``max_area_um2`` or ``max_diameter_um``,
    are no nuclei.
    """
    mask = _mask(confidence > threshold, mpp, config)
    height = _height(mask, core, mpp, config)
    summit = _climb(height, mask, config.marker_radius_um / mpp)
    summit = _merge_shallow(summit, height, mask, config.min_saddle_depth_um)
    return _number(summit, core, mpp, config)


def _mask(above: NDArray[np.bool_], mpp: float, config: SegmentConfig) -> NDArray[np.bool_]:
    """Remove hairs and specks, fill small holes."""
    radius = config.open_radius_um / mpp
    mask = np.asarray(ndimage.binary_opening(above, _disc(radius))) if radius >= 1 else above
    holes, _ = ndimage.label(~mask, _CROSS)
    small = np.bincount(holes.ravel()) * mpp**2 < config.max_hole_um2
    small[0] = False  # what is not a hole is mask already
    mask = mask | small[holes]
    pieces, _ = ndimage.label(mask, _CROSS)
    large = np.bincount(pieces.ravel()) * mpp**2 >= config.min_area_um2
    large[0] = False
    return np.asarray(large[pieces])


def _height(
    mask: NDArray[np.bool_], core: NDArray[np.float32] | None, mpp: float, config: SegmentConfig
) -> NDArray[np.float32]:
    """The landscape to climb: the depth inside the mask, in um, higher in cores; smoothed."""
    depth = np.minimum(ndimage.distance_transform_edt(mask) * mpp, config.max_depth_um)
    if core is not None:
        depth += config.core_um * core
    return np.asarray(
        ndimage.gaussian_filter(depth, config.smooth_um / mpp, truncate=4), np.float32
    )


def _climb(
    height: NDArray[np.float32], mask: NDArray[np.bool_], radius_px: float
) -> NDArray[np.int64]:
    """Each mask pixel's summit, as 1 + its flat index in the padded map; 0 outside the mask.

    A summit is a pixel with no higher one within ``radius_px`` in its connected piece; of equally
    high pixels the one with the larger (row, col) counts as higher. Every step goes up in that
    order, which has no cycles and does not depend on where the tile begins.
    """
    margin = int(np.ceil(radius_px)) + 1
    pieces, _ = ndimage.label(mask, _CROSS)
    width = mask.shape[1] + 2 * margin
    land = np.pad(height, margin).ravel()
    piece = np.pad(pieces, margin).ravel()
    pixels = np.flatnonzero(piece)

    parent = np.arange(land.size)
    parent[pixels] = _highest(pixels, land, piece, _steps(1.5, width))
    peaks = pixels[parent[pixels] == pixels]  # higher than their neighbours, but farther out?
    parent[peaks] = _highest(peaks, land, piece, _steps(radius_px, width))
    summit = np.zeros(land.size, dtype=np.int64)
    summit[pixels] = 1 + _roots(parent, pixels)
    return summit.reshape(-1, width)[margin:-margin, margin:-margin]


def _highest(
    pixels: NDArray[np.int64],
    land: NDArray[np.float32],
    piece: NDArray[np.int32],
    steps: NDArray[np.int64],
) -> NDArray[np.int64]:
    """For each pixel, the highest of itself and its neighbours of the same piece."""
    best = pixels.copy()
    best_height = land[pixels]
    own_piece = piece[pixels]
    for step in steps:  # a few dozen at most; all pixels at once
        there = pixels + step
        there_height = land[there]
        higher = (there_height > best_height) | ((there_height == best_height) & (there > best))
        higher &= piece[there] == own_piece
        best[higher] = there[higher]
        best_height[higher] = there_height[higher]
    return best


def _roots(parent: NDArray[np.int64], start: NDArray[np.int64]) -> NDArray[np.int64]:
    """Follow ``parent`` to the end, doubling the stride each time round."""
    while True:
        grandparent = parent[parent]
        if np.array_equal(grandparent, parent):
            return parent[start]
        parent = grandparent


def _merge_shallow(
    summit: NDArray[np.int64],
    height: NDArray[np.float32],
    mask: NDArray[np.bool_],
    min_depth_um: float,
) -> NDArray[np.int64]:
    """Join a nucleus to its higher neighbour where hardly a saddle parts them.

    The saddle between two is the highest pass along their common border. A summit that rises less
    than ``min_depth_um`` above its highest saddle is a bump on its neighbour's flank.
    """
    names, basin = np.unique(summit[mask], return_inverse=True)
    basins = np.zeros(mask.shape, dtype=np.int64)
    basins[mask] = basin
    peak = np.full(len(names), -np.inf, dtype=np.float32)
    np.maximum.at(peak, basin, height[mask])

    pairs, passes = [], []
    for a, b in (
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1], np.s_[1:]),
    ):
        border = (basins[a] != basins[b]) & mask[a] & mask[b]
        ab = np.stack([basins[a][border], basins[b][border]], axis=-1)
        pairs += [ab, ab[:, ::-1]]
        passes += [np.minimum(height[a][border], height[b][border])] * 2
    low, high = np.concatenate(pairs).T
    saddle = np.concatenate(passes)

    uphill = (peak[high] > peak[low]) | ((peak[high] == peak[low]) & (high > low))
    shallow = uphill & (peak[low] - saddle < min_depth_um)
    low, high, saddle = low[shallow], high[shallow], saddle[shallow]
    parent = np.arange(len(names))
    order = np.lexsort([high, saddle])  # the highest saddle is written last, and stays
    parent[low[order]] = high[order]
    merged = np.zeros_like(summit)
    merged[mask] = names[_roots(parent, np.arange(len(names)))][basin]
    return merged


def _number(
    summit: NDArray[np.int64], core: NDArray[np.float32] | None, mpp: float, config: SegmentConfig
) -> NDArray[np.int32]:
    """Labels 1..N for the pixels of each summit, without those of the wrong size or no core."""
    pixels = np.flatnonzero(summit)
    order = np.argsort(summit.ravel()[pixels], kind="stable")  # by nucleus, then row by row
    pixels = pixels[order]
    start = np.flatnonzero(np.diff(summit.ravel()[pixels], prepend=0))
    count = np.diff(start, append=len(pixels))
    labels = np.zeros(summit.size, dtype=np.int32)
    if len(start):
        rows, cols = np.divmod(pixels, summit.shape[1])
        tall = rows[start + count - 1] - rows[start] + 1
        wide = np.maximum.reduceat(cols, start) - np.minimum.reduceat(cols, start) + 1
        area = count * mpp**2
        keep = (area >= config.min_area_um2) & (area <= config.max_area_um2)
        keep &= np.maximum(tall, wide) * mpp <= config.max_diameter_um
        if core is not None:
            keep &= np.maximum.reduceat(core.ravel()[pixels], start) >= config.min_core
        labels[pixels] = np.repeat(np.where(keep, np.cumsum(keep), 0), count)
    return labels.reshape(summit.shape)


def _disc(radius: float) -> NDArray[np.bool_]:
    reach = int(radius)
    rows, cols = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return np.asarray(rows**2 + cols**2 <= radius**2)


def _steps(radius: float, width: int) -> NDArray[np.int64]:
    """Flat offsets to all pixels within ``radius``, in a map ``width`` wide."""
    rows, cols = np.nonzero(_disc(radius))
    steps = (rows - int(radius)) * width + cols - int(radius)
    return np.asarray(steps[steps != 0])
