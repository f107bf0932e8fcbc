"""What refining changed: of a person's corrections, those that the refined model makes by itself.

Suggesting ROIs saves the nuclei in them (``give``): they stay in QuPath until a person is done,
whatever is run meanwhile. Refining saves the corrected ROIs with the nuclei that the person was
given (``begin``); the next run of the refined model adds its own (``finish``). The refined model
was trained on these ROIs: the numbers show what it learnt, not how good it is elsewhere. Nothing
here is read by training.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.config import TO_CORRECT
from patchcl_qupath.datatypes import (
    Box,
    Corrections,
    Polygons,
    QuPathSummary,
    area_of_tiles,
    grid_to_level0,
    place_text,
)
from patchcl_qupath.errors import StorageError
from patchcl_qupath.evaluation.metrics import MIN_IOU, Overlaps
from patchcl_qupath.segmentation.segmented_image import SegmentedImage
from patchcl_qupath.slides.prepare import on_grid
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.storage.files import atomic_write, to_jpeg
from patchcl_qupath.storage.geojson import class_name, from_object, made_valid, to_object
from patchcl_qupath.storage.layout import CHANGES, Layout
from patchcl_qupath.storage.parquet import read_near
from patchcl_qupath.storage.records import (
    ChangeCounts,
    ChangesRecord,
    ReceiptRecord,
    ResultRecord,
    RoiChangesRecord,
    RoisRecord,
    RunRecord,
    read_kept,
    read_record,
    read_result,
    write_record,
)
from patchcl_qupath.timing import utc_now

logger = logging.getLogger(__name__)

UNCHANGED_IOU = 0.99  # from it on, nobody reshaped it: files round coordinates
_SAME_PLACE_PX = 0.5  # QuPath rounds the corners of a ROI, and grids those of tiles
_JPEG_QUALITY = 62

Bools = NDArray[np.bool_]


def give(layout: Layout, image: str) -> None:
    """Save the nuclei on disk in the suggested ROIs of an image, as those a person is given there.

    Raises StorageError.
    """
    suggested = read_record(layout.rois(image), RoisRecord)
    if suggested is None or not suggested.rois:
        return
    boxes = [shapely.box(r.x, r.y, r.x + r.width, r.y + r.height) for r in suggested.rois]
    path = layout.nuclei(image)
    try:
        nuclei = read_near(path, np.array(boxes, dtype=object))
    except Exception as error:  # readers of damaged files raise anything
        raise StorageError(f"{path} cannot be read: run again, then suggest again") from error
    tree = shapely.STRtree(nuclei)
    result = read_result(layout.result(image))
    # Where the last run did not look, QuPath has nuclei of an earlier one, or none.
    known = [False] * len(boxes)
    if isinstance(result, ResultRecord):
        known = were_segmented(boxes, result).tolist()
    given = []
    for roi, box, is_known in zip(suggested.rois, boxes, known, strict=True):
        near = made_valid(nuclei[np.sort(tree.query(box))])
        given.append(
            RoiChangesRecord(
                id=roi.id,
                x=roi.x,
                y=roi.y,
                width=roi.width,
                height=roi.height,
                geometry=to_object(box),
                before=_numbers(near[shapely.intersects(near, box)]) if is_known else [],
                corrected=[],
                is_known=is_known,
            )
        )
    path = layout.changes(image) / CHANGES
    record = read_kept(path, ChangesRecord)
    record = record or ChangesRecord(model="", model_name="", made="", rois=())
    ids = {roi.id for roi in given}
    # A ROI that a person began to correct stays in the image beside those suggested later.
    earlier = [roi for roi in record.others.get(TO_CORRECT, ()) if roi.id not in ids]
    others = {**record.others, TO_CORRECT: (*earlier, *given)}
    write_record(path, msgspec.structs.replace(record, others=others), compact=True)


def at_import(layout: Layout, image: str, summary: QuPathSummary) -> Callable[[], None]:
    """What to note of the suggested ROIs of an image once its nuclei are written, to be asked for
    before: which nuclei a person is given there, or that nobody knows. It raises StorageError."""
    if rois_wait(layout, image):  # they are imported with the new nuclei
        return partial(give, layout, image)
    if rois_are_unsaved(layout, image, summary):
        return partial(forget, layout, image)
    return lambda: None


def rois_wait(layout: Layout, image: str) -> bool:
    """Whether suggested ROIs of an image wait to be imported: they get the nuclei of that time."""
    rois, receipt = layout.rois(image), layout.receipt(image)
    imported_ns = receipt.stat().st_mtime_ns if receipt.exists() else 0
    return rois.exists() and rois.stat().st_mtime_ns > imported_ns


def rois_are_unsaved(layout: Layout, image: str, summary: QuPathSummary) -> bool:
    """Whether ROIs were imported into an image that was not saved with them, as far as files tell.

    An import that found ROIs in the image added none: these may be in the image as it is saved.
    """
    receipt = read_record(layout.receipt(image), ReceiptRecord)
    if receipt is None or summary.is_saved:
        return False
    return receipt.rois > 0 or summary.to_correct + summary.corrected == 0


def forget(layout: Layout, image: str) -> None:
    """Note that nobody knows which nuclei a person has in the suggested ROIs of an image.

    For a run after an import that is not saved: the image may be closed without, and the ROIs
    imported again with the nuclei of the run; or it is open, and saved later. Raises StorageError.
    """
    suggested = read_record(layout.rois(image), RoisRecord)
    path = layout.changes(image) / CHANGES
    record = read_kept(path, ChangesRecord)
    if suggested is None or record is None:
        return
    ids = {roi.id for roi in suggested.rois}
    rois = tuple(
        msgspec.structs.replace(roi, is_known=False, before=[]) if roi.id in ids else roi
        for roi in record.others.get(TO_CORRECT, ())
    )
    others = {**record.others, TO_CORRECT: rois}
    write_record(path, msgspec.structs.replace(record, others=others), compact=True)


def begin(
    layout: Layout,
    images: Iterable[str],
    corrections: Mapping[str, Corrections],
    *,
    model: str,
    model_name: str,
    roi_class: str,
) -> dict[str, tuple[str, ...]]:
    """Save the corrected ROIs of ``images``, by id, for the refined model of digest ``model``.

    ROIs of which nobody knows the nuclei that a person was given are left out, as those that the
    last run did not segment, outside of its regions say. Returns notes on these, by image. What was
    saved of these images for another refined model is removed; that of other images and of ROIs of
    another class than ``roi_class`` is kept, as a later model may be refined with these again.
    Raises StorageError.
    """
    made = utc_now()
    roi_class = class_name(roi_class)
    notes = {}
    for image in images:
        folder = layout.changes(image)
        others = _by_class(read_kept(folder / CHANGES, ChangesRecord), roi_class)
        known = (*others.pop(roi_class, ()), *others.get(TO_CORRECT, ()))
        rois: list[RoiChangesRecord] = []
        if image in corrections:
            rois, notes[image] = _rois(layout, image, corrections[image], known)
        if not rois and not others:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        record = ChangesRecord(
            model=model,
            model_name=model_name,
            made=made,
            roi_class=roi_class,
            rois=tuple(rois),
            others=others,
        )
        with atomic_write(folder) as new:
            new.mkdir()
            write_record(new / CHANGES, record, compact=True)
    return notes


def _by_class(
    record: ChangesRecord | None, unnamed: str
) -> dict[str, tuple[RoiChangesRecord, ...]]:
    """The ROIs of a record by their class; ``unnamed`` is that of records without one."""
    if record is None:
        return {}
    if not record.rois:
        return dict(record.others)
    without_after = [msgspec.structs.replace(roi, after=[], picture="") for roi in record.rois]
    return {**record.others, record.roi_class or unnamed: tuple(without_after)}


def finish(layout: Layout, segmented: SegmentedImage, model: str, run: str) -> ChangeCounts | None:
    """Add the nuclei that the refined model found, and pictures of the ROIs.

    Returns the counts of the image; None if it has no corrected ROIs, if they are for another
    model, or if the run did not segment all of them. Raises StorageError.
    """
    image = segmented.image
    folder = layout.changes(image.id)
    record = read_kept(folder / CHANGES, ChangesRecord)
    if record is None or record.model != model or not record.rois:
        return None
    if not all(_is_segmented(roi, segmented) for roi in record.rois):
        return None
    boxes = [_box(roi, image.slide) for roi in record.rois]
    rois = [
        _after(
            roi,
            # Rounded as those before, they may be folded, too.
            made_valid(_at_level0(segmented.contours_in(box), box, image.slide)),
            f"roi-{number}.jpg",
        )
        for number, (roi, box) in enumerate(zip(record.rois, boxes, strict=True))
    ]
    with atomic_write(folder) as new:
        new.mkdir()
        for roi, box in zip(rois, boxes, strict=True):
            (new / roi.picture).write_bytes(to_jpeg(segmented.pixels(box), _JPEG_QUALITY))
        finished = msgspec.structs.replace(record, run=run, rois=tuple(rois))
        write_record(new / CHANGES, finished, compact=True)
    return ChangeCounts.total(rois)


def _is_segmented(roi: RoiChangesRecord, segmented: SegmentedImage) -> bool:
    """Whether the area of a ROI that counts lies in the analysis region, and in no failed tile.

    Of a ROI that is no rectangle, the corners of its bounding box may well lie elsewhere.
    """
    slide, region = segmented.image.slide, segmented.image.region
    area = on_grid(from_object(roi.geometry), slide)
    if region is not None and (area - region.buffer(_SAME_PLACE_PX)).area:
        return False
    failed = on_grid(segmented.failed_area, slide).buffer(-_SAME_PLACE_PX)  # borders are rounded
    return failed.is_empty or not (area & failed).area


def compare(
    roi: shapely.Geometry, before: Polygons, corrected: Polygons, after: Polygons
) -> ChangeCounts:
    """Count the corrections in a ROI, and those that the refined model makes by itself.

    Nuclei (N,) count where their centroid lies in the ROI. Two contours are of one nucleus above an
    IoU of 0.5. A nucleus that was added counts as found where the refined model has it; one that
    was reshaped, where the refined contour is nearer to the person's than the earlier one was; one
    that was deleted, where the refined model has nothing but nuclei that the person has, too.
    """
    iou_before, iou_after = _iou(corrected, before), _iou(corrected, after)
    here, found_now = _inside(corrected, roi), iou_after > MIN_IOU
    kept = here & (iou_before >= UNCHANGED_IOU)
    added = here & (iou_before <= MIN_IOU)
    reshaped = here & ~added & ~kept
    deleted = _inside(before, roi) & (_iou(before, corrected) <= MIN_IOU)
    false = after[_iou(after, corrected) <= MIN_IOU]
    old_false = _touched(false, before[deleted])
    return ChangeCounts(
        deleted=int(deleted.sum()),
        added=int(added.sum()),
        reshaped=int(reshaped.sum()),
        kept=int(kept.sum()),
        deleted_now=int((~_touched(before[deleted], false)).sum()),
        added_now=int((added & found_now).sum()),
        reshaped_now=int((reshaped & (iou_after > iou_before)).sum()),
        kept_now=int((kept & found_now).sum()),
        new=int((_inside(false, roi) & ~old_false).sum()),
    )


def _iou(contours: Polygons, others: Polygons) -> NDArray[np.float64]:
    """The largest IoU (N,) of each contour with another."""
    return Overlaps.of_polygons(contours, others).predicted_iou


def _touched(contours: Polygons, others: Polygons) -> Bools:
    """(N,) which are in the place of another: IoU above 0.5, or a centroid in the other."""
    touched = _iou(contours, others) > MIN_IOU
    tree = shapely.STRtree(others)
    touched[tree.query(shapely.centroid(contours), predicate="within")[0]] = True
    touched[tree.query(contours, predicate="contains")[0]] = True
    centroids = shapely.STRtree(shapely.centroid(others))
    touched[centroids.query(contours, predicate="contains")[0]] = True
    return touched


def _inside(contours: Polygons, roi: shapely.Geometry) -> Bools:
    """(N,) whose centroid lies in a ROI."""
    return np.asarray(shapely.covers(roi, shapely.centroid(contours)), dtype=bool)


def _rois(
    layout: Layout, image: str, labels: Corrections, known: Sequence[RoiChangesRecord]
) -> tuple[list[RoiChangesRecord], tuple[str, ...]]:
    """The records of the corrected ROIs of an image, for a refined model.

    And a note on each that is left out, as the nuclei that a person was given are not ``known``,
    nor are they those of the last run. Known ones count without nuclei of a run, too, which may be
    removed. What two ROIs share counts in the first one, from the left.
    """
    found = read_result(layout.result(image))
    result = found if isinstance(found, ResultRecord) else None
    on_disk = whole = None
    segmented = [False] * len(labels.rois)
    if result is not None:
        segmented = were_segmented(labels.rois, result).tolist()
        if result.slide.size is not None:
            whole = shapely.box(0, 0, *result.slide.size)
        if _are_first(layout, image, result):
            on_disk = _on_disk(layout.nuclei(image), labels.rois)
    drawn, ignored = np.array(labels.nuclei, dtype=object), shapely.union_all(labels.ignored)
    records, notes = [], []
    counted = shapely.Polygon()
    ids = labels.ids or [""] * len(labels.rois)
    rois = zip(labels.rois, ids, segmented, strict=True)
    # By place: QuPath may list them in another order when they are read again.
    for roi, id_, was_segmented in sorted(rois, key=lambda each: each[0].bounds):
        if whole is not None:  # a picture of it ends there
            roi &= whole
        area = roi - ignored - counted  # ROIs may overlap
        before = _known(roi, area, id_, known)
        given = on_disk if was_segmented else None
        if before is not None:
            given = _contours(before.before) if before.is_known else None
        if given is None:
            if result is None:  # nobody was given any
                continue
            place = place_text(*roi.centroid.coords[0])
            why = "the last run did not segment all of it"
            if was_segmented:
                why = "its nuclei may be those of an earlier run than the last one"
            notes.append(f"corrections in the ROI {place} are not counted: {why}")
            continue
        records.append(_before(roi, area, id_, given, drawn))
        counted |= roi
    return records, tuple(notes)


def _on_disk(path: Path, rois: Sequence[shapely.Geometry]) -> Polygons | None:
    """The nuclei of the last run near ROIs of an image; None where their file is damaged."""
    try:
        # Contours are rounded to 0.01 px, which may have folded one.
        return made_valid(read_near(path, np.array(rois, dtype=object)))
    except Exception:  # readers of damaged files raise anything; the refined model is saved by now
        logger.warning("%s is damaged: corrections are not counted there", path)
        return None


def were_segmented(rois: Sequence[shapely.Geometry] | Polygons, result: ResultRecord) -> Bools:
    """(N,) whether a run looked at all of ROIs that lies in the image: they are in its analysis
    regions, if there are some, and in no tile that failed."""
    inside = np.asarray(rois, dtype=object)
    if result.slide.size is not None:
        inside = shapely.intersection(inside, shapely.box(0, 0, *result.slide.size))
    found = np.ones(len(inside), dtype=bool)
    if result.regions:
        region = shapely.union_all([from_object(each.geometry) for each in result.regions])
        shapely.prepare(region)
        found &= shapely.covers(region, inside)
    if result.failed_tiles:
        failed = area_of_tiles(result.failed_tiles)
        found &= shapely.area(shapely.intersection(inside, failed)) == 0
    return found


def _known(
    roi: shapely.Geometry, area: shapely.Geometry, id_: str, known: Sequence[RoiChangesRecord]
) -> RoiChangesRecord | None:
    """The record of the nuclei that a person was given to correct in a ROI; None without one.

    Of a ROI that was suggested, or used before, they are those of then: an import changes nothing
    in a ROI, and the last run may be that of another model, all of whose contours differ a little.
    ``area`` is the part of the ROI that counts. One that a person made larger is not known whole.
    """
    for each in known:
        box = (each.x, each.y, each.x + each.width, each.y + each.height)
        if each.id and id_:
            is_it = each.id == id_ and _covers([_with_border(each)], area)
        else:  # of an earlier version
            is_it = np.allclose(box, roi.bounds, atol=_SAME_PLACE_PX, rtol=0)
        if is_it:
            return each
    return None


def _with_border(roi: RoiChangesRecord) -> shapely.Geometry:
    return from_object(roi.geometry).buffer(_SAME_PLACE_PX)


def _are_first(layout: Layout, image: str, result: ResultRecord) -> bool:
    """Whether all ROIs of an image must have been given the nuclei on disk, as far as files tell.

    A ROI that was there before a run keeps the nuclei of the run before. There was one before if
    the nuclei are those of a refined model, or were found after ROIs were suggested, or if the last
    import found one. Nuclei that were not imported nobody was given.
    """
    run = read_record(layout.run_record(result.run), RunRecord)
    suggested = read_record(layout.rois(image), RoisRecord)
    receipt = read_record(layout.receipt(image), ReceiptRecord)
    if receipt is not None:
        had_rois = receipt.rois_kept > 0 or receipt.left_out_rois > 0
        if had_rois or receipt.run != result.run:
            return False
    is_refined = run is not None and "refined_from" in run.training
    return not is_refined and (suggested is None or result.made <= suggested.made)


def _before(
    roi: shapely.Geometry, area: shapely.Geometry, id_: str, nuclei: Polygons, corrected: Polygons
) -> RoiChangesRecord:
    """The record of a ROI, and of the area of it that counts, before the refined model's run."""
    here, theirs = (each[shapely.intersects(each, area)] for each in (nuclei, corrected))
    counts = compare(area, here, theirs, np.empty(0, dtype=object))
    x, y, x1, y1 = roi.bounds
    return RoiChangesRecord(
        id=id_,
        x=x,
        y=y,
        width=x1 - x,
        height=y1 - y,
        geometry=to_object(area),
        before=_numbers(here),
        corrected=_numbers(theirs),
        deleted=counts.deleted,
        added=counts.added,
        reshaped=counts.reshaped,
        kept=counts.kept,
    )


def _after(roi: RoiChangesRecord, nuclei: Polygons, picture: str) -> RoiChangesRecord:
    """The record of a ROI with the nuclei that the refined model found in its bounding box."""
    area = from_object(roi.geometry)
    nuclei = nuclei[shapely.intersects(nuclei, area)]
    before, corrected = _contours(roi.before), _contours(roi.corrected)
    counts = compare(area, before, corrected, nuclei)
    return msgspec.structs.replace(
        roi, after=_numbers(nuclei), picture=picture, **msgspec.structs.asdict(counts)
    )


def _numbers(contours: Polygons) -> list[list[float]]:
    """The corners of contours, [x, y, x, y, ...] each, in hundredths of a pixel.

    One that was folded is of several parts: the largest is the nucleus.
    """
    whole = [max(shapely.get_parts(contour), key=shapely.area) for contour in contours]
    corners = [shapely.get_coordinates(shapely.get_exterior_ring(part))[:-1] for part in whole]
    return [np.round(xy, 2).ravel().tolist() for xy in corners]


def _contours(numbers: Sequence[Sequence[float]]) -> Polygons:
    """The inverse of ``_numbers``."""
    contours = np.empty(len(numbers), dtype=object)
    contours[:] = [shapely.Polygon(np.reshape(xy, (-1, 2))) for xy in numbers]
    return made_valid(contours)


def _box(roi: RoiChangesRecord, slide: Slide) -> Box:
    """The bounding box of a ROI on the working grid, clipped to the image."""
    (x, y), (rows, cols) = slide.downsample, slide.shape
    return Box(
        max(0, math.floor(roi.y / y)),
        max(0, math.floor(roi.x / x)),
        min(rows, math.ceil((roi.y + roi.height) / y)),
        min(cols, math.ceil((roi.x + roi.width) / x)),
    )


def _at_level0(contours: Polygons, box: Box, slide: Slide) -> Polygons:
    """Contours (N,) in pixels of a box, at level 0."""
    moved = shapely.transform(contours, lambda xy: xy + np.array([box.col0, box.row0]))
    return np.asarray(grid_to_level0(moved, slide.downsample))


def _covers(regions: Sequence[shapely.Geometry], roi: shapely.Geometry) -> bool:
    return bool(shapely.union_all(regions).covers(roi))
