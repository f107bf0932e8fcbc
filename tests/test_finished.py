"""A run on a finished project has nothing to do, and answers without importing what does work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from conftest import QUICK, copy_sample
from survivor import left_by_run

from patchcl_qupath import pipeline
from patchcl_qupath.config import EngineChoice
from patchcl_qupath.errors import ImageError, StorageError
from patchcl_qupath.execution import outcome as outcome_module
from patchcl_qupath.finished import _fits, _is_same_in_qupath, all_finished, is_reported
from patchcl_qupath.project import open_project
from patchcl_qupath.report.found import find_image, find_runs
from patchcl_qupath.segmentation import image_tiles
from patchcl_qupath.segmentation.typical_nuclei import TypicalNuclei
from patchcl_qupath.status import image_status
from patchcl_qupath.storage.records import ImageOutcome, ResultRecord, RunRecord, read_record

HEAVY = {
    "torch",
    "numba",
    "dask",
    "distributed",
    "zarr",
    "tifffile",
    "scipy",
    "openvino",
    "pyarrow",
}
MODULES = """
import sys
from patchcl_qupath.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
    print("MODULES", *sys.modules)
"""


def call(*arguments: Any) -> tuple[str, set[str]]:
    """What a command prints in a new process, and which modules it imported."""
    command = [sys.executable, "-c", MODULES, *map(str, arguments)]
    printed = subprocess.check_output(command, text=True, stderr=subprocess.STDOUT)
    text, _, modules = printed.partition("MODULES")
    return text, {name.partition(".")[0] for name in modules.split()}


def run(folder: Path, model: Any, client: Any, config: Any = QUICK) -> ImageOutcome:
    project = open_project(folder, "files")
    this_run = pipeline.Run(
        project=project, model=model, config=config, workers=client, progress=lambda _: None
    )
    (outcome,) = this_run.images(project.images())
    assert outcome.problem is None, outcome.problem
    return outcome


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, model: Any, client: Any) -> Path:
    """A finished project."""
    folder = copy_sample(tmp_path_factory.mktemp("finished") / "project")
    model.save(folder / "patchcl" / "models", "patchcl")
    run(folder, model, client)
    return folder


@pytest.fixture
def folder(done: Path, tmp_path: Path) -> Path:
    """A copy of it, at another place."""
    return Path(shutil.copytree(done, tmp_path / "copy"))


def finished(folder: Path, config: Any = QUICK, within: tuple[str, ...] = ()) -> Any:
    project = open_project(folder, "files")
    images = [replace(entry, fallback_mpp=None) for entry in project.images()]
    return all_finished(project, images, config=config, model_name="patchcl", within=within)


def test_a_finished_project_is_left_as_it_is(folder: Path, model: Any, client: Any) -> None:
    (outcome,) = finished(folder)
    assert outcome.unchanged is True
    assert outcome.tiles == outcome.tiles_resumed > 1
    assert outcome.results == str(folder / "patchcl" / "results" / "1")  # it was moved
    before = left_by_run(folder / "patchcl")
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = run(folder, model, client)
    assert again.unchanged is True
    assert again.nuclei == outcome.nuclei > 1000
    assert left_by_run(folder / "patchcl") == before
    written = {
        p.name for p in folder.rglob("*") if p.is_file() and times.get(p) != p.stat().st_mtime_ns
    }
    assert written <= {"run.json", ".lock"}


def test_nothing_heavy_is_imported_to_find_nothing_to_do(folder: Path, tmp_path: Path) -> None:
    """Times are measured in benchmarks; imports are what takes time."""
    from patchcl_qupath.config import to_dict

    settings = tmp_path / "settings.toml"
    changed = {
        table: {
            name: value
            for name, value in values.items()
            if value != to_dict(type(QUICK)())[table][name]
        }
        for table, values in to_dict(QUICK).items()
        if isinstance(values, dict)
    }
    lines = [
        line
        for table, values in changed.items()
        for line in [f"[{table}]", *(f"{name} = {json.dumps(v)}" for name, v in values.items())]
    ]
    settings.write_text("\n".join(lines))
    (folder / "patchcl" / "report" / "index.html").write_text("a report")
    text, modules = call("run", folder, "--backend", "files", "--config", settings)
    assert "Nothing to do for 1 image with" in text
    assert not HEAVY & modules
    text, _ = call("run", folder, "--backend", "files", "--config", settings, "--json")
    (image,) = json.loads(text[text.index("{") :])["images"]
    assert image["unchanged"] is True
    assert image["tiles_taken_over"] == image["tiles"]


def test_status_imports_nothing_heavy(folder: Path) -> None:
    text, modules = call("status", folder)
    assert "done" in text
    assert not HEAVY & modules


def test_a_report_that_a_run_did_not_come_to_is_written(folder: Path) -> None:
    project = open_project(folder, "files")
    page = project.layout.report_page
    assert not is_reported(project, project.images())
    page.write_text("a report")
    assert is_reported(project, project.images())
    result = project.layout.result("1")
    os.utime(result, ns=2 * (page.stat().st_mtime_ns + 1,))  # a later run, which was stopped
    assert not is_reported(project, project.images())


def test_cells_with_names_of_another_qupath_are_written_again(folder: Path) -> None:
    """Those of the project are of 0.5; where nuclei have no cells, no name differs."""
    project = open_project(folder, "files")
    (entry,) = project.images()
    result = read_record(project.layout.result("1"), ResultRecord)
    assert result is not None
    assert result.is_compartment_first is False
    with_cells = {**result.config, "cells": {**result.config["cells"], "expand_um": 5.0}}
    for config, names, same in (
        (with_cells, False, True),
        (with_cells, True, False),
        (with_cells, None, True),
        (result.config, True, True),
    ):
        made = msgspec.structs.replace(result, config=config, is_compartment_first=names)
        assert _is_same_in_qupath(project, entry, made, "") is same


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def copy_other_weights(folder: Path) -> None:
    """Copy those of another model, without its record."""
    path = folder / "patchcl" / "models" / "patchcl.pt"
    model = pipeline.Model.load(path)
    with torch.no_grad():
        next(model.network.parameters()).mul_(2)
    other = replace(model)  # with a digest of its own
    path.write_bytes(other.save(folder / "elsewhere", "patchcl").read_bytes())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


CHANGES: dict[str, Callable[[Path], Any]] = {
    "the slide is another": lambda folder: touch(folder / "CMU-1-Small-Region.svs"),
    "the slide is gone": lambda folder: (folder / "CMU-1-Small-Region.svs").unlink(),
    "no model": lambda folder: (folder / "patchcl/models/patchcl.pt").unlink(),
    "a model that was not written whole": lambda folder: touch(
        folder / "patchcl/models/patchcl.pt"
    ),
    "weights of another model": copy_other_weights,
    "no tiles": lambda folder: shutil.rmtree(folder / "patchcl/runs"),
    "no nuclei": lambda folder: shutil.rmtree(folder / "patchcl/results"),
    "a table of nuclei that is damaged": lambda folder: cut(
        folder / "patchcl/results/1/nuclei.parquet"
    ),
    "a table of nuclei that was removed": lambda folder: (
        folder / "patchcl/results/1/nuclei.parquet"
    ).unlink(),
    "no file for QuPath": lambda folder: (
        folder / "patchcl/results/1/nuclei-000.geojson.gz"
    ).unlink(),
    "an empty preview": lambda folder: (folder / "patchcl/previews/1.png").write_bytes(b""),
    "no figures": lambda folder: (folder / "patchcl/report/images/1/figures.json").unlink(),
    "figures of an earlier run": lambda folder: touch(folder / "patchcl/report/outcomes/1.json"),
    "no outcome": lambda folder: (folder / "patchcl/report/outcomes/1.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_what_is_not_finished_is_run(folder: Path, change: Callable[[Path], Any]) -> None:
    assert finished(folder)
    change(folder)
    assert finished(folder) is None


@pytest.mark.parametrize(
    ("engine", "fitting"),
    [
        ("torch", {"auto", "torch"}),
        ("openvino bfloat16", {"auto", "openvino"}),
        ("openvino int8", {"auto"}),
        ("torch cuda float16", {"auto", "torch"}),
    ],
)
def test_nuclei_of_an_engine_are_those_of_who_asked_for_it(engine: str, fitting: set[str]) -> None:
    assert {choice for choice in EngineChoice if _fits(engine, choice)} == fitting


def test_other_settings_are_another_run(folder: Path) -> None:
    assert finished(folder, replace(QUICK, result=replace(QUICK.result, class_name="X"))) is None
    assert finished(folder, replace(QUICK, engine=EngineChoice.TORCH)) is None
    assert finished(folder, within=("Tumor",)) is None
    stains = {"image": "CMU-1-Small-Region.svs", "type": "BRIGHTFIELD_H_DAB"}
    summary = folder / "data" / "1" / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text(json.dumps({"imageType": stains["type"]}))
    assert finished(folder) is None  # its measurements are of other stains


def test_nuclei_of_another_pixel_size_are_not_finished(folder: Path) -> None:
    """One that QuPath shows, and that is exported but not saved: at first it is in other digits."""
    exported = folder / "patchcl" / "stains" / "1.json"
    exported.parent.mkdir(parents=True)
    for mpp, is_same in ((0.4990001, True), (0.25, False)):
        exported.write_text(json.dumps({"pixel_size_um": [mpp, mpp]}))
        assert (finished(folder) is not None) is is_same
        project = open_project(folder, "files")
        changed = image_status(project, project.images()[0]).changed
        assert ("pixel size" in changed) is not is_same


def test_a_run_that_a_full_disk_stopped_goes_on(
    folder: Path, model: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its nuclei are on disk, classified; pictures and outcome are those of the run before."""
    config = replace(QUICK, result=replace(QUICK.result, positive="nucleus-hematoxylin-mean=0.0"))

    def full(*_: Any) -> None:
        raise StorageError("no space left")

    with monkeypatch.context() as stopped:
        stopped.setattr(pipeline, "write_pictures", full)
        stopped.setattr(pipeline, "write_outcome", lambda *_: None)
        stopped.setattr(pipeline, "write_run", lambda *_: None)
        with pytest.raises(AssertionError, match="no space left"):
            run(folder, model, client, config)
    assert finished(folder, config) is None
    found = find_image(project := open_project(folder), project.images()[0])
    assert found.positive_percent == 100
    assert found.figures is None  # those of before are on disk
    assert "its pictures were not made: run again" in found.warnings
    outcome = run(folder, model, client, config)
    assert outcome.unchanged is not True
    assert [summary.positive_percent for summary in outcome.summaries] == [100]
    (again,) = finished(folder, config)
    assert again.summaries == outcome.summaries


def test_nuclei_of_a_run_that_failed_after_them_are_no_earlier_ones(
    folder: Path, model: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where QuPath had the image open; then the run fails before it has nuclei."""
    project = open_project(folder, "files")
    (entry,) = project.images()
    other = replace(QUICK, result=replace(QUICK.result, class_name="X"))

    def failed() -> tuple[ImageOutcome, list[str], str]:
        """The outcome, what the report says of earlier runs, and the class of the nuclei."""
        (outcome,) = pipeline.Run(
            project=project, model=model, config=other, workers=client, progress=lambda _: None
        ).images([entry])
        assert outcome.problem is not None
        assert finished(folder, other) is None
        warnings = find_image(project, entry).warnings
        result = read_record(project.layout.result(entry.id), ResultRecord)
        assert result is not None
        said = [one for one in warnings if "earlier" in one]
        return outcome, said, result.config["result"]["class_name"]

    def deny(*_: Any) -> None:
        raise ImageError("QuPath changed the image")

    with monkeypatch.context() as stopped:
        stopped.setattr(pipeline, "answer", deny)
        outcome, said, shown = failed()
        assert (outcome.results, shown) == (None, "Nucleus")
        assert said == ["the result of an earlier run is shown"]
    with monkeypatch.context() as stopped:
        stopped.setattr(pipeline, "write_uncertainty_grid", deny)
        outcome, said, shown = failed()
        assert (outcome.results, shown) == (str(project.layout.results(entry.id)), "X")
        assert said == []


def test_packages_are_those_that_made_the_nuclei(
    folder: Path, model: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Newer ones, with which the run goes on for another image, did not make these."""
    project = open_project(folder, "files")
    (entry,) = project.images()
    found = find_image(project, entry)
    (before,) = find_runs(project, [found])
    assert before.versions["torch"] == version("torch")
    monkeypatch.setattr(outcome_module, "package_versions", lambda: {"torch": "99"})
    assert run(folder, model, client).unchanged is True
    record = read_record(project.layout.run_record(before.id), RunRecord)
    assert record is not None
    assert record.versions["torch"] == "99"
    later = msgspec.structs.replace(found.result, versions=record.versions)
    runs = find_runs(project, [find_image(project, entry), replace(found, result=later)])
    assert [one.versions["torch"] for one in runs] == [version("torch"), "99"]


def test_a_run_goes_on_by_the_typical_nuclei_of_its_finished_tiles(
    folder: Path, model: Any, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine, with a pixel that differs, there may be ten nuclei and not nine of them:
    the diameter is measured, and not 7 µm."""
    project, expected = open_project(folder, "files"), left_by_run(folder / "patchcl")
    measured = image_tiles.typical_nuclei
    (store,) = project.layout.tiles_of_runs("1")

    def otherwise(*arguments: Any) -> Any:
        config, surest = measured(*arguments)
        return TypicalNuclei(replace(config, nucleus_diameter_um=12.0), surest)

    monkeypatch.setattr(image_tiles, "typical_nuclei", otherwise)
    _, *others = sorted((store / "tiles").iterdir())
    for tile in others:
        tile.unlink()
    project.layout.outcome("1").unlink()
    outcome = run(folder, model, client)
    assert (outcome.tiles, outcome.tiles_resumed) == (1 + len(others), 1)
    assert left_by_run(folder / "patchcl") == expected


def test_failed_tiles_are_tried_again(folder: Path) -> None:
    path = folder / "patchcl" / "results" / "1" / "result.json"
    result = json.loads(path.read_text())
    failed = {"x": 0, "y": 0, "width": 9, "height": 9, "reason": "damaged"}
    path.write_text(json.dumps(result | {"holes": [failed]}))
    assert finished(folder) is None
