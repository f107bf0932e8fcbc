"""Label-free nucleus segmentation of the whole-slide images of a QuPath project.

``import patchcl_qupath as pq`` offers the functions of ``patchcl_qupath.library``:

    project = pq.open_project("project.qpproj")
    model = pq.train(project)
    pq.segment(project, model)
    nuclei = pq.read_nuclei(project, "slide.svs")

They are imported when they are first used, so that ``patchcl-qp --help`` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"

__all__ = [
    "Config",
    "create_project",
    "export",
    "load_model",
    "open_project",
    "project_status",
    "read_nuclei",
    "refine",
    "score",
    "segment",
    "suggest",
    "train",
    "write_report",
]

if TYPE_CHECKING:
    from patchcl_qupath.config import Config
    from patchcl_qupath.library import (
        create_project,
        export,
        load_model,
        open_project,
        project_status,
        read_nuclei,
        refine,
        score,
        segment,
        suggest,
        train,
        write_report,
    )


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("patchcl_qupath.library"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
