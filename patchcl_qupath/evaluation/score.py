"""Scores of a project: the nuclei of the last run, compared with ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.datatypes import ImageEntry, Polygons
from patchcl_qupath.errors import ConfigError, GroundTruthError, ImageError, PatchCLError
from patchcl_qupath.evaluation.ground_truth import (
    check_not_shared,
    ground_truth_files,
    is_named_as,
    read_ground_truth,
)
from patchcl_qupath.evaluation.metrics import MIN_IOU, Kind, Overlaps
from patchcl_qupath.evaluation.pictures import draw_errors, picture_name
from patchcl_qupath.project import Project
from patchcl_qupath.project.outlines import mostly_in
from patchcl_qupath.segmentation.measurements import PROBABILITY
from patchcl_qupath.slides.slide import Slide
from patchcl_qupath.storage.geojson import from_object, made_valid
from patchcl_qupath.storage.parquet import read_nuclei
from patchcl_qupath.storage.records import Record, RemovedRecord, ResultRecord, read_result

# Lower ends of the bins in which detection probabilities are held against how many are right.
BINS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_FILES = (".jpeg", ".jpg", ".pdf", ".png", ".tif", ".tiff")  # of pictures; no folder has one
SCORES = {"dice": "Dice", "aji": "AJI", "pq": "PQ", "f1": "F1 at IoU 0.5"}


class Bin(Record, frozen=True, kw_only=True):
    """Of predicted nuclei with a detection probability from ``low`` to ``high``: how many there
    are, how many are right, and the mean of their probabilities."""

    low: float
    high: float
    nuclei: int
    right: int
    mean_probability: float | None


class ImageScore(Record, frozen=True, kw_only=True):
    """The agreement of one image's nuclei with ground truth.

    ``problem`` is None unless it failed; ``note`` is a message for people, or None; ``scores``,
    between 0 and 1, have the names of SCORES; ``kinds`` are the numbers of nuclei of each
    ``metrics.Kind``; ``reliability`` compares detection probabilities with how often they are
    right. ``picture`` is the path of the picture of its errors; ``no_picture`` the
    reason why one that was asked for could not be drawn.
    """

    id: str
    image: str
    problem: str | None = None
    note: str | None = None
    nuclei: int | None = None
    true_nuclei: int | None = None
    scores: dict[str, float] = {}  # noqa: RUF012  # msgspec copies it
    kinds: dict[str, int] = {}  # noqa: RUF012
    reliability: tuple[Bin, ...] = ()
    picture: str | None = None
    no_picture: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """The nuclei (P,) and true nuclei (T,) of an image, level 0, and their overlaps.

    ``mpp`` (x, y) are µm/px at level 0 as in the run; ``notes`` are messages for people.
    """

    nuclei: Polygons
    probability: NDArray[np.float32]  # (P,)
    true: Polygons
    overlaps: Overlaps
    mpp: tuple[float, float]
    notes: list[str]


def score(
    project: Project,
    entries: Sequence[ImageEntry],
    ground_truth: Path,
    pictures: Path | None = None,
) -> tuple[list[ImageScore], list[str]]:
    """Score the images that have ground truth in ``ground_truth``, a folder or a file.

    Draws a picture of the errors of each into the folder ``pictures``, if one is given. Returns
    their scores, and the names of the images without ground truth. An image that fails has a
    ``problem`` and does not stop the others. Raises GroundTruthError if no image has any,
    ConfigError for ``pictures`` that are named as a file.
    """
    if pictures is not None and pictures.suffix.lower() in _FILES and not pictures.is_dir():
        raise ConfigError(f"{pictures} is named as a file: name a folder for the pictures")
    files = ground_truth_files(ground_truth, entries)
    scored, without = [], []
    for entry in entries:
        if not files[entry.id]:
            without.append(entry.name)
            continue
        try:
            check_not_shared(entry, files, entries)
            scored.append(score_image(project, entry, files[entry.id], pictures))
        except PatchCLError as error:
            scored.append(ImageScore(id=entry.id, image=entry.name, problem=str(error)))
    return scored, without


def score_image(
    project: Project, entry: ImageEntry, files: Sequence[Path], pictures: Path | None = None
) -> ImageScore:
    """Score one image. Raises ImageError for its nuclei, GroundTruthError for the ground truth,
    StorageError for its picture."""
    compared = _compare(project, entry, files)
    picture, no_picture = None, None
    if pictures is not None:
        try:
            picture = str(_draw(entry, compared, pictures))
        except ImageError as error:  # the scores need no pixels
            no_picture = str(error)
    return ImageScore(
        id=entry.id,
        image=entry.name,
        note="; ".join(compared.notes) or None,
        nuclei=len(compared.nuclei),
        true_nuclei=len(compared.true),
        scores={name: getattr(compared.overlaps, name) for name in SCORES},
        kinds=compared.overlaps.kinds,
        reliability=_reliability(compared),
        picture=picture,
        no_picture=no_picture,
    )


def mean(scored: Sequence[ImageScore]) -> dict[str, float]:
    """The mean of each score over the images that did not fail; empty if all failed."""
    scores = [image.scores for image in scored if not image.problem]
    return {name: float(np.mean([s[name] for s in scores])) for name in SCORES} if scores else {}


def kinds_in_total(scored: Sequence[ImageScore]) -> dict[str, int]:
    """The nuclei of each kind in all images that did not fail; empty if all failed."""
    kinds = [image.kinds for image in scored if not image.problem]
    return {str(kind): sum(each[kind] for each in kinds) for kind in Kind} if kinds else {}


def per_100_true(scored: Sequence[ImageScore]) -> dict[str, float]:
    """The nuclei of each kind in all images, per 100 true nuclei; empty without a true nucleus."""
    true = sum(image.true_nuclei or 0 for image in scored if not image.problem)
    kinds = kinds_in_total(scored)
    return {kind: 100 * count / true for kind, count in kinds.items()} if true else {}


def reliability_in_total(scored: Sequence[ImageScore]) -> list[Bin]:
    """The bins of all images that did not fail, added up; empty if all failed."""
    images = [image.reliability for image in scored if not image.problem]
    return [_added(bins) for bins in zip(*images, strict=True)]


def _added(bins: Sequence[Bin]) -> Bin:
    """Bins of one range in one."""
    nuclei = sum(each.nuclei for each in bins)
    total = sum(each.nuclei * (each.mean_probability or 0) for each in bins)
    return Bin(
        low=bins[0].low,
        high=bins[0].high,
        nuclei=nuclei,
        right=sum(each.right for each in bins),
        mean_probability=total / nuclei if nuclei else None,
    )


def _reliability(compared: _Compared) -> tuple[Bin, ...]:
    """How often the nuclei of each bin of detection probability are right."""
    right = compared.overlaps.predicted_iou > MIN_IOU
    of_bin = np.digitize(compared.probability, np.asarray(BINS, np.float32)) - 1
    bins = []
    for k, (low, high) in enumerate(pairwise((*BINS, 1.0))):
        here = of_bin == k
        count = int(np.count_nonzero(here))
        bins.append(
            Bin(
                low=low,
                high=high,
                nuclei=count,
                right=int(np.count_nonzero(right & here)),
                mean_probability=float(compared.probability[here].mean()) if count else None,
            )
        )
    return tuple(bins)


def _compare(project: Project, entry: ImageEntry, files: Sequence[Path]) -> _Compared:
    """Compare the nuclei of an image with its ground truth, in the analysis regions of the run.

    Raises ImageError, GroundTruthError.
    """
    nuclei, probability, regions, result = _segmented(project, entry)
    # A project that `init` made has no size of an image until QuPath saves it.
    entry = replace(entry, mpp=result.slide.mpp, size=entry.size or result.slide.size)
    ground_truth = read_ground_truth(files, entry)
    true, notes = ground_truth.polygons, [ground_truth.note] if ground_truth.note else []
    if not is_named_as(files[0], entry):  # as the one file that was given for the one image
        notes.append(f"compared with {files[0].name}, which is named otherwise")
    if outside := _count_outside(true, entry):
        notes.append(f"true contours outside of the image, which count as missed: {outside}")
    if regions:
        # A nucleus is inside if its centroid is, as in the run.
        centroids = shapely.STRtree(shapely.centroid(true))
        true = true[np.unique(centroids.query(regions, predicate="covers")[1])]
        notes.append("only inside the analysis regions of the run")
    if len(ground_truth.ignored):
        found, known = (~mostly_in(each, ground_truth.ignored) for each in (nuclei, true))
        if count := np.count_nonzero(~found) + np.count_nonzero(~known):
            notes.append(f"nuclei left out, found or true, that lie in ignored objects: {count}")
        nuclei, probability, true = nuclei[found], probability[found], true[known]
    if failed := len(result.failed_tiles):
        notes.append(f"tiles that failed, where true nuclei count as missed: {failed}")
    return _Compared(
        nuclei=nuclei,
        probability=probability,
        true=true,
        overlaps=Overlaps.of_polygons(nuclei, true),
        mpp=result.slide.mpp,
        notes=notes,
    )


def _count_outside(true: Polygons, entry: ImageEntry) -> int:
    """How many true nuclei lie outside of the image, where its size is known.

    Raises GroundTruthError where all do: they were drawn on another image, or are not in its px.
    """
    if entry.size is None or not len(true):
        return 0
    count = int(np.count_nonzero(~shapely.intersects(true, shapely.box(0, 0, *entry.size))))
    if count == len(true):
        raise GroundTruthError(
            f"{entry.name} is {entry.size[0]} x {entry.size[1]} px, and all contours of its ground "
            "truth lie outside of it: export those of this very image, in px at full resolution"
        )
    return count


def _draw(entry: ImageEntry, compared: _Compared, folder: Path) -> Path:
    """Draw the errors of an image into a folder. Raises SlideError, StorageError."""
    path = folder / picture_name(entry)
    slide = Slide.open(replace(entry, mpp=compared.mpp))
    draw_errors(path, slide, compared.nuclei, compared.true, compared.overlaps)
    return path


def _segmented(
    project: Project, entry: ImageEntry
) -> tuple[Polygons, NDArray[np.float32], list[shapely.Geometry], ResultRecord]:
    """The nuclei of the last run, level 0, and their detection probabilities; its analysis regions,
    if any; its record.

    Raises ImageError.
    """
    folder = project.layout.results(entry.id)
    result = read_result(project.layout.result(entry.id))
    if isinstance(result, RemovedRecord) or not folder.exists():
        raise ImageError(f"{entry.name} has no nuclei to score: do `patchcl-qp run` first")
    try:
        if result is None:
            raise ValueError("result.json is damaged")
        regions = [from_object(region.geometry) for region in result.regions]
        # Contours are rounded to 0.01 px, which may have folded one.
        nuclei = read_nuclei(project.layout.nuclei(entry.id))
        # Of an image without tissue there is no tile, so that its file has no measurements.
        empty = np.empty(0, np.float32)
        probability = nuclei.measurements[PROBABILITY] if len(nuclei) else empty
        polygons = made_valid(nuclei.polygons)
    except Exception as error:  # readers of damaged files raise anything
        raise ImageError(
            f"{entry.name}: its nuclei in {folder} cannot be read: remove that folder and do "
            "`patchcl-qp run` again"
        ) from error
    return polygons, probability, regions, result
