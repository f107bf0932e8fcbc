"""From a confidence map to instance labels: one label for each nucleus.

Touching nuclei are separated by hill climbing. Each pixel of the mask steps to its highest
neighbour on a map of the distance to the background, again and again, until it reaches a summit;
pixels that share a summit share a nucleus. It is the watershed of that map, but unlike flooding
from a queue it depends on nothing farther away than the nucleus itself, so that a nucleus gets
the same pixels in each tile that sees it whole. No step here looks at the tile as a whole.
"""

from __future__ import annotations

from typing import Any

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
    basins = _climb(height, mask, config.marker_radius_um / mpp)
    basins = _merge_shallow(basins, height, config.min_saddle_depth_um)
    return _number(basins, core, mpp, config)


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
    depth = np.minimum(_distance(mask, config.max_depth_um / mpp) * mpp, config.max_depth_um)
    if core is not None:
        depth += config.core_um * core
    return np.asarray(
        ndimage.gaussian_filter(depth, config.smooth_um / mpp, truncate=4), np.float32
    )


def _distance(mask: NDArray[np.bool_], most: float) -> NDArray[np.float64]:
    """Distance (H, W) to the nearest pixel outside the mask; exact up to ``most``, and no less.

    By columns, then by rows (as A. Meijster et al., 2000), but no farther than needed: three times
    as fast as a whole transform.
    """
    reach = int(np.ceil(most))
    far = reach + 1
    small = np.int16 if 2 * far**2 < 2**15 else np.int32  # half the memory, twice as fast
    down = np.where(mask, small(far), small(0))
    for row in range(1, len(down)):
        np.minimum(down[row], down[row - 1] + small(1), out=down[row])
    for row in range(len(down) - 2, -1, -1):
        np.minimum(down[row], down[row + 1] + small(1), out=down[row])
    down *= down
    square, farther = down.copy(), np.empty_like(down)
    for step in range(1, min(reach + 1, down.shape[1])):
        np.add(down, small(step**2), out=farther)
        np.minimum(square[:, step:], farther[:, :-step], out=square[:, step:])
        np.minimum(square[:, :-step], farther[:, step:], out=square[:, :-step])
    return np.asarray(np.sqrt(np.arange(2 * far**2 + 1))[square], np.float64)


def _climb(
    height: NDArray[np.float32], mask: NDArray[np.bool_], radius_px: float
) -> NDArray[np.int32]:
    """Each mask pixel's basin (H, W): 1..N, in the order of their summits; 0 outside the mask.

    A summit is a pixel with no higher one within ``radius_px`` in its connected piece; of equally
    high pixels the one with the larger (row, col) counts as higher. Every step goes up in that
    order, which has no cycles and does not depend on where the tile begins.
    """
    margin = int(np.ceil(radius_px)) + 1
    pieces, _ = ndimage.label(mask, _CROSS)
    width = mask.shape[1] + 2 * margin
    piece = np.pad(pieces, margin).ravel()
    pixels = np.flatnonzero(piece)
    # Heights are not negative, so that they sort as their bits do; the place breaks ties.
    rank = np.full(piece.size, -1, dtype=np.int64)
    bits = height[mask].view(np.int32).astype(np.int64)
    rank[pixels] = bits << 32 | pixels

    parent = _highest(pixels, rank, piece, _steps(1.5, width))
    peaks = parent == pixels  # higher than their neighbours, but farther out?
    parent[peaks] = _highest(pixels[peaks], rank, piece, _steps(radius_px, width))
    place = np.empty(piece.size, dtype=np.int32)
    place[pixels] = np.arange(len(pixels))
    root = _roots(place[parent])
    number = np.cumsum(root == np.arange(len(pixels)), dtype=np.int32)
    basins = np.zeros(mask.shape, dtype=np.int32)
    basins[mask] = number[root]
    return basins


def _highest(
    pixels: NDArray[np.int64],
    rank: NDArray[np.int64],
    piece: NDArray[np.int32],
    steps: NDArray[np.int64],
) -> NDArray[np.int64]:
    """For each pixel, the highest of itself and its neighbours of the same piece."""
    best = rank[pixels]
    own_piece = piece[pixels]
    for step in steps:  # a few dozen at most; all pixels at once
        there = pixels + step
        np.maximum(best, rank[there], out=best, where=piece[there] == own_piece)
    return best & 0xFFFFFFFF


def _roots(parent: NDArray[np.integer[Any]]) -> NDArray[np.integer[Any]]:
    """Where each chain of parents (N,) ends, by strides that double each time round."""
    while True:
        grandparent = parent[parent]
        if np.array_equal(grandparent, parent):
            return parent
        parent = grandparent


def _merge_shallow(
    basins: NDArray[np.int32], height: NDArray[np.float32], min_depth_um: float
) -> NDArray[np.int32]:
    """Join a nucleus to its higher neighbour where hardly a saddle parts them.

    The saddle between two is the highest pass along their common border. A summit that rises less
    than ``min_depth_um`` above its highest saddle is a bump on its neighbour's flank.
    """
    inside = np.flatnonzero(basins)
    peak = np.full(basins.max(initial=0) + 1, -np.inf, dtype=np.float32)
    np.maximum.at(peak, basins.ravel()[inside], height.ravel()[inside])

    pairs, passes = [], []
    for a, b in (
        (np.s_[:, :-1], np.s_[:, 1:]),
        (np.s_[:-1], np.s_[1:]),
    ):
        border = (basins[a] != basins[b]) & (basins[a] > 0) & (basins[b] > 0)
        ab = np.stack([basins[a][border], basins[b][border]], axis=-1)
        pairs += [ab, ab[:, ::-1]]
        passes += [np.minimum(height[a][border], height[b][border])] * 2
    low, high = np.concatenate(pairs).T
    saddle = np.concatenate(passes)

    uphill = (peak[high] > peak[low]) | ((peak[high] == peak[low]) & (high > low))
    shallow = uphill & (peak[low] - saddle < min_depth_um)
    low, high, saddle = low[shallow], high[shallow], saddle[shallow]
    parent = np.arange(len(peak), dtype=np.int32)
    order = np.lexsort([high, saddle])  # the highest saddle is written last, and stays
    parent[low[order]] = high[order]
    return np.asarray(_roots(parent)[basins], np.int32)


def _number(
    basins: NDArray[np.int32], core: NDArray[np.float32] | None, mpp: float, config: SegmentConfig
) -> NDArray[np.int32]:
    """Labels 1..N for the pixels of each basin, without those of the wrong size or no core."""
    pixels = np.flatnonzero(basins)
    order = np.argsort(basins.ravel()[pixels], kind="stable")  # by nucleus, then row by row
    pixels = pixels[order]
    start = np.flatnonzero(np.diff(basins.ravel()[pixels], prepend=0))
    count = np.diff(start, append=len(pixels))
    labels = np.zeros(basins.size, dtype=np.int32)
    if len(start):
        rows, cols = np.divmod(pixels, basins.shape[1])
        tall = rows[start + count - 1] - rows[start] + 1
        wide = np.maximum.reduceat(cols, start) - np.minimum.reduceat(cols, start) + 1
        area = count * mpp**2
        keep = (area >= config.min_area_um2) & (area <= config.max_area_um2)
        keep &= np.maximum(tall, wide) * mpp <= config.max_diameter_um
        if core is not None:
            keep &= np.maximum.reduceat(core.ravel()[pixels], start) >= config.min_core
        labels[pixels] = np.repeat(np.where(keep, np.cumsum(keep), 0), count)
    return labels.reshape(basins.shape)


def _disc(radius: float) -> NDArray[np.bool_]:
    reach = int(radius)
    rows, cols = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return np.asarray(rows**2 + cols**2 <= radius**2)


def _steps(radius: float, width: int) -> NDArray[np.int64]:
    """Flat offsets to all pixels within ``radius``, in a map ``width`` wide."""
    rows, cols = np.nonzero(_disc(radius))
    steps = (rows - int(radius)) * width + cols - int(radius)
    return np.asarray(steps[steps != 0])
