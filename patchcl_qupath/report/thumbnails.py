"""Drawings on pictures of an image: contours of nuclei, failed tiles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from patchcl_qupath.datatypes import FailedTile, Polygons

_CONTOUR = (40, 240, 80)
_CELL = (255, 225, 60)
_FAILED_TILE = (230, 30, 30)


def draw_contours(
    rgb: NDArray[np.uint8], contours: Polygons, zoom: int = 2, cells: Polygons | None = None
) -> Image.Image:
    """Pixels (H, W, 3) enlarged ``zoom`` times, with contours (N,), in their pixels, drawn on.

    Those of ``cells`` are thinner, and of another colour.
    """
    height, width = rgb.shape[:2]
    picture = Image.fromarray(rgb).resize((width * zoom, height * zoom), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for cell in [] if cells is None else cells:
        corners = shapely.get_coordinates(cell) * zoom
        pen.line([tuple(corner) for corner in corners.tolist()], fill=_CELL, width=1)
    for contour in contours:
        corners = shapely.get_coordinates(contour) * zoom
        pen.line([tuple(corner) for corner in corners.tolist()], fill=_CONTOUR, width=zoom)
    return picture


def draw_failed_tiles(
    rgb: NDArray[np.uint8], failed_tiles: Sequence[FailedTile], size: tuple[int, int]
) -> Image.Image:
    """A thumbnail (H, W, 3) of an image of ``size`` (width, height), with failed tiles in red."""
    height, width = rgb.shape[:2]
    x, y = width / size[0], height / size[1]
    picture = Image.fromarray(rgb)
    pen = ImageDraw.Draw(picture)
    for tile in failed_tiles:
        left, top = tile.x * x, tile.y * y
        right, bottom = (tile.x + tile.width) * x - 1, (tile.y + tile.height) * y - 1
        corners = [left, top, max(left, right), max(top, bottom)]  # 1 px wide at least
        pen.rectangle(corners, fill=_FAILED_TILE)
    return picture


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures side by side, the right one scaled to the height of the left one."""
    width = max(1, round(right.width * left.height / right.height))
    right = right.resize((width, left.height), Image.Resampling.NEAREST)
    both = Image.new("RGB", (left.width + width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both
