"""The paquo backend: errors, and recovery from them. test_backends.py tests what it writes."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import msgspec
import numpy as np
import psutil
import pytest
import qupath
import shapely
from click.testing import CliRunner
from qupath import nuclei
from results import result_of
from slides import scene, write_series, write_tiff

from patchcl_qupath import library
from patchcl_qupath.cli import main
from patchcl_qupath.config import CORRECTED, BackendKind, Config, ResultConfig
from patchcl_qupath.datatypes import Box, Corrections, ImageEntry, Nuclei
from patchcl_qupath.errors import ConfigError, ImageError, ProjectError, StorageError
from patchcl_qupath.models.model import Model
from patchcl_qupath.models.network import NucleusNetwork
from patchcl_qupath.pipeline import Run
from patchcl_qupath.project import NewImage, compiled_scripts, init_project, jvm, open_project
from patchcl_qupath.project import paquo as backend
from patchcl_qupath.project.compiled_scripts import cache_folder
from patchcl_qupath.project.files import FilesProject
from patchcl_qupath.project.installed import find_qupath
from patchcl_qupath.project.jvm import Done, Process, contour_vertices, java_options, uuid_halves
from patchcl_qupath.project.paquo import PaquoProject
from patchcl_qupath.project.protocol import Backend
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.status import image_status
from patchcl_qupath.storage.layout import Layout

SAMPLE = Path(__file__).parent.parent / "sample_project"
SLIDE = SAMPLE / "CMU-1-Small-Region.svs"
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="QuPath's folder as it is on Linux")

LOOK = """
def all = hierarchy.getAllObjects(false)
def one = all.find { it.getPathClass() != null }
groovy.json.JsonOutput.toJson([count: all.size(), class_name: one?.getPathClass()?.toString(),
    color: one?.getPathClass()?.getColor(), detection: one?.isDetection()])
"""

IDS = """
groovy.json.JsonOutput.toJson(hierarchy.getAllObjects(false)*.getID()*.toString().sort())
"""
DRAW = """
import qupath.lib.objects.PathObjects
import qupath.lib.roi.ROIs

def roi = ROIs.createRectangleROI(1, 1, 3, 3, qupath.lib.regions.ImagePlane.getDefaultPlane())
hierarchy.addObject(PathObjects.createAnnotationObject(roi))
entry.saveImageData(imageData)
'"drawn"'
"""


# ---------------------------------------------------------------- without a QuPath


def qupath_folder(folder: Path, jar: str) -> Path:
    """What looks like a QuPath on Linux."""
    (folder / "lib" / "app").mkdir(parents=True)
    (folder / "lib" / "app" / jar).touch()
    java = folder / "lib" / "runtime" / "lib" / "server" / "libjvm.so"
    java.parent.mkdir(parents=True)
    java.touch()
    return folder


@LINUX
def test_qupath_is_found_without_starting_java(tmp_path: Path) -> None:
    pytest.importorskip("paquo")
    folder = qupath_folder(tmp_path, "qupath-core-0.6.0-rc3.jar")
    code = (
        "import sys; from pathlib import Path;"
        "from patchcl_qupath.project.installed import find_qupath;"
        "print(find_qupath(Path(sys.argv[1]))); import jpype; print(jpype.isJVMStarted())"
    )
    printed = subprocess.check_output([sys.executable, "-c", code, folder], text=True)
    assert printed == f"0.6.0-rc3 in {folder / 'lib' / 'app'}\nFalse\n"


@LINUX
@pytest.mark.parametrize(
    ("jar", "message"),
    [
        ("qupath-core-0.3.2.jar", r"QuPath 0\.3\.2 in .* is too old: install QuPath 0\.4 or later"),
        ("other.jar", r"is not complete: install it anew"),
    ],
)
def test_unusable_qupath_is_refused(tmp_path: Path, jar: str, message: str) -> None:
    pytest.importorskip("paquo")
    with pytest.raises(ProjectError, match=message):
        find_qupath(qupath_folder(tmp_path, jar))


@LINUX
def test_qupath_without_java_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("paquo")
    folder = qupath_folder(tmp_path, "qupath-core-0.5.1.jar")
    shutil.rmtree(folder / "lib" / "runtime")
    with pytest.raises(
        ProjectError, match=r"holds no complete QuPath with its Java: pass --qupath"
    ):
        find_qupath(folder)


def by_settings(home: Path, **settings: str) -> str:
    """The backend of a project, in a process with some settings of paquo, which reads them once."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("PAQUO_")}
    own |= {"HOME": str(home), "CONDA_PREFIX": "", "LOCALAPPDATA": ""} | settings
    code = (
        "import sys; from pathlib import Path; from patchcl_qupath.project import open_project;"
        "print(open_project(Path(sys.argv[1])).backend)"
    )
    command = [sys.executable, "-c", code, SAMPLE]
    return subprocess.check_output(command, env=own, cwd=home, text=True).strip()


@LINUX
@pytest.mark.parametrize(
    ("place", "settings"),
    [
        ("QuPath", {"QUPATH_SEARCH_DIRS": '["~"]'}),
        ("QuPath", {"QUPATH_SEARCH_DIRS": "~"}),
        ("AppData/Local/QuPath-0.6.0", {"QUPATH_SEARCH_DIRS": '["~/AppData/Local"]'}),
        ("any", {"QUPATH_DIR": "~/any"}),
    ],
)
def test_qupath_is_found_in_a_home(tmp_path: Path, place: str, settings: dict[str, str]) -> None:
    pytest.importorskip("paquo")
    found = qupath_folder(tmp_path / place, "qupath-core-0.6.0.jar") / "lib" / "app"
    given = {f"PAQUO_{name}": value for name, value in settings.items()}
    assert by_settings(tmp_path, **given) == f"paquo, with QuPath 0.6.0 in {found}"


@LINUX
def test_qupath_is_found_where_windows_keeps_what_a_user_installs(tmp_path: Path) -> None:
    pytest.importorskip("paquo")
    local = tmp_path / "moved"
    found = qupath_folder(local / "QuPath-0.6.0", "qupath-core-0.6.0.jar") / "lib" / "app"
    folders = {"PAQUO_QUPATH_SEARCH_DIRS": '["~/AppData/Local"]', "LOCALAPPDATA": str(local)}
    assert by_settings(tmp_path, **folders) == f"paquo, with QuPath 0.6.0 in {found}"


@LINUX
def test_a_folder_that_cannot_be_searched_does_not_hide_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paquo = pytest.importorskip("paquo.jpype_backend")
    closed, place = tmp_path / "closed", tmp_path / "place"
    closed.mkdir()
    (place / "QuPath-private").mkdir(parents=True)
    scandir, is_dir = os.scandir, Path.is_dir

    def refusing(path: Any) -> Any:  # root may read all
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    monkeypatch.setattr(
        "paquo._config.to_kwargs",
        lambda _: {
            "qupath_dir": "",
            "jvm_path_override": "",
            "qupath_search_dirs": [str(closed), str(place)],
            "qupath_search_dir_regex": "(?i)qupath.*",
        },
    )
    with pytest.raises(ProjectError, match="no QuPath in the usual places: pass --qupath DIR"):
        find_qupath()
    folder = qupath_folder(place / "QuPath-0.6.0", "qupath-core-0.6.0.jar")
    assert find_qupath() == f"0.6.0 in {folder / 'lib' / 'app'}"

    def of_another_user(path: Path) -> bool:
        if "QuPath-private" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return is_dir(path)

    monkeypatch.setattr(paquo.Path, "is_dir", of_another_user)
    with pytest.raises(ProjectError, match=r"^the usual places cannot be .*QuPath-private"):
        find_qupath()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("MOCK_BACKEND", "x", "mock_backend must is_type_of"),
        ("QUPATH_SEARCH_DIR_REGEX", "(", "missing ), unterminated subpattern at position 0"),
        ("QUPATH_DIR", "5", "expected str, bytes or os.PathLike object, not int"),
        ("QUPATH_SEARCH_DIRS", "[5]", "expected str, bytes or os.PathLike object, not int"),
    ],
)
def test_settings_of_paquo_that_cannot_be_used_are_named(
    tmp_path: Path, name: str, value: str, reason: str
) -> None:
    pytest.importorskip("paquo")
    found = by_settings(tmp_path, **{f"PAQUO_{name}": value})
    assert found.startswith(f"files, since paquo's settings cannot be used ({reason}")
    assert found.endswith(f": correct .paquo.toml or PAQUO_{name}")


def test_a_settings_file_of_paquo_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    pytest.importorskip("paquo")
    file = tmp_path / ".paquo.toml"
    file.write_text('qupath_dir = "C:\\Users\\me"\n')
    assert by_settings(tmp_path) == (
        "files, since paquo's settings cannot be used (Invalid hex value (at line 1, column 19)): "
        f"correct {file}"
    )


def test_auto_is_files_without_paquo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paquo._config", None)
    project = open_project(SAMPLE)
    assert str(project.backend) == (
        "files, since paquo is not installed: pip install 'patchcl-qupath[qupath]'"
    )
    with pytest.raises(ProjectError, match="paquo is not installed"):
        open_project(SAMPLE, "paquo")


def test_a_qupath_that_was_given_must_be_one(tmp_path: Path) -> None:
    pytest.importorskip("paquo")
    with pytest.raises(ProjectError, match="holds no complete QuPath"):
        open_project(SAMPLE, "auto", tmp_path)
    with pytest.raises(ConfigError, match="unknown backend 'java'"):
        open_project(SAMPLE, "java")


def test_memory_is_limited_unless_the_user_sets_it() -> None:
    *_, limit = java_options([])
    assert limit.startswith("-Xmx")
    assert int(limit.removeprefix("-Xmx").removesuffix("m")) <= 4096
    quick = ["-XX:TieredStopAtLevel=1", "-XX:+UseParallelGC"]
    assert java_options(["-Xmx9g"]) == ["-Xmx9g", *quick]
    assert java_options(["-Xmx9g", "-XX:+UseZGC"]) == ["-Xmx9g", "-XX:+UseZGC", quick[0]]
    for own in ("-XX:MaxRAMPercentage=75", "-XX:MaxHeapSize=9g"):
        assert java_options([own]) == [own, *quick]
    assert java_options(["-XX:MaxRAMPercentage=50"])[-1] == limit  # paquo's own


def test_java_has_half_of_the_memory_of_a_container(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jvm, "memory_limit", lambda: 3 << 30)
    assert java_options([])[-1] == "-Xmx1536m"


def test_paquo_has_the_option_that_is_taken_for_its_own() -> None:
    config = pytest.importorskip("paquo._config")
    assert config.to_kwargs(config.settings)["java_opts"] == [jvm._OF_PAQUO]


def test_nuclei_become_arrays() -> None:
    polygons = [shapely.box(1, 2, 4, 5), shapely.Polygon([(0, 0), (2, 0), (1, 3)])]
    ids = [uuid.UUID(int=(3 << 64) + 5), uuid.UUID(int=2**128 - 1)]
    few = Nuclei(np.array(polygons), {}, np.array([str(id_) for id_ in ids]))
    x, y, ends = contour_vertices(few.polygons)
    assert list(zip(x, y, strict=True)) == [
        *polygons[0].exterior.coords[:-1],
        *polygons[1].exterior.coords[:-1],
    ]
    assert ends.tolist() == [4, 7]
    assert uuid_halves(few.uuids).tolist() == [3, 5, -1, -1]
    assert [array.size for array in contour_vertices(few[:0].polygons)] == [0, 0, 0]


@pytest.mark.parametrize(
    "settings",
    [{"object_type": "cell"}, {"class_name": " "}, {"class_name": "a\nb"}, {"color": (1, 2)}],
)
def test_settings_that_qupath_cannot_show_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ResultConfig(**settings)


def test_remove_leaves_a_record_for_the_import(path: Path) -> None:
    """The command line, with the files backend."""
    remove = ["remove", str(path), "--backend", "files"]
    shown = CliRunner().invoke(main, remove)
    assert (shown.exit_code, shown.stdout) == (0, "a.svs: no nuclei\n")
    assert shown.stderr == "Nuclei are removed from files\n"
    files = open_project(path, "files")
    (entry,) = files.images()
    files.write(entry, [FEW], ResultConfig(), result_of(len(FEW)))
    assert "import_nuclei.groovy now takes" in CliRunner().invoke(main, remove).stdout
    assert [file.name for file in files.layout.results(entry.id).iterdir()] == ["result.json"]
    rows = json.loads(CliRunner().invoke(main, ["status", str(path), "--json"]).stdout)["images"]
    assert rows[0]["state"] == "removed"


def test_java_that_does_not_start_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("paquo")
    monkeypatch.setattr(backend, "find_qupath", lambda _: "a broken version")
    project, entry = opened(path, Process(path.parent, path.parent / "qupath.log"))
    with closing(project), pytest.raises(ImageError, match="QuPath cannot be started"):
        write(project, entry, FEW)


# ---------------------------------------------------------------- with a QuPath


def opened(path: Path, process: Process) -> tuple[PaquoProject, ImageEntry]:
    """A project with one image, as it is now, written by a JVM that runs already."""
    project = open_project(path, "paquo")
    assert isinstance(project, PaquoProject)
    return dataclasses.replace(project, process=process), project.images()[0]


def write(project: PaquoProject, entry: ImageEntry, found: Nuclei, **settings: Any) -> None:
    config = ResultConfig(**settings)
    project.write(entry, [found], config, result_of(len(found), config))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return qupath.make_project(tmp_path / "project", SLIDE, ["a.svs"])


FEW = nuclei(10, 2, "few")


@pytest.mark.qupath
def test_moved_project_class_and_object_type(
    tmp_path: Path, process: Process, session: qupath.Session, capfd: pytest.CaptureFixture[str]
) -> None:
    """The sample, which names a slide elsewhere; nothing of QuPath's log on our output."""
    folder = tmp_path / "moved #1 ü"
    folder.mkdir()
    for name in ("project.qpproj", SLIDE.name):
        shutil.copy(SAMPLE / name, folder)
    name = "Tumor: Größe"
    write(*opened(folder, process), FEW, class_name=name, object_type="detection", color=(1, 2, 3))
    assert capfd.readouterr().out == ""
    assert (folder / "project.qpproj").read_bytes() == (SAMPLE / "project.qpproj").read_bytes()
    qpproj = folder / "project.qpproj"
    content = json.loads(qpproj.read_text("utf-8"))  # as QuPath's window does, when asked to
    content["images"][0]["serverBuilder"]["uri"] = (folder / SLIDE.name).as_uri()
    qpproj.write_text(json.dumps(content), encoding="utf-8")
    (shown,) = session.run(qpproj, LOOK).values()
    assert shown["color"] & 0xFFFFFF == 0x010203
    del shown["color"]
    assert shown == {"count": len(FEW) + 1, "class_name": name, "detection": True}
    classes = json.loads((folder / "classifiers" / "classes.json").read_text("utf-8"))
    assert classes["pathClasses"][-1]["name"] == name


@pytest.mark.qupath
@pytest.mark.skipif(sys.platform == "win32", reason="links need a right")
def test_qupath_in_a_home_is_started(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same settings as it is found by."""
    monkeypatch.setattr(backend, "find_qupath", lambda _: "in a home")
    (path.parent / "QuPath").symlink_to(qupath.launcher().parents[1])
    monkeypatch.setenv("HOME", str(path.parent))
    monkeypatch.delenv("PAQUO_QUPATH_DIR", raising=False)
    monkeypatch.setenv("PAQUO_QUPATH_SEARCH_DIRS", '["~"]')
    monkeypatch.setenv("CONDA_PREFIX", "")
    project, entry = opened(path, Process(None, path.with_name("qupath.log")))
    with closing(project):
        write(project, entry, FEW)
    assert project.qupath_summary(entry).is_saved


@pytest.mark.qupath
def test_many_become_detections_and_none_is_fine(
    path: Path, process: Process, session: qupath.Session
) -> None:
    project, entry = opened(path, process)
    write(project, entry, FEW, max_annotations=len(FEW) - 1)
    assert session.run(path, LOOK)["a.svs"]["detection"]
    write(project, entry, FEW[:0])  # the same run may write again: the change was its own
    assert session.run(path, LOOK)["a.svs"]["count"] == 1  # the region
    receipt = json.loads((project.layout.root / "imported" / "1.json").read_text("utf-8"))
    assert (receipt["run"], receipt["added"], receipt["removed"]) == ("r", 0, len(FEW))


@pytest.mark.qupath
def test_image_that_qupath_changed_is_not_written_to(
    path: Path, process: Process, session: qupath.Session
) -> None:
    project, entry = opened(path, process)
    session.run(path, "entry.saveImageData(imageData); '1'")
    data = path.parent / "data" / "1" / "data.qpdata"
    before = data.read_bytes()
    with pytest.raises(ImageError, match=r"a\.svs: QuPath changed the image .* close it in QuPath"):
        write(project, entry, FEW)
    assert data.read_bytes() == before
    assert (project.layout.results(entry.id) / "nuclei.parquet").exists()

    write(project.reread(), entry, FEW)
    backup = project.layout.root / "backups" / "1" / "data.qpdata"
    assert backup.read_bytes() == before
    write(*opened(path, process), FEW)
    assert backup.read_bytes() == before  # from before the first write

    data.with_name("data.qpdata.bkp").touch()
    with pytest.raises(ImageError, match="QuPath is saving it"):
        write(*opened(path, process), FEW)


@pytest.mark.qupath
def test_an_import_that_an_open_image_was_saved_over_is_none(
    path: Path, process: Process, session: qupath.Session
) -> None:
    """A person had it open in QuPath while a run wrote into it, and saved it then."""
    data = path.parent / "data" / "1" / "data.qpdata"
    config = ResultConfig()
    open_meanwhile = []
    for run in ("", "run 1", "run 2"):
        if run:
            project, entry = opened(path, process)
            project.write(entry, [FEW], config, result_of(len(FEW), config, run=run))
        else:
            session.run(path, DRAW)
        open_meanwhile.append(data.read_bytes())
    later = project.layout.receipt(entry.id).stat().st_mtime + 60
    for content, there in zip(open_meanwhile, [False, False, True], strict=True):
        data.write_bytes(content)
        os.utime(data, (later, later))
        status = image_status(project, entry)
        assert (status.imported is not None) == there
        assert ("imported into QuPath, but not saved there" in status.changed) == (not there)


@pytest.mark.qupath
def test_image_that_qupath_saves_meanwhile_is_not_written_over(
    path: Path, process: Process, session: qupath.Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it was looked at, and before it is saved: seconds, or minutes of a large image."""
    write(*opened(path, process), FEW)
    project, entry = opened(path, process)
    ask = process.ask

    def ask_while_a_person_saves(*question: Any) -> Any:
        session.run(path, DRAW)
        return ask(*question)

    monkeypatch.setattr(process, "ask", ask_while_a_person_saves)
    with pytest.raises(ImageError, match=r"a\.svs: QuPath saved the image while this was done"):
        write(project, entry, FEW[:5])
    shown = session.run(path, LOOK)["a.svs"]
    assert shown["count"] == len(FEW) + 2  # the region, and what the person drew
    data = path.parent / "data" / "1"
    assert [file.name for file in data.glob("data*")] == ["data.qpdata"]


def test_a_save_right_after_ours_is_told(path: Path) -> None:
    """Of an image that QuPath's window had open meanwhile: it has written over our nuclei."""
    project = open_project(path, "files")
    (entry,) = project.images()
    project.write(entry, [FEW], ResultConfig(), result_of(len(FEW)))
    data = project.saved.data(entry)
    data.parent.mkdir(parents=True)
    data.touch()
    receipt = {"image": "a.svs", "run": "r", "imported": "now", "added": 20, "left_out": 0}
    receipt |= {"removed": 0, "kept": 0, "fields": 0, "fields_kept": 0}
    file = project.layout.receipt(entry.id)
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(receipt))
    saved = file.stat().st_mtime
    for seconds, changed in [(0, False), (2, True)]:
        os.utime(data, (saved + seconds, saved + seconds))
        assert ("saved in QuPath" in image_status(project, entry).changed) == changed


@pytest.mark.qupath
@pytest.mark.parametrize("harm", ["text", "half", "zeros"])
def test_damaged_image_data_are_not_changed(path: Path, process: Process, harm: str) -> None:
    write(*opened(path, process), FEW)
    data = path.parent / "data" / "1" / "data.qpdata"
    whole = data.read_bytes()
    middle = len(whole) // 2
    data.write_bytes(
        {
            "text": b"not QuPath's",
            "half": whole[:middle],
            "zeros": whole[:middle] + bytes(200) + whole[middle + 200 :],
        }[harm]
    )
    before = data.read_bytes()
    with pytest.raises(ImageError, match=r"data\.qpdata is damaged and was left as it is"):
        write(*opened(path, process), FEW)
    assert data.read_bytes() == before
    assert [file.name for file in data.parent.glob("data*")] == ["data.qpdata"]
    (copy,) = (path.parent / "patchcl" / "backups" / "1").glob("*.damaged")
    assert copy.read_bytes() == before


@pytest.mark.qupath
def test_regions_are_those_saved_or_exported_since(
    path: Path, process: Process, session: qupath.Session
) -> None:
    draw = """
        import qupath.lib.objects.PathObjects
        import qupath.lib.objects.classes.PathClass
        import qupath.lib.regions.ImagePlane
        import qupath.lib.roi.ROIs
        def roi = ROIs.createRectangleROI(WHERE, 300, 200, ImagePlane.getDefaultPlane())
        hierarchy.addObject(PathObjects.createAnnotationObject(roi, PathClass.fromString('Tumor')))
        entry.saveImageData(imageData)
        '1'
        """
    project, entry = opened(path, process)
    write(project, entry, FEW)
    with pytest.raises(ImageError, match=r"of class Tumor \(it has none with a class"):
        project.with_regions(entry, ["Tumor"])  # neither nuclei nor their region are a person's
    session.run(path, draw.replace("WHERE", "100, 50"))
    found = opened(path, process)[0].with_regions(entry, ["Tumor", "Stroma"])
    assert [region.bounds for region in found.regions] == [(100, 50, 400, 250)]
    assert found.note == "no annotation of class Stroma"
    session.run(path, draw.replace("WHERE", "500, 600"))
    found = opened(path, process)[0].with_regions(entry, ["Tumor"])
    assert [region.bounds[:2] for region in found.regions] == [(100, 50), (500, 600)]

    # Exported later from an image that was not saved; a selection is in the export alone.
    file = project.layout.root / "regions" / "1.geojson"
    file.write_text(file.read_text("utf-8").replace("Tumor", "(selected)"), "utf-8")
    assert len(opened(path, process)[0].with_regions(entry, ["(selected)"]).regions) == 2
    os.utime(file, (0, 0))
    found = opened(path, process)[0].with_regions(entry, ["(selected)"])
    assert "exported before it was last saved" in str(found.note)
    assert len(opened(path, process)[0].with_regions(entry, ["Tumor"]).regions) == 2


DRAW_LABELS = """
    import qupath.lib.objects.PathObjects
    import qupath.lib.objects.classes.PathClass
    import qupath.lib.regions.ImagePlane
    import qupath.lib.roi.ROIs
    def draw = { double x, double y, double side, String name ->
        def roi = ROIs.createRectangleROI(x, y, side, side, ImagePlane.getDefaultPlane())
        def pathClass = name == null ? null : PathClass.fromString(name)
        hierarchy.addObject(PathObjects.createAnnotationObject(roi, pathClass))
    }
    draw(20, 20, 200, 'PatchCL: corrected')
    draw(0, 0, 2000, 'Tumor')   // contains the ROI: no nucleus
    draw(190, 100, 15, null)   // a nucleus that was missed
    def other = ROIs.createRectangleROI(72, 72, 16, 16, ImagePlane.getDefaultPlane())
    hierarchy.addObject(PathObjects.createDetectionObject(other))   // of another program
    entry.saveImageData(imageData)
    '1'
    """


@pytest.mark.qupath
def test_labels_are_all_nuclei_in_rois(
    path: Path, process: Process, session: qupath.Session
) -> None:
    """Read by QuPath's process, and exported by the script."""
    project, entry = opened(path, process)
    assert project.corrections(entry, CORRECTED) == Corrections()  # never saved
    write(project, entry, FEW)
    session.run(path, DRAW_LABELS)
    expected = shapely.box(20, 20, 220, 220)
    near = [p for p in FEW.polygons if p.intersects(expected)]
    assert len(near) == 10  # five in a row
    project, entry = opened(path, process)
    found = project.corrections(entry, CORRECTED)
    assert [roi.bounds for roi in found.rois] == [expected.bounds]
    assert len(found.nuclei) == len(near) + 1
    for nucleus in found.nuclei:
        assert nucleus.area == 225 or any(nucleus.hausdorff_distance(p) < 0.02 for p in near)

    project.layout.labels(entry.id).unlink()
    script = SAMPLE.parent / "groovy" / "export_labels.groovy"
    log = qupath.run_script(path, script)
    assert "a.svs: 1 ROIs with 12 contours exported to" in log, log
    again = open_project(path, "files").corrections(entry, CORRECTED)
    assert {n.wkt for n in again.nuclei} == {n.wkt for n in found.nuclei}
    assert project.corrections(entry, "Tumor").rois[0].area == 2000**2  # of another class


@pytest.mark.qupath
def test_killed_process_fails_one_image_and_loses_no_data(
    path: Path, process: Process, session: qupath.Session
) -> None:
    project, entry = opened(path, process)
    write(project, entry, FEW)
    data = path.parent / "data" / "1" / "data.qpdata"
    before = data.read_bytes()
    writing = data.with_name("data.qpdata.patchcl-before")  # there while it writes
    died = pytest.raises(ImageError, match=r"a\.svs: QuPath's process died")
    with killing(process, writing), died:
        write(project, entry, nuclei(10, 500, "many"))
    assert data.read_bytes() == before
    assert [file.name for file in data.parent.glob("data*")] == ["data.qpdata"]
    write(project, entry, FEW[:3])
    assert session.run(path, LOOK)["a.svs"]["count"] == 4


@contextmanager
def killing(process: Process, sign: Path) -> Iterator[None]:
    """Kill a JVM as soon as a file is there."""

    def watch() -> None:
        while not sign.exists():
            time.sleep(0.001)
        os.kill(process._process.pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    thread.join(timeout=10)


def test_failed_save_restores_the_data(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As QuPath leaves it when the disk is full: half a file, and the old one beside it."""
    monkeypatch.setattr(backend, "find_qupath", lambda _: "no version")
    data = path.parent / "data" / "1" / "data.qpdata"
    data.parent.mkdir(parents=True)
    data.write_bytes(b"\xac\xed\x00\x05 a pathologist's morning t\x00\x03EOF")
    before = data.read_bytes()
    project, entry = opened(path, Process(None, path.with_name("qupath.log")))

    def fail(*_: object) -> None:
        data.rename(data.with_name("data.qpdata.bkp"))
        data.write_bytes(b"half")
        raise ImageError("a.svs: the disk is full")

    monkeypatch.setattr(project.process, "start", lambda: None)
    monkeypatch.setattr(project.process, "ask", fail)
    with pytest.raises(ImageError, match=r"the disk is full\. Meanwhile its nuclei are in"):
        write(project, entry, FEW)
    assert data.read_bytes() == before
    assert [file.name for file in data.parent.iterdir()] == ["data.qpdata"]


def test_an_image_that_never_had_nuclei_is_not_opened_to_remove_them(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "find_qupath", lambda _: "no version")
    project, entry = opened(path, Process(None, path.with_name("qupath.log")))
    assert project.remove(entry) == "no nuclei"
    assert not (path.parent / "data" / "1").exists()


def test_runs_of_a_notebook_write_into_what_was_saved_between_them(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The project was opened before; what is saved during a run is not written to."""
    monkeypatch.setattr(backend, "find_qupath", lambda _: "no version")
    project, entry = opened(path, Process(None, path.with_name("qupath.log")))
    removed = Done({"removed": 0, "kept": 0})
    monkeypatch.setattr(project.process, "ask", lambda *_: removed)
    data = path.parent / "data" / "1" / "data.qpdata"
    data.parent.mkdir(parents=True)
    during: list[bytes] = []

    def images(run: Run, entries: Any) -> Any:
        for content in during:
            data.write_bytes(content)
        yield run.project.remove(entry)

    monkeypatch.setattr(Run, "images", images)
    model = Model(network=NucleusNetwork((16, 24, 40)).eval(), config=Config())
    saved = [b"\xac\xed\x00\x05" + bytes(size) + b"t\x00\x03EOF" for size in range(3)]
    for content in saved[:2]:
        data.write_bytes(content)
        (done,) = library.segment(project, model, workers=1)
        assert done == "0 nuclei removed, 0 other objects kept"
    during = saved[2:]
    with pytest.raises(ImageError, match=r"QuPath changed the image .* since this run began"):
        library.segment(project, model, workers=1)
    assert data.read_bytes() == saved[2]


def test_a_run_of_a_notebook_has_the_pixel_size_that_was_set_since(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(Run, "images", lambda _, entries: iter(seen.append(entries) or ()))
    model = Model(network=NucleusNetwork((16, 24, 40)).eval(), config=Config())
    project = library.open_project(path)
    content = json.loads(path.read_text("utf-8"))
    length = {"value": 0.3, "unit": "µm"}
    calibration = {"pixelCalibration": {"pixelWidth": length, "pixelHeight": length}}
    content["images"][0]["serverBuilder"]["metadata"] = calibration
    path.write_text(json.dumps(content), "utf-8")
    library.segment(project, model, workers=1)
    assert [entry.mpp for entry in seen[0]] == [(0.3, 0.3)]


@pytest.mark.parametrize("error", [ImageError("a.svs: QuPath's process died"), KeyboardInterrupt()])
def test_what_a_person_saved_meanwhile_is_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """QuPath's process ends before it saved, and the image is given back as it was before."""
    monkeypatch.setattr(backend, "find_qupath", lambda _: "no version")
    data = path.parent / "data" / "1" / "data.qpdata"
    data.parent.mkdir(parents=True)
    yesterday, morning = (
        b"\xac\xed\x00\x05 %s t\x00\x03EOF" % text for text in (b"yesterday", b"a morning's work")
    )
    data.write_bytes(yesterday)
    project, entry = opened(path, Process(None, path.with_name("qupath.log")))

    def fail(*_: object) -> None:
        new = data.with_name("new")
        new.write_bytes(morning)
        new.replace(data)
        raise error

    monkeypatch.setattr(project.process, "start", lambda: None)
    monkeypatch.setattr(project.process, "ask", fail)
    with pytest.raises(type(error)):
        write(project, entry, FEW)
    kept = {file.read_bytes() for file in project.layout.backups(entry.id).iterdir()}
    assert kept == {yesterday, morning}
    assert data.read_bytes() in kept


def test_folder_of_images_that_cannot_be_written_to(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "find_qupath", lambda _: "no version")
    (path.parent / "data").touch()  # a file: also root cannot make folders in it
    project, entry = opened(path, Process(None, path.with_name("qupath.log")))
    monkeypatch.setattr(project.process, "start", lambda: None)
    with pytest.raises(StorageError, match=r"cannot write .*data\.qpdata"):
        write(project, entry, FEW)
    assert (project.layout.results(entry.id) / "nuclei.parquet").exists()


@pytest.mark.qupath
def test_scripts_are_compiled_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged classes, and a folder that cannot be made, cost time and nothing else."""
    cache = path.parent / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    if cache_folder() != cache / "patchcl-qupath" / "groovy":
        pytest.skip("a folder of the system")

    def written(found: Nuclei) -> None:
        own = Process(None, path.with_name("qupath.log"))
        project, entry = opened(path, own)
        write(project, entry, found)
        own.close()
        receipt = json.loads(project.layout.receipt(entry.id).read_text("utf-8"))
        assert receipt["added"] == len(found)

    written(FEW)
    classes = {file: file.stat().st_mtime_ns for file in cache_folder().rglob("*.class")}
    scripts = {file.parent for file in classes}
    assert len(scripts) == 2  # neither of those that export
    damaged = next(file for file in classes if file.name == "import_nuclei.class")
    damaged.write_bytes(b"no class")
    written(FEW[:3])
    assert damaged.read_bytes() != b"no class"
    others = [file for file in classes if file.parent != damaged.parent]
    assert {file: file.stat().st_mtime_ns for file in others} == {f: classes[f] for f in others}
    shutil.rmtree(cache)
    cache.touch()
    written(FEW[:4])


def test_scripts_are_compiled_for_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user is in no list of the system."""

    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    compiled = compiled_scripts.compiled_script("import_nuclei.groovy", MagicMock())
    assert isinstance(compiled, MagicMock)


@pytest.mark.qupath
def test_lost_slide_is_refused_before_java_starts(tmp_path: Path) -> None:
    path = qupath.make_project(tmp_path / "project", tmp_path / "lost.svs", ["lost.svs"])
    project = open_project(path, "paquo")
    (entry,) = project.images()
    assert entry.problem is not None
    project.layout.results(entry.id).mkdir(parents=True)
    with pytest.raises(ImageError, match="put the file beside the project"):
        project.remove(entry)
    assert not (project.layout.root / "qupath.log").exists()


@pytest.mark.qupath
@pytest.mark.parametrize(
    ("sides", "names"),
    [
        ([320, 400], []),
        ([320, 400], ["one", "two"]),
        ([320, 320], ["one", "two"]),
        ([200, 400], ["one", "two"]),  # 4 times its pixels
        ([192, 400], ["one", "two"]),
        ([192, 400], []),
        ([192, 320, 400], ["one", "two", "three"]),
        ([400, 320], ["Label image", "two"]),
        ([400, 320, 352], ["macro", "two", "three"]),
    ],
)
def test_qupath_shows_the_image_that_is_segmented(
    tmp_path: Path, session: qupath.Session, sides: list[int], names: list[str]
) -> None:
    images = [scene(side, side, (0.5, 0.5)) for side in sides]
    slide = write_series(tmp_path / "a.tif", *images, names=names)
    path = init_project(tmp_path / "project", [NewImage.of_file(slide, None)])
    (entry,) = open_project(path, "files").images()
    (shown,) = session.run(
        path, "imageData.getServer().with { '[' + getWidth() + ',' + getHeight() + ']' }"
    ).values()
    assert tuple(shown) == Slide.open(entry).size


@pytest.mark.qupath
def test_nuclei_of_another_image_of_the_file_are_refused(tmp_path: Path, process: Process) -> None:
    """As of a project that does not name the reader, where Bio-Formats takes the first."""
    images = [scene(side, side, (0.5, 0.5)) for side in (192, 400)]
    slide = write_series(tmp_path / "a.tif", *images)
    path = qupath.make_project(tmp_path / "project", slide, ["a.tif"])
    content = json.loads(path.read_text("utf-8"))
    del content["images"][0]["serverBuilder"]["providerClassName"]
    path.write_text(json.dumps(content), "utf-8")
    project, entry = opened(path, process)
    of_slide = msgspec.structs.replace(result_of(4).slide, size=Slide.open(entry).size)
    result = result_of(4, slide=of_slide)
    with pytest.raises(ImageError, match=r"of 192 x 192 px, but .* 400 x 400 px: re"):
        project.write(entry, [FEW[:4]], ResultConfig(), result)
    assert not project.files.saved.data(entry).exists()
    of_slide = msgspec.structs.replace(of_slide, size=(192, 192))
    project.write(entry, [FEW[:4]], ResultConfig(), result_of(4, slide=of_slide))
    assert project.files.saved.data(entry).exists()


def read_by(process: Any, path: Path) -> tuple[PaquoProject, ImageEntry]:
    """A project with one image, which another process reads than QuPath's."""
    files = FilesProject.open(path)
    return PaquoProject(files, process, Backend(kind=BackendKind.PAQUO)), files.images()[0]


def test_a_lost_slide_without_rois_does_not_stop_refining(tmp_path: Path) -> None:
    """By what QuPath counted when it saved the image; with a ROI, its problem is told."""
    path = qupath.make_project(tmp_path / "project", tmp_path / "lost.svs", ["lost.svs"])
    project, entry = read_by(None, path)
    data = path.parent / "data" / "1" / "data.qpdata"
    data.parent.mkdir(parents=True)
    data.touch()
    for counts, problem in [({CORRECTED: 1}, True), ({"Tumor": 2}, False), (None, True)]:
        summary = {"hierarchy": {"annotationClassificationCounts": counts}}
        data.with_name("summary.json").write_text(json.dumps(summary), "utf-8")
        if problem:
            with pytest.raises(ImageError, match="put the file beside the project"):
                project.corrections(entry, CORRECTED)
        else:
            assert project.corrections(entry, CORRECTED) == Corrections()


class SavedMeanwhile:
    """In place of QuPath's process: exports the ROIs of an image, and a person saves another one
    after the image was read for the first time, and before the file is written."""

    def __init__(self, data: Path) -> None:
        self.data = data
        self.later = 2
        self.save(rois=1)

    def save(self, rois: int) -> None:
        self.data.write_bytes(b"\xac\xed\x00\x05" + bytes(rois) + b"t\x00\x03EOF")
        os.utime(self.data, (rois, rois))

    def ask(self, question: Any) -> None:
        rois = self.data.stat().st_size - 10
        self.save(rois=self.later)
        coordinates = [[[0, 0], [0, 99], [99, 99], [99, 0], [0, 0]]]
        feature = {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": coordinates},
            "properties": {"objectType": "annotation", "classification": {"name": CORRECTED}},
        }
        question.file.parent.mkdir(parents=True, exist_ok=True)
        question.file.write_text(json.dumps([feature] * rois), "utf-8")


@pytest.mark.parametrize("what", ["regions", "ROIs"])
def test_what_a_person_saves_while_an_image_is_read_is_read(path: Path, what: str) -> None:
    data = path.parent / "data" / "1" / "data.qpdata"
    data.parent.mkdir(parents=True)
    summary = {"hierarchy": {"annotationClassificationCounts": {CORRECTED: 1}}}
    data.with_name("summary.json").write_text(json.dumps(summary), "utf-8")
    project, entry = read_by(SavedMeanwhile(data), path)
    if what == "regions":
        found = project.with_regions(entry, [CORRECTED]).regions
    else:
        found = project.corrected_rois(entry)
    assert len(found) == 2


@pytest.mark.parametrize("what", ["regions", "ROIs"])
@pytest.mark.parametrize("how", ["restored", "copied"])
def test_what_was_exported_of_other_data_is_exported_anew(path: Path, what: str, how: str) -> None:
    """An earlier file with its own time; or the project copied without times, in any order."""
    data = path.parent / "data" / "1" / "data.qpdata"
    data.parent.mkdir(parents=True)
    summary = {"hierarchy": {"annotationClassificationCounts": {CORRECTED: 1}}}
    data.with_name("summary.json").write_text(json.dumps(summary), "utf-8")
    process = SavedMeanwhile(data)

    def read() -> int:
        project, entry = read_by(process, path)
        if what == "regions":
            return len(project.with_regions(entry, [CORRECTED]).regions)
        return len(project.corrected_rois(entry))

    assert read() == 2
    process.later = 3
    process.save(rois=1)  # at an earlier time than that of the export
    if how == "copied":
        for file in (path.parent / "patchcl").rglob("*.*"):
            os.utime(file, (9, 9))
        os.utime(data, (8, 8))
    assert read() == 3
    assert read() == 3


def quick_run(folder: Path, *names: str) -> tuple[Path, list[str | Path]]:
    """A project of small images, and a command that segments them within seconds."""
    (entry,) = open_project(SAMPLE, "files").images()
    pixels = Slide.open(entry).read(Box(1500, 900, 1900, 1300))
    slides = [write_tiff(folder / name, pixels, (0.5, 0.5)) for name in names]
    path = init_project(
        folder / "project", [NewImage(slide, [(400, 400)], None) for slide in slides]
    )
    settings = folder / "settings.toml"
    settings.write_text('recipe = "patchcl"\n[patchcl]\nmax_steps = 40\nbatch = 2\ncrops = 8\n')
    command = [sys.executable, "-m", "patchcl_qupath.cli", "run", path, "--config", settings]
    return path, [*command, "--backend", "paquo"]


@pytest.mark.qupath
def test_other_processes_draw_an_image_while_qupath_runs(tmp_path: Path) -> None:
    """Of the second image: QuPath's process, which runs by then, cannot be sent to them."""
    path, command = quick_run(tmp_path, "a.tif", "b.tif")
    done = subprocess.run([*command, "--workers", "5"], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert all(Layout(path.parent / "patchcl").preview(number).exists() for number in "12")


@pytest.mark.qupath
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process")
def test_run_that_is_stopped_while_qupath_writes_is_resumed(
    tmp_path: Path, session: qupath.Session
) -> None:
    """By kill -9, which leaves QuPath's process to end by itself, and by Ctrl-C."""
    path, command = quick_run(tmp_path, "a.tif")
    subprocess.run(command, check=True, capture_output=True)
    session.run(path, DRAW)
    before = session.run(path, IDS)
    assert len(before["a.tif"]) > 100

    writing = path.parent / "data" / "1" / "data.qpdata.patchcl-before"
    for sign in (signal.SIGKILL, signal.SIGINT):
        Layout(path.parent / "patchcl").outcome("1").unlink()  # or there is nothing to do
        run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not writing.exists():
            assert run.poll() is None
            time.sleep(0.001)
        children = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(sign)
        assert run.wait(timeout=2) == (-9 if sign == signal.SIGKILL else 130)
        _, alive = psutil.wait_procs(children, timeout=30)
        assert not alive
        assert writing.exists() == (sign == signal.SIGKILL)
        assert session.run(path, IDS) == before
        subprocess.run(command, check=True, capture_output=True)
        assert session.run(path, IDS) == before
        assert not writing.exists()
