"""Unlikely nuclei are paler and redder than the surest ones of their image, and unsure."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchcl_qupath import pipeline
from patchcl_qupath.config import SegmentConfig
from patchcl_qupath.project import open_project
from patchcl_qupath.segmentation import image_tiles
from patchcl_qupath.segmentation.measurements import PROBABILITY, NuclearStain
from patchcl_qupath.segmentation.typical_nuclei import TypicalNuclei
from patchcl_qupath.segmentation.unlikely import SurestNuclei, are_unlikely
from patchcl_qupath.storage.parquet import read_nuclei

CONFIG = SegmentConfig(min_probability_of_pale=0.5, min_probability_of_palest=0.9)
SUREST = SurestNuclei(density=0.6, share=0.4)


def unlikely_of(nuclei: list[tuple[float, float, float]], config: SegmentConfig = CONFIG) -> Any:
    """Which are unlikely of nuclei of a probability, a density of red light, and its share."""
    probability, red, share = np.array(nuclei).T
    no = np.zeros(len(red), np.bool_)
    stain = NuclearStain(
        red=red, share_of_red=share, hematoxylin=red, is_ink=no, is_blurred=no, on_glass=no
    )
    return are_unlikely(probability, stain, SUREST, config).tolist()


def test_the_paler_and_redder_the_surer_a_nucleus_must_be() -> None:
    assert unlikely_of([(p, 0.5999, 0.3999) for p in (0.49, 0.51)]) == [True, False]
    assert unlikely_of([(p, 0.3, 0.3999) for p in (0.89, 0.91)]) == [True, False]  # half as dense
    assert unlikely_of([(p, 0.5999, 0.65 * 0.4) for p in (0.89, 0.91)]) == [True, False]  # red
    # Half of the way to half the density: a quarter of what is asked for more.
    assert unlikely_of([(p, 0.45, 0.3999) for p in (0.59, 0.61)]) == [True, False]
    # Both add up, and paler than half is as half.
    assert unlikely_of([(p, 0.45, 0.825 * 0.4) for p in (0.69, 0.71)]) == [True, False]
    assert unlikely_of([(p, 0.05, 0.1) for p in (0.89, 0.91)]) == [True, False]


def test_what_is_only_paler_or_only_redder_is_likely() -> None:
    assert unlikely_of([(0.1, 0.3, 0.41), (0.1, 0.61, 0.2)]) == [False, False]


def test_with_nothing_asked_for_all_are_likely() -> None:
    config = replace(CONFIG, min_probability_of_pale=0.0, min_probability_of_palest=0.0)
    assert unlikely_of([(0.1, 0.1, 0.1)], config) == [False]


def test_the_surest_are_a_fifth_of_all_nuclei_and_the_palest_a_twentieth_of_these() -> None:
    sure = [(0.9 + 0.0001 * n, 0.2 + 0.001 * n, 0.3 + 0.001 * n) for n in range(101)]
    unsure = [(0.5, 0.01, 0.01)] * 404
    rows = np.array([*sure, *unsure])
    np.random.default_rng(0).shuffle(rows)
    found = SurestNuclei.of(*rows.T)
    assert found is not None
    assert found.density == pytest.approx(0.205)
    assert found.share == pytest.approx(0.35)


def test_without_a_nucleus_there_are_none() -> None:
    assert SurestNuclei.of(*np.zeros((3, 0))) is None


def test_a_run_leaves_out_what_is_unlikely(
    monkeypatch: pytest.MonkeyPatch, folder: Path, model: pipeline.Model, client: Any
) -> None:
    """All are far paler and redder than such nuclei."""
    found = {}
    for surest in (None, SurestNuclei(density=9.0, share=9.0)):
        typical = TypicalNuclei(model.config.segment, surest)
        monkeypatch.setattr(image_tiles, "typical_nuclei", lambda *_, typical=typical: typical)
        shutil.rmtree(folder / "patchcl", ignore_errors=True)
        project = open_project(folder / "project.qpproj", backend="files")
        run = pipeline.Run(
            project=project,
            model=model,
            config=model.config,
            workers=client,
            progress=lambda _: None,
        )
        (outcome,) = run.images(project.images())
        nuclei = read_nuclei(Path(str(outcome.results)) / "nuclei.parquet")
        measured = nuclei.measurements[PROBABILITY]
        found[surest] = set(nuclei.uuids[measured >= 0.9]), set(nuclei.uuids)
    all_sure, everything = found.pop(None)
    ((_, kept),) = found.values()
    assert kept == all_sure < everything
