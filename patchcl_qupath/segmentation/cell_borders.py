"""The contours of cells: along the edges of their pixels, in few points."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.compiled import compiled
from patchcl_qupath.segmentation.rings import Bools, Floats, Integers, Rings, areas_of, taken

_SIMPLIFY_PX = 0.2  # a contour may move by this much when points are left out, as of nuclei


class Borders(NamedTuple):
    """The borders of labels (H, W) along the edges of their pixels, ring by ring.

    Of each edge (E,) the ``pixel``, row by row, and the ``way`` around it: 0 east along its top, 1
    south along its right, 2 west along its bottom, 3 north along its left. Whether three borders
    meet at its beginning or end (``fixed``), and whether the border is simplified from its other
    end: that of two labels in one direction for both (``backwards``). Ring k has the edges from
    ``first[k]`` to ``first[k + 1]``; its ``owner`` (R,) is the label less 1.
    """

    pixel: NDArray[np.int32]
    way: NDArray[np.int8]
    fixed: Bools
    backwards: Bools
    first: Integers
    owner: Integers


@compiled
def trace(labels: NDArray[np.int32], wanted: Bools) -> Borders:
    """Trace the borders of the ``wanted`` (N + 1,) of labels (H, W).

    Those below 1 are no label. The first and last row and column hold none.
    """
    width, flat = labels.shape[1], labels.ravel()
    across = np.array([-width, 1, width, -1])
    ahead = np.array([1, width, -1, -width])
    corner = np.array([1, width + 1, width, 0])  # at the end of an edge, as a pixel's upper left
    edges = 0
    for pixel in range(width, len(flat)):
        edges += flat[pixel] != flat[pixel - 1]
        edges += flat[pixel] != flat[pixel - width]
    edges *= 2  # those of two labels are edges of both; there are no more than that
    pixels, ways = np.empty(edges, np.int32), np.empty(edges, np.int8)
    fixed, backwards = np.empty(edges, np.bool_), np.empty(edges, np.bool_)
    first, owner = np.zeros(edges + 1, np.int64), np.empty(edges, np.int64)
    traced = np.zeros(len(flat), np.bool_)  # along the pixel's top; every ring has such an edge
    edge = rings = 0
    for start in range(width, len(flat) - width):
        label = flat[start]
        if label <= 0 or flat[start - width] == label or traced[start] or not wanted[label]:
            continue
        pixel, way = start, 0
        junction = _is_junction(flat, pixel, width)
        while True:
            if way == 0:
                traced[pixel] = True
            other = flat[pixel + across[way]]  # to the left of where the edge leads
            pixels[edge], ways[edge] = pixel, way
            backwards[edge] = 0 < other < label
            was = junction
            junction = _is_junction(flat, pixel + corner[way], width)
            fixed[edge] = was or junction
            edge += 1
            front = pixel + ahead[way]
            front_left = front + across[way]
            if flat[front] != label:
                way = (way + 1) % 4
            elif flat[front_left] == label:
                pixel, way = front_left, (way - 1) % 4
            else:
                pixel = front
            if pixel == start and way == 0:
                break
        owner[rings] = label - 1
        rings += 1
        first[rings] = edge
    return Borders(
        pixels[:edge],
        ways[:edge],
        fixed[:edge],
        backwards[:edge],
        first[: rings + 1].copy(),
        owner[:rings].copy(),
    )


@compiled
def _is_junction(flat: NDArray[np.int32], pixel: int, width: int) -> bool:
    """Whether more than two borders meet at the upper left corner of a pixel."""
    here, left = max(flat[pixel], 0), max(flat[pixel - 1], 0)
    above, beside = max(flat[pixel - width], 0), max(flat[pixel - width - 1], 0)
    borders = int(here != left) + int(left != beside) + int(beside != above) + int(above != here)
    return borders > 2


def outlines(points: Floats, borders: Borders, ends: Bools) -> Rings:
    """The contours (R,) of rings of ``points`` (E, 2), one for each edge, in fewer points.

    Two cells leave out the same points of the border between them: ``ends`` (E,) are those where it
    is not one line.
    """
    fixed = borders.fixed | _beside(ends, borders.first)
    return _simplified(points, borders, fixed, _SIMPLIFY_PX)


@compiled
def _beside(marked: Bools, first: Integers) -> Bools:
    """Which edges (E,) of closed rings are ``marked``, or beside one that is."""
    beside = marked.copy()
    for ring in range(len(first) - 1):
        before = first[ring + 1] - 1
        for edge in range(first[ring], first[ring + 1]):
            beside[edge] |= marked[before]
            beside[before] |= marked[edge]
            before = edge
    return beside


@compiled
def _simplified(points: Floats, borders: Borders, fixed: Bools, tolerance: float) -> Rings:
    """Closed rings without points that are nearer than ``tolerance`` to lines between others.

    Lines end at ``fixed`` points; in a ring without any, at its first point and at the one that is
    farthest from that (D. Douglas, T. Peucker, 1973). One of fewer than three points stays.
    """
    rings, end = len(borders.owner), 0
    first, xy = np.zeros(rings + 1, np.int64), np.empty((len(points) + rings, 2))
    for k in range(rings):
        begin, size = borders.first[k], borders.first[k + 1] - borders.first[k]
        closed, keep = np.empty((size + 1, 2)), np.zeros(size + 1, np.bool_)
        start = 0
        while start < size and not fixed[begin + start]:
            start += 1
        turn = start % size
        for n in range(size + 1):  # from the first fixed point
            at = begin + (turn + n) % size
            closed[n, 0], closed[n, 1], keep[n] = points[at, 0], points[at, 1], fixed[at]
        if start == size:
            farthest, most = 0, 0.0
            for n in range(size):
                dx, dy = closed[n, 0] - closed[0, 0], closed[n, 1] - closed[0, 1]
                if dx * dx + dy * dy > most:
                    farthest, most = n, dx * dx + dy * dy
            keep[0] = keep[size] = keep[farthest] = True
        _reduce(closed, keep, borders.backwards[begin : begin + size], turn, tolerance)
        keep = keep if keep[:size].sum() > 2 else np.ones_like(keep)
        for n in range(size + 1):
            # A ring begins where it was traced first, if that point stays.
            at = (n - turn) % size if n < size else -1
            if at >= 0 and keep[at]:
                xy[end, 0], xy[end, 1] = closed[at, 0], closed[at, 1]
                end += 1
        xy[end] = xy[first[k]]
        end += 1
        first[k + 1] = end
    return Rings(xy[:end].copy(), first)


@compiled
def _reduce(closed: Floats, keep: Bools, backwards: Bools, turn: int, tolerance: float) -> None:
    """Mark the points of a closed ring, between those that are marked, that stay.

    ``backwards`` are those of the ring before it was turned.
    """
    size = len(backwards)
    line, stack = np.empty((size + 1, 2)), np.empty((size + 1, 2), np.int64)
    begin = 0
    for end in range(1, size + 1):
        if not keep[end]:
            continue
        length = end - begin
        middle = begin + 1 if length > 1 else begin
        is_backwards = backwards[(turn + middle) % size]
        for n in range(length + 1):
            at = end - n if is_backwards else begin + n
            line[n, 0], line[n, 1] = closed[at, 0], closed[at, 1]
        depth = 0
        stack[0, 0], stack[0, 1] = 0, length
        while depth >= 0:
            a, b = stack[depth]
            depth -= 1
            ax, ay = line[a, 0], line[a, 1]
            dx, dy = line[b, 0] - ax, line[b, 1] - ay
            square = dx * dx + dy * dy
            farthest, most = -1, tolerance * tolerance
            for n in range(a + 1, b):
                px, py = line[n, 0] - ax, line[n, 1] - ay
                along = min(max((px * dx + py * dy) / square, 0.0), 1.0) if square > 0 else 0.0
                off = (px - along * dx) ** 2 + (py - along * dy) ** 2
                if off > most:
                    farthest, most = n, off
            if farthest >= 0:
                keep[end - farthest if is_backwards else begin + farthest] = True
                stack[depth + 1, 0], stack[depth + 1, 1] = a, farthest
                stack[depth + 2, 0], stack[depth + 2, 1] = farthest, b
                depth += 2
        begin = end
    keep[0] = keep[size] = keep[0] or keep[size]


def largest(rings: Rings, owner: Integers, count: int) -> Rings:
    """The largest ring (count,) of each owner; without points for one that has none."""
    order = np.lexsort((areas_of(rings), owner))
    place = np.full(count, -1)
    place[owner[order]] = order  # of several, the last
    nothing = np.append(rings.first, rings.first[-1])
    return taken(Rings(rings.xy, nothing), np.where(place < 0, len(owner), place))
