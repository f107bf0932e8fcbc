"""Exported tables and files: right values, worked out by hand, in every format."""

from __future__ import annotations

import gzip
import json
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from click.testing import CliRunner, Result
from exported import (
    AREAS,
    DAB,
    DRAWN,
    export_drawn,
    grow,
    id_of,
    make_project,
    nuclei,
    rows_of,
    write,
)

import patchcl_qupath.exports.nuclei as nuclei_module
from patchcl_qupath import library
from patchcl_qupath.cli import main
from patchcl_qupath.datatypes import FailedTile, Nuclei
from patchcl_qupath.errors import ImageError, ProjectError
from patchcl_qupath.exports import command
from patchcl_qupath.exports.images import ExportedImage, exported_image, told_apart
from patchcl_qupath.project import Project, open_project
from patchcl_qupath.project.drawn import SELECTED
from patchcl_qupath.report.found import find_image
from patchcl_qupath.report.page import write_report
from patchcl_qupath.slides.stain_vectors import H_DAB, H_E
from patchcl_qupath.status import image_status, image_statuses
from patchcl_qupath.storage.files import exclusive_lock
from patchcl_qupath.storage.geojson import read_objects, to_object
from patchcl_qupath.storage.records import (
    ImageOutcome,
    PositivityRecord,
    RegionRecord,
    write_record,
)

GRADES = (0.2, 0.4, 0.6)


def call(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, arguments)], catch_exceptions=False)


def exported(project: Project, *arguments: Any) -> list[Path]:
    """The files that an export wrote."""
    done = call(project.path, *arguments, "--json")
    assert done.exit_code == 0, done.output
    return [Path(file["path"]) for file in json.loads(done.stdout)["files"]]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Two images with nuclei, of which the first has classes, regions and a core."""
    found = make_project(tmp_path / "made", ["a, b.svs", "b.svs"])
    write(found, 0, nuclei("a"), thresholds=GRADES, drawn=DRAWN)
    write(found, 1, nuclei("b", 2, Circularity=[0.9, 0.8]))
    return found


def test_a_row_for_each_nucleus(project: Project) -> None:
    (path,) = exported(project, "--to", "csv")
    assert path == project.layout.root / "exports" / "nuclei.csv"
    rows = rows_of(path)
    assert list(rows[0]) == [
        *("Image", "Object ID", "Object type", "Name", "Classification", "TMA core", "Parent"),
        *("ROI", "Centroid X µm", "Centroid Y µm", "Centroid X px", "Centroid Y px"),
        *("Area µm^2", "DAB: Mean", "Circularity"),
    ]
    assert list(rows[1].values()) == [
        *("a, b.svs", id_of("a", 1), "Annotation", "", "Nucleus: 1+", "A-1"),
        *("Annotation (Stroma)", "Polygon", "70", "25", "140", "100", "20", "0.3", ""),
    ]
    assert [row["Parent"] for row in rows] == [
        *("Annotation (Stroma)", "Annotation (Stroma)", "A-1", "left, 1", "PatchCL"),
        *("PatchCL", "PatchCL"),
    ]
    assert [row["TMA core"] for row in rows] == ["A-1", "A-1", "A-1", "", "", "", ""]
    grades = ["Negative", "1+", "2+", "3+", "Negative"]
    assert [row["Classification"] for row in rows] == [
        *(f"Nucleus: {grade}" for grade in grades),
        *("Nucleus", "Nucleus"),
    ]
    assert [row["Circularity"] for row in rows] == ["", "", "", "", "", "0.9", "0.8"]


def test_what_is_no_number_is_empty(tmp_path: Path) -> None:
    """As in QuPath's tables; quartiles are those of the others."""
    project = make_project(tmp_path / "made", ["a.svs"])
    write(project, 0, nuclei("a", 4, Circularity=[0.5, np.nan, np.inf, 0.7]))
    rows = rows_of(exported(project, "--to", "csv")[0])
    assert [row["Circularity"] for row in rows] == ["0.5", "", "", "0.7"]
    (row,) = rows_of(exported(project, "--to", "csv", "--per", "image")[0])
    assert row["Circularity: Median"] == "0.6"


def test_parquet_has_what_csv_has_and_contours(project: Project) -> None:
    (path,) = exported(project, "--to", "parquet")
    table = pq.read_table(path)
    assert table.column_names[-1] == "geometry"
    texts = rows_of(exported(project, "--to", "csv")[0])
    for field in table.schema.names[:-1]:
        values, read = table[field].to_pylist(), [row[field] for row in texts]
        if any(isinstance(value, float) for value in values):
            numbers = [float(text) if text else np.nan for text in read]
            known = np.array(values, float)
            np.testing.assert_allclose(known, numbers, rtol=1e-6)
        else:
            assert ["" if value is None else value for value in values] == read
    middles = shapely.centroid(shapely.from_wkb(table["geometry"].to_pylist()))
    assert shapely.get_x(middles).tolist() == table["Centroid X px"].to_pylist()
    geo = json.loads(table.schema.metadata[b"geo"])
    assert geo["primary_column"] == "geometry"


def test_a_row_for_each_image(project: Project) -> None:
    first, second = rows_of(exported(project, "--to", "csv", "--per", "image")[0])
    expected = {
        "Image": "a, b.svs",
        "Object type": "Root object (Image)",
        "Num Detections": "5",
        "Num Nucleus (base)": "5",
        "Num Nucleus: Negative": "2",
        "Num Nucleus: 1+": "1",
        "Num Nucleus: 3+": "1",
        "Num Nucleus": "",
        "Nucleus: Positive %": "60",
        "Nucleus: H-score": "120",  # 20 + 2 x 20 + 3 x 20
        "Nucleus: Allred proportion": "4",
        "Nucleus: Allred intensity": "2",
        "Nucleus: Allred score": "6",
        "PatchCL: 1+ threshold": "0.2",
        "PatchCL: 3+ threshold": "0.6",
        "PatchCL: Tissue mm^2": "0.01",
        "PatchCL: Nuclei per mm^2": "500",
        "Num Nucleus: Negative per mm^2": "200",
        "Area µm^2: Lower quartile": "20",
        "Area µm^2: Median": "30",
        "Area µm^2: Upper quartile": "40",
        "DAB: Mean: Median": "0.3",
    }
    assert {name: first[name] for name in expected} == expected
    expected = {
        "Image": "b.svs",
        "Num Detections": "2",
        "Num Nucleus": "2",
        "Nucleus: Positive %": "",
        "PatchCL: Tissue mm^2": "2",
        "PatchCL: Nuclei per mm^2": "1",
        "Area µm^2: Median": "15",
        "Circularity: Median": "0.85",
    }
    assert {name: second[name] for name in expected} == expected


def test_a_row_for_each_region_and_core(project: Project) -> None:
    left, stroma = rows_of(exported(project, "--to", "csv", "--per", "region")[0])
    expected = {
        "Object ID": DRAWN[0].id,
        "Object type": "Annotation",
        "Name": "left, 1",
        "Classification": "Tumor",
        "Centroid X µm": "100",
        "Centroid Y µm": "125",
        "Num Detections": "4",  # also those in the region within
        "Nucleus: Positive %": "75",
        "Nucleus: H-score": "150",
        "Area µm^2": "50000",
        "PatchCL: Tissue mm^2": "0.002",
        "PatchCL: Nuclei per mm^2": "2000",
    }
    assert {name: left[name] for name in expected} == expected
    expected = {
        "Name": "",
        "Classification": "Stroma",
        "Num Detections": "2",
        "Num Nucleus: 2+": "0",
        "Nucleus: Positive %": "50",
        "Nucleus: H-score": "50",
        "Area µm^2: Median": "15",
    }
    assert {name: stroma[name] for name in expected} == expected
    (core,) = rows_of(exported(project, "--to", "csv", "--per", "core")[0])
    expected = {
        "Object type": "TMA core",
        "Name": "A-1",
        "Case ID": "0012",
        "Missing": "False",
        "Num Detections": "3",
        "Nucleus: H-score": "100",
    }
    assert {name: core[name] for name in expected} == expected


def test_numbers_of_rows_are_those_of_their_nuclei(project: Project) -> None:
    """Counts by region are those of the nuclei in the table of nuclei."""
    all_rows = rows_of(exported(project, "--to", "csv")[0])
    for region in rows_of(exported(project, "--to", "csv", "--per", "region")[0]):
        (drawn,) = [one for one in DRAWN if one.id == region["Object ID"]]
        inside = [
            row
            for row in all_rows
            if row["Image"] == region["Image"]
            and drawn.geometry.intersects(
                shapely.Point(float(row["Centroid X px"]), float(row["Centroid Y px"]))
            )
        ]
        assert len(inside) == int(region["Num Detections"])
        positive = sum("Negative" not in row["Classification"] for row in inside)
        assert 100 * positive / len(inside) == float(region["Nucleus: Positive %"])


@pytest.mark.parametrize("kind", ["larger", "a ring", "turned"])
def test_a_region_that_was_reshaped_about_its_centroid_is_another(
    kind: str, project: Project
) -> None:
    region = DRAWN[0]
    larger = shapely.affinity.scale(region.geometry, 1.5, 1.5)
    ring = region.geometry - shapely.affinity.scale(region.geometry, 0.5, 0.5)
    turned = shapely.affinity.rotate(region.geometry, 30, "centroid")
    changed = replace(region, geometry={"larger": larger, "a ring": ring, "turned": turned}[kind])
    assert changed.geometry.centroid.distance(region.geometry.centroid) < 1e-6
    export_drawn(project.layout.regions(project.images()[0].id), (changed, *DRAWN[1:]))
    done = call(project.path, "--to", "csv")
    assert "a, b.svs: 1 of its 3 regions were changed since the run" in done.stderr


def test_images_of_one_name_are_told_apart(tmp_path: Path) -> None:
    project = make_project(tmp_path / "made", ["a.svs", "a.svs", "b.svs"])
    for number in range(3):
        write(project, number, nuclei("abc"[number], 2))
    expected = ["a.svs (1)", "a.svs (2)", "b.svs"]
    rows = rows_of(exported(project, "--to", "csv")[0])
    assert [row["Image"] for row in rows] == [name for name in expected for _ in range(2)]
    rows = rows_of(exported(project, "--to", "csv", "--per", "image")[0])
    assert [row["Image"] for row in rows] == expected
    for entry in project.images()[1:]:
        outcome = ImageOutcome(id=entry.id, image=entry.name, problem="the disk is full")
        write_record(project.layout.outcome(entry.id), outcome)
    said = call(project.path, "--to", "csv").stderr
    assert "Note: a.svs (2): its last run failed" in said
    assert "Note: b.svs: its last run failed" in said


def test_a_name_with_an_id_is_not_that_of_another_image(tmp_path: Path) -> None:
    """A table each, also where an image is called as another one with its id."""
    names = ["s.svs", "s.ndpi", "s-1.svs", "t.svs", "t.svs", "t.svs (4)"]
    project = make_project(tmp_path / "made", names)
    assert [entry.id for entry in project.images()] == ["1", "2", "3", "4", "5", "6"]
    for number, name in enumerate(names):
        write(project, number, nuclei(f"{name} {number}", 1 + number % 5))
    paths = exported(project, "--to", "csv", "--output", tmp_path / "tables")
    assert [path.name for path in paths[:3]] == ["s-1.csv", "s-2.csv", "s-1-3.csv"]
    assert [len(rows_of(path)) for path in paths] == [1, 2, 3, 4, 5, 1]
    rows = rows_of(exported(project, "--to", "csv", "--per", "image")[0])
    assert [row["Image"] for row in rows[3:]] == ["t.svs (4)", "t.svs (5)", "t.svs (4) (6)"]


def test_the_name_of_a_file_does_not_depend_on_what_else_is_exported(tmp_path: Path) -> None:
    """What follows a dot is a part of a name, unless it is the suffix of an image's file."""
    names = ["Pt12.Ki67", "Pt12.ER", "s.svs", "s.ndpi", "x.ome.tiff"]
    project = make_project(tmp_path / "made", names)
    for number, name in enumerate(names):
        write(project, number, nuclei(name, 1 + number))
    folder = tmp_path / "tables"
    stems = ["Pt12.Ki67", "Pt12.ER", "s-3", "s-4", "x"]
    for number, stem in enumerate(stems):
        image = ("--image", f"id:{number + 1}")
        (path,) = exported(project, "--to", "csv", "--output", folder, *image)
        assert (path.name, len(rows_of(path))) == (f"{stem}.csv", number + 1)
    (folder / "old.csv").write_text("of an image that has another name now")
    done = call(project.path, "--to", "csv", "--output", folder)
    assert "did not write, of earlier ones perhaps: old.csv" in done.stderr
    assert sorted(folder.glob("*.csv")) == sorted(folder / f"{one}.csv" for one in [*stems, "old"])


def test_the_name_of_an_element_does_not_depend_on_what_else_is_exported(tmp_path: Path) -> None:
    """Files for SpatialData of single images can be joined: no two have an element of one name."""
    project = make_project(tmp_path / "made", ["Fall ä.svs", "Fall ö.svs", "a.svs", "a_um.svs"])
    entries = project.images()
    images = []
    for number, entry in enumerate(entries):
        write(project, number, nuclei(entry.name))
        image = exported_image(project, entry)
        assert isinstance(image, ExportedImage)
        images.append(image)
    together = [image.element_name for image in told_apart(images, entries)]
    assert together == ["Fall__-1", "Fall__-2", "a-3", "a_um-4"]
    assert [told_apart([image], entries)[0].element_name for image in images] == together


def test_tables_of_all_kinds_are_in_one_folder(project: Project, tmp_path: Path) -> None:
    """None replaces another, and none is told to be of an earlier export, but such a one is."""
    endings = {
        "nucleus": ".csv", "image": ".images.csv", "region": ".regions.csv", "core": ".cores.csv",
    }  # fmt: skip
    folder = tmp_path / "tables"
    for _ in range(2):
        for per, ending in endings.items():
            done = call(project.path, "--to", "csv", "--per", per, "--output", folder)
            assert "earlier" not in done.stderr
            assert (folder / f"a, b{ending}").exists()
    rows = {per: len(rows_of(folder / f"a, b{ending}")) for per, ending in endings.items()}
    assert rows == {"nucleus": 5, "image": 1, "region": 2, "core": 1}
    assert len([*folder.iterdir()]) == 8
    for per, ending in endings.items():
        (folder / f"old{ending}").touch()
        done = call(project.path, "--to", "csv", "--per", per, "--output", folder)
        assert f"of earlier ones perhaps: old{ending}\n" in done.stderr


@pytest.mark.parametrize(
    ("to", "ending"), [("geojson", ".geojson"), ("visium-hd", ".nuclei.geojson")]
)
def test_files_of_images_that_were_renamed_since_are_a_note(
    project: Project, to: str, ending: str
) -> None:
    """Also in the folder that is taken without --output."""
    assert "earlier ones" not in call(project.path, "--to", to).stderr
    content = project.path.read_text("utf-8")
    project.path.write_text(content.replace('"b.svs"', '"new.svs"'), "utf-8")
    done = call(project.path, "--to", to)
    folder = project.layout.exports / to
    assert {path.name for path in folder.iterdir()} == {
        f"{name}{ending}" for name in ("a, b", "b", "new")
    }
    assert f"{folder} has files that this export did not write" in done.stderr
    assert f"of earlier ones perhaps: b{ending}\n" in done.stderr


def test_results_of_several_runs_are_a_note(tmp_path: Path) -> None:
    project = make_project(tmp_path / "made", ["a.svs", "b.svs"])
    for number in range(2):
        write(project, number, nuclei("ab"[number], 2))
    assert "runs" not in call(project.path, "--to", "csv").stderr
    write(project, 1, nuclei("b", 2), run="f" * 16)
    assert "nuclei of these images are of 2 runs" in call(project.path, "--to", "csv").stderr


def test_nuclei_of_a_run_before_one_that_failed_are_a_note(tmp_path: Path) -> None:
    project = make_project(tmp_path / "made", ["a.svs", "b.svs"])
    for number, entry in enumerate(project.images()):
        write(project, number, nuclei("ab"[number], 2))
        problem = "the disk is full" if number else None
        outcome = ImageOutcome(id=entry.id, image=entry.name, problem=problem)
        write_record(project.layout.outcome(entry.id), outcome)
    done = call(project.path, "--to", "csv")
    assert (
        "b.svs: its last run failed, and its nuclei are those of a run before: the disk is full"
        in (done.stderr)
    )
    assert "a.svs: its last run" not in done.stderr
    statuses = image_statuses(project, project.images())
    assert [any("the disk is full" in one for one in s.changed) for s in statuses] == [False, True]
    outcome = msgspec.structs.replace(outcome, results=str(project.layout.results(outcome.id)))
    write_record(project.layout.outcome(outcome.id), outcome)
    said = call(project.path, "--to", "csv").stderr
    assert "b.svs: its last run failed after these nuclei: the disk is full" in said
    assert "a run before" not in said


def test_the_note_on_a_threshold_that_was_not_found_is_told(tmp_path: Path) -> None:
    project = make_project(tmp_path / "made", ["a.svs"])
    record = PositivityRecord(measurement="DAB: Mean", thresholds=(0.2,), note="hardly any")
    write(project, 0, nuclei("a", 2), positivity=record)
    assert "a.svs: hardly any" in call(project.path, "--to", "csv", "--per", "image").stderr


def test_tiles_that_failed_are_a_note(tmp_path: Path) -> None:
    project = make_project(tmp_path / "made", ["a.svs", "b.svs"])
    failed = FailedTile(x=0, y=0, width=9, height=9, reason="damaged")
    write(project, 0, nuclei("a", 2), failed_tiles=(failed,))
    write(project, 1, nuclei("b", 2))
    done = call(project.path, "--to", "csv")
    assert "a.svs: 1 of its tiles could not be segmented" in done.stderr
    assert "b.svs: " not in done.stderr


def test_the_density_of_an_image_whose_tissue_failed_is_not_known(tmp_path: Path) -> None:
    project = make_project(tmp_path / "made", ["a.svs", "b.svs"])
    failed = FailedTile(x=0, y=0, width=9, height=9, reason="damaged")
    write(project, 0, nuclei("a", 0), failed_tiles=(failed,), tissue_mm2=0.0)
    write(project, 1, nuclei("b", 0), tissue_mm2=0.0)
    rows = rows_of(exported(project, "--to", "csv", "--per", "image")[0])
    assert [row["PatchCL: Nuclei per mm^2"] for row in rows] == ["", "0"]
    assert [row["PatchCL: Tissue mm^2"] for row in rows] == ["", "0"]


def test_regions_that_changed_since_are_named(project: Project) -> None:
    (entry, _) = project.images()
    moved = (DRAWN[0], DRAWN[2])
    export_drawn(project.layout.regions(entry.id), moved)
    done = call(project.path, "--to", "csv")
    assert done.exit_code == 0
    assert "a, b.svs: 1 of its 3 regions were changed since the run" in done.stderr
    rows = rows_of(project.layout.exports / "nuclei.csv")
    assert [row["Parent"] for row in rows][:4] == ["A-1", "A-1", "A-1", "left, 1"]


def test_geojson_is_what_is_imported(project: Project, tmp_path: Path) -> None:
    paths = exported(project, "--to", "geojson", "--output", tmp_path / "out")
    assert [path.name for path in paths] == ["a, b.geojson", "b.geojson"]
    objects = read_objects(paths[0])
    assert objects.ids.tolist() == [id_of("a", k) for k in range(5)]
    assert objects.classes.tolist()[1] == "Nucleus: 1+"
    assert shapely.area(objects.areas).tolist() == [100] * 5
    feature = json.loads(paths[1].read_text("utf-8"))["features"][1]
    assert feature["properties"]["measurements"]["Circularity"] == 0.8
    one = tmp_path / "one.geojson"
    assert call(project.path, "--to", "geojson", "--output", one).exit_code == 2
    assert exported(project, "--to", "geojson", "--output", one, "--image", "b.svs") == [one]
    assert one.read_bytes() == paths[1].read_bytes()


def test_geojson_of_many_files_is_one(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchcl_qupath.project.results.NUCLEI_PER_FILE", 2)
    write(project, 0, nuclei("a"))
    entry = project.images()[0]
    assert len(list(project.layout.results(entry.id).glob("*.geojson.gz"))) == 3
    paths = exported(project, "--to", "geojson", "--image", entry.id)
    assert read_objects(paths[0]).ids.tolist() == [id_of("a", k) for k in range(5)]


def test_outlines_of_a_person_are_not_replaced(project: Project, tmp_path: Path) -> None:
    """A folder of ground truth has files named as the images."""
    folder = tmp_path / "ground truth"
    paths = exported(project, "--to", "geojson", "--output", folder)
    first = paths[0].read_bytes()
    assert exported(project, "--to", "geojson", "--output", folder) == paths
    drawn = json.dumps({"type": "FeatureCollection", "features": []})
    for text in (drawn, json.dumps(json.loads(drawn), indent=2), drawn.replace(" ", ""), ""):
        paths[0].unlink()
        paths[1].write_text(text, "utf-8")
        for output in (folder, paths[1]):
            done = call(project.path, "--to", "geojson", "--output", output, "--image", "b.svs")
            assert done.exit_code == 2
            assert "b.geojson is no export of nuclei" in done.stderr
        assert call(project.path, "--to", "geojson", "--output", folder).exit_code == 2
        assert paths[1].read_text("utf-8") == text
        assert not paths[0].exists()
        paths[0].write_bytes(first)


def test_outlines_of_a_person_are_not_replaced_by_those_for_visium_hd(
    project: Project, tmp_path: Path
) -> None:
    options = ("--to", "visium-hd", "--output", tmp_path)
    first, second = exported(project, *options)
    assert exported(project, *options) == [first, second]
    first.unlink()
    second.write_text("[]", "utf-8")
    done = call(project.path, *options)
    assert done.exit_code == 2
    assert f"{second.name} is no export of nuclei" in done.stderr
    assert second.read_text("utf-8") == "[]"
    assert not first.exists()


def test_visium_hd_gets_plain_numbered_polygons(project: Project) -> None:
    """What Space Ranger 4 refuses: other keys at the top, points, and open rings."""
    first, second = exported(project, "--to", "visium-hd")
    assert first.name == "a, b.nuclei.geojson"  # it must end so, and not be compressed
    content = json.loads(first.read_text("utf-8"))
    assert set(content) == {"type", "features"}
    assert content["type"] == "FeatureCollection"
    for number, feature in enumerate(content["features"], start=1):
        assert feature["properties"] == {"cell_id": number}
        assert feature["id"] == id_of("a", number - 1)
        assert feature["geometry"]["type"] == "Polygon"
        (ring,) = feature["geometry"]["coordinates"]
        assert ring[0] == ring[-1]
    assert shapely.Polygon(ring).centroid.coords[0] == (700, 700)  # px, as in the microscope image
    assert len(json.loads(second.read_text("utf-8"))["features"]) == 2


def test_cells_of_a_run_before_are_no_more_beside_the_nuclei(
    project: Project, tmp_path: Path
) -> None:
    grow(project, 1, um=2)
    arguments = ("--to", "visium-hd", "--output", tmp_path / "out", "--image", "b.svs")
    assert [path.name for path in exported(project, *arguments)][1] == "b.cells.geojson"
    write(project, 1, nuclei("b", 2))
    assert [path.name for path in exported(project, *arguments)] == ["b.nuclei.geojson"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.nuclei.geojson"]


def test_cells_are_exported_beside_their_nuclei(project: Project) -> None:
    """In tables they are the objects, as in QuPath; their nucleus says where they belong."""
    (entry, _) = project.images()
    grow(project, 0, um=5, down=110)

    rows = rows_of(exported(project, "--to", "csv")[0])
    assert rows[0]["Object type"] == "Cell"
    assert "cell" not in rows[0]
    assert (rows[0]["Centroid X px"], rows[0]["Centroid Y px"]) == ("100", "210")
    assert rows[1]["Parent"] == "Annotation (Stroma)"  # where its nucleus is
    assert rows[5]["Object type"] == "Annotation"
    (table_path,) = exported(project, "--to", "parquet", "--image", entry.id)
    drawn = shapely.from_wkb(pq.read_table(table_path)["geometry"].to_pylist())
    assert shapely.area(drawn).tolist() == [30 * 50] * 5
    nuclei_path, cells_path, _ = exported(project, "--to", "visium-hd")
    assert cells_path.name == "a, b.cells.geojson"
    for path, area in ((nuclei_path, 100), (cells_path, 30 * 50)):
        objects = read_objects(path)
        assert shapely.area(objects.areas).tolist() == [area] * 5
        assert objects.ids.tolist() == [id_of("a", k) for k in range(5)]


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("0.5.1", "DAB: Nucleus: Mean"),
        ("0.6.0", "Nucleus: DAB: Mean"),
        (None, "Nucleus: DAB: Mean"),
    ],
)
def test_measurements_have_their_names_in_the_projects_qupath(
    tmp_path: Path, version: str | None, name: str
) -> None:
    """On disk they are those of QuPath 0.6."""
    path = make_project(tmp_path, ["a.svs"]).path
    content = json.loads(path.read_text("utf-8"))
    content["version"] = version
    path.write_text(json.dumps({key: each for key, each in content.items() if each}), "utf-8")
    project = open_project(path, "files")
    write(project, 0, nuclei("a", **{"Nucleus: DAB: Mean": DAB}))
    (of_nuclei,) = exported(project, "--to", "csv")
    assert [row[name] for row in rows_of(of_nuclei)] == ["0.1", "0.3", "0.5", "0.7", "0"]
    (of_image,) = exported(project, "--to", "csv", "--per", "image")
    assert rows_of(of_image)[0][f"{name}: Median"] == "0.3"
    assert {"DAB: Nucleus: Mean", "Nucleus: DAB: Mean"} & {*rows_of(of_nuclei)[0]} == {name}
    assert pq.read_schema(project.layout.nuclei("1")).names.count("Nucleus: DAB: Mean") == 1


def test_one_file_or_one_for_each_image(tmp_path: Path) -> None:
    names = ["a.svs", "A.ndpi", 'x/y:"1".ome.tif', "."]
    project = make_project(tmp_path / "made", names)
    for number, name in enumerate(names):
        write(project, number, nuclei(name, number + 1))
    paths = exported(project, "--to", "csv", "--output", tmp_path / "tables")
    ids = [entry.id for entry in project.images()]
    assert [path.name for path in paths] == [
        f"a-{ids[0]}.csv",
        f"A-{ids[1]}.csv",
        "x_y__1_.csv",
        "image.csv",
    ]
    assert [len(rows_of(path)) for path in paths] == [1, 2, 3, 4]
    assert {row["Image"] for row in rows_of(paths[2])} == {names[2]}
    (one,) = exported(project, "--to", "csv", "--output", tmp_path / "new" / "all.CSV")
    assert len(rows_of(one)) == 10


def test_an_image_without_nuclei_is_a_header(tmp_path: Path) -> None:
    project = make_project(tmp_path / "made", ["a.svs"])
    write(project, 0, Nuclei(np.empty(0, dtype=object)))
    for per, first in {
        "nucleus": "Image,Object ID,Object type,Name,Classification,Parent,ROI,Centroid X µm",
        "region": "Image,Object ID,Object type,Name,Classification,Num Detections",
        "core": "Image,Object ID,Object type,Name,Case ID,Missing,Num Detections",
    }.items():
        (path,) = exported(project, "--to", "csv", "--per", per)
        (line,) = path.read_text("utf-8").splitlines()
        assert line.startswith(first)
    (row,) = rows_of(exported(project, "--to", "csv", "--per", "image")[0])
    assert (row["Num Detections"], row["PatchCL: Nuclei per mm^2"]) == ("0", "0")
    (path,) = exported(project, "--to", "geojson")
    assert json.loads(path.read_text("utf-8"))["features"] == []
    (path,) = exported(project, "--to", "visium-hd")
    assert json.loads(path.read_text("utf-8"))["features"] == []


def test_excel_leaves_texts_as_they_are(tmp_path: Path) -> None:
    changed = ["0012", "1-2", "2e5", "=1+1", "SEPT2", "@x", "5%", "(5)", "$ 5", "5 A", "9:30 pm"]
    changed += ["Jan 5, 2020", "Jan. 5", "5 Jan, 2020", "5 %", "($5)"]
    # By an Excel that is not English.
    changed += ["OKT3", "3-Mai", "5. März", "5. März 2020", "5 €", "5€", "1.234,50 €"]
    names = [*changed, 'say "3"', "é 12", "5 AB", "A 5%"]
    project = make_project(tmp_path / "made", names)
    for number, name in enumerate(names):
        write(project, number, nuclei(name, 1))
    (path,) = exported(project, "--to", "csv", "--excel")
    assert path.read_bytes().startswith(b"\xef\xbb\xbfImage,Object ID")
    rows = rows_of(path)
    formulas = [f'="{name}"' for name in changed]
    assert [row["Image"] for row in rows] == [*formulas, *names[len(changed) :]]
    assert [row["Object ID"] for row in rows] == [id_of(name, 0) for name in names]
    (plain,) = exported(project, "--to", "csv")
    assert plain.read_bytes().startswith(b"Image,Object ID")
    assert [row["Image"] for row in rows_of(plain)] == names


def test_excel_shows_so_many_rows(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchcl_qupath.exports.command._EXCEL_ROWS", 7)
    done = call(project.path, "--to", "csv", "--excel")
    assert "nuclei.csv has 7 rows, and Excel shows 7" in done.stderr
    assert "Excel" not in call(project.path, "--to", "csv").stderr
    monkeypatch.setattr("patchcl_qupath.exports.command._EXCEL_ROWS", 8)
    assert "Excel" not in call(project.path, "--to", "csv", "--excel").stderr


def test_nuclei_are_read_some_at_a_time(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = exported(project, "--to", "csv")[0].read_bytes()
    monkeypatch.setattr("patchcl_qupath.storage.parquet._BATCH", 2)
    seen: list[int] = []
    rows = nuclei_module._rows
    monkeypatch.setattr(
        nuclei_module, "_rows", lambda *given: seen.append(len(given[1])) or rows(*given)
    )
    assert exported(project, "--to", "csv")[0].read_bytes() == whole
    assert seen == [2, 2, 1, 2]


def test_a_region_in_place_of_which_another_was_copied_is_named(project: Project) -> None:
    """As many as before have the place and name of one that was counted: one of these is gone."""
    (entry, _) = project.images()
    copied = replace(DRAWN[1], id=str(uuid.uuid4()))
    export_drawn(project.layout.regions(entry.id), (DRAWN[1], copied, DRAWN[2]))
    done = call(project.path, "--to", "csv")
    assert "a, b.svs: 1 of its 3 regions were changed since the run" in done.stderr


def test_regions_that_were_drawn_since_are_a_note(project: Project) -> None:
    (entry, _) = project.images()
    path = project.layout.regions(entry.id)
    for geometry in (shapely.box(500, 0, 600, 100), DRAWN[0].geometry):
        new = replace(DRAWN[0], id=str(uuid.uuid4()), name="new", geometry=geometry)
        export_drawn(path, (*DRAWN, new))
        done = call(project.path, "--to", "csv", "--per", "region")
        assert "a, b.svs: 1 of its regions were drawn since the run" in done.stderr
        assert "were changed" not in done.stderr
    other = replace(DRAWN[0], class_name="Necrosis")  # of a class that was not counted
    export_drawn(path, (*DRAWN, other))
    assert "since the run" not in call(project.path, "--to", "csv").stderr
    export_drawn(path, (replace(DRAWN[0], name="new"), *DRAWN[1:]))  # one renamed is one change
    assert "were drawn" not in call(project.path, "--to", "csv").stderr


def test_a_pixel_size_that_was_corrected_since_is_a_note(project: Project) -> None:
    """What is exported is in µm of before; that QuPath reads it in other digits is no change."""
    content = json.loads(project.path.read_text("utf-8"))
    metadata = content["images"][0]["serverBuilder"]["metadata"]
    for width, changed in ((0.5000001, False), (0.25, True)):
        metadata["pixelCalibration"]["pixelWidth"]["value"] = width
        project.path.write_text(json.dumps(content), "utf-8")
        done = call(project.path, "--to", "csv")
        (row, *_) = rows_of(project.layout.exports / "nuclei.csv")
        assert row["Centroid X µm"] == "50"
        assert ("a, b.svs: its pixel size was changed since the run" in done.stderr) is changed
        page = write_report(open_project(project.path, "files")).read_text("utf-8")
        assert ("its pixel size was changed since the run" in page) is changed


def test_a_slide_that_was_replaced_since_is_a_note(project: Project) -> None:
    """One that is not there, or is a copy, is none."""
    slide = project.images()[0].path
    note = "a, b.svs: its slide file was replaced since the run"
    for content, changed in ((None, False), (b"1", False), (b"another", True)):
        if content is not None:
            slide.write_bytes(content)  # the results are of a slide of 1 byte
        assert (note in call(project.path, "--to", "csv").stderr) is changed
        now = open_project(project.path, "files")
        page = write_report(now).read_text("utf-8")
        assert ("its slide file was replaced since the run" in page) is changed
        entry, _ = now.images()
        assert ("slide file" in image_status(now, entry).changed) is changed


def told(project: Project) -> list[str]:
    """What was changed of the first image, as status has it; export and report tell the same."""
    entry, _ = project.images()
    changed = image_status(project, entry).changed
    notes = call(project.path, "--to", "csv").stderr
    warnings = find_image(project, entry).warnings
    told = {"stain vectors": "its stain vectors were changed", "regions": "the regions of its run"}
    for change, text in told.items():
        assert (f"{entry.name}: {text}" in notes) is (change in changed)
        assert any(text in warning for warning in warnings) is (change in changed)
    return [change for change in changed if change in told]


def test_stain_vectors_that_were_changed_since_are_a_note(project: Project) -> None:
    """What QuPath rounds when it saves them is no change; what was not exported is not known."""
    write(project, 0, nuclei("a"), stains=H_E)
    path = project.layout.stains("1")
    assert told(project) == []
    path.parent.mkdir(parents=True)
    for stains, digits, changed in (
        (H_E, 5, False),
        (H_E, 4, False),
        (H_DAB, 5, True),
        (replace(H_E, background=(240.0, 241.0, 240.0)), 5, True),
        (replace(H_E, names=("Hematoxylin", "Eosin 2")), 5, True),
    ):
        vectors = [[round(number, digits) for number in vector] for vector in stains.vectors]
        each = [
            {"name": name, "vector": vector}
            for name, vector in zip(stains.names, vectors, strict=True)
        ]
        own = {"type": "OTHER", "background": stains.background, "stains": each}
        path.write_text(json.dumps(own))
        assert (told(project) == ["stain vectors"]) is changed
    path.write_text("{")  # the next run says so
    assert told(project) == []
    path.unlink()
    summary = project.path.parent / "data" / "1" / "summary.json"
    summary.parent.mkdir(parents=True)
    summary.write_text('{"imageType": "BRIGHTFIELD_H_DAB"}')
    assert told(project) == ["stain vectors"]
    write(project, 0, nuclei("a"), stains=replace(H_DAB, background=(240.0, 240.0, 240.0)))
    assert told(project) == []  # the image's own are in no file


def test_regions_of_the_run_that_were_changed_since_are_a_note(project: Project) -> None:
    tumour, other = DRAWN[:2]
    second = replace(tumour, geometry=shapely.box(500, 0, 600, 100))
    records = tuple(
        RegionRecord(geometry=to_object(region.geometry), tissue_mm2=0.01)
        for region in (tumour, second)
    )
    write(project, 0, nuclei("a"), within=["Tumor"], regions=records)
    digits = replace(tumour, geometry=shapely.box(0, 0, 400.004, 999.996))
    larger = replace(second, geometry=shapely.box(500, 0, 600, 102))
    path = project.layout.regions("1")
    for drawn, changed in (
        ((tumour, second), False),
        ((second, digits, other), False),
        ((tumour, larger), True),
        ((tumour,), True),
        ((other,), True),
    ):
        export_drawn(path, drawn)
        assert (told(project) == ["regions"]) is changed
    path.unlink()
    assert told(project) == []
    write(project, 0, nuclei("a"), within=[SELECTED], regions=records)
    export_drawn(path, (other,))  # what is selected is never saved
    assert told(project) == []
    write(project, 0, nuclei("a"))
    assert told(project) == []


def test_images_without_cores_are_named(project: Project) -> None:
    """Of one the cores were counted; of the other, which has a grid, perhaps, they were not."""
    for per, what in (("core", "no TMA cores"), ("region", "no regions")):
        done = call(project.path, "--to", "csv", "--per", per)
        assert f"Note: b.svs: {what} were counted: patchcl-qp run --" in done.stderr
    assert "counted" not in call(project.path, "--to", "csv", "--per", "image").stderr


def test_a_project_that_was_never_run_is_refused(tmp_path: Path) -> None:
    project = make_project(tmp_path / "made", ["a.svs", "b.svs"])
    done = call(project.path, "--to", "csv")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: {project.path} has no nuclei to export: patchcl-qp run")
    assert not project.layout.exports.exists()


def test_images_without_nuclei_files_are_left_out(project: Project) -> None:
    project.remove(project.images()[1])
    done = call(project.path, "--to", "csv")
    assert done.exit_code == 0
    assert "Left out: b.svs: its nuclei were removed" in done.stderr
    assert len(rows_of(project.layout.exports / "nuclei.csv")) == 5


def test_a_damaged_file_costs_one_image(project: Project) -> None:
    entry = project.images()[1]
    project.layout.nuclei(entry.id).write_bytes(b"PAR1 not")
    done = call(project.path, "--to", "csv")
    assert done.exit_code == 1
    assert f"Failed: b.svs: {project.layout.nuclei(entry.id)} is damaged" in done.stderr
    assert len(rows_of(project.layout.exports / "nuclei.csv")) == 5


def lost(path: Path, place: int) -> None:
    """Put zeros in place of some bytes, as a disk may have it."""
    content = path.read_bytes()
    path.write_bytes(content[:place] + bytes(16) + content[place + 16 :])


HARMS: dict[str, Callable[[Path], Any]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-12]),
    "cut between members": lambda path: path.write_bytes(
        b"".join(map(gzip.compress, gzip.decompress(path.read_bytes()).splitlines(True)[:-1]))
    ),
    "empty": lambda path: path.write_bytes(b""),
    "no deflate": lambda path: lost(path, 24),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS.keys())
def test_a_damaged_file_for_qupath_costs_one_image(
    project: Project, harm: Callable[[Path], Any]
) -> None:
    damaged, whole = project.images()
    (path,) = project.layout.results(damaged.id).glob("*.geojson.gz")
    harm(path)
    done = call(project.path, "--to", "geojson")
    assert done.exit_code == 1
    (line,) = done.stderr.splitlines()
    words = ["is damaged", "remove it and run again"]
    if not path.exists():
        words = ["cannot be read", "run again"]
    assert line.startswith(f"Failed: {damaged.name}: {path} {words[0]} (")
    assert line.endswith(f"): {words[1]}")
    (written,) = (project.layout.exports / "geojson").iterdir()
    assert [*read_objects(written).ids] == [id_of("b", 0), id_of("b", 1)]
    assert written.stem == Path(whole.name).stem
    with pytest.raises(ImageError, match=words[0]):
        library.export(project, "geojson")


def test_nuclei_for_which_there_is_no_memory_are_not_damaged(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who removed their file would lose them."""

    def full(*_: object) -> None:
        raise pa.ArrowMemoryError("malloc of size 5 failed")

    monkeypatch.setattr(pq, "read_schema", full)
    with pytest.raises(ProjectError, match=r"cannot be read \(malloc .* failed\): run again"):
        library.export(project, "csv")


@pytest.mark.parametrize("to", ["csv", "parquet", "visium-hd", "anndata"])
@pytest.mark.parametrize("output", [None, "folder"])
def test_damage_within_a_table_costs_one_image(
    project: Project, tmp_path: Path, to: str, output: str | None
) -> None:
    if to == "anndata":
        pytest.importorskip("anndata")
    damaged, whole = project.images()
    path = project.layout.nuclei(damaged.id)
    lost(path, path.read_bytes().index(np.float32(AREAS).tobytes()))
    options = [] if output is None else ["--output", tmp_path / output]
    done = call(project.path, "--to", to, "--json", *options)
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    (problem,) = found["problems"]
    assert problem.startswith(f"{damaged.name}: {path} is damaged (")
    (file,) = found["files"]
    assert file["rows"] == 2
    assert Path(file["path"]).exists()
    if to == "csv":
        assert {row["Image"] for row in rows_of(Path(file["path"]))} == {whole.name}


@pytest.mark.parametrize("to", ["csv", "parquet", "geojson", "visium-hd"])
def test_nuclei_that_a_run_replaces_meanwhile_cost_one_image(
    project: Project, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    """They are not those of the record that was read, which has their class and columns."""
    replaced, whole = project.images()
    written = command._written
    runs = [nuclei("a", 3)]

    def late(*arguments: Any) -> Any:
        while runs:
            write(project, 0, runs.pop())
        return written(*arguments)

    monkeypatch.setattr(command, "_written", late)
    done = call(project.path, "--to", to, "--json")
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["problems"] == [
        f"{replaced.name}: its nuclei were replaced while they were exported: export again"
    ]
    (file,) = found["files"]
    assert file["rows"] == 2
    if to == "csv":
        assert {row["Image"] for row in rows_of(Path(file["path"]))} == {whole.name}
    assert call(project.path, "--to", to).exit_code == 0


def test_nuclei_that_a_killed_run_was_replacing_are_exported(project: Project) -> None:
    """Unless a process is at work, which is about to replace them itself."""
    results = project.layout.results(project.images()[0].id)
    before = results.with_name(f".{results.name}.0a1b2c3d.partial.old")
    with exclusive_lock(project.layout.root):
        results.rename(before)
        assert "has no nuclei: segment it first" in call(project.path).stderr
        assert before.exists()
    done = call(project.path)
    assert (done.exit_code, done.stderr) == (0, "")
    assert results.exists()
    assert not before.exists()


def test_where_all_nuclei_are_damaged_there_is_no_file(project: Project) -> None:
    for entry in project.images():
        path = project.layout.nuclei(entry.id)
        lost(path, path.read_bytes().index(np.float32(AREAS[:2]).tobytes()))
    done = call(project.path, "--to", "csv")
    assert done.exit_code == 1
    assert [line.partition(": ")[0] for line in done.stderr.splitlines()] == ["Failed"] * 2
    assert not (project.layout.exports / "nuclei.csv").exists()


def test_an_export_that_fails_leaves_the_old_file(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = exported(project, "--to", "csv")
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise ImageError("broken off")

    monkeypatch.setattr(nuclei_module, "_rows", fail)
    assert "broken off" in call(project.path, "--to", "csv").stderr
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["nuclei.csv"]


@pytest.mark.parametrize("to", ["csv", "geojson"])
def test_where_the_project_cannot_be_written_to_another_place_is_named(
    project: Project, tmp_path: Path, to: str
) -> None:
    project.layout.exports.write_text("a file in the way of the folder")
    done = call(project.path, "--to", to)
    assert done.exit_code == 1
    assert "cannot write" in done.stderr
    assert done.stderr.strip().endswith(
        "move that file away; or export elsewhere, by --output FOLDER"
    )
    assert call(project.path, "--to", to, "--output", tmp_path / "here").exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "geojson", "--per", "region"], "--per region makes a table: use --to csv"),
        (["--to", "parquet", "--excel"], "--excel is for tables in CSV"),
        (["--to", "visium-hd", "--output", "x.geojson"], "name a folder for those of Visium HD"),
        (["--output", "x.parquet"], "a file of parquet, and csv is exported: use --to parquet"),
        (["--to", "parquet", "--output", "x.CSV"], "a file of csv, and parquet is exported: use"),
        (["--to", "geojson", "--output", "x.h5ad"], "a file of anndata, and geojson is exported"),
        (["--output", "x.csv.gz"], "x.csv.gz is named as a file, and not as one of csv: name it x"),
        (["--excel", "--output", "t.XLSX"], "not as one of csv: name it t.csv, or name a folder"),
        (["--to", "parquet", "--output", "t.feather"], "one of parquet: name it t.parquet, or"),
        (["--to", "geojson", "--output", "x.ndjson"], "name it x.geojson, or name a folder"),
        (["--to", "geojson", "--output", "x.geojson.gz"], "name it x.geojson, or name a folder"),
    ],
)
def test_what_cannot_be_asked_for(project: Project, options: list[str], message: str) -> None:
    """A folder was made of the name of a file in another format, with tables in CSV in it."""
    done = call(project.path, *options)
    assert done.exit_code == 2
    assert message in done.stderr
    assert not any(map(Path.exists, map(Path, options)))


def test_tables_without_rows_say_how_to_get_some(tmp_path: Path) -> None:
    project = make_project(tmp_path / "made", ["a.svs"])
    write(project, 0, nuclei("a"))
    done = call(project.path, "--to", "csv", "--per", "region")
    assert done.exit_code == 0
    assert "no regions were counted: patchcl-qp run --summarise CLASS" in done.stderr
