"""What a person drew: what the scripts in groovy/ exported of an image's annotations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Corrections, Polygons
from patchcl_qupath.errors import ImageError

SELECTED = "(selected)"  # what the script exports annotations as that a person has selected
MAX_SHARED = 0.2  # of the smaller of two nuclei that touch; with more, one of them is too many
# No JSON, no FeatureCollection, no geometry.
_DAMAGE = (OSError, ValueError, TypeError, LookupError, AttributeError, shapely.errors.ShapelyError)


def read_regions(
    path: Path, image: str, classes: Sequence[str]
) -> dict[str, list[shapely.Geometry]]:
    """The annotations of some classes, by class: valid polygons and multipolygons, level 0.

    A class is named as QuPath shows it (``Tumor: Positive``). An image need not have all of the
    ``classes``, but one. Raises ImageError.
    """
    export = "run groovy/export_regions.groovy on it in QuPath, then run again"
    try:
        found = _by_class(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ImageError(
            f"{image}: its annotations were not exported ({path} is missing): {export}"
        ) from None
    except _DAMAGE as error:
        raise ImageError(f"{image}: {path} is damaged: {export}") from error
    wanted = {name: found[name] for name in classes if name in found}
    if not wanted:
        known = f"annotations of class {', '.join(sorted(found))}" if found else "none with a class"
        raise ImageError(
            f"{image} has no annotation of class {' or '.join(classes)} (it has {known}): "
            f"draw one, save the image, {export}; or leave the image out with --image"
        )
    return wanted


def read_labels(path: Path, image: str, field_class: str) -> Corrections:
    """The fields of an image, and the nuclei in them, that groovy/export_labels.groovy exported.

    An image that was never exported has none. Raises ImageError for a file that is damaged, and
    for nuclei that lie on each other.
    """
    if not path.exists():
        return Corrections()
    try:
        features = json.loads(path.read_text(encoding="utf-8"))["features"]
        found = [(_class_of(feature), _area_of(feature)) for feature in features]
    except _DAMAGE as error:
        raise ImageError(
            f"{image}: {path} is damaged: run groovy/export_labels.groovy on it in QuPath again"
        ) from error
    areas = [(name, area) for name, area in found if area is not None]
    fields = tuple(area for name, area in areas if name == field_class)
    others = np.array([area for name, area in areas if name != field_class], dtype=object)
    labels = Corrections(fields, tuple(others[~holds_several(others)]))
    check_labels(labels, image)
    return labels


def holds_several(polygons: Polygons) -> NDArray[np.bool_]:
    """Which polygons (N,) hold several others whole, as regions do and nuclei do not: (N,)."""
    holder, _ = shapely.STRtree(polygons).query(polygons, predicate="contains_properly")
    return np.bincount(holder, minlength=len(polygons)) > 1


def check_labels(labels: Corrections, image: str) -> None:
    """Raise ImageError for a field without nuclei, and for nuclei that lie on each other."""
    nuclei = np.array(labels.nuclei, dtype=object)
    tree = shapely.STRtree(nuclei)
    for field in labels.fields:
        if not len(tree.query(field, predicate="intersects")):
            raise ImageError(
                f"{image}: the field {_place(field)} has no nuclei: outline all of them, or delete "
                "the field"
            )
    one, other = tree.query(nuclei, predicate="intersects")
    one, other = one[one < other], other[one < other]
    shared = shapely.area(shapely.intersection(nuclei[one], nuclei[other]))
    smaller = np.minimum(shapely.area(nuclei[one]), shapely.area(nuclei[other]))
    bad = np.flatnonzero(shared > MAX_SHARED * smaller)
    if len(bad):
        place = _place(nuclei[one[bad[0]]])
        raise ImageError(
            f"{image}: two nuclei lie on each other {place} ({len(bad)} such pairs): delete one of "
            "each, save, and run again"
        )


def _place(geometry: shapely.Geometry) -> str:
    x, y = geometry.centroid.coords[0]
    return f"at x {x:.0f}, y {y:.0f} px"


def _class_of(feature: dict[str, Any]) -> str:
    """The name of a class as QuPath shows it, "" without one."""
    classification = feature["properties"].get("classification") or {}
    # "Tumor: Positive" is written by its parts.
    return str(classification.get("name") or ": ".join(classification.get("names", ())))


def _area_of(feature: dict[str, Any]) -> shapely.Geometry | None:
    """The polygon or polygons of a feature, valid; of a cell those of its nucleus."""
    geojson = feature.get("nucleusGeometry") or feature["geometry"]
    polygons = [*_polygons(shapely.make_valid(shapely.from_geojson(json.dumps(geojson))))]
    return shapely.union_all(polygons) if polygons else None


def _by_class(content: dict[str, Any]) -> dict[str, list[shapely.Geometry]]:
    """Areas of a FeatureCollection by QuPath's name of their class."""
    found: dict[str, list[shapely.Geometry]] = {}
    for feature in content["features"]:
        name = _class_of(feature)
        area = _area_of(feature) if name else None
        if area is not None:
            found.setdefault(name, []).append(area)
    return found


def _polygons(geometry: shapely.Geometry) -> Iterator[shapely.Polygon]:
    """The polygons that a geometry consists of; points and lines are left out."""
    if geometry.geom_type == "Polygon" and geometry.area > 0:
        yield geometry
    for part in getattr(geometry, "geoms", ()):
        yield from _polygons(part)
