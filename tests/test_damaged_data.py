"""Objects of an image that QuPath cannot read are not lost: QuPath shows the image without them.

Each image has another fault. The scripts run in a real QuPath without a window.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import qupath
from results import result_of

from patchcl_qupath.config import ResultConfig
from patchcl_qupath.project.results import write_results
from patchcl_qupath.project.scripts import copy_scripts

pytestmark = pytest.mark.qupath

SLIDE = Path(__file__).parent.parent / "sample_project" / "CMU-1-Small-Region.svs"
DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "text.svs": lambda data: b"not QuPath's",
    "half.svs": lambda data: data[: len(data) // 2],
    "zeros.svs": lambda data: data[: len(data) // 2] + bytes(200) + data[len(data) // 2 + 200 :],
    "end.svs": lambda data: data[:-6],  # QuPath reads the objects, and not what is after them
}
WHOLE = "whole.svs"
DRAW = (
    qupath.DRAW_RECTANGLES
    + """
draw('mine', 'PatchCL: corrected', 20, 20, 300, 300)
(0..40).each { draw("nucleus ${it}", 'Nucleus', 30 + 20 * (it % 7), 30 + 20 * it.intdiv(7), 9, 9) }
entry.saveImageData(imageData)
'1'
"""
)
NAMES = """
groovy.json.JsonOutput.toJson(hierarchy.getAllObjects(false).collect { it.getName() }.findAll())
"""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory, session: qupath.Session) -> Path:
    """A project of images in which a person drew, and nuclei were found; then data are damaged."""
    folder = tmp_path_factory.mktemp("damaged") / "project"
    path = qupath.make_project(folder, SLIDE, [*DAMAGED, WHOLE])
    session.run(path, DRAW)
    copy_scripts(path)
    found = qupath.nuclei(10, 10, "a")
    for number in range(1, len(DAMAGED) + 2):
        results = folder / "patchcl" / "results" / f"{number}"
        write_results(results, [found], ResultConfig(), result_of(len(found)))
    for number, damage in enumerate(DAMAGED.values(), start=1):
        data = folder / "data" / f"{number}" / "data.qpdata"
        data.write_bytes(damage(data.read_bytes()))
    return path


@pytest.fixture
def path(drawn: Path, tmp_path: Path) -> Path:
    shutil.copytree(drawn.parent, tmp_path / "project")
    path = tmp_path / "project" / drawn.name
    content = json.loads(path.read_text("utf-8"))
    content["uri"] = path.as_uri()
    path.write_text(json.dumps(content), "utf-8")
    return path


def data_of(path: Path) -> list[bytes]:
    """Of the damaged images."""
    folders = [path.parent / "data" / f"{number}" for number in range(1, len(DAMAGED) + 1)]
    return [(folder / "data.qpdata").read_bytes() for folder in folders]


@pytest.mark.parametrize("script", ["import_nuclei", "summarise"])
def test_what_cannot_be_read_is_not_replaced(
    path: Path, session: qupath.Session, script: str
) -> None:
    before = data_of(path)
    log = qupath.run_script(path, path.parent / "scripts" / f"{script}.groovy", "--save")
    assert data_of(path) == before
    for number, name in enumerate(DAMAGED, start=1):
        assert f"{name}: {path.parent}/data/{number}/data.qpdata is damaged, or was" in log
        # QuPath's window saves after each script of 'Run for project'.
        (copy,) = (path.parent / "patchcl" / "backups" / f"{number}").iterdir()
        assert copy.read_bytes() == before[number - 1]
        data = path.parent / "data" / f"{number}" / "data.qpdata"
        assert copy.name == f"data.qpdata.{data.stat().st_mtime_ns}.damaged"
    if script == "import_nuclei":
        receipts = [file.name for file in (path.parent / "patchcl" / "imported").iterdir()]
        assert receipts == [f"{len(DAMAGED) + 1}.json"]
        assert {"mine", "PatchCL"} <= set(session.run(path, NAMES)[WHOLE])


def test_what_cannot_be_read_is_not_exported(path: Path) -> None:
    """Else a run would find no annotation, and refining no ROI, in an image that has them."""
    patchcl, last = path.parent / "patchcl", f"{len(DAMAGED) + 1}"
    for script, folder in [("export_regions", "regions"), ("export_labels", "labels")]:
        log = qupath.run_script(path, path.parent / "scripts" / f"{script}.groovy")
        for name in DAMAGED:
            assert f"{name}: its " in log
        assert [file.name for file in (patchcl / folder).iterdir()] == [f"{last}.geojson"]
    assert [file.name for file in (patchcl / "stains").iterdir()] == [f"{last}.json"]


def test_a_review_leaves_out_what_cannot_be_read(path: Path) -> None:
    log = qupath.run_script(path, path.parent / "scripts" / "review.groovy", "-i", WHOLE)
    assert "1 ROIs in 1 image: 1 corrected, 0 left" in log
    for name in DAMAGED:
        assert f"{name}: its ROIs are not listed, as " in log


def test_stains_that_cannot_be_read_are_not_taken_for_none(path: Path, tmp_path: Path) -> None:
    command = tmp_path / "command"
    command.write_text("#!/bin/sh\nexit 1\n")
    command.chmod(0o755)
    script = path.parent / "scripts" / "run_patchcl.groovy"
    text = script.read_text("utf-8").replace(
        "String command = '", f"String command = '{command}' //"
    )
    script.write_text(text, "utf-8")
    with pytest.raises(AssertionError) as failed:  # as the command failed
        qupath.run_script(path, script, "-i", WHOLE)
    for name in DAMAGED:
        assert f"{name}: its annotations and stains cannot be read: " in str(failed.value)
    stains = path.parent / "patchcl" / "stains"
    assert [file.name for file in stains.iterdir()] == [f"{len(DAMAGED) + 1}.json"]
