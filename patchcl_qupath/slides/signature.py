"""How a slide's file is known again: by its size, its time, and a sample of its content.

Size and time alone do not do: archives keep times in steps of two seconds, and uncompressed images
of equal dimensions have equal sizes.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from patchcl_qupath.storage.files import read_json
from patchcl_qupath.storage.records import FileSignature, file_signature

_BLOCK_BYTES = 4096
_BLOCKS = 16  # of a file: to read them takes 0.3 ms, or as long as a disk seeks them
_CHUNKS = 64  # of an OME-Zarr: 3 ms
_BLOCKS_OF_CHUNK = 4


def slide_signature(path: Path) -> FileSignature:
    """Size and time of a slide's file, and a sample of it.

    Of an OME-Zarr, these are size and time of its metadata, and a sample of some of its chunks:
    who changes pixels need not write the metadata anew. Raises OSError.
    """
    signature = file_signature(path)
    sample = _checksum_of_chunks(path) if path.is_dir() else _checksum(path, _BLOCKS)
    return msgspec.structs.replace(signature, sample=sample)


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


def _checksum_of_chunks(folder: Path) -> int | None:
    """The CRC-32 of some chunks of an OME-Zarr; None where its metadata are none."""
    try:
        paths = _some_chunks(_finest_level(folder))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None
    checksum = 0
    for path in paths:
        try:
            checksum = _checksum(path, _BLOCKS_OF_CHUNK, checksum)
        except (FileNotFoundError, NotADirectoryError):
            checksum = zlib.crc32(b"missing", checksum)
    return checksum


def _finest_level(folder: Path) -> Path:
    """The finest level of an OME-Zarr's first image. Raises any exception for other metadata.

    Metadata are read here without zarr: to import it takes longer than ``status`` has.
    """
    for image in (folder, folder / "0"):  # in which bioformats2raw has it
        attributes = read_json(image / ".zattrs") or _json(image / "zarr.json")["attributes"]
        metadata = attributes.get("ome", attributes)
        if "multiscales" in metadata:
            return image / str(metadata["multiscales"][0]["datasets"][0]["path"])
    raise LookupError("no multiscales")


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
