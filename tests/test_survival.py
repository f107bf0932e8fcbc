"""What a run survives, each really done to it: being killed and stopped, slides that go or rot.

Nothing is lost, nothing is doubled: what comes out in the end equals what comes out undisturbed.
A full disk: test_cli.py. Workers that die: test_execution.py. QuPath's process: test_paquo.py.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import tifffile
from click.testing import CliRunner, Result
from PIL import Image
from slides import write_tiff
from survivor import left_by_run

from patchcl_qupath.cli import main
from patchcl_qupath.datatypes import Box
from patchcl_qupath.project import NewImage, init_project, open_project
from patchcl_qupath.slides.signature import slide_signature
from patchcl_qupath.slides.slide import Slide

SAMPLE = Path(__file__).parent.parent / "sample_project"
SETTINGS = (
    'recipe = "patchcl"\n[patchcl]\nmax_steps = 40\nbatch = 2\ncrops = 8\n[slide]\ntile_px = 150\n'
)
RUN = [sys.executable, "-m", "patchcl_qupath.cli", "run", "--progress", "json", "--workers", "2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a project of two images, a quick model in it, and settings beside it."""
    folder = tmp_path_factory.mktemp("survival")
    (entry,) = open_project(SAMPLE, "files").images()
    slide = Slide.open(entry)
    images = []
    for name, box in [("a.tif", (1500, 900, 1900, 1300)), ("b.tif", (1900, 900, 2200, 1300))]:
        path = write_tiff(folder / name, slide.read(Box(*box)), (0.5, 0.5), factors=(1, 4))
        images.append(NewImage(path, [(box[3] - box[1], box[2] - box[0])], None))
    init_project(folder / "project", images)
    (folder / "settings.toml").write_text(SETTINGS)
    command = ["train", str(folder / "project"), "--config", str(folder / "settings.toml")]
    assert CliRunner().invoke(main, command).exit_code == 0
    return folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    """A copy of all that."""
    return copy_of(trained, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run leaves that nothing happens to."""
    folder = copy_of(trained, tmp_path_factory.mktemp("undisturbed"))
    assert run(folder).exit_code == 0
    return left_by_run(folder / "project" / "patchcl")


def copy_of(trained: Path, place: Path) -> Path:
    """A copy with images of its own."""
    folder = Path(shutil.copytree(trained, place / "copy"))
    project = folder / "project" / "project.qpproj"
    text = project.read_text("utf-8")
    project.write_text(text.replace(trained.as_posix(), folder.as_posix()), encoding="utf-8")
    return folder


def run(folder: Path, *options: str) -> Result:
    command = ["run", str(folder / "project"), "--config", str(folder / "settings.toml")]
    result = CliRunner().invoke(main, [*command, *options])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def tiles(folder: Path, image: int) -> list[Path]:
    """The files of an image's finished tiles."""
    return [*folder.glob(f"project/patchcl/runs/*/{image}/tiles/*.parquet")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_fifty_kills(folder: Path) -> None:
    project, settings = folder / "project", folder / "settings.toml"
    driver = Path(__file__).with_name("survivor.py")
    command = [sys.executable, driver, "50", project, "--workers", "2", "--config", settings]
    stages = json.loads(subprocess.check_output(command))
    assert len(stages) == 50
    # The images' tissue, tiles and results; several images are under way at once.
    assert {"finding", "segmenting", "writing"} <= {*chain.from_iterable(stages)}


def interrupted(folder: Path, stage: str, *options: str) -> int:
    """Start a run, and press Ctrl-C as soon as it did something of a stage; -> its exit status.

    As in a terminal, all its processes get the signal.
    """
    command = [*RUN, folder / "project", "--config", folder / "settings.toml", *options]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if stage in line and json.loads(line)["done"] > 2:
                break
        os.killpg(process.pid, signal.SIGINT)
        status = process.wait(timeout=2)  # what is asked of it
        printed = process.stderr.read()  # by the last of its processes, too
        assert "The same command resumes finished tiles" in printed
        assert "Traceback" not in printed
    assert not [*folder.rglob("*.partial")]
    return status


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process")
def test_ctrl_c_ends_it_at_once_and_it_resumes(folder: Path, undisturbed: dict[str, bytes]) -> None:
    assert interrupted(folder, "a.tif: segmenting") == 130
    once = len(tiles(folder, 1))
    assert once >= 3
    assert interrupted(folder, "b.tif: segmenting", "--workers", "6") == 130
    # Tiles of both images are under way at once: which of them were finished is not certain.
    twice = [len(tiles(folder, image)) for image in (1, 2)]
    assert twice[0] >= once
    assert twice[1] >= 3
    result = run(folder, "--json")
    assert result.exit_code == 0
    images = json.loads(result.stdout)["images"]
    assert [image["tiles_taken_over"] for image in images] == twice
    assert sum(twice) < sum(image["tiles"] for image in images)
    assert left_by_run(folder / "project" / "patchcl") == undisturbed


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT for one process")
def test_ctrl_c_in_training_leaves_the_old_model(folder: Path) -> None:
    models = folder / "project" / "patchcl" / "models"
    before = {file.name: file.read_bytes() for file in models.iterdir()}
    assert interrupted(folder, "training PatchCL", "--retrain") == 130
    assert {file.name: file.read_bytes() for file in models.iterdir()} == before


def test_slide_that_disappears_half_way(folder: Path, undisturbed: dict[str, bytes]) -> None:
    slide, aside = folder / "a.tif", folder / "aside.tif"
    options = ["--config", folder / "settings.toml", "--json"]
    with subprocess.Popen(
        [*RUN, folder / "project", *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        while b"a.tif: segmenting" not in process.stderr.readline():
            pass
        while not tiles(folder, 1):
            time.sleep(0.001)
        slide.rename(aside)
        printed, _ = process.communicate()
    assert process.returncode == 1
    first, second = json.loads(printed)["images"]
    assert second["problem"] is None  # the other image is done
    assert f"a.tif is not at {slide}" in first["problem"]
    assert "once it can be again, run again; finished tiles are kept" in first["problem"]
    assert not (folder / "project" / "patchcl" / "results" / "1").exists()

    finished = len(tiles(folder, 1))
    aside.rename(slide)
    result = run(folder, "--json")
    assert result.exit_code == 0
    first, second = json.loads(result.stdout)["images"]
    assert 1 <= first["tiles_taken_over"] == finished < first["tiles"]
    assert second["tiles_taken_over"] == second["tiles"]
    assert left_by_run(folder / "project" / "patchcl") == undisturbed


def rot(slide: Path, row: int, col: int) -> None:
    """Spoil the beginning of a TIFF's tile of 64 px; the file's size and time stay."""
    stat = slide.stat()
    with tifffile.TiffFile(slide) as tiff:
        page = tiff.pages[0]
        k = row * -(-page.imagewidth // 64) + col
        first = page.dataoffsets[k]
    with slide.open("rb+") as file:
        file.seek(first)
        file.write(b"\xff" * 64)
    os.utime(slide, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_tile_that_fails_is_left_out_and_shown(folder: Path) -> None:
    """The lower right corner of a slide is damaged; its stain normaliser is fitted elsewhere."""
    (entry,) = open_project(SAMPLE, "files").images()
    pixels = Slide.open(entry).read(Box(1300, 700, 2260, 1660))
    slide, whole = folder / "a.tif", folder / "whole.tif"
    write_tiff(whole, pixels, (0.5, 0.5), factors=(1, 4, 16))
    shutil.copy2(whole, slide)
    rot(slide, 14, 14)
    assert slide_signature(slide) == slide_signature(whole)  # so tiles are kept once it is mended
    models = shutil.move(folder / "project" / "patchcl" / "models", folder)
    shutil.rmtree(folder / "project")
    init_project(folder / "project", [NewImage(slide, [(960, 960)], None)])
    output = folder / "project" / "patchcl"
    shutil.copytree(models, output / "models")

    # Two tiles a side look there.
    places = [(685, 685), (822, 685), (685, 822), (822, 822)]
    result = run(folder)
    assert result.exit_code == 1
    assert "Failed: a.tif: 4 of 49 tiles were left out, as its preview shows" in result.stderr
    assert "the first of 137 x 137 px at x=685 y=685: a.tif cannot be read" in result.stderr
    written = json.loads((output / "results" / "1" / "result.json").read_text("utf-8"))
    listed = json.loads(next(output.glob("runs/*/run.json")).read_text("utf-8"))
    for failed_tiles in (written["holes"], listed["images"][0]["holes"]):
        assert [(failed["x"], failed["y"]) for failed in failed_tiles] == places
        assert {failed["width"] for failed in failed_tiles} == {137, 138}
        assert "a.tif cannot be read" in failed_tiles[0]["reason"]
    assert red_of_overview(output) == pytest.approx((685 / 960,) * 2 + (1, 1), abs=0.03)
    printed = json.loads(CliRunner().invoke(main, ["status", str(output.parent), "--json"]).stdout)
    assert printed["images"][0]["state"] == "done but for 4 of its tiles"
    page = (output / "report" / "index.html").read_text("utf-8")
    assert "4 of 49 tiles failed: a.tif cannot be read" in page
    with Image.open(output / "report" / "images" / "1" / "overview.jpg") as picture:
        shown = np.asarray(picture).astype(int)
    red = shown[..., 0] - shown[..., 1:].max(axis=2) > 150
    assert red[int(0.75 * len(red)) :, int(0.75 * len(red)) :].mean() > 0.9
    assert red.sum() < 0.1 * red.size

    shutil.copy2(whole, slide)
    os.utime(slide, ns=(1, whole.stat().st_mtime_ns))
    result = run(folder, "--json")
    assert result.exit_code == 0
    (image,) = json.loads(result.stdout)["images"]
    assert (image["tiles_taken_over"], image["tiles"], image["holes"]) == (45, 49, [])
    mended = left_by_run(output)
    shutil.rmtree(output / "runs")
    assert run(folder).exit_code == 0
    assert left_by_run(output) == mended


def red_of_overview(output: Path) -> tuple[float, ...]:
    """First row and column, last row and column, that are red beside the field; of 1."""
    with Image.open(output / "previews" / "1.png") as picture:
        shown = np.asarray(picture).astype(int)[:, 1024:]  # a field is 512 px, twice enlarged
    red = shown[..., 0] - shown[..., 1:].max(axis=2) > 150
    rows, cols = (np.flatnonzero(red.any(axis=axis)) / len(red) for axis in (1, 0))
    return rows[0], cols[0], rows[-1], cols[-1]


def test_image_of_which_no_tile_can_be_read_keeps_its_old_results(
    folder: Path, undisturbed: dict[str, bytes]
) -> None:
    assert run(folder).exit_code == 0
    shutil.rmtree(folder / "project" / "patchcl" / "runs")
    slide, aside = folder / "a.tif", folder / "aside.tif"
    shutil.copy2(slide, aside)
    with subprocess.Popen(
        [*RUN, folder / "project", "--config", folder / "settings.toml"], stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        while b"a.tif: segmenting" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGSTOP)
        for row in range(7):
            for col in range(7):
                rot(slide, row, col)
        process.send_signal(signal.SIGCONT)
        _, printed = process.communicate()
    assert process.returncode == 1
    assert b"Failed: a.tif: no tile can be segmented: a.tif cannot be read" in printed
    kept = left_by_run(folder / "project" / "patchcl")
    assert kept["results/1/nuclei.parquet"] == undisturbed["results/1/nuclei.parquet"]
    shutil.move(aside, slide)
    assert run(folder).exit_code == 0
    assert left_by_run(folder / "project" / "patchcl") == undisturbed
