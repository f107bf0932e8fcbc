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

_ID = "id:"  # before what is an id, and no name

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

    "id:3" is the image of the id 3, whatever the names are. Raises ProjectError for a name that no
    image has, and for one that is the id of another image.
    """
    if not all(isinstance(name, str) for name in names):
        raise ProjectError("images are chosen by their names or ids, which are text")
    entries, wanted = project.images(), set(map(readable, names))
    by_id = {entry.id: entry.name for entry in entries}
    chosen_names = wanted & {entry.name for entry in entries}
    chosen_ids = {key.removeprefix(_ID) for key in wanted - chosen_names}
    if unknown := chosen_ids - by_id.keys():
        known = ", ".join(entry.name for entry in entries[:10])
        advice = f"choose among {known}" if known else "it has none, so add some in QuPath first"
        raise ProjectError(f"no image {', '.join(sorted(unknown))} in {project.path}: {advice}")
    for key in sorted(chosen_names & by_id.keys()):
        if by_id[key] != key:
            named = ", ".join(f"{_ID}{entry.id}" for entry in entries if entry.name == key)
            raise ProjectError(
                f"{key} is the name of an image and the id of another one, {by_id[key]}: choose "
                f"{named}, or {_ID}{key}"
            )
    return [
        entry
        for entry in entries
        if not wanted or entry.name in chosen_names or entry.id in chosen_ids
    ]
