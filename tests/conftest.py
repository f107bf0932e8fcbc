"""Where the tests' real data are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
os.environ["PATCHCL_QP_BACKEND"] = "files"  # tests of QuPath ask for paquo: it starts slowly


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
