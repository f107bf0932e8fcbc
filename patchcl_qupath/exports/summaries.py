"""The tables of images, regions and TMA cores: one row each, numbers by QuPath's names.

What QuPath's tables have is named as there: counts and percentages by class, scores, centroids,
and what an import measures on annotations (``PatchCL: Tissue mm^2``). Densities of classes and
quartiles of measurements come after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from patchcl_qupath.answers.summary import Extent, is_main, summarise
from patchcl_qupath.config import GRADES, INTENSITY_COLOURS, POSITIVE, ExportRows
from patchcl_qupath.datatypes import Nuclei
from patchcl_qupath.exports.images import ExportedImage
from patchcl_qupath.exports.nuclei import measurement_names, read_batches
from patchcl_qupath.storage.records import Summary

KINDS = {ExportRows.IMAGE: "image", ExportRows.REGION: "region", ExportRows.CORE: "core"}
_TYPES = {  # of objects in QuPath
    "image": "Root object (Image)",
    "region": "Annotation",
    "core": "TMA core",
}
_TEXTS = {
    "image": ("Image", "Object type", "Name"),
    "region": ("Image", "Object ID", "Object type", "Name", "Classification"),
    "core": ("Image", "Object ID", "Object type", "Name", "Case ID", "Missing"),
}
_NUCLEI = "Num Detections"
_DECIMALS = 3  # of centroids, as in the table of nuclei
_QUARTILES = {"lower": "Lower quartile", "median": "Median", "upper": "Upper quartile"}

Cells = Iterator[tuple[str, float | int | None]]  # names of columns, and the numbers in them


def summaries_of(image: ExportedImage, *, of_nuclei: bool = True) -> tuple[Summary, ...]:
    """The summary of an image, then those of its regions and cores, if the run had any.

    Where the run made none, the one of the image is made from its nuclei; unless ``of_nuclei``,
    without quartiles of measurements, for which all nuclei are read.
    """
    if image.result.summaries:
        return image.result.summaries
    return summarise(
        _measured(image) if of_nuclei else _counted(image),
        image=image.name,
        extents=[Extent(tissue_mm2=_tissue_mm2(image))],
    )


def _tissue_mm2(image: ExportedImage) -> float | None:
    """The tissue that was segmented; None where all of it lies in failed tiles."""
    result = image.result
    return None if result.failed_tiles and not result.tissue_mm2 else result.tissue_mm2


def _measured(image: ExportedImage) -> Iterator[Nuclei]:
    """The nuclei of an image with their main measurements, without contours and ids."""
    names = [name for name in measurement_names(image) if is_main(name)]
    for batch in read_batches(image, names):
        measured = {name: batch[name].to_numpy() for name in names}
        yield Nuclei(polygons=np.empty(len(batch), dtype=object), measurements=measured)


def _counted(image: ExportedImage) -> Iterator[Nuclei]:
    """The nuclei of an image without anything: to count them."""
    yield Nuclei(polygons=np.empty(image.result.nuclei, dtype=object))


def summary_table(
    images: Iterable[ExportedImage], per: ExportRows, *, of_nuclei: bool = True
) -> pa.Table:
    """The table of images, of their regions, or of their cores; see ``summaries_of``."""
    rows = [
        (image, summary)
        for image in images
        for summary in summaries_of(image, of_nuclei=of_nuclei)
        if summary.kind == KINDS[per]
    ]
    texts = [_texts(image, summary) for image, summary in rows]
    columns = {
        name: pa.array([row[name] or None for row in texts], pa.string())
        for name in _TEXTS[KINDS[per]]
    }
    for group in (_centroid, _counts, _scores, _size, _densities, _quartiles):
        cells = [dict(group(image, summary)) for image, summary in rows]
        for name in dict.fromkeys(name for row in cells for name in row):
            columns[name] = _numbers([row.get(name) for row in cells], group is _quartiles)
    if not rows:
        columns[_NUCLEI] = pa.array([], pa.int64())
    return pa.table(columns)


def _numbers(values: list[float | int | None], measured: bool) -> pa.Array:
    """A column of numbers; of measurements they are as short as in the table of nuclei."""
    found = pa.array(values)
    return found.cast(pa.float32()) if measured or pa.types.is_null(found.type) else found


def _texts(image: ExportedImage, summary: Summary) -> dict[str, str]:
    """The texts of a row."""
    return {
        "Image": image.name_in_tables,
        "Object ID": summary.id,
        "Object type": _TYPES[summary.kind],
        "Name": "" if summary.kind == "image" else summary.name,
        "Classification": summary.class_name,
        "Case ID": summary.case_id,
        "Missing": "False",
    }


def _centroid(image: ExportedImage, summary: Summary) -> Cells:
    if summary.x is not None and summary.y is not None:
        x, y = image.mpp
        yield "Centroid X µm", round(summary.x * x, _DECIMALS)
        yield "Centroid Y µm", round(summary.y * y, _DECIMALS)


def _counts(image: ExportedImage, summary: Summary) -> Cells:
    """The numbers of nuclei: all, those of a base class, those of each class."""
    yield _NUCLEI, summary.nuclei
    counts = _by_class(image, summary)
    for base, names in base_classes(counts).items():
        if base:
            yield f"Num {base} (base)", sum(counts[name] for name in names)
    for name, count in sorted(counts.items()):
        yield f"Num {name}", count


def base_classes(names: Iterable[str]) -> dict[str, list[str]]:
    """The classes of positive and negative nuclei, by their base class, which may be ""."""
    found: dict[str, list[str]] = {}
    for name in names:
        base, _, last = name.rpartition(": ")
        if last in INTENSITY_COLOURS:
            found.setdefault(base, []).append(name)
    return found


def _by_class(image: ExportedImage, summary: Summary) -> dict[str, int]:
    """The numbers of nuclei by class; all have one where the run made none."""
    if not summary.classes:
        return {image.class_name: summary.nuclei} if image.class_name else {}
    return {name: found.nuclei for name, found in summary.classes.items()}


def _scores(image: ExportedImage, summary: Summary) -> Cells:
    """Percentage of positive nuclei, H-score and Allred score, and the thresholds they are by."""
    base = next(iter(base_classes(_by_class(image, summary))), "")
    before = f"{base}: " if base else ""
    if summary.positive_percent is not None:
        yield f"{before}Positive %", summary.positive_percent
    if summary.h_score is not None:
        yield f"{before}H-score", summary.h_score
    if summary.allred is not None:
        yield f"{before}Allred proportion", summary.allred.proportion
        yield f"{before}Allred intensity", summary.allred.intensity
        yield f"{before}Allred score", summary.allred.score
    if image.result.positivity is not None:
        thresholds = image.result.positivity.thresholds
        names = GRADES if len(thresholds) > 1 else (POSITIVE,)
        for name, threshold in zip(names, thresholds, strict=True):
            yield f"PatchCL: {name} threshold", threshold


def _size(image: ExportedImage, summary: Summary) -> Cells:
    """The area of a region or a core, as in QuPath; of an image, that which was segmented."""
    if summary.area_px is not None:
        x, y = image.mpp
        yield "Area µm^2", round(summary.area_px * x * y, _DECIMALS)
    elif summary.area_mm2 is not None:
        yield "Area µm^2", round(summary.area_mm2 * 1e6, _DECIMALS)
    yield "PatchCL: Tissue mm^2", summary.tissue_mm2


def _densities(image: ExportedImage, summary: Summary) -> Cells:
    """Nuclei per mm² of tissue: all, and those of each class."""
    yield "PatchCL: Nuclei per mm^2", summary.per_mm2
    for name, found in sorted(summary.classes.items()):
        yield f"Num {name} per mm^2", found.per_mm2


def _quartiles(image: ExportedImage, summary: Summary) -> Cells:
    for name, found in summary.measurements.items():
        for key, words in _QUARTILES.items():
            yield f"{image.shown(name)}: {words}", getattr(found, key)
