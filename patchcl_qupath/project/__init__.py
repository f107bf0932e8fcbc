"""QuPath projects: which images they hold, and where their nuclei go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import shapely

from patchcl_qupath.config import ResultConfig
from patchcl_qupath.datatypes import CorrectionRoi, Corrections, ImageEntry, Nuclei, QuPathSummary
from patchcl_qupath.errors import ConfigError, ProjectError
from patchcl_qupath.project.create import NewImage, init_project

__all__ = ["BACKENDS", "NewImage", "Project", "init_project", "open_project"]

BACKENDS = ("auto", "paquo", "files")


class Project(Protocol):
    """What a backend offers. ``path`` is the .qpproj file, ``output`` the folder that is ours."""

    @property
    def path(self) -> Path: ...

    @property
    def output(self) -> Path: ...

    @property
    def via(self) -> str:
        """The backend, and why this one."""

    def images(self) -> list[ImageEntry]:
        """The project's images, in its order; one that cannot be used says so in ``problem``."""

    def within(self, entry: ImageEntry, classes: Sequence[str]) -> ImageEntry:
        """The image, cut to the annotations of some classes: ``regions``, and a ``note`` on them.

        Raises ImageError where there is none, and says which classes there are.
        """

    def with_stains(self, entry: ImageEntry) -> ImageEntry:
        """The image with its own ``stains``, where a person set some in QuPath, and a ``note``.

        Raises ImageError for stains that cannot be told apart.
        """

    def labels(self, entry: ImageEntry, roi_class: str) -> Corrections:
        """The annotations of a class, and the nuclei in them that a person put right.

        Raises ImageError for what cannot be learnt from.
        """

    def results(self, entry: ImageEntry) -> Path:
        """The folder of an image's nuclei, which may not exist yet."""

    def write(
        self,
        entry: ImageEntry,
        parts: Iterable[Nuclei],
        count: int,
        config: ResultConfig,
        about: dict[str, Any],
    ) -> Path:
        """Replace an image's nuclei by ``count`` others, level 0; returns where they are.

        Only those that nobody touched are replaced. Raises ImageError where the image is as it was.
        """

    def corrected(self, entry: ImageEntry) -> tuple[shapely.Geometry, ...]:
        """The fields of an image that a person said to be done, level 0, as far as is known."""

    def suggest(self, entry: ImageEntry, rois: Sequence[CorrectionRoi]) -> str:
        """Mark fields to correct, in place of those of last time that nobody touched.

        Returns what was done, or what is left to do in QuPath. Raises ImageError.
        """

    def qupath_summary(self, entry: ImageEntry) -> QuPathSummary:
        """What QuPath has of an image, without asking it."""

    def remove(self, entry: ImageEntry) -> str:
        """Take an image's nuclei away, and fields to correct, those excepted that a person changed.

        Returns what was done, or what is left to do in QuPath.
        """

    def close(self) -> None:
        """End what was started for the project."""


def open_project(path: Path, backend: str = "auto", qupath: Path | None = None) -> Project:
    """The project of a .qpproj file, or of a folder that holds exactly one.

    ``backend`` "paquo" has a QuPath that is installed here write nuclei into the images; "files"
    leaves them beside the project, to be imported; "auto" takes paquo where there is a QuPath.
    ``qupath`` is QuPath's folder, where it is in none of the usual places.

    Raises ProjectError for what is not a project, or is damaged, and where paquo was asked for and
    cannot be used.
    """
    from patchcl_qupath.project.files import FilesProject

    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend {backend!r}: it is one of {', '.join(BACKENDS)}")
    files = FilesProject.open(path)
    if backend == "files":
        return files
    from patchcl_qupath.project.paquo import PaquoProject

    try:
        return PaquoProject.open(files, qupath)
    except ProjectError as error:
        if backend == "paquo" or qupath is not None:
            raise
        return replace(files, via=f"files, since {error}")
