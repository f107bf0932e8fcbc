"""The three tests that nobody may delete, on the real slide: tiled equals untiled, many workers
equal one, resumed equals uninterrupted. And what a run leaves behind."""

import gzip
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
import torch
from conftest import QUICK, copy_sample
from PIL import Image, ImageDraw
from scipy import ndimage

from patchcl_qupath import pipeline
from patchcl_qupath.config import Config
from patchcl_qupath.datatypes import Box
from patchcl_qupath.execution.workers import open_workers
from patchcl_qupath.models import engines
from patchcl_qupath.models.engines import EngineKind
from patchcl_qupath.models.model import confidence
from patchcl_qupath.models.network import NucleusNetwork
from patchcl_qupath.progress import Stage
from patchcl_qupath.project import NewImage, init_project, open_project
from patchcl_qupath.segmentation import image_tiles
from patchcl_qupath.segmentation.measurements import PROBABILITY
from patchcl_qupath.segmentation.uncertainty import fields_of_view, predictive_entropy, step_px
from patchcl_qupath.slides.prepare import prepare
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.slides.stains import densities
from patchcl_qupath.storage.parquet import read_nuclei, read_uncertainty_grid

SAMPLE = Path(__file__).parent.parent / "sample_project"


def silent(progress):
    """No progress shown."""


@pytest.fixture
def project_folder(tmp_path):
    folder = tmp_path / "a project, with ümlauts"
    copy_sample(folder)
    return folder


def segment(folder, model, client, progress=silent, engine="auto", **slide_settings):
    """Segment a project's one image -> its result and its nuclei."""
    project = open_project(folder, "files")
    config = replace(QUICK, engine=engine, slide=replace(QUICK.slide, **slide_settings))
    run = pipeline.Run(
        project=project, model=model, config=config, workers=client, progress=progress
    )
    (result,) = run.images(project.images())
    assert result.problem is None
    assert not result.failed_tiles
    return result, read_nuclei(Path(result.results) / "nuclei.parquet")


def matched(these, those, iou):
    """How many of ``these`` have a partner in ``those`` with an IoU above ``iou``."""
    tree = shapely.STRtree(those)
    left, right = tree.query(these, predicate="intersects")
    shared = shapely.area(shapely.intersection(these[left], those[right]))
    union = shapely.area(these[left]) + shapely.area(those[right]) - shared
    return len(np.unique(left[shared / union > iou]))


@pytest.fixture(scope="session")
def whole(model, client, tmp_path_factory):
    folder = tmp_path_factory.mktemp("untiled") / "project"
    copy_sample(folder)
    result, nuclei = segment(folder, model, client, tile_px=10_000)
    assert result.tiles == 1
    return nuclei, read_uncertainty_grid(folder / "patchcl" / "surveys" / "1.parquet")


@pytest.fixture(scope="session")
def untiled(whole):
    return whole[0]


@pytest.mark.parametrize("tile_px", [300, 512, 1000])
def test_tiled_equals_untiled(model, client, project_folder, whole, tile_px):
    untiled, seen = whole
    result, nuclei = segment(project_folder, model, client, tile_px=tile_px)
    assert result.tiles > 4
    assert len(nuclei) == len(untiled) > 1000
    assert matched(nuclei.polygons, untiled.polygons, iou=0.99) == len(untiled)
    uncertainty = read_uncertainty_grid(project_folder / "patchcl" / "surveys" / "1.parquet")
    for name in ("rows", "cols", "points", "entropy", "nuclei"):
        np.testing.assert_array_equal(getattr(uncertainty, name), getattr(seen, name), name)


def test_the_survey_says_where_tissue_nuclei_and_doubts_are(model, client, project_folder, whole):
    nuclei, uncertainty = whole
    assert uncertainty.nuclei.sum() == len(nuclei)
    result, _ = segment(project_folder, model, client)
    mm2 = uncertainty.points.sum() * (step_px(0.5) * 0.0005) ** 2
    assert mm2 == pytest.approx(result.tissue_mm2, rel=0.02)

    (entry,) = open_project(SAMPLE).images()
    image = prepare(entry, QUICK)
    found = fields_of_view(uncertainty)
    assert found.size == pytest.approx((512, 512), rel=0.02)
    fullest = np.argmax(found.nuclei)
    x, y = found.x[fullest], found.y[fullest]
    box = shapely.box(x, y, x + found.size[0], y + found.size[1])
    assert found.nuclei[fullest] == pytest.approx(
        shapely.contains(box, shapely.centroid(nuclei.polygons)).sum(), rel=0.02
    )
    normaliser = image.slide.downsample
    row, col = round(y / normaliser[1]), round(x / normaliser[0])
    shape = image.slide.shape
    square = Box(row, col, min(row + 512, shape[0]), min(col + 512, shape[1]))
    outer = square.grow(128, shape)
    p = confidence(model, image.slide.read(outer), image.normaliser).nucleus[square.within(outer)]
    assert found.entropy[fullest] == pytest.approx(predictive_entropy(p).mean() / 1000, rel=0.1)


def test_engines_find_the_same_nuclei(model, client, project_folder, untiled):
    pytest.importorskip("openvino")
    _, exact = segment(project_folder, model, client, engine="torch")
    _, rounded = segment(project_folder, model, client, engine="openvino")
    # In 8 bits, where the CPU does these, a few more: the model was trained for moments. What is
    # so improbable that other runs leave it out may be found in 8 bits alone, or not there.
    for nuclei, least_probability, least in (
        (rounded, 0, 0.995),
        (untiled, Config().segment.min_probability, 0.99),
    ):
        for these, those in ((exact, nuclei), (nuclei, exact)):
            probable = these.polygons[these.measurements[PROBABILITY] >= least_probability]
            assert matched(probable, those.polygons, iou=0.5) >= least * len(probable) > 1000


@pytest.fixture
def sample_maps(model):
    """What an engine makes of a piece of the sample slide: nucleus and core (2, H, W)."""
    (entry,) = open_project(SAMPLE).images()
    image = prepare(entry, QUICK)
    rgb = image.slide.read(Box(400, 400, 1200, 1200))

    def maps(engine):
        found = confidence(model, rgb, image.normaliser, engine)
        return np.stack([found.nucleus, found.core])

    return maps


def test_openvino_in_float32_computes_what_torch_does(sample_maps):
    pytest.importorskip("openvino")
    exact, found = sample_maps(EngineKind.TORCH), sample_maps(EngineKind.OPENVINO_FLOAT32)
    assert np.abs(found - exact).max() < 1.01 / 255  # probabilities are multiples of 1/255


def test_openvino_in_bfloat16_errs_no_more_than_torch_does(sample_maps, monkeypatch):
    """By how much depends on the model: well trained ones err by 0.03 to 0.08 somewhere."""
    pytest.importorskip("openvino")
    if not engines.multiplies_bfloat16():
        pytest.skip("this CPU does not multiply bfloat16")
    exact, found = sample_maps(EngineKind.TORCH), sample_maps(EngineKind.OPENVINO_BFLOAT16)
    in_float32 = NucleusNetwork.probabilities

    def in_bfloat16(network, x):
        with torch.autocast("cpu", torch.bfloat16):
            return in_float32(network, x).float()

    monkeypatch.setattr(NucleusNetwork, "probabilities", in_bfloat16)
    expected = np.abs(sample_maps(EngineKind.TORCH) - exact)
    assert (expected.max(axis=(1, 2)) > 1 / 255).all()  # or it would still be in float32
    errors = np.abs(found - exact)
    assert (errors.max(axis=(1, 2)) < 1.5 * expected.max(axis=(1, 2))).all()
    assert (errors.mean(axis=(1, 2)) < 1.5 * expected.mean(axis=(1, 2))).all()


def test_many_workers_equal_one(model, project_folder, tmp_path):
    made = []
    for count in (1, 4, 6):  # the last are three processes
        folder = tmp_path / str(count)
        shutil.copytree(project_folder, folder)
        with open_workers(count) as client:
            result, nuclei = segment(folder, model, client)
        made.append((Path(result.results) / "nuclei.parquet").read_bytes())
    assert len(nuclei) > 1000
    assert made[0] == made[1] == made[2]


def test_a_cluster_of_processes_whose_workers_die_equals_threads(
    model, client, project_folder, tmp_path
):
    """All at once, so that nothing they hold is left."""
    from distributed import LocalCluster

    copy = tmp_path / "copy"
    shutil.copytree(project_folder, copy)
    _, expected = segment(copy, model, client, tile_px=300)
    with (
        LocalCluster(
            n_workers=2,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            silence_logs=logging.CRITICAL,
        ) as cluster,
        open_workers(scheduler=cluster.scheduler_address) as remote,
    ):
        alive = {*remote.client.run(os.getpid).values()}

        def kill_all(progress):
            while progress.stage is Stage.SEGMENTING and progress.done > 2 and alive:
                os.kill(alive.pop(), getattr(signal, "SIGKILL", signal.SIGTERM))

        _, nuclei = segment(project_folder, model, remote, kill_all, tile_px=300)
        assert not alive
    assert list(nuclei.uuids) == list(expected.uuids)


def test_killed_and_resumed_equals_uninterrupted(model, client, project_folder, tmp_path):
    whole = tmp_path / "uninterrupted"
    shutil.copytree(project_folder, whole)
    for folder in (whole, project_folder):
        model.save(folder / "patchcl" / "models", "patchcl")
    settings = tmp_path / "settings.toml"
    settings.write_text("[slide]\ntile_px = 300\n")
    options = ["--config", settings, "--workers", "1", "--json"]
    command = [sys.executable, "-m", "patchcl_qupath.cli", "run", *options]

    killed = subprocess.Popen([*command, project_folder], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(project_folder.glob("patchcl/runs/*/1/tiles/*.parquet"))) < 5:
        assert killed.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.wait()
    assert not (project_folder / "patchcl" / "results").exists()

    resumed = json.loads(subprocess.check_output([*command, project_folder]))["images"][0]
    direct = json.loads(subprocess.check_output([*command, whole]))["images"][0]
    assert 5 <= resumed["tiles_taken_over"] < resumed["tiles"]
    assert direct["tiles_taken_over"] == 0
    for name in ("nuclei-000.geojson.gz", "nuclei.parquet"):
        made = [
            (folder / "patchcl/results/1" / name).read_bytes() for folder in (project_folder, whole)
        ]
        assert made[0] == made[1]
    assert not [*project_folder.rglob("*.partial")]


def test_tiles_of_another_slide_are_not_taken_over(model, client, project_folder):
    first, _ = segment(project_folder, model, client)
    slide = project_folder / "CMU-1-Small-Region.svs"
    os.utime(slide, ns=(1, 1))
    second, _ = segment(project_folder, model, client)
    third, _ = segment(project_folder, model, client)
    assert (first.tiles_resumed, second.tiles_resumed) == (0, 0)
    assert third.tiles_resumed == third.tiles


@pytest.mark.parametrize("when", ["before its turn", "meanwhile"])
@pytest.mark.parametrize("what", ["another", "gone"])
def test_a_slide_that_changes_after_it_was_prepared_fails_in_one_line(
    when, what, model, client, project_folder, monkeypatch
):
    """Its tissue and stains were those of another file."""
    slide = project_folder / "CMU-1-Small-Region.svs"

    def change(*_):
        if what == "gone":
            slide.unlink(missing_ok=True)
        elif slide.stat().st_mtime_ns != 1:
            os.utime(slide, ns=(1, 1))

    if when == "meanwhile":
        monkeypatch.setattr(image_tiles, "map_tiles", lambda *_, **__: change() or {})
    else:
        monkeypatch.setattr(pipeline.Turn, "wait", change)
    project = open_project(project_folder, backend="files")
    run = pipeline.Run(
        project=project, model=model, config=QUICK, workers=client, progress=lambda _: None
    )
    (outcome,) = run.images(project.images())
    message = "changed while it was segmented" if what == "another" else "can no longer be read"
    assert message in outcome.problem
    assert "internal error" not in outcome.problem
    assert not project.layout.result("1").exists()


def test_no_tile_of_another_slide_is_kept(model, client, project_folder):
    """Where the slide is back at the next run, it would count as one of its own."""
    slide = project_folder / "CMU-1-Small-Region.svs"
    time_ns = slide.stat().st_mtime_ns

    def change(progress):
        if (progress.stage, progress.done) == (Stage.SEGMENTING, 2):
            os.utime(slide, ns=(1, 1))

    project = open_project(project_folder, backend="files")
    config = replace(QUICK, slide=replace(QUICK.slide, tile_px=300))
    run = pipeline.Run(project=project, model=model, config=config, workers=client, progress=change)
    (outcome,) = run.images(project.images())
    assert "changed while it was segmented" in outcome.problem
    os.utime(slide, ns=(time_ns, time_ns))
    assert len([*project.layout.tiles(run.id, "1").glob("tiles/*")]) == 2


def test_nuclei_lie_on_dark_blue_structures(untiled):
    """Hematoxylin inside each outline is above that of the ring around it, for nearly all."""
    (entry,) = open_project(SAMPLE).images()
    slide = Slide.open(entry)
    assert shapely.is_valid(untiled.polygons).all()
    frame = shapely.box(-0.2, -0.2, slide.size[0] + 0.2, slide.size[1] + 0.2)
    assert shapely.within(untiled.polygons, frame).all()

    hematoxylin = densities(slide.thumbnail(slide.mpp))["Hematoxylin"]
    drawing = Image.new("I", hematoxylin.shape[::-1])
    for label, polygon in enumerate(untiled.polygons, start=1):
        corners = shapely.get_coordinates(polygon) - 0.5  # to the middles of pixels
        ImageDraw.Draw(drawing).polygon(corners.ravel().tolist(), fill=label)
    labels = np.asarray(drawing)
    rings = np.where(labels == 0, ndimage.grey_dilation(labels, (11, 11)), 0)
    index = np.intersect1d(labels, rings)[1:]  # a few are hidden among their neighbours
    assert len(index) > 0.95 * len(untiled)
    inside = ndimage.mean(hematoxylin, labels, index)
    ring = ndimage.mean(hematoxylin, rings, index)
    assert (inside > ring).mean() > 0.97
    assert np.median(inside - ring) > 0.1
    # The measurement is of the same pixels, but for those that the drawn outline runs through.
    measured = untiled.measurements["Hematoxylin: Mean"][index - 1]
    assert np.corrcoef(measured, inside)[0, 1] > 0.9


def test_results_are_what_qupath_reads(model, client, project_folder):
    result, nuclei = segment(project_folder, model, client)
    folder = Path(result.results)
    about = json.loads((folder / "result.json").read_text())
    assert about["nuclei"] == result.nuclei == len(nuclei)
    features = []
    for name in about["files"]:
        features += json.loads(gzip.decompress((folder / name).read_bytes()))["features"]
    assert [f["id"] for f in features] == list(nuclei.uuids)
    assert len(set(nuclei.uuids)) == len(nuclei)
    for feature, polygon in zip(features[:50], nuclei.polygons, strict=False):
        assert feature["type"] == "Feature"
        assert shapely.from_geojson(json.dumps(feature["geometry"])).equals(polygon)
        properties = feature["properties"]
        assert properties["objectType"] == "annotation"
        assert properties["classification"]["name"] == "Nucleus"
        assert len(properties["classification"]["color"]) == 3
    area = nuclei.measurements["Area µm^2"]
    # Measured before corners were rounded to 0.01 px, which moves each by at most 0.0071 px.
    moved = shapely.length(nuclei.polygons) * 0.0071 * 0.499**2
    assert (np.abs(area - shapely.area(nuclei.polygons) * 0.499**2) <= moved).all()
    assert [f["properties"]["measurements"]["Area µm^2"] for f in features] == pytest.approx(
        area.tolist(), rel=1e-4
    )


def test_geoparquet_says_what_it_is(model, client, project_folder):
    result, _ = segment(project_folder, model, client)
    file = pq.ParquetFile(Path(result.results) / "nuclei.parquet")
    geo = json.loads(file.schema_arrow.metadata[b"geo"])
    assert geo["primary_column"] == "geometry"
    assert geo["columns"]["geometry"]["encoding"] == "WKB"


def test_a_run_again_gives_the_same_nuclei_the_same_ids(model, client, project_folder, untiled):
    _, nuclei = segment(project_folder, model, client, tile_px=700)
    same = len(set(nuclei.uuids) & set(untiled.uuids))
    assert same > 0.99 * len(untiled)


def fibres(side_px):
    """Tissue without a nucleus: pink fibres, here denser and there looser, and a camera's noise."""
    rng = np.random.default_rng(0)
    fine = ndimage.gaussian_filter(rng.normal(size=(side_px, side_px)), (1.5, 9))
    coarse = ndimage.gaussian_filter(rng.normal(size=(side_px, side_px)), 25)
    amount = np.clip(1 + 0.25 * fine / fine.std() + 0.3 * coarse / coarse.std(), 0.1, None)
    rgb = 245 * (np.array([225, 150, 185]) / 245) ** amount[..., None]
    return np.clip(rgb + rng.normal(0, 3, rgb.shape), 0, 255).astype(np.uint8)


def scanned(rgb, strength, white, zoom):
    """RGB as another stainer and scanner leave it: paler or darker, on other glass, finer."""
    density = -np.log(np.maximum(rgb, 1) / 245)
    pixels = np.clip(np.array(white) * np.exp(-strength * density), 0, 255).astype(np.uint8)
    picture = Image.fromarray(pixels)
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.BICUBIC)


def test_other_scanners_and_stains_in_one_project_show_the_same_nuclei(model, client, tmp_path):
    (entry,) = open_project(SAMPLE).images()
    rgb = Slide.open(entry).read(Box(1100, 500, 1900, 1300))
    images = []
    looks = [(1, (245, 245, 245), 1), (0.65, (250, 242, 235), 2), (1.4, (235, 238, 250), 1)]
    for number, (strength, white, zoom) in enumerate(looks):
        picture = scanned(rgb, strength, white, zoom)
        picture.save(tmp_path / f"{number}.png")
        images.append(NewImage(tmp_path / f"{number}.png", [picture.size], (0.5 / zoom,) * 2))
    project = open_project(init_project(tmp_path / "p", images), "files")
    results = pipeline.Run(
        project=project, model=model, config=QUICK, workers=client, progress=silent
    ).images(project.images())
    as_it_was, pale, dark = (
        read_nuclei(Path(result.results) / "nuclei.parquet").polygons for result in results
    )
    pale = shapely.transform(pale, lambda xy: xy / 2)
    assert len(as_it_was) > 300
    for found in (pale, dark):
        assert matched(found, as_it_was, iou=0.5) > 0.85 * len(found)
        assert matched(as_it_was, found, iou=0.5) > 0.85 * len(as_it_was)


def red_cells(side):
    """Blood without a white cell: discs on pale plasma, RGB (side, side, 3) at 0.5 um/px."""
    rng = np.random.default_rng(1)
    centres = rng.uniform(0, side, (side * side // 160, 2))
    near = ndimage.distance_transform_edt(_without(centres, side)) < 7
    amount = ndimage.gaussian_filter(near.astype(float), 0.7)[..., None]
    rgb = (
        (1 - amount) * (240, 232, 236) + amount * (200, 60, 70) + rng.normal(0, 3, (side, side, 3))
    )
    return np.clip(rgb, 0, 255).astype(np.uint8)


def _without(points, side):
    mask = np.ones((side, side), bool)
    mask[tuple(points.astype(int).T)] = False
    return mask


@pytest.mark.parametrize("tissue", [fibres, red_cells])
def test_tissue_without_nuclei_stays_nearly_empty(tissue, model, client, tmp_path):
    """A slide of its own: what its faintest stain is scaled to must not look like nuclei."""
    path = tmp_path / "tissue.png"
    Image.fromarray(tissue(1200)).save(path)
    image = NewImage(path, [(1200, 1200)], (0.5, 0.5))
    project = open_project(init_project(tmp_path / "p", [image]), "files")
    run = pipeline.Run(project=project, model=model, config=QUICK, workers=client, progress=silent)
    (result,) = run.images(project.images())
    assert result.problem is None
    assert result.tissue_mm2 > 0.3
    assert result.nuclei <= 20 * result.tissue_mm2
