"""The tiles that cover an image's tissue."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Box, Tile
from patchcl_qupath.slides.tissue import part_of_region


def plan(
    shape: tuple[int, int],
    tissue: NDArray[np.bool_],
    tissue_px: int,
    tile_px: int,
    halo_px: int,
    region: shapely.Geometry | None = None,
    divisor: int = 1,
    beside_px: int = 0,
) -> list[Tile]:
    """The tiles with tissue, row by row, of a working grid of ``shape`` (rows, cols).

    The grid is divided evenly into write boxes of at most ``tile_px`` a side, so that no sliver is
    left over. Each is cropped to its part of ``region`` (polygons on the grid), if there is one,
    with ``beside_px`` around that, and to its tissue; those without are left out. A px of
    ``tissue`` is ``tissue_px`` grid px wide. Read boxes are write boxes grown by ``halo_px``, and
    begin and end at multiples of ``divisor``, or at the end of the grid.
    """
    tiles = []
    for row, rows in enumerate(pairwise(_cuts(shape[0], tile_px))):
        for col, cols in enumerate(pairwise(_cuts(shape[1], tile_px))):
            whole = Box(rows[0], cols[0], rows[1], cols[1])
            part = whole if region is None else _near(region, whole, beside_px, shape)
            write = part and _cropped(part, tissue, tissue_px)
            if write is not None:
                read = write.grow(halo_px, shape).aligned(divisor, shape)
                tiles.append(Tile(row=row, col=col, read=read, write=write))
    return tiles


def largest_first(tiles: Sequence[Tile]) -> list[Tile]:
    """Tiles in the order in which to work on them: by the area that is read.

    Small ones in the end keep all workers busy for longer. And the memory that was taken for the
    first ones holds those that follow: where tiles grow, a run takes a sixth more.
    """
    return sorted(tiles, key=lambda tile: -math.prod(tile.read.shape))


def _cropped(box: Box, tissue: NDArray[np.bool_], tissue_px: int) -> Box | None:
    """The smallest part of a box with all its tissue; None where there is none."""
    row, col = box.row0 // tissue_px, box.col0 // tissue_px
    within = tissue[row : -(-box.row1 // tissue_px), col : -(-box.col1 // tissue_px)]
    rows, cols = np.flatnonzero(within.any(axis=1)), np.flatnonzero(within.any(axis=0))
    if len(rows) == 0:
        return None
    return Box(
        max(box.row0, (row + int(rows[0])) * tissue_px),
        max(box.col0, (col + int(cols[0])) * tissue_px),
        min(box.row1, (row + int(rows[-1]) + 1) * tissue_px),
        min(box.col1, (col + int(cols[-1]) + 1) * tissue_px),
    )


def _near(region: shapely.Geometry, box: Box, beside_px: int, shape: tuple[int, int]) -> Box | None:
    """The smallest part of a box with all that lies in a region, or up to so many px beside it.

    By boxes: a buffer around what a person painted with the brush takes half a minute.
    """
    part = bounds(region, box.grow(beside_px, shape))
    return part and part.grow(beside_px, shape).common(box)


def bounds(region: shapely.Geometry, box: Box) -> Box | None:
    """The smallest part of a box with all its part of a region; None where there is none."""
    part = part_of_region(region, box)
    if not part.area:
        return None
    x0, y0, x1, y1 = part.bounds
    return Box(math.floor(y0), math.floor(x0), math.ceil(y1), math.ceil(x1))


def _cuts(length: int, tile_px: int) -> list[int]:
    """The edges of equal parts of [0, length), of at most ``tile_px`` each."""
    count = -(-length // tile_px)
    return [i * length // count for i in range(count + 1)]
