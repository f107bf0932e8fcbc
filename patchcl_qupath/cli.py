"""The command line: flags to settings, one call of the pipeline, messages for people.

Exit status: 0 all done, 1 something failed (the rest is done), 2 wrong usage, 130 Ctrl-C.
What takes long to import is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import _thread
import atexit
import errno
import gc
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.core import ParameterSource

from patchcl_qupath import __version__, console, options
from patchcl_qupath.config import (
    CORRECTED,
    DEFAULT_MODEL,
    REFINED_MODEL,
    TMA_CORES,
    BackendKind,
    Config,
    EngineChoice,
    ExportFormat,
    ExportRows,
    load_config,
    read_settings,
    to_dict,
    unlike_training,
)
from patchcl_qupath.errors import (
    FORESEEN,
    ConfigError,
    ImageError,
    PatchCLError,
    ProjectError,
    count_of,
    quoted,
    reason_of,
)
from patchcl_qupath.options import (
    Common,
    Exporting,
    Overrides,
    Pool,
    Reading,
    Showing,
    Writing,
)
from patchcl_qupath.progress import Progress, ShowProgress, Stage

if TYPE_CHECKING:
    from patchcl_qupath.datatypes import ImageEntry
    from patchcl_qupath.models.model import Model
    from patchcl_qupath.project import Project
    from patchcl_qupath.storage.records import ImageOutcome, ImageSummary

logger = logging.getLogger("patchcl_qupath.cli")  # which may be run as __main__


class _Commands(click.Group):
    """The commands, whose arguments are as they were given: on Windows, click takes any with a
    ``*`` or a bracket for files, also names of classes, and in quotes."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        try:
            return super().main(*arguments, **{"windows_expand_args": False, **options})
        except OSError as error:  # of project files, it is one of those that are foreseen
            if error.errno != errno.ENOSPC or error.filename:
                raise
            click.echo(f"Error: what is printed cannot be written: {error.strerror}", err=True)
            sys.exit(1)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@options.verbose
def main() -> None:
    """Find every nucleus in the slides of a QuPath project: no labels, no GPU, no download."""
    from patchcl_qupath.execution.workers import set_environment

    set_environment()
    # Without looking for cycles among the objects of libraries once more, Python ends in a third of
    # a second less.
    atexit.register(gc.freeze)
    console.replace_unencodable()
    if sys.getfilesystemencoding() == "ascii":  # the locale C, and PYTHONUTF8=0
        click.echo("No file is found whose name is not ASCII: set PYTHONUTF8=1", err=True)


# ------------------------------------------------------------------ commands


@main.command()
@options.common
@options.reading
@options.writing
@options.device
@options.overrides
@click.option(
    "--within",
    multiple=True,
    metavar="CLASS",
    help="Only inside annotations of this class, read from QuPath, or from what "
    "export_regions.groovy exported of it; repeat for more.",
)
@click.option(
    "--tma",
    is_flag=True,
    help="Only inside the cores of the images' TMA grids that are not missing, with a summary of "
    "each core.",
)
@click.option(
    "--model",
    "name",
    default=DEFAULT_MODEL,
    help=f"Name of the model. Default: {DEFAULT_MODEL}, which is trained if it is missing.",
)
@click.option("--retrain", is_flag=True, help="Train the model anew even if there is one.")
@options.pool
@options.progress
def run(
    *,
    common: Common,
    reading: Reading,
    writing: Writing,
    overrides: Overrides,
    pool: Pool,
    within: tuple[str, ...],
    tma: bool,
    name: str,
    retrain: bool,
    showing: Showing,
) -> None:
    """Segment the nuclei of PROJECT (a .qpproj file or its folder).

    Trains the default model on the project's own slides first if it is missing. A run that was
    stopped resumes: finished tiles are reused.
    """
    with _reporting_errors(common.as_json):
        if pool.scheduler and pool.cluster:
            raise ConfigError("pass --scheduler or --cluster, not both")
        if pool.scheduler and pool.workers:
            raise ConfigError("a scheduler has workers of its own: leave out --workers")
        if within and tma:
            raise ConfigError("pass --within or --tma, not both")
        settings = overrides.of(load_config(reading.config))
        project, entries = _open(common, reading=reading, writing=writing)
        _check_engine(settings)
        if not retrain:
            advice = "pass --retrain to train it anew"
            _check_training(project, name, reading.config, seed=overrides.seed, advice=advice)
        _note_refined(project, name)
        click.echo(f"Nuclei are written {project.backend.in_words('to')}", err=True)
        from patchcl_qupath.finished import all_finished, is_reported
        from patchcl_qupath.storage.geojson import run_classes

        regions = (TMA_CORES,) if tma else run_classes(within)
        with _at_work(project):
            outcomes = (
                None
                if retrain
                else all_finished(
                    project, entries, config=settings, model_name=name, within=regions
                )
            )
            page: Path | None = project.layout.report_page
            if outcomes is None or not is_reported(project, entries):
                with showing() as progress:
                    outcomes = _segmented(
                        project,
                        entries,
                        settings,
                        pool=pool,
                        within=regions,
                        name=name,
                        retrain=retrain,
                        progress=progress,
                    )
                    page = _write_report(project)
        console.report_run(project, outcomes, page, as_json=common.as_json)
    sys.exit(1 if any(outcome.problem or outcome.failed_tiles for outcome in outcomes) else 0)


@main.command()
@options.common
@options.reading
@options.device
@click.option(
    "--model",
    "name",
    default=DEFAULT_MODEL,
    help="Name to give the model; a label-free one of that name is replaced.",
    show_default=True,
)
@options.seed
def train(*, common: Common, reading: Reading, name: str, seed: int | None) -> None:
    """Train a model on the slides of PROJECT, without labels."""
    with _reporting_errors(common.as_json):
        settings = load_config(reading.config)
        project, entries = _open(common, reading=reading)
        if seed is not None:
            settings = replace(settings, patchcl=replace(settings.patchcl, seed=seed))
        from patchcl_qupath import pipeline

        with _at_work(project), console.progress_bars() as progress:
            model = pipeline.train_as(name, project, entries, settings, progress)
        path = project.layout.model(name)
        if common.as_json:
            console.print_json(
                {"model": str(path), "digest": model.digest, "training": model.record.training}
            )
        else:
            console.print_trained(path, common.project_path, name)


@main.command()
@options.common
@options.writing
@click.option(
    "--rois",
    "--fields",
    "count",
    cls=options.Renamed,
    type=click.IntRange(min=1),
    default=6,
    show_default=True,
    help="How many ROIs to choose, squares of 256 µm.",
)
def suggest(*, common: Common, writing: Writing, count: int) -> None:
    """Mark the ROIs of PROJECT whose correction is likely to improve the model most.

    The largest fraction of nuclei is expected to be wrong there; ROIs are spread over the slides
    and over kinds of tissue.
    """
    with _reporting_errors(common.as_json):
        project, entries = _open(common, writing=writing)
        click.echo(f"ROIs are marked {project.backend.in_words('in')}", err=True)
        from patchcl_qupath.correction.suggest import suggest as suggest_rois

        with _at_work(project):
            suggestion = suggest_rois(project, entries, count)
        console.report_suggestion(project, suggestion, count, as_json=common.as_json)
    sys.exit(1 if suggestion.problems else 0)


@main.command()
@options.common
@options.reading
@options.writing
@options.device
@click.option(
    "--labels-from",
    default=CORRECTED,
    metavar="CLASS",
    help=f"Class of the ROIs in which every nucleus was corrected; default: {CORRECTED}.",
)
@click.option(
    "--model",
    "name",
    default=DEFAULT_MODEL,
    show_default=True,
    help="Name of the model to refine.",
)
@click.option(
    "--as",
    "new_name",
    default=REFINED_MODEL,
    show_default=True,
    help="Name of the refined model; one that is there is replaced.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the training.")
@options.progress
def refine(
    *,
    common: Common,
    reading: Reading,
    writing: Writing,
    labels_from: str,
    name: str,
    new_name: str,
    seed: int,
    showing: Showing,
) -> None:
    """Refine a model of PROJECT with ROIs in which a person corrected all nuclei."""
    with _reporting_errors(common.as_json):
        if new_name.casefold() == name.casefold():  # one file on Windows and macOS
            raise ConfigError(f"give the refined model another name than {name}: --as NAME")
        settings = load_config(reading.config)
        project, entries = _open(common, reading=reading, writing=writing)
        from patchcl_qupath import pipeline
        from patchcl_qupath.correction.labels import corrected_images
        from patchcl_qupath.models.model import Model
        from patchcl_qupath.project.models import existing_model

        _check_training(project, name, reading.config, advice="leave that out of the settings")
        if project.layout.model(new_name).exists():
            _note(f"the model {new_name} of before is replaced; --as NAME keeps both")
        with _at_work(project), showing() as progress:
            start = Model.load(existing_model(project, name))
            config = replace(start.config, engine=settings.engine, cdcl=settings.cdcl)
            if "segment" in read_settings(reading.config):
                config = replace(config, segment=settings.segment)
            start = replace(start, config=config)
            model, corrections = pipeline.refine_as(
                new_name, project, entries, start, labels_from, progress, seed
            )
        path = project.layout.model(new_name)
        corrected = corrected_images(entries, corrections)
        if common.as_json:
            console.print_json({"model": str(path), "digest": model.digest, "corrected": corrected})
        else:
            console.print_corrected(corrected)
            console.print_trained(path, common.project_path, new_name)


@main.command()
@click.argument("folder", metavar="DIR", type=options.PATH)
@click.argument("images", metavar="IMAGE...", type=options.FILE, nargs=-1, required=True)
@click.option(
    "--mpp",
    type=options.PixelSize(),
    help="Pixel size, in µm, of images that have none in their file.",
)
@options.verbose
def init(folder: Path, images: tuple[Path, ...], mpp: float | None) -> None:
    """Make a QuPath project in DIR out of image files. Images stay where they are.

    An OME-Zarr is named by its folder. Of the files of a DICOM slide, one becomes an image. A file
    that cannot be used is left out.
    """
    with _reporting_errors(as_json=False):
        from patchcl_qupath.project import NewImage, init_project
        from patchcl_qupath.slides.openslide import one_of_each_slide

        new, failed = [], 0
        for path in one_of_each_slide(options.expanded(images)):
            try:
                new.append(NewImage.of_file(path, mpp))
            except ImageError as error:  # the other images go on
                click.echo(f"Failed: {error}", err=True)
                failed += 1
        if not new:
            raise ProjectError(
                "no project was made: none of the files is an image that can be used"
            )
        project = init_project(folder, new)
        count = count_of(len(new), "image")
        click.echo(f"Project: {project} ({count})\nNext:    patchcl-qp run {quoted(project)}")
    sys.exit(1 if failed else 0)


@main.command()
@options.common
@click.option("--all", "all_rows", is_flag=True, help="List each image, however many there are.")
def status(*, common: Common, all_rows: bool) -> None:
    """Show which images of PROJECT are done, by which model, and what has changed since.

    ROIs to correct are counted as the image was last saved in QuPath. Of a large project, images
    in one state are counted, unless --all asks for a list.
    """
    with _reporting_errors(common.as_json):
        project, entries = _open(common)
        from patchcl_qupath.status import image_statuses

        statuses = image_statuses(project, entries)
        console.report_statuses(project, statuses, as_json=common.as_json, all_rows=all_rows)


@main.command()
@options.common
@click.option(
    "--ground-truth",
    "--truth",
    "ground_truth",
    cls=options.Renamed,
    type=options.PATH,
    required=True,
    metavar="DIR|GEOJSON",
    help="Outlined nuclei: a folder with files named as the images (GeoJSON as QuPath exports it, "
    "or instance labels as PNG, TIFF or NPY), or the file of one image.",
)
@click.option(
    "--pictures",
    is_flag=False,
    flag_value="",
    metavar="[DIR]",
    help="Draw the errors of each image into this folder; without one, into patchcl/errors of the "
    "project.",
)
def score(*, common: Common, ground_truth: Path, pictures: str | None) -> None:
    """Compare the nuclei of `run` in PROJECT with a ground truth, nuclei that people outlined.

    The ground truth must have every nucleus of an image, or of the regions that the run was
    limited to.
    """
    with _reporting_errors(common.as_json):
        project, entries = _open(common)
        from patchcl_qupath.evaluation.score import score as score_images

        folder = None
        if pictures is not None:
            folder = Path(pictures) if pictures else project.layout.errors
        scored, without = score_images(project, entries, ground_truth, folder)
        console.report_scores(project, scored, without, as_json=common.as_json)
    sys.exit(1 if any(image.problem or image.no_picture for image in scored) else 0)


@main.command()
@options.common
@options.writing
def remove(*, common: Common, writing: Writing) -> None:
    """Remove the nuclei of `run` from PROJECT, except those that a person changed."""
    with _reporting_errors(common.as_json):
        project, entries = _open(common, writing=writing)
        click.echo(f"Nuclei are removed {project.backend.in_words('from')}", err=True)
        with _at_work(project):
            rows = [_removed(project, entry, common.as_json) for entry in entries]
        if common.as_json:
            console.print_json({"project": str(project.path), "images": rows})
    sys.exit(1 if any(row["problem"] for row in rows) else 0)


@main.command()
@options.common
@options.writing
def summarise(*, common: Common, writing: Writing) -> None:
    """Count the nuclei in the images of PROJECT anew, as they were last saved in QuPath.

    After nuclei were drawn, deleted or made into cells: by position in the PatchCL annotations,
    whose measurements are refreshed.
    """
    with _reporting_errors(common.as_json):
        project, entries = _open(common, writing=writing)
        click.echo(f"Nuclei are counted {project.backend.in_words('in')}", err=True)
        with _at_work(project):
            summaries = [_summarised(project, entry) for entry in entries]
        console.report_summaries(project, summaries, as_json=common.as_json)
    sys.exit(1 if any(summary.problem for summary in summaries) else 0)


@main.command()
@options.common
@options.exporting
def export(*, common: Common, exporting: Exporting) -> None:
    """Export the nuclei of `run` in PROJECT: tables, and files for other programs.

    Columns of tables have the names of QuPath's measurement tables. They show the nuclei as the
    run found them: what was changed in QuPath since is exported from there.
    """
    with _reporting_errors(common.as_json):
        from patchcl_qupath.exports.command import Request
        from patchcl_qupath.exports.command import export as export_images

        request = Request(
            to=ExportFormat(exporting.to),
            per=ExportRows(exporting.per),
            output=exporting.output,
            excel=exporting.excel,
        )
        project, entries = _open(common)
        exported = export_images(project, entries, request)
        console.report_export(project, exported, as_json=common.as_json)
    sys.exit(1 if exported.problems else 0)


@main.command()
@options.as_json
@options.verbose
@options.project_path
def report(project_path: Path, as_json: bool) -> None:
    """Write the report of PROJECT anew from the files of its runs: a page for a browser."""
    with _reporting_errors(as_json):
        from patchcl_qupath.project import open_project
        from patchcl_qupath.report.page import write_report

        path = write_report(open_project(project_path, backend=BackendKind.FILES))
        if as_json:
            console.print_json({"report": str(path)})
        else:
            click.echo(f"Report: {path}")


@main.command()
@options.verbose
@options.project_path
def scripts(project_path: Path) -> None:
    """Copy the Groovy scripts into PROJECT, where QuPath lists them."""
    with _reporting_errors(as_json=False):
        from patchcl_qupath.project import open_project
        from patchcl_qupath.project.scripts import copy_scripts

        for line in copy_scripts(open_project(project_path, backend=BackendKind.FILES).path):
            click.echo(line)
        click.echo("Next: in QuPath, choose Automate > Project scripts > run_patchcl")


@main.command()
@options.qupath
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@options.verbose
def doctor(qupath: Path | None, as_json: bool) -> None:
    """List what the program can use on this machine, and what a missing part would add."""
    from patchcl_qupath.doctor import findings

    found = list(findings(qupath))
    if as_json:
        console.print_json(found)
    else:
        rows = [[finding.part, finding.found or "none", finding.note] for finding in found]
        console.print_table(["part", "found", "note"], rows)


# ------------------------------------------------------------------ steps of commands


def _note(text: str) -> None:
    """What a person should know before the work begins."""
    click.echo(f"Note: {text}", err=True)


def _note_refined(project: Project, name: str) -> None:
    """Say that there is a refined model, where none was asked for by its name."""
    source = click.get_current_context().get_parameter_source("name")
    if source is ParameterSource.DEFAULT and project.layout.model(REFINED_MODEL).exists():
        _note(
            f"the model {name} segments, not the refined one, which takes --model {REFINED_MODEL}"
        )


def _note_other_sizes(entries: Sequence[ImageEntry], mpp: float) -> None:
    """Say that --mpp is not that of images whose pixel size QuPath has."""
    from patchcl_qupath.slides.pixel_size import PixelSize, PixelSizeSource
    from patchcl_qupath.storage.records import are_one_size

    known = [PixelSize(PixelSizeSource.QUPATH, entry.mpp) for entry in entries if entry.mpp]
    others = [size for size in known if size.is_usable and not are_one_size(size.mpp, (mpp, mpp))]
    if others:
        sizes = ", ".join(sorted({str(size) for size in others}))
        _note(
            f"--mpp is not used of {count_of(len(others), 'image')} with another pixel size in "
            f"QuPath ({sizes} µm): set it there where it is wrong"
        )


def _check_engine(settings: Config) -> None:
    """Raise ConfigError where the engine and --device exclude each other."""
    on_gpu = click.get_current_context().meta[options.DEVICE] == "cuda"
    if on_gpu and settings.engine is EngineChoice.OPENVINO:
        raise ConfigError("OpenVINO runs on CPUs: leave out --device cuda, or use --engine torch")


def _check_training(
    project: Project, name: str, file: Path | None, *, seed: int | None = None, advice: str
) -> None:
    """Raise ConfigError where the model that there is was trained otherwise than is asked for."""
    asked, options = read_settings(file), ""
    if file is not None:
        options += f" --config {quoted(file)}"
    if seed is not None:
        asked["patchcl"] = {**asked.get("patchcl", {}), "seed": seed}
        options += f" --seed {seed}"
    if not asked:
        return
    path = project.layout.model(name)
    if not path.exists():
        return
    try:
        unlike = unlike_training(asked, _training_of(path))
    except ConfigError:  # of a record that is damaged, or of another version: so is its model
        return
    if unlike:
        raise ConfigError(
            f"the model {name} was trained with {unlike}: {advice}, or train another, by "
            f"`patchcl-qp train{options} --model NAME`"
        )


def _training_of(weights: Path) -> dict[str, Any]:
    """The settings that a model was trained with: by its record, or else by the weights alone."""
    from patchcl_qupath.storage.records import read_model_record

    if record := read_model_record(weights):
        return record.config
    from patchcl_qupath.models.model import Model  # which is slow to import

    return to_dict(Model.load(weights).config)


def _open(
    common: Common, *, reading: Reading | None = None, writing: Writing | None = None
) -> tuple[Project, list[ImageEntry]]:
    """The project, and the images of it that were asked for."""
    from patchcl_qupath.project import chosen_images, open_project

    path, reading, writing = common.project_path, reading or Reading(), writing or Writing()
    project = open_project(path, writing.backend, writing.qupath)
    entries = chosen_images(project, common.names)
    logger.info("%s: %d images, backend %s", project.path, len(entries), project.backend)
    if not entries:
        raise ProjectError(f"{path} has no images: add some in QuPath first")
    if reading.mpp is not None:
        _note_other_sizes(entries, reading.mpp)
    return project, [replace(entry, fallback_mpp=reading.mpp) for entry in entries]


def _segmented(
    project: Project,
    entries: Sequence[ImageEntry],
    settings: Config,
    *,
    pool: Pool,
    within: tuple[str, ...],
    name: str,
    retrain: bool,
    progress: ShowProgress,
) -> list[ImageOutcome]:
    """Load or train the model, and segment the images with it."""
    from patchcl_qupath import pipeline

    model = _load_or_train(
        project,
        entries,
        settings,
        pool=pool,
        within=within,
        name=name,
        retrain=retrain,
        progress=progress,
    )
    with pool.open(progress) as workers:
        this_run = pipeline.Run(
            project=project,
            model=model,
            config=settings,
            workers=workers,
            progress=progress,
            region_classes=within,
            model_name=name,
        )
        outcomes = []
        for outcome in this_run.images(entries):
            outcomes.append(outcome)
            if len(entries) > 1:
                progress(Progress(stage=Stage.IMAGES, done=len(outcomes), total=len(entries)))
        return outcomes


def _load_or_train(
    project: Project,
    entries: Sequence[ImageEntry],
    settings: Config,
    *,
    pool: Pool,
    within: tuple[str, ...],
    name: str,
    retrain: bool,
    progress: ShowProgress,
) -> Model:
    """The project's model of that name; trained if ``retrain`` is set, or the default is missing.

    Raises ConfigError for another name that no model has: a slip must not cost a training, and give
    nuclei of a model that nobody asked for.
    """
    from patchcl_qupath import pipeline
    from patchcl_qupath.models.model import Model
    from patchcl_qupath.project.models import existing_model

    missing_default = name == DEFAULT_MODEL and not project.layout.model(name).exists()
    if retrain or missing_default:
        pool.check()  # before minutes of training
        if within:
            _check_regions(project, entries, within)
        return pipeline.train_as(name, project, entries, settings, progress)
    path = existing_model(project, name)
    model = Model.load(path)
    pipeline.check_resolution(model, settings, name)  # before workers are started for it
    logger.info("model %s loaded: %s", name, path)
    return model


def _check_regions(
    project: Project, entries: Sequence[ImageEntry], classes: tuple[str, ...]
) -> None:
    """Raise ImageError where no image has a region of the run, before minutes of training."""
    problems = []
    for entry in entries:
        try:
            project.with_regions(entry, classes)
        except ImageError as error:
            problems.append(str(error))
        else:
            return
    raise ImageError("no image has a region to segment in: " * (len(problems) > 1) + problems[0])


def _write_report(project: Project) -> Path | None:
    """The report of a run that is over; None if it failed, which takes nothing else down."""
    from patchcl_qupath.report.page import write_report

    try:
        return write_report(project)
    except Exception as error:  # whatever it is, the nuclei are there
        logger.info("no report", exc_info=True)
        click.echo(f"No report: {reason_of(error)}", err=True)
        return None


def _summarised(project: Project, entry: ImageEntry) -> ImageSummary:
    """Count the nuclei of an image anew; one that fails does not stop the others."""
    from patchcl_qupath.storage.records import ImageSummary

    try:
        return ImageSummary(id=entry.id, image=entry.name, regions=project.summarise(entry))
    except PatchCLError as error:
        return ImageSummary(id=entry.id, image=entry.name, problem=str(error))


def _removed(project: Project, entry: ImageEntry, as_json: bool) -> dict[str, Any]:
    """Remove the nuclei of an image; what became of it, for JSON."""
    row: dict[str, Any] = {"id": entry.id, "image": entry.name, "problem": None}
    try:
        row["done"] = project.remove(entry)
        click.echo(f"{entry.name}: {row['done']}", err=as_json)
    except PatchCLError as error:  # the other images go on
        row["problem"] = str(error)
        click.echo(f"Failed: {error}", err=True)
    return row


@contextmanager
def _at_work(project: Project) -> Iterator[None]:
    """Nobody else works on the project meanwhile; what was started for it is ended."""
    from patchcl_qupath.storage.files import exclusive_lock

    with exclusive_lock(project.layout.root), closing(project):
        try:
            yield
        except KeyboardInterrupt:
            _leave()  # while the lock is held: what is half-written is removed


@contextmanager
def _reporting_errors(as_json: bool) -> Iterator[None]:
    """Errors meant for the user become one line, not a traceback."""
    for name in ("tifffile", "asyncio"):  # what matters is in our own errors
        logging.getLogger(name).setLevel(logging.CRITICAL)
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except FORESEEN as error:
        logger.debug("the command ends", exc_info=True)
        if as_json:
            console.print_json({"error": reason_of(error)})
        click.echo(f"Error: {reason_of(error)}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        _leave()
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(*_: Any) -> NoReturn:
    """Ctrl-C: end in good order, but not later than in a second, whatever is under way."""
    sys.unraisablehook = _interrupt_again
    logging.disable(logging.CRITICAL)  # of connections that are cut off, Dask may still log
    _after(1.0, _leave)
    _raise()


def _raise(*_: Any) -> NoReturn:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _interrupt_again(unraisable: Any) -> None:
    """Python ignores an interrupt that comes within a destructor: raise it anew."""
    if issubclass(unraisable.exc_type, KeyboardInterrupt):
        signal.signal(signal.SIGINT, _raise)
        _after(0.01, _thread.interrupt_main)


def _after(seconds: float, call: Callable[[], Any]) -> None:
    """Call something later, in a thread that nothing waits for."""
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()


def _leave() -> NoReturn:
    """Without waiting for what is under way: files are there whole or not at all."""
    from patchcl_qupath.storage.files import remove_unfinished

    remove_unfinished()
    os.write(2, b"\nStopped. The same command resumes finished tiles; a training starts anew.\n")
    remove_unfinished()  # what another thread has begun since
    os._exit(130)


if __name__ == "__main__":
    main()
