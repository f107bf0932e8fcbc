"""What a person put on nuclei survives further runs, with each backend; and so does the hierarchy.

Each image is a story: a first run; work of a person, through QuPath's own API; a run with other
settings, whose contours differ a little; and one of another model, that draws them larger, and does
not find some.
"""

from __future__ import annotations

import json
import logging
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import qupath
import shapely
from qupath import by_index, nuclei
from results import result_of
from slides import joined, write_tiff

from patchcl_qupath.config import Config, ObjectType, ResultConfig, to_dict
from patchcl_qupath.datatypes import Nuclei
from patchcl_qupath.project import open_project
from patchcl_qupath.status import image_status
from patchcl_qupath.storage.records import Imported, RegionRecord

pytestmark = pytest.mark.qupath

ROOT = Path(__file__).parent.parent
IMAGES = ["classified", "held", "scored", "resolved", "cores", "cells", "renamed", "regions"]
GONE = {9, *range(50, 60)}  # nuclei that the third run does not find
LARGE = 900  # one of the third run, around nucleus 9
REGIONS = [
    shapely.box(0, 0, 420, 220),
    shapely.box(-300, 400, 420, 700),  # beyond the image's edge
    shapely.box(0, 140, 420, 500),  # over both
]
NOWHERE = shapely.Polygon()
UNSAID = Imported(found=210, added=210, left_out=0)

EDIT = """
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.objects.hierarchy.DefaultTMAGrid
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs

def square = { double x, double y, double width, double height = width ->
    ROIs.createRectangleROI(x, y, width, height, ImagePlane.getDefaultPlane())
}
def draw = { roi, String name ->
    hierarchy.addObject(PathObjects.createAnnotationObject(roi, PathClass.fromString(name)))
}
def nucleus = hierarchy.getAllObjects(false).findAll { it.getMeasurements().containsKey('index') }
    .collectEntries { [it.getMeasurements()['index'] as int, it] }
switch (entry.getImageName()) {
    case ['classified', 'held']:
        nucleus.each { k, one ->
            one.setPathClass(PathClass.fromString(k % 3 ? 'Stroma' : 'Tumor'), 0.75d)
        }
        def region = hierarchy.getAllObjects(false).find { it.getName() == 'PatchCL' }
        region.getMeasurementList().put('Classifier: Tumor %', 12.5d)
        region.getMetadata().put('Block', 'A: 3')
        break
    case 'scored':
        nucleus[5].getMeasurementList().put('スコア: 核', 2.5d)
        nucleus[50].getMeasurementList().put('Score', 3d)
        nucleus[6].setName('look at this')
        nucleus[7].setDescription('mitosis?')
        nucleus[9].setDescription('two of them?')
        nucleus[10].getMetadata().put('評価', 'a: b')
        nucleus[11].setColor(255, 0, 0)
        nucleus[12].setPathClass(PathClass.fromString('Tumor: Positive'))
        nucleus[13].setPathClass(null)
        hierarchy.addObject(PathObjects.createAnnotationObject(square(195, 78, 3)))   // in 14
        def within = hierarchy.getAnnotationObjects().find { it.getROI().getArea() == 9 }
        nucleus[14].addChildObject(within)
        break
    case 'resolved':
        draw(square(0, 0, 210, 300), 'Tumor')
        draw(square(210, 100, 200, 100), 'Stroma')
        draw(square(20, 20, 110), 'Necrosis')
        hierarchy.resolveHierarchy()
        draw(square(300, 500, 100), 'Tumor')   // nothing is in it yet
        break
    case 'cores':
        def cores = [120d, 360d].collect { PathObjects.createTMACoreObject(it, 120d, 200d, false) }
        hierarchy.setTMAGrid(DefaultTMAGrid.create(cores, 2))
        hierarchy.resolveHierarchy()
        break
    case 'cells':
        hierarchy.addObjects(nucleus.collect { k, one ->
            double x = one.getROI().getCentroidX()
            double y = one.getROI().getCentroidY()
            PathObjects.createCellObject(square(x - 15, y - 15, 30), one.getROI(), null)
        })
        hierarchy.removeObjects(nucleus.values(), true)
        break
    case 'renamed':
        def region = hierarchy.getAllObjects(false).find { it.getName() == 'PatchCL' }
        region.setLocked(false)
        region.setName('my slide')
        hierarchy.removeObjects((100..109).collect { nucleus[it] }, true)
        draw(square(0, 0, 300), 'Tumor')
        break
    case 'regions':
        nucleus[0].setPathClass(PathClass.fromString('Tumor'))
        nucleus[1].setPathClass(PathClass.fromString('Tumor'))
}
entry.saveImageData(imageData)
'1'
"""
LOOK = """
import qupath.lib.io.GsonTools
import qupath.lib.objects.PathObjectTools

RESOLVE
def named = {
    def index = it.getMeasurements()['index']
    it.isRootObject() ? 'root' :
        it.isTMACore() ? "core ${it.getROI().getCentroidX() as int}".toString() :
        it.getName() ?: index != null ? (index as int).toString() : it.getPathClass()?.toString()
}
def objects = hierarchy.getAllObjects(false).findAll { !it.isTMACore() }.collect { [
    id: it.getID().toString(),
    type: it.isAnnotation() ? 'annotation' : it.isCell() ? 'cell' : 'detection',
    name: it.getName(),
    class_name: it.getPathClass()?.toString(),
    probability: it.getClassProbability().toString(),
    color: it.getColor(),
    description: it.isAnnotation() ? it.getDescription() : null,
    metadata: it.getMetadata(),
    measurements: it.getMeasurements().collectEntries { k, v -> [k, v] },
    area: it.getROI().getArea(),
    points: PathObjectTools.getROI(it, true).getAllPoints().collect { p -> [p.getX(), p.getY()] },
    parent: named(it.getParent()),
] }
GsonTools.getInstance().toJson(objects)
"""
ASK = """
import groovy.json.JsonOutput
import qupath.lib.objects.PathObjects
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs

if (entry.getImageName() != 'regions')
    return '[]'
def script = new GroovyClassLoader(getClass().getClassLoader()).parseClass(new File('SCRIPT'))
def upper = ROIs.createRectangleROI(0, 0, 420, 140, ImagePlane.getDefaultPlane())
def lower = ROIs.createRectangleROI(0, 600, 420, 140, ImagePlane.getDefaultPlane())
def asked = { List rois -> script.replacedInWords(imageData,
    rois?.collect { PathObjects.createAnnotationObject(it) }) }
JsonOutput.toJson([asked(null), asked([upper, lower]), asked([lower])])
"""
ASK = ASK.replace("SCRIPT", (ROOT / "groovy" / "run_patchcl.groovy").as_posix())
RESOLVED = LOOK.replace("RESOLVE", "hierarchy.resolveHierarchy()")
LOOK = LOOK.replace("RESOLVE", "")


def found_by(run: int, image: str) -> tuple[Nuclei, ResultConfig, tuple[RegionRecord, ...]]:
    """The nuclei of a run, its settings, and its regions."""
    found = nuclei(10, 21, image, run=run if run < 3 else 11)
    kind = ObjectType.ANNOTATION if image in ("scored", "cores") else ObjectType.DETECTION
    config = ResultConfig(object_type=kind, keep=image == "held")
    if image == "regions":
        region = REGIONS[run - 1]
        found = found[shapely.contains(region, shapely.centroid(found.polygons))]
        geometry = json.loads(shapely.to_geojson(region))
        return found, config, (RegionRecord(geometry=geometry, tissue_mm2=0.5),)
    if run == 3:
        found = found[~np.isin(found.measurements["index"], [*GONE])]
    if run == 3 and image == "scored":
        x, y = shapely.centroid(nuclei(10, 21, image).polygons[9]).coords[0]
        large = found[:1]
        measured = {**large.measurements, "index": np.array([LARGE], dtype=np.float32)}
        around = shapely.box(x - 15, y - 15, x + 15, y + 15)
        id_ = np.array(["9" * 8 + "-1111-4111-8111-111111111111"])
        found = joined([found, Nuclei(np.array([around]), measured, id_)])
    return found, config, ()


@pytest.fixture(scope="module", params=["paquo", "files"])
def story(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Of each run: the nuclei, the objects in QuPath, what was told of them, and what was logged.

    ``resolved`` are the objects as QuPath itself would nest them after the third run.
    """
    folder = tmp_path_factory.mktemp("carried")
    rows, columns = np.mgrid[:920, :460]
    pixels = np.stack([rows % 256, columns % 256, 255 - rows % 256], axis=-1).astype(np.uint8)
    slide = write_tiff(folder / "a.tif", pixels, (0.5, 0.5), tile_px=256)  # opens sooner
    path = qupath.make_project(folder / "project", slide, IMAGES)
    session = qupath.Session()
    seen, told, written, logs, receipts = [], [], [], [], []
    for run in (1, 2, 3):
        lines = _Lines()
        logging.getLogger("patchcl_qupath").addHandler(lines)
        with closing(open_project(path, request.param)) as project:
            made = {}
            for entry in project.images():
                found, config, regions = found_by(run, entry.name)
                result = result_of(
                    len(found), config, run=f"run {run}", tissue_mm2=0.5, regions=regions
                )
                settings = to_dict(replace(Config(), result=config))
                result = msgspec.structs.replace(result, config=settings)
                made[entry.name] = found
                project.write(entry, [found], config, result)
        logging.getLogger("patchcl_qupath").removeHandler(lines)
        log = "\n".join(lines.lines)
        if request.param == "files":
            log = qupath.run_script(path, ROOT / "groovy" / "import_nuclei.groovy")
            assert "ERROR" not in log, log
        logs.append(log)
        written.append(made)
        seen.append(session.run(path, LOOK))
        files = open_project(path, "files")
        told.append({e.name: image_status(files, e).imported for e in files.images()})
        receipts.append(
            {e.name: json.loads(files.layout.receipt(e.id).read_text()) for e in files.images()}
        )
        if run == 1:
            session.run(path, EDIT)
            asked = session.run(path, ASK)["regions"]
    resolved = session.run(path, RESOLVED)
    session.close()
    return SimpleNamespace(
        seen=seen,
        told=told,
        written=written,
        logs=logs,
        receipts=receipts,
        resolved=resolved,
        asked=asked,
        backups=files.layout.root / "backups",
    )


class _Lines(logging.Handler):
    """Keeps what the package logs."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def shown(story: Any, run: int, image: str) -> dict[int, dict[str, Any]]:
    """The nuclei in QuPath after a run, by their index."""
    return by_index(story.seen[run - 1][image])


def regions_of(story: Any, run: int, image: str) -> list[dict[str, Any]]:
    names = ("PatchCL", "my slide")
    return [o for o in story.seen[run - 1][image] if o.get("name") in names]


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("run", [1, 2, 3])
def test_the_three_numbers_are_equal_and_true(story: Any, run: int, image: str) -> None:
    """In status, receipt and the region's measurements, and by the objects that are there."""
    told, written = story.told[run - 1][image], story.written[run - 1][image]
    assert told.found == len(written) == told.added + told.left_out
    ids = {o["id"] for o in story.seen[run - 1][image]}
    assert told.added == len(ids & {*written.uuids.tolist()})
    place = REGIONS[run - 1] if image == "regions" else None
    for region in regions_of(story, run, image):
        if place is None or shapely.Polygon(region["points"]).equals(place):
            measured = region["measurements"]
            assert measured["PatchCL: Found"] == told.found
            assert measured["PatchCL: Added"] == told.added
            assert measured["PatchCL: Left out"] == told.left_out
            break
    else:
        raise AssertionError("no region")
    said = story.receipts[run - 1][image].get("in_words")
    if said is not None:  # by the script
        assert said == told.in_words.replace(",", "") or said == told.in_words


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("run", [1, 2, 3])
def test_regions_count_what_is_there(story: Any, run: int, image: str) -> None:
    """By position; neither what lies beyond a region nor what a person drew within a nucleus."""
    for region in regions_of(story, run, image):
        place = shapely.Polygon(region["points"])
        inside = [
            o
            for o in story.seen[run - 1][image]
            if o["area"] < 1500
            and o["area"] != 9
            and place.contains(shapely.Polygon(o["points"]).centroid)
        ]
        assert region["measurements"]["PatchCL: Nuclei"] == len(inside) > 20
        assert region["measurements"]["PatchCL: Nuclei per mm^2"] == len(inside) / 0.5


def test_classes_of_a_classifier_do_not_freeze_the_image(story: Any) -> None:
    assert story.told[1]["classified"] == msgspec.structs.replace(UNSAID, classes=210)
    lost = len(GONE)
    expected = Imported(found=210 - lost, added=210 - lost, left_out=0, classes=199, lost=lost)
    assert story.told[2]["classified"] == expected
    for run in (2, 3):
        one = shown(story, run, "classified")
        assert {o["id"] for o in one.values()} == {*story.written[run - 1]["classified"].uuids}
        for k, nucleus in one.items():
            assert nucleus["class_name"] == ("Stroma" if k % 3 else "Tumor")
            assert float(nucleus["probability"]) == 0.75
            assert nucleus["parent"] == "PatchCL"


@pytest.mark.parametrize("image", ["classified", "held"])
def test_what_was_put_on_a_region_stays_on_it(story: Any, image: str) -> None:
    """What the program says of it is of the last run."""
    for run in (2, 3):
        (region,) = regions_of(story, run, image)
        assert region["measurements"]["Classifier: Tumor %"] == 12.5
        assert region["metadata"]["Block"] == "A: 3"
        assert f"run {run} " in region["description"]


def test_what_is_lost_is_said_before_and_kept_in_a_file(story: Any) -> None:
    said = f"classified: {len(GONE)} nuclei that no new nucleus replaces are removed: "
    said += f"{len(GONE)} with a class of yours; they are kept in "
    assert said in story.logs[2]
    assert "no new nucleus" not in story.logs[0] + story.logs[1]
    assert story.logs[2].count("no new nucleus replaces are removed") == 1
    (file,) = story.backups.rglob("removed-*.geojson")
    assert file.name in story.logs[2]
    features = json.loads(file.read_text("utf-8"))["features"]
    ids = shown(story, 2, "classified")
    assert {f["id"] for f in features} == {ids[k]["id"] for k in GONE}
    assert {f["properties"]["classification"]["name"] for f in features} == {"Tumor", "Stroma"}


def test_keep_removes_nothing_of_a_person(story: Any) -> None:
    expected = Imported(found=199, added=199, left_out=0, classes=199, stayed=len(GONE))
    assert story.told[2]["held"] == expected
    before, after = shown(story, 2, "held"), shown(story, 3, "held")
    assert after.keys() == before.keys()
    assert {k: before[k] for k in GONE} == {k: after[k] for k in GONE}


def test_measurements_and_notes_move_to_the_successor(story: Any) -> None:
    assert story.told[1]["scored"] == msgspec.structs.replace(UNSAID, classes=2, notes=8)
    # 50 and 9 are not found again, and stay; the one around 9 is left out.
    expected = Imported(found=200, added=199, left_out=1, for_yours=1, classes=2, notes=6, stayed=2)
    assert story.told[2]["scored"] == expected
    assert "scored:" not in story.logs[2].replace("scored: 200 nuclei found", "")
    for run in (2, 3):
        one = shown(story, run, "scored")
        assert one[5]["measurements"]["スコア: 核"] == 2.5
        assert one[50]["measurements"]["Score"] == 3
        assert one[6]["name"] == "look at this"
        assert one[7]["description"] == "mitosis?"
        assert one[9]["description"] == "two of them?"
        assert one[10]["metadata"] == {"評価": "a: b"}
        assert one[11]["color"] & 0xFFFFFF == 0xFF0000
        assert one[12]["class_name"] == "Tumor: Positive"
        assert "class_name" not in one[13]
        (drawn,) = (o for o in story.seen[run - 1]["scored"] if o["area"] == 9)
        assert drawn["parent"] == "14"
        assert LARGE not in one
        written = by_id(story.written[run - 1]["scored"])
        for k, nucleus in one.items():
            if run == 3 and k in (9, 50):
                assert nucleus == shown(story, 2, "scored")[k]
                continue
            area = written[nucleus["id"]]["Nucleus: Area µm^2"]
            assert nucleus["measurements"]["Nucleus: Area µm^2"] == pytest.approx(area, rel=1e-5)
            extra = {5: {"スコア: 核"}, 50: {"Score"}}.get(k, set())
            assert {*nucleus["measurements"]} == {"index", "Nucleus: Area µm^2", "-"} | extra


def by_id(found: Nuclei) -> dict[str, dict[str, float]]:
    return {
        id_: {name: float(values[k]) for name, values in found.measurements.items()}
        for k, id_ in enumerate(found.uuids.tolist())
    }


@pytest.mark.parametrize(("image", "parents"), [
    ("resolved", {"PatchCL", "Tumor", "Stroma", "Necrosis"}),
    ("cores", {"PatchCL", "core 120", "core 360"}),
])  # fmt: skip
@pytest.mark.parametrize("run", [2, 3])
def test_nuclei_are_nested_again(story: Any, run: int, image: str, parents: set[str]) -> None:
    """As a person had them, and as QuPath's own 'Resolve hierarchy' would nest them."""
    one = shown(story, run, image)
    assert {o["parent"] for o in one.values()} == parents
    assert {o["id"] for o in one.values()} == {*story.written[run - 1][image].uuids}
    drawn = [o for o in story.seen[run - 1][image] if "class_name" in o and o["area"] > 1500]
    for k, nucleus in one.items():
        x, y = 40 + 40 * (k % 10), 40 + 40 * (k // 10) + 0.03 * k
        if image == "resolved" and k != 8:
            held = [o for o in drawn if shapely.Polygon(o["points"]).contains(shapely.Point(x, y))]
            smallest = min(held, key=lambda o: o["area"], default={"class_name": "PatchCL"})
            assert nucleus["parent"] == smallest["class_name"]
    if run == 3:
        again = by_index(story.resolved[image])
        assert {k: o["parent"] for k, o in again.items()} == {
            k: o["parent"] for k, o in one.items()
        }


def test_cells_stay_and_suppress_nuclei(story: Any) -> None:
    cells = {o["id"] for o in story.seen[1]["cells"] if o["type"] == "cell"}
    assert len(cells) == 210
    assert story.told[1]["cells"] == Imported(found=210, added=0, left_out=210, for_yours=210)
    assert {o["id"] for o in story.seen[2]["cells"] if o["type"] == "cell"} == cells


def test_a_renamed_region_stays_and_holds_the_nuclei(story: Any) -> None:
    """They are flat in it: nobody resolved the hierarchy, although there is a tumour."""
    for run, count in ((2, 200), (3, 210 - 10 - len(GONE))):
        (region,) = regions_of(story, run, "renamed")
        assert region["name"] == "my slide"
        one = shown(story, run, "renamed")
        assert {o["parent"] for o in one.values()} == {"my slide"}
        assert len(one) == region["measurements"]["PatchCL: Nuclei"] == count
        deleted = Imported(found=count + 10, added=count, left_out=10, deleted=10)
        assert story.told[run - 1]["renamed"] == deleted


def test_regions_add_up(story: Any) -> None:
    """Each run replaces what lies in its region, and nothing else."""
    runs = story.written
    first, second, third = REGIONS

    def within(run: int, *, region: Any, without: Any = NOWHERE) -> set[str]:
        found = runs[run - 1]["regions"]
        middle = shapely.centroid(found.polygons)
        inside = shapely.contains(region, middle) & ~shapely.contains(without, middle)
        return {*found.uuids[inside].tolist()}

    def ids(run: int) -> set[str]:
        return {o["id"] for o in shown_with_twins(story, run)}

    assert ids(1) == within(1, region=first)
    assert ids(2) == within(1, region=first) | within(2, region=second)
    expected = within(1, region=first, without=third) | within(2, region=second, without=third)
    assert ids(3) == expected | within(3, region=third)
    assert [len(regions_of(story, run, "regions")) for run in (1, 2, 3)] == [1, 2, 3]
    classes = [o["class_name"] for o in shown_with_twins(story, 3)]
    assert classes.count("Tumor") == 2
    assert story.receipts[2]["regions"]["kept"] == len(expected)


def test_the_window_asks_before_it_replaces(story: Any) -> None:
    whole, some, none = story.asked
    assert whole.startswith("The 50 nuclei of earlier runs in this image are replaced by new ones.")
    assert some.startswith(
        "Of 50 nuclei of earlier runs, the 30 in 2 annotations are replaced by new ones. "
        "All others stay."
    )
    assert none is None


def shown_with_twins(story: Any, run: int) -> list[dict[str, Any]]:
    """The nuclei of the image with regions, those of several runs included."""
    return [o for o in story.seen[run - 1]["regions"] if "index" in o["measurements"]]
