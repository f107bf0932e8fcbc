"""Which ROIs are worth correcting: from made-up candidates, and on the real slide with QuPath."""

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
from results import result_of

from patchcl_qupath import pipeline
from patchcl_qupath.cli import main
from patchcl_qupath.config import CORRECTED, TO_CORRECT, ObjectType
from patchcl_qupath.correction.suggest import (
    Candidates,
    _acquisition_scores,
    choose,
    has_room,
    suggest,
)
from patchcl_qupath.datatypes import CorrectionRoi, ImageEntry, Nuclei
from patchcl_qupath.project import Project, open_project
from patchcl_qupath.project.jvm import Process
from patchcl_qupath.project.paquo import PaquoProject
from patchcl_qupath.status import image_status
from patchcl_qupath.storage.parquet import (
    read_nuclei,
    read_uncertainty_grid,
    write_uncertainty_grid,
)
from patchcl_qupath.storage.records import ChangesRecord, ResultRecord, read_record

ROOT = Path(__file__).parent.parent
SLIDE = ROOT / "sample_project" / "CMU-1-Small-Region.svs"
GROOVY = ROOT / "groovy"
BACKENDS = ("paquo", "files")

SIDE = 512.0


def grid(rows: int, cols: int, slide: int = 0, seed: int = 0, **columns: float) -> Candidates:
    """Candidates of one slide, row by row: full of tissue, with diverse features."""
    rng = np.random.default_rng(seed)
    y, x = (axis.ravel() * SIDE for axis in np.mgrid[:rows, :cols])
    count = rows * cols
    nuclei = rng.integers(50, 500, count)
    values = {
        "slides": np.full(count, slide),
        "boxes": shapely.box(x, y, x + SIDE, y + SIDE),
        "tissue": np.ones(count),
        "entropy": 0.1 + nuclei / 1000 + rng.normal(0, 0.02, count),
        "nuclei": nuclei,
        "wrong": rng.uniform(0.2, 0.4, count),
        "hematoxylin": rng.uniform(0.2, 0.6, count),
        "area": rng.uniform(20, 60, count),
        "whole": np.ones(count, dtype=bool),
    }
    return Candidates(**values | {name: np.full(count, v) for name, v in columns.items()})


def test_a_roi_has_tissue_and_nuclei() -> None:
    """Even if more nuclei are wrong elsewhere."""
    candidates = grid(6, 6)
    candidates.tissue[::2], candidates.wrong[::2] = 0.3, 0.9
    candidates.nuclei[1::4], candidates.wrong[1::4] = 3, 0.9
    chosen = choose(candidates, 36)
    assert chosen
    assert (candidates.tissue[chosen] >= 0.5).all()
    assert (candidates.nuclei[chosen] >= 10).all()
    assert choose(grid(3, 3, tissue=0.49), 3) == []
    assert choose(grid(0, 0), 3) == []


def test_rois_full_of_tissue_are_preferred_on_each_slide() -> None:
    candidates = grid(9, 9)
    candidates.tissue[:] = 0.6
    candidates.tissue[[0, 40, 80]] = 0.8
    chosen = choose(candidates, 5)
    assert sorted(chosen[:3]) == [0, 40, 80]
    assert len(chosen) == 5
    biopsy = grid(2, 2, slide=1, tissue=0.55)
    both = Candidates.concatenate([candidates, biopsy])
    assert 1 in both.slides[choose(both, 2)]


def test_rois_that_the_run_looked_at_as_a_whole_are_preferred() -> None:
    """A person would have to outline all nuclei in the rest, and corrections do not count there."""
    candidates = grid(9, 9)
    candidates.tissue[:] = 0.6
    candidates.tissue[[20, 60]], candidates.wrong[[20, 60]] = 1.0, 0.9
    candidates.whole[[20, 60]] = False
    candidates.tissue[[0, 40]] = 0.8
    assert sorted(choose(candidates, 2)) == [0, 40]
    assert len(choose(grid(3, 3, whole=False), 2)) == 2


def test_equal_fractions_are_of_equal_rank() -> None:
    """Else a duplicate's ROIs, which come later, would be worth more."""
    candidates = grid(2, 2, wrong=0.3)
    assert _acquisition_scores(candidates).tolist() == [1.0] * 4


def test_rois_never_overlap_or_touch_and_may_be_fewer() -> None:
    candidates = grid(5, 5)
    chosen = choose(candidates, 100)
    assert len(set(chosen)) == len(chosen) <= 9  # at most every second one
    boxes = candidates.boxes[chosen]
    near = shapely.distance(boxes[:, None], boxes[None])[~np.eye(len(boxes), dtype=bool)]
    assert near.min() >= 1


def test_slides_have_equal_numbers_of_rois() -> None:
    """Though one of them has more nuclei that may be wrong than all others."""
    slides = [grid(4, 4, slide=k, seed=k) for k in range(5)]
    slides[3].wrong[:] += 0.4
    candidates = Candidates.concatenate(slides)
    for count in (1, 4, 5, 8, 10):
        on = np.bincount(candidates.slides[choose(candidates, count)], minlength=5)
        assert on.sum() == count
        assert on.max() - on.min() <= 1
    assert candidates.slides[choose(candidates, 1)] == [3]


def test_a_small_slide_does_not_limit_the_others() -> None:
    candidates = Candidates.concatenate([grid(1, 1, slide=0), grid(6, 6, slide=1, seed=1)])
    on = np.bincount(candidates.slides[choose(candidates, 5)])
    assert on.tolist() == [1, 4]


def test_the_fraction_that_may_be_wrong_counts() -> None:
    """Neither the number of nuclei, nor the entropy, which grows with it."""
    candidates = grid(8, 8)
    doubtful = int(np.argmin(candidates.nuclei))
    candidates.wrong[doubtful] = 0.45
    assert candidates.entropy[doubtful] < candidates.entropy.max() - 0.1
    assert choose(candidates, 1) == [doubtful]


def test_rois_are_diverse() -> None:
    """Two kinds of tissue, one of them rare: both are chosen, whichever is more uncertain."""
    candidates = grid(10, 10, nuclei=200, entropy=0.4, wrong=0.3, area=30.0, hematoxylin=0.3)
    candidates.wrong[:] += np.random.default_rng(0).normal(0, 0.001, 100)
    rare = [77, 79, 97]
    candidates.area[rare], candidates.hematoxylin[rare] = 80, 0.6
    candidates.wrong[rare] = 0.3
    chosen = choose(candidates, 3)
    assert len(set(rare) & set(chosen[:2])) == 1
    assert len(set(rare) & set(chosen)) < 3


def test_corrected_rois_are_avoided_and_counted() -> None:
    candidates = Candidates.concatenate([grid(4, 4, slide=k, seed=k) for k in range(2)])
    first = choose(candidates, 2)
    done = [(int(candidates.slides[i]), candidates.boxes[i]) for i in first[:1]]
    (slide, area), more = done[0], choose(candidates, 3, done)
    assert candidates.slides[more[0]] != slide  # it has one
    for i in more:
        assert candidates.slides[i] != slide or candidates.boxes[i].distance(area) >= 1
    elsewhere = (7, shapely.box(0, 0, 9, 9))  # on a slide without candidates
    assert choose(candidates, 2, [elsewhere]) == first


def test_the_choice_is_deterministic() -> None:
    candidates = Candidates.concatenate([grid(6, 6, slide=k, seed=k) for k in range(3)])
    again = Candidates.concatenate([grid(6, 6, slide=k, seed=k) for k in range(3)])
    assert choose(candidates, 7) == choose(again, 7)
    assert choose(candidates, 7)[:4] == choose(candidates, 4)  # more ROIs include the first ones
    same = grid(5, 5, nuclei=100, entropy=0.5, wrong=0.3, hematoxylin=0.3, area=30.0)
    assert len(choose(same, 4)) == 4


# ---------------------------------------------------------------- on the real slide


@pytest.fixture(scope="module")
def ran(
    model: pipeline.Model, client: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Nuclei]:
    """A project with the nuclei of a run, as detections; and the nuclei."""
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
    suggested = json.loads(call("suggest", path, "--rois", 3, "--json").stdout)
    assert len(suggested["fields"]) == 3
    assert not suggested["problems"]
    assert not suggested["without"]
    file = json.loads((path.parent / "patchcl" / "fields" / "1.json").read_text("utf-8"))
    assert file["fields"] == [one["field"] for one in suggested["fields"]]
    changes = read_record(path.parent / "patchcl" / "changes" / "1" / "changes.json", ChangesRecord)
    assert changes is not None
    given = {roi.id: roi.before for roi in changes.others[TO_CORRECT]}
    assert [*given] == [one["id"] for one in file["fields"]]
    centroids = shapely.centroid(ran[1].polygons)
    for number, one in enumerate(suggested["fields"], start=1):
        field = one["field"]
        assert field["name"] == f"ROI {number} of 3"
        x, y, width, height = (field[key] for key in ("x", "y", "width", "height"))
        assert width == height == pytest.approx(256 / 0.499, rel=0.02)
        box = shapely.box(x, y, x + width, y + height)
        inside = shapely.contains(box, centroids)
        assert one["nuclei"] == pytest.approx(inside.sum(), rel=0.02)
        probability = ran[1].measurements["Detection probability"][inside]
        assert one["wrong"] == pytest.approx(1 - probability.mean(), abs=0.01)
        expected = f"Of {one['nuclei']} nuclei, {one['wrong']:.0%} are expected to be wrong."
        assert field["description"].startswith(expected)
        assert one["tissue"] >= 0.75
        polygons = ran[1].polygons
        assert len(given[field["id"]]) == shapely.intersects(polygons, box).sum() > inside.sum()
    again = json.loads(call("suggest", path, "--rois", 3, "--json").stdout)["fields"]
    for one, other in zip(suggested["fields"], again, strict=True):
        assert one["field"].pop("id") != other["field"].pop("id")
        assert one == other

    shown = call("suggest", path, "--rois", 90).stdout
    assert "there are no more ROIs" in shown
    assert "run import_nuclei.groovy" in shown
    (row,) = json.loads(call("status", path, "--json").stdout)["images"]
    assert row["changed"] == ["not in QuPath yet"]
    assert call("remove", path).exit_code == 0
    assert not (path.parent / "patchcl" / "fields" / "1.json").exists()
    assert "no nuclei yet: do `patchcl-qp run` first" in call("suggest", path, status=1).output


def test_uncertainty_grids_of_another_run_are_refused(path: Path) -> None:
    uncertainty = path.parent / "patchcl" / "surveys" / "1.parquet"
    found = read_uncertainty_grid(uncertainty)
    write_uncertainty_grid(uncertainty, replace(found, nuclei=found.nuclei * 2))
    assert "of different runs: do `patchcl-qp run` again" in call("suggest", path, status=1).output
    uncertainty.unlink()
    damaged = call("suggest", path, status=1).output
    results = path.parent / "patchcl" / "results" / "1"
    assert f"cannot be read: remove {results} and do `patchcl-qp run` again" in damaged


def test_rois_that_were_corrected_in_a_duplicate_are_avoided(path: Path) -> None:
    """QuPath duplicated the image for another person, who has corrected a ROI there already."""

    def suggested() -> list[dict[str, Any]]:
        called = call("suggest", path, "--rois", 1, "--image", "a.svs", "--json")
        return [one["field"] for one in json.loads(called.stdout)["fields"]]

    (before,) = suggested()
    content = json.loads(path.read_text("utf-8"))
    (image,) = content["images"]
    duplicate = {**image, "entryID": 2, "imageName": "a.svs - duplicate"}
    path.write_text(json.dumps({**content, "images": [image, duplicate]}), encoding="utf-8")
    assert {**suggested()[0], "id": ""} == {**before, "id": ""}
    x, y, width, height = (before[key] for key in ("x", "y", "width", "height"))
    roi = shapely.box(x, y, x + width, y + height)
    feature = {
        "type": "Feature",
        "geometry": shapely.geometry.mapping(roi),
        "properties": {"objectType": "annotation", "classification": {"name": CORRECTED}},
    }
    file = path.parent / "patchcl" / "labels" / "2.geojson"
    file.parent.mkdir()
    file.write_text(json.dumps({"type": "FeatureCollection", "features": [feature]}))
    (after,) = suggested()
    x, y, width, height = (after[key] for key in ("x", "y", "width", "height"))
    assert shapely.distance(roi, shapely.box(x, y, x + width, y + height)) >= 1


def test_a_slide_of_glass_has_no_roi(path: Path) -> None:
    uncertainty = path.parent / "patchcl" / "surveys" / "1.parquet"
    found = read_uncertainty_grid(uncertainty)
    write_uncertainty_grid(uncertainty, replace(found, points=found.points // 3))
    assert "no ROI is 50% tissue with 10 nuclei" in call("suggest", path, status=1).output


def test_an_image_smaller_than_half_a_roi_has_no_room() -> None:
    assert has_room((364, 364), (512, 512))
    assert not has_room((360, 360), (512, 512))
    assert not has_room((100, 5000), (512, 512))


def test_status_lists_changes_since_the_run(path: Path) -> None:
    def changed() -> Any:
        (row,) = json.loads(call("status", path, "--json").stdout)["images"]
        assert (row["state"], row["fields"], row["fields_done"]) == ("done", 0, 0)
        return row["changed"]

    assert changed() == ["not in QuPath yet"]
    output = path.parent / "patchcl"
    receipt, data = output / "imported" / "1.json", path.parent / "data" / "1" / "data.qpdata"
    for file in (data, receipt):  # in the order in which an import writes them
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
    assert changed() == []  # nor is a copy, which has another time, another slide
    with slide.open("r+b") as file:
        file.truncate(slide.stat().st_size - 1)
    calibration = {"value": 0.25, "unit": "µm"}
    sizes = {"pixelWidth": calibration, "pixelHeight": calibration}
    image["serverBuilder"]["metadata"] = {"pixelCalibration": sizes}
    path.write_text(json.dumps(content), "utf-8")
    models = output / "models"
    retrained = replace(pipeline.Model.load(models / "patchcl.pt"), threshold=0.25)
    retrained.save(models, "patchcl")
    result = output / "results" / "1" / "result.json"
    provenance = json.loads(result.read_text("utf-8")) | {"version": "0.0.1"}
    modified = result.stat().st_mtime
    result.write_text(json.dumps(provenance), "utf-8")
    os.utime(result, (modified, modified))
    assert changed() == ["slide file", "pixel size", "model retrained", "version, was 0.0.1"]
    (row,) = json.loads(call("status", path, "--json").stdout)["images"]
    assert (row["model"], row["made"]) == ("patchcl", provenance["made"])
    (models / "patchcl.json").unlink()
    assert changed()[2] == "model gone"
    table = call("status", path).stdout
    assert "changed" in table
    assert provenance["made"][:10] in table


def test_rois_that_nobody_corrected_are_not_trained_on(path: Path) -> None:
    refused = call("refine", path, "--labels-from", TO_CORRECT, status=2)
    advice = f"are still to be corrected: set the class of those that are corrected to {CORRECTED}"
    assert advice in refused.output
    refused = call("refine", path, status=1)
    assert f"no image has an annotation of class {CORRECTED}: have some suggested" in refused.output


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
# A person corrects the first ROI, begins with the second, and leaves the others alone.
EDIT = """
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs

def square = { double x, double y, double side ->
    ROIs.createRectangleROI(x, y, side, side, ImagePlane.getDefaultPlane())
}
def annotations = hierarchy.getAnnotationObjects()
def inside = { roi -> annotations.findAll {
    it.getPathClass()?.toString() == 'Nucleus' &&
        roi.getROI().getGeometry().contains(it.getROI().getGeometry())
}.sort { it.getID().toString() } }
def rois = (1..3).collect { n -> annotations.find { it.getName() == "ROI ${n} of 3" } }
def (one, two, three) = inside(rois[0])
hierarchy.removeObject(three, true)
one.setROI(square(one.getROI().getCentroidX() - 4.5d, one.getROI().getCentroidY() - 4.5d, 9))
def drawn = PathObjects.createAnnotationObject(three.getROI(), PathClass.fromString('Nucleus'))
drawn.setName('by hand')
hierarchy.addObject(drawn)
rois[0].setPathClass(PathClass.fromString('PatchCL: corrected'))
inside(rois[1]).first().setPathClass(PathClass.fromString('Tumor'))
hierarchy.resolveHierarchy()
entry.saveImageData(imageData)
'"edited"'
"""
DELETE = """
def roi = hierarchy.getAllObjects(false).find { it.getID().toString() == 'ROI' }
hierarchy.removeObject(roi, true)
entry.saveImageData(imageData)
'"deleted"'
"""


class Story:
    """The objects in QuPath after each step of a story, by one backend."""

    def __init__(
        self, path: Path, first: Nuclei, process: Process, session: qupath.Session, by: str
    ):
        self.path, self.process, self.session, self.by = path, process, session, by
        # As in a run of another model: each contour a little larger, under another id.
        new = Nuclei(
            np.array([shapely.Polygon(p.buffer(0.4).exterior) for p in first.polygons]),
            first.measurements,
            np.array([str(uuid.uuid5(uuid.NAMESPACE_OID, id_)) for id_ in first.uuids]),
        )
        self.ids, self.new_ids = set(first.uuids.tolist()), set(new.uuids.tolist())
        self.suggestions = [suggest(*self.opened(), 3)]
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
            settings.write_text("[cdcl]\nsteps = 4\ndistillation_steps = 4\n", "utf-8")
            shown = call("refine", path, "--config", settings, "--json")
            self.refined = json.loads(shown.stdout)
        self.labels = self.opened()[0].corrections(entry, CORRECTED)
        self.suggestions.append(suggest(*self.opened(), 3))
        self.seen.append(self.look())
        new_rois = {one.roi.id for one in self.suggestions[1].rois}
        self.deleted = next(o for o in self.seen[3] if o["id"] in new_rois)
        session.run(path, DELETE.replace("ROI", self.deleted["id"]))
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

    def rois(self, step: int) -> dict[str, Any]:
        classes = (TO_CORRECT, CORRECTED)
        found = [o for o in self.seen[step] if o.get("class_name") in classes]
        return {o["name"]: o for o in found}

    def within(self, roi: Any, step: int) -> dict[str, Any]:
        """The nuclei that reach into a ROI, by id."""
        box = contour(roi)
        return {
            o["id"]: {**o, "parent": None}
            for o in self.seen[step]
            if o.get("name") in (None, "by hand") and contour(o).intersects(box)
        }


def contour(shown: Any) -> shapely.Polygon:
    return shapely.Polygon(shown["points"])


@pytest.fixture(scope="module")
def stories(
    ran: tuple[Path, Nuclei],
    process: Process,
    session: qupath.Session,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Story]:
    found = {}
    for by in BACKENDS:
        folder = shutil.copytree(ran[0].parent, tmp_path_factory.mktemp(by) / "project")
        found[by] = Story(folder / "project.qpproj", ran[1], process, session, by)
    return found


@pytest.fixture(params=BACKENDS)
def story(request: pytest.FixtureRequest, stories: dict[str, Story]) -> Story:
    return stories[request.param]


@pytest.mark.qupath
def test_both_backends_give_the_same_objects(stories: dict[str, Story]) -> None:
    """ROIs have other ids each time."""

    def by_id(objects: Any) -> dict[str, Any]:
        found = {}
        for o in objects:
            is_roi = o.get("class_name") in (TO_CORRECT, CORRECTED)
            properties = {k: v for k, v in o.items() if k != "id"}
            key = f"{o['name']} {contour(o).bounds}" if is_roi else o["id"]
            found["by hand" if o.get("name") == "by hand" else key] = properties
        assert len(found) == len(objects)
        return found

    for paquo, files in zip(*(stories[by].seen for by in BACKENDS), strict=True):
        one, other = by_id(paquo), by_id(files)
        assert one.keys() == other.keys()
        for key, shown in one.items():
            assert contour(shown).hausdorff_distance(contour(other[key])) < 0.01
            assert {**shown, "points": None} == {**other[key], "points": None}


@pytest.mark.qupath
def test_rois_are_locked_and_their_nuclei_can_be_edited(story: Story) -> None:
    rois = story.rois(0)
    assert sorted(rois) == [f"ROI {n} of 3" for n in (1, 2, 3)]
    for one in story.suggestions[0].rois:
        shown, asked = rois[one.roi.name], one.roi
        assert (shown["id"], shown["type"]) == (asked.id, "annotation")
        assert shown["class_name"] == TO_CORRECT
        assert shown["locked"]
        box = shapely.box(asked.x, asked.y, asked.x + asked.width, asked.y + asked.height)
        assert contour(shown).hausdorff_distance(box & shapely.box(0, 0, 2220, 2967)) < 0.01
        nuclei = story.within(shown, 0)
        assert len(nuclei) >= one.nuclei * 0.95
        assert {o["type"] for o in nuclei.values()} == {"annotation"}
        assert not any(o["locked"] for o in nuclei.values())
    of_rois = set().union(*(story.within(roi, 0) for roi in rois.values()))
    others = [o for o in story.seen[0] if o["id"] in story.ids - of_rois]
    assert {o["type"] for o in others} == {"detection"}
    assert of_rois | {o["id"] for o in others} == story.ids
    listed = json.loads((story.path.parent / "classifiers" / "classes.json").read_text("utf-8"))
    assert {TO_CORRECT, CORRECTED} <= {c["name"] for c in listed["pathClasses"]}


@pytest.mark.qupath
def test_status_counts_rois_that_are_corrected(story: Story) -> None:
    assert (story.status.rois, story.status.rois_corrected) == (3, 1)


@pytest.mark.qupath
def test_a_run_leaves_rois_unchanged(story: Story) -> None:
    """All of them, touched or not, with the nuclei in them; all other nuclei are the new run's."""
    before, after = story.rois(1), story.rois(2)
    assert before.keys() == after.keys()
    held: set[str] = set()
    for name, roi in before.items():
        assert {**after[name], "parent": None} == {**roi, "parent": None}
        assert story.within(roi, 2) == story.within(roi, 1)
        held |= story.within(roi, 1).keys()
    shown = {o["id"] for o in story.seen[2]}
    assert len(shown & story.new_ids) > 100
    assert shown & story.ids == held & story.ids


@pytest.mark.qupath
def test_refine_trains_with_corrected_rois(story: Story) -> None:
    first = story.rois(1)["ROI 1 of 3"]
    assert first["class_name"] == CORRECTED
    (roi,) = story.labels.rois
    assert roi.hausdorff_distance(contour(first)) < 0.01
    nuclei = story.within(first, 1)
    assert "by hand" in {o.get("name") for o in nuclei.values()}
    assert len(story.labels.nuclei) == len(nuclei)
    if story.by == "files":
        (read,) = story.refined["corrected"]
        assert (read["id"], read["fields"], read["nuclei"]) == ("1", 1, len(nuclei))
        assert not any(read["left_out"].values())
    drawn = shapely.union_all([contour(o).buffer(0) for o in nuclei.values()])
    read = shapely.union_all(story.labels.nuclei)
    assert drawn.symmetric_difference(read).area < 0.01 * drawn.area


@pytest.mark.qupath
def test_new_suggestions_replace_rois_that_nobody_touched(story: Story) -> None:
    before = story.rois(2)
    ids = {o["id"] for o in story.seen[3]}
    for name in ("ROI 1 of 3", "ROI 2 of 3"):
        assert before[name]["id"] in ids
        roi = before[name]
        assert story.within(roi, 3) == story.within(roi, 2)
    assert before["ROI 3 of 3"]["id"] not in ids
    new = [o for o in story.seen[3] if o["id"] in {one.roi.id for one in story.suggestions[1].rois}]
    assert new
    rois = [o for o in story.seen[3] if o.get("class_name") in (TO_CORRECT, CORRECTED)]
    boxes = [contour(roi) for roi in rois]
    assert len(boxes) == len(new) + 2
    assert all(a.distance(b) >= 1 for k, a in enumerate(boxes) for b in boxes[:k])
    for roi in new:
        nuclei = story.within(roi, 3)
        assert {o["type"] for o in nuclei.values()} == {"annotation"}


@pytest.mark.qupath
def test_a_roi_that_a_person_deleted_stays_deleted(story: Story) -> None:
    """And its nuclei are again those of a run, which writes detections."""
    before, others = (
        {o["id"]: o for o in story.seen[step] if o.get("class_name") in (TO_CORRECT, CORRECTED)}
        for step in (3, 4)
    )
    assert others.keys() == before.keys() - {story.deleted["id"]}
    held = set().union(*(story.within(roi, 4) for roi in others.values()))
    free = [o for id_, o in story.within(story.deleted, 4).items() if id_ not in held]
    assert len(free) > 10
    assert {o["type"] for o in free} == {"detection"}


@pytest.mark.qupath
def test_remove_deletes_rois_that_nobody_touched(story: Story) -> None:
    first, second = (story.rois(2)[f"ROI {n} of 3"] for n in (1, 2))
    left = {o["id"] for o in story.seen[5]}
    kept = {first["id"], second["id"], *story.within(first, 2), *story.within(second, 2)}
    assert left == kept
    for roi in (first, second):
        assert story.within(roi, 5) == story.within(roi, 2)


CLASSIFY = """
def nucleus = hierarchy.getAllObjects(false).find { it.getMeasurements()['index'] == 12 }
nucleus.setPathClass(qupath.lib.objects.classes.PathClass.fromString('Tumor'))
entry.saveImageData(imageData)
'1'
"""


@pytest.mark.qupath
def test_a_class_of_before_does_not_make_a_roi_touched(
    tmp_path: Path, process: Process, session: qupath.Session
) -> None:
    """A person classified a nucleus, and then ROIs were suggested; nobody did anything since."""
    path = qupath.make_project(tmp_path / "project", SLIDE, ["a.svs"])
    found = qupath.nuclei(10, 21, "a")

    def opened() -> tuple[Project, ImageEntry]:
        project = open_project(path, "paquo")
        assert isinstance(project, PaquoProject)
        return replace(project, process=process), project.images()[0]

    def mark(name: str, x: float) -> str:
        id_ = str(uuid.uuid4())
        roi = CorrectionRoi(
            id=id_, name=name, description="", x=x, y=20.0, width=150.0, height=150.0
        )
        project, entry = opened()
        return project.mark_rois(entry, [roi])

    project, entry = opened()
    project.write(entry, [found], QUICK.result, result_of(len(found)))
    session.run(path, CLASSIFY)
    assert mark("first", 20.0) == "1 of 1 new ROIs marked, 0 earlier ones kept"
    assert mark("second", 250.0) == "1 of 1 new ROIs marked, 0 earlier ones kept"
    shown = session.run(path, LOOK)["a.svs"]
    assert [o["name"] for o in shown if o.get("class_name") == TO_CORRECT] == ["second"]
    classes = [o["class_name"] for o in shown if o.get("name") is None]
    assert sorted(set(classes)) == ["Nucleus", "Tumor"]
    assert classes.count("Tumor") == 1
