"""QuPath projects: their images, and the nuclei that are written into them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from patchcl_qupath.config import BackendKind
from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.errors import ConfigError, ProjectError
from patchcl_qupath.project.create import NewImage, init_project
from patchcl_qupath.project.protocol import Backend, Project
from patchcl_qupath.storage.files import readable

__all__ = ["NewImage", "Project", "chosen_images", "init_project", "open_project"]


def open_project(path: Path, backend: str = "auto", qupath: Path | None = None) -> Project:
    """The project of a .qpproj file, or of a folder that holds exactly one.

    With ``backend`` "paquo", an installed QuPath writes nuclei into the images; with "files",
    nuclei are written beside the project, for an import in QuPath; "auto" is "paquo" if a QuPath
    is found, else "files". ``qupath`` is QuPath's folder, if it is not in a usual place.

    Raises ConfigError for another backend; ProjectError if the path is not that of a project, if
    the project is damaged, and if paquo was asked for and cannot be used.
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


def chosen_images(project: Project, names: Collection[str]) -> list[ImageEntry]:
    """The images of a project that have these names or ids; all where there are none.

    Raises ProjectError for a name that no image has.
    """
    entries, wanted = project.images(), set(map(readable, names))
    if unknown := wanted - {key for entry in entries for key in (entry.id, entry.name)}:
        known = ", ".join(entry.name for entry in entries[:10]) or "none"
        raise ProjectError(
            f"no image {', '.join(sorted(unknown))} in {project.path}: it has {known}"
        )
    return [entry for entry in entries if not wanted or {entry.id, entry.name} & wanted]
