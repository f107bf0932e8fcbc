"""Time of writing nuclei into a QuPath project, by step.

    python benchmarks/writing.py [--counts N ...] [--json] [--qupath DIR]

Needs a QuPath. Writes made-up nuclei of 24 corners and 15 measurements into a copy of the sample
project, and then other nuclei in their place, as a second run does.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from patchcl_qupath import __version__
from patchcl_qupath.config import Config, ResultConfig, to_dict
from patchcl_qupath.datatypes import ImageEntry, Nuclei
from patchcl_qupath.project import open_project
from patchcl_qupath.project.paquo import PaquoProject
from patchcl_qupath.slides.stain_vectors import H_E
from patchcl_qupath.storage.records import ResultRecord, SlideProvenance, file_signature

SAMPLE = Path(__file__).parent.parent / "sample_project"
COUNTS = (20_000, 100_000)
CORNERS, MEASUREMENTS = 24, 15
START = ("start Java", "load QuPath", "load scripts")  # once for all images of a run


def main() -> None:
    """Print a table, or with --json one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS, help="numbers of nuclei")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.add_argument("--qupath", type=Path, help="folder of QuPath")
    arguments = parser.parse_args()
    figures = [row for count in arguments.counts for row in measure(count, arguments.qupath)]
    if arguments.json:
        print(json.dumps(figures))
        return
    for row in figures:
        without = row["seconds"] - sum(row["steps"].get(step, 0) for step in START)
        print(
            f"{row['nuclei']:,} {row['type']}s, {row['run']} run: {row['seconds']:.1f} s, "
            f"{without:.1f} s without the start of Java"
        )
        for step, seconds in row["steps"].items():
            print(f"{seconds:8.2f} s  {step}")


def measure(count: int, qupath: Path | None) -> list[dict[str, Any]]:
    """Two runs that write ``count`` nuclei each; the second replaces those of the first."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("project.qpproj", "CMU-1-Small-Region.svs"):
            shutil.copy(SAMPLE / name, folder)
        project = open_project(Path(folder), "paquo", qupath)
        assert isinstance(project, PaquoProject)
        (entry,) = project.images()
        with closing(project):
            for run in ("first", "second"):
                found = nuclei(count, run)
                result = record(entry, run, count)
                began = time.perf_counter()
                project.write(entry, [found], ResultConfig(), result)
                seconds = time.perf_counter() - began
                steps = project.process.seconds
                # Java starts while files are written.
                steps["files (beyond the start of Java)"] = seconds - sum(steps.values())
                rows.append(
                    {
                        "nuclei": count,
                        "type": result.object_type,
                        "run": run,
                        "seconds": seconds,
                        "steps": steps,
                    }
                )
    return rows


def record(entry: ImageEntry, run: str, count: int) -> ResultRecord:
    """The record of a run with ``count`` nuclei."""
    assert entry.mpp is not None
    return ResultRecord(
        run=run,
        image=entry.name,
        made="now",
        version=__version__,
        model="",
        engine="torch",
        config=to_dict(Config()),
        within=[],
        tissue_mm2=1.0,
        slide=SlideProvenance(file=file_signature(entry.path), mpp=entry.mpp),
        stains=H_E,
        failed_tiles=(),
        nuclei=count,
        object_type=ResultConfig().kind(count),
        files=(),
    )


def nuclei(count: int, run: str) -> Nuclei:
    """Blobs side by side over the whole sample slide, level 0."""
    columns = math.ceil(math.sqrt(count))
    k = np.arange(count)
    x, y = 10 + 2200 * (k % columns) / columns, 10 + 2940 * (k // columns) / columns  # (N,)
    corner = np.linspace(0, 2 * np.pi, CORNERS, endpoint=False)
    radius = 2 + 0.5 * np.cos(3 * corner) + 0.1 * (run == "second")  # (CORNERS,)
    contour = np.stack([radius * np.cos(corner), radius * np.sin(corner)], axis=1)
    corners = np.stack([x, y], axis=1)[:, None] + contour  # (N, CORNERS, 2)
    return Nuclei(
        shapely.polygons(corners.round(2)),
        {f"Measurement {i}": (k * 1.5 + i).astype(np.float32) for i in range(MEASUREMENTS)},
        np.array([str(uuid.uuid5(uuid.NAMESPACE_OID, f"{run} {i}")) for i in k]),
    )


if __name__ == "__main__":
    main()
