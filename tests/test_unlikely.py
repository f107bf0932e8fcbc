"""Unlikely nuclei are paler and redder than the surest ones of their image, and unsure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import shapely

from patchcl_qupath.config import SegmentConfig
from patchcl_qupath.datatypes import (
    ALL_COLOURS,
    BIN_COL,
    BIN_ROW,
    RED,
    Box,
    Nuclei,
    Tile,
    UncertaintyGrid,
)
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.segmentation.measurements import PROBABILITY
from patchcl_qupath.segmentation.unlikely import are_unlikely, without_unlikely

CONFIG = SegmentConfig(min_probability_of_pale=0.5, min_probability_of_palest=0.9)
SURE = [(0.95, 0.6, 0.4)] * 3  # probability, density of red light, its share in all colours
TILES = [
    Tile(
        row=0, col=col, read=Box(0, 9 * col, 9, 9 * col + 9), write=Box(0, 9 * col, 9, 9 * col + 9)
    )
    for col in range(2)
]


def unlikely(
    others: list[tuple[float, float, float]], config: SegmentConfig = CONFIG
) -> list[bool]:
    """Which of some nuclei are unlikely beside sure ones, which are a fifth of all or more."""
    probability, red, share = np.array([*SURE, *others], np.float32).T
    found = are_unlikely(probability, red, red / share, config)
    assert not found[: len(SURE)].any()
    return found[len(SURE) :].tolist()


def test_the_paler_and_redder_the_surer_a_nucleus_must_be() -> None:
    assert unlikely([(p, 0.5999, 0.3999) for p in (0.49, 0.51)]) == [True, False]
    assert unlikely([(p, 0.3, 0.3999) for p in (0.89, 0.91)]) == [True, False]  # half as dense
    assert unlikely([(p, 0.5999, 0.65 * 0.4) for p in (0.89, 0.91)]) == [True, False]  # red
    # Half of the way to half the density: a quarter of what is asked for more.
    assert unlikely([(p, 0.45, 0.3999) for p in (0.59, 0.61)]) == [True, False]
    # Both add up, and paler than half is as half.
    assert unlikely([(p, 0.45, 0.825 * 0.4) for p in (0.69, 0.71)]) == [True, False]
    assert unlikely([(p, 0.05, 0.1) for p in (0.89, 0.91)]) == [True, False]


def test_what_is_only_paler_or_only_redder_is_likely() -> None:
    assert unlikely([(0.1, 0.3, 0.41), (0.1, 0.61, 0.2)]) == [False, False]


def test_with_nothing_asked_for_all_are_likely() -> None:
    config = replace(CONFIG, min_probability_of_pale=0.0, min_probability_of_palest=0.0)
    assert unlikely([(0.1, 0.1, 0.1)], config) == [False]


def test_all_is_relative_to_the_palest_of_the_surest_nuclei() -> None:
    red = np.linspace(0.05, 0.8, 1000).astype(np.float32)  # a slide of pale and of dark nuclei
    is_sure = np.arange(1000) % 5 == 0
    probability = np.where(is_sure, 0.95, 0.55).astype(np.float32)
    all_colours = red / np.where(is_sure, 0.4, 0.39).astype(np.float32)
    found = are_unlikely(probability, red, all_colours, CONFIG)
    palest = np.quantile(red[is_sure], 0.05)
    assert 0 < found.sum() < 50
    assert found[~is_sure & (red < 0.75 * palest)].all()
    assert not found[is_sure | (red >= palest)].any()
    order = np.random.default_rng(0).permutation(1000)
    again = are_unlikely(probability[order], red[order], all_colours[order], CONFIG)
    np.testing.assert_array_equal(again, found[order])


def test_an_image_of_one_nucleus_or_of_none_has_no_unlikely_ones() -> None:
    one = np.full(1, 0.3, np.float32)
    assert are_unlikely(0.4 + 0 * one, one, 3 * one, CONFIG).tolist() == [False]
    assert not len(are_unlikely(one[:0], one[:0], one[:0], CONFIG))


def of_tile(rows: list[tuple[float, float, float]], bins: list[int]) -> Nuclei:
    """Discs, each measured as said, in bins of the first row of the uncertainty grid."""
    probability, red, share = np.array(rows, np.float32).reshape(-1, 3).T
    measured = {
        "Area µm^2": np.arange(len(rows), dtype=np.float32),
        PROBABILITY: probability,
        RED: red,
        ALL_COLOURS: red / share,
        BIN_ROW: np.zeros(len(rows), np.float32),
        BIN_COL: np.array(bins, np.float32),
    }
    return Nuclei(np.asarray(shapely.buffer(shapely.points(bins, bins), 3.0)), measured)


def grid(nuclei: list[int]) -> UncertaintyGrid:
    """Bins of the first row with so many nuclei."""
    n = len(nuclei)
    ones = np.ones(n, np.int64)
    return UncertaintyGrid((9.0, 9.0), 0 * ones, np.arange(n), ones, ones, np.array(nuclei))


def test_unlikely_nuclei_are_left_out_of_all_that_a_store_gives(tmp_path: Path) -> None:
    pale = (0.6, 0.2, 0.2)
    store = TileStore.open(tmp_path, {})
    store.write(
        TILES[0], TileStore.encode(of_tile([*SURE, pale, pale], [0, 0, 1, 1, 1]), grid([2, 3]))
    )
    store.write(TILES[1], TileStore.encode(of_tile(SURE, [0, 1, 2]), grid([1, 1, 1])))
    likely = without_unlikely(store, TILES, CONFIG)
    assert [*likely.kept] == [TILES[0].name]  # nothing to remember of the other
    assert (store.count(TILES), likely.count(TILES)) == (8, 6)
    first, second = likely.nuclei(TILES)
    assert first.measurements["Area µm^2"].tolist() == [0, 1, 2]
    assert [*first.measurements] == ["Area µm^2", PROBABILITY]  # the rest is of tiles alone
    assert len(second) == 3
    assert [len(contours) for contours in likely.contours(TILES)] == [3, 3]
    assert [len(each[PROBABILITY]) for each in likely.measurements(TILES, [PROBABILITY])] == [3, 3]
    assert [each.nuclei.tolist() for each in likely.uncertainty_grids(TILES)] == [[2, 1], [1, 1, 1]]
    nuclei, uncertainty = TileStore.decode(likely.content(TILES[0]))
    assert (len(nuclei), uncertainty.nuclei.tolist()) == (3, [2, 1])
    assert likely.content(TILES[1]) == store.path(TILES[1]).read_bytes()


def test_what_is_left_out_does_not_depend_on_tiles(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = [*zip(rng.random(60), rng.random(60), 0.2 + 0.3 * rng.random(60), strict=True)]
    counts = []
    for name, parts in (("one", [rows]), ("two", [rows[:17], rows[17:]])):
        store = TileStore.open(tmp_path / name, {})
        for tile, part in zip(TILES, parts, strict=False):
            store.write(tile, TileStore.encode(of_tile(part, [0] * len(part)), grid([len(part)])))
        likely = without_unlikely(store, TILES[: len(parts)], CONFIG)
        found = [each.measurements[PROBABILITY] for each in likely.nuclei(TILES[: len(parts)])]
        counts.append(np.concatenate(found).tolist())
    assert 10 < len(counts[0]) < 60
    assert counts[0] == counts[1]


def test_a_store_without_tiles_stays_as_it_is(tmp_path: Path) -> None:
    store = TileStore.open(tmp_path, {})
    assert without_unlikely(store, [], CONFIG) is store
