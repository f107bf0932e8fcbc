"""What a person has in a corrected ROI: which objects are read as nuclei, and what is reported."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from click.testing import CliRunner
from test_network import selftraining_log

from patchcl_qupath import pipeline
from patchcl_qupath.cli import main
from patchcl_qupath.config import CORRECTED, TO_CORRECT, Config
from patchcl_qupath.correction import labels
from patchcl_qupath.datatypes import Corrections, ImageEntry
from patchcl_qupath.errors import ConfigError, ImageError, TrainingError
from patchcl_qupath.evaluation.ground_truth import read_ground_truth
from patchcl_qupath.models.model import Model
from patchcl_qupath.models.network import NucleusNetwork
from patchcl_qupath.project import open_project
from patchcl_qupath.project.drawn import ExportedLabels, read_regions
from patchcl_qupath.slides.prepare import prepare

SLIDE = Path(__file__).parent.parent / "sample_project" / "CMU-1-Small-Region.svs"
UM = 2.0  # px per µm
ROI = shapely.box(0, 0, 500, 500)
NONE = {
    "ignored": 0,
    "regions": 0,
    "points": 0,
    "lines": 0,
    "tiles": 0,
    "cells_without_nucleus": 0,
    "other_programs": 0,
    "specks": 0,
}


def disc(x: float, y: float, um: float = 8.0) -> shapely.Polygon:
    """A disc around (x, y) px, some µm wide."""
    return shapely.Point(x, y).buffer(um * UM / 2)


def grid(count: int = 9) -> list[shapely.Polygon]:
    """Nuclei 40 µm apart, the last one across the border of ROI."""
    places = [(60 + 80 * (k % 4), 60 + 80 * (k // 4)) for k in range(count - 1)]
    return [*(disc(x, y) for x, y in places), disc(500, 300)]


def feature(
    geometry: Any, name: str | None = "Nucleus", kind: str = "annotation", **more: Any
) -> dict[str, Any]:
    properties: dict[str, Any] = {"objectType": kind}
    if name is not None:
        properties["classification"] = {"name": name, "color": [1, 2, 3]}
    return {
        "type": "Feature",
        "id": str(uuid.uuid4()),
        "geometry": json.loads(shapely.to_geojson(geometry)),
        "properties": properties,
        **more,
    }


def read(
    path: Path, *features: dict[str, Any], roi_class: str = CORRECTED, **more: Any
) -> Corrections:
    """What is read from an export of an image of 0.5 µm/px; ROI is in it, marked as corrected."""
    file = path / "1.geojson"
    content = {
        "type": "FeatureCollection",
        "features": [feature(ROI, roi_class), *features],
        "patchcl": {"pixel_size_um": [0.5, 0.5], **more},
    }
    file.write_text(json.dumps(content, ensure_ascii=False), "utf-8")
    return ExportedLabels.read(file, "a.svs").corrections(roi_class)


def places(nuclei: Any) -> set[tuple[int, int]]:
    return {(round(n.centroid.x), round(n.centroid.y)) for n in nuclei}


LEFT_OUT: list[tuple[str, list[dict[str, Any]], int]] = [
    ("ignored", [feature(disc(200, 400), "Ignore*"), feature(disc(9, 9), "Tumor: Bad*")], 2),
    ("ignored", [feature(disc(400, 400, 40), "Ignore*"), feature(disc(390, 400))], 2),
    # Two that overlap there are no problem.
    (
        "ignored",
        [
            feature(disc(400, 400, 40), "Ignore*"),
            *[feature(disc(400, 400, um)) for um in (7, 9)],
        ],
        3,
    ),
    ("regions", [feature(disc(250, 250, 100), "Vessel")], 1),
    ("regions", [feature(disc(250, 420, 45), "Vessel")], 1),  # empty, but huge beside nuclei
    ("regions", [feature(disc(250, 250, 100), None)], 1),
    ("regions", [feature(shapely.box(30, 30, 170, 90), None)], 1),  # around two
    ("regions", [feature(disc(60, 60, 30), None)], 1),  # around one
    ("regions", [feature(disc(60, 60, 30), "Gland")], 1),
    ("regions", [feature(shapely.box(20, 55, 480, 65), "Vessel")], 1),  # across four
    ("regions", [feature(shapely.box(5, 350, 480, 362), None)], 1),  # long, around none
    ("regions", [feature(disc(60, 60, 30) - disc(60, 60, 25), "Wall")], 1),  # a ring
    ("points", [feature(shapely.MultiPoint([(5, 5), (9, 9), (999, 9)]))], 2),
    ("points", [feature(shapely.Point(5, 5), None)], 1),
    ("lines", [feature(shapely.LineString([(5, 5), (90, 90)]))], 1),
    ("tiles", [feature(shapely.box(0, 0, 80, 80), None, "tile")], 1),
    ("cells_without_nucleus", [feature(disc(200, 400, 20), "Tumor", "cell")], 1),
    ("specks", [feature(disc(200, 400, 1.0))], 1),
    ("specks", [feature(disc(60, 60, 1.0))], 1),  # within a nucleus
]


@pytest.mark.parametrize(("kind", "objects", "count"), LEFT_OUT)
def test_what_is_no_nucleus_is_left_out_with_its_number(
    tmp_path: Path, kind: str, objects: list[dict[str, Any]], count: int
) -> None:
    nuclei = grid()
    found = read(tmp_path, *objects, *map(feature, nuclei))
    assert found.left_out == {**NONE, kind: count}
    assert places(found.nuclei) == places(nuclei)
    assert found.notes == ()


def test_nuclei_are_read_whatever_they_are(tmp_path: Path) -> None:
    """Of any class or none, as detection or cell, large, and half outside of the ROI."""
    cell = feature(disc(60, 60, 20), "Tumor", "cell")
    cell["nucleusGeometry"] = json.loads(shapely.to_geojson(disc(60, 60)))
    objects = [
        cell,
        feature(disc(140, 60), None),
        feature(disc(220, 60), "Tumor: 陽性", "detection"),
        feature(disc(300, 60), "a: b: c"),
        feature(disc(380, 160, 25), None),  # a giant among the others
        feature(disc(408, 160, 4)),  # small beside it, and laps over its border a little
        feature(disc(500, 300), "Ignore"),  # QuPath ignores it only with an asterisk
        feature(disc(700, 300)),  # outside
    ]
    found = read(tmp_path, *objects)
    assert places(found.nuclei) == {
        *((60, 60), (140, 60), (220, 60), (300, 60), (380, 160), (408, 160), (500, 300))
    }
    assert found.left_out == NONE
    assert max(n.area for n in found.nuclei) == pytest.approx(disc(0, 0, 25).area)


def test_detections_of_other_programs_are_those_that_the_export_lists(tmp_path: Path) -> None:
    ours, other = feature(disc(60, 60), None, "detection"), feature(disc(62, 60), None, "detection")
    found = read(tmp_path, ours, other, other_programs=[other["id"]], imported=5)
    assert found.left_out == {**NONE, "other_programs": 1}
    assert places(found.nuclei) == {(60, 60)}


@pytest.mark.parametrize("kind", ["annotation", "detection", "tile", "cell"])
def test_whatever_has_an_ignored_class_is_ignored(tmp_path: Path, kind: str) -> None:
    """As for `score`: superpixels that a classifier gave it, too. The export lists all tiles."""
    area = feature(disc(400, 400, 40), "Ignore*", kind)
    listed = [area["id"]] if kind == "tile" else []
    objects = [area, feature(disc(390, 400)), *map(feature, grid())]
    found = read(tmp_path, *objects, other_programs=listed)
    assert found.left_out == {**NONE, "ignored": 2}
    assert [shape.area for shape in found.ignored] == [disc(400, 400, 40).area]
    assert places(found.nuclei) == places(grid())
    entry = ImageEntry("1", "a.svs", tmp_path, size=(600, 600), mpp=(0.5, 0.5))
    (ignored,) = read_ground_truth([tmp_path / "1.geojson"], entry).ignored
    assert ignored.area == disc(400, 400, 40).area
    if kind == "detection":  # of another program: a person corrects those of this one
        found = read(tmp_path, *objects, other_programs=[area["id"]])
        assert found.left_out == {**NONE, "other_programs": 1}
        assert places(found.nuclei) == places([disc(390, 400), *grid()])


def test_an_outline_of_several_pieces_is_a_nucleus_each(tmp_path: Path) -> None:
    """Crumbs beside a large piece are none; holes are filled."""
    two = disc(60, 60) | disc(140, 60) | disc(240, 60, 2.0)
    holed = disc(60, 200) - disc(60, 200, 3)
    found = read(tmp_path, feature(two), feature(holed))
    assert places(found.nuclei) == {(60, 60), (140, 60), (60, 200)}
    assert all(not n.interiors for n in found.nuclei)


@pytest.mark.parametrize("name", [TO_CORRECT, CORRECTED, "Done"])
def test_a_nucleus_of_the_class_of_its_roi_is_one(tmp_path: Path, name: str) -> None:
    """QuPath's "Auto set" gives all that is drawn the class of what was drawn before."""
    nuclei = grid()
    larger = disc(400, 400, 24)
    roi_class = "Done" if name == "Done" else CORRECTED
    features = [feature(nucleus, name) for nucleus in [*nuclei[:3], larger]]
    found = read(tmp_path, *features, *map(feature, nuclei[3:]), roi_class=roi_class)
    assert places(found.nuclei) == places([*nuclei, larger])
    assert [roi.bounds for roi in found.rois] == [ROI.bounds]
    assert found.left_out == NONE
    assert found.notes == ("outlines in its ROIs that have a class of ROIs, taken as nuclei: 4",)


@pytest.mark.parametrize("um", [8, 18])
@pytest.mark.parametrize(("name", "kind"), [(CORRECTED, "annotation"), ("Tumor", "detection")])
def test_a_nucleus_of_the_class_of_a_roi_may_reach_out_of_it(
    tmp_path: Path, name: str, kind: str, um: int
) -> None:
    """Drawn with "Auto set", or classified by an object classifier: it is no ROI of background."""
    border = disc(505, 100, um)
    assert (border & ROI).area < 0.4 * border.area
    nuclei = [feature(nucleus, name, kind) for nucleus in [border, *grid()]]
    tiles = [feature(disc(9, 9, 40), name, "tile")] if kind == "detection" else []
    found = read(tmp_path, *nuclei, *tiles, roi_class=name)
    assert [roi.bounds for roi in found.rois] == [ROI.bounds]
    assert places(found.nuclei) == places([border, *grid()])
    assert found.left_out == {**NONE, "tiles": len(tiles)}
    assert found.notes == ("outlines in its ROIs that have a class of ROIs, taken as nuclei: 10",)


def test_corrected_rois_are_annotations(tmp_path: Path) -> None:
    """What `suggest` keeps away from is no nucleus that has the class."""
    read(tmp_path, *(feature(disc(505, y), CORRECTED, "detection") for y in (100, 200)))
    (roi,) = ExportedLabels.read(tmp_path / "1.geojson", "a.svs").corrected_rois
    assert roi.bounds == ROI.bounds


def test_a_small_roi_beside_another_is_one(tmp_path: Path) -> None:
    """It holds a nucleus and laps over a little, or touches and is background."""
    over, touching = shapely.box(490, 0, 560, 70), shapely.box(499.9, 200, 560, 270)
    small = [feature(roi, CORRECTED) for roi in (over, touching)]
    found = read(tmp_path, *small, feature(disc(60, 60)), feature(disc(530, 40)))
    assert {roi.bounds for roi in found.rois} == {ROI.bounds, over.bounds, touching.bounds}
    assert places(found.nuclei) == {(60, 60), (530, 40)}


def test_a_small_roi_is_no_nucleus(tmp_path: Path) -> None:
    """One outside of the others, and one to be corrected that is larger than nuclei."""
    small, suggested = shapely.box(600, 0, 660, 60), shapely.box(300, 300, 450, 450)
    file = tmp_path / "1.geojson"
    objects = [feature(ROI, CORRECTED), feature(small, CORRECTED), feature(suggested, TO_CORRECT)]
    content = {
        "features": [*objects, feature(disc(60, 60)), feature(disc(630, 30))],
        "patchcl": {"pixel_size_um": [0.5, 0.5]},
    }
    file.write_text(json.dumps(content))
    labels = ExportedLabels.read(file, "a.svs")
    found = labels.corrections(CORRECTED)
    for rois in (found.rois, labels.corrected_rois):
        assert {roi.bounds for roi in rois} == {ROI.bounds, small.bounds}
    assert places(found.nuclei) == {(60, 60), (630, 30)}
    assert found.notes == ()


def test_a_roi_of_two_pieces_is_two(tmp_path: Path) -> None:
    both = shapely.MultiPolygon([shapely.box(0, 0, 200, 200), shapely.box(9000, 0, 9200, 200)])
    file = tmp_path / "1.geojson"
    objects = [feature(both, CORRECTED), feature(disc(60, 60)), feature(disc(9060, 60))]
    file.write_text(json.dumps({"type": "FeatureCollection", "features": objects}))
    labels = ExportedLabels.read(file, "a.svs")
    found = labels.corrections(CORRECTED)
    assert [roi.bounds for roi in found.rois] == [(0, 0, 200, 200), (9000, 0, 9200, 200)]
    assert len(labels.corrected_rois) == 2
    assert len(found.nuclei) == 2


def test_a_small_piece_of_a_roi_is_one_if_it_holds_a_nucleus(tmp_path: Path) -> None:
    small, slip = shapely.box(900, 0, 1040, 140), shapely.box(2000, 0, 2020, 500)
    both = shapely.MultiPolygon([shapely.box(0, 0, 500, 500), small, slip])
    file = tmp_path / "1.geojson"
    objects = [feature(both, CORRECTED), feature(disc(60, 60)), feature(disc(960, 60))]
    content = {"features": objects, "patchcl": {"pixel_size_um": [0.5, 0.5]}}
    file.write_text(json.dumps(content))
    labels = ExportedLabels.read(file, "a.svs")
    found = labels.corrections(CORRECTED)
    for rois in (found.rois, labels.corrected_rois):
        assert {roi.bounds for roi in rois} == {(0, 0, 500, 500), small.bounds}
    assert places(found.nuclei) == {(60, 60), (960, 60)}


def test_a_duplicate_without_a_class_is_no_region(tmp_path: Path) -> None:
    """It holds a smaller outline, but one of nearly its size."""
    twice = [feature(disc(60, 60, 9), None), feature(disc(60, 60, 8))]
    with pytest.raises(ImageError, match="nuclei overlap in 1 places"):
        read(tmp_path, *twice)


def test_all_overlapping_pairs_of_all_rois_are_listed(tmp_path: Path) -> None:
    second = shapely.box(600, 0, 1000, 400)
    twice = [disc(60, 60), disc(64, 60), disc(140, 60), disc(140, 60), disc(700, 60), disc(702, 60)]
    with pytest.raises(ImageError) as raised:
        read(tmp_path, feature(second, CORRECTED), *map(feature, [*twice, *grid()[3:]]))
    advice = "delete one of each pair, save, and run again"
    assert str(raised.value).splitlines() == [
        f"a.svs: nuclei overlap in 2 places of the ROI at x 250, y 250 px: {advice}: "
        "at x 140, y 60 px; at x 62, y 60 px",
        f"a.svs: nuclei overlap in 1 places of the ROI at x 800, y 200 px: {advice}: "
        "at x 701, y 60 px",
    ]


EMPTY = shapely.box(600, 0, 1000, 400)
BOW_TIE = shapely.Polygon([(700, 60), (720, 80), (720, 60), (700, 80)])  # crosses itself


@pytest.mark.parametrize(
    ("more", "objects", "how"),
    [
        ({}, [], ""),  # there are nuclei in another ROI
        ({"deleted": 12}, [], ", 12 were deleted there"),
        ({"deleted": 12}, [feature(disc(700, 60), None, "detection")], ", 12 were deleted there"),
        ({}, [feature(disc(800, 200, 100), "Ignore*")], ""),
        ({}, [feature(disc(800, 200, 100), "Vessel")], ""),
    ],
)
def test_a_roi_without_nuclei_is_background(
    tmp_path: Path, more: dict[str, int], objects: list[dict[str, Any]], how: str
) -> None:
    roi = feature(EMPTY, CORRECTED)
    said = {"imported": 100, "deleted": {roi["id"]: more.get("deleted", 0)}}
    others = [one["id"] for one in objects if one["properties"]["objectType"] == "detection"]
    found = read(tmp_path, roi, *objects, feature(disc(60, 60)), **said, other_programs=others)
    (note,) = found.notes
    assert note == (
        f"the ROI at x 800, y 200 px has no nuclei{how}: all of it is taken as background; if that "
        "is not meant, outline them and refine again"
    )
    assert len(found.rois) == 2


@pytest.mark.parametrize(
    ("objects", "words"),
    [
        ([feature(shapely.MultiPoint([(700, 60), (800, 60)]))], "2 points"),
        ([feature(disc(700, 60, 20), None, "cell")], "1 cells without a nucleus"),
        ([feature(disc(700, 60), None, "detection")], "1 detections of other programs"),
        ([feature(BOW_TIE, None, "detection")], "1 detections of other programs"),
        ([feature(BOW_TIE, None, "cell")], "1 cells without a nucleus"),
    ],
)
def test_nuclei_that_are_marked_in_another_way_are_not_taken_for_background(
    tmp_path: Path, objects: list[dict[str, Any]], words: str
) -> None:
    others = [one["id"] for one in objects if one["properties"]["objectType"] == "detection"]
    with pytest.raises(
        ImageError, match=rf"at x 800, y 200 px has no nuclei, but {words}: outline"
    ):
        read(
            tmp_path,
            feature(EMPTY, CORRECTED),
            *objects,
            feature(disc(60, 60)),
            other_programs=others,
            imported=3,
        )


@pytest.mark.parametrize("more", [{}, {"imported": 0}, {"imported": "x", "deleted": [1]}])
def test_a_roi_in_an_image_without_any_nucleus_is_an_oversight(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    with pytest.raises(ImageError, match="has no nuclei: outline all of them, or delete the ROI"):
        read(tmp_path, feature(disc(900, 900)), **more)


@pytest.mark.parametrize("given", ["腫瘍:陽性", " 腫瘍 : 陽性", "腫瘍: 陽性"])
def test_classes_are_found_however_they_are_written(tmp_path: Path, given: str) -> None:
    """With a colon, and in Japanese: QuPath writes a space after the colon."""
    read(tmp_path, feature(disc(60, 60)), roi_class="腫瘍: 陽性")
    file = tmp_path / "1.geojson"
    labels = ExportedLabels.read(file, "a.svs")
    assert labels.may_be_of(given)
    assert len(labels.corrections(given).nuclei) == 1
    assert [*read_regions(file, "a.svs", [given])] == [given]


def test_a_pixel_size_that_is_given_is_used_where_nobody_has_another(tmp_path: Path) -> None:
    """At 0.5 µm/px a disc of 8 px has 12 µm²; at a usual 0.25, 3 µm²; at 0.1, a speck."""
    file = tmp_path / "1.geojson"
    objects = [feature(ROI, CORRECTED), *(feature(disc(x, 60, 4)) for x in (60, 140))]
    for more, counts in (({}, (2, 0, 2)), ({"pixel_size_um": [0.5, 0.5]}, (2, 2, 2))):
        file.write_text(json.dumps({"features": objects, "patchcl": more}))
        found = []
        for given in (0.5, 0.1, None):
            try:
                labels = ExportedLabels.read(file, "a.svs")
                found.append(len(labels.corrections(CORRECTED, fallback_mpp=given).nuclei))
            except ImageError:  # a ROI without nuclei
                found.append(0)
        assert tuple(found) == counts


def test_an_unknown_pixel_size_is_a_usual_one(tmp_path: Path) -> None:
    vessel, nucleus = disc(250, 250, 120), disc(60, 60)
    for sides in (None, ["a", 1], [0, 0], [0.5]):
        found = read(tmp_path, feature(vessel), feature(nucleus), pixel_size_um=sides)
        assert found.left_out == {**NONE, "regions": 1}
        assert places(found.nuclei) == {(60, 60)}


def test_ignored_objects_are_no_ground_truth_either(tmp_path: Path) -> None:
    file = tmp_path / "a.geojson"
    objects = [
        *map(feature, grid()),
        feature(disc(200, 400), "Ignore*"),
        feature(shapely.box(0, 0, 9, 9), None, "tile"),
    ]
    file.write_text(json.dumps({"type": "FeatureCollection", "features": objects}))
    truth = read_ground_truth([file], ImageEntry("1", "a.svs", tmp_path, size=(600, 600)))
    assert places(truth.polygons) == places(grid())
    assert truth.note == (
        "objects left out of a class that QuPath ignores, such as Ignore*: 1; tiles left out: 1"
    )


def test_nuclei_of_a_class_of_rois_are_ground_truth_too(tmp_path: Path) -> None:
    """What is read from a file by `refine` and by `score`: a person drew them with "Auto set"."""
    nuclei = grid()
    names = [CORRECTED, TO_CORRECT, "Nucleus"]
    drawn = [feature(nucleus, names[k % 3]) for k, nucleus in enumerate(nuclei)]
    drawn.append(feature(disc(505, 450), CORRECTED, "detection"))
    labels = read(tmp_path, *drawn)
    entry = ImageEntry("1", "a.svs", tmp_path, size=(600, 600), mpp=(0.5, 0.5))
    truth = read_ground_truth([tmp_path / "1.geojson"], entry)
    assert places(truth.polygons) == places(labels.nuclei) == places([*nuclei, disc(505, 450)])
    assert truth.note == "annotations of PatchCL and its ROIs left out: 1"


# ---------------------------------------------------------------- training samples


def prepared() -> Any:
    return prepare(ImageEntry("1", SLIDE.name, SLIDE), Config())


def test_ignored_areas_are_neither_nucleus_nor_background() -> None:
    roi = shapely.box(400, 500, 900, 1000)
    nucleus, ignored = shapely.Point(600, 700).buffer(15), shapely.box(590, 700, 700, 800)
    ((_, target),) = labels.training_samples(
        prepared(), Corrections(rois=(roi,), nuclei=(nucleus,), ignored=(ignored,))
    )
    valid = target[..., 2].astype(bool)
    assert target[..., 0].sum() == pytest.approx(nucleus.area, rel=0.02)
    expected = roi.area - (ignored - nucleus).area
    assert valid.sum() == pytest.approx(expected, rel=0.001)
    assert valid[target[..., 0] > 0].all()


def test_a_roi_without_nuclei_is_a_sample_of_background() -> None:
    roi = shapely.box(400, 500, 900, 1000)
    ((_, target),) = labels.training_samples(prepared(), Corrections(rois=(roi,)))
    assert not target[..., :2].any()
    assert target[..., 2].all()


def test_a_roi_that_does_not_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labels, "MAX_ROI_MM2", 0.05)
    with pytest.raises(ImageError, match=r"needs a box of 0 mm², more than 0\.05: draw smaller"):
        labels.training_samples(prepared(), Corrections(rois=(shapely.box(0, 0, 900, 900),)))


def samples(folder: Path, **options: Any) -> Any:
    project = open_project(folder, "files")
    images = labels.read_corrected(
        project,
        project.images(),
        Config(),
        labels_from=options.get("labels_from", CORRECTED),
        show_count=lambda *_: None,
    )
    found = [sample for each in images for sample in labels.training_samples(*each)]
    read = {image.id: corrections for image, corrections in images}
    return found, labels.corrected_images(project.images(), read)


def export(folder: Path, *features: dict[str, Any]) -> None:
    file = folder / "patchcl" / "labels" / "1.geojson"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"type": "FeatureCollection", "features": features}), "utf-8")


def test_what_was_read_is_shown(folder: Path) -> None:
    more = [
        feature(disc(250, 250, 100), "Vessel"),
        feature(shapely.MultiPoint([(5, 5), (9, 9)])),
        *(feature(disc(200 + 40 * k, 400), "Ignore*") for k in range(3)),
    ]
    export(folder, feature(ROI, CORRECTED), feature(EMPTY, CORRECTED), *map(feature, grid()), *more)
    found, (image,) = samples(folder)
    assert len(found) == 2
    assert image.in_words == (
        "2 ROIs with 9 nuclei; no nuclei, left out: 3 ignored objects, 1 region or vessel, 2 points"
    )
    assert (image.rois, image.nuclei) == (2, 9)
    assert image.left_out == {**NONE, "ignored": 3, "regions": 1, "points": 2}
    assert len(image.notes) == 1


def test_nuclei_of_a_size_that_runs_leave_out_are_told(folder: Path) -> None:
    """A refined model would not find what the person drew, and nobody would know why."""
    unlike = [disc(120, 440, 1.8), disc(160, 440, 1.8), disc(240, 440, 24)]  # 2.5 and 450 µm²
    export(folder, feature(ROI, CORRECTED), *map(feature, [*grid(), *unlike]))
    _, (image,) = samples(folder)
    small, large = image.notes
    assert small.startswith("2 of 12 nuclei have less than min_area_um2, 3 µm²: a run leaves")
    assert large.startswith("1 of 12 nuclei have more than max_area_um2, 400 µm²: a run leaves")


@pytest.mark.parametrize("as_json", [False, True])
def test_refine_reports_what_was_left_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    """In words and in JSON; nothing is trained here."""
    config = Config()
    widths = config.selftrain.widths
    start = Model(network=NucleusNetwork(widths), config=config, training=selftraining_log())
    start.save(folder / "patchcl" / "models", "patchcl")
    monkeypatch.setattr(pipeline, "training_crops", lambda *_: [])
    monkeypatch.setattr(pipeline.cdcl, "refine", lambda *_: start)
    monkeypatch.setattr(pipeline, "calibrated", lambda model, *_: model)
    vessel = feature(disc(250, 250, 100), "Vessel")
    export(
        folder, feature(ROI, CORRECTED), feature(EMPTY, CORRECTED), *map(feature, grid()), vessel
    )
    options = ["--json"] if as_json else []
    shown = CliRunner().invoke(main, ["refine", str(folder), "--backend", "files", *options])
    assert shown.exit_code == 0, shown.output
    if not as_json:
        said = "2 ROIs with 9 nuclei; no nuclei, left out: 1 region or vessel"
        assert f"Corrected: {SLIDE.name}: {said}\n" in shown.stdout
        assert f"Note: {SLIDE.name}: the ROI at x 800, y 200 px has no nuclei" in shown.stdout
        return
    (image,) = json.loads(shown.stdout)["corrected"]
    (note,) = image.pop("notes")
    assert note.startswith("the ROI at x 800, y 200 px has no nuclei")
    assert image == {
        "id": "1",
        "image": SLIDE.name,
        "fields": 2,
        "nuclei": 9,
        "left_out": {**NONE, "regions": 1},
    }


def test_rois_without_any_nucleus_teach_nothing(folder: Path) -> None:
    file = folder / "patchcl" / "labels" / "1.geojson"
    export(folder, feature(ROI, CORRECTED))
    content = json.loads(file.read_text("utf-8")) | {"patchcl": {"imported": 7}}
    file.write_text(json.dumps(content))
    with pytest.raises(TrainingError, match=r"no ROI of class .* has a nucleus"):
        samples(folder)


def test_the_problems_of_all_images_are_listed(folder: Path) -> None:
    path = folder / "project.qpproj"
    content = json.loads(path.read_text("utf-8"))
    content["images"].append({**content["images"][0], "entryID": 2, "imageName": "again.svs"})
    path.write_text(json.dumps(content), "utf-8")
    export(folder, feature(ROI, CORRECTED))
    file = folder / "patchcl" / "labels" / "1.geojson"
    file.with_name("2.geojson").write_bytes(file.read_bytes())
    with pytest.raises(ImageError) as raised:
        samples(folder)
    first, second = str(raised.value).splitlines()
    assert first.startswith("CMU-1-Small-Region.svs: the ROI at x 250, y 250 px has no nuclei")
    assert second.startswith("again.svs: the ROI")


def test_rois_to_correct_are_refused_however_they_are_written(folder: Path) -> None:
    for name in (TO_CORRECT, TO_CORRECT.replace(": ", ":")):
        with pytest.raises(ConfigError, match="are still to be corrected"):
            samples(folder, labels_from=name)


def test_labels_of_one_slide_need_not_agree_where_one_is_ignored() -> None:
    image = prepared()
    roi, nucleus = shapely.box(400, 500, 900, 1000), shapely.Point(600, 700).buffer(15)
    other = shapely.Point(700, 800).buffer(15)
    one = Corrections(rois=(roi,), nuclei=(nucleus, other))
    two = Corrections(rois=(roi,), nuclei=(other,), ignored=(nucleus.buffer(1),))
    labels.check_agreement([(image, one), (image, two)])
    with pytest.raises(ImageError, match="different nuclei"):
        labels.check_agreement([(image, one), (image, Corrections(rois=(roi,), nuclei=(other,)))])
    assert np.isclose(nucleus.area, 706, atol=2)
