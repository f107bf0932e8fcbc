"""Areas out of GeoJSON, as QuPath and other programs write it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Polygons


def read_areas(path: Path) -> tuple[NDArray[np.str_], Polygons]:
    """The classes (N,) of a file's objects as QuPath shows them, "" without one; and their areas.

    Areas (N,) are valid polygons and multipolygons, of a cell that of its nucleus; None where there
    is none, as of points and lines. A file, which may be gzipped, holds features in a collection, a
    list or alone; or a geometry. Raises OSError, and any Exception for a file of another form.
    """
    data = path.read_bytes()
    content = json.loads(gzip.decompress(data) if path.suffix.lower() == ".gz" else data)
    items = content.get("features", [content]) if isinstance(content, dict) else content
    features = [item if item["type"] == "Feature" else {"geometry": item} for item in items]
    drawn = [feature.get("nucleusGeometry") or feature["geometry"] for feature in features]
    texts = np.array([json.dumps(geometry) if geometry else None for geometry in drawn], object)
    areas = made_valid(shapely.from_geojson(texts))
    is_area = np.isin(shapely.get_type_id(areas), (3, 6))  # polygon, multipolygon
    areas[~(is_area & (shapely.area(areas) > 0))] = None
    return np.array([_class(feature) for feature in features], dtype=str), areas


def made_valid(polygons: Polygons) -> Polygons:
    """Polygons or multipolygons (N,) as valid ones; what has no area becomes empty."""
    valid = shapely.make_valid(polygons, method="structure", keep_collapsed=False)
    return np.asarray(valid, dtype=object)


def holds_several(polygons: Polygons) -> NDArray[np.bool_]:
    """Which polygons (N,) hold several others whole, as regions do and nuclei do not: (N,)."""
    holder, _ = shapely.STRtree(polygons).query(polygons, predicate="contains_properly")
    return np.bincount(holder, minlength=len(polygons)) > 1


def _class(feature: dict[str, Any]) -> str:
    classification = (feature.get("properties") or {}).get("classification") or {}
    # "Tumor: Positive" is written by its parts.
    return str(classification.get("name") or ": ".join(classification.get("names", ())))
