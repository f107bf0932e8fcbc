"""Speed of segmentation by stage, and its growth with the size of the slide.

    python benchmarks/speed.py [--areas MM2 ...] [--expand UM] [--json]

Trains on the sample project, as `patchcl-qp run` does; then segments the sample and generated
slides at 0.25 µm/px with that model: mosaics of real tissue in tiled JPEG pyramids, by default of
6, 25 and 100 mm² (40,000 x 40,000 px). Each run is a process of its own, from .qpproj to written
nuclei. For comparison across machines, the network's speed is also given as a fraction of the
speed of a product of float32 matrices.

With --expand, runs with and without cells of that expansion alternate on each generated slide, and
nothing else is measured.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from patchcl_qupath.config import Config
from patchcl_qupath.datatypes import Box
from patchcl_qupath.models.network import NucleusNetwork
from patchcl_qupath.project import open_project
from patchcl_qupath.slides.slide import Slide

ROOT = Path(__file__).resolve().parents[1]
SAMPLE = ROOT / "sample_project"
REAL = ROOT.parent / "shared" / "data" / "monuseg_train" / "images"
COMMAND = [sys.executable, "-m", "patchcl_qupath.cli"]
MPP = 0.25
TILE = 256
_TURNS = 3  # of runs with and without cells
CORES = os.cpu_count() or 1


def main() -> None:
    """Print the figures, and with --json those of the largest slide as one line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--areas", nargs="+", type=float, default=[6.25, 25, 100], help="mm²")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    parser.add_argument("--expand", type=float, metavar="UM", help="only what cells cost")
    options = parser.parse_args()
    gemm = matrix_product()
    print(f"{CORES} cores, {gemm / 1e9:.0f} GFLOP/s in float32 matrix products")
    with tempfile.TemporaryDirectory() as folder:
        sample = Path(folder) / "sample"
        leave = shutil.ignore_patterns("patchcl", "data", "classifiers")
        shutil.copytree(SAMPLE, sample, ignore=leave)
        seconds, trained, peak_gb = timed("train", sample)
        print(f"training on the sample: {seconds:.0f} s, {peak_gb:.2f} GB")
        log = trained["training"]
        pace = len(log["loss"]) / log["seconds"]
        waiting = log["seconds_for_batches"] / log["seconds"]
        print(f"  self-training: {pace:.1f} steps/s, {1 - waiting:.0%} of the time in the network")
        seconds, *_ = timed("run", sample, "--backend", "files", "--expand", "5")
        print(f"a run that compiles what is not compiled yet: {seconds:.0f} s for the sample")
        shutil.rmtree(sample / "patchcl" / "runs")
        figures = [] if options.expand else [measure("sample", sample, gemm)]
        first = Path(folder) / f"{min(options.areas):g} mm2.tif"
        for area in sorted(options.areas):
            slide = Path(folder) / f"{area:g} mm2.tif"
            write_mosaic(slide, round(area**0.5 * 1000 / MPP))
            project = Path(folder) / f"{area:g}"
            subprocess.run([*COMMAND, "init", project, slide], check=True, capture_output=True)
            shutil.copytree(sample / "patchcl" / "models", project / "patchcl" / "models")
            if options.expand:
                print_ratio(f"{area:g} mm²", project, options.expand)
                slide.unlink()
                continue
            figures.append(measure(f"{area:g} mm²", project, gemm))
            if slide == first:
                print_cells(project, figures[-1])
            for other in (("--workers", "1"), ("--engine", "torch")) if slide == first else ():
                shutil.rmtree(project / "patchcl" / "runs")
                _, outcome, _ = timed("run", project, "--backend", "files", *other)
                slower = outcome["images"][0]["main_seconds"]["tiles"] / figures[-1]["tiles_s"]
                print(f"  {' '.join(other)}: tiles take {slower:.2f} times as long", flush=True)
            slide.unlink()
    if options.expand:
        return
    *_, smaller, largest = figures
    time_4x = 4 * largest["s_per_mm2"] / smaller["s_per_mm2"]
    print(f"4 times the area takes {time_4x:.2f} times the time")
    if options.json:
        keys = ("s_per_mm2", "network_share", "network_of_gemm", "peak_gb", "nuclei_per_s_written")
        print(json.dumps({key: largest[key] for key in keys} | {"time_4x_area": time_4x}))


def measure(name: str, project: Path, gemm: float) -> dict[str, float]:
    """Segment the slide of a project, print its times, and return the figures."""
    seconds, outcome, peak_gb = timed("run", project, "--backend", "files")
    (image,) = outcome["images"]
    area, worker, main = image["tissue_mm2"], image["worker_seconds"], image["main_seconds"]
    flop = network_flop() * image["network_px"]
    figures = {
        "mm2": area,
        "nuclei": image["nuclei"],
        "tiles_s": main["tiles"],
        "write_s": main["write"],
        "run_s": image["seconds"],
        "s_per_mm2": image["seconds"] / area,
        "network_share": worker["network"] / (CORES * image["seconds"]),
        "network_of_gemm": flop / worker["network"] * CORES / gemm,
        "peak_gb": peak_gb,
        "nuclei_per_s_written": image["nuclei"] / main["write"],
    }
    print(
        f"{name}: {area:.2f} mm², {image['nuclei']:,} nuclei, {image['tiles']} tiles, "
        f"{image['seconds']:.0f} s and {seconds - image['seconds']:.0f} s to start, "
        f"{figures['s_per_mm2']:.2f} s/mm², {peak_gb:.2f} GB",
        flush=True,
    )
    print("  workers: " + shares(worker, CORES * image["seconds"]))
    print("  the run: " + shares(main, image["seconds"]))
    print(
        f"  network: {image['network_px'] / worker['network'] * CORES / 1e6:.1f} Mpx/s, "
        f"{figures['network_of_gemm']:.0%} of the matrix product; written: "
        f"{figures['nuclei_per_s_written']:,.0f} nuclei/s"
    )
    return figures


def print_cells(project: Path, run: dict[str, float]) -> None:
    """Grow cells after a run, which has the nuclei already, and print how much more they take."""
    _, outcome, _ = timed("run", project, "--backend", "files", "--expand", "5")
    main, worker = (outcome["images"][0][f"{of}_seconds"] for of in ("main", "worker"))
    tiles, writing = main["tiles"] / run["run_s"], (main["write"] - run["write_s"]) / run["run_s"]
    print(f"  --expand 5: {tiles:.0%} of the run more for cells, {writing:.0%} more to write them")
    print("  their workers: " + shares(worker, CORES * run["run_s"]), flush=True)


def print_ratio(name: str, project: Path, expand_um: float) -> None:
    """Print the time of runs with cells as a multiple of that of runs without, in turn."""
    took: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
    for with_cells in (False, True) * _TURNS:
        shutil.rmtree(project / "patchcl" / "runs", ignore_errors=True)
        cells = ("--expand", f"{expand_um:g}") if with_cells else ()
        seconds, outcome, _ = timed("run", project, "--backend", "files", *cells)
        took[with_cells].append((seconds, outcome["images"][0]["seconds"]))
    without, with_ = (np.median(took[with_cells], axis=0) for with_cells in (False, True))
    image = outcome["images"][0]
    print(f"{name}, {image['nuclei']:,} nuclei, without cells and with --expand {expand_um:g}:")
    for what, one, other in zip(("the command", "the image alone"), without, with_, strict=True):
        print(f"  {what}: {one:.1f} s, {other:.1f} s: {other / one - 1:.0%} more")
    print("  workers: " + shares(image["worker_seconds"], CORES * without[1]))
    print("  the run: " + shares(image["main_seconds"], without[1]), flush=True)


def shares(seconds: dict[str, float], total: float) -> str:
    """Each stage's fraction of a time, as text."""
    return ", ".join(f"{stage} {part / total:.0%}" for stage, part in seconds.items())


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


def matrix_product() -> float:
    """FLOP/s of all cores in float32 matrix products: the median of nine."""
    a = torch.rand(2048, 2048)
    took = []
    for _ in range(9):
        began = time.perf_counter()
        a @ a
        took.append(time.perf_counter() - began)
    return float(2 * 2048**3 / np.median(took))


def network_flop() -> float:
    """FLOP of the network's convolutions per working pixel, as in 8 bits: see ``UpBlock``."""
    network, side = NucleusNetwork(Config().selftrain.widths).eval(), 64
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, side, side))
    return float(counter.get_total_flops()) / side**2


def stamp() -> NDArray[np.uint8]:
    """Tissue at 0.25 µm/px, whole multiples of 4 x 4 tiles: of real images, if available."""
    side = 4 * TILE
    if REAL.is_dir():
        paths = sorted(REAL.glob("*.png"))[:20]
        images = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    else:
        (entry,) = open_project(SAMPLE).images()
        dense = Slide.open(entry).read(Box(1500, 900, 2000, 1400))
        dense = dense.repeat(2, axis=0).repeat(2, axis=1)
        images = [np.rot90(dense, turn) for turn in range(4)]
    whole = [
        np.pad(i, ((0, side - len(i)), (0, side - i.shape[1]), (0, 0)), "symmetric") for i in images
    ]
    across = len(whole) // 4
    return np.concatenate(
        [np.concatenate(whole[across * row : across * (row + 1)], axis=1) for row in range(4)]
    )


def write_mosaic(path: Path, side: int) -> None:
    """A slide of ``side`` x ``side`` px, all tissue: a tiled JPEG pyramid that repeats the stamp.

    Each different tile is encoded only once.
    """
    tissue = stamp()
    reduced = tissue.reshape(len(tissue) // 4, 4, tissue.shape[1] // 4, 4, 3).mean(axis=(1, 3))
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for level, (pixels, step) in enumerate(((tissue, 1), (reduced.astype(np.uint8), 4))):
            size = -(-side // step)
            tiff.write(
                encoded(pixels, size),
                shape=(size, size, 3),
                dtype=np.uint8,
                photometric="ycbcr",
                subsampling=(2, 2),
                tile=(TILE, TILE),
                compression="jpeg",
                resolution=(1e4 / (MPP * step), 1e4 / (MPP * step)),
                resolutionunit="CENTIMETER",
                subfiletype=1 if level else 0,
            )


def encoded(pixels: NDArray[np.uint8], size: int) -> Iterator[bytes]:
    """The JPEG tiles of an image (size, size, 3) that repeats ``pixels``, row by row."""
    rows, cols = (n // TILE for n in pixels.shape[:2])
    tiles = [
        [
            imagecodecs.jpeg8_encode(
                np.ascontiguousarray(pixels[TILE * r : TILE * (r + 1), TILE * c : TILE * (c + 1)]),
                level=85,
                subsampling="420",
            )
            for c in range(cols)
        ]
        for r in range(rows)
    ]
    across = -(-size // TILE)
    return (tiles[r % rows][c % cols] for r in range(across) for c in range(across))


if __name__ == "__main__":
    main()
