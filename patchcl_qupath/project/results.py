"""The results of an image on disk: GeoJSON for QuPath, and GeoParquet for other programs.

nuclei-000.geojson.gz ...   at most 50,000 nuclei each, since QuPath reads a whole file at once
nuclei.parquet              all nuclei, with measurements
result.json                 their provenance, and the names of the GeoJSON files
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from isal import isal_zlib
from numpy.typing import NDArray

from patchcl_qupath.config import CELL, ResultConfig, class_colour
from patchcl_qupath.datatypes import Nuclei, Polygons
from patchcl_qupath.project.coordinates import points_text
from patchcl_qupath.project.names import in_qupath, is_compartment_first
from patchcl_qupath.storage.files import atomic_write
from patchcl_qupath.storage.layout import NUCLEI, RESULT
from patchcl_qupath.storage.parquet import CELL as CELL_COLUMN
from patchcl_qupath.storage.parquet import (
    CLASSIFICATION,
    NOT_MEASURED,
    NUCLEUS,
    Table,
    encoding,
    geo_metadata,
    is_utf8,
    points_of,
    polygons_of,
    to_table,
)
from patchcl_qupath.storage.records import RemovedRecord, ResultRecord, write_record
from patchcl_qupath.timing import utc_now

NUCLEI_PER_FILE = 50_000
_GZIP = 16 + 15  # of zlib: a gzip file, and the largest window


def write_results(
    folder: Path,
    batches: Iterable[Nuclei | Table],
    config: ResultConfig,
    result: ResultRecord,
    qupath_version: str | None = None,
) -> None:
    """Write the nuclei of one image, level 0, to ``folder``, which is replaced as a whole.

    In GeoJSON, measurements have the names of ``qupath_version``; of a new one where it is None.
    ``batches`` of nuclei, or of tables of them, are read one at a time and not kept, so memory does
    not grow with the slide.
    ``result`` with the names of the written files becomes ``result.json``. Raises StorageError.
    """
    with (
        atomic_write(folder) as new,
        _Background() as compressing,
        _Background() as formatting,
        _Background() as tabulating,
    ):
        new.mkdir()
        chunks = _Chunks(
            folder=new,
            object_type=result.object_type,
            config=config,
            background=compressing,
            qupath_version=qupath_version,
        )
        table = _Table(new / NUCLEI, tabulating)
        try:
            for batch in batches:
                nuclei = to_table(batch) if isinstance(batch, Nuclei) else batch
                table.add(nuclei)
                formatting.start(chunks.add, nuclei)
            formatting.wait()
            table.finish()
            chunks.finish()
        finally:  # Windows removes no folder with a file that is open
            for background in (formatting, tabulating, compressing):
                background.shutdown()
            table.close()
            chunks.close()
        written = msgspec.structs.replace(
            result,
            files=tuple(chunks.names),
            is_compartment_first=is_compartment_first(qupath_version),
        )
        write_record(new / RESULT, written)


def write_removed(folder: Path) -> None:
    """Replace ``folder`` by a record that its nuclei were removed, for the import script."""
    now = utc_now()
    with atomic_write(folder) as new:
        new.mkdir()
        write_record(new / RESULT, RemovedRecord(removed=now))


class _Background(ThreadPoolExecutor):
    """Runs one call at a time in its own thread; ``start`` waits for the one before."""

    def __init__(self) -> None:
        super().__init__(1)
        self._running = self.submit(int)  # a call that does nothing

    def start(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Start a call when the one before has ended. Raises the error of that one."""
        self.wait()
        self._running = self.submit(call, *arguments)

    def wait(self) -> None:
        """Wait until no call runs. Raises the error of the last one."""
        self._running.result()


class _Table:
    """All nuclei as GeoParquet."""

    def __init__(self, path: Path, background: _Background) -> None:
        self._path = path
        self._background = background
        self._file: BinaryIO | None = None  # Arrow takes paths of UTF-8 alone
        self._writer: pq.ParquetWriter | None = None

    def add(self, nuclei: Table) -> None:
        self._background.start(self._write, nuclei)

    def _write(self, nuclei: Table) -> None:
        table = nuclei.replace_schema_metadata(geo_metadata(nuclei.column_names))
        if self._writer is None:
            if not is_utf8(self._path):
                self._file = self._path.open("wb")
            self._writer = pq.ParquetWriter(
                self._file or self._path, table.schema, **encoding(table.column_names)
            )
        self._writer.write_table(table)

    def finish(self) -> None:
        self._background.wait()
        if self._writer is None:
            self._write(to_table(Nuclei(np.empty(0, dtype=object))))
        self.close()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._file is not None:
            self._file.close()


class _Members:
    """A gzip file of a member for each text, in half the time of one.

    Without a time stamp: equal nuclei make equal files.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")

    def write(self, text: bytes | memoryview) -> None:
        # Of levels 0 to 2, the result is the same with and without AVX2 and AVX512.
        self._file.write(isal_zlib.compress(text, level=1, wbits=_GZIP))

    def close(self) -> None:
        self._file.close()


class _Chunks:
    """Spreads nuclei over GeoJSON files of at most NUCLEI_PER_FILE."""

    def __init__(
        self,
        folder: Path,
        object_type: str,
        config: ResultConfig,
        background: _Background,
        qupath_version: str | None,
    ) -> None:
        self.names: list[str] = []
        self._folder = folder
        self._object_type = object_type
        self._config = config
        self._qupath_version = qupath_version
        self._file: _Members | None = None
        self._written = 0
        self._background = background

    def add(self, nuclei: Table) -> None:
        features = _features(
            nuclei,
            self._properties(nuclei),
            as_cells=self._object_type == CELL,
            version=self._qupath_version,
        )
        while len(features):
            if self._file is None or self._written == NUCLEI_PER_FILE:
                self._file = self._next_file()
            chunk = features[: NUCLEI_PER_FILE - self._written]
            features = features[len(chunk) :]
            self._compress(concatenated(chunk)[0 if self._written else len(",\n") :])
            self._written += len(chunk)

    def _properties(self, nuclei: Table) -> str | pa.StringArray:
        """The properties of all nuclei, without the closing bracket, or of each by its class."""
        if CLASSIFICATION not in nuclei.column_names:
            return self._with_class(self._config.class_name)
        classes = nuclei[CLASSIFICATION].cast(pa.string()).combine_chunks().dictionary_encode()
        names = map(self._with_class, classes.dictionary.to_pylist())
        return pa.array([*names], pa.string()).take(classes.indices)

    def _with_class(self, name: str) -> str:
        colour = list(class_colour(name, self._config.color))
        content = {
            "objectType": self._object_type,
            "classification": {"name": name, "color": colour},
        }
        return json.dumps(content, ensure_ascii=False)[:-1]

    def finish(self) -> None:
        if self._file is not None:
            self._compress(b"\n]}\n")
            self._background.wait()
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _compress(self, text: bytes | memoryview) -> None:
        """In the background: formatting the next nuclei takes as long."""
        assert self._file is not None
        self._background.start(self._file.write, text)

    def _next_file(self) -> _Members:
        self.finish()
        name = f"nuclei-{len(self.names):03d}.geojson.gz"
        file = _Members(self._folder / name)
        file.write(b'{"type": "FeatureCollection", "features": [\n')
        self.names.append(name)
        self._written = 0
        return file


def _features(
    nuclei: Table, properties: str | pa.StringArray, *, as_cells: bool, version: str | None
) -> pa.StringArray:
    """The GeoJSON Feature of each nucleus (N,), after a comma, for QuPath 0.4 and later.

    Those of cells have the contour of the cell, and beside it that of the nucleus. Arrow joins them
    column by column, without Python's global lock.
    """
    measured: list[pa.Array | str] = []
    for name in nuclei.column_names:
        if name in NOT_MEASURED:
            continue
        comma = ", " if measured else ""
        label = f"{comma}{json.dumps(in_qupath(name, version), ensure_ascii=False)}: "
        measured += _numbers(label, nuclei[name].combine_chunks())
    outlines = _outlines(nuclei, NUCLEUS)
    if as_cells and CELL_COLUMN in nuclei.column_names:
        outlines = [*_outlines(nuclei, CELL_COLUMN), ', "nucleusGeometry": ', *outlines]
    return pc.binary_join_element_wise(
        *(',\n{"type": "Feature", "id": "', nuclei["id"].combine_chunks()),
        *('", "geometry": ', *outlines),
        *(', "properties": ', properties, ', "measurements": {', *measured, "}}}", ""),
    )


def _outlines(nuclei: Table, column: str) -> list[pa.StringArray | str]:
    """As ``_geometries``, of a column of contours."""
    try:
        return _rings(*points_of(nuclei[column]))
    except ValueError:
        return _geometries(polygons_of(nuclei, column))


def _numbers(label: str, values: pa.FloatArray) -> list[pa.Array | str]:
    """The columns whose concatenation is a label and each value (N,); nothing for NaN, as JSON
    has none. The first measurement of an object has a value: others follow a comma."""
    missing = pc.is_nan(values)
    texts = values.cast(pa.string())
    if not pc.any(missing).as_py():
        return [label, texts]
    labelled = pc.binary_join_element_wise(label, texts, "")
    return [pc.if_else(missing, "", labelled)]


def _geometries(polygons: Polygons) -> list[pa.StringArray | str]:
    """The columns whose concatenation is each polygon (N,) as GeoJSON.

    Shapely formats them if one has a hole, or is a multipolygon.
    """
    plain = shapely.get_type_id(polygons) == shapely.GeometryType.POLYGON
    if not plain.all() or shapely.get_num_interior_rings(polygons).any():
        return [pa.array(shapely.to_geojson(polygons).tolist(), pa.string())]
    xy, polygon = shapely.get_coordinates(polygons, return_index=True)
    return _rings(xy, np.searchsorted(polygon, np.arange(len(polygons) + 1)))


def _rings(xy: NDArray[np.float64], first: NDArray[np.int64]) -> list[pa.StringArray | str]:
    """The same of rings ``xy[first[k] : first[k + 1]]``."""
    text, offsets, is_done = points_text(xy, first)
    if is_done:
        buffers = pa.py_buffer(offsets), pa.py_buffer(text)
        points = pa.StringArray.from_buffers(len(first) - 1, *buffers)
    else:
        x, y = (pa.array(np.ascontiguousarray(axis)).cast(pa.string()) for axis in xy.T)
        pairs = pc.binary_join_element_wise(x, y, ",")
        points = pc.binary_join(pa.ListArray.from_arrays(first.astype(np.int32), pairs), "],[")
    return ['{"type": "Polygon", "coordinates": [[[', points, "]]]}"]


def geojson_polygons(polygons: Polygons) -> pa.StringArray:
    """Polygons (N,) as GeoJSON geometries (N,)."""
    return pc.binary_join_element_wise(*_geometries(polygons), "")


def concatenated(texts: pa.StringArray) -> memoryview:
    """Texts (N,) one after the other, in UTF-8: where Arrow has them, not a copy."""
    _, offsets, content = texts.buffers()
    ends = np.frombuffer(offsets, np.int32)[texts.offset :]
    return memoryview(content)[ends[0] : ends[len(texts)]]
