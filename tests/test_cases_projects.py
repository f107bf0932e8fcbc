"""Odd projects and labels: each entry is read as QuPath reads it, or refused in one line."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import unicodedata
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
import shapely
import tifffile
from click.testing import CliRunner
from PIL import Image
from test_project import BIO_FORMATS, OPENSLIDE, builder, calibrated, touch, write_project

import patchcl_qupath as pq
from patchcl_qupath.cli import main
from patchcl_qupath.config import load_config
from patchcl_qupath.datatypes import Box, ImageEntry
from patchcl_qupath.errors import GroundTruthError, ImageError, ProjectError, SlideError
from patchcl_qupath.evaluation.ground_truth import read_ground_truth
from patchcl_qupath.project import chosen_images, open_project
from patchcl_qupath.project.arguments import parse_arguments
from patchcl_qupath.project.drawn import read_stains
from patchcl_qupath.project.qpproj import path_of_uri
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.storage.geojson import read_objects

ROOT = Path(__file__).parent.parent
CASES = ROOT.parent / "shared" / "cases"
OLD = "file:/E:/projects/p1/project.qpproj"  # of a project that moved
HOME = "file:/home/old/project.qpproj"


def one_line(problem: str | None) -> str:
    """A problem, which has one line and says what to do."""
    assert problem
    assert "\n" not in problem
    assert ":" in problem
    return problem


# ---------------------------------------------------------------- images of one file name


def found(folder: Path, *paths: str) -> list[str | None]:
    """Where the images of a moved project are, which had these paths; None for a refused one."""
    path = write_project(folder, OLD, *(builder(f"file:/E:/{path}") for path in paths))
    entries = open_project(path).images()
    for entry in entries:
        assert (entry.problem is None) == entry.path.is_file()
    return [None if e.problem else e.path.relative_to(folder).as_posix() for e in entries]


def test_two_lost_images_of_one_name_are_told_by_their_folders(tmp_path: Path) -> None:
    touch(tmp_path / "caseA" / "slide.tif")
    touch(tmp_path / "caseB" / "slide.tif")
    stored = ["study/2021/caseA/slide.tif", "study/2022/caseB/slide.tif"]
    expected = ["caseA/slide.tif", "caseB/slide.tif"]
    assert found(tmp_path, *stored) == expected
    assert found(tmp_path, *reversed(stored)) == expected[::-1]
    assert found(tmp_path, "study/CASEB/slide.tif", stored[0]) == expected[::-1]  # of Windows


@pytest.mark.skipif(not CASES.is_dir(), reason=f"{CASES} is not here")
def test_the_reported_project_of_lost_images() -> None:
    folder = (CASES / "lost-images").resolve()
    entries = open_project(folder / "project.qpproj").images()
    assert [entry.name for entry in entries] == ["caseA", "caseB"]
    assert [entry.path for entry in entries] == [
        folder / n / "slide.tif" for n in ("caseA", "caseB")
    ]
    assert [entry.problem for entry in entries] == [None, None]


@pytest.mark.parametrize(
    ("files", "stored", "expected"),
    [
        # One file is left, and it is not told whose.
        (["slide.tif"], ["a/slide.tif", "b/slide.tif"], [None, None]),
        (["c/slide.tif"], ["a/slide.tif", "b/slide.tif"], [None, None]),
        # One file is left, and its folder tells whose.
        (["a/slide.tif"], ["a/slide.tif", "b/slide.tif"], ["a/slide.tif", None]),
        # The folders are of one name, too.
        (["c/slide.tif"], ["1/c/slide.tif", "2/c/slide.tif"], [None, None]),
        (["1/c/slide.tif"], ["1/c/slide.tif", "2/c/slide.tif"], ["1/c/slide.tif", None]),
        (
            ["1/c/slide.tif", "2/c/slide.tif"],
            ["x/2/c/slide.tif", "x/1/c/slide.tif"],
            ["2/c/slide.tif", "1/c/slide.tif"],
        ),
        # One image of the name: its file is the nearest, as in QuPath, if there is one.
        (["slide.tif", "b/slide.tif"], ["x/slide.tif"], ["slide.tif"]),
        (["slide.tif", "b/slide.tif"], ["x/b/slide.tif"], ["b/slide.tif"]),
        (["a/slide.tif", "b/slide.tif"], ["x/slide.tif"], [None]),
        # One image twice in a project is one file for both, of course.
        (["slide.tif"], ["x/slide.tif", "x/slide.tif"], ["slide.tif", "slide.tif"]),
        # One is where it was, relative to the project; the other is not there as well.
        (["slide.tif"], ["projects/p1/slide.tif", "x/slide.tif"], ["slide.tif", None]),
        (
            ["slide.tif", "y/slide.tif"],
            ["projects/p1/y/slide.tif", "x/slide.tif"],
            ["y/slide.tif", None],
        ),
        # What QuPath and this program made is no slide.
        (["patchcl/previews/1.png"], ["x/1.png"], [None]),
        (["data/1/thumbnail.jpg"], ["x/thumbnail.jpg"], [None]),
        (["sub/patchcl/report/images/1/density.png"], ["x/density.png"], [None]),
        (["patchcl/a.tif", "data/a.tif", "slides/a.tif"], ["x/a.tif"], ["slides/a.tif"]),
        (["slides/data/a.tif"], ["x/a.tif"], ["slides/data/a.tif"]),
        # Windows does not tell these names apart.
        (["Slide.TIF"], ["x/slide.tif"], ["Slide.TIF"]),
        (["A/Slide.TIF", "b/slide.TIF"], ["x/a/slide.tif"], ["A/Slide.TIF"]),
        (["slide.TIF"], ["a/slide.tif", "b/Slide.tif"], [None, None]),
    ],
)
def test_one_file_is_never_taken_for_two_images(
    tmp_path: Path, files: list[str], stored: list[str], expected: list[str | None]
) -> None:
    for file in files:
        touch(tmp_path / file)
    assert found(tmp_path, *stored) == expected
    assert found(tmp_path, *reversed(stored)) == expected[::-1]


@pytest.mark.parametrize(("on_disk", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
@pytest.mark.parametrize("place", ["study/prüfung.tif", "elsewhere/prüfung.tif"])
def test_names_with_marks_are_found_as_any_system_writes_them(
    tmp_path: Path, on_disk: str, stored: str, place: str
) -> None:
    """A letter with a mark is one character, or two where macOS wrote the name."""
    folder = tmp_path / "moved"
    slide = touch(folder / unicodedata.normalize(on_disk, place))
    uri = "file:/home/old/study/" + quote(unicodedata.normalize(stored, "prüfung.tif"))
    (entry,) = open_project(write_project(folder, HOME, builder(uri))).images()
    assert entry.problem is None
    assert entry.path.samefile(slide)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_images_are_named_as_any_system_writes_them(tmp_path: Path, form: str) -> None:
    uri = touch(tmp_path / "a.tif").as_uri()
    named = entry_of(uri) | {"imageName": unicodedata.normalize("NFD", "prüfung")}
    path = write_entries(tmp_path, named)
    name = unicodedata.normalize(form, "prüfung")
    result = CliRunner().invoke(main, ["status", str(path), "--image", name])
    assert result.exit_code == 0, result.output
    with pytest.raises(ImageError, match="has no nuclei"):
        pq.read_nuclei(pq.open_project(path), name)


def test_an_image_is_named_or_given_by_its_id(tmp_path: Path) -> None:
    """In QuPath images may be renamed, to the numbers of cases, whatever their ids are."""
    uris = [touch(tmp_path / f"{k}.tif").as_uri() for k in (1, 2, 3, 4)]
    names = ["3", "2", "b", "b"]
    entries = [
        entry_of(uri, k) | {"imageName": name}
        for k, (uri, name) in enumerate(zip(uris, names, strict=True), start=1)
    ]
    project = open_project(write_entries(tmp_path, *entries))

    def ids(*names: str) -> list[str]:
        return [entry.id for entry in chosen_images(project, names)]

    assert ids() == ["1", "2", "3", "4"]
    assert ids("2") == ids("id:2") == ["2"]
    assert ids("4") == ["4"]
    assert ids("b") == ["3", "4"]
    assert ids("id:3", "1") == ["1", "3"]
    with pytest.raises(ProjectError, match=r"another one, b: choose id:1, or id:3$"):
        ids("3")
    for unknown in ("id:b", "5", "id:5"):
        with pytest.raises(ProjectError, match=r"^no image (b|5) in .*: choose among .*, b"):
            ids(unknown)


def test_posix_tells_large_letters_from_small_ones(tmp_path: Path) -> None:
    touch(tmp_path / "Slide.tif")
    uri = "file:/home/old/slide.tif"
    (entry,) = open_project(write_project(tmp_path, HOME, builder(uri))).images()
    assert (entry.problem is None) == (tmp_path / "slide.tif").exists()  # as its disk does


def test_projects_that_macos_left_its_files_beside(tmp_path: Path) -> None:
    """On disks of other systems, macOS keeps a file ._NAME with the attributes of each file."""
    path = write_project(tmp_path, HOME, builder("file:/home/old/a.tif"))
    (tmp_path / f"._{path.name}").write_bytes(b"\0\5\x16\7")
    assert open_project(tmp_path).path == path
    path.unlink()
    with pytest.raises(ProjectError, match=r"holds no project"):
        open_project(tmp_path)


def test_images_that_cannot_be_told_apart_are_refused_in_one_line(tmp_path: Path) -> None:
    touch(tmp_path / "slide.tif")
    uris = ["file:/E:/a/slide.tif", "file:/E:/b/slide.tif"]
    entries = open_project(write_project(tmp_path, OLD, *map(builder, uris))).images()
    for entry, letter in zip(entries, "ab", strict=True):
        problem = one_line(entry.problem)
        assert problem.startswith(
            f"{entry.name} is not at E:\\{letter}\\slide.tif, and files of that"
        )
        assert "(slide.tif): open the project in QuPath and fix the path" in problem


@pytest.mark.skipif(sys.platform == "win32", reason="Python asks Windows by other functions, too")
def test_folders_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root may read all, permissions are those that the test says."""
    good, closed = touch(tmp_path / "good.tif"), tmp_path / "closed"
    touch(closed / "a.tif")
    uris = [(closed / "a.tif").as_uri(), good.as_uri(), f"file:/{'x' * 300}.tif", "file:/a%00b"]
    path = write_project(tmp_path, "", *map(builder, uris))
    before = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(f"{closed}{os.sep}"):
            raise PermissionError(13, "Permission denied", str(path))
        return before(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    a, other, long, nul = open_project(path).images()
    assert "may not be read from here: ask for the permission" in one_line(a.problem)
    assert (other.problem, other.path) == (None, good)
    for entry in (long, nul):
        assert "nor in the project's folder" in one_line(entry.problem)
    result = CliRunner().invoke(main, ["status", str(path), "--json"])
    assert result.exit_code == 0
    states = [image["state"] for image in json.loads(result.stdout)["images"]]
    with pytest.raises(ProjectError, match="cannot be read: Permission denied"):
        open_project(closed / "project.qpproj")
    assert states == [a.problem, "to do", long.problem, nul.problem]


# ---------------------------------------------------------------- arguments of QuPath


@pytest.mark.parametrize(
    ("args", "series", "name", "crop"),
    [
        ([], None, None, True),
        (["--series", "1"], 1, None, True),
        (["--series=1"], 1, None, True),
        (["-s", "1"], 1, None, True),
        (["-s=1"], 1, None, True),
        (["-s1"], 1, None, True),
        (["--series", "0"], 0, None, True),
        (["--series", "-1"], None, None, True),
        (["--name", "Scan 1"], None, "Scan 1", True),
        (["--name=Scan=1"], None, "Scan=1", True),
        (["-n", "Scan"], None, "Scan", True),
        (["-n=Scan"], None, "Scan", True),
        (["-nScan"], None, "Scan", True),
        (["--name", " "], None, None, True),
        (["--name", "Scan", "-s", "2"], 2, None, True),  # as in QuPath
        (["-s", "-1", "--name", "Scan"], None, "Scan", True),
        (["--no-crop", "-s", "3"], 3, None, False),
        (["--rotate", "ROTATE_NONE", "--order", "RGB"], None, None, True),
        (["--classname", OPENSLIDE, "--background-color=white", ""], None, None, True),
        (["-s", "1", "--series=1"], 1, None, True),
        (["--icc-profile"], None, None, True),
    ],
)
def test_arguments_in_all_spellings(
    args: list[str], series: int | None, name: str | None, crop: bool
) -> None:
    parsed = parse_arguments(args)
    assert (parsed.series, parsed.series_name, parsed.crop) == (series, name, crop)
    assert parsed.problems == ()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--rotate", "ROTATE_90"], "--rotate ROTATE_90"),
        (["--rotate=ROTATE_180"], "--rotate=ROTATE_180"),
        (["--order", "BGR"], "--order BGR"),
        (["--dims", "XYZCT"], "--dims"),
        (["--bfOptions", "zeissczi.autostitch=false"], "--bfOptions"),
        (["--series", "two"], "--series two"),
        (["--series", "1.5"], "--series 1.5"),
        (["--series"], "--series"),
        (["-s", "1", "-s", "2"], "-s 2"),
        (["--rotate"], "--rotate"),
        (["--made-up\nof lines"], "--made-up of lines"),
        (["slide"], "slide"),
    ],
)
def test_arguments_that_change_the_image_are_refused(
    tmp_path: Path, args: list[str], words: str
) -> None:
    uri = touch(tmp_path / "a.tif").as_uri()
    path = write_project(tmp_path, "", builder(uri, args=args), builder(uri))
    refused, used = open_project(path).images()
    assert f"image 1 is opened in QuPath with {words}" in one_line(refused.problem)
    assert "export it as OME-TIFF" in one_line(refused.problem)
    assert used.problem is None


def test_a_colour_profile_of_qupath_is_noted(tmp_path: Path) -> None:
    uri = touch(tmp_path / "a.svs").as_uri()
    path = write_project(tmp_path, "", builder(uri, args=["--icc-profile"]), builder(uri))
    applied, raw = open_project(path).images()
    assert applied.problem is None
    assert "optical densities are those of the colours in the file" in (applied.note or "")
    assert raw.note is None


def test_series_and_name_are_those_of_the_entry(tmp_path: Path) -> None:
    uri = touch(tmp_path / "a.tif").as_uri()
    all_args: list[list[str]] = [["-s", "1"], ["--name=macro"], ["--no-crop"]]
    builders = [builder(uri, args=args, providerClassName=BIO_FORMATS) for args in all_args]
    entries = open_project(write_project(tmp_path, "", *builders)).images()
    assert [entry.series for entry in entries] == [1, None, None]
    assert [entry.series_name for entry in entries] == [None, "macro", None]
    assert [entry.problem for entry in entries] == [None] * 3


# ---------------------------------------------------------------- damaged entries


def entry_of(uri: str, id_: Any = 1, **more: Any) -> dict[str, Any]:
    return {"serverBuilder": builder(uri), "entryID": id_, "imageName": f"image {id_}", **more}


def write_entries(folder: Path, *entries: Any, mark: bytes = b"", **more: Any) -> Path:
    content = {"version": "0.5.1", "images": entries, **more}
    path = folder / "project.qpproj"
    path.write_bytes(mark + json.dumps(content).encode())
    return path


def test_a_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    uri = touch(tmp_path / "a.tif").as_uri()
    write_entries(tmp_path, entry_of(uri), mark=b"\xef\xbb\xbf")
    (entry,) = open_project(tmp_path).images()
    assert (entry.id, entry.problem) == ("1", None)


def test_byte_order_marks_of_other_files_are_skipped(tmp_path: Path) -> None:
    """Editors of Windows write one at the head of settings, too."""
    mark = b"\xef\xbb\xbf"
    settings = tmp_path / "settings.toml"
    settings.write_bytes(mark + b"[slide]\nmpp = 0.25\n")
    assert load_config(settings).slide.mpp == 0.25
    path = write_entries(tmp_path, entry_of(touch(tmp_path / "a.tif").as_uri()))
    summary = touch(tmp_path / "data" / "1" / "summary.json")
    summary.write_bytes(mark + b'{"imageType": "FLUORESCENCE"}')
    assert "fluorescence" in one_line(open_project(path).images()[0].problem)
    stains = tmp_path / "stains.json"
    stains.write_bytes(mark + b"null")
    assert read_stains(stains, "a.svs") is None


def test_two_entries_of_one_id_are_refused_and_keep_what_is_there(tmp_path: Path) -> None:
    uris = [touch(tmp_path / f"{name}.tif").as_uri() for name in "abc"]
    names = [{"imageName": name} for name in "abc"]
    entries = [entry_of(uri, id_, **n) for uri, id_, n in zip(uris, (7, 7, 8), names, strict=True)]
    path = write_entries(tmp_path, *entries)
    touch(tmp_path / "patchcl" / "results" / "7" / "nuclei.parquet")
    images = open_project(path).images()
    assert [image.id for image in images] == ["7-1", "7-2", "8"]
    for image in images[:2]:
        assert "has the id of another image of the project (7: a and b)" in one_line(image.problem)
    assert images[2].problem is None
    for name in "ab":
        result = CliRunner().invoke(main, ["remove", str(path), "--image", name])
        assert (tmp_path / "patchcl" / "results" / "7" / "nuclei.parquet").exists(), result.output


BAD_ENTRIES: dict[str, tuple[dict[str, Any], str]] = {
    "no builder": ({"serverBuilder": None}, "serverBuilder is damaged"),
    "builder of text": ({"serverBuilder": "a.tif"}, "serverBuilder is damaged"),
    "empty pyramid": ({"serverBuilder": {"builderType": "pyramidize"}}, "serverBuilder is damaged"),
    "builder without type": ({"serverBuilder": {"uri": "file:/a.tif"}}, "serverBuilder is damaged"),
    "id of text": ({"entryID": "one"}, "entryID is no whole number"),
    "no id": ({"entryID": None}, "entryID is no whole number"),
    "true id": ({"entryID": True}, "entryID is no whole number"),
    "huge id": ({"entryID": 10**300}, "entryID is no whole number"),
    "no URI": ({"serverBuilder": builder("no URI at all")}, "no path of a file in the project"),
    "bad URI": ({"serverBuilder": builder("http://[")}, "is not a file (http://[)"),
    "number for a URI": ({"serverBuilder": builder("") | {"uri": 7}}, "no path of a file"),
    "fragment": ({"serverBuilder": builder("file:/a.tif#2")}, "not that of a whole file"),
    "query": ({"serverBuilder": builder("file:/a.tif?series=2")}, "not that of a whole file"),
    "args of text": ({"serverBuilder": builder("file:/a.tif", args="-s 1")}, "that are no list"),
    "metadata of text": (
        {"serverBuilder": builder("file:/a.tif", metadata="none")},
        "metadata in the project file that are damaged",
    ),
    "sides of text": (
        {
            "serverBuilder": builder(
                "file:/a.tif", metadata={"pixelCalibration": {"pixelWidth": "0.5 µm"}}
            )
        },
        "metadata in the project file that are damaged",
    ),
    "pixel size null": (
        {"serverBuilder": builder("file:/a.tif", metadata=calibrated(None))},  # type: ignore[arg-type]
        "pixel size in the project file that is no number",
    ),
    "pixel size of text": (
        {"serverBuilder": builder("file:/a.tif", metadata=calibrated("half"))},  # type: ignore[arg-type]
        "pixel size in the project file that is no number",
    ),
    "width of text": (
        {"serverBuilder": builder("file:/a.tif", metadata={"width": "wide", "height": 7})},
        "width or height in the project file that is no number",
    ),
    "infinite width": (
        {"serverBuilder": builder("file:/a.tif", metadata={"width": 1e999, "height": 7})},
        "width or height in the project file that is no number",
    ),
}


@pytest.mark.parametrize("kind", BAD_ENTRIES)
def test_one_damaged_entry_has_a_problem_and_the_others_go_on(tmp_path: Path, kind: str) -> None:
    changes, words = BAD_ENTRIES[kind]
    uri = touch(tmp_path / "a.tif").as_uri()
    bad = {key: value for key, value in (entry_of(uri, 1) | changes).items() if value is not None}
    path = write_entries(tmp_path, bad, entry_of(uri, 2))
    refused, used = open_project(path).images()
    assert words in one_line(refused.problem)
    assert refused.name in one_line(refused.problem)
    assert (used.id, used.problem) == ("2", None)
    assert refused.id not in ("", "2")
    assert Path(refused.id).name == refused.id  # it is the name of a folder
    result = CliRunner().invoke(main, ["status", str(path), "--json"])
    assert result.exit_code == 0
    assert [image["id"] for image in json.loads(result.stdout)["images"]] == [refused.id, "2"]


def test_an_entry_that_is_no_object_and_nulls_that_are_harmless(tmp_path: Path) -> None:
    uri = touch(tmp_path / "a.tif").as_uri()
    nulls = {"metadata": {"pixelCalibration": {"pixelWidth": None, "pixelHeight": None}}}
    none = entry_of(uri, 3, serverBuilder=builder(uri, metadata=None), imageName=None)
    entries = [7, entry_of(uri, 2, serverBuilder=builder(uri, **nulls)), none]
    refused, used, named = open_project(write_entries(tmp_path, *entries)).images()
    assert "image 1 has no id" in one_line(refused.problem)
    assert (used.problem, used.mpp) == (None, None)
    assert (named.problem, named.name) == (None, "a.tif")


@pytest.mark.parametrize(
    "summary",
    [
        "[]",
        "7",
        '{"hierarchy": []}',
        '{"hierarchy": {"annotationClassificationCounts": 7}}',
        '{"hierarchy": {"annotationClassificationCounts": {"PatchCL: corrected": "x"}}}',
        '{"imageType": []}',
        "[" * 100_000,
    ],
)
def test_a_damaged_summary_is_none(tmp_path: Path, summary: str) -> None:
    path = write_entries(tmp_path, entry_of(touch(tmp_path / "a.tif").as_uri()))
    touch(tmp_path / "data" / "1" / "summary.json").write_text(summary, "utf-8")
    result = CliRunner().invoke(main, ["status", str(path), "--json"])
    assert result.exit_code == 0, result.exception
    (image,) = json.loads(result.stdout)["images"]
    assert (image["state"], image["fields_done"]) == ("to do", 0)


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"[" * 100_000, b'{"images": ' * 9999, b""])
def test_a_damaged_project_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "project.qpproj").write_bytes(content)
    with pytest.raises(ProjectError, match=r"project\.qpproj is damaged") as error:
        open_project(tmp_path)
    one_line(str(error.value))


def test_names_have_one_line(tmp_path: Path) -> None:
    uri = touch(tmp_path / "a.tif").as_uri()
    names = ["one\nline", "\x1b[31mred", "half \ud800 of a pair"]
    entries = [entry_of(uri, n, imageName=name) for n, name in enumerate(names)]
    images = open_project(write_entries(tmp_path, *entries)).images()
    assert [image.name for image in images] == ["one line", " [31mred", "half ? of a pair"]


# ---------------------------------------------------------------- GeoJSON

ONE, TWO, THREE = shapely.box(2, 1, 8, 5), shapely.box(12, 3, 20, 9), shapely.box(30, 20, 33, 31)
ENTRY = ImageEntry("1", "a.svs", Path("a.svs"), size=(60, 40))


def geometry(area: shapely.Geometry) -> dict[str, Any]:
    return dict(json.loads(shapely.to_geojson(area)))


def feature(area: shapely.Geometry | None, **properties: Any) -> dict[str, Any]:
    drawn = None if area is None else geometry(area)
    return {"type": "Feature", "geometry": drawn, "properties": properties}


def collection(*features: Any) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": [*features]}


def geometries(*areas: Any) -> dict[str, Any]:
    return {"type": "GeometryCollection", "geometries": [geometry(area) for area in areas]}


LINE = shapely.LineString([(0, 0), (9, 9)])
NESTED = feature(None, objectType="root", childObjects=[feature(ONE), feature(TWO)])
# What a file holds: its nuclei, and how many objects have no area.
TRUTHS: dict[str, tuple[Any, list[shapely.Geometry], int]] = {
    "a bare collection of geometries": (geometries(ONE, TWO, THREE), [ONE, TWO, THREE], 0),
    "with a line": (geometries(ONE, LINE, TWO), [ONE, TWO], 1),
    "a list of them": ([geometries(ONE), geometry(TWO)], [ONE, TWO], 0),
    "within a feature": (
        collection({"type": "Feature", "geometry": geometries(ONE, LINE, TWO)}, feature(THREE)),
        [ONE | TWO, THREE],
        0,
    ),
    "nested collections": (
        {"type": "Feature", "geometry": {**geometries(), "geometries": [geometries(ONE, TWO)]}},
        [ONE | TWO],
        0,
    ),
    "a feature of lines": (
        collection({"type": "Feature", "geometry": geometries(LINE)}, feature(ONE)),
        [ONE],
        1,
    ),
    "children": (collection(NESTED, feature(THREE)), [ONE, TWO, THREE], 0),
    "children of a nucleus": (feature(ONE, childObjects=[feature(TWO)]), [ONE, TWO], 0),
    "children of old versions": (feature(ONE, children=[feature(TWO)]), [ONE, TWO], 0),
    "children of children": (feature(ONE, childObjects=[NESTED]), [ONE, ONE, TWO], 0),
    "a hierarchy": ({"root": NESTED}, [ONE, TWO], 0),
    "a list of collections": ([collection(feature(ONE)), [feature(TWO)]], [ONE, TWO], 0),
    "points and lines": (
        collection(feature(shapely.Point(3, 3)), feature(ONE), feature(LINE), feature(None)),
        [ONE],
        3,
    ),
}


@pytest.mark.parametrize("kind", TRUTHS)
def test_ground_truth_is_read_as_qupath_reads_it(tmp_path: Path, kind: str) -> None:
    content, nuclei, others = TRUTHS[kind]
    file = tmp_path / "a.geojson"
    for mark in (b"", b"\xef\xbb\xbf"):
        file.write_bytes(mark + json.dumps(content).encode())
        truth = read_ground_truth([file], ENTRY)
        assert len(truth.polygons) == len(nuclei)
        for polygon, nucleus in zip(truth.polygons, nuclei, strict=True):
            assert polygon.equals(nucleus)
        note = f"objects without area left out, such as points and lines: {others}"
        assert truth.note == (note if others else None)


def test_a_region_with_cells_nested_in_it_is_left_out(tmp_path: Path) -> None:
    region = feature(shapely.box(0, 0, 50, 40), childObjects=[feature(ONE), feature(TWO)])
    file = tmp_path / "a.geojson"
    file.write_text(json.dumps(collection(region)))
    truth = read_ground_truth([file], ENTRY)
    assert [*map(shapely.area, truth.polygons)] == [ONE.area, TWO.area]
    assert str(truth.note).endswith("as regions do: 1")


@pytest.mark.parametrize(
    ("classification", "name"),
    [
        ("Nucleus", "Nucleus"),
        ("Tumor: Positive", "Tumor: Positive"),
        ("Tumor:Positive", "Tumor: Positive"),
        ({"name": "Nucleus", "color": [1, 2, 3]}, "Nucleus"),
        ({"names": ["Tumor", "Positive"], "color": [1, 2, 3]}, "Tumor: Positive"),
        ({"name": "Positive", "parentClass": {"name": "Tumor"}, "colorRGB": -1}, "Tumor: Positive"),
        (
            {"name": "1+", "parentClass": {"name": "Cell", "parentClass": {"name": "Tumor"}}},
            "Tumor: Cell: 1+",
        ),
        ({"name": "Tumor", "colorRGB": -3670016}, "Tumor"),
        ({}, ""),
        (None, ""),
        (7, ""),
    ],
)
def test_classes_are_read_as_qupath_reads_them(
    tmp_path: Path, classification: Any, name: str
) -> None:
    file = tmp_path / "regions.geojson"
    file.write_text(json.dumps(feature(ONE, classification=classification)))
    found = read_objects(file)
    assert (found.classes.tolist(), len(found.areas)) == ([name], 1)


# ---------------------------------------------------------------- label images

LABELS = np.zeros((40, 60), dtype=np.int32)
LABELS[4:14, 6:18] = 3
LABELS[20:30, 40:48] = 300
AREAS = [120.0, 80.0]


def save(path: Path, labels: Any) -> Path:
    if path.suffix == ".npy":
        np.save(path, labels)
    elif path.suffix == ".png":
        Image.fromarray(labels).save(path)
    else:
        byteorder: Any = ">" if labels.dtype.byteorder == ">" else "<"
        tifffile.imwrite(path, labels, byteorder=byteorder)
    return path


@pytest.mark.parametrize("kind", [">i4", ">u2", "<i4", ">i8", "<u8", "<u2"])
@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_the_order_of_bytes_does_not_matter(tmp_path: Path, kind: str, suffix: str) -> None:
    file = save(tmp_path / f"a{suffix}", LABELS.astype(kind))
    assert [*map(shapely.area, read_ground_truth([file], ENTRY).polygons)] == AREAS


@pytest.mark.parametrize(
    ("name", "labels", "words"),
    [
        (
            "a.png",
            np.where(LABELS > 0, 255, 0).astype(np.uint8),
            "a mask, not instance labels (pieces: 2",
        ),
        (
            "a.png",
            np.where(LABELS == 3, 255, 0).astype(np.uint8),
            "a mask, not instance labels (pieces: 1",
        ),
        (
            "a.tif",
            np.where(LABELS > 0, 1, 0).astype(np.uint8),
            "a mask, not instance labels (pieces: 2",
        ),
        ("a.npy", LABELS > 0, "has no instance labels, but bool"),
        ("a.npy", np.indices(LABELS.shape).sum(0) // 3 % 4, "values: 3)"),
        ("a.npy", np.where(LABELS > 0, LABELS, -1), "has negative labels (-1): save 0 for"),
        ("a.tif", np.where(LABELS > 0, LABELS, -1).astype(np.int16), "has negative labels (-1)"),
        ("a.npy", LABELS.astype(float), "has no instance labels, but float64"),
        ("a.tif", LABELS.astype(np.float32), "has no instance labels, but float32"),
        ("a.npy", LABELS[:0], "a.svs is 60 x 40 px, but"),
    ],
)
def test_masks_and_other_labels_are_refused(
    tmp_path: Path, name: str, labels: Any, words: str
) -> None:
    file = save(tmp_path / name, labels)
    with pytest.raises(GroundTruthError) as error:
        read_ground_truth([file], ENTRY)
    assert words in one_line(str(error.value))
    assert one_line(str(error.value)).startswith("a.svs")


def test_many_labels_are_no_mask_wherever_they_begin(tmp_path: Path) -> None:
    labels = np.zeros((600, 60), dtype=np.int32)
    for k in range(40):
        labels[300 + 7 * k : 305 + 7 * k, 5:15] = labels[300 + 7 * k : 305 + 7 * k, 30:40] = k + 1
    file = save(tmp_path / "a.npy", labels)
    entry = ImageEntry("1", "a.svs", Path("a.svs"), size=(60, 600))
    assert len(read_ground_truth([file], entry).polygons) == 40
    file = save(tmp_path / "a.npy", (labels > 0).astype(np.uint8))
    with pytest.raises(GroundTruthError, match=r"a mask, .* \(pieces: 80, values: 1\)"):
        read_ground_truth([file], entry)


def test_a_tiff_of_very_many_pages_is_refused(tmp_path: Path) -> None:
    """A damaged directory has millions: tifffile would read them all before it answers."""
    file = tmp_path / "a.tif"
    with tifffile.TiffWriter(file) as tiff:
        for _ in range(1001):
            tiff.write(np.zeros((1, 1), dtype=np.uint8), metadata=None)
    with pytest.raises(GroundTruthError, match="more than 1,000 pages"):
        read_ground_truth([file], ENTRY)


def test_one_nucleus_is_no_mask_and_none_is_none(tmp_path: Path) -> None:
    one = save(tmp_path / "a.npy", np.where(LABELS == 3, 1, 0))
    assert [*map(shapely.area, read_ground_truth([one], ENTRY).polygons)] == AREAS[:1]
    none = save(tmp_path / "a.npy", np.zeros_like(LABELS))
    assert len(read_ground_truth([none], ENTRY).polygons) == 0


# ---------------------------------------------------------------- headers of slides


@pytest.mark.parametrize("bit", [20, 24, 30])
def test_a_size_that_no_slide_has_is_refused(tmp_path: Path, bit: int) -> None:
    """One flipped bit of the width: its thumbnail alone would take 48 GB, or an hour."""
    file = tmp_path / "a.tif"
    pixels = np.zeros((256, 320, 3), dtype=np.uint8)
    resolution: dict[str, Any] = {"resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(file, pixels, photometric="rgb", tile=(64, 64), dtype=np.uint8, **resolution)
    with tifffile.TiffFile(file, mode="r+") as tiff:
        width = tiff.pages[0].tags["ImageWidth"]  # type: ignore[union-attr]
        width.overwrite(320 + (1 << bit))
    with pytest.raises(SlideError, match=r"is \d+ x 256 px of 0\.5 µm, which is larger"):
        Slide.open(ImageEntry("1", "a.tif", file))


# ---------------------------------------------------------------- names that are not UTF-8


def test_uris_of_names_that_are_not_utf_8() -> None:
    assert path_of_uri("file:/caf%E9.svs") == PurePosixPath("/caf\udce9.svs")


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are Unicode there")
def test_files_whose_name_is_latin_1_are_done(tmp_path: Path) -> None:
    """The whole way, in a process of its own: init, run, status, report."""
    folder = tmp_path / os.fsdecode(b"K\xf6ln")
    folder.mkdir()
    slide = folder / os.fsdecode(b"caf\xe9.png")
    sample = ImageEntry("1", "a.svs", ROOT / "sample_project" / "CMU-1-Small-Region.svs")
    Image.fromarray(Slide.open(sample).read(Box(1500, 900, 1900, 1300))).save(slide)
    settings = tmp_path / "quick.toml"
    settings.write_text('recipe = "patchcl"\n[patchcl]\nmax_steps = 40\nbatch = 2\ncrops = 8\n')
    project = folder / "project"

    def call(*arguments: Any, charset: str = "utf-8") -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-m", "patchcl_qupath.cli", *map(os.fsencode, arguments)]
        environment = os.environ | {"PYTHONIOENCODING": charset}
        return subprocess.run(command, capture_output=True, env=environment)

    made = call("init", project, slide, "--mpp", "0.5")
    assert made.returncode == 0, made.stderr
    ran = call("run", project, "--config", settings, "--json")
    assert ran.returncode == 0, ran.stderr
    (image,) = json.loads(ran.stdout)["images"]
    assert (image["image"], image["problem"]) == ("caf?.png", None)
    assert image["nuclei"] > 10
    results = project / "patchcl" / "results" / "1"
    assert (results / "nuclei.parquet").is_file()
    assert json.loads((results / "result.json").read_text("utf-8"))["image"] == "caf?.png"
    page = (project / "patchcl" / "report" / "index.html").read_text("utf-8")
    assert "caf?.png" in page
    shown = call("status", project, charset="ascii")
    assert shown.returncode == 0, shown.stderr
    assert b"caf?.png" in shown.stdout
    by_name = call("status", project, "--image", b"caf\xe9.png", "--json")
    assert json.loads(by_name.stdout)["images"][0]["state"] == "done"


# ---------------------------------------------------------------- mutated files


@pytest.mark.parametrize("kind", ["projects", "regions", "labels", "truth", "slides"])
def test_mutated_files_are_answered(kind: str) -> None:
    """The first of those of benchmarks/hostile.py."""
    answer = runpy.run_path(str(ROOT / "benchmarks" / "hostile.py"))["answer"]
    answers = [answer(kind, number, seed=0) for number in range(25)]
    assert [trouble for word, trouble in answers if word == "finding"] == []
    assert len({word for word, _ in answers}) > 1
