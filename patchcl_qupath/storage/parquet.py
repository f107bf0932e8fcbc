"""Nuclei and uncertainty grids as parquet; nuclei as GeoParquet."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from patchcl_qupath.datatypes import (
    Nuclei,
    Polygons,
    UncertaintyGrid,
    centroids_of,
    name_of_nucleus,
)
from patchcl_qupath.storage.files import atomic_write

Table: TypeAlias = pa.Table

# GeoParquet 1.1; coordinates are pixels, so there is no reference system.
_POLYGONS = {"encoding": "WKB", "geometry_types": ["Polygon"], "crs": None}
# WKB of a polygon with one ring: little endian, its type, the number of rings, that of points.
_HEADER = np.frombuffer(bytes([1, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]), np.uint8)
_POINT_BYTES = 16
_BATCH = 32_768  # nuclei that are in memory at once
NUCLEUS, CELL = "geometry", "cell"  # columns of contours
CLASSIFICATION = "Classification"  # the column of classes, as QuPath's tables call it
NOT_MEASURED = ("id", NUCLEUS, CELL, CLASSIFICATION)  # all other columns are measurements
# Attribute of a grid -> column in a file, which has the name of version 0.1.
_GRID = {"rows": "rows", "cols": "cols", "points": "points", "entropy": "doubt", "nuclei": "nuclei"}


def to_table(nuclei: Nuclei) -> pa.Table:
    """Nuclei as an Arrow table with the metadata of GeoParquet: id, geometry, measurements.

    Where nuclei have classes, these are the third column.
    """
    columns: dict[str, Any] = {
        "id": pa.array(nuclei.uuids.tolist(), pa.string()),
        NUCLEUS: pa.array(shapely.to_wkb(nuclei.polygons).tolist(), pa.binary()),
    }
    if nuclei.cells is not None:
        columns[CELL] = pa.array(shapely.to_wkb(nuclei.cells).tolist(), pa.binary())
    if nuclei.classes is not None:
        classes = pa.array(nuclei.classes.tolist(), pa.string())
        columns[CLASSIFICATION] = classes.cast(pa.dictionary(pa.int8(), pa.string()))
    columns |= {name: pa.array(v, pa.float32()) for name, v in nuclei.measurements.items()}
    return pa.table(columns).replace_schema_metadata(geo_metadata(columns))


def with_cells(
    table: pa.Table,
    xy: NDArray[np.float64],
    first: NDArray[np.int64],
    measurements: dict[str, NDArray[np.float32]],
) -> pa.Table:
    """A table of nuclei as ``to_table`` makes it, with the contours of cells, as of ``points_of``.

    ``measurements`` take the place of those that it has.
    """
    columns = {name: table[name] for name in ("id", NUCLEUS)} | {CELL: _wkb_of(xy, first)}
    columns |= {name: pa.array(v, pa.float32()) for name, v in measurements.items()}
    return pa.table(columns).replace_schema_metadata(geo_metadata(columns))


def with_classes(table: pa.Table, classes: NDArray[np.str_]) -> pa.Table:
    """A table of nuclei with the QuPath class (N,) of each, where ``to_table`` has it."""
    place = sum(name in table.column_names for name in ("id", NUCLEUS, CELL))
    column = pa.array(classes.tolist(), pa.string()).cast(pa.dictionary(pa.int8(), pa.string()))
    return table.add_column(place, CLASSIFICATION, column)


def points_of(column: pa.ChunkedArray) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """The points (P, 2) of polygons, WKB as ``to_table`` makes it.

    Polygon k has those from ``first[k]`` to ``first[k + 1]``, the second array. Raises ValueError
    where one has a hole, or is a multipolygon.
    """
    wkb = column.combine_chunks()
    _, offsets, content = wkb.buffers()
    ends = np.frombuffer(offsets, np.int32)[wkb.offset :][: len(wkb) + 1].astype(np.int64)
    content = np.frombuffer(content or b"", np.uint8)[: ends[-1]]
    first = (ends - ends[0] - np.arange(len(ends)) * len(_HEADER)) // _POINT_BYTES
    is_header = np.zeros(len(content), np.bool_)
    is_header[: ends[0]] = True
    places = ends[:-1, None] + np.arange(len(_HEADER))
    if (content[places[:, :9]] != _HEADER[:9]).any():
        raise ValueError("not all are polygons with one ring")
    is_header[places] = True
    return content[~is_header].view("<f8").reshape(-1, 2), first


def outer_points_of(
    column: pa.ChunkedArray,
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """As ``points_of``, without holes: nuclei that touched themselves may have one."""
    try:
        return points_of(column)
    except ValueError:
        polygons = shapely.from_wkb(column.to_numpy(zero_copy_only=False))
        outer = shapely.get_exterior_ring(polygons)
        xy, of = shapely.get_coordinates(outer, return_index=True)
        return xy, np.searchsorted(of, np.arange(len(outer) + 1))


def _wkb_of(xy: NDArray[np.float64], first: NDArray[np.int64]) -> pa.Array:
    """The inverse of ``points_of``; as shapely's ``to_wkb`` of such polygons."""
    ends = first * _POINT_BYTES + np.arange(len(first)) * len(_HEADER)
    content, headers = np.empty(ends[-1], np.uint8), np.tile(_HEADER, (len(first) - 1, 1))
    headers[:, -4:] = np.diff(first).astype("<u4")[:, None].view(np.uint8)
    places = ends[:-1, None] + np.arange(len(_HEADER))
    content[places] = headers
    is_point = np.ones(len(content), np.bool_)
    is_point[places] = False
    content[is_point] = np.ascontiguousarray(xy[first[0] :], "<f8").view(np.uint8).ravel()
    buffers = [None, pa.py_buffer(ends.astype(np.int32)), pa.py_buffer(content)]
    return pa.Array.from_buffers(pa.binary(), len(first) - 1, buffers)


def encoding(names: Collection[str], codec: str = "zstd") -> dict[str, Any]:
    """How to write nuclei as parquet, a table with these columns: options of pyarrow.

    Dictionaries of values nearly all of which differ, and compressing measurements, take half of
    the time and save nothing.
    """
    packed = {"id", NUCLEUS, CELL, CLASSIFICATION}
    return {
        "compression": {name: codec if name in packed else "none" for name in names},
        "use_dictionary": [CLASSIFICATION],
        "write_page_checksum": True,
    }


def geo_metadata(names: Collection[str]) -> dict[str, str]:
    """The metadata of GeoParquet, for a table with these columns."""
    shapes = {name: _POLYGONS for name in (NUCLEUS, CELL) if name in names}
    geo = {"version": "1.1.0", "primary_column": NUCLEUS, "columns": shapes}
    return {"geo": json.dumps(geo)}


def from_table(table: pa.Table) -> Nuclei:
    """The inverse of ``to_table``."""
    names = [name for name in table.column_names if name not in NOT_MEASURED]
    classes = None
    if CLASSIFICATION in table.column_names:
        classes = np.array(table[CLASSIFICATION].to_pylist(), dtype=str)
    return Nuclei(
        polygons=polygons_of(table),
        measurements={name: table[name].to_numpy() for name in names},
        uuids=np.array(table["id"].to_pylist(), dtype="U36"),
        cells=polygons_of(table, CELL) if CELL in table.column_names else None,
        classes=classes,
    )


def polygons_of(table: pa.Table, column: str = NUCLEUS) -> Polygons:
    """The contours (N,) in a column of a table: of nuclei or of cells; None where none is."""
    return np.asarray(shapely.from_wkb(table[column].to_numpy(zero_copy_only=False)), object)


def is_utf8(path: Path) -> bool:
    """Whether a path can be written as UTF-8: Arrow takes no other."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def parquet_source(path: Path) -> Path | io.BytesIO:
    """A file for Arrow to read: its path or, if that is not UTF-8, its content."""
    return path if is_utf8(path) else io.BytesIO(path.read_bytes())


def read_table(
    source: Path | io.BytesIO | pa.BufferReader, columns: list[str] | None = None
) -> Table:
    """The table in a parquet file, or some of its columns; raises OSError, and ArrowInvalid for one
    that is damaged.

    Pages are compared with their checksums. pyarrow's own ``read_table`` is for folders, too, takes
    a third longer, and makes measurements of 0 of a block that was lost.
    """
    with pq.ParquetFile(source, page_checksum_verification=True) as file:
        table = file.read(columns, use_threads=False)
    if columns is not None and len(table.column_names) < len(columns):
        raise pa.ArrowInvalid(f"not all of {columns} are columns of the table")
    return table


def read_nuclei(path: Path) -> Nuclei:
    """The nuclei of a parquet file. Any error may come of one that is damaged."""
    return from_table(read_table(parquet_source(path)))


def read_batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[Table]:
    """The nuclei of a parquet file, some at a time, as all of a slide may take gigabytes: all
    columns, or some. Any error may come of a file that is damaged."""
    with pq.ParquetFile(parquet_source(path), page_checksum_verification=True) as file:
        # Not by iter_batches, which keeps what it read until its end.
        for groups in _row_groups(file.metadata):
            rows = file.read_row_groups(groups, columns=columns and list(columns))
            for first in range(0, len(rows), _BATCH):
                yield rows.slice(first, _BATCH)


def _row_groups(metadata: pq.FileMetaData) -> Iterator[list[int]]:
    """The row groups of a file, of which a tile makes one each, together as large as a batch."""
    groups: list[int] = []
    rows = 0
    for number in range(metadata.num_row_groups):
        groups.append(number)
        rows += metadata.row_group(number).num_rows
        if rows >= _BATCH:
            yield groups
            groups, rows = [], 0
    if rows:
        yield groups


def read_measured(
    path: Path, names: Sequence[str]
) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float32]]]:
    """The centroids (N, 2) of nuclei, px at level 0, and those of some measurements (N,) that there
    are. Any error may come of a file that is damaged."""
    centroids, found = [np.empty((0, 2))], dict[str, list[NDArray[np.float32]]]()
    known = pq.read_schema(parquet_source(path)).names
    columns = {name: name_of_nucleus(name, known) for name in names}
    columns = {name: column for name, column in columns.items() if column in known}
    for table in read_batches(path, [NUCLEUS, *columns.values()]):
        centroids.append(centroids_of(polygons_of(table)))
        for name, column in columns.items():
            found.setdefault(name, []).append(table[column].to_numpy())
    return np.concatenate(centroids), {name: np.concatenate(each) for name, each in found.items()}


def read_near(path: Path, areas: Polygons) -> Polygons:
    """The contours (N,) of nuclei whose bounding box meets that of one of ``areas``, in their order
    in the file. Any error may come of a file that is damaged."""
    near = [np.empty(0, dtype=object)]
    for table in read_batches(path, [NUCLEUS]):
        polygons = polygons_of(table)
        near.append(polygons[np.unique(shapely.STRtree(polygons).query(areas)[1])])
    return np.concatenate(near)


def read_geoarrow(path: Path) -> Table:
    """The table of a GeoParquet file, with its geometries marked as GeoArrow's type for WKB.

    Any error may come of a file that is damaged.
    """
    table = read_table(parquet_source(path))
    schema = table.schema
    for name in {NUCLEUS, CELL} & set(table.column_names):
        column = schema.get_field_index(name)
        marked = schema.field(column).with_metadata({"ARROW:extension:name": "geoarrow.wkb"})
        schema = schema.set(column, marked)
    return table.cast(schema)


def grid_columns(grid: UncertaintyGrid) -> dict[str, NDArray[np.int64]]:
    """The columns (N,) of a grid, by their names in files."""
    return {column: getattr(grid, name) for name, column in _GRID.items()}


def grid_of_columns(bin_size: list[float], columns: dict[str, Any]) -> UncertaintyGrid:
    """The inverse of ``grid_columns``; ``bin_size`` is (width, height), level 0."""
    width, height = bin_size
    values = {name: np.asarray(columns[column], np.int64) for name, column in _GRID.items()}
    return UncertaintyGrid(bin_size=(width, height), **values)


def write_uncertainty_grid(path: Path, grid: UncertaintyGrid) -> None:
    """Write an image's uncertainty grid as a parquet file."""
    table = pa.table(grid_columns(grid))
    table = table.replace_schema_metadata({"cell": json.dumps(grid.bin_size)})
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        pq.write_table(table, file, compression="zstd", write_page_checksum=True)


def read_uncertainty_grid(path: Path) -> UncertaintyGrid:
    """The inverse of ``write_uncertainty_grid``. Any error may come of a file that is damaged."""
    table = read_table(parquet_source(path))
    columns = {name: table[name].to_numpy() for name in table.column_names}
    return grid_of_columns(json.loads(table.schema.metadata[b"cell"]), columns)
