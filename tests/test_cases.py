"""Odd images that people have: each is read as QuPath shows it, or refused in one line."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import shapely
import tifffile
from conftest import QUICK
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from slides import (
    check_boxes,
    joined,
    scene,
    shrunk,
    tissue,
    whole,
    write_series,
    write_svs,
    write_tiff,
)

from patchcl_qupath import pipeline
from patchcl_qupath.config import Config
from patchcl_qupath.datatypes import Box, ImageEntry, Nuclei, Tile
from patchcl_qupath.errors import ImageError, SlideError
from patchcl_qupath.execution.outcome import note
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.finished import _has_its_pixel_size, _is_same_slide
from patchcl_qupath.models.engines import EngineKind
from patchcl_qupath.segmentation.segment_tile import (
    TileContext,
    postprocessing_margin_px,
    segment_tile,
)
from patchcl_qupath.segmentation.tiling import plan
from patchcl_qupath.segmentation.typical_nuclei import typical_nuclei
from patchcl_qupath.slides.pixel_size import in_um, positive
from patchcl_qupath.slides.prepare import PreparedImage, prepare
from patchcl_qupath.slides.signature import slide_signature
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.slides.tissue import check_brightfield, tissue_mask
from patchcl_qupath.storage.files import digest
from patchcl_qupath.storage.records import FileSignature, SlideProvenance

CASES = Path(__file__).resolve().parents[2] / "shared" / "cases"
SIDE = 512  # of the square of the sample slide that most cases are made of
TILE = 64


def entry(path: Path, **known: Any) -> ImageEntry:
    return ImageEntry("1", path.name, path, **known)


def everything(path: Path, **known: Any) -> NDArray[np.uint8]:
    """All working pixels of an image, voids read as glass."""
    slide, _ = Slide.open(entry(path, **known)).without_void(8.0)
    return slide.read(whole(slide))


def case(name: str) -> Path:
    """A file of the real cases."""
    if not (CASES / name).exists():
        pytest.skip(f"needs {CASES / name}")
    return CASES / name


@pytest.fixture(scope="module")
def square(sample_project: Path) -> NDArray[np.uint8]:
    """Tissue and glass of the sample slide, 0.5 µm/px."""
    pixels = tifffile.imread(sample_project / "CMU-1-Small-Region.svs")
    return np.ascontiguousarray(pixels[1200 : 1200 + SIDE, 700 : 700 + SIDE])


def segmented(model: pipeline.Model, image: PreparedImage) -> tuple[Nuclei, list[Tile]]:
    """The nuclei of an image, and those of its tiles that failed."""
    settings = QUICK.segment  # few nuclei are probable by such a model
    typical = typical_nuclei(image, model, settings, EngineKind.TORCH)
    tiles = plan(
        shape=image.slide.shape,
        tissue=image.tissue,
        tissue_px=image.tissue_px,
        tile_px=160,
        halo_px=model.receptive_radius_px + postprocessing_margin_px(typical.config, image.slide),
        divisor=model.divisor,
    )
    context = TileContext(image=image, model=model, typical=typical, engine=EngineKind.TORCH)
    found, failed = [], []
    for tile in tiles:
        try:
            found.append(segment_tile(context, tile)[0])
        except SlideError:
            failed.append(tile)
    return joined(found), failed


def nuclei_of(model: pipeline.Model, path: Path, **known: Any) -> Nuclei:
    """The nuclei of an image without a failed tile."""
    nuclei, failed = segmented(model, prepare(entry(path, **known), Config()))
    assert not failed
    return nuclei


def assert_similar(one: Nuclei, other: Nuclei) -> None:
    """Counts and median areas within 3 %."""
    assert len(one) > 100
    assert len(one) == pytest.approx(len(other), rel=0.03)
    areas = [np.median(n.measurements["Area µm^2"]) for n in (one, other)]
    assert areas[0] == pytest.approx(areas[1], rel=0.03)


# Pixels that are no pixels


def turned(pixels: NDArray[np.uint8], fill: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Pixels turned by 30 degrees, with ``fill`` outside; and what is outside."""
    picture = Image.fromarray(pixels)
    kind = Image.Resampling.NEAREST
    out = picture.rotate(30, kind, expand=True, fillcolor=(fill,) * 3)
    inside = Image.new("L", picture.size, 255).rotate(30, kind, expand=True)
    return np.asarray(out), np.asarray(inside) == 0


def as_black(pixels: NDArray[np.uint8], outside: NDArray[np.bool_], path: Path) -> Path:
    Image.fromarray(np.where(outside[..., None], np.uint8(0), pixels)).save(path)
    return path


def as_grey(pixels: NDArray[np.uint8], outside: NDArray[np.bool_], path: Path) -> Path:
    noise = np.random.default_rng(0).integers(1, 10, pixels.shape, dtype=np.uint8)
    Image.fromarray(np.where(outside[..., None], noise, pixels)).save(path)
    return path


def as_transparent(pixels: NDArray[np.uint8], outside: NDArray[np.bool_], path: Path) -> Path:
    black = np.where(outside[..., None], np.uint8(0), pixels)
    alpha = np.where(outside, np.uint8(0), np.uint8(255))
    Image.fromarray(np.dstack([black, alpha])).save(path)
    return path


def as_transparent_tiff(pixels: NDArray[np.uint8], outside: NDArray[np.bool_], path: Path) -> Path:
    black = np.where(outside[..., None], np.uint8(0), pixels)
    alpha = np.where(outside, np.uint8(0), np.uint8(255))
    path = path.with_suffix(".tif")
    tifffile.imwrite(
        path,
        np.dstack([black, alpha]),
        tile=(TILE, TILE),
        photometric="rgb",
        extrasamples=["assocalpha"],
        compression="deflate",
        metadata=None,
    )
    return path


def as_sparse(pixels: NDArray[np.uint8], outside: NDArray[np.bool_], path: Path) -> Path:
    black = np.where(outside[..., None], np.uint8(0), pixels)
    path = write_tiff(path.with_suffix(".tif"), black, (0.5, 0.5), (1, 4), tile_px=TILE)
    drop_tiles(path, 0, lambda tile: tile.max() == 0)
    return path


def drop_tiles(path: Path, level: int, drop: Callable[[NDArray[np.uint8]], bool]) -> int:
    """Take tiles of a level out of a TIFF: offset and length 0, as sparse files have it."""
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        page = tiff.series[0].levels[level].keyframe
        pixels, cols = page.asarray(), page.chunked[1]
        spans = [divmod(i, cols) for i in range(len(page.dataoffsets))]
        tiles = [pixels[r * TILE : (r + 1) * TILE, c * TILE : (c + 1) * TILE] for r, c in spans]
        dropped = [drop(tile) for tile in tiles]
        for tag in (page.tags["TileOffsets"], page.tags["TileByteCounts"]):
            tag.overwrite([0 if no else n for no, n in zip(dropped, tag.value, strict=True)])
    return sum(dropped)


@pytest.fixture(scope="module")
def white(
    tmp_path_factory: pytest.TempPathFactory, square: NDArray[np.uint8], model: pipeline.Model
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], Nuclei]:
    """The square turned on white; what is outside of it; its nuclei."""
    pixels, outside = turned(square, 255)
    path = tmp_path_factory.mktemp("white") / "white.png"
    Image.fromarray(pixels).save(path)
    return pixels, outside, nuclei_of(model, path, fallback_mpp=0.5)


@pytest.mark.parametrize(
    "write", [as_black, as_grey, as_transparent, as_transparent_tiff, as_sparse]
)
def test_what_is_no_picture_is_glass(
    tmp_path: Path,
    white: tuple[NDArray[np.uint8], NDArray[np.bool_], Nuclei],
    model: pipeline.Model,
    write: Callable[..., Path],
) -> None:
    pixels, outside, nuclei = white
    odd = write(pixels, outside, tmp_path / "odd.png")
    difference = everything(odd, fallback_mpp=0.5) != pixels
    assert difference.any(axis=2).mean() < 0.001  # dark pixels that touch the black
    assert_similar(nuclei_of(model, odd, fallback_mpp=0.5), nuclei)


def test_corners_of_the_real_case(model: pipeline.Model) -> None:
    names = ("white-corners.png", "black-corners.png")
    assert_similar(*(nuclei_of(model, case(name), fallback_mpp=0.5) for name in names))


@pytest.mark.parametrize("factors", [(1,), (1, 4)])
@pytest.mark.parametrize("mpp", [0.5, 0.35])
def test_voids_are_the_same_in_whichever_box_they_are_read(
    tmp_path: Path, square: NDArray[np.uint8], factors: Sequence[int], mpp: float
) -> None:
    pixels, _ = turned(square, 0)
    path = write_tiff(tmp_path / "a.tif", pixels, (0.25, 0.25), factors)
    slide, _ = Slide.open(entry(path), mpp).without_void(8.0)
    assert slide.void is not None
    pixels = slide.read(whole(slide))
    assert (pixels.max(axis=2) <= 10).sum() < 20  # nuclei of the sample have a few such pixels
    check_boxes(slide, 20)


def test_black_pixels_in_tissue_are_pixels(tmp_path: Path, square: NDArray[np.uint8]) -> None:
    pixels = square.copy()
    pixels[300:312, 200:212] = 5  # 6 µm: a very dark nucleus, or pigment
    pixels[100:180, 200:280] = 3  # 40 µm of ink
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(everything(tmp_path / "a.png", fallback_mpp=0.5), pixels)


@pytest.mark.parametrize("side", [3, 5, 40])
def test_a_black_frame_is_glass(tmp_path: Path, square: NDArray[np.uint8], side: int) -> None:
    pixels = square.copy()
    pixels[:side] = pixels[:, -side:] = 0
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = everything(tmp_path / "a.png", fallback_mpp=0.5)
    assert (got[:side] == 255).all()
    assert (got[:, -side:] == 255).all()


def test_a_dark_surround_is_not_fluorescence(square: NDArray[np.uint8]) -> None:
    tissue = shrunk(square, 16)
    surround = np.random.default_rng(0).integers(1, 10, tissue.shape, dtype=np.uint8)
    check_brightfield(np.concatenate([surround, tissue], axis=1), "a.png")
    with pytest.raises(ImageError, match="fluorescence"):
        check_brightfield(surround, "a.png")
    cells = surround.copy()
    cells[::3, ::3] = (20, 30, 160)
    with pytest.raises(ImageError, match="fluorescence"):
        check_brightfield(cells, "a.png")


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_alpha_that_is_0_all_over_means_nothing(tmp_path: Path, name: str) -> None:
    pixels = scene(256, 192, (0.5, 0.5))
    rgba = np.dstack([pixels, np.zeros((192, 256), np.uint8)])
    if name == "a.png":
        Image.fromarray(rgba).save(tmp_path / name)
    else:
        kind: dict[str, Any] = {"photometric": "rgb", "extrasamples": ["unassalpha"]}
        tifffile.imwrite(tmp_path / name, rgba, tile=(TILE, TILE), metadata=None, **kind)
    np.testing.assert_array_equal(everything(tmp_path / name, fallback_mpp=0.5), pixels)


@pytest.mark.parametrize("is_erased", [True, False])
@pytest.mark.parametrize("tile", [(256, 256), None])
def test_the_alpha_of_a_large_level_is_that_of_any_place(
    tmp_path: Path, is_erased: bool, tile: tuple[int, int] | None
) -> None:
    side = 4200
    rgba = np.full((side, side, 4), (200, 120, 180, 0), np.uint8)
    if is_erased:  # all but two pieces
        rgba[3100:3400, 900:1600, 3] = rgba[2500:2600, 2700:3400, 3] = 255
    kind: dict[str, Any] = {"photometric": "rgb", "extrasamples": ["unassalpha"]}
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, rgba, tile=tile, compression="deflate", metadata=None, **kind)
    slide = Slide.open(entry(path, fallback_mpp=0.5))
    erased, left = slide.read(Box(1900, 1900, 1910, 1910)), slide.read(Box(3200, 1000, 3210, 1010))
    assert (erased == (255 if is_erased else (200, 120, 180))).all()
    assert (left == (200, 120, 180)).all()


# Missing and damaged tiles


def write_pyramid(path: Path, pixels: NDArray[np.uint8]) -> Path:
    return write_tiff(path, pixels, (0.5, 0.5), (1, 4), tile_px=TILE)


def damage(path: Path, level: int, number: int) -> None:
    """Overwrite one tile of a level."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.series[0].levels[level].keyframe
        offset, length = page.dataoffsets[number], page.databytecounts[number]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(bytes([171]) * length)


@pytest.mark.parametrize("kind", ["missing", "damaged"])
def test_a_coarse_level_is_mended_from_a_finer_one(
    tmp_path: Path, square: NDArray[np.uint8], kind: str
) -> None:
    path, odd = (write_pyramid(tmp_path / name, square) for name in ("a.tif", "b.tif"))
    if kind == "missing":
        assert drop_tiles(odd, 1, lambda tile: True) == 4
    else:
        damage(odd, 1, 3)
    slides = [Slide.open(entry(p), 2.0) for p in (path, odd)]
    expected, got = (slide.read(whole(slide)).astype(int) for slide in slides)
    assert np.abs(got - expected).max() <= 1  # the level in the file was rounded
    part = slides[1].read(Box(30, 50, 110, 120))
    np.testing.assert_array_equal(part, got[30:110, 50:120])
    overview = slides[1].overview(8.0)
    assert not overview.damaged.any()
    assert np.abs(overview.pixels - slides[0].thumbnail(8.0).astype(int)).max() <= 1


@pytest.mark.parametrize("name", ["coarse-level-lacks-tiles.svs", "coarse-level-damaged-tile.svs"])
def test_a_slide_whose_coarse_level_has_gaps_loses_no_nuclei(
    model: pipeline.Model, name: str
) -> None:
    assert_similar(nuclei_of(model, case("whole.svs")), nuclei_of(model, case(name)))


@pytest.mark.parametrize("coarse", [False, True])
def test_damage_costs_its_own_tiles(
    tmp_path: Path, square: NDArray[np.uint8], model: pipeline.Model, coarse: bool
) -> None:
    path = write_pyramid(tmp_path / "a.tif", square)
    complete = nuclei_of(model, path)
    damage(path, 0, 63)  # the last
    if coarse:
        damage(path, 1, 3)
    image = prepare(entry(path), Config())
    assert image.tissue[448 // 16 :, 448 // 16 :].all()
    nuclei, failed = segmented(model, image)
    assert 1 <= len(failed) <= 4
    col, row = shapely.get_coordinates(shapely.centroid(complete.polygons)).T.astype(int)
    elsewhere = ~np.any([tile.write.holds(row, col) for tile in failed], axis=0)
    # Stains are those of crops without the damage, so a few differ.
    assert 0.9 < len(nuclei) / np.count_nonzero(elsewhere) < 1.1
    assert all(crop.shape == (256, 256, 3) for _, crop in image.crops(8, 256, seed=1))


def test_damage_beside_a_void_costs_its_own_tile(tmp_path: Path, square: NDArray[np.uint8]) -> None:
    """Black pixels around a box decide which of its own are void: not where they are damaged."""
    pixels = square.copy()
    pixels[:192] = pixels[:, :192] = 0
    path = write_tiff(tmp_path / "a.tif", pixels, (0.5, 0.5), tile_px=TILE)
    damage(path, 0, 3 * 8 + 3)  # the corner of the picture
    slide, _ = Slide.open(entry(path)).without_void(8.0)
    assert slide.void is not None
    damaged = slide.overview(8.0).damaged
    assert damaged[12:16, 12:16].all()
    assert damaged.sum() == 16
    beside = slide.read(Box(128, 192, 192, 256))
    assert (beside == 255).all()
    np.testing.assert_array_equal(slide.read(Box(204, 256, 256, 320)), pixels[204:256, 256:320])
    with pytest.raises(SlideError, match=r"a\.tif cannot be read"):
        slide.read(Box(192, 192, 256, 256))


def test_a_slide_without_a_readable_pixel_is_refused(
    tmp_path: Path, square: NDArray[np.uint8]
) -> None:
    path = write_tiff(tmp_path / "a.tif", square, (0.5, 0.5), tile_px=TILE)
    for number in range(64):
        damage(path, 0, number)
    with pytest.raises(SlideError, match=r"^a\.tif cannot be read \(.*OME-TIFF") as error:
        prepare(entry(path), Config())
    assert "\n" not in str(error.value)


# What samples mean


@pytest.mark.parametrize(
    ("photometric", "samples", "name"),
    [
        ("separated", 4, "CMYK"),
        ("minisblack", 1, "greyscale"),
        ("miniswhite", 1, "greyscale"),
        ("cielab", 3, r"CIE L\*a\*b\*"),
        ("palette", 1, "palette"),
    ],
)
def test_samples_that_are_not_rgb_are_named(
    tmp_path: Path, photometric: str, samples: int, name: str
) -> None:
    pixels = np.full((128, 128, samples), 120, np.uint8).squeeze()
    more = {"colormap": np.zeros((3, 256), np.uint16)} if photometric == "palette" else {}
    tifffile.imwrite(
        tmp_path / "a.tif",
        pixels,
        photometric=photometric,
        planarconfig="contig" if samples > 1 else None,
        tile=(TILE, TILE),
        metadata=None,
        **more,
    )
    with pytest.raises(SlideError, match=rf"a\.tif .*\(not 8-bit RGB: {name}.*OME-TIFF"):
        Slide.open(entry(tmp_path / "a.tif", fallback_mpp=0.5))


@pytest.mark.parametrize(
    ("dtype", "planar", "reason"),
    [(np.uint16, "contig", "uint16"), (np.int8, "contig", "int8"), (np.uint8, "separate", "SYX")],
)
def test_samples_of_another_layout_are_refused(
    tmp_path: Path, dtype: type, planar: str, reason: str
) -> None:
    shape = (3, 128, 128) if planar == "separate" else (128, 128, 3)
    tifffile.imwrite(
        tmp_path / "a.tif",
        np.full(shape, 120, dtype),
        photometric="rgb",
        planarconfig=planar,
        tile=(TILE, TILE),
        metadata=None,
    )
    with pytest.raises(SlideError, match=f"not 8-bit RGB: .*{reason}"):
        Slide.open(entry(tmp_path / "a.tif", fallback_mpp=0.5))


COLOURS = np.array([[255, 255, 255], [200, 60, 120], [60, 40, 120], [0, 0, 0]])


def colour_stripes(as_ycbcr: bool) -> NDArray[np.uint8]:
    """Samples (128, 128, 3) of COLOURS, 32 columns each, of RGB or YCbCr."""
    matrix = np.array(
        [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    )
    row = np.rint(COLOURS @ matrix.T + [0, 128, 128]).clip(0, 255) if as_ycbcr else COLOURS
    return np.repeat(np.repeat(row.astype(np.uint8)[None], 128, axis=0), 32, axis=1)


def test_ycbcr_without_a_codec_is_converted(tmp_path: Path) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif",
        colour_stripes(as_ycbcr=True),
        photometric="rgb",
        tile=(TILE, TILE),
        metadata=None,
        extratags=[(530, 3, 2, (1, 1), True)],
    )
    with tifffile.TiffFile(tmp_path / "a.tif", mode="r+b") as tiff:
        tiff.pages[0].tags["PhotometricInterpretation"].overwrite(6)
    slide = Slide.open(entry(tmp_path / "a.tif", fallback_mpp=0.5))
    assert np.abs(slide.read(whole(slide))[5, ::32].astype(int) - COLOURS).max() <= 2


def write_jpeg2000(path: Path, as_ycbcr: bool, description: str) -> Path:
    """Colour stripes with the compression 33003, whose samples depend on who wrote the file."""
    tifffile.imwrite(
        path,
        colour_stripes(as_ycbcr),
        photometric="rgb",
        tile=(TILE, TILE),
        compression="jpeg2000",
        compressionargs={"reversible": True, "level": 0},
        description=description,
        metadata=None,
    )
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags["Compression"].overwrite(33003)
    return path


@pytest.mark.parametrize(
    ("description", "as_ycbcr"),
    [
        ("Aperio Image Library v10.0.51\r\nmade for a test|MPP = 0.5", True),
        ('<OME xmlns="x"/>', False),  # as Bio-Formats does, and so QuPath's export
        ("", False),
    ],
)
def test_jpeg_2000_is_ycbcr_in_files_of_aperio_alone(
    tmp_path: Path, description: str, as_ycbcr: bool
) -> None:
    path = write_jpeg2000(tmp_path / "a.tif", as_ycbcr, description)
    slide = Slide.open(entry(path, fallback_mpp=0.5))
    assert np.abs(slide.read(whole(slide))[5, ::32].astype(int) - COLOURS).max() <= 2


def test_jpeg_2000_of_others_that_is_called_ycbcr_is_refused(tmp_path: Path) -> None:
    path = write_jpeg2000(tmp_path / "a.tif", as_ycbcr=True, description="")
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags["PhotometricInterpretation"].overwrite(6)
    with pytest.raises(SlideError, match=r"not 8-bit RGB: YCbCr"):
        Slide.open(entry(path, fallback_mpp=0.5))


def test_cmyk_of_the_real_case() -> None:
    with pytest.raises(SlideError, match=r"cmyk\.tif cannot be read .*CMYK"):
        Slide.open(entry(case("cmyk.tif"), fallback_mpp=0.5))


# The pixel size


def write_ome(
    path: Path, attributes: str, resolution: float | None = None, encoding: str = "UTF-8"
) -> Path:
    xml = (
        f'<?xml version="1.0" encoding="{encoding}"?>'
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/'
        'OME/2016-06"><Image ID="Image:0" Name="slide"><Pixels ID="Pixels:0" Type="uint8" '
        'DimensionOrder="XYCZT" SizeX="128" SizeY="128" SizeC="3" SizeZ="1" SizeT="1" '
        f'{attributes}><Channel ID="Channel:0:0" SamplesPerPixel="3"/>'
        '<TiffData IFD="0" PlaneCount="1"/></Pixels>'
        "</Image></OME>"
    )
    known = {} if resolution is None else {"resolution": (1e4 / resolution,) * 2}
    tifffile.imwrite(
        path,
        scene(128, 128, (0.5, 0.5)),
        photometric="rgb",
        tile=(TILE, TILE),
        description=xml.encode(),
        metadata=None,
        resolutionunit="NONE" if resolution is None else "CENTIMETER",
        **known,
    )
    return path


@pytest.mark.parametrize(
    ("size", "unit"),
    [
        ("0.5", None),
        ("0.5", "µm"),
        ("0.5", "μm"),
        ("500", "nm"),
        ("5e-4", "mm"),
        ("5e-5", "cm"),
        ("5e-7", "m"),
        ("1.968503937e-5", "in"),
        ("5000", "Å"),
    ],
)
def test_pixel_size_of_ome_xml(tmp_path: Path, size: str, unit: str | None) -> None:
    units = "" if unit is None else f' PhysicalSizeXUnit="{unit}" PhysicalSizeYUnit="{unit}"'
    text = f'PhysicalSizeX="{size}" PhysicalSizeY="{size}"{units}'
    path = write_ome(tmp_path / "a.ome.tif", text, resolution=0.25)
    for fallback in (None, 0.25):
        slide = Slide.open(entry(path, fallback_mpp=fallback))
        assert slide.mpp_level0 == pytest.approx((0.5, 0.5))
        assert (slide.mpp_source, slide.calibrated) == ("OME-XML", True)


@pytest.mark.parametrize("encoding", ["utf-16", "ISO-8859-1", "windows-1252", "x-other"])
def test_ome_xml_that_names_another_encoding_than_its_own(tmp_path: Path, encoding: str) -> None:
    text = 'PhysicalSizeX="0.5" PhysicalSizeXUnit="µm"'  # written as UTF-8
    path = write_ome(tmp_path / "a.ome.tif", text, resolution=0.25, encoding=encoding)
    slide = Slide.open(entry(path, fallback_mpp=0.25))
    assert (slide.mpp_level0, slide.mpp_source) == ((0.5, 0.5), "OME-XML")


@pytest.mark.parametrize(
    "attributes",
    [
        'PhysicalSizeX=""',
        'PhysicalSizeX="0" PhysicalSizeY="0"',
        'PhysicalSizeX="half" PhysicalSizeY="nan"',
        'PhysicalSizeX="1" PhysicalSizeXUnit="pixel"',
        "broken",
    ],
)
def test_ome_xml_without_a_pixel_size(tmp_path: Path, attributes: str) -> None:
    path = write_ome(tmp_path / "a.ome.tif", attributes)
    slide = Slide.open(entry(path, fallback_mpp=0.25))
    assert (slide.mpp_level0, slide.mpp_source) == ((0.25, 0.25), "--mpp")
    assert Slide.open(entry(path, mpp=(0.3, 0.3))).mpp_source == "QuPath"
    with pytest.raises(SlideError, match=r"no pixel size.*--mpp"):
        Slide.open(entry(path))


@pytest.mark.parametrize(
    ("text", "mpp"),
    [("0,500000", 0.5), (" 0.5 ", 0.5), ("", None), ("unknown", None), ("0", None), ("1/0", None)],
)
def test_pixel_size_of_aperio(tmp_path: Path, text: str, mpp: float | None) -> None:
    path = write_svs(tmp_path / "a.svs", scene(256, 256, (0.5, 0.5)), text)  # type: ignore[arg-type]
    slide = Slide.open(entry(path, fallback_mpp=0.25))
    assert slide.mpp_level0[0] == (mpp or 0.25)
    assert slide.mpp_source == ("vendor" if mpp else "--mpp")


def test_text_that_is_not_ascii(tmp_path: Path) -> None:
    path = write_svs(tmp_path / "a.svs", scene(256, 256, (0.5, 0.5)), 0.5)
    path.write_bytes(path.read_bytes().replace(b"made for a test", b"made f\xfcr a test"))
    assert Slide.open(entry(path, fallback_mpp=0.25)).mpp_level0 == (0.5, 0.5)


@pytest.mark.parametrize(("unit", "value"), [("micron", 2), ("\\u00B5m", 2), ("nm", 0.002)])
def test_pixel_size_of_imagej(tmp_path: Path, unit: str, value: float) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif",
        scene(128, 128, (0.5, 0.5)),
        photometric="rgb",
        description=f"ImageJ=1.53t\nunit={unit}\n",
        metadata=None,
        resolution=(value, value),
        resolutionunit="NONE",
    )
    slide = Slide.open(entry(tmp_path / "a.tif", fallback_mpp=0.25))
    assert slide.mpp_level0 == pytest.approx((0.5, 0.5))
    assert slide.mpp_source == "ImageJ"


@pytest.mark.parametrize("value", [(0, 1), (1, 0), (0, 0)])
@pytest.mark.parametrize("unit", [0, 1, 2, 3, 77])
def test_a_resolution_that_is_no_number(tmp_path: Path, value: tuple[int, int], unit: int) -> None:
    path = write_tiff(tmp_path / "a.tif", scene(128, 128, (0.5, 0.5)), (0.5, 0.5))
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name in ("XResolution", "YResolution"):
            tag = tiff.pages[0].tags[name]
            tiff.filehandle.seek(tag.valueoffset)
            tiff.filehandle.write(struct.pack("<II", *value))
        tiff.pages[0].tags["ResolutionUnit"].overwrite(unit)
    assert Slide.open(entry(path, fallback_mpp=0.25)).mpp_source == "--mpp"


@pytest.mark.parametrize(("type_", "px_per_cm"), [("f", 2e4), ("d", 2e4), ("I", 20000), ("f", 0)])
def test_a_resolution_may_be_no_fraction(tmp_path: Path, type_: str, px_per_cm: float) -> None:
    path = write_tiff(tmp_path / "a.tif", scene(128, 128, (0.5, 0.5)), (0.25, 0.25))
    with tifffile.TiffFile(path, mode="r+b") as tiff:
        for name in ("XResolution", "YResolution"):
            tiff.pages[0].tags[name].overwrite(px_per_cm, dtype=type_)
    slide = Slide.open(entry(path, fallback_mpp=0.125))
    assert slide.mpp_source == ("TIFF resolution" if px_per_cm else "--mpp")
    assert slide.mpp_level0 == pytest.approx((0.5, 0.5) if px_per_cm else (0.125, 0.125))


@pytest.mark.parametrize(
    ("unit", "um"), [("mm", 1e3), ("MM", 1e3), ("Mm", None), ("pm", 1e-6), ("Pm", None), ("UM", 1)]
)
def test_a_megametre_is_no_millimetre(tmp_path: Path, unit: str, um: float | None) -> None:
    """Nor in ImageJ."""
    assert in_um("0.5", unit) == (um and pytest.approx(0.5 * um))
    tifffile.imwrite(
        tmp_path / "a.tif",
        scene(128, 128, (0.5, 0.5)),
        photometric="rgb",
        description=f"ImageJ=1.53t\nunit={unit}\n",
        metadata=None,
        resolution=(2 * (um or 1e3), 2 * (um or 1e3)),
        resolutionunit="NONE",
    )
    slide = Slide.open(entry(tmp_path / "a.tif", fallback_mpp=0.25))
    assert slide.mpp_source == ("--mpp" if um is None else "ImageJ")


@given(st.text() | st.floats() | st.none(), st.text())
def test_no_text_is_a_wrong_length(value: object, unit: str) -> None:
    for length in (positive(value), in_um(value, unit), in_um(value, "µm")):
        assert length is None or length > 0


@pytest.mark.parametrize("name", ["ome-physical-size.ome.tif", "mpp-with-comma.svs"])
@pytest.mark.parametrize("fallback", [None, 0.25])
def test_pixel_size_of_the_real_cases(name: str, fallback: float | None) -> None:
    slide = Slide.open(entry(case(name), fallback_mpp=fallback))
    assert slide.mpp_level0 == (0.5, 0.5)
    assert slide.calibrated


# The right image of a file


@pytest.mark.parametrize(
    ("sides", "names", "shown"),
    [
        ([320, 400], [], 0),
        ([320, 400], ["one", "two"], 0),
        ([320, 320], ["one", "two"], 0),
        ([200, 400], ["one", "two"], 0),  # 4 times its pixels
        ([192, 400], ["one", "two"], 1),
        ([192, 320, 400], ["one", "two", "three"], 2),
        ([400, 320], ["Label image", "two"], 1),
        ([400, 320, 352], ["macro", "two", "three"], 1),
        ([400, 320], ["macro", "overview"], 0),
    ],
)
def test_the_image_that_qupath_shows_is_read(
    tmp_path: Path, sides: list[int], names: list[str], shown: int
) -> None:
    images = [scene(side, side, (0.5, 0.5)) for side in sides]
    slide = Slide.open(entry(write_series(tmp_path / "a.tif", *images, names=names)))
    assert slide.size == (sides[shown],) * 2
    np.testing.assert_array_equal(slide.read(whole(slide)), images[shown])


def test_an_image_with_levels_is_a_slide_whatever_its_name(tmp_path: Path) -> None:
    pixels = scene(400, 320, (0.5, 0.5))
    common: dict[str, Any] = {"photometric": "rgb", "tile": (TILE, TILE)}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tiff:
        tiff.write(pixels, subifds=1, metadata={"Name": "macro", "axes": "YXS"}, **common)
        tiff.write(shrunk(pixels, 2), subfiletype=1, **common)
        tiff.write(scene(480, 400, (0.5, 0.5)), metadata={"Name": "two", "axes": "YXS"}, **common)
    assert Slide.open(entry(tmp_path / "a.ome.tif", fallback_mpp=0.5)).size == (400, 320)


def test_a_much_larger_image_is_read_wherever_it_is(tmp_path: Path) -> None:
    pixels = scene(512, 384, (0.5, 0.5))
    path = write_series(tmp_path / "a.tif", shrunk(pixels, 3), pixels, shrunk(pixels, 2))
    slide = Slide.open(entry(path))
    assert slide.size == (512, 384)
    assert slide.levels == ((512, 384), (256, 192))
    np.testing.assert_array_equal(slide.read(whole(slide)), pixels)


@pytest.mark.parametrize("subfiletype", [0, 2])
@pytest.mark.parametrize("tile", [TILE, None])
def test_a_page_of_half_the_size_that_shows_something_else_is_an_image_of_its_own(
    tmp_path: Path, subfiletype: int, tile: int | None
) -> None:
    """Also one that is nearly all glass, and its own levels are its own."""
    pixels, other = scene(512, 384, (0.5, 0.5)), np.full((192, 256, 3), 245, np.uint8)
    other[100:140, 30:80] = (200, 120, 180)
    pages = [pixels, other, shrunk(other, 2)]
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for page in pages:
            tiff.write(
                page,
                photometric="rgb",
                tile=tile and (tile, tile),
                compression="deflate",
                subfiletype=subfiletype,
                metadata=None,
            )

    def read(**known: Any) -> tuple[Any, NDArray[np.uint8]]:
        slide = Slide.open(entry(tmp_path / "a.tif", fallback_mpp=0.5, **known), 1.0)
        return slide.levels, slide.read(whole(slide))

    for known, levels, expected in (
        ({}, ((512, 384),), pixels),
        ({"size": (512, 384)}, ((512, 384),), pixels),
        ({"size": (256, 192)}, ((256, 192), (128, 96)), other),
        ({"series": 1}, ((256, 192), (128, 96)), other),
    ):
        found = read(**known)
        assert found[0] == levels
        np.testing.assert_allclose(found[1], shrunk(expected, 2).astype(int), atol=1)


@pytest.mark.parametrize("quality", [None, 60])
def test_plain_pages_that_show_the_same_are_levels(tmp_path: Path, quality: int | None) -> None:
    """Also ones that take each second pixel, and are compressed hard."""
    pixels = tissue(700, 900)
    with tifffile.TiffWriter(tmp_path / "a.tif") as tiff:
        for step in (1, 2, 4):
            tiff.write(
                np.ascontiguousarray(pixels[::step, ::step]),
                photometric="rgb",
                tile=(TILE, TILE),
                compression="jpeg" if quality else "deflate",
                compressionargs={"level": quality} if quality else None,
                metadata=None,
            )
    slide = Slide.open(entry(tmp_path / "a.tif", fallback_mpp=0.5))
    assert slide.levels == ((900, 700), (450, 350), (225, 175))


def test_levels_may_be_in_any_order(tmp_path: Path) -> None:
    pixels = scene(512, 384, (0.5, 0.5))
    with tifffile.TiffWriter(tmp_path / "a.ome.tif") as tiff:
        common: dict[str, Any] = {"photometric": "rgb", "tile": (TILE, TILE)}
        tiff.write(pixels, subifds=2, metadata={"axes": "YXS"}, **common)
        for factor in (4, 2):
            tiff.write(shrunk(pixels, factor), subfiletype=1, **common)
    slide = Slide.open(entry(tmp_path / "a.ome.tif", fallback_mpp=0.5), 2.0)
    assert slide.levels == ((512, 384), (256, 192), (128, 96))
    np.testing.assert_array_equal(slide.read(whole(slide)), shrunk(pixels, 4))


def test_an_image_is_named_by_number_name_or_size(tmp_path: Path) -> None:
    first, second = scene(256, 192, (0.5, 0.5)), scene(256, 200, (0.5, 0.5))
    third = np.ascontiguousarray(second[::-1])
    names = ["one", "two", "three"]
    path = write_series(tmp_path / "a.ome.tif", first, second, third, names=names)
    known: dict[str, Any]
    for known, expected in (
        ({"series": 0}, first),
        ({"series": 2}, third),
        ({"series_name": "two"}, second),
        ({"size": (256, 192)}, first),
        ({"series": 2, "size": (256, 200)}, third),
    ):
        slide = Slide.open(entry(path, **known))
        np.testing.assert_array_equal(slide.read(whole(slide)), expected)
    for known, reason in (
        ({"series": 7}, "3 images, not number 7"),
        ({"series_name": "four"}, "no image named four, but one, two, three"),
    ):
        with pytest.raises(SlideError, match=f"cannot be read .*{reason}"):
            Slide.open(entry(path, **known))
    with pytest.raises(SlideError, match="QuPath saved 300 x 300"):
        Slide.open(entry(path, series=0, size=(300, 300)))


def test_the_slide_of_the_real_case() -> None:
    assert Slide.open(entry(case("thumbnail-first.tif"))).size == (1024, 1024)


@pytest.mark.parametrize("fallback", [None, 0.5])
def test_the_preview_in_a_vsi_is_refused(tmp_path: Path, fallback: float | None) -> None:
    path = write_series(tmp_path / "Image_01.vsi", scene(256, 192, (0.5, 0.5)))
    with pytest.raises(SlideError, match=r"Image_01\.vsi cannot be read \(a VSI .*OME-TIFF"):
        Slide.open(entry(path, fallback_mpp=fallback))


# Pale tissue


def pale(colour: tuple[int, int, int], nuclei: int = 20) -> NDArray[np.uint8]:
    """Stroma (512, 512, 3) of 0.5 µm/px with nuclei, no glass."""
    rng = np.random.default_rng(0)
    pixels = np.array(colour) + rng.normal(0, 3, (512, 512, 3))
    rows, cols = np.mgrid[:512, :512]
    for y, x in rng.integers(20, 492, (nuclei, 2)):
        pixels[(rows - y) ** 2 + (cols - x) ** 2 < 8**2] = (110, 70, 150)
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("colour", [(240, 225, 233), (238, 220, 230), (241, 234, 239)])
def test_pale_stroma_without_glass_is_tissue(colour: tuple[int, int, int]) -> None:
    assert tissue_mask(shrunk(pale(colour), 16), 8.0).all()


def test_real_fat_and_pale_stroma_are_tissue_and_glass_is_not(shared_data: Path) -> None:
    folder = shared_data / "no_nuclei"
    for path in sorted((folder / "collagen_fat").glob("*.png")):
        thumbnail = np.asarray(Image.open(path).convert("RGB").reduce(16))
        assert tissue_mask(thumbnail, 8.0).mean() > 0.3, path.name
    for name in ("almost-white-1", "almost-white-2", "no-tissue", "no-tissue2", "no-tissue-line"):
        thumbnail = np.asarray(
            Image.open(folder / "ink_and_edges" / f"{name}.png").convert("RGB").reduce(16)
        )
        assert not tissue_mask(thumbnail, 8.0).any(), name


# Other colours


GREEN = "most of it is green as ink, which no stain of nuclei is: left out there"
GREY = "most of it is grey: found by shape, with stains that are not told apart"


@pytest.mark.parametrize(
    ("colours", "count", "message"),
    [
        ("purple", 5, None),
        ("purple", 0, "no nucleus found in its tissue"),
        ("green", 5, GREEN),
        ("grey", 5, GREY),
        ("grey", 0, f"{GREY}; no nucleus found in its tissue"),
    ],
)
def test_tissue_of_no_known_stain_is_noted(
    tmp_path: Path, square: NDArray[np.uint8], colours: str, count: int, message: str | None
) -> None:
    """Green in place of purple, or grey, as no stain of nuclei is."""
    pixels = Image.fromarray(np.roll(square, colours == "green", axis=-1))
    if colours == "grey":
        pixels = pixels.convert("L").convert("RGB")
    pixels.save(tmp_path / "a.png")
    image = prepare(entry(tmp_path / "a.png", fallback_mpp=0.5), Config())
    assert (image.is_green, image.is_grey) == (colours == "green", colours == "grey")
    shown = note(entry(tmp_path / "a.png"), image, count, has_tissue=True, settings=Config())
    assert shown == message


@pytest.mark.parametrize("mpp", [0.5, 1.0, 2.0])
def test_pixels_that_are_too_coarse_for_nuclei_are_noted(
    tmp_path: Path, square: NDArray[np.uint8], mpp: float
) -> None:
    Image.fromarray(square).save(tmp_path / "a.png")
    image = prepare(entry(tmp_path / "a.png", fallback_mpp=mpp), Config())
    shown = note(entry(tmp_path / "a.png"), image, 5, has_tissue=True, settings=Config())
    message = "pixels of 2 µm: too coarse to tell nuclei apart, or to count them"
    assert shown == (message if mpp == 2 else None)


# Small things


def test_the_last_pixel_of_a_truncated_level_is_repeated(tmp_path: Path) -> None:
    pixels = scene(400, 2203, (0.25, 0.25))  # levels of 550 and 137 rows
    path = write_tiff(tmp_path / "a.tif", pixels, (0.25, 0.25), (1, 4, 16), tile_px=TILE)
    for mpp in (4.0, 4.2, 8.0):
        thumbnail = Slide.open(entry(path), 0.25).thumbnail(mpp)
        assert np.abs(thumbnail[-1].astype(int) - thumbnail[-2]).max() < 10


@pytest.mark.parametrize(
    ("saved", "is_same"),
    [
        ({"series": 0, "size": (SIDE, SIDE), "mpp": (0.5, 0.5)}, True),  # as QuPath saves it
        ({"mpp": (0.5 + 1e-9, 0.5)}, True),  # read in other digits
        ({"series_name": "one"}, True),
        ({"series": 1}, False),
        ({"size": (400, SIDE)}, False),
        ({"mpp": (0.25, 0.25)}, False),
    ],
)
def test_finished_tiles_are_kept_when_qupath_saves_what_the_file_says(
    tmp_path: Path, square: NDArray[np.uint8], saved: dict[str, Any], is_same: bool
) -> None:
    path = write_series(
        tmp_path / "a.ome.tif", square, square[:, :400].copy(), names=["one", "two"]
    )
    image = prepare(entry(path), Config())
    plan = json.loads(json.dumps(image.fingerprint()))
    after = prepare(entry(path, **saved), Config())
    assert (json.loads(json.dumps(after.fingerprint())) == plan) is is_same
    slide = image.slide
    made = SlideProvenance(file=image.file, mpp=slide.mpp_level0, mpp_source=slide.mpp_source)
    assert _is_same_slide(plan, made, entry(path))
    if "series_name" not in saved:  # which needs a look into the file
        assert _is_same_slide(plan, made, entry(path, **saved)) is is_same


@pytest.mark.parametrize(
    ("source", "known", "is_same"),
    [
        ("--mpp", {"fallback_mpp": 0.5}, True),
        ("--mpp", {"mpp": (0.5, 0.5)}, True),  # init wrote it into the project
        ("--mpp", {"fallback_mpp": 0.25}, False),
        ("--mpp", {}, False),
        ("QuPath", {"mpp": (0.5, 0.5), "fallback_mpp": 0.25}, True),
        ("QuPath", {}, False),  # the file may have another one
        ("vendor", {"fallback_mpp": 0.25}, True),
        ("vendor", {"mpp": (0.25, 0.25)}, False),
    ],
)
def test_nuclei_are_those_of_a_pixel_size(
    source: str, known: dict[str, Any], is_same: bool
) -> None:
    made = SlideProvenance(
        file=FileSignature(bytes=1, modified_ns=1), mpp=(0.5, 0.5), mpp_source=source
    )
    assert _has_its_pixel_size(made, entry(Path("a.tif"), **known)) is is_same


def test_another_slide_of_one_size_and_time_is_another(
    tmp_path: Path, square: NDArray[np.uint8]
) -> None:
    """As archives keep times in steps of two seconds, and images without compression one size."""
    paths = [tmp_path / "a.tif", tmp_path / "b.tif"]
    for path, pixels in zip(paths, (square, square[::-1]), strict=True):
        tifffile.imwrite(path, np.ascontiguousarray(pixels), photometric="rgb", metadata=None)
        os.utime(path, ns=(10**18, 10**18))
    one, other = (entry(path, mpp=(0.5, 0.5)) for path in paths)
    image = prepare(one, Config())
    assert slide_signature(other.path).bytes == image.file.bytes
    plan = json.loads(json.dumps(image.fingerprint()))
    made = SlideProvenance(file=image.file, mpp=(0.5, 0.5), mpp_source=image.slide.mpp_source)
    assert _is_same_slide(plan, made, one)
    assert not _is_same_slide(plan, made, other)
    assert digest(prepare(other, Config()).fingerprint()) != digest(plan)
    image.check_unchanged()
    shutil.copy2(other.path, one.path)
    with pytest.raises(SlideError, match="changed while it was segmented"):
        image.check_unchanged()


def test_tiles_of_a_version_without_samples_are_kept(
    tmp_path: Path, square: NDArray[np.uint8]
) -> None:
    path = write_tiff(tmp_path / "a.tif", square, (0.5, 0.5))
    image = prepare(entry(path), Config())
    tile = Tile(row=0, col=0, read=Box(0, 0, 9, 9), write=Box(0, 0, 9, 9))
    plan = image.fingerprint()
    old = {name: value for name, value in plan.items() if name != "sample"}
    store = TileStore.open(tmp_path / "tiles", old)
    store.write(tile, b"PAR1 PAR1")
    assert TileStore.open(store.folder, plan).missing([tile]) == []
    made = SlideProvenance(file=image.file, mpp=(0.5, 0.5), mpp_source=image.slide.mpp_source)
    assert _is_same_slide(json.loads(json.dumps(old)), made, entry(path))
    file = msgspec.convert({"bytes": image.file.bytes, "modified_ns": 1}, FileSignature)
    assert image.file.has_content_of(file)
    assert not image.file.is_of(file)
    store = TileStore.open(store.folder, plan | {"stains": None})
    assert store.missing([tile]) == [tile]
    store.write(tile, b"PAR1 PAR1")
    assert TileStore.open(store.folder, plan | {"sample": 1}).missing([tile]) == [tile]


def test_a_slide_with_voids_has_a_fingerprint(tmp_path: Path, square: NDArray[np.uint8]) -> None:
    pixels, _ = turned(square, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = prepare(entry(tmp_path / "a.png", fallback_mpp=0.5), Config())
    without = replace(image, slide=replace(image.slide, void=None))
    assert digest(image.fingerprint()) != digest(without.fingerprint())
