"""How a slide's file is known again: by its size, its time, and a sample of its content.

Size and time alone do not do: archives keep times in steps of two seconds, and uncompressed images
of equal dimensions have equal sizes.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

from patchcl_qupath.storage.records import FileSignature, file_signature

_BLOCK_BYTES = 4096
_BLOCKS = 16  # of a file: it takes 0.3 ms, or as long as a disk seeks them


def slide_signature(path: Path, *, with_sample: bool = True) -> FileSignature:
    """Size and time of a slide's file, and a sample of it; of an OME-Zarr, those of its metadata.

    Without the sample it is one look at the file, as between two tiles. Raises OSError.
    """
    signature = file_signature(path)
    if not with_sample or path.is_dir():
        return signature
    return msgspec.structs.replace(signature, sample=_checksum(path, _BLOCKS))


def _checksum(path: Path, blocks: int) -> int:
    """The CRC-32 of some blocks of a file, the first and the last one among them."""
    checksum = 0
    with path.open("rb") as file:
        last = max(0, file.seek(0, os.SEEK_END) - _BLOCK_BYTES)
        for first in _spread(blocks, last):
            file.seek(first)
            checksum = zlib.crc32(file.read(_BLOCK_BYTES), checksum)
    return checksum


def _spread(count: int, last: int) -> Iterator[int]:
    """Numbers from 0 to ``last``, ``count`` of them, evenly spaced."""
    return (last * n // (count - 1) for n in range(count))
