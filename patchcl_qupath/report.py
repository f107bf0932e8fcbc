"""Pictures of what was found, for people to check with their own eyes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from patchcl_qupath.datatypes import Box, Nuclei, Polygons, grid_to_level0
from patchcl_qupath.storage import replacing

FIELD_PX = (384, 512)  # working pixels of the field that is shown
_OUTLINE = (40, 240, 80)


def write_preview(
    path: Path,
    read: Callable[[Box], NDArray[np.uint8]],
    shape: tuple[int, int],
    downsample: tuple[float, float],
    parts: Callable[[], Iterable[Nuclei]],
) -> None:
    """A PNG of the field with the most nuclei, outlined.

    ``read`` gives the pixels of a box of the working grid, which has ``shape`` (rows, cols);
    ``downsample`` is (x, y) level-0 px per grid px; ``parts`` gives the nuclei, level 0, each
    time it is called. An image without nuclei shows its middle.
    """
    height, width = (min(field, size) for field, size in zip(FIELD_PX, shape, strict=True))
    to_grid = (1 / downsample[0], 1 / downsample[1])
    fields: Counter[tuple[int, int]] = Counter()
    for part in parts():
        xy = shapely.get_coordinates(shapely.centroid(part.polygons)) * to_grid
        cells = (xy[:, ::-1] // (height, width)).astype(int).tolist()
        fields.update((row, col) for row, col in cells)
    most = max(fields, key=lambda field: (fields[field], field)) if fields else None
    row, col = most or ((shape[0] // height) // 2, (shape[1] // width) // 2)
    row0, col0 = min(row * height, shape[0] - height), min(col * width, shape[1] - width)
    box = Box(row0, col0, row0 + height, col0 + width)

    frame = shapely.box(box.col0, box.row0, box.col1, box.row1)
    shown = []
    for part in parts():
        polygons = grid_to_level0(part.polygons, to_grid)
        shown.append(polygons[shapely.intersects(polygons, frame)])
    inside = shapely.transform(
        np.concatenate([*shown, np.empty(0, dtype=object)]),
        lambda xy: xy - (box.col0, box.row0),
    )
    with replacing(path) as temporary:
        draw_outlines(read(box), inside).save(temporary, format="PNG", compress_level=1)


def draw_outlines(rgb: NDArray[np.uint8], polygons: Polygons, zoom: int = 2) -> Image.Image:
    """Outlines drawn over an image.

    ``rgb`` (H, W, 3) is enlarged ``zoom`` times; ``polygons`` (N,) are in its pixels.
    """
    height, width = rgb.shape[:2]
    picture = Image.fromarray(rgb).resize((width * zoom, height * zoom), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(picture)
    for polygon in polygons:
        corners = shapely.get_coordinates(polygon) * zoom
        pen.line([tuple(corner) for corner in corners.tolist()], fill=_OUTLINE, width=zoom)
    return picture
