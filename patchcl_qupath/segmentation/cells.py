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

from patchcl_qupath.compiled import compiled
from patchcl_qupath.config import CellConfig
from patchcl_qupath.datatypes import Box, Polygons, grid_to_level0

_SIMPLIFY_PX = 0.2  # a contour may move by this much when points are left out, as of nuclei
_NO_LIMIT = 1.0  # largest ``constrain_scale`` that is none, as in QuPath
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
    """Nuclei (N,) in µm: the sides ``sides[first[k] : first[k + 1]]`` of each, and its ``bounds``.

    A side is (x, y, dx, dy, 1 / length²), bounds (x0, y0, x1, y1); ``growth`` is how far the limit
    of its cell is outside of each of these. ``planes[limit[k] : limit[k + 1]]`` (normal x, normal
    y, offset) are the sides of that convex limit: a point is outside by the largest of normal *
    point - offset.
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
    nearest, distance = _nearest(shapes, frame)
    labels = _within_limits(nearest, distance, shapes, frame)
    wanted = np.zeros(len(order) + 1, np.bool_)
    wanted[rank + 1] = True
    points, ring, owner, fixed, backwards = _trace(labels, wanted, nearest, distance, shapes, frame)
    kept = _simplify(points, ring, fixed, backwards, _SIMPLIFY_PX)
    rings = shapely.polygons(shapely.linearrings(points[kept], indices=ring[kept]))
    return _largest(rings, owner, len(order))[rank]


def fill(polygons_px: Polygons, box: Box) -> NDArray[np.int32]:
    """The polygon (H, W) that holds the centre of each pixel of a box: k + 1, 0 where none does."""
    if not len(polygons_px):
        return np.zeros(box.shape, np.int32)
    sides, first = _sides(polygons_px)
    return _fill(
        sides, first, shapely.bounds(polygons_px), np.array([box.row0, box.col0]), box.shape
    )


def fit_to_nuclei(cells: Polygons, nuclei: Polygons) -> Polygons:
    """Cells (C,) without what other nuclei (N,) cover, and with all of their own.

    The first C of the nuclei are those of the cells. A contour between touching nuclei may run
    through either by a fraction of a pixel. Vertices come in one order, whatever was cut off first.
    """
    tree = shapely.STRtree(nuclei)
    cell, nucleus = tree.query(cells, predicate="intersects")
    other = cell != nucleus
    cell, nucleus = cell[other], nucleus[other]
    shared = shapely.area(shapely.intersection(cells[cell], nuclei[nucleus])) > 0
    cell, nucleus = cell[shared], nucleus[shared]
    from_the_top = np.argsort(np.argsort(_from_the_top(nuclei))[nucleus], kind="stable")
    cell, nucleus = cell[from_the_top], nucleus[from_the_top]
    fitted = cells.copy()
    for k, j in zip(cell.tolist(), nucleus.tolist(), strict=True):  # a few, at touching nuclei
        fitted[k] = shapely.difference(fitted[k], nuclei[j])
    own = nuclei[: len(cells)]
    poking = ~shapely.covers(fitted, own)
    fitted[poking] = shapely.union(fitted[poking], own[poking])
    return np.asarray(shapely.normalize(_whole(fitted, own)), dtype=object)


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
        hulls = shapely.convex_hull(polygons)
        planes, limit = _half_planes(hulls, constrain_scale)
        centre = shapely.get_coordinates(shapely.centroid(hulls))
        growth = (constrain_scale - 1) * np.abs(bounds - np.tile(centre, 2))
    return _Shapes(
        sides=sides, first=first, bounds=bounds, growth=growth, planes=planes, limit=limit
    )


def _sides(polygons: Polygons) -> tuple[Floats, Integers]:
    """The sides of polygons (N,), as in ``_Shapes``, and the first one of each (N + 1,)."""
    xy, of = shapely.get_coordinates(polygons, return_index=True)  # closed: first point = last
    begin = np.flatnonzero(of[1:] == of[:-1])
    along = xy[begin + 1] - xy[begin]
    inverse = 1 / np.maximum((along**2).sum(axis=1), 1e-24)
    first = np.searchsorted(of[begin], np.arange(len(polygons) + 1))
    return np.column_stack([xy[begin], along, inverse]), first


def _half_planes(hulls: Polygons, scale: float) -> tuple[Floats, Integers]:
    """The sides of convex hulls (N,), scaled about their centroids, as ``planes`` and ``limit``."""
    sides, first = _sides(hulls)
    of = np.repeat(np.arange(len(hulls)), np.diff(first))
    centre = shapely.get_coordinates(shapely.centroid(hulls))[of]
    normal = np.stack([sides[:, 3], -sides[:, 2]], axis=1) * np.sqrt(sides[:, 4:])
    inwards = ((sides[:, :2] - centre) * normal).sum(axis=1) < 0
    normal[inwards] *= -1
    corner = centre + scale * (sides[:, :2] - centre)
    return np.column_stack([normal, (normal * corner).sum(axis=1)]), first


@compiled
def _signed_distance(shapes: _Shapes, k: int, x: float, y: float) -> float:
    """The distance from a point to the contour of nucleus k, in µm; negative within it."""
    inside, least = False, np.inf
    for s in range(shapes.first[k], shapes.first[k + 1]):
        dx, dy = shapes.sides[s, 2], shapes.sides[s, 3]
        px, py = x - shapes.sides[s, 0], y - shapes.sides[s, 1]
        along = min(max((px * dx + py * dy) * shapes.sides[s, 4], 0.0), 1.0)
        ox, oy = px - along * dx, py - along * dy
        least = min(least, ox * ox + oy * oy)
        # A ray to the right crosses the side.
        if (py < 0) != (py < dy) and (px * dy < py * dx) == (dy > 0):
            inside = not inside
    distance: float = np.sqrt(least)
    return -distance if inside else distance


@compiled
def _fill(
    sides: Floats, first: Integers, bounds: Floats, origin: Integers, shape: tuple[int, int]
) -> NDArray[np.int32]:
    """As ``fill``; ``origin`` is the first row and column of the box."""
    labels = np.zeros(shape, np.int32)
    crossed = np.zeros(shape[1] + 1, np.int64)  # by sides, of the pixels' centres in a row
    row0, col0 = origin
    for k in range(len(bounds)):
        x0, y0, x1, y1 = bounds[k]
        for row in range(max(int(y0) - row0, 0), min(int(y1) + 1 - row0, shape[0])):
            y, left = row + row0 + 0.5, max(int(x0) - col0, 0)
            right = min(int(x1) + 1 - col0, shape[1])
            crossed[left : right + 1] = 0
            for s in range(first[k], first[k + 1]):
                py, dy = y - sides[s, 1], sides[s, 3]
                if (py < 0) != (py < dy):
                    x = sides[s, 0] + py / dy * sides[s, 2] - col0
                    crossed[min(max(int(np.ceil(x - 0.5)), left), right)] += 1
            inside = 0
            for col in range(left, right):
                inside ^= crossed[col] & 1
                if inside:
                    labels[row, col] = k + 1
    return labels


@compiled
def _outside_limit(shapes: _Shapes, k: int, x: float, y: float) -> float:
    """How far a point is outside of the limit of cell k, in µm; negative within it."""
    most = -np.inf
    for side in range(shapes.limit[k], shapes.limit[k + 1]):
        plane = shapes.planes[side]
        most = max(most, plane[0] * x + plane[1] * y - plane[2])
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
def _nearest(shapes: _Shapes, frame: _Frame) -> tuple[NDArray[np.int32], Floats]:
    """The nearest nucleus (H, W) of each pixel, k + 1, 0 without one in reach; and its distance.

    First each nucleus has the pixels that its cell might hold; then those of others to which it is
    nearer, although its cell does not hold them.
    """
    nearest = np.zeros((frame.rows, frame.cols), np.int32)
    distance = np.full((frame.rows, frame.cols), np.inf)
    # Pixels with their centre up to one px beyond the reach: contours end between two of them.
    wide = frame.reach + 1.5 * max(frame.scale_x, frame.scale_y)
    far = np.full(4, wide)
    for others in (False, True):
        for k in range(len(shapes.first) - 1):
            x0, y0, x1, y1 = shapes.bounds[k]
            near = _window(shapes.bounds[k], np.minimum(shapes.growth[k], wide), frame)
            top, bottom, left, right = _window(shapes.bounds[k], far, frame) if others else near
            for row in range(top, bottom):
                y = (row + frame.row0 + 0.5) * frame.scale_y
                beside_y = max(y0 - y, y - y1, 0.0)
                for col in range(left, right):
                    if others and not nearest[row, col]:
                        continue
                    x = (col + frame.col0 + 0.5) * frame.scale_x
                    beside_x = max(x0 - x, x - x1, 0.0)
                    most = min(distance[row, col], wide)
                    outside = beside_x > 0 or beside_y > 0
                    if outside and (most <= 0 or beside_x**2 + beside_y**2 >= most**2):
                        continue
                    if others and nearest[row, col] == k + 1:
                        continue
                    if others and near[0] <= row < near[1] and near[2] <= col < near[3]:
                        continue
                    found = _signed_distance(shapes, k, x, y)
                    if found < distance[row, col]:
                        distance[row, col] = found
                        nearest[row, col] = k + 1
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
                if _room(shapes, label - 1, distance[row, col], x, y, frame.reach) > 0:
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
def _until(
    pixel: tuple[int, int],
    beyond: tuple[int, int],
    labels: NDArray[np.int32],
    nearest: NDArray[np.int32],
    distance: Floats,
    shapes: _Shapes,
    frame: _Frame,
) -> tuple[float, bool]:
    """How far the cell of a pixel reaches towards a neighbour that is not its own, in px.

    And whether the border there is not one line of two cells: one of them ends before it.
    """
    (row, col), (r, c) = pixel, beyond
    k, here = labels[row, col] - 1, distance[row, col]
    x, y = (col + frame.col0 + 0.5) * frame.scale_x, (row + frame.row0 + 0.5) * frame.scale_y
    u, v = (c + frame.col0 + 0.5) * frame.scale_x, (r + frame.row0 + 0.5) * frame.scale_y
    there = _signed_distance(shapes, k, u, v)
    limit, border, beside = 1.0, 1.0, 1.0
    room = _room(shapes, k, there, u, v, frame.reach)
    if room < 0:
        limit = _share(_room(shapes, k, here, x, y, frame.reach), -room)
    if not (0 <= r < frame.rows and 0 <= c < frame.cols):  # the image ends
        return min(limit, 0.5), False
    other = nearest[r, c] - 1
    if other >= 0 and other != k:
        others = _signed_distance(shapes, other, x, y)
        if k < other:  # one line, made from the lesser side
            border = _share(others - here, there - distance[r, c])
        else:
            border = 1 - _share(there - distance[r, c], others - here)
        room = _room(shapes, other, others, x, y, frame.reach)
        if room < 0:
            at = _room(shapes, other, distance[r, c], u, v, frame.reach)
            beside = _share(at, -room)
    both = labels[r, c] > 0
    return min(limit, border), both and (limit < border or beside < 1 - border)


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
    labels: NDArray[np.int32],
    wanted: Bools,
    nearest: NDArray[np.int32],
    distance: Floats,
    shapes: _Shapes,
    frame: _Frame,
) -> tuple[Floats, Integers, NDArray[np.int32], Bools, Bools]:
    """Trace the borders of the ``wanted`` labels along the edges of their pixels.

    Returns of each edge where the contour crosses it, on the working grid, (E, 2), and its ring
    (E,), ascending; of each ring its label (R,); of each edge whether its point stays, since three
    borders meet beside it, and whether the border is simplified from its other end: that of two
    cells in one direction for both.
    """
    rows, cols = labels.shape
    ahead_row, ahead_col = _SOUTH, _EAST
    edges = _count_edges(labels, wanted)
    points, ring = np.empty((edges, 2)), np.empty(edges, np.int64)
    fixed, backwards = np.zeros(edges, np.bool_), np.zeros(edges, np.bool_)
    owner = np.empty(edges, np.int32)
    traced = np.zeros((rows, cols), np.bool_)  # along the pixel's top; every ring has such an edge
    edge = rings = 0
    for row0 in range(rows):
        for col0 in range(cols):
            label = labels[row0, col0]
            above = labels[row0 - 1, col0] if row0 else 0
            if not wanted[label] or traced[row0, col0] or above == label:
                continue
            row, col, way = row0, col0, 0
            begin = edge
            stays = _is_junction(labels, row, col)  # whether the next point does
            ends_first = False
            while True:
                if way == 0:
                    traced[row, col] = True
                # Outwards is to the left of where the edge leads.
                r, c = row - ahead_col[way], col + ahead_row[way]
                other = labels[r, c] if 0 <= r < rows and 0 <= c < cols else 0
                reach, ends = _until((row, col), (r, c), labels, nearest, distance, shapes, frame)
                points[edge, 0] = frame.col0 + col + 0.5 + reach * (c - col)
                points[edge, 1] = frame.row0 + row + 0.5 + reach * (r - row)
                ring[edge] = rings
                backwards[edge] = other != 0 and label > other
                fixed[edge] |= stays or ends
                if edge == begin:
                    ends_first = ends
                else:
                    fixed[edge - 1] |= ends
                next_row, next_col = row + ahead_row[way], col + ahead_col[way]
                left_row, left_col = next_row - ahead_col[way], next_col + ahead_row[way]
                # The corner at the end of the edge, as the upper left one of a pixel.
                junction = _is_junction(labels, row + (way in (1, 2)), col + (way in (0, 1)))
                fixed[edge] |= junction
                stays = junction or ends
                edge += 1
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
            fixed[begin] |= stays
            fixed[edge - 1] |= ends_first
            owner[rings] = label - 1
            rings += 1
    return points, ring, owner[:rings], fixed, backwards


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
