"""An image's nuclei on disk: GeoJSON that QuPath imports, and GeoParquet for everything else.

nuclei-000.geojson.gz ...   at most 50,000 nuclei each, since QuPath parses a file whole
nuclei.parquet              all of them, with measurements
result.json                 what made them; names the GeoJSON files to import
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely

from patchcl_qupath.config import ResultConfig
from patchcl_qupath.datatypes import Nuclei, Polygons
from patchcl_qupath.storage.files import atomic_write
from patchcl_qupath.storage.layout import NUCLEI, RESULT
from patchcl_qupath.storage.parquet import to_table
from patchcl_qupath.storage.records import RemovedRecord, ResultRecord, write_record

NUCLEI_PER_FILE = 50_000


def write_results(
    folder: Path, parts: Iterable[Nuclei], config: ResultConfig, result: ResultRecord
) -> None:
    """Write one image's nuclei, level 0, to ``folder``, in place of what was there.

    ``parts`` are taken one at a time and not kept, so memory does not grow with the slide. The
    files that are written are added to ``result``, which becomes ``result.json``.
    """
    with (
        atomic_write(folder) as new,
        _Beside() as compressing,
        _Beside() as formatting,
        _Beside() as tabulating,
    ):
        new.mkdir()
        chunks = _Chunks(new, result.object_type, config, compressing)
        table = _Table(new / NUCLEI, tabulating)
        for part in parts:
            table.add(part)
            formatting.do(chunks.add, part)
        formatting.wait()
        table.close()
        chunks.close()
        written = msgspec.structs.replace(result, files=tuple(chunks.names))
        write_record(new / RESULT, written)


def write_removed(folder: Path) -> None:
    """Leave in ``folder`` only word that its nuclei were removed, for the import script."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with atomic_write(folder) as new:
        new.mkdir()
        write_record(new / RESULT, RemovedRecord(removed=now))


class _Beside(ThreadPoolExecutor):
    """Does one thing after the other in a thread of its own; the next is not taken before."""

    def __init__(self) -> None:
        super().__init__(1)
        self._doing = self.submit(int)  # nothing yet

    def do(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Begin, once what was begun before is done. Raises what that raised."""
        self.wait()
        self._doing = self.submit(call, *arguments)

    def wait(self) -> None:
        """Until all is done."""
        self._doing.result()


class _Table:
    """All nuclei as GeoParquet."""

    def __init__(self, path: Path, beside: _Beside) -> None:
        self._path = path
        self._beside = beside
        self._writer: pq.ParquetWriter | None = None

    def add(self, nuclei: Nuclei) -> None:
        self._beside.do(self._write, nuclei)

    def _write(self, nuclei: Nuclei) -> None:
        table = to_table(nuclei)
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema, compression="zstd")
        self._writer.write_table(table)

    def close(self) -> None:
        self._beside.wait()
        if self._writer is None:
            self._write(Nuclei.concatenate([]))
        assert self._writer is not None
        self._writer.close()


class _Chunks:
    """Spreads nuclei over GeoJSON files of at most NUCLEI_PER_FILE."""

    def __init__(
        self, folder: Path, object_type: str, config: ResultConfig, beside: _Beside
    ) -> None:
        self.names: list[str] = []
        self._folder = folder
        self._properties = json.dumps(
            {
                "objectType": object_type,
                "classification": {"name": config.class_name, "color": list(config.color)},
            },
            ensure_ascii=False,
        )[:-1]
        self._file: gzip.GzipFile | None = None
        self._written = 0
        self._beside = beside

    def add(self, nuclei: Nuclei) -> None:
        features = _features(nuclei, self._properties)
        while len(features):
            if self._file is None or self._written == NUCLEI_PER_FILE:
                self._file = self._next_file()
            now = features[: NUCLEI_PER_FILE - self._written]
            features = features[len(now) :]
            self._compress((b",\n" if self._written else b"\n") + _joined(now, ",\n"))
            self._written += len(now)

    def close(self) -> None:
        if self._file is not None:
            self._compress(b"\n]}\n")
            self._beside.wait()
            self._file.close()
            self._file = None

    def _compress(self, text: bytes) -> None:
        """Beside the making of what comes next, which takes as long."""
        assert self._file is not None
        self._beside.do(self._file.write, text)

    def _next_file(self) -> gzip.GzipFile:
        self.close()
        name = f"nuclei-{len(self.names):03d}.geojson.gz"
        # Without a time stamp, equal nuclei make equal files.
        file = gzip.GzipFile(self._folder / name, "wb", compresslevel=1, mtime=0)
        file.write(b'{"type": "FeatureCollection", "features": [')
        self.names.append(name)
        self._written = 0
        return file


def _features(nuclei: Nuclei, properties: str) -> pa.StringArray:
    """One GeoJSON Feature a nucleus (N,), as QuPath 0.4 and later read them.

    Column by column, by Arrow, which does not hold Python's lock meanwhile.
    """
    measured: list[pa.Array | str] = []
    for name, values in nuclei.measurements.items():
        comma = ", " if measured else ""
        measured += [f"{comma}{json.dumps(name, ensure_ascii=False)}: "]
        measured += [pa.array(values).cast(pa.string())]
    return pc.binary_join_element_wise(
        *('{"type": "Feature", "id": "', pa.array(nuclei.uuids.tolist(), pa.string())),
        *('", "geometry": ', *_geometries(nuclei.polygons)),
        *(f', "properties": {properties}, "measurements": {{', *measured, "}}}", ""),
    )


def _geometries(polygons: Polygons) -> list[pa.StringArray | str]:
    """What, joined, are polygons (N,) as GeoJSON; by shapely where one has a hole, or parts."""
    plain = shapely.get_type_id(polygons) == shapely.GeometryType.POLYGON
    if not plain.all() or shapely.get_num_interior_rings(polygons).any():
        return [pa.array(shapely.to_geojson(polygons).tolist(), pa.string())]
    xy, polygon = shapely.get_coordinates(polygons, return_index=True)
    x, y = (pa.array(np.ascontiguousarray(axis)).cast(pa.string()) for axis in xy.T)
    first = np.searchsorted(polygon, np.arange(len(polygons) + 1)).astype(np.int32)
    points = pa.ListArray.from_arrays(first, pc.binary_join_element_wise(x, y, ","))
    return ['{"type": "Polygon", "coordinates": [[[', pc.binary_join(points, "],["), "]]]}"]


def _joined(texts: pa.StringArray, between: str) -> bytes:
    """Texts (N,) as one, in UTF-8."""
    (whole,) = pc.binary_join(pa.ListArray.from_arrays([0, len(texts)], texts), between)
    return bytes(whole.as_buffer())
