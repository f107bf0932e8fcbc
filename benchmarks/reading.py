"""Ways to read a tile of a slide: time, and how far the pixels differ.

    python benchmarks/reading.py [--slide FILE] [--tiles N] [--rounds N]

Reads tiles of 1,100 working px at half the resolution of level 0, in turn: as the program does,
each JPEG decoded where it is needed and averaged; through tifffile's view for zarr, as version 0.1
did; and with each JPEG decoded at half its size, by libjpeg-turbo's scaled decoding in simplejpeg,
if that is installed, else in Pillow, which has an overhead. Times are processor time, medians over
rounds. Without a slide, one is generated as in ``speed.py``.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from PIL import Image
from tifffile import TiffFile

from patchcl_qupath.datatypes import Box
from patchcl_qupath.slides.level import Level
from patchcl_qupath.slides.level_grid import LevelGrid
from patchcl_qupath.slides.tiled_page import TiledPage, tiled_pages
from speed import write_mosaic

simplejpeg: Any
try:
    simplejpeg = import_module("simplejpeg")
except ImportError:
    simplejpeg = None

SIDE = 1100
HALF = 2
# A marker that names the colours of a JPEG, by TIFF's photometric interpretation: RGB, YCbCr.
ADOBE = {
    kind: b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([how])
    for kind, how in ((2, 0), (6, 1))
}


class HalfPage:
    """A page of JPEG tiles, each decoded at half its size."""

    def __init__(self, page: TiledPage) -> None:
        self.page = page
        rows, cols, _ = page.shape
        self.shape = (rows // HALF, cols // HALF, 3)

    def __getitem__(self, at: tuple[slice, slice]) -> NDArray[np.uint8]:
        rows, cols = at
        height, width = (n // HALF for n in self.page.chunks[:2])
        across = -(-self.page.shape[1] // self.page.chunks[1])
        first = rows.start // height, cols.start // width
        last = -(-rows.stop // height), -(-cols.stop // width)
        whole = np.concatenate(
            [
                np.concatenate(
                    [self._decoded(i * across + j) for j in range(first[1], last[1])], axis=1
                )
                for i in range(first[0], last[0])
            ]
        )
        top, left = first[0] * height, first[1] * width
        return whole[rows.start - top : rows.stop - top, cols.start - left : cols.stop - left]

    def _decoded(self, index: int) -> NDArray[np.uint8]:
        """A tile; the tables that all of them share are put before it."""
        page: Any = self.page.page
        data = self.page.store.read(page.dataoffsets[index], page.databytecounts[index])
        tables = page.jpegtables[2:-2] if page.jpegtables else b""
        data = data[:2] + ADOBE[int(page.photometric)] + tables + data[2:]
        if simplejpeg is not None:
            least = [n // HALF for n in self.page.chunks[:2]]
            small = simplejpeg.decode_jpeg(
                data, "RGB", min_height=least[0], min_width=least[1], min_factor=1
            )
            return np.asarray(small)
        with Image.open(io.BytesIO(data)) as image:
            image.draft("RGB", (image.width // HALF, image.height // HALF))
            return np.asarray(image)


def grid(pixels: Any, chunk: int, scale: float, shape: tuple[int, int]) -> LevelGrid:
    """The working grid over a level of ``scale``."""
    level = Level(pixels, (chunk, chunk), (scale, scale))
    return LevelGrid.of("slide", level=level, shape=shape, downsample=(2.0, 2.0), origin=(0, 0))


def main() -> None:
    """Print times and differences."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--slide", type=Path)
    parser.add_argument("--tiles", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        slide = options.slide
        if slide is None:
            slide = Path(folder) / "slide.tif"
            write_mosaic(slide, 6000)
        with TiffFile(slide) as tiff:
            compare(tiff, options.tiles, options.rounds)


def compare(tiff: TiffFile, tiles: int, rounds: int) -> None:
    """All ways in turn."""
    series = tiff.series[0]
    pages = tiled_pages(series)
    if not pages:
        raise SystemExit("it has no tiles")
    page = pages[0]
    opened = zarr.open(series.aszarr(maxworkers=2), mode="r")
    through_zarr = opened if isinstance(opened, zarr.Array) else opened["0"]
    shape, chunk = (page.shape[0] // 2, page.shape[1] // 2), page.chunks[0]
    ways: dict[str, Callable[[Box], NDArray[np.uint8]]] = {
        "as the program reads": grid(page, chunk, 1.0, shape).read,
        "through zarr": grid(through_zarr, chunk, 1.0, shape).read,
        "at half the size": grid(HalfPage(page), chunk // 2, 2.0, shape).read,
    }
    rng = np.random.default_rng(0)
    side = min(SIDE, *shape)
    corners = [rng.integers(0, [n - side + 1 for n in shape]).tolist() for _ in range(tiles)]
    boxes = [Box(row, col, row + side, col + side) for row, col in corners]
    found = {name: [read(box).astype(int) for box in boxes] for name, read in ways.items()}
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, read in ways.items():
            began = time.process_time()
            for box in boxes:
                read(box)
            took[name].append((time.process_time() - began) / tiles)
    first, *_ = ways
    exact = np.stack(found[first])
    for name in ways:
        seconds, difference = statistics.median(took[name]), np.abs(np.stack(found[name]) - exact)
        ratio = seconds / statistics.median(took[first])
        print(
            f"{name}: {seconds * 1e3:.1f} ms a tile, {ratio:.2f} of the first; grey values differ "
            f"by {difference.mean():.2f} in the mean, "
            f"{np.percentile(difference, 99.9):.0f} in one of 1,000, {difference.max()} at most"
        )


if __name__ == "__main__":
    main()
