"""From instance labels to nuclei: outlines, one owner each, and measurements.

All nuclei of a tile are handled at once, in flat arrays; there is no loop over nuclei.
"""

from __future__ import annotations

import hashlib
from typing import cast

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.datatypes import (
    Labels,
    Nuclei,
    Polygons,
    StainVectors,
    Tile,
    grid_to_level0,
    tile_to_grid,
)
from patchcl_qupath.stains import H_E, densities, hematoxylin

# Walking clockwise round a region, as seen on the screen, the region is on the right. The four
# ways to walk along a pixel's edge, and for each: where the edge starts (a corner, from the
# pixel's top left one), the pixel across the edge, and the pixel ahead. In (row, col).
_START = np.array([[0, 0], [0, 1], [1, 1], [1, 0]])  # top edge east, right south, bottom west, left
_ACROSS = np.array([[-1, 0], [0, 1], [1, 0], [0, -1]])
_AHEAD = np.array([[0, 1], [1, 0], [0, -1], [-1, 0]])

_SIMPLIFY_PX = 0.2  # an outline may move by this much when points are left out
_BLOCK_PX = 2048  # images are traced in blocks, since that takes up to 50 bytes a pixel


def centroids(labels: NDArray[np.int32], tile: Tile) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pixels (rows, cols), each (N,), of the working grid with the centroids of labels 1..N.

    ``labels`` cover the tile's read box. Whoever asks which tile owns a nucleus, or whether it lies
    on tissue, asks for this pixel: a nucleus has the same pixels in each tile that sees it whole,
    and sums of whole numbers do not round, so no two tiles can disagree.
    """
    rows, cols = np.nonzero(labels)
    label = labels[rows, cols] - 1
    count = np.bincount(label, minlength=int(labels.max(initial=0)))
    row_sum, col_sum = np.zeros_like(count), np.zeros_like(count)
    np.add.at(row_sum, label, rows + tile.read.row0)
    np.add.at(col_sum, label, cols + tile.read.col0)
    return row_sum // count, col_sum // count


def outlines(
    labels: NDArray[np.int32],
    confidence: NDArray[np.float32] | None = None,
    threshold: float = 0.5,
) -> Polygons:
    """Outer outlines of labels 1..N -> (N,) valid polygons, tile-local, without holes.

    The outline crosses each pixel edge between inside and outside, halfway between the two pixels'
    middles; with ``confidence`` (H, W), where it falls to ``threshold`` between them. It is
    smoothed without shrinking, and simplified by at most 0.2 px. Of a label in several pieces the
    largest piece is taken. A label without pixels raises ValueError.
    """
    corner, step, ring, owner = _trace(labels)
    xy = corner + step / 2
    if confidence is not None:
        outwards = np.stack([step[:, 1], -step[:, 0]], axis=1)  # (x, y), one px long
        xy += outwards * _rim(confidence, threshold, xy, outwards)[:, None]
    xy = _smooth(xy, ring)
    polygons = shapely.polygons(shapely.linearrings(xy, indices=ring))
    outer = _largest(shapely.area(polygons), owner, int(labels.max(initial=0)))
    return _tidy(polygons[outer])


def _rim(
    confidence: NDArray[np.float32],
    threshold: float,
    middle: NDArray[np.float64],
    outwards: NDArray[np.int64],
) -> NDArray[np.float64]:
    """How far outwards of the middle of each edge (E, 2) confidence is ``threshold``: (E,) in px.

    In quarters of a px, from -1/2 to 1/2: two tiles may differ by a hair in their confidence. 0
    where the label ends for another reason: at another nucleus, or at the border. Which labels
    other nuclei have must not matter: a tile knows its own alone.
    """
    inner = np.floor(middle - outwards / 2).astype(int)  # (E, 2) pixel (x, y) on this side
    outer = inner + outwards
    size = confidence.shape[::-1]
    exists = ((outer >= 0) & (outer < size)).all(axis=1)
    outer = np.clip(outer, 0, np.array(size) - 1)
    high = confidence[inner[:, 1], inner[:, 0]]
    low = confidence[outer[:, 1], outer[:, 0]]
    falls = exists & (high > threshold) & (low < threshold)
    share = (high - threshold) / np.where(falls, high - low, 1)
    return np.asarray(np.where(falls, np.round(4 * share) / 4 - 0.5, 0.0))


def footprints(labels: Labels) -> Polygons:
    """What each of N labels covers -> (N,) valid polygons or multipolygons, in the labels' order.

    They run along the edges of the pixels, so an area is a number of pixels; holes and separate
    pieces are kept. Labels may be any numbers; 0 is background.
    """
    rings, owners = [np.empty(0, dtype=object)], [np.empty(0, dtype=labels.dtype)]
    for row in range(0, labels.shape[0], _BLOCK_PX):
        for col in range(0, labels.shape[1], _BLOCK_PX):
            block = labels[row : row + _BLOCK_PX, col : col + _BLOCK_PX]
            corner, _, ring, owner = _trace(block)
            corner += np.array([col, row])
            rings.append(shapely.polygons(shapely.linearrings(corner, indices=ring)))
            owners.append(owner)
    owner = np.concatenate(owners)
    order = np.argsort(owner, kind="stable")
    # A ring that touches itself at a corner is not valid; points within straight lines cost time.
    parts = shapely.simplify(shapely.make_valid(np.concatenate(rings)[order]), 0)
    return _even_odd(parts, owner[order])


def _even_odd(parts: Polygons, owner: Labels) -> Polygons:
    """What an odd number of the parts of each owner covers; parts are sorted by their owners.

    That takes holes out, keeps what lies in them, and joins parts that share an edge.
    """
    while True:
        place = np.arange(len(owner)) - np.searchsorted(owner, owner)
        second = np.flatnonzero(place % 2)
        if not len(second):
            return parts
        parts[second - 1] = shapely.symmetric_difference(parts[second - 1], parts[second])
        parts, owner = np.delete(parts, second), np.delete(owner, second)


def _trace(
    labels: Labels,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], Labels]:
    """Walk round all labels, along the edges of their pixels.

    Returns of each edge its first corner (E, 2) and the step to the next one (E, 2), in (x, y),
    and its ring (E,), ascending; of each ring its label (R,). Holes have rings of their own.
    """
    padded = np.pad(labels, 1)
    edge, next_edge = _edges(padded)
    head, place = _rings(next_edge)
    order = np.lexsort((place, head))
    pixel, way = edge[order] // 4, edge[order] % 4
    starts = np.diff(head[order], prepend=-1) != 0
    corner = np.stack(np.divmod(pixel, padded.shape[1]), axis=-1) + _START[way] - 1
    owner = padded.ravel()[pixel[starts]]
    return corner[:, ::-1], _AHEAD[way][:, ::-1], np.cumsum(starts) - 1, owner


def _edges(padded: Labels) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """All edges between a label and what is not it -> (edge (E,), index of the next edge (E,)).

    An edge is ``4 * pixel + way``. After an edge, the walk turns right round the same pixel if the
    pixel ahead is outside, so regions connect by edges, not by corners; else it goes straight on,
    or left where the pixel ahead on the left is inside too.
    """
    width = padded.shape[1]
    flat = padded.ravel()
    across, ahead = _ACROSS @ [width, 1], _AHEAD @ [width, 1]
    inside = np.flatnonzero(flat)
    edge = np.concatenate(
        [4 * inside[flat[inside] != flat[inside + across[way]]] + way for way in range(4)]
    )
    pixel, way = edge // 4, edge % 4
    label = flat[pixel]
    front = pixel + ahead[way]
    front_left = front + across[way]
    right = flat[front] != label
    straight = ~right & (flat[front_left] != label)
    follower = np.where(
        right,
        4 * pixel + (way + 1) % 4,
        np.where(straight, 4 * front + way, 4 * front_left + (way - 1) % 4),
    )
    index = np.empty(4 * len(flat), dtype=np.int32)
    index[edge] = np.arange(len(edge), dtype=np.int32)
    return edge, index[follower]


def _rings(following: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Closed chains -> for each link, its chain (the smallest index in it) and its place in it.

    Strides double each time round (list ranking), so that the longest chain sets the cost only by
    its logarithm.
    """
    n = len(following)
    head, step = np.arange(n), following
    while True:
        smaller = np.minimum(head, head[step])
        if np.array_equal(smaller, head):
            break
        head, step = smaller, step[step]
    # Cut each chain before its head and count the links that are left to the cut.
    last = following == head
    step = np.where(last, np.arange(n), following)
    left = np.where(last, 0, 1)
    while True:
        farther = left + left[step]
        if np.array_equal(farther, left):
            break
        left, step = farther, step[step]
    return head, -left


def _smooth(xy: NDArray[np.float64], ring: NDArray[np.int64]) -> NDArray[np.float64]:
    """Each point of each closed ring averaged with its neighbours, without shrinking the ring.

    ``xy`` (E, 2) are points, ``ring`` (E,), ascending, the ring of each.

    One average of 1 : 2 : 1 pulls a circle inwards; what a second one would pull is given back
    (G. Taubin, A signal processing approach to fair surface design, SIGGRAPH 1995).
    """
    before, after = np.arange(len(xy)) - 1, np.arange(len(xy)) + 1
    first = np.flatnonzero(np.diff(ring, prepend=-1))
    last = np.flatnonzero(np.diff(ring, append=len(ring)))
    before[first], after[last] = last, first
    once = (xy[before] + 2 * xy + xy[after]) / 4
    twice = (once[before] + 2 * once + once[after]) / 4
    return 2 * once - twice


def _largest(area: NDArray[np.float64], owner: Labels, n: int) -> NDArray[np.int64]:
    """Index of the largest ring of each label 1..n."""
    order = np.lexsort((area, owner))
    last = np.searchsorted(owner[order], np.arange(1, n + 1), side="right") - 1
    if n and (len(order) == 0 or not np.array_equal(owner[order][last], np.arange(1, n + 1))):
        raise ValueError("labels must be 1..N without gaps")
    return order[last]


def _tidy(polygons: Polygons) -> Polygons:
    """Fewer points; the largest valid part of the few outlines that touch themselves."""
    simple = shapely.simplify(polygons, _SIMPLIFY_PX, preserve_topology=False)  # 9 x as fast
    whole = shapely.get_type_id(simple) == shapely.GeometryType.POLYGON
    whole &= shapely.is_valid(simple) & (shapely.area(simple) > 0)
    polygons = np.where(whole, simple, polygons)
    for i in np.flatnonzero(~shapely.is_valid(polygons)):  # a handful in a thousand
        parts = shapely.get_parts(shapely.buffer(polygons[i], 0))
        polygons[i] = shapely.Polygon(parts[np.argmax(shapely.area(parts))].exterior)
    return polygons


def measure(
    polygons_um: Polygons,
    labels: NDArray[np.int32],
    rgb: NDArray[np.uint8],
    confidence: NDArray[np.float32],
    stains: StainVectors = H_E,
) -> dict[str, NDArray[np.float32]]:
    """Measurements of labels 1..N under QuPath's own names -> name: (N,) float32.

    ``polygons_um`` (N,) are their outlines in um; ``labels`` (H, W), ``rgb`` (H, W, 3) and
    ``confidence`` (H, W) belong to the same tile. Shapes are defined as in QuPath's
    ``ObjectMeasurements`` (0.3 and later); optical densities are those of ``stains``, at the
    working resolution, over the pixels of the nucleus.
    """
    named = shape_measurements(polygons_um)
    pixels = np.flatnonzero(labels)
    order = np.argsort(labels.ravel()[pixels], kind="stable")
    pixels = pixels[order]
    first = np.flatnonzero(np.diff(labels.ravel()[pixels], prepend=0))
    for name, values in densities(rgb.reshape(-1, 3)[pixels], stains).items():
        for statistic, per_nucleus in _statistics(values, first).items():
            named[f"{name}: {statistic}"] = per_nucleus
    probability = _statistics(confidence.ravel()[pixels], first)["Mean"]
    named["Detection probability"] = probability
    return {name: values.astype(np.float32) for name, values in named.items()}


def mean_hematoxylin(labels: NDArray[np.int32], rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Mean optical density of hematoxylin in labels 1..N (H, W), (N,).

    By QuPath's default vector, whatever stains are measured: what has none is no nucleus.
    """
    pixels = np.flatnonzero(labels)
    label = labels.ravel()[pixels]
    total = np.bincount(label, hematoxylin(rgb.reshape(-1, 3)[pixels]))
    return (total / np.maximum(np.bincount(label), 1))[1:]


def shape_measurements(polygons_um: Polygons) -> dict[str, NDArray[np.float64]]:
    """Size and shape of polygons in um, named and defined as in QuPath."""
    area, length = shapely.area(polygons_um), shapely.length(polygons_um)
    hulls = shapely.convex_hull(polygons_um)
    return {
        "Area µm^2": area,
        "Length µm": length,
        "Circularity": 4 * np.pi * area / length**2,
        "Solidity": area / shapely.area(hulls),
        "Max diameter µm": 2 * shapely.minimum_bounding_radius(hulls),
        "Min diameter µm": _min_width(hulls),
    }


def _min_width(hulls: Polygons) -> NDArray[np.float64]:
    """Least width (N,) of convex polygons: over the edges, that to the point farthest off.

    The same as JTS's ``MinimumDiameter``, which QuPath calls the minimum diameter.
    """
    xy, hull = shapely.get_coordinates(hulls, return_index=True)  # closed: first point = last
    if not len(hull):
        return np.empty(0)
    count = np.bincount(hull)
    place = np.arange(len(xy)) - np.repeat(np.cumsum(count) - count, count)
    points = np.repeat(xy[np.cumsum(count) - 1][:, None], count.max(), axis=1)  # (N, K, 2) padded
    points[hull, place] = xy  # by the closing point, which adds edges of no length
    edge = np.diff(points, axis=1)  # (N, K - 1, 2)
    norm = np.linalg.norm(edge, axis=-1)
    to_point = points[:, None] - points[:, :-1, None]  # (N, K - 1, K, 2)
    cross = edge[:, :, None, 0] * to_point[..., 1] - edge[:, :, None, 1] * to_point[..., 0]
    with np.errstate(divide="ignore", invalid="ignore"):
        width = np.abs(cross).max(axis=-1) / norm
    return cast(NDArray[np.float64], np.where(norm > 0, width, np.inf).min(axis=1))


def _statistics(
    values: NDArray[np.float32], first: NDArray[np.int64]
) -> dict[str, NDArray[np.float64]]:
    """QuPath's statistics of runs of ``values`` that begin at ``first``."""
    if not len(first):
        return {name: np.empty(0) for name in ("Mean", "Std.Dev.", "Min", "Max")}
    count = np.diff(first, append=len(values))
    exact = values.astype(np.float64)
    mean = np.add.reduceat(exact, first) / count
    squares = np.add.reduceat((exact - np.repeat(mean, count)) ** 2, first)
    return {
        "Mean": mean,
        "Std.Dev.": np.sqrt(squares / np.maximum(count - 1, 1)),  # of a sample, as in QuPath
        "Min": np.minimum.reduceat(exact, first),
        "Max": np.maximum.reduceat(exact, first),
    }


def nuclei_of_tile(
    labels: NDArray[np.int32],
    mine: NDArray[np.bool_],
    rgb: NDArray[np.uint8],
    confidence: NDArray[np.float32],
    tile: Tile,
    mpp: tuple[float, float],
    threshold: float = 0.5,
    stains: StainVectors = H_E,
) -> Nuclei:
    """Those of labels 1..N that are ``mine`` (N,), outlined and measured, on the working grid.

    ``labels``, ``rgb`` and ``confidence`` cover the tile's read box; ``mpp`` is (x, y) in um per
    working pixel. Outlines run where confidence is ``threshold``; ``stains`` are measured. The
    order is that of the labels.
    """
    renumbered = np.concatenate([[0], np.where(mine, np.cumsum(mine), 0)]).astype(np.int32)
    labels = renumbered[labels]
    polygons = outlines(labels, confidence, threshold)
    polygons_um = grid_to_level0(polygons, mpp)  # um are pixels of 1 um
    measurements = measure(polygons_um, labels, rgb, confidence, stains)
    return Nuclei(tile_to_grid(polygons, tile), measurements)


def to_level0(nuclei: Nuclei, downsample: tuple[float, float], image_id: str) -> Nuclei:
    """Nuclei of the working grid, at level 0 to 0.01 px, each with its UUID.

    A UUID is made of the image's id and the outline: the same nucleus has it in every run.
    """
    at_level0 = grid_to_level0(nuclei.polygons, downsample)
    polygons = cast(Polygons, shapely.transform(at_level0, lambda xy: np.round(xy, 2)))
    return Nuclei(polygons, nuclei.measurements, _uuids(polygons, image_id))


def _uuids(polygons: Polygons, image_id: str) -> NDArray[np.str_]:
    seed = hashlib.sha256(image_id.encode()).digest()
    return np.array([_uuid(outline, seed) for outline in shapely.to_wkb(polygons)], dtype="U36")


def _uuid(outline: bytes, seed: bytes) -> str:
    """``str(uuid.UUID(bytes=digest, version=5))``, five times as fast."""
    digest = hashlib.blake2b(outline, digest_size=16, key=seed).hexdigest()
    variant = "89ab"[int(digest[16], 16) & 3]
    return f"{digest[:8]}-{digest[8:12]}-5{digest[13:16]}-{variant}{digest[17:20]}-{digest[20:]}"
