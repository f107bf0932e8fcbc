"""Time of nuclei segmentation beside other programs, on one slide with the same cores.

    python benchmarks/beside.py [--mm2 MM2] [--rounds N] [--cores N] [--model NAME.pt]
                                [--network FILE ...] [--qupath DIR] [--json]

The slide is generated as in ``speed.py``. In each round, all programs take their turn; printed are
medians over rounds, and how often this program's time fits into each. Programs:

ours        `patchcl-qp run`, from .qpproj to written nuclei
QuPath      its cell detection (without cells) on the whole image, from .qpproj to a saved image
            (where there is a QuPath); once with the start of Java, once without
classical   scikit-image: hematoxylin, Otsu's threshold, watershed of the distance, one process a
            core; nuclei are measured, and not written
FILE        an ONNX or OpenVINO network (StarDist, InstanSeg, HoVer-Next ...), run by OpenVINO on
            tiles of 512 px with a halo of 64: reading and the network alone, without what separates
            nuclei afterwards

Cores are the first ones of this machine (Linux: a process's affinity, which others inherit).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import skimage.color
import skimage.feature
import skimage.filters
import skimage.measure
import skimage.morphology
import skimage.segmentation
from numpy.typing import NDArray
from scipy import ndimage

from patchcl_qupath.datatypes import Box, ImageEntry
from patchcl_qupath.errors import ProjectError
from patchcl_qupath.models.openvino_model import load_openvino
from patchcl_qupath.project.installed import find_qupath
from patchcl_qupath.slides.slide import Slide
from speed import COMMAND, MPP, SAMPLE, write_mosaic

SIDE, HALO = 512, 64  # working px
MIN_PX, PEAKS_PX = 40, 5
OTSU_PX = 16  # of a thumbnail, to which the threshold is fitted

OTSU: Any = skimage.filters.threshold_otsu
PEAKS: Any = skimage.feature.peak_local_max
WATERSHED: Any = skimage.segmentation.watershed
MEASURED: Any = skimage.measure.regionprops_table

DETECTION = """
def began = System.nanoTime()
QP.setImageType('BRIGHTFIELD_H_E')
QP.createFullImageAnnotation(true)
QP.runPlugin('qupath.imagej.detect.cells.WatershedCellDetection', '''{
    "detectionImageBrightfield": "Hematoxylin OD", "requestedPixelSizeMicrons": 0.5,
    "backgroundRadiusMicrons": 8, "backgroundByReconstruction": true, "medianRadiusMicrons": 0,
    "sigmaMicrons": 1.5, "minAreaMicrons": 10, "maxAreaMicrons": 400, "threshold": 0.1,
    "maxBackground": 2, "watershedPostProcess": true, "cellExpansionMicrons": 0,
    "includeNuclei": true, "smoothBoundaries": true, "makeMeasurements": true}''')
def seconds = (System.nanoTime() - began) / 1e9
new File(args[0]).text = "${QP.getDetectionObjects().size()} ${seconds}"
"""

Timing = dict[str, float]  # seconds by program


def main() -> None:
    """Print the medians and ratios, or with --json one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mm2", type=float, default=6.25)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--model", type=Path, help="our model; trained on the sample if not given")
    parser.add_argument("--network", type=Path, nargs="*", default=[])
    parser.add_argument("--qupath", type=Path, help="folder of QuPath")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    with tempfile.TemporaryDirectory() as folder:
        project = prepared(Path(folder), options.mm2, options.model)
        programs = chosen(project, options)
        rounds = [round_of(programs) for _ in range(options.rounds)]
    medians = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    if options.json:
        print(json.dumps({"cores": options.cores, "mm2": options.mm2, "seconds": medians}))
        return
    for name, seconds in medians.items():
        compared = "ours without its start" if name.endswith("start") else "ours"
        ratios = sorted(one[name] / one[compared] for one in rounds)
        print(
            f"{name}: {seconds:.1f} s, {seconds / options.mm2:.2f} s per mm², "
            f"{statistics.median(ratios):.2f} times {compared} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f} by round)"
        )


def chosen(project: Path, options: argparse.Namespace) -> dict[str, Callable[[], Timing]]:
    """The programs that are here."""
    slide = next(project.parent.glob("*.tif"))
    programs: dict[str, Callable[[], Timing]] = {
        "ours": partial(ours, project, options.cores),
        "classical": partial(classical, slide, options.cores),
    }
    for path in options.network:
        programs[path.name] = partial(network, slide, path, options.cores)
    try:
        home = find_qupath(options.qupath).partition(" in ")[2]
    except ProjectError as error:
        print(f"without QuPath: {error}", file=sys.stderr)
    else:
        programs["QuPath"] = partial(qupath, project, launcher(Path(home)))
    return programs


def round_of(programs: dict[str, Callable[[], Timing]]) -> Timing:
    """Each program once."""
    timings: Timing = {}
    for name, program in programs.items():
        took = program()
        print(f"  {name}: {list(took.values())} s", file=sys.stderr, flush=True)
        timings |= took
    return timings


def prepared(folder: Path, mm2: float, model: Path | None) -> Path:
    """A project of a generated slide, with a model."""
    slide = folder / "slide.tif"
    write_mosaic(slide, round(mm2**0.5 * 1000 / MPP))
    project = folder / "project"
    subprocess.run([*COMMAND, "init", project, slide], check=True, capture_output=True)
    models = project / "patchcl" / "models"
    if model is None:
        sample = folder / "sample"
        shutil.copytree(SAMPLE, sample, ignore=shutil.ignore_patterns("patchcl"))
        subprocess.run([*COMMAND, "train", sample], check=True, capture_output=True)
        model = sample / "patchcl" / "models" / "patchcl.pt"
    models.mkdir(parents=True)
    for suffix in (".json", ".pt"):
        shutil.copy(model.with_suffix(suffix), models / f"patchcl{suffix}")
    return project


def ours(project: Path, cores: int) -> Timing:
    """This program, without what an earlier round left."""
    for left in ("runs", "results", "report"):
        shutil.rmtree(project / "patchcl" / left, ignore_errors=True)
    command: list[str | Path] = [
        *COMMAND,
        "run",
        project,
        "--backend",
        "files",
        "--device",
        "cpu",
        "--json",
    ]
    began = time.perf_counter()
    printed = subprocess.run(
        [*command, "--workers", str(cores)], check=True, capture_output=True, text=True
    ).stdout
    whole, (image,) = time.perf_counter() - began, json.loads(printed)["images"]
    return {"ours": whole, "ours without its start": image["seconds"]}


def launcher(app: Path) -> Path:
    """QuPath's command, from the folder that paquo finds."""
    homes = (app, *app.parents[:3])
    found = (path for home in homes for path in sorted(home.glob("bin/QuPath*")))
    return next(path for path in found if "-" not in path.suffix)


def qupath(project: Path, command: Path) -> Timing:
    """QuPath's own detection, with and without the start of Java."""
    script, answer = project / "detect.groovy", project / "answer.txt"
    script.write_text(DETECTION)
    answer.unlink(missing_ok=True)
    file = project / "project.qpproj"
    began = time.perf_counter()
    asked: list[str | Path] = [command, "script", "-s", "-p", file, script, "-a", answer]
    subprocess.run(asked, check=True, capture_output=True)
    whole = time.perf_counter() - began
    _, detecting = answer.read_text().split()
    shutil.rmtree(project / "data", ignore_errors=True)
    return {"QuPath": whole, "QuPath without its start": float(detecting)}


def classical(path: Path, cores: int) -> Timing:
    """Otsu's threshold and a watershed, tile by tile in processes."""
    slide, began = opened(path), time.perf_counter()
    threshold = float(OTSU(hematoxylin(slide.thumbnail(OTSU_PX * MPP))))
    with ProcessPoolExecutor(cores) as pool:
        found = pool.map(partial(watershed, slide, threshold), boxes(slide), chunksize=4)
        assert sum(found) > 0
    return {"classical": time.perf_counter() - began}


def watershed(slide: Slide, threshold: float, box: Box) -> int:
    """How many nuclei a tile has, with their measurements."""
    stain = ndimage.gaussian_filter(hematoxylin(slide.read(box.grow(HALO, slide.shape))), 1)
    mask = skimage.morphology.remove_small_objects(stain > threshold, max_size=MIN_PX)
    distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 1)
    peaks = PEAKS(distance, min_distance=PEAKS_PX, labels=mask)
    markers = np.zeros(mask.shape, np.int32)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    labels = WATERSHED(-distance, markers, mask=mask)
    names = ("label", "area", "centroid", "eccentricity", "solidity", "intensity_mean")
    return len(MEASURED(labels, stain, properties=names)["label"])


def hematoxylin(rgb: NDArray[np.uint8]) -> NDArray[np.float64]:
    """(H, W), by scikit-image's colour deconvolution."""
    return np.asarray(skimage.color.rgb2hed(rgb)[..., 0])


def network(slide_path: Path, path: Path, cores: int) -> Timing:
    """An ONNX or OpenVINO network on all tiles, one request a core."""
    slide, core = opened(slide_path), load_openvino().Core()
    model, side = core.read_model(path), SIDE + 2 * HALO
    channels_last = model.input(0).partial_shape[-1].get_min_length() == 3
    model.reshape([1, side, side, 3] if channels_last else [1, 3, side, side])
    streams = {"NUM_STREAMS": cores, "INFERENCE_NUM_THREADS": cores}
    compiled = core.compile_model(model, "CPU", streams)
    began = time.perf_counter()

    def run(box: Box) -> None:
        pixels = slide.read(box.grow(HALO, slide.shape))
        missing = [(0, side - n) for n in pixels.shape[:2]]
        x = np.pad(pixels, [*missing, (0, 0)]).astype(np.float32)[None] / 255
        compiled.create_infer_request().infer(
            {0: x if channels_last else np.ascontiguousarray(x.transpose(0, 3, 1, 2))}
        )

    with ThreadPoolExecutor(cores) as threads:
        list(threads.map(run, boxes(slide)))
    return {path.name: time.perf_counter() - began}


def opened(path: Path) -> Slide:
    return Slide.open(ImageEntry("1", path.name, path))


def boxes(slide: Slide) -> Iterator[Box]:
    """Tiles of the working grid."""
    rows, cols = slide.shape
    for row in range(0, rows, SIDE):
        for col in range(0, cols, SIDE):
            yield Box(row, col, min(row + SIDE, rows), min(col + SIDE, cols))


if __name__ == "__main__":
    main()
