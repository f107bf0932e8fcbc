"""From instance labels to nuclei: contours, ownership by tiles, and ids.

All nuclei of a tile are handled at once, in flat arrays; loops are compiled.
"""

from __future__ import annotations

import hashlib
from typing import cast

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.compiled import compiled, take
from patchcl_qupath.datatypes import (
    Labels,
    Nuclei,
    Polygons,
    StainVectors,
    Tile,
    grid_to_level0,
    tile_to_grid,
)
from patchcl_qupath.segmentation.measurements import measure
from patchcl_qupath.segmentation.rings import Rings, areas_of, polygons_of, taken
from patchcl_qupath.slides.stain_vectors import H_E

# A contour is traced clockwise, as seen on the screen: the label is on its right. The four
# directions along a pixel's edge are: east along its top, south along its right, west along its
# bottom and north along its left.
_EAST = np.array([1, 0, -1, 0])
_SOUTH = np.array([0, 1, 0, -1])

_SIMPLIFY_PX = 0.2  # a contour may move by this much when points are left out
_BLOCK_PX = 2048  # images are traced in blocks, since that takes up to 50 bytes a pixel


def centroids(labels: NDArray[np.int32], tile: Tile) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pixels (rows, cols), each (N,), of the working grid with the centroids of labels 1..N.

    ``labels`` cover the tile's read box. This pixel decides which tile owns a nucleus, and whether
    it lies on tissue: a nucleus has the same pixels in each tile that contains it, and sums of
    integers do not round, so no two tiles can disagree.
    """
    count, row_sum, col_sum = _position_sums(labels, int(labels.max(initial=0)))
    count = np.maximum(count, 1)
    return row_sum // count + tile.read.row0, col_sum // count + tile.read.col0


@compiled
def _position_sums(
    labels: NDArray[np.int32], n: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Of labels 1..n, (n,): the number of pixels, and the sums of their rows and columns."""
    sums = np.zeros((3, n + 1), np.int64)
    for row in range(labels.shape[0]):
        for col in range(labels.shape[1]):
            label = labels[row, col]
            if label:
                sums[0, label] += 1
                sums[1, label] += row
                sums[2, label] += col
    return sums[0, 1:], sums[1, 1:], sums[2, 1:]


def trace_contours(
    labels: NDArray[np.int32],
    confidence: NDArray[np.float32] | None = None,
    threshold: float = 0.5,
) -> Polygons:
    """Outer contours of labels 1..N -> (N,) valid polygons, tile-local, without holes.

    The contour crosses each pixel edge between inside and outside, halfway between the centres of
    the two pixels; with ``confidence`` (H, W), where it falls to ``threshold`` between them. It is
    smoothed without shrinking, and simplified by at most 0.2 px. Of a label in several pieces the
    largest piece is taken. A label without pixels raises ValueError.
    """
    corner, step, first, owner = _trace(labels)
    xy = corner + step / 2
    if confidence is not None:
        _to_threshold(xy, step, confidence, np.float32(threshold))
    rings = Rings(_smooth(xy, first), first)
    outer = _largest(areas_of(rings), owner, int(labels.max(initial=0)))
    polygons = polygons_of(_simplified(rings, outer))
    invalid = ~shapely.is_valid(polygons)  # a handful in a thousand
    polygons[invalid] = _tidy(polygons_of(taken(rings, outer[invalid])))
    return polygons


def solidities(labels: NDArray[np.int32]) -> NDArray[np.float64]:
    """The solidity (N,) of labels 1..N (H, W): their area, over that of their convex hull, px."""
    area = np.bincount(labels.ravel())[1:]
    hulls = shapely.convex_hull(trace_contours(labels))
    return np.asarray(area / np.maximum(shapely.area(hulls), 1))


@compiled
def _to_threshold(
    middle: NDArray[np.float64],
    step: NDArray[np.int64],
    confidence: NDArray[np.float32],
    threshold: np.float32,
) -> None:
    """Move the middle of each edge (E, 2) outwards or inwards to where confidence is ``threshold``.

    By up to half a px, in quarters: two tiles may differ in the last bits of their confidence. An
    edge where the label ends for another reason, at another nucleus or at the border, stays where
    it is. The result must not depend on the labels of other nuclei, which differ between tiles.
    """
    rows, cols = confidence.shape
    for edge in range(len(middle)):
        x, y = step[edge, 1], -step[edge, 0]  # outwards, one px long
        col = int(np.floor(middle[edge, 0] - x / 2))  # the pixel on this side
        row = int(np.floor(middle[edge, 1] - y / 2))
        if 0 <= row + y < rows and 0 <= col + x < cols:
            high, low = confidence[row, col], confidence[row + y, col + x]
            if high > threshold and low < threshold:
                fraction = (high - threshold) / (high - low)
                outwards = np.rint(4 * fraction) / 4 - 0.5
                middle[edge, 0] += outwards * x
                middle[edge, 1] += outwards * y


def pixel_polygons(labels: Labels) -> Polygons:
    """Pixel polygons of N labels -> (N,) valid polygons or multipolygons, in the labels' order.

    They follow the edges of the pixels, so an area is a number of pixels; holes and separate pieces
    are kept. Labels may be any integers; 0 is background.
    """
    rings, owners = [np.empty(0, dtype=object)], [np.empty(0, dtype=labels.dtype)]
    for row in range(0, labels.shape[0], _BLOCK_PX):
        for col in range(0, labels.shape[1], _BLOCK_PX):
            block = labels[row : row + _BLOCK_PX, col : col + _BLOCK_PX]
            corner, _, first, owner = _trace(block)
            xy = corner.astype(np.float64) + np.array([col, row])
            rings.append(polygons_of(Rings(xy, first)))
            owners.append(owner)
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    # A ring that touches itself at a corner is not valid; points within straight lines cost time.
    parts = shapely.simplify(shapely.make_valid(np.concatenate(rings)[order]), 0)
    return _even_odd(parts, owner[order])


def _even_odd(parts: Polygons, owner: Labels) -> Polygons:
    """Polygons by the even-odd rule from the parts of each owner; parts are sorted by their owners.

    That removes holes, keeps what lies in them, and joins parts that share an edge.
    """
    while True:
        place = np.arange(len(owner)) - np.searchsorted(owner, owner)
        second = np.flatnonzero(place % 2)
        if not len(second):
            return parts
        parts[second - 1] = shapely.symmetric_difference(parts[second - 1], parts[second])
        parts, owner = np.delete(parts, second), np.delete(owner, second)


@compiled
def _trace(
    labels: Labels,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], Labels]:
    """Trace the borders of all labels along the edges of their pixels.

    Returns of each edge its first corner (E, 2) and the step to the next one (E, 2), in (x, y),
    ring by ring; the first edge (R + 1,) of each ring, E in the end; and its label (R,). Holes
    have rings of their own.
    """
    rows, cols = labels.shape
    width = cols + 2
    flat = np.zeros((rows + 2) * width, labels.dtype)  # with a border: every pixel has neighbours
    for row in range(rows):
        flat[(row + 1) * width + 1 : (row + 1) * width + 1 + cols] = labels[row]
    across = np.array([-width, 1, width, -1])
    ahead = np.array([1, width, -1, -width])
    edges, inside = 0, np.flatnonzero(flat)
    for pixel in inside:
        for way in range(4):
            edges += flat[pixel] != flat[pixel + across[way]]
    corner, step = np.empty((edges, 2), np.int64), np.empty((edges, 2), np.int64)
    first, owner = np.zeros(edges + 1, np.int64), np.empty(edges, labels.dtype)

    traced = np.zeros(len(flat), np.bool_)  # along this pixel's top; every ring has such an edge
    edge = rings = 0
    for start in inside:
        label = flat[start]
        if traced[start] or flat[start + across[0]] == label:
            continue
        pixel, way = start, 0
        x, y = start % width - 1, start // width - 1
        while True:
            if way == 0:
                traced[pixel] = True
            corner[edge, 0], corner[edge, 1] = x, y
            step[edge, 0], step[edge, 1] = _EAST[way], _SOUTH[way]
            x, y, edge = x + _EAST[way], y + _SOUTH[way], edge + 1
            front = pixel + ahead[way]
            front_left = front + across[way]
            # Right where the pixel ahead is outside: pixels connect by edges, not by corners.
            if flat[front] != label:
                way = (way + 1) % 4
            elif flat[front_left] != label:
                pixel = front
            else:
                pixel, way = front_left, (way - 1) % 4
            if pixel == start and way == 0:
                break
        owner[rings] = label
        rings += 1
        first[rings] = edge
    return corner, step, first[: rings + 1], owner[:rings]


@compiled
def _smooth(xy: NDArray[np.float64], first: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each point of each closed ring averaged with its neighbours, without shrinking the ring.

    The rings are the points ``xy[first[i] : first[i + 1]]``.

    One average of 1 : 2 : 1 shrinks a circle; the shrinkage of a second one is added back (G.
    Taubin, A signal processing approach to fair surface design, SIGGRAPH 1995).
    """
    once, twice = np.empty_like(xy), np.empty_like(xy)
    for ring in range(len(first) - 1):
        _average(xy, first[ring], first[ring + 1] - 1, once)
        _average(once, first[ring], first[ring + 1] - 1, twice)
    return 2 * once - twice


@compiled
def _average(xy: NDArray[np.float64], first: int, last: int, averaged: NDArray[np.float64]) -> None:
    """Average points ``first`` to ``last``, a ring, 1 : 2 : 1 with their two neighbours."""
    before = last
    for k in range(first, last + 1):
        after = k + 1 if k < last else first
        for axis in range(2):
            averaged[k, axis] = (xy[before, axis] + 2 * xy[k, axis] + xy[after, axis]) / 4
        before = k


def _largest(area: NDArray[np.float64], owner: Labels, n: int) -> NDArray[np.int64]:
    """Index of the largest ring of each label 1..n."""
    order = np.lexsort((area, owner))
    last = np.searchsorted(owner[order], np.arange(1, n + 1), side="right") - 1
    if n and (len(order) == 0 or not np.array_equal(owner[order][last], np.arange(1, n + 1))):
        raise ValueError("labels must be 1..N without gaps")
    return order[last]


@compiled
def _simplified(rings: Rings, wanted: NDArray[np.int64]) -> Rings:
    """Some of the rings, without points that lie within 0.2 px of the line between others.

    As shapely's ``simplify(polygons, 0.2, preserve_topology=False)`` of GEOS 3.14, in a fifth of
    the time; but a ring that would have fewer than three points stays as it is. (D. Douglas, T.
    Peucker, Algorithms for the reduction of the number of points required to represent a digitized
    line or its caricature, 1973.)
    """
    points, first = np.empty_like(rings.xy), np.zeros(len(wanted) + 1, np.int64)
    for i in range(len(wanted)):
        ring = rings.xy[rings.first[wanted[i]] : rings.first[wanted[i] + 1]]
        kept = np.zeros(len(ring) + 1, np.bool_)
        kept[0] = kept[-1] = True  # the first point, which is also the last
        start = 0
        while start < len(ring):
            end = start + 1
            while not kept[end]:
                end += 1
            far = _farthest(ring, start, end)
            if far:
                kept[far] = True
            else:
                start = end
        corners = ring[kept[:-1]]
        if len(corners) > 3:
            across = np.concatenate((corners[-1:], corners[:2]))
            corners = corners if _farthest(across, 0, 2) else corners[1:]
        corners = corners if len(corners) > 2 else ring
        first[i + 1] = first[i] + len(corners)
        points[first[i] : first[i + 1]] = corners
    return Rings(points[: first[-1]], first)


@compiled
def _farthest(ring: NDArray[np.float64], start: int, end: int) -> int:
    """The point of a ring (K, 2) between two others that is farthest from the line between them.

    0 if that is within 0.2 px; K is point 0 again. Contours are in multiples of 1/64 px, of which
    squares and products are exact.
    """
    (x0, y0), (x1, y1) = ring[start], ring[end % len(ring)]
    x1, y1 = x1 - x0, y1 - y0
    length = x1 * x1 + y1 * y1  # squared; so are distances, times this
    scale = length if length else 1.0
    farthest, most = 0, _SIMPLIFY_PX**2 * scale
    for k in range(start + 1, end):
        x, y = ring[k, 0] - x0, ring[k, 1] - y0
        along = x * x1 + y * y1
        if 0 < along < length:
            distance = (x * y1 - y * x1) ** 2
        else:  # to the nearer end
            if along > 0:
                x, y = x - x1, y - y1
            distance = (x * x + y * y) * scale
        if distance > most:
            farthest, most = k, distance
    return farthest


def _tidy(polygons: Polygons) -> Polygons:
    """Simplified contours of polygons that touch themselves then; of some, the largest part.

    What such a contour surrounds is a hole to GEOS, and is filled.
    """
    simple = shapely.simplify(polygons, _SIMPLIFY_PX, preserve_topology=False)
    whole = shapely.get_type_id(simple) == shapely.GeometryType.POLYGON
    whole &= shapely.is_valid(simple) & (shapely.area(simple) > 0)
    polygons = polygons.copy()
    polygons[whole] = shapely.polygons(shapely.get_exterior_ring(simple[whole]))
    for i in np.flatnonzero(~shapely.is_valid(polygons)):
        parts = shapely.get_parts(shapely.buffer(polygons[i], 0))
        polygons[i] = shapely.Polygon(parts[np.argmax(shapely.area(parts))].exterior)
    return polygons


def nuclei_of_tile(
    labels: NDArray[np.int32],
    owned: NDArray[np.bool_],
    probability: NDArray[np.float64],
    rgb: NDArray[np.uint8],
    confidence: NDArray[np.float32],
    tile: Tile,
    mpp: tuple[float, float],
    threshold: float = 0.5,
    stains: StainVectors = H_E,
) -> Nuclei:
    """Contours and measurements of those of labels 1..N that are ``owned`` (N,), in their order.

    ``probability`` (N,) is that of each label to be a nucleus. Contours are on the working grid,
    where confidence is ``threshold``. ``labels``, ``rgb`` and ``confidence`` cover the tile's read
    box; ``mpp`` is (x, y) in µm per working pixel; ``stains`` are measured.
    """
    renumbered = np.concatenate([[0], np.where(owned, np.cumsum(owned), 0)]).astype(np.int32)
    labels = take(renumbered, labels)
    polygons = trace_contours(labels, confidence, threshold)
    polygons_um = grid_to_level0(polygons, mpp)  # µm are pixels of 1 µm
    measurements = measure(polygons_um, labels, rgb, probability[owned], stains)
    return Nuclei(tile_to_grid(polygons, tile), measurements)


def to_level0(nuclei: Nuclei, downsample: tuple[float, float], image_id: str) -> Nuclei:
    """Nuclei of the working grid, at level 0 to 0.01 px, each with its UUID.

    A UUID is made of the image's id and the contour: the same nucleus has it in every run.
    """
    at_level0 = grid_to_level0(nuclei.polygons, downsample)
    polygons = cast(Polygons, shapely.transform(at_level0, lambda xy: np.round(xy, 2)))
    return Nuclei(polygons, nuclei.measurements, _uuids(polygons, image_id))


def _uuids(polygons: Polygons, image_id: str) -> NDArray[np.str_]:
    seed = hashlib.sha256(image_id.encode()).digest()
    return np.array([_uuid(contour, seed) for contour in shapely.to_wkb(polygons)], dtype="U36")


def _uuid(contour: bytes, seed: bytes) -> str:
    """``str(uuid.UUID(bytes=digest, version=5))``, five times as fast."""
    digest = hashlib.blake2b(contour, digest_size=16, key=seed).hexdigest()
    variant = "89ab"[int(digest[16], 16) & 3]
    return f"{digest[:8]}-{digest[8:12]}-5{digest[13:16]}-{variant}{digest[17:20]}-{digest[20:]}"
