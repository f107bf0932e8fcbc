"""The report: its figures are those of the nuclei; a real browser shows it as it should be."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import shapely
import slides
from click.testing import CliRunner
from conftest import copy_sample
from PIL import Image
from results import RESULT, result_of

from patchcl_qupath.cli import main
from patchcl_qupath.config import Config, to_dict
from patchcl_qupath.datatypes import Box, ImageEntry, Nuclei, Tile, UncertaintyGrid
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.project import NewImage, init_project, open_project
from patchcl_qupath.report import page as report_page
from patchcl_qupath.report.charts import Mark, curves
from patchcl_qupath.report.figures import CONTOUR_UNITS, _RunningHistogram, write_figures
from patchcl_qupath.report.found import find_image, find_models, find_runs
from patchcl_qupath.report.views import RunView
from patchcl_qupath.segmentation.segmented_image import SegmentedImage
from patchcl_qupath.segmentation.uncertainty import merge_grids, sampling_points
from patchcl_qupath.slides.prepare import PreparedImage
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.slides.stain_vectors import H_E
from patchcl_qupath.status import image_status
from patchcl_qupath.storage.parquet import read_nuclei
from patchcl_qupath.storage.records import file_signature

SAMPLE = Path(__file__).parent.parent / "sample_project"
HOSTILE = """<script>document.title = "taken"</script>"'&.png"""
CLASS = "<b>Nucleus</b>"
PAGE_BYTES, IMAGE_BYTES = 170_000, 150_000  # at most, of a page, and for each image in it


def call(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def project(model, tmp_path_factory):
    """A project of a large and a small image and a broken one, after a run -> folder, outcome."""
    files = tmp_path_factory.mktemp("images")
    (entry,) = open_project(SAMPLE).images()
    slide, images = Slide.open(entry), []
    for name, box in {
        "large": Box(900, 500, 1600, 1300),
        "small": Box(900, 800, 1200, 1100),
    }.items():
        picture = Image.fromarray(slide.read(box))
        picture.save(files / f"{name}.png")
        images.append(NewImage(files / f"{name}.png", [picture.size], (0.5, 0.5)))
    folder = files / "project"
    path = init_project(folder, images)
    (files / "broken.png").write_bytes(b"no picture")
    content = json.loads(path.read_text("utf-8"))
    content["images"][1]["imageName"] = HOSTILE
    broken = json.loads(json.dumps(content["images"][0]))
    broken |= {"entryID": 99, "imageName": "broken.png"}
    broken["serverBuilder"]["uri"] = (files / "broken.png").as_uri()
    content["images"].append(broken)
    path.write_text(json.dumps(content), "utf-8")
    model.save(folder / "patchcl" / "models", "patchcl")
    ran = call("run", folder, "--json", "--class-name", CLASS)
    assert ran.exit_code == 1  # of the broken image
    return folder, json.loads(ran.stdout)


@pytest.fixture
def copy(project, tmp_path):
    """A copy to change."""
    return Path(shutil.copytree(project[0], tmp_path / "copy"))


def index(folder):
    return folder / "patchcl" / "report" / "index.html"


def test_figures_are_those_of_the_nuclei(project):
    folder, outcome = project
    for image in outcome["images"][:2]:
        nuclei = read_nuclei(Path(image["results"]) / "nuclei.parquet")
        assert len(nuclei) > 20
        shown = folder / "patchcl" / "report" / "images" / image["id"]
        figures = json.loads((shown / "figures.json").read_text())
        area = nuclei.measurements["Area µm^2"]
        stain = nuclei.measurements["Hematoxylin: Mean"]
        assert figures["area"]["median"] == pytest.approx(np.median(area), abs=0.5)
        assert figures["stain"]["median"] == pytest.approx(np.median(stain), abs=0.02)
        bars = np.histogram(np.minimum(area, 299.9), 30, (0, 300))[0]
        assert figures["area"]["counts"] == bars.tolist()
        assert sum(figures["stain"]["counts"]) == len(nuclei)
        certain = nuclei.measurements["Detection probability"].mean()
        assert figures["probability"] == pytest.approx(certain, rel=1e-5)

        page = index(folder).read_text("utf-8")
        cells = re.search(rf'href="#image-{image["id"]}".*?</tr>', page, re.DOTALL).group()
        values = [float(v) for v in re.findall(r'class="number" data-value="([^"]+)"', cells)]
        density = len(nuclei) / image["tissue_mm2"]
        expected = [image["tissue_mm2"], len(nuclei), density, figures["area"]["median"]]
        assert "imported" not in image  # the nuclei wait to be imported: neither added nor left out
        assert values == pytest.approx([*expected, certain, image["seconds"]], rel=1e-5)


@pytest.mark.parametrize("middle", [40, 290, 350])
def test_a_median_is_that_of_the_nuclei_also_beyond_the_bars(middle):
    values = np.random.default_rng(0).normal(middle, 20, 5000).astype(np.float32)
    histogram = _RunningHistogram(highest=300, bars=30, fine=400)
    for part in np.array_split(values, 7):
        histogram.add(part)
    found = histogram.record()
    assert found.median == pytest.approx(np.median(values), abs=0.025)
    assert found.counts == np.histogram(np.clip(values, 0, 300), 30, (0, 300))[0].tolist()


def test_a_median_below_zero_is_no_zero():
    """Deconvolution has nuclei with less than no hematoxylin, which are in the first bar."""
    values = np.random.default_rng(0).normal(-0.05, 0.02, 5000).astype(np.float32)
    histogram = _RunningHistogram(highest=1.5, bars=30, fine=50)
    histogram.add(values)
    found = histogram.record()
    assert found.median == pytest.approx(np.median(values), abs=0.001)
    assert found.counts == [5000] + [0] * 29


@pytest.mark.parametrize(
    ("values", "median"),
    [
        ([20, 60], 40),
        ([10, 12, 80, 90], 46),
        ([10, 12, 80], 12),
        ([30, 30, 30], 30),
        ([30, 30, 30, 90], 30),
        ([7], 7),
        ([], None),
    ],
)
def test_a_median_of_few_nuclei(values, median):
    """Of an even number, it is halfway between the middle two."""
    histogram = _RunningHistogram(highest=300, bars=30, fine=400)
    histogram.add(np.array(values, np.float32))
    found = histogram.record().median
    assert found == (None if median is None else pytest.approx(median, abs=0.025))


def test_fields_of_view_show_the_nuclei_in_them(project):
    folder, outcome = project
    image = outcome["images"][0]
    nuclei = read_nuclei(Path(image["results"]) / "nuclei.parquet")
    middles = shapely.centroid(nuclei.polygons)
    shown = folder / "patchcl" / "report" / "images" / image["id"]
    fields = json.loads((shown / "figures.json").read_text())["fields"]
    assert {field["kind"] for field in fields} == {"densest", "most uncertain", "typical"}
    assert len({(field["x"], field["y"]) for field in fields}) == len(fields)
    assert fields[0]["density"] == max(field["density"] for field in fields)
    assert max(field["doubt"] for field in fields) in (fields[0]["doubt"], fields[1]["doubt"])
    with Image.open(folder.parent / "large.png") as picture:
        whole = np.asarray(picture.convert("RGB"), dtype=float)
    for field in fields:
        x, y, width, height = (field[key] for key in ("x", "y", "width", "height"))
        box = shapely.box(x, y, x + width, y + height)
        touching = nuclei.polygons[shapely.intersects(box, nuclei.polygons)]
        assert len(field["outlines"]) == len(touching)
        drawn = [
            shapely.Polygon(np.reshape(o, (-1, 2)) / CONTOUR_UNITS + (x, y))
            for o in field["outlines"]
        ]
        assert shapely.area(drawn).sum() == pytest.approx(shapely.area(touching).sum(), rel=0.05)
        assert shapely.area(shapely.intersection(drawn, touching)).sum() > 0.9 * sum(
            shapely.area(touching)
        )
        assert field["nuclei"] == shapely.contains(box, middles).sum() > 0
        with Image.open(shown / field["picture"]) as picture:
            pixels = np.asarray(picture, dtype=float)
        assert np.abs(pixels - whole[y : y + height, x : x + width]).mean() < 10


def all_tissue(folder: Path, width: int, height: int) -> SegmentedImage:
    """A slide of 0.5 µm/px, all tissue, with a nucleus in the middle of each square of 20 px.

    Its entropy is 0.1 bit more in each bin of the uncertainty grid than in the one left of it.
    """
    path = slides.write_tiff(folder / "a.tif", slides.scene(width, height, (0.5, 0.5)))
    slide = Slide.open(ImageEntry(id="1", name="a.tif", path=path, mpp=(0.5, 0.5)))
    image = PreparedImage(
        id="1",
        slide=slide,
        file=file_signature(path),
        tissue=np.ones((-(-height // 16), -(-width // 16)), dtype=bool),
        tissue_px=16,
        normaliser=None,
        region=None,
        stains=H_E,
    )
    whole = Box(0, 0, height, width)
    rows, cols = sampling_points(whole, slide.mpp)
    of_points = UncertaintyGrid(
        bin_size=(128, 128),
        rows=rows // 128,
        cols=cols // 128,
        points=np.ones_like(rows),
        entropy=cols // 128 * 100,
        nuclei=np.zeros_like(rows),
    )
    x, y = (each.ravel() for each in np.meshgrid(range(10, width, 20), range(10, height, 20)))
    of_nuclei = UncertaintyGrid(
        bin_size=(128, 128),
        rows=y // 128,
        cols=x // 128,
        points=np.zeros_like(x),
        entropy=np.zeros_like(x),
        nuclei=np.ones_like(x),
    )
    names = ("Area µm^2", "Hematoxylin: Mean", "Detection probability")
    nuclei = Nuclei(
        np.asarray(shapely.buffer(shapely.points(x, y), 4)),
        {name: np.ones(len(x), np.float32) for name in names},
        np.array([f"{number:036}" for number in range(len(x))]),
    )
    tile = Tile(row=0, col=0, read=whole, write=whole)
    store = TileStore.open(folder / "tiles", {})
    store.write(tile, store.encode(nuclei, merge_grids([of_points, of_nuclei])))
    return SegmentedImage(image=image, store=store, tiles=(tile,))


@pytest.mark.parametrize(("width", "height"), [(384, 256), (390, 250), (640, 333), (200, 100)])
def test_a_field_of_view_at_an_edge_has_the_numbers_of_what_it_shows(tmp_path, width, height):
    segmented = all_tissue(tmp_path, width, height)
    write_figures(tmp_path / "figures", segmented, result_of(segmented.count))
    fields = json.loads((tmp_path / "figures" / "figures.json").read_text())["fields"]
    assert any(min(field["width"], field["height"]) < 256 for field in fields)
    x, y = np.meshgrid(range(10, width, 20), range(10, height, 20))
    for field in fields:
        col, row, cols, rows = (field[key] for key in ("x", "y", "width", "height"))
        assert col + cols <= width
        assert row + rows <= height
        with Image.open(tmp_path / "figures" / field["picture"]) as picture:
            assert picture.size == (cols, rows)
        inside = (x >= col) & (x < col + cols) & (y >= row) & (y < row + rows)
        assert field["nuclei"] == inside.sum() > 0
        assert field["density"] == round(inside.sum() / (cols * rows * 0.5**2 / 1e6))
        _, seen = sampling_points(Box(row, col, row + rows, col + cols), 0.5)
        assert field["doubt"] == pytest.approx((seen // 128).mean() / 10, abs=0.001)


def test_the_overview_has_the_tissue_and_the_density_lies_on_it(project):
    folder, outcome = project
    shown = folder / "patchcl" / "report" / "images" / outcome["images"][0]["id"]
    with Image.open(shown / "overview.jpg") as one, Image.open(shown / "density.png") as other:
        assert one.size == other.size
        assert max(one.size) <= 400
        seen = np.asarray(other.convert("RGBA"))
    nuclei = read_nuclei(Path(outcome["images"][0]["results"]) / "nuclei.parquet")
    x, y = shapely.get_coordinates(shapely.centroid(nuclei.polygons)).T / 2  # 2 px for each shown
    assert (seen[y.astype(int), x.astype(int), 3] == 255).all()


def test_equal_files_give_an_equal_page(project):
    folder, outcome = project
    page = index(folder)
    assert Path(outcome["report"]) == page
    before = page.read_bytes()
    page.unlink()
    said = call("report", folder)
    assert said.exit_code == 0
    assert str(page) in said.output
    assert page.read_bytes() == before
    assert json.loads(call("report", folder, "--json").stdout) == {"report": str(page)}


def test_a_page_is_light(project):
    folder, outcome = project
    assert len(outcome["images"]) == 3
    assert index(folder).stat().st_size < PAGE_BYTES + 2 * IMAGE_BYTES


def test_a_project_without_results_is_refused(tmp_path):
    folder = copy_sample(tmp_path / "project")
    said = call("report", folder)
    assert said.exit_code == 1
    assert "patchcl-qp run" in said.output
    assert not (folder / "patchcl").exists()


def test_images_removed_or_still_to_do_say_so(copy):
    ids = [entry.id for entry in open_project(copy).images()]
    assert call("remove", copy, "--image", ids[0]).exit_code == 0
    for part in ("results", "report/images"):
        shutil.rmtree(copy / "patchcl" / part / ids[1])
    (copy / "patchcl" / "report" / "outcomes" / f"{ids[1]}.json").unlink()
    assert call("report", copy).exit_code == 0
    page = index(copy).read_text("utf-8")
    assert "its nuclei were removed" in page
    assert "not done yet" in page
    assert "broken.png cannot be read" in page
    assert "<b>0 of 3</b> images" in page


def test_an_image_without_nuclei_has_no_notes_on_them(copy):
    """As QuPath's process leaves it that removed them; or a person, to have room."""
    (first, second, _), output = open_project(copy).images(), copy / "patchcl"
    for entry in (first, second):
        path = output / "report" / "outcomes" / f"{entry.id}.json"
        content = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps(content | {"note": "written as detections"}), "utf-8")
    shutil.rmtree(output / "results" / first.id)
    project = open_project(copy)
    assert find_image(project, first).warnings == ("not done yet",)
    assert "written as detections" in find_image(project, second).warnings
    assert call("remove", copy, "--image", second.id).exit_code == 0
    assert find_image(project, second).warnings == ("its nuclei were removed",)


def test_training_that_is_shown_is_that_of_the_weights(copy, model):
    """Of weights that were copied alone, the record beside them is of another model; so it is where
    a training was killed as it saved one."""
    project, models = open_project(copy), copy / "patchcl" / "models"
    entry = project.images()[0]
    images = [find_image(project, entry) for entry in project.images()]
    users = [images[0].name, HOSTILE]

    def shown():
        is_retrained = "model retrained" in image_status(project, entry).changed
        found = find_models(project, images)
        return [(each.record.digest, each.images) for each in found], is_retrained

    assert shown() == ([(model.digest, users)], False)
    weights, record = models / "patchcl.pt", models / "patchcl.json"
    other = replace(model, threshold=0.25)  # with a digest of its own
    written = other.save(copy / "elsewhere", "patchcl")
    shutil.copy(written, weights)
    assert shown() == ([(other.digest, [])], True)
    model.save(models, "patchcl")
    shutil.copy(written.with_suffix(".json"), record)
    assert shown() == ([(model.digest, users)], False)
    weights.write_bytes(b"damaged")
    assert shown() == ([], True)
    weights.unlink()
    model.save(models, "patchcl")
    weights.unlink()
    assert shown()[0] == [(model.digest, users)]


def test_damaged_files_leave_a_page(copy):
    output, (first, second, _) = copy / "patchcl", open_project(copy).images()
    path = output / "report" / "images" / first.id / "figures.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fields": [1], "area": "<i>"}))
    (output / "report" / "images" / second.id / "overview.jpg").unlink()
    (output / "report" / "outcomes" / f"{first.id}.json").write_text("{")
    facts = json.loads((output / "models" / "patchcl.json").read_text())
    facts["training"]["patchcl"]["channels"]["crop"] = '"><script>'
    (output / "models" / "patchcl.json").write_text(json.dumps(facts))
    assert call("report", copy).exit_code == 0
    page = index(copy).read_text("utf-8")
    assert page.count("are damaged or of another version") == 3
    assert page.count("<script>") == 1
    assert "<i>" not in page


def test_texts_of_files_are_escaped(copy):
    output, (first, second, _) = copy / "patchcl", open_project(copy).images()
    hostile, expected = '<i title="1">&', "&lt;i title=&#34;1&#34;&gt;&amp;"

    def change(path, **changes):
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")

    path = output / "report" / "images" / first.id / "figures.json"
    figures = json.loads(path.read_text("utf-8"))
    shown = [field | {"kind": hostile} for field in figures["fields"]]
    change(path, fields=shown, stain=figures["stain"] | {"name": hostile})
    failed = {"x": 0, "y": 0, "width": 9, "height": 9, "reason": hostile}
    change(output / "results" / second.id / "result.json", engine=hostile, holes=[failed])
    change(output / "results" / first.id / "result.json", engine=hostile, within=[hostile])
    change(output / "report" / "outcomes" / f"{second.id}.json", note=hostile)
    for run in output.glob("runs/*/run.json"):
        change(run, versions={hostile: hostile})
    (output / "models" / "patchcl.json").rename(output / "models" / "a &lt; b &amp; c.json")
    assert call("report", copy).exit_code == 0
    page = index(copy).read_text("utf-8")
    assert "damaged" not in page
    assert "<i title" not in page
    assert page.count(expected) >= 2 * len(shown) + 8
    assert "<h3>a &amp;lt; b &amp;amp; c</h3>" in page


def test_each_image_has_the_settings_of_its_nuclei(folder: Path) -> None:
    """Of one run, whose tiles do not depend on what nuclei become in QuPath."""
    project = open_project(folder)
    found = find_image(project, project.images()[0])
    other = replace(Config(), result=replace(Config().result, class_name="Tumor cell"))
    images = [
        replace(found, name=name, result=msgspec.structs.replace(RESULT, config=to_dict(config)))
        for name, config in (("a", Config()), ("b", other), ("c", Config()))
    ]
    runs = find_runs(project, images)
    assert {run.id for run in runs} == {"r"}
    shown = [
        (run.provenance["images"], json.loads(run.settings)["result"]["class_name"])
        for run in map(RunView.of, runs)
    ]
    assert shown == [("a, c", "Nucleus"), ("b", "Tumor cell")]


def test_templates_escape_all_that_they_are_given():
    """Only the program's own style sheet and script, ``page.py`` says, are left as they are."""
    report = Path(report_page.__file__).parent
    templates = [*(report / "templates").glob("*.j2")]
    assert len(templates) > 4
    for template in templates:
        assert not re.search(r"\|\s*safe|autoescape|Markup", template.read_text("utf-8"))
    sources = {path.name: path.read_text("utf-8").count("Markup(") for path in report.glob("*.py")}
    assert {name: count for name, count in sources.items() if count} == {"page.py": 1}


def test_charts_leave_out_what_is_not_finite():
    nan, inf = float("nan"), float("inf")
    assert curves("key", "a title", {"loss": [nan, inf]}) is None
    chart = curves("key", "a title", {"a": [3.0, nan, 1.0], "b": [2.0]}, [Mark(2, "converged")])
    assert chart is not None
    assert chart.legend == ("a", "b")
    assert chart.words.startswith("a: 3 at the beginning, 1 at the end. b: 2 ")
    assert chart.words.endswith("Converged.")
    lines = [path.d for path in chart.paths if path.kind.startswith("line")]
    assert [line.count("L") for line in lines] == [1, 0]


def test_a_page_that_cannot_be_written_costs_no_results(copy):
    index(copy).unlink()
    index(copy).mkdir()  # no file can take its place
    ran = call("run", copy, "--image", HOSTILE, "--json")
    assert ran.exit_code == 0
    outcome = json.loads(ran.stdout)
    assert outcome["report"] is None
    assert outcome["images"][0]["nuclei"] > 20
    assert "No report: cannot write" in ran.stderr


def test_the_page_shows_how_the_model_was_trained(project, model):
    log = model.training.patchcl
    channels = log.channels
    assert len(channels.confidences) == len(log.hematoxylin_correlation) == 4
    pictures = [
        Image.open(io.BytesIO(base64.b64decode(text)))
        for text in (channels.crop, *channels.confidences)
    ]
    assert {picture.size for picture in pictures} == {(192, 192)}
    page = index(project[0]).read_text("utf-8")
    assert f"ended at step {log.steps}" in page
    assert f"Channel {channels.chosen + 1} was chosen" in page
    assert "Separation of positive and negative patches" in page


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    driver = shutil.which("chromedriver")
    if not (driver and shutil.which("chromium")):
        pytest.skip("needs chromium and chromedriver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    quiet = ["quic", "background-networking", "component-update", "sync", "gpu"]
    for argument in [
        "headless=new",
        "no-sandbox",
        "no-first-run",
        *(f"disable-{q}" for q in quiet),
    ]:
        options.add_argument(f"--{argument}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('chromium')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=Service(driver))
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium, project):
    """A browser that has just opened the page, as wide as a desk's."""
    chromium.get_log("browser"), chromium.get_log("performance")
    width(chromium, 1280)
    chromium.get("about:blank")
    chromium.get(index(project[0]).as_uri())
    return chromium


def width(browser, px):
    screen = {"width": px, "height": 800, "deviceScaleFactor": 1, "mobile": px < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)


def ask(browser, script):
    return browser.execute_script(f"return {script}")


def all_of(browser, selector, what):
    return ask(browser, f"[...document.querySelectorAll({json.dumps(selector)})].map(e => {what})")


def test_it_loads_without_a_complaint_or_a_request_outside(browser, project):
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    browser.execute_script("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    ask(browser, "Promise.all([...document.images].map(i => i.decode()))")
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    page = index(project[0]).as_uri()  # the browser loads pages of its own
    urls = [asked["request"]["url"] for asked in sent if asked["documentURL"] == page]
    assert {url for url in urls if not url.startswith("data:")} == {page}
    assert all(all_of(browser, "img", "e.naturalWidth > 0"))


def test_it_shows_names_as_they_are(browser):
    assert browser.title == "project: nuclei"
    assert all_of(browser, "tbody th", "e.textContent") == ["large.png", HOSTILE, "broken.png"]
    assert ask(browser, "document.scripts.length") == 1
    assert CLASS in ask(browser, "document.querySelector('footer pre').textContent")
    assert "broken.png" in all_of(browser, "tbody tr:last-child td.warnings", "e.textContent")[0]


def test_columns_sort_both_ways_by_mouse_and_keyboard(browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def state(column):
        names = all_of(browser, "tbody th", "e.textContent")
        return [name[:5] for name in names], all_of(browser, "thead th", "e.ariaSort")[column]

    buttons = browser.find_elements(By.CSS_SELECTOR, "thead button")
    nuclei = next(i for i, button in enumerate(buttons) if button.text == "found")
    assert state(nuclei) == (["large", HOSTILE[:5], "broke"], "none")
    buttons[nuclei].click()
    assert state(nuclei) == ([HOSTILE[:5], "large", "broke"], "ascending")
    buttons[nuclei].send_keys(Keys.ENTER)
    assert state(nuclei) == (["large", HOSTILE[:5], "broke"], "descending")
    assert "found, descending" in ask(browser, "document.getElementById('sorted').textContent")
    buttons[0].send_keys(Keys.SPACE)
    assert state(0)[1] == "ascending"
    assert state(0)[0][-2:] == ["broke", "large"]
    assert state(nuclei)[1] == "none"


def test_it_fits_a_phone(browser):
    width(browser, 360)
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert ask(browser, "innerWidth") == 360
    assert ask(browser, "document.documentElement.scrollWidth") <= 360
    assert ask(browser, "document.body.scrollWidth") <= 360
    scroll = "document.querySelector('.scroll')"
    assert ask(browser, f"{scroll}.scrollWidth > {scroll}.clientWidth")  # in a box of its own


def test_those_who_do_not_see_it_can_read_it(browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    assert ask(browser, "document.documentElement.lang") == "en"
    alts = all_of(browser, "img", "e.alt")
    assert len(alts) > 10
    assert all(alts)
    assert len(all_of(browser, "svg:not([aria-hidden]) title", "e.textContent")) == len(
        all_of(browser, "svg:not([aria-hidden])", "1")
    )
    words = all_of(browser, "svg desc", "e.textContent")
    assert any("Median" in text for text in words)
    ids = all_of(browser, "[id]", "e.id")
    assert len(ids) == len(set(ids))
    levels = all_of(browser, "h1, h2, h3, h4", "Number(e.tagName[1])")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(np.diff(levels)) <= 1
    assert all_of(browser, "header, main, footer", "e.tagName") == ["HEADER", "MAIN", "FOOTER"]
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    assert ask(browser, "document.activeElement.className") == "skip"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert ask(browser, "document.activeElement.id") == "main"


def test_images_open_from_the_table_and_contours_can_be_hidden(browser):
    from selenium.webdriver.common.by import By

    assert all(all_of(browser, "details.image", "e.open"))
    contours = browser.find_element(By.CSS_SELECTOR, ".fov svg")
    assert contours.is_displayed()
    browser.find_element(By.ID, "contours").click()
    assert not contours.is_displayed()
    browser.find_element(By.ID, "all").click()
    assert not any(all_of(browser, "details.image", "e.open"))
    browser.find_element(By.CSS_SELECTOR, "tbody tr:nth-child(2) a").click()
    assert all_of(browser, "details.image", "e.open") == [False, True, False]
