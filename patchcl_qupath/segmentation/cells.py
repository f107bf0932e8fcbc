"""From nuclei to cells: what is near a nucleus belongs to it, up to limits.

A cell is the part of the image that is nearer to its nucleus than to any other, at most
``expand_um`` from it, and within the convex hull of the nucleus, scaled by ``constrain_scale``
about its centroid (as ``CellTools.estimateCellBoundary`` of QuPath). The straight way from a point
of a cell to its nucleus lies in the cell: a cell has one piece, and holds its nucleus.

Distances are those to the contours, in µm, with fractions of pixels. The border between two cells
is one line, which both have: cells do not overlap, except where their nuclei do. Nothing depends on
the box that is looked at, as long as it holds the cells, and all nuclei nearby are given.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.compiled import compiled, take
from patchcl_qupath.config import CellConfig
from patchcl_qupath.datatypes import Box, Polygons, grid_to_level0

_SIMPLIFY_PX = 0.2  # a contour may move by this much when points are left out, as of nuclei
_NO_LIMIT = 1.0  # largest ``constrain_scale`` that is none, as in QuPath
_BLOCK = 4  # px, each way, that look for their nearest sides together
_NEAR = 1e-6  # px, within which GEOS finds whether lines touch
_APART, _HOLDS, _MEETS = 0, 1, 2  # a cell and a nucleus
_EAST = np.array([1, 0, -1, 0])
_SOUTH = np.array([0, 1, 0, -1])

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]


class _Frame(NamedTuple):
    """A box of the working grid: its first row and column, µm per px (x, y); the reach in µm."""

    row0: int
    col0: int
    rows: int
    cols: int
    scale_x: float
    scale_y: float
    reach: float


class _Shapes(NamedTuple):
    """Nuclei (N,) in µm: their sides and bounds, and the limits of their cells.

    Nucleus k has the sides ``sides[:, first[k] : first[k + 1]]``, a column of (x, y, dx, dy,
    1 / length²) each, and ``bounds`` (x0, y0, x1, y1); ``growth`` is how far the limit of its cell
    is outside of each of these. ``planes[limit[k] : limit[k + 1]]`` (normal x, normal y, offset)
    are the sides of that convex limit: a point is outside by the largest of normal * point -
    offset.
    """

    sides: Floats
    first: Integers
    bounds: Floats
    growth: Floats
    planes: Floats
    limit: Integers


def grow(
    polygons_px: Polygons, count: int, box: Box, mpp: tuple[float, float], config: CellConfig
) -> Polygons:
    """The cells (count,) of the first ``count`` of nuclei (N,).

    Polygons are on the working grid, of ``mpp`` (x, y) µm per px. The box holds the cells; the
    nuclei are those that have one, and all others up to twice ``expand_um`` from them. Where two
    are equally near, the upper one has the pixel, whatever the order of the nuclei.
    """
    order = _from_the_top(polygons_px)
    rank = np.argsort(order)[:count]
    frame = _Frame(
        row0=box.row0,
        col0=box.col0,
        rows=box.shape[0],
        cols=box.shape[1],
        scale_x=mpp[0],
        scale_y=mpp[1],
        reach=config.expand_um,
    )
    shapes = _shapes(polygons_px[order], np.array(mpp), config.constrain_scale)
    nearest, distance = _nearest(shapes, _innermost(shapes, frame), frame)
    labels = _within_limits(nearest, distance, shapes, frame)
    wanted = np.zeros(len(order) + 1, np.bool_)
    wanted[rank + 1] = True
    pixels, beyond, ring, owner, fixed, backwards = _trace(labels, wanted)
    points, ends = _crossings(pixels, beyond, labels, nearest, distance, shapes, frame)
    fixed |= _beside(ends, ring)
    kept = _simplify(points, ring, fixed, backwards, _SIMPLIFY_PX)
    rings = shapely.polygons(shapely.linearrings(points[kept], indices=ring[kept]))
    return _largest(rings, owner, len(order))[rank]


def fill(polygons_px: Polygons, box: Box) -> NDArray[np.int32]:
    """The polygon (H, W) that holds the centre of each pixel of a box: k + 1, 0 where none does."""
    if not len(polygons_px):
        return np.zeros(box.shape, np.int32)
    sides, first = _sides(polygons_px)
    frame = _Frame(
        row0=box.row0,
        col0=box.col0,
        rows=box.shape[0],
        cols=box.shape[1],
        scale_x=1.0,
        scale_y=1.0,
        reach=0.0,
    )
    return _fill(sides, first, shapely.bounds(polygons_px), frame)


def fill_cells(
    cells_px: Polygons, nuclei_px: Polygons, box: Box
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The cell, and the nucleus, (H, W) each, of each pixel of a box, 1..C; 0 where there is none.

    The first C of the nuclei (N,) are those of the cells. A pixel in two nuclei, which may overlap,
    belongs to the lower one, and to its cell: also where that is the other's of another tile.
    """
    order = _from_the_top(nuclei_px)
    own = np.append(0, np.where(order < len(cells_px), order + 1, -1)).astype(np.int32)
    nuclei = take(own, fill(nuclei_px[order], box))
    cells = np.where(nuclei, nuclei, fill(cells_px, box))
    return np.maximum(cells, 0), np.maximum(nuclei, 0)


def fit_to_nuclei(cells: Polygons, nuclei: Polygons) -> Polygons:
    """Valid cells (C,) without what other nuclei (N,) cover, and with all of their own.

    The first C of the nuclei are those of the cells. A contour between touching nuclei may run
    through either by a fraction of a pixel. A cell that fits is the same object as before; vertices
    of others come in one order, whatever was cut off first.
    """
    cell, nucleus = shapely.STRtree(nuclei).query(cells)
    meets = _meetings(_rings(cells), _rings(nuclei), cell, nucleus)
    own, other = cell == nucleus, cell != nucleus
    fitted = cells.copy()
    _cut(fitted, nuclei, cell[other & (meets != _APART)], nucleus[other & (meets != _APART)])
    unclear = np.zeros(len(cells), np.bool_)
    unclear[cell[own & (meets != _HOLDS)]] = True
    unclear |= fitted != cells
    unclear[unclear] = ~shapely.covers(fitted[unclear], nuclei[: len(cells)][unclear])
    fitted[unclear] = shapely.union(fitted[unclear], nuclei[: len(cells)][unclear])
    changed = fitted != cells
    whole = _whole(fitted[changed], nuclei[: len(cells)][changed])
    fitted[changed] = shapely.normalize(whole)
    return np.asarray(fitted)


def _cut(
    cells: Polygons, nuclei: Polygons, cell: NDArray[np.intp], nucleus: NDArray[np.intp]
) -> None:
    """Cut each of some nuclei (M,) off its ``cell`` (M,), from the top, if they share an area."""
    rank = np.argsort(_from_the_top(nuclei))[nucleus]
    order = np.lexsort((rank, cell))
    cell, nucleus = cell[order], nucleus[order]
    before = np.arange(len(cell)) - np.searchsorted(cell, cell)  # others of the same cell
    for turn in range(before.max(initial=-1) + 1):
        now = before == turn
        whole = cells[cell[now]]
        rest = shapely.difference(whole, nuclei[nucleus[now]])
        cells[cell[now]] = np.where(shapely.area(rest) < shapely.area(whole), rest, whole)


class _Rings(NamedTuple):
    """Closed rings (N,): points ``xy[:, first[k] : first[k + 1]]``, the first one again as last."""

    xy: Floats
    first: Integers


def _rings(polygons: Polygons) -> _Rings:
    """The rings of polygons (N,) without holes."""
    xy, of = shapely.get_coordinates(polygons, return_index=True)
    first = np.searchsorted(of, np.arange(len(polygons) + 1))
    return _Rings(xy=np.ascontiguousarray(xy.T), first=first)


@compiled
def _meetings(cells: _Rings, nuclei: _Rings, cell: Integers, nucleus: Integers) -> NDArray[np.int8]:
    """How each of some cells (M,) and a nucleus meet: ``_HOLDS`` it, ``_APART``, or else."""
    found = np.empty(len(cell), np.int8)
    x, y = cells.xy[0], cells.xy[1]
    u, v = nuclei.xy[0], nuclei.xy[1]
    for m in range(len(cell)):
        begin, end = cells.first[cell[m]], cells.first[cell[m] + 1]
        start, stop = nuclei.first[nucleus[m]], nuclei.first[nucleus[m] + 1]
        found[m] = _APART
        if begin == end or start == stop:
            continue
        left, right = u[start:stop].min() - _NEAR, u[start:stop].max() + _NEAR
        top, bottom = v[start:stop].min() - _NEAR, v[start:stop].max() + _NEAR
        crosses, inside, within = False, False, False
        for a in range(begin, end - 1):
            x0, y0, x1, y1 = x[a], y[a], x[a + 1], y[a + 1]
            # A ray to the right, from a point of the nucleus.
            if (v[start] < y0) != (v[start] < y1):
                inside ^= u[start] < x0 + (v[start] - y0) / (y1 - y0) * (x1 - x0)
            if max(x0, x1) < left or min(x0, x1) > right:
                continue
            if max(y0, y1) < top or min(y0, y1) > bottom:
                continue
            for b in range(start, stop - 1):
                crosses |= _may_touch(x0, y0, x1, y1, u[b], v[b], u[b + 1], v[b + 1])
            if crosses:
                break
        for b in range(start, stop - 1):  # and one from a point of the cell
            if (y[begin] < v[b]) != (y[begin] < v[b + 1]):
                along = (y[begin] - v[b]) / (v[b + 1] - v[b])
                within ^= x[begin] < u[b] + along * (u[b + 1] - u[b])
        if crosses or within:
            found[m] = _MEETS
        elif inside:
            found[m] = _HOLDS
    return found


@compiled
def _may_touch(
    x0: float, y0: float, x1: float, y1: float, u0: float, v0: float, u1: float, v1: float
) -> bool:
    """Whether two lines are nearer than ``_NEAR``; in doubt they are."""
    if max(u0, u1) < min(x0, x1) - _NEAR or min(u0, u1) > max(x0, x1) + _NEAR:
        return False
    if max(v0, v1) < min(y0, y1) - _NEAR or min(v0, v1) > max(y0, y1) + _NEAR:
        return False
    dx, dy, du, dv = x1 - x0, y1 - y0, u1 - u0, v1 - v0
    near = _NEAR * (abs(dx) + abs(dy) + abs(du) + abs(dv))
    a = dx * (v0 - y0) - dy * (u0 - x0)
    b = dx * (v1 - y0) - dy * (u1 - x0)
    if (a > near and b > near) or (a < -near and b < -near):
        return False
    a = du * (y0 - v0) - dv * (x0 - u0)
    b = du * (y1 - v0) - dv * (x1 - u0)
    return not ((a > near and b > near) or (a < -near and b < -near))


def _whole(cells: Polygons, nuclei: Polygons) -> Polygons:
    """Cells as valid polygons without holes; of several parts, that with most of the nucleus."""
    plain = shapely.get_type_id(cells) == shapely.GeometryType.POLYGON
    plain &= shapely.is_valid(cells) & (shapely.get_num_interior_rings(cells) == 0)
    for k in np.flatnonzero(~plain):
        parts = shapely.get_parts(shapely.make_valid(cells[k]))
        parts = parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON]
        most = np.argmax(shapely.area(shapely.intersection(parts, nuclei[k])))
        cells[k] = shapely.Polygon(parts[most].exterior)
    return cells


def _from_the_top(polygons: Polygons) -> NDArray[np.intp]:
    """The order of polygons by their upper edges; the same whatever others are there."""
    x0, y0, x1, y1 = shapely.bounds(polygons).T
    return np.lexsort((x1, y1, x0, y0))


def _shapes(polygons_px: Polygons, mpp: Floats, constrain_scale: float) -> _Shapes:
    """Nuclei on the working grid, of ``mpp`` (x, y) µm per px, and the limits of their cells."""
    polygons = grid_to_level0(polygons_px, (mpp[0], mpp[1]))  # µm are pixels of 1 µm
    sides, first = _sides(polygons)
    bounds = shapely.bounds(polygons)
    planes, limit = np.empty((0, 3)), np.zeros(len(polygons) + 1, np.int64)
    growth = np.full(bounds.shape, np.inf)
    if constrain_scale > _NO_LIMIT:
        planes, limit, centre = _half_planes(sides, first, constrain_scale)
        growth = (constrain_scale - 1) * np.abs(bounds - np.tile(centre, 2))
    return _Shapes(
        sides=sides, first=first, bounds=bounds, growth=growth, planes=planes, limit=limit
    )


def _sides(polygons: Polygons) -> tuple[Floats, Integers]:
    """The sides (5, S) of polygons (N,), as in ``_Shapes``; the first one of each (N + 1,)."""
    xy, of = shapely.get_coordinates(polygons, return_index=True)  # closed: first point = last
    begin = np.flatnonzero(of[1:] == of[:-1])
    along = xy[begin + 1] - xy[begin]
    inverse = 1 / np.maximum((along**2).sum(axis=1), 1e-24)
    first = np.searchsorted(of[begin], np.arange(len(polygons) + 1))
    return np.stack([*xy[begin].T, *along.T, inverse]), first


@compiled
def _hull(x: Floats, y: Floats, hull: Integers) -> int:
    """The number of corners of the convex hull of points (N,), written to ``hull`` (N + 1,).

    Corners are in the order of A. Andrew, Another efficient algorithm for convex hulls in two
    dimensions, 1979.
    """
    order = np.argsort(x)
    for n in range(1, len(x)):  # of equal x by y
        m = n
        while m and x[order[m - 1]] == x[order[m]] and y[order[m - 1]] > y[order[m]]:
            order[m - 1], order[m] = order[m], order[m - 1]
            m -= 1
    count = 0
    for chain in range(2):
        begin = count
        for n in range(len(x)):
            c = order[n] if chain == 0 else order[len(x) - 1 - n]
            while count >= begin + 2:
                a, b = hull[count - 2], hull[count - 1]
                if (x[b] - x[a]) * (y[c] - y[a]) - (y[b] - y[a]) * (x[c] - x[a]) > 0:
                    break
                count -= 1
            hull[count] = c
            count += 1
        count -= 1  # the last is the first of the other chain
    return count


@compiled
def _half_planes(sides: Floats, first: Integers, scale: float) -> tuple[Floats, Integers, Floats]:
    """The convex hulls of polygons (N,), scaled about their centroids (N, 2).

    As ``planes`` and ``limit``, and with these centroids.
    """
    count = len(first) - 1
    planes, limit = np.empty((sides.shape[1], 3)), np.zeros(count + 1, np.int64)
    centres = np.full((count, 2), np.nan)
    hull = np.empty(sides.shape[1] + 1, np.int64)
    end = 0
    for k in range(count):
        x, y = sides[0, first[k] : first[k + 1]], sides[1, first[k] : first[k + 1]]
        if not len(x):
            continue
        corners = _hull(x, y, hull)
        area, at_x, at_y = 0.0, 0.0, 0.0
        for n in range(1, corners - 1):  # triangles at the first corner
            ax, ay = x[hull[n]] - x[hull[0]], y[hull[n]] - y[hull[0]]
            bx, by = x[hull[n + 1]] - x[hull[0]], y[hull[n + 1]] - y[hull[0]]
            twice = ax * by - ay * bx
            area, at_x, at_y = area + twice, at_x + twice * (ax + bx), at_y + twice * (ay + by)
        if area > 0:
            centres[k, 0] = x[hull[0]] + at_x / (3 * area)
            centres[k, 1] = y[hull[0]] + at_y / (3 * area)
            for n in range(corners):
                a, b = hull[n], hull[(n + 1) % corners]
                length = np.hypot(x[b] - x[a], y[b] - y[a])
                nx, ny = (y[b] - y[a]) / length, (x[a] - x[b]) / length
                ax = centres[k, 0] + scale * (x[a] - centres[k, 0])
                ay = centres[k, 1] + scale * (y[a] - centres[k, 1])
                planes[end, 0], planes[end, 1], planes[end, 2] = nx, ny, nx * ax + ny * ay
                end += 1
        limit[k + 1] = end
    return planes[:end], limit, centres


@compiled
def _signed_distance(shapes: _Shapes, k: int, x: float, y: float) -> float:
    """The distance from a point to the contour of nucleus k, in µm; negative within it."""
    sides, first = shapes.sides, shapes.first
    inside, least = False, np.inf
    for s in range(first[k], first[k + 1]):
        dx, dy = sides[2, s], sides[3, s]
        px, py = x - sides[0, s], y - sides[1, s]
        along = min(max((px * dx + py * dy) * sides[4, s], 0.0), 1.0)
        ox, oy = px - along * dx, py - along * dy
        least = min(least, ox * ox + oy * oy)
        # A ray to the right crosses the side.
        if (py < 0) != (py < dy) and (px * dy < py * dx) == (dy > 0):
            inside = not inside
    distance: float = np.sqrt(least)
    return -distance if inside else distance


@compiled
def _held(sides: Floats, window: tuple[int, int, int, int], frame: _Frame) -> Bools:
    """Which pixels of a window of a frame have their centres in the ring with these sides (5, S).

    (H, W + 1), of which the last column means nothing. The window is (top, bottom, left, right).
    """
    top, bottom, left, right = window
    # First whether sides cross a row an odd number of times, before each of its pixels' centres.
    held = np.zeros((bottom - top, right - left + 1), np.bool_)
    for s in range(sides.shape[1]):
        sx, sy, dx, dy = sides[0, s], sides[1, s], sides[2, s], sides[3, s]
        begin = int(np.floor(min(sy, sy + dy) / frame.scale_y)) - 1 - frame.row0
        end = int(np.floor(max(sy, sy + dy) / frame.scale_y)) + 2 - frame.row0
        for row in range(max(begin, top), min(end, bottom)):
            py = (row + frame.row0 + 0.5) * frame.scale_y - sy
            if (py < 0) != (py < dy):
                x = (sx + py / dy * dx) / frame.scale_x - frame.col0
                col = min(max(int(np.ceil(x - 0.5)), left), right)
                held[row - top, col - left] ^= True
    for row in range(bottom - top):
        for col in range(1, right - left):
            held[row, col] ^= held[row, col - 1]
    return held


@compiled
def _fill(sides: Floats, first: Integers, bounds: Floats, frame: _Frame) -> NDArray[np.int32]:
    """As ``fill``, in a frame of 1 µm per px."""
    labels = np.zeros((frame.rows, frame.cols), np.int32)
    row0, col0 = frame.row0, frame.col0
    for k in range(len(bounds)):
        x0, y0, x1, y1 = bounds[k]
        top, bottom = max(int(y0) - row0, 0), min(int(y1) + 1 - row0, frame.rows)
        left, right = max(int(x0) - col0, 0), min(int(x1) + 1 - col0, frame.cols)
        if top >= bottom or left >= right:
            continue
        held = _held(sides[:, first[k] : first[k + 1]], (top, bottom, left, right), frame)
        for row in range(top, bottom):
            for col in range(left, right):
                if held[row - top, col - left]:
                    labels[row, col] = k + 1
    return labels


@compiled
def _outside_limit(shapes: _Shapes, k: int, x: float, y: float) -> float:
    """How far a point is outside of the limit of cell k, in µm; negative within it."""
    planes, limit = shapes.planes, shapes.limit
    most = -np.inf
    for side in range(limit[k], limit[k + 1]):
        most = max(most, planes[side, 0] * x + planes[side, 1] * y - planes[side, 2])
    return most


@compiled
def _room(shapes: _Shapes, k: int, distance: float, x: float, y: float, reach: float) -> float:
    """How much farther cell k might reach at a point, in µm, were it alone; negative outside."""
    return min(reach - distance, -_outside_limit(shapes, k, x, y))


@compiled
def _window(bounds: Floats, beyond: Floats, frame: _Frame) -> tuple[int, int, int, int]:
    """First and last rows and columns (exclusive) of the pixels up to ``beyond`` (x0, y0, x1, y1)
    µm from bounds, with one more on each side."""
    top = int(np.floor((bounds[1] - beyond[1]) / frame.scale_y)) - frame.row0 - 1
    bottom = int(np.ceil((bounds[3] + beyond[3]) / frame.scale_y)) - frame.row0 + 1
    left = int(np.floor((bounds[0] - beyond[0]) / frame.scale_x)) - frame.col0 - 1
    right = int(np.ceil((bounds[2] + beyond[2]) / frame.scale_x)) - frame.col0 + 1
    return max(top, 0), min(bottom, frame.rows), max(left, 0), min(right, frame.cols)


@compiled
def _innermost(shapes: _Shapes, frame: _Frame) -> NDArray[np.int32]:
    """The nucleus (H, W) that holds the centre of each pixel, k + 1; of several the deepest."""
    labels = np.zeros((frame.rows, frame.cols), np.int32)
    for k in range(len(shapes.first) - 1):
        top, bottom, left, right = _window(shapes.bounds[k], np.zeros(4), frame)
        if top >= bottom or left >= right:
            continue
        sides = shapes.sides[:, shapes.first[k] : shapes.first[k + 1]]
        held = _held(sides, (top, bottom, left, right), frame)
        for row in range(top, bottom):
            for col in range(left, right):
                if held[row - top, col - left]:
                    other = labels[row, col] - 1
                    if other >= 0:
                        x = (col + frame.col0 + 0.5) * frame.scale_x
                        y = (row + frame.row0 + 0.5) * frame.scale_y
                        depth = _signed_distance(shapes, k, x, y)
                        if depth >= _signed_distance(shapes, other, x, y):
                            continue
                    labels[row, col] = k + 1
    return labels


@compiled
def _blocks_near(
    shapes: _Shapes, frame: _Frame, wide: float
) -> tuple[Integers, NDArray[np.int32], Bools]:
    """Which nuclei are near the blocks (B,) of a frame, row by row.

    Returns the nuclei ``near[first[b] : first[b + 1]]`` that may be nearer than ``wide`` µm to
    pixels of each block, and in which blocks there may be a pixel of a cell or beside one (B,).
    """
    rows, cols = (frame.rows + _BLOCK - 1) // _BLOCK, (frame.cols + _BLOCK - 1) // _BLOCK
    radius = _block_radius(frame)
    first, wanted = np.zeros(rows * cols + 2, np.int64), np.zeros(rows * cols, np.bool_)
    near = np.empty(0, np.int32)
    beyond = np.full(4, wide)
    px = max(frame.scale_x, frame.scale_y)
    for fills in (False, True):
        if fills:
            for block in range(rows * cols):
                first[block + 2] += first[block + 1]
            near = np.empty(first[-1], np.int32)
        for k in range(len(shapes.first) - 1):
            top, bottom, left, right = _window(shapes.bounds[k], beyond, frame)
            if top >= bottom or left >= right:
                continue
            x0, y0, x1, y1 = shapes.bounds[k]
            for i in range(top // _BLOCK, (bottom - 1) // _BLOCK + 1):
                y = (frame.row0 + i * _BLOCK + _BLOCK / 2) * frame.scale_y
                beside_y = max(y0 - y, y - y1, 0.0)
                for j in range(left // _BLOCK, (right - 1) // _BLOCK + 1):
                    x = (frame.col0 + j * _BLOCK + _BLOCK / 2) * frame.scale_x
                    beside_x = max(x0 - x, x - x1, 0.0)
                    if beside_x**2 + beside_y**2 > (wide + radius) ** 2:
                        continue
                    block = i * cols + j
                    if fills:
                        near[first[block + 1]] = k
                        first[block + 1] += 1
                    else:
                        first[block + 2] += 1
                        if not wanted[block]:
                            wanted[block] = _outside_limit(shapes, k, x, y) < radius + px
    return first[:-1], near, wanted


@compiled
def _block_radius(frame: _Frame) -> float:
    """How far a pixel's centre is from the centre of its block, at most, in µm."""
    radius: float = (_BLOCK - 1) / 2 * np.hypot(frame.scale_x, frame.scale_y) * (1 + 1e-9)
    return radius


@compiled
def _candidates(
    shapes: _Shapes,
    near: NDArray[np.int32],
    at: tuple[float, float],
    radius: float,
    squares: Floats,
    found: Integers,
) -> int:
    """How many sides may be the nearest one to a point up to ``radius`` from ``at``: C.

    Sides of the nuclei ``near`` that point, written to ``found`` (2, S): the side and its nucleus.
    ``squares`` (2, S) is room.
    """
    x, y = at
    first, bounds, sides = shapes.first, shapes.bounds, shapes.sides
    beside, apart = squares[0], squares[1]
    closest = 0
    for n in range(len(near)):
        x0, y0, x1, y1 = (
            bounds[near[n], 0],
            bounds[near[n], 1],
            bounds[near[n], 2],
            bounds[near[n], 3],
        )
        beside[n] = max(x0 - x, x - x1, 0.0) ** 2 + max(y0 - y, y - y1, 0.0) ** 2
        closest = n if beside[n] < beside[closest] else closest
    least, most, count = np.inf, np.inf, 0
    for turn in range(len(near)):  # that with the closest bounds first, then the others
        n = closest if turn == 0 else turn - (turn <= closest)
        if beside[n] > most:
            continue
        begin, end = first[near[n]], first[near[n] + 1]
        sx, sy, dx, dy, inverse = (
            sides[0, begin:end],
            sides[1, begin:end],
            sides[2, begin:end],
            sides[3, begin:end],
            sides[4, begin:end],
        )
        here = apart[: end - begin]
        for s in range(end - begin):
            px, py = x - sx[s], y - sy[s]
            along = min(max((px * dx[s] + py * dy[s]) * inverse[s], 0.0), 1.0)
            ox, oy = px - along * dx[s], py - along * dy[s]
            here[s] = ox * ox + oy * oy
        for s in range(end - begin):
            least = min(least, here[s])
        most = (np.sqrt(least) + 2 * radius) ** 2
        for s in range(end - begin):
            if here[s] <= most:
                found[0, count], found[1, count] = begin + s, near[n]
                count += 1
    return count


@compiled
def _nearest(
    shapes: _Shapes, inside: NDArray[np.int32], frame: _Frame
) -> tuple[NDArray[np.int32], Floats]:
    """The nearest nucleus (H, W) of each pixel, k + 1, 0 without one in reach; and its distance.

    That is left out where no cell may be, or only other ones; and the distance ``inside`` (H, W) of
    nuclei, NaN, which few pixels need. In each block only those sides are looked at that may be the
    nearest ones to a pixel of it.
    """
    nearest = inside.copy()
    distance = np.full((frame.rows, frame.cols), np.nan)
    # Pixels with their centre up to one px beyond the reach: contours end between two of them.
    wide = frame.reach + 1.5 * max(frame.scale_x, frame.scale_y)
    first, near, wanted = _blocks_near(shapes, frame, wide)
    radius = _block_radius(frame)
    sides = shapes.sides
    squares, found = np.empty((2, sides.shape[1])), np.empty((2, sides.shape[1]), np.int64)
    pixels = _BLOCK * _BLOCK
    x, y = np.empty(pixels), np.empty(pixels)
    best, who = np.empty(pixels), np.empty(pixels, np.int64)
    across = (frame.cols + _BLOCK - 1) // _BLOCK
    for block in range(len(wanted)):
        row0, col0 = block // across * _BLOCK, block % across * _BLOCK
        row1, col1 = min(row0 + _BLOCK, frame.rows), min(col0 + _BLOCK, frame.cols)
        if not wanted[block] or (inside[row0:row1, col0:col1] > 0).all():
            continue
        for p in range(pixels):
            x[p] = (col0 + p % _BLOCK + frame.col0 + 0.5) * frame.scale_x
            y[p] = (row0 + p // _BLOCK + frame.row0 + 0.5) * frame.scale_y
        at = (x[0] + x[-1]) / 2, (y[0] + y[-1]) / 2
        around = near[first[block] : first[block + 1]]
        count = _candidates(shapes, around, at, radius, squares, found)
        best[:], who[:] = np.inf, -1
        for c in range(count):
            s, k = found[0, c], found[1, c]
            sx, sy, dx, dy, inverse = (
                sides[0, s],
                sides[1, s],
                sides[2, s],
                sides[3, s],
                sides[4, s],
            )
            for p in range(pixels):
                px, py = x[p] - sx, y[p] - sy
                along = min(max((px * dx + py * dy) * inverse, 0.0), 1.0)
                ox, oy = px - along * dx, py - along * dy
                square = ox * ox + oy * oy
                closer = square < best[p] or (square == best[p] and k < who[p])
                best[p] = square if closer else best[p]
                who[p] = k if closer else who[p]
        for row in range(row0, row1):
            for col in range(col0, col1):
                p = (row - row0) * _BLOCK + col - col0
                if not inside[row, col] and best[p] < wide * wide:
                    nearest[row, col] = who[p] + 1
                    distance[row, col] = np.sqrt(best[p])
    return nearest, distance


@compiled
def _within_limits(
    nearest: NDArray[np.int32], distance: Floats, shapes: _Shapes, frame: _Frame
) -> NDArray[np.int32]:
    """The cell (H, W) of each pixel: of its nearest nucleus, where that reaches so far."""
    labels = np.zeros(nearest.shape, np.int32)
    for row in range(frame.rows):
        y = (row + frame.row0 + 0.5) * frame.scale_y
        for col in range(frame.cols):
            label = nearest[row, col]
            if label:
                x = (col + frame.col0 + 0.5) * frame.scale_x
                here = distance[row, col]
                inside = np.isnan(here)
                if inside or _room(shapes, label - 1, here, x, y, frame.reach) > 0:
                    labels[row, col] = label
    return labels


@compiled
def _share(one: float, other: float) -> float:
    """Where a line from ``one`` to ``-other`` is 0: a fraction of its length, in steps of 1/1024.

    Such numbers of pixels add up without rounding, so that two cells have the same points.
    """
    total = one + other
    fraction = one / total if total > 0 else 0.5
    rounded: float = np.rint(1024 * fraction)
    return min(max(rounded, 8.0), 1016.0) / 1024  # not at a pixel's centre


@compiled
def _crossings(
    pixels: Integers,
    beyond: Integers,
    labels: NDArray[np.int32],
    nearest: NDArray[np.int32],
    distance: Floats,
    shapes: _Shapes,
    frame: _Frame,
) -> tuple[Floats, Bools]:
    """Where cells end between ``pixels`` (E, 2) of theirs and those ``beyond``: points (E, 2).

    On the working grid. And whether the border there is not one line of two cells, since one of
    them ends before it.
    """
    points, ends = np.empty((len(pixels), 2)), np.zeros(len(pixels), np.bool_)
    for edge in range(len(pixels)):
        row, col, r, c = pixels[edge, 0], pixels[edge, 1], beyond[edge, 0], beyond[edge, 1]
        k = labels[row, col] - 1
        x, y = (col + frame.col0 + 0.5) * frame.scale_x, (row + frame.row0 + 0.5) * frame.scale_y
        u, v = (c + frame.col0 + 0.5) * frame.scale_x, (r + frame.row0 + 0.5) * frame.scale_y
        is_in_image = 0 <= r < frame.rows and 0 <= c < frame.cols
        here, there = distance[row, col], np.nan
        if np.isnan(here):
            here = _signed_distance(shapes, k, x, y)
        other, its_own = -1, np.nan
        if is_in_image:
            other, its_own = nearest[r, c] - 1, distance[r, c]
            there = its_own
        if other >= 0 and np.isnan(its_own):
            its_own = _signed_distance(shapes, other, u, v)
            there = its_own
        if other != k:
            there = _signed_distance(shapes, k, u, v)
        limit, border, beside = 1.0, 1.0, 1.0
        room = min(frame.reach - there, -_outside_limit(shapes, k, u, v))
        if room < 0:
            limit = _share(min(frame.reach - here, -_outside_limit(shapes, k, x, y)), -room)
        if not is_in_image:
            border = 0.5
        elif other >= 0 and other != k:
            others = _signed_distance(shapes, other, x, y)
            if k < other:  # one line, made from the lesser side
                border = _share(others - here, there - its_own)
            else:
                border = 1 - _share(there - its_own, others - here)
            room = min(frame.reach - others, -_outside_limit(shapes, other, x, y))
            if room < 0:
                at = min(frame.reach - its_own, -_outside_limit(shapes, other, u, v))
                beside = _share(at, -room)
        reach = min(limit, border)
        points[edge, 0] = frame.col0 + col + 0.5 + reach * (c - col)
        points[edge, 1] = frame.row0 + row + 0.5 + reach * (r - row)
        if is_in_image and labels[r, c] > 0:
            ends[edge] = limit < border or beside < 1 - border
    return points, ends


@compiled
def _is_junction(labels: NDArray[np.int32], row: int, col: int) -> bool:
    """Whether more than two borders meet at the upper left corner of a pixel."""
    rows, cols = labels.shape
    around = np.zeros(4, np.int32)
    for k in range(4):
        r, c = row - (k < 2), col - (k == 0 or k == 3)
        if 0 <= r < rows and 0 <= c < cols:
            around[k] = labels[r, c]
    borders = 0
    for k in range(4):
        borders += around[k] != around[(k + 1) % 4]
    return borders > 2


@compiled
def _count_edges(labels: NDArray[np.int32], wanted: Bools) -> int:
    """The number of pixels' edges along the borders of the ``wanted`` labels."""
    rows, cols = labels.shape
    edges = 0
    for row in range(rows):
        for col in range(cols):
            if wanted[labels[row, col]]:
                for way in range(4):
                    r, c = row + _SOUTH[way], col + _EAST[way]
                    inside = 0 <= r < rows and 0 <= c < cols
                    edges += not inside or labels[r, c] != labels[row, col]
    return edges


@compiled
def _trace(
    labels: NDArray[np.int32], wanted: Bools
) -> tuple[Integers, Integers, Integers, NDArray[np.int32], Bools, Bools]:
    """Trace the borders of the ``wanted`` labels along the edges of their pixels.

    Returns of each edge its pixel and the one beyond it (E, 2), as (row, column), and its ring
    (E,), ascending; of each ring its label (R,); of each edge whether three borders meet at its
    beginning or end, and whether the border is simplified from its other end: that of two cells in
    one direction for both.
    """
    rows, cols = labels.shape
    ahead_row, ahead_col = _SOUTH, _EAST
    edges = _count_edges(labels, wanted)
    pixels, beyond = np.empty((edges, 2), np.int64), np.empty((edges, 2), np.int64)
    ring, owner = np.empty(edges, np.int64), np.empty(edges, np.int32)
    fixed, backwards = np.zeros(edges, np.bool_), np.zeros(edges, np.bool_)
    traced = np.zeros((rows, cols), np.bool_)  # along the pixel's top; every ring has such an edge
    edge = rings = 0
    for row0 in range(rows):
        for col0 in range(cols):
            label = labels[row0, col0]
            above = labels[row0 - 1, col0] if row0 else 0
            if not wanted[label] or traced[row0, col0] or above == label:
                continue
            row, col, way = row0, col0, 0
            junction = _is_junction(labels, row, col)
            while True:
                if way == 0:
                    traced[row, col] = True
                # Outwards is to the left of where the edge leads.
                r, c = row - ahead_col[way], col + ahead_row[way]
                other = labels[r, c] if 0 <= r < rows and 0 <= c < cols else 0
                pixels[edge], beyond[edge] = (row, col), (r, c)
                ring[edge] = rings
                backwards[edge] = other != 0 and label > other
                fixed[edge] = junction
                # The corner at the end of the edge, as the upper left one of a pixel.
                junction = _is_junction(labels, row + (way in (1, 2)), col + (way in (0, 1)))
                fixed[edge] |= junction
                edge += 1
                next_row, next_col = row + ahead_row[way], col + ahead_col[way]
                left_row, left_col = next_row - ahead_col[way], next_col + ahead_row[way]
                in_front = 0 <= next_row < rows and 0 <= next_col < cols
                in_front = in_front and labels[next_row, next_col] == label
                to_left = 0 <= left_row < rows and 0 <= left_col < cols
                to_left = to_left and labels[left_row, left_col] == label
                if not in_front:
                    way = (way + 1) % 4
                elif not to_left:
                    row, col = next_row, next_col
                else:
                    row, col, way = left_row, left_col, (way - 1) % 4
                if row == row0 and col == col0 and way == 0:
                    break
            owner[rings] = label - 1
            rings += 1
    return pixels, beyond, ring, owner[:rings], fixed, backwards


@compiled
def _beside(marked: Bools, ring: Integers) -> Bools:
    """Which edges (E,) of closed rings are ``marked``, or beside one that is."""
    beside = marked.copy()
    begin = 0
    for edge in range(len(ring)):
        is_last = edge + 1 == len(ring) or ring[edge + 1] != ring[edge]
        after = begin if is_last else edge + 1
        beside[edge] |= marked[after]
        beside[after] |= marked[edge]
        if is_last:
            begin = edge + 1
    return beside


@compiled
def _simplify(
    points: Floats, ring: Integers, fixed: Bools, backwards: Bools, tolerance: float
) -> Bools:
    """Which points (E,) of closed rings stay: the others are nearer than ``tolerance`` to lines.

    Lines end at ``fixed`` points; in a ring without any, at its first point and at the one that is
    farthest from that (D. Douglas, T. Peucker, 1973).
    """
    keep = fixed.copy()
    first = 0
    for last in range(len(ring)):
        if last + 1 < len(ring) and ring[last + 1] == ring[last]:
            continue
        size = last + 1 - first
        start = first
        while start <= last and not keep[start]:
            start += 1
        if start > last:
            start = first
            apart = points[first : last + 1] - points[first]
            keep[start] = True
            keep[first + np.argmax((apart**2).sum(axis=1))] = True
        line = np.empty(size + 1, np.int64)
        length = 0
        for k in range(size + 1):
            at = first + (start - first + k) % size
            line[length] = at
            length += 1
            if keep[at] and length > 1:
                middle = line[1] if length > 2 else line[0]
                if backwards[middle]:
                    _reduce(points, line[:length][::-1].copy(), keep, tolerance)
                else:
                    _reduce(points, line[:length].copy(), keep, tolerance)
                line[0] = at
                length = 1
        if keep[first : last + 1].sum() < 3:
            keep[first : last + 1] = True
        first = last + 1
    return keep


@compiled
def _reduce(points: Floats, line: Integers, keep: Bools, tolerance: float) -> None:
    """Mark the points of a line, between its ends, that stay."""
    stack = [(0, len(line) - 1)]
    while stack:
        begin, end = stack.pop()
        ax, ay = points[line[begin]]
        dx, dy = points[line[end], 0] - ax, points[line[end], 1] - ay
        length = dx * dx + dy * dy
        farthest, most = -1, tolerance * tolerance
        for k in range(begin + 1, end):
            px, py = points[line[k], 0] - ax, points[line[k], 1] - ay
            along = min(max((px * dx + py * dy) / length, 0.0), 1.0) if length > 0 else 0.0
            off = (px - along * dx) ** 2 + (py - along * dy) ** 2
            if off > most:
                farthest, most = k, off
        if farthest >= 0:
            keep[line[farthest]] = True
            stack.append((begin, farthest))
            stack.append((farthest, end))


def _largest(rings: Polygons, owner: NDArray[np.int32], count: int) -> Polygons:
    """The largest ring (count,) of each label; empty for one without pixels."""
    order = np.lexsort((shapely.area(rings), owner))
    largest = np.full(count, shapely.Polygon(), dtype=object)
    largest[owner[order]] = rings[order]  # of several, the last
    return largest
