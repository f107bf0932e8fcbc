"""Polygons from GeoJSON of QuPath and of other programs."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.config import class_parts
from patchcl_qupath.datatypes import Polygons
from patchcl_qupath.storage.files import readable

_COLLECTION = 7  # GEOS's number of the type


@dataclass(frozen=True, kw_only=True)
class Objects:
    """The objects of a GeoJSON file as columns, (N,) each.

    ``classes`` are QuPath's, "" without one; ``areas`` valid polygons and multipolygons, for a cell
    those of its nucleus, None without area; ``shapes`` what was drawn, None where it cannot be
    read. ``kinds`` are QuPath's types, such as annotation, detection, cell, tile; ``ids`` and
    ``names`` its ids and names, "" without one. ``whole_cells`` are cells without a nucleus.
    ``missing`` are TMA cores that a person marked so; ``case_ids`` those of cores, "" without one.
    ``more`` is what groovy/export_labels.groovy wrote beside the objects.
    """

    classes: NDArray[np.str_]
    areas: Polygons
    shapes: Polygons
    kinds: NDArray[np.str_]
    ids: NDArray[np.str_]
    names: NDArray[np.str_]
    whole_cells: NDArray[np.bool_]
    missing: NDArray[np.bool_]
    case_ids: NDArray[np.str_]
    more: dict[str, Any] = field(default_factory=dict)

    def take(self, rows: NDArray[np.bool_]) -> Objects:
        """The objects of some rows."""
        return replace(
            self,
            **{
                column.name: getattr(self, column.name)[rows]
                for column in fields(self)
                if column.name != "more"
            },
        )


def read_objects(path: Path) -> Objects:
    """All objects of a file, which may be gzipped.

    It holds features, collections of features, geometries, or lists of them; or QuPath's hierarchy,
    ``{"root": ...}``. Objects that are nested in others are objects, too. Of a collection of
    geometries, the areas of one feature are one object, as in QuPath; the members of a bare one are
    an object each.

    Raises OSError, and any Exception for a file of another form.
    """
    data = path.read_bytes()
    text = gzip.decompress(data) if path.suffix.lower() == ".gz" else data
    content = json.loads(text.decode("utf-8-sig"))
    features = list(_features(content))
    properties = [feature.get("properties") or {} for feature in features]
    nuclei = [bool(feature.get("nucleusGeometry")) for feature in features]
    drawn = [feature.get("nucleusGeometry") or feature["geometry"] for feature in features]
    texts = np.array([json.dumps(geometry) if geometry else None for geometry in drawn], object)
    shapes = shapely.from_geojson(texts)
    areas = made_valid(_polygonal(shapes))
    areas[~(_is_polygonal(areas) & (shapely.area(areas) > 0))] = None
    kinds = _texts(own.get("objectType") or own.get("object_type") for own in properties)
    more = content.get("patchcl") if isinstance(content, dict) else None
    return Objects(
        classes=np.array([_class(feature) for feature in features], dtype=str),
        areas=areas,
        shapes=np.asarray(shapes, dtype=object),
        kinds=kinds,
        ids=_texts(feature.get("id") for feature in features),
        names=_texts(own.get("name") for own in properties),
        whole_cells=(kinds == "cell") & ~np.array(nuclei, dtype=bool),
        missing=np.array([own.get("isMissing") is True for own in properties], dtype=bool),
        case_ids=_texts(_case_id(own.get("metadata")) for own in properties),
        more=more if isinstance(more, dict) else {},
    )


def _case_id(metadata: Any) -> str | None:
    """The case of a TMA core, by the name that QuPath gives it: in 0.4 it was another."""
    named = metadata if isinstance(metadata, dict) else {}
    return named.get("Case ID") or named.get("Unique ID")


def _texts(values: Iterator[Any]) -> NDArray[np.str_]:
    """Values (N,) that are texts; "" for others."""
    return np.array([value if isinstance(value, str) else "" for value in values], dtype=str)


def _features(content: Any) -> Iterator[dict[str, Any]]:
    """Each feature of a GeoJSON document, in its order, those within before the next one.

    Raises any Exception for another document.
    """
    if isinstance(content, list):
        for item in content:
            yield from _features(item)
    elif "root" in content:  # PathObjectHierarchy; the root itself is no object
        yield from _nested(content["root"])
    elif content.get("type") == "Feature":
        if content.get("geometry") or content.get("nucleusGeometry") or not _children(content):
            yield content
        yield from _nested(content)
    elif "features" in content:
        yield from _features(content["features"])
    elif content["type"] == "GeometryCollection":
        yield from _features(content["geometries"])
    else:
        yield {"geometry": content}


def _nested(feature: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The features within a feature."""
    yield from _features(_children(feature))


def _children(feature: dict[str, Any]) -> list[Any]:
    properties = feature.get("properties") or {}
    return properties.get("childObjects") or properties.get("children") or []


def _polygonal(geometries: Polygons) -> Polygons:
    """Geometries (N,); of a collection, its polygons as one, or None if it has none."""
    geometries = geometries.copy()
    for index in np.flatnonzero(shapely.get_type_id(geometries) == _COLLECTION):
        parts = _parts(geometries[index])
        inside = parts[_is_polygonal(parts)]
        geometries[index] = shapely.union_all(made_valid(inside)) if len(inside) else None
    return geometries


def _parts(geometry: shapely.Geometry) -> Polygons:
    """The members of a collection of geometries, and of collections within it."""
    parts = np.array([geometry], dtype=object)
    while np.any(shapely.get_type_id(parts) == _COLLECTION):
        parts = shapely.get_parts(parts)
    return parts


def _is_polygonal(geometries: Polygons) -> NDArray[np.bool_]:
    """(N,) which geometries (N,) are polygons or multipolygons."""
    return np.isin(shapely.get_type_id(geometries), (3, 6))


def to_object(geometry: shapely.Geometry) -> dict[str, Any]:
    """A geometry as an object of GeoJSON, as records have it."""
    plain: dict[str, Any] = json.loads(shapely.to_geojson(geometry))
    return plain


def from_object(plain: dict[str, Any]) -> shapely.Geometry:
    """The inverse of ``to_object``."""
    return shapely.from_geojson(json.dumps(plain))


def made_valid(polygons: Polygons) -> Polygons:
    """Polygons or multipolygons (N,) as valid ones; one without area becomes empty."""
    valid = shapely.make_valid(polygons, method="structure", keep_collapsed=False)
    return np.asarray(valid, dtype=object)


def holds_several(polygons: Polygons) -> NDArray[np.bool_]:
    """(N,) which polygons (N,) contain several others, as regions do and nuclei do not."""
    outer, _ = shapely.STRtree(polygons).query(polygons, predicate="contains_properly")
    return np.bincount(outer, minlength=len(polygons)) > 1


def class_name(text: str) -> str:
    """A class as QuPath writes its name, ``Tumor: Positive``, however a person wrote it."""
    return ": ".join(_class_names(readable(text)))


def run_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Classes of the regions of a run: in any order, and however they are written, one run."""
    return tuple(sorted({*map(class_name, names)}))


def _class(feature: dict[str, Any]) -> str:
    """The class of a feature, by QuPath's name, such as ``Tumor: Positive``; "" without one."""
    return ": ".join(_class_names((feature.get("properties") or {}).get("classification")))


def _class_names(classification: Any) -> list[str]:
    """The names that make a class, the outermost first.

    QuPath reads a text; a name; a list of names; and, of versions before 0.4, a name within the
    class ``parentClass``.
    """
    names: list[Any]
    if not isinstance(classification, dict):
        names = [classification] if isinstance(classification, str) else []
    elif classification.get("parentClass"):
        parent, name = classification["parentClass"], str(classification["name"])
        return [*_class_names(parent), readable(name)]
    else:
        names = [classification.get("name")] if classification.get("name") else []
        names = names or classification.get("names") or []
    return [part for name in names for part in class_parts(readable(str(name)))]
