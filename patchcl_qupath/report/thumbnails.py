"""Pictures of what was found, for people to check with their own eyes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from patchcl_qupath.datatypes import FailedTile, Polygons

_CONTOUR = (40, 240, 80)
_FAILED_TILE = (230, 30, 30)


def draw_contours(rgb: NDArray[np.uint8], polygons: Polygons, zoom: int = 2) -> Image.Image:
    """Outlines drawn over an image.

    ``rgb`` (H, W, 3) is enlarged ``zoom`` times; ``polygons`` (N,) are in its pixels.
    """
    height, width = rgb.shape[:2]
    picture = Image.fromarray(rgb).resize((width * zoom, height * zoom), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for polygon in polygons:
        corners = shapely.get_coordinates(polygon) * zoom
        pen.line([tuple(corner) for corner in corners.tolist()], fill=_CONTOUR, width=zoom)
    return picture


def draw_failed_tiles(
    rgb: NDArray[np.uint8], failed_tiles: Sequence[FailedTile], size: tuple[int, int]
) -> Image.Image:
    """Holes in red on a small picture (H, W, 3) of an image of ``size`` (width, height)."""
    height, width = rgb.shape[:2]
    x, y = width / size[0], height / size[1]
    picture = Image.fromarray(rgb)
    pen = ImageDraw.Draw(picture)
    for failed in failed_tiles:
        right, low = (failed.x + failed.width) * x - 1, (failed.y + failed.height) * y - 1
        left, top = failed.x * x, failed.y * y
        pen.rectangle(
            [left, top, max(left, right), max(top, low)], fill=_FAILED_TILE
        )  # 1 px at least
    return picture


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures side by side, the right one as high as the left."""
    width = max(1, round(right.width * left.height / right.height))
    right = right.resize((width, left.height), Image.Resampling.NEAREST)
    both = Image.new("RGB", (left.width + width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both
