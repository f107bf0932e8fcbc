"""What a worker does for cells: grow the nuclei that a tile owns, and measure the cells.

A nucleus that another tile owns keeps a cell out of its place as one of the same tile does. Cells
of a tile therefore come once the nuclei of all tiles near it are known; the halo need not hold
these, which would take long.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.config import CellConfig, SegmentConfig
from patchcl_qupath.datatypes import Box, Tile, UncertaintyGrid
from patchcl_qupath.execution.pixel_store import PixelStore
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.segmentation.cells import grow
from patchcl_qupath.segmentation.fit_cells import fit_to_nuclei, rounded_rings
from patchcl_qupath.segmentation.measurements import measure_cells
from patchcl_qupath.segmentation.rings import (
    NOTHING,
    Floats,
    Rings,
    bounds_of,
    joined,
    scaled,
    taken,
)
from patchcl_qupath.segmentation.segmented_image import max_radius_um
from patchcl_qupath.slides.prepare import PreparedImage
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.storage.parquet import NOT_MEASURED, NUCLEUS, Table, outer_points_of, with_cells
from patchcl_qupath.timing import Seconds, timed

_BESIDE_PX = 3  # between what matters of a tile and the border of what is looked at
_REMEMBERED = 64  # tiles, whose nuclei several others ask for


@dataclass(frozen=True, kw_only=True)
class CellContext:
    """What a worker needs beside the nuclei; ``pixels`` are those that were kept of tiles."""

    image: PreparedImage
    config: CellConfig
    pixels: PixelStore | None = None


@dataclass(frozen=True, kw_only=True)
class TileNuclei:
    """A tile with its nuclei, as they are stored; ``around`` are others near them, level 0."""

    tile: Tile
    content: bytes
    around: Rings

    @property
    def name(self) -> str:
        """The name of the tile."""
        return self.tile.name


class NucleiOfTiles:
    """Finds the nuclei of a tile, and those of its neighbours that are near them.

    Cells of a tile can grow when ``tiles_near`` it have ``ended``, itself among them: in the store
    are the nuclei of each, or it failed. No nucleus is higher or wider than ``max_diameter_um``.
    """

    def __init__(
        self,
        store: TileStore,
        tiles: Sequence[Tile],
        slide: Slide,
        config: CellConfig,
        missing: Iterable[Tile] = (),
        max_diameter_um: float = SegmentConfig().max_diameter_um,
    ) -> None:
        self._store, self._tiles, self._slide = store, tiles, slide
        boxes = [(t.write.row0, t.write.col0, t.write.row1, t.write.col1) for t in tiles]
        sides = np.array(boxes, np.int64).reshape(-1, 4).T
        self._places = shapely.STRtree(shapely.box(*sides))  # x and y are rows and columns
        self._near_um = _near_um(slide, config)
        self._reach_um = 2 * max_radius_um(max_diameter_um) + self._near_um
        self._missing = {tile.name for tile in missing}
        self._failed: set[str] = set()
        self._contours = lru_cache(_REMEMBERED)(self._read)

    def __call__(self, tile: Tile) -> TileNuclei:
        """The nuclei of a finished tile. Raises StorageError."""
        around = joined([NOTHING, *self._others(tile)])
        return TileNuclei(tile=tile, content=self._store.content(tile), around=around)

    def can_grow(self, tile: Tile) -> bool:
        """Whether all nuclei are known that have a part in where the cells of a tile end."""
        near = {other.name for other in self.tiles_near(tile)}
        return tile.name not in self._failed and not near & self._missing

    def ended(self, tile: Tile) -> list[Tile]:
        """The nuclei of a tile are in the store, or it failed: those that can grow since then."""
        self._missing.discard(tile.name)
        return [other for other in self.tiles_near(tile) if self.can_grow(other)]

    def failed(self, tile: Tile) -> None:
        """The nuclei of a tile will not be known."""
        self._failed.add(tile.name)

    def tiles_near(self, tile: Tile) -> list[Tile]:
        """The tiles that may own a nucleus near those of a tile, and itself."""
        reach_px = math.ceil(self._reach_um / min(self._slide.grid_mpp))
        beside = tile.write.grow(reach_px, self._slide.shape)
        place = shapely.box(beside.row0, beside.col0, beside.row1, beside.col1)
        near = [self._tiles[n] for n in np.sort(self._places.query(place)).tolist()]
        return [other for other in near if other.write.meets(beside)]

    def _read(self, tile: Tile) -> tuple[Rings, Floats]:
        """The nuclei (N,) of a tile and their bounds (N, 4)."""
        contours = Rings(*self._store.points(tile))
        return contours, bounds_of(contours)

    def _others(self, tile: Tile) -> Iterator[Rings]:
        """The nuclei of each other tile that are near those of a tile."""
        _, own = self._contours(tile)
        if not len(own):
            return
        x, y = (self._near_um / side for side in self._slide.mpp_level0)
        (x0, y0), (x1, y1) = own[:, :2].min(axis=0), own[:, 2:].max(axis=0)
        for other in self.tiles_near(tile):
            if other != tile and other.name not in self._failed:
                contours, bounds = self._contours(other)
                near = bounds[:, :2] <= (x1 + x, y1 + y)
                near &= bounds[:, 2:] >= (x0 - x, y0 - y)
                yield taken(contours, np.flatnonzero(near.all(axis=1)))


def grow_tile(context: CellContext, found: TileNuclei) -> tuple[Table, UncertaintyGrid, Seconds]:
    """Grow the nuclei of a tile into cells, and measure these.

    Returns the table of the nuclei with their cells, level 0; the uncertainty grid of the tile as
    it is stored; and the seconds that each stage took. Raises SlideError for damaged pixels.
    """
    seconds: Seconds = {}
    slide = context.image.slide
    with timed(seconds, "grow"):
        table, uncertainty = TileStore.decode(found.content)
        own = Rings(*outer_points_of(table[NUCLEUS]))
        nuclei = joined([own, found.around])
        cells = cells_of(nuclei, len(table), slide, context.config)
    with timed(seconds, "read cells"):
        box = _box(own, slide, context.config.expand_um)
        rgb = _read(context, found.tile, box) if len(table) else np.zeros((*box.shape, 3), np.uint8)
    with timed(seconds, "measure cells"):
        names = set(table.column_names) - {*NOT_MEASURED}
        measurements = measure_cells(
            {name: table[name].to_numpy() for name in names},
            scaled(cells, slide.mpp_level0),  # µm are pixels of 1 µm
            cells=_on_grid(cells, slide),
            nuclei=_on_grid(nuclei, slide),
            rgb=rgb,
            box=box,
            stains=context.image.stains,
        )
        table = with_cells(table, *cells, measurements)
    return table, uncertainty, seconds


def _read(context: CellContext, tile: Tile, box: Box) -> NDArray[np.uint8]:
    """The pixels (H, W, 3) of a box around a tile's nuclei, as they were kept, else of the slide.

    Raises SlideError for damaged pixels.
    """
    kept = None if context.pixels is None else context.pixels.read(tile, box)
    return context.image.slide.read(box) if kept is None else kept


def cells_of(nuclei: Rings, count: int, slide: Slide, config: CellConfig) -> Rings:
    """The cells (count,) of the first ``count`` of nuclei (N,), level 0.

    The others are those around: all that ``NucleiOfTiles`` gives.
    """
    own = Rings(nuclei.xy[: nuclei.first[count]], nuclei.first[: count + 1])
    box = _box(own, slide, _near_um(slide, config))  # others have their pixels in it
    grown = grow(_on_grid(nuclei, slide), count, box, slide.grid_mpp, config)
    at_level0 = scaled(grown, slide.downsample)
    cells = Rings(np.round(at_level0.xy, 2), at_level0.first)
    return rounded_rings(fit_to_nuclei(cells, nuclei))


def _near_um(slide: Slide, config: CellConfig) -> float:
    """How far from a nucleus another may be and have a part in where its cell ends.

    A cell ends between pixels, of which the second may be up to two beyond the expansion.
    """
    return 2 * (config.expand_um + 2 * max(slide.grid_mpp))


def _on_grid(contours: Rings, slide: Slide) -> Rings:
    """Contours of level 0 on the working grid."""
    x, y = slide.downsample
    return scaled(contours, (1 / x, 1 / y))


def _box(nuclei: Rings, slide: Slide, around_um: float) -> Box:
    """The box of the working grid that holds nuclei, level 0, and what is around them.

    Without nuclei, any px.
    """
    if not len(nuclei.xy):
        return Box(0, 0, 1, 1)
    (x, y), (rows, cols) = slide.downsample, slide.shape
    xs, ys = nuclei.xy[:, 0], nuclei.xy[:, 1]
    margin = math.ceil(around_um / min(slide.grid_mpp)) + _BESIDE_PX
    top, left = math.floor(ys.min() / y), math.floor(xs.min() / x)
    inner = Box(top, left, math.ceil(ys.max() / y), math.ceil(xs.max() / x))
    return inner.grow(margin, (rows, cols))
