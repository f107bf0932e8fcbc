"""Runs that classify nuclei, and count them in annotations and TMA cores: the files backend."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from click.testing import CliRunner
from conftest import QUICK, copy_sample
from exported import rows_of
from test_regions import HOLED, SMALL, TUMOR, export, feature

from patchcl_qupath import pipeline
from patchcl_qupath.cli import main
from patchcl_qupath.config import TMA_CORES, Config
from patchcl_qupath.datatypes import Tile, centroids_of
from patchcl_qupath.errors import ImageError
from patchcl_qupath.project import open_project
from patchcl_qupath.report.found import find_image
from patchcl_qupath.segmentation import image_tiles
from patchcl_qupath.segmentation.segment_tile import TileContext, segment_tile
from patchcl_qupath.storage.geojson import read_objects
from patchcl_qupath.storage.parquet import read_nuclei
from patchcl_qupath.storage.records import ImageOutcome, ResultRecord, read_record

WIDE = replace(QUICK, slide=replace(QUICK.slide, stain="h-dab"))  # of H&E, for numbers that differ


def run(
    folder: Path,
    model: pipeline.Model,
    client: Any,
    *within: str,
    config: Config = WIDE,
    **asked: Any,
) -> tuple[ImageOutcome, ResultRecord | None]:
    project = open_project(folder, backend="files")
    (outcome,) = pipeline.Run(
        project=project,
        model=model,
        config=replace(config, result=replace(config.result, **asked)),
        workers=client,
        progress=lambda *_: None,
        region_classes=within,
    ).images(project.images())
    return outcome, read_record(project.layout.result("1"), ResultRecord)


def files(folder: Path) -> dict[str, bytes]:
    results = folder / "patchcl" / "results" / "1"
    return {
        path.name: path.read_bytes() for path in results.iterdir() if path.name != "result.json"
    }


def test_thresholds_change_without_another_segmentation(
    folder: Path, model: pipeline.Model, client: Any
) -> None:
    outcome, result = run(folder, model, client)
    plain = files(folder)
    assert result is not None
    assert (outcome.tiles_resumed, result.summaries, result.positivity) == (0, (), None)
    assert "summaries" not in (folder / "patchcl" / "results" / "1" / "result.json").read_text()
    dab = read_nuclei(folder / "patchcl" / "results" / "1" / "nuclei.parquet").measurements
    low, middle, high = (float(x) for x in np.quantile(dab["DAB: Mean"], [0.2, 0.5, 0.8]))
    for positive, thresholds in [
        (f"nucleus-dab-mean={middle}", [middle]),
        (f"dab-mean={low},{middle},{high}", [low, middle, high]),
    ]:
        outcome, result = run(folder, model, client, positive=positive)
        assert outcome.problem is None
        assert outcome.tiles_resumed == outcome.tiles > 0
        found = read_nuclei(folder / "patchcl" / "results" / "1" / "nuclei.parquet")
        grade = np.searchsorted(thresholds, dab["DAB: Mean"].astype(float), side="right")
        assert found.classes is not None
        names = list(result.summaries[0].classes) if result else []
        assert found.classes.tolist() == [names[k] for k in grade]
        assert result is not None
        assert result.object_type == "detection"
        (image,) = result.summaries
        assert image.nuclei == outcome.nuclei == sum(one.nuclei for one in image.classes.values())
        assert image.positive_percent == pytest.approx(100 * np.mean(grade > 0))
        if len(thresholds) == 3:
            assert image.h_score == pytest.approx(100 * grade.mean())
        assert outcome.summaries == result.summaries
        geojson = folder / "patchcl" / "results" / "1" / "nuclei-000.geojson.gz"
        assert read_objects(geojson).classes.tolist() == found.classes.tolist()
    run(folder, model, client)
    assert files(folder) == plain


def test_every_annotation_is_counted(folder: Path, model: pipeline.Model, client: Any) -> None:
    """Also those drawn after a run, nested, in part beyond the image, or outside of it."""
    run(folder, model, client)
    within = shapely.box(1550, 2000, 1750, 2200)
    export(
        folder,
        feature(HOLED, "Tumor") | {"id": "one"},
        feature(SMALL, "Tumor"),
        feature(within, "Stroma"),
        feature(shapely.box(1600, 1900, 2400, 2050), "Stroma"),
        feature(shapely.box(5000, 0, 6000, 90), "Stroma"),
        feature(shapely.box(0, 0, 9, 9), "Other"),
    )
    outcome, result = run(folder, model, client, summarise=("Tumor", "Stroma", "Necrosis"))
    assert outcome.tiles_resumed == outcome.tiles
    assert result is not None
    image, *regions = result.summaries
    found = read_nuclei(folder / "patchcl" / "results" / "1" / "nuclei.parquet")
    assert found.classes is None
    x, y = centroids_of(found.polygons).T
    drawn = [HOLED, SMALL, within, shapely.box(1600, 1900, 2400, 2050)]
    counts = [int(shapely.intersects_xy(one, x, y).sum()) for one in drawn]
    assert [region.nuclei for region in regions] == [*counts, 0]
    assert min(counts) > 0
    own = int((shapely.intersects_xy(SMALL, x, y) & ~shapely.intersects_xy(drawn[2], x, y)).sum())
    assert regions[1].own <= own
    assert sum(one.own for one in [image, *regions]) == image.nuclei == len(found)
    tumor = regions[0]
    assert (tumor.id, tumor.class_name) == ("one", "Tumor")
    assert tumor.tissue_mm2 is not None
    assert tumor.per_mm2 == tumor.nuclei / tumor.tissue_mm2
    assert tumor.area_mm2 == pytest.approx(HOLED.area * 0.499e-3**2, rel=1e-3)
    part = shapely.box(1600, 1900, 2220, 2050).area
    assert regions[3].area_mm2 == pytest.approx(part * 0.499e-3**2, rel=1e-3)
    assert (regions[4].area_mm2, regions[4].per_mm2) == (None, None)  # not 0: nobody looked there
    note = str(outcome.note)
    assert "no annotation of class Necrosis" in note
    assert "regions lie outside the image: Stroma at x 5500, y 45 px" in note
    assert "regions reach beyond the image, only their part in it counts: Stroma at x 2000" in note
    assert "regions overlap, and nuclei in both count in both: Tumor at x" in note

    outcome, _ = run(folder, model, client, "Tumor", summarise=("Tumor", "Stroma"))
    assert "only what lies in the regions of the run was segmented" in str(outcome.note)

    right, bottom = SMALL.bounds[2:]
    beside = shapely.box(right, bottom - 200, right + 200, bottom)
    export(folder, feature(SMALL, "Tumor"), feature(beside, "Stroma"))
    _, result = run(folder, model, client, "Tumor", summarise=("Tumor", "Stroma"))
    assert result is not None
    _, tumor, stroma = result.summaries
    assert tumor.per_mm2 == tumor.nuclei / (tumor.tissue_mm2 or 0) > 0
    assert (stroma.nuclei, stroma.per_mm2, stroma.tissue_mm2, stroma.area_mm2) == (0, *[None] * 3)


def segment_but(context: TileContext, tile: Tile) -> Any:
    """Fails for two tiles side by side, which are all tissue."""
    if tile.name in ("00007-00003", "00007-00004"):
        raise ImageError("damaged")
    return segment_tile(context, tile)


def test_what_lies_in_failed_tiles_counts_nowhere(
    folder: Path,
    model: pipeline.Model,
    client: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither its tissue nor its area: densities are those of the tiles that are finished."""
    config, mpp = replace(WIDE, slide=replace(WIDE.slide, tile_px=300)), 0.499
    failed = shapely.box(832, 2076, 1387, 2373)
    drawn = {
        "lost": shapely.box(900, 2100, 1300, 2350),
        "partly": shapely.box(900, 2200, 1100, 2600),
        "beside": shapely.box(1150, 2400, 1350, 2600),
        "glass": shapely.box(0, 0, 90, 90),
    }
    features = [feature(geometry, "Tumor") for geometry in drawn.values()]
    for name, each in zip(drawn, features, strict=True):
        each["properties"]["name"] = name
    export(folder, *features)
    _, whole = run(folder, model, client, config=config, summarise=("Tumor",))
    damaged = copy_sample(tmp_path / "damaged")
    export(damaged, *features)
    monkeypatch.setattr(image_tiles, "segment_tile", segment_but)
    outcome, result = run(damaged, model, client, config=config, summarise=("Tumor",))
    assert whole is not None
    assert result is not None
    boxes = [shapely.box(t.x, t.y, t.x + t.width, t.y + t.height) for t in result.failed_tiles]
    assert shapely.equals(shapely.union_all(boxes), failed)

    found = read_nuclei(folder / "patchcl" / "results" / "1" / "nuclei.parquet")
    x, y = centroids_of(found.polygons).T
    in_failed = shapely.intersects_xy(failed, x, y)
    assert result.nuclei == pytest.approx(np.count_nonzero(~in_failed), abs=3)
    tissue_mm2 = whole.tissue_mm2 - failed.area * mpp**2 / 1e6
    assert result.tissue_mm2 == pytest.approx(tissue_mm2, rel=0.002)
    assert outcome.tissue_mm2 == result.tissue_mm2
    image, lost, partly, beside, glass = result.summaries
    assert image.tissue_mm2 == result.tissue_mm2
    assert image.per_mm2 == result.nuclei / result.tissue_mm2
    area_mm2 = whole.summaries[0].area_mm2 or 0
    assert image.area_mm2 == pytest.approx(area_mm2 - failed.area * mpp**2 / 1e6, rel=1e-6)
    assert (lost.nuclei, lost.per_mm2, lost.tissue_mm2, lost.area_mm2) == (0, None, None, None)
    left = shapely.difference(drawn["partly"], failed)
    count = np.count_nonzero(shapely.intersects_xy(left, x, y))
    assert count > 20
    assert partly.nuclei == pytest.approx(count, abs=3)
    assert partly.tissue_mm2 == pytest.approx(left.area * mpp**2 / 1e6, rel=0.01)
    assert partly.area_mm2 == pytest.approx(left.area * mpp**2 / 1e6, rel=1e-6)
    assert partly.per_mm2 == partly.nuclei / (partly.tissue_mm2 or 0)
    assert beside == whole.summaries[3]
    assert (glass.tissue_mm2, glass.per_mm2) == (0, 0)
    failed_note = "what lies in failed tiles was not segmented, and does not count, of lost, partly"
    assert str(outcome.note).endswith(failed_note)

    project = open_project(damaged, backend="files")
    (entry,) = project.images()
    assert find_image(project, entry).density == result.nuclei / result.tissue_mm2
    arguments = ["export", str(damaged), "--to", "csv", "--per", "region", "--json"]
    done = CliRunner().invoke(main, arguments, catch_exceptions=False)
    row = rows_of(Path(json.loads(done.stdout)["files"][0]["path"]))[0]
    columns = ("Name", "Num Detections", "PatchCL: Tissue mm^2", "PatchCL: Nuclei per mm^2")
    assert [row[column] for column in columns] == ["lost", "0", "", ""]

    outcome, result = run(damaged, model, client, "Tumor", config=config)
    assert result is not None
    tissue = [region.tissue_mm2 for region in result.regions]
    assert tissue == [0, partly.tissue_mm2, beside.tissue_mm2, 0]
    assert result.tissue_mm2 == pytest.approx(sum(tissue), rel=0.01)


def core(x: float, y: float, label: str, **more: Any) -> dict[str, Any]:
    """A core of 400 px as QuPath exports it."""
    found = feature(shapely.Point(x, y).buffer(200, 64), None)
    properties = {"objectType": "tmaCore", "name": label, "isMissing": False}
    return found | {"id": f"id of {label}", "properties": properties | more}


def test_cores_are_segmented_alone(folder: Path, model: pipeline.Model, client: Any) -> None:
    """Those that are missing are not; of one outside of the image, nothing is known."""
    export(
        folder,
        core(1800, 2300, "A-1", metadata={"Case ID": "7"}),
        core(1200, 1500, "A-2", classification={"name": "Tumor", "color": [1, 2, 3]}),
        core(1500, 700, "B-1", isMissing=True),
        core(2600, 300, "B-2"),
        feature(TUMOR, "Tumor"),
    )
    outcome, result = run(folder, model, client, TMA_CORES, summarise=("Tumor",))
    assert outcome.problem is None
    assert result is not None
    image, *rows = result.summaries
    assert [row.name for row in rows] == ["A-1", "A-2", "B-2", ""]
    assert [row.kind for row in rows] == ["core", "core", "core", "region"]
    assert (rows[0].case_id, rows[0].id) == ("7", "id of A-1")
    assert min(rows[0].nuclei, rows[1].nuclei) > 10
    assert sum(row.nuclei for row in rows[:3]) == image.nuclei == result.nuclei
    assert (rows[2].nuclei, rows[2].tissue_mm2, rows[2].per_mm2) == (0, None, None)
    assert image.tissue_mm2 == pytest.approx(sum(row.tissue_mm2 or 0 for row in rows[:3]), rel=0.02)
    assert len(result.regions) == 3


def test_of_a_core_outside_of_the_regions_of_a_run_nothing_is_known(
    folder: Path, model: pipeline.Model, client: Any
) -> None:
    export(folder, core(1800, 2300, "A-1"), core(1900, 400, "A-2"), feature(TUMOR, "Tumor"))
    outcome, result = run(folder, model, client, "Tumor", summarise=(TMA_CORES,))
    assert result is not None
    _, inside, outside = result.summaries
    assert inside.tissue_mm2 is not None
    assert (outside.nuclei, outside.area_mm2, outside.per_mm2) == (0, None, None)
    assert "only what lies in the regions of the run was segmented" in (outcome.note or "")


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([feature(TUMOR, "Tumor")], "has no TMA grid with a core that is not missing"),
        ([core(700, 700, "A-1", isMissing=True)], "has no TMA grid with a core"),
    ],
)
def test_without_cores_an_image_fails(folder: Path, features: list[Any], message: str) -> None:
    export(folder, *features)
    project = open_project(folder, backend="files")
    with pytest.raises(ImageError, match=message) as error:
        project.with_regions(project.images()[0], [TMA_CORES])
    assert "export_regions.groovy" in str(error.value)


def test_a_core_is_no_annotation_of_its_class(folder: Path) -> None:
    export(folder, core(9, 9, "A-1", classification={"name": "Tumor", "color": [1, 2, 3]}))
    project = open_project(folder, backend="files")
    with pytest.raises(ImageError, match="has no annotation of class Tumor"):
        project.with_regions(project.images()[0], ["Tumor"])
    found = project.with_drawn(project.images()[0], ["Tumor"])
    assert found.drawn == ()
    assert found.note == "no annotation of class Tumor (it has none with a class)"
    export(folder, feature(SMALL, "tumor"), feature(HOLED, "Stroma"), feature(HOLED, None))
    found = project.with_drawn(project.images()[0], ["Tumor", "Necrosis"])
    assert found.note == (
        "no annotation of class Tumor or Necrosis (it has annotations of class Stroma, tumor)"
    )


def test_positive_nuclei_of_h_and_e_are_refused(
    folder: Path, model: pipeline.Model, client: Any
) -> None:
    outcome, result = run(folder, model, client, config=QUICK, positive="auto")
    assert result is None
    assert "--positive needs DAB, and its stains are Hematoxylin and Eosin" in str(outcome.problem)
    assert outcome.tiles == 0
    outcome, _ = run(folder, model, client, positive="auto")  # of a slide without DAB
    assert outcome.problem is None
    assert outcome.positivity
    assert "the threshold is 0.2" in str(outcome.note) or outcome.positivity.found


def test_the_command(folder: Path, model: pipeline.Model) -> None:
    model.save(folder / "patchcl" / "models", "patchcl")
    export(folder, feature(TUMOR, "Tumor"))
    command = [
        "run",
        str(folder),
        "--stain",
        "h-dab",
        "--positive",
        "nucleus-dab-mean=0.05,0.1,0.2",
    ]
    command += ["--summarise", "Tumor", "--summarise", "Tumor"]
    done = CliRunner().invoke(main, [*command, "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (image,) = json.loads(done.stdout)["images"]
    assert [row["kind"] for row in image["summaries"]] == ["image", "region"]
    assert set(image["summaries"][1]["allred"]) == {"proportion", "intensity"}
    assert image["positivity"]["thresholds"] == [0.05, 0.1, 0.2]
    done = CliRunner().invoke(main, command, catch_exceptions=False)
    assert "region" in done.stdout
    assert "DAB: Mean of at least 0.05, 0.1, 0.2, given" in done.stdout
    for more, message in [
        (["--positive", "dab"], "give a measurement with one threshold"),
        (["--tma", "--within", "Tumor"], "pass --within or --tma, not both"),
        (["--class-name", "Positive"], "pass another name than Positive"),
    ]:
        done = CliRunner().invoke(main, [*command, *more])
        assert done.exit_code == 2
        assert message in done.stderr
