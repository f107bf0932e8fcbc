"""The contours of cells: along the edges of their pixels, in few points."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.compiled import compiled
from patchcl_qupath.segmentation.rings import Bools, Floats, Integers, Rings

_SIMPLIFY_PX = 0.2  # a contour may move by this much when points are left out, as of nuclei
# Of 1024 from a pixel's centre to where a cell ends: a pixel that two nuclei are equally near to is
# clearly in one of their cells, for whoever measures it.
_LEAST_STEPS = 128.0
# Pixels are read this many rows before rings are traced in them, and each 64 bytes of a row: they
# wait in a core's cache. One ring after the other would fetch them in no order, and wait for each.
_AHEAD, _FETCHED = 32, 32
# What there is room for, to begin with: edges of the longest ring, and points of a cell on average.
_RING_EDGES, _CELL_POINTS = 4096, 64

Labels = NDArray[np.signedinteger[Any]]
Distances = NDArray[np.uint16]


class Frame(NamedTuple):
    """A box of the working grid, with a border of one px, and how distances are counted in it.

    ``reach`` is the largest distance in a cell, and ``step`` that between neighbours (x, y). All
    are in parts of the largest distance that matters for where a cell ends, which is ``_BEYOND``.
    Squares are whole numbers of a ``unit``: ``weight`` is that of 1 px (x, y), ``wide`` the largest
    number of px.
    """

    row0: int
    col0: int
    rows: int
    cols: int
    reach: float
    step: tuple[float, float]
    unit: int
    weight: tuple[int, int]
    wide: tuple[int, int]


class Limits(NamedTuple):
    """Where the scaled hulls of nuclei (N,) begin and end: along rows, and along columns.

    Hull k holds the centres of row ``begin[0, k] + n`` from ``ends[0, first[0, k] + n]`` px to
    ``ends[1, first[0, k] + n]`` px, for each n up to ``first[0, k + 1] - first[0, k]``, and none of
    other rows; likewise of columns by ``begin[1]`` and ``first[1]``. All are empty without limits.
    """

    first: Integers
    begin: Integers
    ends: Floats


class _Ring(NamedTuple):
    """Room for one ring along the edges of pixels (E,); the next has the same, in a core's cache.

    Of each edge ``row`` and ``col`` of the pixel, and where it leads, with the pixel on its right:
    1 px ``east`` or ``south``, or -1. Whether three borders meet at its beginning or end
    (``fixed``), and whether the border is simplified from its other end: that of two labels in one
    direction for both (``backwards``). The point where the cell ends there, and whether the border
    is not one line of two cells, since one of them ends before it (``ends``).

    ``points`` (2E, 2) follow once more, for lines over the end of the ring. ``keep`` (2E,) are
    those that stay; ``stack`` (2E,) is for finding them.
    """

    row: NDArray[np.int32]
    col: NDArray[np.int32]
    east: NDArray[np.int32]
    south: NDArray[np.int32]
    fixed: Bools
    backwards: Bools
    ends: Bools
    points: Floats
    keep: Bools
    stack: Integers


def contours(
    labels: Labels, distances: Distances, place: Integers, limits: Limits, frame: Frame
) -> Rings:
    """The contours (M,) of the cells of labels (H, W), by the place (N + 1,) of each, or -1.

    The largest ring of each; without points for one that has none. Labels below 1 are no cells, and
    the first and last row and column hold none.
    """
    ring_edges, points = _RING_EDGES, _RING_EDGES + _CELL_POINTS * len(place)
    while True:
        ring, xy = _room(ring_edges), np.empty((points, 2))
        rings, has_room = _contours(labels, distances, place, limits, frame, ring, xy)
        if has_room:
            return rings
        ring_edges, points = 2 * ring_edges, 2 * points


@compiled
def _contours(
    labels: Labels,
    distances: Distances,
    place: Integers,
    limits: Limits,
    frame: Frame,
    ring: _Ring,
    xy: Floats,
) -> tuple[Rings, bool]:
    """``contours``, and whether there was room for each ring and for points (P, 2) of all.

    A loop that makes more room itself takes half as long again.
    """
    width, flat, apart = frame.cols, labels.ravel(), distances.ravel()
    traced = np.zeros(labels.size, np.bool_)  # along the pixel's top; every ring has such an edge
    tops = np.zeros((width + 7) // 8 * 8, np.bool_)
    eights = tops.view(np.uint64)  # columns: nearly all have no top
    begin, end = np.zeros(place.max() + 1, np.int64), np.zeros(place.max() + 1, np.int64)
    used = 0
    for row in range(1, frame.rows - 1):
        _find_tops(labels[row - 1], labels[row], traced[row * width : (row + 1) * width], tops)
        ahead = min(row + _AHEAD, frame.rows - 1)
        ring.stack[0] = _fetch(labels[ahead], distances[ahead])  # unused, it would not be compiled
        for eight in range(len(eights)):
            if eights[eight] == 0:
                continue
            for col in range(8 * eight, 8 * eight + 8):
                start = row * width + col
                if not tops[col] or traced[start]:
                    continue
                label = labels[row, col]
                n = place[label]
                if n < 0:
                    continue
                size = _trace(flat, width, start, traced, ring)
                if size < 0 or used + size + 1 > len(xy):
                    return Rings(xy, begin), False
                _cross(flat, apart, label, limits, frame, size, ring)
                _simplify(size, _SIMPLIFY_PX, ring)
                last = _add(ring, size, xy, used)
                if end[n] == 0 or _area(xy[used:last]) >= _area(xy[begin[n] : end[n]]):
                    begin[n], end[n] = used, last
                used = last
    return _in_order(xy, begin, end), True


@compiled
def _find_tops(above: Labels, labels: Labels, traced: Bools, tops: Bools) -> None:
    """Where another label (W,) is above that of a cell, and no ring was traced there before."""
    for col in range(len(labels)):
        tops[col] = (labels[col] > 0) & (labels[col] != above[col]) & ~traced[col]


@compiled
def _fetch(labels: Labels, distances: Distances) -> int:
    """Read a row (W,) of pixels, so that a core has it in its cache; the result has no meaning."""
    total = 0
    for col in range(0, len(labels), _FETCHED):
        total += labels[col] + distances[col]
    return total


@compiled
def _add(ring: _Ring, size: int, xy: Floats, end: int) -> int:
    """Add the points of a ring that stay, from the first one traced, to those up to ``end``."""
    begin = end
    for n in range(size):
        xy[end, 0], xy[end, 1] = ring.points[n, 0], ring.points[n, 1]
        end += ring.keep[n]
    xy[end, 0], xy[end, 1] = xy[begin, 0], xy[begin, 1]
    return end + 1


@compiled
def _area(ring: Floats) -> float:
    """The area of a closed ring (P, 2)."""
    twice = 0.0
    for point in range(1, len(ring) - 1):
        twice += (ring[point, 0] - ring[0, 0]) * (ring[point - 1, 1] - ring[point + 1, 1])
    return abs(twice / 2)


@compiled
def _in_order(xy: Floats, begin: Integers, end: Integers) -> Rings:
    """The rings (N,) ``xy[begin[k] : end[k]]`` of points."""
    first = np.zeros(len(begin) + 1, np.int64)
    for k in range(len(begin)):
        first[k + 1] = first[k] + end[k] - begin[k]
    ordered = np.empty((first[-1], 2))
    for k in range(len(begin)):
        for n in range(end[k] - begin[k]):
            ordered[first[k] + n, 0] = xy[begin[k] + n, 0]
            ordered[first[k] + n, 1] = xy[begin[k] + n, 1]
    return Rings(ordered, first)


@compiled
def _room(edges: int) -> _Ring:
    """Room for a ring of so many edges."""
    row, col, east, south = np.empty((4, edges), np.int32)
    fixed, backwards, ends = np.empty((3, edges), np.bool_)
    points, keep = np.empty((2 * edges, 2)), np.empty(2 * edges, np.bool_)
    return _Ring(
        row, col, east, south, fixed, backwards, ends, points, keep, np.empty(2 * edges, np.int64)
    )


@compiled
def _trace(flat: Labels, width: int, start: int, traced: Bools, ring: _Ring) -> int:
    """Trace the ring that begins along the top of a pixel: the number of edges; -1 without room."""
    label, pixel, size = flat[start], start, 0
    row, col = start // width, start % width
    east, south = 1, 0
    junction = _is_junction(label, flat[start - width], flat[start - width - 1], flat[start - 1])
    while True:
        if size == len(ring.row):
            return -1
        if east > 0:
            traced[pixel] = True
        ahead, across = east + south * width, south - east * width
        other, front = flat[np.uintp(pixel + across)], flat[np.uintp(pixel + ahead)]
        beside = flat[np.uintp(pixel + ahead + across)]
        ring.row[size], ring.col[size] = row, col
        ring.east[size], ring.south[size] = east, south
        ring.backwards[size] = 0 < other < label
        was, junction = junction, _is_junction(label, front, beside, other)
        ring.fixed[size] = was | junction
        size += 1
        if front != label:
            east, south = -south, east
        else:
            pixel, row, col = pixel + ahead, row + south, col + east
            if beside == label:
                pixel, row, col = pixel + across, row - east, col + south
                east, south = south, -east
        if pixel == start and east > 0:
            return size


@compiled
def _is_junction(one: int, two: int, three: int, four: int) -> bool:
    """Whether more than two borders meet between four pixels, in their order around a corner."""
    a, b, c, d = max(one, 0), max(two, 0), max(three, 0), max(four, 0)
    return int(a != b) + int(b != c) + int(c != d) + int(d != a) > 2


@compiled
def _rounded(share: float) -> float:
    """A fraction of the line between the centres of two pixels, in steps of 1/1024.

    Such numbers of pixels add up without rounding, so that two cells have the same points.
    """
    steps: float = min(max(np.rint(1024 * share), _LEAST_STEPS), 1024 - _LEAST_STEPS)
    return steps / 1024


@compiled
def _cross(
    flat: Labels,
    apart: Distances,
    own: int,
    limits: Limits,
    frame: Frame,
    size: int,
    ring: _Ring,
) -> None:
    """Find where a cell ends between its pixels and those beyond: points on the working grid."""
    for edge in range(size):
        row, col = ring.row[edge], ring.col[edge]
        x, y = ring.south[edge], -ring.east[edge]  # outwards
        pixel = row * frame.cols + col
        beyond = pixel + y * frame.cols + x
        other, is_border = abs(flat[beyond]), flat[beyond] > 0
        here, there = float(apart[pixel]), float(apart[beyond])
        axis, step = (0, frame.step[0]) if y == 0 else (1, frame.step[1])
        limit, border = (frame.reach - here) / step, 1.0
        if not (0 < row + y < frame.rows - 1 and 0 < col + x < frame.cols - 1):
            border = 0.5  # the image ends
        elif own == other:
            limit = (frame.reach - here) / (there - here) if there > frame.reach else 1.0
        elif own < other:  # one line, made from the lesser side
            border = _rounded(0.5 + (there - here) / (2 * step))
        else:
            border = 1 - _rounded(0.5 - (there - here) / (2 * step))
        line, at = row + frame.row0, col + frame.col0 + 0.5
        if axis:
            line, at = col + frame.col0, row + frame.row0 + 0.5
        limit = _rounded(min(limit, _within(limits, own - 1, axis, line, at, x + y)))
        is_end = is_border and limit < border
        if is_border and not is_end:
            within = _within(limits, other - 1, axis, line, at + (x + y), -(x + y))
            is_end = _rounded(min((frame.reach - there) / step, within)) < 1 - border
        share = min(limit, border, 1 - _LEAST_STEPS / 1024)
        ring.ends[edge] = is_end
        ring.points[edge, 0] = frame.col0 + col + 0.5 + share * x
        ring.points[edge, 1] = frame.row0 + row + 0.5 + share * y


@compiled
def _within(limits: Limits, k: int, axis: int, line: int, at: float, outwards: int) -> float:
    """How far it is along a row or column to where a hull ends; infinite where there is none."""
    if limits.begin.shape[1] == 0:
        return np.inf
    first, last = limits.first[axis, k], limits.first[axis, k + 1]
    n = first + line - limits.begin[axis, k]
    if not first <= n < last:
        return np.inf
    room: float = outwards * (limits.ends[1 if outwards > 0 else 0, n] - at)
    return room


@compiled
def _simplify(size: int, tolerance: float, ring: _Ring) -> None:
    """Keep no points of a closed ring that are nearer than ``tolerance`` to lines between others.

    Lines end at fixed points, and beside ends; in a ring without any, at its first point and at the
    one that is farthest from that (D. Douglas, T. Peucker, 1973). Two cells leave out the same
    points of the border between them. All stay where fewer than three would.
    """
    points, keep = ring.points, ring.keep
    for n in range(size):
        before, after = n - 1 if n else size - 1, n + 1 if n < size - 1 else 0
        keep[n] = ring.fixed[n] | ring.ends[before] | ring.ends[n] | ring.ends[after]
    turn = 0
    while turn < size and not keep[turn]:
        turn += 1
    if turn == size:
        turn, farthest, most = 0, 0, 0.0
        for n in range(size):
            dx, dy = points[n, 0] - points[0, 0], points[n, 1] - points[0, 1]
            if dx * dx + dy * dy > most:
                farthest, most = n, dx * dx + dy * dy
        keep[0] = keep[farthest] = True
    for n in range(turn + 1):
        points[size + n, 0], points[size + n, 1] = points[n, 0], points[n, 1]
        keep[size + n] = keep[n]
    begin = turn
    for end in range(turn + 1, turn + size + 1):
        if keep[end]:
            if end > begin + 1:
                middle = begin + 1 if begin + 1 < size else begin + 1 - size
                _reduce(points, begin, end, ring.backwards[middle], tolerance, keep, ring.stack)
            begin = end
    kept = 0
    for n in range(size):
        keep[n] = keep[n] if n >= turn else keep[n + size]
        kept += keep[n]
    if kept < 3:
        keep[:size] = True


@compiled
def _reduce(
    points: Floats,
    begin: int,
    end: int,
    is_backwards: bool,
    tolerance: float,
    keep: Bools,
    stack: Integers,
) -> None:
    """Keep those points between two that make a line of them all, found from one end of it."""
    origin, way = (end, -1) if is_backwards else (begin, 1)
    stack[0], stack[1], depth = 0, end - begin, 0
    while depth >= 0:
        a, b = stack[depth], stack[depth + 1]
        depth -= 2
        ax, ay = points[origin + way * a, 0], points[origin + way * a, 1]
        dx, dy = points[origin + way * b, 0] - ax, points[origin + way * b, 1] - ay
        square = dx * dx + dy * dy
        farthest, most = -1, tolerance * tolerance
        for n in range(a + 1, b):
            px, py = points[origin + way * n, 0] - ax, points[origin + way * n, 1] - ay
            along = min(max((px * dx + py * dy) / square, 0.0), 1.0) if square > 0 else 0.0
            off = (px - along * dx) ** 2 + (py - along * dy) ** 2
            if off > most:
                farthest, most = n, off
        if farthest >= 0:
            keep[origin + way * farthest] = True
            stack[depth + 2], stack[depth + 3] = a, farthest
            stack[depth + 4], stack[depth + 5] = farthest, b
            depth += 4
