"""Pixels that are kept of tiles: those of the slide, to the bit, or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import shapely
from conftest import copy_sample

from patchcl_qupath.config import CellConfig, Config
from patchcl_qupath.datatypes import Box, Nuclei, Tile, UncertaintyGrid
from patchcl_qupath.execution.pixel_store import PixelStore
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.project import open_project
from patchcl_qupath.segmentation.grow_tile import CellContext, TileNuclei, grow_tile
from patchcl_qupath.segmentation.rings import NOTHING
from patchcl_qupath.slides.prepare import prepare
from patchcl_qupath.storage.parquet import (
    from_table,
    outer_points_of,
    points_of,
    to_table,
    with_cells,
)

TILE = Tile(row=3, col=4, read=Box(100, 200, 164, 296), write=Box(110, 210, 150, 280))
PIXELS = np.random.default_rng(0).integers(0, 255, (64, 96, 3)).astype(np.uint8)
NONE = np.empty(0, np.int64)
GRID = UncertaintyGrid(
    bin_size=(1, 1), rows=NONE, cols=NONE, points=NONE, entropy=NONE, nuclei=NONE
)


def test_pixels_are_kept_of_a_tile_until_they_are_removed(tmp_path: Path) -> None:
    pixels = PixelStore.of(tmp_path, {"slide": 1})
    pixels.keep(TILE, PIXELS)  # nobody made room, or this worker does not see the folder
    assert pixels.read(TILE, TILE.read) is None
    assert not [*tmp_path.iterdir()]

    pixels.make_room([TILE])
    pixels.keep(TILE, PIXELS)
    np.testing.assert_array_equal(pixels.read(TILE, TILE.read), PIXELS)
    inner = Box(120, 205, 130, 296)
    np.testing.assert_array_equal(pixels.read(TILE, inner), PIXELS[20:30, 5:])
    for beyond in (Box(99, 200, 120, 220), Box(100, 200, 165, 220), Box(100, 199, 120, 297)):
        assert pixels.read(TILE, beyond) is None
    assert PixelStore.of(tmp_path, {"slide": 2}).read(TILE, inner) is None  # of another slide
    (file,) = pixels.folder.iterdir()
    content = file.read_bytes()
    lost = content[:4096] + bytes(4096) + content[8192:]
    # A disk that was full, and what a power failure left.
    for damaged in (content[:-1], b"", bytes(len(content)), lost):
        file.write_bytes(damaged)
        assert pixels.read(TILE, inner) is None
    pixels.remove()
    assert not [*tmp_path.iterdir()]


def test_a_disk_without_room_keeps_no_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 2 * PIXELS.size + 2**30})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    pixels = PixelStore.of(tmp_path, {})
    pixels.make_room([TILE])
    assert not pixels.folder.exists()
    usage.free += 1
    pixels.make_room([TILE])
    assert pixels.folder.exists()


def test_cells_are_measured_by_kept_pixels_as_by_the_slide(tmp_path: Path) -> None:
    (entry,) = open_project(copy_sample(tmp_path / "p"), "files").images()
    image = prepare(entry, Config())
    box = Box(300, 300, 800, 800)
    tile = Tile(row=0, col=0, read=box, write=box)
    rows, cols = np.mgrid[340:760:30, 340:760:30].reshape(2, -1)
    centres = shapely.points(cols * image.slide.downsample[0], rows * image.slide.downsample[1])
    polygons = shapely.transform(shapely.buffer(centres, 9), lambda xy: np.round(xy, 2))
    names = [*Nuclei(polygons).measurements, "Detection probability"]
    names += ["Area µm^2", "Length µm", "Circularity", "Solidity"]
    names += ["Max diameter µm", "Min diameter µm"]
    measured = {name: np.ones(len(polygons), np.float32) for name in names}
    nuclei = Nuclei(np.asarray(polygons, object), measured)
    found = TileNuclei(tile=tile, content=TileStore.encode(nuclei, GRID), around=NOTHING)

    pixels = PixelStore.of(tmp_path, image.fingerprint())
    pixels.make_room([tile])
    pixels.keep(tile, image.slide.read(tile.read))
    context = CellContext(image=image, config=CellConfig(expand_um=5), pixels=pixels)
    content = [
        TileStore.encode(*grow_tile(each, found)[:2])
        for each in (context, replace(context, pixels=None))
    ]
    assert content[0] == content[1]
    grown, _ = TileStore.decode(content[0])
    assert grown["Cell: Hematoxylin: Mean"].to_numpy().std() > 0.001

    # The slide is not read where its pixels are there.
    broken = replace(image, slide=replace(image.slide, path=tmp_path / "gone.svs"))
    grow_tile(replace(context, image=broken), found)


def test_contours_are_the_same_in_flat_arrays() -> None:
    polygons = np.array([shapely.box(0, 0, 3, 4), shapely.Point(5, 5).buffer(2)], dtype=object)
    table = to_table(Nuclei(polygons, {"a": np.float32([1, 2])}, np.array(["x", "y"])))
    xy, first = points_of(table["geometry"])
    np.testing.assert_array_equal(xy, shapely.get_coordinates(polygons))
    assert first.tolist() == [0, 5, len(xy)]
    with_both = with_cells(table, xy, first, {"b": np.float32([3, 4])})
    expected = to_table(from_table(with_both))
    assert with_both.equals(expected)
    assert with_both.schema.metadata == expected.schema.metadata
    assert with_both["cell"].combine_chunks().equals(table["geometry"].combine_chunks())
    part_xy, part_first = points_of(table["geometry"].slice(1))
    np.testing.assert_array_equal(part_xy, xy[5:])
    assert part_first.tolist() == [0, len(xy) - 5]
    none_xy, none_first = points_of(table["geometry"].slice(0, 0))
    assert (len(none_xy), none_first.tolist()) == (0, [0])

    holed = shapely.Point(0, 0).buffer(3) - shapely.Point(0, 0).buffer(1)
    for other in (holed, shapely.MultiPolygon([shapely.box(0, 0, 1, 1)])):
        with pytest.raises(ValueError, match="one ring"):
            points_of(to_table(Nuclei(np.array([other], dtype=object)))["geometry"])
    both = np.array([shapely.box(0, 0, 1, 1), holed], dtype=object)
    xy, first = outer_points_of(to_table(Nuclei(both))["geometry"])
    np.testing.assert_array_equal(xy[first[1] :], shapely.get_coordinates(holed.exterior))
    assert first.tolist() == [0, 5, len(xy)]
