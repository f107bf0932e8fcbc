"""groovy/review.groovy: its logic in a real QuPath without a window, and its window by a robot."""

from __future__ import annotations

import json
import os
import re
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import qupath
import shapely
from results import result_of
from robot import Robot
from shapely import affinity
from test_outlines import LEFT_OUT, feature, grid, places, read

from patchcl_qupath.config import ResultConfig
from patchcl_qupath.project import open_project, outlines
from patchcl_qupath.project.qpproj import read_project
from patchcl_qupath.project.results import write_results
from patchcl_qupath.project.scripts import copy_scripts, read_script
from patchcl_qupath.storage.records import ChangesRecord, RoiChangesRecord, write_record

pytestmark = pytest.mark.qupath

SLIDE = Path(__file__).parent.parent / "sample_project" / "CMU-1-Small-Region.svs"

# Of each image: a ROI with six nuclei of falling confidence from left to right; beside them a
# drawing of a person, a vessel, an ignored one, and a nucleus outside.
PREPARE = """
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs

def square = { double x, double y, double side, String name ->
    def roi = ROIs.createRectangleROI(x, y, side, side, ImagePlane.getDefaultPlane())
    PathObjects.createAnnotationObject(roi, name ? PathClass.fromString(name) : null)
}
def roi = square(100, 100, 300, 'PatchCL: correct here')
roi.setLocked(true)
roi.setName("ROI ${entry.getImageName() == 'one.svs' ? 2 : 1} of 2")
def nuclei = (0..5).collect { k ->
    def nucleus = square(110 + 40 * k, 120, 20, 'Nucleus')
    nucleus.setName("nucleus ${k}")
    nucleus.getMeasurementList().put('Detection probability', 0.9 - 0.1 * k)
    nucleus.getMeasurementList().put('Area µm^2', 100)
    nucleus.getMeasurementList().put('my score', k)
    nucleus
}
def others = [
    square(110, 200, 20, 'Nucleus'), square(150, 150, 240, null), square(110, 300, 20, 'Ignore*'),
    square(500, 500, 20, 'Nucleus'),
]
others[0].setName('drawn')
others[1].setName('vessel')
hierarchy.addObjects([roi] + nuclei + others)
// Else the window asks for the type.
imageData.setImageType(qupath.lib.images.ImageData.ImageType.BRIGHTFIELD_H_E)
entry.saveImageData(imageData)
'[]'
"""

# A review of these images, in a folder of its own; 'look' adds a line to what is returned.
REVIEW = """
def loader = new GroovyClassLoader(getClass().getClassLoader())
loader.parseClass(new File('SCRIPT'))
def project = qupath.lib.projects.ProjectIO.loadProject(
        new File('PROJECT'), java.awt.image.BufferedImage)
def create = {
    def made = loader.loadClass('Review').getDeclaredConstructor().newInstance()
    made.project = project
    made.folder = java.nio.file.Paths.get('PROJECT').resolveSibling('patchcl')
    made.findRois(null)
    made
}
def review = create()
def open = { number ->
    review.begin(number, review.entryOf(review.rois[number]).readImageData())
}
def lines = []
def look = { message = null ->
    lines << [message: message, nucleus: review.nucleus?.getName(), nuclei: review.nuclei.size(),
              seen: review.seen.size()]
}
"""
END = """
groovy.json.JsonOutput.toJson(lines)
"""


@pytest.fixture
def project(session: qupath.Session, tmp_path: Path) -> Path:
    """A project of two images, each with a ROI to correct."""
    project = qupath.make_project(tmp_path / "ein Projekt, ü", SLIDE, ["one.svs", "two.svs"])
    session.run(project, PREPARE)
    return project


def review(session: qupath.Session, project: Path, actions: str) -> list[Any]:
    """What a review does, line by line."""
    script = project.with_name("review.groovy")
    script.write_text(read_script("review.groovy"), "utf-8")
    head = REVIEW.replace("SCRIPT", str(script)).replace("PROJECT", str(project))
    # Once: the session runs a script for each image.
    once = f"if (entry.getImageName() != 'one.svs') return '[]'\n{head}{actions}{END}"
    lines: list[Any] = session.run(project, once)["one.svs"]
    return lines


def names(lines: list[Any]) -> list[str | None]:
    return [line["nucleus"] for line in lines]


def test_nuclei_come_by_rising_confidence_and_drawn_ones_last(
    session: qupath.Session, project: Path
) -> None:
    lines = review(session, project, "open(0); look(); 7.times { look(review.accept()) }")
    assert names(lines) == [*(f"nucleus {k}" for k in (5, 4, 3, 2, 1, 0)), "drawn", None]
    assert lines[0]["nuclei"] == 7  # neither the vessel, nor the ignored one, nor the one outside
    assert lines[-1]["seen"] == 7
    assert "You have seen all nuclei" in lines[-1]["message"]


def test_keys_delete_add_reshape_and_undo(session: qupath.Session, project: Path) -> None:
    actions = """
    open(0); look(); look(review.accept()); look(review.back()); look(review.delete())
    look(review.undo()); look(review.delete())
    def before = review.nucleus.getROI()
    review.grow(0.5)
    def measured = review.nucleus.getMeasurements()
    lines << measured.collectEntries { name, value -> [name, value as float] }
    lines << review.nucleus.getROI().getArea() / before.getArea()
    review.move(1, -2)
    lines << [review.nucleus.getROI().getCentroidX() - before.getCentroidX(),
              review.nucleus.getROI().getCentroidY() - before.getCentroidY()]
    look(review.undo()); review.undo()
    lines << (review.nucleus.getROI() == before && review.nucleus.getMeasurements().size() == 3)
    look(review.insert(250, 300))
    lines << [review.nucleus.getROI().getArea(), review.nucleus.getPathClass().toString()]
    look(review.undo()); look(review.accept())
    3.times { look(review.undo()) }
    review.nucleus.setLocked(true)
    look(review.delete()); look(review.grow(1))
    """
    lines = review(session, project, actions)
    start, accepted, back, deleted, undone, again, kept, growth, moved, *rest = lines
    assert names([start, accepted, back]) == ["nucleus 5", "nucleus 4", "nucleus 5"]
    assert [line["seen"] for line in (start, accepted, back)] == [0, 1, 0]
    assert (deleted["nucleus"], deleted["nuclei"]) == ("nucleus 4", 6)
    assert (undone["nucleus"], undone["nuclei"]) == ("nucleus 5", 7)
    assert again["nucleus"] == "nucleus 4"
    # QuPath removes all measurements with a contour: those of a person are kept.
    assert kept == {"Detection probability": pytest.approx(0.5), "my score": 4}
    assert growth == pytest.approx((4 * 20 + 400 + 3.14) / 400, abs=0.01)  # 0.5 µm is 1 px here
    assert moved == pytest.approx([2, -4], abs=0.05)
    assert rest[1] is True
    inserted, (area, class_name) = rest[2], rest[3]
    assert "Shift and the arrow keys" in inserted["message"]
    assert area == pytest.approx(400, rel=0.01)
    assert class_name == "Nucleus"
    assert rest[4]["nuclei"] == 6
    locked = rest[-2:]
    assert all("is locked" in line["message"] for line in locked)


def test_nuclei_that_a_command_locked_can_be_reshaped(
    session: qupath.Session, project: Path
) -> None:
    """Annotations and detections; one that a person locked stays as it is."""
    actions = """
    import qupath.lib.objects.PathObjects

    def shown = { int elsewhere ->
        def image = review.entryOf(review.rois[0]).readImageData()
        def hierarchy = image.getHierarchy()
        def plane = qupath.lib.regions.ImagePlane.getDefaultPlane()
        def detection = { x, y ->
            def roi = qupath.lib.roi.ROIs.createRectangleROI(x, y, 20, 20, plane)
            def made = PathObjects.createDetectionObject(roi)
            made.setLocked(true)
            made
        }
        def inside = detection(300, 350)
        hierarchy.addObjects([inside] + (0..<elsewhere).collect { detection(500 + 30 * it, 700) })
        hierarchy.getAnnotationObjects().find { it.getName() == 'nucleus 2' }.setLocked(true)
        review.begin(0, image)
        def found = review.nuclei.findAll { it.isLocked() }.collect { it.getName() ?: 'made' }
        review.release()
        [review.nuclei.size(), found.sort()]
    }
    lines << shown(30)
    lines << shown(5)
    """
    by_command, by_hand = review(session, project, actions)
    assert by_command == [8, []]
    assert by_hand == [8, ["made", "nucleus 2"]]


def test_a_duplicate_of_an_image_has_a_review_of_its_own(
    session: qupath.Session, project: Path
) -> None:
    """As for a second reader: its ROI and nuclei have the same ids."""
    actions = """
    project.addDuplicate(review.entryOf(review.rois[0]), true).setImageName('second reader')
    project.syncChanges()
    review.findRois(null)
    lines << review.rois.collect { it.imageName }
    lines << (review.rois[0].id == review.rois[2].id)
    open(0); 3.times { review.accept() }
    open(2); look(); review.accept()
    def remembered = review.rememberedNucleus()
    review = create()
    lines << review.index
    open(0); lines << review.seen.size()
    open(2); lines << review.seen.size()
    """
    images, is_same, second, index, *seen = review(session, project, actions)
    assert images == ["one.svs", "two.svs", "second reader"]
    assert is_same is True
    assert (second["nucleus"], second["seen"]) == ("nucleus 5", 0)
    assert index == 2
    assert seen == [3, 1]


def test_what_an_earlier_version_remembered_is_read(session: qupath.Session, project: Path) -> None:
    """By ROI, without its image."""
    actions = """
    open(1); 2.times { review.accept() }
    """
    review(session, project, actions)
    file = project.parent / "patchcl" / "review.json"
    now = json.loads(file.read_text("utf-8"))
    (key,) = now["accepted"]
    file.write_text(
        json.dumps(
            {"roi": now["roi"], "nucleus": None, "accepted": {now["roi"]: now["accepted"][key]}}
        )
    )
    actions = """
    lines << review.index
    open(review.index); look()
    """
    index, line = review(session, project, actions)
    assert index == 1
    assert (line["nucleus"], line["seen"]) == ("nucleus 3", 2)


def test_keys_change_only_what_is_selected(session: qupath.Session, project: Path) -> None:
    """Not the nucleus before, where a person selected a vessel since, or nothing."""
    actions = """
    open(0)
    def annotations = review.imageData.getHierarchy().getAnnotationObjects()
    [null, annotations.find { it.getName() == 'vessel' }].each { selected ->
        review.accept()
        review.choose(selected)
        look(review.delete()); look(review.grow(1)); look(review.move(1, 1))
    }
    review.choose(annotations.find { it.getName() == 'nucleus 1' })
    look()
    look(review.delete())
    """
    *nothing, chosen, deleted = review(session, project, actions)
    for line in nothing:
        assert "No nucleus is selected" in line["message"]
        assert line["nuclei"] == 7
    assert chosen["nucleus"] == "nucleus 1"
    assert deleted["nuclei"] == 6


def test_it_goes_through_all_images_and_remembers_where_it_was(
    session: qupath.Session, project: Path
) -> None:
    actions = """
    lines << review.rois.collect { [it.imageName, it.name, it.corrected] }
    lines << review.inWords()
    open(0); review.accept(); review.accept(); review.markCorrected()
    lines << review.nextUncorrected()
    open(1); review.accept(); look()
    review = create()
    lines << review.inWords()
    lines << [review.index, review.nextUncorrected()]
    def remembered = review.rememberedNucleus()
    open(review.index); review.select(remembered); look()
    review.markCorrected()
    lines << [review.left, review.nextUncorrected()]
    """
    lines = review(session, project, actions)
    assert lines[0] == [["one.svs", "ROI 2 of 2", False], ["two.svs", "ROI 1 of 2", False]]
    assert lines[1] == "2 ROIs in 2 images: 0 corrected, 2 left"
    assert lines[2] == 1
    before, words, where, after, left = lines[3:]
    assert words == "2 ROIs in 2 images: 1 corrected, 1 left"
    assert where == [1, 1]
    assert before == after
    assert (after["nucleus"], after["seen"]) == ("nucleus 4", 1)
    assert left == [0, -1]
    classes = """
    def annotations = hierarchy.getAnnotationObjects()
    groovy.json.JsonOutput.toJson(annotations.collect { it.getPathClass()?.toString() })
    """
    for saved in session.run(project, classes).values():
        assert saved.count("PatchCL: corrected") == 1
        assert "PatchCL: correct here" not in saved


def test_an_import_that_nobody_saved_is_to_be_done_again(
    session: qupath.Session, project: Path
) -> None:
    """The image of the first ROI was saved after it, that of the second one was closed without."""
    patchcl = project.parent / "patchcl"
    roi = {"id": str(uuid.uuid4()), "name": "ROI 9 of 9", "description": ""}
    roi |= {"x": 800, "y": 800, "width": 100, "height": 100}
    for number, saved_s in [("1", 60), ("2", -60)]:
        data = project.parent / "data" / number / "data.qpdata"
        for path, content, seconds in [
            (patchcl / "fields" / f"{number}.json", {"fields": [roi]}, -20),
            (patchcl / "results" / number / "result.json", {}, -10),
            (patchcl / "imported" / f"{number}.json", {"saved": False}, 0),
            (data, None, saved_s),
        ]:
            if content is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(content), "utf-8")
            os.utime(path, (1_700_000_000 + seconds,) * 2)
    listed, waiting, imported = review(
        session,
        project,
        """
        def listed = review.rois.findAll { it.name == 'ROI 9 of 9' }
        lines << listed.collect { [it.imageName, it.waiting] }
        lines << project.getImageList().collect { review.isWaiting(it) }
        lines << project.getImageList().collect { review.isImported(it) }
        """,
    )
    assert listed == [["two.svs", True]]
    assert waiting == [False, True]
    assert imported == [True, True]


def test_what_is_locked_for_a_roi_is_not_locked_once_a_person_saved(
    session: qupath.Session, project: Path
) -> None:
    """By Ctrl+S, which saves the image as it is; the window then closes, with nothing changed."""
    actions = """
    open(0)
    def annotations = review.imageData.getHierarchy().getAnnotationObjects()
    def vessel = annotations.find { it.getName() == 'vessel' }
    lines << vessel.isLocked()
    review.entryOf(review.rois[0]).saveImageData(review.imageData)
    review.save()
    review.release()
    lines << vessel.isLocked()
    def data = review.entryOf(review.rois[0]).getEntryPath().resolve('data.qpdata').toFile()
    data.setLastModified(1000000000000L)
    review.protect()
    review.save()
    lines << data.lastModified()
    """
    assert review(session, project, actions) == [True, False, 1_000_000_000_000]  # saved no more
    locked = """
    def vessel = hierarchy.getAnnotationObjects().find { it.getName() == 'vessel' }
    groovy.json.JsonOutput.toJson(vessel.isLocked())
    """
    assert session.run(project, locked)["one.svs"] is False


def test_locks_end_also_where_a_person_saved_them_and_left(
    session: qupath.Session, project: Path
) -> None:
    """By Ctrl+S, and then by opening another image, in QuPath's own way; also after a restart."""
    actions = """
    def isLocked = { data, name ->
        data.getHierarchy().getAnnotationObjects().find { it.getName() == name }.isLocked()
    }
    def entry = review.entryOf(review.rois[0])
    open(0)
    entry.saveImageData(review.imageData)
    open(1)
    lines << isLocked(entry.readImageData(), 'vessel')
    review = create()
    open(0)
    lines << isLocked(review.imageData, 'vessel')
    review.save()   // unchanged
    lines << [isLocked(entry.readImageData(), 'vessel'), isLocked(review.imageData, 'vessel')]
    review.release()
    lines << [isLocked(review.imageData, 'vessel'), review.locked.keySet()]
    """
    saved, again, left, released = review(session, project, actions)
    assert (saved, again) == (True, True)
    assert left == [False, True]
    assert released == [False, ["2"]]  # the restart left that image locked, as it may be saved


def test_locks_end_also_of_what_undo_brought_back(session: qupath.Session, project: Path) -> None:
    """A copy, which is another object; and a lock of the person stays."""
    actions = """
    def image = review.entryOf(review.rois[0]).readImageData()
    def hierarchy = image.getHierarchy()
    hierarchy.getAnnotationObjects().find { it.getName() == 'drawn' }.setLocked(true)
    review.begin(0, image)
    def out = new ByteArrayOutputStream()
    new ObjectOutputStream(out).writeObject(hierarchy)
    def copy = new ByteArrayInputStream(out.toByteArray())
    hierarchy.setHierarchy(qupath.lib.io.PathIO.createObjectInputStream(copy).readObject())
    review.release()
    lines << hierarchy.getAnnotationObjects().findAll { it.isLocked() }*.getName().sort()
    """
    assert review(session, project, actions) == [["ROI 2 of 2", "drawn"]]  # the ROI was before


def test_a_roi_that_cannot_be_used_is_not_marked(session: qupath.Session, project: Path) -> None:
    """The same that `refine` refuses, so that nobody finds out later."""
    actions = """
    open(0)
    lines << review.problem()
    review.insert(121, 131)   // over the first one, and larger
    review.accept()
    lines << review.problem()
    look()
    review.undo()
    lines << review.problem()
    7.times { review.accept(); review.select(review.nuclei[0].getID().toString()); review.delete() }
    lines << [review.nuclei.size(), review.problem(), review.problem()]
    """
    right, overlapping, where, undone, (left, without, asked) = review(session, project, actions)
    assert right is undone is None
    assert "overlaps another one" in overlapping
    assert where["nucleus"] in ("nucleus 0", None)
    assert left == 0
    assert "all of it is taken as background" in without
    assert asked is None


# What is no nucleus, each in an ROI of its own with nine nuclei.
LOOK_AT_ALL = """
review.rois.size().times { number ->
    open(number)
    lines << [x: review.current.x, y: review.current.y, problem: review.problem(), nuclei:
              review.nuclei.collect { [it.getROI().getCentroidX(), it.getROI().getCentroidY()] }]
}
"""


def test_nuclei_of_a_roi_are_those_that_refine_reads(
    session: qupath.Session, tmp_path: Path
) -> None:
    """Not a vessel, or what was drawn around nuclei: a key would delete it as one."""
    project = qupath.make_project(tmp_path / "project", SLIDE, ["one.svs"])
    expected, features = {}, []
    cases = [objects for kind, objects, _ in LEFT_OUT if kind in ("ignored", "regions")]
    for number, objects in enumerate(cases):
        dx, dy = 10 + 550 * (number % 4), 10 + 550 * (number // 4)
        drawn = [*objects, *map(feature, grid())]
        expected[(dx, dy)] = places(read(tmp_path, *drawn).nuclei)
        for one in [feature(shapely.box(0, 0, 500, 500), "PatchCL: correct here"), *drawn]:
            geometry = shapely.from_geojson(json.dumps(one["geometry"]))
            moved = affinity.translate(geometry, dx, dy)
            features.append(one | {"geometry": json.loads(shapely.to_geojson(moved))})
    assert len(expected) > 10
    file = tmp_path / "drawn.geojson"
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}), "utf-8")
    add = f"""
    hierarchy.addObjects(qupath.lib.io.PathIO.readObjects(new File('{file}')))
    entry.saveImageData(imageData)
    '1'
    """
    session.run(project, add)
    found = {}
    for line in review(session, project, LOOK_AT_ALL):
        x, y = line["x"], line["y"]
        found[(x, y)] = {(round(cx - x), round(cy - y)) for cx, cy in line["nuclei"]}
        assert line["problem"] is None
    assert found == expected


def test_its_rules_are_those_of_refine() -> None:
    script = read_script("review.groovy")
    rules = re.findall(r"static final (?:double|int) (\w+) = ([\d.]+)", script)
    assert len(rules) == 9
    assert {name: float(value) for name, value in rules} == {
        name: getattr(outlines, name) for name, _ in rules
    }


def test_a_region_in_a_roi_is_neither_deleted_nor_a_problem(
    session: qupath.Session, project: Path
) -> None:
    """A vessel of 125 x 30 µm over six nuclei; and nuclei that share what is outside of the ROI."""
    actions = """
    def image = review.entryOf(review.rois[0]).readImageData()
    def draw = { roi, name ->
        def made = qupath.lib.objects.PathObjects.createAnnotationObject(
                roi, qupath.lib.objects.classes.PathClass.fromString(name))
        image.getHierarchy().addObject(made)
        made
    }
    def plane = qupath.lib.regions.ImagePlane.getDefaultPlane()
    def roi = { double... xy ->
        def (x, y) = [0, 1].collect { axis -> (0..2).collect { xy[2 * it + axis] } as double[] }
        qupath.lib.roi.ROIs.createPolygonROI(x, y, plane)
    }
    def vessel = draw(qupath.lib.roi.ROIs.createRectangleROI(105, 110, 250, 60, plane), 'Vessel')
    def pair = [draw(roi(395, 290, 425, 285, 425, 305), 'Nucleus'),
                draw(roi(395, 315, 425, 290, 425, 310), 'Nucleus')]
    review.begin(0, image)
    lines << [review.nuclei.contains(vessel), vessel.isLocked(),
              review.nuclei.containsAll(pair), review.problem()]
    pair[1].setROI(roi(395, 292, 425, 287, 425, 307))   // now a part of what they share is inside
    lines << review.problem()
    """
    region, overlapping = review(session, project, actions)
    assert region == [False, True, True, None]
    assert "overlaps another one" in overlapping


def test_an_undone_import_is_not_the_last_one(session: qupath.Session, project: Path) -> None:
    """QuPath's Undo brings back the nuclei of the import before, but not the image's property."""
    undone = """
    import qupath.lib.objects.PathObjects
    import qupath.lib.roi.ROIs

    def found = hierarchy.getAnnotationObjects().findAll { it.getName()?.startsWith('nucleus') }
    hierarchy.removeObjects(found, true)
    def nuclei = found.collect { PathObjects.createDetectionObject(it.getROI(), it.getPathClass()) }
    def plane = qupath.lib.regions.ImagePlane.getDefaultPlane()
    def other = ROIs.createRectangleROI(300, 300, 20, 20, plane)
    hierarchy.addObjects(nuclei + PathObjects.createDetectionObject(other))
    def mark = { ids -> ids.collect { "${it} 0 1 1" }.join('\\n') }
    imageData.setProperty('patchcl.imported', mark((1..6).collect { UUID.randomUUID() }))
    imageData.setProperty('patchcl.imported.before', mark(nuclei*.getID()))
    entry.saveImageData(imageData)
    '[]'
    """
    session.run(project, undone)
    script = project.with_name("run_patchcl.groovy")
    script.write_text(read_script("run_patchcl.groovy"), "utf-8")
    actions = f"""
    def image = review.entryOf(review.rois[0]).readImageData()
    def running = new GroovyClassLoader(loader).parseClass(new File('{script}'))
    lines << running.replacedInWords(image, null)
    review.begin(0, image)
    lines << [review.nuclei.size(), image.getHierarchy().getDetectionObjects().size()]
    """
    asked, (nuclei, others) = review(session, project, actions)
    assert asked.startswith("The 6 nuclei of earlier runs in this image are replaced")
    assert (nuclei, others) == (7, 1)  # with the drawn one, and without another program's


def test_a_pixel_size_is_saved_with_the_image(session: qupath.Session, project: Path) -> None:
    """QuPath keeps it in the project, which saving an image does not write."""
    actions = """
    open(0)
    qupath.lib.scripting.QP.setPixelSizeMicrons(review.imageData, 0.25, 0.26, Double.NaN)
    review.markCorrected()
    """
    review(session, project, actions)
    assert open_project(project, "files").images()[0].mpp == (0.25, 0.26)


def test_tools_are_found_in_each_version(session: qupath.Session, project: Path) -> None:
    """QuPath 0.5 has a manager of them, 0.4 the window itself: here without windows."""
    actions = """
    class Old { String selectedTool = 'of 0.4' }
    class New { Old toolManager = new Old(selectedTool: 'of 0.5') }
    def window = loader.loadClass('ReviewWindow')
    lines.addAll([new Old(), new New()].collect { window.tools(it).getSelectedTool() })
    """
    assert review(session, project, actions) == ["of 0.4", "of 0.5"]


def test_detections_become_annotations_with_all_they_had(
    session: qupath.Session, project: Path
) -> None:
    detect = """
    def found = hierarchy.getAnnotationObjects().findAll { it.getName()?.startsWith('nucleus') }
    hierarchy.removeObjects(found, true)
    hierarchy.addObjects(found.collect {
        def detection = qupath.lib.objects.PathObjects.createDetectionObject(
                it.getROI(), it.getPathClass(), it.getMeasurementList())
        detection.setID(it.getID()); detection.setName(it.getName())
        detection.storeMetadataValue('seen by', 'me')   // getMetadata() of a detection is read-only
        detection
    })
    def free = { double x -> qupath.lib.roi.ROIs.createRectangleROI(
            x, 340, 20, 20, qupath.lib.regions.ImagePlane.getDefaultPlane()) }
    hierarchy.addObjects([
        qupath.lib.objects.PathObjects.createCellObject(free(110), null, null, null),
        qupath.lib.objects.PathObjects.createTileObject(free(200)),
    ])
    entry.saveImageData(imageData)
    '[]'
    """
    session.run(project, detect)
    lines = review(
        session,
        project,
        "open(0); look(); 6.times { look(review.accept()) }\n"
        "lines << review.nuclei.every { it.isAnnotation() }\n"
        "lines << review.nuclei.count { it.getMetadata()['seen by'] == 'me' }\n"
        "lines << review.imageData.getHierarchy().getDetectionObjects().size()",
    )
    assert names(lines[:-4]) == [f"nucleus {k}" for k in (5, 4, 3, 2, 1, 0)]
    # The cell without a nucleus and the tile are no nuclei: they stay what they are.
    assert lines[-3:] == [True, 6, 2]


def test_what_a_model_changed_is_that_of_the_newest(session: qupath.Session, project: Path) -> None:
    """Of images that were not refined with, the record is one of a model before."""
    roi = RoiChangesRecord(
        x=100, y=100, width=300, height=300, geometry={}, before=[], corrected=[], deleted=2
    )

    def save(number: str, model: str, run: str) -> list[Any]:
        record = ChangesRecord(model=model, model_name="refined", made=model, run=run, rois=(roi,))
        folder = project.parent / "patchcl" / "changes" / number
        write_record(folder / "changes.json", record)
        return review(session, project, "lines << review.changesInWords()")

    assert review(session, project, "lines << review.changesInWords()") == [None]
    (line,) = save("1", "first", "r")
    assert "makes 0 of your 2 corrections" in line
    (line,) = save("2", "first", "r")
    assert "makes 0 of your 4 corrections" in line
    assert save("1", "second", "") == [None]  # no run of it yet
    (line,) = save("1", "second", "r")
    assert "makes 0 of your 2 corrections" in line


def test_without_a_window_it_logs_what_is_left(project: Path) -> None:
    copy_scripts(project)
    log = qupath.run_script(project, project.parent / "scripts" / "review.groovy")
    assert "ERROR" not in log, log
    assert log.count("2 ROIs in 2 images: 0 corrected, 2 left.") == 1


# In place of patchcl-qp: says what it was called for, and has results and changes ready.
COMMAND = f"""#!{sys.executable}
import json, pathlib, sys, time
patchcl = pathlib.Path(sys.argv[2]).parent / "patchcl"
with open(patchcl / "called.txt", "a") as file:
    print(sys.argv[1], "--model refined" in " ".join(sys.argv), file=file)
print(json.dumps({{"stage": "pretending", "done": 1, "total": 1}}), file=sys.stderr)
(patchcl / "seen.qpproj").write_bytes(pathlib.Path(sys.argv[2]).read_bytes())
while (patchcl / f"{{sys.argv[1]}}.waits").exists():
    time.sleep(0.1)
if sys.argv[1] == "refine":
    (patchcl / "models").mkdir()
    (patchcl / "models" / "refined.pt").touch()
else:
    (patchcl / "changes.later").rename(patchcl / "changes")
    for path in patchcl.glob("results/*/result.json"):
        path.touch()
"""

LOOK = """
groovy.json.JsonOutput.toJson(hierarchy.getAllObjects(false).collect {
    [it.getName(), it.getPathClass()?.toString(), it.getROI().getArea(), it.isLocked(),
     it.getROI().getCentroidX(), it.getROI().getCentroidY()]
})
"""


def state(project: Path) -> dict[str, Any]:
    """Where the review is."""
    path = project.parent / "patchcl" / "review.json"
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return found


def accepted(project: Path, roi: str) -> list[str]:
    """The nuclei that were accepted in an ROI, of whichever image."""
    found = state(project)["accepted"].items()
    return [nucleus for key, nuclei in found if key.endswith(f" {roi}") for nucleus in nuclei]


def prepare(project: Path, tmp_path: Path) -> Path:
    """Scripts that call ``COMMAND``, and what it has ready; the folder of results."""
    patchcl = project.parent / "patchcl"
    command = tmp_path / "command"
    command.write_text(COMMAND, "utf-8")
    command.chmod(0o755)
    copy_scripts(project)
    script = project.parent / "scripts" / "run_patchcl.groovy"
    changed, count = re.subn(
        "(?m)^String command = .*", f"String command = '{command}'", script.read_text("utf-8")
    )
    assert count == 1
    script.write_text(changed, "utf-8")
    for number in ("1", "2"):
        found = qupath.nuclei(10, 20, number)
        write_results(patchcl / "results" / number, [found], ResultConfig(), result_of(len(found)))
        roi = RoiChangesRecord(
            x=100, y=100, width=300, height=300, geometry={}, before=[], corrected=[], deleted=1
        )
        record = ChangesRecord(model="m", model_name="refined", made="", run="r", rois=(roi,))
        write_record(patchcl / "changes.later" / number / "changes.json", record)
    return patchcl


def test_two_rois_are_corrected_by_keys_alone(
    session: qupath.Session, project: Path, tmp_path: Path
) -> None:
    """Real keys in a real window: to the refined model's nuclei in all images, saved."""
    patchcl = prepare(project, tmp_path)
    with Robot(project, "one.svs", tmp_path) as robot:
        robot.run_script("review")
        robot.wait(lambda: state(project).get("nucleus"), 120, "review")
        robot.focus("PatchCL: review")
        first = state(project)["roi"]
        robot.press("e", "x", "2", "e", "e", "i", "shift+Left")
        robot.wait(lambda: len(accepted(project, first)) >= 3, 60, "nuclei")
        robot.press("b")
        robot.drag((690, 560), (692, 560), (694, 562))  # in the middle of the ROI, in the vessel
        robot.keys = 0
        robot.press("y")
        robot.wait(lambda: state(project)["roi"] != first, 60, "next ROI")
        assert robot.keys == 1  # beside the corrections
        second = state(project)["roi"]
        robot.press("e")
        robot.wait(lambda: accepted(project, second), 60, "nucleus")
        robot.press("y", "u")
        receipts = [patchcl / "imported" / f"{number}.json" for number in ("1", "2")]
        robot.wait(lambda: all(path.exists() for path in receipts), 120, "import")
        robot.wait(lambda: robot.text().count("Image data written") >= 4, 60, "saved image")
    assert (patchcl / "called.txt").read_text("utf-8").split("\n") == [
        "refine False",
        "run True",
        "",
    ]
    saved = session.run(project, LOOK)
    for image, objects in saved.items():
        classes = [class_name for _, class_name, *_ in objects]
        assert classes.count("PatchCL: corrected") == 1
        assert "PatchCL: correct here" not in classes
        assert len(objects) > 100  # with the nuclei of the refined model
        named = {name: rest for name, *rest in objects if name}
        kept = {f"nucleus {k}" for k in range(6)} - ({"nucleus 4"} if image == "one.svs" else set())
        assert {name for name in named if name.startswith("nucleus")} == kept
        area = named["nucleus 3"][1]
        assert area == pytest.approx(440.8 if image == "one.svs" else 400, abs=5)
        assert named["vessel"][:3] == [None, 240 * 240, False]  # the brush began in it
        new = [
            class_name
            for name, class_name, _, _, x, y in objects
            if not name and 200 < x < 300 and 200 < y < 330
        ]
        assert new.count("Nucleus") == (2 if image == "one.svs" else 0)  # by I and by the brush


# Opens the first image, in which a pixel size was saved as by Run for project: without the project.
OPEN_OTHER = """
def gui = qupath.lib.gui.QuPathGUI.getInstance()
def other = getProject().getImageList().find { it.getImageName() == 'one.svs' }
def saved = other.readImageData()
qupath.lib.scripting.QP.setPixelSizeMicrons(saved, 0.25, 0.26, Double.NaN)
other.saveImageData(saved)
javafx.application.Platform.runLater {
    gui.openImageEntry(other)
    new File('DONE').createNewFile()
}
"""


@pytest.mark.parametrize("step", ["refine", "run"])
def test_nuclei_are_in_all_images_whichever_is_opened_meanwhile(
    session: qupath.Session, project: Path, tmp_path: Path, step: str
) -> None:
    """A person who refines in one image and opens another one has them in both, saved."""
    patchcl = prepare(project, tmp_path)
    opened, waits = tmp_path / "opened", patchcl / f"{step}.waits"
    waits.touch()
    script = project.parent / "scripts" / "zz_open.groovy"
    script.write_text(OPEN_OTHER.replace("DONE", str(opened)), "utf-8")
    called = patchcl / "called.txt"
    with Robot(project, "one.svs", tmp_path) as robot:
        robot.run_script("review")
        robot.wait(lambda: state(project).get("nucleus"), 120, "review")
        robot.focus("PatchCL: review")
        first = state(project)["roi"]
        robot.press("y")
        robot.wait(lambda: state(project)["roi"] != first, 60, "next ROI")
        robot.press("u", "u")
        robot.wait(lambda: called.exists() and step in called.read_text("utf-8"), 60, step)
        robot.focus("QuPath - ")
        robot.run_script("zz_open")
        robot.wait(lambda: opened.exists() or robot.window("Save changes"), 60, "other image")
        if not opened.exists():  # the image with the next ROI may have changed
            robot.focus("Save changes")
            robot.press("Return")
        robot.wait(opened.exists, 60, "other image")
        waits.unlink()
        receipts = [patchcl / "imported" / f"{number}.json" for number in ("1", "2")]
        robot.wait(lambda: all(path.exists() for path in receipts), 120, "import")
        robot.wait(lambda: robot.text().count("Image data written") >= 4, 60, "saved image")
    for objects in session.run(project, LOOK).values():
        assert len(objects) > 100
    seen = read_project(patchcl / "seen.qpproj").images[0].mpp  # by the last command, at its start
    assert (seen == (0.25, 0.26)) is (step == "refine")
    assert open_project(project, "files").images()[0].mpp == (0.25, 0.26)
