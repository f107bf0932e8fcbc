"""The tables of a project as files beside the report, which links to them.

report/tables/images.csv, regions.csv, cores.csv    one row each, from the records of the runs
report/tables/nuclei.csv                            one row each, unless there are very many
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from patchcl_qupath.config import ExportRows
from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.errors import ImageError, StorageError
from patchcl_qupath.exports.command import TABLE_NAMES
from patchcl_qupath.exports.images import ExportedImage, exported_image, told_apart
from patchcl_qupath.exports.nuclei import NucleiTable
from patchcl_qupath.exports.summaries import summary_table
from patchcl_qupath.exports.writing import write_csv
from patchcl_qupath.project import Project

logger = logging.getLogger(__name__)

MAX_NUCLEI = 100_000  # in a table beside the report: more are exported where they are asked for
_FOLDER = "tables"
_WORDS = {  # what is in each table, in the order of the links
    ExportRows.IMAGE: "one row for each image",
    ExportRows.REGION: "one row for each region",
    ExportRows.CORE: "one row for each TMA core",
    ExportRows.NUCLEUS: "one row for each nucleus",
}


class Download(NamedTuple):
    """A file beside the report: its address from there, its name, and what is in it."""

    href: str
    name: str
    words: str


def write_downloads(project: Project) -> list[Download]:
    """Write the tables beside the report, as Excel opens them; those that are empty are removed.

    One that cannot be written, as Excel has it open say, stays as it was, and the report does not
    link to it, with a warning: it costs no report.
    """
    entries = project.images()
    images = told_apart(_images(project, entries), entries)
    folder = project.layout.report / _FOLDER
    written = []
    for per, words in _WORDS.items():
        name = f"{TABLE_NAMES[per]}.csv"
        try:
            rows = _write(folder / name, images, per)
        except StorageError as error:
            logger.warning("the report has no link to %s: %s", name, error)
            continue
        if rows:
            written.append(Download(f"{_FOLDER}/{name}", name, words))
        else:
            with suppress(OSError):
                (folder / name).unlink()
    return written


def _images(project: Project, entries: Sequence[ImageEntry]) -> Iterator[ExportedImage]:
    """The images that have nuclei which can be read."""
    for entry in entries:
        try:
            found = exported_image(project, entry)
        except ImageError:  # the report has a warning of its own
            continue
        if not isinstance(found, str):
            yield found


def _write(path: Path, images: Sequence[ExportedImage], per: ExportRows) -> int:
    """Write one table, if it has rows; returns their number."""
    if per is not ExportRows.NUCLEUS:
        rows = summary_table(images, per, of_nuclei=False)
        return write_csv(path, rows.schema, [rows], excel=True) if len(rows) else 0
    if not 0 < sum(image.result.nuclei for image in images) <= MAX_NUCLEI:
        return 0
    table = NucleiTable.of(images)
    try:
        return write_csv(path, table.schema, table.batches(), excel=True)
    except ImageError:  # a file that is damaged within
        return 0
