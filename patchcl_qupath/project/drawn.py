"""Annotations, stains and pixel size of an image, as the scripts in groovy/ exported them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.config import CORRECTED, TMA_CORES, TO_CORRECT
from patchcl_qupath.datatypes import (
    Corrections,
    DrawnRegion,
    Polygons,
    StainKind,
    StainVectors,
    place_text,
)
from patchcl_qupath.errors import ImageError
from patchcl_qupath.project.outlines import (
    UNKNOWN_PIXEL_UM2,
    Kind,
    Outlines,
    are_nuclei_in,
    overlapping,
    rois_of,
    sort_outlines,
)
from patchcl_qupath.project.qpproj import as_count
from patchcl_qupath.slides.stain_vectors import H_DAB, H_E, flaw, without_rounding
from patchcl_qupath.storage.files import read_json
from patchcl_qupath.storage.geojson import Objects, class_name, read_objects

_EXPORT = "run export_regions.groovy on it in QuPath, then run again"
_PIXEL_SIZE = "pixel_size_um"
_CORE = "tmaCore"  # QuPath's name of the type
_KINDS = {  # by QuPath's image type
    "BRIGHTFIELD_H_E": StainKind.H_E,
    "BRIGHTFIELD_H_DAB": StainKind.H_DAB,
}
# Stain vectors in data.qpdata: after the name of their class, and before all objects.
_SAVED_STAINS = re.compile(rb'ColorDeconvolutionStains.{,99}?(\{"Name" : .*?"\})', re.DOTALL)
_HEAD_BYTES = 2**20
SELECTED = "(selected)"  # class under which the selected annotations are exported
OUR_REGION = "PatchCL"  # the name of annotations of no class that hold imported nuclei
_UNCLEAR = {  # how a person may have marked nuclei, without outlines
    Kind.POINTS: "points",
    Kind.CELLS: "cells without a nucleus",
    Kind.OTHERS: "detections of other programs",
}


def read_regions(
    path: Path, image: str, classes: Sequence[str]
) -> dict[str, list[shapely.Geometry]]:
    """The annotations of some classes, by class: valid polygons and multipolygons, level 0.

    Classes have QuPath's names (``Tumor: Positive``). Raises ImageError if the image has none of
    the ``classes``, and for a file that is missing or damaged.
    """
    drawn = read_drawn(path, image)
    wanted = of_classes(drawn, classes)
    if not wanted and TMA_CORES in classes:
        raise ImageError(
            f"{image} has no TMA grid with a core that is not missing: make one in QuPath (TMA > "
            f"TMA dearrayer), save the image, {_EXPORT}; or leave the image out with --image"
        )
    if not wanted:
        found = {region.class_name for region in drawn if not region.is_core} - {""}
        raise ImageError(
            f"{image} has no annotation of class {' or '.join(classes)} (it has "
            f"{classes_text(found)}): draw one, save the image, {_EXPORT}; or leave the image out "
            "with --image"
        )
    return {name: [region.geometry for region in regions] for name, regions in wanted.items()}


def classes_text(found: Collection[str]) -> str:
    """What a person reads of the classes of annotations that an image has."""
    return f"annotations of class {', '.join(sorted(found))}" if found else "none with a class"


def read_drawn(path: Path, image: str) -> list[DrawnRegion]:
    """All annotations that were exported of an image, and the cores of its TMA grid.

    Cores that a person marked as missing are left out; so are objects without an area. Raises
    ImageError for a file that is missing or damaged.
    """
    try:
        objects = read_objects(path)
    except FileNotFoundError:
        raise ImageError(
            f"{image}: its annotations were not exported ({path} is missing): {_EXPORT}"
        ) from None
    except Exception as error:  # not JSON, of any other form
        raise ImageError(f"{image}: {path} {_flaw(error)}: {_EXPORT}") from error
    found = objects.take(~shapely.is_missing(objects.areas) & ~objects.missing)
    columns = (found.areas, found.ids, found.names, found.classes, found.kinds, found.case_ids)
    return [
        DrawnRegion(
            geometry=area,
            id=str(id_),
            name=str(name),
            class_name=str(its_class),
            is_core=bool(kind == _CORE),
            case_id=str(case),
        )
        for area, id_, name, its_class, kind, case in zip(*columns, strict=True)
    ]


def of_classes(
    drawn: Sequence[DrawnRegion], classes: Sequence[str]
) -> dict[str, list[DrawnRegion]]:
    """The annotations of some classes, by class in the order of ``classes``; without empty ones."""
    found = {
        name: [region for region in drawn if _class_of(region) == class_name(name)]
        for name in classes
    }
    return {name: regions for name, regions in found.items() if regions}


def counted_class(own: str, *, is_core: bool) -> str:
    """The class by which an annotation is chosen; a core, which may have any, by TMA_CORES."""
    return TMA_CORES if is_core else own


def _class_of(region: DrawnRegion) -> str:
    return counted_class(region.class_name, is_core=region.is_core)


def read_stains(path: Path, image: str) -> StainVectors | None:
    """The stains that groovy/export_regions.groovy exported; None if the image has none.

    Raises ImageError for a file that is damaged, and for vectors that are linearly dependent.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if content is None or set(content) == {_PIXEL_SIZE}:
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
            f"{image}: {path} {_flaw(error)}: run export_regions.groovy on it in QuPath, or "
            "delete the file, then run again"
        ) from error
    if problem:
        raise ImageError(
            f"{image}: {problem}: double-click a stain in QuPath's Image tab and set it anew, or "
            "set the image type again for the default stains; save (without a QuPath here, run "
            "export_regions.groovy there), and run again"
        )
    return without_rounding(stains)


def read_pixel_size(path: Path) -> tuple[float, float] | None:
    """The pixel size (x, y) in µm that QuPath showed when stains were exported to a file.

    None where the file has none: without an export, or where an earlier version made it.
    """
    return _sides((read_json(path) or {}).get(_PIXEL_SIZE))


def has_own_stains(data: Path) -> bool:
    """Whether a person changed the stain vectors in ``data.qpdata``; False where that is unknown.

    QuPath writes them as text, near the beginning. Its default ones come with an image type.
    """
    try:
        with data.open("rb") as file:
            found = _SAVED_STAINS.search(file.read(_HEAD_BYTES))
        if found is None:
            return False
        saved = json.loads(found[1].decode("utf-8", "replace"))
        stains = StainVectors(
            kind=StainKind.OTHER,
            names=(saved["Stain 1"], saved["Stain 2"]),
            vectors=(_triple(saved["Values 1"].split()), _triple(saved["Values 2"].split())),
            background=_triple(saved["Background"].split()),
        )
    except (OSError, ValueError, KeyError):
        return False
    return "Stain 3" in saved or without_rounding(stains) not in (H_E, H_DAB)


def _triple(numbers: Sequence[float | str]) -> tuple[float, float, float]:
    red, green, blue = map(float, numbers)
    return red, green, blue


@dataclass(frozen=True, kw_only=True)
class ExportedLabels:
    """The objects of an image that groovy/export_labels.groovy exported; none without its file."""

    image: str
    objects: Objects | None

    @classmethod
    def read(cls, path: Path, image: str) -> ExportedLabels:
        """From a file, which may be missing. Raises ImageError if it is damaged."""
        try:
            objects = read_objects(path) if path.exists() else None
        except Exception as error:  # not JSON, of any other form
            raise ImageError(
                f"{image}: {path} {_flaw(error)}: run export_labels.groovy on it in QuPath again"
            ) from error
        return cls(image=image, objects=objects)

    def may_be_of(self, roi_class: str) -> bool:
        """Whether they were exported for ROIs of a class, as far as they say it.

        Of other classes they have what meets these ROIs, and no more.
        """
        exported_for = self.objects.more.get("roi_class") if self.objects else None
        return not isinstance(exported_for, str) or class_name(exported_for) == class_name(
            roi_class
        )

    def count(self, roi_class: str) -> int:
        """How many annotations of a class were exported."""
        if self.objects is None:
            return 0
        is_of_class = self.objects.classes == class_name(roi_class)
        return int(np.count_nonzero(is_of_class & (self.objects.kinds == "annotation")))

    def corrections(
        self,
        roi_class: str,
        mpp: tuple[float, float] | None = None,
        fallback_mpp: float | None = None,
    ) -> Corrections:
        """The ROIs of a class, and the nuclei in them.

        ``mpp`` is the pixel size (x, y) at level 0; None if only QuPath has it, or nobody: then it
        is ``fallback_mpp``. Raises ImageError for all that cannot be meant so: ROIs in which
        nothing was outlined, and nuclei that overlap.
        """
        objects = self.objects
        if objects is None:
            return Corrections()
        pixel_um2 = _pixel_um2(objects, mpp, fallback_mpp)
        is_nucleus = nuclei_of_roi_class(objects, (roi_class,), pixel_um2)
        is_roi = _are_annotations(objects) & (objects.classes == class_name(roi_class))
        is_roi &= ~is_nucleus
        marked = objects.take(is_roi & ~shapely.is_missing(objects.areas))
        rois, owner = rois_of(marked.areas, pixel_um2)
        if not len(rois):
            return Corrections()
        others = objects.take(~is_roi & (is_nucleus | ~are_ours(objects)))
        found = sort_outlines(others, shapely.union_all(rois), pixel_um2)
        without = _without_nuclei(rois, marked.ids[owner], found, objects)
        notes = [text for text, _ in without]
        if count := int(np.count_nonzero(is_nucleus)):
            words = "outlines in its ROIs that have a class of ROIs, taken as nuclei"
            notes.append(f"{words}: {count:,}")
        problems = _overlaps(rois, found) + [text for text, is_problem in without if is_problem]
        if problems:
            raise ImageError("\n".join(f"{self.image}: {problem}" for problem in problems))
        return Corrections(
            rois=tuple(rois),
            nuclei=found.nuclei,
            ignored=found.ignored,
            left_out=found.left_out,
            notes=tuple(notes),
            ids=tuple(map(str, marked.ids[owner])),
        )

    @property
    def corrected_rois(self) -> tuple[shapely.Geometry, ...]:
        """The ROIs that are marked as corrected."""
        if self.objects is None:
            return ()
        areas, pixel_um2 = self.objects.areas, _pixel_um2(self.objects)
        marked = (self.objects.classes == CORRECTED) & ~shapely.is_missing(areas)
        marked &= _are_annotations(self.objects)
        marked &= ~nuclei_of_roi_class(self.objects, (CORRECTED,), pixel_um2)
        rois, _ = rois_of(areas[marked], pixel_um2)
        return tuple(rois)


def are_ours(objects: Objects) -> NDArray[np.bool_]:
    """(N,) which objects are what this program puts into an image beside nuclei: the annotation
    that holds them, and ROIs to correct."""
    ours: NDArray[np.bool_] = np.isin(objects.classes, (TO_CORRECT, CORRECTED))
    ours |= (objects.names == OUR_REGION) & (objects.classes == "")
    return ours


def nuclei_of_roi_class(
    objects: Objects, roi_classes: Sequence[str], pixel_um2: float
) -> NDArray[np.bool_]:
    """(N,) which objects are outlines of nuclei in ROIs of some classes, though they have one of
    these, or another class of ROIs: detections, which no ROI is, and annotations as small as
    nuclei.

    ``pixel_um2`` is the area of a pixel at level 0, in µm².
    """
    areas = np.where(shapely.is_missing(objects.areas), shapely.Polygon(), objects.areas)
    is_annotation, names = _are_annotations(objects), [*map(class_name, roi_classes)]
    has_class = np.isin(objects.classes, (*names, TO_CORRECT, CORRECTED))
    rois = areas[is_annotation & np.isin(objects.classes, names)]
    is_detection = ~is_annotation & (objects.kinds != "tile") & ~objects.whole_cells
    is_small = is_annotation & are_nuclei_in(areas, rois, areas[~has_class], pixel_um2)
    return np.asarray(has_class & (is_detection | is_small))


def _are_annotations(objects: Objects) -> NDArray[np.bool_]:
    """(N,) which objects a ROI may be: detections may have its class, by an object classifier."""
    return ~np.isin(objects.kinds, ("detection", "cell", "tile"))


def _flaw(error: Exception) -> str:
    """Why a file cannot be read, in words."""
    return "may not be read" if isinstance(error, PermissionError) else "is damaged"


def _pixel_um2(
    objects: Objects, mpp: tuple[float, float] | None = None, fallback_mpp: float | None = None
) -> float:
    """The area of a pixel at level 0: in the project, else in the export, else as given, or a usual
    one."""
    sides = _sides(mpp or objects.more.get(_PIXEL_SIZE) or (fallback_mpp, fallback_mpp))
    return UNKNOWN_PIXEL_UM2 if sides is None else math.prod(sides)


def _sides(value: Any) -> tuple[float, float] | None:
    """The sides (x, y) of a pixel in an export; None for anything but two positive numbers."""
    try:
        x, y = map(float, value)
    except (TypeError, ValueError):
        return None
    return (x, y) if 0 < x < math.inf and 0 < y < math.inf else None


def _overlaps(rois: Polygons, found: Outlines) -> list[str]:
    """The problem of each ROI in which nuclei overlap, with all places."""
    shared = overlapping(np.array(found.nuclei, dtype=object))
    problems = []
    for roi in rois:
        here = shared[shapely.intersects(shared, roi)]
        shared = shared[~shapely.intersects(shared, roi)]
        if len(here):
            places = "; ".join(sorted(_place(part) for part in here))
            problems.append(
                f"nuclei overlap in {len(here)} places of the ROI {_place(roi)}: delete one of "
                f"each pair, save, and run again: {places}"
            )
    return problems


def _without_nuclei(
    rois: Polygons, ids: NDArray[np.str_], found: Outlines, objects: Objects
) -> list[tuple[str, bool]]:
    """For each ROI in which no nucleus is outlined, a message, and whether it is a problem.

    It is a statement, "no nucleus here", if a person deleted those that were there, or if the image
    has nuclei elsewhere; not if what is there may be how a person marked nuclei.
    """
    tree = shapely.STRtree(np.array(found.nuclei, dtype=object))
    worked = bool(found.nuclei) or as_count(objects.more.get("imported")) > 0
    deleted = objects.more.get("deleted")
    messages = []
    for roi, id_ in zip(rois, ids, strict=True):
        if len(tree.query(roi, predicate="intersects")):
            continue
        gone = as_count(deleted.get(id_)) if isinstance(deleted, dict) else 0
        place = _place(roi)
        if unclear := _unclear(roi, found, gone > 0):
            text = (
                f"the ROI {place} has no nuclei, but {unclear}: outline all nuclei, or delete the "
                "ROI"
            )
        elif worked or gone:
            how = f", {gone:,} were deleted there" if gone else ""
            text = (
                f"the ROI {place} has no nuclei{how}: all of it is taken as background; if that is "
                "not meant, outline them and refine again"
            )
        else:
            text = f"the ROI {place} has no nuclei: outline all of them, or delete the ROI"
        messages.append((text, bool(unclear) or not (worked or gone)))
    return messages


def _unclear(roi: shapely.Geometry, found: Outlines, all_deleted: bool) -> str:
    """What may mark nuclei in a ROI without outlines of them, in words; "" for nothing.

    Where a person deleted nuclei, detections of other programs are not such marks.
    """
    words = []
    for kind, name in _UNCLEAR.items():
        here = [shape & roi for of, shape in found.unclear if of is kind and shape.intersects(roi)]
        count = sum(shapely.get_num_coordinates(here)) if kind is Kind.POINTS else len(here)
        if count and not (all_deleted and kind is Kind.OTHERS):
            words.append(f"{count:,} {name}")
    return " and ".join(words)


def _place(geometry: shapely.Geometry) -> str:
    return place_text(*geometry.centroid.coords[0])
