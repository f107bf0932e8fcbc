"""Stain vectors that are set in QuPath: read, checked, and measured as QuPath does."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qupath
from conftest import QUICK
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from patchcl_qupath import pipeline
from patchcl_qupath.config import Config, StainChoice
from patchcl_qupath.datatypes import Box, StainKind, StainVectors
from patchcl_qupath.errors import ImageError
from patchcl_qupath.project import open_project
from patchcl_qupath.project.create import NewImage, init_project
from patchcl_qupath.project.jvm import Process
from patchcl_qupath.project.paquo import PaquoProject
from patchcl_qupath.segmentation.measurements import NuclearStain
from patchcl_qupath.slides.prepare import PreparedImage, prepare
from patchcl_qupath.slides.stain_vectors import H_DAB, H_E, stains_to_measure
from patchcl_qupath.slides.stains import StainNormaliser, densities
from patchcl_qupath.storage.parquet import read_nuclei

ROOT = Path(__file__).parent.parent
SAMPLE = ROOT / "sample_project"
SLIDE = SAMPLE / "CMU-1-Small-Region.svs"
OWN = StainVectors(
    kind=StainKind.H_E,
    names=("Haemalum", "Eosin Y"),
    vectors=((0.7, 0.65, 0.3), (0.1, 0.9, 0.4)),
    background=(243.0, 240.0, 235.0),
)
THREE = StainVectors(
    kind=StainKind.OTHER,
    names=("A", "B", "C"),
    vectors=((0.8, 0.6, 0.0), (0.0, 0.6, 0.8), (0.6, 0.0, 0.8)),
    background=(250.0,) * 3,
)

IMAGE_TYPES = {
    StainKind.H_E: "BRIGHTFIELD_H_E",
    StainKind.H_DAB: "BRIGHTFIELD_H_DAB",
    StainKind.OTHER: "BRIGHTFIELD_OTHER",
}


def test_densities_of_a_pixel_worked_by_hand() -> None:
    """Of red, and of green and blue together, each from a background of its own."""
    stains = StainVectors(
        kind=StainKind.OTHER,
        names=("Red", "Teal"),
        vectors=((2, 0, 0), (0, 3, 4)),
        background=(200, 100, 250),
    )
    # Red: log10(200 / 20) = 1. Green, blue: log10(100 / 25) = 0.602, log10(250 / 25) = 1; along
    # (0, 0.6, 0.8), which is as long as 1, that is 0.6 * 0.602 + 0.8 * 1.
    found = densities(np.uint8([[20, 25, 25], [255, 255, 255], [0, 0, 250]]), stains)
    assert list(found) == ["Red", "Teal"]
    # Brighter than the background is none; 0 counts as 1: log10(200), and 0.6 * log10(100).
    np.testing.assert_allclose(found["Red"], [1, 0, 2.30103], atol=1e-5)
    np.testing.assert_allclose(found["Teal"], [1.16124, 0, 1.2], atol=1e-5)


@pytest.mark.parametrize(
    ("own", "choice", "measured"),
    [
        (None, StainChoice.AUTO, H_E),
        (None, StainChoice.H_DAB, H_DAB),
        (OWN, StainChoice.AUTO, OWN),
        (OWN, StainChoice.H_E, OWN),
        (OWN, StainChoice.H_DAB, H_DAB),
        (THREE, StainChoice.AUTO, THREE),
        (THREE, StainChoice.H_E, H_E),
    ],
)
def test_an_image_s_own_stains_are_measured_unless_others_are_chosen(
    own: StainVectors | None, choice: StainChoice, measured: StainVectors
) -> None:
    assert stains_to_measure(own, choice) == measured


# ---------------------------------------------------------------- files


def export(folder: Path, stains: StainVectors | None) -> Path:
    """What groovy/export_regions.groovy leaves of the first image."""
    content = stains and {
        "type": IMAGE_TYPES[stains.kind],
        "background": stains.background,
        "stains": [
            {"name": name, "vector": vector}
            for name, vector in zip(stains.names, stains.vectors, strict=True)
        ],
    }
    file = folder / "patchcl" / "stains" / "1.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), "utf-8")
    return file


def with_stains(folder: Path) -> Any:
    project = open_project(folder, backend="files")
    return project.with_stains(project.images()[0])


@pytest.mark.parametrize("stains", [OWN, THREE, H_DAB, None])
def test_exported_stains_are_read(folder: Path, stains: StainVectors | None) -> None:
    assert with_stains(folder).stains is None
    export(folder, stains)
    assert (with_stains(folder).stains, with_stains(folder).note) == (stains, None)


def test_stains_may_be_older_than_the_image_and_its_type_alone_known(folder: Path) -> None:
    data = folder / "data" / "1"
    data.mkdir(parents=True)
    (data / "summary.json").write_text('{"imageType": "BRIGHTFIELD_H_DAB"}')
    assert with_stains(folder).stains == H_DAB
    export(folder, OWN)
    (data / "data.qpdata").touch()
    os.utime(data / "data.qpdata", ns=(2**62, 2**62))
    assert with_stains(folder).stains == OWN
    assert "stains were exported before it was last saved" in with_stains(folder).note


def save(folder: Path, name: str, vectors: str, background: str = "255 255 255") -> None:
    """The beginning of a data.qpdata with H&E, as QuPath 0.5 writes it."""
    text = (
        f'{{"Name" : "{name}", "Stain 1" : "Hematoxylin", "Values 1" : "0.65110783 0.70119304 '
        f'0.29049426", "Stain 2" : "Eosin", "Values 2" : "{vectors}", '
        f'"Background" : " {background}"}}'
    ).encode()
    data = folder / "data" / "1" / "data.qpdata"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_bytes(
        b"\xac\xed\x00\x05t\x00\x13Data file version 3~r\x00%qupath.lib.images.ImageData$ImageType"
        b"t\x00\x0fBRIGHTFIELD_H_Esr\x00)qupath.lib.color.ColorDeconvolutionStains\x8a\x1cb\xb0"
        b"\x8f\xfd8\xd6\x0c\x00\x00xpw\x04\x00\x00\x00\x01t" + len(text).to_bytes(2) + text + b"xsr"
    )


DEFAULT = "0.21589979 0.80119922 0.55809946"


def test_own_stains_that_were_not_exported_are_a_note(folder: Path) -> None:
    """Not those that come with an image type, nor of an image that was never saved, or damaged."""
    assert with_stains(folder).note is None
    save(folder, "H&E default", DEFAULT)
    assert with_stains(folder).note is None
    for changed in ((DEFAULT[:-10] + "0.31000000",), (DEFAULT, "243 240 235")):
        save(folder, "H&E modified", *changed)
        entry = with_stains(folder)
        assert entry.stains is None
        assert re.fullmatch(r"its own stain vectors .* run export_regions.*", entry.note)
    file = export(folder, OWN)
    assert (with_stains(folder).stains, with_stains(folder).note) == (OWN, None)
    export(folder, None)  # and then a person set them
    os.utime(file, ns=(1, 1))
    assert "were not exported" in with_stains(folder).note
    for content in (b"", b"\xac\xed", b'ColorDeconvolutionStains {"Name" : "x"}'):
        (folder / "data" / "1" / "data.qpdata").write_bytes(content)
        assert with_stains(folder).note is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vectors": ((0.6, 0.8, 0), (1.2, 1.61, 0))}, "its stain vectors are parallel, or nearly"),
        ({"vectors": ((0.6, 0.8, 0), (0, 0, 0))}, "a stain vector is zero"),
        ({"vectors": ((0.6, 0.8, 0), (0, float("nan"), 1))}, "a stain vector is zero, or not a"),
        ({"background": (255, 0, 255)}, "its background is black, or not a number"),
        ({"background": (255, float("inf"), 255)}, "its background is black, or not a number"),
        ({"names": ("A", "A")}, "two of its stains have one name"),
        ({"names": ("A",), "vectors": ((0.6, 0.8, 0),)}, "it has not two or three stains"),
    ],
)
def test_stains_that_cannot_be_separated_are_refused(
    folder: Path, changes: dict[str, Any], problem: str
) -> None:
    export(folder, replace(OWN, **changes))
    with pytest.raises(
        ImageError, match=rf"svs: {problem}.*: double-click a stain in QuPath's Image"
    ):
        with_stains(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"stains": []}', '{"type": "", "stains": [1]}'])
def test_a_damaged_export_is_an_error(folder: Path, content: str) -> None:
    export(folder, OWN).write_text(content)
    with pytest.raises(ImageError, match=r"1\.json is damaged: run export_regions"):
        with_stains(folder)


def segment(project: Any, model: pipeline.Model, client: Any, config: Config) -> tuple[Any, Any]:
    run = pipeline.Run(
        project=project, model=model, config=config, workers=client, progress=lambda *_: None
    )
    (result,) = run.images(project.images())
    if result.problem:
        return result, None
    return result, read_nuclei(Path(result.results) / "nuclei.parquet")


def test_a_run_measures_exported_stains_and_no_old_tiles(
    folder: Path, model: pipeline.Model, client: Any
) -> None:
    def measured(stain: StainChoice = StainChoice.AUTO) -> tuple[Any, Any]:
        config = replace(QUICK, slide=replace(QUICK.slide, stain=stain))
        return segment(open_project(folder, "files"), model, client, config)

    _, plain = measured()
    export(folder, OWN)
    result, own = measured()
    assert result.tiles_resumed == 0
    assert result.note is None
    assert list(own.uuids) == list(plain.uuids)
    assert {"Haemalum: Mean", "Eosin Y: Max"} < set(own.measurements)
    assert "Hematoxylin: Mean" not in own.measurements
    about = json.loads((Path(result.results) / "result.json").read_text("utf-8"))
    assert tuple(about["stains"]["names"]) == OWN.names
    assert measured()[0].tiles_resumed == result.tiles

    export(folder, replace(OWN, background=(255.0, 255.0, 255.0)))
    result, brighter = measured()
    assert result.tiles_resumed == 0
    assert (brighter.measurements["Haemalum: Mean"] > own.measurements["Haemalum: Mean"]).all()

    result, chosen = measured(StainChoice.H_DAB)
    assert "DAB: Mean" in chosen.measurements
    assert result.note.startswith("measured Hematoxylin and DAB as asked for, with QuPath's")
    assert result.note.endswith("its own stains in QuPath are Haemalum and Eosin Y")

    export(folder, replace(OWN, vectors=OWN.vectors[:1] * 2))
    assert "vectors are parallel" in measured()[0].problem


def write_slide_with_few_positive_nuclei(path: Path) -> NDArray[np.bool_]:
    """Tissue in hematoxylin, of which 0.4 % is brown; where that is (H, W)."""
    hematoxylin, dab = (np.array(vector) for vector in H_DAB.vectors)
    rows, cols = np.ogrid[:512, :512]
    blue, brown = np.zeros((512, 512), bool), np.zeros((512, 512), bool)
    for row in range(32, 512, 64):
        for col in range(32, 512, 64):
            disc = (rows - row) ** 2 + (cols - col) ** 2 <= 10**2
            (brown if (row, col) in ((160, 160), (288, 352), (352, 224)) else blue)[disc] = True
    density = np.where(blue, 0.45, 0.07)[..., None] * hematoxylin
    density[brown] = 1.0 * dab
    pixels = 243 * 10**-density + np.random.default_rng(0).normal(0, 3, density.shape)
    Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)).save(path)
    return brown


def test_few_positive_nuclei_count_where_the_image_is_said_to_have_dab(tmp_path: Path) -> None:
    """By its type in QuPath, which training sees, too, or by the settings for all images."""
    brown = write_slide_with_few_positive_nuclei(tmp_path / "a.png")
    assert 0.003 < brown.mean() < 0.005
    labels, count = ndimage.label(brown)
    path = init_project(tmp_path / "p", [NewImage.of_file(tmp_path / "a.png", 0.5)])
    h_dab = replace(QUICK, slide=replace(QUICK.slide, stain=StainChoice.H_DAB))

    def found(config: Config = QUICK) -> tuple[PreparedImage, list[bool]]:
        image = prepare(open_project(path, "files").images()[0], config)
        rgb = image.slide.read(Box(0, 0, *image.slide.shape))
        stain = NuclearStain.of(labels.astype(np.int32), rgb, 0.5, config.segment)
        assert image.normaliser is not None
        return image, stain.is_enough(config.segment, image.normaliser.has_brown).tolist()

    unknown, kept = found()
    assert kept == [False] * count
    assert unknown.normaliser == StainNormaliser.fit(unknown.typical_crops())
    declared, kept = found(h_dab)
    assert kept == [True] * count
    data = tmp_path / "p" / "data" / "1"
    data.mkdir(parents=True)
    (data / "summary.json").write_text('{"imageType": "BRIGHTFIELD_H_DAB"}')
    assert found()[1] == [True] * count
    assert found()[0].normaliser == declared.normaliser
    # What is brown looks to the network as on a slide that is full of it, and noise is no stain.
    of_stain = declared.normaliser.apply(declared.slide.read(Box(0, 0, 512, 512)))[..., 2]
    assert of_stain[brown].min() > 0.8
    assert np.abs(of_stain[~brown]).max() < 0.2
    assert (declared.normaliser.low, declared.normaliser.high[:2]) == (
        unknown.normaliser.low,
        unknown.normaliser.high[:2],
    )


# ---------------------------------------------------------------- with a QuPath


SET = """
import qupath.lib.color.ColorDeconvolutionStains
import qupath.lib.color.ColorTransformer
import qupath.lib.color.ColorTransformer.ColorTransformMethod as Method
import qupath.lib.color.StainVector
import qupath.lib.images.ImageData

def stain = { name, vector -> StainVector.createStainVector(name, *vector) }
imageData.setImageType(ImageData.ImageType.TYPE)
def stains = new ColorDeconvolutionStains('of a person', STAINS, BACKGROUND)
imageData.setColorDeconvolutionStains(stains)
entry.saveImageData(imageData)
groovy.json.JsonOutput.toJson([Method.Stain_1, Method.Stain_2, Method.Stain_3].collect {
    ColorTransformer.getTransformedPixels(PIXELS as int[], it, null, stains).toList()
})
"""


def set_in_qupath(
    session: qupath.Session, path: Path, stains: StainVectors, pixels: np.ndarray
) -> Any:
    """Save stains with the image; the densities (3, N) that QuPath itself has for pixels (N, 3)."""
    packed = (pixels.astype(int) @ [1 << 16, 1 << 8, 1]).tolist()
    made = [
        f"stain('{name}', {[float(v) for v in vector]})"
        for name, vector in zip(stains.names, stains.vectors, strict=True)
    ]
    script = SET.replace("TYPE", IMAGE_TYPES[stains.kind], 1).replace("STAINS", ", ".join(made))
    levels = ", ".join(f"{level} as double" for level in stains.background)
    script = script.replace("BACKGROUND", levels)
    return session.run(path, script.replace("PIXELS", str(packed)))["a.svs"]


@pytest.mark.qupath
@pytest.mark.parametrize("stains", [OWN, THREE])
def test_stains_of_a_real_qupath_are_read_and_measured_as_it_does(
    tmp_path: Path, process: Process, session: qupath.Session, stains: StainVectors
) -> None:
    """By its process, and by the script without a window."""
    path = qupath.make_project(tmp_path / "project", SLIDE, ["a.svs"])
    pixels = np.random.default_rng(0).integers(0, 256, (200, 3)).astype(np.uint8)
    expected = set_in_qupath(session, path, stains, pixels)
    (entry,) = open_project(path, "files").images()
    assert "were not exported" in (open_project(path, "files").with_stains(entry).note or "")
    project = open_project(path, "paquo")
    assert isinstance(project, PaquoProject)
    project = replace(project, process=process)
    (entry,) = project.images()
    by_process = project.with_stains(entry).stains
    project.layout.stains(entry.id).unlink()
    log = qupath.run_script(path, ROOT / "groovy" / "export_regions.groovy")
    assert "ERROR" not in log, log
    for read in (by_process, open_project(path, "files").with_stains(entry).stains):
        assert (read.kind, read.names, read.background) == (
            stains.kind,
            stains.names,
            stains.background,
        )
        found = np.array(list(densities(pixels, read).values()))
        np.testing.assert_allclose(found, expected[: len(found)], atol=1e-4)


@pytest.mark.qupath
def test_qupath_s_defaults_are_those_that_are_measured_without_it(
    tmp_path: Path, process: Process, session: qupath.Session
) -> None:
    path = qupath.make_project(tmp_path / "project", SLIDE, ["a.svs"])
    for kind, stains in ((None, None), ("H_E", H_E), ("H_DAB", H_DAB)):
        set_type = f"imageData.setImageType(Type.BRIGHTFIELD_{kind})" if kind else ""
        start = "import qupath.lib.images.ImageData.ImageType as Type\n"
        session.run(path, f"{start}{set_type}\nentry.saveImageData(imageData)\n'1'")
        project = open_project(path, "paquo")
        assert isinstance(project, PaquoProject)
        (entry,) = project.images()
        assert replace(project, process=process).with_stains(entry).stains == stains
        project.layout.stains(entry.id).unlink()
        only_type = open_project(path, "files").with_stains(entry)
        assert (only_type.stains, only_type.note) == (H_DAB if kind == "H_DAB" else None, None)


@pytest.mark.qupath
def test_a_run_writes_the_image_s_own_stains_into_qupath(
    tmp_path: Path, process: Process, session: qupath.Session, model: pipeline.Model, client: Any
) -> None:
    path = qupath.make_project(tmp_path / "project", SLIDE, ["a.svs"])

    def measured() -> Any:
        project = open_project(path, "paquo")
        assert isinstance(project, PaquoProject)
        result, found = segment(replace(project, process=process), model, client, QUICK)
        assert result.problem is None
        return found

    plain = measured()
    set_in_qupath(session, path, OWN, np.zeros((1, 3), np.uint8))
    own = measured()
    assert list(own.uuids) == list(plain.uuids)
    look = """
        groovy.json.JsonOutput.toJson(hierarchy.getAllObjects(false).findAll { it.getPathClass() }
            .collectEntries { [it.getID().toString(), it.getMeasurements()['Haemalum: Mean']] })
        """
    shown = session.run(path, look)["a.svs"]
    means = own.measurements["Haemalum: Mean"]
    assert shown == pytest.approx(dict(zip(own.uuids.tolist(), means.tolist(), strict=True)))
    assert not np.allclose(means, plain.measurements["Hematoxylin: Mean"])
