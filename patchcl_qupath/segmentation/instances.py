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

from patchcl_qupath.compiled import compiled, take
from patchcl_qupath.config import SegmentConfig

_CROSS = ndimage.generate_binary_structure(2, 1)  # pixels connect by edges, not by corners


def postprocessing_margin_um(config: SegmentConfig) -> float:
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
    pieces = _pieces(confidence > threshold, mpp, config)
    elevation = _elevation(pieces > 0, core, mpp, config)
    near, far = _offsets(1.5), _offsets(config.marker_radius_um / mpp)
    basins, peak = _steepest_ascent(elevation, pieces, near, far)
    into = _merge_low_prominence(basins, peak, elevation, np.float32(config.min_prominence_um))
    return take(_number(basins, into, core, mpp, config), basins)


def _pieces(above: NDArray[np.bool_], mpp: float, config: SegmentConfig) -> NDArray[np.int32]:
    """The connected pieces (H, W) of what is above, without hairs, specks and small holes."""
    radius = config.open_radius_um / mpp
    mask = np.asarray(ndimage.binary_opening(above, _disc(radius))) if radius >= 1 else above
    holes, count = ndimage.label(~mask, _CROSS)
    stay = _sizes(holes, count) * mpp**2 >= config.max_hole_um2
    stay[0] = False  # what is not a hole is mask already
    pieces, count = ndimage.label(take(~stay, holes), _CROSS)
    large = _sizes(pieces, count) * mpp**2 >= config.min_area_um2
    large[0] = False
    return take(np.where(large, np.arange(count + 1), 0).astype(np.int32), pieces)


@compiled
def _sizes(labels: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """How many pixels have each label 0..N: (N + 1,)."""
    sizes = np.zeros(count + 1, np.int64)
    for label in labels.flat:
        sizes[label] += 1
    return sizes


def _elevation(
    mask: NDArray[np.bool_], core: NDArray[np.float32] | None, mpp: float, config: SegmentConfig
) -> NDArray[np.float32]:
    """The landscape to climb: the depth inside the mask, in um, higher in cores; smoothed."""
    depth = np.minimum(_distance(mask, config.max_depth_um / mpp) * mpp, config.max_depth_um)
    if core is not None:
        depth += config.core_um * core
    sigma = config.smooth_um / mpp
    if sigma == 0:
        return depth.astype(np.float32)
    x = np.arange(int(4 * sigma + 0.5) + 1)
    taps = np.exp(-0.5 * (x / sigma) ** 2)
    return _smooth(depth, mask, taps / (2 * taps.sum() - taps[0]))


@compiled
def _smooth(
    values: NDArray[np.float64], mask: NDArray[np.bool_], taps: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Values (H, W) blurred with a kernel of ``taps`` from its middle on; 0 outside of the mask.

    Mirrored at the border. Down the columns first, for a whole row at once; then along the row, but
    where the mask is only, a fifth of a slide.
    """
    rows, cols = values.shape
    blurred = np.zeros((rows, cols), np.float32)
    line = np.empty(cols)
    for row in range(rows):
        line[:] = values[row] * taps[0]
        for k in range(len(taps) - 1, 0, -1):
            line += (values[_mirrored(row - k, rows)] + values[_mirrored(row + k, rows)]) * taps[k]
        for col in range(cols):
            if mask[row, col]:
                total = line[col] * taps[0]
                for k in range(len(taps) - 1, 0, -1):
                    total += (
                        line[_mirrored(col - k, cols)] + line[_mirrored(col + k, cols)]
                    ) * taps[k]
                blurred[row, col] = total
    return blurred


@compiled
def _mirrored(at: int, length: int) -> int:
    """An index as far inside as ``at`` is outside."""
    while not 0 <= at < length:
        at = -1 - at if at < 0 else 2 * length - 1 - at
    return at


@compiled
def _distance(mask: NDArray[np.bool_], most: float) -> NDArray[np.float64]:
    """Distance (H, W) to the nearest pixel outside the mask; exact up to ``most``, and no less.

    By columns, then by rows (as A. Meijster et al., 2000), but no farther than needed.
    """
    rows, cols = mask.shape
    reach = int(np.ceil(most))
    down = np.zeros((rows, cols), np.int32)  # to the nearest pixel outside in the same column
    for row in range(rows):
        for col in range(cols):
            if mask[row, col]:
                above = down[row - 1, col] if row else reach
                down[row, col] = min(above, reach) + 1
    for row in range(rows - 2, -1, -1):
        for col in range(cols):
            down[row, col] = min(down[row, col], down[row + 1, col] + 1)
    distance = np.zeros((rows, cols))
    for row in range(rows):
        for col in range(cols):
            square = down[row, col] ** 2
            step = 1
            while step <= reach and step**2 < square:
                if col >= step:
                    square = min(square, down[row, col - step] ** 2 + step**2)
                if col + step < cols:
                    square = min(square, down[row, col + step] ** 2 + step**2)
                step += 1
            distance[row, col] = np.sqrt(square)
    return distance


@compiled
def _steepest_ascent(
    elevation: NDArray[np.float32],
    pieces: NDArray[np.int32],
    near: NDArray[np.int64],
    far: NDArray[np.int64],
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Each pixel's basin (H, W): 1..N, in the order of their summits; and these's heights (N + 1,).

    Every pixel of a piece steps to the highest of the pixels ``near``, (K, 2) offsets in (row,
    col), that are of the same piece. A summit is one with no higher one ``far`` off either. Of
    equally high pixels the one with the larger (row, col) counts as higher: so every step goes up,
    there are no cycles, and nothing depends on where the tile begins.
    """
    rows, cols = pieces.shape
    parent = np.full(rows * cols, -1, np.int32)
    maxima = 0
    for row in range(rows):
        for col in range(cols):
            if pieces[row, col]:
                best = _highest(elevation, pieces, row, col, near)
                if best == row * cols + col:
                    best = _highest(elevation, pieces, row, col, far)
                parent[row * cols + col] = best
                maxima += best == row * cols + col
    basins = np.zeros(rows * cols, np.int32)
    peak = np.full(maxima + 1, -np.inf, np.float32)
    number = 0
    for pixel in range(rows * cols):
        if parent[pixel] == pixel:
            number += 1
            basins[pixel] = number
            peak[number] = elevation[pixel // cols, pixel % cols]
    for pixel in range(rows * cols):
        if parent[pixel] >= 0:
            maximum = pixel
            while not basins[maximum]:
                maximum = parent[maximum]
            step = pixel
            while not basins[step]:  # whoever comes across this way again is there at once
                basins[step] = basins[maximum]
                step = parent[step]
    return basins.reshape(rows, cols), peak


@compiled
def _highest(
    elevation: NDArray[np.float32],
    pieces: NDArray[np.int32],
    row: int,
    col: int,
    offsets: NDArray[np.int64],
) -> int:
    """The highest of a pixel and those at the offsets from it in its piece, as row * W + col."""
    rows, cols = pieces.shape
    piece, best_elevation = pieces[row, col], elevation[row, col]
    best: int = row * cols + col
    for k in range(len(offsets)):
        r, c = row + offsets[k, 0], col + offsets[k, 1]
        if 0 <= r < rows and 0 <= c < cols and pieces[r, c] == piece:
            there = r * cols + c
            if elevation[r, c] > best_elevation or (
                elevation[r, c] == best_elevation and there > best
            ):
                best, best_elevation = there, elevation[r, c]
    return best


@compiled
def _merge_low_prominence(
    basins: NDArray[np.int32],
    peak: NDArray[np.float32],
    elevation: NDArray[np.float32],
    min_prominence_um: np.float32,
) -> NDArray[np.int32]:
    """Which basin (N + 1,) each one becomes a part of, where hardly a saddle parts them.

    The saddle between two is the highest pass along their common border. A summit that rises less
    than ``min_prominence_um`` above its highest saddle is a bump on its neighbour's flank.
    """
    rows, cols = basins.shape
    into = np.arange(len(peak)).astype(np.int32)
    saddle = np.full(len(peak), -np.inf, np.float32)
    for row in range(rows):
        for col in range(cols):
            for r, c in ((row, col + 1), (row + 1, col)):
                if r == rows or c == cols:
                    continue
                low, high = basins[row, col], basins[r, c]
                if not low or not high or low == high:
                    continue
                if peak[low] > peak[high] or (peak[low] == peak[high] and low > high):
                    low, high = high, low
                over = min(elevation[row, col], elevation[r, c])
                if peak[low] - over < min_prominence_um and (
                    over > saddle[low] or (over == saddle[low] and high > into[low])
                ):
                    saddle[low], into[low] = over, high
    for basin in range(len(into)):
        while into[into[basin]] != into[basin]:
            into[basin] = into[into[basin]]
    return into


def _number(
    basins: NDArray[np.int32],
    into: NDArray[np.int32],
    core: NDArray[np.float32] | None,
    mpp: float,
    config: SegmentConfig,
) -> NDArray[np.int32]:
    """The label (N + 1,) of each basin, 1..M: 0 for those of the wrong size, or without a core."""
    count, tall, wide, surest = _extents(basins, into, core)
    area = count * mpp**2
    keep = (count > 0) & (area >= config.min_area_um2) & (area <= config.max_area_um2)
    keep &= np.maximum(tall, wide) * mpp <= config.max_diameter_um
    if core is not None:
        keep &= surest >= config.min_core
    return np.asarray(np.where(keep, np.cumsum(keep), 0)[into], np.int32)


@compiled
def _extents(
    basins: NDArray[np.int32], into: NDArray[np.int32], values: NDArray[np.float32] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Of each basin with those that became a part of it, (N + 1,): its pixels, its height and width
    in px, and the largest of the values (H, W) in it."""
    n = len(into)
    count, most = np.zeros(n, np.int64), np.full(n, -np.inf, np.float32)
    top, bottom = np.full(n, basins.size), np.full(n, -1)
    left, right = np.full(n, basins.size), np.full(n, -1)
    for row in range(basins.shape[0]):
        for col in range(basins.shape[1]):
            if basins[row, col]:
                basin = into[basins[row, col]]
                count[basin] += 1
                top[basin], bottom[basin] = min(top[basin], row), max(bottom[basin], row)
                left[basin], right[basin] = min(left[basin], col), max(right[basin], col)
                if values is not None:
                    most[basin] = max(most[basin], values[row, col])
    return count, bottom - top + 1, right - left + 1, most


def _disc(radius: float) -> NDArray[np.bool_]:
    reach = int(radius)
    rows, cols = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return np.asarray(rows**2 + cols**2 <= radius**2)


def _offsets(radius: float) -> NDArray[np.int64]:
    """(row, col) offsets (K, 2) to all other pixels within ``radius``."""
    offsets = np.argwhere(_disc(radius)) - int(radius)
    return offsets[offsets.any(axis=1)]
