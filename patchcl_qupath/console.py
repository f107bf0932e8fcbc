"""What people see, and programs read: progress, tables, JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from patchcl_qupath.config import CORRECTED
from patchcl_qupath.progress import Progress, ShowProgress

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from patchcl_qupath.correction.suggest import Suggestion
    from patchcl_qupath.evaluation.score import ImageScore
    from patchcl_qupath.project import Project
    from patchcl_qupath.status import ImageStatus
    from patchcl_qupath.storage.records import ImageOutcome

_BARS = 8  # progress bars on the screen at once


@contextmanager
def progress_lines() -> Iterator[ShowProgress]:
    """Progress as lines of JSON, which groovy/run_patchcl.groovy reads; 0 of 0 is: not counted."""

    def show(progress: Progress) -> None:
        step = {"stage": progress.label, "done": progress.done, "total": progress.total or 0}
        click.echo(json.dumps(step), err=True)

    yield show


@contextmanager
def progress_bars() -> Iterator[ShowProgress]:
    """Bars on standard error: what is done, how fast, how long still."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress
    from rich.table import Column

    whole = Column(no_wrap=True)
    with RichProgress(
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, ratio=1)),
        BarColumn(bar_width=12),
        MofNCompleteColumn(table_column=whole),
        TextColumn("{task.fields[rate]}", table_column=whole),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True, table_column=whole),
        console=Console(stderr=True),
        expand=True,
    ) as bars:
        yield _Bars(bars).show


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

    def _begin(self, label: str) -> None:
        for task in self.bars.tasks:
            if task.total is None:  # what cannot be counted is over when the next begins
                self.bars.update(task.id, total=1, completed=1)
        if len(self.tasks) == _BARS:
            self.bars.remove_task(self.tasks.pop(next(iter(self.tasks))))
        self.tasks[label] = self.bars.add_task(label, total=None, rate="")


def report_run(
    project: Project, results: Sequence[ImageOutcome], report: Path | None, as_json: bool
) -> None:
    """What became of the images of a run, where its ``report`` is, and what to do next."""
    if as_json:
        images = results
        page = None if report is None else str(report)
        print_json({"project": str(project.path), "images": images, "report": page})
        return
    done = [result for result in results if not result.problem]
    if done:
        print_table(
            ["image", "tissue mm2", "nuclei", "seconds", "tiles", "taken over"],
            [
                [
                    r.image,
                    f"{r.tissue_mm2:.2f}",
                    f"{r.nuclei:,}",
                    f"{r.seconds:.1f}",
                    r.tiles,
                    r.tiles_resumed,
                ]
                for r in done
            ],
        )
        for result in done:
            if result.note:
                click.echo(f"Note: {result.image}: {result.note}")
        click.echo(f"Results: {project.layout.root / 'results'}")
        click.echo(f"Look at: {project.layout.previews}")
        if report is not None:
            click.echo(f"Report:  {report}")
        if project.backend.writes_into_qupath:
            click.echo("Next:    open the project in QuPath: the nuclei are in its images")
        else:
            click.echo(
                f"Next:    patchcl-qp scripts {project.path}, then open the project in\n"
                "         QuPath: Automate > Project scripts > import_nuclei, Run > Run for project"
            )
    for result in results:
        if result.problem:
            click.echo(f"Failed: {result.problem}", err=True)
        if result.failed_tiles:
            first, count = result.failed_tiles[0], len(result.failed_tiles)
            click.echo(
                f"Failed: {result.image}: {count} of {result.tiles} tiles were left out, as its "
                f"preview shows; the first of {first.width} x {first.height} px at x={first.x} "
                f"y={first.y}: {first.reason}. Run again to try them again",
                err=True,
            )


def report_states(project: Project, states: Sequence[ImageStatus], as_json: bool) -> None:
    """Where the images of a project are."""
    if as_json:
        print_json(
            {
                "project": str(project.path),
                "images": states,
            }
        )
        return
    print_table(
        ["image", "state", "nuclei", "made (UTC)", "model", "fields done", "changed since"],
        [
            [
                s.image,
                s.state,
                None if s.nuclei is None else f"{s.nuclei:,}",
                s.made and s.made[:16].replace("T", " "),
                s.model,
                f"{s.rois_corrected} of {s.rois}" if s.rois else None,
                "; ".join(s.changed),
            ]
            for s in states
        ],
    )


def report_suggestion(project: Project, suggestion: Suggestion, count: int, as_json: bool) -> None:
    """The fields that were chosen, and what to do with them."""
    if as_json:
        print_json({"project": str(project.path), **_plain(suggestion)})
        return
    for line in suggestion.done:
        click.echo(line)
    if suggestion.rois:
        print_table(
            ["image", "field", "x", "y", "doubt", "usual", "nuclei"],
            [
                [
                    one.image,
                    one.roi.name,
                    round(one.roi.x),
                    round(one.roi.y),
                    f"{one.entropy:.2f}",
                    f"{one.expected:.2f}",
                    one.nuclei,
                ]
                for one in suggestion.rois
            ],
        )
        if len(suggestion.rois) < count and not suggestion.problems:
            click.echo("Note: there are no more fields with tissue and nuclei that do not touch")
        steps = [
            "in QuPath, put right every nucleus in these fields",
            f"set the class of each field that is done to '{CORRECTED}', and save",
            f"patchcl-qp refine {project.path}",
        ]
        if not project.backend.writes_into_qupath:
            steps.insert(0, "in QuPath, run groovy/import_nuclei.groovy for the project")
            steps.insert(-1, "run groovy/export_labels.groovy, too")
        click.echo("Next:")
        for number, step in enumerate(steps, start=1):
            click.echo(f"  {number}. {step}")
    if suggestion.without:
        click.echo(f"Without nuclei, left out: {', '.join(suggestion.without)}")
    for problem in suggestion.problems:
        click.echo(f"Failed: {problem}", err=True)


def report_scores(
    project: Project, scored: Sequence[ImageScore], without: Sequence[str], as_json: bool
) -> None:
    """Scores of each image and their means; ``without`` are the images that have no truth."""
    from patchcl_qupath.evaluation.score import SCORES, mean

    means = mean(scored)
    if as_json:
        images = scored
        print_json(
            {"project": str(project.path), "images": images, "mean": means, "without": without}
        )
        return
    if means:
        rows = [
            [image.image, f"{image.nuclei:,}", f"{image.true_nuclei:,}", *_figures(image.scores)]
            for image in scored
            if not image.problem
        ]
        titles = ["image", "nuclei", "true nuclei", *SCORES.values()]
        print_table(titles, [*rows, ["mean", None, None, *_figures(means)]])
    for image in scored:
        if image.note:
            click.echo(f"Note: {image.image}: {image.note}")
    if without:
        click.echo(f"Without truth, left out: {', '.join(without)}")
    for image in scored:
        if image.problem:
            click.echo(f"Failed: {image.problem}", err=True)


def _figures(scores: dict[str, float]) -> list[str]:
    return [f"{score:.3f}" for score in scores.values()]


def print_table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on standard output; None is an empty cell."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*titles)
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    Console(markup=False, emoji=False).print(table)  # names may hold [brackets] and :colons:


def print_json(content: Any) -> None:
    """JSON on standard output."""
    click.echo(json.dumps(_plain(content), indent=2, ensure_ascii=False))


def _plain(content: Any) -> Any:
    from patchcl_qupath.storage.records import to_plain

    return to_plain(content)
