"""Tiles and strips of a TIFF, decoded in the reading thread: the same samples as by tifffile."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from slides import scene

from patchcl_qupath.slides.level import Selection
from patchcl_qupath.slides.tiff import open_tiff
from patchcl_qupath.slides.tiled_page import TiffBytes, TiledPage, tiled_pages

SHAPE = (413, 517)  # not of whole tiles
KINDS = {
    "JPEG": {"compression": "jpeg", "compressionargs": {"level": 80}, "photometric": "rgb"},
    "YCbCr with half the chroma": {
        "compression": "jpeg",
        "photometric": "ycbcr",
        "subsampling": (2, 2),
    },
    "deflate with a predictor": {"compression": "deflate", "predictor": 2, "photometric": "rgb"},
    "JPEG 2000": {"compression": "jpeg2000", "photometric": "rgb"},
    "nothing": {"photometric": "rgb"},
}
TILES: dict[str, object] = {"tile": (64, 96)}
STRIPS: dict[str, object] = {"rowsperstrip": 48}  # of the last one, not all rows are in the image
LAYOUTS = [
    *((f"{kind} in tiles", {**options, **TILES}) for kind, options in KINDS.items()),
    *((f"{kind} in strips", {**KINDS[kind], **STRIPS}) for kind in KINDS if kind != "nothing"),
]


def write(path: Path, **options: object) -> Path:
    pixels = scene(SHAPE[1], SHAPE[0], (0.25, 0.25))
    tifffile.imwrite(path, pixels, metadata=None, **options)
    return path


def opened(tiff: tifffile.TiffFile) -> TiledPage:
    pages = tiled_pages(tiff.series[0])
    assert pages is not None
    return pages[0]


@pytest.mark.parametrize(
    "options", [options for _, options in LAYOUTS], ids=[name for name, _ in LAYOUTS]
)
def test_samples_are_those_of_tifffile(tmp_path: Path, options: dict[str, object]) -> None:
    path = write(tmp_path / "a.tif", **options)
    expected = tifffile.imread(path)
    rng = np.random.default_rng(0)
    with tifffile.TiffFile(path) as tiff:
        page = opened(tiff)
        assert page.shape == (*SHAPE, 3)
        np.testing.assert_array_equal(page[:], expected)
        for _ in range(20):
            row0, row1 = np.sort(rng.integers(0, SHAPE[0] + 1, 2)).tolist()
            col0, col1 = np.sort(rng.integers(0, SHAPE[1] + 1, 2)).tolist()
            part = page[row0:row1, col0:col1]
            np.testing.assert_array_equal(part, expected[row0:row1, col0:col1])


@pytest.mark.parametrize("without_pread", [False, True], ids=["at an offset", "as on Windows"])
def test_threads_read_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_pread: bool
) -> None:
    if without_pread:
        monkeypatch.delattr(os, "pread", raising=False)
    path = write(tmp_path / "a.tif", **KINDS["JPEG"], **TILES)
    expected = tifffile.imread(path)
    with tifffile.TiffFile(path) as tiff, ThreadPoolExecutor(8) as threads:
        page = opened(tiff)
        for part in threads.map(lambda row: (row, page[row : row + 70]), range(0, 340, 5)):
            np.testing.assert_array_equal(part[1], expected[part[0] : part[0] + 70])


def test_strips_that_are_not_compressed_are_left_to_tifffile(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", **KINDS["nothing"], **STRIPS)
    with tifffile.TiffFile(path) as tiff:
        assert tiled_pages(tiff.series[0]) is None


@pytest.mark.parametrize("layout", [TILES, STRIPS], ids=["tiles", "strips"])
def test_jpeg_that_the_end_of_the_file_cuts_off_raises(
    tmp_path: Path, layout: dict[str, object]
) -> None:
    """Decoders would draw what is cut off in grey."""
    path = write(tmp_path / "a.tif", **KINDS["JPEG"], **layout)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages.first
        end = page.dataoffsets[-1] + page.databytecounts[-1] // 2
    expected = tifffile.imread(path)
    path.write_bytes(path.read_bytes()[:end])
    pixels = open_tiff(path, Selection()).levels[0].pixels
    np.testing.assert_array_equal(pixels[:384], expected[:384])
    with pytest.raises(ValueError, match=r"the file ends [\d,]+ bytes before"):
        pixels[384:]


def test_a_file_that_ends_too_early_and_one_that_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(b"0123456789")
    file = TiffBytes(path)
    handle = file._file
    assert file.read(4, 3) == b"456"
    assert file.read(8, 5) == b"89"
    assert file.read(80, 5) == b""
    del file
    gc.collect()
    assert handle.closed
