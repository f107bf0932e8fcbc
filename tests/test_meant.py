"""Corrected ROIs in a real QuPath: what is read of them, and detections that can be reshaped.

The images of one project, one for each backend, go through one story: nuclei are written as
detections; a person classifies them, makes cells of some and locks one; ROIs to correct are marked;
a person corrects one of them, and draws another, with all that is no nucleus; then they are read.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qupath
import shapely
from qupath import nuclei
from results import result_of

from patchcl_qupath.config import CORRECTED, TO_CORRECT, ObjectType, ResultConfig
from patchcl_qupath.datatypes import CorrectionRoi, Corrections, ImageEntry
from patchcl_qupath.project import Project, open_project
from patchcl_qupath.project.jvm import Process
from patchcl_qupath.project.paquo import PaquoProject
from patchcl_qupath.segmentation.measurements import shape_measurements

pytestmark = pytest.mark.qupath

ROOT = Path(__file__).parent.parent
SLIDE = ROOT / "sample_project" / "CMU-1-Small-Region.svs"
BACKENDS = ("paquo", "files")  # an image for each
DETECTIONS = ResultConfig(object_type=ObjectType.DETECTION)
ROI = CorrectionRoi(
    id="00000000-0000-4000-8000-000000000001",
    name="ROI 1 of 1",
    description="",
    x=20.0,
    y=20.0,
    width=180.0,
    height=180.0,
)
BOX = shapely.box(20, 20, 200, 200)
MINE = shapely.box(220, 1000, 420, 1200)  # drawn by a person

LOOK = """
import qupath.lib.objects.PathObjectTools

groovy.json.JsonOutput.toJson(hierarchy.getAllObjects(false).collect { [
    id: it.getID().toString(),
    type: it.isAnnotation() ? 'annotation' : it.isCell() ? 'cell' : 'detection',
    name: it.getName(),
    class_name: it.getPathClass()?.toString(),
    probability: it.getClassProbability().toString(),
    locked: it.isLocked(),
    index: it.getMeasurements()['index'],
    score: it.getMeasurements()['score of a person'],
    area: PathObjectTools.getROI(it, true).getArea(),
    children: it.getChildObjects().collect { child -> child.getName() },
] })
"""
BEGIN = """
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.GeometryTools
import qupath.lib.roi.ROIs

def plane = ImagePlane.getDefaultPlane()
def square = { double x, double y, double side -> ROIs.createRectangleROI(x, y, side, side, plane) }
def add = { roi, name, detection = false ->
    def pathClass = name == null ? null : PathClass.fromString(name)
    def made = detection ? PathObjects.createDetectionObject(roi, pathClass) :
        PathObjects.createAnnotationObject(roi, pathClass)
    hierarchy.addObject(made)
    made
}
def nucleus = hierarchy.getDetectionObjects().findAll { it.getMeasurements().containsKey('index') }
    .collectEntries { [it.getMeasurements()['index'] as int, it] }
def save = {
    entry.saveImageData(imageData)
    '"saved"'
}
"""
# All nuclei get a class; two of them become cells, one with a measurement; one is locked.
CLASSIFY = (
    BEGIN
    + """
nucleus.each { index, one ->
    one.setPathClass(PathClass.fromString(index % 2 ? 'Tumor: Positive' : 'Tumor: Negative'))
}
for (index in [11, 55]) {
    def old = nucleus[index]
    def around = GeometryTools.geometryToROI(old.getROI().getGeometry().buffer(6), plane)
    def cell = PathObjects.createCellObject(around, old.getROI(), old.getPathClass(), null)
    cell.getMeasurementList().put('index', index)
    cell.getMeasurementList().put('score of a person', 3)
    hierarchy.removeObject(old, true)
    hierarchy.addObject(cell)
}
nucleus[12].setLocked(true)
nucleus[12].setPathClass(PathClass.fromString('Tumor: Negative'), 0.75d)
nucleus[12].setName('mitosis')
add(square(122, 122, 12), 'Stroma', true)   // a detection of another program, on nucleus 22
add(square(220, 1000, 200), 'PatchCL: correct here').setName('mine')
save()
"""
)
# A person corrects the ROI: one is wrong, two are ignored; around them lies what is no nucleus.
CORRECT = (
    "import qupath.lib.geom.Point2\n"
    + BEGIN
    + """
def annotations = hierarchy.getAnnotationObjects()
def at = annotations.findAll { it.getMeasurements().containsKey('index') }
    .collectEntries { [it.getMeasurements()['index'] as int, it] }
hierarchy.removeObject(at[10], true)
at[20].setPathClass(PathClass.fromString('Ignore*'))
at[21].setPathClass(PathClass.fromString('Tumor: Ignore*'))
def roi = annotations.find { it.getName() == 'ROI 1 of 1' }
roi.setPathClass(PathClass.fromString('PatchCL: corrected'))
add(ROIs.createEllipseROI(10, 10, 201, 201, plane), 'Vessel')   // of 100 µm
add(square(65, 25, 70), null)   // a region around nuclei
def points = [new Point2(30, 100), new Point2(100, 30), new Point2(500, 30)]
add(ROIs.createPointsROI(points, plane), 'Nucleus')
add(ROIs.createLineROI(30, 30, 90, 90, plane), null)
add(square(179, 100, 10), null)   // a nucleus that was missed
add(square(1100, 700, 200), 'PatchCL: corrected').setName('empty')   // no nucleus was there
save()
"""
)


class Story:
    """What is in the saved images after each step, and what was said, by backend."""

    def __init__(self, path: Path, process: Process, session: qupath.Session) -> None:
        self.path, self.process, self.session = path, process, session
        self.written = nuclei(10, 60, "both")
        self.said: dict[str, str] = {}
        self.read: dict[str, Corrections] = {}
        for by in BACKENDS:
            project, entry = self.opened(by)
            result = result_of(len(self.written), DETECTIONS)
            project.write(entry, [self.written], DETECTIONS, result)
        self.imported()
        session.run(path, CLASSIFY)
        for by in BACKENDS:
            project, entry = self.opened(by)
            self.said[by] = project.mark_rois(entry, [ROI])
        self.log = self.imported()
        self.marked = session.run(path, LOOK)
        session.run(path, CORRECT)
        qupath.run_script(path, ROOT / "groovy" / "export_labels.groovy")
        for by in BACKENDS:
            project, entry = self.opened(by)
            if by == "paquo":
                project.layout.labels(entry.id).unlink()
            self.read[by] = project.corrections(entry, CORRECTED)
        self.corrected = session.run(path, LOOK)

    def opened(self, by: str) -> tuple[Project, ImageEntry]:
        """The project, by one of the backends, and its image."""
        project: Project = open_project(self.path, by)
        if isinstance(project, PaquoProject):
            project = replace(project, process=self.process)
        return project, project.images()[BACKENDS.index(by)]

    def imported(self) -> str:
        """The log of the import script, run on the image of the files backend."""
        script = ROOT / "groovy" / "import_nuclei.groovy"
        log = qupath.run_script(self.path, script, "-i", "files")
        assert "ERROR" not in log, log
        return log

    def within(self, box: shapely.Geometry) -> set[int]:
        """The nuclei that lie in a box, in part or whole."""
        return set(np.flatnonzero(shapely.intersects(self.written.polygons, box)).tolist())


@pytest.fixture(scope="module")
def story(
    process: Process, session: qupath.Session, tmp_path_factory: pytest.TempPathFactory
) -> Story:
    path = qupath.make_project(tmp_path_factory.mktemp("meant") / "p", SLIDE, [*BACKENDS])
    return Story(path, process, session)


def by_index(objects: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    return {int(one["index"]): one for one in objects if one["index"] is not None}


@pytest.mark.parametrize("by", BACKENDS)
def test_detections_in_rois_become_annotations_that_can_be_reshaped(story: Story, by: str) -> None:
    """Classified ones, a locked one and the nucleus of a cell; none elsewhere, and none is lost."""
    shown = by_index(story.marked[by])
    assert sorted(shown) == list(range(len(story.written)))
    in_rois = story.within(BOX) | story.within(MINE)
    assert len(in_rois) > 40
    for index, one in shown.items():
        expected = "annotation" if index in in_rois else "cell" if index == 55 else "detection"
        assert one["type"] == expected, index
        assert one["class_name"] == ("Tumor: Positive" if index % 2 else "Tumor: Negative")
        assert one["area"] == pytest.approx(story.written.polygons[index].area, rel=1e-3)
        assert one["locked"] == (index == 12)
        assert one["name"] == ("mitosis" if index == 12 else None)
        assert one["probability"] == ("0.75" if index == 12 else "NaN")
        assert one["score"] == (3 if index in (11, 55) else None)
    (other,) = (one for one in story.marked[by] if one["class_name"] == "Stroma")
    assert other["type"] == "detection"
    rois = [one["name"] for one in story.marked[by] if one["class_name"] == TO_CORRECT]
    assert sorted(rois) == ["ROI 1 of 1", "mine"]


def test_detections_that_became_annotations_are_counted(story: Story) -> None:
    found = re.search(r"(\d+) detections became annotations", story.said["paquo"])
    assert found is not None
    assert f"Detections that became annotations there: {found[1]}." in story.log
    cells_and_locked = 2
    in_rois = story.within(BOX) | story.within(MINE)
    assert cells_and_locked <= int(found[1]) <= len(in_rois)


@pytest.mark.parametrize("by", BACKENDS)
def test_a_vessel_and_ignored_nuclei_are_no_nuclei(story: Story, by: str) -> None:
    found = story.read[by]
    assert {roi.bounds for roi in found.rois} == {BOX.bounds, (1100, 700, 1300, 900)}
    nuclei_left = story.within(BOX) - {10, 20, 21}
    missed = shapely.box(179, 100, 189, 110)
    expected = [*story.written.polygons[sorted(nuclei_left)], missed]
    assert len(found.nuclei) == len(expected)
    for nucleus in expected:
        assert any(nucleus.hausdorff_distance(other) < 0.02 for other in found.nuclei)
    ignored = story.written.polygons[[20, 21]]
    assert len(found.ignored) == 2
    assert all(any(o.hausdorff_distance(i) < 0.02 for i in ignored) for o in found.ignored)
    assert {kind: count for kind, count in found.left_out.items() if count} == {
        "ignored": 2,
        "regions": 2,
        "points": 2,
        "lines": 1,
        "other_programs": 1,
    }
    (note,) = found.notes
    assert note.startswith("the ROI at x 1200, y 800 px has no nuclei: all of it is taken as")


@pytest.mark.parametrize("by", BACKENDS)
def test_reading_changes_nothing_in_the_image(story: Story, by: str) -> None:
    """All that a person made is still there."""
    before = {one["id"]: one for one in story.marked[by]}
    after = {one["id"]: one for one in story.corrected[by]}
    (deleted,) = before.keys() - after.keys()
    assert before[deleted]["index"] == 10
    assert len(after.keys() - before.keys()) == 6
    classes = [one["class_name"] for one in after.values()]
    assert {"Vessel", "Ignore*", "Tumor: Ignore*", "Stroma", CORRECTED} <= set(classes)


def test_both_backends_read_and_show_the_same(story: Story) -> None:
    one, other = (story.read[by] for by in BACKENDS)
    assert {n.wkt for n in one.nuclei} == {n.wkt for n in other.nuclei}
    assert one.left_out == other.left_out
    shown = [
        sorted(json.dumps({**o, "id": None, "children": len(o["children"])}) for o in image)
        for image in (story.marked[by] for by in BACKENDS)
    ]
    assert shown[0] == shown[1]


MEASURE = """
import qupath.lib.analysis.features.ObjectMeasurements
import qupath.lib.objects.PathObjects

def pixels = imageData.getServer().getPixelCalibration()
def nucleus = hierarchy.getAllObjects(false).find { it.getMeasurements()['index'] == 3 }
def copy = PathObjects.createDetectionObject(nucleus.getROI())
ObjectMeasurements.addShapeMeasurements(copy, pixels)
groovy.json.JsonOutput.toJson([
    mpp: [pixels.getPixelWidthMicrons(), pixels.getPixelHeightMicrons()],
    measured: copy.getMeasurements().collectEntries { k, v -> [k, v] },
])
"""


def test_shapes_are_measured_and_named_as_by_this_qupath(story: Story) -> None:
    """In each version: 0.6 renamed measurements of cells, and none of these."""
    found = story.session.run(story.path, MEASURE)["paquo"]
    scale = np.array(found["mpp"])
    polygon = shapely.transform(story.written.polygons[3], lambda xy: xy * scale)
    ours = shape_measurements(np.array([polygon], dtype=object))
    assert ours.keys() == found["measured"].keys()
    for name, value in found["measured"].items():
        assert ours[name][0] == pytest.approx(value, rel=0.01), name
