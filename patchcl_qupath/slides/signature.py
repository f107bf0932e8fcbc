"""How a slide is known again: by the size and time of its files, and a sample of their content.

Size and time alone do not do: archives keep times in steps of two seconds, and uncompressed images
of equal dimensions have equal sizes. Nor does the file that a project names: of MRXS, VMS and
DICOM, other files beside it hold the pixels, and some of them of an OME-TIFF of several files.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from patchcl_qupath.slides.ome_files import SUFFIXES, named_files
from patchcl_qupath.storage.files import content_file, read_json
from patchcl_qupath.storage.records import FileSignature

_BLOCK_BYTES = 4096
_RECALL_ON_DATA_ACCESS = 0x400000  # FILE_ATTRIBUTE_ of Windows
_DATALESS = 0x40000000  # SF_ of macOS
_BLOCKS = 16  # of a file: to read them takes 0.3 ms, or as long as a disk seeks them
_CHUNKS = 64  # of an OME-Zarr, or files of another slide: 3 ms
_BLOCKS_OF_CHUNK = 4
_HEAD_BYTES = 65536  # of a text or header: OpenSlide reads no more of a VMS

_NAMED_IN_VMS = re.compile(
    rb"^(?:Image|Map)File[^=\n]*=[ \t]*([^\r\n\0/\\]+?)[ \t]*\r?$", re.MULTILINE
)
_DICOM_SERIES = re.compile(rb"\x20\x00\x0e\x00.{4}([\d.]+)", re.DOTALL)  # SeriesInstanceUID


def slide_signature(path: Path) -> FileSignature:
    """Size and time of a slide's files, and a sample of them.

    Of an OME-Zarr, these are size and time of its metadata, and a sample of some of its chunks:
    who changes pixels need not write the metadata anew. Raises OSError.
    """
    return _with_sample(path, slide_files(path))


def signature_without_download(path: Path) -> FileSignature:
    """The same, but without a sample where files are in a cloud alone (OneDrive, iCloud): to read a
    block of one downloads all of it, gigabytes, for a look at what changed. Raises OSError."""
    files = slide_files(path)
    if any(map(_is_in_cloud_alone, files.values())):
        return _size_and_time(files)
    return _with_sample(path, files)


def _is_in_cloud_alone(found: os.stat_result) -> bool:
    """What Windows and macOS say of a file of which they have the name, size and time."""
    return bool(
        getattr(found, "st_file_attributes", 0) & _RECALL_ON_DATA_ACCESS
        or getattr(found, "st_flags", 0) & _DATALESS
    )


def _with_sample(path: Path, files: dict[Path, os.stat_result]) -> FileSignature:
    sample = sample_of_chunks(path) if path.is_dir() else _checksum_of_files([*files])
    return msgspec.structs.replace(_size_and_time(files), sample=sample)


def quick_signature(path: Path) -> FileSignature:
    """Size and time of a slide's files alone. Raises OSError."""
    return _size_and_time(slide_files(path))


def slide_files(path: Path) -> dict[Path, os.stat_result]:
    """The files that hold a slide, its own first, and what the system tells of each.

    Of an OME-Zarr, it is its metadata. Raises OSError for a slide that is missing; what else is
    missing is left out.
    """
    own = content_file(path)
    files = {own: own.stat()}
    for other in _others(path):
        with suppress(FileNotFoundError, NotADirectoryError):
            files[other] = other.stat()
    return files


def _others(path: Path) -> Iterable[Path]:
    """The files that hold pixels of a slide, where its own does not hold them all."""
    suffix = path.suffix.lower()
    if suffix == ".mrxs":
        inside = _inside(path.with_suffix(""))
        return [file for file in inside if file.suffix == ".dat" or file.name == "Slidedat.ini"]
    if suffix in (".vms", ".vmu"):
        return [path.parent / os.fsdecode(name) for name in _NAMED_IN_VMS.findall(_head(path))]
    if suffix == ".dcm":
        series = _series_of(path)
        return [file for file in _inside(path.parent) if series and _series_of(file) == series]
    if suffix in SUFFIXES and path.is_file():
        return named_files(path)
    return ()


def _inside(folder: Path) -> list[Path]:
    """What a folder holds, if it is there."""
    with suppress(FileNotFoundError, NotADirectoryError):
        return sorted(folder.iterdir())
    return []


def _series_of(path: Path) -> bytes | None:
    """The DICOM series that a file belongs to; None for a file that has none, or is unreadable."""
    if path.suffix.lower() != ".dcm":
        return None
    try:
        return _series(path, path.stat().st_mtime_ns)
    except OSError:  # it may be of another slide
        return None


@lru_cache(maxsize=4096)  # a folder may hold many slides, and each asks for all files
def _series(path: Path, modified_ns: int) -> bytes | None:
    found = _DICOM_SERIES.search(_head(path))
    return found and found[1]


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(_HEAD_BYTES)


def _size_and_time(files: dict[Path, os.stat_result]) -> FileSignature:
    """The size of all files together, and the time of the last one."""
    return FileSignature(
        bytes=sum(stat.st_size for stat in files.values()),
        modified_ns=max(stat.st_mtime_ns for stat in files.values()),
    )


def _checksum_of_files(paths: Sequence[Path]) -> int:
    """The CRC-32 of some of the content of a slide's own file, the first, and of some others."""
    own, *others = paths
    checksum = _checksum(own, _BLOCKS)
    for number in _spread(min(_CHUNKS, len(others)), len(others) - 1):
        checksum = _checksum(others[number], _BLOCKS_OF_CHUNK, checksum)
    return checksum


def _checksum(path: Path, blocks: int, checksum: int = 0) -> int:
    """The CRC-32 of a file's size and some of its blocks, the first and the last one among them.

    It goes on from a ``checksum`` of others.
    """
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        checksum = zlib.crc32(b"%d" % size, checksum)
        for first in _spread(blocks, max(0, size - _BLOCK_BYTES)):
            file.seek(first)
            checksum = zlib.crc32(file.read(_BLOCK_BYTES), checksum)
    return checksum


def sample_of_chunks(folder: Path) -> int | None:
    """The CRC-32 of some chunks of an OME-Zarr; None where its metadata are none, and of a file.

    Raises OSError.
    """
    if not folder.is_dir():
        return None
    try:
        paths = [path for level in _finest_levels(folder) for path in _some_chunks(level)]
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None
    checksum = 0
    for path in paths:
        try:
            checksum = _checksum(path, _BLOCKS_OF_CHUNK, checksum)
        except (FileNotFoundError, NotADirectoryError):
            checksum = zlib.crc32(b"missing", checksum)
    return checksum


def _finest_levels(folder: Path) -> list[Path]:
    """The finest level of each image of an OME-Zarr. Raises any exception for other metadata.

    Which of several is read, the project says, or the file. Metadata are read here without zarr: to
    import it takes longer than ``status`` has.
    """
    metadata = _metadata(folder)
    images = [folder] if "multiscales" in metadata else _images(folder)
    levels = [
        image / str(found["multiscales"][0]["datasets"][0]["path"])
        for image in images
        if "multiscales" in (found := _metadata(image))
    ]
    if not levels:
        raise LookupError("no multiscales")
    return levels


def _images(folder: Path) -> list[Path]:
    """Where bioformats2raw has the images of a folder: those it lists, else those with a number."""
    listed = _metadata(folder / "OME").get("series")
    return [folder / str(name) for name in listed or range(len(_inside(folder)))]


def _metadata(group: Path) -> dict[str, Any]:
    """The OME metadata of a group; empty where it has none."""
    attributes = read_json(group / ".zattrs") or (read_json(group / "zarr.json") or {}).get(
        "attributes", {}
    )
    found: dict[str, Any] = attributes.get("ome", attributes)
    return found


def _some_chunks(level: Path) -> list[Path]:
    """The files of some chunks, or shards, of a level, evenly spaced; some may be missing.

    Raises any exception for metadata of another form.
    """
    array = read_json(level / ".zarray")
    if array is not None:
        chunk, prefix, separator = array["chunks"], [], array.get("dimension_separator", ".")
    else:
        array = _json(level / "zarr.json")
        chunk = array["chunk_grid"]["configuration"]["chunk_shape"]
        keys = array["chunk_key_encoding"]
        prefix = ["c"] if keys["name"] == "default" else []
        separator = keys.get("configuration", {}).get("separator", "/" if prefix else ".")
    counts = [-(-n // side) for n, side in zip(array["shape"], chunk, strict=True)]
    total = math.prod(counts)
    places = (np.unravel_index(n, counts) for n in _spread(min(_CHUNKS, total), total - 1))
    return [level / separator.join([*prefix, *map(str, map(int, place))]) for place in places]


def _json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises LookupError without any."""
    content = read_json(path)
    if content is None:
        raise LookupError(path)
    return content


def _spread(count: int, last: int) -> Iterator[int]:
    """Numbers from 0 to ``last``, ``count`` of them, evenly spaced."""
    return (last * n // max(1, count - 1) for n in range(count))
