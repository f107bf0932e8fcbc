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
from numpy.typing import NDArray

from patchcl_qupath.compiled import compiled
from patchcl_qupath.config import CellConfig
from patchcl_qupath.datatypes import Box
from patchcl_qupath.segmentation.cell_borders import Borders, largest, outlines, trace
from patchcl_qupath.segmentation.fit_cells import from_the_top
from patchcl_qupath.segmentation.rings import (
    Bools,
    Floats,
    Integers,
    Rings,
    bounds_of,
    hulls_of,
    scaled,
    taken,
)

_NO_LIMIT = 1.0  # largest ``constrain_scale`` that is none, as in QuPath
_BLOCK = 4  # px, each way, that look for their nearest sides together
_AT_ONCE = 4096  # edges of cells, so that what is known of them stays in the cache
_AMPLE = 2.0  # px from where a cell could reach: less matters for where it ends

Labels = NDArray[np.int32]


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
    1 / length²) each, and ``bounds`` (x0, y0, x1, y1). ``planes[:, limit[k] : limit[k + 1]]``
    (normal x, normal y, offset) are the sides of the convex limit of its cell: a point is outside
    by the largest of normal * point - offset.
    """

    sides: Floats
    first: Integers
    bounds: Floats
    planes: Floats
    limit: Integers


class _Spans(NamedTuple):
    """The pixels within the limits of cells (N,), row by row.

    Those of cell k in the row ``top[k] + n`` are the columns ``left[first[k] + n]`` to
    ``right[first[k] + n]`` (exclusive), for each n up to ``first[k + 1] - first[k]``.
    """

    first: Integers
    top: Integers
    left: Integers
    right: Integers


class _Nearest(NamedTuple):
    """The nucleus of each pixel (H, W), k + 1, 0 where none matters; and its distance.

    ``inside`` is the nucleus that holds the pixel, of several the deepest. The distance is NaN
    within nuclei, and where it is less than the reach by some px.
    """

    nucleus: Labels
    inside: Labels
    distance: Floats


def grow(
    nuclei_px: Rings, count: int, box: Box, mpp: tuple[float, float], config: CellConfig
) -> Rings:
    """The cells (count,) of the first ``count`` of nuclei (N,).

    Contours are on the working grid, of ``mpp`` (x, y) µm per px. The box holds the cells; the
    nuclei are those that have one, and all others up to twice ``expand_um`` from them. Where two
    are equally near, the upper one has the pixel, whatever the order of the nuclei.
    """
    order = from_the_top(bounds_of(nuclei_px))
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
    shapes = _shapes(scaled(taken(nuclei_px, order), mpp), config.constrain_scale)
    spans = _spans(shapes, frame)
    nearest = _nearest(shapes, spans, frame)
    labels = _within_limits(nearest, spans, frame)
    wanted = np.zeros(len(order) + 1, np.bool_)
    wanted[rank + 1] = True
    borders = trace(labels, wanted)
    points, ends = _crossings(borders, labels, nearest, shapes, frame)
    rings = outlines(points, borders, ends)
    return taken(largest(rings, borders.owner, len(order)), rank)


def _shapes(nuclei: Rings, constrain_scale: float) -> _Shapes:
    """Nuclei in µm, and the limits of their cells."""
    planes, limit = np.empty((3, 0)), np.zeros(len(nuclei.first), np.int64)
    if constrain_scale > _NO_LIMIT:
        planes, limit = _half_planes(hulls_of(nuclei), constrain_scale)
    sides, first = _sides(nuclei)
    return _Shapes(sides=sides, first=first, bounds=bounds_of(nuclei), planes=planes, limit=limit)


@compiled
def _sides(rings: Rings) -> tuple[Floats, Integers]:
    """The sides (5, S) of rings (N,), as in ``_Shapes``; the first one of each (N + 1,)."""
    first = np.zeros(len(rings.first), np.int64)
    sides = np.empty((5, len(rings.xy)))
    s = 0
    for k in range(len(first) - 1):
        for point in range(rings.first[k], rings.first[k + 1] - 1):
            x, y = rings.xy[point, 0], rings.xy[point, 1]
            dx, dy = rings.xy[point + 1, 0] - x, rings.xy[point + 1, 1] - y
            sides[0, s], sides[1, s], sides[2, s], sides[3, s] = x, y, dx, dy
            sides[4, s] = 1 / max(dx * dx + dy * dy, 1e-24)
            s += 1
        first[k + 1] = s
    return sides[:, :s].copy(), first


@compiled
def _half_planes(hulls: Rings, scale: float) -> tuple[Floats, Integers]:
    """Convex hulls (N,), scaled about their centroids, as ``planes`` and ``limit``."""
    planes, limit = np.empty((3, len(hulls.xy))), np.zeros(len(hulls.first), np.int64)
    end = 0
    for k in range(len(limit) - 1):
        xy = hulls.xy[hulls.first[k] : hulls.first[k + 1]]
        area, at_x, at_y = 0.0, 0.0, 0.0
        for n in range(1, len(xy) - 2):  # triangles at the first corner
            ax, ay = xy[n, 0] - xy[0, 0], xy[n, 1] - xy[0, 1]
            bx, by = xy[n + 1, 0] - xy[0, 0], xy[n + 1, 1] - xy[0, 1]
            twice = by * ax - bx * ay
            area, at_x, at_y = area + twice, at_x + twice * (ax + bx), at_y + twice * (ay + by)
        if area != 0:
            x0, y0 = xy[0, 0] + at_x / (3 * area), xy[0, 1] + at_y / (3 * area)
            for n in range(len(xy) - 1):
                dx, dy = xy[n + 1, 0] - xy[n, 0], xy[n + 1, 1] - xy[n, 1]
                length = np.hypot(dx, dy)
                nx, ny = -dy / length, dx / length  # a hull has what is outside to its left
                x, y = x0 + scale * (xy[n, 0] - x0), y0 + scale * (xy[n, 1] - y0)
                planes[0, end], planes[1, end], planes[2, end] = nx, ny, nx * x + ny * y
                end += 1
        limit[k + 1] = end
    return planes[:, :end].copy(), limit


@compiled
def _spans(shapes: _Shapes, frame: _Frame) -> _Spans:
    """The pixels of a frame within the limits of cells, and within reach of their bounds."""
    count = len(shapes.first) - 1
    first, top = np.zeros(count + 1, np.int64), np.zeros(count, np.int64)
    for k in range(count):
        bounds = shapes.bounds[k]
        rows = 0
        if shapes.first[k + 1] > shapes.first[k]:
            upper = int(np.floor((bounds[1] - frame.reach) / frame.scale_y)) - frame.row0
            lower = int(np.ceil((bounds[3] + frame.reach) / frame.scale_y)) - frame.row0
            top[k] = max(upper, 0)
            rows = max(min(lower, frame.rows) - top[k], 0)
        first[k + 1] = first[k] + rows
    left, right = np.zeros(first[count], np.int64), np.zeros(first[count], np.int64)
    for k in range(count):
        for row in range(first[k + 1] - first[k]):
            y = (top[k] + row + frame.row0 + 0.5) * frame.scale_y
            least, most = shapes.bounds[k, 0] - frame.reach, shapes.bounds[k, 2] + frame.reach
            for side in range(shapes.limit[k], shapes.limit[k + 1]):
                nx = shapes.planes[0, side]
                rest = shapes.planes[2, side] - shapes.planes[1, side] * y
                if nx > 0:
                    most = min(most, rest / nx)
                elif nx < 0:
                    least = max(least, rest / nx)
                elif rest <= 0:
                    most = -np.inf
            if least < most:
                col0 = int(np.floor(least / frame.scale_x - 0.5)) + 1 - frame.col0
                col1 = int(np.ceil(most / frame.scale_x - 0.5)) - frame.col0
                left[first[k] + row] = max(col0, 0)
                right[first[k] + row] = min(col1, frame.cols)
    return _Spans(first, top, left, right)


@compiled
def _least_square(
    sides: Floats, begin: int, end: int, x: float, y: float, squares: Floats
) -> float:
    """The square of the least distance from a point to the sides from ``begin`` to ``end``, in µm².

    ``squares`` (S,) is room for those of all sides: two plain loops take less time than one.
    Comparisons in place of ``min`` and ``max``, which look for NaN, take a third of the time.
    """
    for s in range(begin, end):
        dx, dy = sides[2, s], sides[3, s]
        px, py = x - sides[0, s], y - sides[1, s]
        along = (px * dx + py * dy) * sides[4, s]
        along = along if along > 0.0 else 0.0
        along = along if along < 1.0 else 1.0
        ox, oy = px - along * dx, py - along * dy
        squares[s - begin] = ox * ox + oy * oy
    least = np.inf
    for n in range(end - begin):
        least = squares[n] if squares[n] < least else least
    return least


@compiled
def _depth(shapes: _Shapes, k: int, x: float, y: float) -> float:
    """The least distance from a point in nucleus k to a side of it, in µm."""
    begin, end = shapes.first[k], shapes.first[k + 1]
    depth: float = np.sqrt(_least_square(shapes.sides, begin, end, x, y, np.empty(end - begin)))
    return depth


@compiled
def _innermost(shapes: _Shapes, frame: _Frame) -> Labels:
    """The nucleus (H, W) that holds the centre of each pixel, k + 1; of several the deepest."""
    labels = np.zeros((frame.rows, frame.cols), np.int32)
    crossed = np.zeros((64, 64), np.bool_)
    for k in range(len(shapes.first) - 1):
        x0, y0, x1, y1 = shapes.bounds[k]
        if np.isnan(x0):
            continue
        top = max(int(np.floor(y0 / frame.scale_y - 0.5)) - frame.row0, 0)
        bottom = min(int(np.ceil(y1 / frame.scale_y + 0.5)) - frame.row0, frame.rows)
        left = max(int(np.floor(x0 / frame.scale_x - 0.5)) - frame.col0, 0)
        right = min(int(np.ceil(x1 / frame.scale_x + 0.5)) - frame.col0, frame.cols)
        if top >= bottom or left >= right:
            continue
        if bottom - top > crossed.shape[0] or right - left >= crossed.shape[1]:
            crossed = np.zeros((bottom - top + 64, right - left + 64), np.bool_)
        here = crossed[: bottom - top, : right - left + 1]
        _cross(shapes.sides[:, shapes.first[k] : shapes.first[k + 1]], (top, left), frame, here)
        for row in range(top, bottom):
            inside = False
            for col in range(left, right):
                inside ^= here[row - top, col - left]
                if not inside:
                    continue
                other = labels[row, col] - 1
                if other >= 0:
                    x = (col + frame.col0 + 0.5) * frame.scale_x
                    y = (row + frame.row0 + 0.5) * frame.scale_y
                    if _depth(shapes, k, x, y) <= _depth(shapes, other, x, y):
                        continue
                labels[row, col] = k + 1
        here[:] = False
    return labels


@compiled
def _cross(sides: Floats, corner: tuple[int, int], frame: _Frame, crossed: Bools) -> None:
    """Mark before which pixels (H, W + 1) sides (5, S) cross their row an odd number of times.

    By the pixels' centres; ``corner`` (row, column) is the first of them in the frame.
    """
    top, left = corner
    rows, cols = crossed.shape
    for s in range(sides.shape[1]):
        sx, sy, dx, dy = sides[0, s], sides[1, s], sides[2, s], sides[3, s]
        begin = int(np.floor(min(sy, sy + dy) / frame.scale_y)) - 1 - frame.row0 - top
        end = int(np.floor(max(sy, sy + dy) / frame.scale_y)) + 2 - frame.row0 - top
        for row in range(max(begin, 0), min(end, rows)):
            py = (row + top + frame.row0 + 0.5) * frame.scale_y - sy
            if (py < 0) != (py < dy):
                x = (sx + py / dy * dx) / frame.scale_x - frame.col0 - left
                crossed[row, min(max(int(np.ceil(x - 0.5)), 0), cols - 1)] ^= True


@compiled
def _wanted_blocks(spans: _Spans, inside: Labels, frame: _Frame) -> Bools:
    """The blocks (B,), row by row, with a pixel that may be a cell's, or one beside such.

    But not those that are all ``inside`` (H, W) of nuclei.
    """
    rows, cols = (frame.rows + _BLOCK - 1) // _BLOCK, (frame.cols + _BLOCK - 1) // _BLOCK
    wanted = np.zeros((rows, cols), np.bool_)
    for k in range(len(spans.top)):
        for n in range(spans.first[k + 1] - spans.first[k]):
            left, right = spans.left[spans.first[k] + n], spans.right[spans.first[k] + n]
            if left >= right:
                continue
            row = spans.top[k] + n
            first, last = max(left - 1, 0) // _BLOCK, min(right, frame.cols - 1) // _BLOCK
            for i in range(max(row - 1, 0) // _BLOCK, min(row + 1, frame.rows - 1) // _BLOCK + 1):
                for j in range(first, last + 1):
                    wanted[i, j] = True
    for i in range(frame.rows // _BLOCK):
        for j in range(frame.cols // _BLOCK):
            outside = 0
            for row in range(i * _BLOCK, (i + 1) * _BLOCK):
                for col in range(j * _BLOCK, (j + 1) * _BLOCK):
                    outside += inside[row, col] == 0
            wanted[i, j] &= outside > 0
    return wanted.ravel()


@compiled
def _blocks_near(
    shapes: _Shapes, wanted: Bools, frame: _Frame, wide: float
) -> tuple[Integers, Labels]:
    """Which nuclei are near the ``wanted`` blocks (B,) of a frame, row by row.

    The nuclei ``near[first[b] : first[b + 1]]`` may be nearer than ``wide`` µm to pixels of block
    b: ``first`` and ``near``.
    """
    rows, cols = (frame.rows + _BLOCK - 1) // _BLOCK, (frame.cols + _BLOCK - 1) // _BLOCK
    high, across = _BLOCK * frame.scale_y, _BLOCK * frame.scale_x
    x_of_0 = frame.col0 * frame.scale_x + across / 2
    y_of_0 = frame.row0 * frame.scale_y + high / 2
    radius = _block_radius(frame)
    first = np.zeros(rows * cols + 2, np.int64)
    near = np.empty(0, np.int32)
    for fills in (False, True):
        if fills:
            for block in range(rows * cols):
                first[block + 2] += first[block + 1]
            near = np.empty(first[-1], np.int32)
        for k in range(len(shapes.first) - 1):
            x0, y0, x1, y1 = shapes.bounds[k]
            if np.isnan(x0):
                continue
            top = max(int(np.floor((y0 - wide - radius - y_of_0) / high)), 0)
            bottom = min(int(np.ceil((y1 + wide + radius - y_of_0) / high)) + 1, rows)
            left = max(int(np.floor((x0 - wide - radius - x_of_0) / across)), 0)
            right = min(int(np.ceil((x1 + wide + radius - x_of_0) / across)) + 1, cols)
            for i in range(top, bottom):
                y = y_of_0 + i * high
                beside_y = max(y0 - y, y - y1, 0.0)
                for j in range(left, right):
                    if not wanted[i * cols + j]:
                        continue
                    x = x_of_0 + j * across
                    beside_x = max(x0 - x, x - x1, 0.0)
                    if beside_x**2 + beside_y**2 > (wide + radius) ** 2:
                        continue
                    if fills:
                        near[first[i * cols + j + 1]] = k
                        first[i * cols + j + 1] += 1
                    else:
                        first[i * cols + j + 2] += 1
    return first[:-1], near


@compiled
def _block_radius(frame: _Frame) -> float:
    """How far a pixel's centre is from the centre of its block, at most, in µm."""
    radius: float = (_BLOCK - 1) / 2 * np.hypot(frame.scale_x, frame.scale_y) * (1 + 1e-9)
    return radius


@compiled
def _fewer_near(
    shapes: _Shapes, inside: Labels, frame: _Frame, first: Integers, near: Labels
) -> tuple[Integers, Floats]:
    """How many of the nuclei near each block (B,) may be the nearest one to a pixel of it.

    These come first among its ``near`` then. And the least distance (B,) from the block's centre;
    at least that, if they are one nucleus, with pixels ``inside`` (H, W) in the block.
    """
    bounds, sides, of = shapes.bounds, shapes.sides, shapes.first
    across, twice = (frame.cols + _BLOCK - 1) // _BLOCK, 2 * _block_radius(frame)
    blocks = len(first) - 1
    few, least = np.zeros(blocks, np.int64), np.full(blocks, np.inf)
    room = np.diff(first).max()
    beside, apart, squares = np.empty(room), np.empty(room), np.empty(sides.shape[1])
    for block in range(blocks):
        begin, count = first[block], first[block + 1] - first[block]
        if count == 0:
            continue
        row0, col0 = block // across * _BLOCK, block % across * _BLOCK
        x = (col0 + frame.col0 + _BLOCK / 2) * frame.scale_x
        y = (row0 + frame.row0 + _BLOCK / 2) * frame.scale_y
        held = 0  # by a nucleus, which is no farther from the centre than a pixel of the block
        for row in range(row0, min(row0 + _BLOCK, frame.rows)):
            for col in range(col0, min(col0 + _BLOCK, frame.cols)):
                held = inside[row, col] if inside[row, col] > held else held
        most, may_be = (1.5 * twice) ** 2, 0
        closest = 0
        for n in range(count):
            k = near[begin + n]
            beside_x = bounds[k, 0] - x if bounds[k, 0] > x else x - bounds[k, 2]
            beside_y = bounds[k, 1] - y if bounds[k, 1] > y else y - bounds[k, 3]
            beside_x = beside_x if beside_x > 0.0 else 0.0
            beside_y = beside_y if beside_y > 0.0 else 0.0
            beside[n] = beside_x * beside_x + beside_y * beside_y
            closest = n if beside[n] < beside[closest] else closest
            may_be += beside[n] <= most
        if held and may_be == 1:
            near[begin], few[block], least[block] = held - 1, 1, twice / 2
            continue
        nearest, most = np.inf, np.inf
        for turn in range(count):  # that with the closest bounds first, then the others
            n = closest if turn == 0 else turn - (turn <= closest)
            apart[n] = np.inf
            if beside[n] > most:
                continue
            k = near[begin + n]
            square = _least_square(sides, of[k], of[k + 1], x, y, squares)
            apart[n], nearest = square, square if square < nearest else nearest
            most = (np.sqrt(nearest) + twice) ** 2
        for n in range(count):
            if apart[n] <= most:
                near[begin + few[block]] = near[begin + n]
                few[block] += 1
        least[block] = np.sqrt(nearest)
    return few, least


@compiled
def _sides_near(
    shapes: _Shapes, near: Labels, at: tuple[float, float], most: float, found: Integers
) -> int:
    """The number of sides of the nuclei ``near`` that are up to ``most`` µm from a point.

    They are written to ``found`` (2, S): the side and its nucleus.
    """
    sides, count = shapes.sides, 0
    for n in range(len(near)):
        k = near[n]
        for s in range(shapes.first[k], shapes.first[k + 1]):
            dx, dy = sides[2, s], sides[3, s]
            px, py = at[0] - sides[0, s], at[1] - sides[1, s]
            along = (px * dx + py * dy) * sides[4, s]
            along = along if along > 0.0 else 0.0
            along = along if along < 1.0 else 1.0
            ox, oy = px - along * dx, py - along * dy
            if ox * ox + oy * oy <= most * most:
                found[0, count], found[1, count] = s, k
                count += 1
    return count


@compiled
def _nearest(shapes: _Shapes, spans: _Spans, frame: _Frame) -> _Nearest:
    """The nearest nucleus of each pixel that may be a cell's, and of those beside.

    In each block only those sides are looked at that may be the nearest ones to a pixel of it.
    """
    inside = _innermost(shapes, frame)
    nearest = inside.copy()
    distance = np.full((frame.rows, frame.cols), np.nan)
    # Pixels with their centre up to one px beyond the reach: contours end between two of them.
    px = max(frame.scale_x, frame.scale_y)
    wide, ample = frame.reach + 1.5 * px, frame.reach - _AMPLE * px
    wanted = _wanted_blocks(spans, inside, frame)
    first, near = _blocks_near(shapes, wanted, frame, wide)
    few, least = _fewer_near(shapes, inside, frame, first, near)
    sides, radius = shapes.sides, _block_radius(frame)
    found = np.empty((2, sides.shape[1]), np.int64)
    x, y = np.empty(_BLOCK * _BLOCK), np.empty(_BLOCK * _BLOCK)
    best, who = np.empty(_BLOCK * _BLOCK), np.empty(_BLOCK * _BLOCK, np.int64)
    across = (frame.cols + _BLOCK - 1) // _BLOCK
    for block in range(len(wanted)):
        row0, col0 = block // across * _BLOCK, block % across * _BLOCK
        row1, col1 = min(row0 + _BLOCK, frame.rows), min(col0 + _BLOCK, frame.cols)
        if not few[block]:
            continue
        if few[block] == 1 and least[block] + radius < ample:
            one = near[first[block]]
            for row in range(row0, row1):
                for col in range(col0, col1):
                    if not inside[row, col]:
                        nearest[row, col] = one + 1
            continue
        for p in range(_BLOCK * _BLOCK):
            x[p] = (col0 + p % _BLOCK + frame.col0 + 0.5) * frame.scale_x
            y[p] = (row0 + p // _BLOCK + frame.row0 + 0.5) * frame.scale_y
            best[p], who[p] = np.inf, -1
        at = (x[0] + x[-1]) / 2, (y[0] + y[-1]) / 2
        around = near[first[block] : first[block] + few[block]]
        for c in range(_sides_near(shapes, around, at, least[block] + 2 * radius, found)):
            s, k = found[0, c], found[1, c]
            sx, sy, dx, dy = sides[0, s], sides[1, s], sides[2, s], sides[3, s]
            for p in range(_BLOCK * _BLOCK):
                px, py = x[p] - sx, y[p] - sy
                along = (px * dx + py * dy) * sides[4, s]
                along = along if along > 0.0 else 0.0
                along = along if along < 1.0 else 1.0
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
    return _Nearest(nearest, inside, distance)


@compiled
def _within_limits(nearest: _Nearest, spans: _Spans, frame: _Frame) -> Labels:
    """The cell (H, W) of each pixel: of its nearest nucleus, where that reaches so far."""
    labels = nearest.inside.copy()
    for k in range(len(spans.top)):
        for n in range(spans.first[k + 1] - spans.first[k]):
            row = spans.top[k] + n
            for col in range(spans.left[spans.first[k] + n], spans.right[spans.first[k] + n]):
                if nearest.nucleus[row, col] == k + 1:
                    here = nearest.distance[row, col]
                    if np.isnan(here) or here < frame.reach:
                        labels[row, col] = k + 1
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


class _Ends(NamedTuple):
    """The ends of edges (E,) between a cell's pixel and the one beyond, 0 and 1: (2, E) each.

    ``x`` and ``y`` in µm; whether they are ``held`` by a nucleus. ``own`` (E,) is the cell's
    nucleus, ``other`` (E,) the nearest one to the pixel beyond, -1 where that is the same or none.
    ``distance`` (2, 2, E) is that of both nuclei from both ends, NaN where it does not matter.
    ``in_image`` (E,) are the pixels beyond that are pixels.
    """

    x: Floats
    y: Floats
    held: Bools
    own: Integers
    other: Integers
    distance: Floats
    in_image: Bools


@compiled
def _ends_of(
    pixels: Labels, beyond: Labels, labels: Labels, nearest: _Nearest, frame: _Frame
) -> _Ends:
    """The ends of edges between pixels (E, 2); distances where they are known, else infinite."""
    edges = len(pixels)
    x, y, held = np.empty((2, edges)), np.empty((2, edges)), np.zeros((2, edges), np.bool_)
    own, other = np.empty(edges, np.int64), np.full(edges, -1)
    distance, in_image = np.full((2, 2, edges), np.nan), np.zeros(edges, np.bool_)
    is_ample = frame.reach >= _AMPLE * max(frame.scale_x, frame.scale_y)
    for edge in range(edges):
        row, col = pixels[edge, 0], pixels[edge, 1]
        r, c = beyond[edge, 0], beyond[edge, 1]
        x[0, edge], x[1, edge] = (
            (col + frame.col0 + 0.5) * frame.scale_x,
            (c + frame.col0 + 0.5) * frame.scale_x,
        )
        y[0, edge], y[1, edge] = (
            (row + frame.row0 + 0.5) * frame.scale_y,
            (r + frame.row0 + 0.5) * frame.scale_y,
        )
        k = labels[row, col] - 1
        own[edge], held[0, edge] = k, nearest.inside[row, col] > 0
        distance[0, 0, edge] = nearest.distance[row, col]
        if 0 <= r < frame.rows and 0 <= c < frame.cols:
            in_image[edge], held[1, edge] = True, nearest.inside[r, c] > 0
            j = nearest.nucleus[r, c] - 1
            if j == k:
                distance[0, 1, edge] = nearest.distance[r, c]
            else:
                distance[0, 1, edge] = np.inf
                other[edge] = j
        else:
            distance[0, 1, edge] = np.inf
        if other[edge] >= 0:
            distance[1, 0, edge], distance[1, 1, edge] = np.inf, nearest.distance[r, c]
            for which in range(2):
                if np.isnan(distance[which, which, edge]):
                    distance[which, which, edge] = np.inf
        for end in range(2):
            if held[end, edge] and not is_ample and np.isnan(distance[0, end, edge]):
                distance[0, end, edge] = np.inf
    return _Ends(x, y, held, own, other, distance, in_image)


@compiled
def _fill_distances(ends: _Ends, shapes: _Shapes) -> None:
    """Replace infinite distances of ends, in µm; they are negative within a nucleus."""
    sides, first, distance = shapes.sides, shapes.first, ends.distance
    squares = np.empty(sides.shape[1])
    for which in range(2):
        for end in range(2):
            for edge in range(len(ends.own)):
                if not np.isinf(distance[which, end, edge]):
                    continue
                k = ends.own[edge] if which == 0 else ends.other[edge]
                x, y = ends.x[end, edge], ends.y[end, edge]
                least = _least_square(sides, first[k], first[k + 1], x, y, squares)
                inside = False
                if ends.held[end, edge]:
                    for s in range(first[k], first[k + 1]):  # does a ray to the right cross it?
                        dx, dy, px, py = sides[2, s], sides[3, s], x - sides[0, s], y - sides[1, s]
                        if (py < 0) != (py < dy) and (px * dy < py * dx) == (dy > 0):
                            inside = not inside
                distance[which, end, edge] = -np.sqrt(least) if inside else np.sqrt(least)


@compiled
def _rooms(ends: _Ends, shapes: _Shapes, reach: float) -> Floats:
    """How much farther cells might reach at ends, were they alone, in µm: (2, 2, E).

    Negative outside. Of a cell's own nucleus and the other one, as ``distance`` of ends.
    """
    planes, limit = shapes.planes, shapes.limit
    rooms = np.full(ends.distance.shape, np.inf)
    for which in range(2):
        for edge in range(len(ends.own)):
            k = ends.own[edge] if which == 0 else ends.other[edge]
            if k < 0:
                continue
            x, y, u, v = ends.x[0, edge], ends.y[0, edge], ends.x[1, edge], ends.y[1, edge]
            here, there = np.inf, np.inf
            for side in range(limit[k], limit[k + 1]):
                nx, ny, offset = planes[0, side], planes[1, side], planes[2, side]
                within = offset - (nx * x + ny * y)
                here = within if within < here else here
                within = offset - (nx * u + ny * v)
                there = within if within < there else there
            from_here = reach - ends.distance[which, 0, edge]
            from_there = reach - ends.distance[which, 1, edge]
            # A distance that is NaN leaves more room than the limit.
            rooms[which, 0, edge] = from_here if from_here < here else here
            rooms[which, 1, edge] = from_there if from_there < there else there
    return rooms


@compiled
def _crossings(
    borders: Borders, labels: Labels, nearest: _Nearest, shapes: _Shapes, frame: _Frame
) -> tuple[Floats, Bools]:
    """Where cells end between their pixels and those beyond: points (E, 2) on the working grid.

    And whether the border there is not one line of two cells, since one of them ends before it.
    """
    edges = len(borders.ring)
    points, is_end = np.empty((edges, 2)), np.zeros(edges, np.bool_)
    for begin in range(0, edges, _AT_ONCE):
        pixels = borders.pixels[begin : begin + _AT_ONCE]
        beyond = borders.beyond[begin : begin + _AT_ONCE]
        ends = _ends_of(pixels, beyond, labels, nearest, frame)
        _fill_distances(ends, shapes)
        rooms = _rooms(ends, shapes, frame.reach)
        for n in range(len(pixels)):
            limit, border, beside = 1.0, 1.0, 1.0
            if rooms[0, 1, n] < 0:
                limit = _share(rooms[0, 0, n], -rooms[0, 1, n])
            if not ends.in_image[n]:
                border = 0.5
            elif ends.other[n] >= 0:
                one = ends.distance[1, 0, n] - ends.distance[0, 0, n]
                other = ends.distance[0, 1, n] - ends.distance[1, 1, n]
                if ends.own[n] < ends.other[n]:  # one line, made from the lesser side
                    border = _share(one, other)
                else:
                    border = 1 - _share(other, one)
                if rooms[1, 0, n] < 0:
                    beside = _share(rooms[1, 1, n], -rooms[1, 0, n])
            row, col, r, c = pixels[n, 0], pixels[n, 1], beyond[n, 0], beyond[n, 1]
            share = min(limit, border, 1016 / 1024)
            points[begin + n, 0] = frame.col0 + col + 0.5 + share * (c - col)
            points[begin + n, 1] = frame.row0 + row + 0.5 + share * (r - row)
            if ends.in_image[n] and labels[r, c] > 0:
                is_end[begin + n] = limit < border or beside < 1 - border
    return points, is_end
