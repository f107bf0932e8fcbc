"""The report of positive nuclei, regions and cores: maps, charts, tables, and files beside it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from click.testing import CliRunner
from exported import DRAWN, export_drawn, make_project, nuclei, rows_of, write
from PIL import Image

from patchcl_qupath.answers.positivity import Positivity
from patchcl_qupath.cli import main
from patchcl_qupath.datatypes import Box, DrawnRegion, centroids_of
from patchcl_qupath.errors import StorageError
from patchcl_qupath.pipeline import Model
from patchcl_qupath.project import NewImage, Project, init_project, open_project
from patchcl_qupath.report import downloads
from patchcl_qupath.report.charts import Mark, Stack, stacked
from patchcl_qupath.report.positivity_map import (
    POSITIVITY_COLOURS,
    _round_up,
    positive_share,
)
from patchcl_qupath.report.views import kind_of_class
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.storage.parquet import read_nuclei
from patchcl_qupath.storage.records import PositivityRecord

SAMPLE = Path(__file__).parent.parent / "sample_project"
HOSTILE = '<img src=x onerror="alert(1)">'


def call(*arguments: Any) -> Any:
    return CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)


def page_of(project: Project) -> str:
    return project.layout.report_page.read_text("utf-8")


def test_the_share_of_a_bin_is_that_of_it_and_its_neighbours() -> None:
    """Bins of 10 x 20 px: two positive of three nuclei in a row of four bins, one far away."""
    centroids = np.array([[5, 10], [15, 10], [16, 11], [35, 10], [5, 90]], float)
    positive = np.array([True, False, True, False, True])
    share = positive_share(positive, centroids, (10, 20), (5, 4))
    assert share.shape == (5, 4)
    assert share[0, :2].tolist() == pytest.approx([2 / 3, 2 / 3])
    assert np.isnan(share[0, 2])  # no nucleus in it
    assert share[0, 3] == 0
    assert share[4, 0] == 1
    assert np.isfinite(share).sum() == 4
    beyond = positive_share(np.array([True]), np.array([[41.0, 101.0]]), (10, 20), (5, 4))
    assert beyond[4, 3] == 1  # a centroid on the rim of the grid


def test_classes_are_numbered_from_negative() -> None:
    record = PositivityRecord(measurement="DAB: Mean", thresholds=(0.2, 0.4, 0.6))
    positivity = Positivity(record=record, base_class="Tumor")
    values = np.array([0.7, 0.1, 0.2, np.nan, 0.5], np.float32)
    assert positivity.codes(values).tolist() == [3, 0, 1, 0, 2]
    assert len(positivity.codes(values[:0])) == 0
    assert [kind_of_class(name) for name in positivity.class_names] == [
        *("negative", "grade-1", "grade-2", "grade-3")
    ]
    assert [_round_up(v) for v in (0.011, 0.9, 1.2, 1.6, 7.0)] == [0.015, 1, 1.5, 2, 8]


def test_bars_of_classes_stand_on_each_other() -> None:
    stacks = [Stack("Negative", "negative", [3, 1]), Stack("Positive", "positive", [1, 0])]
    chart = stacked("key", "title", "OD", highest=1, stacks=stacks, marks=[Mark(0.2, "0.2")])
    low, high = [path.d for path in chart.paths if path.kind.startswith("bars")]
    bottoms = [[float(v) for v in re.findall(r"V([\d.]+)", d)] for d in (low, high)]
    assert len(bottoms[0]) == 4  # two bars, up and down
    assert bottoms[1][1] == bottoms[0][0]  # the positive ones begin where the negative ones end
    assert bottoms[1][0] == pytest.approx(22)  # the highest bar fills the plot
    assert chart.swatches == ("negative", "positive")
    assert "Negative: 4 nuclei. Positive: 1 nuclei. 0.2 OD." in chart.words


@pytest.fixture(scope="module")
def project(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project of one small image after a run with --positive and --summarise."""
    files = tmp_path_factory.mktemp("images")
    (entry,) = open_project(SAMPLE).images()
    picture = Image.fromarray(Slide.open(entry).read(Box(900, 700, 1300, 1200)))
    picture.save(files / "a.png")
    path = init_project(files / "project", [NewImage(files / "a.png", [picture.size], (0.5, 0.5))])
    project = open_project(path, "files")
    (entry,) = project.images()
    drawn = (
        DrawnRegion(geometry=shapely.box(0, 0, 300, 400), name=HOSTILE, class_name="Tumor"),
        DrawnRegion(geometry=shapely.box(50, 50, 200, 200), class_name="Tumor"),
    )
    export_drawn(project.layout.regions(entry.id), drawn)
    model.save(project.layout.models, "patchcl")
    assert call("run", path, "--stain", "h-dab").exit_code == 0
    found = read_nuclei(project.layout.nuclei(entry.id))
    middle = float(np.median(found.measurements["DAB: Mean"]))
    options = ["--stain", "h-dab", "--positive", f"nucleus-dab-mean={middle:.3f}"]
    ran = call("run", path, *options, "--summarise", "Tumor", "--json")
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["report"] is not None, ran.stderr
    return project


def test_figures_by_class_are_those_of_the_nuclei(project: Project) -> None:
    (entry,) = project.images()
    found = read_nuclei(project.layout.nuclei(entry.id))
    figures = json.loads((project.layout.figures(entry.id) / "figures.json").read_text("utf-8"))
    dab, area = found.measurements["DAB: Mean"], found.measurements["Area µm^2"]
    shown = figures["positivity"]
    assert shown["measurement"] == "DAB: Mean"
    (threshold,) = shown["thresholds"]
    negative, positive = shown["classes"]
    assert min(negative["nuclei"], positive["nuclei"]) > 5
    for one, rows in ((negative, dab < threshold), (positive, dab >= threshold)):
        assert one["nuclei"] == rows.sum()
        bars = np.histogram(np.minimum(area[rows], 299.9), 30, (0, 300))[0]
        assert one["area"] == bars.tolist()
        bars = np.histogram(np.clip(dab[rows], 0, shown["highest"]), 30, (0, shown["highest"]))[0]
        assert one["measurement"] == bars.tolist()
    for field in figures["fields"]:
        box = shapely.box(field["x"], field["y"], field["x"] + 256, field["y"] + 256)
        touching = shapely.intersects(box, found.polygons)
        assert len(field["classes"]) == len(field["outlines"]) == touching.sum()
        assert sum(field["classes"]) == (dab[touching] >= threshold).sum()


def test_the_map_lies_on_the_overview(project: Project) -> None:
    (entry,) = project.images()
    folder = project.layout.figures(entry.id)
    with Image.open(folder / "overview.jpg") as one, Image.open(folder / "positivity.png") as two:
        assert one.size == two.size
        seen = np.asarray(two.convert("RGBA"))
        px = round(500 / one.size[0])
    found = read_nuclei(project.layout.nuclei(entry.id))
    x, y = (centroids_of(found.polygons).T / px).astype(int)
    assert (seen[y, x, 3] == 255).all()
    # Bluer where fewer are positive: the share around each nucleus against the colour there.
    assert found.classes is not None
    positive = found.classes == "Nucleus: Positive"
    share = positive_share(positive, centroids_of(found.polygons), (128, 128), (4, 4))
    low, high = np.nanargmin(share), np.nanargmax(share)
    assert np.nanmin(share) < np.nanmax(share)
    places = [(min(64 + 128 * (k // 4), 399), min(64 + 128 * (k % 4), 499)) for k in (low, high)]
    colours = [seen[row // px, col // px, :3] for row, col in places]
    ends = np.linspace(0, 1, len(POSITIVITY_COLOURS))
    shares = np.linspace(0, 1, 101)
    scale = np.stack([np.interp(shares, ends, of) for of in np.transpose(POSITIVITY_COLOURS)], 1)
    shown = [np.abs(scale - colour.astype(int)).sum(axis=1).argmin() for colour in colours]
    assert shown[0] < shown[1]


def test_the_page_has_maps_charts_tables_and_files(project: Project) -> None:
    page = page_of(project)
    assert "100 % of nuclei are positive" in page
    assert "By class: area of nuclei" in page
    assert '<h2 id="regions">Regions</h2>' in page
    assert "TMA cores" not in page
    assert HOSTILE not in page
    assert "&lt;img src=x onerror=" in page
    assert len(page) < 500_000
    links = re.findall(r'<a href="(tables/[^"]*)" download>', page)
    assert links == ["tables/images.csv", "tables/regions.csv", "tables/nuclei.csv"]
    rows = {link: rows_of(project.layout.report / link) for link in links}
    (entry,) = project.images()
    assert len(rows["tables/nuclei.csv"]) == len(read_nuclei(project.layout.nuclei(entry.id)))
    large, small = rows["tables/regions.csv"]
    assert large["Name"] == HOSTILE
    assert small["Name"] == ""
    shown = re.findall(r'<tr><th scope="row" data-value="at x 125, y 125 px">.*?</tr>', page, re.S)
    (values,) = (re.findall(r'data-value="([^"]*)"', row)[3:] for row in shown)
    assert [float(value) for value in values] == pytest.approx(
        [
            float(small[name])
            for name in (
                *("PatchCL: Tissue mm^2", "Num Detections", "PatchCL: Nuclei per mm^2"),
                "Nucleus: Positive %",
            )
        ],
        rel=1e-6,
    )


def test_equal_files_give_an_equal_page(project: Project) -> None:
    before = project.layout.report_page.read_bytes()
    assert call("report", project.path).exit_code == 0
    assert project.layout.report_page.read_bytes() == before


def test_cores_have_a_table_of_their_own(tmp_path: Path) -> None:
    project = make_project(tmp_path / "made", ["tma.svs"])
    write(project, 0, nuclei("a"), thresholds=(0.2, 0.4, 0.6), drawn=DRAWN)
    assert call("report", project.path).exit_code == 0
    page = page_of(project)
    (row,) = re.findall(r'<tr><th scope="row" data-value="A-1">.*?</tr>', page, re.S)
    values = re.findall(r'data-value="([^"]*)"', row)
    assert values[1:3] == ["tma.svs", "0012"]
    # Negative, 1+ and 2+: H = 100/3 + 200/3; the mean grade of positive ones is 1.5.
    assert [float(value) for value in values[3:]] == pytest.approx(
        [0.002, 3, 1500, 200 / 3, 100, 5 + 1], rel=1e-6
    )
    assert rows_of(project.layout.report / "tables" / "cores.csv")[0]["Case ID"] == '="0012"'


def test_many_nuclei_are_no_table_beside_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path / "made", ["a.svs"])
    write(project, 0, nuclei("a"))
    table = project.layout.report / "tables" / "nuclei.csv"
    assert call("report", project.path).exit_code == 0
    assert table.exists()
    monkeypatch.setattr(downloads, "MAX_NUCLEI", 4)
    assert call("report", project.path).exit_code == 0
    assert not table.exists()
    assert "tables/nuclei.csv" not in page_of(project)
    page = page_of(project)
    assert "tables/images.csv" in page
    assert "folder <code>tables</code> beside this page" in page, "who gets the page alone has none"


def test_a_damaged_file_of_nuclei_costs_no_page(tmp_path: Path) -> None:
    project = make_project(tmp_path / "made", ["a.svs"])
    write(project, 0, nuclei("a"))
    project.layout.nuclei(project.images()[0].id).write_bytes(b"PAR1")
    assert call("report", project.path).exit_code == 0
    assert "tables/" not in page_of(project)


def test_a_table_that_cannot_be_written_costs_no_page(tmp_path: Path) -> None:
    project = make_project(tmp_path / "made", ["a.svs"])
    write(project, 0, nuclei("a"))
    (project.layout.report / "tables" / "images.csv").mkdir(parents=True)  # as if it were open
    (project.layout.report / "tables" / "images.csv" / "x").touch()
    done = call("report", project.path)
    assert done.exit_code == 0
    assert "WARNING: the report has no link to images.csv: cannot write" in done.stderr
    assert "tables/images.csv" not in page_of(project)
    assert "tables/nuclei.csv" in page_of(project)


def test_a_table_for_which_there_is_no_room_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it there would be room for the page, and nobody would see that it is gone."""
    project = make_project(tmp_path / "made", ["a.svs"])
    write(project, 0, nuclei("a"))
    assert call("report", project.path).exit_code == 0
    table = project.layout.report / "tables" / "nuclei.csv"
    before = table.read_bytes()
    write_csv = downloads.write_csv

    def full(path: Path, *more: Any, **options: Any) -> int:
        if path == table:
            raise StorageError(f"cannot write {path}: the disk is full")
        return write_csv(path, *more, **options)

    monkeypatch.setattr(downloads, "write_csv", full)
    assert "no link to nuclei.csv: cannot write" in call("report", project.path).stderr
    assert "tables/nuclei.csv" not in page_of(project)
    assert table.read_bytes() == before
