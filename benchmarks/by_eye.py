"""Sheets of objects for a person to judge: what is found where no label, or no nucleus, is.

    python benchmarks/by_eye.py FOLDER [--data DIR] [--sets NAME ...] [--beside DIR] [--objects N]
                                [--seed N] [--config TOML] [--cache DIR]

Of each labelled set, a model is trained without labels, as by benchmarks/quality.py. Objects with
less than a tenth of their area in true nuclei are drawn at random, and so are objects that the
model finds in fat and collagen. Many of the former are nuclei that nobody outlined, most of the
latter small nuclei: a person says which are none. Each object is shown with its outline in 20 µm of
tissue (fat and collagen: 24 µm). With --beside, those of another version are mixed in: DIR holds a
project for each set, SET/project.qpproj, in which that version has run.

FOLDER gets SET.png, SET-fat.png and SET-collagen.png, with a number on each object, and beside each
a CSV file that says of each number whose it is and where: open it after judging. How many objects
they were drawn from is printed; where there are none, there is no sheet.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import shapely
from PIL import Image, ImageDraw

from bench.cache import Cache, default_folder
from bench.few_labels import true_nuclei
from bench.measure import Bench, segment
from bench.sets import MPP, ImageSet, empty_sets, labelled_sets, project_of
from patchcl_qupath.config import load_config
from patchcl_qupath.datatypes import ImageEntry, Polygons
from patchcl_qupath.evaluation.metrics import Overlaps
from patchcl_qupath.project import Project, open_project
from patchcl_qupath.storage.geojson import made_valid
from patchcl_qupath.storage.parquet import read_nuclei
from quality import DATA

_MOST_ON_NUCLEI = 0.1  # of the area of an object that lies on nothing
_SHOWN_UM = {"labelled": 20.0, "fat": 24.0, "collagen": 24.0}  # side of the tissue around an object
_CELL_PX, _GAP_PX, _COLUMNS = 146, 4, 10
_OUTLINE, _NUMBER = (0, 255, 0), (255, 255, 0)


class Found(NamedTuple):
    """An object: who found it, in which image, its outline at level 0, and its probability."""

    whose: str
    image: Path
    outline: shapely.Geometry
    probability: float


def main() -> None:
    """Write the sheets."""
    options = parser().parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(cache=Cache(options.cache))
    config = load_config(options.config)
    empty = [each for each in empty_sets(options.data) if each.name in _SHOWN_UM]
    for images in labelled_sets(options.data, options.sets):
        model = bench.trained(images, config)
        with project_of(images) as project:
            segment(project, model, project.images())
            found = {"now": [*_objects("now", project, images)]}
        if options.beside:
            other = open_project(options.beside / images.name / "project.qpproj", backend="files")
            found["beside"] = [*_objects("beside", other, images)]
        _draw(options, images.name, images.mpp, found, _SHOWN_UM["labelled"])
        for pieces in empty:
            with project_of(pieces) as project:
                segment(project, model, project.images(), may_fail=True)
                found = {"now": [*_objects("now", project, pieces)]}
            name = f"{images.name}-{pieces.name}"
            _draw(options, name, pieces.mpp, found, _SHOWN_UM[pieces.name])


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = made.add_argument
    add("folder", metavar="FOLDER", type=Path, help="for the sheets")
    add("--data", type=Path, default=DATA, help="folder of the labelled sets")
    add("--sets", nargs="+", choices=[*MPP], default=[*MPP], help="default: all")
    add(
        "--beside",
        metavar="DIR",
        type=Path,
        help="folder of projects that another version has run in",
    )
    add("--objects", type=int, default=70, help="drawn of each version")
    add("--seed", type=int, default=0, help="of the draw")
    add("--config", type=Path, help="TOML file with settings, as for patchcl-qp run")
    add("--cache", type=Path, default=default_folder(), help="folder; default: %(default)s")
    return made


def _objects(whose: str, project: Project, images: ImageSet) -> Iterator[Found]:
    """The objects of a project's results that lie on no true nucleus; all without labels."""
    paths = {path.stem: path for path in images.images}
    for entry in project.images():
        path = project.layout.nuclei(entry.id)
        if not path.is_file():  # a run refuses images without tissue
            continue
        nuclei = read_nuclei(path)
        outlines = made_valid(nuclei.polygons)
        for k in np.flatnonzero(_on_nothing(outlines, entry, images)):
            probability = float(nuclei.measurements["Detection probability"][k])
            yield Found(whose, paths[Path(entry.name).stem], outlines[k], probability)


def _on_nothing(outlines: Polygons, entry: ImageEntry, images: ImageSet) -> np.ndarray:
    """(N,) whether less than a tenth of an outline lies in true nuclei."""
    if images.ground_truth is None:
        return np.ones(len(outlines), bool)
    overlaps = Overlaps.of_polygons(outlines, made_valid(true_nuclei(entry, images)))
    covered = np.bincount(overlaps.row, overlaps.shared, len(outlines))
    return np.asarray(covered < _MOST_ON_NUCLEI * overlaps.predicted)


def _draw(
    options: argparse.Namespace,
    name: str,
    mpp: float,
    found: dict[str, list[Found]],
    shown_um: float,
) -> None:
    """Write a sheet of objects drawn at random, mixed, and its key."""
    counts = ", ".join(f"{len(objects)} {whose}" for whose, objects in found.items())
    print(f"{options.folder / name}.png: drawn from {counts}", flush=True)
    if not any(found.values()):
        return
    rng = np.random.default_rng(options.seed)
    drawn = [
        objects[k]
        for objects in found.values()
        for k in rng.choice(len(objects), min(options.objects, len(objects)), replace=False)
    ]
    drawn = [drawn[k] for k in rng.permutation(len(drawn))]
    step = _CELL_PX + _GAP_PX
    sheet = Image.new("RGB", (_COLUMNS * step, -(-len(drawn) // _COLUMNS) * step), "white")
    with (options.folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        key = csv.writer(file)
        key.writerow(["number", "whose", "image", "x px", "y px", "probability"])
        for k, each in enumerate(drawn):
            row, col = divmod(k, _COLUMNS)
            sheet.paste(_picture(each, k, shown_um / mpp), (col * step, row * step))
            centre = shapely.get_coordinates(each.outline.centroid)[0].round(1)
            key.writerow([k, each.whose, each.image.name, *centre, f"{each.probability:.2f}"])
    sheet.save(options.folder / f"{name}.png")


def _picture(found: Found, number: int, side_px: float) -> Image.Image:
    """An object in the tissue around it, with its outline and number."""
    x, y = shapely.get_coordinates(found.outline.centroid)[0] - side_px / 2
    scale = _CELL_PX / side_px
    with Image.open(found.image) as image:
        window = (round(x), round(y), round(x + side_px), round(y + side_px))
        shown = image.convert("RGB").crop(window)
    picture = shown.resize((_CELL_PX, _CELL_PX), Image.Resampling.LANCZOS)
    draw = ImageDraw.Draw(picture)
    for part in shapely.get_parts(found.outline):
        ring = (shapely.get_coordinates(shapely.get_exterior_ring(part)) - window[:2]) * scale
        draw.line([*map(tuple, ring)], fill=_OUTLINE)
    draw.text((2, 2), str(number), fill=_NUMBER)
    return picture


if __name__ == "__main__":
    main()
