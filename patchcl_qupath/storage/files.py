"""Files that are there whole or not at all, and nuclei as parquet."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image

from patchcl_qupath.datatypes import Nuclei, Polygons, Survey
from patchcl_qupath.errors import StorageError

_FULL = "make room and run again, finished tiles are kept"
_CLOSED = "copy the project to a folder that you can write to"
_ADVICE = {
    errno.ENOSPC: f"the disk is full: {_FULL}",
    errno.EDQUOT: f"your disk quota is used up: {_FULL}",
    errno.EROFS: f"it is read-only: {_CLOSED}",
    errno.EACCES: f"no permission to write there: {_CLOSED}",
    errno.EPERM: f"no permission to write there: {_CLOSED}",
}


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the operating system says of a failed write into a StorageError with advice."""
    try:
        yield
    except OSError as error:
        advice = _ADVICE.get(error.errno or 0, str(error))
        raise StorageError(f"cannot write {path}: {advice}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it becomes ``path`` when the block ends without an error.

    Works for a file and for a folder. A reader sees the old one or the new one, never a half; for
    a folder there is an instant in which it sees none.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if temporary.is_dir():
                _replace_folder(temporary, path)
            else:
                with temporary.open("rb+") as file:
                    os.fsync(file.fileno())
                temporary.replace(path)
        finally:
            _remove(temporary)


def copy_once(path: Path, other: Path) -> None:
    """Copy a file, unless there is a copy already."""
    if not other.exists():
        with replacing(other) as temporary:
            shutil.copy2(path, temporary)


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left in a folder and those in it."""
    for leftover in [*folder.rglob(".*.partial*")]:
        _remove(leftover)


def check_writable(folder: Path) -> None:
    """Raise StorageError now rather than when there are results to lose."""
    with replacing(folder / "writable") as temporary:
        temporary.touch()
    (folder / "writable").unlink()


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder; raise StorageError where another process holds it.

    The operating system lets go of it when the process ends, however that is. What those before
    left half-written is swept.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except Timeout:
            raise StorageError(
                f"another patchcl-qp is at work in {folder}: wait until it is done, or stop it"
            ) from None
        except NotImplementedError:
            pass  # a file system without locks
    try:
        sweep(folder)
        yield
    finally:
        lock.release()


def _replace_folder(new: Path, path: Path) -> None:
    old = path.with_name(new.name + ".old")
    if path.exists():
        path.replace(old)
    new.replace(path)
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, content: Any, compact: bool = False) -> None:
    """Write JSON in one go, keys in the order given; ``compact`` is for programs only."""
    with replacing(path) as temporary:
        text = json.dumps(content, indent=None if compact else 2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def file_facts(path: Path) -> dict[str, int]:
    """What changes when a file does, but not when it is moved."""
    stat = path.stat()
    return {"bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object of a file; None where there is no such file, or none that holds one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def digest(content: Any) -> str:
    """12 hexadecimal digits that stand for a JSON-like value."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


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


def to_parquet(nuclei: Nuclei, survey: Survey) -> bytes:
    """A tile's nuclei as the content of a parquet file, with its survey in the header."""
    table = to_table(nuclei)
    columns = {name: values.tolist() for name, values in _columns(survey).items()}
    header = table.schema.metadata | {"survey": json.dumps([survey.cell, columns])}
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata(header), sink, compression="zstd")
    return bytes(sink.getvalue())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one go."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def to_jpeg(pixels: NDArray[np.uint8], quality: int) -> bytes:
    """Pixels (H, W, 3), or grey (H, W), as the content of a JPEG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="JPEG", quality=quality, optimize=True)
    return file.getvalue()


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


def _columns(survey: Survey) -> dict[str, NDArray[np.int64]]:
    return {name: values for name, values in vars(survey).items() if name != "cell"}


def read_tile_survey(path: Path) -> Survey:
    """The survey in the header of a tile's file."""
    cell, columns = json.loads(pq.read_schema(path).metadata[b"survey"])
    return Survey(tuple(cell), **{name: np.array(v, np.int64) for name, v in columns.items()})


def write_survey(path: Path, survey: Survey) -> None:
    """Write an image's survey as a parquet file."""
    table = pa.table(_columns(survey)).replace_schema_metadata({"cell": json.dumps(survey.cell)})
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_survey(path: Path) -> Survey:
    """The inverse of ``write_survey``."""
    table = pq.read_table(path)
    columns = {name: table[name].to_numpy() for name in table.column_names}
    return Survey(tuple(json.loads(table.schema.metadata[b"cell"])), **columns)
