"""What the program can use on this machine, and what a missing part would add."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil
import torch

from patchcl_qupath import __version__
from patchcl_qupath.config import CLUSTERS
from patchcl_qupath.errors import ConfigError, ProjectError
from patchcl_qupath.execution.workers import check_workers
from patchcl_qupath.memory import memory_limit
from patchcl_qupath.models import engines
from patchcl_qupath.models.network import NucleusNetwork, device
from patchcl_qupath.overlap import usable_cores
from patchcl_qupath.project.installed import find_qupath
from patchcl_qupath.slides.level import MissingReaderError
from patchcl_qupath.slides.openslide import FORMATS, openslide_version


@dataclass(frozen=True)
class Finding:
    """A part of the machine: what was found of it, or None; and advice on it."""

    part: str
    found: str | None
    note: str = ""


def findings(qupath: Path | None = None) -> Iterator[Finding]:
    """Each part in turn. ``qupath`` is QuPath's folder, if it is in no usual place."""
    yield Finding("program", f"patchcl-qupath {__version__}, Python {platform.python_version()}")
    note = (
        "" if memory_limit() > 4e9 else "a run takes 1 to 2 GB, more with many cores: use --workers"
    )
    yield Finding("machine", f"{platform.platform()}, {_cores()}, {_memory()}", note)
    yield _qupath(qupath)
    yield _engine()
    yield _gpu()
    readers = ("tiffslide", "tifffile", "imagecodecs", "pillow", "zarr")
    yield Finding("readers", ", ".join(f"{name} {version(name)}" for name in readers))
    yield _jpeg()
    yield _openslide()
    yield _workers()
    yield _queues()


def _cores() -> str:
    all_cores = os.cpu_count()
    try:
        usable = usable_cores()
    except ConfigError:  # which the workers are found to have, too
        return f"{all_cores} cores"
    return f"{usable} cores" if usable == all_cores else f"{usable} of {all_cores} cores"


def _memory() -> str:
    usable, all_bytes = memory_limit(), psutil.virtual_memory().total
    part = f"{usable / 1e9:.0f} of " if usable < all_bytes else ""
    return f"{part}{all_bytes / 1e9:.0f} GB"


def _qupath(folder: Path | None) -> Finding:
    try:
        return Finding("QuPath", find_qupath(folder), "it writes nuclei into projects by itself")
    except ProjectError as error:
        note = f"{error}. Without it, nuclei are left as files: import_nuclei.groovy imports them"
        return Finding("QuPath", None, note)


def _engine() -> Finding:
    kind = engines.choose("auto", NucleusNetwork)
    found = f"{kind}, torch {version('torch')}"
    if kind.is_openvino:
        return Finding("engine", f"{found}, OpenVINO {version('openvino')}")
    if device().type != "cpu":
        return Finding("engine", found)
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")  # it was measured there
    advice = "pip install openvino: runs take about half the time" if is_x86 else ""
    return Finding("engine", found, advice)


def _gpu() -> Finding:
    if torch.cuda.is_available():
        return Finding("GPU", torch.cuda.get_device_name())
    return Finding("GPU", None, "none is needed; with CUDA and its torch, training is faster")


def _jpeg() -> Finding:
    try:
        return Finding("JPEG", f"simplejpeg {version('simplejpeg')}")
    except PackageNotFoundError:
        note = "pip install simplejpeg: JPEG tiles are read in 0.7 of the time"
        return Finding("JPEG", None, note)


def _openslide() -> Finding:
    formats = ", ".join(sorted(FORMATS.values()))
    try:
        return Finding("OpenSlide", openslide_version(), f"it reads {formats}")
    except MissingReaderError:
        return Finding("OpenSlide", None, f"pip install 'patchcl-qupath[openslide]': {formats}")


def _workers() -> Finding:
    try:
        check_workers()
    except ConfigError as error:
        return Finding("workers", None, f"{error}. Without them, nothing is segmented")
    return Finding("workers", f"Dask {version('dask')}")


def _queues() -> Finding:
    there = [kind for kind, command in CLUSTERS.items() if shutil.which(command)]
    try:
        package: str | None = f"dask-jobqueue {version('dask-jobqueue')}"
    except PackageNotFoundError:
        package = None
    if there and package:
        notes = "; ".join(filter(None, map(_problem_of_jobs, there)))
        return Finding("job queue", f"{', '.join(there)}, {package}", notes)
    missing = [] if there else [f"none of {', '.join(dict.fromkeys(CLUSTERS.values()))} is here"]
    missing += [] if package else ["pip install 'patchcl-qupath[cluster]'"]
    return Finding("job queue", None, f"for --cluster: {'; '.join(missing)}")


def _problem_of_jobs(kind: str) -> str:
    """Why no job of a queue can be had, as far as that is known before one is submitted; or ''."""
    try:
        check_workers(cluster=kind)
    except ConfigError as error:
        return f"{kind}: {error}"
    return ""
