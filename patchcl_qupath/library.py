"""The library: what a notebook or a script does with a project, in a dozen functions.

``import patchcl_qupath as pq`` offers them. Each sees the project as it is on disk by then. The
examples run on a copy of the sample project.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

from patchcl_qupath import pipeline
from patchcl_qupath.config import (
    Config,
    ExportFormat,
    ExportRows,
    from_dict,
    to_dict,
    unlike_training,
)
from patchcl_qupath.correction import suggest as suggestions
from patchcl_qupath.correction.suggest import Suggestion
from patchcl_qupath.errors import ConfigError, ImageError, ModelError, ProjectError
from patchcl_qupath.evaluation.score import ImageScore
from patchcl_qupath.evaluation.score import score as score_images
from patchcl_qupath.execution.workers import open_workers
from patchcl_qupath.exports.command import Request
from patchcl_qupath.exports.command import export as export_images
from patchcl_qupath.exports.images import damaged
from patchcl_qupath.models.model import Model
from patchcl_qupath.progress import ShowProgress, hide_progress
from patchcl_qupath.project import NewImage, Project, chosen_images, init_project
from patchcl_qupath.project import open_project as open_backend
from patchcl_qupath.project.models import existing_model
from patchcl_qupath.report.page import write_report as write_page
from patchcl_qupath.slides.openslide import one_of_each_slide
from patchcl_qupath.status import ImageStatus, image_statuses
from patchcl_qupath.storage.files import exclusive_lock
from patchcl_qupath.storage.geojson import run_classes
from patchcl_qupath.storage.parquet import Table, read_geoarrow
from patchcl_qupath.storage.records import ImageOutcome

Choice = TypeVar("Choice", ExportFormat, ExportRows)
Settings = Config | Mapping[str, Any] | None  # None: the defaults


def open_project(path: str | Path, backend: str = "files", qupath: Path | None = None) -> Project:
    """Open a QuPath project: its .qpproj file, or the folder that holds one.

    ``backend`` "files" leaves nuclei beside the project; "paquo" has an installed QuPath (in the
    folder ``qupath``, or in a usual place) write them into the images; "auto" takes what is there.
    Raises ProjectError.

    >>> project = pq.open_project("sample_project")
    >>> [image.name for image in project.images()]
    ['CMU-1-Small-Region.svs']
    """
    return open_backend(Path(path), backend, qupath)


def create_project(
    folder: str | Path, images: str | Path | Sequence[str | Path], mpp: float | None = None
) -> Project:
    """Create a QuPath project of image files, which stay where they are.

    ``mpp`` is the pixel size, in µm, of images whose file has no usable one; of several images in a
    file, the one is taken that QuPath's Bio-Formats shows. Raises ProjectError where there is a
    project already, SlideError for an image that cannot be read, ConfigError for an ``mpp`` that is
    no length.

    >>> project = pq.create_project("new_project", ["sample_project/CMU-1-Small-Region.svs"])
    >>> project.path.name
    'project.qpproj'
    """
    paths = [Path(images)] if isinstance(images, str | Path) else [*map(Path, images)]
    size = None if mpp is None else _length(mpp)
    new = [NewImage.of_file(image, size) for image in one_of_each_slide(paths)]
    return open_project(init_project(Path(folder), new))


def train(
    project: Project,
    name: str = "patchcl",
    images: Sequence[str] = (),
    settings: Settings = None,
    show: ShowProgress | None = None,
) -> Model:
    """Train a model on a project's own slides, without labels, and save it as ``name``.

    ``images`` are names or ids; all where there are none. ``settings`` are those of the guide, as a
    ``Config`` or as nested dictionaries. ``show`` is called with each
    ``Progress``. Takes two to eleven minutes on two cores with the default settings. Images that
    cannot be used are left out, with a warning in Python's log. Raises TrainingError; ConfigError
    for the name of a refined model.

    >>> steps = {"first_steps": 20, "steps": 80, "cdcl_steps": 5, "crop_px": 64}
    >>> quick = {"patchcl": {"max_steps": 60, "batch": 2, "crops": 16}, "selftrain": steps}
    >>> model = pq.train(project, settings=quick)
    >>> model.mpp
    0.5
    """
    with _at_work(project) as project:
        entries = chosen_images(project, _several(images))
        return pipeline.train_as(name, project, entries, _config(settings), show or hide_progress)


def load_model(project: Project, name: str = "patchcl") -> Model:
    """Load a model that was trained for a project.

    Raises ModelError, also where there is none of that name.

    >>> pq.load_model(project).digest == model.digest
    True
    """
    try:
        return Model.load(existing_model(project, name))
    except ConfigError as error:
        raise ModelError(str(error)) from error


def segment(
    project: Project,
    model: Model,
    images: Sequence[str] = (),
    regions: Sequence[str] = (),
    settings: Settings = None,
    workers: int | None = None,
    show: ShowProgress | None = None,
) -> list[ImageOutcome]:
    """Segment the nuclei of a project's images, and write them into the project.

    ``regions`` are classes of annotations to keep to; ``settings`` those of the model where there
    are none, and dictionaries change some of these; ``workers`` the number of threads, all usable
    cores where it is None. One image that fails does not stop the others:
    its outcome has a ``problem``. Resumes what was stopped. Raises ConfigError for settings of
    another ``slide.mpp`` than the model's, and for dictionaries of another training.

    >>> outcome, = pq.segment(project, model)
    >>> outcome.problem is None, outcome.nuclei > 100
    (True, True)
    """
    if not isinstance(model, Model):
        raise ConfigError(f"{model!r} is not a model: pass pq.load_model(project, NAME)")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers are 1 or more, not {workers}: leave them out for all cores")
    with _at_work(project) as project, open_workers(workers) as found:
        run = pipeline.Run(
            project=project,
            model=model,
            config=_config_of_run(settings, model),
            workers=found,
            progress=show or hide_progress,
            region_classes=run_classes(_several(regions)),
        )
        return list(run.images(chosen_images(project, _several(images))))


def read_nuclei(project: Project, image: str) -> Table:
    """The nuclei of an image: id, geometry, and measurements under QuPath's names.

    Geometry is WKB, polygons in px at level 0, as a GeoArrow extension type: geopandas takes the
    table by ``GeoDataFrame.from_arrow``, pandas by ``to_pandas``. ``image`` is a name or an id.
    Raises ImageError where it has no nuclei, or a damaged file of them; ProjectError for no image,
    or several of that name.

    >>> nuclei = pq.read_nuclei(project, "CMU-1-Small-Region.svs")
    >>> nuclei.num_rows == outcome.nuclei
    True
    >>> nuclei.column_names[:4]
    ['id', 'geometry', 'Area µm^2', 'Length µm']
    """
    project = project.reread()
    entry, *others = chosen_images(project, [image])
    if others:
        ids = ", ".join(each.id for each in (entry, *others))
        raise ProjectError(f"{1 + len(others)} images are named {image}: pass an id ({ids})")
    path = project.layout.nuclei(entry.id)
    if not path.exists():
        raise ImageError(f"{entry.name} has no nuclei: segment it first")
    try:
        return read_geoarrow(path)
    except Exception as error:  # readers of damaged files raise anything
        raise damaged(entry, path, error) from error


def export(
    project: Project,
    to: str = "csv",
    per: str = "nucleus",
    output: str | Path | None = None,
    images: Sequence[str] = (),
    excel: bool = False,
) -> list[Path]:
    """Export nuclei as tables or for other programs, and return the files.

    ``to`` is csv, parquet, geojson (for QuPath), visium-hd (for Space Ranger), spatialdata or
    anndata; ``per``, what a row of a table is: nucleus, image, region or core. ``output`` is a file
    for all images, if it has the suffix of the format, or a folder with a file for each; without
    one, a file in the project's folder patchcl/exports. ``excel``: CSV as Excel opens it. Images
    without nuclei, which are left out, and the command's other notes are warnings. Raises
    ProjectError where there are no nuclei, ConfigError for what cannot be asked for, StorageError
    for a file that cannot be written; ImageError for an image whose nuclei cannot be read, once the
    others are exported.

    >>> table, = pq.export(project, per="image")
    >>> table.name, table.read_text().split(",")[:3]
    ('images.csv', ['Image', 'Object type', 'Name'])
    """
    request = Request(
        to=_one_of(ExportFormat, to),
        per=_one_of(ExportRows, per),
        output=None if output is None else Path(output),
        excel=excel,
    )
    project = project.reread()
    exported = export_images(project, chosen_images(project, _several(images)), request)
    _warn([*(f"left out: {reason}" for reason in exported.left_out), *exported.notes])
    if exported.problems:
        raise ImageError(exported.problems[0])
    return [Path(file.path) for file in exported.files]


def score(
    project: Project, ground_truth: str | Path, pictures: str | Path | None = None
) -> list[ImageScore]:
    """Compare nuclei with those that people outlined: Dice, AJI, PQ, F1 at IoU 0.5, errors by kind.

    ``ground_truth`` is a folder of files named as the images (GeoJSON, or instance labels as PNG,
    TIFF or NPY), or the file of one image. With a folder ``pictures``, the errors of each image are
    drawn into it. Images without ground truth, which are left out, are a warning. Raises
    GroundTruthError where all are.

    >>> scored, = pq.score(project, "ground_truth")
    >>> sorted(scored.scores)
    ['aji', 'dice', 'f1', 'pq']
    >>> list(scored.kinds)
    ['right', 'badly_outlined', 'missed', 'merged', 'split', 'spurious']
    """
    folder = None if pictures is None else Path(pictures)
    project = project.reread()
    scored, without = score_images(project, project.images(), Path(ground_truth), folder)
    if without:
        _warn([f"without ground truth, left out: {', '.join(without)}"])
    return scored


def suggest(project: Project, count: int = 6) -> Suggestion:
    """Mark the ROIs of a project that are most worth a correction.

    Raises ProjectError where none can be chosen, ConfigError for a count below 1.

    >>> suggestion = pq.suggest(project, count=2)
    >>> len(suggestion.rois)
    2
    """
    if count < 1:
        raise ConfigError(f"{count} ROIs cannot be chosen: ask for 1 or more")
    with _at_work(project) as project:
        return suggestions.suggest(project, project.images(), count)


def refine(
    project: Project,
    model: Model,
    name: str = "refined",
    labels_from: str = "PatchCL: corrected",
    show: ShowProgress | None = None,
) -> Model:
    """Refine a model by CDCL with the ROIs of a class that a person corrected; save it as ``name``.

    The command's notes on what was drawn are warnings. Raises TrainingError where there is no such
    ROI, ImageError for labels that cannot be trained on, ConfigError for a name that no file can
    have, and for that of the model it begins with.

    >>> pq.refine(project, model)
    Traceback (most recent call last):
    ...
    patchcl_qupath.errors.TrainingError: no image has an annotation of class PatchCL: corrected: ...
    """
    if _is_saved_as(project.layout.model(name), model):
        raise ConfigError(f"give the refined model another name than {name}")
    with _at_work(project) as project:
        entries = project.images()
        refined, corrections = pipeline.refine_as(
            name, project, entries, model, labels_from, show or hide_progress
        )
    names = {entry.id: entry.name for entry in entries}
    _warn(f"{names[id_]}: {note}" for id_, found in corrections.items() for note in found.notes)
    return refined


def project_status(project: Project) -> list[ImageStatus]:
    """What is done of each image, by which model, and what changed since.

    >>> [(image.state, image.nuclei == outcome.nuclei) for image in pq.project_status(project)]
    [('done', True)]
    """
    project = project.reread()
    return image_statuses(project, project.images())


def write_report(project: Project) -> Path:
    """Write the report of a project, one HTML page, and return its path. Raises ProjectError.

    >>> pq.write_report(project).name
    'index.html'
    """
    return write_page(project.reread())


@contextmanager
def _at_work(project: Project) -> Iterator[Project]:
    """Nobody else works on the project meanwhile; it is the one that is on disk by then.

    A person may have changed it in QuPath since it was opened, between two cells of a notebook.
    """
    with exclusive_lock(project.layout.root):
        yield project.reread()


def _is_saved_as(path: Path, model: Model) -> bool:
    """Whether a file of weights is there, and of that model: whatever lies beside it."""
    with suppress(ModelError):
        return Model.load(path).digest == model.digest
    return False


def _warn(notes: Iterable[str]) -> None:
    """Remarks for people, at the line of the script that called a function of this module."""
    for note in notes:
        warnings.warn(note, stacklevel=3)


def _length(um: object) -> float:
    """A length in µm, of numpy, too. Raises ConfigError."""
    length = float(um) if not isinstance(um, bool) and isinstance(um, Real) else math.nan
    if not 0 < length < math.inf:
        raise ConfigError(f"mpp is a number of µm above 0, not {um!r}")
    return length


def _several(names: object) -> tuple[str, ...]:
    """Some names; a text is one name, not that of each of its letters. Raises ConfigError."""
    if isinstance(names, str):
        return (names,)
    if not isinstance(names, Iterable):
        raise ConfigError(f"{names!r} is no name, nor several: pass text, or a list of it")
    return tuple(names)


def _one_of(kind: type[Choice], name: str) -> Choice:
    try:
        return kind(name)
    except ValueError:
        raise ConfigError(f"{name} is none of {', '.join(kind)}: choose one of these") from None


def _config(settings: Settings) -> Config:
    if settings is None or isinstance(settings, Config):
        return settings or Config()
    return from_dict(_tables(settings))


def _tables(settings: object) -> Mapping[str, Any]:
    """Settings as nested dictionaries. Raises ConfigError for anything else."""
    if not isinstance(settings, Mapping):
        raise ConfigError(
            f"settings are a Config, or nested dictionaries, not {settings!r}: read those of a "
            "file by Python's tomllib"
        )
    return settings


def _config_of_run(settings: Settings, model: Model) -> Config:
    """The settings of a run: those of the model, with what dictionaries change of them."""
    if settings is None:
        return model.config
    if isinstance(settings, Config):
        return settings
    if unlike := unlike_training(_tables(settings), to_dict(model.config)):
        raise ConfigError(f"the model was trained with {unlike}: leave that out, or train another")
    return from_dict(settings, model.config)
