"""QuPath projects: which images they hold, and where their nuclei go."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from patchcl_qupath.config import ResultConfig
from patchcl_qupath.datatypes import ImageEntry, Nuclei
from patchcl_qupath.project.create import NewImage, init_project

__all__ = ["NewImage", "Project", "init_project", "open_project"]


class Project(Protocol):
    """What a backend offers. ``path`` is the .qpproj file, ``output`` the folder that is ours."""

    @property
    def path(self) -> Path: ...

    @property
    def output(self) -> Path: ...

    def images(self) -> list[ImageEntry]:
        """The project's images, in its order; one that cannot be used says so in ``problem``."""

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
        """Replace an image's nuclei by ``count`` others, level 0; returns where they are."""


def open_project(path: Path) -> Project:
    """The project of a .qpproj file, or of a folder that holds exactly one.

    Raises ProjectError for what is not a project, or is damaged.
    """
    from patchcl_qupath.project.files import FilesProject

    return FilesProject.open(path)
