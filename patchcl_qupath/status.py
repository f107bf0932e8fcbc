"""What is done of an image, by what, and what changed since."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from patchcl_qupath import __version__
from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.project import Project
from patchcl_qupath.storage.files import file_signature, read_json


@dataclass(frozen=True)
class ImageStatus:
    """Where an image is: ``image_status`` says it in words, or what is in the way.

    ``nuclei`` were ``made`` then (UTC) by the model of that name; of the ``rois`` that a person
    was asked to correct, ``rois_corrected`` are done. ``changed`` is what is no longer as it was.
    """

    id: str
    image: str
    image_status: str
    nuclei: int | None = None
    made: str | None = None
    model: str | None = None
    rois: int = 0
    rois_corrected: int = 0
    changed: tuple[str, ...] = ()


def image_status(project: Project, entry: ImageEntry) -> ImageStatus:
    """Where an image is, from what is on disk."""
    qupath_summary = project.qupath_summary(entry)
    to_do = ImageStatus(
        entry.id,
        entry.name,
        entry.problem or "to do",
        rois=qupath_summary.to_correct + qupath_summary.corrected,
        rois_corrected=qupath_summary.corrected,
    )
    result = read_json(project.results(entry) / "result.json")
    if result is None:
        return to_do
    if "removed" in result:
        return replace(to_do, image_status="removed")
    failed_tiles = len(result.get("holes", ()))
    done = f"done but for {failed_tiles} of its tiles" if failed_tiles else "done"
    models = _models(project)
    changed = _changed(entry, result, models)
    if not qupath_summary.is_current:
        changed.append("not in QuPath yet")
    elif qupath_summary.saved_later:
        changed.append("saved in QuPath")
    return replace(
        to_do,
        image_status=entry.problem or done,
        nuclei=result["nuclei"],
        made=result["made"],
        model=_name(result, models),
        changed=tuple(changed),
    )


def _changed(entry: ImageEntry, result: dict[str, Any], models: dict[str, str]) -> list[str]:
    """What is no longer as it was when the nuclei were found."""
    changed = []
    slide = result.get("slide")
    if slide and not entry.problem:
        if slide["file"] != file_signature(entry.path):
            changed.append("slide file")
        if entry.mpp and slide["mpp"] != [*entry.mpp]:
            changed.append("pixel size")
    if result["model"] not in models.values():
        changed.append("model retrained" if result.get("model_name") in models else "model gone")
    if result.get("version", __version__) != __version__:
        changed.append(f"version, was {result['version']}")
    return changed


def _models(project: Project) -> dict[str, str]:
    """The project's models as they are now: name -> digest."""
    found = {}
    for path in sorted((project.output / "models").glob("*.json")):
        facts = read_json(path)
        if facts is not None and "digest" in facts:  # else of no model of ours
            found[path.stem] = str(facts["digest"])
    return found


def _name(result: dict[str, Any], models: dict[str, str]) -> str:
    """The model that made an image's nuclei: what it is called now, or was."""
    same = [name for name, digest in models.items() if digest == result["model"]]
    name = result.get("model_name", f"no longer here ({result['model'][:12]})")
    return name if name in same or not same else same[0]
