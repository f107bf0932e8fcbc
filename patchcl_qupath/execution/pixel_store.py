"""The pixels of tiles, from the workers that find nuclei to those that grow them into cells.

Reading a slide a second time takes as long as growing does. A tile is a file of 3 bytes for each
px, about 12 MB for each mm² at 0.5 µm per px, until the image has its cells. It is a short cut, and
nothing else: where a file is not there, the slide is read. So it is where one does not have its own
checksum, as zeros do, which a power failure may leave of a file that nobody waits for.
"""

from __future__ import annotations

import math
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Box, Tile
from patchcl_qupath.errors import StorageError
from patchcl_qupath.storage.files import atomic_write, digest, remove_folder

_LEFT_FREE = 2**30  # bytes of a disk, beside as much again as is needed
_CHECKSUM_BYTES = 4  # at the end of a file; 1.5 ms for a tile of 1,900 x 1,900 px


@dataclass(frozen=True)
class PixelStore:
    """The pixels of one image's tiles: a folder, which a worker may see or not."""

    folder: Path

    @classmethod
    def of(cls, folder: Path, fingerprint: dict[str, Any]) -> PixelStore:
        """That in a folder of tiles, for the pixels of one slide and no other."""
        return cls(folder / f"pixels-{digest(fingerprint)[:12]}")

    @classmethod
    def all_in(cls, folders: Iterable[Path]) -> Iterator[PixelStore]:
        """Those in folders of tiles, for the pixels of any slide."""
        return (cls(found) for folder in folders for found in folder.glob("pixels-*"))

    def make_room(self, tiles: Sequence[Tile]) -> None:
        """Make the folder, if the disk has room for the pixels of tiles."""
        with suppress(OSError):
            needed = 3 * sum(math.prod(tile.read.shape) for tile in tiles)
            if shutil.disk_usage(self.folder.parent).free > 2 * needed + _LEFT_FREE:
                self.folder.mkdir(exist_ok=True)

    def keep(self, tile: Tile, rgb: NDArray[np.uint8]) -> None:
        """Keep the pixels (H, W, 3) of a tile's read box, if that is possible."""
        if self.folder.is_dir():
            pixels = np.ascontiguousarray(rgb).data
            with (
                suppress(StorageError),
                atomic_write(self._path(tile), durable=False) as temporary,
                temporary.open("wb") as file,
            ):
                file.write(pixels)
                file.write(_checksum(pixels))

    def read(self, tile: Tile, box: Box) -> NDArray[np.uint8] | None:
        """The pixels (H, W, 3) of a box, if those of the tile are here and hold it."""
        rows, cols = tile.read.shape
        inner = box.within(tile.read)
        if min(inner[0].start, inner[1].start) < 0 or inner[0].stop > rows or inner[1].stop > cols:
            return None
        try:
            content = np.fromfile(self._path(tile), np.uint8)
        except OSError:
            return None
        pixels, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
        if pixels.size != rows * cols * 3 or checksum.tobytes() != _checksum(pixels.data):
            return None
        return np.ascontiguousarray(pixels.reshape(rows, cols, 3)[inner])

    def forget(self, tile: Tile) -> None:
        """Remove the pixels of a tile: those of others find their memory taken."""
        with suppress(OSError):
            self._path(tile).unlink()

    def remove(self) -> None:
        """Remove all pixels."""
        with suppress(StorageError):
            remove_folder(self.folder)

    def _path(self, tile: Tile) -> Path:
        return self.folder / f"{tile.name}.rgb"


def _checksum(pixels: memoryview) -> bytes:
    return zlib.crc32(pixels).to_bytes(_CHECKSUM_BYTES)
