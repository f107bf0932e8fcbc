"""A segmented image shows the nuclei of its tile store, in the pixels of the box asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
import slides

from patchcl_qupath.datatypes import (
    Box,
    FailedTile,
    ImageEntry,
    Nuclei,
    Tile,
    UncertaintyGrid,
)
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.segmentation.segmented_image import SegmentedImage
from patchcl_qupath.slides.prepare import PreparedImage
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.slides.stain_vectors import H_E
from patchcl_qupath.storage.records import file_signature

WIDTH, HEIGHT, MPP = 600, 401, 0.25  # at level 0; the working grid is half as fine
ROWS, COLS = HEIGHT // 2, WIDTH // 2
BORDER = 120  # column of the working grid where the right tile begins
TISSUE_PX = 16


def nuclei_at(xy: list[tuple[float, float]]) -> Nuclei:
    """Discs of 10 px radius at (x, y) of level 0; the number of each is its area."""
    polygons = shapely.buffer(shapely.points(xy), 10.0)
    areas = np.arange(len(xy), dtype=np.float32)
    uuids = np.array([f"{x}, {y}" for x, y in xy], dtype="U36")
    return Nuclei(np.asarray(polygons), {"Area µm^2": areas, "Solidity": areas / 2}, uuids)


def one_bin(col: int, nuclei: int) -> UncertaintyGrid:
    """A grid of a bin in the first row."""
    one = np.ones(1, np.int64)
    return UncertaintyGrid(
        bin_size=(256.0, 256.0),
        rows=0 * one,
        cols=col * one,
        points=100 * one,
        entropy=7 * one,
        nuclei=nuclei * one,
    )


@pytest.fixture
def segmented(tmp_path: Path) -> SegmentedImage:
    """A slide of two tiles: two nuclei in the left one, three in the right one."""
    pixels = slides.scene(WIDTH, HEIGHT, (MPP, MPP))
    path = slides.write_tiff(tmp_path / "a.tiff", pixels, (MPP, MPP))
    slide = Slide.open(ImageEntry(id="1", name="a.tiff", path=path))
    assert slide.shape == (ROWS, COLS)
    assert slide.downsample == (2.0, 2.0)
    image = PreparedImage(
        id="1",
        slide=slide,
        file=file_signature(path),
        tissue=np.ones((-(-ROWS // TISSUE_PX), -(-COLS // TISSUE_PX)), dtype=bool),
        tissue_px=TISSUE_PX,
        normaliser=None,
        region=None,
        stains=H_E,
    )
    left, right = Box(0, 0, ROWS, BORDER), Box(0, BORDER, ROWS, COLS)
    tiles = (Tile(row=0, col=0, read=left, write=left), Tile(row=0, col=1, read=right, write=right))
    store = TileStore.open(tmp_path / "tiles", {})
    found = nuclei_at([(40, 60), (230, 100)]), nuclei_at([(250, 300), (262, 110), (500, 350)])
    for tile, nuclei in zip(tiles, found, strict=True):
        store.write(tile, store.encode(nuclei, one_bin(tile.col, len(nuclei))))
    return SegmentedImage(image=image, store=store, tiles=tiles)


def test_nuclei_of_all_tiles_come_in_the_order_of_tiles(segmented: SegmentedImage) -> None:
    assert segmented.count == 5
    assert [len(nuclei) for nuclei in segmented.nuclei()] == [2, 3]
    names = [uuid for nuclei in segmented.nuclei() for uuid in nuclei.uuids.tolist()]
    assert names == ["40, 60", "230, 100", "250, 300", "262, 110", "500, 350"]
    measured = [*segmented.measurements(["Area µm^2"])]
    assert [{name: values.tolist() for name, values in m.items()} for m in measured] == [
        {"Area µm^2": [0, 1]},
        {"Area µm^2": [0, 1, 2]},
    ]


def test_the_uncertainty_grid_is_that_of_all_tiles(segmented: SegmentedImage) -> None:
    uncertainty = segmented.uncertainty
    assert uncertainty is not None
    assert uncertainty.cols.tolist() == [0, 1]
    assert uncertainty.nuclei.tolist() == [2, 3]
    assert (
        SegmentedImage(image=segmented.image, store=segmented.store, tiles=()).uncertainty is None
    )


def test_areas_are_without_failed_tiles(segmented: SegmentedImage) -> None:
    """All is tissue; the lower half of the right tile failed."""
    tile = FailedTile(x=240, y=200, width=360, height=201, reason="damaged")
    damaged = replace(segmented, failed_tiles=(tile,))
    px = MPP**2 / 1e6  # mm² of a px at level 0
    assert damaged.area_mm2() == pytest.approx((600 * 400 - 360 * 200) * px)
    assert damaged.tissue_mm2() == pytest.approx((600 * 400 - 360 * 200) * px, rel=0.01)
    across = shapely.box(200, 300, 280, 400)
    assert damaged.area_mm2(across) == pytest.approx(40 * 100 * px)
    assert damaged.tissue_mm2(across) == pytest.approx(40 * 100 * px)
    within = shapely.box(300, 250, 400, 300)
    assert damaged.area_mm2(within) == 0
    assert damaged.tissue_mm2(within) is None
    beside = shapely.box(10, 10, 90, 90)
    for region in (None, across, within, beside):
        assert segmented.tissue_mm2(region) == segmented.image.tissue_mm2(region)
        assert segmented.area_mm2(region) == segmented.image.area_mm2(region)
    assert damaged.tissue_mm2(beside) == segmented.tissue_mm2(beside)

    image = replace(segmented.image, region=shapely.box(100, 75, 140, 200))  # of the working grid
    damaged = replace(damaged, image=image)
    assert damaged.area_mm2() == pytest.approx((80 * 250 - 40 * 200) * px)
    assert damaged.tissue_mm2() == pytest.approx((80 * 250 - 40 * 200) * px)
    image = replace(segmented.image, tissue=np.zeros_like(segmented.image.tissue))
    assert replace(damaged, image=image).tissue_mm2(within) == 0  # of glass, this is known


def test_contours_in_a_box_are_those_that_intersect_it(segmented: SegmentedImage) -> None:
    """Of both tiles, in pixels of the box; a nucleus on its border is there in full."""
    box = Box(40, 113, 60, 140)  # x 226 to 280, y 80 to 120 at level 0
    contours = segmented.contours_in(box)
    centroids = shapely.get_coordinates(shapely.centroid(contours))
    assert centroids == pytest.approx(np.array([[115 - 113, 50 - 40], [131 - 113, 55 - 40]]))
    assert shapely.area(contours) == pytest.approx(np.pi * 5**2, rel=0.02)
    assert shapely.bounds(contours)[0, 0] == pytest.approx(-3)  # not clipped


def test_a_box_shows_a_nucleus_that_another_tile_owns(segmented: SegmentedImage) -> None:
    box = Box(45, BORDER - 1, 55, BORDER + 3)  # the left nucleus ends where the right tile begins
    assert len(segmented.contours_in(box)) == 1
    assert len(segmented.contours_in(Box(45, BORDER + 1, 55, BORDER + 3))) == 0


def test_contours_in_an_empty_box_are_none(segmented: SegmentedImage) -> None:
    contours = segmented.contours_in(Box(150, 10, 190, 50))
    assert contours.shape == (0,)


def test_pixels_are_those_of_the_slide(segmented: SegmentedImage) -> None:
    box = Box(20, 30, 90, 70)
    np.testing.assert_array_equal(segmented.pixels(box), segmented.image.slide.read(box))


@pytest.mark.parametrize("px", [1, 7, 1000])
def test_a_thumbnail_covers_the_whole_image(segmented: SegmentedImage, px: int) -> None:
    thumbnail = segmented.thumbnail(px)
    assert thumbnail.shape == (-(-ROWS // px), -(-COLS // px), 3)
    assert thumbnail.std() > 0 or px == 1000


@pytest.mark.parametrize("px", [1, 7, 1000])
def test_a_slide_that_cannot_be_read_is_grey(segmented: SegmentedImage, px: int) -> None:
    slide = replace(segmented.image.slide, path=Path("gone.tiff"))
    gone = replace(segmented, image=replace(segmented.image, slide=slide))
    pixels, thumbnail = gone.pixels(Box(20, 30, 90, 75)), gone.thumbnail(px)
    assert pixels.shape == (70, 45, 3)
    assert thumbnail.shape == segmented.thumbnail(px).shape
    assert {*np.unique(pixels), *np.unique(thumbnail)} == {128}
    assert gone.count == 5  # nuclei come from the store
