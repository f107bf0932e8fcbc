"""From nuclei to cells: what is near a nucleus belongs to it, up to limits.

A cell is the part of the image that is nearer to its nucleus than to any other, at most
``expand_um`` from it, and within the convex hull of the nucleus, scaled by ``constrain_scale``
about its centroid (as ``CellTools.estimateCellBoundary`` of QuPath).

Cells grow on the pixels of the working grid. Distances are those between the centres of pixels, and
those that a nucleus holds the centre of are its pixels: a cell ends within about half a pixel of
where exact distances between contours would have it end. The border between two cells is one line,
which both have: they do not overlap. Nothing depends on the box that is looked at, as long as all
nuclei nearby are given, and it holds what is near of these.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.compiled import compiled
from patchcl_qupath.config import CellConfig
from patchcl_qupath.datatypes import Box
from patchcl_qupath.segmentation.cell_borders import Distances, Frame, Labels, Limits, contours
from patchcl_qupath.segmentation.fit_cells import from_the_top
from patchcl_qupath.segmentation.rings import (
    NOTHING,
    Floats,
    Integers,
    Rings,
    bounds_of,
    hulls_of,
    taken,
)

_NO_LIMIT = 1.0  # largest ``constrain_scale`` that is none, as in QuPath
_BEYOND = 2**16 - 1  # of a distance that does not matter
_SQUARE = 2**19  # of the largest distance that matters, in whole numbers
# Bits for the column of a nucleus, beside the square of the distance to it. Of isotropic pixels up
# to so many px, both are in 16 bits, which take half the time.
_LONG_BITS, _SHORT_BITS, _SHORT_PX = 10, 5, 15
_BAND = 64  # rows at once, so that what is known of their columns stays in the cache

Number = np.signedinteger[Any]
Keys = NDArray[np.signedinteger[Any]]


def grow(
    nuclei_px: Rings, count: int, box: Box, mpp: tuple[float, float], config: CellConfig
) -> Rings:
    """The cells (count,) of the first ``count`` of nuclei (N,).

    Contours are on the working grid, of ``mpp`` (x, y) µm per px. The nuclei are those that have a
    cell, and all others that are nearer to them than twice ``expand_um`` and 2 px; the box holds
    all that is so near. Of two that are equally near, one has the pixel, whatever the order of the
    nuclei. A nucleus that holds the centre of no pixel has a cell without points.
    """
    order = from_the_top(bounds_of(nuclei_px))
    nuclei = taken(nuclei_px, order)
    frame = _frame(box, mpp, config.expand_um)
    limits = _limits(nuclei, config.constrain_scale)
    labels = _filled(nuclei, frame)
    distances = _grow_to_nearest(labels, frame)
    _limit(labels, distances, limits, frame)
    place = np.append(-1, np.where(order < count, order, -1))
    return contours(labels, distances, place, limits, frame)


def _frame(box: Box, mpp: tuple[float, float], expand_um: float) -> Frame:
    """The frame of a box; a nucleus ends half a px from the centres of its last pixels."""
    reach = expand_um + sum(mpp) / 4
    wide = reach + max(mpp)
    x, y = mpp
    weight = round(_SQUARE * (x / wide) ** 2), round(_SQUARE * (y / wide) ** 2)
    unit = math.gcd(*weight)
    return Frame(
        row0=box.row0 - 1,
        col0=box.col0 - 1,
        rows=box.shape[0] + 2,
        cols=box.shape[1] + 2,
        reach=_BEYOND * reach / wide,
        step=(_BEYOND * x / wide, _BEYOND * y / wide),
        unit=unit,
        weight=(weight[0] // unit, weight[1] // unit),
        wide=(int(wide / x), int(wide / y)),
    )


def _limits(nuclei: Rings, constrain_scale: float) -> Limits:
    """The limits of the cells of nuclei."""
    hulls = hulls_of(nuclei if constrain_scale > _NO_LIMIT else NOTHING)
    return _extents(_scaled_about_centroids(hulls, constrain_scale), hulls.first)


@compiled
def _scaled_about_centroids(hulls: Rings, scale: float) -> Floats:
    """The points (P, 2) of convex rings, scaled about the centroid of each."""
    xy = hulls.xy.copy()
    for k in range(len(hulls.first) - 1):
        begin, end = hulls.first[k], hulls.first[k + 1]
        area, at_x, at_y = 0.0, 0.0, 0.0
        for n in range(begin + 1, end - 2):  # triangles at the first corner
            ax, ay = xy[n, 0] - xy[begin, 0], xy[n, 1] - xy[begin, 1]
            bx, by = xy[n + 1, 0] - xy[begin, 0], xy[n + 1, 1] - xy[begin, 1]
            twice = by * ax - bx * ay
            area, at_x, at_y = area + twice, at_x + twice * (ax + bx), at_y + twice * (ay + by)
        if area == 0:
            continue
        x0, y0 = xy[begin, 0] + at_x / (3 * area), xy[begin, 1] + at_y / (3 * area)
        for n in range(begin, end):
            xy[n, 0], xy[n, 1] = x0 + scale * (xy[n, 0] - x0), y0 + scale * (xy[n, 1] - y0)
    return xy


@compiled
def _extents(xy: Floats, points: Integers) -> Limits:
    """Where the convex rings ``xy[points[k] : points[k + 1]]`` begin and end."""
    count = len(points) - 1
    first, begin = np.zeros((2, count + 1), np.int64), np.zeros((2, count), np.int64)
    end = 0
    for axis in range(2):
        first[axis, 0] = end
        for k in range(count):
            if points[k + 1] > points[k]:
                along = xy[points[k] : points[k + 1], 1 - axis]
                begin[axis, k] = int(np.ceil(along.min() - 0.5))
                end += max(int(np.ceil(along.max() - 0.5)) - begin[axis, k], 0)
            first[axis, k + 1] = end
    ends = np.empty((2, end))
    ends[0], ends[1] = np.inf, -np.inf
    for axis in range(2):
        for k in range(count):
            start = first[axis, k] - begin[axis, k]
            for point in range(points[k], points[k + 1] - 1):
                u0, v0 = xy[point, axis], xy[point, 1 - axis]
                u1, v1 = xy[point + 1, axis], xy[point + 1, 1 - axis]
                if v0 > v1:
                    u0, v0, u1, v1 = u1, v1, u0, v0
                for line in range(int(np.ceil(v0 - 0.5)), int(np.ceil(v1 - 0.5))):
                    u = u0 + (line + 0.5 - v0) / (v1 - v0) * (u1 - u0)
                    ends[0, start + line] = min(ends[0, start + line], u)
                    ends[1, start + line] = max(ends[1, start + line], u)
    return Limits(first, begin, ends)


def _filled(nuclei: Rings, frame: Frame) -> Labels:
    """The nucleus (H, W) that holds the centre of each pixel, k + 1; of several the first.

    None is in the border of the frame. Labels have 16 bits where these can count the nuclei: half
    as much is read and written.
    """
    number = np.int16 if len(nuclei.first) <= np.iinfo(np.int16).max else np.int32
    labels: Labels = np.zeros((frame.rows, frame.cols), number)
    _fill(labels, nuclei, frame)
    return labels


@compiled
def _fill(labels: Labels, nuclei: Rings, frame: Frame) -> None:
    """Fill the pixels (H, W) of nuclei that have no label yet."""
    crossed = np.zeros((64, 64), np.bool_)
    for k in range(len(nuclei.first) - 1):
        xy = nuclei.xy[nuclei.first[k] : nuclei.first[k + 1]]
        if not len(xy):
            continue
        x0 = x1 = xy[0, 0]
        y0 = y1 = xy[0, 1]
        for point in range(1, len(xy)):
            x, y = xy[point, 0], xy[point, 1]
            x0, y0, x1, y1 = min(x0, x), min(y0, y), max(x1, x), max(y1, y)
        top = max(int(np.ceil(y0 - 0.5)) - frame.row0, 1)
        bottom = min(int(np.ceil(y1 - 0.5)) - frame.row0, frame.rows - 1)
        left = max(int(np.ceil(x0 - 0.5)) - frame.col0, 1)
        right = min(int(np.ceil(x1 - 0.5)) - frame.col0, frame.cols - 1)
        if top >= bottom or left >= right:
            continue
        if bottom - top > crossed.shape[0] or right - left >= crossed.shape[1]:
            crossed = np.zeros((bottom - top + 64, right - left + 64), np.bool_)
        for point in range(len(xy) - 1):
            u0, v0, u1, v1 = xy[point, 0], xy[point, 1], xy[point + 1, 0], xy[point + 1, 1]
            if v0 > v1:  # the same result whichever way a ring goes
                u0, v0, u1, v1 = u1, v1, u0, v0
            begin, end = int(np.ceil(v0 - 0.5)) - frame.row0, int(np.ceil(v1 - 0.5)) - frame.row0
            for row in range(max(begin, top), min(end, bottom)):
                x = u0 + (row + frame.row0 + 0.5 - v0) / (v1 - v0) * (u1 - u0)
                col = int(np.ceil(x - 0.5)) - frame.col0
                crossed[row - top, min(max(col, left), right) - left] ^= True
        for row in range(top, bottom):
            inside = False
            here, line = labels[row, left:right], crossed[row - top]
            for col in range(len(here)):
                inside ^= line[col]
                line[col] = False
                here[col] = k + 1 if inside & (here[col] == 0) else here[col]
            line[right - left] = False


def _grow_to_nearest(labels: Labels, frame: Frame) -> Distances:
    """The distance (H, W) of each pixel to the nearest one of a nucleus; grow ``labels`` so far.

    Nucleus k is k + 1 in ``labels`` (H, W); a pixel to which it is the nearest becomes -k - 1.
    """
    if frame.weight == (1, 1) and max(frame.wide) <= _SHORT_PX:
        return _nearest(labels, frame, np.int16, _SHORT_BITS)
    return _nearest(labels, frame, np.int32, _LONG_BITS)


@compiled
def _nearest(labels: Labels, frame: Frame, number: type[Number], bits: int) -> Distances:
    """``_grow_to_nearest`` by keys of type ``number``: squares, and in the last ``bits`` a column.

    In each column the nearest pixel of a nucleus is known; a pixel looks at those of the columns
    beside it (A. Meijster, J. Roerdink, W. Hesselink, A general algorithm for computing distance
    transforms in linear time, 2000; only few columns are near enough here). Of equally near ones
    that of the first column is taken, and in it the upper one.
    """
    side, far = frame.wide[0], frame.wide[1] + 1
    first, last = 1, frame.cols - 1  # without the border
    cols = last - first
    none = number((_SQUARE // frame.unit + 1) << (bits + 1))  # more than the sum of two that matter
    distances = np.full(labels.shape, _BEYOND, np.uint16)
    above, upper = np.full(cols, far, np.int16), np.zeros(cols, labels.dtype)
    below, lower = np.empty((_BAND, cols), np.int16), np.empty((_BAND, cols), labels.dtype)
    keys, which = np.full(cols + 2 * side, none, number), np.zeros(cols + 2 * side, labels.dtype)
    least, nearest = np.empty(cols, number), np.empty(cols, labels.dtype)
    for row in range(1, frame.rows - 1):
        n = (row - 1) % _BAND
        if n == 0:
            _look_ahead(labels, row, far, below, lower)
        here = labels[row, first:last]
        _go_on(here, far, above, upper)
        own = slice(side, side + cols)
        _nearest_in_column(above, below[n], far, frame.weight[1] << bits, none, keys[own])
        _choose(above, below[n], upper, lower[n], which[own])
        least[:] = none
        for apart in range(side + 1):
            left, right = side - apart, side + apart
            square = (frame.weight[0] * apart * apart) << bits
            ones, others = keys[left : left + cols], keys[right : right + cols]
            _keep_least(ones, number(square | left), others, number(square | right), least)
        _find(least, which, (1 << bits) - 1, nearest)
        _take(least, nearest, bits, frame.unit, here, distances[row, first:last])
    return distances


@compiled
def _go_on(labels: Labels, far: int, apart: Keys, which: Labels) -> None:
    """Go on to the next row (W,): how far ``apart`` the last nucleus of each column is; and it."""
    for col in range(len(apart)):
        on, last, label = min(apart[col] + 1, far), which[col], labels[col]
        apart[col] = on if label == 0 else 0
        which[col] = last if label == 0 else label


@compiled
def _look_ahead(labels: Labels, begin: int, far: int, below: Keys, lower: Labels) -> None:
    """How far ``below`` the next nucleus of each column is, for rows from ``begin`` on; and it."""
    rows, cols = below.shape
    apart, which = np.full(cols, far, below.dtype), np.zeros(cols, lower.dtype)
    for n in range(min(rows + far, len(labels) - begin) - 1, -1, -1):
        _go_on(labels[begin + n, 1 : cols + 1], far, apart, which)
        if n < rows:
            below[n], lower[n] = apart, which


@compiled
def _nearest_in_column(
    above: Keys, below: Keys, far: int, weight: int, none: Number, keys: Keys
) -> None:
    """The squares (W,) of the distance to nuclei in the same column, with room for an offset."""
    number = keys.dtype.type
    for col in range(len(keys)):
        rows = number(min(above[col], below[col]))
        square = number(number(rows * rows) * number(weight))
        keys[col] = square if rows < far else none


@compiled
def _choose(above: Keys, below: Keys, upper: Labels, lower: Labels, which: Labels) -> None:
    """The nearest nucleus (W,) in the same column: ``upper`` or ``lower``, by how far these are."""
    for col in range(len(which)):
        one, other = upper[col], lower[col]
        which[col] = one if above[col] <= below[col] else other


@compiled
def _keep_least(ones: Keys, more: Number, others: Keys, more_others: Number, least: Keys) -> None:
    """The ``least`` keys (W,) so far, and of ``ones`` and ``others``, greater by some ``more``."""
    number = least.dtype.type
    for col in range(len(least)):
        one, other = number(ones[col] + more), number(others[col] + more_others)
        key = one if one < other else other
        least[col] = key if key < least[col] else least[col]


@compiled
def _find(keys: Keys, which: Labels, last_bits: int, nearest: Labels) -> None:
    """The nearest nucleus of each pixel of a row (W,), by the least keys."""
    for col in range(len(keys)):
        nearest[col] = which[np.uintp(col + (keys[col] & last_bits))]


@compiled
def _take(
    keys: Keys, nearest: Labels, bits: int, unit: int, labels: Labels, distances: Distances
) -> None:
    """Take the nearest nuclei (W,) where they are near enough, and their distance from the keys."""
    scale = np.float32(_BEYOND / np.sqrt(_SQUARE))
    for col in range(len(keys)):
        square = np.int32(np.int32(keys[col] >> bits) * np.int32(unit))
        is_near = square < _SQUARE
        distances[col] = np.int32(scale * np.sqrt(np.float32(square))) if is_near else _BEYOND
        own, other = labels[col], -nearest[col] if is_near else 0
        labels[col] = own if own > 0 else other


@compiled
def _limit(labels: Labels, distances: Distances, limits: Limits, frame: Frame) -> None:
    """Make pixels of cells of those (H, W) that are nearest to a nucleus, up to the limits."""
    reach = np.uint16(frame.reach)
    if limits.first.shape[1] == 1:
        for row in range(frame.rows):
            for col in range(frame.cols):
                is_cell = distances[row, col] < reach
                labels[row, col] = abs(labels[row, col]) if is_cell else labels[row, col]
        return
    for k in range(limits.begin.shape[1]):
        for n in range(limits.first[0, k], limits.first[0, k + 1]):
            row = limits.begin[0, k] + n - limits.first[0, k] - frame.row0
            if not 0 < row < frame.rows - 1:
                continue
            left = int(np.floor(limits.ends[0, n] - 0.5)) + 1 - frame.col0
            right = int(np.ceil(limits.ends[1, n] - 0.5)) - frame.col0
            here, apart = labels[row], distances[row]
            for col in range(max(left, 1), min(right, frame.cols - 1)):
                at = np.uintp(col)  # not counted from the end: several pixels at once
                is_cell = (here[at] == -k - 1) & (apart[at] < reach)
                here[at] = k + 1 if is_cell else here[at]
