"""Which objects in corrected ROIs are outlines of nuclei, and which are something else.

A person puts more into an image than nuclei: vessels, regions, points, notes. Trained on as nuclei
they would spoil the model, so they are left out by kind, and their numbers are reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Polygons
from patchcl_qupath.storage.geojson import Objects

MAX_AREA_UM2 = 2000.0  # of a nucleus: a disc of 50 µm; as in groovy/import_nuclei.groovy
MAX_LENGTH_UM = 75.0  # of a nucleus: longer ones are vessels or fibres
MIN_AREA_UM2 = 2.0  # of a nucleus: what is smaller is a slip of the mouse
MAX_TIMES_MEDIAN = 20.0  # of the areas of an image's outlines; of those above this one:
MAX_COMMON_AREA_UM2 = 600.0
MIN_COMMON = 5  # outlines that make a median
MIN_ROI_UM = 16.0  # a narrower ROI contains no whole nucleus
MIN_PIECE = 0.1  # of the largest piece of an outline
MAX_HELD = 0.25  # of an outline's area: a smaller one within shows that it is a region
MAX_SHARED = 0.2  # fraction of the smaller of two nuclei; with more, one of them is a duplicate
_ROUNDING = 0.01  # of an area that touches another: what both may share
UNKNOWN_PIXEL_UM2 = 0.25 * 0.25  # where nobody knows the size of a pixel

_Bools = NDArray[np.bool_]


class Kind(StrEnum):
    """The kinds of objects that are no nuclei."""

    IGNORED = "ignored"
    REGIONS = "regions"
    POINTS = "points"
    LINES = "lines"
    TILES = "tiles"
    CELLS = "cells_without_nucleus"
    OTHERS = "other_programs"
    SPECKS = "specks"


@dataclass(frozen=True, kw_only=True)
class Outlines:
    """The ``nuclei`` among the objects of an image, as polygons without holes.

    ``ignored`` are areas of a class that QuPath ignores. ``left_out`` are the numbers of objects
    that are no nuclei; of points, that of points. ``unclear`` are those, as (kind, geometry), that
    may be how a person marked nuclei.
    """

    nuclei: tuple[shapely.Polygon, ...]
    ignored: tuple[shapely.Geometry, ...]
    left_out: dict[str, int]
    unclear: tuple[tuple[Kind, shapely.Geometry], ...]


def sort_outlines(objects: Objects, within: shapely.Geometry, pixel_um2: float) -> Outlines:
    """The nuclei among the objects that lie ``within`` corrected ROIs, in part or whole.

    ``pixel_um2`` is the area of a pixel at level 0, in µm². Of detections that the export lists as
    those of other programs, none is a nucleus: a person corrects those of this one.
    """
    # Areas are valid; shapes are as drawn, and GEOS raises for some that cross themselves.
    places = np.where(shapely.is_missing(objects.areas), objects.shapes, objects.areas)
    is_near = shapely.intersects(places, within)
    objects, places = objects.take(is_near), places[is_near]
    kinds = _kinds(objects)
    outlines = objects.take(kinds == "")
    pieces, owner = pieces_of(outlines.areas)
    pieces, classes = shapely.polygons(shapely.get_exterior_ring(pieces)), outlines.classes[owner]
    near = shapely.intersects(pieces, within)
    small = near & (shapely.area(pieces) * pixel_um2 < MIN_AREA_UM2)
    pieces, classes = pieces[near & ~small], classes[near & ~small]
    is_region = _are_regions(pieces, classes, pixel_um2)
    ignored = objects.areas[kinds == Kind.IGNORED]
    is_ignored = ~is_region & mostly_in(pieces, ignored)
    points = shapely.intersection(objects.shapes[kinds == Kind.POINTS], within)
    counts = {kind: int(np.count_nonzero(kinds == kind)) for kind in Kind} | {
        Kind.IGNORED: len(ignored) + int(np.count_nonzero(is_ignored)),
        Kind.REGIONS: int(np.count_nonzero(is_region)),
        Kind.POINTS: int(shapely.get_num_coordinates(points).sum()),
        Kind.SPECKS: int(np.count_nonzero(small)),
    }
    return Outlines(
        nuclei=tuple(pieces[~is_region & ~is_ignored]),
        ignored=tuple(ignored),
        left_out={str(kind): count for kind, count in counts.items()},
        unclear=tuple(
            (kind, shape)
            for kind in (Kind.POINTS, Kind.CELLS, Kind.OTHERS)
            for shape in places[kinds == kind]
        ),
    )


def mostly_in(polygons: Polygons, areas: Polygons) -> _Bools:
    """(N,) of which polygons (N,) more than half lies in some areas (M,)."""
    inside = shapely.area(shapely.intersection(polygons, shapely.union_all(areas)))
    mostly: _Bools = inside > shapely.area(polygons) / 2
    return mostly


def _kinds(objects: Objects) -> NDArray[np.str_]:
    """The kind (N,) of each object, as far as it alone shows it; "" for an outline."""
    listed = objects.more.get("other_programs")
    others = [id_ for id_ in listed if isinstance(id_, str)] if isinstance(listed, list) else []
    is_point = np.isin(shapely.get_type_id(objects.shapes), (0, 4))
    is_tile = objects.kinds == "tile"  # which the export lists, too
    ignored = np.char.endswith(objects.classes, "*") & ~shapely.is_missing(objects.areas)
    found = np.full(len(objects.classes), "", dtype="U32")
    for kind, is_kind in (  # the last that fits counts
        (Kind.CELLS, objects.whole_cells),
        (Kind.TILES, is_tile),
        (Kind.IGNORED, ignored),
        (Kind.OTHERS, np.isin(objects.ids, np.array(others, dtype=str)) & ~is_tile),
        (Kind.LINES, shapely.is_missing(objects.areas) & ~is_point),
        (Kind.POINTS, is_point),
    ):
        found[is_kind] = kind
    return found


def _are_regions(outlines: Polygons, classes: NDArray[np.str_], pixel_um2: float) -> _Bools:
    """(N,) which outlines (N,) are regions: too large for a nucleus, or drawn around several.

    One that holds a single, much smaller outline is a region if it has no class, or another one.
    """
    area = shapely.area(outlines)
    region = _are_large(outlines, pixel_um2)
    outer, inner = shapely.STRtree(outlines).query(outlines, predicate="intersects")
    smaller = area[inner] < area[outer]
    outer, inner = outer[smaller], inner[smaller]
    shared = shapely.area(shapely.intersection(outlines[outer], outlines[inner])) / area[inner]
    for share, count in ((0.5, 2), (MAX_SHARED, 3)):
        region |= np.bincount(outer[shared > share], minlength=len(outlines)) >= count
    around = (shared > 0.5) & (area[inner] < MAX_HELD * area[outer])
    around &= (classes[outer] == "") | (classes[outer] != classes[inner])
    region[outer[around]] = True
    return region


def are_nuclei_in(areas: Polygons, rois: Polygons, others: Polygons, pixel_um2: float) -> _Bools:
    """(N,) which areas (N,) are as small as nuclei, and lie in one of ``rois`` (M,) that is not, in
    part or whole.

    So areas of a class of ROIs are told from ROIs: what a person draws gets the class of what was
    drawn before, where QuPath's "Auto set" is on. One that lies mostly outside is a small ROI if it
    holds a much smaller one of ``others`` (K,), outlines of other classes.
    """
    large = rois[_exceed_nuclei(rois, pixel_um2)]
    if not len(large):
        return np.zeros(len(areas), dtype=bool)
    size = shapely.area(areas)
    inside = shapely.area(shapely.intersection(areas, shapely.union_all(large)))
    inner, outer = shapely.STRtree(areas).query(shapely.centroid(others), predicate="within")
    holds = np.zeros(len(areas), dtype=bool)
    holds[outer[shapely.area(others[inner]) < MAX_HELD * size[outer]]] = True
    reaches = (inside > _ROUNDING * size) & ~holds
    found: _Bools = ~_exceed_nuclei(areas, pixel_um2) & ((inside > size / 2) | reaches)
    return found


def _exceed_nuclei(areas: Polygons, pixel_um2: float) -> _Bools:
    """(N,) which areas (N,) are larger or longer than nuclei are."""
    length = 2 * shapely.minimum_bounding_radius(areas) * pixel_um2**0.5
    exceed = (shapely.area(areas) * pixel_um2 > MAX_AREA_UM2) | (length > MAX_LENGTH_UM)
    return np.asarray(exceed, dtype=bool)


def _are_large(outlines: Polygons, pixel_um2: float) -> _Bools:
    """(N,) which outlines (N,) are larger or longer than nuclei are, or than the others are."""
    area = shapely.area(outlines) * pixel_um2
    large = _exceed_nuclei(outlines, pixel_um2)
    if len(outlines) >= MIN_COMMON:
        usual = np.median(area)
        large |= (area > MAX_COMMON_AREA_UM2) & (area > MAX_TIMES_MEDIAN * usual)
    return np.asarray(large)


def overlapping(nuclei: Polygons) -> Polygons:
    """What two nuclei share, (P,), of each pair that shares more than MAX_SHARED of the smaller."""
    one, other = shapely.STRtree(nuclei).query(nuclei, predicate="intersects")
    one, other = one[one < other], other[one < other]
    shared = shapely.intersection(nuclei[one], nuclei[other])
    smaller = np.minimum(shapely.area(nuclei[one]), shapely.area(nuclei[other]))
    return np.asarray(shared[shapely.area(shared) > MAX_SHARED * smaller], dtype=object)


def pieces_of(areas: Polygons) -> tuple[Polygons, NDArray[np.intp]]:
    """The pieces (M,) of areas (N,), and of which of them each is (M,).

    Two nuclei may be drawn as one object of two pieces; crumbs beside a large piece are slips of
    the brush, and left out.
    """
    pieces, owner = shapely.get_parts(areas, return_index=True)
    size = shapely.area(pieces)
    largest = np.zeros(len(areas))
    np.maximum.at(largest, owner, size)
    keep = size >= MIN_PIECE * largest[owner]
    return np.asarray(pieces[keep], dtype=object), owner[keep]


def rois_of(areas: Polygons, pixel_um2: float) -> tuple[Polygons, NDArray[np.intp]]:
    """The ROIs (M,) that areas (N,) are, one a piece, and of which of them each is (M,).

    Pieces that hold no whole nucleus, beside such that do, are slips of the brush, and left out.
    """
    pieces, owner = shapely.get_parts(areas, return_index=True)
    x0, y0, x1, y1 = shapely.bounds(pieces).T
    is_wide = np.minimum(x1 - x0, y1 - y0) * pixel_um2**0.5 >= MIN_ROI_UM
    has_wide = np.zeros(len(areas), dtype=bool)
    has_wide[owner[is_wide]] = True
    keep = is_wide | ~has_wide[owner]
    return np.asarray(pieces[keep], dtype=object), owner[keep]
