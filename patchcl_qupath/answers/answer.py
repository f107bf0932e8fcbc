"""What a run answers of an image beside its nuclei: which are positive, and what is where."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import shapely
from numpy.typing import NDArray

from patchcl_qupath.answers.positivity import Positivity, check_positive, find_positivity
from patchcl_qupath.answers.regions import Regions
from patchcl_qupath.answers.summary import Extent, summarise
from patchcl_qupath.config import Config, ResultConfig
from patchcl_qupath.datatypes import ImageEntry, Nuclei, names_text
from patchcl_qupath.segmentation.measurements import measurement_names
from patchcl_qupath.segmentation.segmented_image import SegmentedImage
from patchcl_qupath.slides.prepare import PreparedImage
from patchcl_qupath.storage.parquet import Table
from patchcl_qupath.storage.records import PositivityRecord, Summary

_named = partial(names_text, most=3)  # of the regions that a note is about


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was asked of an image: ``positivity`` is None, and ``summaries`` empty, if it was not.

    ``notes`` are for people.
    """

    positivity: Positivity | None = None
    summaries: tuple[Summary, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def record(self) -> PositivityRecord | None:
        """What makes nuclei positive, for the file of the result."""
        return None if self.positivity is None else self.positivity.record

    def classified(self, batches: Iterable[Nuclei]) -> Iterable[Nuclei]:
        """Batches of nuclei, with classes where these were asked for."""
        return batches if self.positivity is None else self.positivity.apply(batches)

    def classified_tables(self, tables: Iterable[Table]) -> Iterable[Table]:
        """The same for tables of nuclei."""
        if self.positivity is None:
            return tables
        return map(self.positivity.apply_to_table, tables)


def check_answerable(image: PreparedImage, entry: ImageEntry, config: Config) -> None:
    """Raise ImageError, before it is segmented, for an image that cannot be answered."""
    if positive := config.result.positive:
        names, with_cells = measurement_names(image.stains), config.cells.are_grown
        check_positive(positive, entry.name, image.stains, names, with_cells=with_cells)


def answer(segmented: SegmentedImage, entry: ImageEntry, config: ResultConfig) -> Answer:
    """Classify the nuclei of an image, and summarise it and the regions of ``entry.drawn``."""
    if not config.positive and not config.summarise and not entry.drawn:
        return Answer()
    positivity = _positivity(segmented, entry, config) if config.positive else None
    regions = Regions(entry.drawn)
    asked = Answer(positivity=positivity)
    summaries = summarise(
        asked.classified(segmented.nuclei()),
        image=entry.name,
        extents=list(_extents(segmented, entry)),
        regions=regions,
        class_names=positivity.class_names if positivity else (),
    )
    of_positivity = positivity.record.note if positivity else None
    notes = [*filter(None, [of_positivity]), *_notes(regions, segmented, entry)]
    return Answer(positivity=positivity, summaries=summaries, notes=tuple(notes))


def _positivity(segmented: SegmentedImage, entry: ImageEntry, config: ResultConfig) -> Positivity:
    def values(name: str) -> Iterator[NDArray[np.float32]]:
        return (found[name] for found in segmented.measurements([name]))

    first = next(iter(segmented.nuclei()), Nuclei(np.empty(0, dtype=object)))
    return find_positivity(
        config.positive,
        image=entry.name,
        base_class=config.class_name,
        stains=segmented.image.stains,
        names=list(first.measurements) or measurement_names(segmented.image.stains),
        values=values,
    )


def _extents(segmented: SegmentedImage, entry: ImageEntry) -> Iterator[Extent]:
    """How large the image is, and each region: what of it was segmented."""
    yield _extent(segmented)
    within = shapely.union_all(entry.regions) if entry.regions else None
    for region in entry.drawn:
        geometry = region.geometry
        part = geometry if within is None else geometry & within
        x, y = geometry.centroid.coords[0]
        place = {"x": x, "y": y, "area_px": geometry.area, "bounds": geometry.bounds}
        yield replace(_extent(segmented, part), **place)


def _extent(segmented: SegmentedImage, region: shapely.Geometry | None = None) -> Extent:
    """What was segmented of a region (level 0), or of the image.

    Unknown where that is nothing, or where all its tissue failed: a density of 0 would say that no
    nuclei were found there.
    """
    area_mm2, tissue_mm2 = segmented.area_mm2(region), segmented.tissue_mm2(region)
    if not area_mm2 or tissue_mm2 is None:
        return Extent()
    return Extent(area_mm2=area_mm2, tissue_mm2=tissue_mm2)


def _notes(regions: Regions, segmented: SegmentedImage, entry: ImageEntry) -> Iterator[str]:
    """What a person should know of regions that overlap, or that were not segmented as a whole."""
    if not len(regions):
        return
    pairs = [
        f"{regions.label(one)} and {regions.label(other)}"
        for one, other in regions.partly_overlapping()
    ]
    if pairs:
        yield f"regions overlap, and nuclei in both count in both: {_named(pairs)}"
    whole = shapely.box(0, 0, *segmented.image.slide.size)
    shares = regions.shares_in(whole)
    if outside := _labels(regions, shares == 0):
        yield f"regions lie outside the image: {_named(outside)}"
    if partly := _labels(regions, (shares > 0) & (shares < 1)):
        yield f"regions reach beyond the image, only their part in it counts: {_named(partly)}"
    if entry.regions:
        shares_segmented = regions.shares_in(shapely.union_all(entry.regions))
        if missed := _labels(regions, (shares > 0) & (shares_segmented < shares)):
            yield (
                "only what lies in the regions of the run was segmented, and counts, of "
                f"{_named(missed)}"
            )
    if failed := _labels(regions, regions.shares_in(segmented.failed_area) > 0):
        yield (
            f"what lies in failed tiles was not segmented, and does not count, of {_named(failed)}"
        )


def _labels(regions: Regions, which: NDArray[np.bool_]) -> list[str]:
    return [regions.label(i) for i in np.flatnonzero(which).tolist()]
