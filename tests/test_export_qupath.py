"""The same numbers in QuPath, in the exported tables, and in the report."""

from __future__ import annotations

import json
import re
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
from exported import rows_of
from results import result_of

from patchcl_qupath.answers.positivity import Positivity
from patchcl_qupath.answers.regions import Regions
from patchcl_qupath.answers.summary import Extent, summarise
from patchcl_qupath.cli import main
from patchcl_qupath.config import Config, ResultConfig, to_dict
from patchcl_qupath.project import open_project
from patchcl_qupath.storage.records import PositivityRecord, SlideProvenance

ROOT = Path(__file__).parent.parent
SLIDE = ROOT / "sample_project" / "CMU-1-Small-Region.svs"  # 2220 x 2967 px of 0.499 µm
MPP = (0.499, 0.499)  # by its file

DRAW = (
    qupath.DRAW_RECTANGLES
    + """
draw('left', 'Tumor', 0, 0, 210, 900)
draw(null, 'Stroma', 30, 30, 90, 110)
entry.saveImageData(imageData)
'1'
"""
)
# What QuPath shows in its tables of detections, annotations and images, and exports. The method
# setImageData needs a display, which asks whether it is called by QuPath's window.
TABLES = """
import groovy.json.JsonOutput
import qupath.lib.gui.measure.ObservableMeasurementTableData

def rows = { objects ->
    def table = new ObservableMeasurementTableData()
    table.@imageData = imageData
    table.getBackingListEntries().setAll(objects)
    table.updateMeasurementList()
    objects.collect { object ->
        table.getAllNames().collectEntries { [it, table.getStringValue(object, it) ?: ''] }
    }
}
JsonOutput.toJson([nuclei: rows(hierarchy.getDetectionObjects()),
    regions: rows(hierarchy.getAnnotationObjects()), images: rows([hierarchy.getRootObject()])])
"""
LOAD = """
import groovy.json.JsonOutput
import qupath.lib.io.PathIO

def read = PathIO.readObjects(java.nio.file.Paths.get('FILE'))
JsonOutput.toJson([objects: read.collect { [
    id: it.getID().toString(), type: it.getClass().getSimpleName(),
    of: it.getPathClass()?.toString(), area: it.getROI().getArea(),
    measurements: it.getMeasurements()] }])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, session: qupath.Session) -> Path:
    """A project after a run with --positive and --summarise, by QuPath: its folder."""
    made = tmp_path_factory.mktemp("made")
    path = qupath.make_project(made / "project", SLIDE, ["a.svs"])
    record = PositivityRecord(measurement="DAB: Mean", thresholds=(0.2, 0.4, 0.6))
    positivity = Positivity(record=record, base_class="Nucleus")
    found = qupath.nuclei(10, 21, "a.svs")
    dab = (np.arange(len(found)) % 10 / 10).astype(np.float32)
    measurements = {"Area µm^2": found.measurements["index"] + 1, "DAB: Mean": dab}
    (found,) = positivity.apply([replace(found, measurements=measurements)])
    config = ResultConfig(object_type="detection", summarise=("Tumor", "Stroma"))
    with closing(open_project(path, "paquo")) as project:
        project.write(project.images()[0], [found], config, result_of(len(found), config))
    session.run(path, DRAW)
    with closing(open_project(path, "paquo")) as project:
        (entry,) = project.images()
        entry = project.with_drawn(entry, ["Tumor", "Stroma"])
        regions = Regions(entry.drawn)
        extents = [
            Extent(
                area_mm2=g.area * MPP[0] * MPP[1] / 2e6,  # half of it was segmented
                tissue_mm2=0.5,
                x=g.centroid.x,
                y=g.centroid.y,
                area_px=g.area,
            )
            for g in regions.geometries
        ]
        summaries = summarise(
            [found],
            image=entry.name,
            extents=[Extent(area_mm2=1.6, tissue_mm2=1.0), *extents],
            regions=regions,
            class_names=positivity.class_names,
        )
        result = msgspec.structs.replace(
            result_of(len(found), config),
            run="second",
            image=entry.name,
            tissue_mm2=1.0,
            slide=SlideProvenance(file=result_of(0).slide.file, mpp=MPP),
            config=to_dict(Config(result=config)),
            positivity=record,
            summaries=summaries,
        )
        project.write(entry, [found], config, result)
    return path.parent


def exported(folder: Path, *options: str) -> list[dict[str, str]]:
    """The rows of a table."""
    words = ["export", str(folder), "--to", "csv", *options, "--json"]
    done = CliRunner().invoke(main, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return rows_of(Path(json.loads(done.stdout)["files"][0]["path"]))


@pytest.fixture(scope="module")
def of_qupath(folder: Path, session: qupath.Session) -> dict[str, list[dict[str, str]]]:
    """The rows of QuPath's own tables, by their name."""
    found: dict[str, list[dict[str, str]]] = session.run(folder / "project.qpproj", TABLES)["a.svs"]
    return found


def compared(ours: dict[str, str], theirs: dict[str, str], but: set[str]) -> None:
    """All columns of QuPath's row are in ours, and agree; ``but`` some that differ."""
    missing = [
        name
        for name, text in theirs.items()
        if text not in ("", "NaN") and name not in {*ours, *but}
    ]
    assert missing == []
    for name in set(ours) & set(theirs) - but:
        if theirs[name] == "NaN":
            assert ours[name] == "", name
        elif re.fullmatch(r"-?[\d.]+(E-?\d+)?", theirs[name]):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=2e-3, abs=6e-3), name
        else:
            assert ours[name] == theirs[name], name


@pytest.mark.qupath
def test_nuclei_have_the_columns_and_numbers_of_qupath(
    folder: Path, of_qupath: dict[str, list[dict[str, str]]]
) -> None:
    ours = {row["Object ID"]: row for row in exported(folder)}
    theirs = of_qupath["nuclei"]
    assert len(ours) == len(theirs) == 210
    assert {"Image", "Object ID", "Object type", "Classification", "Parent"} <= set(theirs[0])
    assert {"ROI", "Centroid X µm", "Centroid Y µm", "DAB: Mean"} <= set(theirs[0])
    order = [name for name in theirs[0] if name in next(iter(ours.values()))]
    assert order == [name for name in next(iter(ours.values())) if name in order]
    for row in theirs:
        # In QuPath nuclei lie in the PatchCL annotation until a person resolves the hierarchy.
        compared(ours[row["Object ID"]], row, but={"Parent"})


@pytest.mark.qupath
def test_regions_have_the_columns_and_numbers_of_qupath(
    folder: Path, of_qupath: dict[str, list[dict[str, str]]]
) -> None:
    ours = {row["Object ID"]: row for row in exported(folder, "--per", "region")}
    theirs = {row["Object ID"]: row for row in of_qupath["regions"]}
    assert len(ours) == 2
    for id_, row in ours.items():
        wanted = {name: text for name, text in theirs[id_].items() if name in row}
        assert len(wanted) > 20
        assert {"Num Detections", "Nucleus: Positive %", "Nucleus: H-score"} <= set(wanted)
        assert {"Nucleus: Allred score", "PatchCL: Nuclei per mm^2"} <= set(wanted)
        compared(row, wanted, but=set())


@pytest.mark.qupath
def test_images_have_the_columns_and_numbers_of_qupath(
    folder: Path, of_qupath: dict[str, list[dict[str, str]]]
) -> None:
    (ours,), (theirs,) = exported(folder, "--per", "image"), of_qupath["images"]
    assert {"Num Detections", "Num Nucleus: 3+", "Nucleus: H-score"} <= set(theirs)
    compared(ours, theirs, but=set())


@pytest.mark.qupath
def test_the_report_has_the_numbers_of_the_tables(folder: Path) -> None:
    CliRunner().invoke(main, ["report", str(folder)], catch_exceptions=False)
    report = folder / "patchcl" / "report"
    page = (report / "index.html").read_text("utf-8")
    section = page[page.index('id="regions"') : page.index('id="files"')]
    shown = [
        re.findall(r'data-value="([^"]*)"', row)
        for row in re.findall(r"<tr>.*?</tr>", section, re.S)
    ][1:]
    ours = exported(folder, "--per", "region")
    assert len(shown) == len(ours) == 2
    for row, values in zip(ours, shown, strict=True):
        columns = ("PatchCL: Tissue mm^2", "Num Detections", "PatchCL: Nuclei per mm^2")
        columns += ("Nucleus: Positive %", "Nucleus: H-score", "Nucleus: Allred score")
        assert [float(v) for v in values[3:]] == [
            pytest.approx(float(row[name]), rel=1e-6) for name in columns
        ]
    (image,) = exported(folder, "--per", "image")
    cells = re.search(r'href="#image-1".*?</tr>', page, re.S)
    assert cells
    values = [v for v in re.findall(r'class="number" data-value="([^"]*)"', cells[0]) if v]
    for name in ("Num Detections", "Nucleus: Positive %", "Nucleus: H-score"):
        assert any(float(v) == pytest.approx(float(image[name]), rel=1e-6) for v in values), name
    links = re.findall(r'href="(tables/[^"]+)"', page)
    assert links == ["tables/images.csv", "tables/regions.csv", "tables/nuclei.csv"]
    assert rows_of(report / links[1]) == ours


@pytest.mark.qupath
def test_qupath_reads_the_geojson(folder: Path, session: qupath.Session, tmp_path: Path) -> None:
    path = tmp_path / "a.geojson"
    words = ["export", str(folder), "--to", "geojson", "--output", str(path)]
    assert CliRunner().invoke(main, words, catch_exceptions=False).exit_code == 0
    script = LOAD.replace("FILE", str(path))
    read: list[dict[str, Any]] = session.run(folder / "project.qpproj", script)["a.svs"]["objects"]
    rows = {row["Object ID"]: row for row in exported(folder)}
    assert len(read) == len(rows)
    for one in read:
        row = rows[one["id"]]
        assert one["type"] == "PathDetectionObject"
        assert one["of"] == row["Classification"]
        assert one["measurements"]["DAB: Mean"] == pytest.approx(float(row["DAB: Mean"]))
    nuclei = qupath.nuclei(10, 21, "a.svs")
    total = sum(one["area"] for one in read)
    assert total == pytest.approx(shapely.area(nuclei.polygons).sum(), rel=1e-4)
