"""Ways to read a tile of a slide: time, and how far the pixels differ.

    python benchmarks/reading.py [--slide FILE] [--tiles N] [--rounds N]

Reads tiles of 1,100 working px at half the resolution of level 0, in turn: with each tile of the
file decoded at its size and averaged; decoded at half its size, as the program does where it can,
with simplejpeg if that is installed, and without; and through tifffile's view for zarr, as version
0.1 did. Times are processor time, medians over rounds. Without a slide, one with JPEG tiles is
generated as in ``speed.py``.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import zarr
from numpy.typing import NDArray
from tifffile import TiffFile

from patchcl_qupath.datatypes import Box
from patchcl_qupath.slides import half_jpeg
from patchcl_qupath.slides.level import Level
from patchcl_qupath.slides.level_grid import LevelGrid
from patchcl_qupath.slides.pyramid import open_pyramid
from speed import write_mosaic

SIDE = 1100
Read = Callable[[Box], NDArray[np.uint8]]


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
        compare(slide, options.tiles, options.rounds)


def compare(slide: Path, tiles: int, rounds: int) -> None:
    """All ways in turn."""
    level = open_pyramid(slide).levels[0]
    shape = level.pixels.shape[0] // 2, level.pixels.shape[1] // 2
    ways: dict[str, Read] = {"at full size": grid(level, shape).read}
    if level.half is not None:
        ways["at half the size"] = grid(level.half, shape).read
    else:
        print("its tiles cannot be decoded at half their size")
    if level.half is not None and half_jpeg.simplejpeg is not None:
        ways["at half the size, without simplejpeg"] = without_simplejpeg(ways["at half the size"])
    ways["through zarr"] = grid(Level(through_zarr(slide), level.chunk, level.scale), shape).read
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


def grid(level: Level, shape: tuple[int, int]) -> LevelGrid:
    """The working grid over a level."""
    return LevelGrid.of("slide", level=level, shape=shape, downsample=(2.0, 2.0), origin=(0, 0))


def without_simplejpeg(read: Read) -> Read:
    """A way of reading where simplejpeg is not installed."""

    def reading(box: Box) -> NDArray[np.uint8]:
        with mock.patch.object(half_jpeg, "simplejpeg", None):
            return read(box)

    return reading


def through_zarr(slide: Path) -> Any:
    """The finest level, as tifffile shows it to zarr."""
    with TiffFile(slide) as tiff:
        store = tiff.series[0].aszarr(maxworkers=2)
    opened = zarr.open(store, mode="r")
    return opened if isinstance(opened, zarr.Array) else opened["0"]


if __name__ == "__main__":
    main()
