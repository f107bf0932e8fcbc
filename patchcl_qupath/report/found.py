"""What runs left in a project, for the report. Files may be missing, outdated or damaged."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.project import Project
from patchcl_qupath.project.changed import changed_since
from patchcl_qupath.project.imported import imported_nuclei
from patchcl_qupath.project.models import model_record
from patchcl_qupath.storage.files import digest
from patchcl_qupath.storage.layout import CHANGES, FIGURES
from patchcl_qupath.storage.records import (
    ChangesRecord,
    FiguresRecord,
    ImageOutcome,
    Imported,
    ModelRecord,
    RemovedRecord,
    ResultRecord,
    RunRecord,
    Summary,
    read_record,
    read_result,
)


@dataclass(frozen=True, kw_only=True)
class FoundImage:
    """One image; None is what is not known.

    ``imported`` is what became of its nuclei in QuPath, None where the saved image does not have
    them. ``pictures`` is the folder of its pictures and figures. ``changes`` are those that a
    refined model made in corrected ROIs, with pictures in ``changes_folder``. Where it is
    ``damaged``, there are figures that cannot be read.
    """

    id: str
    name: str
    pictures: Path
    result: ResultRecord | None = None
    imported: Imported | None = None
    figures: FiguresRecord | None = None
    changes: ChangesRecord | None = None
    changes_folder: Path
    damaged: bool = False
    seconds: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def nuclei(self) -> int | None:
        """Number of nuclei that were found."""
        return self.result.nuclei if self.result else None

    @property
    def added(self) -> int | None:
        """Number of those that were added to the image in QuPath."""
        return self.imported.added if self.imported else None

    @property
    def left_out(self) -> int | None:
        """Number of those that were not."""
        return self.imported.left_out if self.imported else None

    @property
    def tissue_mm2(self) -> float | None:
        """Area of the tissue, in mm²."""
        return self.result.tissue_mm2 if self.result else None

    @property
    def density(self) -> float | None:
        """Nuclei that were found per mm² of tissue."""
        if self.result is None or not self.result.tissue_mm2:
            return None
        return self.result.nuclei / self.result.tissue_mm2

    @property
    def summary(self) -> Summary | None:
        """The summary of the image, if the run was asked for any."""
        return self.result.summaries[0] if self.result and self.result.summaries else None

    @property
    def positive_percent(self) -> float | None:
        """The percentage of positive nuclei."""
        return self.summary.positive_percent if self.summary else None

    @property
    def h_score(self) -> float | None:
        """The H-score, 0 to 300."""
        return self.summary.h_score if self.summary else None

    @property
    def median_area(self) -> float | None:
        """Median area of its nuclei, in µm²."""
        return self.figures.area.median if self.figures else None

    @property
    def probability(self) -> float | None:
        """Mean detection probability of its nuclei."""
        return self.figures.probability if self.figures else None


@dataclass(frozen=True)
class FoundModel:
    """A model, and the names of the images that it segmented."""

    name: str
    record: ModelRecord
    images: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class FoundRun:
    """What made the nuclei of images; ``versions`` are those of packages, ``images`` names."""

    id: str
    result: ResultRecord
    versions: dict[str, str]
    images: list[str] = field(default_factory=list)


def find_image(project: Project, entry: ImageEntry) -> FoundImage:
    """What there is of an image, with warnings."""
    layout = project.layout
    found = read_result(layout.result(entry.id))
    outcome = read_record(layout.outcome(entry.id), ImageOutcome)
    pictures = layout.figures(entry.id)
    figures = read_record(pictures / FIGURES, FiguresRecord)
    warnings = _warnings(project, entry, found, outcome)
    folder = layout.changes(entry.id)
    if not isinstance(found, ResultRecord):
        return FoundImage(
            id=entry.id,
            name=entry.name,
            pictures=pictures,
            changes_folder=folder,
            warnings=tuple(warnings),
        )
    changes = read_record(folder / CHANGES, ChangesRecord)
    if changes is not None and changes.run != found.run:
        changes = None
    damaged = figures is None and (pictures / FIGURES).exists()
    if figures is not None and not _are_of(figures, found):
        figures = None
    imported = imported_nuclei(project, entry)
    if imported and (imported.left_out or imported.stayed or imported.lost):
        warnings.append(f"in QuPath: {imported.in_words}")
    if figures is None and not damaged:
        warnings.append("its pictures were not made: run again")
    return FoundImage(
        id=entry.id,
        name=entry.name,
        pictures=pictures,
        result=found,
        imported=imported,
        figures=figures,
        changes=changes,
        changes_folder=folder,
        damaged=damaged,
        seconds=outcome.seconds if outcome and not outcome.problem else None,
        warnings=tuple(warnings),
    )


def _are_of(figures: FiguresRecord, result: ResultRecord) -> bool:
    """Whether figures are those of the nuclei, and not of a run before one that was stopped."""
    return (figures.run, figures.nuclei) == (result.run, result.nuclei) and (
        figures.drawn_from in ("", result.drawn_from)
    )


def _warnings(
    project: Project,
    entry: ImageEntry,
    found: ResultRecord | RemovedRecord | None,
    outcome: ImageOutcome | None,
) -> list[str]:
    """What a person should know of an image's nuclei, or why there are none."""
    warnings = [entry.problem] if entry.problem else []
    if outcome and outcome.problem and outcome.problem not in warnings:
        warnings.append(f"failed: {outcome.problem}")
    if found is None and not warnings:  # nor any more, whatever became of an earlier run
        warnings.append("not done yet")
    if isinstance(found, ResultRecord) and outcome and outcome.note:
        warnings.append(outcome.note)
    if isinstance(found, RemovedRecord):
        warnings.append("its nuclei were removed")
    if isinstance(found, ResultRecord):
        if outcome and outcome.problem and not outcome.results:
            warnings.append("the result of an earlier run is shown")
        warnings += [change.in_words for change in changed_since(project, entry, found)]
        if found.failed_tiles:
            total = f" of {outcome.tiles}" if outcome and outcome.tiles else ""
            reason = found.failed_tiles[0].reason
            warnings.append(f"{len(found.failed_tiles)}{total} tiles failed: {reason}")
    return warnings


def find_models(project: Project, images: list[FoundImage]) -> list[FoundModel]:
    """The project's models, by name; one whose weights are gone may still have made nuclei."""
    models = []
    for path in project.layout.model_records():
        weights = path.with_suffix(".pt")
        record = model_record(weights) if weights.exists() else read_record(path, ModelRecord)
        if record is not None:
            used = [i.name for i in images if i.result and i.result.model == record.digest]
            models.append(FoundModel(path.stem, record, used))
    return models


def find_runs(project: Project, images: list[FoundImage]) -> list[FoundRun]:
    """The runs that made the nuclei which are there.

    A run goes on with other settings that its tiles do not depend on, such as a class of nuclei, or
    with other packages: that is another one here.
    """
    runs: dict[tuple[str, str], FoundRun] = {}
    for image in images:
        if image.result is None:
            continue
        run, versions = image.result.run, image.result.versions
        if not versions:  # of an earlier version
            record = read_record(project.layout.run_record(run), RunRecord)
            versions = record.versions if record else {}
        key = run, digest([image.result.config, versions])
        if key not in runs:
            runs[key] = FoundRun(id=run, result=image.result, versions=versions)
        runs[key].images.append(image.name)
    return list(runs.values())
