"""Classes, counts in annotations and TMA cores, written and read by a real QuPath."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import qupath
import shapely
from click.testing import CliRunner
from results import result_of

from patchcl_qupath.answers.positivity import Positivity
from patchcl_qupath.answers.regions import Regions
from patchcl_qupath.answers.summary import Extent, summarise
from patchcl_qupath.cli import main
from patchcl_qupath.config import TMA_CORES, Config, ResultConfig, to_dict
from patchcl_qupath.datatypes import FailedTile, ImageEntry, Nuclei
from patchcl_qupath.project import Project, open_project
from patchcl_qupath.storage.parquet import read_nuclei
from patchcl_qupath.storage.records import (
    PositivityRecord,
    RegionRecord,
    ResultRecord,
    Summary,
)

ROOT = Path(__file__).parent.parent
SLIDE = ROOT / "sample_project" / "CMU-1-Small-Region.svs"  # 2220 x 2967 px

LOOK = """
import groovy.json.JsonOutput

def of = { [name: it.getName(), path_class: it.getPathClass()?.toString(),
    color: it.getPathClass()?.getColor(), detection: it.isDetection(),
    parent: it.getParent()?.getName(), grandparent: it.getParent()?.getParent()?.getName(),
    measurements: it.getMeasurements().findAll { key, value -> !Double.isNaN(value as double) }] }
JsonOutput.toJson([objects: hierarchy.getAllObjects(false).collect(of)])
"""
DRAW = (
    qupath.DRAW_RECTANGLES
    + """
draw('left', 'Tumor', 0, 0, 210, 900)
draw('inner', 'Stroma', 30, 30, 90, 110)
draw('right', 'Tumor', 2100, 0, 400, 200)   // reaches beyond the image
draw('other', 'Necrosis', 0, 0, 100, 100)
entry.saveImageData(imageData)
'1'
"""
)
DRAW_CROSSING = (
    qupath.DRAW_RECTANGLES
    + """
import qupath.lib.io.GsonTools
import qupath.lib.roi.interfaces.ROI

// Two parts that overlap, as no brush draws it: a file may have it.
def json = '{"type": "MultiPolygon", "coordinates": [' +
    '[[[500, 500], [600, 500], [600, 600], [500, 600], [500, 500]]], ' +
    '[[[550, 550], [650, 550], [650, 650], [550, 650], [550, 550]]]]}'
def roi = GsonTools.getInstance().fromJson(json, ROI)
assert !roi.getGeometry().isValid()
def crossing = PathObjects.createAnnotationObject(roi, PathClass.fromString('Tumor'))
crossing.setName('crossing')
hierarchy.addObject(crossing)
draw('bare', 'Tumor', 700, 500, 100, 100)
entry.saveImageData(imageData)
'1'
"""
)
DRAW_NUCLEI = (
    qupath.DRAW_RECTANGLES
    + """
draw('one', 'Nucleus', 710, 510, 10, 10)
draw('other', 'Nucleus', 730, 510, 10, 10)
entry.saveImageData(imageData)
'1'
"""
)
GRID = """
import qupath.lib.objects.PathObjects
import qupath.lib.objects.hierarchy.DefaultTMAGrid

def cores = [[60, 60], [200, 60], [60, 400], [1500, 1500]].collect { x, y ->
    PathObjects.createTMACoreObject(x - 60 as double, y - 60 as double, 120, 120, false)
}
[cores, ['A-1', 'A-2', 'B-1', 'B-2']].transpose().each { core, label -> core.setName(label) }
cores[1].setMissing(true)
cores[0].setCaseID('patient 7')
hierarchy.setTMAGrid(DefaultTMAGrid.create(cores, 2))
entry.saveImageData(imageData)
'1'
"""
DRAW_SMALL = (
    qupath.DRAW_RECTANGLES
    + """
draw('around one', 'Stroma', 385, 25, 30, 30)   // a nucleus at x = 400, y = 40
draw('without', 'Tumor', 1000, 1000, 30, 30)
draw('outside', 'Tumor', 2300, 0, 30, 30)
draw('drawn', 'Nucleus', 1200, 1200, 20, 20)   // a nucleus, by hand
entry.saveImageData(imageData)
'1'
"""
)
RECLASSIFY = """
import qupath.lib.objects.classes.PathClass

def nucleus = hierarchy.getAllObjects(false).find { it.getMeasurements()['index'] == 2d }
nucleus.setPathClass(PathClass.fromString('Nucleus: Positive'))
entry.saveImageData(imageData)
'1'
"""
RENAME = """
import qupath.lib.objects.classes.PathClass

def left = hierarchy.getAllObjects(false).find { it.getName() == 'left' }
left.setPathClass(PathClass.fromString('Necrosis'))
hierarchy.getTMAGrid().getTMACore('B-1').setMissing(true)
entry.saveImageData(imageData)
'1'
"""


def stained(run: int = 1) -> Nuclei:
    """210 nuclei on a grid of 40 px, 10 columns: their DAB is 0, 0.1, ... 0.9, column by column."""
    found = qupath.nuclei(10, 21, "a.svs", run=run)
    dab = (np.arange(len(found)) % 10 / 10).astype(np.float32)
    return replace(found, measurements=found.measurements | {"DAB: Mean": dab})


def rule(*thresholds: float) -> Positivity:
    record = PositivityRecord(measurement="DAB: Mean", thresholds=thresholds)
    return Positivity(record=record, base_class="Nucleus")


def summaries_of(
    entry: ImageEntry,
    found: Nuclei,
    positivity: Positivity,
    failed: tuple[FailedTile, ...] = (),
    region: shapely.Geometry | None = None,
) -> tuple[Summary, ...]:
    """Of regions that a failed tile touches, or outside that of the run, nothing was segmented. In
    what is called bare there is no tissue."""
    regions = Regions(entry.drawn)
    holes = shapely.union_all(
        [shapely.box(t.x, t.y, t.x + t.width, t.y + t.height) for t in failed]
    )
    segmented = [
        not geometry.intersects(holes)
        and (region is None or geometry.intersection(region).area > 0)
        for geometry in regions.geometries
    ]
    extents = [
        Extent(
            area_mm2=1.0 if is_segmented else None,
            tissue_mm2=0.5 * (one.name != "bare") if is_segmented else None,
            x=geometry.centroid.x,
            y=geometry.centroid.y,
            area_px=geometry.area,
        )
        for one, geometry, is_segmented in zip(
            entry.drawn, regions.geometries, segmented, strict=True
        )
    ]
    return summarise(
        [found],
        image=entry.name,
        extents=[Extent(area_mm2=3.0, tissue_mm2=2.0), *extents],  # as in results.RESULT
        regions=regions,
        class_names=positivity.class_names,
    )


def write(
    project: Project,
    *thresholds: float,
    run: int = 1,
    classes: tuple[str, ...] = (),
    within: tuple[str, ...] = (),
    tma: bool = False,
    failed: tuple[FailedTile, ...] = (),
    region: shapely.Geometry | None = None,
) -> tuple[Any, ResultRecord]:
    """Write classified nuclei as a run does; -> what became of them, and the record."""
    positivity = rule(*thresholds)
    (found,) = positivity.apply([stained(run)])
    (entry,) = project.images()
    config = ResultConfig(positive=f"dab={','.join(map(str, thresholds))}", summarise=classes)
    regions: tuple[RegionRecord, ...] = ()
    if region is not None:
        geometry = json.loads(shapely.to_geojson(region))
        regions = (RegionRecord(geometry=geometry, tissue_mm2=0.5),)
    if tma:
        entry = project.with_regions(entry, [TMA_CORES])
        geometries = [json.loads(shapely.to_geojson(core)) for core in entry.regions]
        regions = tuple(RegionRecord(geometry=one, tissue_mm2=0.0) for one in geometries)
        cores = shapely.union_all(entry.regions)
        found = found[shapely.intersects(cores, shapely.centroid(found.polygons))]
    if counted := [*[TMA_CORES] * tma, *classes]:
        entry = project.with_drawn(entry, counted)
    result = msgspec.structs.replace(
        result_of(len(found), config),
        run=f"run {run} {thresholds}",
        within=[*within, *[TMA_CORES] * tma],
        regions=regions,
        config=to_dict(Config(result=config)),
        positivity=positivity.record,
        summaries=summaries_of(entry, found, positivity, failed, region),
        failed_tiles=failed,
    )
    return project.write(entry, [found], config, result), result


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return qupath.make_project(tmp_path / "project", SLIDE, ["a.svs"])


Importer = Callable[..., ResultRecord]


@pytest.fixture(params=["paquo", "files"])
def import_(request: pytest.FixtureRequest, path: Path) -> Importer:
    """Write nuclei into the image, by one backend; files are imported by the script."""

    def write_into(*thresholds: float, **asked: Any) -> ResultRecord:
        drawn = asked.get("classes") or asked.get("tma")
        if drawn and request.param == "files":
            log = qupath.run_script(path, ROOT / "groovy" / "export_regions.groovy")
            assert "annotations exported to" in log, log
        with closing(open_project(path, request.param)) as project:
            _, result = write(project, *thresholds, **asked)
        if request.param == "files":
            log = qupath.run_script(path, ROOT / "groovy" / "import_nuclei.groovy")
            assert "ERROR" not in log, log
        return result

    return write_into


def objects(session: qupath.Session, path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = session.run(path, LOOK)["a.svs"]["objects"]
    return found


def packed(red: int, green: int, blue: int) -> int:
    return (255 << 24 | red << 16 | green << 8 | blue) - (1 << 32)


@pytest.mark.qupath
def test_classes_and_colours(import_: Importer, path: Path, session: qupath.Session) -> None:
    """By a new threshold, too; and what a person classified keeps its class."""
    import_(0.2, 0.4, 0.6)
    shown = qupath.by_index(objects(session, path))
    assert len(shown) == 210
    colours = {
        "Nucleus: Negative": packed(90, 90, 180),
        "Nucleus: 1+": packed(255, 215, 0),
        "Nucleus: 2+": packed(225, 150, 50),
        "Nucleus: 3+": packed(200, 50, 50),
    }
    for index, one in shown.items():
        grade = np.searchsorted([2, 4, 6], index % 10, side="right")
        assert one["path_class"] == list(colours)[grade], one
        assert one["color"] == colours[one["path_class"]]
        assert one["detection"]
    results = path.parent / "patchcl" / "results" / "1" / "nuclei.parquet"
    on_disk = read_nuclei(results)
    assert on_disk.classes is not None
    assert [shown[k]["path_class"] for k in range(210)] == on_disk.classes.tolist()

    import_(0.5, run=2)
    shown = qupath.by_index(objects(session, path))
    assert all(
        one["path_class"] == f"Nucleus: {'Positive' if k % 10 >= 5 else 'Negative'}"
        for k, one in shown.items()
    )
    session.run(path, RECLASSIFY)
    import_(0.65, run=3)
    import_(0.65, run=4)
    shown = qupath.by_index(objects(session, path))
    assert len(shown) == 210
    assert [k for k, one in shown.items() if one["path_class"] == "Nucleus: Positive"] == [
        k for k in sorted(shown) if k % 10 >= 7 or k == 2
    ]


@pytest.mark.qupath
def test_annotations_are_measured(import_: Importer, path: Path, session: qupath.Session) -> None:
    """The numbers in QuPath are those of the file: worked out by hand, of nested regions, too."""
    session.run(path, DRAW)
    result = import_(0.2, 0.4, 0.6, classes=("Tumor", "Stroma"))
    by_name = {one.name: one for one in result.summaries}
    assert list(by_name) == ["a.svs", "left", "right", "inner"]
    # Columns at x = 40, 80, ... 200 lie in 'left', with DAB of 0 to 0.4; two of them, in three
    # rows at y = 40, 80, 120, in 'inner'.
    left, inner, right = by_name["left"], by_name["inner"], by_name["right"]
    assert (left.nuclei, left.own) == (5 * 21, 5 * 21 - 6)
    assert (inner.nuclei, inner.own) == (6, 6)
    assert left.positive_percent == 60
    assert left.h_score == 20 + 20 + 2 * 20
    assert right.nuclei == 0
    shown = {one["name"]: one["measurements"] for one in objects(session, path) if one["name"]}
    for name, summary in by_name.items():
        measured = shown.get(name) or shown["PatchCL"]
        assert measured["PatchCL: Nuclei"] == summary.nuclei
        assert measured["PatchCL: Nuclei per mm^2"] == pytest.approx(summary.per_mm2)
        assert measured.get("PatchCL: Positive %") == pytest.approx(summary.positive_percent)
        assert measured.get("PatchCL: H-score") == pytest.approx(summary.h_score)
        assert measured.get("PatchCL: Allred score") == (summary.allred and summary.allred.score)
    assert "PatchCL: Nuclei" not in shown["other"]
    assert shown["left"]["PatchCL: Tissue mm^2"] == 0.5
    assert shown["left"]["PatchCL: 1+"] == 42
    assert shown["left"]["PatchCL: 2+"] == 21

    session.run(path, RECLASSIFY)  # a nucleus of 'left' that is 1+
    command = ["summarise", str(path), "--backend", "paquo", "--json"]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    regions = {one["name"]: one for one in json.loads(done.stdout)["images"][0]["regions"]}
    assert set(regions) == {"PatchCL", "left", "inner", "right"}
    assert regions["left"]["nuclei"] == 105
    assert regions["left"]["positive_percent"] == 60
    assert "positive_percent" not in regions["right"]
    assert regions["left"]["h_score"] == pytest.approx(100 * (41 + 2 * 21) / 105)


BROKEN = FailedTile(x=2000, y=0, width=220, height=400, reason="broken")
BESIDE = shapely.box(0, 0, 2100, 2967)  # it shares a border with 'right'


@pytest.mark.qupath
@pytest.mark.parametrize(
    "asked",
    [{"failed": (BROKEN,)}, {"region": BESIDE, "within": ("Area",)}],
    ids=["failed", "outside"],
)
def test_the_density_where_nothing_was_segmented_is_not_known(
    import_: Importer, path: Path, session: qupath.Session, asked: dict[str, Any]
) -> None:
    """Not 0: neither after the import nor after the nuclei are counted anew."""
    session.run(path, DRAW)
    session.run(path, DRAW_CROSSING)
    result = import_(0.2, 0.4, 0.6, classes=("Tumor", "Stroma"), **asked)
    by_name = {one.name: one for one in result.summaries}
    assert by_name["right"].per_mm2 is None
    for script in (None, "summarise.groovy"):
        if script is not None:
            log = qupath.run_script(path, ROOT / "groovy" / script)
            assert "a.svs: right: 0 nuclei, unknown number per mm^2" in log, log
        shown = {one["name"]: one["measurements"] for one in objects(session, path) if one["name"]}
        assert shown["right"]["PatchCL: Nuclei"] == 0
        assert "PatchCL: Nuclei per mm^2" not in shown["right"]
        assert shown["left"]["PatchCL: Nuclei per mm^2"] == pytest.approx(by_name["left"].per_mm2)
        for name in ("bare", "crossing"):
            assert shown[name]["PatchCL: Nuclei per mm^2"] == by_name[name].per_mm2 == 0
    session.run(path, DRAW_NUCLEI)  # in what counts as no tissue
    log = qupath.run_script(path, ROOT / "groovy" / "summarise.groovy")
    shown = {one["name"]: one["measurements"] for one in objects(session, path) if one["name"]}
    assert shown["bare"]["PatchCL: Nuclei"] == 2, log
    assert "PatchCL: Nuclei per mm^2" not in shown["bare"]


@pytest.mark.qupath
@pytest.mark.parametrize("option", ["classes", "within"])
def test_small_regions_are_no_nuclei(
    import_: Importer, path: Path, session: qupath.Session, option: str
) -> None:
    """However small they are, and without nuclei: what else a person drew is one."""
    session.run(path, DRAW_SMALL)
    import_(0.5, **{option: ("Tumor", "Stroma")})
    counts = {
        one["name"]: one["measurements"].get("PatchCL: Nuclei")
        for one in objects(session, path)
        if one["name"]
    }
    expected = {"PatchCL": 211, "drawn": None, "around one": None, "without": None, "outside": None}
    if option == "classes":
        expected |= {"around one": 1, "without": 0, "outside": 0}
    assert counts == expected


@pytest.mark.qupath
def test_what_is_counted_no_more_has_no_numbers(
    import_: Importer, path: Path, session: qupath.Session
) -> None:
    """Of another class now, missing now, not asked for again: those of before were wrong."""
    session.run(path, DRAW)
    session.run(path, GRID)

    def counted() -> set[str]:
        return {
            one["name"]
            for one in objects(session, path)
            if any(name.startswith("PatchCL: ") for name in one["measurements"])
        }

    import_(0.5, classes=("Tumor", "Stroma"), tma=True)
    assert counted() == {"PatchCL", "left", "right", "inner", "A-1", "B-1", "B-2"}
    session.run(path, RENAME)
    import_(0.5, run=2, classes=("Tumor",), tma=True)
    assert counted() == {"PatchCL", "right", "A-1", "B-2"}
    import_(0.5, run=3)
    assert counted() == {"PatchCL"}


@pytest.mark.qupath
def test_nuclei_of_an_earlier_run_beside_cores_are_not_counted(
    import_: Importer, path: Path, session: qupath.Session
) -> None:
    """Though some touch a core: their centroids are outside."""
    session.run(path, GRID)
    import_(0.2)
    result = import_(0.2, tma=True, run=2)
    shown = objects(session, path)
    measured = {one["name"]: one["measurements"] for one in shown}
    for core in result.summaries[1:]:
        assert measured[core.name]["PatchCL: Nuclei"] == core.nuclei
    assert len([one for one in shown if "index" in one["measurements"]]) > result.nuclei


@pytest.mark.qupath
def test_tma_round_trip(import_: Importer, path: Path, session: qupath.Session) -> None:
    session.run(path, GRID)
    result = import_(0.2, tma=True)
    cores = {one.name: one for one in result.summaries[1:]}
    assert list(cores) == ["A-1", "B-1", "B-2"]  # A-2 is missing
    assert cores["A-1"].case_id == "patient 7"
    assert cores["A-1"].nuclei > 0
    assert cores["B-2"].nuclei == 0
    assert cores["B-2"].positive_percent is None
    assert sum(core.nuclei for core in cores.values()) == result.nuclei
    for _ in range(2):  # once more, over what is there
        shown = objects(session, path)
        inside = [one for one in shown if "index" in one["measurements"]]
        assert len(inside) == result.nuclei
        assert {one["parent"] for one in inside} == {"PatchCL"}
        counts = dict.fromkeys(cores, 0)
        for one in inside:
            counts[one["grandparent"]] += 1
        assert counts == {name: core.nuclei for name, core in cores.items()}
        measured = {one["name"]: one["measurements"] for one in shown if one["name"] in cores}
        for name, core in cores.items():
            assert measured[name]["PatchCL: Nuclei"] == core.nuclei
            assert measured[name].get("PatchCL: Positive %") == pytest.approx(core.positive_percent)
        missing = next(one for one in shown if one["name"] == "A-2")
        assert "PatchCL: Nuclei" not in missing["measurements"]
        import_(0.2, tma=True, run=2)
