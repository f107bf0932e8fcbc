"""What was changed since a run, of that which the nuclei of an image depend on."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum
from itertools import chain

import numpy as np
import shapely

from patchcl_qupath.config import from_dict
from patchcl_qupath.datatypes import ImageEntry, StainVectors
from patchcl_qupath.errors import ConfigError, ImageError
from patchcl_qupath.project.drawn import SELECTED, of_classes, read_drawn
from patchcl_qupath.project.protocol import Project
from patchcl_qupath.slides.signature import signature_without_download
from patchcl_qupath.slides.stain_vectors import H_DAB, H_E, stains_to_measure
from patchcl_qupath.storage.geojson import from_object
from patchcl_qupath.storage.records import ResultRecord


class Change(StrEnum):
    """What was changed, in a word or two."""

    SLIDE = "slide file"
    PIXEL_SIZE = "pixel size"
    STAINS = "stain vectors"
    REGIONS = "regions"

    @property
    def in_words(self) -> str:
        """What it means for the nuclei, and what to do."""
        return _IN_WORDS[self]


_IN_WORDS = {
    Change.SLIDE: (
        "its slide file was replaced since the run, and its nuclei are those of the one before: "
        "run again"
    ),
    Change.PIXEL_SIZE: (
        "its pixel size was changed since the run, and lengths, areas and densities are those of "
        "before: run again"
    ),
    Change.STAINS: (
        "its stain vectors were changed since the run, and optical densities, and what is positive "
        "by them, are those of before: run again"
    ),
    Change.REGIONS: (
        "the regions of its run were changed since then, and its nuclei are those in the ones "
        "before: run again"
    ),
}
_SAME_AREA = 0.01  # of the smallest region: what is exported and read again differs by less
_SAME_VECTOR = 1e-4  # QuPath rounds vectors when it saves them,
_SAME_LEVEL = 0.5  # and levels of the background


def changed_since(project: Project, entry: ImageEntry, result: ResultRecord) -> list[Change]:
    """What was changed since the run of a result, as far as files tell; what is not known, is not.

    A copy of a slide, which has another time, is no change. Of stains and regions it is known what
    was exported from QuPath: that of the run, or what was there later.
    """
    return [*_changes(project, entry, result)]


def _changes(project: Project, entry: ImageEntry, result: ResultRecord) -> Iterator[Change]:
    if not _has_its_file(entry, result):
        yield Change.SLIDE
    if not result.slide.has_size(entry.mpp):
        yield Change.PIXEL_SIZE
    if not _has_its_stains(project, entry, result):
        yield Change.STAINS
    if not _has_its_regions(project, entry, result):
        yield Change.REGIONS


def _has_its_file(entry: ImageEntry, result: ResultRecord) -> bool:
    """Whether the slide is that of the nuclei, or cannot be read."""
    try:
        return signature_without_download(entry.path).has_content_of(result.slide.file)
    except OSError:
        return True


def _has_its_stains(project: Project, entry: ImageEntry, result: ResultRecord) -> bool:
    """Whether the stains are those of the nuclei, or are not known: without an export of them, they
    are one of QuPath's defaults."""
    own_are_known = project.layout.stains(entry.id).exists()
    if not own_are_known and not any(_are_same(result.stains, each) for each in (H_E, H_DAB)):
        return True
    try:
        own = project.exported_stains(entry)
        choice = from_dict(result.config).slide.stain
    except (ImageError, ConfigError):  # damaged, or of another version
        return True
    return _are_same(stains_to_measure(own, choice), result.stains)


def _are_same(stains: StainVectors, others: StainVectors) -> bool:
    """Whether two stain vectors measure the same, but for the digits that QuPath saves."""
    return (
        stains.names == others.names
        and np.allclose(stains.vectors, others.vectors, rtol=0, atol=_SAME_VECTOR)
        and np.allclose(stains.background, others.background, rtol=0, atol=_SAME_LEVEL)
    )


def _has_its_regions(project: Project, entry: ImageEntry, result: ResultRecord) -> bool:
    """Whether the regions cover what those of the run did, or are not known; a selection is not."""
    if not result.regions or SELECTED in result.within:
        return True
    try:
        drawn = read_drawn(project.layout.regions(entry.id), entry.name)
    except ImageError:  # missing or damaged
        return True
    of_run = of_classes(drawn, result.within).values()
    now = [region.geometry for region in chain.from_iterable(of_run)]
    before = [from_object(region.geometry) for region in result.regions]
    differing = shapely.symmetric_difference(shapely.union_all(now), shapely.union_all(before))
    smallest = float(shapely.area([*now, *before]).min())
    return bool(differing.area <= _SAME_AREA * smallest)
