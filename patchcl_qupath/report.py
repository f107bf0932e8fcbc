"""Pictures of what was found, for people to check with their own eyes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from patchcl_qupath.datatypes import Box, Hole, Polygons, grid_to_level0
from patchcl_qupath.errors import SlideError
from patchcl_qupath.storage import replacing

FIELD_PX = (384, 512)  # working pixels of the field that is shown
OVERVIEW_MPP = 16.0  # um per pixel of a picture of the whole image
_OUTLINE = (40, 240, 80)
_HOLE = (230, 30, 30)
_UNREADABLE = 128


def write_preview(
    path: Path,
    read: Callable[[Box], NDArray[np.uint8]],
    shape: tuple[int, int],
    downsample: tuple[float, float],
    parts: Callable[[], Iterable[Polygons]],
    overview: Image.Image | None = None,
) -> None:
    """A PNG of the field with the most nuclei, outlined; and of ``overview`` beside it, if given.

    ``read`` gives the pixels of a box of the working grid, which has ``shape`` (rows, cols);
    ``downsample`` is (x, y) level-0 px per grid px; ``parts`` gives the outlines, level 0,
    each time it is called. An image without nuclei shows its middle. A field that cannot be read is
    grey.
    """
    height, width = (min(field, size) for field, size in zip(FIELD_PX, shape, strict=True))
    to_grid = (1 / downsample[0], 1 / downsample[1])
    fields: Counter[tuple[int, int]] = Counter()
    for part in parts():
        xy = shapely.get_coordinates(shapely.centroid(part)) * to_grid
        cells = (xy[:, ::-1] // (height, width)).astype(int).tolist()
        fields.update((row, col) for row, col in cells)
    most = max(fields, key=lambda field: (fields[field], field)) if fields else None
    row, col = most or ((shape[0] // height) // 2, (shape[1] // width) // 2)
    row0, col0 = min(row * height, shape[0] - height), min(col * width, shape[1] - width)
    box = Box(row0, col0, row0 + height, col0 + width)

    frame = shapely.box(box.col0, box.row0, box.col1, box.row1)
    shown = []
    for part in parts():
        polygons = grid_to_level0(part, to_grid)
        shown.append(polygons[shapely.intersects(polygons, frame)])
    inside = shapely.transform(
        np.concatenate([*shown, np.empty(0, dtype=object)]),
        lambda xy: xy - (box.col0, box.row0),
    )
    try:
        pixels = read(box)
    except SlideError:
        pixels = np.full((*box.shape, 3), _UNREADABLE, dtype=np.uint8)
    picture = draw_outlines(pixels, inside)
    if overview is not None:
        picture = _beside(picture, overview)
    with replacing(path) as temporary:
        picture.save(temporary, format="PNG", compress_level=1)


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


def draw_holes(rgb: NDArray[np.uint8], holes: Sequence[Hole], size: tuple[int, int]) -> Image.Image:
    """Holes in red on a small picture (H, W, 3) of an image of ``size`` (width, height)."""
    height, width = rgb.shape[:2]
    x, y = width / size[0], height / size[1]
    picture = Image.fromarray(rgb)
    pen = ImageDraw.Draw(picture)
    for hole in holes:
        right, low = (hole.x + hole.width) * x - 1, (hole.y + hole.height) * y - 1
        left, top = hole.x * x, hole.y * y
        pen.rectangle([left, top, max(left, right), max(top, low)], fill=_HOLE)  # 1 px at least
    return picture


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures side by side, the right one as high as the left."""
    width = max(1, round(right.width * left.height / right.height))
    right = right.resize((width, left.height), Image.Resampling.NEAREST)
    both = Image.new("RGB", (left.width + width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both
