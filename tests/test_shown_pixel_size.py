"""A pixel size that QuPath shows and did not save: exported with the stains, and used."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import qupath
import test_regions
import test_scripts

from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.project import open_project
from patchcl_qupath.project.jvm import Process
from patchcl_qupath.project.paquo import PaquoProject
from patchcl_qupath.project.scripts import copy_scripts

STAINS = {
    "type": "BRIGHTFIELD_H_E",
    "background": [243.0, 240.0, 235.0],
    "stains": [
        {"name": "Hematoxylin", "vector": [0.7, 0.65, 0.3]},
        {"name": "Eosin", "vector": [0.1, 0.9, 0.4]},
    ],
}


def export(folder: Path, content: Any) -> None:
    """What groovy/export_regions.groovy leaves of the stains of the first image."""
    file = folder / "patchcl" / "stains" / "1.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), "utf-8")


def save_pixel_size(folder: Path, *sides: float) -> None:
    """As QuPath saves it in the project."""
    project = folder / "project.qpproj"
    content = json.loads(project.read_text("utf-8"))
    both = zip(("pixelWidth", "pixelHeight"), sides, strict=True)
    calibration = {name: {"value": side, "unit": "µm"} for name, side in both}
    content["images"][0]["serverBuilder"]["metadata"] = {"pixelCalibration": calibration}
    project.write_text(json.dumps(content), "utf-8")


def image(folder: Path) -> ImageEntry:
    return open_project(folder, "files").images()[0]


def test_a_shown_pixel_size_counts_until_the_image_is_saved(folder: Path) -> None:
    project = folder / "project.qpproj"
    content = json.loads(project.read_text("utf-8"))
    content["images"][0]["serverBuilder"]["metadata"] = {}
    project.write_text(json.dumps(content), "utf-8")
    export(folder, {"pixel_size_um": [0.25, 0.26]})
    assert (image(folder).mpp, image(folder).note) == ((0.25, 0.26), None)
    save_pixel_size(folder, 0.5, 0.5)
    assert image(folder).mpp == (0.25, 0.26)
    note = "its pixel size is 0.25 x 0.26 µm, as exported from QuPath, where 0.5 µm are saved: "
    assert str(image(folder).note).startswith(note)
    save_pixel_size(folder, 0.25, 0.26)
    assert (image(folder).mpp, image(folder).note) == ((0.25, 0.26), None)
    save_pixel_size(folder, 0.3, 0.3)
    data = folder / "data" / "1" / "data.qpdata"
    data.parent.mkdir(parents=True)
    data.touch()
    os.utime(data, ns=(2**62, 2**62))
    assert (image(folder).mpp, image(folder).note) == ((0.3, 0.3), None)


@pytest.mark.parametrize(
    "content",
    [
        None,
        STAINS,
        "damaged",
        {"pixel_size_um": None},
        {"pixel_size_um": 0.25},
        {"pixel_size_um": [0.25]},
        {"pixel_size_um": [0, 0.25]},
        {"pixel_size_um": ["a", "b"]},
        {"pixel_size_um": [float("inf"), 1]},
    ],
)
def test_exports_without_one_leave_that_of_the_project(folder: Path, content: Any) -> None:
    """Such as those of earlier versions."""
    save_pixel_size(folder, 0.3, 0.4)
    export(folder, content)
    assert (image(folder).mpp, image(folder).note) == ((0.3, 0.4), None)


def test_stains_are_read_beside_it(folder: Path) -> None:
    project = open_project(folder, "files")
    export(folder, {"pixel_size_um": [0.25, 0.25]})
    assert project.with_stains(image(folder)).stains is None
    export(folder, STAINS | {"pixel_size_um": [0.25, 0.25]})
    stains = project.with_stains(image(folder)).stains
    assert stains is not None
    assert stains.names == ("Hematoxylin", "Eosin")


def test_the_note_stays_beside_those_of_regions_and_stains(folder: Path) -> None:
    test_regions.export(folder, test_regions.feature(test_regions.TUMOR, "Tumor"))
    save_pixel_size(folder, 0.5, 0.5)
    export(folder, STAINS | {"pixel_size_um": [0.25, 0.25]})
    project = open_project(folder, "files")
    entry = project.with_regions(image(folder), ["Tumor", "Stroma"])
    entry = project.with_stains(project.with_drawn(entry, ["Tumor"]))
    own, other = str(entry.note).split("; ")
    assert own.startswith("its pixel size is 0.25 µm, as exported")
    assert other == "no annotation of class Stroma"


# ---------------------------------------------------------------- with a QuPath

SET = """
qupath.lib.scripting.QP.setPixelSizeMicrons(0.25, 0.26)
"""


@pytest.mark.qupath
@pytest.mark.parametrize("what", ["project", "image", "refine"])
def test_run_patchcl_hands_on_what_is_shown(tmp_path: Path, what: str) -> None:
    """Set by a line before the script: as in QuPath's window, without saving."""
    qupath.launcher()
    path = qupath.make_project(tmp_path / "project", test_scripts.SLIDE, ["one.svs", "two.svs"])
    copy_scripts(path)
    script = path.parent / "scripts" / "run_patchcl.groovy"
    test_scripts.write_failing(path.parent / "failing")
    test_scripts.settings(script, command=f"'{path.parent / 'failing'}'", what=f"'{what}'")
    script.write_text(SET + script.read_text("utf-8"), "utf-8")
    qupath.run_script(path, script)
    entries = open_project(path, "files").images()
    shown = (0.25, 0.26)
    assert [entry.mpp for entry in entries] == [shown, shown if what == "image" else None]


@pytest.mark.qupath
def test_what_qupath_reads_by_itself_is_that_of_the_project(
    tmp_path: Path, process: Process, session: qupath.Session
) -> None:
    """An export of it would outlive a pixel size that is saved in the project alone."""
    path = qupath.make_project(tmp_path / "project", test_scripts.SLIDE, ["a.svs"])
    session.run(path, "entry.saveImageData(imageData)\n'1'")
    project = open_project(path, "paquo")
    assert isinstance(project, PaquoProject)
    project = replace(project, process=process)
    project.with_stains(project.images()[0])
    assert project.layout.stains("1").exists()
    save_pixel_size(path.parent, 0.3, 0.3)
    assert project.reread().images()[0].mpp == (0.3, 0.3)
