"""What became of nuclei in QuPath: the same numbers in all places, and objects of other programs.

Three images, with each backend: QuPath's own detections are there before the first run; a person
works on the nuclei; a second run is asked to add nuclei beside other programs' objects, to leave
them out, or to replace these.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import qupath
import shapely
from click.testing import CliRunner
from qupath import nuclei
from results import result_of
from slides import write_tiff

from patchcl_qupath.cli import main
from patchcl_qupath.config import Config, Overlapping, ResultConfig, to_dict
from patchcl_qupath.datatypes import Box
from patchcl_qupath.project import NewImage, init_project, open_project
from patchcl_qupath.project.imported import imported_nuclei
from patchcl_qupath.report.found import find_image
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.status import image_status
from patchcl_qupath.storage.records import (
    Imported,
    ReceiptRecord,
    data_signature,
    write_record,
)

ROOT = Path(__file__).parent.parent
SLIDE = ROOT / "sample_project" / "CMU-1-Small-Region.svs"
IMAGES = {"beside.svs": "both", "theirs.svs": "keep", "ours.svs": "replace"}
FOREIGN = range(20, 31)  # nuclei in whose place another program has found some

LOOK = """
import qupath.lib.io.GsonTools
import qupath.lib.objects.PathObjectTools

def objects = hierarchy.getAllObjects(false).collect { [
    id: it.getID().toString(),
    type: it.isAnnotation() ? 'annotation' : it.isCell() ? 'cell' :
        it.isTile() ? 'tile' : 'detection',
    name: it.getName(),
    class_name: it.getPathClass()?.toString(),
    locked: it.isLocked(),
    measurements: it.getMeasurements().collectEntries { k, v -> [k, v] },
    points: PathObjectTools.getROI(it, true).getAllPoints().collect { p -> [p.getX(), p.getY()] },
    parent: it.getParent().isRootObject() ? null : it.getParent().getID().toString(),
] }
GsonTools.getInstance().toJson(objects)
"""
OBJECTS = """
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs

def square = { double x, double y, double side ->
    ROIs.createRectangleROI(x - side / 2, y - side / 2, side, side, ImagePlane.getDefaultPlane())
}
def at = { int k, double side ->
    square(40 + 40 * (k % 10), 40 + 40 * k.intdiv(10) + 0.03 * k, side)
}
"""
DETECT = (
    OBJECTS
    + """
def found = (20..29).collect { k ->
    def one = PathObjects.createDetectionObject(at(k, 15), PathClass.fromString('Tumor'))
    one.getMeasurementList().put('Detection probability', 0.5d + k / 100)
    one
}
found << PathObjects.createCellObject(at(30, 25), at(30, 15), PathClass.fromString('Immune cells'))
found << PathObjects.createTileObject(square(220, 140, 400))
found[1].setLocked(true)
hierarchy.addObjects(found)
def drawn = PathObjects.createAnnotationObject(at(200, 15))
drawn.setName('by hand')
hierarchy.addObject(drawn)
entry.saveImageData(imageData)
'1'
"""
)
EDIT = (
    OBJECTS
    + """
def nucleus = hierarchy.getAllObjects(false).findAll { it.getMeasurements().containsKey('index') }
    .collectEntries { [it.getMeasurements()['index'] as int, it] }
nucleus[0].setROI(square(30, 30, 4))
hierarchy.removeObject(nucleus[1], true)
nucleus[2].setPathClass(PathClass.fromString('Tumor: Positive'))
def cell = PathObjects.createCellObject(at(3, 30), nucleus[3].getROI(), null)
hierarchy.removeObject(nucleus[3], true)
hierarchy.addObject(cell)
hierarchy.resolveHierarchy()
entry.saveImageData(imageData)
'1'
"""
)

FIRST = Imported(found=210, added=209, left_out=1, for_yours=1)  # the one drawn by hand
# Nucleus 0 was reshaped, a cell was made of 3, 1 was deleted; 2 has a class.
BESIDE = Imported(found=210, added=206, left_out=4, for_yours=3, deleted=1, classes=1)
THEIRS = msgspec.structs.replace(BESIDE, added=195, left_out=15, for_others=11)
OURS = msgspec.structs.replace(BESIDE, replaced=10)  # one of theirs is locked
SECOND = {"beside.svs": BESIDE, "theirs.svs": THEIRS, "ours.svs": OURS}


def write(project: Any, entry: Any, run: int, overlapping: str) -> tuple[Any, Imported | None]:
    """Write nuclei as a run does; they, and what became of them."""
    settings = ResultConfig(overlapping=Overlapping(overlapping))
    found = nuclei(10, 21, entry.name, run=run)
    result = result_of(len(found), run=f"run {run}", tissue_mm2=0.5)
    config = to_dict(replace(Config(), result=settings))
    result = msgspec.structs.replace(result, config=config)
    return found, project.write(entry, [found], settings, result)


@pytest.fixture(scope="module", params=["paquo", "files"])
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The objects of each image after each step, and what was told of them, by place."""
    qupath.launcher()  # skips
    folder = tmp_path_factory.mktemp(request.param)
    path = qupath.make_project(folder / "project", SLIDE, [*IMAGES])
    session = qupath.Session()
    session.run(path, DETECT)
    seen, told, written = [session.run(path, LOOK)], [], []
    for run in (1, 2):
        with closing(open_project(path, request.param)) as project:
            returned, before, made = {}, {}, {}
            for entry in project.images():
                how = "both" if run == 1 else IMAGES[entry.name]
                made[entry.name], returned[entry.name] = write(project, entry, run, how)
                before[entry.name] = imported_nuclei(project, entry)
        if request.param == "files":
            assert before == returned == dict.fromkeys(IMAGES)  # they wait to be imported
            log = qupath.run_script(path, ROOT / "groovy" / "import_nuclei.groovy")
            assert "ERROR" not in log, log
            returned = log
        written.append(made)
        told.append((returned, told_of(path)))
        seen.append(session.run(path, LOOK))
        if run == 1:
            session.run(path, EDIT)
    session.close()
    return SimpleNamespace(seen=seen, told=told, written=written)


def told_of(path: Path) -> dict[str, dict[str, Imported | None]]:
    """What status and report tell of each image."""
    project = open_project(path, "files")
    return {
        entry.name: {
            "status": image_status(project, entry).imported,
            "report": find_image(project, entry).imported,
        }
        for entry in project.images()
    }


@pytest.mark.qupath
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("run", [1, 2])
def test_all_places_tell_the_same_numbers(story: Any, image: str, run: int) -> None:
    """What the backend returns, or the script logs; status; report; and the region's measurements.

    They are those of the objects that are in the image.
    """
    expected = FIRST if run == 1 else SECOND[image]
    returned, told = story.told[run - 1]
    if isinstance(returned, dict):
        assert returned[image] == expected
    else:
        assert f"{image}: {expected.in_words};" in returned
    assert told[image] == {"status": expected, "report": expected}
    objects = story.seen[run][image]
    (region,) = (o for o in objects if o.get("name") == "PatchCL")
    measured = region["measurements"]
    assert measured["PatchCL: Found"] == expected.found
    assert measured["PatchCL: Added"] == expected.added
    assert measured["PatchCL: Left out"] == expected.left_out
    assert measured["PatchCL: Left out for objects of yours"] == expected.for_yours
    assert measured["PatchCL: Left out as deleted by you"] == expected.deleted
    assert measured["PatchCL: Left out for other programs"] == expected.for_others
    assert measured["PatchCL: Left out in correction ROIs"] == 0
    new = {*story.written[run - 1][image].uuids.tolist()}
    assert len(new & {o["id"] for o in objects}) == expected.added


@pytest.mark.qupath
@pytest.mark.parametrize("image", IMAGES)
def test_objects_of_other_programs_stay_as_they_are(story: Any, image: str) -> None:
    def foreign(step: int) -> dict[str, Any]:
        unplaced = ({**o, "parent": None} for o in story.seen[step][image])
        return {o["id"]: o for o in unplaced if o["id"] in ids}

    ids = {o["id"] for o in story.seen[0][image]}
    assert len(ids) == len(FOREIGN) + 2  # a tile, and an annotation that a person drew
    assert foreign(1) == foreign(0)
    if image != "ours.svs":
        assert foreign(2) == foreign(0)
        return
    left = foreign(2)
    assert left == {id_: foreign(0)[id_] for id_ in left}
    assert {(o["type"], o.get("name"), o["locked"]) for o in left.values()} == {
        ("detection", None, True),
        ("tile", None, False),
        ("annotation", "by hand", False),
    }


@pytest.mark.qupath
@pytest.mark.parametrize("image", IMAGES)
def test_no_nucleus_is_there_twice(story: Any, image: str) -> None:
    """But for other programs' beside ours, where they were not asked to give way."""
    contours = [shapely.Polygon(o["points"]) for o in story.seen[2][image] if o["type"] != "tile"]
    tree = shapely.STRtree(contours)
    one, other = tree.query(contours, predicate="intersects")
    pairs = [
        (contours[i], contours[k])
        for i, k in zip(one, other, strict=True)
        if i < k
        and shapely.intersection(contours[i], contours[k]).area > 20
        and max(contours[i].area, contours[k].area) < 1000
    ]
    assert len(pairs) == {"beside.svs": 11, "theirs.svs": 0, "ours.svs": 1}[image]


HALF_AS_DETECTIONS = """
import qupath.lib.io.PathIO
import qupath.lib.objects.PathObjects

def found = PathIO.readObjects(new File('FILE').toPath())
def half = found.take(found.size().intdiv(2)).collect {
    PathObjects.createDetectionObject(it.getROI())
}
hierarchy.addObjects(half)
entry.saveImageData(imageData)
half.size().toString()
"""


@pytest.mark.qupath
def test_a_run_after_a_detection_of_qupath(tmp_path: Path, session: qupath.Session) -> None:
    """The command line: table, --json, status and report, with --overlapping and without."""
    (entry,) = open_project(SLIDE.parent, "files").images()
    pixels = Slide.open(entry).read(Box(1500, 900, 1900, 1300))
    slide = write_tiff(tmp_path / "a.tif", pixels, (0.5, 0.5))
    path = init_project(tmp_path / "project", [NewImage(slide, [(400, 400)], None)])
    settings = tmp_path / "settings.toml"
    settings.write_text('recipe = "patchcl"\n[patchcl]\nmax_steps = 40\nbatch = 2\ncrops = 8\n')

    def call(command: str, *options: str) -> str:
        done = CliRunner().invoke(main, [command, str(path), *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    run = ("run", "--config", str(settings), "--backend")
    shown = call(*run, "files")
    assert "In QuPath:" not in shown + call("status")  # the nuclei wait to be imported
    (row,) = json.loads(call("status", "--json"))["images"]
    count = row["nuclei"]
    assert (count > 100, row["imported"]) == (True, None)
    (file,) = (path.parent / "patchcl" / "results" / row["id"]).glob("*.geojson.gz")
    theirs = session.run(path, HALF_AS_DETECTIONS.replace("FILE", file.as_posix()))["a.tif"]
    assert theirs == count // 2

    for overlapping, left_out in [((), 0), (("--overlapping", "keep"), theirs)]:
        shown = call(*run, "paquo", *overlapping)
        (outcome,) = json.loads(call(*run, "paquo", *overlapping, "--json"))["images"]
        assert outcome["unchanged"]  # nothing was left to do
        numbers = outcome["imported"]
        added = count - left_out
        assert (numbers["found"], numbers["added"], numbers["left_out"]) == (count, added, left_out)
        assert numbers["for_others"] == left_out
        (row,) = json.loads(call("status", "--json"))["images"]
        assert row["imported"] == numbers
        words = f"In QuPath: a.tif: {count:,} nuclei found, {added:,} added, {left_out:,} left out"
        assert words in shown
        assert words in call("status")
        page = (path.parent / "patchcl" / "report" / "index.html").read_text("utf-8")
        cells = re.search(r'href="#image-.*?</tr>', page, re.DOTALL)
        assert cells is not None
        values = re.findall(r'class="number" data-value="([^"]+)"', cells.group())
        assert values[1:4] == [str(count), str(added), str(left_out)]
        objects = session.run(path, LOOK)["a.tif"]
        (region,) = (o for o in objects if o.get("name") == "PatchCL")
        assert region["measurements"]["PatchCL: Added"] == added
        assert len(objects) == 1 + theirs + added


@pytest.mark.parametrize("saved", [True, False])
def test_an_import_that_nobody_saved_is_none(tmp_path: Path, saved: bool) -> None:
    """In QuPath's window, a person saves the image after the import, or closes it without."""
    path = qupath.make_project(tmp_path / "project", SLIDE, ["a.svs"])
    project = open_project(path, "files")
    (entry,) = project.images()
    write(project, entry, 1, "both")
    receipt = ReceiptRecord(
        image="a.svs",
        run="run 1",
        imported="2026-11-26T01:08:00+00:00",
        saved=False,
        added=209,
        left_out=1,
        left_out_deleted=1,
        removed=0,
        kept=0,
        rois=0,
        rois_kept=0,
    )
    write_record(project.layout.receipt(entry.id), receipt)
    if saved:
        project.saved.data(entry).parent.mkdir(parents=True)
        project.saved.data(entry).touch()
    status = image_status(project, entry)
    expected = Imported(found=210, added=209, left_out=1, deleted=1)
    assert status.imported == (expected if saved else None)
    assert ("imported into QuPath, but not saved there" in status.changed) == (not saved)
    write(project, entry, 1, "both")  # the same run anew: these wait to be imported
    later = project.layout.receipt(entry.id).stat().st_mtime + 5
    os.utime(project.layout.result(entry.id), (later, later))
    assert image_status(project, entry).imported is None


def imported(folder: Path, **more: Any) -> tuple[Any, Any, ReceiptRecord]:
    """A project with nuclei on disk, its image, and a receipt of their import."""
    project = open_project(qupath.make_project(folder / "project", SLIDE, ["a.svs"]), "files")
    (entry,) = project.images()
    write(project, entry, 1, "both")
    data = project.saved.data(entry)
    data.parent.mkdir(parents=True)
    data.write_bytes(b"with nuclei")
    none = {"left_out": 0, "removed": 0, "kept": 0, "rois": 0, "rois_kept": 0}
    numbers = {"added": 210, **none, "data": data_signature(data), **more}
    receipt = ReceiptRecord(image="a.svs", run="run 1", imported="2026-11-26T01:08", **numbers)
    write_record(project.layout.receipt(entry.id), receipt)
    return project, entry, receipt


def test_nuclei_are_in_the_image_that_was_saved_with_them_or_a_later_one(tmp_path: Path) -> None:
    project, entry, receipt = imported(tmp_path)
    data, file = project.saved.data(entry), project.layout.receipt(entry.id)
    assert imported_nuclei(project, entry) == receipt.nuclei
    at = file.stat().st_mtime
    earlier = tmp_path / "earlier"
    earlier.write_bytes(b"of before")
    os.utime(earlier, (at - 3600, at - 3600))
    shutil.copy2(earlier, data)  # a backup, with its time
    assert imported_nuclei(project, entry) is None
    os.utime(data, (at + 3600, at + 3600))  # a person saved it
    assert imported_nuclei(project, entry) == receipt.nuclei
    data.unlink()
    assert imported_nuclei(project, entry) is None


@pytest.mark.parametrize(("objects", "there"), [(212, True), (150, True), (1, False)])
def test_an_import_is_not_in_an_image_that_was_saved_without_it(
    tmp_path: Path, objects: int, there: bool
) -> None:
    """Imported in the window and closed; the next day a person draws something, and saves."""
    project, entry, receipt = imported(tmp_path, saved=False, data=None)
    data = project.saved.data(entry)
    later = project.layout.receipt(entry.id).stat().st_mtime + 86400
    os.utime(data, (later, later))
    summary = {"hierarchy": {"nObjects": objects}}
    data.with_name("summary.json").write_text(json.dumps(summary), "utf-8")
    again = open_project(project.path, "files")
    assert imported_nuclei(again, entry) == (receipt.nuclei if there else None)


@pytest.mark.parametrize(
    ("properties", "there"),
    [
        (b"patchcl.imported", True),  # of an earlier version, which did not leave its run
        (b"", False),
        (b"patchcl.imported patchcl.runt\x00\x05run 1", True),
        (b"patchcl.imported patchcl.runt\x00\x05run 2", False),
    ],
)
def test_the_run_that_an_image_names_is_the_one_whose_nuclei_it_has(
    tmp_path: Path, properties: bytes, there: bool
) -> None:
    project, entry, receipt = imported(tmp_path, saved=False, data=None)
    data = project.saved.data(entry)
    later = project.layout.receipt(entry.id).stat().st_mtime + 86400
    data.write_bytes(b"\xac\xed\x00\x05" + properties)
    os.utime(data, (later, later))
    assert imported_nuclei(project, entry) == (receipt.nuclei if there else None)


def test_numbers_in_words() -> None:
    assert FIRST.in_words == (
        "210 nuclei found, 209 added, 1 left out: 1 in place of objects of yours"
    )
    many = Imported(found=3172, added=1003, left_out=2169, for_others=2100, in_rois=69, replaced=5)
    assert many.in_words == (
        "3,172 nuclei found, 1,003 added, 2,169 left out: 2,100 in place of objects of other "
        "programs, 69 in correction ROIs; 5 objects of other programs replaced"
    )
    assert Imported(found=2, added=2, left_out=0).in_words == "2 nuclei found, 2 added, 0 left out"
    carried = Imported(found=2, added=2, left_out=0, classes=1400, notes=3, stayed=2, lost=1)
    assert carried.in_words == (
        "2 nuclei found, 2 added, 0 left out; carried over: 1,400 classes, 3 nuclei with "
        "measurements or notes; of yours without a new nucleus: 2 kept, 1 removed"
    )
