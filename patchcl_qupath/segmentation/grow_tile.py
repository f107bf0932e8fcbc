"""What a worker does for cells: grow the nuclei that a tile owns, and measure the cells.

Cells come after all nuclei of an image: one that another tile owns keeps a cell out of its place as
one of the same tile does. The halo of tiles need not hold such neighbours, which would take long.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.config import CellConfig
from patchcl_qupath.datatypes import Box, Nuclei, Polygons, Tile, UncertaintyGrid
from patchcl_qupath.execution.pixel_store import PixelStore
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.segmentation.cells import grow
from patchcl_qupath.segmentation.fit_cells import fit_to_nuclei, rounded_rings
from patchcl_qupath.segmentation.measurements import measure_cells
from patchcl_qupath.segmentation.rings import Rings, polygons_of, rings_of, scaled
from patchcl_qupath.segmentation.segmented_image import MAX_RADIUS_UM
from patchcl_qupath.slides.prepare import PreparedImage
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.timing import Seconds, timed

_BESIDE_PX = 3  # between the cells of a tile and the border of what is looked at
_REMEMBERED = 64  # tiles, whose nuclei several others ask for


@dataclass(frozen=True, kw_only=True)
class CellContext:
    """What a worker needs beside the nuclei; ``pixels`` are those that were kept of tiles."""

    image: PreparedImage
    config: CellConfig
    pixels: PixelStore | None = None


@dataclass(frozen=True, kw_only=True)
class TileNuclei:
    """A tile with its nuclei, as they are stored; ``around`` are others near them, as WKB."""

    tile: Tile
    content: bytes
    around: bytes

    @property
    def name(self) -> str:
        """The name of the tile."""
        return self.tile.name


class NucleiOfTiles:
    """Finds the nuclei of a tile, and those of its neighbours that are near them."""

    def __init__(
        self, store: TileStore, tiles: Sequence[Tile], slide: Slide, config: CellConfig
    ) -> None:
        self._store, self._tiles, self._slide = store, tiles, slide
        boxes = [(t.write.row0, t.write.col0, t.write.row1, t.write.col1) for t in tiles]
        self._boxes = np.array(boxes, np.int64).reshape(-1, 4)
        self._near_um = 2 * config.expand_um
        self._contours = lru_cache(_REMEMBERED)(self._read)

    def __call__(self, tile: Tile) -> TileNuclei:
        """The nuclei of a finished tile."""
        own, _ = self._contours(tile)
        around = [contours for contours in self._others(tile, own) if len(contours)]
        together = (
            shapely.multipolygons(np.concatenate(around)) if around else shapely.MultiPolygon()
        )
        return TileNuclei(
            tile=tile, content=self._store.content(tile), around=shapely.to_wkb(together)
        )

    def _read(self, tile: Tile) -> tuple[Polygons, NDArray[np.float64]]:
        """The nuclei (N,) of a tile and their bounds (N, 4)."""
        (contours,) = self._store.contours([tile])
        return contours, shapely.bounds(contours)

    def _others(self, tile: Tile, own: Polygons) -> list[Polygons]:
        """The nuclei of each other tile that are near those of a tile."""
        if not len(own):
            return []
        reach_px = math.ceil((2 * MAX_RADIUS_UM + self._near_um) / min(self._slide.grid_mpp))
        beside = tile.write.grow(reach_px, self._slide.shape)
        x, y = (self._near_um / side for side in self._slide.mpp_level0)
        least, most = np.split(shapely.total_bounds(own) + np.array([-x, -y, x, y]), 2)
        first, last = np.split(self._boxes, 2, axis=1)
        meets = (first < (beside.row1, beside.col1)) & (last > (beside.row0, beside.col0))
        found = [self._tiles[n] for n in np.flatnonzero(meets.all(axis=1)).tolist()]
        others = [other for other in found if other != tile]
        near = []
        for contours, bounds in map(self._contours, others):
            meets = (bounds[:, :2] <= most) & (bounds[:, 2:] >= least)
            near.append(contours[meets.all(axis=1)])
        return near


def grow_tile(context: CellContext, found: TileNuclei) -> tuple[Nuclei, UncertaintyGrid, Seconds]:
    """Grow the nuclei of a tile into cells, and measure these.

    Returns the nuclei with their cells, level 0; the uncertainty grid of the tile as it is stored;
    and the seconds that each stage took. Raises SlideError for damaged pixels.
    """
    seconds: Seconds = {}
    slide = context.image.slide
    nuclei, uncertainty = TileStore.decode(found.content)
    with timed(seconds, "grow"):
        around = shapely.get_parts(shapely.from_wkb(found.around))
        all_nuclei = rings_of(np.concatenate([nuclei.polygons, around]))
        box = _box(nuclei.polygons, slide, context.config.expand_um)
        (x, y), count = slide.downsample, len(nuclei)
        on_grid = scaled(all_nuclei, (1 / x, 1 / y))
        grown = grow(on_grid, count, box, slide.grid_mpp, context.config)
        at_level0 = scaled(grown, slide.downsample)
        cells = Rings(np.round(at_level0.xy, 2), at_level0.first)
        cells = rounded_rings(fit_to_nuclei(cells, all_nuclei))
    with timed(seconds, "read cells"):
        rgb = None if context.pixels is None else context.pixels.read(found.tile, box)
        rgb = slide.read(box) if rgb is None else rgb
    with timed(seconds, "measure cells"):
        measurements = measure_cells(
            nuclei.measurements,
            scaled(cells, slide.mpp_level0),  # µm are pixels of 1 µm
            cells=scaled(cells, (1 / x, 1 / y)),
            nuclei=on_grid,
            rgb=rgb,
            box=box,
            stains=context.image.stains,
        )
        polygons = polygons_of(cells)
    return replace(nuclei, cells=polygons, measurements=measurements), uncertainty, seconds


def _box(nuclei: Polygons, slide: Slide, expand_um: float) -> Box:
    """The box of the working grid that holds the cells of nuclei, level 0."""
    if not len(nuclei):
        return Box(0, 0, 1, 1)
    (x, y), (rows, cols) = slide.downsample, slide.shape
    x0, y0, x1, y1 = shapely.total_bounds(nuclei)
    margin = math.ceil(expand_um / min(slide.grid_mpp)) + _BESIDE_PX
    inner = Box(math.floor(y0 / y), math.floor(x0 / x), math.ceil(y1 / y), math.ceil(x1 / x))
    return inner.grow(margin, (rows, cols))
