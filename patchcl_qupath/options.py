"""The options of the commands, and the records that they come in."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patchcl_qupath import console, logs
from patchcl_qupath.config import (
    CLUSTERS,
    MAX_EXPAND_UM,
    BackendKind,
    Config,
    EngineChoice,
    ExportFormat,
    ExportRows,
    ObjectType,
    Overlapping,
    StainChoice,
)
from patchcl_qupath.progress import Progress, ShowProgress, Stage
from patchcl_qupath.slides.pixel_size import MPP_RANGE

if TYPE_CHECKING:
    from patchcl_qupath.execution.workers import Workers


Showing = Callable[[], AbstractContextManager[ShowProgress]]
Command = Callable[..., None]
WINDOWS = os.name == "nt"


class _OfUser(click.Path):
    """A path; one that begins with ~ is in the user's folder, which a shell of Windows leaves."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return super().convert(Path(value).expanduser() if WINDOWS else value, param, ctx)


PATH = _OfUser(path_type=Path)
FILE = _OfUser(path_type=Path, readable=False)  # what cannot be read is told of, one by one
_SHOWING = {"bars": console.progress_bars, "json": console.progress_lines}
_VERBOSITY = "patchcl_qupath.verbosity"  # of click's context
DEVICE = "patchcl_qupath.device"


def expanded(files: Sequence[Path]) -> list[Path]:
    """Files; on Windows, whose shells leave that to programs, those that names with wildcards stand
    for. A name that stands for none, or is that of a file itself, stays.
    """
    if not WINDOWS:
        return [*files]
    found = list[Path]()
    for file in files:
        pattern = str(file.relative_to(file.anchor))
        named = [] if file.exists() else sorted(Path(file.anchor).glob(pattern))
        found += named or [file]
    return found


class Renamed(click.Option):
    """An option whose help shows its first name alone; the others keep old scripts going."""

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        names, self.opts = self.opts, self.opts[:1]
        try:
            return super().get_help_record(ctx)
        finally:
            self.opts = names


class PixelSize(click.FloatRange):
    """A pixel size in µm that a microscope can have, and not NaN."""

    def __init__(self) -> None:
        super().__init__(*MPP_RANGE)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        mpp: float = super().convert(value, param, ctx)
        if math.isnan(mpp):  # in no range, and out of none
            self.fail(f"{value} is not a pixel size in µm.", param, ctx)
        return mpp


def _log(context: click.Context, _: click.Parameter, count: int) -> None:
    """Show the log; -v may stand before the command, after it, or both."""
    context.meta[_VERBOSITY] = context.meta.get(_VERBOSITY, 0) + count
    logs.show_logs(logs.level_of(context.meta[_VERBOSITY]))


verbose = click.option(
    "-v",
    "--verbose",
    count=True,
    callback=_log,
    expose_value=False,
    is_eager=True,
    help="Log on standard error what is done; -vv: in detail.",
)


@dataclass(frozen=True, kw_only=True)
class Common:
    """The options of every command on a project's images."""

    project_path: Path
    names: tuple[str, ...]
    as_json: bool


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The options of commands that read the slides.

    ``mpp`` is the pixel size, in µm, of images that have none in QuPath or in their file.
    """

    mpp: float | None = None
    config: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Writing:
    """The options of commands that change what QuPath shows."""

    backend: str = BackendKind.FILES
    qupath: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Overrides:
    """The options of a run that take the place of settings."""

    engine: str | None
    object_type: str | None
    stain: str | None
    class_name: str | None
    overlapping: str | None
    keep: bool
    positive: str | None
    summarise: tuple[str, ...]
    expand: float | None
    seed: int | None

    def of(self, config: Config) -> Config:
        """The settings, but for what was given."""
        result, slide, patchcl, cells = config.result, config.slide, config.patchcl, config.cells
        if self.object_type is not None:
            result = replace(result, object_type=ObjectType(self.object_type))
        if self.class_name is not None:
            result = replace(result, class_name=self.class_name)
        if self.overlapping is not None:
            result = replace(result, overlapping=Overlapping(self.overlapping))
        if self.keep:
            result = replace(result, keep=True)
        if self.positive is not None:
            result = replace(result, positive=self.positive)
        if self.summarise:
            from patchcl_qupath.storage.files import readable

            result = replace(result, summarise=tuple(map(readable, self.summarise)))
        if self.stain is not None:
            slide = replace(slide, stain=StainChoice(self.stain))
        if self.expand is not None:
            cells = replace(cells, expand_um=self.expand)
        if self.seed is not None:
            patchcl = replace(patchcl, seed=self.seed)
        engine = EngineChoice(self.engine or config.engine)
        return replace(
            config, slide=slide, patchcl=patchcl, cells=cells, result=result, engine=engine
        )


@dataclass(frozen=True, kw_only=True)
class Exporting:
    """The options of what is exported, and where to."""

    to: str
    per: str
    output: Path | None
    excel: bool


@dataclass(frozen=True, kw_only=True)
class Pool:
    """The options of where tiles are segmented."""

    workers: int | None
    scheduler: str | None
    cluster: str | None

    def check(self) -> None:
        """Raise ConfigError for workers that cannot be had."""
        from patchcl_qupath.execution.workers import check_workers

        check_workers(self.scheduler, self.cluster)

    @contextmanager
    def open(self, progress: ShowProgress) -> Iterator[Workers]:
        """The workers; shows what they are waited for."""
        from patchcl_qupath.execution.workers import open_workers

        def notify(what: str) -> None:
            progress(Progress(stage=Stage.WAITING_FOR_WORKERS, detail=f"of {what}"))

        if elsewhere := self.scheduler or self.cluster:
            notify(elsewhere)
        with open_workers(self.workers, self.scheduler, self.cluster, notify) as workers:
            yield workers


def _bundle(
    name: str, record: type, options: Sequence[Callable[[Command], Command]]
) -> Callable[[Command], Command]:
    """A decorator that gives a command some options as one ``record``, the argument ``name``."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def with_record(**values: Any) -> None:
            given = {field.name: values.pop(field.name) for field in dataclasses.fields(record)}
            command(**values, **{name: record(**given)})

        decorated: Command = with_record
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


as_json = click.option("--json", "as_json", is_flag=True, help="Print the outcome as JSON.")
project_path = click.argument("project_path", metavar="PROJECT", type=PATH)
qupath = click.option("--qupath", type=PATH, help="Folder of QuPath, if it is in no usual place.")
seed = click.option("--seed", type=click.IntRange(min=0), help="Seed of the training.")

common = _bundle(
    "common",
    Common,
    [
        project_path,
        click.option(
            "--image",
            "names",
            multiple=True,
            help="Only the image of this name or id (id:3); repeat for more. Default: all.",
        ),
        as_json,
        verbose,
    ],
)

reading = _bundle(
    "reading",
    Reading,
    [
        click.option(
            "--mpp",
            type=PixelSize(),
            help="Pixel size, in µm, of images that have none in QuPath or in their file.",
        ),
        click.option("--config", type=PATH, help="TOML file with settings."),
    ],
)

writing = _bundle(
    "writing",
    Writing,
    [
        click.option(
            "--backend",
            type=click.Choice([*map(str, BackendKind)]),
            default=str(BackendKind.AUTO),
            envvar="PATCHCL_QP_BACKEND",
            help="Have QuPath write nuclei into its images (paquo), or leave files to import "
            "(files). Default: QuPath, if there is one.",
        ),
        qupath,
    ],
)


def _check_expansion(_: click.Context, __: click.Parameter, um: float | None) -> float | None:
    """Refuse a growth that is negative, too far, or no number."""
    if um is not None and not 0 <= um <= MAX_EXPAND_UM:
        most = f"{MAX_EXPAND_UM:g}"
        raise click.BadParameter(f"nuclei grow into cells by 0 to {most} µm, not by {um:g}")
    return um


overrides = _bundle(
    "overrides",
    Overrides,
    [
        click.option(
            "--engine",
            type=click.Choice([*map(str, EngineChoice)]),
            help="What runs the network. Default: on a GPU torch in float16; on CPUs OpenVINO, if "
            "it is installed, in 8 bits where the CPU is fast in these; else torch in float32. "
            "openvino: in bfloat16 or float32.",
        ),
        click.option(
            "--object-type",
            type=click.Choice([*map(str, ObjectType)]),
            help="What nuclei become in QuPath. auto: annotations, or detections where they are "
            "many.",
        ),
        click.option(
            "--stain",
            type=click.Choice([*map(str, StainChoice)]),
            help="The stains that are measured. auto, the default: those of the image in QuPath, "
            "else h-e. Nuclei are found in any; with h-dab, brown ones need no hematoxylin.",
        ),
        click.option("--class-name", help="Class of the nuclei in QuPath; default: Nucleus."),
        click.option(
            "--overlapping",
            type=click.Choice([*map(str, Overlapping)]),
            help="Where nuclei overlap detections of other programs in QuPath: add them beside "
            "these (both, the default), leave them out (keep), or remove these (replace).",
        ),
        click.option(
            "--keep",
            is_flag=True,
            help="Keep every nucleus of an earlier run that carries a class, measurements or notes "
            "of yours, also where no new nucleus takes these over.",
        ),
        click.option(
            "--expand",
            type=float,
            metavar="UM",
            callback=_check_expansion,
            help="Grow nuclei into cells: by so many µm at most, as far as neighbours and the size "
            f"of the nucleus allow; up to {MAX_EXPAND_UM:g}, 0 for none. They are cells in QuPath, "
            "with their nucleus within, and are measured as such.",
        ),
        click.option(
            "--positive",
            metavar="MEASUREMENT=OD|auto",
            help="Classes of positive and negative nuclei, on slides with DAB: by a threshold "
            "(nucleus-dab-mean=0.2), by three for 1+, 2+ and 3+ (nucleus-dab-mean=0.2,0.4,0.6), "
            "or by one that is found on each slide (auto).",
        ),
        click.option(
            "--summarise",
            multiple=True,
            metavar="CLASS",
            help="Count nuclei in every annotation of this class, with densities and percentages; "
            "repeat for more.",
        ),
        seed,
    ],
)

exporting = _bundle(
    "exporting",
    Exporting,
    [
        click.option(
            "--to",
            type=click.Choice([*map(str, ExportFormat)]),
            default=str(ExportFormat.CSV),
            show_default=True,
            help="csv and parquet are tables; geojson is for QuPath; visium-hd is GeoJSON for "
            "Space Ranger; spatialdata and anndata need an extra: pip install "
            "'patchcl-qupath[spatial]'.",
        ),
        click.option(
            "--per",
            type=click.Choice([*map(str, ExportRows)]),
            default=str(ExportRows.NUCLEUS),
            show_default=True,
            help="What a row of a table is; core: of a TMA.",
        ),
        click.option(
            "--output",
            type=PATH,
            metavar="FILE|FOLDER",
            help="A file with the suffix of the format, for all images, or a folder with a file "
            "for each. Default: in patchcl/exports of the project.",
        ),
        click.option(
            "--excel",
            is_flag=True,
            help="CSV as Excel opens it: with the mark of UTF-8, and texts that look like numbers, "
            "dates or formulas stay texts.",
        ),
    ],
)

pool = _bundle(
    "pool",
    Pool,
    [
        click.option(
            "--workers",
            type=click.IntRange(min=1),
            help="Threads, default: all usable cores; with --cluster: jobs, default: 1.",
        ),
        click.option("--scheduler", help="Address of a running Dask scheduler: tcp://host:8786."),
        click.option(
            "--cluster",
            type=click.Choice([*CLUSTERS]),
            help="Work in jobs of this queue; ~/.config/dask/jobqueue.yaml describes a job.",
        ),
    ],
)


def _use_device(context: click.Context, __: click.Parameter, device: str) -> None:
    """Networks run on the GPU if torch sees one: so hide it, or check that it is there."""
    context.meta[DEVICE] = device
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise click.BadParameter("torch finds no CUDA device here: use --device cpu")


device = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    callback=_use_device,
    expose_value=False,
    help="Where networks run. Default: a CUDA device, if there is one.",
)

progress = click.option(
    "--progress",
    "showing",
    type=click.Choice(["bars", "json"]),
    default="bars",
    callback=lambda _, __, kind: _SHOWING[kind],
    help="On standard error: bars for people, or a line of JSON for each step.",
)
