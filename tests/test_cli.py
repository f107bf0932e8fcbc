"""The command line: bad input gets one clear line that says what to do; other images go on."""

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path, PureWindowsPath
from types import SimpleNamespace

import click
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import copy_sample
from PIL import Image
from survivor import left_by_run

from patchcl_qupath import console, logs, options
from patchcl_qupath.cli import main
from patchcl_qupath.config import BackendKind
from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.errors import ConfigError, count_of, quoted
from patchcl_qupath.execution.outcome import failed_image
from patchcl_qupath.progress import Progress, Stage
from patchcl_qupath.project import open_project
from patchcl_qupath.project.protocol import Backend
from patchcl_qupath.status import ImageStatus
from patchcl_qupath.storage.records import ImageOutcome

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "sample_project"
SHARED_SLIDES = ROOT.parent / "shared" / "data" / "slides"
needs_shared_slides = pytest.mark.skipif(
    not SHARED_SLIDES.is_dir(), reason=f"{SHARED_SLIDES} is not here"
)


def call(*arguments):
    return CliRunner().invoke(main, [*map(str, arguments)], catch_exceptions=False)


def write_project(folder, images):
    """A project of image files, as QuPath writes it, without what it knows of them."""
    folder.mkdir()
    entries = [
        {
            "serverBuilder": {"builderType": "uri", "uri": path.as_uri(), "args": []},
            "entryID": number,
            "imageName": path.name,
        }
        for number, path in enumerate(images, start=1)
    ]
    content = {"version": "0.5.1", "images": entries}
    (folder / "project.qpproj").write_text(json.dumps(content))
    return folder


@pytest.fixture
def crop(tmp_path):
    """A PNG of H&E tissue, which has no pixel size."""
    from patchcl_qupath.datatypes import Box
    from patchcl_qupath.slides.slide import Slide

    (entry,) = open_project(SAMPLE).images()
    path = tmp_path / "crop.png"
    Image.fromarray(Slide.open(entry).read(Box(1500, 900, 1900, 1300))).save(path)
    return path


@pytest.fixture
def quick(tmp_path):
    """Settings for a training of seconds."""
    path = tmp_path / "quick.toml"
    path.write_text('recipe = "patchcl"\n[patchcl]\nmax_steps = 40\nbatch = 2\ncrops = 8\n')
    return path


@pytest.mark.parametrize(
    "command",
    sorted(main.commands),
)
def test_every_command_explains_itself(command):
    """What it does, and each of its options."""
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"{command} [OPTIONS]" in result.output
    assert main.commands[command].get_short_help_str(200).rstrip(".") in " ".join(
        result.output.split()
    )
    options = [o for o in main.commands[command].params if isinstance(o, click.Option)]
    assert all(option.opts[0] in result.output for option in options)
    assert [option.opts[0] for option in options if len(option.help or "") < 10] == []


@pytest.mark.parametrize(
    ("before", "after", "level"),
    [([], [], None), (["-v"], [], "INFO"), ([], ["-v"], "INFO"), (["-v"], ["-v"], "DEBUG")],
)
def test_verbose_logs_on_standard_error(before, after, level):
    result = call(*before, "status", SAMPLE, "--json", *after)
    assert json.loads(result.stdout)["images"]
    assert ("INFO patchcl_qupath.cli: " in result.stderr) == (level is not None)
    failed = call(*before, "status", "nowhere.qpproj", "--json", *after)
    assert "error" in json.loads(failed.stdout)
    assert ("Traceback" in failed.stderr) == (level == "DEBUG")


def test_images_of_one_name_are_shown_with_their_ids(capsys):
    images = [("3", "a.svs"), ("5", "a.svs"), ("7", "b.svs")]
    statuses = [ImageStatus(id=id_, image=name, state="to do") for id_, name in images]
    project = open_project(SAMPLE, backend="files")
    console.report_statuses(project, statuses, as_json=False)
    shown = capsys.readouterr().out
    assert "a.svs (3)" in shown
    assert "a.svs (5)" in shown
    assert "b.svs (" not in shown


def test_logs_do_not_disturb_progress_for_programs(capsys):
    logs.show_logs(logging.INFO)
    with console.progress_lines() as show:
        show(Progress(stage=Stage.SEGMENTING, done=2, total=9, image="a.svs"))
        logging.getLogger("patchcl_qupath.pipeline").info("two of nine")
        show(Progress(stage=Stage.WRITING, image="a.svs", detail="12 nuclei"))
    logs.hide_logs()
    first, log, last = capsys.readouterr().err.splitlines()
    assert json.loads(first) == {"stage": "a.svs: segmenting", "done": 2, "total": 9}
    assert log.endswith("INFO patchcl_qupath.pipeline: two of nine")
    assert json.loads(last) == {"stage": "a.svs: writing 12 nuclei", "done": 0, "total": 0}


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminal")
def test_logs_appear_above_progress_bars():
    """On a terminal, where rich rewrites the bars again and again."""
    code = """
import logging
from patchcl_qupath import console, logs
from patchcl_qupath.progress import Progress, Stage
logs.show_logs(logging.INFO)
with console.progress_bars() as show:
    show(Progress(stage=Stage.SEGMENTING, done=1, total=9, image="a [red].svs"))
    logging.getLogger("patchcl_qupath.pipeline").info("one of [nine]")
    show(Progress(stage=Stage.SEGMENTING, done=2, total=9, image="a [red].svs"))
"""
    command = f"import pty, sys; pty.spawn([sys.executable, '-c', {code!r}])"
    terminal = os.environ | {"COLUMNS": "100", "TERM": "xterm"}
    shown = subprocess.check_output([sys.executable, "-c", command], text=True, env=terminal)
    line = re.search(r"(.*)INFO patchcl_qupath.pipeline: one of \[nine\](.*)\n", shown)
    assert line, shown
    assert "segmenting" not in re.split(r"\r|\x1b\[2K", line[1])[-1] + line[2]
    assert "2/9" in shown


def test_where_no_terminal_is_progress_is_lines(capsys, monkeypatch):
    """As in a file, or in Git Bash, whose windows are pipes to programs of Windows."""
    now = 100.0
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: now))
    with console.progress_bars() as show:
        for second in range(100):
            now = 100.0 + second
            show(Progress(stage=Stage.TRAINING_NETWORK, done=second, total=1200))
            assert capsys.readouterr().err == (
                "" if second % 30 else f"training the segmentation network: {second} of 1,200\n"
            )
        for image in range(6):
            now += 1.5
            show(Progress(stage=Stage.FINDING_TISSUE, image=f"{image}.svs"))
        shown = capsys.readouterr().err.splitlines()
    assert shown == [f"{image}.svs: finding tissue" for image in (0, 2, 4)]


def test_arguments_are_as_they_are_given(monkeypatch):
    """On Windows, too, where click would take the class Region* for files in the folder."""
    given = {}
    monkeypatch.setattr("click.Group.main", lambda _, *__, **options: given.update(options))
    main()
    assert given["windows_expand_args"] is False


def test_names_with_wildcards_are_files_on_windows(tmp_path, monkeypatch):
    for name in ("a.svs", "b.svs", "c[1].svs", "c1.svs"):
        (tmp_path / name).touch()
    given = [tmp_path / name for name in ("[ab].svs", "c[1].svs", "*.tif")]
    monkeypatch.setattr(options, "WINDOWS", False)
    assert options.expanded(given) == given
    monkeypatch.setattr(options, "WINDOWS", True)
    assert [path.name for path in options.expanded(given)] == [
        *("a.svs", "b.svs", "c[1].svs", "*.tif")
    ]
    monkeypatch.chdir(tmp_path)
    assert options.expanded([Path("?.svs")]) == [Path("a.svs"), Path("b.svs")]


def test_import_has_no_side_effect():
    """Variables of the environment are set by the command, in this process and in workers."""
    code = "import os; before = {**os.environ}\n"
    code += "import patchcl_qupath.cli, patchcl_qupath.execution.map_tiles\n"
    code += "assert {**os.environ} == before, {**os.environ}.keys() - before.keys()"
    subprocess.check_call([sys.executable, "-c", code])


@pytest.mark.parametrize("charset", ["ascii", "cp1252", "utf-8"])
def test_names_that_a_terminal_cannot_encode_are_shown_with_marks(tmp_path, charset):
    name = "切片 µ.png"
    project = write_project(tmp_path / "project", [tmp_path / name])
    runner = CliRunner(charset=charset)
    table = runner.invoke(main, ["status", str(project)])
    assert table.exit_code == 0, table.exception
    assert ".png" in table.stdout
    assert ("切片" in table.stdout) == (charset == "utf-8")
    failed = runner.invoke(main, ["status", str(project), "--image", "切"])
    assert (failed.exit_code, failed.exception.__class__) == (1, SystemExit)
    as_json = runner.invoke(main, ["status", str(project), "--json"])
    assert json.loads(as_json.stdout)["images"][0]["image"] == name


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are UTF-8")
def test_names_of_files_that_python_takes_for_ascii_are_said(tmp_path):
    """Python heeds PYTHONUTF8=0 in the locale C, and finds no other names."""
    name = "Schnitt ö.png"
    project = write_project(tmp_path / "project", [tmp_path / name])
    command = [sys.executable, "-m", "patchcl_qupath.cli", "status", project]
    for utf8 in (0, 1):
        settings = {"LC_ALL": "C", "PYTHONUTF8": str(utf8), "PYTHONCOERCECLOCALE": "0"}
        shown = subprocess.run(command, capture_output=True, env=os.environ | settings)
        assert shown.returncode == 0, shown.stderr
        assert (b"set PYTHONUTF8=1" in shown.stderr) == (not utf8)


@pytest.mark.parametrize("columns", [20, 40, 80])
def test_tables_in_a_narrow_place_cut_no_name_and_no_figure(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    names = [f"TCGA-A2-A0CM-01Z-00-DX1.AD8FC5E2-9D1A-4B6E-B2E7-{end}.svs" for end in ("1F", "2F")]
    titles = ["image", "region", "tissue mm²", "nuclei", "per mm²", "positive %", "H-score"]
    figures = ["12.345", "12,345,678", "1,234", "12.5"]
    rows = [[name, "tumour_centre", *figures, None] for name in names]
    console.print_table(titles, rows)
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("│")
    ]
    firsts = [k for k, row in enumerate(cells) if row[3]]  # the lines that a row begins with
    assert [cells[k][2:] for k in firsts] == [[*figures, ""]] * 2
    both = [cells[slice(*ends)] for ends in zip(firsts, [*firsts[1:], None], strict=True)]
    shown = [tuple("".join(parts) for parts in zip(*lines, strict=True))[:2] for lines in both]
    assert shown == [(name, "tumour_centre") for name in names]


def test_json_on_a_closed_standard_output_is_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it there, and pythonw on Windows
    console.print_json({"image": "Größe.svs"})


def test_the_outcome_of_hundreds_of_images_is_on_one_screen(tmp_path, capsys):
    project = open_project(write_project(tmp_path / "project", [tmp_path / "a.png"]), "files")
    few, many = (
        [
            ImageOutcome(id=str(k), image=f"{k}.svs", nuclei=10, note="large" if k % 2 else "small")
            for k in range(count)
        ]
        for count in (5, 300)
    )
    console.report_run(project, few, None, as_json=False)
    text = capsys.readouterr().out
    assert all(f"{k}.svs" in text for k in range(5))
    assert "Note: 1.svs, 3.svs: large" in text
    console.report_run(project, many, None, as_json=False)
    text = capsys.readouterr().out
    assert len(text.splitlines()) < 40
    assert "and 285 other images with 2,850 nuclei: the report lists all" in text
    assert "17.svs, 19.svs and 140 more: large" in text


def test_the_status_of_hundreds_of_images_is_on_one_screen(tmp_path):
    """What is wrong with 300 images is said once, with their number."""
    absent = [tmp_path / "elsewhere" / f"{i}.svs" for i in range(300)]
    here = [tmp_path / f"here{i}.png" for i in range(20)]
    for path in here:
        Image.new("RGB", (64, 64), "white").save(path)
    project = write_project(tmp_path / "project", [*absent, *here])
    shown = call("status", project).stdout.splitlines()
    assert len(shown) == 3
    assert shown[0].startswith("300 images: not usable, such as: 0.svs is not at ")
    assert "put the file beside the project" in shown[0]
    assert shown[1:] == ["20 images: to do", "All images: patchcl-qp status --all, or --json"]
    assert len(json.loads(call("status", project, "--json").stdout)["images"]) == 320


@pytest.mark.parametrize(
    ("command", "old", "new"),
    [("suggest", ["--fields", "3"], "--rois"), ("score", ["--truth", "x"], "--ground-truth")],
)
def test_options_of_version_0_1_are_still_read(command, old, new):
    context = main.commands[command].make_context(command, [str(SAMPLE), *old])
    assert {str(value) for value in context.params.values()} >= {old[1]}
    shown = call(command, "--help").output
    assert new in shown
    assert old[0] not in shown


@pytest.mark.parametrize("command", ["score", "status", "suggest", "remove"])
@pytest.mark.parametrize("option", [["--mpp", "0.5"], ["--config", "settings.toml"]])
def test_an_option_that_does_nothing_does_not_exist(command, option):
    result = call(command, SAMPLE, *option)
    assert result.exit_code == 2
    assert "No such option" in result.output
    assert option[0] in result.output
    assert option[0] not in call(command, "--help").output


def test_init_leaves_out_what_is_no_image(tmp_path, crop):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    made = call("init", tmp_path / "project", broken, crop, "--mpp", "0.5")
    assert made.exit_code == 1
    assert f"Failed: {broken} cannot be read" in made.stderr
    assert "project.qpproj (1 image)" in made.stdout
    assert [i.name for i in open_project(tmp_path / "project").images()] == [crop.name]
    alone = call("init", tmp_path / "none", broken)
    assert alone.exit_code == 1
    assert f"Failed: {broken} cannot be read" in alone.stderr
    assert "no project was made: none of the files" in alone.stderr
    assert not (tmp_path / "none").exists()


def test_classes_of_regions_are_one_run_in_any_order(tmp_path, crop, monkeypatch):
    asked = []

    def stop(*_, within, **__):
        asked.append(within)
        raise ConfigError("enough")

    monkeypatch.setattr("patchcl_qupath.finished.all_finished", stop)
    assert call("init", tmp_path / "project", crop, "--mpp", "0.5").exit_code == 0
    for classes in (("A", "B"), ("B", "A"), ("B", "A", "B")):
        words = [word for name in classes for word in ("--within", name)]
        assert "enough" in call("run", tmp_path / "project", *words).stderr
    assert asked == [("A", "B")] * 3


def test_a_class_is_one_however_its_colon_is_written(tmp_path, crop, monkeypatch):
    asked = []

    def stop(*_, within, config, **__):
        asked.append((within, config.result.summarise))
        raise ConfigError("enough")

    monkeypatch.setattr("patchcl_qupath.finished.all_finished", stop)
    assert call("init", tmp_path / "project", crop, "--mpp", "0.5").exit_code == 0
    for classes in (["T: Positive"], ["T:Positive"], ["T :Positive ", "T: Positive"]):
        words = [word for name in classes for word in ("--within", name, "--summarise", name)]
        assert "enough" in call("run", tmp_path / "project", *words).stderr
    assert asked == [(("T: Positive",), ("T: Positive",))] * 3


def test_init_takes_a_file_once_however_it_is_named(tmp_path, crop):
    other = crop.parent / ".." / crop.parent.name / crop.name
    made = call("init", tmp_path / "project", crop, other, crop, "--mpp", "0.5")
    assert made.exit_code == 0, made.output
    assert "project.qpproj (1 image)" in made.stdout
    assert [i.path for i in open_project(tmp_path / "project").images()] == [crop]


def test_init_run_status_on_a_crop(tmp_path, crop, quick):
    project = tmp_path / "project"
    made = call("init", project, crop, "--mpp", "0.5")
    assert made.exit_code == 0, made.output
    assert str(project / "project.qpproj") in made.output
    before = json.loads(call("status", project, "--json").stdout)
    assert [image["state"] for image in before["images"]] == ["to do"]

    ran = call("run", project, "--config", quick, "--json")
    assert ran.exit_code == 0, ran.output
    (image,) = json.loads(ran.stdout)["images"]
    assert image["nuclei"] > 10
    assert image["tissue_mm2"] == pytest.approx(0.04, rel=0.1)
    assert Path(image["preview"]).is_file()
    run_file = json.loads(next(project.glob("patchcl/runs/*/run.json")).read_text())
    assert run_file["images"][0]["worker_seconds"]["network"] > 0
    assert "torch" in run_file["versions"]
    assert "crop.png" in (project / "patchcl" / "report" / "index.html").read_text("utf-8")

    (after,) = json.loads(call("status", project, "--json").stdout)["images"]
    assert (after["state"], after["nuclei"]) == ("done", image["nuclei"])


def test_an_image_without_pixel_size_fails_with_advice(tmp_path, crop, quick):
    project = write_project(tmp_path / "project", [crop])
    result = call("run", project, "--config", quick)
    assert result.exit_code == 1
    assert "crop.png has no pixel size" in result.output
    assert "--mpp" in result.output
    assert call("run", project, "--config", quick, "--mpp", "0.5").exit_code == 0


@needs_shared_slides
def test_bad_images_fail_one_by_one_and_the_good_one_is_done(tmp_path, quick):
    names = ["unreadable.svs", "unopenable.tiff", "cells.ome.tif", "kidney-48-5.tif"]
    names += ["boxes.tiff", "test3-DAPI-2-387.ndpi", "CMU-1-Small-Region.svs", "small.svs"]
    images = [SHARED_SLIDES / name for name in names]
    glass = tmp_path / "glass.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(236, 244, (600, 500, 3), dtype=np.uint8)).save(glass)
    project = write_project(tmp_path / "project", [*images, glass, tmp_path / "gone.svs"])
    # Only the crops of the good slide are there to learn from; glass.png needs a pixel size.
    result = call("run", project, "--config", quick, "--json")
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    images = {image["image"]: image for image in json.loads(result.stdout)["images"]}
    good = images["CMU-1-Small-Region.svs"]
    assert good["problem"] is None
    assert good["nuclei"] > 100
    assert images["small.svs"]["problem"] is None
    says = {
        "unreadable.svs": "unreadable.svs",
        "unopenable.tiff": "unopenable.tiff",
        "cells.ome.tif": "cells.ome.tif",
        "kidney-48-5.tif": "has no pixel size",
        "boxes.tiff": "352",
        "test3-DAPI-2-387.ndpi": "brightfield",
        "glass.png": "has no pixel size",
        "gone.svs": "put the file beside the project",
    }
    for name, words in says.items():
        assert words in images[name]["problem"], images[name]["problem"]
        assert name in images[name]["problem"]
        assert "\n" not in images[name]["problem"]
        assert "an internal error" not in images[name]["problem"]
        assert not (project / "patchcl" / "results" / images[name]["id"]).exists()
    assert not [*project.rglob("*.partial")]


@pytest.fixture
def disk(tmp_path):
    """mount(options): a small file system, unmounted in the end."""
    if sys.platform != "linux":
        pytest.skip("tmpfs is of Linux")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("may not mount a file system here")
        return folder

    yield mount
    subprocess.run(["umount", "--lazy", folder], capture_output=True)


def test_a_read_only_project_is_refused_before_any_work(tmp_path, crop, disk):
    folder = disk("size=1m")
    write_project(folder / "project", [crop])
    disk("remount,ro")
    result = call("run", folder / "project", "--mpp", "0.5")
    assert result.exit_code == 1
    assert "it is read-only: copy the project" in result.output
    assert "training PatchCL" not in result.output


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_output_that_cannot_be_written_is_one_line():
    command = [sys.executable, "-m", "patchcl_qupath.cli", "--help"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: what is printed cannot be written: No space left on device")


def test_a_full_disk_leaves_nothing_half_and_the_run_goes_on(tmp_path, crop, quick, disk):
    folder = disk("size=5m")
    quick.write_text(quick.read_text() + "[slide]\ntile_px = 150\n")
    project = write_project(folder / "project", [crop])
    options = ["--config", quick, "--mpp", "0.5"]
    assert call("train", project, *options).exit_code == 0
    (folder / "film").write_bytes(b"0" * (shutil.disk_usage(folder).free - 40_000))
    result = call("run", project, *options)
    assert result.exit_code == 1
    assert "disk is full: make room and run again" in result.output
    assert not [*folder.rglob("*.partial")]
    assert not (project / "patchcl" / "results" / "1").exists()

    (folder / "film").unlink()
    result = call("run", project, *options, "--json")
    assert result.exit_code == 0, result.output
    (image,) = json.loads(result.stdout)["images"]
    assert 0 < image["tiles_taken_over"] < image["tiles"] == 9
    resumed = left_by_run(project / "patchcl")
    shutil.rmtree(project / "patchcl" / "runs")
    assert call("run", project, *options).exit_code == 0
    assert left_by_run(project / "patchcl") == resumed


def test_glass_has_no_nuclei(tmp_path, crop, quick):
    glass = tmp_path / "glass.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(236, 244, (600, 500, 3), dtype=np.uint8)).save(glass)
    project = write_project(tmp_path / "project", [crop, glass])
    result = call("run", project, "--config", quick, "--mpp", "0.5", "--json")
    assert result.exit_code == 0, result.output
    images = {image["image"]: image for image in json.loads(result.stdout)["images"]}
    assert images["glass.png"]["nuclei"] == 0
    assert "no tissue" in images["glass.png"]["note"]
    assert images["crop.png"]["nuclei"] > 10


def test_nothing_to_learn_from(tmp_path, crop):
    result = call("run", write_project(tmp_path / "project", [crop]))
    assert result.exit_code == 1
    assert "no image to train on: crop.png has no pixel size" in result.output


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["run", "nowhere.qpproj"], 1, "does not exist"),
        (["run", SAMPLE / "CMU-1-Small-Region.svs"], 1, "patchcl-qp init"),
        (["run", SAMPLE, "--image", "other.svs"], 1, "no image other.svs"),
        (["run", SAMPLE, "--workers", "0"], 2, "--workers"),
        (["run", SAMPLE, "--mpp", "0"], 2, "--mpp"),
        (["run", SAMPLE, "--mpp", "nan"], 2, "'--mpp': nan is not a pixel size in µm"),
        (["init", "new", "none.svs", "--mpp", "inf"], 2, "'--mpp': inf is not in the range"),
        (["run", SAMPLE, "--mpp", "10"], 2, "'--mpp': 10.0 is not in the range 0.05<=x<=4.0"),
        (["init", "new", "none.svs", "--mpp", "0.04"], 2, "'--mpp': 0.04 is not in the range"),
        (["run", SAMPLE, "--config", "none.toml"], 2, "none.toml"),
        (["init", SAMPLE, SAMPLE / "CMU-1-Small-Region.svs"], 1, "is there already"),
        (
            ["init", *[SAMPLE / "CMU-1-Small-Region.svs"] * 2],
            1,
            "name the folder for the project first",
        ),
        (["init", "new", "none.svs"], 1, "none.svs"),
        (["status", ROOT / "tests"], 1, "no project"),
    ],
)
def test_wrong_usage_is_one_line(tmp_path, monkeypatch, arguments, status, words):
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == status, result.output
    assert words in result.output
    assert "Traceback" not in result.output
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("command", "name", "hint"),
    [
        ("run", "refind", "do you mean refined?"),
        ("run", "REFIND", "do you mean refined?"),
        ("run", "other", "it has patchcl, refined."),
        ("refine", "patchlc", "do you mean patchcl?"),
    ],
)
def test_a_model_that_does_not_exist_is_refused(tmp_path, command, name, hint):
    """In one line, with the nearest name, and nothing is trained in its place."""
    folder = copy_sample(tmp_path / "project")
    models = folder / "patchcl" / "models"
    models.mkdir(parents=True)
    for there in ("patchcl", "refined"):
        for suffix in (".pt", ".json"):
            (models / f"{there}{suffix}").write_bytes(b"{}")
    result = call(command, folder, "--model", name)
    assert result.exit_code == 2, result.output
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    assert line.startswith(f"Error: no model {name} in {folder / 'project.qpproj'}: {hint} Only")
    assert f"patchcl-qp train {folder / 'project.qpproj'} --model {name}" in line
    assert len([*models.iterdir()]) == 4
    assert not (folder / "patchcl" / "results").exists()


def test_without_models_only_the_default_is_trained(tmp_path):
    folder = copy_sample(tmp_path / "project")
    result = call("run", folder, "--model", "refined")
    assert result.exit_code == 2
    assert "it has none. Only the model patchcl is trained by itself" in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("Error:")]
    made = f"`patchcl-qp refine {folder / 'project.qpproj'}` makes this one of corrected ROIs"
    assert line.endswith(made), "a training without labels is no refined model"
    assert not [*(folder / "patchcl").rglob("*.pt")]


def test_a_model_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    """It may be another person's: to train a new one in its place is the wrong advice."""
    folder = copy_sample(tmp_path / "project")
    (folder / "patchcl" / "models").mkdir(parents=True)
    (folder / "patchcl" / "models" / "patchcl.pt").write_bytes(b"a sound model")

    def deny(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("torch.load", deny)
    result = call("run", folder)
    assert result.exit_code == 1
    assert "patchcl.pt may not be read from here: ask for the permission" in result.stderr


def test_a_folder_that_may_not_be_looked_into_is_one_line(tmp_path, monkeypatch):
    """Of what another person ran in a shared project."""

    def deny(_):
        raise PermissionError(errno.EACCES, "Permission denied", "/share/patchcl/results")

    monkeypatch.setattr("patchcl_qupath.report.page.write_report", deny)
    result = call("report", copy_sample(tmp_path / "project"), "--json")
    assert result.exit_code == 1
    reason = "/share/patchcl/results may not be read from here: ask for the permission"
    assert result.stderr == f"Error: {reason}\n"
    assert json.loads(result.stdout) == {"error": reason}
    # Of one image of a run, too.
    entry = ImageEntry("1", "a.svs", Path("a.svs"))
    error = PermissionError(errno.EACCES, "Permission denied", "/share/patchcl/results")
    assert failed_image(entry, error).problem == f"a.svs: {reason}"


def test_a_damaged_model_is_not_used(tmp_path):
    folder = tmp_path / "project"
    copy_sample(folder)
    (folder / "patchcl" / "models").mkdir(parents=True)
    (folder / "patchcl" / "models" / "patchcl.pt").write_bytes(b"not a model")
    result = call("run", folder)
    assert result.exit_code == 1
    assert "patchcl.pt cannot be used: it is damaged" in result.output
    assert "train" in result.output


def test_a_scheduler_that_is_not_there(tmp_path, quick, crop):
    project = write_project(tmp_path / "project", [crop])
    call("train", project, "--config", quick, "--mpp", "0.5")
    result = call("run", project, "--scheduler", "tcp://127.0.0.1:1", "--config", quick)
    assert result.exit_code == 2
    assert "no Dask scheduler answers at tcp://127.0.0.1:1" in result.output


def test_a_scheduler_takes_its_own_workers():
    result = call("run", SAMPLE, "--scheduler", "tcp://127.0.0.1:1", "--workers", "2")
    assert result.exit_code == 2
    assert "a scheduler has workers of its own: leave out --workers" in result.output


def test_openvino_is_not_asked_for_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    command = ["run", str(SAMPLE), "--engine", "openvino", "--device", "cuda"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 2
    assert "OpenVINO runs on CPUs: leave out --device cuda, or use --engine torch" in result.stderr


@pytest.mark.parametrize(
    ("path", "printed"),
    [
        ("/a/b/project.qpproj", "/a/b/project.qpproj"),
        (r"C:\slides\ö-1.svs", r'"C:\slides\ö-1.svs"'),
        (PureWindowsPath(r"C:\slides\ö-1.svs"), "C:/slides/ö-1.svs"),
        (PureWindowsPath(r"\\server\my slides\b"), '"//server/my slides/b"'),
        ("/a b/project.qpproj", '"/a b/project.qpproj"'),
        (r"C:\a (copy)\b", r'"C:\a (copy)\b"'),
        ("a&b", '"a&b"'),
    ],
)
def test_paths_in_commands_are_quoted_where_a_shell_would_part_them(path, printed):
    assert quoted(path) == printed


def test_init_prints_a_command_that_can_be_copied(tmp_path, crop):
    made = call("init", tmp_path / "my slides", crop, "--mpp", "0.5")
    path = tmp_path / "my slides" / "project.qpproj"
    assert made.stdout.splitlines()[-1] == f'Next:    patchcl-qp run "{path}"'


def test_init_says_what_is_wrong_with_a_path(tmp_path, crop):
    said = call("init", tmp_path / "project", tmp_path / "missing.png", tmp_path, crop).stderr
    assert said.splitlines()[:3] == [
        f"Failed: {tmp_path / 'missing.png'} does not exist, or may not be read: check the path",
        f"Failed: {tmp_path} is a folder, and no OME-Zarr: name the image files in it",
        f"Failed: {crop} has no pixel size: pass --mpp (0.25 for most scans at 40x), or set it in "
        "QuPath (Image tab, double-click 'Pixel width')",
    ]


def test_init_goes_on_after_a_file_that_may_not_be_read(tmp_path, crop, monkeypatch):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"")
    may_read = os.access
    monkeypatch.setattr(  # root may read all
        os, "access", lambda path, *rest, **more: Path(path) != secret and may_read(path, *rest)
    )
    made = call("init", tmp_path / "project", secret, crop, "--mpp", "0.5")
    assert made.exit_code == 1
    assert f"Failed: {secret}" in made.stderr
    assert "(1 image)" in made.stdout


def test_a_pixel_size_that_is_not_used_is_told(tmp_path, crop):
    """It is for images without one, and QuPath has that of the first command."""
    call("init", tmp_path / "project", crop, "--mpp", "0.25")
    missing = ["run", tmp_path / "project", "--model", "none"]
    said = call(*missing, "--mpp", "0.5").stderr
    message = "Note: --mpp is not used of 1 image with another pixel size in QuPath (0.25 µm): set"
    assert message in said
    assert "--mpp is not used" not in call(*missing, "--mpp", "0.25").stderr


def test_one_is_not_several():
    assert count_of(1, "image") == "1 image"
    assert count_of(1_200, "nucleus", "nuclei") == "1,200 nuclei"


@pytest.mark.parametrize(
    ("backend", "line"),
    [
        (Backend(kind=BackendKind.FILES), "to files"),
        (Backend(kind=BackendKind.FILES, reason="since there is none"), "to files, since there is"),
        (Backend(kind=BackendKind.PAQUO, reason="with QuPath 0.5"), "by paquo, with QuPath 0.5"),
    ],
)
def test_how_nuclei_are_written_is_said(backend, line):
    assert backend.in_words("to").startswith(line)
