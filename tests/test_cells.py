"""Growing nuclei into cells: what must hold of all cells, and what they measure."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapely
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from results import result_of
from scipy import ndimage
from shapely import affinity

from patchcl_qupath.cli import main
from patchcl_qupath.config import CellConfig, Config, ObjectType, ResultConfig, from_dict
from patchcl_qupath.datatypes import Box, Nuclei, Polygons, Tile, UncertaintyGrid
from patchcl_qupath.errors import ConfigError, DamagedError, StorageError
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.project.coordinates import points_text
from patchcl_qupath.project.names import in_qupath
from patchcl_qupath.project.results import write_results
from patchcl_qupath.segmentation import cell_borders, cells, fit_cells, grow_tile
from patchcl_qupath.segmentation.cells import grow
from patchcl_qupath.segmentation.fit_cells import fit_to_nuclei
from patchcl_qupath.segmentation.grow_tile import CellContext, NucleiOfTiles
from patchcl_qupath.segmentation.measurements import PROBABILITY, measure_cells, shape_measurements
from patchcl_qupath.segmentation.rings import polygons_of, rings_of, scaled
from patchcl_qupath.slides.stain_vectors import H_E
from patchcl_qupath.slides.stains import densities
from patchcl_qupath.storage.geojson import read_objects
from patchcl_qupath.storage.parquet import from_table, read_geoarrow, read_nuclei

SIDE = 120
SHAPES = [*shape_measurements(np.empty(0, object))]
BOX = Box(0, 0, SIDE, SIDE)


def cells_of(
    nuclei: Polygons,
    expand_um: float,
    scale: float = 0,
    mpp: tuple[float, float] = (1.0, 1.0),
    box: Box = BOX,
    count: int | None = None,
) -> Polygons:
    """The cells of the first nuclei, or of all."""
    config = CellConfig(expand_um=expand_um, constrain_scale=scale)
    count = len(nuclei) if count is None else count
    return polygons_of(grow(rings_of(nuclei), count, box, mpp, config))


def fitted_to(nuclei: Polygons, cells: Polygons) -> Polygons:
    """Cells, fitted to their nuclei and to others."""
    return polygons_of(fit_to_nuclei(rings_of(cells), rings_of(nuclei)))


def fill(polygons: Polygons) -> np.ndarray[Any, np.dtype[np.int_]]:
    """The last polygon that holds the centre of each pixel, k + 1; 0 where none does."""
    rows, cols = np.mgrid[:SIDE, :SIDE] + 0.5
    labels = np.zeros((SIDE, SIDE), int)
    for k, polygon in enumerate(polygons):
        labels[shapely.contains_xy(polygon, cols, rows)] = k + 1
    return labels


def in_um(polygons: Polygons, mpp: tuple[float, float]) -> Polygons:
    return np.asarray(shapely.transform(polygons, lambda xy: xy * np.array(mpp)), dtype=object)


def disc(x: float, y: float, radius: float) -> shapely.Polygon:
    return shapely.Point(x, y).buffer(radius, quad_segs=16)


@st.composite
def fields(draw: st.DrawFn) -> Polygons:
    """Nuclei on a grid of 100 px: ellipses and kidneys, near one another, some touching."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nuclei: list[shapely.Polygon] = []
    for _ in range(draw(st.integers(1, 14))):
        x, y = rng.uniform(20, 100, 2)
        shape = affinity.scale(disc(0, 0, 1), rng.uniform(2.5, 9), rng.uniform(2.5, 6))
        if rng.random() < 0.3:  # a dent
            shape = shape - disc(0, shape.bounds[3], rng.uniform(1, 2.5))
        shape = affinity.rotate(shape, rng.uniform(0, 180), origin=(0, 0))
        shape = affinity.translate(shape, x, y).simplify(0.2)
        for other in nuclei:
            shape = shape - other  # a border between touching nuclei is one line
        shape = max(shapely.get_parts(shape), key=shapely.area, default=None)
        if shape is not None and shape.area > 15 and shape.buffer(-1).area > 0:
            nuclei.append(shapely.Polygon(shape.exterior))
    return np.array(nuclei or [disc(60, 60, 5)], dtype=object)


PIXELS = st.sampled_from([(1.0, 1.0), (0.5, 0.5), (0.5, 0.3)])


@given(
    fields(), PIXELS, st.sampled_from([0.3, 2.0, 5.0, 12.0]), st.sampled_from([0.0, 1.2, 1.5, 3.0])
)
def test_what_holds_of_all_cells(
    nuclei: Polygons, mpp: tuple[float, float], expand: float, scale: float
) -> None:
    cells = cells_of(nuclei, expand, scale, mpp)
    assert shapely.is_valid(cells).all()
    px = max(mpp)

    # Cells share no area, not even where borders of several meet.
    one, other = shapely.STRtree(cells).query(cells, predicate="intersects")
    one, other = one[one < other], other[one < other]
    assert shapely.area(shapely.intersection(cells[one], cells[other])).max(initial=0) < 1e-6

    fitted = fitted_to(nuclei, cells)
    assert shapely.is_valid(fitted).all()
    assert (shapely.get_type_id(fitted) == 3).all()
    assert (shapely.get_num_interior_rings(fitted) == 0).all()
    assert shapely.area(shapely.difference(nuclei, fitted)).max() < 1e-6  # its nucleus within
    inner, outer = shapely.STRtree(fitted).query(nuclei, predicate="intersects")
    shared = shapely.area(shapely.intersection(nuclei[inner], fitted[outer]))
    assert shared[inner != outer].max(initial=0) < 1e-6  # no other nucleus

    # At most so far, by true distances, and within the scaled convex hull.
    for cell, nucleus in zip(in_um(fitted, mpp), in_um(nuclei, mpp), strict=True):
        distance = shapely.distance(shapely.points(shapely.get_coordinates(cell)), nucleus)
        # Half a px, since distances are those between pixels, and 0.2 px of simplifying.
        assert distance.max() <= expand + 0.7 * px
        if scale > 1:
            hull = nucleus.convex_hull
            limit = affinity.scale(hull, scale, scale, origin=hull.centroid).union(nucleus)
            assert cell.difference(limit.buffer(0.2 * px)).area < 1e-6


@given(fields(), st.sampled_from([2.0, 6.0]), st.sampled_from([0.0, 1.5]))
@settings(max_examples=40)
def test_cells_fill_what_is_nearest_to_them(nuclei: Polygons, expand: float, scale: float) -> None:
    """Pixel by pixel, by distances of another library."""
    labels = fill(cells_of(nuclei, expand, scale))
    rows, cols = np.mgrid[:SIDE, :SIDE] + 0.5
    distance = np.array([shapely.distance(shapely.points(cols, rows), n) for n in nuclei])
    order = np.sort(distance, axis=0)
    nearest = np.argmin(distance, axis=0)
    sure = order[0] > 0.3  # of pixels within nuclei, contours decide
    # A nucleus begins up to half a px from its first pixel: less is sure than of contours.
    if len(nuclei) > 1:
        sure &= order[1] - order[0] > 1.1  # not on a border
    inside = np.abs(order[0] - expand) > 1
    expected = np.where(order[0] < expand, nearest + 1, 0)
    if scale > 1:
        hulls = [n.convex_hull for n in nuclei]
        limits = [affinity.scale(h, scale, scale, origin=h.centroid) for h in hulls]
        points = shapely.points(cols, rows)
        within = np.array([shapely.contains(limit, points) for limit in limits])
        rim = np.array([shapely.distance(limit.exterior, points) for limit in limits])
        expected[~np.take_along_axis(within, nearest[None], 0)[0]] = 0
        inside &= np.take_along_axis(rim, nearest[None], 0)[0] > 0.5
    checked = sure & inside
    assert (labels == expected)[checked].all()


def test_a_lonely_nucleus_becomes_a_disc_in_um() -> None:
    mpp = (0.5, 0.25)
    nucleus = affinity.scale(disc(0, 0, 1), 4 / 0.5, 4 / 0.25)  # 4 µm
    nuclei = np.array([affinity.translate(nucleus, 60.3, 59.6)], dtype=object)
    (cell,) = in_um(cells_of(nuclei, 5, mpp=mpp), mpp)
    assert cell.area == pytest.approx(np.pi * 9**2, rel=0.02)
    centre = shapely.Point(60.3 * 0.5, 59.6 * 0.25)
    radii = shapely.distance(shapely.points(shapely.get_coordinates(cell)), centre)
    assert 8.75 < radii.min() <= radii.max() < 9.25  # half a px

    (limited,) = in_um(cells_of(nuclei, 5, scale=1.5, mpp=mpp), mpp)  # 4 µm by half
    assert limited.area == pytest.approx(np.pi * 6**2, rel=0.01)
    (touching,) = cells_of(np.array([disc(10, 40, 5)], dtype=object), 8, box=Box(0, 0, 80, 80))
    assert 0 <= touching.bounds[0] <= 0.2  # the image ends


def test_cells_meet_half_way_and_a_neighbour_without_a_cell_keeps_its_place() -> None:
    nuclei = np.array([disc(40, 60, 6), disc(60.5, 60, 8)], dtype=object)
    for count in (2, 1):  # the second is owned by another tile
        cells = cells_of(nuclei, 12, count=count)
        assert len(cells) == count
        # 49.25 is half way between 46 and 52.5.
        assert cells[0].bounds[2] == pytest.approx(49.5, abs=0.6)
        row = shapely.LineString([(40, 60.5), (60, 60.5)])
        assert cells[0].intersection(row).bounds[2] == pytest.approx(49.25, abs=0.5)
    alone = cells_of(nuclei[:1], 12)
    assert alone[0].bounds[2] == pytest.approx(58, abs=0.1)


def test_contours_get_the_room_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    nuclei = np.array([disc(40, 60, 6), disc(60.5, 60, 8), disc(90, 30, 3)], dtype=object)
    cells = cells_of(nuclei, 12, 1.5)
    monkeypatch.setattr(cell_borders, "_CELL_POINTS", 1)
    for edges in (2, 70):  # for no ring, and for some
        monkeypatch.setattr(cell_borders, "_RING_EDGES", edges)
        assert shapely.equals_exact(cells_of(nuclei, 12, 1.5), cells, tolerance=0).all()


@given(fields())
@settings(max_examples=20)
def test_cells_are_the_same_by_numbers_of_any_size(nuclei: Polygons) -> None:
    rings, frame = rings_of(nuclei), cells._frame(BOX, (0.5, 0.5), 5)
    short = cells._filled(rings, frame)
    long = short.astype(np.int32)
    distances = cells._nearest(short, frame, np.int16, 5)
    assert (distances == cells._nearest(long, frame, np.int32, 10)).all()
    assert short.dtype == np.int16
    assert (short == long).all()


@given(fields(), PIXELS, st.sampled_from([0.0, 1.5]), st.sampled_from([0.3, 5.0]))
@settings(max_examples=40)
def test_a_pixel_belongs_to_the_nucleus_of_the_nearest_pixel(
    nuclei: Polygons, mpp: tuple[float, float], scale: float, expand_um: float
) -> None:
    """By distances of another library, for each pixel; up to the limits, to the last pixel."""
    box = Box(5, 2, SIDE - 5, SIDE - 4)
    rings = rings_of(nuclei)
    frame, limits = cells._frame(box, mpp, expand_um), cells._limits(rings, scale)
    filled = cells._filled(rings, frame)
    labels = filled.copy()
    distances = cells._grow_to_nearest(labels, frame)
    grown = labels.copy()
    cells._limit(grown, distances, limits, frame)

    rows, cols = np.mgrid[: frame.rows, : frame.cols] + 0.5
    points = shapely.points(cols + frame.col0, rows + frame.row0)
    inner = np.pad(np.ones(box.shape, np.bool_), 1)
    holds = np.array([shapely.contains(nucleus, points) for nucleus in nuclei]) & inner
    assert (filled == np.where(holds.any(axis=0), holds.argmax(axis=0) + 1, 0)).all()
    each = np.array(
        [
            ndimage.distance_transform_edt(filled != k + 1, sampling=mpp[::-1])
            if (filled == k + 1).any()
            else np.full(filled.shape, np.inf)
            for k in range(len(nuclei))
        ]
    )
    least, free = each.min(axis=0), inner & (filled == 0)
    near = least < expand_um + sum(mpp) / 4 + max(mpp) - 1e-3
    found = np.take_along_axis(each, np.maximum(-labels, 1)[None] - 1, 0)[0]
    assert (labels[free & near] < 0).all()
    assert found[free & near] == pytest.approx(least[free & near], rel=1e-3)
    reach = expand_um + sum(mpp) / 4
    assert distances[free & near] == pytest.approx(
        least[free & near] / reach * frame.reach, rel=1e-3, abs=1
    )
    hulls = [nucleus.convex_hull for nucleus in nuclei]
    held = [
        shapely.contains(affinity.scale(h, scale, scale, origin=h.centroid), points) for h in hulls
    ]
    within = np.take_along_axis(np.array(held), np.abs(labels)[None] - 1, 0)[0] | (scale <= 1)
    sure = free & (np.abs(least - reach) > 1e-3)
    assert ((grown > 0) == (within & (least < reach)))[sure].all()
    assert (grown[filled > 0] == filled[filled > 0]).all()
    assert (np.abs(grown) == np.abs(labels)).all()


@given(fields(), st.sampled_from([0.0, 1.5]))
@settings(max_examples=30)
def test_cells_that_fit_stay_as_they_are(nuclei: Polygons, scale: float) -> None:
    """Those that hold their nucleus and touch no other; all others are no longer the same."""
    grown = cells_of(nuclei, 4, scale)
    fitted = fitted_to(nuclei, grown)
    others, of = shapely.STRtree(nuclei).query(grown, predicate="intersects")
    touches = np.isin(np.arange(len(nuclei)), others[others != of])
    fits = shapely.contains_properly(grown, nuclei) & ~touches
    assert shapely.equals_exact(grown[fits], fitted[fits], tolerance=0).all()
    shared = shapely.area(shapely.intersection(grown[others], nuclei[of]))
    cut = np.unique(others[(others != of) & (shared > 1e-3)])
    wrong = np.union1d(cut, np.flatnonzero(shapely.area(shapely.difference(nuclei, grown)) > 1e-3))
    assert not shapely.equals_exact(grown[wrong], fitted[wrong], tolerance=0).any()


@given(fields(), fields(), st.booleans(), st.booleans())
def test_contours_are_cut_and_joined_as_by_geos(
    one: Polygons, two: Polygons, joins: bool, mirrored: bool
) -> None:
    """Also of nuclei that share lines with cells, and in either direction."""
    for other in (*two, *(polygon.convex_hull for polygon in one)):
        for cell in one:
            shared, least = cell.intersection(other).area, min(cell.area, other.area)
            if joins and shared < 1e-3:  # a cell shares pixels with its nucleus
                continue
            ring, nucleus = (shapely.get_coordinates(polygon) for polygon in (cell, other))
            nucleus = nucleus[::-1].copy() if mirrored else nucleus
            room, bounds = np.empty((64, 5)), np.array(other.bounds)
            found, is_clear = fit_cells._combined(ring, nucleus, bounds, 1.0, joins, room)
            expected = cell.union(other) if joins else cell.difference(other)
            if not is_clear:  # GEOS does it: in pieces, all of it, or apart
                is_one = len(shapely.get_parts(expected)) == 1
                assert not is_one or shared < 1e-3 or shared > least - 1e-3
                continue
            made = shapely.Polygon(found)
            if fit_cells._crosses_itself(rings_of(np.array([made])))[0]:  # and here
                assert cell.exterior.distance(other.exterior) < 1e-6
                continue
            outer = [shapely.Polygon(part.exterior) for part in shapely.get_parts(expected)]
            whole = max(outer, key=shapely.area)
            assert whole.symmetric_difference(made).area < (0.1 if len(outer) > 1 else 1e-5)


def test_a_nucleus_in_another_and_one_that_splits_a_cell_are_left_to_geos() -> None:
    own, other = shapely.box(10, 10, 20, 20), shapely.box(24, 0, 26, 40)
    split, within = shapely.box(4, 4, 40, 30), shapely.box(24.5, 10, 25.5, 20)
    (cell, swallowed, free) = fitted_to(
        np.array([own, within, other]), np.array([split, shapely.box(24.2, 8, 25.8, 22), other])
    )
    assert cell.equals(shapely.box(4, 4, 24, 30))  # the part with its nucleus
    assert swallowed.equals(within)  # nothing else of it is its own
    assert free.equals(other)


@given(fields(), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_cells_do_not_depend_on_order_or_box(nuclei: Polygons, random: Any) -> None:
    cells = cells_of(nuclei, 5, 1.5)
    order = list(range(len(nuclei)))
    random.shuffle(order)
    again = cells_of(nuclei[order], 5, 1.5, box=Box(3, 1, SIDE + 40, SIDE + 30))
    few = cells_of(nuclei[order], 5, 1.5, count=1)
    assert shapely.equals_exact(again, cells[order], tolerance=0).all()
    assert shapely.equals_exact(few, cells[order][:1], tolerance=0).all()


# ---------------------------------------------------------------- tiles


def stored(folder: Path, nuclei: dict[Tile, Polygons]) -> TileStore:
    """A store of tiles with these nuclei."""
    store = TileStore.open(folder, {})
    for tile, polygons in nuclei.items():
        ids = np.array([f"{k:036d}" for k in range(len(polygons))])
        store.write(tile, TileStore.encode(Nuclei(polygons, {}, ids), grid_without_bins()))
    return store


def grid_without_bins() -> UncertaintyGrid:
    none = np.empty(0, np.int64)
    return UncertaintyGrid(
        bin_size=(1, 1), rows=none, cols=none, points=none, entropy=none, nuclei=none
    )


class Slide100:
    """All that is asked of a slide here."""

    shape, grid_mpp, mpp_level0, downsample = (400, 400), (0.5, 0.5), (0.5, 0.5), (1.0, 1.0)


def test_a_tile_is_given_its_neighbours_nuclei(tmp_path: Path) -> None:
    boxes = [Box(0, 0, 200, 200), Box(0, 200, 200, 400), Box(200, 0, 400, 200)]
    tiles = [Tile(row=0, col=k, read=box, write=box) for k, box in enumerate(boxes)]
    near, far, below = disc(212, 100, 6), disc(300, 100, 6), disc(100, 212, 6)
    contours = {
        tiles[0]: np.array([disc(190, 100, 6), disc(100, 190, 6)], dtype=object),
        tiles[1]: np.array([near, far], dtype=object),
        tiles[2]: np.array([below], dtype=object),
    }
    store = stored(tmp_path, contours)
    find = NucleiOfTiles(store, tiles, Slide100(), CellConfig(expand_um=4))  # type: ignore[arg-type]
    found = find(tiles[0])
    around = polygons_of(found.around)
    assert {c.wkt for c in around} == {near.wkt, below.wkt}  # up to 16 px from the contours
    table, _ = TileStore.decode(found.content)
    assert shapely.equals(from_table(table).polygons, contours[tiles[0]]).all()


@pytest.mark.parametrize(("diameter_um", "reach_px"), [(30, 198), (60, 368)])
def test_each_tile_can_grow_once_when_the_last_tile_near_it_has_ended(
    tmp_path: Path, diameter_um: float, reach_px: int
) -> None:
    """It reaches as far as two nuclei with that diagonal, and what is between their contours."""

    class Slide2000(Slide100):
        shape = (2000, 2000)

    rng, tiles = np.random.default_rng(0), []
    for row in range(25):
        for col in range(25):
            top, left = rng.integers(0, 79, 2)  # as tissue and regions crop them
            bottom, right = rng.integers((top + 1, left + 1), 81)
            box = Box(80 * row + top, 80 * col + left, 80 * row + bottom, 80 * col + right)
            tiles.append(Tile(row=row, col=col, read=box, write=box))
    near = {}
    for tile in tiles:
        beside = tile.write.grow(reach_px, Slide2000.shape)
        near[tile] = [other for other in tiles if other.write.meets(beside)]
    missing = [tiles[k] for k in rng.permutation(len(tiles))[:300].tolist()]
    find = NucleiOfTiles(
        TileStore(tmp_path),
        tiles,
        Slide2000(),  # type: ignore[arg-type]
        CellConfig(expand_um=4),
        missing,
        max_diameter_um=diameter_um,
    )
    assert {tile: find.tiles_near(tile) for tile in tiles} == near
    named, wait = [tile for tile in tiles if find.can_grow(tile)], {*missing}
    assert named == [tile for tile in tiles if wait.isdisjoint(near[tile])]
    for tile in missing:
        wait.remove(tile)
        for other in find.ended(tile):
            assert wait.isdisjoint(near[other])
            named.append(other)
    assert len(named) == len(tiles)
    assert {*named} == {*tiles}


def test_a_tile_that_cannot_be_read_is_named_and_not_the_scheduler(tmp_path: Path) -> None:
    box = Box(0, 0, 200, 200)
    tile = Tile(row=0, col=0, read=box, write=box)
    store = stored(tmp_path, {tile: np.array([disc(50, 50, 6)], dtype=object)})
    find = NucleiOfTiles(store, [tile], Slide100(), CellConfig())  # type: ignore[arg-type]
    store.path(tile).unlink()
    with pytest.raises(StorageError, match=r"finished tiles in .* cannot be read .*: run again$"):
        find(tile)
    store.path(tile).write_bytes(b"no parquet")
    with pytest.raises(StorageError):
        find(tile)


def test_a_tile_without_nuclei_reads_no_pixels(tmp_path: Path) -> None:
    """It does not fail where some pixels of the slide are damaged."""

    class Damaged(Slide100):
        def read(self, box: Box) -> Any:
            raise DamagedError("damaged", "damaged")

    box = Box(200, 200, 400, 400)
    tile = Tile(row=0, col=0, read=box, write=box)
    none = Nuclei(
        np.empty(0, object),
        dict.fromkeys([*SHAPES, PROBABILITY], np.empty(0, np.float32)),
        np.empty(0),
    )
    store = stored(tmp_path, {})
    store.write(tile, TileStore.encode(none, grid_without_bins()))
    image: Any = SimpleNamespace(slide=Damaged(), stains=H_E)
    config = CellConfig(expand_um=4)
    find = NucleiOfTiles(store, [tile], image.slide, config)
    table, *_ = grow_tile.grow_tile(CellContext(image=image, config=config), find(tile))
    assert len(table) == 0
    assert "Cell: Area µm^2" in table.column_names


@pytest.mark.parametrize(
    ("expand_um", "scale"), [(3, 1.5), (5, 0), (10, 0), (10, 1.5), (2, 10), (0.6, 0)]
)
def test_cells_of_two_tiles_are_those_of_one(
    expand_um: float, scale: float, tmp_path: Path
) -> None:
    """Nuclei at random in two tiles, dense and sparse: neighbours across the border count, up to
    all that an expansion reaches."""
    rng = np.random.default_rng(7)
    slide: Any = Slide100()
    config = CellConfig(expand_um=expand_um, constrain_scale=scale)
    left, right, both = Box(0, 0, 400, 200), Box(0, 200, 400, 400), Box(0, 0, 400, 400)
    tiles = [Tile(row=0, col=k, read=box, write=box) for k, box in enumerate((left, right))]
    one = Tile(row=1, col=0, read=both, write=both)
    for case, wanted in enumerate([150, 150, 60, 60, 30, 30]):
        discs: list[tuple[float, float, float]] = []
        while len(discs) < wanted:
            x, y, r = *rng.uniform(15, 385, 2), rng.uniform(6, 12)
            if all((x - a) ** 2 + (y - b) ** 2 > (r + q + 1) ** 2 for a, b, q in discs):
                discs.append((x, y, r))
        nuclei = np.array([disc(*each) for each in discs], dtype=object)
        in_left = np.array([x < 200 for x, *_ in discs])
        halves = {tiles[0]: nuclei[in_left], tiles[1]: nuclei[~in_left]}
        find = NucleiOfTiles(stored(tmp_path / f"{case}", halves), tiles, slide, config)
        found = np.empty(len(nuclei), dtype=object)
        for tile, mine in zip(tiles, (in_left, ~in_left), strict=True):
            around = polygons_of(find(tile).around)
            given_ = rings_of(np.concatenate([nuclei[mine], around]))
            found[mine] = polygons_of(grow_tile.cells_of(given_, mine.sum(), slide, config))
        whole = {one: nuclei}
        alone = NucleiOfTiles(stored(tmp_path / f"{case} as one", whole), [one], slide, config)
        assert not len(polygons_of(alone(one).around))
        expected = polygons_of(grow_tile.cells_of(rings_of(nuclei), len(nuclei), slide, config))
        assert shapely.equals_exact(found, expected, tolerance=0).all()


# ---------------------------------------------------------------- measurements


def test_compartments_are_measured_as_in_qupath() -> None:
    rng = np.random.default_rng(3)
    rgb = rng.integers(90, 255, (12, 14, 3)).astype(np.uint8)
    polygons = np.array([shapely.box(2, 1, 8, 7), shapely.box(9, 8, 12, 11)], dtype=object)
    inner = np.array([shapely.box(3, 2, 6, 5), shapely.box(9, 8, 12, 11)], dtype=object)
    cells, nuclei = np.zeros((2, 12, 14), np.int32)
    cells[1:7, 2:8], nuclei[2:5, 3:6] = 1, 1
    cells[8:11, 9:12] = nuclei[8:11, 9:12] = 2  # all nucleus
    of_nuclei = {name: np.float32([2, 2.25]) for name in [*SHAPES, PROBABILITY]}
    at = np.array([100, 50])  # of the pixels, on the grid
    found = measure_cells(
        of_nuclei,
        scaled(rings_of(polygons), (0.5, 0.5)),
        cells=rings_of(shapely.transform(polygons, lambda xy: xy + at)),
        nuclei=rings_of(shapely.transform(inner, lambda xy: xy + at)),
        rgb=rgb,
        box=Box(50, 100, 62, 114),
    )
    assert found["Cell: Area µm^2"].tolist() == [9, 2.25]
    assert found["Nucleus: Area µm^2"].tolist() == [2, 2.25]
    assert found["Nucleus/Cell area ratio"] == pytest.approx([2 / 9, 1])
    for stain in H_E.names:
        density = densities(rgb)[stain]
        for name, where in (
            ("Nucleus", nuclei == 1),
            ("Cytoplasm", (cells == 1) & (nuclei == 0)),
            ("Cell", cells == 1),
        ):
            values = density[where].astype(np.float64)
            for what, expected in (
                ("Mean", values.mean()),
                ("Std.Dev.", values.std(ddof=1)),
                ("Min", values.min()),
                ("Max", values.max()),
            ):
                value = found[f"{name}: {stain}: {what}"][0]
                assert value == pytest.approx(expected, rel=1e-5), (name, stain, what)
        assert np.isnan(found[f"Cytoplasm: {stain}: Mean"][1])
        assert found[f"Cell: {stain}: Max"][1] == found[f"Nucleus: {stain}: Max"][1]
    assert all(values.dtype == np.float32 for values in found.values())
    assert next(iter(found)) == "Nucleus: Area µm^2"  # it is never missing


def test_a_pixel_is_measured_in_each_contour_that_holds_it() -> None:
    """As by QuPath: nothing depends on which other nuclei a tile has."""
    rgb = np.zeros((12, 14, 3), np.uint8)
    rgb[:] = 20 * np.arange(12)[:, None, None] + 10
    upper, lower = shapely.box(2, 1, 8, 6), shapely.box(3, 5, 9, 10)  # both have row 5
    of_nuclei = {name: np.float32([1, 1]) for name in [*SHAPES, PROBABILITY]}
    rings = rings_of(np.array([upper, lower]))
    found = measure_cells(
        of_nuclei, rings, cells=rings, nuclei=rings, rgb=rgb, box=Box(0, 0, 12, 14)
    )
    density = densities(rgb)["Hematoxylin"][:, 0]
    least = found["Nucleus: Hematoxylin: Min"]
    assert least == pytest.approx([density[1:6].min(), density[5:10].min()])
    assert found["Nucleus: Hematoxylin: Max"] == pytest.approx(
        [density[1:6].max(), density[5:10].max()]
    )
    assert np.isnan(found["Cytoplasm: Hematoxylin: Mean"]).all()


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("0.5.1", "DAB: Nucleus: Mean"),
        ("v0.4.4", "DAB: Nucleus: Mean"),
        ("0.6.0-rc1", "Nucleus: DAB: Mean"),
        ("1.0", "Nucleus: DAB: Mean"),
        (None, "Nucleus: DAB: Mean"),
        ("?", "Nucleus: DAB: Mean"),
    ],
)
def test_names_are_those_of_the_version(version: str | None, expected: str) -> None:
    assert in_qupath("Nucleus: DAB: Mean", version) == expected
    for same in ("Cell: Area µm^2", "Hematoxylin: Mean", "Nucleus/Cell area ratio"):
        assert in_qupath(same, version) == same
    assert in_qupath("Cytoplasm: a: b: Std.Dev.", "0.5.0") == "a: b: Cytoplasm: Std.Dev."


# ---------------------------------------------------------------- on disk


def some_cells() -> Nuclei:
    nuclei = np.array([shapely.box(2, 2, 4, 4), shapely.box(12, 2, 14, 5)], dtype=object)
    cells = np.array([shapely.box(1, 1, 5, 6), shapely.box(11, 1, 16, 6)], dtype=object)
    names = ("Nucleus: Area µm^2", "Cytoplasm: Eosin: Mean", "Cell: Area µm^2")
    values = np.float32([[4, 6], [0.5, np.nan], [20, 25]])
    ids = np.array([f"00000000-0000-5000-8000-00000000000{k}" for k in range(2)])
    return Nuclei(nuclei, dict(zip(names, values, strict=True)), ids, cells)


def written(folder: Path, nuclei: Nuclei, config: Config, version: str | None = None) -> Any:
    """The features of the GeoJSON that is written of nuclei."""
    record = replace_kind(result_of(len(nuclei)), config.kind(len(nuclei)))
    write_results(folder, [nuclei], config.result, record, version)
    text = gzip.decompress((folder / "nuclei-000.geojson.gz").read_bytes())
    assert b"nan" not in text.lower()
    return json.loads(text)["features"]


def replace_kind(record: Any, kind: str) -> Any:
    import msgspec

    return msgspec.structs.replace(record, object_type=kind)


GROWN = replace(Config(), cells=CellConfig(expand_um=5))


def test_cells_are_features_with_a_nucleus(tmp_path: Path) -> None:
    nuclei = some_cells()
    one, two = written(tmp_path / "a", nuclei, GROWN, "0.5.1")
    assert one["properties"]["objectType"] == "cell"
    assert shapely.from_geojson(json.dumps(one["geometry"])).equals(nuclei.cells[0])  # type: ignore[index]
    inner = shapely.from_geojson(json.dumps(one["nucleusGeometry"]))
    assert inner.equals(nuclei.polygons[0])
    assert one["properties"]["measurements"]["Eosin: Cytoplasm: Mean"] == 0.5
    assert two["properties"]["measurements"] == {"Nucleus: Area µm^2": 6, "Cell: Area µm^2": 25}
    assert one["id"] == nuclei.uuids[0]

    objects = read_objects(tmp_path / "a" / "nuclei-000.geojson.gz")
    assert set(objects.kinds) == {"cell"}
    assert shapely.equals(objects.areas, nuclei.polygons).all()  # what refine and score read

    (new, _) = written(tmp_path / "b", nuclei, GROWN, "0.6.0")
    assert "Cytoplasm: Eosin: Mean" in new["properties"]["measurements"]


def test_annotations_are_of_nuclei(tmp_path: Path) -> None:
    annotations = replace(GROWN, result=ResultConfig(object_type=ObjectType.ANNOTATION))
    (one, _) = written(tmp_path, some_cells(), annotations)
    assert one["properties"]["objectType"] == "annotation"
    assert "nucleusGeometry" not in one
    outline = shapely.from_geojson(json.dumps(one["geometry"]))
    assert outline.equals(some_cells().polygons[0])
    assert one["properties"]["measurements"]["Cell: Area µm^2"] == 20


def test_what_nuclei_become() -> None:
    assert [GROWN.kind(n) for n in (1, 10**6)] == ["cell", "cell"]
    detections = ResultConfig(object_type=ObjectType.DETECTION)
    assert replace(GROWN, result=detections).kind(1) == "cell"  # which is a detection in QuPath
    assert [Config().kind(n) for n in (1, 10**6)] == ["annotation", "detection"]


def test_tables_have_the_cell_beside_the_nucleus(tmp_path: Path) -> None:
    nuclei = some_cells()
    written(tmp_path, nuclei, GROWN)
    back = read_nuclei(tmp_path / "nuclei.parquet")
    assert back.cells is not None
    assert shapely.equals(back.cells, nuclei.cells).all()
    assert shapely.equals(back.polygons, nuclei.polygons).all()
    assert list(back.measurements) == list(nuclei.measurements)
    assert back.of_nucleus("Area µm^2") is not None
    np.testing.assert_array_equal(back.of_nucleus("Area µm^2"), [4, 6])
    assert back.of_nucleus("Solidity") is None
    assert back[1:].cells is not None

    table = read_geoarrow(tmp_path / "nuclei.parquet")
    geo = json.loads(table.schema.metadata[b"geo"])
    assert set(geo["columns"]) == {"geometry", "cell"}
    for column in geo["columns"]:
        assert table.schema.field(column).metadata[b"ARROW:extension:name"] == b"geoarrow.wkb"


@given(
    st.lists(
        st.one_of(
            st.integers(-(10**9), 10**11).map(lambda c: c / 100), st.sampled_from([0.0, -0.0])
        ),
        min_size=2,
        max_size=20,
    )
)
def test_coordinates_are_written_as_by_arrow(values: list[float]) -> None:
    xy = np.array(values[: len(values) // 2 * 2]).reshape(-1, 2)
    text, offsets, is_done = points_text(xy, np.array([0, len(xy), len(xy)]))
    assert is_done
    x, y = (pa.array(axis).cast(pa.string()).to_pylist() for axis in xy.T)
    assert bytes(text).decode() == "],[".join(f"{a},{b}" for a, b in zip(x, y, strict=True))
    assert offsets.tolist() == [0, len(text), len(text)]
    for other in (0.125, 1e13, np.nan):
        assert not points_text(np.array([[1, other]]), np.array([0, 1]))[2]


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("given_", ["-1", "25.1", "a lot"])
def test_an_expansion_out_of_range_is_refused_in_one_line(given_: str) -> None:
    done = CliRunner().invoke(main, ["run", "x", "--expand", given_])
    assert done.exit_code == 2
    (line,) = [text for text in done.output.splitlines() if "Error" in text]
    assert "--expand" in line
    assert given_ in line


@pytest.mark.parametrize("given_", ["nan", "inf"])
def test_an_expansion_that_is_no_number_is_refused(given_: str, folder: Path) -> None:
    done = CliRunner().invoke(main, ["run", str(folder), "--expand", given_])
    assert done.exit_code == 2
    assert len([text for text in done.output.splitlines() if "expand" in text]) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"expand_um": -1}, "cells.expand_um = -1: expected `float` >= 0"),
        ({"expand_um": 40}, "cells.expand_um = 40: expected `float` <= 25"),
        ({"expand_um": float("nan")}, "cells.expand_um = nan: it must be finite"),
        ({"constrain_scale": -1}, "cells.constrain_scale = -1"),
        ({"expand": 4}, "unknown setting cells.expand: do you mean expand_um?"),
    ],
)
def test_settings_of_cells_are_checked(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        from_dict({"cells": values})
    assert message.replace("`", "") in str(error.value).replace("`", "")
