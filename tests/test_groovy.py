"""groovy/import_nuclei.groovy, run by a real QuPath without a window; each image is another case.

QuPath starts slowly, so the cases share its starts: import, list, edit; import other results,
list; import the same once more, list. The edits go through QuPath's own API and are saved by it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import qupath
import shapely
from qupath import by_index, nuclei
from results import result_of

from patchcl_qupath.config import ResultConfig
from patchcl_qupath.datatypes import Nuclei
from patchcl_qupath.project.results import write_results

pytestmark = pytest.mark.qupath

ROOT = Path(__file__).parent.parent
IMPORT = ROOT / "groovy" / "import_nuclei.groovy"
SLIDE = ROOT / "sample_project" / "CMU-1-Small-Region.svs"

# Image names, in the order of their ids 1, 2, ...
EDITED, DETECTIONS, EMPTY, DAMAGED, CLEARED, DISCARDED, NONE = IMAGES = [
    "edited.svs",
    "detections.svs",
    "no results.svs",
    "damaged.svs",
    "cleared.svs",
    "Schnitt ü, {1}.svs",
    "no nuclei.svs",
]

# Writes all objects of the image as JSON; with EDIT, then edits those of EDITED and CLEARED.
LOOK = """
import qupath.lib.io.GsonTools
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs
import qupath.lib.scripting.QP

def imageData = QP.getCurrentImageData()
def entry = QP.getProjectEntry()
def hierarchy = imageData.getHierarchy()
def objects = hierarchy.getAllObjects(false).collect { [
    id: it.getID().toString(),
    type: it.isAnnotation() ? 'annotation' : it.isDetection() ? 'detection' : 'other',
    name: it.getName(),
    class_name: it.getPathClass()?.toString(),
    color: it.getPathClass()?.getColor(),
    locked: it.isLocked(),
    measurements: it.getMeasurements().collectEntries { k, v -> [k, v] },
    area: it.getROI().getArea(),
    roi: it.getROI().getRoiName(),
    points: it.getROI().getAllPoints().collect { p -> [p.getX(), p.getY()] },
    parent: it.getParent().isRootObject() ? null : it.getParent().getID().toString(),
] }
def file = new File(QP.buildPathInProject("look-${entry.getID()}.json"))
file.text = GsonTools.getInstance().toJson(objects)

def square = { double x, double y, double side ->
    ROIs.createRectangleROI(x, y, side, side, ImagePlane.getDefaultPlane())
}
def drawn = { String name, roi ->
    def pathObject = PathObjects.createAnnotationObject(roi, PathClass.fromString('Nucleus'))
    pathObject.setName(name)
    hierarchy.addObject(pathObject)
}
"""
EDIT = """
if (entry.getImageName() == 'cleared.svs')
    hierarchy.clearAll()
else if (entry.getImageName() == 'edited.svs') {
    def nucleus = hierarchy.getAllObjects(false).findAll { it.getName() != 'PatchCL' }
        .collectEntries { [it.getMeasurements()['index'] as int, it] }
    nucleus[0].setROI(square(30, 30, 4))   // reshaped beyond recognition
    hierarchy.removeObject(nucleus[1], true)
    nucleus[2].setPathClass(PathClass.fromString('Tumor: Positive'))
    nucleus[3].setLocked(true)
    nucleus[4].setName('look at this')
    nucleus[5].setDescription('mitosis?')
    nucleus[6].setColor(255, 0, 0)
    drawn('within 7', square(320, 40, 2))
    drawn('by hand', square(32, 838, 16))   // where the second run, too, finds a nucleus
    drawn('region', square(0, 0, 500))   // around many
    hierarchy.resolveHierarchy()
} else
    return
entry.saveImageData(imageData)
"""


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The results, logs, objects and receipts of each step of the module's docstring."""
    folder = tmp_path_factory.mktemp("groovy") / "a project"
    qupath.launcher()  # skips
    project = qupath.make_project(folder, SLIDE, IMAGES)
    patchcl = folder / "patchcl"
    look = folder / "look.groovy"
    written: list[dict[str, Nuclei]] = []

    def write(run: int) -> None:
        written.append({})
        for number, name in enumerate(IMAGES, start=1):
            if name == EMPTY:
                continue
            config = ResultConfig(class_name="Nucleus", color=(38, 70, 214))
            if name == DETECTIONS:
                config = dataclasses.replace(config, max_annotations=10)
            new = nuclei(10, 20 + run, name, run=run)
            if name == NONE:
                new = new[:0]
            written[-1][name] = new
            record = result_of(len(new), config, run=f"run {run}")
            write_results(patchcl / "results" / str(number), [new], config, record)

    def looked(script: str) -> dict[str, list[dict[str, Any]]]:
        look.write_text(script, encoding="utf-8")
        log = qupath.run_script(project, look)
        assert "ERROR" not in log, log
        files = [folder / f"look-{number}.json" for number in range(1, len(IMAGES) + 1)]
        return dict(zip(IMAGES, [json.loads(f.read_text("utf-8")) for f in files], strict=True))

    def receipts() -> dict[str, dict[str, Any]]:
        found = [json.loads(f.read_text("utf-8")) for f in (patchcl / "imported").iterdir()]
        return {receipt["image"]: receipt for receipt in found}

    seen, logs, given = [], [], []
    write(1)
    logs.append(qupath.run_script(project, IMPORT))
    given.append(receipts())
    seen.append(looked(LOOK + EDIT))

    # A person closes DISCARDED without saving; the results of DAMAGED lose their end.
    write(2)
    shutil.rmtree(folder / "data" / str(IMAGES.index(DISCARDED) + 1))
    half = patchcl / "results" / str(IMAGES.index(DAMAGED) + 1) / "nuclei-000.geojson.gz"
    half.write_bytes(half.read_bytes()[:2000])
    logs.append(qupath.run_script(project, IMPORT, "--save"))
    given.append(receipts())
    seen.append(looked(LOOK))

    logs.append(qupath.run_script(project, IMPORT))
    given.append(receipts())
    seen.append(looked(LOOK))
    return SimpleNamespace(written=written, logs=logs, seen=seen, receipts=given, folder=patchcl)


@pytest.mark.parametrize("image", [DETECTIONS, EDITED, DISCARDED])
def test_what_was_written_is_what_qupath_shows(story: SimpleNamespace, image: str) -> None:
    """Ids, kind, class and colour, measurements and contours survive import, saving, reopening."""
    written, seen = story.written[0][image], by_index(story.seen[0][image])
    (region,) = (o for o in story.seen[0][image] if o.get("name") == "PatchCL")
    assert len(seen) == len(story.seen[0][image]) - 1 == len(written)
    for k, polygon in enumerate(written.polygons):
        shown = seen[k]
        assert shown["id"] == written.uuids[k]
        assert shown["type"] == ("detection" if image == DETECTIONS else "annotation")
        assert shown["class_name"] == "Nucleus"
        assert shown["color"] & 0xFFFFFF == (38 << 16) + (70 << 8) + 214
        assert not shown["locked"]
        assert "name" not in shown
        assert shown["parent"] == region["id"]
        assert shown["roi"] == ("Rectangle" if k == 8 else "Polygon")
        assert shown["area"] == pytest.approx(polygon.area, rel=1e-4)
        assert shapely.Polygon(shown["points"]).hausdorff_distance(polygon) < 1e-3
        assert list(shown["measurements"]) == list(written.measurements)
        for name, values in written.measurements.items():
            assert math.isclose(shown["measurements"][name], values[k], rel_tol=1e-5), name


@pytest.mark.parametrize("image", [DETECTIONS, CLEARED, DISCARDED])
def test_new_results_replace_old_ones(story: SimpleNamespace, image: str) -> None:
    """Also where a person deleted all nuclei, and where an import was never saved."""
    shown = {o["id"] for o in story.seen[1][image] if o.get("name") != "PatchCL"}
    assert shown == set(story.written[1][image].uuids.tolist())
    removed = len(story.written[0][image]) if image == DETECTIONS else 0
    counts = {key: story.receipts[1][image][key] for key in ("added", "removed", "kept")}
    assert counts == {"added": len(story.written[1][image]), "removed": removed, "kept": 0}


def test_the_work_of_a_person_is_kept(story: SimpleNamespace) -> None:
    """What was reshaped or drawn stays as it was, to the last point; the rest has a new contour."""
    old, new = (written[EDITED].uuids.tolist() for written in story.written)
    for later in story.seen[1:]:
        shown = {o["id"]: o for o in later[EDITED]}
        assert shown[old[0]]["area"] == 16
        assert shown[new[2]]["class_name"] == "Tumor: Positive"
        assert shown[old[3]]["locked"]
        assert shown[new[4]]["name"] == "look at this"
        assert {new[5], new[6], new[7]} <= shown.keys()
        named = {o.get("name"): o for o in shown.values()}
        assert named["region"]["area"] == 250_000
        assert named["by hand"]["area"] == 256
        assert named["within 7"]["parent"] == new[7]


def test_no_new_nucleus_where_a_person_decided(story: SimpleNamespace) -> None:
    """Nor where a nucleus was deleted or moved; everywhere else they are the new run's."""
    old, new = (written[EDITED].uuids.tolist() for written in story.written)
    by_hand = 200
    for later in story.seen[1:]:
        drawn = ("by hand", "region", "within 7", "PatchCL")
        shown = {o["id"] for o in later[EDITED] if o.get("name") not in drawn}
        left_out = {0, 1, 3, by_hand}
        assert shown == {old[0], old[3]} | {id_ for k, id_ in enumerate(new) if k not in left_out}
    first, again = story.receipts[1][EDITED], story.receipts[2][EDITED]
    assert first["left_out"] == again["left_out"] == 4
    assert first["removed"] == len(old) - 3
    assert again["removed"] == again["added"] == first["added"] == len(new) - 4
    assert first["kept"] == again["kept"] == 5  # those drawn, too
    assert (first["classes"], first["notes"]) == (again["classes"], again["notes"]) == (1, 4)


def test_importing_again_changes_nothing(story: SimpleNamespace) -> None:
    for image in IMAGES:
        before, after = (
            sorted(
                ({**o, "parent": None} for o in seen[image]),
                key=lambda o: o["id"],
            )
            for seen in story.seen[1:]
        )
        assert before == after


def test_damaged_results_change_nothing(story: SimpleNamespace) -> None:
    assert (
        f"The results of {DAMAGED} are damaged (java.io.EOFException: Unexpected end of ZLIB "
        "input stream): remove " in story.logs[1]
    )
    assert story.seen[1][DAMAGED] == story.seen[0][DAMAGED]
    assert len(story.seen[1][DAMAGED]) == len(story.written[0][DAMAGED]) + 1
    assert story.receipts[1][DAMAGED]["run"] == "run 1"


def test_image_without_results_is_left_alone(story: SimpleNamespace) -> None:
    assert all(f"No nuclei for {EMPTY}: run 'patchcl-qp run'" in log for log in story.logs)
    assert all(seen[EMPTY] == [] for seen in story.seen)
    assert all(EMPTY not in receipts for receipts in story.receipts)


def test_each_image_has_a_receipt(story: SimpleNamespace) -> None:
    for run, receipts in zip([1, 2, 2], story.receipts, strict=True):
        assert receipts.keys() == set(IMAGES) - {EMPTY}
        shown = {image for image in receipts if image != DAMAGED}
        assert {receipts[image]["run"] for image in shown} == {f"run {run}"}
        assert receipts[NONE]["added"] == 0
    # Others of a shared project may read them, as they may what Python writes.
    folder = story.folder
    modes = {file.stat().st_mode for file in folder.glob("imported/*.json")}
    assert modes == {(folder / "results" / "1" / "result.json").stat().st_mode}
    assert not [*folder.rglob("*.partial*")]


def test_images_are_saved_once(story: SimpleNamespace) -> None:
    """By QuPath with --save, by the script without."""
    shown = len(IMAGES) - 2  # neither EMPTY nor, the second and third time, DAMAGED
    assert story.logs[0].count("Image data written") == shown + 1
    assert story.logs[1].count("Image data written") == shown + 1  # --save saves EMPTY too
    assert story.logs[2].count("Image data written") == shown
