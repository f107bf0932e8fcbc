"""Pictures of what was found, for people to check with their own eyes."""

from __future__ import annotations

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from patchcl_qupath.datatypes import Polygons


def draw_outlines(
    rgb: NDArray[np.uint8],
    polygons: Polygons,
    zoom: int = 2,
    color: tuple[int, int, int] = (20, 220, 60),
) -> Image.Image:
    """Outlines drawn over an image.

    ``rgb`` (H, W, 3) is enlarged ``zoom`` times; ``polygons`` (N,) are in its pixels.
    """
    height, width = rgb.shape[:2]
    picture = Image.fromarray(rgb).resize((width * zoom, height * zoom), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for polygon in polygons:
        corners = shapely.get_coordinates(polygon) * zoom
        pen.line([tuple(corner) for corner in corners.tolist()], fill=color, width=max(1, zoom - 1))
    return picture
