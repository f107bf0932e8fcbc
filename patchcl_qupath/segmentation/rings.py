"""Contours as flat arrays, for compiled loops: no object for each of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.compiled import compiled
from patchcl_qupath.datatypes import Polygons

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Rings(NamedTuple):
    """Closed rings (N,): points ``xy[first[k] : first[k + 1]]`` (P, 2), the first again as last.

    Those that are being traced (``contours``) leave that last one out.
    """

    xy: Floats
    first: Integers


NOTHING = Rings(np.empty((0, 2)), np.zeros(1, np.int64))


def rings_of(polygons: Polygons) -> Rings:
    """The rings of polygons (N,) without holes."""
    xy, of = shapely.get_coordinates(polygons, return_index=True)
    return Rings(xy, np.searchsorted(of, np.arange(len(polygons) + 1)))


def polygons_of(rings: Rings) -> Polygons:
    """The polygons (N,) of rings; empty where a ring has no points."""
    sizes = np.diff(rings.first)
    polygons = np.full(len(sizes), shapely.Polygon(), dtype=object)
    numbers = np.repeat(np.cumsum(sizes > 0) - 1, sizes)
    polygons[sizes > 0] = shapely.polygons(shapely.linearrings(rings.xy, indices=numbers))
    return polygons


@compiled
def scaled(rings: Rings, factor: tuple[float, float]) -> Rings:
    """Rings whose coordinates (x, y) are multiplied by a factor, from frame to frame."""
    xy = np.empty_like(rings.xy)
    for point in range(len(xy)):
        xy[point, 0] = factor[0] * rings.xy[point, 0]
        xy[point, 1] = factor[1] * rings.xy[point, 1]
    return Rings(xy, rings.first)


def joined(parts: list[Rings]) -> Rings:
    """All rings of some parts."""
    sizes = np.concatenate([np.diff(part.first) for part in parts])
    return Rings(
        np.concatenate([part.xy for part in parts]), np.concatenate([[0], np.cumsum(sizes)])
    )


@compiled
def taken(rings: Rings, wanted: Integers) -> Rings:
    """Some of the rings, in the order of ``wanted`` (M,)."""
    first = np.zeros(len(wanted) + 1, np.int64)
    for n in range(len(wanted)):
        first[n + 1] = first[n] + rings.first[wanted[n] + 1] - rings.first[wanted[n]]
    xy = np.empty((first[-1], 2))
    for n in range(len(wanted)):
        begin = rings.first[wanted[n]]
        for point in range(first[n + 1] - first[n]):
            xy[first[n] + point, 0] = rings.xy[begin + point, 0]
            xy[first[n] + point, 1] = rings.xy[begin + point, 1]
    return Rings(xy, first)


@compiled
def bounds_of(rings: Rings) -> Floats:
    """The bounds (x0, y0, x1, y1) of rings: (N, 4); NaN of one without points."""
    bounds = np.full((len(rings.first) - 1, 4), np.nan)
    for k in range(len(bounds)):
        begin, end = rings.first[k], rings.first[k + 1]
        if begin == end:
            continue
        x0, y0 = rings.xy[begin]
        x1, y1 = x0, y0
        for point in range(begin + 1, end):
            x, y = rings.xy[point, 0], rings.xy[point, 1]
            x0, y0, x1, y1 = min(x0, x), min(y0, y), max(x1, x), max(y1, y)
        bounds[k, 0], bounds[k, 1], bounds[k, 2], bounds[k, 3] = x0, y0, x1, y1
    return bounds


@compiled
def hulls_of(rings: Rings) -> Rings:
    """The convex hulls of rings, each from its least y, along its least x, as GEOS has them.

    Corners are found in the order of A. Andrew, Another efficient algorithm for convex hulls in two
    dimensions, 1979.
    """
    xy, first = np.empty((len(rings.xy) + 2 * len(rings.first), 2)), np.zeros_like(rings.first)
    for k in range(len(first) - 1):
        points = rings.xy[rings.first[k] : max(rings.first[k + 1] - 1, rings.first[k])]
        end = first[k]
        if len(points):
            least, most = _extremes(points)
            end = _append_chain(points, least, most, 1.0, xy, end)
            end = _append_chain(points, most, least, -1.0, xy, end) + 1
        first[k + 1] = end
    return Rings(xy[: first[-1]].copy(), first)


@compiled
def _extremes(points: Floats) -> tuple[int, int]:
    """The first and the last of points (S, 2) by y, then x."""
    least = most = 0
    for n in range(1, len(points)):
        x, y = points[n, 0], points[n, 1]
        if y < points[least, 1] or (y == points[least, 1] and x < points[least, 0]):
            least = n
        if y > points[most, 1] or (y == points[most, 1] and x > points[most, 0]):
            most = n
    return least, most


@compiled
def _append_chain(
    points: Floats, start: int, stop: int, sign: float, xy: Floats, begin: int
) -> int:
    """Write the corners of a hull from one of its points to another to ``xy``, from ``begin`` on.

    Returns the place of the last one. The points (S, 2) of a ring are passed in the order of their
    y, then x, times ``sign``. Only those beyond the line from ``start`` to ``stop`` can be corners:
    contours that go around clockwise, as seen on the screen, have these nearly in order.
    """
    x0, y0, x1, y1 = points[start, 0], points[start, 1], points[stop, 0], points[stop, 1]
    xy[begin, 0], xy[begin, 1] = x0, y0
    end, at = begin + 1, start
    for _ in range(1, len(points)):
        at = (at if at else len(points)) - 1
        x, y = points[at, 0], points[at, 1]
        xy[end, 0], xy[end, 1] = x, y
        end += (x - x0) * (y1 - y0) - (y - y0) * (x1 - x0) < 0
    for n in range(begin + 2, end):
        x, y, place = xy[n, 0], xy[n, 1], n
        while place > begin + 1:
            u, v = xy[place - 1, 0], xy[place - 1, 1]
            if sign * y > sign * v or (y == v and sign * x >= sign * u):
                break
            xy[place, 0], xy[place, 1] = u, v
            place -= 1
        xy[place, 0], xy[place, 1] = x, y
    xy[end, 0], xy[end, 1] = x1, y1
    top = begin
    for n in range(begin + 1, end + 1):
        x, y = xy[n, 0], xy[n, 1]
        while top > begin:
            u, v = xy[top - 1, 0], xy[top - 1, 1]
            if (xy[top, 0] - u) * (y - v) - (xy[top, 1] - v) * (x - u) < 0:
                break
            top -= 1
        top += 1
        xy[top, 0], xy[top, 1] = x, y
    return top


@compiled
def areas_of(rings: Rings) -> Floats:
    """The areas (N,) of rings, whether their first point comes again or not."""
    areas = np.zeros(len(rings.first) - 1)
    for k in range(len(areas)):
        begin, end = rings.first[k], rings.first[k + 1]
        twice = 0.0
        for point in range(begin + 1, end):
            after = point + 1 if point + 1 < end else begin
            up = rings.xy[point - 1, 1] - rings.xy[after, 1]
            twice += (rings.xy[point, 0] - rings.xy[begin, 0]) * up
        areas[k] = abs(twice / 2)
    return areas


@compiled
def lengths_of(rings: Rings) -> Floats:
    """The lengths (N,) of rings."""
    lengths = np.zeros(len(rings.first) - 1)
    for k in range(len(lengths)):
        for point in range(rings.first[k], rings.first[k + 1] - 1):
            dx = rings.xy[point + 1, 0] - rings.xy[point, 0]
            dy = rings.xy[point + 1, 1] - rings.xy[point, 1]
            lengths[k] += np.sqrt(dx * dx + dy * dy)
    return lengths
