"""A real QuPath for tests: found as paquo finds it, run without a window, in its own process."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely

from patchcl_qupath.datatypes import Nuclei

# No JVM starts here: paquo starts one only when paquo.java is imported.
_FIND = """
from paquo._config import settings, to_kwargs
from paquo.jpype_backend import find_qupath
print(find_qupath(**to_kwargs(settings)).app_dir)
"""
# Groovy before calls of draw(name, class, x, y, width, height), which add annotations.
DRAW_RECTANGLES = """
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs

def draw = { String name, String of, double x, double y, double width, double height ->
    def roi = ROIs.createRectangleROI(x, y, width, height, ImagePlane.getDefaultPlane())
    def annotation = PathObjects.createAnnotationObject(roi, PathClass.fromString(of))
    annotation.setName(name)
    hierarchy.addObject(annotation)
}
"""


def launcher() -> Path:
    """QuPath's command; skips the test where there is none."""
    command, reason = _find_launcher()
    if command is None:
        pytest.skip(reason)
    return command


@functools.cache
def _find_launcher() -> tuple[Path | None, str]:
    """QuPath's command, or None and why there is none."""
    found = subprocess.run([sys.executable, "-c", _FIND], capture_output=True, text=True)
    if found.returncode:
        return None, f"no QuPath: {found.stderr.strip().splitlines()[-1]}"
    home = Path(found.stdout.strip()).parents[1]  # Linux: HOME/lib/app
    commands = [path for path in home.glob("bin/QuPath*") if "-" not in path.suffix]
    if not commands:
        return None, f"no QuPath: {home} has no bin/QuPath"
    return sorted(commands)[0], ""


def run_script(project: Path, script: Path, *options: str) -> str:
    """QuPath's log of a script, run on each image of a .qpproj.

    QuPath's exit status is 0 even where the script threw: read the log, or what the script left.
    """
    command = [launcher(), "script", *options, "-p", project, script]
    quick = {
        "JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"
    }  # starts in half the time
    done = subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=120, env=os.environ | quick
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_project(folder: Path, slide: Path, images: list[str]) -> Path:
    """A .qpproj as QuPath 0.5 writes it: the same slide under several names, ids from 1."""
    folder.mkdir(parents=True)
    uri = re.sub("^file://", "file:", slide.resolve().as_uri())
    builder = "qupath.lib.images.servers.openslide.OpenslideServerBuilder"
    entries = [
        {
            "serverBuilder": {
                "builderType": "uri",
                "providerClassName": builder,
                "uri": uri,
                "args": [],
            },
            "entryID": number,
            "randomizedName": f"{number}",
            "imageName": name,
            "metadata": {},
        }
        for number, name in enumerate(images, start=1)
    ]
    project = folder / "project.qpproj"
    content = {
        "version": "0.5.1",
        "createTimestamp": 1735689600000,
        "modifyTimestamp": 1735689600000,
        "uri": project.as_uri(),
        "lastID": len(entries),
        "images": entries,
    }
    project.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return project


class Session:
    """One QuPath for many scripts, in a process of its own, apart from the code under test."""

    def __init__(self) -> None:
        launcher()  # skips
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def run(self, project: Path, script: str) -> dict[str, Any]:
        """What a Groovy script returns for each image, by name, as JSON text. It sees
        imageData, entry and hierarchy."""
        self._pipe.send((project, script))
        found = self._pipe.recv()
        if isinstance(found, str):
            raise AssertionError(found)
        return {name: json.loads(text) for name, text in found.items()}

    def close(self) -> None:
        """End it."""
        self._pipe.close()
        self._process.join(timeout=10)
        self._process.kill()


def _serve(pipe: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    import jpype
    from paquo.projects import QuPathProject

    while True:
        try:
            path, script = pipe.recv()
        except EOFError:
            os._exit(0)
        found = {}
        try:
            for image in QuPathProject(path, mode="r+").images:
                data = image.java_object.readImageData()
                binding = jpype.JClass("groovy.lang.Binding")()
                binding.setVariable("imageData", data)
                binding.setVariable("hierarchy", data.getHierarchy())
                binding.setVariable("entry", image.java_object)
                shell = jpype.JClass("groovy.lang.GroovyShell")(binding)
                found[image.image_name] = str(shell.evaluate(jpype.JString(script)))
            pipe.send(found)
        except Exception as error:
            pipe.send(f"{type(error).__name__}: {error}")


def nuclei(columns: int, rows: int, image: str, *, run: int = 1) -> Nuclei:
    """Blobs of 20 vertices, and one rectangle, on a grid of 40 px; level 0.

    As in real runs, contours, and with them ids, differ a little from run to run.
    """
    corner = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    radius = 8 + 2 * np.cos(3 * corner) + 0.1 * run
    polygons = []
    for k in range(columns * rows):
        x, y = 40 + 40 * (k % columns), 40 + 40 * (k // columns) + 0.03 * k
        xy = np.stack([x + radius * np.cos(corner), y + radius * np.sin(corner)], axis=1)
        polygons.append(shapely.Polygon(np.round(xy, 2)))
    polygons[8] = shapely.box(353.17, 30.41, 366.83, 48.29 + run)
    count = np.arange(len(polygons))
    names = {"index": count, "Nucleus: Area µm^2": count * 1.7 + 0.123, "-": -count / 3}
    return Nuclei(
        np.array(polygons, dtype=object),
        {name: values.astype(np.float32) for name, values in names.items()},
        np.array([str(uuid.uuid5(uuid.NAMESPACE_OID, f"{image} {p.wkt}")) for p in polygons]),
    )


def by_index(objects: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The nuclei of an image, by their measurement 'index'."""
    found = [o for o in objects if "index" in o["measurements"]]
    numbered = {int(o["measurements"]["index"]): o for o in found}
    assert len(numbered) == len(found)
    return numbered
