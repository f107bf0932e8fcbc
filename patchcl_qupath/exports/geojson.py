"""Nuclei as GeoJSON: for QuPath, and for the bins of Visium HD."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from patchcl_qupath.exports.images import ExportedImage, damaged
from patchcl_qupath.exports.nuclei import read_batches
from patchcl_qupath.project.results import concatenated, geojson_polygons
from patchcl_qupath.storage.files import atomic_write
from patchcl_qupath.storage.parquet import CELL, NUCLEUS, polygons_of

_BEGIN, _END = b'{"type": "FeatureCollection", "features": [\n', b"\n]}\n"


def is_export(path: Path) -> bool:
    """Whether a file begins as those that are written here do; QuPath's begin otherwise.

    One that cannot be read may be anybody's.
    """
    try:
        with path.open("rb") as file:
            return file.read(len(_BEGIN)) == _BEGIN
    except OSError:
        return False


def write_qupath(path: Path, image: ExportedImage) -> int:
    """Write the nuclei of an image as QuPath imports them; returns their number.

    A feature is what groovy/import_nuclei.groovy imports: class, measurements, and of a cell also
    its nucleus. Raises StorageError; DamagedNucleiError for a damaged file.
    """
    count = 0
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(_BEGIN)
        for name in image.result.files:
            for feature in _features(image, image.folder / name):
                file.write((b",\n" if count else b"") + feature)
                count += 1
        file.write(_END)
        image.check_current()
    return count


def _features(image: ExportedImage, path: Path) -> Iterator[bytes]:
    """The features of a file of nuclei, which has one a line."""
    line = b""
    try:
        with gzip.open(path, "rb") as file:
            file.readline()
            for line in file:
                if line != _END.lstrip():
                    yield line.rstrip(b",\n")
    except (OSError, EOFError, zlib.error) as error:
        raise damaged(image, path, error) from error
    if line != _END.lstrip():
        raise damaged(image, path, "it is cut")


def visium_hd_files(folder: Path, image: ExportedImage) -> dict[Path, str]:
    """The files of an image's nuclei and, if it has some, of its cells: the column of contours."""
    files = {folder / f"{image.file_name}.nuclei.geojson": NUCLEUS}
    if CELL in image.columns:
        files[cells_file(folder, image)] = CELL
    return files


def cells_file(folder: Path, image: ExportedImage) -> Path:
    """The file of an image's cells, which is there only if it has some."""
    return folder / f"{image.file_name}.cells.geojson"


def write_visium_hd(path: Path, image: ExportedImage, column: str) -> int:
    """Write the contours of an image in one column; returns their number.

    They are plain polygons in px of the microscope image, numbered from 1 (``cell_id``), as Space
    Ranger takes them by ``--custom-segmentation-file``. Raises StorageError; DamagedNucleiError for
    a damaged file.
    """
    count = 0
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(_BEGIN)
        for batch in read_batches(image):
            numbers = pa.array(range(count + 1, count + len(batch) + 1)).cast(pa.string())
            features = pc.binary_join_element_wise(
                ',\n{"type": "Feature", "id": "',
                batch["id"].combine_chunks(),
                '", "geometry": ',
                geojson_polygons(polygons_of(batch, column)),
                ', "properties": {"cell_id": ',
                numbers,
                "}}",
                "",
            )
            if len(batch):
                file.write(concatenated(features)[0 if count else len(",\n") :])
                count += len(batch)
        file.write(_END)
    return count
