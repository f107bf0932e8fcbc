"""Runs with cells, on the real slide: tiled equals untiled, many workers equal one, resumed equals
uninterrupted; and what a run of nuclei alone shares with one of cells."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from conftest import QUICK, copy_sample

from patchcl_qupath import pipeline
from patchcl_qupath.config import CellConfig
from patchcl_qupath.correction.suggest import suggest
from patchcl_qupath.datatypes import Nuclei
from patchcl_qupath.errors import ImageError
from patchcl_qupath.execution.workers import open_workers
from patchcl_qupath.progress import Progress, Stage
from patchcl_qupath.project import open_project
from patchcl_qupath.segmentation import image_tiles
from patchcl_qupath.segmentation.segment_tile import segment_tile
from patchcl_qupath.storage.parquet import read_nuclei
from patchcl_qupath.storage.records import ImageOutcome

NUCLEI = "nuclei.parquet"


def silent(progress: Progress) -> None:
    """No progress shown."""


def run(
    folder: Path,
    model: Any,
    client: Any,
    tile_px: int = 512,
    expand_um: float = 5,
    progress: Callable[[Progress], None] = silent,
) -> ImageOutcome:
    """Segment a project's one image, and grow cells."""
    project = open_project(folder, "files")
    config = replace(
        QUICK,
        slide=replace(QUICK.slide, tile_px=tile_px),
        cells=CellConfig(expand_um=expand_um),
    )
    this_run = pipeline.Run(
        project=project, model=model, config=config, workers=client, progress=progress
    )
    (outcome,) = this_run.images(project.images())
    return outcome


def cells(folder: Path) -> Nuclei:
    return read_nuclei(folder / "patchcl/results/1" / NUCLEI)


@pytest.fixture(scope="module")
def whole(model: Any, client: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose image was segmented as one tile."""
    folder = copy_sample(tmp_path_factory.mktemp("whole") / "project")
    assert run(folder, model, client, tile_px=10_000).tiles == 1
    return folder


@pytest.fixture(scope="module")
def tiled(model: Any, client: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose image was segmented in many tiles."""
    folder = copy_sample(tmp_path_factory.mktemp("tiled") / "project")
    assert run(folder, model, client, tile_px=300).tiles > 50
    return folder


def test_tiled_equals_untiled(whole: Path, tiled: Path) -> None:
    one, other = cells(whole), cells(tiled)
    assert one.cells is not None
    assert other.cells is not None
    assert len(one) == len(other) > 1000
    # Nuclei are the same, but for the last bits of the network; then cells are, to the last bit.
    known = {id_: k for k, id_ in enumerate(one.uuids.tolist())}
    same = [(known[id_], k) for k, id_ in enumerate(other.uuids.tolist()) if id_ in known]
    assert len(same) > 0.97 * len(one)
    mine, theirs = np.array(same).T
    equal = shapely.equals_exact(one.cells[mine], other.cells[theirs], tolerance=0)
    # But for neighbours of the few nuclei that differ.
    assert equal.sum() >= len(same) - 3 * (len(one) - len(same))
    shared = shapely.area(shapely.intersection(one.cells[mine], other.cells[theirs]))
    union = shapely.area(shapely.union(one.cells[mine], other.cells[theirs]))
    assert (shared / union).min() > 0.95
    for name, values in one.measurements.items():
        np.testing.assert_array_equal(values[mine][equal], other.measurements[name][theirs][equal])


def test_cells_of_a_slide_are_apart_and_hold_their_nuclei(tiled: Path) -> None:
    found = cells(tiled)
    assert found.cells is not None
    assert shapely.is_valid(found.cells).all()
    near = shapely.buffer(found.cells, 0.01)  # coordinates are rounded to as much
    assert shapely.covers(near, found.polygons).all()
    one, other = shapely.STRtree(found.cells).query(found.cells, predicate="intersects")
    one, other = one[one < other], other[one < other]
    assert len(one) > 200
    shared = shapely.area(shapely.intersection(found.cells[one], found.cells[other]))
    of_nuclei = shapely.area(shapely.intersection(found.polygons[one], found.polygons[other]))
    assert (shared - of_nuclei).max() < 0.2
    ratio = found.measurements["Nucleus/Cell area ratio"]
    assert 0.3 < np.median(ratio) < 0.7
    assert (ratio <= 1).all()
    depth = {
        n: np.nanmedian(found.measurements[f"{n}: Hematoxylin: Mean"])
        for n in ("Nucleus", "Cytoplasm")
    }
    assert depth["Nucleus"] > 2 * depth["Cytoplasm"]


def test_many_workers_equal_one(model: Any, tmp_path: Path) -> None:
    made = []
    for count in (1, 6):  # the latter are three processes
        folder = copy_sample(tmp_path / str(count))
        with open_workers(count) as client:
            assert run(folder, model, client).problem is None
        made.append((folder / "patchcl/results/1" / NUCLEI).read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize(
    ("stage", "share"),
    [(Stage.SEGMENTING, 0.6), (Stage.SEGMENTING, 0.9), (Stage.GROWING_CELLS, 0.1)],
)
def test_stopped_and_resumed_equals_uninterrupted(
    stage: Stage, share: float, model: Any, client: Any, tiled: Path, tmp_path: Path
) -> None:
    folder = copy_sample(tmp_path / "project")

    def stop(progress: Progress) -> None:
        if progress.stage is stage and progress.done >= share * (progress.total or 0):
            raise ImageError("stopped")

    stopped = run(folder, model, client, tile_px=300, progress=stop)
    assert stopped.problem == "CMU-1-Small-Region.svs: stopped"
    assert not (folder / "patchcl/results").exists()
    found, grown = files_of_tiles(folder)
    assert len(grown) < len(found)
    counts: list[tuple[int, int | None]] = []

    def count(progress: Progress) -> None:
        if progress.stage is Stage.GROWING_CELLS:
            counts.append((progress.done, progress.total))

    resumed = run(folder, model, client, tile_px=300, progress=count)
    assert resumed.problem is None
    assert (len(found) < resumed.tiles) is (stage is Stage.SEGMENTING)
    assert resumed.tiles_resumed == len(found)  # no nucleus was segmented again
    assert counts[0][0] >= len(grown)
    assert counts[-1] == (resumed.tiles, resumed.tiles)
    for name in (NUCLEI, "nuclei-000.geojson.gz"):
        made = [(each / "patchcl/results/1" / name).read_bytes() for each in (folder, tiled)]
        assert made[0] == made[1]


@pytest.mark.parametrize("expand_um", [5, 0])
def test_pixels_of_a_stopped_run_do_not_outlive_one_with_other_settings(
    expand_um: float, model: Any, client: Any, tmp_path: Path
) -> None:
    folder = copy_sample(tmp_path / "project")

    def stop(progress: Progress) -> None:
        if progress.stage is Stage.SEGMENTING and progress.done == 5:
            raise ImageError("stopped")

    run(folder, model, client, tile_px=300, progress=stop)
    assert [*folder.rglob("*.rgb")]
    assert run(folder, model, client, tile_px=600, expand_um=expand_um).problem is None
    assert not [*folder.rglob("pixels-*")]


def files_of_tiles(folder: Path) -> list[list[Path]]:
    """The finished tiles of nuclei, and those of cells."""
    tiles = [*folder.glob("patchcl/runs/*/1/tiles/*.parquet")]
    have_cells = ["cell" in pq.read_schema(tile).names for tile in tiles]
    return [
        [tile for tile, has_cells in zip(tiles, have_cells, strict=True) if has_cells is wanted]
        for wanted in (False, True)
    ]


def test_cells_grow_while_nuclei_are_looked_for(
    model: Any, client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles whose neighbours are known do not wait for all others, nor do their pixels stay."""
    folder = copy_sample(tmp_path / "project")
    kept: list[int] = []

    def look(progress: Progress) -> None:
        if progress.stage is Stage.SEGMENTING:
            _, grown = files_of_tiles(folder)
            pixels = {tile.stem for tile in folder.glob("patchcl/runs/*/1/pixels-*/*.rgb")}
            assert not pixels & {tile.stem for tile in grown[:-1]}
            kept.append(len(grown))

    outcome = run(folder, model, client, tile_px=200, progress=look)
    assert outcome.problem is None
    assert outcome.tiles > 100
    assert 0 < kept[-1] < outcome.tiles


def test_other_expansions_share_the_tiles_of_nuclei(
    model: Any, client: Any, tmp_path: Path
) -> None:
    folder = copy_sample(tmp_path / "project")
    first = run(folder, model, client, expand_um=0)
    nuclei = cells(folder)
    assert nuclei.cells is None
    assert "Area µm^2" in nuclei.measurements
    plain = (folder / "patchcl/results/1" / NUCLEI).read_bytes()
    runs, areas = set(), []
    for expand_um in (1, 8):
        outcome = run(folder, model, client, expand_um=expand_um)
        assert outcome.tiles_resumed == first.tiles
        assert outcome.network_px == 0
        grown = cells(folder)
        assert grown.cells is not None
        assert list(grown.uuids) == list(nuclei.uuids)
        assert shapely.equals_exact(grown.polygons, nuclei.polygons, tolerance=0).all()
        for name in ("Area µm^2", "Detection probability"):
            np.testing.assert_array_equal(grown.of_nucleus(name), nuclei.of_nucleus(name))
        areas.append(shapely.area(grown.cells))
        lengths = shapely.length(grown.cells)
        result = json.loads((folder / "patchcl/results/1/result.json").read_text("utf-8"))
        assert result["object_type"] == "cell"
        assert result["config"]["cells"]["expand_um"] == expand_um
        runs.add(result["run"])
    assert len(runs) == 2
    # Contours are simplified by up to 0.2 px.
    assert (areas[0] < areas[1] + 0.2 * lengths).all()
    assert (areas[1] > 1.1 * areas[0]).sum() > 100  # others are at their limit, or touch
    figures = json.loads((folder / "patchcl/report/images/1/figures.json").read_text("utf-8"))
    assert figures["area"]["median"] == pytest.approx(
        np.median(nuclei.measurements["Area µm^2"]), rel=0.02
    )
    assert suggest(open_project(folder, "files"), open_project(folder, "files").images(), 1).rois

    run(folder, model, client, expand_um=0)
    assert (folder / "patchcl/results/1" / NUCLEI).read_bytes() == plain


def test_a_tile_of_nuclei_that_was_damaged_is_made_again(
    model: Any, client: Any, tmp_path: Path
) -> None:
    folder = copy_sample(tmp_path / "project")
    found = run(folder, model, client, expand_um=0)
    tile = next(folder.glob("patchcl/runs/*/1/tiles/*.parquet"))
    group = pq.read_metadata(tile).row_group(0)
    last = group.column(group.num_columns - 1)  # a measurement, which only workers read
    content = bytearray(tile.read_bytes())
    content[last.data_page_offset + last.total_compressed_size - 1] ^= 1
    tile.write_bytes(content)
    problem = run(folder, model, client).problem
    assert problem is not None
    assert problem.endswith(": run again")
    assert not tile.exists()
    outcome = run(folder, model, client)
    assert outcome.problem is None
    assert outcome.tiles_resumed == found.tiles - 1


FAILING: set[str] = set()


def segment_some(context: Any, tile: Any) -> Any:
    """Fails for some tiles."""
    if tile.name in FAILING:
        raise ImageError("damaged")
    return segment_tile(context, tile)


@pytest.mark.parametrize("is_stopped", [False, True])
def test_cells_beside_a_tile_that_failed_grow_again_once_it_is_there(
    is_stopped: bool,
    model: Any,
    client: Any,
    tiled: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the run that left it out was stopped when most cells had grown."""
    folder = copy_sample(tmp_path / "project")
    monkeypatch.setattr(image_tiles, "segment_tile", segment_some)
    FAILING.update({"00004-00003"})

    def stop(progress: Progress) -> None:
        if is_stopped and (progress.stage, progress.done) == (Stage.GROWING_CELLS, progress.total):
            raise ImageError("stopped")

    outcome = run(folder, model, client, tile_px=300, progress=stop)
    if is_stopped:
        assert outcome.problem is not None
    else:
        assert len(outcome.failed_tiles) == 1
        assert len(cells(folder)) < len(cells(tiled))
    FAILING.clear()
    outcome = run(folder, model, client, tile_px=300)
    assert not outcome.failed_tiles
    assert outcome.tiles_resumed == outcome.tiles - 1
    made = [(each / "patchcl/results/1" / NUCLEI).read_bytes() for each in (folder, tiled)]
    assert made[0] == made[1]


def test_a_tile_that_failed_costs_the_cells_beside_it_alone(
    model: Any, client: Any, tiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it fails again, and where a run without cells finds its nuclei."""
    folder = copy_sample(tmp_path / "project")
    monkeypatch.setattr(image_tiles, "segment_tile", segment_some)
    FAILING.update({"00004-00003"})
    beside = {f"{row:05}-{col:05}" for row in (3, 4, 5) for col in (2, 3, 4)}

    def grown() -> dict[str, int]:
        return {tile.stem: tile.stat().st_mtime_ns for tile in files_of_tiles(folder)[1]}

    run(folder, model, client, tile_px=300)
    first = grown()
    assert len(run(folder, model, client, tile_px=300).failed_tiles) == 1
    again = grown()
    assert {name for name in again if again[name] != first[name]} == beside - FAILING
    FAILING.clear()
    assert not run(folder, model, client, tile_px=300, expand_um=0).failed_tiles
    assert grown() == again
    assert not run(folder, model, client, tile_px=300).failed_tiles
    last = grown()
    assert {name for name in last if last[name] != again.get(name)} == beside
    made = [(each / "patchcl/results/1" / NUCLEI).read_bytes() for each in (folder, tiled)]
    assert made[0] == made[1]
