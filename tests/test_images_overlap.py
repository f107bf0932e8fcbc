"""Images of a run overlap: the next is prepared and the last written while tiles are segmented."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK
from PIL import Image
from survivor import left_by_run

from patchcl_qupath import pipeline
from patchcl_qupath.datatypes import Box
from patchcl_qupath.execution.workers import open_workers
from patchcl_qupath.progress import Progress, Stage
from patchcl_qupath.project import NewImage, init_project, open_project
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.storage.records import ImageOutcome, RunRecord, read_record

NAMES = ["a.png", "b.png", "c.png", "d.png"]
SETTINGS = replace(QUICK, slide=replace(QUICK.slide, tile_px=100))


def write_images(folder: Path, sample: Path) -> Path:
    """A project of four crops of the sample slide; one cannot be read."""
    (entry,) = open_project(sample, "files").images()
    slide, images = Slide.open(entry), []
    folder.mkdir()
    for number, name in enumerate(NAMES):
        pixels = slide.read(Box(1500, 900 + 200 * number, 1700, 1100 + 200 * number))
        Image.fromarray(pixels).save(folder / name)
        images.append(NewImage(folder / name, [(200, 200)], (0.5, 0.5)))
    init_project(folder / "project", images)
    (folder / "c.png").write_bytes(b"no image")
    return folder / "project"


@contextmanager
def at_once(monkeypatch: pytest.MonkeyPatch, count: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        workers = "patchcl_qupath.execution.workers.Workers.images_at_once"
        patch.setattr(workers, lambda _: count)
        yield


def run(
    project: Path,
    model: Any,
    workers: Any,
    progress: Any = lambda _: None,
    images: Collection[str] = NAMES,
) -> list[Any]:
    opened = open_project(project, "files")
    this_run = pipeline.Run(
        project=opened, model=model, config=SETTINGS, workers=workers, progress=progress
    )
    return list(this_run.images([entry for entry in opened.images() if entry.name in images]))


@pytest.mark.parametrize("workers", [2, 6])
def test_images_at_once_are_those_of_one_after_the_other(
    workers: int,
    tmp_path: Path,
    sample_project: Path,
    model: Any,
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With six workers, which are processes, these prepare, write and draw, too."""
    alone = write_images(tmp_path / "alone", sample_project)
    with at_once(monkeypatch, 1):
        run(alone, model, client)
    together = write_images(tmp_path / "together", sample_project)
    with at_once(monkeypatch, 3), open_workers(workers) as several:
        outcomes = run(together, model, several)
    assert [outcome.image for outcome in outcomes] == NAMES
    assert ["c.png cannot be read" in (outcome.problem or "") for outcome in outcomes] == [
        name == "c.png" for name in NAMES
    ]
    expected, found = left_by_run(alone / "patchcl"), left_by_run(together / "patchcl")
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        if not name.endswith((".json",)):  # which have times and paths
            assert found[name] == content, name


def test_the_record_of_a_run_is_not_written_anew_for_each_image(
    tmp_path: Path,
    sample_project: Path,
    model: Any,
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project = write_images(tmp_path / "project", sample_project)
    recorded: list[int] = []
    write_run = pipeline.write_run

    def count(*given: Any) -> None:
        recorded.append(len(given[-1]))
        write_run(*given)

    monkeypatch.setattr(pipeline, "write_run", count)
    monkeypatch.setattr(pipeline, "_RECORD_S", 3600.0)
    outcomes = run(project, model, client)
    assert recorded == [1, 4]
    (path,) = (project / "patchcl").glob("runs/*/run.json")
    record = read_record(path, RunRecord)
    assert record is not None
    assert [image.image for image in record.images] == NAMES
    for outcome in outcomes:
        layout = open_project(project, "files").layout
        assert read_record(layout.outcome(outcome.id), ImageOutcome) is not None
    (again,) = run(project, model, client, images=NAMES[1:2])
    record = read_record(path, RunRecord)
    assert record is not None
    assert [image.image for image in record.images] == NAMES, "the others were done before"
    assert record.images[1] == again


def test_stages_overlap_and_tiles_keep_their_order(
    tmp_path: Path,
    sample_project: Path,
    model: Any,
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project = write_images(tmp_path / "project", sample_project)
    shown: list[Progress] = []
    prepared = threading.Event()

    def show(progress: Progress) -> None:
        """The first image's tiles wait here until the second is prepared."""
        shown.append(progress)
        if progress.stage is Stage.FINDING_TISSUE and progress.image == "b.png":
            prepared.set()
        if progress.stage is Stage.SEGMENTING and progress.image == "a.png":
            limit = time.monotonic() + 60
            while not prepared.is_set() and time.monotonic() < limit:
                time.sleep(0.01)

    with at_once(monkeypatch, 3):
        run(project, model, client, show)
    assert prepared.is_set()
    begun = [p.image for p in shown if p.stage is Stage.SEGMENTING and p.done == 0]
    assert begun == ["a.png", "b.png", "d.png"]


def test_a_run_that_is_left_ends_its_images(
    tmp_path: Path,
    sample_project: Path,
    model: Any,
    client: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project = open_project(write_images(tmp_path / "project", sample_project), "files")
    this_run = pipeline.Run(
        project=project, model=model, config=SETTINGS, workers=client, progress=lambda _: None
    )
    with at_once(monkeypatch, 3):
        images = this_run.images(project.images())
        assert next(images).problem is None
        images.close()
        assert not [t for t in threading.enumerate() if t.name.startswith("overlapped")]
        again = list(this_run.images(project.images()))
    assert [outcome.problem is None for outcome in again] == [True, True, False, True]
    assert again[0].unchanged is True
