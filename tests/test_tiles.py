"""Tissue masks and tiles."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from PIL import Image
from slides import tissue as tissue_scene

from patchcl_qupath.config import Config, PatchCLConfig
from patchcl_qupath.datatypes import Box, ImageEntry
from patchcl_qupath.errors import ImageError
from patchcl_qupath.segmentation.tiling import largest_first, plan
from patchcl_qupath.slides.prepare import training_crops
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.slides.tissue import check_brightfield, inside, sample_boxes, tissue_mask

PINK = (225, 170, 205)


def glass(vignetting: float = 0.0, noise: float = 2.0, white: tuple[int, ...] = (243, 243, 240)):
    """A thumbnail of blank glass (200, 300, 3)."""
    y, x = np.mgrid[-1:1:200j, -1:1:300j]
    shade = 1 - vignetting * (x**2 + y**2)[..., None] / 2
    speckle = np.random.default_rng(0).normal(0, noise, (200, 300, 3))
    return np.clip(np.array(white) * shade + speckle, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("vignetting", [0, 0.1, 0.2])
@pytest.mark.parametrize(
    "white", [(243, 243, 240), (255, 255, 255), (222, 225, 228), (165, 165, 164)]
)
def test_blank_glass_has_no_tissue(vignetting: float, white: tuple[int, ...]) -> None:
    assert not tissue_mask(glass(vignetting, white=white), 8.0).any()


def test_scanner_voids_and_padding_are_no_tissue() -> None:
    thumbnail = glass()
    thumbnail[:, :100] = 0
    thumbnail[:, 200:] = 255
    assert not tissue_mask(thumbnail, 8.0).any()
    assert not tissue_mask(np.zeros_like(thumbnail), 8.0).any()


def test_tissue_is_found_whole_and_specks_are_not() -> None:
    thumbnail = glass()
    thumbnail[50:120, 40:100] = PINK
    thumbnail[70:84, 60:74] = 243  # a hole of 12,500 µm²
    thumbnail[20:30, 200:210] = (90, 60, 120)  # 6,400 µm² of dirt
    mask = tissue_mask(thumbnail, 8.0, min_tissue_um2=20_000)
    assert mask[50:120, 40:100].all()
    grown = np.zeros_like(mask)
    grown[45:125, 35:105] = True
    assert not mask[~grown].any()
    assert tissue_mask(thumbnail, 8.0, min_tissue_um2=5_000)[25, 205]


@pytest.mark.parametrize(
    "white",
    [(235, 226, 208), (225, 215, 200), (205, 235, 224), (170, 170, 168), (168, 162, 150)],
)
def test_glass_that_is_tinted_or_dim_is_no_tissue(white: tuple[int, ...]) -> None:
    """The same pixels are tissue as on white glass, which is none."""
    stained = np.zeros((200, 300), bool)
    stained[50:110, 60:150] = True
    masks = []
    for colour in ((243, 243, 240), white):
        thumbnail = glass(white=colour).astype(float)
        thumbnail[stained] *= np.array((200, 130, 180)) / 243
        masks.append(tissue_mask(thumbnail.round().astype(np.uint8), 16.0))
    assert masks[1][stained].all()
    assert masks[1].mean() < 0.12
    np.testing.assert_array_equal(*masks)


def test_pale_tissue_without_glass_is_no_tinted_glass() -> None:
    """Of an image that is too large for a crop: its brightest pixels are pink, as no glass is."""
    pale = glass(white=(232, 205, 222))
    pale[20:60, 30:90] = (190, 120, 170)
    assert tissue_mask(pale, 16.0).all()


def test_pale_warm_tissue_without_glass_is_no_tinted_glass() -> None:
    """Its brightest pixels are as warm as glass may be whose tint makes no tissue of it."""
    pale = glass(white=(214, 205, 196))
    pale[::8, ::8] = (224, 221, 214)
    assert tissue_mask(pale, 16.0).all()


def test_a_crop_without_glass_is_all_tissue() -> None:
    noise = np.random.default_rng(0).normal(0, 8, (32, 32, 3))
    assert tissue_mask((np.array(PINK) + noise).astype(np.uint8), 8.0).all()


def test_a_crop_smaller_than_a_speck_is_masked_as_any_other() -> None:
    assert tissue_mask(np.full((3, 3, 3), PINK, np.uint8), 8.0).all()
    assert not tissue_mask(glass()[:3, :3], 8.0).any()


def test_real_tissue(shared_data: Path, sample_project: Path) -> None:
    for path in sorted((shared_data / "monuseg_train" / "images").glob("*.png"))[::3]:
        thumbnail = np.asarray(Image.open(path).convert("RGB").reduce(32))
        assert tissue_mask(thumbnail, 8.0).mean() > 0.95, path.name
        check_brightfield(thumbnail, path.name)
    path = sample_project / "CMU-1-Small-Region.svs"
    mask = tissue_mask(Slide.open(ImageEntry("1", path.name, path)).thumbnail(8.0), 8.0)
    assert 0.40 < mask.mean() < 0.50
    assert mask[100, 70]  # in the middle of the tissue
    assert not mask[:, 130:].any()  # glass on the right
    assert not mask[130:, :25].any()  # glass at the bottom left


def test_fluorescence_is_refused(shared_data: Path) -> None:
    path = shared_data / "slides" / "test3-DAPI-2-387.ndpi"
    slide = Slide.open(ImageEntry("1", "dapi.ndpi", path))
    with pytest.raises(ImageError, match=r"dapi\.ndpi .*fluorescence.*H&E"):
        check_brightfield(slide.thumbnail(8.0), slide.name)


def test_brightfield_with_scanner_voids_is_not_refused() -> None:
    thumbnail = glass()
    thumbnail[:, :200] = 0
    check_brightfield(thumbnail, "a.svs")
    with pytest.raises(ImageError, match=r"a\.svs"):
        check_brightfield(np.zeros_like(thumbnail), "a.svs")


@pytest.mark.parametrize("shape", [(1000, 1300), (1024, 512), (7, 5), (1025, 2049)])
def test_tiles_partition_the_grid(shape: tuple[int, int]) -> None:
    tissue = np.ones((-(-shape[0] // 16), -(-shape[1] // 16)), dtype=bool)
    tiles = plan(shape, tissue, 16, 512, 100)
    owners = np.zeros(shape, dtype=int)
    for tile in tiles:
        w, r = tile.write, tile.read
        owners[w.row0 : w.row1, w.col0 : w.col1] += 1
        assert max(w.shape) <= 512
        assert min(w.shape) >= min(256, *shape)  # no slivers
        assert r.row0 == max(0, w.row0 - 100)
        assert r.col0 == max(0, w.col0 - 100)
        assert r.row1 == min(shape[0], w.row1 + 100)
        assert r.col1 == min(shape[1], w.col1 + 100)
    assert (owners == 1).all()
    assert len({tile.name for tile in tiles}) == len(tiles)
    assert [tile.name for tile in tiles] == sorted(tile.name for tile in tiles)


def test_large_tiles_come_first_and_none_is_lost() -> None:
    tissue = np.zeros((64, 96), dtype=bool)  # of 16 px
    tissue[10:64, 40:90] = True
    tiles = plan((1020, 1530), tissue, 16, 256, 20)
    ordered = largest_first(tiles)
    areas = [math.prod(tile.read.shape) for tile in ordered]
    assert areas == sorted(areas, reverse=True)
    assert len({*areas}) > 3
    assert sorted(tile.name for tile in ordered) == [tile.name for tile in tiles]
    assert largest_first([]) == []


def test_tiles_are_where_the_tissue_is() -> None:
    tissue = np.zeros((64, 96), dtype=bool)  # of 16 px: the grid is 1024 x 1536
    tissue[10:20, 40:90] = True
    tiles = plan((1020, 1530), tissue, 16, 256, 0)
    assert {(tile.row, tile.col) for tile in tiles} == {
        (row, col) for row in (0, 1) for col in (2, 3, 4, 5)
    }
    assert plan((1020, 1530), np.zeros_like(tissue), 16, 256, 0) == []


def test_sample_boxes_lie_in_the_image_on_tissue_and_repeat() -> None:
    tissue = np.zeros((50, 80), dtype=bool)  # of 16 px
    tissue[20:30, 30:60] = True
    boxes = sample_boxes(tissue, 16, (800, 1275), 256, 200, np.random.default_rng(3))
    assert len(boxes) == 200
    for box in boxes:
        assert box.shape == (256, 256)
        assert box == box.grow(0, (800, 1275))
        assert tissue[
            box.row0 // 16 : box.row1 // 16 + 1, box.col0 // 16 : box.col1 // 16 + 1
        ].any()
    assert len(set(boxes)) > 150
    assert boxes == sample_boxes(tissue, 16, (800, 1275), 256, 200, np.random.default_rng(3))
    assert boxes != sample_boxes(tissue, 16, (800, 1275), 256, 200, np.random.default_rng(4))


def test_sample_boxes_of_a_small_image_and_of_glass() -> None:
    rng = np.random.default_rng(0)
    assert set(sample_boxes(np.ones((2, 3), bool), 16, (30, 45), 256, 5, rng)) == {
        Box(0, 0, 30, 45)
    }
    assert sample_boxes(np.zeros((2, 3), bool), 16, (30, 45), 256, 5, rng) == []


def test_usable_images_yield_the_crops_of_the_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.fromarray(tissue_scene(200, 300)).save(tmp_path / "tissue.png")
    Image.fromarray(glass()).save(tmp_path / "glass.png")
    files = ["tissue.png", "glass.png", "missing.png", *["dark.png"] * 3]
    Image.new("RGB", (300, 300), (12, 11, 14)).save(tmp_path / "dark.png")
    entries = [
        ImageEntry(str(i), name, tmp_path / name, mpp=(0.5, 0.5)) for i, name in enumerate(files)
    ]
    config = Config(patchcl=PatchCLConfig(crops=12, source_px=64))
    shown: list[tuple[int, int]] = []
    crops = training_crops(entries, config, lambda done, of: shown.append((done, of)))
    assert crops.slides == ("0",) * 12
    assert len({(box.row0, box.col0) for box in crops.boxes}) > 6
    assert shown[-1] == (1, 1)
    (warning,) = caplog.messages
    assert warning.startswith("not trained on 3 images that cannot be used: ")
    assert "glass.png shows no tissue" in warning
    assert "missing.png" in warning


@pytest.mark.parametrize("seed", range(4))  # of the order
def test_duplicates_of_an_image_yield_no_crops_of_their_own(tmp_path: Path, seed: int) -> None:
    for name in ("one.png", "other.png"):
        Image.fromarray(tissue_scene(200, 300)).save(tmp_path / name)
    entries = [
        ImageEntry(str(i), name, tmp_path / name, mpp=(0.5, 0.5))
        for i, name in enumerate(["one.png"] * 5 + ["other.png"])
    ]
    entries[0] = replace(entries[0], problem="it is rotated")
    patchcl = PatchCLConfig(crops=12, source_px=64, slides=2, seed=seed)
    crops = training_crops(entries, Config(patchcl=patchcl), lambda *_: None)
    assert len({*crops.slides}) == 2
    assert crops.slides.count("5") == 6
    assert "0" not in crops.slides


def test_inside_finds_pixels_in_the_mask() -> None:
    tissue = np.array([[True, False, False], [False, False, True]])
    rows = np.array([0, 15, 16, 31, 16])
    cols = np.array([15, 16, 40, 10, 47])
    assert inside(tissue, 16, rows, cols).tolist() == [True, False, True, False, True]


def test_write_boxes_hold_all_tissue_once_and_little_else() -> None:
    tissue = np.zeros((64, 96), dtype=bool)  # of 16 px
    rows, cols = np.mgrid[:64, :96]
    tissue[(rows - 30) ** 2 + (cols - 50) ** 2 < 25**2] = True
    tiles = plan((1020, 1530), tissue, 16, 256, 40)
    held = np.zeros((1020, 1530), dtype=int)
    for tile in tiles:
        held[tile.write.row0 : tile.write.row1, tile.write.col0 : tile.write.col1] += 1
        assert max(tile.write.shape) <= 256
        assert tile.read == tile.write.grow(40, (1020, 1530))
    on_grid = np.kron(tissue, np.ones((16, 16), dtype=bool))[:1020, :1530]
    assert (held[on_grid] == 1).all()
    assert held.max() == 1
    assert held.sum() < 1.3 * on_grid.sum()


def test_a_region_with_corners_on_the_borders_of_tiles_is_whole() -> None:
    # GEOS's clip_by_rect leaves 60,000 of the 100,000 px that the first tile has.
    region = shapely.Polygon([(400, 0), (600, 700), (0, 800), (0, 0), (100, 300)])
    tissue = np.ones((100, 100), dtype=bool)
    tiles = plan((800, 800), tissue, 8, tile_px=400, halo_px=0, region=region)
    write = [tile.write for tile in tiles]
    assert write[0] == Box(0, 0, 400, 400)
    covered = shapely.union_all([shapely.box(b.col0, b.row0, b.col1, b.row1) for b in write])
    assert covered.covers(region)


def test_read_boxes_are_aligned() -> None:
    tissue = np.zeros((64, 96), dtype=bool)  # of 16 px
    tissue[3:60, 7:95] = True
    shape = (1021, 1530)
    region = shapely.box(131, 57, 1529, 1001)
    tiles = plan(shape, tissue, 16, 200, 21, region, divisor=4)
    assert len(tiles) > 20
    for tile in tiles:
        r, least = tile.read, tile.write.grow(21, shape)
        assert r.row0 % 4 == r.col0 % 4 == 0
        assert r.row1 % 4 == 0 or r.row1 == shape[0]
        assert r.col1 % 4 == 0 or r.col1 == shape[1]
        assert 0 <= least.row0 - r.row0 < 4
        assert 0 <= r.col1 - least.col1 < 4
