"""Cells in a real QuPath, by both backends: what is shown, replaced and kept, and its measures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import qupath
import shapely
from qupath import by_index
from results import result_of

from patchcl_qupath.config import CORRECTED, CellConfig, Config, ObjectType, ResultConfig
from patchcl_qupath.datatypes import Box, CorrectionRoi, ImageEntry, Nuclei, Tile, UncertaintyGrid
from patchcl_qupath.execution.tile_store import TileStore
from patchcl_qupath.project import Project, open_project
from patchcl_qupath.project.jvm import Process
from patchcl_qupath.project.names import in_qupath
from patchcl_qupath.project.paquo import PaquoProject
from patchcl_qupath.segmentation.contours import nuclei_of_tile, to_level0
from patchcl_qupath.segmentation.grow_tile import CellContext, TileNuclei, grow_tile
from patchcl_qupath.segmentation.instances import instances
from patchcl_qupath.segmentation.rings import NOTHING
from patchcl_qupath.slides.prepare import prepare
from patchcl_qupath.slides.stains import densities
from patchcl_qupath.storage.parquet import from_table

pytestmark = pytest.mark.qupath

ROOT = Path(__file__).parent.parent
SLIDE = ROOT / "sample_project" / "CMU-1-Small-Region.svs"
GROWN = replace(Config(), cells=CellConfig(expand_um=5))

LOOK = """
import qupath.lib.objects.PathObjectTools

def points = { it?.getAllPoints()?.collect { p -> [p.getX(), p.getY()] } }
groovy.json.JsonOutput.toJson(hierarchy.getAllObjects(false).collect { [
    id: it.getID().toString(),
    type: it.isCell() ? 'cell' : it.isDetection() ? 'detection' : 'annotation',
    class_name: it.getPathClass()?.toString(), name: it.getName(), locked: it.isLocked(),
    measurements: it.getMeasurements().findAll { name, value -> !value.isNaN() },
    outline: points(it.getROI()), nucleus: points(PathObjectTools.getROI(it, true)),
    parent: it.getParent().isRootObject() ? null : it.getParent().getName(),
] })
"""
VERSION = """
groovy.json.JsonOutput.toJson(qupath.lib.common.GeneralTools.getVersion().toString())
"""
EDIT = """
import qupath.lib.objects.classes.PathClass

def nucleus = hierarchy.getAllObjects(false).findAll { it.getMeasurements().containsKey('index') }
    .collectEntries { [it.getMeasurements()['index'] as int, it] }
hierarchy.removeObject(nucleus[1], true)
nucleus[2].setPathClass(PathClass.fromString('Tumor: Positive'))
nucleus[3].setLocked(true)
nucleus[4].getMeasurementList().put('my score', 7)
entry.saveImageData(imageData)
'"edited"'
"""


def with_cells(nuclei: Nuclei) -> Nuclei:
    """Nuclei with a cell around each, and a measurement of each compartment."""
    n = len(nuclei)
    measured = {
        **nuclei.measurements,
        "Cytoplasm: Eosin: Mean": np.linspace(0, 1, n, dtype=np.float32),
        "Cell: Area µm^2": np.full(n, 99, np.float32),
    }
    measured["Cytoplasm: Eosin: Mean"][5] = np.nan
    around = shapely.buffer(nuclei.polygons, 5, quad_segs=4)
    cells = np.asarray(shapely.transform(around, lambda xy: np.round(xy, 2)), dtype=object)
    return replace(nuclei, measurements=measured, cells=cells)


def opened(path: Path, process: Process, backend: str = "paquo") -> tuple[Project, ImageEntry]:
    """A project and its one image; ``process`` is QuPath's."""
    project: Project = open_project(path, backend)
    if isinstance(project, PaquoProject):
        project = replace(project, process=process)
    (entry,) = project.images()
    return project, entry


def write(
    path: Path,
    nuclei: Nuclei,
    config: Config,
    run: str,
    *,
    process: Process,
    backend: str = "paquo",
) -> None:
    """Write nuclei of a run into the image; the import script follows, if need be."""
    project, entry = opened(path, process, backend)
    result = result_of(len(nuclei), config.result, run=run, tissue_mm2=0.5)
    result = msgspec.structs.replace(result, object_type=config.kind(len(nuclei)))
    project.write(entry, [nuclei], config.result, result)
    if backend == "files":
        qupath.run_script(path, ROOT / "groovy" / "import_nuclei.groovy")


def polygon(points: list[list[float]]) -> shapely.Polygon:
    return shapely.Polygon(points)


@pytest.mark.parametrize("backend", ["paquo", "files"])
def test_cells_replace_nuclei_and_the_other_way_round(
    tmp_path: Path, session: qupath.Session, process: Process, backend: str
) -> None:
    path = qupath.make_project(tmp_path / "ein Projekt ü", SLIDE, ["a.svs"])
    first, second = (qupath.nuclei(10, 21, "a", run=run) for run in (1, 2))
    detections = replace(Config(), result=ResultConfig(object_type=ObjectType.DETECTION))

    def look() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = session.run(path, LOOK)["a.svs"]  # type: ignore[assignment]
        return found

    def put(nuclei: Nuclei, config: Config, run: str) -> None:
        write(path, nuclei, config, run, process=process, backend=backend)

    put(first, detections, "1")
    assert {o["type"] for o in by_index(look()).values()} == {"detection"}

    # The same nuclei, as cells: same ids, both contours, names of this QuPath, or of the project's.
    version = session.run(path, VERSION)["a.svs"] if backend == "paquo" else "0.5.1"
    expected = in_qupath("Cytoplasm: Eosin: Mean", str(version))
    grown = with_cells(first)
    put(grown, GROWN, "2")
    seen = by_index(look())
    assert len(seen) == len(first)
    assert grown.cells is not None
    for k, cell in seen.items():
        assert (cell["type"], cell["class_name"]) == ("cell", "Nucleus")
        assert cell["id"] == first.uuids[k]
        assert cell["parent"] == "PatchCL"
        assert shapely.hausdorff_distance(polygon(cell["outline"]), grown.cells[k]) < 0.01
        assert shapely.hausdorff_distance(polygon(cell["nucleus"]), first.polygons[k]) < 0.01
        assert cell["measurements"]["Cell: Area µm^2"] == 99
        names = {"Cytoplasm: Eosin: Mean", "Eosin: Cytoplasm: Mean"} & {*cell["measurements"]}
        assert names == (set() if k == 5 else {expected})
    (region,) = [o for o in look() if o["name"] == "PatchCL"]
    assert region["measurements"]["PatchCL: Nuclei"] == len(first)

    # What a person did with cells is kept, by nuclei, in the next run without cells.
    session.run(path, EDIT)
    put(second, detections, "3")
    objects = look()
    seen = {k: [o for o in objects if o["measurements"].get("index") == k] for k in range(210)}
    assert [len(seen[k]) for k in range(5)] == [1, 0, 1, 1, 1]  # the deleted one stays deleted
    (locked,) = seen[3]
    assert (locked["type"], locked["locked"], locked["id"]) == ("cell", True, first.uuids[3])
    assert seen[2][0]["class_name"] == "Tumor: Positive"
    assert seen[4][0]["measurements"]["my score"] == 7
    for k in (0, 2, 4, 5, 100):
        (one,) = seen[k]
        assert (one["type"], one["id"]) == ("detection", second.uuids[k])
        assert "Cell: Area µm^2" not in one["measurements"]

    # And back: carried over once more.
    put(with_cells(second), GROWN, "4")
    objects = look()
    seen = {k: [o for o in objects if o["measurements"].get("index") == k] for k in range(210)}
    assert [len(seen[k]) for k in range(5)] == [1, 0, 1, 1, 1]
    assert [seen[k][0]["type"] for k in (0, 2, 3, 4)] == ["cell"] * 4
    assert seen[3][0]["id"] == first.uuids[3]
    assert seen[2][0]["class_name"] == "Tumor: Positive"
    assert seen[4][0]["measurements"]["my score"] == 7

    project, entry = opened(path, process, backend)
    project.remove(entry)
    if backend == "files":
        qupath.run_script(path, ROOT / "groovy" / "import_nuclei.groovy")
    left = [o["measurements"].get("index") for o in look()]
    assert sorted(left) == [2, 3, 4]  # a person's


FORGET = """
def lines = imageData.getProperty('patchcl.given').readLines()
assert lines.any { it.contains('Cytoplasm') }
imageData.setProperty('patchcl.given', lines.findAll { !it.contains('Cytoplasm') }.join('\\n'))
entry.saveImageData(imageData)
'"forgotten"'
"""


def test_measurements_that_the_first_cell_lacks_are_those_of_the_run(
    tmp_path: Path, session: qupath.Session, process: Process
) -> None:
    """A file has no value for a cytoplasm without pixels: this is not a person's measurement."""
    path = qupath.make_project(tmp_path / "p", SLIDE, ["a.svs"])
    name, of_qupath = "Cytoplasm: Eosin: Mean", "Eosin: Cytoplasm: Mean"
    for run in (1, 2):
        cells = with_cells(qupath.nuclei(10, 3, "a"))
        around = np.linspace(0, run, len(cells), dtype=np.float32)
        around[0] = np.nan
        whole = np.full(len(cells), run, np.float32)
        measured = {**cells.measurements, name: around, "Cell: Eosin: Mean": whole}
        cells = replace(cells, measurements=measured)
        write(path, cells, GROWN, str(run), process=process, backend="files")
        seen = by_index(session.run(path, LOOK)["a.svs"])  # type: ignore[arg-type]
        assert of_qupath not in seen[0]["measurements"]
        for k in range(1, len(cells)):
            assert seen[k]["measurements"][of_qupath] == pytest.approx(around[k])

    session.run(path, FORGET)  # as in an image of a version that asked the first cell alone
    project, entry = opened(path, process)
    project.remove(entry)
    assert session.run(path, LOOK)["a.svs"] == []


def test_annotations_of_cells_are_their_nuclei(
    tmp_path: Path, session: qupath.Session, process: Process
) -> None:
    path = qupath.make_project(tmp_path / "p", SLIDE, ["a.svs"])
    nuclei = qupath.nuclei(10, 3, "a")
    config = replace(GROWN, result=ResultConfig(object_type=ObjectType.ANNOTATION))
    write(path, with_cells(nuclei), config, "1", process=process)
    seen = by_index(session.run(path, LOOK)["a.svs"])  # type: ignore[arg-type]
    assert {o["type"] for o in seen.values()} == {"annotation"}
    for k, one in seen.items():
        assert shapely.hausdorff_distance(polygon(one["outline"]), nuclei.polygons[k]) < 0.01
        assert one["measurements"]["Cell: Area µm^2"] == 99


CORRECT = """
import qupath.lib.objects.classes.PathClass

def roi = hierarchy.getAnnotationObjects().find {
    it.getPathClass()?.toString() == 'PatchCL: correct here'
}
roi.setPathClass(PathClass.fromString('PatchCL: corrected'))
entry.saveImageData(imageData)
'"done"'
"""


@pytest.mark.parametrize("suggested", [True, False])
def test_cells_are_corrected_by_their_nuclei(
    tmp_path: Path, session: qupath.Session, process: Process, suggested: bool
) -> None:
    """In a suggested ROI, nuclei are there as annotations; in one that was drawn, as cells."""
    path = qupath.make_project(tmp_path / "p", SLIDE, ["a.svs"])
    nuclei = qupath.nuclei(10, 6, "a")
    write(path, with_cells(nuclei), GROWN, "1", process=process)
    box = shapely.box(20, 20, 260, 200)
    if suggested:
        project, entry = opened(path, process)
        id_ = "11111111-1111-5111-8111-111111111111"
        roi = CorrectionRoi(
            id=id_, name="ROI 1 of 1", description="", x=20, y=20, width=240, height=180
        )
        project.mark_rois(entry, [roi])
        session.run(path, CORRECT)
    else:
        session.run(path, DRAW_ROI)
    near = shapely.intersects(nuclei.polygons, box)
    seen = by_index(session.run(path, LOOK)["a.svs"])  # type: ignore[arg-type]
    types = {k: o["type"] for k, o in seen.items()}
    assert {types[k] for k in np.flatnonzero(near)} == {"annotation" if suggested else "cell"}
    assert {types[k] for k in np.flatnonzero(~near)} == {"cell"}
    project, entry = opened(path, process)
    found = project.corrections(entry, CORRECTED)
    assert len(found.rois) == 1
    assert len(found.nuclei) == near.sum()
    outlines = sorted(found.nuclei, key=lambda p: p.bounds)
    expected = sorted(nuclei.polygons[near], key=lambda p: p.bounds)
    for one, other in zip(outlines, expected, strict=True):
        assert shapely.hausdorff_distance(one, other) < 0.02


DRAW_ROI = """
import qupath.lib.objects.PathObjects
import qupath.lib.objects.classes.PathClass
import qupath.lib.regions.ImagePlane
import qupath.lib.roi.ROIs

def square = ROIs.createRectangleROI(20, 20, 240, 180, ImagePlane.getDefaultPlane())
def corrected = PathClass.fromString('PatchCL: corrected')
hierarchy.addObject(PathObjects.createAnnotationObject(square, corrected))
entry.saveImageData(imageData)
'"drawn"'
"""

MEASURE = """
import qupath.lib.analysis.features.ObjectMeasurements
import qupath.lib.images.ImageData
import qupath.lib.images.servers.TransformedServerBuilder
import qupath.lib.objects.PathObjects

imageData.setImageType(ImageData.ImageType.BRIGHTFIELD_H_E)
def server = new TransformedServerBuilder(imageData.getServer())
    .deconvolveStains(imageData.getColorDeconvolutionStains()).build()
def wanted = ObjectMeasurements.Measurements.with { [MEAN, STD_DEV, MIN, MAX] }
def compartments = ObjectMeasurements.Compartments.values().toList()
groovy.json.JsonOutput.toJson(hierarchy.getCellObjects().take(400).collect { cell ->
    def copy = PathObjects.createCellObject(cell.getROI(), cell.getNucleusROI(), null, null)
    ObjectMeasurements.addShapeMeasurements([copy], server.getPixelCalibration())
    ObjectMeasurements.addIntensityMeasurements(server, copy, 1.0, wanted, compartments)
    [ours: cell.getMeasurements(), theirs: copy.getMeasurements()].collectEntries { who, measured ->
        [who, measured.findAll { name, value -> !value.isNaN() }]
    }
})
"""


def cells_of_the_sample(path: Path) -> Nuclei:
    """Cells of the dark blue structures in a part of the sample slide: no model is needed."""
    (entry,) = open_project(path, "files").images()
    image = prepare(entry, Config())
    box = Box(300, 300, 1400, 1400)
    whole = Tile(row=0, col=0, read=box, write=box)
    rgb = image.slide.read(whole.read)
    dark = np.clip(densities(rgb)["Hematoxylin"], 0, 1)
    labels = instances(dark, mpp=image.slide.mpp, config=Config().segment, threshold=0.35)
    count = int(labels.max())
    found = nuclei_of_tile(
        labels=labels,
        owned=np.ones(count, bool),
        probability=np.ones(count),
        rgb=rgb,
        confidence=dark,
        tile=whole,
        mpp=image.slide.grid_mpp,
        threshold=0.35,
    )
    none = np.empty(0, np.int64)
    grid = UncertaintyGrid(
        bin_size=(1, 1), rows=none, cols=none, points=none, entropy=none, nuclei=none
    )
    content = TileStore.encode(to_level0(found, image.slide.downsample, image.id), grid)
    context = CellContext(image=image, config=GROWN.cells)
    grown, _, _ = grow_tile(context, TileNuclei(tile=whole, content=content, around=NOTHING))
    return from_table(grown)


def test_cells_measure_as_qupath_measures_them(
    tmp_path: Path, session: qupath.Session, process: Process
) -> None:
    path = qupath.make_project(tmp_path / "p", SLIDE, ["a.svs"])
    cells = cells_of_the_sample(path)
    assert len(cells) > 300
    write(path, cells, GROWN, "1", process=process)
    found: list[dict[str, Any]] = session.run(path, MEASURE)["a.svs"]  # type: ignore[assignment]
    names = {name for cell in found for name in cell["theirs"]} & {*found[0]["ours"]}
    assert names == {*found[0]["ours"]} - {"Detection probability"}  # all names are QuPath's
    assert len(names) == 12 + 1 + 2 * 3 * 4
    for name in names:
        pairs = [(c["ours"].get(name), c["theirs"].get(name)) for c in found]
        ours, theirs = np.array([pair for pair in pairs if None not in pair]).T
        assert len(ours) > 0.9 * len(found)
        off = np.abs(ours - theirs) / np.maximum(np.abs(theirs), 1e-6)
        assert np.median(off) < 0.002, name
        assert np.median(ours) == pytest.approx(np.median(theirs), rel=0.02), name
