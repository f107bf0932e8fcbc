"""How long the main job takes, and that its memory does not grow with the slide.

    python benchmarks/speed.py [--json]

Runs the sample project in a copy: training, then segmentation. Then segments two generated
slides, one with 16 times the area of the other (mosaics of the sample's tissue, tiled JPEG
pyramids at 0.5 um/px), with the same model. Each run is a process of its own, as a user starts it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from patchcl_qupath.datatypes import Box
from patchcl_qupath.project import open_project
from patchcl_qupath.slide import Slide

SAMPLE = Path(__file__).parent.parent / "sample_project"
COMMAND = [sys.executable, "-m", "patchcl_qupath.cli"]


def main() -> None:
    """Print the table, or with --json one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    as_json = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder))
    width = max(len(name) for name in figures)
    for name, value in figures.items():
        print(f"{name:<{width}}  {value:.3g}")
    if as_json:
        print(json.dumps(figures))


def measure(folder: Path) -> dict[str, float]:
    """The figures, by name."""
    sample = folder / "sample"
    shutil.copytree(SAMPLE, sample, ignore=shutil.ignore_patterns("patchcl", "data", "classifiers"))
    train_s, _, _ = timed("train", sample)
    segment_s, outcome, _ = timed("run", sample, "--backend", "files")
    figures = {
        "cores": float(os.cpu_count() or 1),
        "train_s": train_s,
        "sample_s": segment_s,
        "sample_tissue_mm2": outcome["images"][0]["tissue_mm2"],
        "sample_s_per_mm2": outcome["images"][0]["seconds"] / outcome["images"][0]["tissue_mm2"],
    }
    for name, side in (("small", 3_000), ("large", 12_000)):
        project = folder / name
        slide = folder / f"{name}.tif"
        write_mosaic(slide, side)
        subprocess.run([*COMMAND, "init", project, slide], check=True, capture_output=True)
        shutil.copytree(sample / "patchcl" / "models", project / "patchcl" / "models")
        _, outcome, peak_gb = timed("run", project, "--backend", "files")
        image = outcome["images"][0]
        figures[f"{name}_tissue_mm2"] = image["tissue_mm2"]
        figures[f"{name}_s_per_mm2"] = image["seconds"] / image["tissue_mm2"]
        figures[f"{name}_peak_gb"] = peak_gb
    figures["memory_16x_area"] = figures["large_peak_gb"] / figures["small_peak_gb"]
    return figures


def timed(command: str, project: Path, *options: str) -> tuple[float, dict[str, Any], float]:
    """Run a command on a project -> (seconds, what it printed as JSON, peak memory in GB)."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [*COMMAND, command, project, "--json", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed: {printed.decode()}")
    return time.perf_counter() - began, json.loads(printed), usage.ru_maxrss * 1024 / 1e9


def write_mosaic(path: Path, side: int) -> None:
    """A slide of ``side`` x ``side`` px at 0.5 um/px, all tissue: the sample's densest part, again
    and again, every other one mirrored."""
    (entry,) = open_project(SAMPLE).images()
    stamp = Slide.open(entry).read(Box(1500, 900, 2500, 1500))
    stamp = np.concatenate([stamp, stamp[:, ::-1]], axis=1)
    stamp = np.concatenate([stamp, stamp[::-1]], axis=0)
    rows, cols = (-(-side // n) for n in stamp.shape[:2])
    level = np.tile(stamp, (rows, cols, 1))[:side, :side]
    options: dict[str, Any] = {"photometric": "rgb", "tile": (256, 256), "compression": "jpeg"}
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for reduced in range(3):
            step = 4**reduced
            tiff.write(
                level[::step, ::step],
                resolution=(1e4 / (0.5 * step), 1e4 / (0.5 * step)),
                resolutionunit="CENTIMETER",
                subfiletype=1 if reduced else 0,
                **options,
            )


if __name__ == "__main__":
    main()
