"""Slides: pixels are the area averages of the file, from any level and in any box."""

from __future__ import annotations

import errno
import gc
import os
import pickle
import re
import subprocess
import sys
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from slides import DISCS_UM, check_boxes, scene, shrunk, whole, write_svs, write_tiff
from tifffile import TiffFile
from tiffslide import TiffSlide

from patchcl_qupath.datatypes import Box, ImageEntry
from patchcl_qupath.errors import DamagedError, ImageError, SlideError
from patchcl_qupath.slides import pyramid, signature
from patchcl_qupath.slides.pyramid import open_pyramid
from patchcl_qupath.slides.signature import (
    signature_without_download,
    slide_files,
    slide_signature,
)
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.slides.tiled_page import TiledPage
from patchcl_qupath.storage.records import FileSignature

LAYOUTS = [(1,), (1, 2, 4), (1, 4, 16)]


def entry(path: Path, **known: object) -> ImageEntry:
    return ImageEntry("1", path.name, path, **known)  # type: ignore[arg-type]


def area_mean(pixels: NDArray[np.uint8], shape: tuple[int, int], factor: float) -> NDArray:
    """The area average by another method: differences of the interpolated integral image."""
    for axis in (0, 1):
        integral = np.insert(np.cumsum(pixels, axis=axis, dtype=float), 0, 0, axis=axis)
        edges = np.minimum(np.arange(shape[axis] + 1) * factor, pixels.shape[axis])
        low = np.floor(edges).astype(int)
        high = np.minimum(low + 1, pixels.shape[axis])
        part = (edges - low).reshape([-1 if a == axis else 1 for a in range(3)])
        at = integral.take(low, axis) * (1 - part) + integral.take(high, axis) * part
        widths = np.diff(edges).reshape([-1 if a == axis else 1 for a in range(3)])
        pixels = np.diff(at, axis=axis) / widths
    return pixels


@pytest.fixture
def chunks_read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each tile was decoded, as 'level/number'."""
    counter: Counter[str] = Counter()
    decoded = TiledPage.decoded

    def counting(self: TiledPage, index: int) -> object:
        levels = [level.keyframe for level in self.page.parent.series[0].levels]
        counter[f"{levels.index(self.page)}/{index}"] += 1
        return decoded(self, index)

    monkeypatch.setattr(TiledPage, "decoded", counting)
    return counter


@pytest.mark.parametrize(
    ("mpp0", "downsample"),
    [
        *[(0.25, 2), (0.2525, 2), (0.23, 2), (0.5, 1), (0.499, 1), (0.17, 3)],  # whole blocks
        *[(1.0, 0.5), (0.35, 0.5 / 0.35), (0.2, 2.5)],  # not near: exactly what was asked for
    ],
)
def test_grid_is_whole_blocks_where_they_are_near_the_mpp(
    tmp_path: Path, mpp0: float, downsample: float
) -> None:
    pixels = scene(401, 303, (mpp0, mpp0))
    slide = Slide.open(entry(write_tiff(tmp_path / "a.tif", pixels, (mpp0, mpp0))), 0.5)
    assert slide.downsample == pytest.approx((downsample, downsample), rel=1e-6)
    assert slide.shape == (int(303 / downsample), int(401 / downsample))
    assert slide.mpp == pytest.approx(mpp0 * downsample, rel=1e-6)
    expected = area_mean(pixels, slide.shape, slide.downsample[0])
    assert np.abs(slide.read(whole(slide)) - expected).max() < 1.5


@pytest.mark.parametrize("factors", LAYOUTS)
@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.8, 1.0, 2.3, 4.0])
def test_all_levels_have_the_same_content(
    tmp_path: Path, factors: tuple[int, ...], mpp: float
) -> None:
    pixels = scene(803, 611, (0.25, 0.25))  # no level is a whole fraction of it
    slide = Slide.open(entry(write_tiff(tmp_path / "a.tif", pixels, (0.25, 0.25), factors)), mpp)
    expected = area_mean(pixels, slide.shape, slide.downsample[0])
    difference = np.abs(slide.read(whole(slide)) - expected)
    assert difference.mean() < 0.5  # each level was rounded to whole numbers
    assert difference.max() < 40  # a pixel's shift would be 150 on the border of a disc


@pytest.mark.parametrize("mpp", [0.25, 0.35, 0.5, 1.1])
@pytest.mark.parametrize("factors", LAYOUTS)
def test_a_pixel_is_the_same_in_whichever_box_it_is_read(
    tmp_path: Path, factors: tuple[int, ...], mpp: float
) -> None:
    pixels = scene(803, 611, (0.25, 0.25))
    slide = Slide.open(entry(write_tiff(tmp_path / "a.tif", pixels, (0.25, 0.25), factors)), mpp)
    check_boxes(slide, 12)


@pytest.mark.parametrize("factors", LAYOUTS)
def test_discs_are_where_they_were_drawn(tmp_path: Path, factors: tuple[int, ...]) -> None:
    pixels = scene(640, 480, (0.23, 0.23))
    slide = Slide.open(entry(write_tiff(tmp_path / "a.tif", pixels, (0.23, 0.23), factors)), 0.9)
    labels, n = ndimage.label(slide.read(whole(slide))[..., 1] < 100)
    centres = ndimage.center_of_mass(labels > 0, labels, range(1, n + 1))
    level0 = sorted(
        ((col + 0.5) * slide.downsample[0], (row + 0.5) * slide.downsample[1])
        for row, col in centres
    )
    expected = sorted((x / 0.23, y / 0.23) for x, y, _ in DISCS_UM)
    np.testing.assert_allclose(level0, expected, atol=2)


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", scene(600, 200, (0.25, 0.5)), (0.25, 0.5))
    slide = Slide.open(entry(path), 0.5)
    assert slide.mpp_level0 == pytest.approx((0.25, 0.5))
    assert slide.downsample == (2, 1)
    assert slide.shape == (200, 300)
    assert slide.grid_mpp == pytest.approx((0.5, 0.5))
    pixels = slide.read(whole(slide)).astype(int)
    assert (np.diff(pixels[-1, :, 0]) >= 0).all()  # red grows with x
    assert (np.diff(pixels[:, -1, 1]) <= 0).all()  # green falls with y


@pytest.mark.parametrize(
    ("mpp", "level", "side"),
    [(0.25, 0, 64), (0.6, 0, 64), (1.0, 1, 64), (2.0, 1, 64), (4.0, 2, 64)],
)
def test_reads_each_chunk_once_from_the_coarsest_level_that_is_fine_enough(
    tmp_path: Path, chunks_read: Counter[str], mpp: float, level: int, side: int
) -> None:
    path = write_tiff(tmp_path / "a.tif", scene(3000, 2400, (0.25, 0.25)), (0.25, 0.25), (1, 4, 16))
    slide = Slide.open(entry(path), mpp)
    chunks_read.clear()
    rows, cols = slide.shape
    box = Box(rows // 3, cols // 4, rows // 2, cols // 2)
    slide.read(box)
    assert set(chunks_read.values()) == {1}
    assert {int(key.split("/")[0]) for key in chunks_read} == {level}
    per_px = mpp / 0.25 / 4**level  # level px per working px
    spans = [
        np.ceil(last * per_px / side) - np.floor(first * per_px / side)
        for first, last in ((box.row0, box.row1), (box.col0, box.col1))
    ]
    assert len(chunks_read) == np.prod(spans)


def test_thumbnail_is_the_mean_and_reads_each_chunk_once(
    tmp_path: Path, chunks_read: Counter[str]
) -> None:
    pixels = scene(5003, 2601, (0.25, 0.25))  # one level, more than one block
    path = write_tiff(tmp_path / "a.tif", pixels, (0.25, 0.25), tile_px=208)
    slide = Slide.open(entry(path), 0.5)
    chunks_read.clear()
    thumbnail, px = slide.thumbnail(8.0), slide.thumbnail_px(8.0)
    assert set(chunks_read.values()) == {1}
    assert px == 16
    assert thumbnail.shape == (-(-1300 // 16), -(-2501 // 16), 3)
    expected = shrunk(pixels, 32).astype(int)
    got = thumbnail[: expected.shape[0], : expected.shape[1]]
    assert np.abs(got - expected).max() <= 1


def test_thumbnail_of_a_pyramid_reads_a_coarse_level(
    tmp_path: Path, chunks_read: Counter[str]
) -> None:
    pixels = scene(1600, 1200, (0.25, 0.25))
    path = write_tiff(tmp_path / "a.tif", pixels, (0.25, 0.25), (1, 4), tile_px=128)
    slide = Slide.open(entry(path), 0.35)
    chunks_read.clear()
    thumbnail = slide.thumbnail(2.0)
    assert {key.split("/")[0] for key in chunks_read} == {"1"}
    side = slide.thumbnail_px(2.0) * slide.downsample[0]
    expected = area_mean(pixels, thumbnail.shape[:2], side)
    assert np.abs(thumbnail - expected).mean() < 0.5


def test_a_slide_smaller_than_a_pixel_of_its_thumbnail(shared_data: Path) -> None:
    slide = Slide.open(entry(shared_data / "slides" / "small.svs"))
    assert slide.read(whole(slide)).shape == (16, 16, 3)
    assert slide.thumbnail(16.0).shape == (1, 1, 3)


def test_aperio(tmp_path: Path) -> None:
    pixels = scene(1000, 800, (0.25, 0.25))
    slide = Slide.open(entry(write_svs(tmp_path / "a.svs", pixels, 0.25)))
    assert slide.mpp_level0 == (0.25, 0.25)
    assert slide.levels == ((1000, 800), (250, 200))
    assert np.abs(slide.read(whole(slide)) - shrunk(pixels, 2).astype(int)).mean() < 3


def test_hamamatsu(shared_data: Path) -> None:
    slide = Slide.open(entry(shared_data / "slides" / "test3-DAPI-2-387.ndpi"))
    assert slide.size == (3968, 4864)
    assert slide.mpp == pytest.approx(2 * 0.228, abs=1e-3)
    assert len(slide.levels) == 4


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_plain_images_are_read_with_the_fallback_pixel_size(tmp_path: Path, suffix: str) -> None:
    pixels = scene(600, 400, (0.25, 0.25))
    path = tmp_path / f"crop{suffix}"
    if suffix == ".tif":
        write_tiff(path, pixels, tile_px=None)
    else:
        Image.fromarray(pixels).save(path, dpi=(72, 72), quality=98)
    slide = Slide.open(entry(path, fallback_mpp=0.25), 0.5)
    assert not slide.calibrated
    assert np.abs(slide.read(whole(slide)) - shrunk(pixels, 2).astype(int)).mean() < 2
    with pytest.raises(SlideError, match=rf"crop{suffix} has no pixel size.*--mpp"):
        Slide.open(entry(path))


def test_transparency_is_left_out(tmp_path: Path) -> None:
    pixels = scene(300, 200, (0.5, 0.5))
    alpha = np.full((200, 300, 1), 255, np.uint8)
    Image.fromarray(np.concatenate([pixels, alpha], axis=2)).save(tmp_path / "a.png")
    slide = Slide.open(entry(tmp_path / "a.png", mpp=(0.5, 0.5)))
    np.testing.assert_array_equal(slide.read(whole(slide)), pixels)


def test_halves_are_rounded_up(tmp_path: Path) -> None:
    chequered = (254 + np.indices((40, 60)).sum(axis=0) % 2).astype(np.uint8)
    Image.fromarray(np.stack([chequered] * 3, axis=-1)).save(tmp_path / "a.png")
    slide = Slide.open(entry(tmp_path / "a.png", mpp=(0.25, 0.25)))
    assert (slide.read(whole(slide)) == 255).all()


def test_pixel_size_is_qupaths_then_the_files_then_the_fallback(tmp_path: Path) -> None:
    pixels = scene(300, 200, (0.25, 0.25))
    path = write_tiff(tmp_path / "a.tif", pixels, (0.25, 0.25))
    dpi_72 = write_tiff(tmp_path / "b.tif", pixels, (352.8, 352.8))
    corrected = entry(path, mpp=(0.3, 0.3), fallback_mpp=0.4)
    assert Slide.open(corrected).mpp_level0 == (0.3, 0.3)
    assert Slide.open(entry(path, fallback_mpp=0.4)).mpp_level0 == pytest.approx((0.25, 0.25))
    assert Slide.open(entry(dpi_72, fallback_mpp=0.4)).mpp_level0 == (0.4, 0.4)
    assert Slide.open(entry(path, fallback_mpp=0.4)).calibrated
    with pytest.raises(SlideError, match=r"b\.tif has a pixel size of 352\.8 µm.*--mpp"):
        Slide.open(entry(dpi_72))


def test_a_pixel_size_that_cannot_be_is_refused(tmp_path: Path) -> None:
    """QuPath measures with what it shows, and what is given with --mpp is meant."""
    pixels = scene(300, 200, (0.25, 0.25))
    path = write_tiff(tmp_path / "a.tif", pixels, (0.25, 0.25))
    dpi_72 = write_tiff(tmp_path / "b.tif", pixels, (352.8, 352.8))
    message = r"a\.tif has a pixel size of 5 x 6 µm in QuPath, .*, and of 0\.25 µm in its file: set"
    with pytest.raises(SlideError, match=message):
        Slide.open(entry(path, mpp=(5.0, 6.0), fallback_mpp=0.5))
    saved = entry(dpi_72, mpp=(352.8, 352.8))  # as QuPath reads it from the file
    assert Slide.open(replace(saved, fallback_mpp=0.5)).mpp_level0 == (0.5, 0.5)
    with pytest.raises(
        SlideError, match=r"b\.tif has .* 352\.8 µm, which cannot be: pass --mpp .* QuPath"
    ):
        Slide.open(saved)
    message = r"b\.tif has .* the given one of 10 µm cannot be: give one from 0\.05 to 4\.0 µm"
    with pytest.raises(SlideError, match=message):
        Slide.open(replace(saved, fallback_mpp=10.0))


def test_bounds_are_subtracted_as_qupath_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = scene(600, 400, (0.5, 0.5))
    path = write_tiff(tmp_path / "a.tif", pixels, (0.5, 0.5), (1, 2))
    bounds = {"x": 101, "y": 50, "width": 300, "height": 200}
    parse = TiffSlide.properties.func  # type: ignore[attr-defined]
    with_bounds = {f"tiffslide.bounds-{name}": value for name, value in bounds.items()}
    monkeypatch.setattr(TiffSlide, "properties", property(lambda self: parse(self) | with_bounds))
    cropped = Slide.open(entry(path))
    assert cropped.size == (300, 200)
    np.testing.assert_array_equal(cropped.read(whole(cropped)), pixels[50:250, 101:401])
    assert Slide.open(entry(path, use_bounds=False)).size == (600, 400)
    assert Slide.open(entry(path, size=(600, 400))).size == (600, 400)  # as QuPath saved it
    coarse = Slide.open(entry(path), 1.0)  # half a pixel of the second level before the origin
    expected = area_mean(pixels[50:250, 101:401], coarse.shape, 2)
    assert np.abs(coarse.read(whole(coarse)) - expected).mean() < 1


def test_another_image_than_qupath_saved(sample_project: Path) -> None:
    path = sample_project / "CMU-1-Small-Region.svs"
    with pytest.raises(SlideError, match="2220 x 2967 px, but QuPath saved 1000 x 2967"):
        Slide.open(entry(path, size=(1000, 2967)))


def test_a_pickled_slide_is_small_and_reads_the_same(sample_project: Path) -> None:
    slide = Slide.open(entry(sample_project / "CMU-1-Small-Region.svs"))
    boxes = [Box(r, c, r + 300, c + 300) for r in range(0, 2600, 400) for c in range(0, 1900, 400)]
    expected = [slide.read(box) for box in boxes]
    sent = pickle.dumps(slide)
    assert len(sent) < 1000
    copy = pickle.loads(sent)
    with ThreadPoolExecutor(8) as threads:
        for got, pixels in zip(threads.map(copy.read, boxes), expected, strict=True):
            np.testing.assert_array_equal(got, pixels)


def test_another_machine_may_have_another_file_there(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", scene(300, 300, (0.5, 0.5)), (0.5, 0.5))
    slide, file = Slide.open(entry(path)), slide_signature(path)
    os.utime(path, ns=(1, 1))  # as copies have it
    slide.check_same(file)
    slide.check_same(FileSignature(bytes=file.bytes, modified_ns=1))  # of an earlier version
    with pytest.raises(SlideError, match=rf"a.tif: .* has {file.bytes} bytes, not 7: copy it"):
        slide.check_same(FileSignature(bytes=7, modified_ns=1))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(SlideError, match=r"a.tif: .* has another content: copy it there again"):
        slide.check_same(file)
    path.unlink()
    with pytest.raises(SlideError, match=r"a.tif is not at .*, as seen from .*: bring it back"):
        slide.check_same(file)


@pytest.mark.skipif(os.name == "nt", reason="no name has a colon there")
def test_a_path_that_tiffslide_takes_for_two_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "stain::HE"
    folder.mkdir()
    path = write_tiff(folder / "a.tif", scene(300, 300, (0.5, 0.5)), (0.5, 0.5))
    advice = "rename the folder or file that has :: in its name"  # to copy it again does not help
    with pytest.raises(SlideError, match=rf"a\.tif cannot be read: {advice}$"):
        Slide.open(entry(path))
    assert Slide.open(entry(path.rename(tmp_path / "a:HE.tif"))).size == (300, 300)


def test_pixels_for_which_there_is_no_memory_are_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damaged ones are left out of the overview, of training and of the nuclei."""
    path = write_tiff(tmp_path / "a.tif", scene(300, 300, (0.5, 0.5)), (0.5, 0.5))
    slide = Slide.open(entry(path))

    def full(*_: object) -> None:
        raise MemoryError("Unable to allocate 5 MiB")

    monkeypatch.setattr(TiledPage, "decoded", full)
    expected = r"too little memory to read a.tif \(Unable .* 5 MiB\): close other programs, or"
    for read in (lambda: slide.overview(8.0), lambda: slide.read(Box(0, 0, 99, 99))):
        with pytest.raises(SlideError, match=expected) as found:
            read()
        assert not isinstance(found.value, DamagedError)


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() == 0, reason="root may read all")
def test_another_user_may_not_read_a_slide(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", scene(300, 300, (0.5, 0.5)), (0.5, 0.5))
    slide = Slide.open(entry(path))
    path.chmod(0)
    os.utime(path, ns=(1, 1))  # it is opened again
    with pytest.raises(SlideError, match=r"may not be read by the user of .*: give that user the"):
        slide.check_same(FileSignature(bytes=0, modified_ns=0))


def test_a_slide_without_permission_is_told_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiff(tmp_path / "a.tif", scene(300, 300, (0.5, 0.5)), (0.5, 0.5))

    def refuse(*_: object) -> None:  # root may read all
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("patchcl_qupath.slides.slide.open_pyramid", refuse)
    with pytest.raises(SlideError, match=r"a\.tif may not be read from here: ask for the perm"):
        Slide.open(entry(path))


def test_a_process_that_only_opens_slides_decodes_in_two_threads(tmp_path: Path) -> None:
    """And importing the module that opens them does not change the environment."""
    path = tmp_path / "strips.tif"  # tiles are decoded by who reads them
    tifffile.imwrite(path, scene(300, 200, (0.5, 0.5)), photometric="rgb", rowsperstrip=50)
    program = """if True:
        import os, pathlib, sys
        before = dict(os.environ)
        from patchcl_qupath.slides import pyramid
        assert dict(os.environ) == before
        level = pyramid.open_pyramid(pathlib.Path(sys.argv[1])).levels[0]
        print(level.pixels.stored.store._maxworkers)
    """
    without = {k: v for k, v in os.environ.items() if k != "TIFFSLIDE_NUM_DECODE_THREADS"}
    command = [sys.executable, "-c", program, path]
    done = subprocess.run(command, env=without, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("2\n", "")


def test_many_slides_one_after_another(tmp_path: Path) -> None:
    slides = []
    for i in range(9):  # more than stay open
        pixels = np.full((80, 100, 3), 20 * i + 40, np.uint8)
        slides.append(Slide.open(entry(write_tiff(tmp_path / f"{i}.tif", pixels, (0.5, 0.5)))))
    for i, slide in enumerate(slides):
        assert (slide.read(whole(slide)) == 20 * i + 40).all()


def test_a_file_is_closed_after_its_last_reader(tmp_path: Path) -> None:
    pixels = scene(400, 300, (0.5, 0.5))
    paths = [write_tiff(tmp_path / f"{i}.tif", pixels, (0.5, 0.5)) for i in range(9)]
    level = open_pyramid(paths[0]).levels[0]
    for path in paths[1:]:
        open_pyramid(path)
    np.testing.assert_array_equal(level.pixels[:], pixels)
    del level  # a file that nobody closes is a ResourceWarning, which fails the test


@pytest.mark.parametrize("kind", ["png", "bmp", "one chunk"])
def test_images_that_are_held_in_memory_are_few(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Each has up to 0.5 GB, in each process; of others, as many are open as before."""
    pixels = scene(200, 100, (0.5, 0.5))
    monkeypatch.setattr(pyramid, "MAX_HELD_BYTES", int(2.5 * pixels.nbytes))
    pyramid.forget_pyramids()
    in_parts = write_tiff(tmp_path / "a.tif", pixels, (0.5, 0.5))
    tiled, alive = open_pyramid(in_parts), []
    for i in range(6):
        path = tmp_path / f"{i}.{'tif' if kind == 'one chunk' else kind}"
        if kind == "one chunk":
            write_tiff(path, pixels, (0.5, 0.5), tile_px=208)
        else:
            Image.fromarray(pixels).save(path)
        alive.append(weakref.ref(open_pyramid(path).levels[0]))
        open_pyramid(path)
    gc.collect()
    assert [reference() is not None for reference in alive] == [False] * 4 + [True] * 2
    assert open_pyramid(in_parts) is tiled
    monkeypatch.setattr(pyramid, "MAX_HELD_BYTES", 1)  # the last one may hold more
    assert open_pyramid(path) is open_pyramid(path)
    gc.collect()
    assert [reference() is not None for reference in alive] == [False] * 5 + [True]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unreadable.svs", "cannot be read"),
        ("unopenable.tiff", "cannot be read"),
        ("cells.ome.tif", "cannot be read.*SYX.*OME-TIFF"),
        ("kidney-48-5.tif", "no pixel size.*--mpp.*QuPath"),
        ("boxes.tiff", "352.8 µm.*--mpp.*QuPath"),
        ("not-there.svs", "is not at .*QuPath"),
    ],
)
def test_errors_of_unusable_files_have_a_reason_and_advice(
    shared_data: Path, name: str, reason: str
) -> None:
    with pytest.raises(SlideError, match=f"(?s)^{re.escape(name)} .*{reason}") as error:
        Slide.open(entry(shared_data / "slides" / name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mode", ["L", "I;16", "CMYK"])
def test_images_that_are_not_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (64, 64)).save(path)
    with pytest.raises(SlideError, match="not RGB"):
        Slide.open(entry(path, fallback_mpp=0.5))


@pytest.mark.parametrize("channels", [3, 4])
def test_a_png_of_16_bits_is_refused_as_a_tiff_is(tmp_path: Path, channels: int) -> None:
    pixels = np.full((64, 64, channels), 3000, np.uint16)  # of 12 bits
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(pixels))
    tifffile.imwrite(tmp_path / "a.tif", pixels, photometric="rgb", metadata=None)
    for name in ("a.png", "a.tif"):
        with pytest.raises(SlideError, match=r"not 8-bit RGB: .*16.*OME-TIFF \(rendered RGB\)"):
            Slide.open(entry(tmp_path / name, fallback_mpp=0.5))


def test_images_that_are_cut_off(tmp_path: Path, sample_project: Path) -> None:
    content = (sample_project / "CMU-1-Small-Region.svs").read_bytes()
    svs, png = tmp_path / "cut.svs", tmp_path / "cut.png"
    svs.write_bytes(content[: len(content) * 6 // 10])
    Image.fromarray(scene(300, 200, (0.5, 0.5))).save(tmp_path / "whole.png")
    png.write_bytes((tmp_path / "whole.png").read_bytes()[:9000])
    for path in (svs, png):
        with pytest.raises(SlideError, match=f"{path.name} cannot be read"):
            Slide.open(entry(path, fallback_mpp=0.5))


def test_an_unknown_codec_is_an_error_when_the_slide_is_opened(tmp_path: Path) -> None:
    path = write_tiff(tmp_path / "a.tif", scene(300, 200, (0.5, 0.5)), (0.5, 0.5))
    with TiffFile(path, mode="r+b") as tiff:
        tiff.pages[0].tags["Compression"].overwrite(52479)
    with pytest.raises(SlideError, match=r"a\.tif cannot be read .*52479.*OME-TIFF"):
        Slide.open(entry(path))


def test_pixels_that_are_damaged_are_not_read_as_black(
    tmp_path: Path, sample_project: Path
) -> None:
    content = bytearray((sample_project / "CMU-1-Small-Region.svs").read_bytes())
    content[400_000:500_000] = bytes(100_000)  # the middle of the JPEG tiles
    path = tmp_path / "a.svs"
    path.write_bytes(content)
    slide = Slide.open(entry(path))
    with pytest.raises(SlideError, match=r"a\.svs cannot be read"):
        slide.read(whole(slide))
    overview = slide.overview(8.0)
    assert 0 < overview.damaged.mean() < 0.2
    assert (overview.pixels[overview.damaged] == 128).all()


def test_an_image_with_a_problem_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a rotated view"):
        Slide.open(entry(tmp_path / "a.svs", problem="a.svs is a rotated view"))


def write_part(path: Path, pixels: NDArray[np.uint8], xml: str, *, is_big: bool) -> None:
    tifffile.imwrite(
        path,
        pixels,
        photometric="rgb",
        tile=(64, 64),
        compression="deflate",
        description=xml.encode(),
        metadata=None,
        bigtiff=is_big,
        byteorder=">" if is_big else "<",
    )


@pytest.mark.parametrize("is_big", [False, True])
def test_an_ome_tiff_is_known_by_all_files_that_it_names(tmp_path: Path, is_big: bool) -> None:
    """But not by a file whose name it had before it was renamed."""
    first, second = scene(200, 128, (0.5, 0.5)), scene(300, 128, (0.5, 0.5))
    image = (
        '<Image ID="Image:{0}"><Pixels ID="Pixels:{0}" DimensionOrder="XYCZT" Type="uint8" '
        'SizeX="{1}" SizeY="128" SizeC="3" SizeZ="1" SizeT="1" PhysicalSizeX="0.5" '
        'PhysicalSizeY="0.5"><Channel ID="C:{0}" SamplesPerPixel="3"/><TiffData IFD="0" '
        'PlaneCount="1"><UUID FileName="{2}">urn:uuid:{3}</UUID></TiffData></Pixels></Image>'
    )
    images = image.format(0, 200, "before.ome.tif", 1) + image.format(
        1, 300, "b &amp; c.ome.tif", 2
    )
    ome = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:{}">{}</OME>'
    )
    path, other = tmp_path / "a.ome.tif", tmp_path / "b & c.ome.tif"
    write_part(path, first, ome.format(1, images), is_big=is_big)
    write_part(other, second, ome.format(2, images), is_big=is_big)
    (tmp_path / "before.ome.tif").write_bytes(b"of another slide")
    slide = Slide.open(entry(path, series=1))
    np.testing.assert_array_equal(slide.read(whole(slide)), second)
    assert [*slide_files(path)] == [path, other]
    before, stat = slide_signature(path), other.stat()
    write_part(other, np.ascontiguousarray(second[::-1]), ome.format(2, images), is_big=is_big)
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not slide_signature(path).has_content_of(before)
    (tmp_path / "before.ome.tif").unlink()
    other.unlink()
    assert [*slide_files(path)] == [path]


@pytest.mark.parametrize(
    "content", [b"", b"II", b"II*\0\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff", b"MM\0+" * 5]
)
def test_a_damaged_tiff_names_no_other_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.ome.tif"
    path.write_bytes(content)
    assert [*slide_files(path)] == [path]


@pytest.mark.parametrize("mark", [{"st_file_attributes": 0x400020}, {"st_flags": 0x40000000}])
def test_a_slide_in_a_cloud_is_not_downloaded_to_see_whether_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: dict[str, int]
) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes(b"pixels")
    whole = slide_signature(path)
    assert signature_without_download(path) == whole
    stat = path.stat()
    of_cloud = SimpleNamespace(st_size=stat.st_size, st_mtime_ns=stat.st_mtime_ns, **mark)
    monkeypatch.setattr(signature, "slide_files", lambda _: {path: of_cloud})
    monkeypatch.setattr(Path, "open", lambda *_: pytest.fail("it is downloaded"))
    found = signature_without_download(path)
    assert found.sample is None
    assert found.is_of(whole)
