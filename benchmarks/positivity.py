"""Positive nuclei on slides with DAB, beside QuPath's positive cell detection on the same images.

    python benchmarks/positivity.py [--data DIR] [--model FILE] [--keep DIR] [--json]

Images are those of the set deepliif_ihc (Ki-67, 0.25 µm/px), and scikit-image's
immunohistochemistry() (FHL2, in the cytoplasm; 0.5 µm/px is assumed). A model is trained on them,
without labels, unless one is given. Optical densities are compared on nuclei that both find;
without a QuPath, its columns are empty.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import shapely
import skimage.data
import skimage.io
import tifffile

import patchcl_qupath as library
from patchcl_qupath.answers.mixture import threshold_between
from patchcl_qupath.config import from_dict
from patchcl_qupath.errors import ProjectError
from patchcl_qupath.models.model import Model
from patchcl_qupath.project.installed import find_qupath
from patchcl_qupath.storage.parquet import read_table

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
THRESHOLD = 0.2
DETECT = """
setImageType('BRIGHTFIELD_H_DAB')
setPixelSizeMicrons(MPP, MPP)
createFullImageAnnotation(true)
runPlugin('qupath.imagej.detect.cells.PositiveCellDetection', '{"detectionImageBrightfield": \
"Optical density sum", "requestedPixelSizeMicrons": 0.5, "backgroundRadiusMicrons": 8.0, \
"medianRadiusMicrons": 0.0, "sigmaMicrons": 1.5, "minAreaMicrons": 10.0, "maxAreaMicrons": 400.0, \
"threshold": 0.1, "maxBackground": 2.0, "watershedPostProcess": true, "excludeDAB": false, \
"cellExpansionMicrons": 0.0, "includeNuclei": true, "smoothBoundaries": true, \
"makeMeasurements": true, "thresholdCompartment": "Nucleus: DAB OD mean", \
"thresholdPositive1": THRESHOLD, "thresholdPositive2": 0.4, "thresholdPositive3": 0.6, \
"singleThreshold": true}')
println 'FOUND ' + groovy.json.JsonOutput.toJson(getDetectionObjects().collect {
    [it.getROI().getCentroidX(), it.getROI().getCentroidY(),
     it.getMeasurementList().get('Nucleus: DAB OD mean'),
     it.getPathClass().toString() == 'Positive' ? 1 : 0]
})
"""


def main() -> None:
    """Print a table, or with --json one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="folder with deepliif_ihc")
    parser.add_argument("--model", type=Path, help="weights of a model; default: one is trained")
    parser.add_argument("--keep", type=Path, help="keep the project and the images in this folder")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        rows = measure(images(arguments.data), folder, arguments.model)
    if arguments.json:
        print(json.dumps(rows))
        return
    titles = list(rows[0])
    print(*titles, sep=" | ")
    for row in rows:
        print(*("" if row[title] is None else row[title] for title in titles), sep=" | ")


def images(data: Path) -> dict[str, tuple[Any, float]]:
    """Name -> pixels (H, W, 3) and µm/px."""
    found = {
        path.stem: (skimage.io.imread(path)[..., :3], 0.25)
        for path in sorted((data / "deepliif_ihc" / "images").glob("*.png"))
    }
    return found | {"immunohistochemistry": (skimage.data.immunohistochemistry(), 0.5)}  # type: ignore[no-untyped-call]


def measure(
    pictures: dict[str, tuple[Any, float]], folder: Path, weights: Path | None
) -> list[dict[str, Any]]:
    """A row for each image: percentages, thresholds, and how far both agree."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (rgb, mpp) in pictures.items():
        skimage.io.imsave(folder / f"{name}.png", rgb, check_contrast=False)
        size = {f"PhysicalSize{axis}": mpp for axis in "XY"}
        tifffile.imwrite(
            folder / f"{name}.ome.tif",
            rgb,
            photometric="rgb",
            tile=(256, 256),
            metadata={"axes": "YXS", **size},
        )
    slides = [folder / f"{name}.ome.tif" for name in pictures]
    project = library.create_project(folder / "project", slides)
    config = from_dict({"slide": {"stain": "h-dab"}})
    model = Model.load(weights) if weights else library.train(project, settings=config)
    run = from_dict({"slide": {"stain": "h-dab"}, "result": {"positive": f"dab-mean={THRESHOLD}"}})
    outcomes = library.segment(project, model, settings=run)
    return [
        row(name, mpp, Path(str(outcome.results)), folder / f"{name}.png")
        for (name, (_, mpp)), outcome in zip(pictures.items(), outcomes, strict=True)
    ]


def row(name: str, mpp: float, results: Path, picture: Path) -> dict[str, Any]:
    """One image."""
    table = read_table(results / "nuclei.parquet")
    dab = table["DAB: Mean"].to_numpy()
    found, note = threshold_between(dab)
    theirs = positive_cell_detection(picture, mpp)
    contours = shapely.from_wkb(table["geometry"].to_numpy(zero_copy_only=False))
    difference = agreement = both = None
    if theirs is not None:
        point, nucleus = shapely.STRtree(contours).query(
            shapely.points(theirs[:, :2]), predicate="intersects"
        )
        both = len(point)
        difference = round(float(np.median(np.abs(theirs[point, 2] - dab[nucleus]))), 3)
        same = (theirs[point, 3] == 1) == (dab[nucleus] >= THRESHOLD)
        agreement = round(100 * float(same.mean()), 1)
    return {
        "image": name,
        "nuclei": len(dab),
        f"positive % at {THRESHOLD}": percent(dab >= THRESHOLD),
        "threshold found": found if note is None else None,
        "positive % (auto)": percent(dab >= found),
        "QuPath: nuclei": None if theirs is None else len(theirs),
        f"QuPath: positive % at {THRESHOLD}": None if theirs is None else percent(theirs[:, 3] > 0),
        "in both": both,
        "same class %": agreement,
        "median difference of DAB OD": difference,
    }


def percent(which: Any) -> float:
    """The percentage of true values (N,)."""
    return round(100 * float(np.mean(which)), 1)


def positive_cell_detection(picture: Path, mpp: float) -> Any:
    """x, y, DAB OD mean and whether it is positive (N, 4), of QuPath; None without a QuPath."""
    try:
        app = Path(find_qupath().partition(" in ")[2])
    except ProjectError:
        return None
    command = sorted(app.parents[1].glob("bin/QuPath*"))[0]
    script = picture.with_suffix(".groovy")
    text = DETECT.replace("MPP", str(mpp)).replace("THRESHOLD", str(THRESHOLD), 1)
    script.write_text(text, encoding="utf-8")
    done = subprocess.run(
        [command, "script", "-i", picture, script], capture_output=True, encoding="utf-8"
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    if not lines:
        raise SystemExit(f"QuPath failed on {picture}:\n{done.stdout[-3000:]}")
    return np.array(json.loads(lines[0].removeprefix("FOUND ")), float).reshape(-1, 4)


if __name__ == "__main__":
    main()
