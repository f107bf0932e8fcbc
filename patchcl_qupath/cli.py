"""The command line: flags to settings, one call of the pipeline, messages for people.

Exit status: 0 all done, 1 something failed (the rest is done), 2 wrong usage, 130 Ctrl-C.
What takes long to import is imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from patchcl_qupath import __version__, console
from patchcl_qupath.config import (
    CLUSTERS,
    CORRECTED,
    Config,
    EngineChoice,
    ObjectType,
    StainChoice,
    load_config,
)
from patchcl_qupath.errors import ConfigError, PatchCLError, ProjectError
from patchcl_qupath.progress import Progress, ShowProgress, Stage

if TYPE_CHECKING:
    from patchcl_qupath.datatypes import ImageEntry
    from patchcl_qupath.models.model import Model
    from patchcl_qupath.project import Project

# Threads of torch that wait by spinning starve whatever else the machine does, and themselves: a
# training beside one busy process took three times as long. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

Showing = Callable[[], AbstractContextManager[ShowProgress]]
Command = TypeVar("Command", bound=Callable[..., Any])
_PATH = click.Path(path_type=Path)
_SHOWING = {"bars": console.progress_bars, "json": console.progress_lines}


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Find every nucleus in the slides of a QuPath project: no labels, no GPU, no download."""


def _shared(command: Command) -> Command:
    """The options that every command on a project's images takes."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON."),
        click.option("--config", type=_PATH, help="TOML file with settings."),
        click.option(
            "--mpp",
            type=click.FloatRange(min=0, min_open=True),
            help="Pixel size, in um, of images that have none in QuPath or in their file.",
        ),
        click.option(
            "--image",
            "names",
            multiple=True,
            help="Only the image of this name or id; repeat for more. Default: all.",
        ),
        click.argument("project_path", metavar="PROJECT", type=_PATH),
    ):
        command = option(command)
    return command


def _writing(command: Command) -> Command:
    """The options of commands that change what QuPath shows."""
    for option in (
        click.option(
            "--qupath", type=_PATH, help="Folder of QuPath, where it is in no usual place."
        ),
        click.option(
            "--backend",
            type=click.Choice(["auto", "paquo", "files"]),
            default="auto",
            envvar="PATCHCL_QP_BACKEND",
            help="Have QuPath write nuclei into its images (paquo), or leave files to import "
            "(files). Default: QuPath, if there is one.",
        ),
    ):
        command = option(command)
    return command


def _use_device(context: click.Context, __: click.Parameter, device: str) -> None:
    """Networks run on the GPU if torch sees one: so hide it, or look whether it is there."""
    context.meta[_DEVICE] = device
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise click.BadParameter("torch finds no CUDA device here: use --device cpu")


_DEVICE = "patchcl_qupath.device"
_device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    callback=_use_device,
    expose_value=False,
    help="Where networks run. Default: a CUDA device, if there is one.",
)

_progress = click.option(
    "--progress",
    "showing",
    type=click.Choice(["bars", "json"]),
    default="bars",
    callback=lambda _, __, kind: _SHOWING[kind],
    help="On standard error: for people, or a line of JSON for each step.",
)


@main.command()
@_shared
@_writing
@_device
@click.option(
    "--engine",
    type=click.Choice([*map(str, EngineChoice)]),
    help="What runs the network. Default: OpenVINO on CPUs, if it is installed, else torch.",
)
@click.option(
    "--within",
    multiple=True,
    metavar="CLASS",
    help="Only inside annotations of this class, read from QuPath, or from what "
    "groovy/export_regions.groovy exported of it; repeat for more.",
)
@click.option(
    "--object-type",
    type=click.Choice([*map(str, ObjectType)]),
    help="What nuclei become in QuPath. auto: annotations, or detections where they are many.",
)
@click.option(
    "--stain",
    type=click.Choice([*map(str, StainChoice)]),
    help="The stains that are measured. auto, the default: those of the image in QuPath, else "
    "h-e. Nuclei are found in any.",
)
@click.option("--class-name", help="Class of the nuclei in QuPath; default: Nucleus.")
@click.option("--model", "name", default="patchcl", help="Name of the model; trained if missing.")
@click.option("--retrain", is_flag=True, help="Train the model anew even if there is one.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the training.")
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Threads, default: all cores; with --cluster: jobs, default: 1.",
)
@click.option("--scheduler", help="Address of a running Dask scheduler, as tcp://host:8786.")
@click.option(
    "--cluster",
    type=click.Choice([*CLUSTERS]),
    help="Work in jobs of this queue, as ~/.config/dask/jobqueue.yaml says what a job is.",
)
@_progress
def run(
    project_path: Path,
    names: tuple[str, ...],
    mpp: float | None,
    config: Path | None,
    as_json: bool,
    backend: str,
    qupath: Path | None,
    engine: str | None,
    within: tuple[str, ...],
    object_type: str | None,
    stain: str | None,
    class_name: str | None,
    name: str,
    retrain: bool,
    seed: int | None,
    workers: int | None,
    scheduler: str | None,
    cluster: str | None,
    showing: Showing,
) -> None:
    """Segment the nuclei of PROJECT (a .qpproj file or its folder).

    Trains a model on the project's own slides first if it has none. Run it again after it was
    stopped, and it goes on where it was.
    """
    with _reporting_errors(as_json):
        if scheduler and cluster:
            raise ConfigError("pass --scheduler or --cluster, not both")
        project, entries, settings = _open(project_path, names, mpp, config, seed, backend, qupath)
        shown = replace(
            settings.result,
            object_type=ObjectType(object_type or settings.result.object_type),
            class_name=settings.result.class_name if class_name is None else class_name,
        )
        slide = replace(settings.slide, stain=StainChoice(stain or settings.slide.stain))
        chosen = EngineChoice(engine or settings.engine)
        if chosen == "openvino" and click.get_current_context().meta[_DEVICE] == "cuda":
            raise ConfigError(
                "OpenVINO runs on CPUs: leave out --device cuda, or use --engine torch"
            )
        settings = replace(settings, slide=slide, result=shown, engine=chosen)
        from patchcl_qupath import pipeline
        from patchcl_qupath.execution.workers import open_workers

        click.echo(f"Nuclei are written by {project.backend}", err=True)
        with _at_work(project), showing() as progress:

            def notify(what: str) -> None:
                progress(Progress(stage=Stage.WAITING_FOR_WORKERS, detail=f"of {what}"))

            model = _model(project, entries, settings, name, retrain, progress)
            if where := scheduler or cluster:
                notify(where)
            with open_workers(workers, scheduler, cluster, notify) as found:
                this_run = pipeline.Run(
                    project=project,
                    model=model,
                    config=settings,
                    workers=found,
                    progress=progress,
                    region_classes=within,
                    model_name=name,
                )
                results = list(this_run.images(entries))
            report = _report(project)
        console.report_run(project, results, report, as_json)
    sys.exit(1 if any(result.problem or result.failed_tiles for result in results) else 0)


@main.command()
@_shared
@_device
@click.option("--model", "name", default="patchcl", help="Name to give the model.")
@click.option("--seed", type=click.IntRange(min=0), help="Seed of the training.")
def train(
    project_path: Path,
    names: tuple[str, ...],
    mpp: float | None,
    config: Path | None,
    as_json: bool,
    name: str,
    seed: int | None,
) -> None:
    """Train a model on the slides of PROJECT, without labels."""
    with _reporting_errors(as_json):
        project, entries, settings = _open(project_path, names, mpp, config, seed)
        with _at_work(project), console.progress_bars() as progress:
            model = _model(project, entries, settings, name, True, progress)
        path = project.layout.model(name)
        if as_json:
            console.print_json(
                {"model": str(path), "digest": model.digest, "training": model.training}
            )
        else:
            click.echo(f"Model: {path}\nNext:  patchcl-qp run {project_path} --model {name}")


@main.command()
@_shared
@_writing
@click.option(
    "--fields",
    "count",
    type=click.IntRange(min=1),
    default=6,
    show_default=True,
    help="How many fields to choose, of 256 um a side.",
)
def suggest(
    project_path: Path,
    names: tuple[str, ...],
    mpp: float | None,
    config: Path | None,
    as_json: bool,
    backend: str,
    qupath: Path | None,
    count: int,
) -> None:
    """Mark the fields of PROJECT where a correction is worth most.

    Those are where the model of the last run was in doubt, spread over slides and looks of tissue.
    """
    with _reporting_errors(as_json):
        project, entries, _ = _open(project_path, names, mpp, config, None, backend, qupath)
        click.echo(f"Fields are marked by {project.backend}", err=True)
        from patchcl_qupath.correction.suggest import suggest as suggest_fields

        with _at_work(project):
            suggestion = suggest_fields(project, entries, count)
        console.report_suggestion(project, suggestion, count, as_json)
    sys.exit(1 if suggestion.problems else 0)


@main.command()
@_shared
@_writing
@_device
@click.option(
    "--labels-from",
    default=CORRECTED,
    metavar="CLASS",
    help=f"Class of the annotations in which every nucleus was put right; default: {CORRECTED}.",
)
@click.option("--model", "name", default="patchcl", help="Name of the model to refine.")
@click.option("--as", "new_name", default="refined", help="Name of the refined model.")
@click.option("--seed", type=click.IntRange(min=0), default=0, help="Seed of the training.")
@_progress
def refine(
    project_path: Path,
    names: tuple[str, ...],
    mpp: float | None,
    config: Path | None,
    as_json: bool,
    backend: str,
    qupath: Path | None,
    labels_from: str,
    name: str,
    new_name: str,
    seed: int,
    showing: Showing,
) -> None:
    """Refine a model of PROJECT with fields in which a person corrected all nuclei."""
    with _reporting_errors(as_json):
        if new_name == name:
            raise ConfigError(f"give the refined model another name than {name}: --as NAME")
        project, entries, settings = _open(project_path, names, mpp, config, None, backend, qupath)
        from patchcl_qupath import pipeline
        from patchcl_qupath.models.model import Model
        from patchcl_qupath.storage.files import check_writable

        with _at_work(project), showing() as progress:
            start = Model.load(project.layout.model(name))
            path = project.layout.model(new_name)
            check_writable(path.parent)
            start = replace(start, config=replace(start.config, cdcl=settings.cdcl))
            model = pipeline.refine(project, entries, start, labels_from, progress, seed)
            model.save(path.parent, new_name)
        if as_json:
            console.print_json({"model": str(path), "digest": model.digest})
        else:
            click.echo(f"Model: {path}\nNext:  patchcl-qp run {project_path} --model {new_name}")


@main.command()
@click.argument("folder", metavar="DIR", type=_PATH)
@click.argument("images", metavar="IMAGE...", type=_PATH, nargs=-1, required=True)
@click.option("--mpp", type=click.FloatRange(min=0, min_open=True), help="Pixel size in um.")
def init(folder: Path, images: tuple[Path, ...], mpp: float | None) -> None:
    """Make a QuPath project in DIR out of image files. Images stay where they are."""
    with _reporting_errors(as_json=False):
        from patchcl_qupath.datatypes import ImageEntry
        from patchcl_qupath.project import NewImage, init_project
        from patchcl_qupath.slides.slide import Slide

        new = []
        for path in images:
            entry = ImageEntry("", path.name, path.resolve(), fallback_mpp=mpp)
            slide = Slide.open(entry)
            known = None if slide.calibrated else slide.mpp_level0
            new.append(NewImage(slide.path, slide.levels, known))
        project = init_project(folder, new)
        click.echo(f"Project: {project} ({len(new)} images)\nNext:    patchcl-qp run {project}")


@main.command()
@_shared
def status(
    project_path: Path,
    names: tuple[str, ...],
    mpp: float | None,
    config: Path | None,
    as_json: bool,
) -> None:
    """Say for each image of PROJECT what is done, by which model, and what changed since.

    Fields to correct are counted as the image was last saved in QuPath.
    """
    with _reporting_errors(as_json):
        project, entries, _ = _open(project_path, names, mpp, config, None)
        from patchcl_qupath.status import image_status

        console.report_states(project, [image_status(project, entry) for entry in entries], as_json)


@main.command()
@_shared
@click.option(
    "--truth",
    type=_PATH,
    required=True,
    metavar="DIR|GEOJSON",
    help="Outlined nuclei: a folder with files named as the images (GeoJSON as QuPath exports it, "
    "or instance labels as PNG, TIFF or NPY), or the file of one image.",
)
def score(
    project_path: Path,
    names: tuple[str, ...],
    mpp: float | None,
    config: Path | None,
    as_json: bool,
    truth: Path,
) -> None:
    """Say how well the nuclei of `run` in PROJECT agree with nuclei that people outlined.

    The truth must have every nucleus of an image, or of the regions that the run kept to.
    """
    with _reporting_errors(as_json):
        project, entries, _ = _open(project_path, names, mpp, config, None)
        from patchcl_qupath.evaluation.score import score as score_images

        scored, without = score_images(project, entries, truth)
        console.report_scores(project, scored, without, as_json)
    sys.exit(1 if any(image.problem for image in scored) else 0)


@main.command()
@_shared
@_writing
def remove(
    project_path: Path,
    names: tuple[str, ...],
    mpp: float | None,
    config: Path | None,
    as_json: bool,
    backend: str,
    qupath: Path | None,
) -> None:
    """Take the nuclei of `run` out of PROJECT again, but for those that a person changed."""
    with _reporting_errors(as_json):
        project, entries, _ = _open(project_path, names, mpp, config, None, backend, qupath)
        click.echo(f"Nuclei are removed by {project.backend}", err=True)
        rows: list[dict[str, Any]] = []
        with _at_work(project):
            for entry in entries:
                row: dict[str, Any] = {"id": entry.id, "image": entry.name, "problem": None}
                try:
                    row["done"] = project.remove(entry)
                    click.echo(f"{entry.name}: {row['done']}", err=as_json)
                except PatchCLError as error:  # the other images go on
                    row["problem"] = str(error)
                    click.echo(f"Failed: {error}", err=True)
                rows.append(row)
        if as_json:
            console.print_json({"project": str(project.path), "images": rows})
    sys.exit(1 if any(row["problem"] for row in rows) else 0)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
@click.argument("project_path", metavar="PROJECT", type=_PATH)
def report(project_path: Path, as_json: bool) -> None:
    """Make the report of PROJECT again, of what its runs left: a page to open in a browser."""
    with _reporting_errors(as_json):
        from patchcl_qupath.project import open_project
        from patchcl_qupath.report.page import write_report

        path = write_report(open_project(project_path, backend="files"))
        if as_json:
            console.print_json({"report": str(path)})
        else:
            click.echo(f"Report: {path}")


@main.command()
@click.argument("project_path", metavar="PROJECT", type=_PATH)
def scripts(project_path: Path) -> None:
    """Copy the Groovy scripts into PROJECT, where QuPath lists them."""
    with _reporting_errors(as_json=False):
        from patchcl_qupath.project import open_project
        from patchcl_qupath.project.scripts import copy_scripts

        for line in copy_scripts(open_project(project_path, backend="files").path):
            click.echo(line)
        click.echo("Next: in QuPath, choose Automate > Project scripts > run_patchcl")


@main.command()
@click.option("--qupath", type=_PATH, help="Folder of QuPath, where it is in no usual place.")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
def doctor(qupath: Path | None, as_json: bool) -> None:
    """Say what this machine has that is of use here, and what a missing part would bring."""
    from patchcl_qupath.doctor import findings

    found = list(findings(qupath))
    if as_json:
        console.print_json(found)
    else:
        rows = [[finding.part, finding.found or "none", finding.note] for finding in found]
        console.print_table(["part", "found", "note"], rows)


def _report(project: Project) -> Path | None:
    """The page of a run that is over; without it, all else is as it should be."""
    from patchcl_qupath.execution.outcome import internal_error
    from patchcl_qupath.report.page import write_report

    try:
        return write_report(project)
    except Exception as error:  # whatever it is, the nuclei are there
        reason = str(error) if isinstance(error, PatchCLError) else internal_error(error)
        click.echo(f"No report: {reason}", err=True)
        return None


def _open(
    path: Path,
    names: Sequence[str],
    mpp: float | None,
    config: Path | None,
    seed: int | None,
    backend: str = "files",
    qupath: Path | None = None,
) -> tuple[Project, list[ImageEntry], Config]:
    """The project, the images asked for, and the settings.

    ``mpp`` is the pixel size, in µm, of images that have none in QuPath or in their file.
    """
    from patchcl_qupath.project import open_project

    settings = load_config(config)
    if seed is not None:
        settings = replace(settings, patchcl=replace(settings.patchcl, seed=seed))
    project = open_project(path, backend, qupath)
    entries = [replace(entry, fallback_mpp=mpp) for entry in project.images()]
    if not entries:
        raise ProjectError(f"{path} has no images: add some in QuPath first")
    if names:
        unknown = set(names) - {key for entry in entries for key in (entry.id, entry.name)}
        if unknown:
            known = ", ".join(entry.name for entry in entries[:10])
            raise ProjectError(f"no image {', '.join(sorted(unknown))} in {path}: it has {known}")
        entries = [entry for entry in entries if entry.id in names or entry.name in names]
    return project, entries, settings


def _model(
    project: Project,
    entries: Sequence[ImageEntry],
    settings: Config,
    name: str,
    retrain: bool,
    progress: ShowProgress,
) -> Model:
    """The project's model of that name; trained if there is none, or if it is to be anew."""
    from patchcl_qupath import pipeline
    from patchcl_qupath.models.model import Model
    from patchcl_qupath.storage.files import check_writable

    path = project.layout.model(name)
    if path.exists() and not retrain:
        model = Model.load(path)
        if model.mpp != settings.slide.mpp:
            raise ConfigError(
                f"the model {name} was trained at {model.mpp} um/px, the settings ask for "
                f"{settings.slide.mpp}: pass --retrain, or --model with another name"
            )
        return model
    check_writable(path.parent)
    model = pipeline.train(entries, settings, progress)
    model.save(path.parent, name)
    return model


@contextmanager
def _at_work(project: Project) -> Iterator[None]:
    """Nobody else works on the project meanwhile; what was started for it is ended."""
    from patchcl_qupath.storage.files import exclusive_lock

    with exclusive_lock(project.layout.root), closing(project):
        yield


@contextmanager
def _reporting_errors(as_json: bool) -> Iterator[None]:
    """Errors meant for the user become one line, not a traceback."""
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what matters is in our own errors
    before = signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    except PatchCLError as error:
        if as_json:
            console.print_json({"error": str(error)})
        click.echo(f"Error: {error}", err=True)
        sys.exit(2 if isinstance(error, ConfigError) else 1)
    except KeyboardInterrupt:
        _leave()
    finally:
        signal.signal(signal.SIGINT, before)


def _interrupt(*_: Any) -> NoReturn:
    """Ctrl-C: end in good order, but not later than in a second, whatever is under way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    deadline = threading.Timer(1.0, _leave)
    deadline.daemon = True
    deadline.start()
    raise KeyboardInterrupt


def _leave() -> NoReturn:
    """Without waiting for the tiles under way: files are there whole or not at all."""
    os.write(2, b"\nStopped. The same command goes on from here.\n")
    os._exit(130)


if __name__ == "__main__":
    main()
