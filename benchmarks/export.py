"""Time and memory of exporting a million nuclei.

    python benchmarks/export.py [--counts N ...] [--to FORMAT ...] [--json]

Writes made-up nuclei of 24 corners and 15 measurements beside a copy of the sample project, as a
run does, and exports them, each time in a process of its own: memory is the most that it used.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from patchcl_qupath.config import ResultConfig
from patchcl_qupath.datatypes import Nuclei
from patchcl_qupath.project import open_project
from writing import SAMPLE, nuclei, record

COUNTS = (100_000, 1_000_000)
FORMATS = ("csv", "parquet", "geojson", "visium-hd")
_BATCH = 20_000  # nuclei of a tile


def main() -> None:
    """Print a table, or with --json one line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS, help="numbers of nuclei")
    parser.add_argument("--to", nargs="+", default=FORMATS, help="formats")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    arguments = parser.parse_args()
    rows = [row for count in arguments.counts for row in measure(count, arguments.to)]
    if arguments.json:
        print(json.dumps(rows))
        return
    print("  nuclei  format     seconds  of CPU  peak MB     file MB")
    for row in rows:
        print(
            f"{row['nuclei']:>8}  {row['to']:<9}  {row['seconds']:7.1f}  {row['cpu']:6.1f}  "
            f"{row['peak_mb']:7.0f}  {row['file_mb']:10.0f}"
        )


def measure(count: int, formats: list[str]) -> list[dict[str, Any]]:
    """A row for each format."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("project.qpproj", "CMU-1-Small-Region.svs"):
            shutil.copy(SAMPLE / name, folder)
        project = open_project(Path(folder), "files")
        (entry,) = project.images()
        result = record(entry, "run", count)
        project.write(entry, batches(count), ResultConfig(), result)
        rows = []
        for to in formats:
            context = multiprocessing.get_context("spawn")
            with context.Pool(1) as pool:
                row = pool.apply(export_once, (folder, to))
            rows.append({"nuclei": count, "to": to, **row})
        return rows


def batches(count: int) -> Iterator[Nuclei]:
    """Made-up nuclei, tile by tile."""
    found = nuclei(min(count, _BATCH), "run")
    for _ in range(math.ceil(count / _BATCH)):
        yield found


def export_once(folder: str, to: str) -> dict[str, float]:
    """Time and memory of one export, without the time to import libraries."""
    from patchcl_qupath.config import ExportFormat
    from patchcl_qupath.exports.command import Request, export

    project = open_project(Path(folder), "files")
    request = Request(to=ExportFormat(to), output=Path(folder) / f"out-{to}")
    began, before = time.perf_counter(), time.process_time()
    exported = export(project, project.images(), request)
    seconds, cpu = time.perf_counter() - began, time.process_time() - before
    memory = psutil.Process().memory_info()
    size = sum(Path(file.path).stat().st_size for file in exported.files)
    return {
        "seconds": seconds,
        "cpu": cpu,
        "peak_mb": peak_mb(memory),
        "file_mb": size / 1e6,
    }


def peak_mb(memory: Any) -> float:
    """The most memory that this process used, in MB, by what the system offers."""
    if hasattr(memory, "peak_wset"):  # Windows
        return float(memory.peak_wset) / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


if __name__ == "__main__":
    main()
