"""Instance separation: from a confidence map to one label for each nucleus.

Touching nuclei are separated by a steepest-ascent watershed of an elevation map, the distance to
the background, raised in the cores of nuclei. Each pixel of the mask steps to its highest
neighbour until it reaches a maximum; the pixels of one maximum (marker) are one nucleus. Maxima of
low prominence are merged, and so are neighbours that together are no larger than a nucleus is
there, more so if they are one ellipse, or one core: what is a part of a large nucleus in one image
is a nucleus in another. Unlike a watershed that floods from a queue, this one depends on no pixel
farther away than the nucleus, so that a nucleus has the same pixels in each tile that contains it.
No step here depends on the tile as a whole.

F. Meyer, Topographic distance and watershed lines, Signal Processing 38 (1994).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from patchcl_qupath.compiled import compiled, take
from patchcl_qupath.config import SegmentConfig

# Largest height and width of what is joined, and of each part of what is merged, relative to
# ``max_diameter_um``. Two thirds of it lie beyond the centroid, and the neighbour that a nucleus
# may be joined to as far again: together the two thirds of ``max_diameter_um`` that the margin of a
# tile holds.
_MAX_JOINED = 0.4
# Largest height and width of a hole that is filled, relative to the same: beside a nucleus it lies
# within that margin. A long gap that the border of a tile closes would be a hole there alone.
_MAX_HOLE = 0.4


def postprocessing_margin_um(config: SegmentConfig) -> float:
    """The post-processing margin: how far beyond its tile's write box an owned nucleus depends on
    pixels, in µm.

    A convex shape extends at most two thirds of its diameter from its centroid; the elevation of
    its outermost pixels depends on the mask up to ``max_depth_um`` farther, and smoothing and the
    search for a higher maximum extend a little beyond that. Whether a nucleus is joined to a
    neighbour depends on the whole neighbour, and whether a gap in it is a hole on the whole gap,
    but such pairs and holes are so small (``_MAX_JOINED``, ``_MAX_HOLE``) that they lie within the
    same margin; so does what is merged, but for a fibre, which is merged with nothing.
    """
    beyond = config.scale * (4 * config.smooth_um + config.marker_radius_um)
    beyond += 2 * config.open_radius_um
    return 2 / 3 * config.max_diameter_um + config.max_depth_um + beyond


def instances(
    confidence: NDArray[np.float32],
    mpp: float,
    config: SegmentConfig,
    threshold: float = 0.5,
    core: NDArray[np.float32] | None = None,
) -> NDArray[np.int32]:
    """Nuclei of a confidence map (H, W) in [0, 1], as labels (H, W): 0 is background, 1..N nuclei.

    ``core`` (H, W) in [0, 1], where the network has cores, is high in the middle of each nucleus:
    it separates touching nuclei, and objects without a core are left out.

    ``mpp`` is in µm per pixel. Touching nuclei are separated by the typical diameter of those of
    the image, ``config.nucleus_diameter_um``; by 7 µm where that is 0. Labels are numbered by the
    position of the nucleus's maximum, row by row. Objects below ``min_area_um2``, and above
    ``max_area_um2`` or ``max_diameter_um``, are left out.
    """
    mask = _mask(confidence > threshold, mpp, config)
    elevation = _elevation(mask, core, mpp, config)
    far = _disc(config.scale * config.marker_radius_um / mpp)
    basins, peak = _steepest_ascent(elevation, mask, _offsets(1.5), far)
    prominence = np.float32(config.scale * config.min_prominence_um)
    longest = np.float64(_MAX_JOINED * config.max_diameter_um / mpp)
    basins = take(_merge_low_prominence(basins, peak, elevation, prominence, longest), basins)
    found = _Basins(*_sums(basins, len(peak), core))
    saddles = _saddles(basins, np.zeros_like(elevation) if core is None else core)
    into = _join_parts(found, saddles, peak, mpp, config)
    return take(_number(found, into, core is not None, mpp, config), basins)


def _mask(above: NDArray[np.bool_], mpp: float, config: SegmentConfig) -> NDArray[np.bool_]:
    """A mask (H, W), opened, without specks and small holes.

    As scikit-image's ``remove_small_holes`` and ``remove_small_objects``, in half the time.
    """
    radius = config.open_radius_um / mpp
    mask = np.asarray(ndimage.binary_opening(above, _disc(radius))) if radius >= 1 else above
    longest = _MAX_HOLE * config.max_diameter_um / mpp
    background = large_pieces(~mask, mpp**2, config.max_hole_um2, longest) > 0
    return large_pieces(~background, mpp**2, config.min_area_um2) > 0


@compiled
def large_pieces(
    mask: NDArray[np.bool_], px_um2: float, least_um2: float, longest_px: float = np.inf
) -> NDArray[np.int32]:
    """The connected pieces (H, W) of a mask, as labels 1..N from the top, of pixels of ``px_um2``;
    0 for those of less than ``least_um2`` that are not higher or wider than ``longest_px``.

    Pixels connect by edges, not by corners. Pieces are sets of runs, pixels of a row side by side:
    runs that touch runs of the row above belong to the same piece (union-find).
    """
    rows, cols = mask.shape
    most = rows * (cols // 2 + 1)
    start, end = np.empty(most, np.int32), np.empty(most, np.int32)
    parent, size = np.empty(most, np.int32), np.zeros(most, np.int64)
    bounds = np.empty((most, 4), np.int32)  # first and last row, first column and that after all
    first = np.zeros(rows + 2, np.int64)  # run of each row; those above the first row are none
    count = 0
    for row in range(rows):
        above, col = first[row], 0
        first[row + 1] = count
        while col < cols:
            if not mask[row, col]:
                col += 1
                continue
            start[count], parent[count] = col, count
            while col < cols and mask[row, col]:
                col += 1
            end[count] = col
            while above < first[row + 1] and end[above] <= start[count]:
                above += 1
            other = above
            while other < first[row + 1] and start[other] < col:
                _unite(parent, other, count)
                other += 1
            count += 1
    first[rows + 1] = count
    for run in range(count):
        parent[run] = parent[parent[run]]  # of which the parent is known: it came before
        size[parent[run]] += end[run] - start[run]
    for row in range(rows):
        for run in range(first[row + 1], first[row + 2]):
            box = bounds[parent[run]]
            if parent[run] == run:  # the first of its piece
                box[0], box[2], box[3] = row, start[run], end[run]
            box[1] = row
            box[2], box[3] = min(box[2], start[run]), max(box[3], end[run])
    pieces, number = np.zeros((rows, cols), np.int32), np.zeros(count, np.int32)
    found = 0
    for row in range(rows):
        for run in range(first[row + 1], first[row + 2]):
            if parent[run] == run:
                box = bounds[run]
                is_long = max(box[1] + 1 - box[0], box[3] - box[2]) > longest_px
                if is_long or size[run] * px_um2 >= least_um2:
                    found += 1
                    number[run] = found
            pieces[row, start[run] : end[run]] = number[parent[run]]
    return pieces


@compiled
def _unite(parent: NDArray[np.int32], one: int, other: int) -> None:
    """Make one set of the two sets of a forest that hold ``one`` and ``other``.

    The root of a set is its first member.
    """
    while parent[one] != one:
        parent[one] = parent[parent[one]]
        one = parent[one]
    while parent[other] != other:
        parent[other] = parent[parent[other]]
        other = parent[other]
    parent[max(one, other)] = min(one, other)


def _elevation(
    mask: NDArray[np.bool_], core: NDArray[np.float32] | None, mpp: float, config: SegmentConfig
) -> NDArray[np.float32]:
    """The elevation map (H, W): the depth inside the mask, in µm, raised in cores; smoothed."""
    depth = _distance(mask, config.max_depth_um / mpp)
    _raise(depth, mpp, config.max_depth_um, core, np.float32(config.core_um))
    sigma = config.scale * config.smooth_um / mpp
    x = np.arange(int(4 * sigma + 0.5) + 1)
    taps = np.exp(-0.5 * (x / sigma) ** 2) if sigma else np.ones(1)
    # It also makes what is outside 0, where cores may be: no pixel inside steps there.
    return _smooth(depth, mask, taps / (2 * taps.sum() - taps[0]))


@compiled
def _raise(
    depth: NDArray[np.float64],
    mpp: float,
    most_um: float,
    core: NDArray[np.float32] | None,
    core_um: np.float32,
) -> None:
    """Make an elevation (H, W) in µm of a depth in px: at most ``most_um``, and raised in cores."""
    for row in range(depth.shape[0]):
        for col in range(depth.shape[1]):
            height = min(depth[row, col] * mpp, most_um)
            depth[row, col] = height if core is None else height + core_um * core[row, col]


@compiled
def _smooth(
    values: NDArray[np.float64], mask: NDArray[np.bool_], taps: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Values (H, W) smoothed with a symmetric kernel, half of it in ``taps``; 0 outside the mask.

    Mirrored at the border. Down the columns, then along the row, for a whole row at once.
    """
    rows, cols = values.shape
    reach = len(taps) - 1
    blurred = np.zeros((rows, cols), np.float32)
    line, padded = np.empty(cols), np.empty(cols + 2 * reach)
    for row in range(rows):
        line[:] = values[row] * taps[0]
        for k in range(reach, 0, -1):
            above, below = values[_mirrored(row - k, rows)], values[_mirrored(row + k, rows)]
            _add(line, above, below, taps[k])
        padded[reach : reach + cols] = line
        for k in range(1, reach + 1):
            padded[reach - k] = line[_mirrored(-k, cols)]
            padded[reach + cols - 1 + k] = line[_mirrored(cols - 1 + k, cols)]
        line *= taps[0]
        for k in range(reach, 0, -1):
            left, right = padded[reach - k : cols + reach - k], padded[reach + k : cols + reach + k]
            _add(line, left, right, taps[k])
        for col in range(cols):
            blurred[row, col] = line[col] if mask[row, col] else 0
    return blurred


@compiled
def _add(
    line: NDArray[np.float64], one: NDArray[np.float64], other: NDArray[np.float64], weight: float
) -> None:
    """Add two lines (W,), times a weight, to another."""
    for col in range(len(line)):
        line[col] += (one[col] + other[col]) * weight


@compiled
def _mirrored(at: int, length: int) -> int:
    """An index mirrored at the borders 0 and ``length``."""
    while not 0 <= at < length:
        at = -1 - at if at < 0 else 2 * length - 1 - at
    return at


@compiled
def _distance(mask: NDArray[np.bool_], most: float) -> NDArray[np.float64]:
    """Distance (H, W) to the nearest pixel outside the mask; exact up to ``most``, and at least
    that beyond.

    By columns, then by rows, no farther than needed (as A. Meijster, J. Roerdink, W. Hesselink, A
    General Algorithm for Computing Distance Transforms in Linear Time, 2000).
    """
    rows, cols = mask.shape
    reach = int(np.ceil(most))
    down = np.zeros((rows, cols), np.int32)  # to the nearest pixel outside in the same column
    down[0] = mask[0] * (reach + 1)
    for row in range(1, rows):
        above, here, inside = down[row - 1], down[row], mask[row]
        for col in range(cols):
            here[col] = (min(above[col], reach) + 1) * inside[col]
    for row in range(rows - 2, -1, -1):
        here, below = down[row], down[row + 1]
        for col in range(cols):
            here[col] = min(here[col], below[col] + 1)
    distance = np.zeros((rows, cols))
    for row in range(rows):
        for col in range(cols):
            if not mask[row, col]:
                continue
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
    mask: NDArray[np.bool_],
    near: NDArray[np.int64],
    far: NDArray[np.bool_],
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The basin of each pixel (H, W), 1..N, in the order of their maxima; and the elevation of
    these (N + 1,).

    Every pixel of the mask steps to the highest of the pixels ``near``, (K, 2) offsets in (row,
    col), that are connected with it there. A maximum is one with no higher one in the disc ``far``
    around it, as far as pixels in it connect the two. Of equally high pixels the one with the
    larger (row, col) counts as higher: so every step goes up, there are no cycles, and nothing
    depends on where the tile begins, or on what connects two pixels farther away.
    """
    rows, cols = mask.shape
    inside = np.flatnonzero(mask)
    parent, basins = _highest_near(elevation, mask, near), np.zeros(rows * cols, np.int32)
    peak = [np.float32(-np.inf)]
    for pixel in inside:
        if parent[pixel] == pixel:
            parent[pixel] = _highest(elevation, mask, int(pixel), far)
            if parent[pixel] == pixel:
                basins[pixel] = len(peak)
                peak.append(elevation.flat[pixel])
    for pixel in inside:
        maximum = pixel
        while not basins[maximum]:
            maximum = parent[maximum]
        step = pixel
        while not basins[step]:  # the next pixel on this path is there at once
            basins[step] = basins[maximum]
            step = parent[step]
    return basins.reshape(rows, cols), np.array(peak)


@compiled
def _highest_near(
    elevation: NDArray[np.float32], mask: NDArray[np.bool_], offsets: NDArray[np.int64]
) -> NDArray[np.int32]:
    """The highest of each pixel inside and those connected with it beside it, (H * W,): for a whole
    row at once. A corner alone connects no two pixels: one beside both must be inside.

    Outside, the elevation is lower than anywhere inside. ``offsets`` ascend, and have (0, 0): so of
    equally high pixels the last one is taken.
    """
    rows, cols = mask.shape
    found = np.empty((rows, cols), np.int32)
    for row in range(rows):
        height = np.full(cols, -np.inf, np.float32)
        for down, right in offsets:
            if not 0 <= row + down < rows:
                continue
            first, last = max(0, -right), min(cols, cols - right)
            best, highest = found[row, first:last], height[first:last]
            there = elevation[row + down, first + right : last + right]
            start = np.int32((row + down) * cols + first + right)
            for col in range(last - first):
                higher = there[col] >= highest[col]
                highest[col] = there[col] if higher else highest[col]
                best[col] = start + np.int32(col) if higher else best[col]
        for col in range(cols):
            step = found[row, col]
            far = abs(step - row * cols - col)
            is_at_corner = (far == cols + 1 or far == cols - 1) and mask[row, col]
            if is_at_corner and not (mask[row, step % cols] or mask[step // cols, col]):
                found[row, col] = _highest_connected(elevation, mask, row, col, offsets)
    return found.ravel()


@compiled
def _highest_connected(
    elevation: NDArray[np.float32],
    mask: NDArray[np.bool_],
    row: int,
    col: int,
    offsets: NDArray[np.int64],
) -> int:
    """That of one pixel, as row * W + col."""
    rows, cols = mask.shape
    best, highest = row * cols + col, elevation[row, col]
    for down, right in offsets:
        r, c = row + down, col + right
        if 0 <= r < rows and 0 <= c < cols and (mask[row, c] or mask[r, col]):
            there = r * cols + c
            if elevation[r, c] > highest or (elevation[r, c] == highest and there > best):
                best, highest = there, elevation[r, c]
    return int(best)


@compiled
def _highest(
    elevation: NDArray[np.float32], mask: NDArray[np.bool_], pixel: int, disc: NDArray[np.bool_]
) -> int:
    """The highest of a pixel and those in a disc around it, (2 R + 1, 2 R + 1), which pixels of the
    mask in the disc connect with it by their edges; as row * W + col."""
    rows, cols = mask.shape
    reach = len(disc) // 2
    top, left = pixel // cols - reach, pixel % cols - reach
    is_new = disc.copy()
    waiting = [(reach, reach)]
    is_new[reach, reach] = False
    best, highest = pixel, elevation.flat[pixel]
    while waiting:
        down, right = waiting.pop()
        r, c = top + down, left + right
        there = r * cols + c
        if elevation[r, c] > highest or (elevation[r, c] == highest and there > best):
            best, highest = there, elevation[r, c]
        for d, e in ((down - 1, right), (down + 1, right), (down, right - 1), (down, right + 1)):
            if 0 <= d < len(disc) and 0 <= e < len(disc) and is_new[d, e]:
                is_new[d, e] = False
                if 0 <= top + d < rows and 0 <= left + e < cols and mask[top + d, left + e]:
                    waiting.append((d, e))
    return best


@compiled
def _merge_low_prominence(
    basins: NDArray[np.int32],
    peak: NDArray[np.float32],
    elevation: NDArray[np.float32],
    min_prominence_um: np.float32,
    longest_px: float,
) -> NDArray[np.int32]:
    """The basin (N + 1,) that each basin is merged into; itself, unless its prominence is low.

    The saddle between two basins is the highest pass along their common border. The prominence of a
    maximum is its elevation above its highest saddle to a higher one. What is higher or wider than
    ``longest_px``, such as a fibre, is merged with nothing: the border of a tile may cut it, and
    its maximum may lie beyond.
    """
    rows, cols = basins.shape
    ends = np.full((len(peak), 4), -(2**31), np.int32)  # the largest row, col, -row and -col
    for row in range(rows):
        for col in range(cols):
            if basins[row, col]:
                end = ends[basins[row, col]]
                end[0], end[1] = row, max(end[1], col)
                end[2], end[3] = max(end[2], -row), max(end[3], -col)
    is_long = np.maximum(ends[:, 0] + ends[:, 2], ends[:, 1] + ends[:, 3]) + 1 > longest_px
    into = np.arange(len(peak)).astype(np.int32)
    saddle = np.full(len(peak), -np.inf, np.float32)
    for row in range(rows):
        for col in range(cols):
            for r, c in ((row, col + 1), (row + 1, col)):
                if r == rows or c == cols:
                    continue
                low, high = basins[row, col], basins[r, c]
                if not low or not high or low == high or is_long[low] or is_long[high]:
                    continue
                if peak[low] > peak[high] or (peak[low] == peak[high] and low > high):
                    low, high = high, low
                height = min(elevation[row, col], elevation[r, c])
                if peak[low] - height < min_prominence_um and (
                    height > saddle[low] or (height == saddle[low] and high > into[low])
                ):
                    saddle[low], into[low] = height, high
    for basin in range(len(into)):
        while into[into[basin]] != into[basin]:
            into[basin] = into[into[basin]]
    return into


class _Basins(NamedTuple):
    """Basins 0..N: ``sums`` (N + 1, 6) of pixels, of row, col, and of their products; ``ends``
    (N + 1, 4), the largest row, col, -row and -col; ``core`` (N + 1,), its largest value."""

    sums: NDArray[np.int64]
    ends: NDArray[np.int64]
    core: NDArray[np.float32]


def _join_parts(
    found: _Basins,
    saddles: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]],
    peak: NDArray[np.float32],
    mpp: float,
    config: SegmentConfig,
) -> NDArray[np.int32]:
    """The basin (N + 1,) that each basin is joined to; itself, unless it is one of several parts.

    Neighbours are parts of one nucleus if the diameter of their union, relative to the typical one,
    is below ``join_diameter``; more by ``join_ellipse`` times what their union is more of an
    ellipse than they are, and by ``join_core`` times the largest core probability on their border
    (``saddles``). Each pair is judged by itself, so that no nucleus depends on how others far away
    were joined. Parts whose union would be too large stay apart.
    """
    sums, ends = found.sums, found.ends
    low, high, core = saddles
    area = sums[low, 0] + sums[high, 0]
    apart = (_ellipticity(sums[low]) * sums[low, 0] + _ellipticity(sums[high]) * sums[high, 0]) / (
        np.maximum(area, 1)
    )
    gain = _ellipticity(sums[low] + sums[high]) - apart
    diameter = np.sqrt(4 / np.pi * area) * mpp / config.typical_um
    join = diameter < config.join_diameter + config.join_ellipse * gain + config.join_core * core
    reach_um = _MAX_JOINED * config.max_diameter_um
    join &= _side(np.maximum(ends[low], ends[high])) * mpp <= reach_um
    low, high = low[join], high[join]
    pairs = coo_array((np.ones(len(low)), (low, high)), shape=(len(peak), len(peak)))
    _, group = connected_components(pairs, directed=False)
    # The highest maximum of a group is that of the nucleus; of equal ones the last.
    order = np.lexsort((np.arange(len(peak)), peak))
    highest = np.zeros(len(peak), np.int32)
    highest[group[order]] = order
    fits = (_side(_largest(ends, group)) * mpp <= reach_um)[group]
    return np.where(fits, highest[group], np.arange(len(peak))).astype(np.int32)


def ellipticities(labels: NDArray[np.int32]) -> NDArray[np.float64]:
    """The area of labels 1..N (H, W) over that of the ellipse with their second moments, (N,)."""
    return _ellipticity(_sums(labels, int(labels.max(initial=0)) + 1, None)[0][1:])


def _ellipticity(sums: NDArray[np.int64]) -> NDArray[np.float64]:
    """The area of regions (N,) over that of the ellipse with their second moments: 1 for ellipses.

    ``sums`` (N, 6) are those of ``_Basins``. Central moments are exact integers, so that they do
    not depend on where a tile begins.
    """
    n, row, col, row_row, col_col, row_col = sums.T
    square = n.astype(np.float64) ** 2
    rows = (n * row_row - row * row) + square / 12  # pixels are squares, not points
    cols = (n * col_col - col * col) + square / 12
    both = (n * row_col - row * col).astype(np.float64)
    area = 4 * np.pi * np.sqrt(np.maximum(rows * cols - both * both, 1)) / np.maximum(n, 1)
    return np.minimum(np.where(n > 0, n / np.maximum(area / np.maximum(n, 1), 1e-9), 0), 1)


def _side(ends: NDArray[Any]) -> NDArray[Any]:
    """The larger of height and width (N,) in px, by the largest row, col, -row and -col (N, 4)."""
    return np.asarray((ends[:, :2] + ends[:, 2:] + 1).max(axis=1, initial=0))


def _largest(values: NDArray[Any], into: NDArray[np.int32]) -> NDArray[np.float64]:
    """The largest values (N, ...) of the basins that go ``into`` (N,) each one."""
    largest = np.full(values.shape, -np.inf)
    np.maximum.at(largest, into, values)
    return largest


@compiled
def _sums(
    basins: NDArray[np.int32], n: int, core: NDArray[np.float32] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The three arrays of ``_Basins``, of basins (H, W) 0..n-1 and a core probability (H, W)."""
    sums, ends = np.zeros((n, 6), np.int64), np.full((n, 4), -(2**31))
    largest = np.full(n, -np.inf, np.float32)
    for row in range(basins.shape[0]):
        for col in range(basins.shape[1]):
            basin = basins[row, col]
            if basin:
                sums[basin, 0] += 1
                sums[basin, 1] += row
                sums[basin, 2] += col
                sums[basin, 3] += row * row
                sums[basin, 4] += col * col
                sums[basin, 5] += row * col
                ends[basin, 0] = row
                ends[basin, 1] = max(ends[basin, 1], col)
                ends[basin, 2] = max(ends[basin, 2], -row)
                ends[basin, 3] = max(ends[basin, 3], -col)
                if core is not None:
                    largest[basin] = max(largest[basin], core[row, col])
    return sums, ends, largest


def _saddles(
    basins: NDArray[np.int32], heights: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Pairs of basins with a common border, (K,) and (K,), and the highest pass along it, (K,).

    Heights are (H, W), as basins are.
    """
    low, high, height = _borders(basins, heights)
    if not len(low):
        return low, high, height
    order = np.lexsort((high, low))
    low, high, height = low[order], high[order], height[order]
    first = np.flatnonzero((np.diff(low, prepend=-1) != 0) | (np.diff(high, prepend=-1) != 0))
    return low[first], high[first], np.maximum.reduceat(height, first)


@compiled
def _borders(
    basins: NDArray[np.int32], heights: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """The basins on both sides of each pixel edge between two, the smaller first; and the lower
    height beside it."""
    rows, cols = basins.shape
    low, high, height = [], [], []
    for row in range(rows):
        for col in range(cols):
            here = basins[row, col]
            for r, c in ((row, col + 1), (row + 1, col)):
                there = basins[r, c] if here and r < rows and c < cols else 0
                if there and there != here:
                    low.append(min(here, there))
                    high.append(max(here, there))
                    height.append(min(heights[row, col], heights[r, c]))
    return np.array(low, np.int64), np.array(high, np.int64), np.array(height, np.float32)


def _number(
    found: _Basins, into: NDArray[np.int32], has_core: bool, mpp: float, config: SegmentConfig
) -> NDArray[np.int32]:
    """The label (N + 1,) of each basin, 1..M: 0 for those of the wrong size, or without a core."""
    count = np.zeros(len(into), np.int64)
    np.add.at(count, into, found.sums[:, 0])
    area = count * mpp**2
    keep = (count > 0) & (area >= config.min_area_um2) & (area <= config.max_area_um2)
    keep &= _side(_largest(found.ends, into)) * mpp <= config.max_diameter_um
    if has_core:
        keep &= _largest(found.core, into) >= config.min_core
    return np.asarray(np.where(keep, np.cumsum(keep), 0)[into], np.int32)


def _disc(radius: float) -> NDArray[np.bool_]:
    """A disc of any radius; scikit-image's ``disk`` has no pixel in its middle for half ones."""
    reach = int(radius)
    rows, cols = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    return np.asarray(rows**2 + cols**2 <= radius**2)


def _offsets(radius: float) -> NDArray[np.int64]:
    """(row, col) offsets (K, 2) to the pixels within ``radius``, ascending; (0, 0) is one."""
    return np.asarray(np.argwhere(_disc(radius)) - int(radius))
