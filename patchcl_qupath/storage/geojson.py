"""Polygons from GeoJSON of QuPath and of other programs."""

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
    """The QuPath classes (N,) of a file's objects, "" without a class; and their areas (N,).

    Areas are valid polygons and multipolygons, for a cell those of its nucleus; None for objects
    without area, such as points and lines. The file, which may be gzipped, holds a feature
    collection, a list of features, one feature, or one geometry. Raises OSError, and any Exception
    for a file of another form.
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
    """Polygons or multipolygons (N,) as valid ones; one without area becomes empty."""
    valid = shapely.make_valid(polygons, method="structure", keep_collapsed=False)
    return np.asarray(valid, dtype=object)


def holds_several(polygons: Polygons) -> NDArray[np.bool_]:
    """(N,) which polygons (N,) contain several others, as regions do and nuclei do not."""
    outer, _ = shapely.STRtree(polygons).query(polygons, predicate="contains_properly")
    return np.bincount(outer, minlength=len(polygons)) > 1


def _class(feature: dict[str, Any]) -> str:
    classification = (feature.get("properties") or {}).get("classification") or {}
    # "Tumor: Positive" is written as a list of two names.
    return str(classification.get("name") or ": ".join(classification.get("names", ())))
