"""Which fields are worth correcting: by what was surveyed, and on the real slide with QuPath."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import qupath
import shapely
from click.testing import CliRunner
from conftest import QUICK

from patchcl_qupath import pipeline
from patchcl_qupath.cli import main
from patchcl_qupath.config import CORRECTED, TO_CORRECT, ObjectType
from patchcl_qupath.correction.suggest import Candidates, choose, expected_entropy, suggest
from patchcl_qupath.datatypes import ImageEntry, Nuclei
from patchcl_qupath.project import Project, open_project
from patchcl_qupath.project.jvm import Process
from patchcl_qupath.project.paquo import PaquoProject
from patchcl_qupath.status import image_status
from patchcl_qupath.storage.parquet import (
    read_nuclei,
    read_uncertainty_grid,
    write_uncertainty_grid,
)
from patchcl_qupath.storage.records import ResultRecord, read_record

ROOT = Path(__file__).parent.parent
SLIDE = ROOT / "sample_project" / "CMU-1-Small-Region.svs"
GROOVY = ROOT / "groovy"
BACKENDS = ("paquo", "files")

SIDE = 512.0


def grid(rows: int, cols: int, slide: int = 0, seed: int = 0, **columns: float) -> Candidates:
    """The fields of one slide, row by row: full of tissue, of all looks."""
    rng = np.random.default_rng(seed)
    y, x = (axis.ravel() * SIDE for axis in np.mgrid[:rows, :cols])
    count = rows * cols
    nuclei = rng.integers(50, 500, count)
    values = {
        "slides": np.full(count, slide),
        "boxes": shapely.box(x, y, x + SIDE, y + SIDE),
        "tissue": np.ones(count),
        "doubt": 0.1 + nuclei / 1000 + rng.normal(0, 0.02, count),
        "nuclei": nuclei,
        "hematoxylin": rng.uniform(0.2, 0.6, count),
        "area": rng.uniform(20, 60, count),
    }
    return Candidates(**values | {name: np.full(count, v) for name, v in columns.items()})


def together(*parts: Candidates) -> Candidates:
    return Candidates(
        *(np.concatenate([getattr(p, n) for p in parts]) for n in Candidates.__dataclass_fields__)
    )


def test_a_field_is_never_on_glass_and_has_nuclei() -> None:
    """Even where that is what the network doubts most."""
    fields = grid(6, 6)
    fields.tissue[::2], fields.entropy[::2] = 0.3, 1.0
    fields.nuclei[1::4], fields.entropy[1::4] = 3, 1.0
    chosen = choose(fields, 36)
    assert chosen
    assert (fields.tissue[chosen] >= 0.5).all()
    assert (fields.nuclei[chosen] >= 10).all()
    assert choose(grid(3, 3, tissue=0.49), 3) == []
    assert choose(grid(0, 0), 3) == []


def test_full_fields_come_first_and_fuller_ones_where_there_is_none() -> None:
    fields = grid(9, 9)
    fields.tissue[:] = 0.6
    fields.tissue[[0, 40, 80]] = 0.8
    chosen = choose(fields, 5)
    assert sorted(chosen[:3]) == [0, 40, 80]
    assert len(chosen) == 5
    biopsy = grid(2, 2, slide=1, tissue=0.55)
    assert 1 in together(fields, biopsy).slides[choose(together(fields, biopsy), 2)]


def test_fields_never_overlap_or_touch_and_there_may_be_fewer() -> None:
    fields = grid(5, 5)
    chosen = choose(fields, 100)
    assert len(set(chosen)) == len(chosen) <= 9  # every other one at most
    boxes = fields.boxes[chosen]
    near = shapely.distance(boxes[:, None], boxes[None])[~np.eye(len(boxes), dtype=bool)]
    assert near.min() >= 1


def test_slides_have_as_many_each() -> None:
    """Though one of them is in more doubt than all others."""
    slides = [grid(4, 4, slide=k, seed=k) for k in range(5)]
    slides[3].entropy[:] += 0.4
    fields = together(*slides)
    for count in (1, 4, 5, 8, 10):
        on = np.bincount(fields.slides[choose(fields, count)], minlength=5)
        assert on.sum() == count
        assert on.max() - on.min() <= 1
    assert fields.slides[choose(fields, 1)] == [3]


def test_a_small_slide_does_not_hold_up_the_others() -> None:
    fields = together(grid(1, 1, slide=0), grid(6, 6, slide=1, seed=1))
    on = np.bincount(fields.slides[choose(fields, 5)])
    assert on.tolist() == [1, 4]


def test_doubt_counts_beyond_what_is_usual_for_so_many_nuclei() -> None:
    """Crowded fields have the most, by the rims of nuclei; a sparse one has more than it should."""
    fields = grid(8, 8)
    sparse = int(np.argmin(fields.nuclei))
    fields.entropy[sparse] += 0.15
    assert fields.entropy[sparse] < fields.entropy.max() - 0.1
    assert choose(fields, 1) == [sparse]
    beyond = fields.entropy - expected_entropy(fields)
    assert beyond[np.arange(64) != sparse] == pytest.approx(0, abs=0.08)
    assert beyond[sparse] > 0.1


def test_looks_are_spread() -> None:
    """Two kinds of tissue, one of them rare: both are seen, whatever is in more doubt."""
    fields = grid(10, 10, nuclei=200, entropy=0.4, area=30.0, hematoxylin=0.3)
    fields.entropy[:] += np.random.default_rng(0).normal(0, 0.001, 100)
    rare = [77, 79, 97]
    fields.area[rare], fields.hematoxylin[rare] = 80, 0.6
    fields.entropy[rare] = 0.4
    chosen = choose(fields, 3)
    assert len(set(rare) & set(chosen[:2])) == 1
    assert len(set(rare) & set(chosen)) < 3


def test_what_is_corrected_is_left_and_counts() -> None:
    fields = together(*(grid(4, 4, slide=k, seed=k) for k in range(2)))
    first = choose(fields, 2)
    done = [(int(fields.slides[i]), fields.boxes[i]) for i in first[:1]]
    (slide, area), more = done[0], choose(fields, 3, done)
    assert fields.slides[more[0]] != slide  # it has one
    for i in more:
        assert fields.slides[i] != slide or fields.boxes[i].distance(area) >= 1
    elsewhere = (7, shapely.box(0, 0, 9, 9))  # on a slide without candidates
    assert choose(fields, 2, [elsewhere]) == first


def test_equal_surveys_make_the_same_choice() -> None:
    fields = together(*(grid(6, 6, slide=k, seed=k) for k in range(3)))
    again = together(*(grid(6, 6, slide=k, seed=k) for k in range(3)))
    assert choose(fields, 7) == choose(again, 7)
    assert choose(fields, 7)[:4] == choose(fields, 4)  # more are those and others
    same = grid(5, 5, nuclei=100, entropy=0.5, hematoxylin=0.3, area=30.0)
    assert len(choose(same, 4)) == 4


# ---------------------------------------------------------------- on the real slide


@pytest.fixture(scope="module")
def ran(
    model: pipeline.Model, client: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Nuclei]:
    """A project with the nuclei of a run, as detections; and these."""
    folder = tmp_path_factory.mktemp("suggest") / "project"
    folder.mkdir()
    path = qupath.make_project(folder / "p", SLIDE, ["a.svs"])
    model.save(path.parent / "patchcl" / "models", "patchcl")
    config = replace(QUICK, result=replace(QUICK.result, object_type=ObjectType.DETECTION))
    project = open_project(path, "files")
    run = pipeline.Run(
        project=project,
        model=model,
        config=config,
        workers=client,
        progress=lambda *_: None,
        model_name="patchcl",
    )
    (result,) = run.images(project.images())
    assert result.problem is None
    return path, read_nuclei(Path(str(result.results)) / "nuclei.parquet")


@pytest.fixture
def path(ran: tuple[Path, Nuclei], tmp_path: Path) -> Path:
    """A copy of it to change."""
    return Path(shutil.copytree(ran[0].parent, tmp_path / "project")) / "project.qpproj"


def call(*arguments: object, status: int = 0) -> Any:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output
    return result


def test_suggest_from_the_command_line(path: Path, ran: tuple[Path, Nuclei]) -> None:
    said = json.loads(call("suggest", path, "--fields", 3, "--json").stdout)
    assert len(said["fields"]) == 3
    assert not said["problems"]
    assert not said["without"]
    file = json.loads((path.parent / "patchcl" / "fields" / "1.json").read_text("utf-8"))
    assert file["fields"] == [one["field"] for one in said["fields"]]
    centroids = shapely.centroid(ran[1].polygons)
    for number, one in enumerate(said["fields"], start=1):
        field = one["field"]
        assert field["name"] == f"Field {number} of 3"
        assert f"{one['doubt']:.2f} bits" in field["description"]
        x, y, width, height = (field[key] for key in ("x", "y", "width", "height"))
        assert width == height == pytest.approx(256 / 0.499, rel=0.02)
        box = shapely.box(x, y, x + width, y + height)
        assert one["nuclei"] == pytest.approx(shapely.contains(box, centroids).sum(), rel=0.02)
        assert one["tissue"] >= 0.75
    again = json.loads(call("suggest", path, "--fields", 3, "--json").stdout)["fields"]
    for one, other in zip(said["fields"], again, strict=True):
        assert one["field"].pop("id") != other["field"].pop("id")
        assert one == other

    shown = call("suggest", path, "--fields", 90).stdout
    assert "there are no more fields" in shown
    assert "run groovy/import_nuclei.groovy" in shown
    (row,) = json.loads(call("status", path, "--json").stdout)["images"]
    assert row["changed"] == ["not in QuPath yet"]
    assert call("remove", path).exit_code == 0
    assert not (path.parent / "patchcl" / "fields" / "1.json").exists()
    assert "no nuclei yet: do `patchcl-qp run` first" in call("suggest", path, status=1).output


def test_surveys_of_another_run_are_not_used(path: Path) -> None:
    uncertainty = path.parent / "patchcl" / "surveys" / "1.parquet"
    found = read_uncertainty_grid(uncertainty)
    write_uncertainty_grid(uncertainty, replace(found, nuclei=found.nuclei * 2))
    assert "of different runs: do `patchcl-qp run` again" in call("suggest", path, status=1).output
    uncertainty.unlink()
    assert "cannot be read: do `patchcl-qp run` again" in call("suggest", path, status=1).output


def test_a_slide_of_glass_has_no_field(path: Path) -> None:
    uncertainty = path.parent / "patchcl" / "surveys" / "1.parquet"
    found = read_uncertainty_grid(uncertainty)
    write_uncertainty_grid(uncertainty, replace(found, points=found.points // 3))
    assert "no field is 50% tissue with 10 nuclei" in call("suggest", path, status=1).output


def test_status_says_what_changed_since(path: Path) -> None:
    def changed() -> Any:
        (row,) = json.loads(call("status", path, "--json").stdout)["images"]
        assert (row["state"], row["fields"], row["fields_done"]) == ("done", 0, 0)
        return row["changed"]

    assert changed() == ["not in QuPath yet"]
    output = path.parent / "patchcl"
    receipt, data = output / "imported" / "1.json", path.parent / "data" / "1" / "data.qpdata"
    for file in (receipt, data):
        file.parent.mkdir(parents=True)
        file.touch()
    assert changed() == []
    later = receipt.stat().st_mtime + 60
    os.utime(data, (later, later))
    assert changed() == ["saved in QuPath"]
    os.utime(receipt, (later, later))

    slide = path.parent / SLIDE.name
    shutil.copy2(SLIDE, slide)
    content = json.loads(path.read_text("utf-8"))
    image = content["images"][0]
    image["serverBuilder"]["uri"] = slide.as_uri()
    path.write_text(json.dumps(content), "utf-8")
    assert changed() == []  # a moved slide is the same
    os.utime(slide)
    calibration = {"value": 0.25, "unit": "µm"}
    sizes = {"pixelWidth": calibration, "pixelHeight": calibration}
    image["serverBuilder"]["metadata"] = {"pixelCalibration": sizes}
    path.write_text(json.dumps(content), "utf-8")
    facts = output / "models" / "patchcl.json"
    facts.write_text(facts.read_text("utf-8").replace('"digest": "', '"digest": "0'), "utf-8")
    result = output / "results" / "1" / "result.json"
    about = json.loads(result.read_text("utf-8")) | {"version": "0.0.1"}
    modified = result.stat().st_mtime
    result.write_text(json.dumps(about), "utf-8")
    os.utime(result, (modified, modified))
    assert changed() == ["slide file", "pixel size", "model retrained", "version, was 0.0.1"]
    (row,) = json.loads(call("status", path, "--json").stdout)["images"]
    assert (row["model"], row["made"]) == ("patchcl", about["made"])
    facts.unlink()
    assert changed()[2] == "model gone"
    table = call("status", path).stdout
    assert "changed" in table
    assert about["made"][:10] in table


def test_fields_that_nobody_corrected_teach_nothing(path: Path) -> None:
    said = call("refine", path, "--labels-from", TO_CORRECT, status=2)
    assert f"are still to be corrected: set the class of those that are done to {CORRECTED}" in (
        said.output
    )
    said = call("refine", path, status=1)
    assert f"no image has an annotation of class {CORRECTED}: have some suggested" in said.output


LOOK = """
import qupath.lib.io.GsonTools

def objects = hierarchy.getAllObjects(false).collect { [
    id: it.getID().toString(),
    type: it.isAnnotation() ? 'annotation' : 'detection',
    name: it.getName(),
    class_name: it.getPathClass()?.toString(),
    locked: it.isLocked(),
    points: it.getROI().getAllPoints().collect { p -> [p.getX(), p.getY()] },
    parent: it.getParent().isRootObject() ? null : it.getParent().getName(),
] }
GsonTools.getInstance().toJson(objects)
"""
# A person corrects the first field, begins with the second, and leaves the others alone.
EDIT = """
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs

def square = { double x, double y, double side ->
    ROIs.createRectangleROI(x, y, side, side, ImagePlane.getDefaultPlane())
}
def annotations = hierarchy.getAnnotationObjects()
def inside = { field -> annotations.findAll {
    it.getPathClass()?.toString() == 'Nucleus' &&
        field.getROI().getGeometry().contains(it.getROI().getGeometry())
}.sort { it.getID().toString() } }
def field = (1..3).collect { n -> annotations.find { it.getName() == "Field ${n} of 3" } }
def (one, two, three) = inside(field[0])
hierarchy.removeObject(three, true)
one.setROI(square(one.getROI().getBoundsX(), one.getROI().getBoundsY(), 9))
def drawn = PathObjects.createAnnotationObject(three.getROI(), PathClass.fromString('Nucleus'))
drawn.setName('by hand')
hierarchy.addObject(drawn)
field[0].setPathClass(PathClass.fromString('PatchCL: corrected'))
inside(field[1]).first().setPathClass(PathClass.fromString('Tumor'))
hierarchy.resolveHierarchy()
entry.saveImageData(imageData)
'"edited"'
"""
DELETE = """
def field = hierarchy.getAllObjects(false).find { it.getID().toString() == 'FIELD' }
hierarchy.removeObject(field, true)
entry.saveImageData(imageData)
'"deleted"'
"""


class Told:
    """What QuPath shows of the image after each chapter of a story, by one backend."""

    def __init__(
        self, path: Path, first: Nuclei, process: Process, session: qupath.Session, by: str
    ):
        self.path, self.process, self.session, self.by = path, process, session, by
        # As in a run of another model: each outline a little larger, under another id.
        new = Nuclei(
            np.array([shapely.Polygon(p.buffer(0.4).exterior) for p in first.polygons]),
            first.measurements,
            np.array([str(uuid.uuid5(uuid.NAMESPACE_OID, id_)) for id_ in first.uuids]),
        )
        self.ids, self.new_ids = set(first.uuids.tolist()), set(new.uuids.tolist())
        self.said = [suggest(*self.opened(), 3)]
        self.seen = [self.look()]
        session.run(path, EDIT)
        self.seen.append(self.look(shown=True))
        project, (entry,) = self.opened()
        self.status = image_status(project, entry)
        result = read_record(project.layout.result(entry.id), ResultRecord)
        assert result is not None
        config = replace(QUICK.result, object_type=ObjectType.DETECTION)
        result = msgspec.structs.replace(result, nuclei=len(new), object_type="detection")
        project.write(entry, [new], config, result)
        self.seen.append(self.look())
        if by == "files":
            qupath.run_script(path, GROOVY / "export_labels.groovy")
            settings = path.with_name("settings.toml")
            settings.write_text("[cdcl]\nsteps = 4\n[patchcl]\ncrops = 4\n", "utf-8")
            call("refine", path, "--config", settings)
        self.labels = self.opened()[0].corrections(entry, CORRECTED)
        self.said.append(suggest(*self.opened(), 3))
        self.seen.append(self.look())
        new_fields = {one.field.id for one in self.said[1].fields}
        self.deleted = next(o for o in self.seen[3] if o["id"] in new_fields)
        session.run(path, DELETE.replace("FIELD", self.deleted["id"]))
        project, (entry,) = self.opened()
        project.write(entry, [new], config, result)
        self.seen.append(self.look())
        self.opened()[0].remove(entry)
        self.seen.append(self.look())

    def opened(self) -> tuple[Project, list[ImageEntry]]:
        project = open_project(self.path, self.by)
        if isinstance(project, PaquoProject):
            project = replace(project, process=self.process)
        return project, project.images()

    def look(self, shown: bool = False) -> Any:
        """All objects; those of the files backend are imported first."""
        if self.by == "files" and not shown:
            log = qupath.run_script(self.path, GROOVY / "import_nuclei.groovy")
            assert "ERROR" not in log, log
        return self.session.run(self.path, LOOK)["a.svs"]

    def fields(self, chapter: int) -> dict[str, Any]:
        classes = (TO_CORRECT, CORRECTED)
        found = [o for o in self.seen[chapter] if o.get("class_name") in classes]
        return {o["name"]: o for o in found}

    def within(self, field: Any, chapter: int) -> dict[str, Any]:
        """The nuclei that reach into a field, by id."""
        box = outline(field)
        return {
            o["id"]: {**o, "parent": None}
            for o in self.seen[chapter]
            if o.get("name") in (None, "by hand") and outline(o).intersects(box)
        }


def outline(shown: Any) -> shapely.Polygon:
    return shapely.Polygon(shown["points"])


@pytest.fixture(scope="module")
def stories(
    ran: tuple[Path, Nuclei],
    process: Process,
    session: qupath.Session,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Told]:
    found = {}
    for by in BACKENDS:
        folder = shutil.copytree(ran[0].parent, tmp_path_factory.mktemp(by) / "project")
        found[by] = Told(folder / "project.qpproj", ran[1], process, session, by)
    return found


@pytest.fixture(params=BACKENDS)
def told(request: pytest.FixtureRequest, stories: dict[str, Told]) -> Told:
    return stories[request.param]


@pytest.mark.qupath
def test_both_backends_give_the_same_objects(stories: dict[str, Told]) -> None:
    """Fields have other ids each time."""

    def by_id(objects: Any) -> dict[str, Any]:
        found = {}
        for o in objects:
            is_roi = o.get("class_name") in (TO_CORRECT, CORRECTED)
            facts = {k: v for k, v in o.items() if k != "id"}
            key = f"{o['name']} {outline(o).bounds}" if is_roi else o["id"]
            found["by hand" if o.get("name") == "by hand" else key] = facts
        assert len(found) == len(objects)
        return found

    for paquo, files in zip(*(stories[by].seen for by in BACKENDS), strict=True):
        one, other = by_id(paquo), by_id(files)
        assert one.keys() == other.keys()
        for key, shown in one.items():
            assert outline(shown).hausdorff_distance(outline(other[key])) < 0.01
            assert {**shown, "points": None} == {**other[key], "points": None}


@pytest.mark.qupath
def test_fields_are_locked_and_their_nuclei_can_be_edited(told: Told) -> None:
    fields = told.fields(0)
    assert sorted(fields) == [f"Field {n} of 3" for n in (1, 2, 3)]
    for one in told.said[0].fields:
        shown, asked = fields[one.field.name], one.field
        assert (shown["id"], shown["type"]) == (asked.id, "annotation")
        assert shown["class_name"] == TO_CORRECT
        assert shown["locked"]
        box = shapely.box(asked.x, asked.y, asked.x + asked.width, asked.y + asked.height)
        assert outline(shown).hausdorff_distance(box & shapely.box(0, 0, 2220, 2967)) < 0.01
        nuclei = told.within(shown, 0)
        assert len(nuclei) >= one.nuclei * 0.95
        assert {o["type"] for o in nuclei.values()} == {"annotation"}
        assert not any(o["locked"] for o in nuclei.values())
    of_fields = set().union(*(told.within(field, 0) for field in fields.values()))
    others = [o for o in told.seen[0] if o["id"] in told.ids - of_fields]
    assert {o["type"] for o in others} == {"detection"}
    assert of_fields | {o["id"] for o in others} == told.ids
    listed = json.loads((told.path.parent / "classifiers" / "classes.json").read_text("utf-8"))
    assert {TO_CORRECT, CORRECTED} <= {c["name"] for c in listed["pathClasses"]}


@pytest.mark.qupath
def test_status_counts_fields_that_are_done(told: Told) -> None:
    assert (told.state.fields, told.state.rois_corrected) == (3, 1)


@pytest.mark.qupath
def test_a_run_leaves_fields_as_they_are(told: Told) -> None:
    """All of them, touched or not, with what reaches into them; all else is the new run's."""
    before, after = told.fields(1), told.fields(2)
    assert before.keys() == after.keys()
    held: set[str] = set()
    for name, field in before.items():
        assert {**after[name], "parent": None} == {**field, "parent": None}
        assert told.within(field, 2) == told.within(field, 1)
        held |= told.within(field, 1).keys()
    shown = {o["id"] for o in told.seen[2]}
    assert len(shown & told.new_ids) > 100
    assert shown & told.ids == held & told.ids


@pytest.mark.qupath
def test_refine_learns_from_what_is_done(told: Told) -> None:
    first = told.fields(1)["Field 1 of 3"]
    assert first["class_name"] == CORRECTED
    (field,) = told.labels.fields
    assert field.hausdorff_distance(outline(first)) < 0.01
    nuclei = told.within(first, 1)
    assert "by hand" in {o.get("name") for o in nuclei.values()}
    assert len(told.labels.nuclei) == len(nuclei)
    left = shapely.union_all([outline(o).buffer(0) for o in nuclei.values()])
    learnt = shapely.union_all(told.labels.nuclei)
    assert left.symmetric_difference(learnt).area < 0.01 * left.area


@pytest.mark.qupath
def test_other_suggestions_replace_those_that_nobody_touched(told: Told) -> None:
    before = told.fields(2)
    ids = {o["id"] for o in told.seen[3]}
    for name in ("Field 1 of 3", "Field 2 of 3"):
        assert before[name]["id"] in ids
        field = before[name]
        assert told.within(field, 3) == told.within(field, 2)
    assert before["Field 3 of 3"]["id"] not in ids
    new = [o for o in told.seen[3] if o["id"] in {one.field.id for one in told.said[1].fields}]
    assert new
    fields = [o for o in told.seen[3] if o.get("class_name") in (TO_CORRECT, CORRECTED)]
    boxes = [outline(field) for field in fields]
    assert len(boxes) == len(new) + 2
    assert all(a.distance(b) >= 1 for k, a in enumerate(boxes) for b in boxes[:k])
    for field in new:
        nuclei = told.within(field, 3)
        assert {o["type"] for o in nuclei.values()} == {"annotation"}


@pytest.mark.qupath
def test_a_field_that_a_person_deleted_stays_deleted(told: Told) -> None:
    """And its nuclei are a run's again, which writes detections."""
    before, others = (
        {o["id"]: o for o in told.seen[chapter] if o.get("class_name") in (TO_CORRECT, CORRECTED)}
        for chapter in (3, 4)
    )
    assert others.keys() == before.keys() - {told.deleted["id"]}
    held = set().union(*(told.within(field, 4) for field in others.values()))
    free = [o for id_, o in told.within(told.deleted, 4).items() if id_ not in held]
    assert len(free) > 10
    assert {o["type"] for o in free} == {"detection"}


@pytest.mark.qupath
def test_remove_takes_fields_that_nobody_touched(told: Told) -> None:
    first, second = (told.fields(2)[f"Field {n} of 3"] for n in (1, 2))
    left = {o["id"] for o in told.seen[5]}
    kept = {first["id"], second["id"], *told.within(first, 2), *told.within(second, 2)}
    assert left == kept
    for field in (first, second):
        assert told.within(field, 5) == told.within(field, 2)
