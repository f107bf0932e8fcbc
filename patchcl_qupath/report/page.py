"""The report of a project: one HTML page that needs nothing but itself, read by people.

``write_report`` puts it together from what runs left: pictures and figures of each image
(``gallery``), results, models, runs. All words that come from files are escaped, pictures are
embedded, and a policy in the page's head forbids the browser to load or run anything else.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from importlib.resources import files
from pathlib import Path
from string import Template

from patchcl_qupath.errors import ProjectError
from patchcl_qupath.project import Project
from patchcl_qupath.report import sections
from patchcl_qupath.report.charts import Charts
from patchcl_qupath.report.density_map import DENSITY_COLOURS
from patchcl_qupath.report.found import find_image, find_models, find_runs
from patchcl_qupath.storage.files import write_bytes

__all__ = ["write_report"]


def write_report(project: Project) -> Path:
    """Write ``report/index.html`` of a project anew; returns its path.

    Equal files make an equal page. Raises StorageError; ProjectError where nothing was run yet.
    """
    images = [find_image(project, entry) for entry in project.images()]
    layout = project.layout
    if not (layout.root / "results").exists() and not layout.report.exists():
        raise ProjectError(
            f"{project.path} has no results to report: patchcl-qp run {project.path}"
        )
    models, runs, charts = find_models(project, images), find_runs(project, images), Charts()
    stops = ", ".join(f"rgb{colour}" for colour in DENSITY_COLOURS)
    style = f":root {{ --density: linear-gradient(90deg, {stops}); }}\n{_part('page.css')}"
    script = _part("page.js")
    page = Template(_part("page.html")).substitute(
        title=sections.title(project),
        sums=sections.sums(images),
        main="\n".join(
            [
                sections.table(images),
                sections.images(images, charts),
                sections.models(models, charts),
            ]
        ),
        footer=sections.made(runs),
        style=style,
        style_hash=_hash(style),
        script=script,
        script_hash=_hash(script),
    )
    path = layout.report_page
    write_bytes(path, page.encode())
    return path


def _part(name: str) -> str:
    return files("patchcl_qupath.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
