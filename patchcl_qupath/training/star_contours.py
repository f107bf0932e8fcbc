"""Star-convex contours: nuclei that are seen by their rim, not by their darkness.

A pale nucleus with a dark rim, in cytoplasm as dark as itself, is no component of any threshold.
But where its rim ends, hematoxylin falls on all sides. Gradients, which point inwards, vote for
centres (G. Loy, A. Zelinsky, Fast Radial Symmetry for Detecting Points of Interest, PAMI 2003).
Around each centre, dynamic programming finds the closed contour, one radius in each of 32
directions as in StarDist (U. Schmidt et al., Cell Detection with Star-Convex Polygons, MICCAI
2018), along which hematoxylin falls most. Contours and components of the component tree that
overlap compete: the better one by area, convexity and fall is kept.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy import ndimage
from skimage.draw import polygon

from patchcl_qupath.compiled import compiled
from patchcl_qupath.segmentation.contours import solidities

_RAYS = 32
_ANGLES = 2 * np.pi * np.arange(_RAYS) / _RAYS
_SIN, _COS = np.sin(_ANGLES), np.cos(_ANGLES)

_REACH_UM = (2.0, 6.0)  # from the rim to a centre that it votes for
_MIN_SLOPE = 0.15  # of a pixel that votes
_VOTES_SIGMA_UM = 0.7
_CENTRES_APART_UM = 1.0
_MIN_VOTES = 0.4  # of a centre, relative to the 98th percentile of the map of votes

_RADII_UM = (1.5, 9.0)
_STEP_PX = 0.5  # between the radii that are tried
_HALF_EDGE_PX = 1.0  # the fall is that over twice this, along the ray
_BEND = 0.02  # cost of a radius that differs from the last one
_CROSSED = 0.15  # cost of a fall that lies within, relative to it

_QUANTILE = 25  # per cent of the rays may have less than the fall that is asked for
_MIN_FALL = 0.1
_SOLIDITY = (0.85, 0.95)  # at which the score is 0, and full
_MIN_SCORE = 0.05  # of a contour: pieces of strands, open at two ends, have less
_COMPONENT = 2.0  # a component's score, relative to that of an equally good contour
_FREE = 0.8  # of an object's pixels no better one may have taken the rest
_REST_FREE = 0.9  # the same for components without a score
_DISCS = (np.arange(6) + 0.5) / 6  # relative radii at which the inside is sampled

Map = NDArray[np.float32]


class StarContours(NamedTuple):
    """Star-convex contours around centres: (N, 2), radii (N, 32), and the fall on each ray (N, 32).

    Centres, in (row, col), and radii are in px. The fall is relative to the slide's steepest edges.
    """

    centres: NDArray[np.float64]
    radii: NDArray[np.float64]
    fall: NDArray[np.float64]

    def take(self, wanted: NDArray[np.bool_]) -> StarContours:
        """Those that are ``wanted`` (N,)."""
        return StarContours(*(values[wanted] for values in self))

    @property
    def area_px(self) -> NDArray[np.float64]:
        """Areas (N,) in px²."""
        products = self.radii * np.roll(self.radii, 1, axis=1)
        return np.asarray(np.sin(2 * np.pi / _RAYS) / 2 * products.sum(axis=1))

    @property
    def solidity(self) -> NDArray[np.float64]:
        """Areas (N,) relative to those of the convex hulls."""
        rings = shapely.polygons(np.stack([self.radii * _COS, self.radii * _SIN], axis=-1))
        hulls = shapely.area(shapely.convex_hull(rings))
        return np.asarray(self.area_px / np.maximum(hulls, 1e-9))

    def pixels(self, i: int, shape: tuple[int, ...]) -> tuple[NDArray[np.int64], ...]:
        """(rows, cols) of the pixels inside contour ``i``."""
        row, col = self.centres[i]
        rows, cols = row + self.radii[i] * _SIN, col + self.radii[i] * _COS
        return polygon(rows, cols, shape)  # type: ignore[no-any-return, no-untyped-call]

    def sampled(self, values: Map, reach: NDArray[np.float64]) -> NDArray[np.float64]:
        """Values of a map (H, W) on all rays at radii (N, 32): (N, 32)."""
        rows = self.centres[:, :1] + reach * _SIN
        cols = self.centres[:, 1:] + reach * _COS
        return np.asarray(ndimage.map_coordinates(values, [rows, cols], order=1, mode="nearest"))

    def inside(self, values: Map) -> NDArray[np.float64]:
        """Means (N,) of a map (H, W) within the contours."""
        weights = self.radii[None] ** 2 * _DISCS[:, None, None]  # (6, N, 32)
        found = np.stack([self.sampled(values, part * self.radii) for part in _DISCS])
        return np.asarray((found * weights).sum(axis=(0, 2)) / weights.sum(axis=(0, 2)))


def with_star_contours(
    labels: NDArray[np.int32],
    density: Map,
    steep: float,
    min_density: float,
    excluded: NDArray[np.bool_],
    areas_um2: tuple[float, float],
    mpp: float,
) -> NDArray[np.int32]:
    """Components 1..N (H, W), and star-convex contours where these are better: labels 1..M (H, W).

    ``density`` (H, W) is the smoothed hematoxylin, ``steep`` its steepest edges by a Sobel filter.
    Contours have at least ``min_density`` within, ``areas_um2`` are the smallest and the largest;
    less than a fifth of one lies on pixels ``excluded`` (H, W).
    """
    # A Sobel filter is 8 times the slope of a pixel; the fall is over 2 px.
    edges = np.asarray(density * (4 / steep), np.float32)
    contours = star_contours(edges, _centres(density, steep, mpp), mpp)
    area = contours.area_px * mpp**2
    sized = (area >= areas_um2[0]) & (area <= areas_um2[1])
    contours = contours.take(sized)
    contour_scores = _scores(area[sized], contours.solidity, contours.fall)
    good = contour_scores >= _MIN_SCORE
    contours, contour_scores = contours.take(good), contour_scores[good]
    possible = contours.inside(density) >= min_density
    possible &= contours.inside(excluded.astype(np.float32)) < 1 - _FREE
    contour_scores = np.where(possible, contour_scores, 0)
    component_scores = _COMPONENT * _component_scores(labels, edges, mpp)
    return _best(labels, component_scores, contours, contour_scores)


def star_contours(edges: Map, centres: NDArray[np.float64], mpp: float) -> StarContours:
    """The contours around centres (N, 2) along which a map (H, W) falls most."""
    least, most = _RADII_UM
    tried = np.arange(least / mpp, most / mpp, _STEP_PX)
    radii, fall = _steepest_contours(edges, centres, tried, _SIN, _COS)
    return StarContours(centres, radii, fall)


def _centres(density: Map, steep: float, mpp: float) -> NDArray[np.float64]:
    """Where gradients meet: (N, 2) in (row, col)."""
    rows, cols = ndimage.sobel(density, 0), ndimage.sobel(density, 1)
    slope = np.hypot(rows, cols)
    votes = _votes(rows, cols, slope / np.float32(steep), _REACH_UM[0] / mpp, _REACH_UM[1] / mpp)
    votes = ndimage.gaussian_filter(votes, _VOTES_SIGMA_UM / mpp)
    around = ndimage.maximum_filter(votes, size=2 * int(_CENTRES_APART_UM / mpp) + 1)
    chosen = (votes == around) & (votes > _MIN_VOTES * np.percentile(votes, 98))
    return np.argwhere(chosen).astype(np.float64)


@compiled
def _votes(
    rows: Map, cols: Map, slope: Map, least_px: float, most_px: float
) -> NDArray[np.float32]:
    """The votes (H, W) of pixels on slopes for what lies upwards of them, by their gradients."""
    height, width = slope.shape
    votes = np.zeros((height, width), np.float32)
    for row in range(height):
        for col in range(width):
            if slope[row, col] > _MIN_SLOPE:
                length = np.sqrt(rows[row, col] ** 2 + cols[row, col] ** 2)
                weight = np.sqrt(min(slope[row, col], 1.0))
                reach = least_px
                while reach <= most_px:
                    r = round(row + rows[row, col] / length * reach)
                    c = round(col + cols[row, col] / length * reach)
                    if 0 <= r < height and 0 <= c < width:
                        votes[r, c] += weight / reach
                    reach += 1
    return votes


@compiled
def _at(values: Map, row: float, col: float) -> float:
    """A map at a position between pixels, bilinear; beyond the border as at it."""
    row = min(max(row, 0.0), values.shape[0] - 1.001)
    col = min(max(col, 0.0), values.shape[1] - 1.001)
    r, c = int(row), int(col)
    down, right = row - r, col - c
    above = values[r, c] * (1 - right) + values[r, c + 1] * right
    below = values[r + 1, c] * (1 - right) + values[r + 1, c + 1] * right
    value: float = above * (1 - down) + below * down
    return value


@compiled
def _fall(edges: Map, row: float, col: float, sin: float, cos: float, radius: float) -> float:
    """How much a map falls at a radius around a centre."""
    inner, outer = radius - _HALF_EDGE_PX, radius + _HALF_EDGE_PX
    before = _at(edges, row + sin * inner, col + cos * inner)
    fall: float = before - _at(edges, row + sin * outer, col + cos * outer)
    return fall


@compiled
def _steepest_contours(
    edges: Map,
    centres: NDArray[np.float64],
    tried: NDArray[np.float64],
    sin: NDArray[np.float64],
    cos: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The radii (N, K) of the steepest contours around centres (N, 2), and the fall there (N, K).

    By dynamic programming over one and a half turns, of which the middle one is taken: so the
    contour closes. From ray to ray a radius changes by one step at most.
    """
    rays, steps = len(sin), len(tried)
    turns = rays + rays // 2
    radii, falls = np.zeros((len(centres), rays)), np.zeros((len(centres), rays))
    fall, value = np.zeros((rays, steps)), np.zeros((rays, steps))
    total, origin = np.zeros((turns, steps)), np.zeros((turns, steps), np.int64)
    for i in range(len(centres)):
        for ray in range(rays):
            crossed = 0.0
            for k in range(steps):
                fall[ray, k] = _fall(
                    edges, centres[i, 0], centres[i, 1], sin[ray], cos[ray], tried[k]
                )
                if k >= 3:  # farther in than the edge itself is wide
                    crossed = max(crossed, min(fall[ray, k - 3], 1.0))
                value[ray, k] = min(fall[ray, k], 1.0) - _CROSSED * crossed
        total[0] = value[0]
        for turn in range(1, turns):
            for k in range(steps):
                best, origin[turn, k] = total[turn - 1, k], k
                for neighbour in (k - 1, k + 1):
                    if 0 <= neighbour < steps and total[turn - 1, neighbour] - _BEND > best:
                        best, origin[turn, k] = total[turn - 1, neighbour] - _BEND, neighbour
                total[turn, k] = best + value[turn % rays, k]
        k = int(np.argmax(total[turns - 1]))
        for turn in range(turns - 1, -1, -1):
            if rays // 4 <= turn < rays // 4 + rays:
                radii[i, turn % rays] = tried[k]
                falls[i, turn % rays] = fall[turn % rays, k]
            k = origin[turn, k]
    return radii, falls


def _scores(
    area_um2: NDArray[np.float64], solidity: NDArray[np.float64], fall: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Scores (N,) of objects as nuclei, by areas and solidities (N,), and falls (N, K) on rays."""
    convex = np.clip((solidity - _SOLIDITY[0]) / (_SOLIDITY[1] - _SOLIDITY[0]), 0, 1)
    closed = np.clip(np.percentile(fall, _QUANTILE, axis=1) - _MIN_FALL, 0, None)
    return np.asarray(np.sqrt(area_um2) * convex * closed * np.minimum(fall, 1).mean(axis=1))


def _component_scores(labels: NDArray[np.int32], edges: Map, mpp: float) -> NDArray[np.float64]:
    """Scores (N,) of components 1..N (H, W), on the scale of those of contours."""
    count = int(labels.max(initial=0))
    if not count:
        return np.zeros(0)
    centres = np.array(ndimage.center_of_mass(labels > 0, labels, np.arange(1, count + 1)))
    fall = _component_falls(labels, edges, centres, _RADII_UM[1] * 2 / mpp, _SIN, _COS)
    area = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    return _scores(np.asarray(area * mpp**2), solidities(labels), fall)


@compiled
def _component_falls(
    labels: NDArray[np.int32],
    edges: Map,
    centres: NDArray[np.float64],
    most_px: float,
    sin: NDArray[np.float64],
    cos: NDArray[np.float64],
) -> NDArray[np.float64]:
    """The fall (N, K) at the rim of components 1..N (H, W), on rays from their centres (N, 2)."""
    falls = np.zeros((len(centres), len(sin)))
    for i in range(len(centres)):
        row, col = centres[i]
        for ray in range(len(sin)):
            radius, rim = 0.0, 0.5
            while radius <= most_px:
                r, c = round(row + sin[ray] * radius), round(col + cos[ray] * radius)
                if not (0 <= r < labels.shape[0] and 0 <= c < labels.shape[1]):
                    break
                if labels[r, c] == i + 1:
                    rim = radius + 0.5
                radius += _STEP_PX
            best = -np.inf
            for k in range(-1, 3):  # the rim of a threshold need not be the steepest place
                best = max(best, _fall(edges, row, col, sin[ray], cos[ray], rim + k * _STEP_PX))
            falls[i, ray] = best
    return falls


def _best(
    labels: NDArray[np.int32],
    component_scores: NDArray[np.float64],
    contours: StarContours,
    contour_scores: NDArray[np.float64],
) -> NDArray[np.int32]:
    """Labels (H, W) of the best objects, where components (H, W) and contours overlap.

    The best come first, and take the pixels that no better one has, unless too few are left. Then
    components without a score, where nothing overlaps them.
    """
    boxes = ndimage.find_objects(labels)
    taken = np.zeros(labels.shape, np.int32)
    count = 0

    def take(pixels: tuple[NDArray[np.int64], ...], least_free: float) -> None:
        nonlocal count
        free = taken[pixels] == 0
        if len(free) and free.mean() >= least_free:
            count += 1
            taken[tuple(axis[free] for axis in pixels)] = count

    def pixels(i: int) -> tuple[NDArray[np.int64], ...]:
        if i >= len(boxes):
            return contours.pixels(i - len(boxes), taken.shape)
        rows, cols = np.nonzero(labels[boxes[i]] == i + 1)
        return rows + boxes[i][0].start, cols + boxes[i][1].start

    scores = np.concatenate([component_scores, contour_scores])
    for i in np.argsort(-scores, kind="stable"):
        if scores[i] > 0:
            take(pixels(int(i)), _FREE)
    for i in np.flatnonzero(component_scores == 0):
        take(pixels(int(i)), _REST_FREE)
    return taken
