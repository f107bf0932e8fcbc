"""QuPath projects, read as files: the .qpproj file, and the images that it lists."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
from PIL import Image
from results import result_of
from slides import scene

import patchcl_qupath.project.files as project_files
import patchcl_qupath.storage.files as storage_files
from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.errors import ProjectError, SlideError, StorageError, quoted
from patchcl_qupath.project import NewImage, init_project, open_project
from patchcl_qupath.project.create import to_uri
from patchcl_qupath.project.qpproj import path_of_uri
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.status import image_statuses
from patchcl_qupath.storage.records import write_record

OPENSLIDE = "qupath.lib.images.servers.openslide.OpenslideServerBuilder"
BIO_FORMATS = "qupath.lib.images.servers.bioformats.BioFormatsServerBuilder"


def builder(uri: str, **more: Any) -> dict[str, Any]:
    return {"builderType": "uri", "providerClassName": OPENSLIDE, "uri": uri, "args": []} | more


def calibrated(mpp: float, unit: str = "µm", **more: Any) -> dict[str, Any]:
    side = {"value": mpp, "unit": unit}
    return {"pixelCalibration": {"pixelWidth": side, "pixelHeight": side}} | more


def write_project(folder: Path, uri: str, *builders: dict[str, Any]) -> Path:
    """A project file as QuPath leaves it, last saved at ``uri``."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [
        {"serverBuilder": b, "entryID": i, "imageName": f"image {i}", "metadata": {}}
        for i, b in enumerate(builders, start=1)
    ]
    path = folder / "project.qpproj"
    path.write_text(json.dumps({"version": "0.5.1", "uri": uri, "images": images}), "utf-8")
    return path


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"")
    return path


def test_the_sample_project_can_be_moved(tmp_path: Path, sample_project: Path) -> None:
    shutil.copytree(sample_project, tmp_path / "elsewhere #1", ignore=lambda *_: {"patchcl"})
    project = open_project(tmp_path / "elsewhere #1")
    (entry,) = project.images()
    assert entry.path == tmp_path / "elsewhere #1" / "CMU-1-Small-Region.svs"
    assert (entry.id, entry.name) == ("1", "CMU-1-Small-Region.svs")
    assert entry.problem is None
    assert Slide.open(entry).mpp_level0 == (0.499, 0.499)
    assert project.layout.root == tmp_path / "elsewhere #1" / "patchcl"
    assert project.layout.results(entry.id).parent == project.layout.root / "results"


def test_version_0_3(shared_data: Path) -> None:
    folder = shared_data / "qupath_projects" / "nedaghohabi_v0.3.2"
    entries = open_project(folder / "project.qpproj").images()
    assert len({entry.id for entry in entries}) == len(entries) == 434
    assert entries[0].name.startswith("TCGA-D5-5539-01Z-00-DX1")
    assert entries[0].size == (176501, 85037)
    assert Counter(entry.mpp for entry in entries)[(0.252, 0.252)] == 217
    for entry in entries:
        assert entry.problem is not None
        assert "I:\\COAD-TCGA-Diagnostic-Slide\\" in entry.problem
        assert "put the file beside the project" in entry.problem


def test_version_0_5(shared_data: Path) -> None:
    entries = open_project(shared_data / "qupath_projects" / "avyan-k_btc_v0.5.1").images()
    assert [entry.id for entry in entries] == ["117", "118", "119", "120"]
    assert entries[0].name == "AS21057515 - 2024-05-07 19.34.42.ndpi"
    assert entries[0].path.name == entries[0].name  # %20 is a space
    assert entries[0].mpp == (0.22974245870379303, 0.22977941176470587)
    assert all("is not at /home/kavy/" in str(entry.problem) for entry in entries)


def test_version_0_6_fluorescence(shared_data: Path) -> None:
    (entry,) = open_project(shared_data / "qupath_projects" / "CosciaLab_v0.6.0").images()
    assert "TD_01_verysmall_mIF.ome.tif is a fluorescence" in str(entry.problem)
    assert not entry.use_bounds  # Bio-Formats does not crop


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:/home/a/b%20c.svs", PurePosixPath("/home/a/b c.svs")),
        ("file:///home/a/%C3%BC%23.svs", PurePosixPath("/home/a/ü#.svs")),
        ("file:/D:/a/b%20c.svs", PureWindowsPath("D:/a/b c.svs")),
        ("file:///D:/a/b.svs", PureWindowsPath("D:/a/b.svs")),
        ("file://server/share/b.svs", PureWindowsPath("//server/share/b.svs")),
        ("file:////server/share/b.svs", PureWindowsPath("//server/share/b.svs")),
        ("https://omero.example.org/webclient/?show=image-1", None),
        ("omero:iid=1", None),
        ("", None),
    ],
)
def test_uris_as_java_writes_them(uri: str, path: PurePosixPath | PureWindowsPath | None) -> None:
    assert path_of_uri(uri) == path


@pytest.mark.parametrize(
    ("project", "image"),
    [
        ("file:/old/qupath/project.qpproj", "file:/old/slides/a.svs"),
        ("file:/D:/old/qupath/project.qpproj", "file:/D:/old/slides/a.svs"),
        ("file:/D:/old/qupath/project.qpproj", "file:/d:/OLD/slides/a.svs"),
        ("file://nas/old/qupath/project.qpproj", "file://nas/old/slides/a.svs"),
    ],
)
def test_images_that_moved_with_their_project(tmp_path: Path, project: str, image: str) -> None:
    moved = touch(tmp_path / "new" / "slides" / "a.svs")
    touch(tmp_path / "new" / "qupath" / "a.svs")  # of the same name, but not in its place
    path = write_project(tmp_path / "new" / "qupath", project, builder(image))
    assert open_project(path).images()[0].path == moved


def test_an_image_that_was_not_moved_is_found_first(tmp_path: Path) -> None:
    there = touch(tmp_path / "old" / "slides" / "a.svs")
    touch(tmp_path / "new" / "slides" / "a.svs")
    was = (tmp_path / "old" / "qupath" / "project.qpproj").as_uri()
    path = write_project(tmp_path / "new" / "qupath", was, builder(there.as_uri()))
    assert open_project(path).images()[0].path == there


def test_lost_images_are_searched_for_four_folders_deep(tmp_path: Path) -> None:
    uris = [builder(f"file:/I:/gone/{name}.svs") for name in "abcd"]
    path = write_project(tmp_path, "file:/D:/project.qpproj", *uris)
    near = touch(tmp_path / "a.svs")
    touch(tmp_path / "sub" / "a.svs")
    deep = touch(tmp_path / "1" / "2" / "3" / "b.svs")
    touch(tmp_path / "1" / "2" / "3" / "4" / "c.svs")
    touch(tmp_path / ".hidden" / "d.svs")
    a, b, c, d = open_project(path).images()
    assert (a.path, a.problem) == (near, None)
    assert (b.path, b.problem) == (deep, None)
    for lost in (c, d):
        assert "is not at I:\\gone" in str(lost.problem)


@pytest.mark.parametrize("moved", [False, True])
def test_a_path_that_windows_finds_nothing_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: bool
) -> None:
    """As here, where nothing is."""
    monkeypatch.setattr(storage_files, "WINDOWS", True)
    slide = f"{'x' * 240}.svs"
    was = "file:/old/project.qpproj" if moved else ""
    uri = f"file:/old/{slide}" if moved else (tmp_path / slide).as_uri()
    (entry,) = open_project(write_project(tmp_path, was, builder(uri))).images()
    expected = f"image 1 is not found at {tmp_path / slide}, which is longer than 259 characters: "
    assert entry.problem is not None
    assert entry.problem.startswith(expected)
    with pytest.raises(SlideError) as found:
        Slide.open(ImageEntry("1", "image 1", tmp_path / slide))
    assert str(found.value) == entry.problem
    (lost,) = open_project(write_project(tmp_path, "", builder("file:/a.svs"))).images()
    assert "nor in the project's folder" in str(lost.problem)


@pytest.mark.skipif(sys.platform == "win32", reason="links are not for everyone there")
@pytest.mark.parametrize("windows", [False, True])
def test_a_folder_that_is_mapped_keeps_its_short_path_on_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, windows: bool
) -> None:
    """A link stands for a drive here: both are followed by ``resolve``."""
    monkeypatch.setattr(project_files, "WINDOWS", windows)
    real = write_project(tmp_path / "long", "")
    drive = tmp_path / "Z"
    drive.symlink_to(tmp_path / "long", target_is_directory=True)
    opened = drive / real.name if windows else real
    assert open_project(drive).path == open_project(drive / real.name).path == opened
    monkeypatch.chdir(drive)
    assert open_project(Path(real.name)).path.is_absolute()
    link = tmp_path / "link.qpproj"  # QuPath's data are beside the file itself
    link.symlink_to(real)
    assert open_project(link).path == real


def test_images_that_are_not_files_are_refused(tmp_path: Path) -> None:
    path = write_project(tmp_path, "", builder("https://omero.example.org/?show=image-1"))
    assert "image 1 is not a file (https://omero" in str(open_project(path).images()[0].problem)


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        ("rotated", "rotated"),
        ("cropped", "cropped"),
        ("flipped", "flipped"),
        ("affine", "transformed"),
        ("sparse", "several images"),
        ("channels", "several images"),
        ("color_deconvolved", "colour"),
        ("swapRedBlue", "swapped"),
        ("made-up", "made-up"),
    ],
)
def test_views_of_other_images_are_refused(tmp_path: Path, kind: str, word: str) -> None:
    original = touch(tmp_path / "a.svs").as_uri()
    view = {"builderType": kind, "builder": builder(original)}
    path = write_project(tmp_path, "", view, builder(original))
    refused, used = open_project(path).images()
    assert word in str(refused.problem)
    assert "image 1" in str(refused.problem)
    assert "add the original image" in str(refused.problem)
    assert used.problem is None


def test_a_generated_pyramid_is_the_image_within(tmp_path: Path) -> None:
    image = touch(tmp_path / "a.png")
    inner = builder(image.as_uri(), providerClassName=BIO_FORMATS, metadata=calibrated(1, "px"))
    pyramid = {"builderType": "pyramidize", "metadata": calibrated(0.25), "builder": inner}
    (entry,) = open_project(write_project(tmp_path, "", pyramid)).images()
    assert (entry.path, entry.mpp, entry.problem) == (image, (0.25, 0.25), None)
    turned = {"builderType": "pyramidize", "builder": {"builderType": "rotated", "builder": inner}}
    (entry,) = open_project(write_project(tmp_path, "", turned)).images()
    assert "rotated" in str(entry.problem)


def test_pixel_size_is_the_one_in_the_project_file(tmp_path: Path) -> None:
    uri = touch(tmp_path / "a.svs").as_uri()
    known = [calibrated(0.25), calibrated(1, "px"), calibrated(float("nan")), {}]
    path = write_project(
        tmp_path, "", *(builder(uri, metadata=metadata) for metadata in known), builder(uri)
    )
    server = tmp_path / "data" / "4" / "server.json"  # QuPath writes it, and never reads it
    touch(server).write_text(json.dumps(builder(uri, metadata=calibrated(0.9))), "utf-8")
    mpps = [entry.mpp for entry in open_project(path).images()]
    assert mpps == [(0.25, 0.25), None, None, None, None]


def test_no_crop_and_further_series(tmp_path: Path) -> None:
    uri = touch(tmp_path / "a.svs").as_uri()
    path = write_project(
        tmp_path,
        "",
        builder(uri),
        builder(uri, args=["--no-crop"]),
        builder(uri, providerClassName=BIO_FORMATS, args=["--series", "0"]),
        builder(uri, providerClassName=BIO_FORMATS, args=["--series", "2"]),
    )
    entries = open_project(path).images()
    assert [entry.use_bounds for entry in entries] == [True, False, False, False]
    assert [entry.problem for entry in entries] == [None] * 4
    assert [entry.series for entry in entries] == [None, None, 0, 2]


def test_fluorescence_set_by_a_person_is_refused(tmp_path: Path) -> None:
    uri = touch(tmp_path / "a.svs").as_uri()
    path = write_project(tmp_path, "", *[builder(uri)] * 3, builder(uri, metadata={"isRGB": False}))
    for number, kind in ((1, "FLUORESCENCE"), (2, "BRIGHTFIELD_H_E")):
        summary = touch(tmp_path / "data" / str(number) / "summary.json")
        summary.write_text(json.dumps({"imageType": kind}), "utf-8")
    one, two, three, four = open_project(path).images()
    assert "fluorescence" in str(one.problem)
    assert two.problem is three.problem is None
    assert "image 4 is a fluorescence or multichannel image" in str(four.problem)


def test_paths_that_are_not_projects_are_refused(tmp_path: Path, sample_project: Path) -> None:
    slide = sample_project / "CMU-1-Small-Region.svs"
    with pytest.raises(ProjectError, match=r"not a QuPath project: .*init DIR ") as no_project:
        open_project(slide)
    assert str(no_project.value).endswith(f"`patchcl-qp init DIR {quoted(slide)}`")
    (tmp_path / "README.md").write_text("text", "utf-8")
    with pytest.raises(ProjectError, match=r"README\.md is neither .* or of its folder$"):
        open_project(tmp_path / "README.md")
    with pytest.raises(ProjectError, match=r"does not exist: give .*\.qpproj, or of its folder$"):
        open_project(tmp_path / "none.qpproj")
    with pytest.raises(
        ProjectError, match=r"holds no project \(.qpproj\): make one of .* init .* or name"
    ):
        open_project(tmp_path)
    (tmp_path / "a.qpproj").write_text("{", "utf-8")
    with pytest.raises(ProjectError, match=r"a\.qpproj is damaged"):
        open_project(tmp_path)
    (tmp_path / "a.qpproj.backup").write_text("{}", "utf-8")
    with pytest.raises(ProjectError, match=r"put a\.qpproj\.backup in its place"):
        open_project(tmp_path)
    for content in ("{}", "[]", '{"images": [1]}', '{"images": [{"path": "a.svs"}]}'):
        (tmp_path / "a.qpproj").write_text(content, "utf-8")
        with pytest.raises(ProjectError, match=r"a\.qpproj does not list its images"):
            open_project(tmp_path)
    (tmp_path / "b.qpproj").write_text("{}", "utf-8")
    with pytest.raises(
        ProjectError, match=r"several projects: name one of them, a\.qpproj, b\.qpproj"
    ):
        open_project(tmp_path)


@pytest.mark.parametrize(
    "left",
    [
        "data/2/data.qpdata",
        "patchcl/regions/2.geojson",
        "patchcl/results/2/result.json",
        "patchcl/backups/2/data.qpdata.1.damaged",
        "patchcl/report/outcomes/2.json",
    ],
)
def test_init_takes_nothing_of_an_earlier_project(tmp_path: Path, left: str) -> None:
    """Images are numbered anew: what was drawn in the second one lies in another slide."""
    images = [NewImage(touch(tmp_path / name), [(9, 9)], (0.5, 0.5)) for name in ("a.png", "b.png")]
    file = tmp_path / "made" / left
    file.parent.mkdir(parents=True)
    touch(file)
    with pytest.raises(ProjectError, match="is of an image of an earlier project"):
        init_project(tmp_path / "made", images)
    assert not (tmp_path / "made" / "project.qpproj").exists()
    model = tmp_path / "made" / "patchcl" / "models" / "patchcl.pt"
    model.parent.mkdir(parents=True, exist_ok=True)
    touch(model)
    init_project(tmp_path / "made", images[:1])  # there is no second one, and models are kept
    assert model.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="links need a permission")
def test_init_does_not_follow_links(tmp_path: Path) -> None:
    """What they lead to may have no suffix, or bear the name of a patient."""
    (tmp_path / "store").mkdir()
    image = Image.fromarray(scene(60, 40, (0.5, 0.5)))
    image.save(tmp_path / "store" / "3f2a9c", "png")
    image.save(tmp_path / "store" / "PATIENT-NAME.png")
    (tmp_path / "links").symlink_to(tmp_path / "store")
    links = [tmp_path / "case1.png", tmp_path / "anon-1.png"]
    for link, name in zip(links, ["3f2a9c", "PATIENT-NAME.png"], strict=True):
        link.symlink_to(tmp_path / "store" / name)
    path = init_project(
        tmp_path / "links" / "project", [NewImage.of_file(link, 0.5) for link in links]
    )
    assert path == tmp_path / "links" / "project" / "project.qpproj"
    text = path.read_text("utf-8")
    assert "PATIENT" not in text
    assert to_uri(path) in text
    entries = open_project(path).images()
    assert [entry.path for entry in entries] == links
    assert [Slide.open(entry).size for entry in entries] == [(60, 40)] * 2


def test_a_pixel_size_in_other_digits_is_no_change(tmp_path: Path) -> None:
    image = touch(tmp_path / "a.png")
    for mpp, is_changed in ((0.5, False), (0.5000001, False), (0.25, True)):
        folder = tmp_path / str(mpp)
        project = open_project(init_project(folder, [NewImage(image, [(9, 9)], (mpp, 0.5))]))
        write_record(project.layout.result("1"), result_of(0))  # of 0.5 µm/px
        (status,) = image_statuses(project, project.images())
        assert ("pixel size" in status.changed) is is_changed


def test_init_makes_a_project_that_reads_the_same(tmp_path: Path) -> None:
    slide, crop = touch(tmp_path / "ä #1.svs"), touch(tmp_path / "50%.png")
    twin = touch(tmp_path / "sub" / "50%.png")
    new = [
        NewImage(slide, [(4000, 3000), (1000, 750)]),
        NewImage(crop, [(1000, 800)], (0.25, 0.26)),
        NewImage(twin, [(1001, 801), (250, 200), (61, 50)], (0.5, 0.5)),
    ]
    path = init_project(tmp_path / "made", new)
    entries = open_project(path).images()
    assert [entry.path for entry in entries] == [slide, crop, twin]
    assert [entry.name for entry in entries] == ["ä #1.svs", "50%.png", "50%.png"]
    assert [entry.mpp for entry in entries] == [None, (0.25, 0.26), (0.5, 0.5)]
    assert [entry.size for entry in entries] == [None, (1000, 800), (1001, 801)]
    assert [entry.id for entry in entries] == ["1", "2", "3"]
    assert all(entry.problem is None for entry in entries)
    content = json.loads(path.read_text("utf-8"))
    levels = content["images"][2]["serverBuilder"]["metadata"]["levels"]
    assert [level["downsample"] for level in levels] == pytest.approx([1, 4, 16.215], rel=1e-4)
    assert [file.name for file in path.parent.iterdir()] == ["project.qpproj"]

    with pytest.raises(ProjectError, match="is there already"):
        init_project(tmp_path / "made", new)
    with pytest.raises(ProjectError, match="a project needs an image"):
        init_project(tmp_path / "none", [])
    with pytest.raises(ProjectError, match=r"new\.qpproj is named as the file of a project: name"):
        init_project(tmp_path / "new.qpproj", new)
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "new.qpproj").exists()
    touch(tmp_path / "file")
    with pytest.raises(ProjectError, match="file is a file: name the folder for the project first"):
        init_project(tmp_path / "file", new)
    with pytest.raises(StorageError, match="cannot write"):
        init_project(tmp_path / "file" / "below", new)
