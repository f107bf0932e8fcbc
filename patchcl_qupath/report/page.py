"""The report of a project: one HTML page that needs nothing but itself, read by people.

``write_report`` reads what runs left (``found``), makes views of it (``views``), and renders them
by the Jinja2 templates in ``templates``, which escape all texts. Pictures are embedded, and a
content security policy forbids the browser to load or run anything else.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from patchcl_qupath.config import INTENSITY_COLOURS
from patchcl_qupath.errors import ProjectError, quoted
from patchcl_qupath.project import Project
from patchcl_qupath.report import training_views, views
from patchcl_qupath.report.density_map import DENSITY_COLOURS
from patchcl_qupath.report.downloads import write_downloads
from patchcl_qupath.report.found import find_image, find_models, find_runs
from patchcl_qupath.report.positivity_map import POSITIVITY_COLOURS
from patchcl_qupath.storage.files import write_bytes

__all__ = ["write_report"]

_OPEN_IMAGES = 3  # at most that are shown at once, and not on demand, so that the page stays light


class _Embedded(NamedTuple):
    """A style sheet or script of the page, and its hash for the content security policy."""

    text: Markup
    hash: str


def write_report(project: Project) -> Path:
    """Write ``report/index.html`` of a project anew; returns its path.

    Equal files make an equal page. Raises StorageError; ProjectError where nothing was run yet.
    """
    images = [find_image(project, entry) for entry in project.images()]
    layout = project.layout
    if not (layout.root / "results").exists() and not layout.report.exists():
        raise ProjectError(
            f"{project.path} has no results to report: patchcl-qp run {quoted(project.path)}"
        )
    models, runs = find_models(project, images), find_runs(project, images)
    page = (
        _environment()
        .get_template("page.html.j2")
        .render(
            title=views.title(project),
            totals=views.Totals.of(images),
            table=views.Table.of(images),
            images=[views.ImageView.of(image, number) for number, image in enumerate(images)],
            region_tables=[
                table
                for kind in ("region", "core")
                if (table := views.RegionTable.of(images, kind)) is not None
            ],
            downloads=write_downloads(project),
            open_images=len(images) <= _OPEN_IMAGES,
            models=[
                training_views.ModelView.of(model, number) for number, model in enumerate(models)
            ],
            runs=[views.RunView.of(run) for run in runs],
            style=_embedded(f"{_colours()}\n{_source('page.css')}"),
            script=_embedded(_source("page.js")),
        )
    )
    write_bytes(layout.report_page, page.encode("utf-8", "replace"))  # paths may not be UTF-8
    return layout.report_page


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("patchcl_qupath.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = _number
    return environment


def _number(value: float, spec: str = ",") -> str:
    """A number by a format specification, with separators of thousands unless another is given."""
    return format(value, spec)


def _colours() -> str:
    """The colours of maps, for their scales, and those of classes of nuclei."""
    maps = {"density": DENSITY_COLOURS, "positivity": POSITIVITY_COLOURS}
    named = {
        name: f"linear-gradient(90deg, {', '.join(f'rgb{colour}' for colour in colours)})"
        for name, colours in maps.items()
    }
    named |= {
        views.kind_of_class(name): f"rgb{colour}" for name, colour in INTENSITY_COLOURS.items()
    }
    return f":root {{ {' '.join(f'--{name}: {value};' for name, value in named.items())} }}"


def _source(name: str) -> str:
    return files("patchcl_qupath.report").joinpath(name).read_text(encoding="utf-8")


def _embedded(text: str) -> _Embedded:
    """A style sheet or script that is part of the program."""
    digest = b64encode(hashlib.sha256(text.encode()).digest()).decode()
    # Browsers take what is in <style> and <script> as it is: escaped, it would be another text than
    # the one whose hash is in the policy. Nothing of a project is in it.
    return _Embedded(text=Markup(text), hash=f"sha256-{digest}")
