"""A segmented image: its nuclei, pixels and uncertainty, without keeping all of them in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.config import SegmentConfig
from patchcl_qupath.datatypes import (
    Box,
    FailedTile,
    Nuclei,
    Polygons,
    Tile,
    UncertaintyGrid,
    area_of_tiles,
    level0_to_grid,
)
from patchcl_qupath.errors import SlideError
from patchcl_qupath.execution.tile_store import Measurements, TileStore
from patchcl_qupath.segmentation.uncertainty import merge_grids
from patchcl_qupath.slides.level_grid import GREY
from patchcl_qupath.slides.prepare import PreparedImage
from patchcl_qupath.storage.parquet import Table

_BESIDE_UM = 2.0  # of a contour beside the pixels of its nucleus, at most
_ROUNDING = 0.001  # of tissue: what is left of it beside failed tiles, whose borders are rounded


def max_radius_um(max_diameter_um: float) -> float:
    """How far from its centroid a nucleus reaches that is no higher or wider than a diameter."""
    return math.sqrt(2) * max_diameter_um + _BESIDE_UM


@dataclass(frozen=True, kw_only=True)
class SegmentedImage:
    """An image whose tiles are finished, except those that failed.

    Nuclei are read from the tile store when they are asked for, tile by tile, so that memory does
    not grow with the slide.

    ``tiles`` are the finished tiles; ``resumed`` how many of them an earlier run finished;
    ``network_px`` the working pixels that the network was run on for the others. No nucleus is
    higher or wider than ``max_diameter_um``.
    """

    image: PreparedImage
    store: TileStore
    tiles: tuple[Tile, ...]
    failed_tiles: tuple[FailedTile, ...] = ()
    resumed: int = 0
    network_px: int = 0
    max_diameter_um: float = SegmentConfig().max_diameter_um

    @cached_property
    def count(self) -> int:
        """Number of nuclei."""
        return self.store.count(self.tiles)

    @cached_property
    def uncertainty(self) -> UncertaintyGrid | None:
        """The uncertainty grid of the image; None without a finished tile."""
        return merge_grids(self.store.uncertainty_grids(self.tiles)) if self.tiles else None

    @cached_property
    def failed_area(self) -> shapely.Geometry:
        """The area of failed tiles, at level 0; empty where none failed."""
        return area_of_tiles(self.failed_tiles)

    def tissue_mm2(self, region: shapely.Geometry | None = None) -> float | None:
        """Area of the tissue that was segmented in a region (level 0), in mm².

        Without one, in the analysis region, or in the whole image. None where there is tissue, and
        all of it in failed tiles: 0 would say that there is none.
        """
        tissue = self.image.tissue_mm2(region)
        if not self.failed_tiles:
            return tissue
        left = self.image.tissue_mm2(self._without_failed(region))
        return None if left < _ROUNDING * tissue else left

    def area_mm2(self, region: shapely.Geometry | None = None) -> float:
        """Area of what was segmented in a region (level 0), tissue or not, in mm²."""
        if not self.failed_tiles:
            return self.image.area_mm2(region)
        return self.image.area_mm2(self._without_failed(region))

    def _without_failed(self, region: shapely.Geometry | None) -> shapely.Geometry:
        """A region (level 0), or the analysis region, or the whole image, but for failed tiles."""
        slide = self.image.slide
        if region is None and self.image.region is not None:
            region = shapely.transform(self.image.region, lambda xy: xy * slide.downsample)
        whole = shapely.box(0, 0, *slide.size)
        return shapely.difference(whole if region is None else region, self.failed_area)

    def nuclei(self) -> Iterator[Nuclei]:
        """All nuclei, at level 0, tile by tile."""
        return self.store.nuclei(self.tiles)

    def tables(self) -> Iterator[Table]:
        """The same as tables, without an object for each contour."""
        return self.store.tables(self.tiles)

    def measurements(self, names: Sequence[str]) -> Iterator[Measurements]:
        """Some measurements of all nuclei, tile by tile: (N,) float32 by name."""
        return self.store.measurements(self.tiles, names)

    def contours_in(self, box: Box, of_cells: bool = False) -> Polygons:
        """Contours (N,) of the nuclei that intersect a box of the working grid, in its pixels.

        The origin is the box's top left corner; contours are not clipped to the box. With
        ``of_cells``, those of cells; there are none where none were grown.
        """
        downsample = self.image.slide.downsample
        frame = shapely.box(box.col0, box.row0, box.col1, box.row1)
        found = [np.empty(0, dtype=object)]
        for contours in self.store.contours(self._tiles_near(box), of_cells):
            on_grid = level0_to_grid(contours, downsample)
            found.append(on_grid[shapely.intersects(on_grid, frame)])
        moved = shapely.transform(np.concatenate(found), lambda xy: xy - (box.col0, box.row0))
        return np.asarray(moved)

    def nuclei_in(self, box: Box) -> Iterator[Nuclei]:
        """The nuclei, at level 0, whose contours ``contours_in`` has of a box, in their order."""
        downsample = self.image.slide.downsample
        frame = shapely.box(box.col0, box.row0, box.col1, box.row1)
        for nuclei in self.store.nuclei(self._tiles_near(box)):
            on_grid = level0_to_grid(nuclei.polygons, downsample)
            yield nuclei[shapely.intersects(on_grid, frame)]

    def _tiles_near(self, box: Box) -> list[Tile]:
        """The tiles that may own a nucleus with a part in a box of the working grid."""
        slide = self.image.slide
        reach = box.grow(math.ceil(max_radius_um(self.max_diameter_um) / slide.mpp), slide.shape)
        return [tile for tile in self.tiles if tile.write.meets(reach)]

    def pixels(self, box: Box) -> NDArray[np.uint8]:
        """The pixels (H, W, 3) of a box of the working grid; grey where they cannot be read."""
        try:
            return self.image.slide.read(box)
        except SlideError:
            return np.full((*box.shape, 3), GREY, np.uint8)

    def thumbnail(self, px: int) -> NDArray[np.uint8]:
        """The whole image (h, w, 3), ``px`` working px per pixel; grey if it cannot be read.

        (h, w) is the shape of the working grid over ``px``, rounded up.
        """
        slide = self.image.slide
        try:
            return slide.thumbnail(px * slide.mpp)
        except SlideError:
            return np.full((*(-(-n // px) for n in slide.shape), 3), GREY, np.uint8)
