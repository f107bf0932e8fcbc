"""ROIs worth correcting, chosen by active learning: uncertain ones, diverse, on all slides.

The acquisition score is the rank of the fraction of nuclei that are expected to be wrong, which is
the mean of 1 minus their probability (least confidence; D. Lewis, W. Gale, *A Sequential Algorithm
for Training Text Classifiers*, SIGIR 1994). It follows the errors of the images of four labelled
sets far better than the predictive entropy of pixels does, which grows with all contours, right or
wrong (``docs/measured.md``). The score is multiplied by the distance to the ROIs chosen so far, in
a space of features: a greedy core-set (O. Sener, S. Savarese, *Active Learning for Convolutional
Neural Networks: A Core-Set Approach*, ICLR 2018).
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.config import CORRECTED
from patchcl_qupath.correction.changes import give, were_segmented
from patchcl_qupath.datatypes import (
    CorrectionRoi,
    ImageEntry,
    Polygons,
    UncertaintyGrid,
)
from patchcl_qupath.errors import ImageError, PatchCLError, ProjectError
from patchcl_qupath.project import Project
from patchcl_qupath.segmentation.measurements import PROBABILITY
from patchcl_qupath.segmentation.uncertainty import FieldsOfView, fields_of_view
from patchcl_qupath.storage.parquet import read_measured, read_uncertainty_grid
from patchcl_qupath.storage.records import Record, ResultRecord, read_result

FULL_TISSUE = 0.75  # tissue fraction of ROIs that are preferred
MIN_TISSUE = 0.5  # tissue fraction of ROIs on slides that have none with FULL_TISSUE
MIN_NUCLEI = 10  # with fewer, corrections may leave a ROI without nuclei, which cannot be used
MIN_GAP_PX = 1.0  # at level 0; ROIs that are nearer touch
MAX_FEATURE = 3.0  # standard deviations at which features are clipped
_MEASURED = (PROBABILITY, "Hematoxylin: Mean", "Area µm^2")  # of nuclei

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Candidate ROIs as columns, (N,) each.

    ``slides`` are numbers of slides from 0; ``boxes`` are at level 0; ``tissue`` is the tissue
    fraction; ``entropy`` the mean predictive entropy of tissue, in bits; ``nuclei`` the number of
    nuclei, ``wrong`` the fraction of them that is expected to be wrong, ``hematoxylin`` their mean
    optical density, ``area`` their median area in µm². ``whole`` is whether the run looked at all
    of them that lies in the image.
    """

    slides: Integers
    boxes: Polygons
    tissue: Floats
    entropy: Floats
    nuclei: Integers
    wrong: Floats
    hematoxylin: Floats
    area: Floats
    whole: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def density(self) -> Floats:
        """(N,) nuclei per ROI of tissue alone; with less tissue than a ROI must have, of that."""
        return np.asarray(self.nuclei / np.maximum(self.tissue, MIN_TISSUE))

    @property
    def usable(self) -> NDArray[np.bool_]:
        """(N,) which have enough tissue and nuclei."""
        return (self.tissue >= MIN_TISSUE) & (self.nuclei >= MIN_NUCLEI)

    @classmethod
    def concatenate(cls, parts: Sequence[Candidates]) -> Candidates:
        """All candidates of ``parts``, in that order: at least one part."""
        return cls(
            **{
                column.name: np.concatenate([getattr(part, column.name) for part in parts])
                for column in fields(cls)
            }
        )


class SuggestedRoi(
    Record,
    frozen=True,
    kw_only=True,
    rename={"roi": "field", "entropy": "doubt"},
):
    """A ROI that was marked, and the reasons.

    ``id`` is that of the image. ``tissue`` is a fraction; ``entropy`` the mean predictive entropy
    in bits; ``wrong`` the fraction of its ``nuclei`` that is expected to be wrong.
    """

    id: str
    image: str
    roi: CorrectionRoi
    tissue: float
    entropy: float
    nuclei: int
    wrong: float


class Suggestion(Record, frozen=True, kw_only=True, rename={"rois": "fields"}):
    """The new ROIs of a project; for each image with some, a message of what was done.

    ``problems`` are those of images that failed; ``without`` are the images without nuclei.
    """

    rois: list[SuggestedRoi]
    done: list[str]
    problems: list[str]
    without: list[str]


def suggest(project: Project, entries: Sequence[ImageEntry], count: int) -> Suggestion:
    """Choose ``count`` ROIs of a project's images, or as many as there are, and mark them.

    They replace ROIs that were suggested before and that nobody touched. An image that fails is
    reported and does not stop the others. Raises ProjectError if no image has a usable ROI.
    """
    found = _Found.read(project, entries)
    candidates = Candidates.concatenate(found.candidates)
    chosen = choose(candidates, count, found.corrected)
    if not chosen:
        if found.too_small(project):
            raise ProjectError(
                f"each image is smaller than {MIN_TISSUE:.0%} of a ROI, a square of 256 µm: add "
                "larger images, or draw ROIs yourself"
            )
        raise ProjectError(
            f"no ROI is {MIN_TISSUE:.0%} tissue with {MIN_NUCLEI} nuclei or more, and apart from "
            "those that are corrected: add slides with more tissue, or draw ROIs yourself"
        )
    image_of = np.repeat(np.arange(len(found.entries)), [len(part) for part in found.candidates])
    suggested: list[SuggestedRoi] = []
    done: list[str] = []
    problems = found.problems
    for k, entry in enumerate(found.entries):
        here = [
            _suggested(
                entry=entry,
                candidates=candidates,
                row=row,
                name=f"ROI {number} of {len(chosen)}",
            )
            for number, row in enumerate(chosen, start=1)
            if image_of[row] == k
        ]
        try:
            message = project.mark_rois(entry, [one.roi for one in here])
            if here:
                give(project.layout, entry.id)
        except PatchCLError as error:
            problems.append(str(error))
            continue
        suggested += here
        if here:
            done.append(f"{entry.name}: {message}")
    return Suggestion(rois=suggested, done=done, problems=problems, without=found.without)


def choose(
    candidates: Candidates, count: int, corrected: Sequence[tuple[int, shapely.Geometry]] = ()
) -> list[int]:
    """The ``count`` rows, or as many as there are, that are most worth correcting, best first.

    Greedily, the row with the greatest product of acquisition score and distance to the features
    of the rows chosen before: of the slides with fewest ROIs, and of their candidates that the run
    looked at as a whole, and with FULL_TISSUE, if there are any. ROIs touch neither each other nor
    those that are ``corrected``: pairs of slide number and geometry. Deterministic.
    """
    free = candidates.usable
    if not free.any():
        return []
    features, acquisition = _features(candidates), _acquisition_scores(candidates)
    on_slide = np.zeros(candidates.slides.max() + 1, dtype=np.int64)
    nearest = np.full(len(free), np.inf)  # distance to the features chosen so far

    def take(slide: int, area: shapely.Geometry, feature: Floats | None) -> None:
        here = candidates.slides == slide
        free[here & (shapely.distance(candidates.boxes, area) < MIN_GAP_PX)] = False
        on_slide[slide : slide + 1] += 1  # a slide without candidates has no place
        if feature is not None:
            np.minimum(nearest, np.linalg.norm(features - feature, axis=1), out=nearest)

    for slide, area in corrected:
        holds = (candidates.slides == slide) & shapely.contains(candidates.boxes, area.centroid)
        take(slide, area, features[np.argmax(holds)] if holds.any() else None)
    chosen: list[int] = []
    while len(chosen) < count and free.any():
        pool = free & (on_slide[candidates.slides] == on_slide[candidates.slides[free]].min())
        for preferred in (candidates.whole, candidates.tissue >= FULL_TISSUE):
            better = pool & preferred
            pool = better if better.any() else pool
        distance = np.where(np.isinf(nearest), 1.0, nearest + 1e-9)  # equal features: by score
        best = int(np.argmax(np.where(pool, acquisition * distance, -1.0)))
        take(int(candidates.slides[best]), candidates.boxes[best], features[best])
        chosen.append(best)
    return chosen


def _acquisition_scores(candidates: Candidates) -> Floats:
    """(N,) in (0, 1]: the rank of the fraction of nuclei that is expected to be wrong."""
    rank = np.searchsorted(np.sort(candidates.wrong), candidates.wrong, side="right")
    return np.asarray(rank / len(candidates))


def _features(candidates: Candidates) -> Floats:
    """(N, 4) standardised features, clipped at MAX_FEATURE."""
    columns = [candidates.density, candidates.hematoxylin, candidates.area, candidates.entropy]
    features = np.stack(columns, axis=1)
    usable = features[candidates.usable]
    mean, spread = usable.mean(axis=0), usable.std(axis=0)
    standardised = (features - mean) / np.where(spread > 0, spread, 1)
    return np.asarray(np.clip(standardised, -MAX_FEATURE, MAX_FEATURE))


@dataclass(frozen=True, kw_only=True)
class _Found:
    """The candidates of each of ``entries``; ``corrected`` are pairs of slide number and ROI.

    ``problems`` are those of images that failed; ``without`` are the images without nuclei.
    """

    entries: list[ImageEntry]
    candidates: list[Candidates]
    corrected: list[tuple[int, shapely.Geometry]]
    problems: list[str]
    without: list[str]

    @classmethod
    def read(cls, project: Project, entries: Sequence[ImageEntry]) -> _Found:
        """From a project's images. Raises ProjectError if none can be used."""
        found = cls(entries=[], candidates=[], corrected=[], problems=[], without=[])
        sources = dict.fromkeys(entry.source for entry in entries)
        slides = {source: k for k, source in enumerate(sources)}
        unread = set[int]()
        for entry in project.images():  # a duplicate of an image may have been corrected
            copied = slides.get(entry.source)
            if copied is not None and not found._add_corrected(project, entry, copied):
                unread.add(copied)
        for entry in entries:
            slide = slides[entry.source]
            if slide in unread:
                continue
            result = read_result(project.layout.result(entry.id))
            if not isinstance(result, ResultRecord):
                found.without.append(entry.name)
                continue
            try:
                candidates = _candidates(project, entry, slide, result)
            except PatchCLError as error:
                found.problems.append(str(error))
                continue
            found.entries.append(entry)
            found.candidates.append(candidates)
        if not found.entries:
            raise ProjectError(
                "; ".join(found.problems) or "no nuclei yet: do `patchcl-qp run` first"
            )
        return found

    def _add_corrected(self, project: Project, entry: ImageEntry, slide: int) -> bool:
        """Add the ROIs that were corrected in an image; whether they can be read."""
        try:
            self.corrected.extend((slide, roi) for roi in project.corrected_rois(entry))
        except PatchCLError as error:
            self.problems.append(str(error))
            return False
        return True

    def too_small(self, project: Project) -> bool:
        """Whether no image has room for enough tissue: then it is not tissue that is missing."""
        pairs = zip(self.entries, self.candidates, strict=True)
        small = [_is_small(project, entry, part) for entry, part in pairs if len(part)]
        return bool(small) and all(small)


def _is_small(project: Project, entry: ImageEntry, candidates: Candidates) -> bool:
    """Whether an image is smaller than the tissue that a ROI must have."""
    result = read_result(project.layout.result(entry.id))
    if not isinstance(result, ResultRecord) or result.slide.size is None:
        return False
    left, top, right, bottom = candidates.boxes[0].bounds
    return not has_room(result.slide.size, (right - left, bottom - top))


def has_room(size: tuple[int, int], roi: tuple[float, float]) -> bool:
    """Whether an image (width, height) can hold the least tissue of a ROI of such a size."""
    width, height = (min(1.0, side / whole) for side, whole in zip(size, roi, strict=True))
    return bool(width * height >= MIN_TISSUE)


def _candidates(
    project: Project, entry: ImageEntry, slide: int, result: ResultRecord
) -> Candidates:
    """The candidates of one image.

    Raises ImageError if its nuclei or its uncertainty grid cannot be read, or are of two runs.
    """
    if entry.problem:
        raise ImageError(entry.problem)
    file = project.layout.uncertainty(entry.id)
    try:
        centroids, measured = read_measured(project.layout.nuclei(entry.id), _MEASURED)
        uncertainty = read_uncertainty_grid(file) if len(centroids) else None
    except Exception as error:  # readers of damaged files raise anything
        raise ImageError(
            f"{entry.name}: its nuclei or their uncertainty grid ({file}) cannot be read: remove "
            f"{project.layout.results(entry.id)} and do `patchcl-qp run` again"
        ) from error
    if uncertainty is None:
        return _no_candidates()
    if uncertainty.nuclei.sum() != len(centroids):
        raise ImageError(
            f"{entry.name}: its nuclei and their uncertainty grid are of different runs: do "
            "`patchcl-qp run` again"
        )
    return _candidates_from(slide, uncertainty, centroids, measured, result)


def _no_candidates() -> Candidates:
    integers, floats = np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float64)
    return Candidates(
        slides=integers,
        boxes=np.empty(0, dtype=object),
        tissue=floats,
        entropy=floats,
        nuclei=integers,
        wrong=floats,
        hematoxylin=floats,
        area=floats,
        whole=np.empty(0, dtype=bool),
    )


def _candidates_from(
    slide: int,
    uncertainty: UncertaintyGrid,
    centroids: Floats,
    measured: dict[str, NDArray[np.float32]],
    result: ResultRecord,
) -> Candidates:
    """The fields of view of an image as candidates.

    ``centroids`` (N, 2) are those of its nuclei, ``measured`` (N,) their measurements by name.
    """
    fovs = fields_of_view(uncertainty)
    width, height = fovs.size
    boxes = shapely.box(fovs.x, fovs.y, fovs.x + width, fovs.y + height)
    inside = _nuclei_inside(fovs, centroids)
    missing = np.zeros(len(centroids), dtype=np.float32)  # for stains without hematoxylin
    probability, hematoxylin, area = (measured.get(name, missing) for name in _MEASURED)
    return Candidates(
        slides=np.full(len(fovs), slide),
        boxes=boxes,
        tissue=fovs.tissue,
        entropy=fovs.entropy,
        nuclei=fovs.nuclei,
        wrong=np.array([1 - probability[i].mean() if len(i) else 0.0 for i in inside], float),
        hematoxylin=np.array([hematoxylin[i].mean() if len(i) else 0.0 for i in inside], float),
        area=np.array([np.median(area[i]) if len(i) else 0.0 for i in inside], float),
        whole=were_segmented(boxes, result),
    )


def _nuclei_inside(fovs: FieldsOfView, centroids: Floats) -> list[NDArray[np.intp]]:
    """For each field of view, the rows of the nuclei that have their centroid in it."""
    width, height = fovs.size
    cols, rows = np.rint(fovs.x / width).astype(int), np.rint(fovs.y / height).astype(int)
    places = np.floor(centroids / fovs.size).astype(int)
    across = max(cols.max(), places[:, 0].max()) + 1
    fov_of = places[:, 1] * across + places[:, 0]
    order = np.argsort(fov_of, kind="stable")
    begin = np.searchsorted(fov_of[order], rows * across + cols)
    end = np.searchsorted(fov_of[order], rows * across + cols + 1)
    return [order[b:e] for b, e in zip(begin, end, strict=True)]


def _suggested(*, entry: ImageEntry, candidates: Candidates, row: int, name: str) -> SuggestedRoi:
    x0, y0, x1, y1 = (round(value, 2) for value in candidates.boxes[row].bounds)
    wrong, nuclei = float(candidates.wrong[row]), int(candidates.nuclei[row])
    partly = "" if candidates.whole[row] else "A part of the ROI was not segmented. "
    roi = CorrectionRoi(
        id=str(uuid.uuid4()),  # a ROI that a person deleted may be suggested again
        name=name,
        description=(
            f"Of {nuclei} nuclei, {wrong:.0%} are expected to be wrong. {partly}Correct every "
            f"nucleus that reaches into the ROI, then set the ROI's class to '{CORRECTED}'."
        ),
        x=x0,
        y=y0,
        width=round(x1 - x0, 2),
        height=round(y1 - y0, 2),
    )
    return SuggestedRoi(
        id=entry.id,
        image=entry.name,
        roi=roi,
        tissue=float(candidates.tissue[row]),
        entropy=float(candidates.entropy[row]),
        nuclei=nuclei,
        wrong=wrong,
    )
