"""Pictures of an image's errors: what is right, badly outlined, missed, merged, split, spurious.

True nuclei are drawn with their true outlines, spurious ones with the predicted outlines, each kind
in its colour; predicted nuclei that are neither right nor spurious are thin and dark blue. A large
image is shown where its true nuclei are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from patchcl_qupath.datatypes import Box, ImageEntry, Polygons, centroids_of, level0_to_grid
from patchcl_qupath.evaluation.metrics import MIN_IOU, Kind, Overlaps
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.storage.files import atomic_write
from patchcl_qupath.storage.layout import file_name

# Of M. Okabe and K. Ito's palette for all kinds of colour vision, those that show on tissue.
COLOURS = {
    Kind.RIGHT: (0, 158, 115),
    Kind.BADLY_OUTLINED: (240, 228, 66),
    Kind.MISSED: (86, 180, 233),
    Kind.MERGED: (0, 0, 0),
    Kind.SPLIT: (255, 255, 255),
    Kind.SPURIOUS: (213, 94, 0),
}
_NEITHER = (0, 114, 178)
_ZOOM = 2  # picture px per working px
_WHOLE_PX = 1536  # longest side, in working px, of what is shown in one piece
_FIELD_PX = 512  # side of each field of a larger image
_FIELDS = 6  # of these at most
_COLUMNS = 2
_MARGIN_PX = 16  # around the true nuclei
_GAP_PX = 8  # of the picture, between fields and in the legend
_FONT_PX = 16
_PAPER, _INK = (150, 150, 150), (0, 0, 0)


def picture_name(entry: ImageEntry) -> str:
    """The file name of an image's picture, which no other image of the project has."""
    return f"{file_name(PurePath(entry.name).stem)}-{entry.id}.png"


def draw_errors(
    path: Path, slide: Slide, nuclei: Polygons, true: Polygons, overlaps: Overlaps
) -> None:
    """Write the picture of an image's errors as PNG.

    ``nuclei`` (P,) and ``true`` (T,) are polygons at level 0, ``overlaps`` theirs. Raises
    SlideError for pixels that cannot be read, StorageError.
    """
    nuclei = level0_to_grid(nuclei, slide.downsample)
    true = level0_to_grid(true, slide.downsample)
    outlines = [*_outlines(nuclei, true, overlaps)]
    boxes = _shown(slide, nuclei, true)
    sheet = _side_by_side([_panel(slide, box, outlines) for box in boxes])
    is_whole = boxes[0].shape == slide.shape
    picture = _with_legend(sheet, overlaps, "" if is_whole else " in the whole image")
    with atomic_write(path) as temporary:
        picture.save(temporary, format="PNG")


def _shown(slide: Slide, nuclei: Polygons, true: Polygons) -> list[Box]:
    """The boxes of the working grid to show: the whole image, all true nuclei, or some fields.

    True nuclei outside of the image cannot be shown.
    """
    rows, cols = slide.shape
    if max(rows, cols) <= _WHOLE_PX:
        return [Box(0, 0, rows, cols)]
    true = true[shapely.intersects(true, shapely.box(0, 0, cols, rows))]
    wanted = true if len(true) else nuclei
    if not len(wanted):
        return [_box_around(cols / 2, rows / 2, _FIELD_PX, slide.shape)]
    left, top, right, bottom = shapely.total_bounds(wanted)
    if max(right - left, bottom - top) <= _WHOLE_PX - 2 * _MARGIN_PX:
        around = Box(math.floor(top), math.floor(left), math.ceil(bottom), math.ceil(right))
        return [around.grow(_MARGIN_PX, slide.shape)]
    return _fullest_fields(centroids_of(wanted), slide.shape)


def _fullest_fields(centroids: NDArray[np.float64], shape: tuple[int, int]) -> list[Box]:
    """The fields with the most of some nuclei (N, 2), from the top to the bottom."""
    fields, count = np.unique((centroids // _FIELD_PX).astype(int), axis=0, return_counts=True)
    fullest = fields[np.sort(np.argsort(-count, kind="stable")[:_FIELDS])]
    middles = (fullest + 0.5) * _FIELD_PX
    boxes = [_box_around(x, y, _FIELD_PX, shape) for x, y in middles.tolist()]
    return sorted(boxes, key=lambda box: (box.row0, box.col0))


def _box_around(x: float, y: float, side: int, shape: tuple[int, int]) -> Box:
    """A square around a point, moved to lie in the image, and no larger than it."""
    height, width = (min(side, size) for size in shape)
    row = min(max(0, round(y - side / 2)), shape[0] - height)
    col = min(max(0, round(x - side / 2)), shape[1] - width)
    return Box(row, col, row + height, col + width)


def _outlines(
    nuclei: Polygons, true: Polygons, overlaps: Overlaps
) -> Iterator[tuple[Polygons, tuple[int, int, int], int]]:
    """What is drawn, in that order: polygons, their colour, and the width of the line."""
    neither = ~overlaps.spurious & (overlaps.predicted_iou <= MIN_IOU)
    yield nuclei[neither], _NEITHER, 1
    for kind in Kind:
        if kind is not Kind.SPURIOUS:
            yield true[overlaps.true_kinds == kind], COLOURS[kind], _ZOOM
    yield nuclei[overlaps.spurious], COLOURS[Kind.SPURIOUS], _ZOOM


def _panel(
    slide: Slide, box: Box, outlines: Sequence[tuple[Polygons, tuple[int, int, int], int]]
) -> Image.Image:
    """A box of the working grid, enlarged, with outlines."""
    height, width = box.shape
    pixels = Image.fromarray(slide.read(box))
    panel = pixels.resize((width * _ZOOM, height * _ZOOM), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(panel)
    frame = shapely.box(box.col0, box.row0, box.col1, box.row1)
    for polygons, colour, line_px in outlines:
        inside = polygons[shapely.intersects(polygons, frame)]
        for ring in shapely.get_rings(shapely.get_parts(inside)):
            corners = (shapely.get_coordinates(ring) - (box.col0, box.row0)) * _ZOOM
            pen.line([(x, y) for x, y in corners.tolist()], fill=colour, width=line_px)
    return panel


def _side_by_side(panels: Sequence[Image.Image]) -> Image.Image:
    """Panels in rows."""
    columns = min(_COLUMNS, len(panels))
    width, height = panels[0].width, max(panel.height for panel in panels)
    rows = math.ceil(len(panels) / columns)
    size = columns * (width + _GAP_PX) - _GAP_PX, rows * (height + _GAP_PX) - _GAP_PX
    sheet = Image.new("RGB", size, _PAPER)
    for i, panel in enumerate(panels):
        row, col = divmod(i, columns)
        sheet.paste(panel, (col * (width + _GAP_PX), row * (height + _GAP_PX)))
    return sheet


def _with_legend(sheet: Image.Image, overlaps: Overlaps, where: str) -> Image.Image:
    """The sheet, and below it the colour, name and number of each kind, and ``where`` that is."""
    entries = [
        (COLOURS[Kind(kind)], f"{kind.replace('_', ' ')} {count:,}{where}")
        for kind, count in overlaps.kinds.items()
    ]
    entries.append((_NEITHER, "predicted, neither right nor spurious"))
    font = ImageFont.load_default(_FONT_PX)
    line_px = _FONT_PX + _GAP_PX
    places: list[tuple[int, int, int]] = []
    x, y = _GAP_PX, _GAP_PX
    for _, text in entries:
        width = 2 * line_px + round(font.getlength(text))
        if places and x + width > sheet.width:
            x, y = _GAP_PX, y + line_px
        places.append((x, y, width))
        x += width + _GAP_PX
    needed = max(x + width for x, _, width in places)
    both = Image.new("RGB", (max(sheet.width, needed), sheet.height + y + line_px), _PAPER)
    both.paste(sheet, (0, 0))
    pen = ImageDraw.Draw(both)
    for (colour, text), (left, top, _) in zip(entries, places, strict=True):
        top += sheet.height
        pen.line([left, top + _FONT_PX // 2, left + line_px, top + _FONT_PX // 2], colour, 4)
        pen.text((left + line_px + _GAP_PX, top), text, fill=_INK, font=font)
    return both
