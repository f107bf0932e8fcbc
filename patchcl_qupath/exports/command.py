"""Exports the nuclei of a project's images: tables, and files for other programs.

A table has one row for each nucleus, image, region or TMA core. An image that has no nuclei file is
left out, with a reason; one that has no nuclei is an empty table with its header.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pyarrow as pa

from patchcl_qupath.config import ExportFormat, ExportRows
from patchcl_qupath.datatypes import ImageEntry, names_text
from patchcl_qupath.errors import ConfigError, ImageError, ProjectError, StorageError, quoted
from patchcl_qupath.exports.geojson import (
    cells_file,
    is_export,
    visium_hd_files,
    write_qupath,
    write_visium_hd,
)
from patchcl_qupath.exports.images import (
    DamagedNucleiError,
    ExportedImage,
    exported_image,
    told_apart,
)
from patchcl_qupath.exports.nuclei import NucleiTable
from patchcl_qupath.exports.summaries import KINDS, summary_table
from patchcl_qupath.exports.writing import write_csv, write_parquet
from patchcl_qupath.project import Project
from patchcl_qupath.project.changed import changed_since
from patchcl_qupath.project.imported import imported_nuclei
from patchcl_qupath.storage.files import digest, remove_file
from patchcl_qupath.storage.records import ImageOutcome, Record, read_record

_SUFFIXES = {
    ExportFormat.CSV: ".csv",
    ExportFormat.PARQUET: ".parquet",
    ExportFormat.GEOJSON: ".geojson",
    ExportFormat.VISIUM_HD: ".geojson",
    ExportFormat.SPATIALDATA: ".zarr",
    ExportFormat.ANNDATA: ".h5ad",
}
_OTHER_SUFFIXES = (  # no folder has one
    *(".arrow", ".feather", ".gz", ".h5", ".json", ".jsonl", ".ndjson", ".ods", ".pq", ".tsv"),
    *(".txt", ".xls", ".xlsx", ".xml", ".zip"),
)
_TABLES = (ExportFormat.CSV, ExportFormat.PARQUET)
_FOR_PYTHON = (ExportFormat.SPATIALDATA, ExportFormat.ANNDATA)
_IN_FOLDERS = (ExportFormat.GEOJSON, ExportFormat.VISIUM_HD)  # a file of each image, always
TABLE_NAMES = {  # of files, by what a row is
    ExportRows.NUCLEUS: "nuclei",
    ExportRows.IMAGE: "images",
    ExportRows.REGION: "regions",
    ExportRows.CORE: "cores",
}

_GROUPS = ("images", "labels", "points", "shapes", "tables")  # of a Zarr of SpatialData
_ELEMENTS = ("shapes/*_nuclei", "shapes/*_cells", "tables/nuclei")  # that an export has in them
_EXCEL_ROWS = 1_048_576  # with the header
_NOT_COUNTED = {
    ExportRows.REGION: "no regions were counted: patchcl-qp run --summarise CLASS",
    ExportRows.CORE: "no TMA cores were counted: patchcl-qp run --tma",
}

_NAMED = 5  # images that a note names


class _File(NamedTuple):
    """A file to write: of which images, and how, which returns the number of rows or objects."""

    path: Path
    images: Sequence[ExportedImage]
    write: Callable[[Path, Sequence[ExportedImage]], int]


class ExportedFile(Record, frozen=True, kw_only=True):
    """A file, or the folder of a Zarr, and the number of rows or objects in it."""

    path: str
    rows: int


class Exported(Record, frozen=True, kw_only=True):
    """What was exported.

    ``left_out`` are the reasons of images without nuclei, ``problems`` those of images whose nuclei
    cannot be read; ``notes`` are remarks for people.
    """

    files: tuple[ExportedFile, ...]
    left_out: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to export.

    ``output`` is a file for all images, if it has the suffix of the format, or a folder with a file
    for each image; without one, a file in the project's folder ``exports``. ``excel``: CSV as Excel
    opens it.
    """

    to: ExportFormat
    per: ExportRows = ExportRows.NUCLEUS
    output: Path | None = None
    excel: bool = False

    def __post_init__(self) -> None:
        if self.per is not ExportRows.NUCLEUS and self.to not in _TABLES:
            raise ConfigError(
                f"--per {self.per} makes a table: use --to csv or --to parquet, or leave --per out"
            )
        if self.excel and self.to is not ExportFormat.CSV:
            raise ConfigError("--excel is for tables in CSV: use --to csv with it")
        if self.output is not None and not self.one_file and not self.output.is_dir():
            suffix = self.output.suffix.lower()
            if meant := [to for to, of_format in _SUFFIXES.items() if of_format == suffix]:
                raise ConfigError(
                    f"{self.output} is named as a file of {meant[0]}, and {self.to} is exported: "
                    f"use --to {meant[0]}, or name it otherwise"
                )
            if suffix in _OTHER_SUFFIXES:
                raise ConfigError(
                    f"{self.output} is named as a file, and not as one of {self.to}: name it "
                    f"{self.output.with_suffix('').stem}{self.suffix}, or name a folder"
                )

    @property
    def suffix(self) -> str:
        """The suffix of files of the format."""
        return _SUFFIXES[self.to]

    @property
    def one_file(self) -> bool:
        """Whether ``output`` names one file for all images."""
        return self.output is not None and self.output.suffix.lower() == self.suffix


def export(project: Project, entries: Sequence[ImageEntry], request: Request) -> Exported:
    """Export the nuclei of some images of a project.

    An image whose nuclei cannot be read is a problem, and the others are exported. Raises
    ProjectError where none of them has nuclei; ConfigError for what cannot be asked for;
    StorageError for a file that cannot be written.
    """
    if request.to in _FOR_PYTHON:
        _spatial(request)  # before all images are looked at
    exported: list[ExportedImage] = []
    left_out: list[str] = []
    problems: list[str] = []
    for entry in entries:
        try:
            found = exported_image(project, entry)
        except ImageError as error:  # the other images go on
            problems.append(str(error))
            continue
        if isinstance(found, str):
            left_out.append(found)
            continue
        exported.append(found)
    if not exported:
        reason = f" ({'; '.join(problems + left_out)})" if len(entries) == 1 or problems else ""
        raise ProjectError(
            f"{project.path} has no nuclei to export{reason}: patchcl-qp run {quoted(project.path)}"
        )
    all_entries = project.images()
    images = told_apart(exported, all_entries)
    of_id = {entry.id: entry for entry in entries}
    notes = [note for image in images for note in _notes(project, of_id[image.id], image)]
    runs = {(image.result.run, digest(image.result.config)) for image in images}
    if len(runs) > 1:
        notes.append(
            f"nuclei of these images are of {len(runs)} runs, which differ in model, settings or "
            "version: the report tells which; run again to have all of one"
        )
    if request.per in (ExportRows.REGION, ExportRows.CORE):
        notes += _not_counted(images, request.per)
    written: list[tuple[Path, int]] = []
    try:
        for file in _FILES[request.to](project, images, request):
            written += _written(file, problems)
    except StorageError as error:
        if request.output is not None:
            raise
        raise StorageError(f"{error}; or export elsewhere, by --output FOLDER") from error
    if request.excel:
        notes += [
            f"{path} has {rows:,} rows, and Excel shows {_EXCEL_ROWS:,}: export fewer images, or "
            "name a folder"
            for path, rows in written
            if rows >= _EXCEL_ROWS
        ]
    if len(entries) == len(all_entries):
        notes += _others(project, request, [path for path, _ in written])
    return Exported(
        files=tuple(ExportedFile(path=str(path), rows=rows) for path, rows in written),
        left_out=tuple(left_out),
        problems=tuple(dict.fromkeys(problems)),  # an image may have two files
        notes=tuple(notes),
    )


def _notes(project: Project, entry: ImageEntry, found: ExportedImage) -> Iterator[str]:
    """What a person should know of the nuclei of an image."""
    name = found.name_in_tables
    yield from found.notes
    for change in changed_since(project, entry, found.result):
        yield f"{name}: {change.in_words}"
    if failed := len(found.result.failed_tiles):
        yield (
            f"{name}: {failed} of its tiles could not be segmented: their nuclei are "
            "missing, and their tissue counts in no density: run again"
        )
    outcome = read_record(project.layout.outcome(entry.id), ImageOutcome)
    if outcome is not None and outcome.problem and outcome.results:
        yield f"{name}: its last run failed after these nuclei: {outcome.problem}"
    elif outcome is not None and outcome.problem:
        yield (
            f"{name}: its last run failed, and its nuclei are those of a run before: "
            f"{outcome.problem}"
        )
    if found.result.positivity is not None and found.result.positivity.note:
        yield f"{name}: {found.result.positivity.note}"
    imported = imported_nuclei(project, entry)
    if imported is not None and imported.left_out:
        yield f"{name}: not all of its nuclei are in QuPath: {imported.in_words}"


def _others(project: Project, request: Request, written: Sequence[Path]) -> list[str]:
    """A note on files beside those of all images, which are read together with them."""
    if request.one_file or (request.output is None and request.to not in _IN_FOLDERS):
        return []
    folder = _folder(project, request)
    of_other_rows = {
        path
        for per in ExportRows
        if per not in (ExportRows.NUCLEUS, request.per)
        for path in folder.glob(f"*{_ending(request.suffix, per)}")
    }
    found = {*folder.glob(f"*{_ending(request.suffix, request.per)}")} - of_other_rows
    others = sorted(found - {*written})
    if not others:
        return []
    named = names_text([path.name for path in others], _NAMED)
    return [f"{folder} has files that this export did not write, of earlier ones perhaps: {named}"]


def _written(file: _File, problems: list[str]) -> list[tuple[Path, int]]:
    """Write a file, without images whose nuclei turn out to be damaged; its path and its rows.

    These are added to ``problems``. Where no image is left, there is no file.
    """
    images = file.images
    while images:
        try:
            return [(file.path, file.write(file.path, images))]
        except DamagedNucleiError as error:
            problems.append(str(error))
            images = [image for image in images if image.id != error.image]
    return []


def _not_counted(images: Sequence[ExportedImage], per: ExportRows) -> list[str]:
    """A note where some images, or all, have no row in a table of regions or cores."""
    kinds = [{summary.kind for summary in image.result.summaries} for image in images]
    without = [
        image.name_in_tables
        for image, found in zip(images, kinds, strict=True)
        if KINDS[per] not in found
    ]
    if not without:
        return []
    named = f"{names_text(without, _NAMED)}: " if len(without) < len(images) else ""
    return [named + _NOT_COUNTED[per]]


def _tables(project: Project, images: Sequence[ExportedImage], request: Request) -> list[_File]:
    """One table of all images, or one for each."""
    targets = _targets(project, images, request, TABLE_NAMES[request.per])
    write = partial(write_table, request=request)
    return [_File(path, of_file, write) for path, of_file in targets]


def _targets(
    project: Project, images: Sequence[ExportedImage], request: Request, name: str
) -> list[tuple[Path, Sequence[ExportedImage]]]:
    """The files, and the images in each: one file of all, or one for each image in a folder."""
    if request.output is None:
        return [(project.layout.exports / f"{name}{request.suffix}", images)]
    if request.one_file:
        return [(request.output, images)]
    ending = _ending(request.suffix, request.per)
    paths = [request.output / f"{image.file_name}{ending}" for image in images]
    return [(path, [image]) for path, image in zip(paths, images, strict=True)]


def _ending(suffix: str, per: ExportRows) -> str:
    """How files of single images end: tables of nuclei and of regions may be in one folder."""
    return suffix if per is ExportRows.NUCLEUS else f".{TABLE_NAMES[per]}{suffix}"


def write_table(path: Path, images: Sequence[ExportedImage], request: Request) -> int:
    """Write one table of images; returns its number of rows."""
    schema, batches = _table(images, request)
    if request.to is ExportFormat.PARQUET:
        return write_parquet(path, schema, batches)
    return write_csv(path, schema, batches, excel=request.excel)


def _table(
    images: Sequence[ExportedImage], request: Request
) -> tuple[pa.Schema, Iterable[pa.Table]]:
    """The columns of a table, and its rows."""
    if request.per is not ExportRows.NUCLEUS:
        rows = summary_table(images, request.per)
        return rows.schema, [rows]
    table = NucleiTable.of(images, geometry=request.to is ExportFormat.PARQUET)
    return table.schema, table.batches()


def _geojson(project: Project, images: Sequence[ExportedImage], request: Request) -> list[_File]:
    """A file for each image."""
    folder = _folder(project, request)
    if request.one_file:
        if len(images) > 1:
            raise ConfigError(
                f"{folder} is one file, and {len(images)} images are exported: name a folder, as "
                "GeoJSON has the objects of one image"
            )
        paths = [folder]
    else:
        paths = [folder / f"{image.file_name}{request.suffix}" for image in images]
    _check_no_outlines(paths)
    return [
        _File(path, [image], _of_one(write_qupath))
        for path, image in zip(paths, images, strict=True)
    ]


def _folder(project: Project, request: Request) -> Path:
    """Where the files of an export lie that has one for each image."""
    return request.output or project.layout.exports / request.to


def _of_one(
    write: Callable[[Path, ExportedImage], int],
) -> Callable[[Path, Sequence[ExportedImage]], int]:
    """How a file of a single image is written."""
    return lambda path, images: write(path, *images)


def _check_no_outlines(paths: Iterable[Path]) -> None:
    """Raise ConfigError for GeoJSON that would be replaced, and may be a person's."""
    for path in filter(Path.is_file, paths):
        if not is_export(path):
            raise ConfigError(
                f"{path} is no export of nuclei, but may be outlines of a person's, and would be "
                "replaced: give --output another name"
            )


def _visium_hd(project: Project, images: Sequence[ExportedImage], request: Request) -> list[_File]:
    """A file for each image, and another one for its cells, if it has some."""
    if request.one_file:
        raise ConfigError(f"{request.output} is one file: name a folder for those of Visium HD")
    folder = _folder(project, request)
    kinds = [
        (path, image, column)
        for image in images
        for path, column in visium_hd_files(folder, image).items()
    ]
    _check_no_outlines(path for path, _, _ in kinds)
    written = {path for path, _, _ in kinds}
    for path in sorted(cells_file(folder, image) for image in images):
        if path not in written and is_export(path):  # of a run before, which made cells
            remove_file(path)
    return [
        _File(path, [image], _of_one(partial(write_visium_hd, column=column)))
        for path, image, column in kinds
    ]


def _for_python(project: Project, images: Sequence[ExportedImage], request: Request) -> list[_File]:
    """A file for SpatialData or AnnData of all images, or one for each."""
    targets = _targets(project, images, request, TABLE_NAMES[ExportRows.NUCLEUS])
    for path, _ in targets:
        _check_replaceable(path)
    spatial = _spatial(request)
    is_anndata = request.to is ExportFormat.ANNDATA
    write = spatial.write_anndata if is_anndata else spatial.write_spatialdata
    return [_File(path, of_file, write) for path, of_file in targets]


def _spatial(request: Request) -> ModuleType:
    """What writes for SpatialData and AnnData. Raises ConfigError where these are not installed."""
    try:
        from patchcl_qupath.exports import spatial
    except ImportError as error:
        raise ConfigError(
            f"--to {request.to} needs {error.name}: pip install 'patchcl-qupath[spatial]'"
        ) from error
    return spatial


def _check_replaceable(path: Path) -> None:
    """Raise ConfigError for a folder that has more in it than an export, as all of it is replaced.

    It may be a slide, an OME-Zarr, or a SpatialData to which a person added images or points.
    """
    inside = [item.relative_to(path) for depth in ("*", "*/*") for item in sorted(path.glob(depth))]
    for item in inside:
        is_metadata = item.name.startswith(".") or item.name == "zarr.json"
        if not is_metadata and str(item) not in _GROUPS and not any(map(item.match, _ELEMENTS)):
            raise ConfigError(
                f"{path} has more in it than an export of nuclei ({item.as_posix()}), and would be "
                "replaced: give --output another name"
            )


_FILES: dict[ExportFormat, Callable[[Project, Sequence[ExportedImage], Request], list[_File]]] = {
    ExportFormat.CSV: _tables,
    ExportFormat.PARQUET: _tables,
    ExportFormat.GEOJSON: _geojson,
    ExportFormat.VISIUM_HD: _visium_hd,
    ExportFormat.SPATIALDATA: _for_python,
    ExportFormat.ANNDATA: _for_python,
}
