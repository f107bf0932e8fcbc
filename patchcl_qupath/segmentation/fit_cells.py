"""Cells that hold all of their own nucleus, and nothing of others.

A contour between touching nuclei may run through either by a fraction of a pixel: cells are cut at
the contours of others, and joined with their nuclei. Compiled loops do so where two contours cross;
GEOS does the few cells that fall into pieces, or that another nucleus holds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.compiled import compiled
from patchcl_qupath.datatypes import Polygons
from patchcl_qupath.segmentation.rings import (
    Bools,
    Floats,
    Integers,
    Rings,
    bounds_of,
    joined,
    polygons_of,
    rings_of,
    taken,
)

_NEAR = 1e-6  # px, within which it is not clear whether lines touch
_APART, _HOLDS, _MEETS = 0, 1, 2  # a cell and a nucleus
_SAME, _CHANGED, _UNCLEAR = 0, 1, 2  # a cell, once a nucleus was cut off or joined
# Contours that share points or lines do not cross: one is moved by this much (x, y), in px.
_ASIDE_X, _ASIDE_Y = 1e-8, 0.618e-8
_CRUMB = 0.05  # px², of pieces that are left out


class _Pairs(NamedTuple):
    """Nuclei ``nucleus[first[k] : first[k + 1]]`` near cell k, from the top; and how they meet."""

    first: Integers
    nucleus: Integers
    meeting: NDArray[np.int8]


def fit_to_nuclei(cells: Rings, nuclei: Rings) -> Rings:
    """Cells (C,) without what other nuclei (N,) cover, and with all of their own.

    The first C of the nuclei are those of the cells. One that fits stays as it is.
    """
    bounds = bounds_of(nuclei)
    pairs = _pairs(cells, nuclei, bounds_of(cells), bounds, from_the_top(bounds))
    fitted, found = _fitted(cells, nuclei, pairs)
    changed = np.flatnonzero(found == _CHANGED)
    fitted = taken(fitted, changed)
    found[changed[_crosses_itself(fitted)]] = _UNCLEAR
    unclear = np.flatnonzero(found == _UNCLEAR)
    by_geos = rings_of(_by_geos(cells, nuclei, pairs, unclear))
    source = np.arange(len(found))
    source[changed] = len(found) + np.arange(len(changed))
    source[unclear] = len(found) + len(changed) + np.arange(len(unclear))
    return taken(joined([cells, fitted, by_geos]), source)


def rounded_rings(rings: Rings) -> Rings:
    """Rings to 0.01 px, as nuclei are; one that would cross itself stays as it is."""
    rounded = Rings(np.round(rings.xy, 2), rings.first)
    moved = np.cumsum(np.append(0, (rounded.xy != rings.xy).any(axis=1)))[rings.first]
    moving = np.flatnonzero(np.diff(moved))
    for k in moving[_crosses_itself(taken(rounded, moving))]:
        points = slice(rings.first[k], rings.first[k + 1])
        rounded.xy[points] = rings.xy[points]
    return rounded


def from_the_top(bounds: Floats) -> Integers:
    """The order of polygons by their bounds (N, 4): the same whatever others are there."""
    x0, y0, x1, y1 = bounds.T
    return np.lexsort((x1, y1, x0, y0))


def _crosses_itself(rings: Rings) -> Bools:
    """Which rings (N,) are no valid polygons."""
    crosses = _may_cross_itself(rings)
    crosses[crosses] = ~shapely.is_valid(polygons_of(taken(rings, np.flatnonzero(crosses))))
    return crosses


def _by_geos(cells: Rings, nuclei: Rings, pairs: _Pairs, wanted: Integers) -> Polygons:
    """Some of the cells (M,), fitted by GEOS."""
    fitted = np.empty(len(wanted), dtype=object)
    for n, k in enumerate(wanted):
        (cell,) = polygons_of(taken(cells, np.array([k])))
        (own,) = polygons_of(taken(nuclei, np.array([k])))
        near = slice(pairs.first[k], pairs.first[k + 1])
        others = pairs.nucleus[near][pairs.meeting[near] == _MEETS]
        for other in polygons_of(taken(nuclei, others[others != k])):
            rest = cell.difference(other)
            cell = rest if rest.area < cell.area else cell
        parts = shapely.get_parts(shapely.make_valid(cell.union(own)))
        parts = parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON]
        most = np.argmax(shapely.area(shapely.intersection(parts, own)))
        fitted[n] = shapely.normalize(shapely.Polygon(parts[most].exterior))
    return fitted


@compiled
def _pairs(
    cells: Rings, nuclei: Rings, of_cells: Floats, of_nuclei: Floats, order: Integers
) -> _Pairs:
    """The nuclei near each cell, in their ``order`` from the top, by the bounds (.., 4) of both."""
    count = len(cells.first) - 1
    highest, top = 0.0, np.empty(len(order))
    for n in range(len(order)):
        top[n] = of_nuclei[order[n], 1]
        highest = max(highest, of_nuclei[order[n], 3] - top[n])
    first, room = np.zeros(count + 1, np.int64), 8 * count + 8
    nucleus, meeting = np.empty(room, np.int64), np.empty(room, np.int8)
    end = 0
    for k in range(count):
        left, right = of_cells[k, 0] - _NEAR, of_cells[k, 2] + _NEAR
        upper, lower = of_cells[k, 1] - _NEAR, of_cells[k, 3] + _NEAR
        cell = cells.xy[cells.first[k] : cells.first[k + 1]]
        for n in range(np.searchsorted(top, upper - highest), len(order)):
            if not len(cell) or top[n] > lower:
                break
            j = order[n]
            bounds = of_nuclei[j]
            if bounds[3] < upper or bounds[2] < left or bounds[0] > right:
                continue
            if end == len(nucleus):
                nucleus = np.concatenate((nucleus, np.empty_like(nucleus)))
                meeting = np.concatenate((meeting, np.empty_like(meeting)))
            nucleus[end] = j
            of_nucleus = nuclei.xy[nuclei.first[j] : nuclei.first[j + 1]]
            meeting[end] = _meeting(cell, of_nucleus, bounds)
            end += 1
        first[k + 1] = end
    return _Pairs(first, nucleus[:end], meeting[:end])


@compiled
def _meeting(cell: Floats, nucleus: Floats, bounds: Floats) -> int:
    """How a cell and a nucleus, closed rings, meet: ``_HOLDS`` it, ``_APART``, or else.

    ``bounds`` (4,) are those of the nucleus.
    """
    u, v = nucleus[:, 0], nucleus[:, 1]
    left, right = bounds[0] - _NEAR, bounds[2] + _NEAR
    top, bottom = bounds[1] - _NEAR, bounds[3] + _NEAR
    inside = False
    for a in range(len(cell) - 1):
        x0, y0, x1, y1 = cell[a, 0], cell[a, 1], cell[a + 1, 0], cell[a + 1, 1]
        # A ray to the right, from a point of the nucleus.
        if (v[0] < y0) != (v[0] < y1):
            inside ^= u[0] < x0 + (v[0] - y0) / (y1 - y0) * (x1 - x0)
        if max(x0, x1) < left or min(x0, x1) > right:
            continue
        if max(y0, y1) < top or min(y0, y1) > bottom:
            continue
        for b in range(len(nucleus) - 1):
            if _may_touch(x0, y0, x1, y1, u[b], v[b], u[b + 1], v[b + 1]):
                return _MEETS
    if inside:
        return _HOLDS
    return _MEETS if _holds(nucleus, cell[0, 0], cell[0, 1]) else _APART


@compiled
def _holds(ring: Floats, x: float, y: float) -> bool:
    """Whether a ring holds a point: a ray to the right crosses it an odd number of times."""
    inside = False
    for a in range(len(ring) - 1):
        if (y < ring[a, 1]) != (y < ring[a + 1, 1]):
            along = (y - ring[a, 1]) / (ring[a + 1, 1] - ring[a, 1])
            inside ^= x < ring[a, 0] + along * (ring[a + 1, 0] - ring[a, 0])
    return inside


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


@compiled
def _may_cross_itself(rings: Rings) -> Bools:
    """Which rings (N,) may touch or cross themselves; in doubt they may."""
    found = np.zeros(len(rings.first) - 1, np.bool_)
    for k in range(len(found)):
        xy = rings.xy[rings.first[k] : rings.first[k + 1]]
        sides = len(xy) - 1
        found[k] = sides < 3
        for a in range(sides):
            x0, y0, x1, y1 = xy[a, 0], xy[a, 1], xy[a + 1, 0], xy[a + 1, 1]
            # The next side may turn back along this one.
            after = xy[(a + 2) % sides if a + 2 >= sides else a + 2]
            across = (x1 - x0) * (after[1] - y1) - (y1 - y0) * (after[0] - x1)
            along = (x1 - x0) * (after[0] - x1) + (y1 - y0) * (after[1] - y1)
            found[k] |= along <= 0 and abs(across) <= _NEAR
            for b in range(a + 2, sides - (a == 0)):
                u0, v0, u1, v1 = xy[b, 0], xy[b, 1], xy[b + 1, 0], xy[b + 1, 1]
                found[k] |= _may_touch(x0, y0, x1, y1, u0, v0, u1, v1)
            if found[k]:
                break
    return found


@compiled
def _fitted(cells: Rings, nuclei: Rings, pairs: _Pairs) -> tuple[Rings, NDArray[np.int8]]:
    """Cells (C,) without other nuclei and with their own; and which changed, or are unclear.

    Others have no points.
    """
    count = len(cells.first) - 1
    first, found = np.zeros(count + 1, np.int64), np.zeros(count, np.int8)
    xy, end = np.empty((len(cells.xy) + 64, 2)), 0
    for k in range(count):
        cell = cells.xy[cells.first[k] : cells.first[k + 1]]
        own = nuclei.xy[nuclei.first[k] : nuclei.first[k + 1]]
        is_held = False
        for n in range(pairs.first[k], pairs.first[k + 1]):
            j = pairs.nucleus[n]
            if j == k:
                is_held = pairs.meeting[n] == _HOLDS
            elif pairs.meeting[n] == _MEETS and found[k] != _UNCLEAR:
                other = nuclei.xy[nuclei.first[j] : nuclei.first[j + 1]]
                cell, change = _combined(cell, other, aside=n - pairs.first[k] + 1.0, joins=False)
                found[k] = change if change > found[k] else found[k]
        if found[k] == _CHANGED or (found[k] == _SAME and not is_held):
            cell, change = _combined(cell, own, aside=-1.0, joins=True)
            found[k] = change if change > found[k] else found[k]
        if found[k] == _CHANGED:
            if end + len(cell) > len(xy):
                xy = np.concatenate((xy, np.empty((len(xy) + len(cell), 2))))
            xy[end : end + len(cell)] = cell
            end += len(cell)
        first[k + 1] = end
    return Rings(xy[:end].copy(), first), found


@compiled
def _combined(cell: Floats, nucleus: Floats, aside: float, joins: bool) -> tuple[Floats, int]:
    """A cell without a nucleus, or joined with it, closed rings; and what became of it.

    The cell is followed from where it leaves the nucleus to where it enters it, and from there the
    nucleus to where the cell leaves it (K. Weiler, P. Atherton, Hidden surface removal using
    polygon area sorting, 1977). Of several pieces, the largest; unless others are no crumbs. The
    nucleus is moved ``aside``, each by another factor.
    """
    origin = cell[0].copy()
    ring, other = cell - origin, nucleus - origin
    other[:, 0] += aside * _ASIDE_X
    other[:, 1] += aside * _ASIDE_Y
    crossings = _crossings(ring, other)
    count = len(crossings)
    if count == 0:
        if joins:
            return cell, _SAME if _holds(ring, other[0, 0], other[0, 1]) else _UNCLEAR
        return cell, _UNCLEAR if _holds(other, ring[0, 0], ring[0, 1]) else _SAME
    turn = 1.0 if _twice_area(ring) > 0 else -1.0
    forwards = (turn * _twice_area(other) > 0) == joins
    along_other = np.argsort(crossings[:, 1])
    place = np.argsort(along_other)
    leaving = 0 if crossings[0, 4] else 1  # and every other crossing
    for n in range(count):
        if crossings[n, 4] == crossings[n - 1, 4]:
            return cell, _UNCLEAR
    points, used = np.empty((len(ring) + len(other) + count, 2)), np.zeros(count, np.bool_)
    best, most, total = points[:0], 0.0, 0.0
    for begin in range(leaving, count, 2):
        size, here = 0, begin
        while not used[here]:
            used[here] = True
            entry = (here + 1) % count
            size = _follow(ring, crossings[here], crossings[entry], 0, True, points, size)
            here = along_other[(place[entry] + (1 if forwards else -1)) % count]
            if (here - leaving) % 2:
                return cell, _UNCLEAR
            begun = size
            size = _follow(other, crossings[entry], crossings[here], 1, forwards, points, size)
            points[begun + 1 : size, 0] -= aside * _ASIDE_X
            points[begun + 1 : size, 1] -= aside * _ASIDE_Y
        piece = _closed(points[:size])
        area = turn * _twice_area(piece)
        total += max(area, 0.0)
        if area > most:
            best, most = piece, area
    if len(best) < 4 or (total - most > 2 * _CRUMB and not joins):
        return cell, _UNCLEAR
    return best + origin, _CHANGED


@compiled
def _crossings(ring: Floats, other: Floats) -> Floats:
    """Where two closed rings cross, along the first: (K, 5).

    The number of the side and how much of it lies before the crossing, of both; (x, y); and whether
    the first ring leaves the other there.
    """
    found, count = np.empty((16, 5)), 0
    is_left_inside = _twice_area(other) > 0
    left, right = other[:, 0].min(), other[:, 0].max()
    top, bottom = other[:, 1].min(), other[:, 1].max()
    for a in range(len(ring) - 1):
        x0, y0, x1, y1 = ring[a, 0], ring[a, 1], ring[a + 1, 0], ring[a + 1, 1]
        if max(x0, x1) < left or min(x0, x1) > right or max(y0, y1) < top or min(y0, y1) > bottom:
            continue
        for b in range(len(other) - 1):
            u0, v0, u1, v1 = other[b, 0], other[b, 1], other[b + 1, 0], other[b + 1, 1]
            if max(u0, u1) < min(x0, x1) or min(u0, u1) > max(x0, x1):
                continue
            before = (u1 - u0) * (y0 - v0) - (v1 - v0) * (x0 - u0)
            after = (u1 - u0) * (y1 - v0) - (v1 - v0) * (x1 - u0)
            if (before > 0) == (after > 0):
                continue
            begins = (x1 - x0) * (v0 - y0) - (y1 - y0) * (u0 - x0)
            ends = (x1 - x0) * (v1 - y0) - (y1 - y0) * (u1 - x0)
            if (begins > 0) == (ends > 0):
                continue
            if count == len(found):
                found = np.concatenate((found, np.empty_like(found)))
            along = before / (before - after)
            found[count, 0], found[count, 1] = a + along, b + begins / (begins - ends)
            found[count, 2], found[count, 3] = x0 + along * (x1 - x0), y0 + along * (y1 - y0)
            found[count, 4] = (before > 0) == is_left_inside
            count += 1
    return found[np.argsort(found[:count, 0])]


@compiled
def _follow(
    ring: Floats,
    begin: Floats,
    end: Floats,
    which: int,
    forwards: bool,
    points: Floats,
    size: int,
) -> int:
    """Append a crossing, and the corners of a closed ring from there to another crossing.

    ``which`` of the two rings it is; ``size`` is the number of points, and the result.
    """
    points[size, 0], points[size, 1] = begin[2], begin[3]
    size += 1
    sides, side, last = len(ring) - 1, int(begin[which]), int(end[which])
    steps = (last - side if forwards else side - last) % sides
    if steps == 0 and (end[which] < begin[which]) == forwards:
        steps = sides
    for step in range(steps):
        corner = (side + 1 + step if forwards else side - step) % sides
        points[size, 0], points[size, 1] = ring[corner, 0], ring[corner, 1]
        size += 1
    return size


@compiled
def _closed(points: Floats) -> Floats:
    """The closed ring of some points, of which equal ones that follow each other become one."""
    ring, size = np.empty((len(points) + 1, 2)), 0
    for point in range(len(points)):
        dx = points[point, 0] - points[point - 1, 0]
        dy = points[point, 1] - points[point - 1, 1]
        if max(abs(dx), abs(dy)) > _NEAR:
            ring[size] = points[point]
            size += 1
    ring[size] = ring[0]
    return ring[: size + 1]


@compiled
def _twice_area(ring: Floats) -> float:
    """Twice the signed area of a closed ring near the origin."""
    twice = 0.0
    for point in range(len(ring) - 1):
        twice += ring[point, 0] * ring[point + 1, 1] - ring[point + 1, 0] * ring[point, 1]
    return twice
