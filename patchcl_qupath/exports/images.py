"""The images of a project whose nuclei are exported."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from patchcl_qupath import config
from patchcl_qupath.answers.regions import Regions
from patchcl_qupath.datatypes import DrawnRegion, ImageEntry, distinct_names
from patchcl_qupath.errors import ImageError, StorageError, is_damage
from patchcl_qupath.project import Project
from patchcl_qupath.project.drawn import OUR_REGION, counted_class, read_drawn
from patchcl_qupath.project.names import in_qupath
from patchcl_qupath.slides.pyramid import IMAGE_SUFFIXES
from patchcl_qupath.storage.files import readable
from patchcl_qupath.storage.layout import RESULT, file_name
from patchcl_qupath.storage.parquet import CELL, parquet_source
from patchcl_qupath.storage.records import RemovedRecord, ResultRecord, Summary, read_result

_SAME_AREA = 0.01  # of a region: what is exported and read again differs by less
_SUFFIX = re.compile(  # of an image's file: what else follows a dot belongs to its name
    rf"(\.ome)?({'|'.join(map(re.escape, sorted(IMAGE_SUFFIXES)))})$", re.IGNORECASE
)


@dataclass(frozen=True)
class Places:
    """Where nuclei lie: the names (N,) of the smallest region and of the TMA core of each."""

    parents: pa.Array
    cores: pa.Array


@dataclass(frozen=True, kw_only=True)
class ExportedImage:
    """An image with nuclei.

    ``name_in_tables`` ends with the id where another image has the same name, and so does
    ``file_name``, which has no suffix, and ``element_name``, in SpatialData (``told_apart``).
    ``result`` is the record of its nuclei, ``nuclei`` their file, ``columns`` the names in it,
    ``folder`` the folder of both; ``regions`` are those that the run counted nuclei in. ``notes``
    are for people. Tables have the names of ``qupath_version``, that of the project.
    """

    id: str
    name: str
    name_in_tables: str
    file_name: str
    element_name: str
    result: ResultRecord
    folder: Path
    nuclei: Path
    columns: tuple[str, ...]
    regions: Regions = field(default_factory=Regions)
    notes: tuple[str, ...] = ()
    qupath_version: str | None = None

    def shown(self, measurement: str) -> str:
        """The name of a measurement in tables."""
        return in_qupath(measurement, self.qupath_version)

    def check_current(self) -> None:
        """Raise ImageError where a run has replaced the nuclei since ``result`` was read: what is
        read of them is of that one then."""
        try:
            is_current = read_result(self.folder / RESULT) == self.result
        except StorageError:
            is_current = False
        if not is_current:
            raise DamagedNucleiError(
                f"{self.name}: its nuclei were replaced while they were exported: export again",
                self.id,
            )

    @property
    def has_cells(self) -> bool:
        """Whether the objects in QuPath are cells."""
        return CELL in self.columns and self.result.object_type == config.CELL

    @property
    def mpp(self) -> tuple[float, float]:
        """(x, y) µm/px at level 0."""
        return self.result.slide.mpp

    @property
    def class_name(self) -> str:
        """The QuPath class of nuclei that have none of their own."""
        settings = self.result.config.get("result")
        return str(settings["class_name"]) if isinstance(settings, dict) else ""

    @property
    def object_type(self) -> str:
        """What a nucleus is in QuPath, as QuPath's tables write it."""
        return self.result.object_type.capitalize()

    @property
    def has_cores(self) -> bool:
        """Whether nuclei lie in TMA cores."""
        return bool(self.regions.is_core.any())

    def places(self, centroids: NDArray[np.float64]) -> Places:
        """Where nuclei lie, by their centroids (N, 2) in px at level 0."""
        region, point = self.regions.pairs(centroids)
        parent = self.regions.smallest(region, point, len(centroids))
        in_core = self.regions.is_core[region]
        core = self.regions.smallest(region[in_core], point[in_core], len(centroids))
        return Places(
            parents=_taken([*map(_displayed, self.regions.drawn), OUR_REGION], parent),
            cores=_taken([*(region.name for region in self.regions.drawn), None], core),
        )


def _displayed(region: DrawnRegion) -> str:
    """How QuPath calls a region in the column Parent."""
    kind = "TMA core" if region.is_core else "Annotation"
    return region.name or (f"{kind} ({region.class_name})" if region.class_name else kind)


def _taken(names: Sequence[str | None], numbers: NDArray[np.intp]) -> pa.Array:
    """The names (N,) of these numbers (N,); the last one is that of -1."""
    numbers = np.where(numbers < 0, len(names) - 1, numbers)
    return pa.array(names, pa.string()).take(pa.array(numbers))


def exported_image(project: Project, entry: ImageEntry) -> ExportedImage | str:
    """An image with its nuclei, or the reason why it has none. Raises ImageError for a file that is
    damaged, or cannot be read."""
    layout = project.layout
    try:
        result = read_result(layout.result(entry.id))
    except StorageError as error:
        raise ImageError(f"{entry.name}: {error}") from error
    if isinstance(result, RemovedRecord):
        return f"{entry.name}: its nuclei were removed"
    if result is None:
        return f"{entry.name} has no nuclei: segment it first"
    nuclei = layout.nuclei(entry.id)
    try:
        columns = pq.read_schema(parquet_source(nuclei)).names
    except (OSError, pa.ArrowException) as error:
        raise damaged(entry, nuclei, error) from error
    regions, notes = _regions(layout.regions(entry.id), entry.name, result)
    return ExportedImage(
        id=entry.id,
        name=entry.name,
        name_in_tables=entry.name,
        file_name=entry.name,
        element_name=entry.name,
        result=result,
        folder=layout.results(entry.id),
        nuclei=nuclei,
        columns=tuple(columns),
        regions=regions,
        notes=notes,
        qupath_version=project.qupath_version,
    )


def _regions(path: Path, image: str, result: ResultRecord) -> tuple[Regions, tuple[str, ...]]:
    """The regions and cores that a run counted nuclei in, and notes where others are there now.

    ``path`` has the annotations as they were last exported from QuPath.
    """
    counted = [summary for summary in result.summaries if summary.kind != "image"]
    if not counted:
        return Regions(), ()
    try:
        drawn = read_drawn(path, image)
    except ImageError:
        drawn = []
    same = [[_same(region, summary) for summary in counted] for region in drawn]
    is_same = np.array(same, dtype=bool).reshape(len(drawn), len(counted))
    is_known = np.asarray(is_same.any(axis=1))
    classes = {counted_class(one.class_name, is_core=one.kind == "core") for one in counted}
    now = [counted_class(one.class_name, is_core=one.is_core) for one in drawn]
    to_count = np.array([name in classes for name in now], dtype=bool)
    changed = len(counted) - np.count_nonzero(is_same.any(axis=0))
    notes = []
    if changed:
        notes.append(
            f"{image}: {changed} of its {len(counted)} regions were changed since the run, and are "
            "not in the column Parent: run again"
        )
    if (new := np.count_nonzero(to_count & ~is_known) - changed) > 0:
        notes.append(f"{image}: {new} of its regions were drawn since the run: run again")
    return Regions([*itertools.compress(drawn, is_known)]), tuple(notes)


def _same(region: DrawnRegion, summary: Summary) -> bool:
    """Whether a region is the one that was summarised, in the same place, as large and as turned.

    Earlier versions kept no bounds.
    """
    if (region.class_name, region.name) != (summary.class_name, summary.name):
        return False
    x, y = region.geometry.centroid.coords[0]
    near = summary.x is not None and abs(summary.x - x) < 1 and abs((summary.y or 0) - y) < 1
    area, before = region.geometry.area, summary.area_px
    as_large = before is None or abs(area - before) <= _SAME_AREA * before
    bounds = summary.bounds
    as_turned = bounds is None or np.allclose(bounds, region.geometry.bounds, rtol=0, atol=1)
    return near and as_large and as_turned and region.is_core == (summary.kind == "core")


def told_apart(
    images: Iterable[ExportedImage], entries: Sequence[ImageEntry]
) -> list[ExportedImage]:
    """The images, with names in tables, of files and elements that no two of ``entries`` have.

    These are all of the project, whichever are exported, so that exports can be kept side by side.
    """
    names = [entry.name for entry in entries]
    in_tables = distinct_names(names, [f" ({entry.id})" for entry in entries], key=str)
    # As far as any system takes it, and without its suffix.
    stems = [file_name(_SUFFIX.sub("", name)) or "image" for name in names]
    endings = [f"-{entry.id}" for entry in entries]
    of_files = distinct_names(stems, endings)
    of_elements = _element_names(of_files, endings)
    number = {entry.id: i for i, entry in enumerate(entries)}
    return [
        replace(
            image,
            name_in_tables=in_tables[number[image.id]],
            file_name=of_files[number[image.id]],
            element_name=of_elements[number[image.id]],
        )
        for image in images
    ]


def _element_names(names: Sequence[str], endings: Sequence[str]) -> list[str]:
    """Names (N,) of letters, digits, ``.``, ``_`` and ``-``, as SpatialData asks for."""
    plain = [re.sub(r"[^A-Za-z0-9._-]", "_", name).lstrip("_.") or "image" for name in names]
    # A name that ends with _um may be that of another image's coordinate system in µm.
    return distinct_names(
        plain, endings, key=lambda name: re.sub("(_um|_file)+$", "", name.casefold())
    )


class DamagedNucleiError(ImageError):
    """A file of nuclei cannot be read, or is not that of before; ``image`` is the id of theirs."""

    def __init__(self, message: str, image: str) -> None:
        super().__init__(message, image)
        self.image = image

    def __str__(self) -> str:
        return str(self.args[0])


def damaged(
    image: ImageEntry | ExportedImage, nuclei: Path, error: Exception | str
) -> DamagedNucleiError:
    """The error of a file of nuclei that cannot be read.

    One that is damaged is to be removed: a run that finds all files there, and whole by their ends,
    changes nothing. One that is missing, say, is not.
    """
    reason = readable(str(error))
    message = f"{image.name}: {nuclei} is damaged ({reason}): remove it and run again"
    if isinstance(error, Exception) and not is_damage(error):
        message = f"{image.name}: {nuclei} cannot be read ({reason}): run again"
    return DamagedNucleiError(message, image.id)
