"""Fields worth correcting: where a model is in doubt, on all slides, and unlike each other.

Doubt is the entropy of what the network says (uncertainty sampling: D. Lewis, W. Gale, *A
Sequential Algorithm for Training Text Classifiers*, SIGIR 1994). It grows with the number of
nuclei, since each has a rim; so a field counts by its doubt beyond what is usual for so many. That
fields are to differ in look, greedily, is core-set selection (O. Sener, S. Savarese, *Active
Learning for Convolutional Neural Networks: A Core-Set Approach*, ICLR 2018).
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.config import CORRECTED
from patchcl_qupath.datatypes import CorrectionRoi, ImageEntry, Nuclei, Polygons, UncertaintyGrid
from patchcl_qupath.errors import ImageError, PatchCLError, ProjectError
from patchcl_qupath.project import Project
from patchcl_qupath.segmentation.uncertainty import fields_of_view
from patchcl_qupath.storage.parquet import read_nuclei, read_uncertainty_grid
from patchcl_qupath.storage.records import Record, ResultRecord, read_result

FULL = 0.75  # of a field that is tissue
MIN_TISSUE = 0.5  # where no fuller field is left on a slide; the rest is glass
MIN_NUCLEI = 10  # with fewer, corrections may leave none, which nothing can be learnt from
APART_PX = 1.0  # at level 0; fields that are nearer touch

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Candidates:
    """Fields to choose from, as columns; (N,) each.

    ``slides`` are numbers from 0 that say on which slide a field is; ``boxes`` are at level 0;
    ``tissue`` is its share; ``entropy`` the mean entropy of tissue, in bits. ``hematoxylin`` is the
    mean optical density of the ``nuclei``, and ``area`` their median area in um2.
    """

    slides: NDArray[np.int64]
    boxes: Polygons
    tissue: Floats
    entropy: Floats
    nuclei: NDArray[np.int64]
    hematoxylin: Floats
    area: Floats

    @property
    def density(self) -> Floats:
        """Nuclei of each field, if all of it were tissue."""
        return np.asarray(self.nuclei / self.tissue)

    @property
    def usable(self) -> NDArray[np.bool_]:
        """Which are more tissue than glass, and have nuclei."""
        return (self.tissue >= MIN_TISSUE) & (self.nuclei >= MIN_NUCLEI)


class SuggestedRoi(
    Record,
    frozen=True,
    kw_only=True,
    rename={"roi": "field", "entropy": "doubt", "expected": "usual"},
):
    """A ROI that was marked, and why: ``expected`` is the mean entropy of fields of view as dense.

    ``tissue`` is a fraction; ``entropy`` the mean predictive entropy, in bits.
    """

    id: str
    image: str
    roi: CorrectionRoi
    tissue: float
    entropy: float
    expected: float
    nuclei: int


class Suggestion(Record, frozen=True, kw_only=True, rename={"rois": "fields"}):
    """What became of a project: its new ROIs, what was done with them, and what failed.

    ``without`` are the images that have no nuclei yet.
    """

    rois: list[SuggestedRoi]
    done: list[str]
    problems: list[str]
    without: list[str]


def suggest(project: Project, entries: Sequence[ImageEntry], count: int) -> Suggestion:
    """Choose ``count`` fields of a project's images, or as many as there are, and mark them.

    They take the place of fields that were suggested before and that nobody touched. An image that
    fails says why, and the others go on. Raises ProjectError where there is nothing to choose from.
    """
    looked: list[tuple[ImageEntry, Candidates]] = []
    corrected: list[tuple[int, shapely.Geometry]] = []
    problems: list[str] = []
    without = []
    slides = {path: k for k, path in enumerate(dict.fromkeys(entry.path for entry in entries))}
    for entry in entries:
        if not _has_nuclei(project, entry):
            without.append(entry.name)
            continue
        try:
            found = _candidates(project, entry, slides[entry.path])
            corrected_rois = project.corrected_rois(entry)
        except PatchCLError as error:
            problems.append(str(error))
            continue
        looked.append((entry, found))
        corrected += [(slides[entry.path], field) for field in corrected_rois]
    if not looked:
        raise ProjectError("; ".join(problems) or "no nuclei yet: do `patchcl-qp run` first")
    everything = _concatenate([found for _, found in looked])
    chosen = choose(everything, count, corrected)
    if not chosen:
        raise ProjectError(
            f"no field is {MIN_TISSUE:.0%} tissue with {MIN_NUCLEI} nuclei or more, and apart from "
            "those that are corrected: add slides with more tissue, or draw fields yourself"
        )

    expected = expected_entropy(everything)
    owner = np.repeat(np.arange(len(looked)), [len(found.entropy) for _, found in looked])
    suggested: list[SuggestedRoi] = []
    done: list[str] = []
    for k, (entry, _) in enumerate(looked):
        here = [
            _suggested(entry, everything, i, float(expected[i]), f"Field {number} of {len(chosen)}")
            for number, i in enumerate(chosen, start=1)
            if owner[i] == k
        ]
        try:
            said = project.mark_rois(entry, [one.roi for one in here])
        except PatchCLError as error:
            problems.append(str(error))
            continue
        suggested += here
        if here:
            done.append(f"{entry.name}: {said}")
    return Suggestion(rois=suggested, done=done, problems=problems, without=without)


def choose(
    candidates: Candidates, count: int, corrected: Sequence[tuple[int, shapely.Geometry]] = ()
) -> list[int]:
    """The ``count`` rows, or as many as there are, that are most worth correcting, best first.

    Each time the one whose worth, times how far its look is from those chosen, is greatest: of the
    slides that have fewest, and of their full fields if there are some. Fields do not touch, nor do
    they touch those that are ``corrected``: the numbers of their slides, and their outlines. Equal
    candidates make the same choice.
    """
    free = candidates.usable
    if not free.any():
        return []
    features, acquisition = _features(candidates), _acquisition_scores(candidates)
    on_slide = np.zeros(candidates.slides.max() + 1, dtype=np.int64)
    nearest = np.full(len(free), np.inf)

    def take(slide: int, area: shapely.Geometry, feature: Floats | None) -> None:
        here = candidates.slides == slide
        free[here & (shapely.distance(candidates.boxes, area) < APART_PX)] = False
        on_slide[slide : slide + 1] += 1  # a slide without candidates has no place
        if feature is not None:
            np.minimum(nearest, np.linalg.norm(features - feature, axis=1), out=nearest)

    for slide, area in corrected:
        holds = (candidates.slides == slide) & shapely.contains(candidates.boxes, area.centroid)
        take(slide, area, features[np.argmax(holds)] if holds.any() else None)
    chosen: list[int] = []
    while len(chosen) < count and free.any():
        pool = free & (on_slide[candidates.slides] == on_slide[candidates.slides[free]].min())
        full = pool & (candidates.tissue >= FULL)
        pool = full if full.any() else pool
        far = np.where(np.isinf(nearest), 1.0, nearest + 1e-9)  # of equal features the worthier
        best = int(np.argmax(np.where(pool, acquisition * far, -1.0)))
        take(int(candidates.slides[best]), candidates.boxes[best], features[best])
        chosen.append(best)
    return chosen


def expected_entropy(candidates: Candidates) -> Floats:
    """The doubt (N,) of fields as dense as each: a line through those that are usable."""
    density, entropy = candidates.density[candidates.usable], candidates.entropy[candidates.usable]
    spread = density - density.mean()
    slope = spread @ (entropy - entropy.mean()) / max(spread @ spread, 1e-9)
    return np.asarray(entropy.mean() + slope * (candidates.density - density.mean()))


def _acquisition_scores(candidates: Candidates) -> Floats:
    """(N,) in (0, 1]: the rank of the doubt that is beyond the usual."""
    beyond = candidates.entropy - expected_entropy(candidates)
    return np.asarray((np.argsort(np.argsort(beyond, kind="stable")) + 1) / len(beyond))


def _features(candidates: Candidates) -> Floats:
    """(N, 4) what fields look like, each number by its spread, and no further off than 3."""
    c = candidates
    features = np.stack([c.density, c.hematoxylin, c.area, c.entropy], axis=1)
    mean, spread = features[c.usable].mean(axis=0), features[c.usable].std(axis=0)
    scaled = (features - mean) / np.where(spread > 0, spread, 1)
    return np.asarray(np.clip(scaled, -3, 3))


def _has_nuclei(project: Project, entry: ImageEntry) -> bool:
    return isinstance(read_result(project.layout.result(entry.id)), ResultRecord)


def _candidates(project: Project, entry: ImageEntry, slide: int) -> Candidates:
    """The fields of one image. Raises ImageError where its survey is not that of its nuclei."""
    if entry.problem:
        raise ImageError(entry.problem)
    file = project.layout.uncertainty(entry.id)
    try:
        nuclei = read_nuclei(project.layout.nuclei(entry.id))
        uncertainty = read_uncertainty_grid(file) if len(nuclei) else None
    except Exception as error:  # readers of damaged files raise anything
        raise ImageError(
            f"{entry.name}: its nuclei or their survey ({file}) cannot be read: do "
            "`patchcl-qp run` again"
        ) from error
    if uncertainty is None:
        return _concatenate([])
    if uncertainty.nuclei.sum() != len(nuclei):
        raise ImageError(
            f"{entry.name}: its nuclei and their survey are of different runs: do `patchcl-qp run` "
            "again"
        )
    return _candidates_from(slide, uncertainty, nuclei)


def _candidates_from(slide: int, uncertainty: UncertaintyGrid, nuclei: Nuclei) -> Candidates:
    found = fields_of_view(uncertainty)
    width, height = found.size
    cols, rows = np.rint(found.x / width).astype(int), np.rint(found.y / height).astype(int)
    xy = shapely.get_coordinates(shapely.centroid(nuclei.polygons))
    places = np.floor(xy / found.size).astype(int)
    across = max(cols.max(), places[:, 0].max()) + 1
    field_of = places[:, 1] * across + places[:, 0]
    order = np.argsort(field_of, kind="stable")
    begin = np.searchsorted(field_of[order], rows * across + cols)
    end = np.searchsorted(field_of[order], rows * across + cols + 1)
    none = np.zeros(len(nuclei), dtype=np.float32)  # of stains without hematoxylin
    hematoxylin, area = (
        nuclei.measurements.get(name, none)[order] for name in ("Hematoxylin: Mean", "Area µm^2")
    )
    inside = [slice(b, e) for b, e in zip(begin, end, strict=True)]
    return Candidates(
        np.full(len(found), slide),
        shapely.box(found.x, found.y, found.x + width, found.y + height),
        found.tissue,
        found.entropy,
        found.nuclei,
        np.array([hematoxylin[s].mean() if s.stop > s.start else 0.0 for s in inside], float),
        np.array([np.median(area[s]) if s.stop > s.start else 0.0 for s in inside], float),
    )


def _concatenate(parts: Sequence[Candidates]) -> Candidates:
    types = (np.int64, object, float, float, np.int64, float, float)
    names = Candidates.__dataclass_fields__
    return Candidates(
        *(
            np.concatenate([np.empty(0, dtype=kind), *(getattr(part, name) for part in parts)])
            for name, kind in zip(names, types, strict=True)
        )
    )


def _suggested(
    entry: ImageEntry, candidates: Candidates, row: int, expected: float, name: str
) -> SuggestedRoi:
    x0, y0, x1, y1 = (round(value, 2) for value in candidates.boxes[row].bounds)
    entropy, nuclei = float(candidates.entropy[row]), int(candidates.nuclei[row])
    roi = CorrectionRoi(
        str(uuid.uuid4()),  # a field that a person deleted may be suggested again
        name,
        f"Doubt {entropy:.2f} bits, where {expected:.2f} are usual. Put right every nucleus that "
        f"reaches into the field, then set the field's class to '{CORRECTED}'.",
        *(x0, y0, round(x1 - x0, 2), round(y1 - y0, 2)),
    )
    return SuggestedRoi(
        id=entry.id,
        image=entry.name,
        roi=roi,
        tissue=float(candidates.tissue[row]),
        entropy=entropy,
        expected=expected,
        nuclei=nuclei,
    )
