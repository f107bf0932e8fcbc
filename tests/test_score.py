"""`patchcl-qp score`: ground truth of every kind is read, and errors give advice."""

from __future__ import annotations

import errno
import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import shapely
import tifffile
from click.testing import CliRunner
from msgspec import structs
from PIL import Image
from results import result_of

from patchcl_qupath.cli import main
from patchcl_qupath.config import Config
from patchcl_qupath.datatypes import Box, FailedTile, ImageEntry, Nuclei
from patchcl_qupath.errors import GroundTruthError
from patchcl_qupath.evaluation import pictures
from patchcl_qupath.evaluation.ground_truth import ground_truth_files, read_ground_truth
from patchcl_qupath.evaluation.metrics import Kind
from patchcl_qupath.evaluation.score import BINS, _Compared, _reliability
from patchcl_qupath.project import NewImage, init_project, open_project
from patchcl_qupath.storage.records import RegionRecord

WIDTH, HEIGHT = 60, 40
# Level 0; the second is in two pieces, the third has a hole.
LABELS = np.zeros((HEIGHT, WIDTH), dtype=np.int32)
LABELS[4:14, 6:18] = 3
LABELS[20:30, 40:48] = LABELS[20:30, 50:52] = 40_000
LABELS[24:36, 10:26] = 70
LABELS[28:32, 14:20] = 0
NUCLEI = np.array(
    [
        shapely.box(6, 4, 18, 14),
        shapely.box(10, 24, 26, 36) - shapely.box(14, 28, 20, 32),
        shapely.box(40, 20, 48, 30) | shapely.box(50, 20, 52, 30),
    ]
)
PERFECT = {"dice": 1, "aji": 1, "pq": 1, "f1": 1}
ENTRY = ImageEntry("1", "a.svs", Path("a.svs"), size=(WIDTH, HEIGHT))


def call(*arguments: object) -> Any:
    return CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)


def feature(geometry: shapely.Geometry, **more: Any) -> dict[str, Any]:
    """An object as QuPath exports it."""
    area = json.loads(shapely.to_geojson(geometry))
    return {"type": "Feature", "geometry": area, "properties": {"objectType": "cell"}, **more}


def write_geojson(path: Path, polygons: Any = NUCLEI) -> None:
    features = [feature(polygon) for polygon in polygons]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), "utf-8")


def tables(printed: str) -> list[list[list[str]]]:
    """The cells of each row of each table, without its head."""
    found: list[list[list[str]]] = []
    for line in printed.splitlines():
        if line.startswith("┏"):
            found.append([])
        if line.startswith("│"):
            found[-1].append([cell.strip() for cell in line.split("│")[1:-1]])
    return found


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of two images; the first has the nuclei of a run."""
    folder = tmp_path / "project"
    folder.mkdir()
    entries = []
    for number, name in enumerate(["a.svs", "b.svs"], start=1):
        metadata = {"width": WIDTH, "height": HEIGHT}
        uri = (tmp_path / name).as_uri()
        builder = {"builderType": "uri", "uri": uri, "args": [], "metadata": metadata}
        entries.append({"serverBuilder": builder, "entryID": number, "imageName": name})
    (folder / "project.qpproj").write_text(json.dumps({"version": "0.5.1", "images": entries}))
    write_nuclei(folder, 0, NUCLEI)
    return folder


def write_nuclei(folder: Path, image: int, polygons: Any, **changes: Any) -> Path:
    """Write nuclei as a run does."""
    project = open_project(folder, backend="files")
    entry = project.images()[image]
    area = shapely.area(polygons).astype(np.float32)
    probability = np.linspace(0.95, 0.41, len(area), dtype=np.float32)
    nuclei = Nuclei(polygons, {"Area µm^2": area, "Detection probability": probability})
    project.write(entry, [nuclei], Config().result, result_of(len(polygons), **changes))
    return project.layout.results(entry.id)


@pytest.fixture
def ground_truth(tmp_path: Path) -> Path:
    folder = tmp_path / "truth"
    folder.mkdir()
    return folder


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.png": lambda path: Image.fromarray(LABELS.astype(np.uint16)).save(path),
    "a.svs.tif": lambda path: tifffile.imwrite(path, LABELS.astype(np.uint16)),
    "a.TIFF": lambda path: tifffile.imwrite(path, LABELS),
    "a.npy": lambda path: np.save(path, LABELS.astype(np.int64)),
    "a.svs.npy": lambda path: np.save(path, LABELS.repeat(3, axis=0).repeat(3, axis=1)),
    "a.svs.png": lambda path: Image.fromarray(LABELS[::2, ::2].astype(np.uint16)).save(path),
    "a.geojson": write_geojson,
    "a.svs.geojson": lambda path: path.write_text(json.dumps([feature(n) for n in NUCLEI])),
    "a.geojson.gz": lambda path: path.write_bytes(
        gzip.compress(json.dumps({"features": [feature(n) for n in NUCLEI]}).encode())
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_ground_truth_of_every_kind_is_read(project: Path, ground_truth: Path, name: str) -> None:
    WRITERS[name](ground_truth / name)
    result = call("score", project, "--ground-truth", ground_truth, "--json")
    assert result.exit_code == 0, result.output
    outcome = json.loads(result.stdout)
    (image,) = outcome["images"]
    assert (image["image"], image["nuclei"], image["true_nuclei"]) == ("a.svs", 3, 3)
    assert image["scores"] == outcome["mean"] == pytest.approx(PERFECT)
    assert (image["problem"], image["note"]) == (None, None)
    assert outcome["without"] == ["b.svs"]


def test_a_probability_at_the_edge_of_two_bins_is_in_the_upper_one() -> None:
    """That of 0.9 in 32 bits is below 0.9, and printed as 0.9."""
    at = np.float32(BINS)
    overlaps = SimpleNamespace(predicted_iou=np.ones(len(at)))
    bins = _reliability(cast(_Compared, SimpleNamespace(probability=at, overlaps=overlaps)))
    assert [(each.low, each.nuclei) for each in bins] == [(low, 1) for low in BINS]


def test_kinds_of_error_are_counted(project: Path, ground_truth: Path) -> None:
    """Of a: the first is right, the second split, the third missed; one is spurious."""
    halves = [shapely.box(10, 24, 18, 36), shapely.box(18, 24, 26, 36)]
    write_nuclei(project, 0, np.array([NUCLEI[0], *halves, shapely.box(50, 0, 58, 8)]))
    write_nuclei(project, 1, NUCLEI[:1])
    write_geojson(ground_truth / "a.geojson")
    write_geojson(ground_truth / "b.geojson", [])
    result = call("score", project, "--ground-truth", ground_truth, "--json")
    outcome = json.loads(result.stdout)
    none = dict.fromkeys(["right", "badly_outlined", "missed", "merged", "split", "spurious"], 0)
    kinds = none | {"right": 1, "split": 1, "missed": 1, "spurious": 1}
    assert outcome["images"][0]["kinds"] == kinds
    assert outcome["images"][1]["kinds"] == none | {"spurious": 1}
    assert outcome["kinds"] == kinds | {"spurious": 2}
    per_100 = {kind: 100 * count / 3 for kind, count in outcome["kinds"].items()}
    assert outcome["kinds_per_100_true"] == pytest.approx(per_100)
    bins = {each["low"]: each for each in outcome["reliability"] if each["nuclei"]}
    assert {low: (each["nuclei"], each["right"]) for low, each in bins.items()} == {
        0.9: (2, 1),  # the first of each image
        0.7: (1, 0),
        0.5: (1, 0),
        0.4: (1, 0),
    }
    assert bins[0.9]["mean_probability"] == pytest.approx(0.95)
    assert [each["high"] for each in bins.values()] == [0.5, 0.6, 0.8, 1.0]
    only_spurious = call("score", project, "--ground-truth", ground_truth, "--image", "b.svs")
    assert "per 100" not in only_spurious.output


# True and predicted nuclei by the kind of the true one; each pair has a row of its own, from y.
PAIRS = {
    Kind.RIGHT: ([(2, 12)], [(2, 12)]),
    Kind.BADLY_OUTLINED: ([(2, 22)], [(2, 9)]),
    Kind.MISSED: ([(2, 12)], []),
    Kind.MERGED: ([(2, 12), (12, 22)], [(2, 22)]),
    Kind.SPLIT: ([(2, 22)], [(2, 12), (12, 22)]),
    Kind.SPURIOUS: ([], [(2, 12)]),
}


def rectangles(side: int) -> list[shapely.Geometry]:
    return [
        shapely.box(x, 10 * row + 2, to, 10 * row + 8)
        for row, pair in enumerate(PAIRS.values())
        for x, to in pair[side]
    ]


@pytest.fixture
def drawn(tmp_path: Path, ground_truth: Path) -> Path:
    """A project of one image, 60 x 80 px of 0.5 µm, with nuclei of all kinds."""
    pixels = np.random.default_rng(0).integers(180, 200, (80, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "all kinds.png")
    new = NewImage(tmp_path / "all kinds.png", [(60, 80)], (0.5, 0.5))
    folder = init_project(tmp_path / "project", [new]).parent
    write_nuclei(folder, 0, np.array(rectangles(1)))
    write_geojson(ground_truth / "all kinds.geojson", rectangles(0))
    return folder


def test_colours_of_errors_are_told_apart() -> None:
    colours = np.array([*pictures.COLOURS.values(), pictures._NEITHER], dtype=float)
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert apart[~np.eye(len(colours), dtype=bool)].min() > 60


def test_errors_are_drawn_in_the_colour_of_their_kind(drawn: Path, ground_truth: Path) -> None:
    result = call("score", drawn, "--ground-truth", ground_truth, "--json", "--pictures")
    assert result.exit_code == 0, result.output
    (image,) = json.loads(result.stdout)["images"]
    assert set(image["kinds"].values()) == {1, 2}  # two are merged
    path = drawn / "patchcl" / "errors" / "all kinds-1.png"
    assert image["picture"] == str(path)
    picture = Image.open(path)
    assert picture.width >= 2 * 60
    assert picture.height > 2 * 80  # with a legend
    for row, kind in enumerate(PAIRS):
        assert picture.getpixel((2 * 6, 2 * (10 * row + 2))) == pictures.COLOURS[kind], kind
        assert picture.getpixel((2 * 50, 2 * (10 * row + 2))) != pictures.COLOURS[kind]
    legend = np.asarray(picture)[2 * 80 :]
    for colour in pictures.COLOURS.values():
        assert (legend == colour).all(axis=-1).any()


def test_pictures_go_where_one_says(drawn: Path, ground_truth: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "pictures"
    result = call("score", drawn, "--ground-truth", ground_truth, "--pictures", folder)
    assert result.exit_code == 0
    assert [path.name for path in folder.iterdir()] == ["all kinds-1.png"]
    assert f"Look at: {folder}" in result.output
    assert not (drawn / "patchcl" / "errors").exists()
    file = tmp_path / "errors.PNG"
    result = call("score", drawn, "--ground-truth", ground_truth, "--pictures", file)
    assert result.exit_code == 2
    assert "errors.PNG is named as a file: name a folder for the pictures" in result.output
    assert not file.exists()


def test_scores_need_no_pixels_but_pictures_do(
    project: Path, ground_truth: Path, tmp_path: Path
) -> None:
    write_geojson(ground_truth / "a.geojson")
    result = call("score", project, "--ground-truth", ground_truth, "--pictures", tmp_path / "p")
    assert result.exit_code == 1
    assert "1.000" in result.stdout
    assert f"{tmp_path / 'a.svs'}" in result.stderr
    assert "Look at" not in result.stdout


def test_a_large_image_is_shown_where_its_true_nuclei_are(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slide:
        shape = (1000, 800)

    def shown(nuclei: list[shapely.Geometry], true: list[shapely.Geometry]) -> list[Box]:
        return pictures._shown(Slide, np.array(nuclei), np.array(true))  # type: ignore[arg-type]

    small, far = shapely.box(700, 10, 710, 20), shapely.box(5, 900, 15, 910)
    assert shown([small], [small, far]) == [Box(0, 0, 1000, 800)]
    monkeypatch.setattr(pictures, "_WHOLE_PX", 300)
    monkeypatch.setattr(pictures, "_FIELD_PX", 100)
    assert shown([far], [small]) == [Box(0, 684, 36, 726)]
    assert shown([small, far], [small, far, far]) == [Box(0, 700, 100, 800), Box(900, 0, 1000, 100)]
    assert shown([far], []) == [Box(884, 0, 926, 31)]
    assert shown([], []) == [Box(450, 350, 550, 450)]
    outside = shapely.box(5000, 10, 5010, 20)
    assert shown([far], [outside]) == [Box(884, 0, 926, 31)]
    assert shown([], [outside, small]) == [Box(0, 684, 36, 726)]
    monkeypatch.setattr(pictures, "_FIELDS", 1)
    assert shown([small, far], [small, far, far]) == [Box(900, 0, 1000, 100)]


def test_one_geojson_is_the_ground_truth_of_one_image(project: Path, tmp_path: Path) -> None:
    (results,) = (project / "patchcl" / "results").glob("1/nuclei-*.geojson.gz")  # our own
    refused = call("score", project, "--ground-truth", results)
    assert refused.exit_code == 1
    assert "ground truth of one image: say which one with --image" in refused.output
    result = call("score", project, "--ground-truth", results, "--image", "a.svs", "--json")
    printed = json.loads(result.stdout)
    assert printed["mean"] == pytest.approx(PERFECT)
    # It may be that of another image.
    assert printed["images"][0]["note"] == f"compared with {results.name}, which is named otherwise"
    for name in ("a", "a.svs"):
        named = tmp_path / f"{name}.geojson"
        write_geojson(named)
        result = call("score", project, "--ground-truth", named, "--image", "a.svs", "--json")
        assert json.loads(result.stdout)["images"][0]["note"] is None


def test_the_table_has_images_and_their_mean(project: Path, ground_truth: Path) -> None:
    write_nuclei(project, 1, NUCLEI[:1])
    write_geojson(ground_truth / "a.geojson")
    write_geojson(ground_truth / "b.geojson")
    result = call("score", project, "--ground-truth", ground_truth)
    assert result.exit_code == 0
    scores, kinds, reliability = tables(result.stdout)
    figures = {row[0]: row[1:] for row in scores}
    assert figures["a.svs"] == ["3", "3", "1.000", "1.000", "1.000", "1.000"]
    # It has the first of three nuclei, of 120, 168 and 100 px.
    assert figures["b.svs"] == ["1", "3", f"{240 / 508:.3f}", f"{120 / 388:.3f}", "0.500", "0.500"]
    assert figures["mean"] == ["", "", "0.736", "0.655", "0.750", "0.750"]
    assert kinds == [
        ["a.svs", "3", "0", "0", "0", "0", "0"],
        ["b.svs", "1", "0", "2", "0", "0", "0"],
        ["total", "4", "0", "2", "0", "0", "0"],
        ["per 100 true", "66.7", "0.0", "33.3", "0.0", "0.0", "0.0"],
    ]
    assert reliability == [  # without the bins that have no nucleus
        ["0.4 to 0.5", "1", "0.41", "1.00"],
        ["0.6 to 0.7", "1", "0.68", "1.00"],
        ["0.9 to 1.0", "2", "0.95", "1.00"],
    ]


def test_images_that_fail_do_not_stop_the_others(project: Path, ground_truth: Path) -> None:
    write_geojson(ground_truth / "a.geojson")
    write_geojson(ground_truth / "b.geojson")
    result = call("score", project, "--ground-truth", ground_truth)
    assert result.exit_code == 1
    assert "Failed: b.svs has no nuclei to score: do `patchcl-qp run` first" in result.output
    assert "1.000" in result.output
    call("remove", project, "--backend", "files")
    removed = call("score", project, "--ground-truth", ground_truth)
    assert "a.svs has no nuclei to score" in removed.output
    assert "mean" not in removed.output
    assert "total" not in removed.output


def test_damaged_results_are_reported(project: Path, ground_truth: Path) -> None:
    write_geojson(ground_truth / "a.geojson")
    (project / "patchcl" / "results" / "1" / "nuclei.parquet").write_bytes(b"PAR1")
    result = call("score", project, "--ground-truth", ground_truth)
    assert result.exit_code == 1
    assert "cannot be read: remove that folder and do `patchcl-qp run` again" in result.output


def wrong(name: str, pixels: Any) -> tuple[str, Callable[[Path], object]]:
    return name, lambda path: np.save(path, pixels)


@pytest.mark.parametrize(
    ("name", "write", "words"),
    [
        (*wrong("a.npy", LABELS[:-1]), "is 60 x 40 px"),
        (*wrong("a.npy", LABELS.T), "40 x 60: give labels of that size, or of a whole multiple"),
        (*wrong("a.npy", LABELS[::2]), "60 x 20"),
        (*wrong("a.npy", LABELS[:, :0]), "0 x 40"),
        (*wrong("a.npy", LABELS / 2), "save one channel of integers"),
        (*wrong("a.npy", np.stack([LABELS] * 3, axis=-1)), "save one channel of integers"),
        ("a.npy", lambda path: path.write_bytes(b"numpy"), "a.npy cannot be read"),
        ("a.png", lambda path: path.write_bytes(b"\x89PNG"), "save it again, or as GeoJSON"),
        ("a.tif", lambda path: path.write_bytes(b"II*\0"), "save it again, or as GeoJSON"),
        ("a.geojson", lambda path: path.write_text('{"features": [{'), "export it again"),
        ("a.geojson", lambda path: path.write_text('{"images": []}'), "export it again"),
        ("a.geojson", lambda path: path.write_text("[[1, 2]]"), "export it again"),
        ("a.geojson.gz", lambda path: path.write_text("[]"), "export it again"),
        ("a.geojson.gz", lambda path: path.write_bytes(gzip.compress(b"[]")[:-9]), "export it"),
        ("a.geojson", lambda path: write_geojson(path, [shapely.Point(3, 4)]), "must be outlined"),
        ("c.geojson", write_geojson, "name files as the images, as a.svs.geojson"),
        ("a.jpg", write_geojson, "name files as the images"),
    ],
)
def test_ground_truth_that_cannot_be_used_is_refused(
    project: Path, ground_truth: Path, name: str, write: Callable[[Path], object], words: str
) -> None:
    write(ground_truth / name)
    result = call("score", project, "--ground-truth", ground_truth)
    assert result.exit_code == 1
    assert words in result.output
    assert "Traceback" not in result.output
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("true", "score"), [(NUCLEI, 0.0), ([], 1.0)])
def test_an_image_without_tissue_is_scored(
    project: Path, ground_truth: Path, true: Any, score: float
) -> None:
    """It has no tile, and the file of its nuclei no measurements."""
    opened = open_project(project, backend="files")
    entry = opened.images()[0]
    opened.write(entry, [], Config().result, result_of(0))
    write_geojson(ground_truth / "a.geojson", true)
    done = call("score", project, "--ground-truth", ground_truth, "--json")
    assert done.exit_code == 0, done.output
    (image,) = json.loads(done.stdout)["images"]
    assert (image["nuclei"], image["true_nuclei"]) == (0, len(true))
    assert image["scores"] == dict.fromkeys(("dice", "aji", "pq", "f1"), score)
    assert image["kinds"]["missed"] == len(true)


def test_ground_truth_that_does_not_exist_is_refused(project: Path, tmp_path: Path) -> None:
    assert "--ground-truth" in call("score", project).output
    missing = call("score", project, "--ground-truth", tmp_path / "none")
    assert missing.exit_code == 1
    assert "none does not exist: give a file that ends in .geojson" in missing.output
    other = call("score", project, "--ground-truth", project / "project.qpproj")
    assert "project.qpproj cannot be the ground truth: give a file that ends in" in other.output


@pytest.mark.parametrize("call_of_path", ["is_dir", "iterdir"])
def test_ground_truth_that_may_not_be_looked_at_is_refused(
    project: Path, ground_truth: Path, monkeypatch: pytest.MonkeyPatch, call_of_path: str
) -> None:
    """In a folder that another person alone may look into, or one itself."""

    def deny(_: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    entries = open_project(project).images()
    message = r"cannot be read: Permission denied; mend that, or ask for the permission"
    monkeypatch.setattr(Path, call_of_path, deny)
    with pytest.raises(GroundTruthError, match=message):
        ground_truth_files(ground_truth, entries)
    monkeypatch.undo()


def test_two_ground_truth_files_of_one_image_are_refused(project: Path, ground_truth: Path) -> None:
    write_geojson(ground_truth / "a.geojson")
    np.save(ground_truth / "a.npy", LABELS)
    result = call("score", project, "--ground-truth", ground_truth)
    assert "a.svs has several ground-truth files (a.geojson, a.npy): leave one" in result.output
    np.save(ground_truth / "a.svs.npy", LABELS)  # the whole name precedes the stem
    assert call("score", project, "--ground-truth", ground_truth).exit_code == 0


NAMES = ["a.svs", "a.ndpi", "x/a.svs", "b.svs", "b", "Case 1.2 HE", "Case 1.5 HE"]


@pytest.mark.parametrize(
    ("files", "owners"),
    [
        (["a"], {"a.svs": "a", "a.ndpi": "a", "x/a.svs": "a"}),
        (["a", "a.svs"], {"a.svs": "a.svs", "a.ndpi": "a", "x/a.svs": "a"}),
        (["b"], {"b": "b"}),  # the whole name of one is not the stem of another
        (["b", "Case 1"], {"b": "b"}),
        (["Case 1.2 HE"], {"Case 1.2 HE": "Case 1.2 HE"}),
    ],
)
def test_a_file_belongs_to_images_by_name_then_by_stem(
    ground_truth: Path, files: list[str], owners: dict[str, str]
) -> None:
    for file in files:
        write_geojson(ground_truth / f"{file}.geojson")
    entries = [ImageEntry(name, name, Path(name)) for name in NAMES]
    found = ground_truth_files(ground_truth, entries)
    assert {image: [file.name for file in of_it] for image, of_it in found.items() if of_it} == {
        image: [f"{file}.geojson"] for image, file in owners.items()
    }


def test_a_file_of_several_images_is_the_ground_truth_of_none(
    project: Path, ground_truth: Path
) -> None:
    path = project / "project.qpproj"
    content = json.loads(path.read_text())
    content["images"].append(content["images"][0] | {"entryID": 3, "imageName": "a.ndpi"})
    path.write_text(json.dumps(content))
    write_nuclei(project, 1, NUCLEI)
    write_geojson(ground_truth / "a.geojson")
    write_geojson(ground_truth / "b.geojson")
    result = call("score", project, "--ground-truth", ground_truth, "--json")
    first, second, third = json.loads(result.stdout)["images"]
    named = "a.geojson is named as several images (a.svs (id 1), a.ndpi (id 3)): give it the whole"
    for image in (first, third):
        assert image["problem"].startswith(f"{image['image']}: {named}")
        assert image["scores"] == {}
    assert (second["problem"], second["scores"]) == (None, pytest.approx(PERFECT))
    chosen = call("score", project, "--ground-truth", ground_truth, "--image", "1", "--json")
    assert json.loads(chosen.stdout)["mean"] == pytest.approx(PERFECT)


def test_a_cell_is_its_nucleus_and_areas_are_made_valid(ground_truth: Path) -> None:
    small = json.loads(shapely.to_geojson(shapely.box(2, 2, 4, 4)))
    crossed = shapely.Polygon([(20, 0), (30, 10), (30, 0), (20, 10)])
    flat = shapely.Polygon([(0, 0), (5, 5), (9, 9)])
    path = ground_truth / "a.geojson"
    items = [
        feature(shapely.box(0, 0, 9, 9), nucleusGeometry=small),
        feature(crossed),
        feature(flat),
        feature(shapely.Point(3, 3)),
        {"type": "Feature", "geometry": None, "properties": {}},
    ]
    path.write_text(json.dumps(items))
    polygons = read_ground_truth([path], ENTRY).polygons
    assert shapely.is_valid(polygons).all()
    np.testing.assert_allclose(shapely.area(polygons), [4, 50])
    path.write_text(json.dumps(items[0]))
    assert read_ground_truth([path], ENTRY).polygons[0].equals(shapely.box(2, 2, 4, 4))
    path.write_text("[]")
    assert not len(read_ground_truth([path], ENTRY).polygons)


def test_regions_in_ground_truth_are_no_nuclei(project: Path, ground_truth: Path) -> None:
    write_geojson(ground_truth / "a.geojson", [shapely.box(0, 0, 60, 40), *NUCLEI])
    (image,) = json.loads(call("score", project, "--ground-truth", ground_truth, "--json").stdout)[
        "images"
    ]
    assert image["scores"] == pytest.approx(PERFECT)
    assert image["note"].endswith("contain several others, as regions do: 1")


def annotation(geometry: shapely.Geometry, name: str = "", class_name: str = "") -> dict[str, Any]:
    """An annotation as QuPath exports it."""
    properties: dict[str, Any] = {"objectType": "annotation", "name": name}
    if class_name:
        properties["classification"] = {"name": class_name}
    return {**feature(geometry), "properties": properties}


@pytest.mark.parametrize("true", [NUCLEI[:0], NUCLEI[:1]])
@pytest.mark.parametrize(
    ("other", "words"),
    [
        (annotation(shapely.box(0, 0, 60, 40), "PatchCL"), "annotations of PatchCL and its ROIs"),
        (annotation(shapely.box(0, 0, 30, 30), "ROI 1 of 6", "PatchCL: corrected"), "and its ROIs"),
        (annotation(shapely.box(0, 0, 30, 30), "", "PatchCL: correct here"), "and its ROIs"),
        (annotation(shapely.box(0, 0, 91, 91), "", "Tumor"), "larger than 2,000 µm²"),
    ],
)
def test_annotations_around_few_nuclei_are_no_nuclei(
    project: Path, ground_truth: Path, true: Any, other: dict[str, Any], words: str
) -> None:
    write_nuclei(project, 0, true)
    (ground_truth / "a.geojson").write_text(json.dumps([other, *map(feature, true)]), "utf-8")
    result = call("score", project, "--ground-truth", ground_truth, "--json")
    (image,) = json.loads(result.stdout)["images"]
    assert (image["true_nuclei"], image["scores"]) == (len(true), pytest.approx(PERFECT))
    assert words in image["note"]
    assert image["note"].endswith(": 1")


def test_a_large_nucleus_in_ground_truth_is_one(ground_truth: Path) -> None:
    """At 0.5 µm/px, one of 90 px is too small to be left out; without a pixel size, none is."""
    path = ground_truth / "a.geojson"
    for side, mpp in ((89, (0.5, 0.5)), (91, None)):
        path.write_text(json.dumps([annotation(shapely.box(0, 0, side, side), "PatchCL", "Tumor")]))
        truth = read_ground_truth([path], replace(ENTRY, mpp=mpp))
        assert [*shapely.area(truth.polygons)] == [side**2]
        assert truth.note is None


def test_background_with_a_number_of_its_own_is_no_nucleus(
    project: Path, ground_truth: Path
) -> None:
    """A watershed numbers it as all else; in GeoJSON, such an area is left out, too."""
    labels = np.where(LABELS > 0, LABELS, 1)
    np.save(ground_truth / "a.npy", labels)
    slide = structs.replace(result_of(0).slide, mpp=(1.5, 1.5))  # of 5,400 µm²
    write_nuclei(project, 0, NUCLEI, slide=slide)
    (image,) = json.loads(call("score", project, "--ground-truth", ground_truth, "--json").stdout)[
        "images"
    ]
    assert (image["true_nuclei"], image["scores"]) == (3, pytest.approx(PERFECT))
    assert image["note"] == "true contours left out since they are larger than 2,000 µm²: 1"


def test_contours_outside_of_the_image_are_told_of(project: Path, ground_truth: Path) -> None:
    """They are of another image, or not in px at full resolution: scores near 0 say nothing."""
    moved = [shapely.affinity.translate(nucleus, WIDTH, 0) for nucleus in NUCLEI]
    write_geojson(ground_truth / "a.geojson", [*NUCLEI, *moved[:2]])
    result = call("score", project, "--ground-truth", ground_truth, "--json")
    (image,) = json.loads(result.stdout)["images"]
    assert image["note"] == "true contours outside of the image, which count as missed: 2"
    assert (image["true_nuclei"], image["kinds"]["missed"]) == (len(NUCLEI) + 2, 2)
    write_geojson(ground_truth / "a.geojson", moved[:2])
    result = call("score", project, "--ground-truth", ground_truth)
    assert result.exit_code == 1
    assert f"a.svs is {WIDTH} x {HEIGHT} px, and all contours of its ground truth" in result.stderr


def test_contours_are_outside_of_an_image_whose_size_the_run_found(
    project: Path, ground_truth: Path
) -> None:
    """A project that `init` made, and QuPath has not saved, has no sizes."""
    file = project / "project.qpproj"
    content = json.loads(file.read_text("utf-8"))
    for image in content["images"]:
        del image["serverBuilder"]["metadata"]
    file.write_text(json.dumps(content), "utf-8")
    slide = structs.replace(result_of(0).slide, size=(WIDTH, HEIGHT))
    write_nuclei(project, 0, NUCLEI, slide=slide)
    moved = [shapely.affinity.translate(nucleus, WIDTH, 0) for nucleus in NUCLEI]
    write_geojson(ground_truth / "a.geojson", moved)
    result = call("score", project, "--ground-truth", ground_truth)
    assert result.exit_code == 1
    assert f"a.svs is {WIDTH} x {HEIGHT} px, and all contours of its ground truth" in result.stderr


def test_nuclei_in_an_ignored_area_are_not_scored(project: Path, ground_truth: Path) -> None:
    """Whoever marks an area so does not say which nuclei are in it."""
    beside, within, half = (shapely.box(x, 60, x + 10, 70) for x in (10, 44, 35))
    write_nuclei(project, 0, np.array([*NUCLEI, within, half, beside]))
    path = ground_truth / "a.geojson"
    write_geojson(path, [*NUCLEI, shapely.box(46, 72, 50, 76)])  # one in the area, not found
    content = json.loads(path.read_text("utf-8"))
    area = feature(shapely.box(40, 50, 60, 80))
    area["properties"]["classification"] = {"name": "Ignore*"}
    content["features"].append(area)
    path.write_text(json.dumps(content), "utf-8")
    done = call("score", project, "--ground-truth", ground_truth, "--json")
    assert done.exit_code == 0, done.output
    (image,) = json.loads(done.stdout)["images"]
    assert (image["nuclei"], image["true_nuclei"]) == (5, 3)
    assert (image["kinds"]["right"], image["kinds"]["spurious"]) == (3, 2)
    assert sum(each["nuclei"] for each in image["reliability"]) == 5
    assert "found or true, that lie in ignored objects: 2" in image["note"]


def test_a_run_limited_to_regions_is_scored_inside_them(project: Path, ground_truth: Path) -> None:
    left = json.loads(shapely.to_geojson(shapely.box(0, 0, 30, 40)))
    write_nuclei(project, 0, NUCLEI[:2], regions=(RegionRecord(geometry=left, tissue_mm2=0.1),))
    write_geojson(ground_truth / "a.geojson")
    result = call("score", project, "--ground-truth", ground_truth, "--json")
    (image,) = json.loads(result.stdout)["images"]
    assert (image["true_nuclei"], image["scores"]) == (2, pytest.approx(PERFECT))
    assert image["note"] == "only inside the analysis regions of the run"


@pytest.mark.parametrize("count", [1, 2])
def test_tiles_that_failed_are_in_the_note(project: Path, ground_truth: Path, count: int) -> None:
    tile = FailedTile(x=0, y=16, width=60, height=24, reason="damaged")
    write_nuclei(project, 0, NUCLEI[:1], failed_tiles=(tile,) * count)
    write_geojson(ground_truth / "a.geojson")
    result = call("score", project, "--ground-truth", ground_truth, "--json")
    (image,) = json.loads(result.stdout)["images"]
    assert image["note"] == f"tiles that failed, where true nuclei count as missed: {count}"
    assert image["kinds"]["missed"] == 2


def test_what_qupath_exported_is_read(shared_data: Path) -> None:
    cells = shared_data / "geojson" / "CosciaLab__demo_Qupath_project_Single_cells.geojson"
    ground_truth = read_ground_truth([cells], ENTRY)
    # Cells and annotations, except the one that contains all others.
    assert len(ground_truth.polygons) == 121 + 7 - 1
    assert ground_truth.note is not None
    polygon = shared_data / "geojson" / "qupath__polygon.geojson"
    (region,) = read_ground_truth([polygon], ENTRY).polygons
    assert region.geom_type == "MultiPolygon"


def test_labels_of_real_nuclei_are_read_to_the_pixel(shared_data: Path) -> None:
    path = min((shared_data / "monuseg_train" / "labels").glob("*.png"))
    labels = np.asarray(Image.open(path))
    entry = ImageEntry("1", path.name, path, size=(labels.shape[1] // 2, labels.shape[0] // 2))
    _, count = np.unique(labels[labels > 0], return_counts=True)
    np.testing.assert_array_equal(
        shapely.area(read_ground_truth([path], entry).polygons), count / 4
    )


def test_the_size_is_the_files_where_qupath_saved_none(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", LABELS)
    entry = ImageEntry("1", "a.png", tmp_path / "a.png")
    assert len(read_ground_truth([tmp_path / "a.npy"], entry).polygons) == 3
