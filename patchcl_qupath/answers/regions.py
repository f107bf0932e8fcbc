"""The annotations and TMA cores of an image that nuclei are counted in.

A nucleus lies in all regions that hold the centroid of its contour, their boundary included, and
belongs to the smallest of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.datatypes import DrawnRegion, Polygons, place_text

Centroids = NDArray[np.float64]  # (N, 2): x and y, level 0
_PARTLY = 0.001  # of the smaller area: two regions that share less touch, or share a border


@dataclass(frozen=True)
class Regions:
    """The regions that were drawn in an image, in their order."""

    drawn: Sequence[DrawnRegion] = ()

    @cached_property
    def geometries(self) -> Polygons:
        """(N,) at level 0."""
        geometries = np.empty(len(self.drawn), dtype=object)
        geometries[:] = [region.geometry for region in self.drawn]
        return geometries

    @cached_property
    def is_core(self) -> NDArray[np.bool_]:
        """(N,) which are TMA cores; the others are annotations."""
        return np.array([region.is_core for region in self.drawn], dtype=bool)

    def __len__(self) -> int:
        return len(self.drawn)

    def label(self, i: int) -> str:
        """What people call a region: its name, else its class and place."""
        region = self.drawn[i]
        kind = "core" if region.is_core else region.class_name or "annotation"
        return region.name or f"{kind} {place_text(*region.geometry.centroid.coords[0])}"

    def pairs(self, centroids: Centroids) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """The pairs (P,), (P,) of a region and a centroid that lies in it."""
        if not len(self) or not len(centroids):
            none = np.empty(0, dtype=np.intp)
            return none, none
        shapely.prepare(self.geometries)  # once: it is kept with them
        points = shapely.points(centroids)
        region, point = shapely.STRtree(points).query(self.geometries, predicate="intersects")
        return region, point

    def smallest(
        self, region: NDArray[np.intp], point: NDArray[np.intp], count: int
    ) -> NDArray[np.intp]:
        """The smallest region (count,) of each point in pairs; -1 for a point in none."""
        parent = np.full(count, -1, dtype=np.intp)
        from_large_to_small = np.argsort(-self._areas[region], kind="stable")
        parent[point[from_large_to_small]] = region[from_large_to_small]  # the last one stays
        return parent

    @cached_property
    def _areas(self) -> NDArray[np.float64]:
        return np.asarray(shapely.area(self.geometries), np.float64)

    def shares_in(self, area: shapely.Geometry) -> NDArray[np.float64]:
        """The share (N,) of each region that lies in an area: 1 up to rounding is 1, 0 is none."""
        inside = shapely.area(shapely.intersection(self.geometries, area))
        shares = inside / np.maximum(self._areas, 1e-12)
        return np.where(shares > 1 - _PARTLY, 1.0, shares)

    def partly_overlapping(self) -> list[tuple[int, int]]:
        """The pairs of regions of which each has a part of its own and a part in common.

        Two annotations, or two cores; an annotation may well reach from core to core.
        """
        one, other = shapely.STRtree(self.geometries).query(self.geometries, "intersects")
        first = one < other
        one, other = one[first], other[first]
        shared = shapely.area(shapely.intersection(self.geometries[one], self.geometries[other]))
        smaller = np.minimum(self._areas[one], self._areas[other])
        partly = (shared > _PARTLY * smaller) & (shared < (1 - _PARTLY) * smaller)
        partly &= self.is_core[one] == self.is_core[other]
        return list(zip(one[partly].tolist(), other[partly].tolist(), strict=True))
