"""The state of an image: its nuclei, their model, and changes since the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from patchcl_qupath import __version__
from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.project import Project
from patchcl_qupath.project.changed import changed_since
from patchcl_qupath.project.imported import imported_nuclei
from patchcl_qupath.project.models import model_record
from patchcl_qupath.storage.records import (
    ImageOutcome,
    Imported,
    Record,
    RemovedRecord,
    ResultRecord,
    read_record,
    read_result,
)


class ImageStatus(
    Record,
    frozen=True,
    kw_only=True,
    rename={"rois": "fields", "rois_corrected": "fields_done"},
):
    """The state of an image: ``state`` is its progress in words, or its problem.

    ``nuclei`` is the number that was found, ``imported`` what became of them in QuPath, None where
    the saved image does not have them. ``made`` is the time of their run (UTC in ISO 8601),
    ``model`` the name of its model. Of ``rois`` to correct, ``rois_corrected`` are done.
    ``changed`` lists changes since the run.
    """

    id: str
    image: str
    state: str
    nuclei: int | None = None
    imported: Imported | None = None
    made: str | None = None
    model: str | None = None
    rois: int = 0
    rois_corrected: int = 0
    changed: tuple[str, ...] = ()


def image_statuses(project: Project, entries: Sequence[ImageEntry]) -> list[ImageStatus]:
    """The states of images. The records of models, which are large, are read once."""
    models = _models(project)
    return [image_status(project, entry, models) for entry in entries]


def image_status(
    project: Project, entry: ImageEntry, models: Mapping[str, str] | None = None
) -> ImageStatus:
    """The state of an image, from the files on disk.

    ``models`` are the digests of the project's present models by name, read if they are not given.
    Raises StorageError for a result that is there, but cannot be read.
    """
    qupath = project.qupath_summary(entry)
    to_do = ImageStatus(
        id=entry.id,
        image=entry.name,
        state=entry.problem or "to do",
        rois=qupath.to_correct + qupath.corrected,
        rois_corrected=qupath.corrected,
    )
    result = read_result(project.layout.result(entry.id))
    if result is None:
        return to_do
    if isinstance(result, RemovedRecord):
        return msgspec.structs.replace(to_do, state="removed")
    failed = len(result.failed_tiles)
    models = _models(project) if models is None else models
    changed = _changed(project, entry, result, models)
    outcome = read_record(project.layout.outcome(entry.id), ImageOutcome)
    if outcome is not None and outcome.problem not in (None, entry.problem):
        changed.append(f"a run failed: {outcome.problem}")
    if not qupath.is_current:
        changed.append("not in QuPath yet")
    elif not qupath.is_saved:
        changed.append("imported into QuPath, but not saved there")
    elif qupath.saved_later:
        changed.append("saved in QuPath")
    return msgspec.structs.replace(
        to_do,
        state=entry.problem or (f"done but for {failed} of its tiles" if failed else "done"),
        nuclei=result.nuclei,
        imported=imported_nuclei(project, entry),
        made=result.made,
        model=_model_name(result, models),
        changed=tuple(changed),
    )


def _changed(
    project: Project, entry: ImageEntry, result: ResultRecord, models: Mapping[str, str]
) -> list[str]:
    """What changed since the nuclei were segmented."""
    changed = [str(change) for change in changed_since(project, entry, result)]
    if result.model not in models.values():
        changed.append("model retrained" if result.model_name in models else "model gone")
    if result.version != __version__:
        changed.append(f"version, was {result.version}")
    return changed


def _models(project: Project) -> dict[str, str]:
    """The project's present models: name -> digest, "" where it is not known."""
    weights = [path.with_suffix(".pt") for path in project.layout.model_records()]
    records = {path.stem: model_record(path) for path in weights if path.exists()}
    return {name: record.digest if record else "" for name, record in records.items()}


def _model_name(result: ResultRecord, models: Mapping[str, str]) -> str:
    """The name of the model of an image's nuclei: its present name, or that of the run."""
    same = [name for name, digest in models.items() if digest == result.model]
    name = result.model_name or f"no longer here ({result.model[:12]})"
    return name if name in same or not same else same[0]
