"""What is in an image, a region or a TMA core: counts, densities, percentages and scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.answers.positivity import allred_score, h_score, positive_percent
from patchcl_qupath.answers.regions import Regions
from patchcl_qupath.datatypes import Nuclei, centroids_of
from patchcl_qupath.storage.records import ClassSummary, Quartiles, Summary

_MAIN = ("area µm^2", "area ratio", "circularity")  # the main measurements, beside means of stains


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How large an image or a region is, in mm²: all of it, and the tissue in it; None if unknown.

    ``x`` and ``y`` are its centroid, ``area_px`` its area, and ``bounds`` (x0, y0, x1, y1), all at
    level 0; None of an image.
    """

    area_mm2: float | None = None
    tissue_mm2: float | None = None
    x: float | None = None
    y: float | None = None
    area_px: float | None = None
    bounds: tuple[float, float, float, float] | None = None


def is_main(measurement: str) -> bool:
    """Whether a measurement is summarised: areas, circularity, means of stains."""
    return measurement.lower().endswith(_MAIN) or measurement.endswith(": Mean")


def summarise(
    batches: Iterable[Nuclei],
    *,
    image: str,
    extents: Sequence[Extent],
    regions: Regions | None = None,
    class_names: Sequence[str] = (),
) -> tuple[Summary, ...]:
    """The summary of an image, and of each of its regions in their order.

    ``batches`` of nuclei, at level 0, are read one at a time; of each nucleus its main measurements
    are kept, in float32. ``extents`` are that of the image, then those of the regions.
    ``class_names`` are counted also where no nucleus has them.
    """
    regions = regions or Regions()
    assert len(extents) == 1 + len(regions), "one extent for the image, and one for each region"
    counted = _Counted(regions=regions, class_names=[*class_names])
    for batch in batches:
        counted.add(batch)
    image_summary = counted.summary(0, extents[0], kind="image", name=image)
    return image_summary, *(
        counted.summary(
            row,
            extents[row],
            kind="core" if region.is_core else "region",
            name=region.name,
            class_name=region.class_name,
            case_id=region.case_id,
            id=region.id,
        )
        for row, region in enumerate(regions.drawn, start=1)
    )


@dataclass(kw_only=True)
class _Counted:
    """The nuclei of an image so far: row 0 is the image, row i the region i - 1."""

    regions: Regions
    class_names: list[str]
    nuclei: int = 0
    own: NDArray[np.int64] = field(init=False)
    names: tuple[str, ...] | None = None  # of the main measurements
    codes: list[NDArray[np.int16]] = field(default_factory=list)  # of classes, for each nucleus
    values: list[NDArray[np.float32]] = field(default_factory=list)  # (n, measurements)
    inside: list[list[NDArray[np.int64]]] = field(init=False)  # of each region, numbers of nuclei

    def __post_init__(self) -> None:
        self.own = np.zeros(1 + len(self.regions), np.int64)
        self.inside = [[] for _ in range(len(self.regions))]

    def add(self, batch: Nuclei) -> None:
        """Count a batch of nuclei."""
        if not len(batch):
            return
        if self.names is None:
            self.names = tuple(filter(is_main, batch.measurements))
        self.codes.append(self._codes(batch))
        columns = [batch.measurements[name] for name in self.names]
        self.values.append(np.stack(columns, 1) if columns else np.empty((len(batch), 0), "f4"))
        if len(self.regions):
            region, point = self.regions.pairs(centroids_of(batch.polygons))
            parent = self.regions.smallest(region, point, len(batch))
            self.own += np.bincount(parent + 1, minlength=len(self.own))
            order = np.argsort(region, kind="stable")
            ends = np.searchsorted(region[order], np.arange(len(self.regions) + 1))
            for row in np.unique(region):
                self.inside[row].append(point[order[ends[row] : ends[row + 1]]] + self.nuclei)
        else:
            self.own[0] += len(batch)
        self.nuclei += len(batch)

    def _codes(self, batch: Nuclei) -> NDArray[np.int16]:
        """The number of each nucleus's class; -1 without classes."""
        if batch.classes is None:
            return np.full(len(batch), -1, np.int16)
        found, inverse = np.unique(batch.classes, return_inverse=True)
        self.class_names += [name for name in found.tolist() if name not in self.class_names]
        return np.array([self.class_names.index(name) for name in found], np.int16)[inverse]

    def summary(self, row: int, extent: Extent, **named: str) -> Summary:
        """The summary of the image (row 0), or of a region."""
        codes, values = self._all
        if row:
            numbers = np.concatenate([np.empty(0, np.int64), *self.inside[row - 1]])
            codes, values = codes[numbers], values[numbers]
        counts = np.bincount(codes[codes >= 0], minlength=len(self.class_names)).tolist()
        by_class = dict(zip(self.class_names, counts, strict=True))
        area = extent.area_mm2 if extent.tissue_mm2 is None else extent.tissue_mm2
        return Summary(
            **named,
            x=extent.x,
            y=extent.y,
            area_px=extent.area_px,
            bounds=extent.bounds,
            area_mm2=extent.area_mm2,
            tissue_mm2=extent.tissue_mm2,
            nuclei=len(codes),
            own=int(self.own[row]),
            per_mm2=_density(len(codes), area),
            classes={
                name: ClassSummary(nuclei=count, per_mm2=_density(count, area))
                for name, count in by_class.items()
            },
            positive_percent=positive_percent(by_class),
            h_score=h_score(by_class),
            allred=allred_score(by_class),
            measurements=_quartiles(self.names or (), values),
        )

    @property
    def _all(self) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
        """Classes (N,) and main measurements (N, M) of all nuclei."""
        if len(self.codes) > 1:
            self.codes = [np.concatenate(self.codes)]
            self.values = [np.concatenate(self.values)]
        if not self.codes:
            return np.empty(0, np.int16), np.empty((0, 0), np.float32)
        return self.codes[0], self.values[0]


def _density(count: int, area_mm2: float | None) -> float | None:
    """Nuclei per mm²; 0 where there is nothing, None where the area is not known, or 0."""
    if not area_mm2:
        return 0.0 if area_mm2 is not None and not count else None
    return count / area_mm2


def _quartiles(names: Sequence[str], values: NDArray[np.float32]) -> dict[str, Quartiles]:
    """The quartiles of measurements (N, M), without values that are no number."""
    found = {}
    for name, column in zip(names, values.T, strict=False):
        known = column[np.isfinite(column)]
        if len(known):
            lower, median, upper = np.quantile(known, [0.25, 0.5, 0.75]).tolist()
            found[name] = Quartiles(lower=lower, median=median, upper=upper)
    return found
