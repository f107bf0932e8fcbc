"""Imports of runs within regions, in a real QuPath without a window."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import qupath
import shapely
from results import result_of

from patchcl_qupath.config import ResultConfig
from patchcl_qupath.datatypes import Nuclei
from patchcl_qupath.project.results import write_results
from patchcl_qupath.storage.records import RegionRecord

pytestmark = pytest.mark.qupath

ROOT = Path(__file__).parent.parent
SLIDE = ROOT / "sample_project" / "CMU-1-Small-Region.svs"
DETECTIONS = ResultConfig(max_annotations=0)
LOOK = """
groovy.json.JsonOutput.toJson(hierarchy.getAllObjects(false).collect { [
    name: it.getName(), is_annotation: it.isAnnotation(), measurements: it.getMeasurements(),
] })
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    qupath.launcher()
    return qupath.make_project(tmp_path / "project", SLIDE, ["a.svs"])


def imported(
    path: Path, session: qupath.Session, found: Nuclei, run: str, *regions: shapely.Geometry
) -> list[dict[str, Any]]:
    """The objects of the image after the import of a run, in regions that were selected."""
    records = tuple(RegionRecord(geometry=json.loads(shapely.to_geojson(r)), tissue_mm2=0.01)
                    for r in regions)  # fmt: skip
    within = {"within": ["(selected)"], "regions": records} if regions else {}
    result = result_of(len(found), DETECTIONS, run=run, **within)
    write_results(path.parent / "patchcl" / "results" / "1", [found], DETECTIONS, result)
    log = qupath.run_script(path, ROOT / "groovy" / "import_nuclei.groovy")
    assert "ERROR" not in log, log
    return list(session.run(path, LOOK)["a.svs"])


def test_a_selected_annotation_is_no_nucleus(path: Path, session: qupath.Session) -> None:
    """However small it is, and of any class or none."""
    draw = "draw('mine', 'Any', 20, 20, 40, 40)\nentry.saveImageData(imageData)\n'1'"
    session.run(path, qupath.DRAW_RECTANGLES + draw)
    objects = imported(
        path, session, qupath.nuclei(10, 10, "a")[:1], "one", shapely.box(20, 20, 60, 60)
    )
    (region,) = [each for each in objects if each["name"] == "PatchCL"]
    assert region["measurements"]["PatchCL: Nuclei"] == 1


def test_nuclei_of_an_unchanged_roi_outside_of_a_run_are_replaced_later(
    path: Path, session: qupath.Session
) -> None:
    """In the ROI they became annotations; nobody changed these."""
    found = qupath.nuclei(10, 10, "a")
    imported(path, session, found, "one")
    roi = {"id": "00000000-0000-0000-0000-000000000001", "name": "ROI 1 of 1", "description": ""}
    roi |= {"x": 220, "y": 220, "width": 120, "height": 120}
    rois = path.parent / "patchcl" / "fields" / "1.json"
    rois.parent.mkdir()
    rois.write_text(json.dumps({"made": "", "fields": [roi]}), "utf-8")
    inside = shapely.box(0, 0, 100, 500)
    here = shapely.intersects(found.polygons, inside)
    objects = imported(path, session, found[here], "two", inside)
    nuclei = [each for each in objects if "index" in each["measurements"]]
    assert sum(each["is_annotation"] for each in nuclei) == 9
    rois.unlink()
    objects = imported(path, session, qupath.nuclei(10, 10, "a", run=2), "three")
    nuclei = [each for each in objects if "index" in each["measurements"]]
    assert len(nuclei) == len(found)
    assert not any(each["is_annotation"] for each in nuclei)
    assert not any(each["name"] == "ROI 1 of 1" for each in objects)
