"""What was changed since a run, of that which the nuclei of an image depend on."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.slides.signature import slide_signature
from patchcl_qupath.storage.records import ResultRecord


class Change(StrEnum):
    """What was changed, in a word or two."""

    SLIDE = "slide file"
    PIXEL_SIZE = "pixel size"

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
}


def changed_since(entry: ImageEntry, result: ResultRecord) -> list[Change]:
    """What was changed since the run of a result, as far as files tell; what is not known, is not.

    A copy of a slide, which has another time, is no change.
    """
    return [*_changes(entry, result)]


def _changes(entry: ImageEntry, result: ResultRecord) -> Iterator[Change]:
    if not _has_its_file(entry, result):
        yield Change.SLIDE
    if not result.slide.has_size(entry.mpp):
        yield Change.PIXEL_SIZE


def _has_its_file(entry: ImageEntry, result: ResultRecord) -> bool:
    """Whether the slide is that of the nuclei, or cannot be read."""
    try:
        return slide_signature(entry.path).has_content_of(result.slide.file)
    except OSError:
        return True
