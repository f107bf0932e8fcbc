"""Draws docs/figures/gallery.jpg: places of the sample slide, by two versions of the program.

    python docs/gallery.py BEFORE AFTER

BEFORE and AFTER are copies of sample_project/project.qpproj in which a version has run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import shapely
from PIL import Image, ImageDraw, ImageFont

from patchcl_qupath.datatypes import Box
from patchcl_qupath.project import open_project
from patchcl_qupath.report.thumbnails import draw_contours
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.storage.parquet import read_nuclei

FIGURES = Path(__file__).parent / "figures"
SIDE, ZOOM, GAP, HEAD = 120, 2, 8, 34
PLACES = {  # top left corners at level 0 (x, y)
    "large pale nuclei": (585, 2630),
    "purple cytoplasm": (1130, 985),
    "out of focus": (1360, 620),
    "ink at the rim": (1785, 2090),
    "keratin": (1380, 1190),
}


def main(before: str, after: str) -> None:
    """Draw a row for each place: the slide, the nuclei before, and those after."""
    projects = [open_project(Path(path), backend="files") for path in (before, after)]
    nuclei = [read_nuclei(each.layout.nuclei(each.images()[0].id)).polygons for each in projects]
    slide = Slide.open(projects[1].images()[0])
    font = ImageFont.load_default(20)
    width = 3 * ZOOM * SIDE + 2 * GAP
    picture = Image.new("RGB", (width, len(PLACES) * (ZOOM * SIDE + HEAD)), "white")
    pen = ImageDraw.Draw(picture)
    for row, (name, (x, y)) in enumerate(PLACES.items()):
        top = row * (ZOOM * SIDE + HEAD)
        pen.text((0, top + 4), name, fill=(40, 40, 40), font=font)
        rgb = slide.read(Box(y, x, y + SIDE, x + SIDE))  # working px are those of level 0
        for col, polygons in enumerate(([], *nuclei)):
            here = shapely.transform(polygons, lambda xy, x=x, y=y: xy - (x, y))
            picture.paste(draw_contours(rgb, here, ZOOM), (col * (ZOOM * SIDE + GAP), top + HEAD))
    picture.save(FIGURES / "gallery.jpg", quality=65, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
