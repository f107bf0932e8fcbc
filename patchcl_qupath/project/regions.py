"""Regions that a person drew: what groovy/export_regions.groovy wrote of an image's annotations."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import shapely

from patchcl_qupath.errors import ImageError

SELECTED = "(selected)"  # what the script exports annotations as that a person has selected
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


def _by_class(content: dict[str, Any]) -> dict[str, list[shapely.Geometry]]:
    """Areas of a FeatureCollection by QuPath's name of their class."""
    found: dict[str, list[shapely.Geometry]] = {}
    for feature in content["features"]:
        classification = feature["properties"].get("classification") or {}
        # "Tumor: Positive" is written by its parts.
        name = classification.get("name") or ": ".join(classification.get("names", ()))
        if name:
            geometry = shapely.make_valid(shapely.from_geojson(json.dumps(feature["geometry"])))
            polygons = [*_polygons(geometry)]
            if polygons:
                found.setdefault(name, []).append(shapely.union_all(polygons))
    return found


def _polygons(geometry: shapely.Geometry) -> Iterator[shapely.Polygon]:
    """The polygons that a geometry consists of; points and lines are left out."""
    if geometry.geom_type == "Polygon" and geometry.area > 0:
        yield geometry
    for part in getattr(geometry, "geoms", ()):
        yield from _polygons(part)
