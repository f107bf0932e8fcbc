"""Locks of imported nuclei: one of a person keeps its nucleus, those of a command of QuPath do not.

Each image is a story: a first run, with what a command or a person did then; a second one; a third.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import qupath
import shapely
from qupath import by_index, nuclei
from results import result_of
from slides import write_tiff

from patchcl_qupath.config import Config, ObjectType, ResultConfig, to_dict
from patchcl_qupath.datatypes import CorrectionRoi, ImageEntry, Nuclei
from patchcl_qupath.project import open_project
from patchcl_qupath.project.jvm import Process
from patchcl_qupath.project.paquo import PaquoProject
from patchcl_qupath.status import image_status
from patchcl_qupath.storage.records import Imported, RegionRecord

pytestmark = pytest.mark.qupath

IMAGES = ["measured", "few", "cells made", "pixels", "part", "corrected"]
GONE = {9, *range(50, 60)}  # nuclei that the third run does not find
MARKS_OF_BEFORE = {  # of nucleus 5, an annotation and a detection
    "few": "8003a4997cdadd91 240.00008 40.15",
    "pixels": "06a78d624b5b6e2d 240.00008 40.15",
}
PART = shapely.box(0, 0, 420, 220)  # of the first run of the image 'part'
SUGGESTED = CorrectionRoi(
    id="11111111-1111-5111-8111-111111111111",
    name="ROI 1 of 1",
    description="",
    x=20,
    y=20,
    width=180,
    height=180,
)
OTHER = replace(SUGGESTED, id="22222222-2222-5222-8222-222222222222", y=420)
DRAWN = shapely.box(220, 20, 400, 200)

# What QuPath's 'Add intensity features' does with objects: it measures them, and locks annotations.
MEASURE = """
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs
import qupath.lib.scripting.QP

def measure = { Collection objects ->
    hierarchy.getSelectionModel().setSelectedObjects(objects, null)
    def done = QP.runPlugin('qupath.lib.algorithms.IntensityFeaturesPlugin', imageData,
        '{"pixelSizeMicrons": 1.0, "region": "ROI", "tileSizeMicrons": 25.0, "colorRed": true, ' +
        '"doMean": true}')
    assert done && objects.every { it.isLocked() && it.getMeasurements().keySet()
        .any { name -> name.contains('Red') && name.contains('Mean') } }
}
def nucleus = hierarchy.getAllObjects(false).findAll { it.getMeasurements().containsKey('index') }
    .collectEntries { [it.getMeasurements()['index'] as int, it] }
"""
AFTER_THE_FIRST = (
    MEASURE
    + """
switch (entry.getImageName()) {
    case 'measured':
        measure(nucleus.values())
        nucleus[50].setName('look at this')
        break
    case 'few':
        measure((0..18).collect { nucleus[it] })
        nucleus[30].setLocked(true)
        break
    case 'cells made':   // in each, by StarDist in the selected annotations, say: none was found
        nucleus.values().each { it.setLocked(true) }
        break
    case 'pixels':   // as a pixel classifier's 'Measure' does, also with detections
        nucleus.values().each {
            it.getMeasurementList().put('Tissue: Tumor %', 50)
            it.setLocked(true)
        }
        break
    case 'part':
        measure(nucleus.values())
        break
    case 'corrected':
        measure(nucleus.values())
        def square = ROIs.createRectangleROI(220, 20, 180, 180, ImagePlane.getDefaultPlane())
        def toCorrect = PathClass.fromString('PatchCL: correct here')
        hierarchy.addObject(PathObjects.createAnnotationObject(square, toCorrect))
}
entry.saveImageData(imageData)
'1'
"""
)
AFTER_THE_SECOND = (
    MEASURE
    + """
if (entry.getImageName() == 'corrected') {
    measure(nucleus.values())
    entry.saveImageData(imageData)
}
'1'
"""
)
LOOK = """
groovy.json.JsonOutput.toJson(hierarchy.getAllObjects(false).collect { [
    id: it.getID().toString(), name: it.getName(), locked: it.isLocked(),
    type: it.isAnnotation() ? 'annotation' : 'detection',
    class_name: it.getPathClass()?.toString(), measurements: it.getMeasurements(),
] })
"""
MARKS = "groovy.json.JsonOutput.toJson(imageData.getProperty('patchcl.imported').readLines())"


def found_by(run: int, image: str) -> tuple[Nuclei, ResultConfig, tuple[RegionRecord, ...]]:
    """The nuclei of a run, its settings, and its regions."""
    found = nuclei(10, 21, image, run=run)
    kind = ObjectType.DETECTION if image == "pixels" else ObjectType.ANNOTATION
    config = ResultConfig(object_type=kind)
    if run == 1 and image == "part":
        found = found[shapely.contains(PART, shapely.centroid(found.polygons))]
        geometry = json.loads(shapely.to_geojson(PART))
        return found, config, (RegionRecord(geometry=geometry, tissue_mm2=0.5),)
    if run == 3:
        found = found[~np.isin(found.measurements["index"], [*GONE])]
    return found, config, ()


@pytest.fixture(scope="module")
def story(
    tmp_path_factory: pytest.TempPathFactory, session: qupath.Session, process: Process
) -> SimpleNamespace:
    """Of each run: the nuclei, the objects in QuPath, and what was told; and of the removal."""
    folder = tmp_path_factory.mktemp("locked")
    rows, columns = np.mgrid[:920, :460]
    pixels = np.stack([rows % 256, columns % 256, 255 - rows % 256], axis=-1).astype(np.uint8)
    slide = write_tiff(folder / "a.tif", pixels, (0.5, 0.5), tile_px=256)
    path = qupath.make_project(folder / "project", slide, IMAGES)
    warned = _Lines()
    logging.getLogger("patchcl_qupath").addHandler(warned)
    seen, told = [], []
    written: list[dict[str, Nuclei]] = []

    def looked() -> dict[str, list[dict[str, Any]]]:
        return session.run(path, LOOK)

    def opened() -> PaquoProject:
        project = open_project(path, "paquo")
        assert isinstance(project, PaquoProject)
        return replace(project, process=process)

    for run in (1, 2, 3):
        project = opened()
        written.append({})
        for entry in project.images():
            found, config, regions = found_by(run, entry.name)
            result = result_of(
                len(found), config, run=f"run {run}", tissue_mm2=0.5, regions=regions
            )
            settings = to_dict(replace(Config(), result=config))
            project.write(entry, [found], config, msgspec.structs.replace(result, config=settings))
            written[-1][entry.name] = found
        if run > 1:
            project.mark_rois(image(project, "corrected"), [SUGGESTED if run == 2 else OTHER])
        told.append({e.name: image_status(project, e).imported for e in project.images()})
        seen.append(looked())
        if run == 1:
            marks = session.run(path, MARKS)
        if run < 3:
            session.run(path, AFTER_THE_FIRST if run == 1 else AFTER_THE_SECOND)
    logging.getLogger("patchcl_qupath").removeHandler(warned)
    for name in ("few", "cells made"):
        project.remove(image(project, name))
    return SimpleNamespace(
        seen=seen, told=told, written=written, warned=warned.lines, marks=marks, left=looked()
    )


def image(project: PaquoProject, name: str) -> ImageEntry:
    """The image of that name."""
    return next(entry for entry in project.images() if entry.name == name)


class _Lines(logging.Handler):
    """Keeps what the package logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def shown(story: SimpleNamespace, run: int, image: str) -> dict[int, dict[str, Any]]:
    """The nuclei in QuPath after a run, by their index."""
    return by_index(story.seen[run - 1][image])


def ids(objects: dict[int, dict[str, Any]]) -> set[str]:
    return {o["id"] for o in objects.values()}


def is_measured(nucleus: dict[str, Any]) -> bool:
    """Whether 'Add intensity features' measured it."""
    return any("Red" in name and "Mean" in name for name in nucleus["measurements"])


def test_marks_are_those_of_earlier_versions(story: SimpleNamespace) -> None:
    """The nuclei that a version before imported are known as such after an update."""
    for name, mark in MARKS_OF_BEFORE.items():
        id_ = story.written[0][name].uuids[5]
        assert f"{id_} {mark}" in story.marks[name]


@pytest.mark.parametrize("image", ["measured", "cells made", "pixels"])
def test_nuclei_that_a_command_locked_are_replaced(story: SimpleNamespace, image: str) -> None:
    notes = 0 if image == "cells made" else 210
    expected = Imported(found=210, added=210, left_out=0, notes=notes)
    assert story.told[1][image] == expected
    assert ids(shown(story, 2, image)) == {*story.written[1][image].uuids.tolist()}
    for nucleus in shown(story, 2, image).values():
        assert nucleus["locked"]  # as it was
        assert is_measured(nucleus) == (image == "measured")
        assert nucleus["measurements"].get("Tissue: Tumor %") == (50 if image == "pixels" else None)


@pytest.mark.parametrize("image", ["measured", "cells made", "pixels"])
def test_those_that_a_run_does_not_find_are_told(story: SimpleNamespace, image: str) -> None:
    stayed = {50} if image == "measured" else set()  # it has a name
    lost = GONE - stayed
    assert shown(story, 3, image).keys() == {*range(210)} - lost
    told = story.told[2][image]
    assert (told.added, told.stayed, told.lost) == (199, len(stayed), len(lost))
    measured = "" if image == "cells made" else f"{len(lost)} with measurements or notes of yours, "
    said = f"{image}: {len(lost)} nuclei that no new nucleus replaces are removed: {measured}"
    assert sum(line.startswith(f"{said}{len(lost)} locked") for line in story.warned) == 1


def test_those_that_a_person_locked_stay(story: SimpleNamespace) -> None:
    """And those of a command that at most half have: nothing tells them apart."""
    locked = {*range(19), 30}
    first = shown(story, 1, "few")
    for run in (2, 3):
        seen = shown(story, run, "few")
        assert {k for k, nucleus in seen.items() if nucleus["locked"]} == locked
        assert {seen[k]["id"] for k in locked} == {first[k]["id"] for k in locked}
        assert story.told[run - 1]["few"].for_yours == len(locked - (GONE if run == 3 else set()))


def test_a_lock_that_was_carried_over_stays_that_of_a_command(story: SimpleNamespace) -> None:
    """Also where few of the nuclei have it, after a run of more of the image."""
    measured = {k for k, nucleus in shown(story, 2, "part").items() if nucleus["locked"]}
    assert measured == shown(story, 1, "part").keys()
    assert 2 * len(measured) < len(shown(story, 2, "part")) == 210
    third = shown(story, 3, "part")
    alone = third.pop(9)  # not found again, it stays for a measurement that few have by now
    assert alone["id"] == shown(story, 2, "part")[9]["id"]
    assert ids(third) == {*story.written[2]["part"].uuids.tolist()}
    assert {k for k, nucleus in third.items() if nucleus["locked"]} == measured - {9}
    assert (story.told[2]["part"].left_out, story.told[2]["part"].stayed) == (0, 1)


@pytest.mark.parametrize("place", [SUGGESTED, DRAWN])
def test_nuclei_to_correct_can_be_reshaped(story: SimpleNamespace, place: Any) -> None:
    if isinstance(place, CorrectionRoi):
        place = shapely.box(place.x, place.y, place.x + place.width, place.y + place.height)
    near = np.flatnonzero(shapely.intersects(nuclei(10, 21, "corrected", run=2).polygons, place))
    assert len(near) == 25
    for k, nucleus in shown(story, 2, "corrected").items():
        assert nucleus["type"] == "annotation"
        assert is_measured(nucleus)
        if k in near:
            assert not nucleus["locked"]


def test_an_roi_with_locks_of_a_command_alone_is_unchanged(story: SimpleNamespace) -> None:
    """It is removed when another one is suggested; one that a person drew stays."""
    names = [[o["name"], o["class_name"]] for o in story.seen[2]["corrected"]]
    assert names.count(["ROI 1 of 1", "PatchCL: correct here"]) == 1
    assert names.count([None, "PatchCL: correct here"]) == 1
    assert {SUGGESTED.id, OTHER.id} & {o["id"] for o in story.seen[2]["corrected"]} == {OTHER.id}


def test_removing_keeps_what_a_person_locked(story: SimpleNamespace) -> None:
    assert by_index(story.left["few"]).keys() == {*range(19), 30}
    assert by_index(story.left["cells made"]) == {}
