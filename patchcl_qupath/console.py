"""What the program prints: progress, tables and advice for people, JSON for programs."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click
from msgspec import UNSET

from patchcl_qupath.config import CORRECTED
from patchcl_qupath.errors import count_of, quoted
from patchcl_qupath.progress import Progress, ShowProgress, Stage

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from patchcl_qupath.correction.labels import CorrectedImage
    from patchcl_qupath.correction.suggest import SuggestedRoi, Suggestion
    from patchcl_qupath.evaluation.score import ImageScore
    from patchcl_qupath.exports.command import Exported
    from patchcl_qupath.project import Project
    from patchcl_qupath.status import ImageStatus
    from patchcl_qupath.storage.records import ImageOutcome, ImageSummary

_BARS = 8  # progress bars on the screen at once
_STAGE_S = 2.0  # after a line, before one of another stage
_LINE_S = 30.0  # before one of the same
_ROWS = 40  # of a table of images, before most are only counted
_NAMED = 10  # images that a note is of
_NARROWEST = 8  # characters of a text in a table
_ROWS_OF_MANY = 15  # of those with nuclei then: all is on one screen


@contextmanager
def progress_lines() -> Iterator[ShowProgress]:
    """Progress as lines of JSON, which groovy/run_patchcl.groovy reads; 0 of 0 is: not counted."""

    def show(progress: Progress) -> None:
        step = {"stage": progress.label, "done": progress.done, "total": progress.total or 0}
        with suppress(OSError):  # nobody reads them any more: that must not cost the nuclei
            click.echo(json.dumps(step), err=True)

    yield show


@contextmanager
def progress_bars() -> Iterator[ShowProgress]:
    """Bars on standard error: what is done, how fast, how long still; lines where that is no
    terminal, but a file, or a pipe as that of Git Bash: bars would be shown at the end alone."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    terminal = Console(stderr=True)
    if not terminal.is_terminal:
        yield _Lines().show
        return
    whole = Column(no_wrap=True)
    with RichProgress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
        BarColumn(bar_width=12),
        MofNCompleteColumn(table_column=whole),
        TextColumn("{task.fields[rate]}", table_column=whole),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=whole),
        console=terminal,
        expand=True,
    ) as bars:
        stages = _Bars(bars)
        yield stages.show
        stages.end_uncounted()


class _Lines:
    """A line as each stage begins, and some while it goes on; not one for each of many images."""

    def __init__(self) -> None:
        self.label, self.shown = "", -math.inf

    def show(self, progress: Progress) -> None:
        """Print how far a stage is, unless a line was printed just before."""
        pause = _STAGE_S if progress.label != self.label else _LINE_S
        if (now := time.monotonic()) < self.shown + pause:
            return
        self.label, self.shown = progress.label, now
        count = f": {progress.done:,} of {progress.total:,}" if progress.total else ""
        with suppress(OSError):  # as of progress_lines
            click.echo(f"{progress.label}{count}", err=True)


class _Bars:
    """A bar for each of the last stages."""

    def __init__(self, bars: RichProgress) -> None:
        self.bars = bars
        self.tasks: dict[str, TaskID] = {}  # by label, the oldest first

    def show(self, progress: Progress) -> None:
        """Move the bar of a stage, or begin it."""
        if progress.label not in self.tasks:
            self._begin(progress.label)
        task = self.tasks[progress.label]
        speed = next(known.speed for known in self.bars.tasks if known.id == task)
        rate = f"{speed:.1f}/s" if speed else ""
        self.bars.update(task, completed=progress.done, total=progress.total, rate=rate)

    def end_uncounted(self) -> None:
        """What cannot be counted is over when the next stage begins, or when all is."""
        for task in self.bars.tasks:
            if task.total is None:
                self.bars.update(task.id, total=1, completed=1)

    def _begin(self, label: str) -> None:
        self.end_uncounted()
        if len(self.tasks) == _BARS:  # the oldest goes, but not that of all images
            oldest = next(label for label in self.tasks if label != Stage.IMAGES)
            self.bars.remove_task(self.tasks.pop(oldest))
        self.tasks[label] = self.bars.add_task(label, total=None, rate="")


def report_run(
    project: Project, outcomes: Sequence[ImageOutcome], report: Path | None, *, as_json: bool
) -> None:
    """What became of the images of a run, where its ``report`` is, and what to do next."""
    if as_json:
        page = None if report is None else str(report)
        print_json({"project": str(project.path), "images": outcomes, "report": page})
        return
    names = _names(outcomes)
    if done := [outcome for outcome in outcomes if not outcome.problem]:
        _print_done([outcome for outcome in done if outcome.unchanged is not True], names)
        _print_unchanged([outcome for outcome in done if outcome.unchanged is True])
        _print_places(project, report)
    for outcome in outcomes:
        _print_failure(outcome, names[outcome.id])


def _print_done(outcomes: Sequence[ImageOutcome], names: Mapping[str, str]) -> None:
    """A row for each image that was segmented, of many for some, and notes on them."""
    if not outcomes:
        return
    from patchcl_qupath.datatypes import names_text  # with it NumPy

    is_many = len(outcomes) > _ROWS
    rows = [
        [
            names[outcome.id],
            f"{outcome.tissue_mm2:.2f}",
            f"{outcome.nuclei:,}",
            f"{outcome.seconds:.1f}",
            outcome.tiles,
            outcome.tiles_resumed,
        ]
        for outcome in outcomes[: _ROWS_OF_MANY if is_many else None]
    ]
    print_table(["image", "tissue mm²", "nuclei", "seconds", "tiles", "resumed"], rows)
    if is_many:
        others = outcomes[_ROWS_OF_MANY:]
        nuclei = count_of(sum(outcome.nuclei for outcome in others), "nucleus", "nuclei")
        click.echo(f"and {len(others):,} other images with {nuclei}: the report lists all")
    for outcome in outcomes:
        if outcome.imported and not is_many:
            click.echo(f"In QuPath: {names[outcome.id]}: {outcome.imported.in_words}")
    _print_answers(outcomes, names)
    corrections = [outcome.corrections for outcome in outcomes if outcome.corrections]
    if corrections:
        click.echo(f"Corrections: {corrections[0].total(corrections).in_words}")
    noted: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.note:
            noted.setdefault(outcome.note, []).append(names[outcome.id])
    for note, of_images in noted.items():
        click.echo(f"Note: {names_text(of_images, _NAMED)}: {note}")


def _print_answers(outcomes: Sequence[ImageOutcome], names: Mapping[str, str]) -> None:
    """A row for each image, region and core that was summarised, and how nuclei were classified."""
    summaries = [
        (names[outcome.id], summary) for outcome in outcomes for summary in outcome.summaries or ()
    ]
    if summaries:
        rows = [
            [
                image,
                "all" if summary.kind == "image" else summary.label,
                None if summary.tissue_mm2 is None else f"{summary.tissue_mm2:.3f}",
                f"{summary.nuclei:,}",
                None if summary.per_mm2 is None else f"{summary.per_mm2:,.0f}",
                None if summary.positive_percent is None else f"{summary.positive_percent:.1f}",
                None if summary.h_score is None else f"{summary.h_score:.0f}",
                None if summary.allred is None else summary.allred.score,
            ]
            for image, summary in summaries
        ]
        titles = ["image", "region", "tissue mm²", "nuclei", "per mm²", "positive %"]
        titles += ["H-score", "Allred"]
        _print_used(titles, rows, optional=3)
    for outcome in outcomes:
        if rule := outcome.positivity:
            limits = ", ".join(f"{threshold:g}" for threshold in rule.thresholds)
            how = "found on the slide" if rule.found else "given"
            how = "QuPath's usual one" if rule.note else how
            image = names[outcome.id]
            click.echo(f"Positive: {image}: {rule.measurement} of at least {limits}, {how}")


def _print_used(titles: list[str], rows: list[list[Any]], optional: int) -> None:
    """A table without those of its last columns in which nothing is."""
    always = len(titles) - optional
    used = [k for k in range(len(titles)) if k < always or any(row[k] is not None for row in rows)]
    print_table([titles[k] for k in used], [[row[k] for k in used] for row in rows])


def _print_unchanged(outcomes: Sequence[ImageOutcome]) -> None:
    """How many images were finished before."""
    if outcomes:
        nuclei = sum(outcome.nuclei for outcome in outcomes)
        click.echo(
            f"Nothing to do for {count_of(len(outcomes), 'image')} with "
            f"{count_of(nuclei, 'nucleus', 'nuclei')}: finished before "
            "by this model with these settings"
        )


def _print_places(project: Project, report: Path | None) -> None:
    """Where the results are, and what to do next."""
    click.echo(f"Results: {project.layout.root / 'results'}")
    click.echo(f"Look at: {project.layout.previews}")
    if report is not None:
        click.echo(f"Report:  {report}")
    if project.backend.writes_into_qupath:
        click.echo("Next:    open the project in QuPath, and look at the nuclei that were added")
    else:
        click.echo(
            f"Next:    patchcl-qp scripts {quoted(project.path)}, then open the project in\n"
            "         QuPath: Automate > Project scripts > import_nuclei, Run > Run for project"
        )


def print_trained(model: Path, project: Path, name: str) -> None:
    """Where a new model is, and the command that segments a project with it."""
    click.echo(f"Model: {model}\nNext:  patchcl-qp run {quoted(project)} --model {quoted(name)}")


def _print_failure(outcome: ImageOutcome, name: str) -> None:
    """What failed of an image, if anything did."""
    if outcome.problem:
        click.echo(f"Failed: {outcome.problem}", err=True)
    if outcome.failed_tiles:
        first, count = outcome.failed_tiles[0], len(outcome.failed_tiles)
        click.echo(
            f"Failed: {name}: {count} of {outcome.tiles} tiles were left out, as its "
            f"preview shows; the first of {first.width} x {first.height} px at x={first.x} "
            f"y={first.y}: {first.reason}. Run again to try them again",
            err=True,
        )


def report_statuses(
    project: Project, statuses: Sequence[ImageStatus], *, as_json: bool, all_rows: bool = False
) -> None:
    """What is done of the images of a project; where they are many, on one screen."""
    if as_json:
        print_json({"project": str(project.path), "images": statuses})
        return
    shown, others = list(statuses), []
    if len(statuses) > _ROWS and not all_rows:
        shown = [status for status in statuses if status.nuclei is not None or status.rois]
        others = [status for status in statuses if status.nuclei is None and not status.rois]
        shown, others = shown[:_ROWS_OF_MANY], shown[_ROWS_OF_MANY:] + others
    names = _names(statuses)
    rows = [
        [
            names[status.id],
            status.state,
            None if status.nuclei is None else f"{status.nuclei:,}",
            status.made and status.made[:16].replace("T", " "),
            status.model,
            f"{status.rois_corrected} of {status.rois}" if status.rois else None,
            "; ".join(status.changed),
        ]
        for status in shown
    ]
    titles = ["image", "state", "nuclei", "made (UTC)", "model", "ROIs corrected", "changed since"]
    if rows:
        print_table(titles, rows)
    for status in shown:
        if status.imported and not others:
            click.echo(f"In QuPath: {names[status.id]}: {status.imported.in_words}")
    _print_others(others)


def _print_others(statuses: Sequence[ImageStatus]) -> None:
    """How many images are in each state; one of them where that is a problem."""
    states: dict[str, list[ImageStatus]] = {}
    for status in statuses:
        names_image = status.image in status.state
        advice = status.state.partition(": ")[2] if names_image else status.state
        states.setdefault(advice or status.state, []).append(status)
    for state, alike in states.items():
        first = alike[0].state
        such_as = "" if first == state else f", such as: {first}"
        click.echo(
            f"{count_of(len(alike), 'image')}: {state if first == state else 'not usable'}{such_as}"
        )
    if states:
        click.echo("All images: patchcl-qp status --all, or --json")


def report_summaries(project: Project, summaries: Sequence[ImageSummary], *, as_json: bool) -> None:
    """The nuclei in the regions of each image, as they are in QuPath now."""
    if as_json:
        print_json({"project": str(project.path), "images": summaries})
        return
    names = _names(summaries)
    rows = [
        [
            names[summary.id],
            region.name,
            f"{region.nuclei:,}",
            None if region.area_mm2 is None else f"{region.area_mm2:.2f}",
            "tissue" if region.is_tissue else "region",
            None if region.per_mm2 is None else f"{region.per_mm2:,.0f}",
            f"{region.positive_percent:.1f}" if region.positive_percent is not UNSET else None,
            f"{region.h_score:.0f}" if region.h_score is not UNSET else None,
        ]
        for summary in summaries
        for region in summary.regions
    ]
    if rows:
        titles = ["image", "annotation", "nuclei", "mm²", "of", "nuclei per mm²"]
        _print_used([*titles, "positive %", "H-score"], rows, optional=2)
    for summary in summaries:
        if summary.problem:
            click.echo(f"Failed: {summary.problem}", err=True)


def report_suggestion(
    project: Project, suggestion: Suggestion, count: int, *, as_json: bool
) -> None:
    """The ROIs that were chosen, ``count`` if there are as many, and what to do with them."""
    if as_json:
        print_json({"project": str(project.path), **_plain(suggestion)})
        return
    for line in suggestion.done:
        click.echo(line)
    if suggestion.rois:
        _print_rois(suggestion.rois)
        if len(suggestion.rois) < count and not suggestion.problems:
            click.echo("Note: there are no more ROIs with tissue and nuclei that do not touch")
        _print_steps(project)
    if suggestion.without:
        click.echo(f"Without nuclei, left out: {', '.join(suggestion.without)}")
    for problem in suggestion.problems:
        click.echo(f"Failed: {problem}", err=True)


def _print_rois(rois: Sequence[SuggestedRoi]) -> None:
    """A row for each ROI, with the fraction of its nuclei that is expected to be wrong."""
    names = _names(rois)
    rows = [
        [
            names[one.id],
            one.roi.name,
            round(one.roi.x),
            round(one.roi.y),
            one.nuclei,
            f"{one.wrong:.0%}",
        ]
        for one in rois
    ]
    print_table(["image", "ROI", "x", "y", "nuclei", "expected wrong"], rows)


def _print_steps(project: Project) -> None:
    """How ROIs are corrected and used."""
    steps = [
        "in QuPath, correct every nucleus in these ROIs",
        f"set the class of each ROI that is corrected to '{CORRECTED}', and save",
        f"patchcl-qp refine {quoted(project.path)}",
    ]
    if not project.backend.writes_into_qupath:
        scripts = f"patchcl-qp scripts {quoted(project.path)} adds it to its menu"
        steps.insert(0, f"in QuPath, run import_nuclei.groovy for the project ({scripts})")
        steps.insert(-1, "run export_labels.groovy, too")
    click.echo("Next:")
    for number, step in enumerate(steps, start=1):
        click.echo(f"  {number}. {step}")


def print_corrected(images: Sequence[CorrectedImage]) -> None:
    """What was read from the corrected ROIs of each image, and what was left out."""
    names = _names(images)
    for image in images:
        click.echo(f"Corrected: {names[image.id]}: {image.in_words}")
    for image in images:
        for note in image.notes:
            click.echo(f"Note: {names[image.id]}: {note}")


def report_scores(
    project: Project, scored: Sequence[ImageScore], without: Sequence[str], *, as_json: bool
) -> None:
    """Scores and kinds of error of each image, their means and totals.

    ``without`` are the images without ground truth.
    """
    from patchcl_qupath.evaluation.score import (
        kinds_in_total,
        mean,
        per_100_true,
        reliability_in_total,
    )

    if as_json:
        print_json(
            {
                "project": str(project.path),
                "images": scored,
                "mean": mean(scored),
                "kinds": kinds_in_total(scored),
                "kinds_per_100_true": per_100_true(scored),
                "reliability": reliability_in_total(scored),
                "without": without,
            }
        )
        return
    if done := [image for image in scored if not image.problem]:
        _print_scores(done)
        _print_kinds(done)
        _print_reliability(done)
    names = _names(scored)
    for image in scored:
        if image.note:
            click.echo(f"Note: {names[image.id]}: {image.note}")
    if drawn := [Path(image.picture) for image in scored if image.picture]:
        click.echo(f"Look at: {drawn[0].parent}")
    if without:
        click.echo(f"Without ground truth, left out: {', '.join(without)}")
    for image in scored:
        if problem := image.problem or image.no_picture:
            click.echo(f"Failed: {problem}", err=True)


def _print_scores(scored: Sequence[ImageScore]) -> None:
    """A row for each image, and the means."""
    from patchcl_qupath.evaluation.score import SCORES, mean

    names = _names(scored)
    rows = [
        [names[image.id], f"{image.nuclei:,}", f"{image.true_nuclei:,}", *_figures(image.scores)]
        for image in scored
    ]
    titles = ["image", "nuclei", "true nuclei", *SCORES.values()]
    print_table(titles, [*rows, ["mean", None, None, *_figures(mean(scored))]])


def _print_kinds(scored: Sequence[ImageScore]) -> None:
    """A row of the kinds of error of each image, and those of all, per 100 true nuclei."""
    from patchcl_qupath.evaluation.score import kinds_in_total, per_100_true

    total, rates = kinds_in_total(scored), per_100_true(scored)
    names = _names(scored)
    rows = [
        [names[image.id], *(f"{count:,}" for count in image.kinds.values())] for image in scored
    ]
    rows.append(["total", *(f"{count:,}" for count in total.values())])
    if rates:
        rows.append(["per 100 true", *(f"{rate:.1f}" for rate in rates.values())])
    print_table(["image", *(kind.replace("_", " ") for kind in total)], rows)


def _print_reliability(scored: Sequence[ImageScore]) -> None:
    """How often nuclei of each range of detection probability are right."""
    from patchcl_qupath.evaluation.score import reliability_in_total

    rows = [
        [
            f"{each.low:.1f} to {each.high:.1f}",
            f"{each.nuclei:,}",
            f"{each.mean_probability:.2f}",
            f"{each.right / each.nuclei:.2f}",
        ]
        for each in reliability_in_total(scored)
        if each.nuclei
    ]
    print_table(["detection probability", "nuclei", "mean", "right"], rows)


def _figures(scores: dict[str, float]) -> list[str]:
    return [f"{score:.3f}" for score in scores.values()]


def report_export(project: Project, exported: Exported, *, as_json: bool) -> None:
    """The files that were exported, and why images are not in them."""
    if as_json:
        print_json({"project": str(project.path), **_plain(exported)})
        return
    for file in exported.files:
        click.echo(f"Exported: {file.path} ({file.rows:,})")
    for reason in exported.left_out:
        click.echo(f"Left out: {reason}", err=True)
    for problem in exported.problems:
        click.echo(f"Failed: {problem}", err=True)
    for note in exported.notes:
        click.echo(f"Note: {note}", err=True)


class _OfImage(Protocol):
    """What is shown of an image."""

    @property
    def id(self) -> str: ...

    @property
    def image(self) -> str: ...


def _names(shown: Sequence[_OfImage]) -> dict[str, str]:
    """The names of images by their ids, which end with the id where several have one name."""
    from patchcl_qupath.datatypes import distinct_names

    names = {each.id: each.image for each in shown}
    endings = [f" ({id_})" for id_ in names]
    return dict(zip(names, distinct_names([*names.values()], endings, key=str), strict=True))


def print_table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on standard output; None is an empty cell.

    A file or a pipe has 80 columns. Where a table has more, texts go on in the next line, and
    figures stay whole: names of slides of one case differ at their end, and a cut count is another.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table()
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    for title, *column in zip(titles, *cells, strict=True):
        longest = max(map(len, column), default=0)
        is_text = any(letter.isalpha() for letter in "".join(column))
        narrowest = min(longest, _NARROWEST) if is_text else longest
        table.add_column(title, overflow="fold", min_width=narrowest)
    for row in cells:
        table.add_row(*row)
    console = Console(markup=False, emoji=False)  # names may hold [brackets] and :colons:
    console.print(table, crop=False)


def print_json(content: Any) -> None:
    """JSON on standard output; characters that it cannot encode are escaped."""
    text = json.dumps(_plain(content), indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")  # None where it is closed
    except UnicodeEncodeError:
        text = json.dumps(_plain(content), indent=2)
    click.echo(text)


def replace_unencodable() -> None:
    """Print ? for what the terminal cannot encode, of an image's name say, and go on."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _plain(content: Any) -> Any:
    from patchcl_qupath.storage.records import to_plain

    return to_plain(content)
