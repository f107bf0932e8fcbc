"""JPEG tiles that are decoded at half their size: area averages, whatever library decodes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from slides import BLUE, TILE_PX, Encode, at_full_size, opened, tissue, whole, write_encoded
from tifffile import TiffFile

from patchcl_qupath.datatypes import Box
from patchcl_qupath.errors import DamagedError
from patchcl_qupath.slides import half_jpeg
from patchcl_qupath.slides.half_jpeg import HalfJPEG
from patchcl_qupath.slides.level import Level
from patchcl_qupath.slides.pyramid import forget_pyramids, open_pyramid

SHAPE = (413, 517)  # not of whole tiles, nor of pairs of px


def jpeg(subsampling: str, **options: object) -> Encode:
    return lambda tile: imagecodecs.jpeg8_encode(tile, level=85, subsampling=subsampling, **options)


def finest(path: Path) -> Level:
    return open_pyramid(path).levels[0]


KINDS = {
    "all chroma": (jpeg("444"), "ycbcr"),
    "half the chroma": (jpeg("420"), "ycbcr"),
    "RGB, as Aperio": (jpeg("444", colorspace="rgb", outcolorspace="rgb"), "rgb"),
    "JFIF that is said to be RGB": (jpeg("420"), "rgb"),
}


@pytest.fixture(params=KINDS)
def slide_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    encode, photometric = KINDS[request.param]
    return write_encoded(tmp_path / "a.tif", tissue(*SHAPE), encode, photometric=photometric)


def test_pixels_are_area_averages(slide_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert finest(slide_file).half is not None
    slide = opened(slide_file)
    assert slide.downsample == (2, 2)
    got, expected = slide.read(whole(slide)), at_full_size(slide_file, monkeypatch)
    assert got.shape == (SHAPE[0] // 2, SHAPE[1] // 2, 3)
    difference = np.abs(got - expected)
    assert 0 < difference.mean() < 0.6
    assert np.percentile(difference, 99.9) <= 4
    assert difference.max() <= 16
    assert np.abs((got - expected).mean(axis=(0, 1))).max() < 0.2


def test_chroma_is_smoothed_as_interpolation_does() -> None:
    pixels = np.full((TILE_PX, TILE_PX, 3), 200, np.uint8)
    pixels[:, 32:] = BLUE
    encoded = jpeg("420")(pixels)
    decoder = HalfJPEG.of(encoded, (TILE_PX, TILE_PX), tables=b"", is_rgb=False)
    assert decoder is not None
    expected = imagecodecs.jpeg8_decode(encoded).reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    assert np.abs(decoder.decode(encoded) - expected).max() < 3
    assert np.abs(decoder._decoded(encoded) - expected).max() > 6  # as libjpeg-turbo has it


def test_a_pixel_is_the_same_in_whichever_box_it_is_read(slide_file: Path) -> None:
    slide, rng = opened(slide_file), np.random.default_rng(0)
    pixels = slide.read(whole(slide))
    for _ in range(20):
        row0, row1 = np.sort(rng.choice(slide.shape[0] + 1, 2, replace=False)).tolist()
        col0, col1 = np.sort(rng.choice(slide.shape[1] + 1, 2, replace=False)).tolist()
        box = Box(row0, col0, row1, col1)
        np.testing.assert_array_equal(slide.read(box), pixels[row0:row1, col0:col1])


def test_pixels_do_not_depend_on_the_library(
    slide_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("simplejpeg", reason="needs simplejpeg")
    assert half_jpeg.simplejpeg is not None
    slide = opened(slide_file)
    with_library = slide.read(whole(slide))
    monkeypatch.setattr(half_jpeg, "simplejpeg", None)
    np.testing.assert_array_equal(slide.read(whole(slide)), with_library)


@pytest.mark.parametrize("has_library", [True, False], ids=["simplejpeg", "Pillow"])
def test_damaged_tiles_are_read_as_at_full_size(
    has_library: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused where full decoding refuses them, and as near to its pixels as others elsewhere."""
    if has_library:
        pytest.importorskip("simplejpeg", reason="needs simplejpeg")
    else:
        monkeypatch.setattr(half_jpeg, "simplejpeg", None)
    encoded, rng = jpeg("420")(tissue(TILE_PX, TILE_PX)), np.random.default_rng(1)
    decoder = HalfJPEG.of(encoded, (TILE_PX, TILE_PX), tables=b"", is_rgb=False)
    assert decoder is not None
    start = encoded.index(b"\xff\xda") + 14
    damaged = [encoded[: rng.integers(start, len(encoded))] for _ in range(20)]
    for _ in range(200):
        changed = bytearray(encoded)
        changed[rng.integers(start, len(encoded))] = rng.integers(256)
        damaged.append(bytes(changed))
    damaged.append(encoded[:start] + b"\xff\xa0" + encoded[start:])  # an unknown marker
    refused = 0
    for each in damaged:
        try:
            expected = imagecodecs.jpeg8_decode(each).reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        except imagecodecs.Jpeg8Error:
            refused += 1
            with pytest.raises(ValueError, match=r"."):
                decoder.decode(each)
            continue
        assert np.median(np.abs(decoder.decode(each) - expected)) < 2
    assert refused


def arithmetic(tile: NDArray[np.uint8]) -> bytes:
    """A JPEG that says that it is in arithmetic codes."""
    return jpeg("444")(tile).replace(b"\xff\xc0", b"\xff\xc9")


def of_12_bits(tile: NDArray[np.uint8]) -> bytes:
    """A JPEG that says that it has 12 bits."""
    encoded = bytearray(jpeg("444")(tile))
    encoded[encoded.index(b"\xff\xc1" if b"\xff\xc1" in encoded else b"\xff\xc0") + 4] = 12
    return bytes(encoded)


REFUSED = {
    "half the width of chroma": jpeg("422"),
    "half the height of chroma": jpeg("440"),
    "a quarter of chroma": jpeg("411"),
    "grey": lambda tile: imagecodecs.jpeg8_encode(tile[..., 0].copy()),
    "CMYK": lambda tile: imagecodecs.jpeg8_encode(
        np.dstack([tile, tile[..., :1]]), colorspace="cmyk", outcolorspace="cmyk"
    ),
    "lossless": lambda tile: imagecodecs.ljpeg_encode(tile[..., 0].copy()),
    "arithmetic codes": arithmetic,
    "12 bits": of_12_bits,
    "cut in its header": lambda tile: jpeg("420")(tile)[:100],
    "nothing": lambda tile: b"",
    "no JPEG": lambda tile: b"\xff\xd8 no JPEG",
}


@pytest.mark.parametrize("encode", REFUSED.values(), ids=REFUSED.keys())
def test_kinds_that_are_refused(encode: Encode) -> None:
    pixels = tissue(TILE_PX, TILE_PX)
    assert HalfJPEG.of(encode(pixels), (TILE_PX, TILE_PX), tables=b"", is_rgb=False) is None
    decoder = HalfJPEG.of(jpeg("420")(pixels), (TILE_PX, TILE_PX), tables=b"", is_rgb=False)
    assert decoder is not None
    with pytest.raises(ValueError, match="of another kind"):
        decoder.decode(encode(pixels))


def test_sizes_and_colours_that_are_refused() -> None:
    small, jfif = jpeg("444")(tissue(48, 64)), jpeg("444")(tissue(64, 64))
    odd = jpeg("444")(tissue(63, 64))
    plain = jpeg("444", colorspace="rgb", outcolorspace="rgb")(tissue(64, 64))
    of = HalfJPEG.of
    assert of(small, (64, 64), tables=b"", is_rgb=False) is None
    assert of(odd, (63, 64), tables=b"", is_rgb=False) is None
    assert of(jfif, (64, 64), tables=b"", is_rgb=True) is None  # the marker would count
    assert of(jfif, (64, 64), tables=jfif, is_rgb=False) is None  # they are more than tables
    assert of(jfif, (64, 64), tables=b"", is_rgb=False) is not None
    assert plain is not None


@pytest.mark.parametrize("subsampling", ["422", "440", "411"])
def test_other_subsampling_is_decoded_at_full_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subsampling: str
) -> None:
    path = write_encoded(tmp_path / "a.tif", tissue(*SHAPE), jpeg(subsampling))
    assert finest(path).half is None
    slide = opened(path)
    np.testing.assert_array_equal(slide.read(whole(slide)), at_full_size(path, monkeypatch))


def test_a_tile_unlike_the_others_is_decoded_at_full_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_encoded(
        tmp_path / "a.tif", tissue(*SHAPE), jpeg("420"), changed={10: jpeg("422"), 12: jpeg("444")}
    )
    slide = opened(path)
    got, expected = slide.read(whole(slide)), at_full_size(path, monkeypatch)
    at = np.s_[32:64, 32:64], np.s_[32:64, 96:128]  # tiles 10 and 12, of 9 in a row
    for part in at:
        np.testing.assert_array_equal(got[part], expected[part])
    assert (got != expected).any()
    for box in (Box(20, 20, 50, 70), Box(40, 40, 41, 41), Box(0, 90, 64, 140)):
        np.testing.assert_array_equal(
            slide.read(box), got[box.row0 : box.row1, box.col0 : box.col1]
        )


def test_a_tile_that_cannot_be_decoded_raises_as_at_full_size(tmp_path: Path) -> None:
    path = write_encoded(
        tmp_path / "a.tif", tissue(*SHAPE), jpeg("420"), changed={10: lambda _: b"\xff\xd8 none"}
    )
    slide = opened(path)
    assert slide.read(Box(0, 0, 32, 258)).shape == (32, 258, 3)
    with pytest.raises(DamagedError, match=r"a.tif cannot be read"):
        slide.read(Box(0, 0, 33, 33))


def test_a_truncated_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_encoded(tmp_path / "a.tif", tissue(*SHAPE), jpeg("420"))
    with TiffFile(path) as tiff:
        page = tiff.pages.first
        end = page.dataoffsets[30] + page.databytecounts[30] // 2
    assert end > page.offset  # what describes the image comes first
    data = path.read_bytes()
    path.write_bytes(data[:end])
    slide = opened(path)
    part = Box(96, 0, 128, 96)  # tiles 27 to 29
    assert np.abs(slide.read(part) - at_full_size(path, monkeypatch, part)).mean() < 0.6
    for cut_off in (Box(96, 96, 128, 128), Box(96, 128, 128, 160)):  # tile 30, and what follows
        with pytest.raises(DamagedError):
            slide.read(cut_off)
        with pytest.raises(DamagedError):
            at_full_size(path, monkeypatch, cut_off)


def test_tiles_that_are_not_in_the_file_are_glass(tmp_path: Path) -> None:
    path = write_encoded(
        tmp_path / "a.tif",
        tissue(*SHAPE),
        jpeg("420"),
        changed={0: lambda _: b"", 10: lambda _: b""},
    )
    assert finest(path).half is not None
    slide = opened(path)
    pixels = slide.read(whole(slide))
    assert (pixels[:32, :32] == 255).all()
    assert (pixels[32:64, 32:64] == 255).all()
    assert (pixels[:32, 32:] < 255).any(axis=-1).all()


def test_what_is_no_jpeg_of_tiles_has_no_half(tmp_path: Path) -> None:
    pixels = tissue(*SHAPE)
    options = {"photometric": "rgb", "metadata": None}
    tifffile.imwrite(tmp_path / "a.tif", pixels, tile=(64, 64), compression="deflate", **options)
    tifffile.imwrite(tmp_path / "b.tif", pixels, compression="jpeg", **options)
    assert finest(tmp_path / "a.tif").half is None
    assert finest(tmp_path / "b.tif").half is None


def test_a_level_of_one_tile_is_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_encoded(tmp_path / "a.tif", tissue(60, 50), jpeg("420"))
    assert finest(path).half is None
    slide = opened(path)
    np.testing.assert_array_equal(slide.read(whole(slide)), at_full_size(path, monkeypatch))


def test_only_grids_of_whole_blocks_are_read_from_a_half(tmp_path: Path) -> None:
    level = finest(write_encoded(tmp_path / "a.tif", tissue(*SHAPE), jpeg("420")))
    half = level.half
    assert half is not None
    assert (half.scale, half.chunk) == ((2, 2), (32, 32))
    assert half.pixels.shape == (206, 258, 3)
    for downsample, origin, expected in [
        ((2.0, 2.0), (0, 0), half),
        ((6.0, 2.0), (4, 10), half),
        ((2.0, 2.0), (0, 1), level),
        ((3.0, 3.0), (0, 0), level),
        ((2.0, 2.2), (0, 0), level),
        ((1.0, 1.0), (0, 0), level),
    ]:
        assert level.averaged(downsample, origin) is expected
    plain = replace(level, half=None)
    assert plain.averaged((2.0, 2.0), (0, 0)) is plain


def test_voids_and_overviews_are_of_the_level_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = tissue(*SHAPE)
    pixels[:120] = 0
    path = write_encoded(tmp_path / "a.tif", pixels, jpeg("420"))

    def read() -> Sequence[NDArray[np.uint8]]:
        slide, overview = opened(path).without_void(8.0)
        assert slide.void is not None
        return overview.pixels, overview.black, slide.read(whole(slide)), slide.thumbnail(2.0)

    got = read()
    monkeypatch.setattr(Level, "averaged", lambda self, downsample, origin: self)
    forget_pyramids()
    for each, expected in zip(got, read(), strict=True):
        np.testing.assert_array_equal(each, expected)


def test_hamamatsu(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shared_data / "slides" / "test3-DAPI-2-387.ndpi"
    assert finest(path).half is not None
    slide = opened(path)
    box = Box(700, 300, 1500, 1100)
    difference = slide.read(box) - at_full_size(path, monkeypatch, box)
    assert np.abs(difference).mean() < 0.6
