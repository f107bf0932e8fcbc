"""Analysis regions: read from exports, applied to runs, and exported by a real QuPath."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qupath
import shapely
from click.testing import CliRunner
from conftest import QUICK

from patchcl_qupath import pipeline
from patchcl_qupath.cli import main
from patchcl_qupath.datatypes import Box, grid_to_level0, level0_to_grid
from patchcl_qupath.errors import ImageError, TrainingError
from patchcl_qupath.project import open_project
from patchcl_qupath.segmentation.tiling import plan
from patchcl_qupath.slides.tissue import inside_region, tissue_area_px
from patchcl_qupath.storage.parquet import read_nuclei
from patchcl_qupath.storage.records import ImageOutcome

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "sample_project"
SLIDE = SAMPLE / "CMU-1-Small-Region.svs"

# Level 0 of the sample slide, 2220 x 2967 px. Two parts, one of them with a hole; neither is
# symmetric.
HOLED = shapely.Polygon(
    [(300, 400), (1500, 300), (1400, 1500), (500, 1700)],
    [[(700, 700), (1100, 650), (1000, 1100), (750, 1200)]],
)
SMALL = shapely.Polygon([(1500, 1900), (2100, 2000), (1700, 2600)])
TUMOR = shapely.MultiPolygon([HOLED, SMALL])
STROMA = shapely.box(200, 1900, 900, 2500)


def islands(side: float, count: int) -> shapely.Geometry:
    """Squares in rows, 40 px apart, as a pixel classifier makes annotations of single pixels."""
    x, y = np.divmod(np.arange(count), 100)
    return shapely.MultiPolygon([*shapely.box(40 * x, 40 * y, 40 * x + side, 40 * y + side)])


@pytest.mark.parametrize("side", [0.5, 3, 6])
@pytest.mark.parametrize("count", [1, 10_000])
def test_islands_that_lie_between_samples_are_tissue_where_they_are(
    side: float, count: int
) -> None:
    tissue = np.zeros((250, 250), dtype=bool)  # of 16 px
    tissue[:, 0::2] = True
    region = islands(side, count)
    expected = sum(part.area for part in region.geoms if int(part.bounds[0] / 16) % 2 == 0)
    found = tissue_area_px(tissue, 16, (4000, 4000), region)
    assert found == pytest.approx(expected, rel=0.02)


def feature(geometry: shapely.Geometry, name: str | None) -> dict[str, Any]:
    """An annotation as QuPath exports it."""
    properties: dict[str, Any] = {"objectType": "annotation"}
    if name is not None:
        key, value = ("names", name.split(": ")) if ": " in name else ("name", name)
        properties["classification"] = {key: value, "color": [200, 0, 0]}
    geojson = json.loads(shapely.to_geojson(geometry))
    return {"type": "Feature", "geometry": geojson, "properties": properties}


def export(project: Path, *features: dict[str, Any]) -> None:
    """Write the file that groovy/export_regions.groovy exports of the first image."""
    file = project / "patchcl" / "regions" / "1.geojson"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}), "utf-8")


def read(folder: Path, *classes: str) -> shapely.Geometry:
    project = open_project(folder, backend="files")
    return shapely.union_all(project.with_regions(project.images()[0], classes).regions)


def test_classes_are_read_by_name(folder: Path) -> None:
    crossed = shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])
    export(
        folder,
        feature(TUMOR, "Tumor"),
        feature(STROMA, "Stroma"),
        feature(shapely.box(0, 0, 50, 50), "Tumor: Positive"),
        feature(shapely.box(0, 0, 2000, 2000), None),
        feature(shapely.LineString([(0, 0), (9, 9)]), "Größe"),
        feature(crossed, "Größe"),
    )
    assert read(folder, "Tumor").equals(TUMOR)
    assert read(folder, "Tumor", "Stroma").equals(TUMOR | STROMA)
    assert read(folder, "Tumor: Positive").area == 2500
    assert read(folder, "Größe").area == 50
    assert read(folder, "Tumor", "Necrosis").equals(TUMOR)


def test_annotations_are_regions_one_by_one(folder: Path) -> None:
    export(folder, feature(TUMOR, "Tumor"), feature(STROMA, "Stroma"), feature(SMALL, "Tumor"))
    project = open_project(folder, backend="files")
    (image,) = project.images()
    found = project.with_regions(image, ["Stroma", "Tumor"])
    assert found.note is None
    for region, drawn in zip(found.regions, [STROMA, TUMOR, SMALL], strict=True):
        assert region.equals(drawn)
    assert project.with_regions(image, ["Tumour", "Tumor"]).note == "no annotation of class Tumour"

    data = folder / "data" / "1" / "data.qpdata"
    data.parent.mkdir(parents=True)
    data.touch()
    os.utime(data, ns=(2**62, 2**62))
    assert "exported before it was last saved" in str(project.with_regions(image, ["Tumor"]).note)

    os.utime(data, ns=(1, 1))  # as in a copy of the project, in which all times are new
    counts = {"hierarchy": {"annotationClassificationCounts": {"Tumor": 5, "Stroma": 1}}}
    data.with_name("summary.json").write_text(json.dumps(counts), "utf-8")
    assert project.with_regions(image, ["Stroma"]).note is None
    note = str(project.with_regions(image, ["Stroma", "Tumor"]).note)
    assert note.startswith("5 annotations of class Tumor are saved in QuPath, 2 were exported: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "its annotations were not exported"),
        ("{", "is damaged"),
        ("7", "is damaged"),
        ("[]", "it has none with a class"),
        ('{"features": [{"type": "Feature", "geometry": 1, "properties": {}}]}', "is damaged"),
        (json.dumps({"features": [feature(SMALL, None)]}), "it has none with a class"),
        (
            '{"features": [{"type": "Feature", "geometry": {"type": "Polygon", '
            '"coordinates": [[1, 2]]}, "properties": {"classification": {"name": "A"}}}]}',
            "is damaged",
        ),
        (
            json.dumps({"features": [feature(SMALL, "Tumour")]}),
            "it has annotations of class Tumour",
        ),
        (json.dumps({"features": []}), "it has none with a class"),
    ],
)
def test_exports_that_cannot_be_used_raise_one_line(
    folder: Path, content: str | None, message: str
) -> None:
    export(folder)
    file = folder / "patchcl" / "regions" / "1.geojson"
    if content is None:
        file.unlink()
    else:
        file.write_text(content, "utf-8")
    with pytest.raises(ImageError) as error:
        read(folder, "Tumor")
    raised = str(error.value)
    assert raised.startswith("CMU-1-Small-Region.svs")
    assert message in raised
    assert "export_regions.groovy" in raised
    assert "\n" not in raised


def test_no_model_is_trained_where_no_image_has_a_region(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Minutes later, the run would fail in each image."""
    trained = []

    def train_as(*args: Any) -> None:
        trained.append(args)
        raise TrainingError("no use")

    monkeypatch.setattr(pipeline, "train_as", train_as)
    export(folder, feature(SMALL, "Tumour"))
    run = ["run", str(folder), "--backend", "files", "--within"]
    failed = CliRunner().invoke(main, [*run, "Tumor"])
    assert failed.exit_code == 1
    assert "Error: CMU-1-Small-Region.svs has no annotation of class Tumor (it has" in failed.output
    assert not trained
    assert "no use" in CliRunner().invoke(main, [*run, "Tumour"]).output
    assert trained


def test_level0_and_back() -> None:
    grid = level0_to_grid(TUMOR, (2.0, 4.0))
    assert grid.bounds == (150, 75, 1050, 650)
    (back,) = grid_to_level0(np.array([grid]), (2.0, 4.0))
    assert back.equals(TUMOR)


def test_plan_is_limited_to_the_region() -> None:
    tissue = np.ones((100, 80), dtype=bool)
    tissue[:5] = False
    region = shapely.Polygon([(10.5, 20), (300.2, 30), (290, 410), (11, 44)])
    tiles = plan((800, 640), tissue, 8, 200, 50, region)
    boxes = [shapely.box(t.write.col0, t.write.row0, t.write.col1, t.write.row1) for t in tiles]
    covered = shapely.union_all(boxes)
    assert covered.area == sum(box.area for box in boxes)  # no two overlap
    assert covered.covers(region & shapely.box(0, 40, 640, 800))
    assert covered.bounds == (8, 40, 304, 410) or covered.bounds == (10, 40, 301, 410)
    assert plan((800, 640), tissue, 8, 200, 50, shapely.box(0, 0, 640, 40)) == []


def test_pixels_of_a_region() -> None:
    region = shapely.box(10.4, 20, 30, 40.6) - shapely.box(15, 25, 20, 30)
    rows, cols = (axis.ravel() for axis in np.mgrid[0:64, 0:50])
    found = inside_region(region, Box(0, 0, 64, 50), rows, cols).reshape(64, 50)
    expected = np.zeros((64, 50), dtype=bool)
    expected[20:41, 10:30] = True
    expected[25:30, 15:20] = False
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("scale", [0.5, 20])
def test_area_of_tissue_in_a_region(scale: float) -> None:
    tissue = np.zeros((300, 200), dtype=bool)
    tissue[:, :100] = True
    region = shapely.Point(1600, 1000).buffer(30 * scale)  # half of it on tissue of 1600 px
    shape = (300 * 16, 200 * 16)
    assert tissue_area_px(tissue, 16, shape, region) == pytest.approx(region.area / 2, rel=0.02)
    assert tissue_area_px(tissue, 16, shape, None) == 300 * 100 * 256


def test_tissue_of_parts_far_apart_is_that_of_each() -> None:
    """Two small squares at the ends of a large slide, and of the first a third on tissue."""
    tissue = np.zeros((2500, 2500), dtype=bool)
    tissue[:, :100] = True  # of 1600 px
    parts = shapely.box(1580, 80, 1640, 140), shapely.box(39_000, 39_000, 39_060, 39_060)
    shape, on_tissue = (40_000, 40_000), pytest.approx(20 * 60, rel=0.02)
    both = shapely.union_all(parts)
    assert tissue_area_px(tissue, 16, shape, parts[0]) == on_tissue
    assert tissue_area_px(tissue, 16, shape, parts[1]) == 0
    assert tissue_area_px(tissue, 16, shape, both) == on_tissue
    with_a_line = shapely.GeometryCollection([*parts, shapely.LineString([(0, 0), (9, 9)])])
    assert tissue_area_px(tissue, 16, shape, with_a_line) == on_tissue  # where two regions touch
    assert tissue_area_px(tissue, 16, shape, shapely.Polygon()) == 0


@pytest.mark.parametrize("scale", [0.5, 20])
def test_tissue_fills_a_region(scale: float) -> None:
    """Its area is that of the region, to the last digit, as in QuPath."""
    tissue = np.ones((300, 200), dtype=bool)
    region = shapely.box(0, 0, 75.3 * scale, 101.7 * scale) - shapely.box(9, 9, 9 + scale, 30)
    found = tissue_area_px(tissue, 16, (300 * 16, 200 * 16), region)
    assert found == pytest.approx(region.area, rel=1e-12)


def test_tissue_is_no_larger_than_the_image() -> None:
    """Of an image of 250 x 100 px, whose mask has px of 16, and the last ones reach beyond it."""
    tissue = np.ones((16, 7), dtype=bool)
    assert tissue_area_px(tissue, 16, (250, 100), None) == 250 * 100
    whole = shapely.box(0, 0, 100, 250)
    found = tissue_area_px(tissue, 16, (250, 100), whole)
    assert found == 250 * 100
    tissue[-1] = tissue[:, -1] = False
    assert tissue_area_px(tissue, 16, (250, 100), None) == 240 * 96


def segment(
    folder: Path, model: pipeline.Model, client: Any, *within: str, tile_px: int = 10_000
) -> tuple[ImageOutcome, Any]:
    project = open_project(folder, backend="files")
    config = replace(QUICK, slide=replace(QUICK.slide, tile_px=tile_px))
    run = pipeline.Run(
        project=project,
        model=model,
        config=config,
        workers=client,
        progress=lambda *_: None,
        region_classes=within,
    )
    (result,) = run.images(project.images())
    nuclei = None if result.problem else read_nuclei(Path(str(result.results)) / "nuclei.parquet")
    return result, nuclei


def test_nuclei_of_a_region_are_those_of_the_whole_image(
    folder: Path, model: pipeline.Model, client: Any
) -> None:
    """Tiled or not, the same nuclei, all inside the regions; finished tiles are not shared."""
    whole, everything = segment(folder, model, client)
    export(folder, feature(TUMOR, "Tumor"), feature(STROMA, "Stroma"))
    results = []
    for tile_px in (10_000, 300):
        result, nuclei = segment(folder, model, client, "Tumor", "Stroma", tile_px=tile_px)
        assert result.tiles_resumed == 0
        results.append(nuclei)
        assert 0.1 < result.tissue_mm2 < (TUMOR | STROMA).area * 0.499e-3**2 < whole.tissue_mm2
    assert len(results[0]) > 200
    assert set(results[0].uuids) == set(results[1].uuids)
    found = np.isin(everything.uuids, results[0].uuids)
    centroids = shapely.centroid(everything.polygons)
    np.testing.assert_array_equal(found, shapely.intersects(TUMOR | STROMA, centroids))
    assert 0 < found.sum() < len(everything) == whole.nuclei

    again, _ = segment(folder, model, client, "Tumor", "Stroma", tile_px=300)
    assert again.tiles_resumed == again.tiles > 1
    export(folder, feature(SMALL, "Tumor"), feature(STROMA, "Stroma"))
    moved, fewer = segment(folder, model, client, "Tumor", "Stroma", tile_px=300)
    assert moved.tiles_resumed == 0
    assert 0 < len(fewer) < len(results[0])


def test_a_nucleus_on_a_border_is_where_its_centroid_is(
    folder: Path, model: pipeline.Model, client: Any
) -> None:
    """As in QuPath, and as summaries count: by that of its contour, not by that of its pixels."""
    _, everything = segment(folder, model, client)
    stripes = shapely.MultiPolygon([shapely.box(0, y, 2220, y + 5) for y in range(3, 2967, 10)])
    export(folder, feature(stripes, "Tumor"))
    _, nuclei = segment(folder, model, client, "Tumor", tile_px=300)
    inside = shapely.intersects(stripes, shapely.centroid(everything.polygons))
    assert 0.4 < inside.mean() < 0.6
    assert set(nuclei.uuids) == set(everything.uuids[inside])


def test_regions_outside_the_image(folder: Path, model: pipeline.Model, client: Any) -> None:
    export(folder, feature(shapely.box(5000, 0, 6000, 900), "Tumor"))
    result, _ = segment(folder, model, client, "Tumor")
    assert "regions lie outside the image, which has 2220 x 2967 px" in str(result.problem)
    # QuPath lets one draw over the edge.
    export(folder, feature(shapely.box(-500, -500, 900, 900), "Tumor"))
    result, _ = segment(folder, model, client, "Tumor")
    assert result.problem is None
    assert result.tissue_mm2 <= (900 * 0.499e-3) ** 2


DRAW = """
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.GeometryTools
import qupath.lib.roi.ROIs
import qupath.lib.scripting.QP
import org.locationtech.jts.io.WKTReader

def plane = ImagePlane.getDefaultPlane()
def draw = { roi, name ->
    def pathClass = name == null ? null : PathClass.fromString(name)
    def drawn = PathObjects.createAnnotationObject(roi, pathClass)
    QP.getCurrentHierarchy().addObject(drawn)
    return drawn
}
def polygons = { GeometryTools.geometryToROI(new WKTReader().read(it), plane) }
draw(polygons('TUMOR'), 'Tumor')
draw(polygons('STROMA'), 'Größe: klein')
draw(ROIs.createEllipseROI(100, 200, 60, 40, plane), 'Stroma')
draw(ROIs.createLineROI(0, 0, 50, 50, plane), 'Stroma')
draw(ROIs.createRectangleROI(0, 0, 99, 99, plane), null)
def nucleus = draw(ROIs.createRectangleROI(0, 0, 20, 20, plane), 'Nucleus')
def mark = nucleus.getID().toString() + ' 0123456789abcdef 1 2'
QP.getCurrentImageData().setProperty('patchcl.imported', mark)
def chosen = draw(ROIs.createRectangleROI(40, 50, 30, 20, plane), 'Other')
QP.getCurrentHierarchy().getSelectionModel().setSelectedObject(chosen)
"""


@pytest.mark.qupath
def test_qupath_exports_the_regions_that_were_drawn(tmp_path: Path) -> None:
    folder = tmp_path / "ein Projekt, ü"
    qupath.launcher()
    project = qupath.make_project(folder, SLIDE, ["one.svs", "zwei ö.svs"])
    script = folder / "draw and export.groovy"
    # Imports may stand anywhere in a script; a selection does not outlive QuPath.
    exporting = (ROOT / "groovy" / "export_regions.groovy").read_text("utf-8")
    drawing = DRAW.replace("TUMOR", TUMOR.wkt).replace("STROMA", STROMA.wkt)
    script.write_text(drawing + exporting, "utf-8")
    log = qupath.run_script(project, script)
    assert "ERROR" not in log, log
    assert "zwei ö.svs: annotations exported to" in log, log
    for entry in open_project(project, backend="files").images():
        within = open_project(project, backend="files").with_regions

        def region(*classes: str, entry: Any = entry, within: Any = within) -> Any:
            return shapely.union_all(within(entry, classes).regions)

        assert region("Tumor").equals(TUMOR)
        assert region("Größe: klein").equals(STROMA)
        assert region("Stroma").area == pytest.approx(np.pi * 30 * 20, rel=0.01)
        assert region("(selected)").equals(shapely.box(40, 50, 70, 70))
        with pytest.raises(
            ImageError, match=r"class .selected., Größe: klein, Other, Stroma, Tumor"
        ):
            region("Nucleus")
    assert not [*folder.rglob("*.partial")]
