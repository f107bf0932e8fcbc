"""Counts and densities in QuPath are of the nuclei that are there, whatever was done to them."""

from __future__ import annotations

import json
import os
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import qupath
from click.testing import CliRunner
from qupath import nuclei
from results import result_of

from patchcl_qupath.cli import main
from patchcl_qupath.config import ResultConfig
from patchcl_qupath.project import open_project
from patchcl_qupath.status import image_status

ROOT = Path(__file__).parent.parent
SLIDE = ROOT / "sample_project" / "CMU-1-Small-Region.svs"

# One nucleus is deleted and one ignored, one drawn; from ten, cells are made; those in 'Tumor' get
# another parent, and the region another name. All else that is drawn or detected is no nucleus.
EDIT = """
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs

def square = { double x, double y, double side ->
    ROIs.createRectangleROI(x, y, side, side, ImagePlane.getDefaultPlane())
}
def draw = { roi, String name ->
    hierarchy.addObject(PathObjects.createAnnotationObject(roi, PathClass.fromString(name)))
}
def all = hierarchy.getAllObjects(false)
def nucleus = all.findAll { it.getMeasurements().containsKey('index') }
    .collectEntries { [it.getMeasurements()['index'] as int, it] }
hierarchy.removeObject(nucleus[1], true)
nucleus[2].setPathClass(PathClass.fromString('Ignore*'))
hierarchy.addObjects((40..49).collect { k ->
    double x = nucleus[k].getROI().getCentroidX()
    double y = nucleus[k].getROI().getCentroidY()
    PathObjects.createCellObject(square(x - 15, y - 15, 30), nucleus[k].getROI(), null)
})
hierarchy.removeObjects((40..49).collect { nucleus[it] }, true)
hierarchy.addObjects((0..4).collect {
    PathObjects.createDetectionObject(square(600 + 30 * it, 600, 15))
})
draw(square(0, 400, 500), 'Tumor')
draw(square(1000, 1000, 200), 'Vessel')
draw(square(700, 100, 16), null)   // a nucleus that was missed
draw(square(1500, 1500, 100), 'PatchCL: corrected')
def region = all.find { it.getName() == 'PatchCL' }
region.setLocked(false)
region.setName('my slide')
hierarchy.resolveHierarchy()
entry.saveImageData(imageData)
'1'
"""
LOOK = """
import groovy.json.JsonOutput

def region = hierarchy.getAllObjects(false).find { it.getName() in ['PatchCL', 'my slide'] }
def tumor = hierarchy.getAllObjects(false).find { it.getPathClass()?.toString() == 'Tumor' }
JsonOutput.toJson([measured: region.getMeasurements(), name: region.getName(),
    in_tumor: tumor?.nChildObjects()])
"""
FORGET = """
def region = hierarchy.getAllObjects(false).find { it.getName() == 'my slide' }
region.getMeasurementList().put('PatchCL: Nuclei', 7)
entry.saveImageData(imageData)
'1'
"""
COUNT = 210 - 1 - 1 + 1


@pytest.mark.qupath
def test_nuclei_are_counted_where_they_are(tmp_path: Path, session: qupath.Session) -> None:
    """By the command, by the script, and by the next run."""
    path = qupath.make_project(tmp_path / "project", SLIDE, ["a.svs"])

    def write(run: int) -> Any:
        found = nuclei(10, 21, "a.svs", run=run)
        with closing(open_project(path, "paquo")) as project:
            result = result_of(len(found), run=f"run {run}", tissue_mm2=0.5)
            return project.write(project.images()[0], [found], ResultConfig(), result)

    write(1)
    assert session.run(path, LOOK)["a.svs"]["measured"]["PatchCL: Nuclei"] == 210
    session.run(path, EDIT)
    assert session.run(path, LOOK)["a.svs"]["in_tumor"] > 50
    os.utime(path.parent / "patchcl" / "imported" / "1.json")  # as if the edits were older

    command = ["summarise", str(path), "--backend", "paquo"]
    done = CliRunner().invoke(main, [*command, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (image,) = json.loads(done.stdout)["images"]
    (region,) = image["regions"]
    assert (region["name"], region["nuclei"], region["is_tissue"]) == ("my slide", COUNT, True)
    assert (region["area_mm2"], region["per_mm2"]) == (0.5, COUNT / 0.5)
    project = open_project(path, "files")
    assert "saved in QuPath" not in image_status(project, project.images()[0]).changed
    shown = session.run(path, LOOK)["a.svs"]
    assert shown["name"] == "my slide"
    assert shown["measured"]["PatchCL: Nuclei"] == COUNT
    assert shown["measured"]["PatchCL: Nuclei per mm^2"] == COUNT / 0.5
    assert shown["measured"]["PatchCL: Added"] == 210

    session.run(path, FORGET)
    log = qupath.run_script(path, ROOT / "groovy" / "summarise.groovy")
    assert f"a.svs: my slide: {COUNT} nuclei, {COUNT / 0.5:.1f} per mm^2 of tissue." in log, log
    assert session.run(path, LOOK)["a.svs"]["measured"]["PatchCL: Nuclei"] == COUNT

    imported = write(2)
    assert (imported.added, imported.for_yours, imported.deleted) == (199, 10, 1)
    shown = session.run(path, LOOK)["a.svs"]
    assert shown["name"] == "my slide"
    assert shown["measured"]["PatchCL: Nuclei"] == COUNT  # 198, 10 cells, the one drawn
    assert shown["measured"]["PatchCL: Added"] == 199  # the ignored one, too


@pytest.mark.qupath
def test_an_image_without_regions_cannot_be_summarised(tmp_path: Path) -> None:
    path = qupath.make_project(tmp_path / "project", SLIDE, ["a.svs"])
    done = CliRunner().invoke(main, ["summarise", str(path), "--backend", "paquo"])
    assert done.exit_code == 1
    assert "Failed: a.svs has no PatchCL annotation: do `patchcl-qp run` first" in done.stderr


def test_without_qupath_a_script_counts(tmp_path: Path) -> None:
    path = qupath.make_project(tmp_path / "project", SLIDE, ["a.svs"])
    done = CliRunner().invoke(main, ["summarise", str(path), "--backend", "files"])
    assert done.exit_code == 1
    assert "run summarise.groovy there, or pass --qupath DIR" in done.stderr
