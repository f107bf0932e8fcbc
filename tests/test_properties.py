"""Properties of boxes, tiles, resampling, frames and tissue masks, for random examples."""

from __future__ import annotations

from itertools import pairwise
from unittest.mock import patch

import numpy as np
import shapely
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from patchcl_qupath.datatypes import Box, Tile, grid_to_level0, level0_to_grid, tile_to_grid
from patchcl_qupath.segmentation.tiling import plan
from patchcl_qupath.slides import level_grid
from patchcl_qupath.slides.level import Level
from patchcl_qupath.slides.level_grid import LevelGrid
from patchcl_qupath.slides.resample import Axis
from patchcl_qupath.slides.tissue import inside, sample_boxes, tissue_area_px, tissue_mask

Shape = tuple[int, int]

shapes = st.tuples(st.integers(1, 60), st.integers(1, 60))
seeds = st.integers(0, 2**32 - 1)
scales = st.one_of(
    st.integers(1, 9).map(float),  # whole blocks
    st.sampled_from([0.5, 1 / 3, 1.5, 2.5]),
    st.floats(0.3, 9.0),
)


@st.composite
def boxes_in(draw: st.DrawFn, shape: Shape) -> Box:
    """A box of one pixel or more in an image of ``shape``."""
    (row0, row1), (col0, col1) = (draw(spans(n)) for n in shape)
    return Box(row0, col0, row1, col1)


@st.composite
def spans(draw: st.DrawFn, length: int) -> tuple[int, int]:
    start = draw(st.integers(0, length - 1))
    return start, draw(st.integers(start + 1, length))


@st.composite
def axes(draw: st.DrawFn) -> tuple[Axis, int]:
    """An axis of a level, and how many grid px lie whole on it: one or more."""
    scale = draw(scales)
    offset = draw(st.one_of(st.integers(0, 20).map(float), st.floats(0, 20)))
    count = draw(st.integers(1, 40))
    size = int(np.ceil(offset + count * scale)) + draw(st.integers(0, 5))
    return Axis(scale, offset, size), count


@st.composite
def cuts(draw: st.DrawFn, length: int) -> list[int]:
    """Where [0, length) is cut: 0, some places between, and length."""
    between = draw(st.sets(st.integers(0, length), max_size=4))
    return sorted(between | {0, length})


def random_pixels(shape: Shape, seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3)).astype(np.uint8)


def random_mask(shape: Shape, seed: int) -> NDArray[np.bool_]:
    """Any share of True, none and all among them."""
    rng = np.random.default_rng(seed)
    return rng.random(shape) < rng.choice([0, 0.02, 0.3, 0.8, 1])


def filled(shape: Shape, box: Box) -> NDArray[np.bool_]:
    """An image that is True in a box."""
    image = np.zeros(shape, dtype=bool)
    image[box.row0 : box.row1, box.col0 : box.col1] = True
    return image


# ---------------------------------------------------------------- boxes


@given(st.data(), shapes)
def test_holds_is_true_of_the_pixels_of_a_box(data: st.DataObject, shape: Shape) -> None:
    box = data.draw(boxes_in(shape))
    rows, cols = np.indices(shape)
    np.testing.assert_array_equal(box.holds(rows, cols), filled(shape, box))
    assert filled(shape, box).sum() == np.prod(box.shape)


@given(st.data(), shapes, st.integers(0, 70))
def test_grow_adds_a_margin_that_stays_in_the_image(
    data: st.DataObject, shape: Shape, margin: int
) -> None:
    box = data.draw(boxes_in(shape))
    rows, cols = np.indices(shape)
    near_rows = (rows >= box.row0 - margin) & (rows < box.row1 + margin)
    near_cols = (cols >= box.col0 - margin) & (cols < box.col1 + margin)
    grown = box.grow(margin, shape)
    np.testing.assert_array_equal(filled(shape, grown), near_rows & near_cols)
    assert box.grow(0, shape) == box
    assert grown.grow(3, shape) == box.grow(margin + 3, shape)


@given(st.data(), shapes, st.integers(1, 40))
def test_aligned_is_the_smallest_box_at_multiples(
    data: st.DataObject, shape: Shape, multiple: int
) -> None:
    box = data.draw(boxes_in(shape))
    aligned = box.aligned(multiple, shape)
    assert aligned.row0 % multiple == aligned.col0 % multiple == 0
    assert 0 <= box.row0 - aligned.row0 < multiple
    assert 0 <= box.col0 - aligned.col0 < multiple
    ends = ((box.row1, aligned.row1, shape[0]), (box.col1, aligned.col1, shape[1]))
    for end, aligned_end, limit in ends:
        assert aligned_end % multiple == 0 or aligned_end == limit
        assert 0 <= aligned_end - end < multiple
    assert aligned.aligned(multiple, shape) == aligned


@given(st.data(), shapes, seeds)
def test_within_finds_a_box_in_the_pixels_of_an_outer_one(
    data: st.DataObject, shape: Shape, seed: int
) -> None:
    image = random_pixels(shape, seed)
    outer = data.draw(boxes_in(shape))
    inner = data.draw(boxes_in(outer.shape))
    row, col = outer.row0, outer.col0
    box = Box(inner.row0 + row, inner.col0 + col, inner.row1 + row, inner.col1 + col)
    whole = Box(0, 0, *shape)
    np.testing.assert_array_equal(
        image[outer.within(whole)][box.within(outer)], image[box.within(whole)]
    )


# ---------------------------------------------------------------- tiles


@st.composite
def grids(draw: st.DrawFn) -> tuple[Shape, NDArray[np.bool_], int]:
    """The shape of a working grid, its tissue, and the grid px per px of tissue."""
    tissue_px = draw(st.integers(1, 16))
    shape = draw(st.tuples(st.integers(1, 200), st.integers(1, 200)))
    tissue = random_mask((-(-shape[0] // tissue_px), -(-shape[1] // tissue_px)), draw(seeds))
    return shape, tissue, tissue_px


def on_pixels(grid: tuple[Shape, NDArray[np.bool_], int]) -> NDArray[np.bool_]:
    """The tissue of each pixel of a working grid."""
    (rows, cols), tissue, tissue_px = grid
    return np.kron(tissue, np.ones((tissue_px, tissue_px), dtype=bool))[:rows, :cols]


@given(st.data(), grids(), st.integers(1, 90), st.integers(0, 60), st.sampled_from([1, 4, 7, 32]))
def test_write_boxes_partition_the_tissue_and_read_boxes_hold_the_halo(
    data: st.DataObject,
    grid: tuple[Shape, NDArray[np.bool_], int],
    tile_px: int,
    halo_px: int,
    divisor: int,
) -> None:
    shape, tissue, tissue_px = grid
    wanted, region, beside_px = on_pixels(grid), None, 0
    if data.draw(st.booleans(), label="with a region"):
        part = data.draw(boxes_in(shape))
        beside_px = data.draw(st.integers(0, 20), label="px beside it")
        wanted &= filled(shape, part.grow(beside_px, shape))
        region = shapely.box(part.col0, part.row0, part.col1, part.row1)
    tiles = plan(shape, tissue, tissue_px, tile_px, halo_px, region, divisor, beside_px)
    owners = np.zeros(shape, dtype=int)
    for tile in tiles:
        owners += filled(shape, tile.write)
        assert min(tile.write.shape) >= 1
        assert max(tile.write.shape) <= tile_px
        assert tile.read == tile.write.grow(halo_px, shape).aligned(divisor, shape)
        assert (on_pixels(grid) & filled(shape, tile.write)).any()
    assert owners.max(initial=0) <= 1
    assert (owners[wanted] == 1).all()
    names = [tile.name for tile in tiles]
    assert names == sorted(set(names))


# ---------------------------------------------------------------- resampling


@given(st.data(), axes())
def test_edges_are_monotone_and_the_same_in_any_span(
    data: st.DataObject, drawn: tuple[Axis, int]
) -> None:
    axis, count = drawn
    edges = axis.edges(0, count)
    assert (np.diff(edges) >= 0).all()
    assert edges[0] >= 0
    assert edges[-1] <= axis.size * axis.quanta
    np.testing.assert_allclose(
        edges / axis.quanta, axis.offset + axis.scale * np.arange(count + 1), atol=0.5 / 256
    )
    start, stop = data.draw(spans(count))
    np.testing.assert_array_equal(axis.edges(start, stop), edges[start : stop + 1])
    np.testing.assert_array_equal(axis.lengths(start, stop), np.diff(edges)[start:stop])


@given(st.data(), axes())
def test_source_and_touched_are_of_overlapping_pixels(
    data: st.DataObject, drawn: tuple[Axis, int]
) -> None:
    axis, count = drawn
    edges = axis.edges(0, count)
    level_edges = np.arange(axis.size + 1) * axis.quanta
    overlap = np.minimum(edges[1:, None], level_edges[1:]) - np.maximum(
        edges[:-1, None], level_edges[:-1]
    )  # (grid px, level px)
    start, stop = data.draw(spans(count))
    first, last = axis.source(start, stop)
    elsewhere = np.r_[0:first, last : axis.size]
    assert not (overlap[start:stop, elsewhere] > 0).any()
    start, stop = data.draw(spans(axis.size))
    first, last = axis.touched(start, stop, count)
    elsewhere = np.r_[0:first, last:count]
    assert not (overlap[elsewhere, start:stop] > 0).any()


@given(st.data(), axes(), seeds)
def test_sums_of_parts_equal_those_of_the_whole(
    data: st.DataObject, drawn: tuple[Axis, int], seed: int
) -> None:
    axis, count = drawn
    pixels = random_pixels((axis.size, 2), seed)
    source = axis.source(0, count)
    whole = axis.sums(pixels[slice(*source)], (0, count), source)
    level_edges = np.arange(axis.size + 1) * axis.quanta  # expected: differences of integrals
    integral = np.insert(np.cumsum(pixels.astype(np.int64), axis=0), 0, 0, axis=0) * axis.quanta
    edges = axis.edges(0, count)
    low = np.minimum(edges // axis.quanta, axis.size - 1)
    at = integral[low] + pixels[low] * (edges - level_edges[low])[:, None, None]
    np.testing.assert_array_equal(whole, np.diff(at, axis=0))

    of_grid = []
    for grid in pairwise(data.draw(cuts(count))):
        part = axis.source(*grid)
        of_grid.append(axis.sums(pixels[slice(*part)], grid, part))
    np.testing.assert_array_equal(np.concatenate(of_grid), whole)

    of_source = np.zeros_like(whole, dtype=np.int64)
    for part in pairwise(cut + source[0] for cut in data.draw(cuts(source[1] - source[0]))):
        grid = axis.touched(*part, count)
        of_source[slice(*grid)] += axis.sums(pixels[slice(*part)], grid, part)
    np.testing.assert_array_equal(of_source, whole)


@st.composite
def level_grids(draw: st.DrawFn) -> LevelGrid:
    """A grid on a level of random pixels, in chunks of any size."""
    (rows, height), (cols, width) = draw(axes()), draw(axes())
    pixels = random_pixels((rows.size, cols.size), draw(seeds))
    chunk = draw(st.sampled_from([(1, 1), (7, 16), (1000, 700)]))
    level = Level(pixels, chunk, (1.0, 1.0))
    return LevelGrid(name="a.tif", level=level, shape=(height, width), rows=rows, cols=cols)


@given(st.data(), level_grids())
def test_a_grid_read_in_tiles_is_the_grid_read_at_once(
    data: st.DataObject, grid: LevelGrid
) -> None:
    whole = grid.read(Box(0, 0, *grid.shape))
    assert whole.shape == (*grid.shape, 3)
    with patch.object(level_grid, "BLOCK_PX", 32):  # small, for several blocks
        np.testing.assert_array_equal(grid.read_whole().pixels, whole)
    rows, cols = (data.draw(cuts(n)) for n in grid.shape)
    for row0, row1 in pairwise(rows):
        for col0, col1 in pairwise(cols):
            tile = grid.read(Box(row0, col0, row1, col1))
            np.testing.assert_array_equal(tile, whole[row0:row1, col0:col1])


@given(level_grids(), st.integers(0, 255))
def test_the_mean_of_one_colour_is_that_colour(grid: LevelGrid, colour: int) -> None:
    grid.level.pixels[:] = colour
    assert (grid.read_whole().pixels == colour).all()


# ---------------------------------------------------------------- frames

downsamples = st.tuples(st.floats(0.1, 40), st.floats(0.1, 40))


@st.composite
def squares(draw: st.DrawFn) -> shapely.Polygon:
    x, y = draw(st.integers(0, 10**5)), draw(st.integers(0, 10**5))
    return shapely.box(x, y, x + draw(st.integers(1, 500)), y + draw(st.integers(1, 500)))


@given(squares(), downsamples)
def test_level0_to_grid_is_the_inverse_of_grid_to_level0(
    polygon: shapely.Polygon, downsample: tuple[float, float]
) -> None:
    (at_level0,) = grid_to_level0(np.array([polygon]), downsample)
    x0, y0, x1, y1 = polygon.bounds
    x, y = downsample
    np.testing.assert_allclose(at_level0.bounds, (x0 * x, y0 * y, x1 * x, y1 * y))
    back = level0_to_grid(at_level0, downsample)
    np.testing.assert_allclose(
        shapely.get_coordinates(back), shapely.get_coordinates(polygon), rtol=1e-12
    )


@given(st.data(), shapes)
def test_a_tile_s_pixels_are_where_they_are_on_the_grid(data: st.DataObject, shape: Shape) -> None:
    read = data.draw(boxes_in(shape))
    pixel = data.draw(boxes_in(read.shape))
    local = shapely.box(pixel.col0, pixel.row0, pixel.col1, pixel.row1)
    (polygon,) = tile_to_grid(np.array([local]), Tile(row=0, col=0, read=read, write=read))
    col0, row0, col1, row1 = map(int, polygon.bounds)
    np.testing.assert_array_equal(
        filled(shape, Box(row0, col0, row1, col1))[read.within(Box(0, 0, *shape))],
        filled(read.shape, pixel),
    )


# ---------------------------------------------------------------- tissue


@given(grids())
def test_a_pixel_is_inside_tissue_as_its_pixel_of_the_mask_is(
    grid: tuple[Shape, NDArray[np.bool_], int],
) -> None:
    shape, tissue, tissue_px = grid
    rows, cols = np.indices(shape).reshape(2, -1)
    found = inside(tissue, tissue_px, rows, cols).reshape(shape)
    np.testing.assert_array_equal(found, on_pixels(grid))


@given(st.data(), grids())
def test_the_area_of_tissue_in_whole_pixels_is_their_number(
    data: st.DataObject, grid: tuple[Shape, NDArray[np.bool_], int]
) -> None:
    shape, tissue, px = grid
    part = data.draw(boxes_in(tissue.shape))
    region = shapely.box(part.col0 * px, part.row0 * px, part.col1 * px, part.row1 * px)
    expected = tissue[part.within(Box(0, 0, *tissue.shape))].sum() * px**2
    np.testing.assert_allclose(tissue_area_px(tissue, px, shape, region), expected)
    assert tissue_area_px(tissue, px, shape, None) == on_pixels(grid).sum()


@given(grids(), st.integers(1, 250), seeds)
def test_sample_boxes_lie_in_the_grid_around_tissue(
    grid: tuple[Shape, NDArray[np.bool_], int], size_px: int, seed: int
) -> None:
    shape, tissue, tissue_px = grid
    boxes = sample_boxes(tissue, tissue_px, shape, size_px, 5, np.random.default_rng(seed))
    assert len(boxes) == (5 if tissue.any() else 0)
    for box in boxes:
        assert box.shape == (min(size_px, shape[0]), min(size_px, shape[1]))
        assert box.grow(0, shape) == box


@given(shapes, seeds, st.floats(2, 40))
def test_tissue_is_found_in_thumbnails_of_any_shape(shape: Shape, seed: int, mpp: float) -> None:
    stained = random_mask(shape, seed)
    thumbnail = np.where(stained[..., None], np.uint8([225, 170, 205]), np.uint8([243, 243, 240]))
    mask = tissue_mask(thumbnail, mpp)
    assert mask.shape == shape
    if stained.all():
        assert mask.all()
    if not stained.any():
        assert not mask.any()
