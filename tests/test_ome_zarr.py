"""OME-Zarr: pixels, pixel size and levels are those that were written; projects hold folders."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import zarr
from click.testing import CliRunner
from slides import check_boxes, scene, shrunk, tissue, whole, write_ome_zarr
from zarr.codecs import GzipCodec
from zarr.storage import LocalStore

from patchcl_qupath.cli import main
from patchcl_qupath.datatypes import Box, ImageEntry
from patchcl_qupath.errors import DamagedError, SlideError
from patchcl_qupath.project import open_project
from patchcl_qupath.slides.signature import slide_signature
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.storage import files

MPP = (0.25, 0.25)


def opened(path: Path, mpp: float = 0.5, **known: Any) -> Slide:
    return Slide.open(ImageEntry("1", path.name, path, **known), mpp)


@pytest.fixture
def chunks_read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each chunk was fetched, as 'level/0/row/col'."""
    counter: Counter[str] = Counter()
    get = LocalStore.get

    async def counting(self: LocalStore, key: str, *args: Any, **kwargs: Any) -> Any:
        if re.fullmatch(r"\d+(/c)?(/\d+)+", key):
            counter[key] += 1
        return await get(self, key, *args, **kwargs)

    monkeypatch.setattr(LocalStore, "get", counting)
    return counter


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["cyx", "tczyx", "yxc"])
def test_pixels_and_pixel_size_are_those_that_were_written(
    tmp_path: Path, version: str, axes: str
) -> None:
    pixels = scene(403, 301, MPP)
    path = write_ome_zarr(
        tmp_path / "a.ome.zarr", pixels, MPP, (1, 2, 4), version=version, axes=axes
    )
    slide = opened(path, 0.25)
    assert slide.levels == ((403, 301), (201, 150), (100, 75))
    assert slide.mpp_level0 == MPP
    assert slide.calibrated
    np.testing.assert_array_equal(slide.read(whole(slide)), pixels)
    coarse = opened(path, 0.5)
    assert coarse.downsample == (2, 2)
    np.testing.assert_array_equal(coarse.read(Box(0, 0, 150, 201)), shrunk(pixels, 2)[:150, :201])


def test_shards_are_read_by_their_chunks(tmp_path: Path) -> None:
    pixels = scene(500, 300, MPP)
    pixels[256:] = 255
    path = write_ome_zarr(
        tmp_path / "a.zarr", pixels, MPP, (1, 2), version="0.5", chunk_px=32, shard_px=128
    )
    shutil.rmtree(path / "1" / "c" / "0" / "0")  # the first row of shards, and of level 0 ...
    shutil.rmtree(path / "0" / "c" / "0" / "2")  # ... the last one
    slide = opened(path, 0.25)
    np.testing.assert_array_equal(slide.read(whole(slide)), pixels)
    coarse = opened(path, 0.5)
    got = coarse.read(Box(0, 0, 120, 250))
    np.testing.assert_allclose(got, shrunk(pixels, 2)[:120], atol=1)  # of halves


@pytest.mark.parametrize(
    ("unit", "factor"), [("micrometer", 1), ("nanometer", 1e-3), ("millimeter", 1e3), ("", None)]
)
def test_the_pixel_size_is_in_the_unit_of_the_axes(
    tmp_path: Path, unit: str, factor: float | None
) -> None:
    mpp = (0.25, 0.5)
    path = write_ome_zarr(
        tmp_path / "a.zarr",
        scene(200, 100, mpp),
        mpp if factor is None else (mpp[0] / factor, mpp[1] / factor),
        unit=unit,
    )
    if factor is None:
        with pytest.raises(SlideError, match=r"a\.zarr has no pixel size.*--mpp"):
            opened(path)
        assert not opened(path, fallback_mpp=0.25).calibrated
    else:
        assert opened(path).mpp_level0 == pytest.approx(mpp)


def edited(path: Path, **changes: Any) -> Path:
    """An OME-Zarr whose image, in the metadata, has other values."""
    group = zarr.open_group(str(path))
    image = group.attrs.asdict()["multiscales"][0]
    group.attrs.update({"multiscales": [{**image, **changes}]})
    return path


def test_without_transformations_levels_are_placed_by_their_size(tmp_path: Path) -> None:
    """As in the first versions, which name the axes only, or not even these."""
    pixels = scene(401, 302, MPP)
    datasets = [{"path": "0"}, {"path": "1"}]
    for axes in (None, list("tczyx")):
        path = write_ome_zarr(tmp_path / "a.zarr", pixels, MPP, (1, 4), axes="tczyx")
        edited(path, datasets=datasets, axes=axes)
        slide = opened(path, 1.0, fallback_mpp=0.25)
        np.testing.assert_array_equal(slide.read(whole(slide)), shrunk(pixels, 4))


def test_a_ratio_of_sizes_is_no_scale(tmp_path: Path) -> None:
    """Level 2 is a quarter of level 0, but for what did not fit: its scale is not 4.03."""
    pixels = scene(403, 301, MPP)
    path = write_ome_zarr(tmp_path / "a.zarr", pixels, MPP, (1, 4), axes="yxc")
    datasets = zarr.open_group(str(path)).attrs.asdict()["multiscales"][0]["datasets"]
    ratio = [MPP[1] * 301 / 75, MPP[0] * 403 / 100, 1.0]
    datasets[1]["coordinateTransformations"] = [{"type": "scale", "scale": ratio}]
    slide = opened(edited(path, datasets=datasets), 1.0)
    np.testing.assert_array_equal(slide.read(Box(0, 0, 75, 100)), shrunk(pixels, 4)[:75, :100])


def test_levels_that_begin_elsewhere_are_left_out(tmp_path: Path) -> None:
    pixels = scene(400, 300, MPP)
    path = write_ome_zarr(tmp_path / "a.zarr", pixels, MPP, (1, 2, 4))
    datasets = zarr.open_group(str(path)).attrs.asdict()["multiscales"][0]["datasets"]
    # Centres of the first px, as ngff-zarr writes them; then a level that is shifted by 10 of its.
    for number, shift in ((1, 0.125), (2, 10.0)):
        datasets[number]["coordinateTransformations"].append(
            {"type": "translation", "translation": [0, shift, shift]}
        )
    slide = opened(edited(path, datasets=datasets))
    assert slide.levels == ((400, 300), (200, 150))


@pytest.mark.parametrize("mpp", [0.25, 0.35, 0.5, 1.1])
def test_a_pixel_is_the_same_in_whichever_box_it_is_read(tmp_path: Path, mpp: float) -> None:
    path = write_ome_zarr(tmp_path / "a.zarr", scene(803, 611, MPP), MPP, (1, 2, 4))
    slide = opened(path, mpp)
    check_boxes(slide)


def test_reads_each_chunk_once_from_the_coarsest_level_that_is_fine_enough(
    tmp_path: Path, chunks_read: Counter[str]
) -> None:
    path = write_ome_zarr(tmp_path / "a.zarr", scene(1500, 1200, MPP), MPP, (1, 4))
    slide = opened(path, 1.0)
    assert sum(chunks_read.values()) < 20  # to open it, few are read
    chunks_read.clear()
    slide.read(Box(70, 70, 180, 200))
    assert set(chunks_read.values()) == {1}
    expected = {f"1/{c}/{row}/{col}" for c in range(3) for row in (1, 2) for col in (1, 2, 3)}
    assert set(chunks_read) == expected
    chunks_read.clear()
    slide.thumbnail(8.0)
    assert set(chunks_read.values()) == {1}
    assert len(chunks_read) == 3 * 5 * 6


@pytest.mark.parametrize("fill", [0, 255])
def test_missing_chunks_are_drawn_from_a_finer_level_and_else_glass(
    tmp_path: Path, fill: int
) -> None:
    pixels = scene(400, 300, MPP)
    pixels[64:128, 128:192] = 255
    path = write_ome_zarr(tmp_path / "a.zarr", pixels, MPP, (1, 2), fill=fill)
    for channel in "012":
        (path / "0" / channel / "1" / "2").unlink(missing_ok=True)
        (path / "1" / channel / "1" / "1").unlink()
        (path / "1" / channel / "0" / "0").unlink()
    fine, coarse = opened(path, 0.25), opened(path, 0.5)
    np.testing.assert_array_equal(fine.read(whole(fine)), pixels)
    np.testing.assert_array_equal(fine.read(Box(100, 130, 120, 150)), pixels[100:120, 130:150])
    expected = shrunk(pixels, 2)
    np.testing.assert_allclose(coarse.read(whole(coarse)), expected, atol=1)  # of halves


@pytest.mark.parametrize("unscanned", [0, 255, 243])
def test_a_chunk_that_never_arrived_is_damaged_and_one_of_glass_is_missing(
    tmp_path: Path, unscanned: int
) -> None:
    """As a coarser level shows; so what is lost of an incomplete copy fails, and is reported."""
    pixels = tissue(512, 512)
    pixels[:128, :256] = unscanned
    path = write_ome_zarr(tmp_path / "a.zarr", pixels, MPP, (1, 2, 4))
    for channel in "012":
        for row, col in ((0, 1), (1, 2), (5, 1), (7, 7)):
            (path / "0" / channel / str(row) / str(col)).unlink(missing_ok=True)
        (path / "1" / channel / "2" / "0").unlink()  # of what is lost: the next level tells
        for number, place in ((1, "3"), (2, "1")):  # missing in all levels
            (path / str(number) / channel / place / place).unlink()
    slide = opened(path, 0.25)
    assert (slide.read(Box(0, 64, 64, 128)) == 255).all()
    assert (slide.read(Box(64, 128, 128, 192)) == 255).all()
    assert (slide.read(Box(448, 448, 512, 512)) == 255).all()
    np.testing.assert_array_equal(slide.read(Box(128, 0, 320, 512)), pixels[128:320])
    with pytest.raises(DamagedError, match=r"a chunk is missing where a coarser .*copy the file"):
        slide.read(Box(330, 80, 340, 90))


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_copy_without_any_chunk_of_level_0_is_no_glass(tmp_path: Path, version: str) -> None:
    path = write_ome_zarr(tmp_path / "a.zarr", scene(400, 300, MPP), MPP, (1, 2), version=version)
    chunks = path / "0" / ("c" if version == "0.5" else "")
    for channel in "012":
        shutil.rmtree(chunks / channel)
    with pytest.raises(SlideError, match=r"cannot be read \(it holds no pixels\): .*copy the file"):
        opened(path)
    (chunks / "0" / "0").mkdir(parents=True)  # as of a copy that was stopped
    with pytest.raises(SlideError, match="it holds no pixels"):
        opened(path)


@pytest.mark.parametrize("fill", [0, 255])
@pytest.mark.parametrize("index_location", ["start", "end"])
def test_chunks_that_are_missing_in_a_shard_are_missing(
    tmp_path: Path, fill: int, index_location: str
) -> None:
    """zarr leaves out chunks that hold the fill value alone."""
    pixels = scene(400, 300, MPP)
    pixels[64:96, 160:192] = 255
    path = write_ome_zarr(
        tmp_path / "a.zarr",
        pixels,
        MPP,
        (1, 2),
        version="0.5",
        chunk_px=32,
        shard_px=128,
        index_location=index_location,
        fill=fill,
    )
    zarr.open_array(str(path / "0"))[:, 64:96, 160:192] = fill
    zarr.open_array(str(path / "1"))[:, 96:128, 32:64] = fill
    fine, coarse = opened(path, 0.25), opened(path, 0.5)
    expected = shrunk(pixels, 2)
    np.testing.assert_allclose(coarse.read(whole(coarse)), expected, atol=1)  # of halves
    np.testing.assert_array_equal(fine.read(whole(fine)), pixels)
    np.testing.assert_array_equal(fine.read(Box(80, 150, 90, 170)), pixels[80:90, 150:170])


@pytest.mark.parametrize("kept", [0, 10, -1])
def test_a_shard_that_is_cut_is_damaged_not_missing(tmp_path: Path, kept: int) -> None:
    path = write_ome_zarr(
        tmp_path / "a.zarr", scene(400, 300, MPP), MPP, version="0.5", chunk_px=32, shard_px=128
    )
    shard = path / "0" / "c" / "0" / "1" / "1"
    shard.write_bytes(shard.read_bytes()[:kept])
    slide = opened(path, 0.25)
    slide.read(Box(0, 0, 128, 400))
    with pytest.raises(SlideError, match=r"^a\.zarr cannot be read "):
        slide.read(Box(130, 130, 140, 140))


def test_a_damaged_chunk_is_an_error_where_it_is_read(tmp_path: Path) -> None:
    path = write_ome_zarr(tmp_path / "a.zarr", scene(400, 300, MPP), MPP)
    (path / "0" / "0" / "1" / "2").write_bytes(b"no chunk at all")
    slide = opened(path, 0.25)
    slide.read(Box(0, 0, 64, 400))
    with pytest.raises(SlideError, match=r"^a\.zarr cannot be read .*copy the file again$"):
        slide.read(Box(60, 0, 70, 400))


@pytest.mark.parametrize(
    ("version", "compressor"),
    [("0.4", numcodecs.GZip()), ("0.4", numcodecs.BZ2()), ("0.5", GzipCodec())],
    ids=["gzip", "bz2", "gzip of version 3"],
)
def test_damage_that_a_codec_takes_for_an_error_of_the_system(
    tmp_path: Path, version: str, compressor: Any
) -> None:
    pixels = scene(400, 300, MPP)
    path = write_ome_zarr(
        tmp_path / "a.zarr", pixels, MPP, (1, 2), version=version, compressor=compressor
    )
    prefix = "c/" if version == "0.5" else ""
    for chunk in ("0/{}1/1/2", "1/{}0/1/1"):
        file = path / chunk.format(prefix)
        file.write_bytes(bytes(file.stat().st_size))
    coarse, fine = opened(path, 0.5), opened(path, 0.25)
    expected = shrunk(pixels, 2)
    got = coarse.read(Box(64, 64, 128, 128)), expected[64:128, 64:128]
    np.testing.assert_allclose(*got, atol=1)  # of halves
    np.testing.assert_array_equal(fine.read(Box(0, 0, 64, 400)), pixels[:64])
    with pytest.raises(DamagedError, match=r"^a\.zarr cannot be read "):
        fine.read(Box(64, 100, 128, 200))
    assert 0 < fine.overview(0.25).damaged.mean() < 0.05


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(errno.EIO, "Input/output error"), "Input/output"), (MemoryError(), "too little")],
    ids=["disk", "memory"],
)
def test_a_chunk_that_is_not_read_is_not_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    """It would be drawn from the finer level, whose averages may be others."""
    path = write_ome_zarr(tmp_path / "a.zarr", scene(400, 300, MPP), MPP, (1, 2))
    slide, get = opened(path, 0.5), LocalStore.get

    async def failing(self: LocalStore, key: str, *args: Any, **kwargs: Any) -> Any:
        if key == "1/0/1/1":
            raise error
        return await get(self, key, *args, **kwargs)

    monkeypatch.setattr(LocalStore, "get", failing)
    with pytest.raises(SlideError, match=reason) as found:
        slide.read(whole(slide))
    assert not isinstance(found.value, DamagedError)


def test_a_chunk_that_cannot_be_looked_up_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be read as glass, as a disk fails for a moment."""
    slide = opened(write_ome_zarr(tmp_path / "a.zarr", scene(400, 300, MPP), MPP), 0.25)
    look = Path.stat

    def stat(path: Path, **options: Any) -> os.stat_result:
        if path.parts[-4:] == ("0", "0", "1", "2"):
            raise OSError(errno.EIO, "Input/output error")
        return look(path, **options)

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(SlideError, match="Input/output error"):
        slide.read(Box(60, 0, 70, 400))


@pytest.mark.parametrize("shard_px", [None, 128])
def test_a_chunk_whose_path_is_too_long_for_windows_is_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_px: int | None
) -> None:
    """Windows finds nothing there, and it would be read as glass."""
    version = "0.4" if shard_px is None else "0.5"
    pixels = scene(400, 300, MPP)
    path = tmp_path / "a.zarr"
    write_ome_zarr(path, pixels, MPP, version=version, chunk_px=64, shard_px=shard_px)
    chunk = path / ("0/0/1/2" if shard_px is None else "0/c/0/1/2")
    chunk.unlink()
    slide = opened(path, 0.25)
    slide.read(whole(slide))
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(files, "_LONGEST", len(str(chunk)) - 1)
    with pytest.raises(SlideError, match="too long for Windows: move the slide to a shorter one"):
        slide.read(whole(slide))


def channels(*colours: str) -> dict[str, Any]:
    return {"channels": [{"label": f"of {colour}", "color": colour} for colour in colours]}


def test_channels_of_red_green_and_blue_are_rgb(tmp_path: Path) -> None:
    omero = channels("FF0000", "00ff00", "0000FF")
    path = write_ome_zarr(tmp_path / "a.zarr", scene(200, 100, MPP), MPP, omero=omero)
    assert opened(path).size == (200, 100)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"omero": channels("0000FF", "00FF00", "FF0000")}, "not red, green and blue, but of 00"),
        ({"pixels": scene(200, 100, MPP)[..., :1]}, "not 8-bit RGB: 1 channels of uint8"),
        ({"pixels": np.ones((100, 200, 4), np.uint8)}, "not 8-bit RGB: 4 channels of uint8"),
        ({"pixels": np.ones((100, 200, 3), np.uint16)}, "not 8-bit RGB: 3 channels of uint16"),
        ({"axes": "zyx"}, r"a stack of 3 planes \(axis z\)"),
    ],
)
def test_images_that_are_not_rgb(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    given = {"pixels": scene(200, 100, MPP), "mpp": MPP, **change}
    if given.get("axes") == "zyx":
        path = write_ome_zarr(tmp_path / "a.zarr", **{**given, "axes": "cyx"})
        axes = [{"name": name, "type": "space"} for name in "zyx"]
        edited(path, axes=axes)
    else:
        path = write_ome_zarr(tmp_path / "a.zarr", **given)
    with pytest.raises(SlideError, match=rf"^a\.zarr cannot be read \(.*{reason}.*OME-TIFF"):
        opened(path)


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [({"plate": {}}, "a plate of many wells"), ({}, "no multiscales")],
)
def test_zarr_that_is_no_image(tmp_path: Path, metadata: dict[str, Any], reason: str) -> None:
    zarr.open_group(str(tmp_path / "a.zarr"), mode="w", zarr_format=2, attributes=metadata)
    with pytest.raises(SlideError, match=rf"^a\.zarr cannot be read .*{reason}"):
        opened(tmp_path / "a.zarr")


def test_a_folder_that_is_no_zarr(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="is not at"):
        opened(tmp_path)


def write_several(path: Path, *widths: int) -> Path:
    """A slide as bioformats2raw writes it: each image, its label too, is in a group of its own."""
    root = zarr.open_group(
        str(path), mode="w", zarr_format=2, attributes={"bioformats2raw.layout": 3}
    )
    root.create_group("OME", attributes={"series": [*map(str, range(len(widths)))]})
    for number, width in enumerate(widths):
        write_ome_zarr(path / str(number), scene(width, 100, MPP), MPP)
    return path


def test_the_image_that_is_meant_of_several(tmp_path: Path) -> None:
    path = write_several(tmp_path / "a.zarr", 60, 300)
    assert opened(path).size == (300, 100)
    assert opened(path, size=(60, 100)).size == (60, 100)
    assert opened(path, series=0).size == (60, 100)
    assert opened(path / "0").size == (60, 100)


def test_the_image_that_qupath_shows_of_several(tmp_path: Path) -> None:
    """As of a TIFF: the first slide, unless another one is much larger."""
    path = write_several(tmp_path / "a.zarr", 120, 300)
    assert opened(path).size == (120, 100)
    assert opened(path, series=1).size == (300, 100)
    labelled = write_several(tmp_path / "labelled.zarr", 120, 300)
    edited(labelled / "0", name="Label image")
    assert opened(labelled).size == (300, 100)


def test_a_pickled_slide_reads_the_same(tmp_path: Path) -> None:
    slide = opened(write_ome_zarr(tmp_path / "a.zarr", scene(400, 300, MPP), MPP))
    copy = pickle.loads(pickle.dumps(slide))
    np.testing.assert_array_equal(copy.read(whole(copy)), slide.read(whole(slide)))


def test_the_signature_is_that_of_the_metadata(tmp_path: Path) -> None:
    path = write_ome_zarr(tmp_path / "a.zarr", scene(200, 100, MPP), MPP)
    before = slide_signature(path)
    assert slide_signature(path) == before
    edited(path, name="another")
    assert not slide_signature(path).is_of(before)
    assert opened(path).size == (200, 100)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(
    ("version", "axes", "shard_px"),
    [("0.4", "cyx", None), ("0.5", "tczyx", None), ("0.5", "yxc", 128)],
)
def test_pixels_that_are_changed_in_place_change_the_signature(
    tmp_path: Path, version: str, axes: str, shard_px: int | None, several: bool
) -> None:
    """The metadata are not written anew."""
    path = tmp_path / "a.zarr"
    image = path / "0" if several else path
    if several:
        zarr_format: Any = 3 if version == "0.5" else 2
        attributes: dict[str, Any] = {"bioformats2raw.layout": 3}
        zarr.open_group(str(path), mode="w", zarr_format=zarr_format, attributes=attributes)
    pixels = scene(800, 600, MPP)
    write_ome_zarr(image, pixels, MPP, (1, 2), version=version, axes=axes, shard_px=shard_px)
    before = slide_signature(path)
    assert before.sample is not None
    copy = shutil.copytree(path, tmp_path / "copy.zarr")
    assert slide_signature(copy) == before
    for chunk in (copy / "0").rglob("*"):  # as of a copy whose files have other times
        os.utime(chunk, ns=(1, 1))
    assert slide_signature(copy).sample == before.sample
    array = zarr.open_array(str(image / "0"))
    at = {"y": slice(0, 300), "x": slice(400, 800)}
    array[tuple(at.get(axis, slice(None)) for axis in axes)] = 243
    after = slide_signature(path)
    assert (after.bytes, after.modified_ns) == (before.bytes, before.modified_ns)
    assert not after.is_of(before)


@pytest.mark.parametrize("names", [("0", "1"), ("a", "b")])
@pytest.mark.parametrize("changed", [0, 1])
def test_pixels_of_any_image_of_several_change_the_signature(
    tmp_path: Path, names: tuple[str, str], changed: int
) -> None:
    """Which of them is read depends on the project; they may have any names."""
    path = tmp_path / "a.zarr"
    attributes = {"bioformats2raw.layout": 3}
    root = zarr.open_group(str(path), mode="w", zarr_format=2, attributes=attributes)
    root.create_group("OME", attributes={"series": [*names]})
    for name, side in zip(names, (100, 300), strict=True):
        write_ome_zarr(path / name, scene(side, side, MPP), MPP, (1, 2))
    before = slide_signature(path)
    assert before.sample is not None
    zarr.open_array(str(path / names[changed] / "0"))[:] = 243
    assert not slide_signature(path).is_of(before)
    assert (opened(path, MPP[0], series=changed).read(Box(0, 0, 9, 9)) == 243).all()


def test_pixels_that_are_changed_in_place_are_read(tmp_path: Path) -> None:
    """By the slide that another process has opened, too, and of a level of one chunk."""
    path = write_ome_zarr(tmp_path / "a.zarr", scene(512, 512, MPP), MPP, (1, 8))
    before = opened(path, 4.0)
    old = before.read(whole(before))
    for number in ("0", "1"):
        zarr.open_array(str(path / number))[:] = 100
    after = pickle.loads(pickle.dumps(opened(path, 4.0)))
    assert old.mean() > 150
    np.testing.assert_array_equal(after.read(whole(after)), np.full_like(old, 100))


def test_chunks_that_went_missing_change_the_signature(tmp_path: Path) -> None:
    path = write_ome_zarr(tmp_path / "a.zarr", scene(200, 100, MPP), MPP)
    before = slide_signature(path)
    shutil.rmtree(path / "0" / "1")
    assert not slide_signature(path).is_of(before)


@pytest.mark.skipif(os.name == "nt", reason="no name has a colon there")
@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_folder_of_any_name_is_read(tmp_path: Path, version: str) -> None:
    pixels = scene(200, 100, MPP)
    path = write_ome_zarr(tmp_path / "a.zarr", pixels, MPP, version=version)
    for name in ("stain::HE", "s3:", "file:", "a#b"):
        (tmp_path / name).mkdir()
        moved = path.rename(tmp_path / name / "a.zarr")
        slide = opened(moved, 0.25)
        np.testing.assert_array_equal(slide.read(whole(slide)), pixels)
        path = moved


@pytest.mark.parametrize("uri", ["", "/", "/.zattrs"])
def test_a_project_of_an_ome_zarr(tmp_path: Path, uri: str) -> None:
    path = write_ome_zarr(tmp_path / "slides" / "a.ome.zarr", scene(400, 300, MPP), MPP)
    result = CliRunner().invoke(main, ["init", str(tmp_path / "project"), str(path)])
    assert result.exit_code == 0, result.output
    file = tmp_path / "project" / "project.qpproj"
    content = json.loads(file.read_text())
    builder = content["images"][0]["serverBuilder"]
    builder["uri"] += uri
    # Bio-Formats does not call the channels of a Zarr RGB.
    builder["metadata"] = {
        "width": 400,
        "height": 300,
        "isRGB": False,
        "pixelType": "UINT8",
        "channels": [{"name": f"Channel {i}", "color": c} for i, c in enumerate(RGB)],
    }
    file.write_text(json.dumps(content))
    (found,) = open_project(file, backend="files").images()
    assert (found.problem, found.path, found.name) == (None, path, "a.ome.zarr")
    shutil.move(path, tmp_path / "project" / "a.ome.zarr")  # moved beside the project
    (moved,) = open_project(file, backend="files").images()
    assert moved.path == tmp_path / "project" / "a.ome.zarr"
    assert Slide.open(moved).size == (400, 300)
    builder["metadata"]["channels"][0]["color"] = RGB[2]
    file.write_text(json.dumps(content))
    (other,) = open_project(file, backend="files").images()
    assert "fluorescence" in str(other.problem)


RGB = (-65536, -16711936, -16776961)  # Java's 0xAARRGGBB


@pytest.mark.parametrize("key", ["multiscales", "axes", "datasets", "path", "scale"])
@pytest.mark.parametrize("value", [None, 7, "words", [], {}, [[]], [{"path": "0"}, 7]])
def test_metadata_of_any_kind_are_read_or_refused(tmp_path: Path, key: str, value: Any) -> None:
    path = write_ome_zarr(tmp_path / "a.zarr", scene(200, 100, MPP), MPP)
    metadata = json.loads((path / ".zattrs").read_text())

    def changed(item: Any) -> Any:
        if isinstance(item, list):
            return [changed(inner) for inner in item]
        if isinstance(item, dict):
            return {k: value if k == key else changed(v) for k, v in item.items()}
        return item

    (path / ".zattrs").write_text(json.dumps(changed(metadata)))
    assert slide_signature(path).bytes > 0
    try:
        found = str(opened(path, fallback_mpp=0.25).size)
    except SlideError as error:
        found = str(error)
    assert re.fullmatch(r"\(200, 100\)|a\.zarr cannot be read \(.+\): .*", found)
