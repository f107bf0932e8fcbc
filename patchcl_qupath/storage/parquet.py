"""Nuclei and surveys as parquet; nuclei as GeoParquet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Nuclei, Polygons, UncertaintyGrid
from patchcl_qupath.storage.files import atomic_write

_GEO = {  # GeoParquet 1.1; coordinates are pixels, so there is no reference system
    "version": "1.1.0",
    "primary_column": "geometry",
    "columns": {"geometry": {"encoding": "WKB", "geometry_types": ["Polygon"], "crs": None}},
}


def to_table(nuclei: Nuclei) -> pa.Table:
    """Nuclei as an Arrow table that is GeoParquet when written: id, geometry, measurements."""
    columns: dict[str, Any] = {
        "id": pa.array(nuclei.uuids.tolist(), pa.string()),
        "geometry": pa.array(shapely.to_wkb(nuclei.polygons).tolist(), pa.binary()),
    }
    columns |= {name: pa.array(v, pa.float32()) for name, v in nuclei.measurements.items()}
    return pa.table(columns).replace_schema_metadata({"geo": json.dumps(_GEO)})


def from_table(table: pa.Table) -> Nuclei:
    """The inverse of ``to_table``."""
    names = [name for name in table.column_names if name not in ("id", "geometry")]
    return Nuclei(
        _polygons(table),
        {name: table[name].to_numpy() for name in names},
        np.array(table["id"].to_pylist(), dtype="U36"),
    )


def _polygons(table: pa.Table) -> Polygons:
    return np.asarray(shapely.from_wkb(table["geometry"].to_numpy(zero_copy_only=False)), object)


def to_parquet(nuclei: Nuclei, uncertainty: UncertaintyGrid) -> bytes:
    """A tile's nuclei as the content of a parquet file, with its survey in the header."""
    table = to_table(nuclei)
    columns = {name: values.tolist() for name, values in _columns(uncertainty).items()}
    header = table.schema.metadata | {"survey": json.dumps([uncertainty.bin_size, columns])}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(header), sink, compression="zstd")
    return bytes(sink.getvalue())


def read_nuclei(path: Path) -> Nuclei:
    """The nuclei of a parquet file."""
    return from_table(pq.read_table(path))


def read_polygons(path: Path) -> Polygons:
    """The outlines of a parquet file's nuclei alone, several times as fast."""
    return _polygons(pq.read_table(path, columns=["geometry"]))


def read_measurements(path: Path, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Some measurements of a parquet file's nuclei, name: (N,), and nothing else of them."""
    table = pq.read_table(path, columns=list(names))
    return {name: table[name].to_numpy() for name in names}


def count_nuclei(path: Path) -> int:
    """How many nuclei a parquet file holds, without reading them."""
    return int(pq.read_metadata(path).num_rows)


def _columns(uncertainty: UncertaintyGrid) -> dict[str, NDArray[np.int64]]:
    return {name: values for name, values in vars(uncertainty).items() if name != "cell"}


def read_tile_uncertainty(path: Path) -> UncertaintyGrid:
    """The survey in the header of a tile's file."""
    bin_size, columns = json.loads(pq.read_schema(path).metadata[b"survey"])
    return UncertaintyGrid(
        tuple(bin_size), **{name: np.array(v, np.int64) for name, v in columns.items()}
    )


def write_uncertainty_grid(path: Path, uncertainty: UncertaintyGrid) -> None:
    """Write an image's survey as a parquet file."""
    table = pa.table(_columns(uncertainty)).replace_schema_metadata(
        {"cell": json.dumps(uncertainty.bin_size)}
    )
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_uncertainty_grid(path: Path) -> UncertaintyGrid:
    """The inverse of ``write_uncertainty_grid``."""
    table = pq.read_table(path)
    columns = {name: table[name].to_numpy() for name in table.column_names}
    return UncertaintyGrid(tuple(json.loads(table.schema.metadata[b"cell"])), **columns)
