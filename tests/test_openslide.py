"""OpenSlide: the same pixels as by tiffslide, in any box; and formats that it alone reads."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image
from slides import check_boxes, scene, shrunk, whole, write_svs

from patchcl_qupath.config import Config
from patchcl_qupath.datatypes import Box, ImageEntry
from patchcl_qupath.errors import SlideError
from patchcl_qupath.slides import pyramid
from patchcl_qupath.slides.level import Selection
from patchcl_qupath.slides.openslide import one_of_each_slide, open_openslide
from patchcl_qupath.slides.prepare import prepare
from patchcl_qupath.slides.signature import quick_signature, slide_files, slide_signature
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.slides.tiff import open_tiff
from patchcl_qupath.storage.records import FileSignature

openslide = pytest.importorskip("openslide")

ANY = Selection()


def opened(path: Path, mpp: float = 0.5, **known: Any) -> Slide:
    return Slide.open(ImageEntry("1", path.name, path, **known), mpp)


@pytest.fixture
def without_tiffslide(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if tiffslide could not read a slide."""

    def fails(path: Path, selection: Selection) -> None:
        raise ValueError("no such codec")

    monkeypatch.setattr(pyramid, "open_tiff", fails)


def test_the_sample_has_the_same_pixels_as_by_tiffslide(sample_project: Path) -> None:
    path = sample_project / "CMU-1-Small-Region.svs"
    ours, theirs = open_openslide(path, ANY), open_tiff(path, ANY)
    assert [level.scale for level in ours.levels] == [level.scale for level in theirs.levels]
    assert ours.pixel_sizes[0].mpp == theirs.pixel_sizes[0].mpp
    np.testing.assert_array_equal(ours.levels[0].pixels[:, :], theirs.levels[0].pixels[:, :])


def test_levels_of_odd_size_are_those_of_the_file(tmp_path: Path) -> None:
    """Where level 0 has no whole number of px for one of a level, OpenSlide interpolates."""
    path = write_svs(tmp_path / "a.svs", scene(1003, 802, (0.25, 0.25)), 0.25, (1, 2, 4))
    ours, theirs = open_openslide(path, ANY), open_tiff(path, ANY)
    for level, same in zip(ours.levels, theirs.levels, strict=True):
        assert level.scale == same.scale
        difference = np.abs(level.pixels[:, :].astype(int) - same.pixels[:, :])
        assert difference.mean() < 0.5
    np.testing.assert_array_equal(ours.levels[0].pixels[:, :], theirs.levels[0].pixels[:, :])


@pytest.mark.parametrize("mpp", [0.25, 0.35, 0.5, 1.1])
def test_a_pixel_is_the_same_in_whichever_box_it_is_read(
    tmp_path: Path, mpp: float, without_tiffslide: None
) -> None:
    path = write_svs(tmp_path / "a.svs", scene(1003, 802, (0.25, 0.25)), 0.25, (1, 2, 4))
    slide = opened(path, mpp)
    check_boxes(slide)


def test_a_box_is_drawn_without_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_tiffslide: None
) -> None:
    drawn: list[tuple[int, tuple[int, int]]] = []
    read = openslide.OpenSlide.read_region

    def counting(self: Any, location: Any, level: int, size: tuple[int, int]) -> Any:
        drawn.append((level, size))
        return read(self, location, level, size)

    monkeypatch.setattr(openslide.OpenSlide, "read_region", counting)
    slide = opened(write_svs(tmp_path / "a.svs", scene(2000, 1600, (0.25, 0.25)), 0.25), 0.25)
    assert sum(width * height for _, (width, height) in drawn) < 1000
    drawn.clear()
    slide.read(Box(300, 500, 420, 690))
    assert drawn == [(0, (190, 120))]
    drawn.clear()
    slide.thumbnail(8.0)  # each px of one level once
    assert {level for level, _ in drawn} == {1}
    assert sum(width * height for _, (width, height) in drawn) == 500 * 400


def test_a_slide_that_tiffslide_cannot_read(tmp_path: Path, without_tiffslide: None) -> None:
    pixels = scene(600, 400, (0.5, 0.5))
    slide = opened(write_svs(tmp_path / "a.svs", pixels, 0.5))
    assert slide.mpp_level0 == (0.5, 0.5)
    assert np.abs(slide.read(whole(slide)).astype(int) - pixels).mean() < 3


def test_a_tiff_of_no_scanner_is_left_to_tiffslide(tmp_path: Path, without_tiffslide: None) -> None:
    """OpenSlide does not refuse what is not RGB."""
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, scene(300, 200, (0.5, 0.5)), photometric="rgb", tile=(64, 64))
    with pytest.raises(SlideError, match=r"a\.tif cannot be read \(no such codec\)"):
        opened(path, fallback_mpp=0.5)


def test_what_neither_reads_has_the_reason_of_tiffslide(
    tmp_path: Path, without_tiffslide: None
) -> None:
    path = tmp_path / "a.svs"
    path.write_bytes(write_svs(tmp_path / "b.svs", scene(600, 400, MPP), 0.5).read_bytes()[:9000])
    with pytest.raises(SlideError, match=r"a\.svs cannot be read \(no such codec\)"):
        opened(path)


MPP = (0.5, 0.5)


def test_a_damaged_tile_does_not_end_the_others(tmp_path: Path, without_tiffslide: None) -> None:
    """OpenSlide repeats its first error for all regions that are read after it."""
    path = write_svs(tmp_path / "a.svs", scene(900, 700, MPP), 0.5, (1,))
    with tifffile.TiffFile(path) as tiff:
        at, length = tiff.pages.first.dataoffsets[9], tiff.pages.first.databytecounts[9]
    content = bytearray(path.read_bytes())
    content[at : at + length] = bytes(length)
    path.write_bytes(content)
    slide = opened(path)
    damaged, sound = Box(128, 128, 200, 200), Box(400, 400, 600, 600)
    expected = slide.read(sound)

    def read(box: Box) -> NDArray[np.uint8] | str:
        try:
            return slide.read(box)
        except SlideError as error:
            return str(error)

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(read, [damaged, sound] * 10))
    assert {result.split(" (")[0] for result in results[::2]} == {"a.svs cannot be read"}
    for result in results[1::2]:
        np.testing.assert_array_equal(result, expected)


def test_a_pickled_slide_reads_the_same(tmp_path: Path, without_tiffslide: None) -> None:
    slide = opened(write_svs(tmp_path / "a.svs", scene(400, 300, MPP), 0.5))
    copy = pickle.loads(pickle.dumps(slide))
    np.testing.assert_array_equal(copy.read(whole(copy)), slide.read(whole(slide)))


@pytest.mark.parametrize(
    ("name", "format_"),
    [("a.mrxs", "MRXS"), ("a.SCN", "Leica SCN"), ("a.dcm", "DICOM"), ("a.bif", "Ventana BIF")],
)
def test_formats_that_need_openslide_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, format_: str
) -> None:
    monkeypatch.setitem(sys.modules, "openslide", None)  # as if it were not installed
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(
        SlideError,
        match=rf"^{name} cannot be read \({format_} needs OpenSlide\): "
        r"pip install 'patchcl-qupath\[openslide\]'$",
    ):
        opened(tmp_path / name)


def test_a_damaged_file_of_a_format_that_needs_openslide(tmp_path: Path) -> None:
    (tmp_path / "a.mrxs").write_bytes(b"anything")
    with pytest.raises(SlideError, match=r"^a\.mrxs cannot be read \(Unsupported.*OME-TIFF"):
        opened(tmp_path / "a.mrxs")


def write_mrxs(
    path: Path, pixels: NDArray[np.uint8], mpp: float, at: tuple[int, int], levels: int
) -> Path:
    """A MIRAX slide, of 8 x 8 images of 128 px, of which only those of ``pixels`` were scanned.

    These begin at image ``at`` (row, col). Each level is half of the one before it.
    """
    side, across = 128, 8
    slide = np.full((side * across, side * across, 3), 255, np.uint8)
    scanned = np.zeros(slide.shape[:2], bool)
    row, col = at[0] * side, at[1] * side
    area = slice(row, row + pixels.shape[0]), slice(col, col + pixels.shape[1])
    slide[area], scanned[area] = pixels, True
    path.touch()
    folder = path.with_suffix("")
    folder.mkdir()
    data, pages = b"", []
    for level in range(levels):
        concat = 2**level
        images = shrunk(slide, concat) if level else slide
        page = []
        for y in range(0, across, concat):
            for x in range(0, across, concat):
                if not scanned[y * side :, x * side :][: concat * side, : concat * side].any():
                    continue
                image = images[y // concat * side :, x // concat * side :][:side, :side]
                buffer = BytesIO()
                Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
                page.append((y * across + x, len(data), buffer.tell(), 0))
                data += buffer.getvalue()
        pages.append(page)
    (folder / "Data0000.dat").write_bytes(data)
    (folder / "Index.dat").write_bytes(_mrxs_index(b"01.02" + MRXS_ID.encode(), pages))
    zoom = "".join(f"HIER_0_VAL_{i}_SECTION = LEVEL_{i}\n" for i in range(levels))
    sections = "".join(
        f"[LEVEL_{i}]\nOVERLAP_X = 0\nOVERLAP_Y = 0\nMICROMETER_PER_PIXEL_X = {mpp}\n"
        f"MICROMETER_PER_PIXEL_Y = {mpp}\nIMAGE_FORMAT = JPEG\nIMAGE_FILL_COLOR_BGR = 16777215\n"
        f"DIGITIZER_WIDTH = {side}\nDIGITIZER_HEIGHT = {side}\n"
        f"IMAGE_CONCAT_FACTOR = {min(1, i)}\n"
        for i in range(levels)
    )
    (folder / "Slidedat.ini").write_text(
        f"[GENERAL]\nSLIDE_ID = {MRXS_ID}\nIMAGENUMBER_X = {across}\nIMAGENUMBER_Y = {across}\n"
        "OBJECTIVE_MAGNIFICATION = 20\n[HIERARCHICAL]\nHIER_COUNT = 1\nNONHIER_COUNT = 0\n"
        f"INDEXFILE = Index.dat\nHIER_0_NAME = Slide zoom level\nHIER_0_COUNT = {levels}\n"
        f"{zoom}[DATAFILE]\nFILE_COUNT = 1\nFILE_0 = Data0000.dat\n{sections}"
    )
    return path


MRXS_ID = "0123456789ABCDEF"


def _mrxs_index(head: bytes, pages: Sequence[Sequence[tuple[int, ...]]]) -> bytes:
    """The places of images: a table with one record a level, each with one page of images."""
    table = len(head) + 8
    record = table + 4 * len(pages)
    page = record + 8 * len(pages)
    numbers = [table, 0, *(record + 8 * i for i in range(len(pages)))]
    lengths = [8 + 16 * len(images) for images in pages]
    for i in range(len(pages)):
        numbers += [0, page + sum(lengths[:i])]
    for images in pages:
        numbers += [len(images), 0, *(number for image in images for number in image)]
    return head + np.array(numbers, "<i4").tobytes()


@pytest.mark.parametrize("mpp", [0.25, 0.5, 0.8])
def test_mirax_is_cropped_to_its_bounds_and_glass_where_nothing_was_scanned(
    tmp_path: Path, mpp: float
) -> None:
    pixels = scene(512, 256, (0.25, 0.25))
    path = write_mrxs(tmp_path / "a.mrxs", pixels, 0.25, at=(2, 1), levels=3)
    slide = opened(path, mpp)
    assert (slide.size, slide.origin) == ((512, 256), (128, 256))
    assert slide.levels == ((1024, 1024), (512, 512), (256, 256))
    assert slide.mpp_level0 == (0.25, 0.25)
    got = slide.read(whole(slide))
    if mpp != 0.8:
        expected = shrunk(pixels, 2) if mpp == 0.5 else pixels
        assert np.abs(got - expected.astype(int)).mean() < 2
    np.testing.assert_array_equal(slide.read(Box(30, 41, 70, 99)), got[30:70, 41:99])
    around = opened(path, mpp, use_bounds=False)
    assert around.size == (1024, 1024)
    everything = around.read(whole(around))
    px = around.downsample[0]
    assert (everything[: int(250 / px)] > 250).all()
    assert (everything[:, int(650 / px) :] > 250).all()
    assert (around.thumbnail(8.0)[0] == 255).all()


def test_mirax_without_its_folder(tmp_path: Path) -> None:
    path = write_mrxs(tmp_path / "a.mrxs", scene(256, 256, MPP), 0.5, at=(0, 0), levels=1)
    path.with_suffix("").rename(tmp_path / "b")
    with pytest.raises(SlideError, match=r"^a\.mrxs cannot be read"):
        opened(path)


def write_vms(folder: Path, pixels: NDArray[np.uint8]) -> Path:
    """A Hamamatsu VMS of one JPEG, which needs restart markers, and a map of it."""
    folder.mkdir()
    image = Image.fromarray(pixels)
    image.save(folder / "image.jpg", quality=95, subsampling=0, restart_marker_blocks=4)
    height, width = pixels.shape[:2]
    image.resize((width // 8, height // 8)).save(folder / "map.jpg", restart_marker_blocks=2)
    physical = f"PhysicalWidth={width * 250}\nPhysicalHeight={height * 250}\n"  # nm
    (folder / "a.vms").write_text(
        "[Virtual Microscope Specimen]\nNoLayers=1\nNoJpegColumns=1\nNoJpegRows=1\n"
        "ImageFile=image.jpg\nMapFile=map.jpg\nMacroImage=map.jpg\n" + physical
    )
    return folder / "a.vms"


def test_hamamatsu_vms(tmp_path: Path) -> None:
    pixels = scene(1024, 768, (0.25, 0.25))
    slide = opened(write_vms(tmp_path / "a", pixels), 0.5)
    assert slide.size == (1024, 768)
    assert slide.mpp_level0 == pytest.approx((0.25, 0.25))
    assert np.abs(slide.read(whole(slide)) - shrunk(pixels, 2).astype(int)).mean() < 2


def slide_of(tmp_path: Path, kind: str) -> tuple[Path, Path]:
    """A slide of several files: its own, and one with pixels."""
    pixels = scene(512, 512, MPP)
    if kind == "mrxs":
        path = write_mrxs(tmp_path / "a.mrxs", pixels, 0.5, at=(0, 0), levels=2)
        return path, tmp_path / "a" / "Data0000.dat"
    path = write_vms(tmp_path / "a", pixels)
    return path, path.with_name("image.jpg")


@pytest.mark.parametrize("kind", ["mrxs", "vms"])
def test_a_slide_whose_own_file_stays_is_another_one_with_other_pixels(
    tmp_path: Path, kind: str
) -> None:
    """As where its folder is copied again: the file that a project names keeps size and time."""
    path, file = slide_of(tmp_path, kind)
    stat, content = file.stat(), bytearray(file.read_bytes())
    before, quick = slide_signature(path), quick_signature(path)
    slide, cached = opened(path), pyramid.open_pyramid(path)
    assert before.bytes == quick.bytes > len(content)
    assert pyramid.open_pyramid(path) is cached

    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    assert not slide_signature(path).is_of(before)
    assert not quick_signature(path).is_of(quick)
    slide.check_same(before)  # a copy has another time
    assert pyramid.open_pyramid(path) is not cached

    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert quick_signature(path) == quick
    assert not slide_signature(path).has_content_of(before)
    with pytest.raises(SlideError, match="has another content: copy it there again"):
        slide.check_same(before)

    file.unlink()
    assert not quick_signature(path).is_of(quick)


def test_finished_nuclei_of_a_slide_are_not_of_one_with_other_pixels(tmp_path: Path) -> None:
    path, file = slide_of(tmp_path, "mrxs")
    image = prepare(ImageEntry("1", "a", path), Config())
    image.check_unchanged()
    image.check_not_replaced()
    file.write_bytes(file.read_bytes()[::-1])
    for check in (image.check_unchanged, image.check_not_replaced):
        with pytest.raises(SlideError, match="changed while it was segmented: run again"):
            check()


def write_dicom(path: Path, series: str, pixels: bytes) -> Path:
    """The header of a DICOM file, as far as it tells the series, and some pixels."""
    uid = series.encode() + b"\0" * (len(series) % 2)
    element = b"\x20\x00\x0e\x00UI" + len(uid).to_bytes(2, "little") + uid
    path.write_bytes(bytes(128) + b"DICM" + element + pixels)
    return path


def test_a_dicom_slide_is_all_files_of_its_series(tmp_path: Path) -> None:
    path = write_dicom(tmp_path / "b.dcm", "1.2.3", b"level 1")
    coarse = write_dicom(tmp_path / "a.dcm", "1.2.3", b"level 0")
    other = write_dicom(tmp_path / "c.dcm", "1.2.34", b"another slide")
    assert [*slide_files(path)] == [path, coarse]
    assert [*slide_files(other)] == [other]
    before = slide_signature(path)
    write_dicom(other, "1.2.34", b"written anew")
    write_dicom(tmp_path / "d.dcm", "1.2.34", b"added")
    assert slide_signature(path) == before
    stat = coarse.stat()
    write_dicom(coarse, "1.2.3", b"LEVEL 0")
    os.utime(coarse, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert not slide_signature(path).has_content_of(before)


@pytest.mark.parametrize("suffix", [".svs", ".tif", ".png", ".scn"])
def test_the_signature_of_one_file_is_that_of_earlier_versions(tmp_path: Path, suffix: str) -> None:
    """Finished runs stay finished."""
    path = tmp_path / f"a{suffix}"
    path.write_bytes(bytes(range(256)) * 300)
    os.utime(path, ns=(5, 7))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "Data0000.dat").touch()
    expected = FileSignature(bytes=76800, modified_ns=7, sample=2816379145)
    assert slide_signature(path) == expected
    assert quick_signature(path) == FileSignature(bytes=76800, modified_ns=7)


@pytest.mark.parametrize("content", [b"", b"ImageFile=\0", b"ImageFile=../a\nMapFile=/dev/zero"])
@pytest.mark.parametrize("suffix", [".vms", ".dcm", ".mrxs"])
def test_a_damaged_slide_of_several_files_has_a_signature(
    tmp_path: Path, suffix: str, content: bytes
) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    assert [*slide_files(path)] == [path]
    assert slide_signature(path).bytes == len(content)


def write_scn(path: Path, pixels: NDArray[np.uint8], mpp: float, at: tuple[int, int]) -> Path:
    """A Leica SCN whose scanned area begins at (x, y) px of its slide."""
    height, width = pixels.shape[:2]
    macro = shrunk(pixels, 8)
    nm = [round(1000 * mpp * n) for n in (width, height, *at)]
    light = (
        "<illuminationSettings><illuminationSource>brightfield</illuminationSource>"
        "</illuminationSettings>"
    )

    def image(view: str, objective: int, *levels: tuple[int, int, int]) -> str:
        sizes = [
            f'<dimension sizeX="{x}" sizeY="{y}" r="{r}" ifd="{page}"/>'
            for r, (x, y, page) in enumerate(levels)
        ]
        return (
            f'<image><device model="Leica SCN400"/><pixels sizeX="{levels[0][0]}" '
            f'sizeY="{levels[0][1]}">{"".join(sizes)}</pixels><view {view}/><scanSettings>'
            f"<objectiveSettings><objective>{objective}</objective></objectiveSettings>{light}"
            "</scanSettings></image>"
        )

    slide = f'sizeX="{2 * nm[0]}" sizeY="{2 * nm[1]}"'
    area = f'sizeX="{nm[0]}" sizeY="{nm[1]}" offsetX="{nm[2]}" offsetY="{nm[3]}"'
    xml = (
        '<scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
        f"<collection {slide}>"
        + image(f'{slide} offsetX="0" offsetY="0"', 1, (*macro.shape[1::-1], 0))
        + image(area, 20, (width, height, 1), (width // 4, height // 4, 2))
        + "</collection></scn>"
    )
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for level in (macro, pixels, shrunk(pixels, 4)):
            tiff.write(
                level,
                photometric="rgb",
                tile=(64, 64),
                compression="jpeg",
                compressionargs={"level": 95},
                description=xml,
                resolution=(1e4 / mpp, 1e4 / mpp),
                resolutionunit="CENTIMETER",
                metadata=None,
            )
    return path


def test_leica_scn_is_cropped_to_its_bounds_as_qupath_does(tmp_path: Path) -> None:
    pixels = scene(512, 384, (0.5, 0.5))
    path = write_scn(tmp_path / "a.scn", pixels, 0.5, (100, 60))
    slide = opened(path)
    assert (slide.size, slide.origin) == ((512, 384), (100, 60))
    assert slide.mpp_level0 == pytest.approx((0.5, 0.5))
    assert np.abs(slide.read(whole(slide)) - pixels.astype(int)).mean() < 3
    assert opened(path, size=(512, 384)).origin == (100, 60)
    around = opened(path, use_bounds=False)
    assert around.size == (1024, 768)
    everything = around.read(whole(around))
    assert (everything[:50] == 255).all()  # nothing was scanned there: glass, not black
    np.testing.assert_array_equal(everything[60:444, 100:612], slide.read(whole(slide)))


def test_one_file_of_a_dicom_slide_becomes_an_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each file of a DICOM slide opens all of it."""
    series = {"a": "1.2.3", "b": "1.2.3", "c": "1.2.4"}

    class Opened:
        def __init__(self, path: Path) -> None:
            self.properties = {"dicom.SeriesInstanceUID": series[path.stem]}

        def __enter__(self) -> Opened:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(openslide, "OpenSlide", Opened)
    names = ["a.dcm", "x.svs", "b.dcm", "c.dcm", "damaged.dcm", "y.svs"]
    left = ["a.dcm", "x.svs", "c.dcm", "damaged.dcm", "y.svs"]
    found = one_of_each_slide(tmp_path / name for name in names)
    assert [path.name for path in found] == left
