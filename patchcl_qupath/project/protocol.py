"""What a backend of QuPath projects offers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import shapely

from patchcl_qupath.config import BackendKind as BackendKind
from patchcl_qupath.config import ResultConfig
from patchcl_qupath.datatypes import CorrectionRoi, Corrections, ImageEntry, Nuclei, QuPathSummary
from patchcl_qupath.storage.layout import Layout
from patchcl_qupath.storage.records import ResultRecord


@dataclass(frozen=True)
class Backend:
    """A backend, and why this one: ``reason`` follows its name and a comma."""

    kind: BackendKind
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.kind}, {self.reason}" if self.reason else str(self.kind)

    @property
    def writes_into_qupath(self) -> bool:
        """Whether nuclei are in QuPath's images at once, without an import by a person."""
        return self.kind is BackendKind.PAQUO


class Project(Protocol):
    """A QuPath project. ``path`` is the .qpproj file, ``layout`` where our own files lie."""

    @property
    def path(self) -> Path: ...

    @property
    def layout(self) -> Layout: ...

    @property
    def backend(self) -> Backend: ...

    def images(self) -> list[ImageEntry]:
        """The project's images, in its order; one that cannot be used says so in ``problem``."""

    def with_regions(self, entry: ImageEntry, classes: Sequence[str]) -> ImageEntry:
        """The image, limited to the annotations of some classes: ``regions``, and a ``note``.

        Raises ImageError where there is none, and says which classes there are.
        """

    def with_stains(self, entry: ImageEntry) -> ImageEntry:
        """The image with its own ``stains``, where a person set some in QuPath, and a ``note``.

        Raises ImageError for stains that cannot be told apart.
        """

    def corrections(self, entry: ImageEntry, roi_class: str) -> Corrections:
        """The ROIs of a class, and the nuclei in them that a person corrected.

        Raises ImageError for labels that cannot be trained on.
        """

    def corrected_rois(self, entry: ImageEntry) -> tuple[shapely.Geometry, ...]:
        """The ROIs of an image that a person marked as corrected, level 0, as far as is known."""

    def write(
        self,
        entry: ImageEntry,
        parts: Iterable[Nuclei],
        config: ResultConfig,
        result: ResultRecord,
    ) -> Path:
        """Replace an image's nuclei by ``result.nuclei`` others, level 0; returns their folder.

        Only those that nobody touched are replaced. Raises ImageError where the image is as it was.
        """

    def mark_rois(self, entry: ImageEntry, rois: Sequence[CorrectionRoi]) -> str:
        """Mark ROIs to correct, in place of those of last time that nobody touched.

        Returns what was done, or what is left to do in QuPath. Raises ImageError.
        """

    def qupath_summary(self, entry: ImageEntry) -> QuPathSummary:
        """What QuPath has of an image, read from files, without starting QuPath."""

    def remove(self, entry: ImageEntry) -> str:
        """Remove an image's nuclei, and ROIs to correct, except those that a person changed.

        Returns what was done, or what is left to do in QuPath.
        """

    def close(self) -> None:
        """End what was started for the project."""
