"""A segmented image: its nuclei, pixels and uncertainty, without keeping all of them in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.datatypes import (
    Box,
    FailedTile,
    Nuclei,
    Polygons,
    Tile,
    UncertaintyGrid,
    grid_to_level0,
)
from patchcl_qupath.errors import SlideError
from patchcl_qupath.execution.tile_store import Measurements, TileStore
from patchcl_qupath.segmentation.uncertainty import merge_grids
from patchcl_qupath.slides.prepare import PreparedImage

_NEAR_UM = 50.0  # no part of a nucleus is farther from its centroid
_UNREADABLE = 128  # grey


@dataclass(frozen=True, kw_only=True)
class SegmentedImage:
    """An image whose tiles are finished, but for those that failed.

    ``tiles`` are the finished ones, ``resumed`` how many of them an earlier run had finished;
    ``network_px`` the working pixels that the network saw of the others.
    """

    image: PreparedImage
    store: TileStore
    tiles: tuple[Tile, ...]
    failed_tiles: tuple[FailedTile, ...] = ()
    resumed: int = 0
    network_px: int = 0

    @cached_property
    def count(self) -> int:
        """How many nuclei there are."""
        return self.store.count(self.tiles)

    @cached_property
    def uncertainty(self) -> UncertaintyGrid | None:
        """Where tissue, nuclei and uncertain pixels are; None without a finished tile."""
        return merge_grids(self.store.uncertainty_grids(self.tiles)) if self.tiles else None

    def nuclei(self) -> Iterator[Nuclei]:
        """All nuclei, level 0, tile by tile."""
        return self.store.nuclei(self.tiles)

    def measurements(self, names: Sequence[str]) -> Iterator[Measurements]:
        """Some measurements of all nuclei, tile by tile."""
        return self.store.measurements(self.tiles, names)

    def contours_in(self, box: Box) -> Polygons:
        """Contours (N,) of the nuclei that show in a box of the working grid, in its pixels."""
        slide = self.image.slide
        x, y = slide.downsample
        near = box.grow(math.ceil(_NEAR_UM / slide.mpp), slide.shape)
        frame = shapely.box(box.col0, box.row0, box.col1, box.row1)
        shown = [np.empty(0, dtype=object)]
        for contours in self.store.contours(
            [tile for tile in self.tiles if tile.write.meets(near)]
        ):
            on_grid = grid_to_level0(contours, (1 / x, 1 / y))
            shown.append(on_grid[shapely.intersects(on_grid, frame)])
        moved = shapely.transform(np.concatenate(shown), lambda xy: xy - (box.col0, box.row0))
        return np.asarray(moved)

    def pixels(self, box: Box) -> NDArray[np.uint8]:
        """The pixels (H, W, 3) of a box of the working grid; grey where they cannot be read."""
        try:
            return self.image.slide.read(box)
        except SlideError:
            return np.full((*box.shape, 3), _UNREADABLE, np.uint8)

    def thumbnail(self, px: int) -> NDArray[np.uint8]:
        """The whole image (h, w, 3), ``px`` working px per pixel; grey if it cannot be read."""
        slide = self.image.slide
        try:
            return slide.thumbnail(px * slide.mpp)
        except SlideError:
            return np.full((*(-(-n // px) for n in slide.shape), 3), _UNREADABLE, np.uint8)
