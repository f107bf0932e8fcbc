"""An image's nuclei on disk: GeoJSON that QuPath imports, and GeoParquet for everything else.

nuclei-000.geojson.gz ...   at most 50,000 nuclei each, since QuPath parses a file whole
nuclei.parquet              all of them, with measurements
result.json                 what made them; names the GeoJSON files to import
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import shapely

from patchcl_qupath.config import ResultConfig
from patchcl_qupath.datatypes import Nuclei
from patchcl_qupath.storage import replacing, to_table, write_json

NUCLEI_PER_FILE = 50_000


def write_results(
    folder: Path, parts: Iterable[Nuclei], count: int, config: ResultConfig, about: dict[str, Any]
) -> None:
    """Write one image's nuclei, level 0, to ``folder``, in place of what was there.

    ``parts`` are taken one at a time and not kept, so memory does not grow with the slide;
    ``count`` is their total. ``about`` goes into ``result.json`` as it is.
    """
    object_type = config.kind(count)
    with replacing(folder) as new, _Beside() as compressing, _Beside() as tabulating:
        new.mkdir()
        chunks = _Chunks(new, object_type, config, compressing)
        table = _Table(new / "nuclei.parquet", tabulating)
        for part in parts:
            table.add(part)
            chunks.add(part)
        table.close()
        chunks.close()
        write_json(
            new / "result.json",
            {**about, "nuclei": count, "object_type": object_type, "files": chunks.names},
        )


def write_removed(folder: Path) -> None:
    """Leave in ``folder`` only word that its nuclei were removed, for the import script."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with replacing(folder) as new:
        new.mkdir()
        write_json(new / "result.json", {"removed": now, "nuclei": 0, "files": []})


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
        features = list(_features(nuclei, self._properties))
        while features:
            if self._file is None or self._written == NUCLEI_PER_FILE:
                self._file = self._next_file()
            now = features[: NUCLEI_PER_FILE - self._written]
            del features[: len(now)]
            text = ("," if self._written else "") + "\n" + ",\n".join(now)
            self._compress(text)
            self._written += len(now)

    def close(self) -> None:
        if self._file is not None:
            self._compress("\n]}\n")
            self._beside.wait()
            self._file.close()
            self._file = None

    def _compress(self, text: str) -> None:
        """Beside the making of what comes next, which takes as long."""
        assert self._file is not None
        self._beside.do(self._file.write, text.encode())

    def _next_file(self) -> gzip.GzipFile:
        self.close()
        name = f"nuclei-{len(self.names):03d}.geojson.gz"
        # Without a time stamp, equal nuclei make equal files.
        file = gzip.GzipFile(self._folder / name, "wb", compresslevel=1, mtime=0)
        file.write(b'{"type": "FeatureCollection", "features": [')
        self.names.append(name)
        self._written = 0
        return file


def _features(nuclei: Nuclei, properties: str) -> Iterator[str]:
    """One GeoJSON Feature a nucleus, as QuPath 0.4 and later read them."""
    quoted = (json.dumps(name, ensure_ascii=False) for name in nuclei.measurements)
    measured = ", ".join(f"{name.replace('%', '%%')}: %.6g" for name in quoted)  # for a whole row
    rows = zip(*(values.tolist() for values in nuclei.measurements.values()), strict=True)
    geometries = shapely.to_geojson(nuclei.polygons)
    for uuid, geometry, row in zip(nuclei.uuids.tolist(), geometries, rows, strict=True):
        yield (
            f'{{"type": "Feature", "id": "{uuid}", "geometry": {geometry}, '
            f'"properties": {properties}, "measurements": {{{measured % row}}}}}}}'
        )
