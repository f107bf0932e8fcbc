"""The interface of a QuPath project, which both backends implement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import shapely

from patchcl_qupath.config import BackendKind, ResultConfig
from patchcl_qupath.datatypes import (
    CorrectionRoi,
    Corrections,
    ImageEntry,
    Nuclei,
    QuPathSummary,
    StainVectors,
)
from patchcl_qupath.storage.layout import Layout
from patchcl_qupath.storage.records import Imported, RegionSummary, ResultRecord

if TYPE_CHECKING:  # it loads pyarrow
    from patchcl_qupath.storage.parquet import Table


@dataclass(frozen=True)
class Backend:
    """The backend of a project; ``reason``, for people, is why it was chosen."""

    kind: BackendKind
    reason: str = ""

    def __str__(self) -> str:
        return self._with_reason(str(self.kind))

    def in_words(self, preposition: str) -> str:
        """How something is done: by QuPath; or, after the ``preposition``, in files, and why."""
        how = f"by {self.kind}" if self.writes_into_qupath else f"{preposition} files"
        return self._with_reason(how)

    def _with_reason(self, text: str) -> str:
        return f"{text}, {self.reason}" if self.reason else text

    @property
    def writes_into_qupath(self) -> bool:
        """Whether nuclei are in QuPath's images without an import by a person."""
        return self.kind is BackendKind.PAQUO


class Project(Protocol):
    """A QuPath project.

    ``path`` is that of the .qpproj file; ``layout`` has the paths of our own files. All geometry is
    in px at level 0, (x, y).
    """

    @property
    def path(self) -> Path: ...

    @property
    def layout(self) -> Layout: ...

    @property
    def backend(self) -> Backend: ...

    @property
    def qupath_version(self) -> str | None:
        """The QuPath that saved the project, if it is known: measurements have its names there."""

    def reread(self) -> Project:
        """The project as it is on disk now, with which a run begins. Raises ProjectError."""

    def images(self) -> list[ImageEntry]:
        """The project's images, in its order; one that cannot be used has a ``problem``."""

    def with_regions(self, entry: ImageEntry, classes: Sequence[str]) -> ImageEntry:
        """The image, limited to the annotations of some classes: ``regions``, and a ``note``.

        ``TMA_CORES`` is one of the classes where cores are meant. Raises ImageError if the image
        has no annotation of these classes.
        """

    def with_drawn(self, entry: ImageEntry, classes: Sequence[str]) -> ImageEntry:
        """The image with annotations of some classes, to count nuclei in: ``drawn``, a ``note``.

        ``TMA_CORES`` is one of the classes where cores are meant. Raises ImageError where the
        annotations cannot be read; an image may have none.
        """

    def with_stains(self, entry: ImageEntry) -> ImageEntry:
        """The image with the ``stains`` that a person set in QuPath, if any, and a ``note``.

        Raises ImageError for stain vectors that are linearly dependent.
        """

    def exported_stains(self, entry: ImageEntry) -> StainVectors | None:
        """The stains of an image as they were last exported, read without starting QuPath.

        Without an export, QuPath's default ones of an image of type H-DAB; else None. Raises
        ImageError for a file that is damaged.
        """

    def corrections(self, entry: ImageEntry, roi_class: str) -> Corrections:
        """The ROIs of a class, and the nuclei in them that a person corrected.

        Raises ImageError for labels that cannot be trained on.
        """

    def corrected_rois(self, entry: ImageEntry) -> tuple[shapely.Geometry, ...]:
        """The ROIs of an image that a person marked as corrected; none if they were not exported.

        Raises ImageError if they cannot be read.
        """

    def write(
        self,
        entry: ImageEntry,
        batches: Iterable[Nuclei | Table],
        config: ResultConfig,
        result: ResultRecord,
    ) -> Imported | None:
        """Replace an image's nuclei by ``result.nuclei`` others.

        Returns what became of them in QuPath; None where they wait to be imported. Nuclei that a
        person changed are kept. ``batches`` are read one at a time. Raises
        StorageError; and ImageError if the nuclei cannot be written into the image, which is then
        unchanged.
        """

    def mark_rois(self, entry: ImageEntry, rois: Sequence[CorrectionRoi]) -> str:
        """Mark ROIs to correct; they replace earlier ones that nobody touched.

        Returns a message of what was done, or of what is to be done in QuPath. Raises ImageError.
        """

    def qupath_summary(self, entry: ImageEntry) -> QuPathSummary:
        """The state of an image in QuPath, read from files, without starting QuPath."""

    def summarise(self, entry: ImageEntry) -> tuple[RegionSummary, ...]:
        """Count the nuclei in the `PatchCL` annotations of an image anew, as it was last saved.

        Raises ImageError where there are none, and without a QuPath.
        """

    def remove(self, entry: ImageEntry) -> str:
        """Remove an image's nuclei and ROIs to correct, except those that a person changed.

        Returns a message of what was done, or of what is to be done in QuPath. Raises ImageError.
        """

    def close(self) -> None:
        """End processes that were started for the project."""
