"""QuPath projects: which images they hold, and where their nuclei go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from patchcl_qupath.config import BackendKind
from patchcl_qupath.errors import ConfigError, ProjectError
from patchcl_qupath.project.create import NewImage, init_project
from patchcl_qupath.project.protocol import Backend, Project

__all__ = ["Backend", "BackendKind", "NewImage", "Project", "init_project", "open_project"]


def open_project(path: Path, backend: str = "auto", qupath: Path | None = None) -> Project:
    """The project of a .qpproj file, or of a folder that holds exactly one.

    ``backend`` "paquo" has a QuPath that is installed here write nuclei into the images; "files"
    leaves them beside the project, to be imported; "auto" takes paquo where there is a QuPath.
    ``qupath`` is QuPath's folder, where it is in none of the usual places.

    Raises ProjectError for what is not a project, or is damaged, and where paquo was asked for and
    cannot be used.
    """
    from patchcl_qupath.project.files import FilesProject

    if backend not in [*BackendKind]:
        raise ConfigError(f"unknown backend {backend!r}: it is one of {', '.join(BackendKind)}")
    files = FilesProject.open(path)
    if backend == BackendKind.FILES:
        return files
    from patchcl_qupath.project.paquo import PaquoProject

    try:
        return PaquoProject.open(files, qupath)
    except ProjectError as error:
        if backend == BackendKind.PAQUO or qupath is not None:
            raise
        return replace(files, backend=Backend(kind=BackendKind.FILES, reason=f"since {error}"))
