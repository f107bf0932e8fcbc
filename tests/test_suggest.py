"""Which fields are worth correcting: by what was surveyed, and on the real slide with QuPath."""

from __future__ import annotations

import numpy as np
import pytest
import shapely

from patchcl_qupath.suggest import Candidates, choose, usual_doubt

SIDE = 512.0


def grid(rows: int, cols: int, slide: int = 0, seed: int = 0, **columns: float) -> Candidates:
    """The fields of one slide, row by row: full of tissue, of all looks."""
    rng = np.random.default_rng(seed)
    y, x = (axis.ravel() * SIDE for axis in np.mgrid[:rows, :cols])
    count = rows * cols
    nuclei = rng.integers(50, 500, count)
    values = {
        "slides": np.full(count, slide),
        "boxes": shapely.box(x, y, x + SIDE, y + SIDE),
        "tissue": np.ones(count),
        "doubt": 0.1 + nuclei / 1000 + rng.normal(0, 0.02, count),
        "nuclei": nuclei,
        "hematoxylin": rng.uniform(0.2, 0.6, count),
        "area": rng.uniform(20, 60, count),
    }
    return Candidates(**values | {name: np.full(count, v) for name, v in columns.items()})


def together(*parts: Candidates) -> Candidates:
    return Candidates(
        *(np.concatenate([getattr(p, n) for p in parts]) for n in Candidates.__dataclass_fields__)
    )


def test_a_field_is_never_on_glass_and_has_nuclei() -> None:
    """Even where that is what the network doubts most."""
    fields = grid(6, 6)
    fields.tissue[::2], fields.doubt[::2] = 0.3, 1.0
    fields.nuclei[1::4], fields.doubt[1::4] = 3, 1.0
    chosen = choose(fields, 36)
    assert chosen
    assert (fields.tissue[chosen] >= 0.5).all()
    assert (fields.nuclei[chosen] >= 10).all()
    assert choose(grid(3, 3, tissue=0.49), 3) == []
    assert choose(grid(0, 0), 3) == []


def test_full_fields_come_first_and_fuller_ones_where_there_is_none() -> None:
    fields = grid(9, 9)
    fields.tissue[:] = 0.6
    fields.tissue[[0, 40, 80]] = 0.8
    chosen = choose(fields, 5)
    assert sorted(chosen[:3]) == [0, 40, 80]
    assert len(chosen) == 5
    biopsy = grid(2, 2, slide=1, tissue=0.55)
    assert 1 in together(fields, biopsy).slides[choose(together(fields, biopsy), 2)]


def test_fields_never_overlap_or_touch_and_there_may_be_fewer() -> None:
    fields = grid(5, 5)
    chosen = choose(fields, 100)
    assert len(set(chosen)) == len(chosen) <= 9  # every other one at most
    boxes = fields.boxes[chosen]
    near = shapely.distance(boxes[:, None], boxes[None])[~np.eye(len(boxes), dtype=bool)]
    assert near.min() >= 1


def test_slides_have_as_many_each() -> None:
    """Though one of them is in more doubt than all others."""
    slides = [grid(4, 4, slide=k, seed=k) for k in range(5)]
    slides[3].doubt[:] += 0.4
    fields = together(*slides)
    for count in (1, 4, 5, 8, 10):
        on = np.bincount(fields.slides[choose(fields, count)], minlength=5)
        assert on.sum() == count
        assert on.max() - on.min() <= 1
    assert fields.slides[choose(fields, 1)] == [3]


def test_a_small_slide_does_not_hold_up_the_others() -> None:
    fields = together(grid(1, 1, slide=0), grid(6, 6, slide=1, seed=1))
    on = np.bincount(fields.slides[choose(fields, 5)])
    assert on.tolist() == [1, 4]


def test_doubt_counts_beyond_what_is_usual_for_so_many_nuclei() -> None:
    """Crowded fields have the most, by the rims of nuclei; a sparse one has more than it should."""
    fields = grid(8, 8)
    sparse = int(np.argmin(fields.nuclei))
    fields.doubt[sparse] += 0.15
    assert fields.doubt[sparse] < fields.doubt.max() - 0.1
    assert choose(fields, 1) == [sparse]
    beyond = fields.doubt - usual_doubt(fields)
    assert beyond[np.arange(64) != sparse] == pytest.approx(0, abs=0.08)
    assert beyond[sparse] > 0.1


def test_looks_are_spread() -> None:
    """Two kinds of tissue, one of them rare: both are seen, whatever is in more doubt."""
    fields = grid(10, 10, nuclei=200, doubt=0.4, area=30.0, hematoxylin=0.3)
    fields.doubt[:] += np.random.default_rng(0).normal(0, 0.001, 100)
    rare = [77, 79, 97]
    fields.area[rare], fields.hematoxylin[rare] = 80, 0.6
    fields.doubt[rare] = 0.4
    chosen = choose(fields, 3)
    assert len(set(rare) & set(chosen[:2])) == 1
    assert len(set(rare) & set(chosen)) < 3


def test_what_is_corrected_is_left_and_counts() -> None:
    fields = together(*(grid(4, 4, slide=k, seed=k) for k in range(2)))
    first = choose(fields, 2)
    done = [(int(fields.slides[i]), fields.boxes[i]) for i in first[:1]]
    (slide, area), more = done[0], choose(fields, 3, done)
    assert fields.slides[more[0]] != slide  # it has one
    for i in more:
        assert fields.slides[i] != slide or fields.boxes[i].distance(area) >= 1
    elsewhere = (7, shapely.box(0, 0, 9, 9))  # on a slide without candidates
    assert choose(fields, 2, [elsewhere]) == first


def test_equal_surveys_make_the_same_choice() -> None:
    fields = together(*(grid(6, 6, slide=k, seed=k) for k in range(3)))
    again = together(*(grid(6, 6, slide=k, seed=k) for k in range(3)))
    assert choose(fields, 7) == choose(again, 7)
    assert choose(fields, 7)[:4] == choose(fields, 4)  # more are those and others
    same = grid(5, 5, nuclei=100, doubt=0.5, hematoxylin=0.3, area=30.0)
    assert len(choose(same, 4)) == 4
