"""Annotations and stains of an image, as the scripts in groovy/ exported them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.config import CORRECTED, TO_CORRECT
from patchcl_qupath.datatypes import Corrections, Polygons, StainKind, StainVectors
from patchcl_qupath.errors import ImageError
from patchcl_qupath.slides.stains import flaw, without_rounding
from patchcl_qupath.storage.geojson import holds_several, read_areas

_KINDS = {  # by QuPath's image type
    "BRIGHTFIELD_H_E": StainKind.H_E,
    "BRIGHTFIELD_H_DAB": StainKind.H_DAB,
}
SELECTED = "(selected)"  # class under which the selected annotations are exported
MAX_SHARED = 0.2  # fraction of the smaller of two nuclei; with more, one of them is a duplicate


def read_regions(
    path: Path, image: str, classes: Sequence[str]
) -> dict[str, list[shapely.Geometry]]:
    """The annotations of some classes, by class: valid polygons and multipolygons, level 0.

    Classes have QuPath's names (``Tumor: Positive``). Raises ImageError if the image has none of
    the ``classes``, and for a file that is missing or damaged.
    """
    export = "run groovy/export_regions.groovy on it in QuPath, then run again"
    try:
        names, areas = read_areas(path)
    except FileNotFoundError:
        raise ImageError(
            f"{image}: its annotations were not exported ({path} is missing): {export}"
        ) from None
    except Exception as error:  # not JSON, of any other form
        raise ImageError(f"{image}: {path} is damaged: {export}") from error
    found: dict[str, list[shapely.Geometry]] = {}
    for name, area in zip(names.tolist(), areas, strict=True):
        if name and area is not None:
            found.setdefault(name, []).append(area)
    wanted = {name: found[name] for name in classes if name in found}
    if not wanted:
        others = (
            f"annotations of class {', '.join(sorted(found))}" if found else "none with a class"
        )
        raise ImageError(
            f"{image} has no annotation of class {' or '.join(classes)} (it has {others}): "
            f"draw one, save the image, {export}; or leave the image out with --image"
        )
    return wanted


def read_stains(path: Path, image: str) -> StainVectors | None:
    """The stains that groovy/export_regions.groovy exported; None if the image has none.

    Raises ImageError for a file that is damaged, and for vectors that are linearly dependent.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if content is None:
            return None
        stains = StainVectors(
            kind=_KINDS.get(content["type"], StainKind.OTHER),
            names=tuple(str(stain["name"]) for stain in content["stains"]),
            vectors=tuple(_triple(stain["vector"]) for stain in content["stains"]),
            background=_triple(content["background"]),
        )
        problem = flaw(stains)
    except FileNotFoundError:
        return None
    except Exception as error:  # not JSON, of any other form
        raise ImageError(
            f"{image}: {path} is damaged: run groovy/export_regions.groovy on it in QuPath, or "
            "delete the file, then run again"
        ) from error
    if problem:
        raise ImageError(
            f"{image}: {problem}: double-click a stain in QuPath's Image tab and set it anew, or "
            "set the image type again for the default stains; save (without a QuPath here, run "
            "groovy/export_regions.groovy there), and run again"
        )
    return without_rounding(stains)


def _triple(numbers: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = map(float, numbers)
    return red, green, blue


def read_labels(path: Path, image: str, roi_class: str) -> Corrections:
    """The ROIs of an image, and the nuclei in them, that groovy/export_labels.groovy exported.

    None for an image that was never exported. Raises ImageError for a file that is damaged, for a
    ROI without nuclei, and for nuclei that overlap.
    """
    names, areas = _exported(path, image)
    is_roi = names == roi_class
    others = areas[~is_roi & ~np.isin(names, (TO_CORRECT, CORRECTED))]
    nuclei = others[~holds_several(others)]
    labels = Corrections(rois=tuple(areas[is_roi]), nuclei=tuple(nuclei))
    check_labels(labels, image)
    return labels


def read_corrected_rois(path: Path, image: str) -> tuple[shapely.Geometry, ...]:
    """The ROIs of such a file that are marked as corrected. Raises ImageError if it is damaged."""
    names, areas = _exported(path, image)
    return tuple(areas[names == CORRECTED])


def _exported(path: Path, image: str) -> tuple[NDArray[np.str_], Polygons]:
    """Classes (N,) and areas (N,) that groovy/export_labels.groovy exported; empty without file."""
    if not path.exists():
        return np.empty(0, dtype=str), np.empty(0, dtype=object)
    try:
        names, areas = read_areas(path)
    except Exception as error:  # not JSON, of any other form
        raise ImageError(
            f"{image}: {path} is damaged: run groovy/export_labels.groovy on it in QuPath again"
        ) from error
    is_area = ~shapely.is_missing(areas)
    return names[is_area], areas[is_area]


def check_labels(labels: Corrections, image: str) -> None:
    """Raise ImageError for a ROI without nuclei, and for nuclei that overlap."""
    nuclei = np.array(labels.nuclei, dtype=object)
    tree = shapely.STRtree(nuclei)
    for roi in labels.rois:
        if not len(tree.query(roi, predicate="intersects")):
            raise ImageError(
                f"{image}: the ROI {_place(roi)} has no nuclei: outline all of them, or delete "
                "the ROI"
            )
    one, other = tree.query(nuclei, predicate="intersects")
    one, other = one[one < other], other[one < other]
    shared = shapely.area(shapely.intersection(nuclei[one], nuclei[other]))
    smaller = np.minimum(shapely.area(nuclei[one]), shapely.area(nuclei[other]))
    bad = np.flatnonzero(shared > MAX_SHARED * smaller)
    if len(bad):
        place = _place(nuclei[one[bad[0]]])
        raise ImageError(
            f"{image}: two nuclei overlap {place} ({len(bad)} such pairs): delete one of each, "
            "save, and run again"
        )


def _place(geometry: shapely.Geometry) -> str:
    x, y = geometry.centroid.coords[0]
    return f"at x {x:.0f}, y {y:.0f} px"
