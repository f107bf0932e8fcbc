"""Where the tests' real data are; a model and workers for all that segment the sample slide."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command does, before torch is imported

import hypothesis
import pytest
import qupath
import torch
from filelock import FileLock

from patchcl_qupath import pipeline
from patchcl_qupath.config import Config
from patchcl_qupath.execution.workers import open_workers
from patchcl_qupath.project import open_project
from patchcl_qupath.project.jvm import Process

ROOT = Path(__file__).resolve().parents[1]
QUICK = replace(
    Config(),
    patchcl=replace(Config().patchcl, max_steps=80, cooldown_steps=30, crops=20, batch=2),
    selftrain=replace(Config().selftrain, first_steps=60, steps=200, cdcl_steps=20),
    # After so few steps few nuclei are probable.
    segment=replace(Config().segment, min_probability=0.0, min_probability_of_pale=0.0),
)
# The same examples each time: a failure is one of the change that shows it.
hypothesis.settings.register_profile(
    "same", derandomize=True, deadline=None, max_examples=80, database=None
)
hypothesis.settings.load_profile("same")
os.environ["PATCHCL_QP_BACKEND"] = "files"  # tests of QuPath ask for paquo: it starts slowly

# The longest files: side by side, the last one to begin would be waited for.
LONGEST = [
    *("pipeline", "execution", "refine", "cells_run", "machines", "survival", "cases", "docs"),
    *("cli", "patchcl", "instances", "library", "images_overlap", "selftrain", "regions"),
]


def pytest_configure() -> None:
    """Share the cores among processes: threads of several would wait for each other."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    of_file = {f"test_{name}.py": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: of_file.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real slides, projects and labels, which are no part of the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real data in {folder}")
    return folder


@pytest.fixture(scope="session")
def sample_project() -> Path:
    """The folder of the sample project: read it, never write to it."""
    return ROOT / "sample_project"


def copy_sample(folder: Path) -> Path:
    """A copy of the sample project, without what a run left in it."""
    left = shutil.ignore_patterns("patchcl", "data", "classifiers")
    sample = ROOT / "sample_project"
    return Path(shutil.copytree(sample, folder, ignore=left, dirs_exist_ok=True))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sample project to write to."""
    return copy_sample(tmp_path / "project")


@pytest.fixture(scope="session")
def model(sample_project: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Model:
    """A model that learnt from the sample slide for a minute; all processes share it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    path = folder / "model.pt"
    with FileLock(folder / "model.lock"):
        if not path.exists():
            entries = open_project(sample_project, backend="files").images()
            pipeline.train(entries, QUICK, lambda *_: None).save(folder, path.stem)
    return pipeline.Model.load(path)


@pytest.fixture(scope="session")
def client() -> Iterator[Any]:
    """A Dask client of two threads."""
    with open_workers(2) as client:
        yield client


@pytest.fixture(autouse=True)
def _qupath_is_here(request: pytest.FixtureRequest) -> None:
    """What is marked so needs one, whether it starts it or only asks for it."""
    if request.node.get_closest_marker("qupath"):
        qupath.launcher()  # skips


@pytest.fixture(scope="module")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One JVM for all the tests; it starts anew after the test that kills it."""
    qupath.launcher()  # skips
    process = Process(None, tmp_path_factory.mktemp("jvm") / "qupath.log")
    yield process
    process.close()


@pytest.fixture(scope="module")
def session() -> Iterator[qupath.Session]:
    """One QuPath for all tests of a module."""
    session = qupath.Session()
    yield session
    session.close()
