"""What nuclei of an image are like: how large, and by which settings they are separated."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from scipy import ndimage

from patchcl_qupath import pipeline
from patchcl_qupath.config import SegmentConfig
from patchcl_qupath.models.engines import EngineKind
from patchcl_qupath.models.model import Confidence
from patchcl_qupath.project import open_project
from patchcl_qupath.segmentation.typical_nuclei import (
    _each_once,
    typical_area,
    typical_nuclei,
    with_diameter,
)
from patchcl_qupath.slides.prepare import prepare

CONFIG = SegmentConfig()


def test_half_of_the_area_is_in_nuclei_larger_than_the_typical_one():
    assert typical_area(np.array([40])) == 40
    assert typical_area(np.array([30, 20, 10])) == 20
    fragments = np.full(60, 3)
    assert typical_area(np.concatenate([np.full(40, 50), fragments])) == 50
    assert np.median(np.concatenate([np.full(40, 50), fragments])) == 3


def discs(radius: int, count: int) -> Confidence:
    """Nuclei (and cores) of a radius in px, apart from one another."""
    middle = np.zeros((40 * count, 40), bool)
    middle[20::40, 20] = True
    distance = ndimage.distance_transform_edt(~middle)
    return Confidence(
        *(np.where(distance < r, 0.9, 0.1).astype(np.float32) for r in (radius, radius / 2))
    )


def test_the_diameter_is_that_of_nuclei_in_all_crops(model: pipeline.Model):
    sized = with_diameter(CONFIG, model, [discs(8, 15), discs(8, 15)], mpp=0.5)
    assert sized.nucleus_diameter_um == pytest.approx(8.0, rel=0.03)
    assert sized.scale == pytest.approx(8 / 7, rel=0.03)
    assert replace(sized, nucleus_diameter_um=0.0) == CONFIG


def test_few_nuclei_tell_nothing_and_what_a_person_set_stays(model: pipeline.Model):
    assert with_diameter(CONFIG, model, [discs(8, 9)], mpp=0.5) == CONFIG
    assert with_diameter(CONFIG, model, [discs(8, 10)], mpp=0.5) != CONFIG
    blank = Confidence(*np.zeros((2, 64, 64), np.float32))
    assert with_diameter(CONFIG, model, [blank], mpp=0.5) == CONFIG
    by_hand = replace(CONFIG, nucleus_diameter_um=11.0)
    assert with_diameter(by_hand, model, [discs(8, 40)], mpp=0.5) == by_hand
    assert with_diameter(by_hand, model, [discs(8, 40)], mpp=0.5).scale == 11 / 7


def test_lengths_of_separation_stay_within_limits():
    """Where a fold or a clump is all that is found, say."""
    assert replace(CONFIG, nucleus_diameter_um=1.0).scale == 0.5
    assert replace(CONFIG, nucleus_diameter_um=90.0).scale == 2.5
    assert CONFIG.scale == 1
    assert math.isclose(CONFIG.typical_um, 7)


def test_an_image_has_one_typical_diameter_in_any_region(
    model: pipeline.Model, sample_project: Path
):
    (entry,) = open_project(sample_project, backend="files").images()
    whole = prepare(entry, model.config)
    config = model.config.segment
    found = typical_nuclei(whole, model, config, EngineKind.TORCH)
    assert 5 < found.config.nucleus_diameter_um < 9
    assert found.surest is not None
    assert 0.1 < found.surest.share < 0.5 < 5 * found.surest.density
    part = prepare(replace(entry, regions=(shapely.box(0, 0, 900, 900),)), model.config)
    assert typical_nuclei(part, model, config, EngineKind.TORCH) == found
    blank = replace(whole, normaliser=None)
    assert typical_nuclei(blank, model, config, EngineKind.TORCH) == (config, None)
    without = replace(model, calibration=None)
    sized, surest = typical_nuclei(whole, without, config, EngineKind.TORCH)
    assert sized == found.config
    assert surest is None


def test_what_is_the_same_is_looked_at_once() -> None:
    one, other = np.zeros(3), np.zeros(3)
    asked = []

    def number(first: object, second: object) -> int:
        asked.append((first, second))
        return len(asked)

    found = _each_once(number, [one, other, one, one], [one, one, one, other])
    assert found[0] == found[2]
    assert len({*found}) == 3
    assert len(asked) == 3
    assert _each_once(number, []) == []
