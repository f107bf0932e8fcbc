"""One story with each backend, and with both in turn: the objects in QuPath must be the same.

A first run writes nuclei; a person edits them; a second run writes other contours; then ours are
removed. With the files backend, groovy/import_nuclei.groovy imports them.
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import qupath
import shapely
from qupath import by_index, nuclei
from results import result_of

from patchcl_qupath.config import ObjectType, ResultConfig
from patchcl_qupath.datatypes import Nuclei
from patchcl_qupath.project import open_project
from patchcl_qupath.storage.records import RegionRecord

pytestmark = pytest.mark.qupath

ROOT = Path(__file__).parent.parent
SLIDE = ROOT / "sample_project" / "CMU-1-Small-Region.svs"

# An image for each story: the backends that write, write again, and remove.
STORIES = {
    "paquo.svs": ("paquo", "paquo", "paquo"),
    "files.svs": ("files", "files", "files"),
    "files, then paquo.svs": ("files", "paquo", "files"),
    "paquo, then files.svs": ("paquo", "files", "paquo"),
}

NUMBERS = ("PatchCL: Nuclei", "PatchCL: Tissue mm^2", "PatchCL: Nuclei per mm^2")
POSITIVE = {"PatchCL: Positive": 1, "PatchCL: Negative": 0, "PatchCL: Positive %": 100}
LOOK = """
import qupath.lib.io.GsonTools

def objects = hierarchy.getAllObjects(false).collect { [
    id: it.getID().toString(),
    type: it.isAnnotation() ? 'annotation' : it.isDetection() ? 'detection' : 'other',
    name: it.getName(),
    description: it.isAnnotation() ? it.getDescription() : null,
    class_name: it.getPathClass()?.toString(),
    color: it.getPathClass()?.getColor(),
    locked: it.isLocked(),
    measurements: it.getMeasurements().collectEntries { k, v -> [k, v] },
    area: it.getROI().getArea(),
    points: it.getROI().getAllPoints().collect { p -> [p.getX(), p.getY()] },
    parent: it.getParent().isRootObject() ? null : it.getParent().getID().toString(),
] }
GsonTools.getInstance().toJson([objects: objects, type: imageData.getImageType().name(),
    note: imageData.getProperty('a note'), imported: imageData.getProperty('patchcl.imported')])
"""
EDIT = """
import qupath.lib.images.ImageData
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs

def square = { double x, double y, double side ->
    ROIs.createRectangleROI(x, y, side, side, ImagePlane.getDefaultPlane())
}
def nucleus = hierarchy.getAllObjects(false).findAll { it.getMeasurements().containsKey('index') }
    .collectEntries { [it.getMeasurements()['index'] as int, it] }
nucleus[0].setROI(square(30, 30, 4))
hierarchy.removeObject(nucleus[1], true)
nucleus[2].setPathClass(PathClass.fromString('Tumor: Positive'))
nucleus[3].setLocked(true)
def drawn = PathObjects.createAnnotationObject(square(32, 838, 16))   // on nucleus 200
drawn.setName('by hand')
hierarchy.addObject(drawn)
hierarchy.resolveHierarchy()
imageData.setImageType(ImageData.ImageType.BRIGHTFIELD_H_E)
imageData.setProperty('a note', 'of a person')
entry.saveImageData(imageData)
'"edited"'
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The objects in QuPath of each image after each step, and the nuclei that were written."""
    session = qupath.Session()
    path = qupath.make_project(
        tmp_path_factory.mktemp("backends") / "ein Projekt ü", SLIDE, [*STORIES]
    )
    written: list[dict[str, Any]] = [{}, {}]
    seen, untouched = [], []
    for step in range(3):
        # Files first: the script would import the results of the other backend, too.
        for backend in ("files", "paquo"):
            with closing(open_project(path, backend)) as project:
                for entry in project.images():
                    if STORIES[entry.name][step] != backend:
                        continue
                    if step == 2:
                        project.remove(entry)
                        continue
                    found = nuclei(10, 21 + step, entry.name, run=1 + step)
                    written[step][entry.name] = found
                    result = result_of(
                        len(found), run=f"run {step + 1}", made="today", tissue_mm2=0.5
                    )
                    project.write(entry, [found], ResultConfig(), result)
                if backend == "files":
                    qupath.run_script(path, ROOT / "groovy" / "import_nuclei.groovy")
                    project_file = path.read_bytes()
                    shutil.rmtree(project.layout.root / "results")
        untouched.append(path.read_bytes() == project_file)
        seen.append(session.run(path, LOOK))
        if step == 0:
            session.run(path, EDIT)
    session.close()
    classes = json.loads((path.parent / "classifiers" / "classes.json").read_text("utf-8"))
    return SimpleNamespace(
        written=written,
        seen=seen,
        classes=[c["name"] for c in classes["pathClasses"]],
        project_is_untouched=all(untouched),
    )


@pytest.mark.parametrize("image", STORIES)
def test_qupath_shows_what_was_written(story: Any, image: str) -> None:
    written, shown = story.written[0][image], by_index(story.seen[0][image]["objects"])
    assert sorted(shown) == list(range(len(written)))
    region = region_of(story.seen[0][image])
    for k, polygon in enumerate(written.polygons):
        one = shown[k]
        assert one["id"] == written.uuids[k]
        assert (one["type"], one["class_name"]) == ("annotation", "Nucleus")
        assert one["color"] & 0xFFFFFF == (38 << 16) + (70 << 8) + 214
        assert one["parent"] == region["id"]
        assert not one["locked"]
        assert shapely.Polygon(one["points"]).hausdorff_distance(polygon) < 1e-3
        for name, values in written.measurements.items():
            assert one["measurements"][name] == pytest.approx(values[k], rel=1e-5)


@pytest.mark.parametrize("image", STORIES)
@pytest.mark.parametrize("run", [1, 2])
def test_region_has_the_measurements_of_its_run(story: Any, image: str, run: int) -> None:
    region = region_of(story.seen[run - 1][image])
    assert region["locked"]
    assert "class_name" not in region
    assert "parent" not in region
    assert f"run {run} (today)" in region["description"]
    assert region["area"] == 2220 * 2967
    within = [o for o in story.seen[run - 1][image]["objects"] if o.get("parent") == region["id"]]
    measured = region["measurements"]
    found = len(story.written[run - 1][image])
    left_out = 0 if run == 1 else len({0, 1, 3, 200})
    assert {name: measured.pop(name) for name in [*measured] if name not in NUMBERS} == {
        "PatchCL: Found": found,
        "PatchCL: Added": found - left_out,
        "PatchCL: Left out": left_out,
        "PatchCL: Left out for objects of yours": left_out and left_out - 1,
        "PatchCL: Left out as deleted by you": left_out and 1,
        "PatchCL: Left out for other programs": 0,
        "PatchCL: Left out in correction ROIs": 0,
        # The class that a person gave one nucleus, as QuPath counts it.
        **(POSITIVE if run == 2 else {}),
    }
    assert measured == {
        "PatchCL: Nuclei": len(within),
        "PatchCL: Tissue mm^2": 0.5,
        "PatchCL: Nuclei per mm^2": len(within) / 0.5,
    }


@pytest.mark.parametrize("image", STORIES)
@pytest.mark.parametrize("step", [1, 2])
def test_edits_of_a_person_are_kept(story: Any, image: str, step: int) -> None:
    """After another run, and after ours were removed. A class is carried over."""
    old, new = (written[image].uuids.tolist() for written in story.written)
    seen = story.seen[step][image]
    shown = {o["id"]: o for o in seen["objects"]}
    assert shown[old[0]]["area"] == 16
    assert old[1] not in shown
    assert shown[new[2]]["class_name"] == "Tumor: Positive"
    assert shown[old[3]]["locked"]
    assert {o.get("name") for o in shown.values()} >= {"by hand"}
    assert (seen["type"], seen["note"]) == ("BRIGHTFIELD_H_E", "of a person")


@pytest.mark.parametrize("image", STORIES)
def test_all_other_nuclei_are_those_of_the_new_run(story: Any, image: str) -> None:
    """Except where the person reshaped, deleted, locked or drew."""
    old, new = (written[image].uuids.tolist() for written in story.written)
    shown = {o["id"] for o in story.seen[1][image]["objects"] if "name" not in o}
    edited = {0, 1, 3, 200}
    assert shown == {old[0], old[3]} | {id_ for k, id_ in enumerate(new) if k not in edited}


@pytest.mark.parametrize("image", STORIES)
def test_remove_deletes_ours_and_the_marks_of_the_import(story: Any, image: str) -> None:
    old, new = (written[image].uuids.tolist() for written in story.written)
    seen = story.seen[2][image]
    assert {o["id"] for o in seen["objects"] if "name" not in o} == {old[0], new[2], old[3]}
    assert {o.get("name") for o in seen["objects"]} == {None, "by hand"}
    assert seen["imported"] == ""


def test_project_keeps_its_classes_and_its_file(story: Any) -> None:
    """Our class is added to QuPath's usual ones; paquo does not change the project's file."""
    assert story.classes[0] == "Tumor"
    assert story.classes[-1] == "Nucleus"
    assert story.project_is_untouched


@pytest.mark.parametrize("backend", ["paquo", "files"])
def test_each_region_has_an_annotation_of_its_own(tmp_path: Path, backend: str) -> None:
    """Two regions; then one of them and another, beside the first two; then the whole image."""
    upper = shapely.box(0, 0, 420, 300) - shapely.box(100, 100, 180, 180)
    right = shapely.MultiPolygon([shapely.box(300, 400, 420, 500), shapely.box(300, 600, 420, 700)])
    left = shapely.box(20, 400, 100, 900)
    session = qupath.Session()
    path = qupath.make_project(tmp_path / "project", SLIDE, ["a.svs"])
    shown = []
    for run, regions in enumerate([(upper, right), (upper, left), ()], start=1):
        found = nuclei(10, 21, "a", run=run)
        if regions:
            within = shapely.contains(shapely.union_all(regions), shapely.centroid(found.polygons))
            found = found[within]
        records = tuple(
            RegionRecord(geometry=json.loads(shapely.to_geojson(region)), tissue_mm2=0.25 + k)
            for k, region in enumerate(regions)
        )
        result = result_of(len(found), run=f"run {run}", regions=records)
        with closing(open_project(path, backend)) as project:
            project.write(project.images()[0], [found], ResultConfig(), result)
        if backend == "files":
            log = qupath.run_script(path, ROOT / "groovy" / "import_nuclei.groovy")
            assert "ERROR" not in log, log
        shown.append(session.run(path, LOOK)["a.svs"]["objects"])
        if run == 1:
            session.run(path, EDIT)
    session.close()

    there = [(upper, right), (upper, right, left), ()]
    tissue_mm2 = [(0.25, 1.25), (0.25, 1.25, 1.25), ()]
    for objects, regions, areas in zip(shown, there, tissue_mm2, strict=True):
        held = {o["id"]: o for o in objects if o.get("name") == "PatchCL"}
        members = [o for o in objects if o.get("parent") in held and "index" in o["measurements"]]
        if not regions:
            (region,) = held.values()
            assert region["area"] == 2220 * 2967
            assert region["measurements"]["PatchCL: Tissue mm^2"] == 2.0
            continue
        by_area = {round(o["area"]): o for o in held.values()}
        assert sorted(by_area) == sorted(round(region.area) for region in regions)
        for region, area in zip(regions, areas, strict=True):
            one = by_area[round(region.area)]
            inside = [o for o in members if o["parent"] == one["id"]]
            assert len(inside) > 2
            for nucleus in inside:
                assert region.contains(shapely.Polygon(nucleus["points"]).centroid)
            count = one["measurements"]["PatchCL: Nuclei"]
            # By position: one that was drawn where no region was has another parent.
            centroids = [
                shapely.Polygon(o["points"]).centroid for o in objects if o["id"] not in held
            ]
            assert count == sum(region.contains(centroid) for centroid in centroids) >= len(inside)
            assert one["measurements"]["PatchCL: Nuclei per mm^2"] == count / area
    first, second, third = ({o["id"]: o for o in objects} for objects in shown)
    drawn = next(o for o in second.values() if o.get("name") == "by hand")
    assert {"Tumor: Positive", "Nucleus"} == {
        o["class_name"] for o in third.values() if "class_name" in o
    }
    assert drawn["id"] in third
    reshaped = next(o for o in first.values() if o["measurements"].get("index") == 0)
    assert second[reshaped["id"]]["area"] == third[reshaped["id"]]["area"] == 16
    # Of earlier runs, only the edits of a person are left.
    old = {o["id"] for o in first.values() if o["measurements"].get("index", 0) > 3}
    assert not old & set(third)


def region_of(seen: dict[str, Any]) -> dict[str, Any]:
    (region,) = (o for o in seen["objects"] if o.get("name") == "PatchCL")
    found: dict[str, Any] = region
    return found


STAY = """
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass

def nucleus = hierarchy.getDetectionObjects()
    .collectEntries { [it.getMeasurements()['index'] as int, it] }
nucleus[3].setLocked(true)
nucleus[4].setPathClass(PathClass.fromString('Tumor'))
nucleus[5].setName('mitosis')
def cell = PathObjects.createCellObject(nucleus[6].getROI(), nucleus[6].getROI(), null)
hierarchy.removeObject(nucleus[6], true)
hierarchy.addObject(cell)
def other = PathObjects.createDetectionObject(nucleus[7].getROI())   // of another program
hierarchy.addObject(other)
entry.saveImageData(imageData)
'1'
"""


@pytest.mark.parametrize("backend", ["paquo", "files"])
def test_detections_that_stay_are_a_persons_in_the_next_run(tmp_path: Path, backend: str) -> None:
    """Locked, classified, named, made a cell: ours are removed, and another model's run follows."""
    session = qupath.Session()
    path = qupath.make_project(tmp_path / "project", SLIDE, ["a.svs"])
    config = ResultConfig(object_type=ObjectType.DETECTION)
    shown, written = [], []
    for step in ("run", "remove", "run"):
        if step == "remove":
            session.run(path, STAY)
        with closing(open_project(path, backend)) as project:
            (entry,) = project.images()
            if step == "remove":
                project.remove(entry)
            else:
                found = nuclei(10, 21, "a", run=len(written) + 1)
                project.write(entry, [found], config, result_of(len(found), config))
                written.append(found.uuids.tolist())
        if backend == "files":
            log = qupath.run_script(path, ROOT / "groovy" / "import_nuclei.groovy")
            assert "ERROR" not in log, log
        shown.append(session.run(path, LOOK)["a.svs"]["objects"])
    session.close()
    old, new = written
    stayed = {o["id"] for o in shown[1]}
    assert stayed & set(old) == {old[3], old[4], old[5]}
    assert len(stayed) == 5  # and the cell, and what is of another program
    last = {o["id"]: o for o in shown[2]}
    assert set(last) & set(new) == set(new) - {new[3], new[6]}
    assert last[old[3]]["locked"]
    assert (last[new[4]]["class_name"], last[new[5]]["name"]) == ("Tumor", "mitosis")
    assert set(last) & stayed == stayed - {old[4], old[5]}


def written(path: Path, run: int, config: ResultConfig) -> tuple[Nuclei, Any]:
    """Write the nuclei of a run into the one image of a project; these, and what is told of it."""
    with closing(open_project(path, "paquo")) as project:
        (entry,) = project.images()
        found = nuclei(10, 21, "a", run=run)
        return found, project.write(entry, [found], config, result_of(len(found), config))


CLASSIFY = """
def classified = hierarchy.getAllObjects(false).find { it.getMeasurements()['index'] == 4 }
classified.setPathClass(qupath.lib.objects.classes.PathClass.fromString('Tumor'))
entry.saveImageData(imageData)
'1'
"""


def test_a_class_of_a_person_stays_after_a_run_that_agrees(tmp_path: Path) -> None:
    """It is the person's in the runs after that, too; all other nuclei have the runs' classes."""
    session = qupath.Session()
    path = qupath.make_project(tmp_path / "project", SLIDE, ["a.svs"])
    for run, name in enumerate(["Nucleus", "Tumor", "Nucleus", "Stroma"], start=1):
        config = ResultConfig(class_name=name)
        _, told = written(path, run, config)
        if run == 1:
            session.run(path, CLASSIFY)
            continue
        assert told is not None
        assert told.classes == 1
        shown = by_index(session.run(path, LOOK)["a.svs"]["objects"])
        others = [k for k in shown if k != 4]
        assert (shown[4]["class_name"], len(others)) == ("Tumor", 209)
        assert {shown[k]["class_name"] for k in others} == {name}
    session.close()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no locale C")
def test_names_that_are_not_ascii_are_found_in_any_locale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In C, that of many containers and cron jobs, Java found neither project nor image."""
    folder = tmp_path / "Prüfung"
    folder.mkdir()
    slide = Path(shutil.copy(SLIDE, folder / "Schnitt ö.svs"))
    path = qupath.make_project(folder / "project", slide, ["a.svs"])
    for name in ("LANG", "LC_CTYPE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LC_ALL", "C")
    _, told = written(path, 1, ResultConfig())
    assert told is not None
    assert told.added == 210


# QuPath's 'Undo' restores the objects, as they were serialized, and nothing else of an image.
UNDO = """
def hierarchyBefore = new File('BEFORE').withInputStream { qupath.lib.io.PathIO.readHierarchy(it) }
hierarchy.setHierarchy(hierarchyBefore)
def nucleus = hierarchy.getAllObjects(false).findAll { it.getMeasurements().containsKey('index') }
    .collectEntries { [it.getMeasurements()['index'] as int, it] }
hierarchy.removeObject(nucleus[5], true)
nucleus[6].setPathClass(qupath.lib.objects.classes.PathClass.fromString('Tumor'))
def whole = qupath.lib.roi.ROIs.createRectangleROI(0, 0, imageData.getServer().getWidth(),
    imageData.getServer().getHeight(), qupath.lib.regions.ImagePlane.getDefaultPlane())
def corrected = qupath.lib.objects.classes.PathClass.fromString('PatchCL: corrected')
hierarchy.addObject(qupath.lib.objects.PathObjects.createAnnotationObject(whole, corrected))
entry.saveImageData(imageData)
'1'
"""


# A run would leave the nuclei in it as they are.
WITHOUT_ROI = """
def rois = hierarchy.getAnnotationObjects().findAll { "${it.getPathClass()}".contains('corrected') }
hierarchy.removeObjects(rois, true)
entry.saveImageData(imageData)
'1'
"""


def check_exports_of_what_was_before(path: Path) -> None:
    """The nuclei that are there again are no other program's, and the region is no person's."""
    qupath.run_script(path, ROOT / "groovy" / "export_labels.groovy")
    labels = json.loads((path.parent / "patchcl" / "labels" / "1.geojson").read_text("utf-8"))
    assert labels["patchcl"]["imported"] == 210
    assert labels["patchcl"]["other_programs"] == []
    assert [*labels["patchcl"]["deleted"].values()] == [1]
    qupath.run_script(path, ROOT / "groovy" / "export_regions.groovy")
    regions = json.loads((path.parent / "patchcl" / "regions" / "1.geojson").read_text("utf-8"))
    (roi,) = regions["features"]
    assert roi["properties"]["classification"]["names"] == ["PatchCL", "corrected"]


@pytest.mark.parametrize(
    ("kind", "undone"),
    [
        (ObjectType.ANNOTATION, 1),
        (ObjectType.DETECTION, 1),
        (ObjectType.DETECTION, 2),  # one after the other
    ],
)
def test_nuclei_of_imports_that_were_undone_are_replaced(
    tmp_path: Path, kind: ObjectType, undone: int
) -> None:
    """What a person did with the nuclei of before, which are there again, holds for the next."""
    session = qupath.Session()
    path = qupath.make_project(tmp_path / "project", SLIDE, ["a.svs"])
    data, before = path.parent / "data" / "1" / "data.qpdata", tmp_path / "before"
    config = ResultConfig(object_type=kind)
    for run in range(1, undone + 3):
        found, told = written(path, run, config)
        if run == 1:
            shutil.copy(data, before)
        elif run == undone + 1:
            session.run(path, UNDO.replace("BEFORE", before.as_posix()))
            check_exports_of_what_was_before(path)
            session.run(path, WITHOUT_ROI)
    shown = session.run(path, LOOK)["a.svs"]["objects"]
    session.close()
    assert told is not None
    assert (told.added, told.left_out, told.deleted, told.classes) == (209, 1, 1, 1)
    one = by_index(shown)
    assert {k: o["id"] for k, o in one.items()} == {
        k: id_ for k, id_ in enumerate(found.uuids.tolist()) if k != 5
    }
    assert len(shown) == 209 + 1  # the region
    assert one[6]["class_name"] == "Tumor"
