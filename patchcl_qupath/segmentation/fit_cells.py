"""Cells that hold all of their own nucleus, and nothing of others.

Cells end between pixels, nuclei wherever their contours do: a cell is cut at the contours of other
nuclei, and joined with its own. Compiled loops do so where two contours cross; GEOS does the few
cells that fall into pieces, that another nucleus holds, or that would cross themselves.
"""

from __future__ import annotations

import numpy as np
import shapely

from patchcl_qupath.compiled import compiled
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
# Contours that share points or lines do not cross: one is moved by this much (x, y), in px.
_ASIDE_X, _ASIDE_Y = 1e-8, 0.618e-8
_CRUMB = 0.05  # px², of pieces that are left out
_CROSSINGS = 64  # of two contours; GEOS does those with more


def fit_to_nuclei(cells: Rings, nuclei: Rings) -> Rings:
    """Cells (C,) without what other nuclei (N,) cover, and with all of their own.

    The first C of the nuclei are those of the cells. One that fits stays as it is; one without
    points becomes its nucleus.
    """
    bounds = bounds_of(nuclei)
    order = from_the_top(bounds)
    fitted, is_clear = _fitted(cells, nuclei, bounds, order)
    unclear = np.flatnonzero(~is_clear | _crosses_itself(fitted))
    if not len(unclear):
        return fitted
    by_geos = [_by_geos(cells, nuclei, bounds, order, k) for k in unclear.tolist()]
    source = np.arange(len(is_clear))
    source[unclear] = len(source) + np.arange(len(unclear))
    return taken(joined([fitted, rings_of(np.array(by_geos, dtype=object))]), source)


def rounded_rings(rings: Rings) -> Rings:
    """Rings to 0.01 px, as nuclei are; one that would cross itself stays as it is."""
    xy, is_moved = _rounded(rings)
    moved = np.flatnonzero(is_moved)
    for k in moved[_crosses_itself(taken(Rings(xy, rings.first), moved))]:
        points = slice(rings.first[k], rings.first[k + 1])
        xy[points] = rings.xy[points]
    return Rings(xy, rings.first)


@compiled
def _rounded(rings: Rings) -> tuple[Floats, Bools]:
    """The points (P, 2) of rings to 0.01 px, as by ``np.round``; and which rings (N,) differ."""
    xy, is_moved = np.empty_like(rings.xy), np.zeros(len(rings.first) - 1, np.bool_)
    for k in range(len(is_moved)):
        for point in range(rings.first[k], rings.first[k + 1]):
            x, y = np.rint(100 * rings.xy[point, 0]) / 100, np.rint(100 * rings.xy[point, 1]) / 100
            is_moved[k] |= (x != rings.xy[point, 0]) | (y != rings.xy[point, 1])
            xy[point, 0], xy[point, 1] = x, y
    return xy, is_moved


def from_the_top(bounds: Floats) -> Integers:
    """The order of polygons by their bounds (N, 4): the same whatever others are there."""
    x0, y0, x1, y1 = bounds.T
    order = np.lexsort((x0, y0))  # nuclei of a tile are nearly in this order, not in that by others
    tied = (np.diff(y0[order]) == 0) & (np.diff(x0[order]) == 0)
    return np.lexsort((x1, y1, x0, y0)) if tied.any() else order


def _crosses_itself(rings: Rings) -> Bools:
    """Which rings (N,) are no valid polygons."""
    crosses = _may_cross_itself(rings)
    if crosses.any():
        crosses[crosses] = ~shapely.is_valid(polygons_of(taken(rings, np.flatnonzero(crosses))))
    return crosses


def _by_geos(
    cells: Rings, nuclei: Rings, bounds: Floats, order: Integers, k: int
) -> shapely.Polygon:
    """Cell k, fitted by GEOS. ``bounds`` (N, 4) are those of nuclei, in ``order`` from the top."""
    cell, own = (polygons_of(taken(rings, np.array([k])))[0] for rings in (cells, nuclei))
    cell = shapely.make_valid(cell)
    x0, y0, x1, y1 = shapely.total_bounds([cell, own])
    beside = bounds - (x1, y1, x0, y0)
    near = np.logical_and(beside[:, :2] <= 0, beside[:, 2:] >= 0).all(axis=1)
    near[k] = False
    for other in polygons_of(taken(nuclei, order[near[order]])):
        if not cell.contains_properly(other):
            rest = cell.difference(other)
            cell = rest if rest.area < cell.area else cell
    parts = shapely.get_parts(shapely.make_valid(cell.union(own)))
    parts = parts[shapely.get_type_id(parts) == shapely.GeometryType.POLYGON]
    most = np.argmax(shapely.area(shapely.intersection(parts, own)))
    return shapely.normalize(shapely.Polygon(parts[most].exterior))


@compiled
def _turns_once(ring: Floats) -> bool:
    """Whether a closed ring turns once around the mean of its points, and never back."""
    x, y = 0.0, 0.0
    for point in range(1, len(ring)):
        x, y = x + ring[point, 0], y + ring[point, 1]
    x, y = x / (len(ring) - 1), y / (len(ring) - 1)
    turns, left, right = 0, False, False
    u1, v1 = ring[0, 0] - x, ring[0, 1] - y
    for point in range(1, len(ring)):
        u0, v0 = u1, v1
        u1, v1 = ring[point, 0] - x, ring[point, 1] - y
        turned = u0 * v1 - u1 * v0
        left |= turned < _NEAR
        right |= turned > -_NEAR
        turns += (v0 < 0) & (v1 >= 0)
    return turns == 1 and not (left and right)


@compiled
def _fitted(cells: Rings, nuclei: Rings, bounds: Floats, order: Integers) -> tuple[Rings, Bools]:
    """Cells (C,) without other nuclei and with their own; and which are clear.

    ``bounds`` (N, 4) are those of nuclei, in ``order`` from the top. Cells that are unclear stay.
    """
    count = len(cells.first) - 1
    ranked, near = np.ascontiguousarray(bounds[order].T), np.empty(len(order) + 1, np.int64)
    highest = 0.0
    for n in range(len(order)):
        highest = max(highest, ranked[3, n] - ranked[1, n])
    first, is_clear = np.zeros(count + 1, np.int64), np.ones(count, np.bool_)
    xy, crossings = np.empty((2 * len(cells.xy) + 64, 2)), np.empty((_CROSSINGS, 5))
    for k in range(count):
        own = nuclei.xy[nuclei.first[k] : nuclei.first[k + 1]]
        whole = cells.xy[cells.first[k] : cells.first[k + 1]]
        whole = whole if len(whole) else own
        cell, is_cut = whole, 0
        for n in near[: _take_near(ranked, highest, _bounds(whole), near)]:
            j = order[n]
            if j == k:
                continue
            other = nuclei.xy[nuclei.first[j] : nuclei.first[j + 1]]
            is_cut += 1
            cell, clear = _combined(cell, other, bounds[j], is_cut, False, crossings)
            is_clear[k] &= clear
        cell, clear = _combined(cell, own, bounds[k], -1, True, crossings)
        is_clear[k] &= clear
        cell = cell if is_clear[k] else whole
        end = first[k] + len(cell)
        if end > len(xy):
            xy = np.concatenate((xy, np.empty((len(xy) + len(cell), 2))))
        xy[first[k] : end] = cell
        first[k + 1] = end
    return Rings(xy[: first[count]].copy(), first), is_clear


@compiled
def _take_near(
    ranked: Floats, highest: float, bounds: tuple[float, float, float, float], near: Integers
) -> int:
    """Write to ``near`` (N + 1,) which bounds of polygons meet some other ``bounds``.

    Returns how many do. Those of polygons, ``ranked`` (4, N), are from the top; none is higher than
    ``highest``.
    """
    left, upper, right, lower = bounds
    x0, y0, x1, y1 = ranked[0], ranked[1], ranked[2], ranked[3]
    count = 0
    for n in range(np.searchsorted(y0, upper - highest), len(y0)):
        if y0[n] > lower:
            break
        near[count] = n  # without a branch, which would be guessed wrong
        count += (x0[n] <= right) & (x1[n] >= left) & (y1[n] >= upper)
    return count


@compiled
def _bounds(ring: Floats) -> tuple[float, float, float, float]:
    """The bounds (x0, y0, x1, y1) of a ring."""
    x0 = x1 = ring[0, 0]
    y0 = y1 = ring[0, 1]
    for point in range(1, len(ring)):
        x, y = ring[point, 0], ring[point, 1]
        x0, y0 = x if x < x0 else x0, y if y < y0 else y0
        x1, y1 = x if x > x1 else x1, y if y > y1 else y1
    return x0, y0, x1, y1


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
        ring = rings.xy[rings.first[k] : rings.first[k + 1]]
        found[k] = len(ring) < 4 or (not _turns_once(ring) and _sides_may_touch(ring))
    return found


@compiled
def _sides_may_touch(ring: Floats) -> bool:
    """Whether sides of a closed ring may touch or cross each other; in doubt they may."""
    sides = len(ring) - 1
    x0, y0, x1, y1 = np.empty((4, sides))
    for a in range(sides):
        x, y, u, v = ring[a, 0], ring[a, 1], ring[a + 1, 0], ring[a + 1, 1]
        x0[a], x1[a] = (x if x < u else u) - _NEAR, x if x > u else u
        y0[a], y1[a] = (y if y < v else v) - _NEAR, y if y > v else v
    for a in range(sides):
        x, y, u, v = ring[a, 0], ring[a, 1], ring[a + 1, 0], ring[a + 1, 1]
        # The next side may turn back along this one.
        after = ring[a + 2 if a + 2 <= sides else 1]
        across = (u - x) * (after[1] - v) - (v - y) * (after[0] - u)
        along = (u - x) * (after[0] - u) + (v - y) * (after[1] - v)
        if along <= 0 and abs(across) <= _NEAR:
            return True
        left, top, right, bottom = x0[a], y0[a], x1[a], y1[a]
        meeting = 0  # in a loop without branches, which takes several sides at once
        for b in range(sides):
            beside = (x0[b] <= right) & (x1[b] >= left)
            meeting += beside & (y0[b] <= bottom) & (y1[b] >= top)
        if meeting <= 3:  # itself, and those before and after it
            continue
        for b in range(a + 2, sides - (a == 0)):
            if _may_touch(x, y, u, v, ring[b, 0], ring[b, 1], ring[b + 1, 0], ring[b + 1, 1]):
                return True
    return False


@compiled
def _combined(
    cell: Floats, nucleus: Floats, bounds: Floats, aside: float, joins: bool, crossings: Floats
) -> tuple[Floats, bool]:
    """A cell without a nucleus, or joined with it, closed rings; and whether that is clear.

    The cell is followed from where it leaves the nucleus to where it enters it, and from there the
    nucleus to where the cell leaves it (K. Weiler, P. Atherton, Hidden surface removal using
    polygon area sorting, 1977). Of several pieces, the largest; unless others are no crumbs. The
    nucleus, with ``bounds`` (4,), is moved ``aside``, each by another factor. ``crossings`` is room
    for what ``_cross`` finds.
    """
    shift_x, shift_y = aside * _ASIDE_X, aside * _ASIDE_Y
    count = _cross(cell, nucleus, bounds, (shift_x, shift_y), crossings)
    if count == len(crossings):
        return cell, False
    if count == 0:
        if joins:
            return cell, _holds(cell, nucleus[0, 0] + shift_x, nucleus[0, 1] + shift_y)
        return cell, not _holds(nucleus, cell[0, 0] - shift_x, cell[0, 1] - shift_y)
    found = crossings[:count]
    is_turned = _twice_area(nucleus) > 0
    turn = 1.0 if _twice_area(cell) > 0 else -1.0
    forwards = ((turn > 0) == is_turned) == joins
    leaving = 0 if (found[0, 4] > 0) == is_turned else 1  # and every other crossing
    along_other = _order(found[:, 1])
    place = np.empty_like(along_other)
    for n in range(count):
        here, before = along_other[n], along_other[n - 1]
        place[here] = n
        if found[n, 0] == found[n - 1, 0] or found[here, 1] == found[before, 1]:
            return cell, False  # parts of a ring between crossings would not be clear
        if (found[n, 4] > 0) == (found[n - 1, 4] > 0):
            return cell, False
    points, used = np.empty((len(cell) + len(nucleus) + 2 * count, 2)), np.zeros(count, np.bool_)
    best, most, total = points[:0], 0.0, 0.0
    for begin in range(leaving, count, 2):
        size, here = 0, begin
        while not used[here]:
            used[here] = True
            entry = (here + 1) % count
            size = _follow(cell, found[here], found[entry], 0, True, points, size)
            here = along_other[(place[entry] + (1 if forwards else -1)) % count]
            if (here - leaving) % 2:
                return cell, False
            size = _follow(nucleus, found[entry], found[here], 1, forwards, points, size)
        if size == 0:
            continue
        piece = _closed(points[: size + 1])
        points = points[len(piece) :]
        area = turn * _twice_area(piece)
        total += max(area, 0.0)
        if area > most:
            best, most = piece, area
    if len(best) < 4 or total - most > 2 * _CRUMB:
        return cell, False
    return best, True


@compiled
def _cross(
    ring: Floats, other: Floats, bounds: Floats, aside: tuple[float, float], found: Floats
) -> int:
    """The number of crossings of two closed rings, which are written to ``found`` (K, 5).

    In the order along the first ring: the number of the side and how much of it lies before the
    crossing, of both; (x, y); and whether the first ring crosses from the left of the other to its
    right. The other one, with ``bounds`` (4,), is moved ``aside``.
    """
    count = 0
    left, top = bounds[0] + aside[0], bounds[1] + aside[1]
    right, bottom = bounds[2] + aside[0], bounds[3] + aside[1]
    for a in range(len(ring) - 1):
        x0, y0, x1, y1 = ring[a, 0], ring[a, 1], ring[a + 1, 0], ring[a + 1, 1]
        if (x0 < left and x1 < left) or (x0 > right and x1 > right):
            continue
        if (y0 < top and y1 < top) or (y0 > bottom and y1 > bottom):
            continue
        x0, y0, x1, y1 = x0 - aside[0], y0 - aside[1], x1 - aside[0], y1 - aside[1]
        dx, dy = x1 - x0, y1 - y0
        begins = dx * (other[0, 1] - y0) - dy * (other[0, 0] - x0)
        for b in range(len(other) - 1):
            begun = begins
            begins = dx * (other[b + 1, 1] - y0) - dy * (other[b + 1, 0] - x0)
            if (begun > 0) == (begins > 0):
                continue
            u0, v0 = other[b, 0], other[b, 1]
            du, dv = other[b + 1, 0] - u0, other[b + 1, 1] - v0
            before = du * (y0 - v0) - dv * (x0 - u0)
            after = du * (y1 - v0) - dv * (x1 - u0)
            if (before > 0) == (after > 0):
                continue
            if count == len(found):
                return count
            along = before / (before - after)
            place = count
            while place and found[place - 1, 0] > a + along:
                found[place] = found[place - 1]
                place -= 1
            found[place, 0], found[place, 1] = a + along, b + begun / (begun - begins)
            found[place, 2], found[place, 3] = ring[a, 0] + along * dx, ring[a, 1] + along * dy
            found[place, 4] = before > 0
            count += 1
    return count


@compiled
def _order(values: Floats) -> Integers:
    """The order of a few values (K,), for which ``np.argsort`` takes several times as long."""
    order = np.arange(len(values))
    for n in range(1, len(values)):
        place = n
        while place and values[order[place - 1]] > values[n]:
            order[place] = order[place - 1]
            place -= 1
        order[place] = n
    return order


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
    corner = (side + 1 if forwards else side) % sides  # a crossing may be at the end of the last
    for _ in range(steps):
        points[size, 0], points[size, 1] = ring[corner, 0], ring[corner, 1]
        size += 1
        if forwards:
            corner = corner + 1 if corner + 1 < sides else 0
        else:
            corner = corner - 1 if corner > 0 else sides - 1
    return size


@compiled
def _closed(points: Floats) -> Floats:
    """The closed ring of all points but the last one, in their place.

    Equal ones that follow each other become one; the last one is room for the first.
    """
    size = 0
    x0, y0 = points[len(points) - 2]
    for point in range(len(points) - 1):
        x, y = points[point, 0], points[point, 1]
        if max(abs(x - x0), abs(y - y0)) > _NEAR:
            points[size, 0], points[size, 1] = x, y
            size += 1
        x0, y0 = x, y
    points[size] = points[0]
    return points[: size + 1]


@compiled
def _twice_area(ring: Floats) -> float:
    """Twice the signed area of a closed ring."""
    twice = 0.0
    for point in range(1, len(ring) - 2):
        x, y = ring[point, 0] - ring[0, 0], ring[point, 1] - ring[0, 1]
        u, v = ring[point + 1, 0] - ring[0, 0], ring[point + 1, 1] - ring[0, 1]
        twice += x * v - u * y
    return twice
