"""What refining changed: corrections counted on discs in known places, saved, printed, reported."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import shapely
import shapely.affinity
from click.testing import CliRunner
from exported import make_project, nuclei, write
from msgspec import structs
from PIL import Image

from patchcl_qupath import cli, pipeline
from patchcl_qupath.config import TO_CORRECT
from patchcl_qupath.correction.changes import (
    begin,
    compare,
    finish,
    forget,
    give,
    rois_are_unsaved,
    rois_wait,
)
from patchcl_qupath.datatypes import Box, CorrectionRoi, Corrections, FailedTile, Polygons
from patchcl_qupath.errors import StorageError
from patchcl_qupath.project import NewImage, Project, init_project, open_project
from patchcl_qupath.project.results import write_removed
from patchcl_qupath.report.views import _rois
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.storage.layout import Layout
from patchcl_qupath.storage.parquet import read_nuclei
from patchcl_qupath.storage.records import (
    ChangeCounts,
    ChangesRecord,
    ReceiptRecord,
    RegionRecord,
    ResultRecord,
    RoiChangesRecord,
    RunRecord,
    read_record,
    write_record,
)

SAMPLE = Path(__file__).parent.parent / "sample_project"
ROI = shapely.box(0, 0, 200, 100)


def discs(*places: tuple[float, ...]) -> Polygons:
    """Discs of x, y and, unless it is 8, radius."""
    found = np.empty(len(places), dtype=object)
    found[:] = [shapely.Point(x, y).buffer(*(radius or [8])) for x, y, *radius in places]
    return found


def counts(**expected: int) -> ChangeCounts:
    return ChangeCounts(**expected)


KEPT, GONE, SMALL, LARGE, NEW = (20, 50), (60, 50), (100, 50, 7), (100, 50, 9), (140, 50)
BEFORE, CORRECTED = discs(KEPT, GONE, SMALL), discs(KEPT, LARGE, NEW)
MADE = {"deleted": 1, "added": 1, "reshaped": 1, "kept": 1}


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (discs(), {**MADE, "deleted_now": 1}),
        (BEFORE, {**MADE, "kept_now": 1}),
        (
            CORRECTED,
            {**MADE, "deleted_now": 1, "added_now": 1, "reshaped_now": 1, "kept_now": 1},
        ),
        # A smaller nucleus in the place of a false one is still false, and no new one.
        (discs(KEPT, (62, 50, 4)), {**MADE, "kept_now": 1}),
        # A false nucleus elsewhere, and one outside of the ROI.
        (discs(KEPT, (180, 80), (300, 50)), {**MADE, "deleted_now": 1, "kept_now": 1, "new": 1}),
        # Farther from the person's contour than the model before; too far from the one added.
        (discs((100, 50, 6.9), (148, 50)), {**MADE, "deleted_now": 1, "new": 1}),
    ],
)
def test_corrections_that_a_model_makes(after: Polygons, expected: dict[str, int]) -> None:
    assert compare(ROI, BEFORE, CORRECTED, after) == counts(**expected)


def test_a_merged_nucleus_is_no_false_one() -> None:
    """Two were deleted and one drawn over both: the same one of the model is right."""
    before, corrected = discs((50, 50, 5), (60, 50, 5)), discs((55, 50, 9))
    found = compare(ROI, before, corrected, corrected)
    assert found == counts(deleted=2, added=1, deleted_now=2, added_now=1)


def test_a_nucleus_counts_where_its_centroid_is() -> None:
    """On the border of the ROI, and moved by less than a hundredth of a pixel by a file."""
    border, outside = discs((2, 50), (-2, 80)), discs((2.005, 50), (-2, 80))
    assert compare(ROI, border, outside, outside) == counts(kept=1, kept_now=1)
    assert compare(ROI, discs(), discs(), discs()) == counts()


def segmented_image(
    contours: Polygons,
    region: shapely.Geometry | None = None,
    failed: shapely.Geometry = shapely.Polygon(),  # noqa: B008  # it never changes
    shape: tuple[int, int] = (40, 40),
) -> Any:
    """What a run found in an image of (rows, columns); ``failed`` is the area of failed tiles."""
    slide = SimpleNamespace(downsample=(1.0, 1.0), shape=shape)
    return SimpleNamespace(
        image=SimpleNamespace(id="1", region=region, slide=slide),
        failed_area=failed,
        contours_in=lambda box: shapely.transform(contours, lambda xy: xy - (box.col0, box.row0)),
        pixels=lambda box: np.zeros((*box.shape, 3), np.uint8),
    )


def test_a_contour_that_rounding_folded_is_compared(tmp_path: Path) -> None:
    area = shapely.box(0, 0, 40, 40)
    folded = shapely.Polygon([(10, 10), (30, 10), (30, 30), (20, 9.99), (10, 30)])
    assert not folded.is_valid
    drawn = shapely.get_coordinates(shapely.Point(20, 16).buffer(8))[:-1].ravel().tolist()
    roi = RoiChangesRecord(
        **structs.asdict(counts(added=1)),
        x=0,
        y=0,
        width=40,
        height=40,
        geometry=json.loads(shapely.to_geojson(area)),
        before=[],
        corrected=[drawn],
    )
    layout = Layout(tmp_path)
    record = ChangesRecord(model="a", model_name="refined", made="today", rois=(roi,))
    write_record(layout.changes("1") / "changes.json", record)
    found = finish(layout, segmented_image(np.array([folded])), "a", "run 1")
    assert found is not None
    assert found.added == 1
    written = read_record(layout.changes("1") / "changes.json", ChangesRecord)
    assert written is not None
    (contour,) = written.rois[0].after  # the larger part of it is drawn
    part = shapely.Polygon(np.reshape(contour, (-1, 2)))
    assert part.area == pytest.approx(folded.buffer(0).area / 2, rel=0.01)
    view: Any = SimpleNamespace(name="a.svs", changes=written, changes_folder=layout.changes("1"))
    (shown,) = _rois(view)
    assert shown.after.count("M") == 1


def test_refining_with_one_image_keeps_what_another_was_given(tmp_path: Path) -> None:
    """Of a ROI that was corrected, the nuclei before are those that the person was given."""
    project = make_project(tmp_path / "made", ["a.svs", "b.svs"])
    layout, roi = project.layout, shapely.box(80, 80, 200, 200)
    for number, name in enumerate("ab"):
        write(project, number, nuclei(name, 2))  # both lie in the ROI
    drawn = nuclei("a", 1).polygons  # a person deleted one
    corrections = {name: Corrections(rois=(roi,), nuclei=(*drawn,)) for name in ("1", "2")}

    def refine(*images: str, model: str) -> dict[str, ChangesRecord | None]:
        corrected = {image: corrections[image] for image in images if image in corrections}
        begin(layout, images, corrected, model=model, model_name="refined", roi_class="Done")
        found = {image: layout.changes(image) / "changes.json" for image in ("1", "2")}
        return {image: read_record(path, ChangesRecord) for image, path in found.items()}

    first = refine("1", "2", model="first")
    for number, name in enumerate("ab"):  # the refined model deletes it by itself
        write(project, number, nuclei(name, 1))
    second = refine("1", model="second")
    assert second["2"] == first["2"]
    third = refine("1", "2", model="third")
    for record in third.values():
        assert record is not None
        assert record.model == "third"
        assert [(each.deleted, each.kept) for each in record.rois] == [(1, 1)]
    del corrections["2"]
    assert refine("1", "2", model="fourth")["2"] is None  # its ROI was deleted


def test_what_two_rois_share_counts_once(tmp_path: Path) -> None:
    """Nuclei at x 100, 140 and 300: of the second, in both ROIs, the contour is new."""
    project = make_project(tmp_path / "made", ["a.svs"])
    write(project, 0, nuclei("a", 1))
    rois = (shapely.box(80, 80, 200, 200), shapely.box(120, 80, 320, 200))
    segmented = segmented_image(nuclei("a", 3).polygons, shape=(1000, 1000))
    for order, model in ((1, "m"), (-1, "n")):  # read again, in another order
        drawn = tuple(nuclei("a", 3).polygons)
        corrections = {"1": Corrections(rois=rois[::order], nuclei=drawn, ids=("1", "2")[::order])}
        names = {"model": model, "model_name": "refined", "roi_class": "Done"}
        begin(project.layout, ["1"], corrections, **names)
        found = finish(project.layout, segmented, model, "run 1")
        assert found == counts(added=2, added_now=2, kept=1, kept_now=1)
        record = read_record(project.layout.changes("1") / "changes.json", ChangesRecord)
        assert record is not None
        assert [(roi.added, roi.kept) for roi in record.rois] == [(1, 1), (1, 0)]
        run_again(project, 3, refined=True)


def test_the_picture_of_a_roi_that_reaches_out_of_the_image_is_its_size(tmp_path: Path) -> None:
    """The report draws contours over all of it: a picture of a part would be stretched below."""
    project = make_project(tmp_path / "made", ["a.svs"])
    roi = shapely.box(80, 80, 200, 200)
    corrections = {"1": Corrections(rois=(roi,), nuclei=tuple(nuclei("a", 2).polygons), ids=("1",))}
    for model in "mn":
        run_again(project, 2, refined=model == "n")
        result = read_record(project.layout.result("1"), ResultRecord)
        assert result is not None
        slide = structs.replace(result.slide, size=(150, 300))
        write_record(project.layout.result("1"), structs.replace(result, slide=slide))
        names = {"model": model, "model_name": "refined", "roi_class": "Done"}
        assert begin(project.layout, ["1"], corrections, **names) == {"1": ()}
        segmented = segmented_image(nuclei("a", 2).polygons, shape=(300, 150))
        assert finish(project.layout, segmented, model, "run 1") == counts(kept=2, kept_now=2)
        record = read_record(project.layout.changes("1") / "changes.json", ChangesRecord)
        assert record is not None
        (found,) = record.rois
        with Image.open(project.layout.changes("1") / found.picture) as picture:
            assert picture.size == (found.width, found.height) == (70, 120)


ELLIPSE = shapely.affinity.scale(shapely.Point(140, 120).buffer(1), 90, 60)
# Of what lies outside of the image, a line remains.
BEYOND = shapely.Polygon(
    [(-50, 0), (0, 0), (0, 60), (-20, 60), (-20, 80), (200, 80), (200, 200), (-50, 200)]
)


@pytest.mark.parametrize(
    ("roi", "region", "failed", "counted"),
    [
        (ELLIPSE, ELLIPSE.buffer(3), None, True),  # in it, but not the corners of its box
        (ELLIPSE, ELLIPSE, None, True),
        (shapely.box(80.4, 80.4, 200.6, 200.6), shapely.box(80.4, 80.4, 200.6, 200.6), None, True),
        (ELLIPSE, ELLIPSE & shapely.box(0, 0, 220, 300), None, False),
        (BEYOND, None, None, True),
        (BEYOND, BEYOND, shapely.box(200, 0, 300, 300), True),
        (ELLIPSE, None, shapely.box(0, 0, 75, 75), True),  # a failed tile meets its box alone
        (ELLIPSE, None, shapely.box(0, 0, 110, 300), False),
    ],
)
def test_a_roi_counts_where_the_run_segmented_all_of_it(
    tmp_path: Path,
    roi: shapely.Geometry,
    region: shapely.Geometry | None,
    failed: shapely.Geometry | None,
    counted: bool,
) -> None:
    """Nuclei in a failed tile are not deleted by the refined model: nobody looked for them."""
    project = make_project(tmp_path / "made", ["a.svs"])
    write(project, 0, nuclei("a", 2))
    corrections = {"1": Corrections(rois=(roi,), nuclei=(nuclei("a", 2).polygons[1],))}
    names = {"model": "m", "model_name": "refined", "roi_class": "Done"}
    begin(project.layout, ["1"], corrections, **names)
    segmented = segmented_image(
        nuclei("a", 2).polygons[1:], region, failed or shapely.Polygon(), (300, 300)
    )
    found = finish(project.layout, segmented, "m", "run 1")
    assert found == (counts(deleted=1, deleted_now=1, kept=1, kept_now=1) if counted else None)


def test_a_damaged_file_of_nuclei_costs_no_refined_model(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    project = make_project(tmp_path / "made", ["a.svs", "b.svs"])
    layout, roi = project.layout, shapely.box(80, 80, 200, 200)
    for number, name in enumerate("ab"):
        write(project, number, nuclei(name, 2))
    layout.nuclei("1").write_bytes(b"PAR1")
    corrections = {image: Corrections(rois=(roi,)) for image in ("1", "2")}
    begin(layout, corrections, corrections, model="m", model_name="refined", roi_class="Done")
    assert [(layout.changes(image) / "changes.json").exists() for image in "12"] == [False, True]
    assert f"{layout.nuclei('1')} is damaged" in caplog.text


def test_refining_with_another_class_keeps_what_was_given_for_the_first(tmp_path: Path) -> None:
    """Two people, say, each with ROIs of a class of their own, in turn."""
    project = make_project(tmp_path / "made", ["a.svs"])
    layout, path = project.layout, project.layout.changes("1") / "changes.json"
    write(project, 0, nuclei("a", 2))
    one = shapely.box(80, 80, 200, 200)  # both nuclei lie in it
    other = shapely.box(300, 300, 400, 400)
    drawn = nuclei("a", 1).polygons  # a person deleted one
    mine = {"1": Corrections(rois=(one,), nuclei=(*drawn,))}
    yours = {"1": Corrections(rois=(other,), nuclei=())}

    def refine(corrections: dict[str, Corrections], model: str, roi_class: str) -> ChangesRecord:
        names = {"model": model, "model_name": "refined", "roi_class": roi_class}
        begin(layout, ["1"], corrections, **names)
        record = read_record(path, ChangesRecord)
        assert record is not None
        assert record.model == model
        return record

    refine(mine, "first", "Mine")
    write(project, 0, nuclei("a", 1))  # the refined model deletes it by itself
    second = refine(yours, "second", "Yours: done")
    assert [roi.x for roi in second.rois] == [300]  # the model learnt nothing else
    assert refine({}, "third", "Theirs").rois == ()  # this image has no such ROI
    segmented: Any = SimpleNamespace(image=SimpleNamespace(id="1"))
    assert finish(layout, segmented, "third", "run 1") is None
    fourth = refine(mine, "fourth", "Mine")
    assert [(each.deleted, each.kept) for each in fourth.rois] == [(1, 1)]
    assert [roi.x for roi in refine(yours, "fifth", "Yours:done").rois] == [300]
    assert {*refine({}, "sixth", "Yours: done").others} == {"Mine"}


GIVEN = shapely.box(80, 80, 200, 200)  # a suggested ROI, in which two nuclei lie
NOTE = (
    "corrections in the ROI at x {:.0f}, y {:.0f} px are not counted: its nuclei may be those of "
    "an earlier run than the last one"
)


@pytest.fixture
def suggested(tmp_path: Path) -> Project:
    """A project of an image in which GIVEN was suggested after a first run."""
    project = make_project(tmp_path / "made", ["a.svs"])
    write(project, 0, nuclei("a", 2), made="2020-01-01T00:00:00+00:00")
    roi = CorrectionRoi("first", "ROI 1 of 1", "", x=80, y=80, width=120, height=120)
    project.mark_rois(project.images()[0], [roi])
    give(project.layout, "1")
    return project


def import_now(project: Project) -> None:
    """What groovy/import_nuclei.groovy leaves of an import."""
    receipt = project.layout.receipt("1")
    receipt.parent.mkdir(exist_ok=True)
    receipt.write_text("{}", "utf-8")
    later = project.layout.rois("1").stat().st_mtime_ns + 10**9
    os.utime(receipt, ns=(later, later))


def run_again(project: Project, count: int, *, refined: bool = False) -> None:
    """Write what another model finds: the first ``count`` nuclei."""
    write(project, 0, nuclei("a", count), run="again", made="2100-01-01T00:00:00+00:00")
    training = {"refined_from": "m"} if refined else {}
    record = RunRecord(
        version="", model="n", engine="", config={}, within=[], versions={}, training=training,
        images=[],
    )  # fmt: skip
    write_record(project.layout.run_record("again"), record)


def refined_with(
    project: Project, *rois: tuple[shapely.Geometry, str], model: str = "n"
) -> tuple[list[tuple[int, int, int, int]], tuple[str, ...]]:
    """Refine with ROIs and their ids, in which a person left the two nuclei as they were given.

    Returns numbers of nuclei deleted, added, reshaped and kept in each, and notes.
    """
    corrections = Corrections(
        rois=tuple(roi for roi, _ in rois),
        nuclei=tuple(nuclei("a", 2).polygons),
        ids=tuple(id_ for _, id_ in rois),
    )
    notes = begin(
        project.layout, ["1"], {"1": corrections}, model=model, model_name="r", roi_class="Done"
    )
    record = read_record(project.layout.changes("1") / "changes.json", ChangesRecord)
    counted = record.rois if record else ()
    return [(roi.deleted, roi.added, roi.reshaped, roi.kept) for roi in counted], notes["1"]


@pytest.mark.parametrize("refined", [True, False])  # after refining with others; after --retrain
def test_a_suggested_roi_keeps_the_nuclei_it_was_given(suggested: Project, refined: bool) -> None:
    """The last run has one nucleus in it, of another model; an import changes nothing in a ROI."""
    import_now(suggested)
    assert not rois_wait(suggested.layout, "1")
    run_again(suggested, 1, refined=refined)
    assert refined_with(suggested, (GIVEN, "first")) == ([(0, 0, 0, 2)], ())
    smaller, larger = shapely.box(80, 80, 125, 200), shapely.box(80, 80, 320, 200)  # then
    assert refined_with(suggested, (smaller, "first"), model="o") == ([(0, 0, 0, 1)], ())
    assert refined_with(suggested, (GIVEN, "first"), model="p") == ([(0, 0, 0, 2)], ())
    assert refined_with(suggested, (larger, "first"), model="q") == ([], (NOTE.format(200, 140),))


def test_another_suggestion_leaves_what_a_roi_was_given(suggested: Project) -> None:
    """A ROI that a person began to correct stays, though another is suggested in its place."""
    import_now(suggested)
    run_again(suggested, 1)
    roi = CorrectionRoi("second", "ROI 1 of 1", "", x=80, y=80, width=120, height=120)
    suggested.mark_rois(suggested.images()[0], [roi])
    give(suggested.layout, "1")
    assert refined_with(suggested, (GIVEN, "first")) == ([(0, 0, 0, 2)], ())
    assert refined_with(suggested, (GIVEN, "second")) == ([(0, 1, 0, 1)], ())


def test_what_a_roi_was_given_is_not_written_over_unread(
    suggested: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program has the file open, on Windows; or a network folder is gone for a moment."""
    file, opened = suggested.layout.changes("1") / "changes.json", Path.open
    before = file.read_bytes()

    def deny(path: Path, *more: Any, **options: Any) -> Any:
        if path == file:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(path, *more, **options)

    roi = CorrectionRoi("second", "ROI 1 of 1", "", x=200, y=80, width=120, height=120)
    suggested.mark_rois(suggested.images()[0], [roi])
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", deny)
        for write_over in (
            lambda: give(suggested.layout, "1"),
            lambda: refined_with(suggested, (GIVEN, "first")),
        ):
            with pytest.raises(StorageError, match=r"changes\.json cannot be read \(Input/output"):
                write_over()
    assert file.read_bytes() == before
    give(suggested.layout, "1")
    assert refined_with(suggested, (GIVEN, "first")) == ([(0, 0, 0, 2)], ())


def left_to_save(project: Project, *, rois: int, data_s: int, shown: int = 0) -> None:
    """A receipt of an import that a person was to save, and data saved some seconds after it."""
    import_now(project)
    receipt = project.layout.receipt("1")
    imported_ns = receipt.stat().st_mtime_ns
    record = ReceiptRecord(
        image="a.svs", run="run", imported="", saved=False, added=2, left_out=0, removed=0, kept=0,
        rois=rois, rois_kept=1 - rois,
    )  # fmt: skip
    write_record(receipt, record)
    data = project.saved.data(project.images()[0])
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_bytes(b"old")
    counts = {"annotationClassificationCounts": {TO_CORRECT: shown}}
    data.with_name("summary.json").write_text(json.dumps({"hierarchy": counts}), "utf-8")
    for path, seconds in (receipt, 0), (data, data_s):
        os.utime(path, ns=(imported_ns + seconds * 10**9,) * 2)


@pytest.mark.parametrize(
    ("saved", "is_known"),
    [
        ({"rois": 1, "data_s": -60}, False),  # it may have been closed without saving
        ({"rois": 1, "data_s": 60}, True),
        ({"rois": 0, "data_s": -60, "shown": 1}, True),  # an earlier import was saved with them
        ({"rois": 0, "data_s": -60}, False),  # nor was the import before
    ],
)
def test_of_an_import_that_nobody_saved_no_nuclei_are_known(
    suggested: Project, saved: dict[str, int], is_known: bool
) -> None:
    left_to_save(suggested, **saved)
    layout, summary = suggested.layout, suggested.qupath_summary(suggested.images()[0])
    assert not rois_wait(layout, "1")
    assert rois_are_unsaved(layout, "1", summary) != is_known
    if not is_known:
        forget(layout, "1")  # as a run does
    run_again(suggested, 1)
    note = NOTE.format(140, 140)
    expected = ([(0, 0, 0, 2)], ()) if is_known else ([], (note,))
    assert refined_with(suggested, (GIVEN, "first")) == expected
    assert refined_with(suggested, (GIVEN, "first"), model="o") == expected
    roi = CorrectionRoi("second", "ROI 1 of 1", "", x=500, y=80, width=120, height=120)
    suggested.mark_rois(suggested.images()[0], [roi])
    give(suggested.layout, "1")  # the nuclei on disk are those of before this suggestion
    assert refined_with(suggested, (GIVEN, "first"), model="p") == expected


@pytest.mark.parametrize("refined", [True, False])
def test_a_roi_of_unknown_nuclei_is_not_counted(suggested: Project, refined: bool) -> None:
    """A person drew it, before the last run or after it."""
    drawn, note = shapely.box(80, 80, 210, 210), NOTE.format(145, 145)
    run_again(suggested, 1, refined=refined)
    if refined:
        suggested.layout.rois("1").unlink()  # nothing was ever suggested there
    assert refined_with(suggested, (drawn, "mine")) == ([], (note,))
    both = refined_with(suggested, (drawn, "mine"), (GIVEN, "first"))
    assert both == ([(0, 0, 0, 2)], (note,))


ELSEWHERE = RegionRecord(
    geometry=json.loads(shapely.to_geojson(shapely.box(500, 500, 900, 900))), tissue_mm2=0.1
)
FAILED = FailedTile(x=0, y=0, width=120, height=400, reason="damaged")


@pytest.mark.parametrize("last", [{"regions": (ELSEWHERE,)}, {"failed_tiles": (FAILED,)}])
def test_a_roi_that_the_last_run_did_not_segment(suggested: Project, last: dict[str, Any]) -> None:
    """What a person was given in a suggested ROI is known; in one that was drawn, nobody knows."""
    import_now(suggested)
    write(suggested, 0, nuclei("a", 0), made="2020-01-01T00:00:00+00:00", **last)
    drawn = shapely.box(80, 80, 210, 210)
    both = refined_with(suggested, (drawn, "mine"), (GIVEN, "first"))
    note = NOTE.format(145, 145).partition(": ")[0] + ": the last run did not segment all of it"
    assert both == ([(0, 0, 0, 2)], (note,))
    # It is still known when it was used.
    assert refined_with(suggested, (GIVEN, "first"), model="o") == ([(0, 0, 0, 2)], ())


@pytest.mark.parametrize("last", [{"regions": (ELSEWHERE,)}, {"failed_tiles": (FAILED,)}])
def test_a_roi_that_was_suggested_where_the_run_did_not_look(
    tmp_path: Path, last: dict[str, Any]
) -> None:
    """QuPath has nuclei of an earlier run there, or none: nobody added what a person has."""
    project = make_project(tmp_path / "made", ["a.svs"])
    write(project, 0, nuclei("a", 0), made="2020-01-01T00:00:00+00:00", **last)
    roi = CorrectionRoi("first", "ROI 1 of 1", "", x=80, y=80, width=120, height=120)
    project.mark_rois(project.images()[0], [roi])
    give(project.layout, "1")
    note = NOTE.format(140, 140).partition(": ")[0] + ": the last run did not segment all of it"
    assert refined_with(project, (GIVEN, "first")) == ([], (note,))


def test_a_drawn_roi_is_counted_in_the_first_round(suggested: Project) -> None:
    """Beside suggested ones; and again after the run of the refined model."""
    drawn = shapely.box(80, 80, 210, 210)
    assert refined_with(suggested, (drawn, "mine")) == ([(0, 0, 0, 2)], ())
    run_again(suggested, 1, refined=True)
    assert refined_with(suggested, (drawn, "mine"), model="o") == ([(0, 0, 0, 2)], ())


@pytest.mark.parametrize(
    ("run", "rois_kept", "left_out", "counted"),
    [("", 0, 0, True), ("again", 0, 0, False), ("", 1, 0, False), ("", 0, 4, False)],
)
def test_a_drawn_roi_has_the_nuclei_of_the_last_import(
    tmp_path: Path, run: str, rois_kept: int, left_out: int, counted: bool
) -> None:
    """Not those of a later run; and one that was there at an import keeps those of before."""
    project = make_project(tmp_path / "made", ["a.svs"])
    write(project, 0, nuclei("a", 2))
    result = read_record(project.layout.result("1"), ResultRecord)
    assert result is not None
    none = {"removed": 0, "kept": 0, "rois": 0}
    receipt = ReceiptRecord(
        image="a.svs", run=run or result.run, imported="2026-01-01T00:00:00Z", added=2,
        left_out=left_out, left_out_rois=left_out, rois_kept=rois_kept, **none,
    )  # fmt: skip
    write_record(project.layout.receipt("1"), receipt)
    found = refined_with(project, (GIVEN, "mine"))
    assert found == (([(0, 0, 0, 2)], ()) if counted else ([], (NOTE.format(140, 140),)))


def test_a_roi_counts_once_the_nuclei_of_its_image_are_removed(tmp_path: Path) -> None:
    """A person was given some when the model was refined for the first time; then they go."""
    project = make_project(tmp_path / "made", ["a.svs"])
    write(project, 0, nuclei("a", 2))
    drawn = shapely.box(80, 80, 210, 210)
    assert refined_with(project, (drawn, "mine")) == ([(0, 0, 0, 2)], ())
    write_removed(project.layout.results("1"))
    assert refined_with(project, (drawn, "mine"), model="o") == ([(0, 0, 0, 2)], ())
    run_again(project, 1)
    other = shapely.box(0, 0, 60, 60)  # beside it, of no suggestion
    found, notes = refined_with(project, (drawn, "mine"), (other, "new"), model="p")
    assert found == [(0, 0, 0, 0), (0, 0, 0, 2)]
    assert notes == ()


def test_a_file_of_before_has_no_ids(suggested: Project) -> None:
    """Then a ROI is known by its box."""
    path = suggested.layout.changes("1") / "changes.json"
    refined_with(suggested, (GIVEN, "first"))
    content = json.loads(path.read_text("utf-8"))
    del content["others"], content["rois"][0]["id"]
    path.write_text(json.dumps(content), "utf-8")
    run_again(suggested, 1, refined=True)
    assert refined_with(suggested, (GIVEN, "first")) == ([(0, 0, 0, 2)], ())


def test_a_sentence_and_a_sum() -> None:
    one = ChangeCounts(deleted=6, added=4, reshaped=2, kept=1000, deleted_now=5, kept_now=990)
    assert ChangeCounts.total([one, one]).made == 24
    assert one.in_words == (
        "the refined model makes 5 of your 12 corrections by itself: 5 of 6 deleted, 0 of 4 "
        "added, 0 of 2 reshaped; of 1,000 nuclei that were right, it finds 990; new false ones: 0"
    )


def export(folder: Path, rois: list[shapely.Geometry], nuclei: Polygons) -> None:
    """What groovy/export_labels.groovy writes."""
    features = [
        {
            "type": "Feature",
            "geometry": json.loads(shapely.to_geojson(geometry)),
            "properties": {"objectType": "annotation", "classification": {"name": name}},
        }
        for name, geometries in (("PatchCL: corrected", rois), ("Nucleus", nuclei))
        for geometry in geometries
    ]
    path = folder / "patchcl" / "labels" / "1.geojson"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}), "utf-8")


@pytest.fixture(scope="module")
def story(model: pipeline.Model, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run, corrections, refining and a run of the refined model -> the folder, its output."""
    files = tmp_path_factory.mktemp("changes")
    folder = files / "project"
    (entry,) = open_project(SAMPLE, backend="files").images()
    picture = Image.fromarray(Slide.open(entry).read(Box(900, 500, 1500, 1100)))
    picture.save(files / "part.png")
    init_project(folder, [NewImage(files / "part.png", [picture.size], (0.5, 0.5))])
    model.save(folder / "patchcl" / "models", "patchcl")
    settings = folder / "quick.toml"
    settings.write_text("[cdcl]\nsteps = 4\ndistillation_steps = 4\n", "utf-8")

    def call(*arguments: object) -> str:
        result = CliRunner().invoke(cli.main, [*map(str, arguments)])
        assert result.exit_code == 0, result.output
        return result.stdout

    call("run", folder, "--backend", "files")
    call("suggest", folder, "--rois", 1, "--backend", "files")
    found = read_nuclei(folder / "patchcl" / "results" / "1" / "nuclei.parquet").polygons
    roi = shapely.box(150, 200, 450, 400)
    here = found[shapely.intersects(found, roi)]
    inside = np.flatnonzero(shapely.within(here, roi))
    alone = [here[k] for k in inside if shapely.distance(here[k], np.delete(here, k)).min() > 3]
    assert len(alone) > 5
    drawn = [n for n in here if n not in alone[:3]]  # one is deleted, two are reshaped
    export(folder, [roi], [*drawn, *(n.buffer(1.5) for n in alone[1:3])])
    call("refine", folder, "--config", settings)
    record = read_record(folder / "patchcl" / "changes" / "1" / "changes.json", ChangesRecord)
    assert record is not None
    assert not record.run
    (saved,) = record.rois
    assert (saved.deleted, saved.added, saved.reshaped) == (1, 0, 2)
    assert len(saved.corrected) == len(saved.before) - 1
    call("run", folder, "--backend", "files")  # another model than the refined one
    again = read_record(folder / "patchcl" / "changes" / "1" / "changes.json", ChangesRecord)
    assert again == record
    return folder, call("run", folder, "--backend", "files", "--model", "refined")


def test_rois_that_wait_are_given_the_nuclei_of_the_next_run(story: tuple[Path, str]) -> None:
    """They are imported with these."""
    patchcl = story[0] / "patchcl"
    record = read_record(patchcl / "changes" / "1" / "changes.json", ChangesRecord)
    assert record is not None
    ((roi,), (waiting,)) = record.rois, record.others[TO_CORRECT]
    (x, y), side = (waiting.x, waiting.y), waiting.width
    assert shapely.box(x, y, x + side, y + side).contains(shapely.box(150, 200, 450, 400))
    assert all(contour in waiting.before for contour in roi.after)
    assert not all(contour in waiting.before for contour in roi.before)


def test_a_run_after_an_import_that_nobody_saved(story: tuple[Path, str], tmp_path: Path) -> None:
    """Its nuclei are given to who imports the ROIs again, and not to who has them open still."""
    folder = tmp_path / "project"
    shutil.copytree(story[0], folder)
    project = open_project(folder, "files")
    left_to_save(project, rois=1, data_s=-60)
    result = CliRunner().invoke(cli.main, ["run", str(folder), "--backend", "files"])
    assert result.exit_code == 0, result.output
    record = read_record(project.layout.changes("1") / "changes.json", ChangesRecord)
    assert record is not None
    (roi,) = record.others[TO_CORRECT]
    assert (roi.is_known, roi.before) == (False, [])


def test_a_run_of_the_refined_model_says_what_it_corrects(story: tuple[Path, str]) -> None:
    folder, shown = story
    changes = folder / "patchcl" / "changes" / "1"
    record = read_record(changes / "changes.json", ChangesRecord)
    assert record is not None
    assert record.run
    (roi,) = record.rois
    assert f"Corrections: {roi.in_words}" in shown
    assert roi.after
    assert (changes / roi.picture).stat().st_size > 1000
    again = ["run", str(folder), "--backend", "files", "--model", "refined", "--json"]
    outcome = json.loads(CliRunner().invoke(cli.main, again).stdout)["images"][0]
    assert outcome["corrections"]["deleted"] == 1
    assert outcome["corrections"]["deleted_now"] == roi.deleted_now


def test_the_report_shows_corrected_rois_before_and_after(story: tuple[Path, str]) -> None:
    folder, _ = story
    page = (folder / "patchcl" / "report" / "index.html").read_text("utf-8")
    assert page.count('<svg class="roi"') == 2
    assert page.count("<image ") == page.count("<use ") == 1
    assert "corrections by itself" in page


def test_a_damaged_file_of_changes_leaves_a_page(story: tuple[Path, str]) -> None:
    folder, _ = story
    path = folder / "patchcl" / "changes" / "1" / "changes.json"
    text = path.read_text("utf-8")
    try:
        for damaged in (text[:100], text.replace("roi-0.jpg", "../../secret.jpg")):
            path.write_text(damaged, "utf-8")
            result = CliRunner().invoke(cli.main, ["report", str(folder)])
            assert result.exit_code == 0, result.output
            page = (folder / "patchcl" / "report" / "index.html").read_text("utf-8")
            assert '<svg class="roi"' not in page
    finally:
        path.write_text(text, "utf-8")
