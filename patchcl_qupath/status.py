"""What is done of an image, by what, and what changed since."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from patchcl_qupath import __version__
from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.project import Project
from patchcl_qupath.storage.files import file_facts, read_json


@dataclass(frozen=True)
class State:
    """Where an image is: ``state`` says it in words, or what is in the way.

    ``nuclei`` were ``made`` then (UTC) by the model of that name; of the ``fields`` that a person
    was asked to correct, ``fields_done`` are done. ``changed`` is what is no longer as it was.
    """

    id: str
    image: str
    state: str
    nuclei: int | None = None
    made: str | None = None
    model: str | None = None
    fields: int = 0
    fields_done: int = 0
    changed: tuple[str, ...] = ()


def state(project: Project, entry: ImageEntry) -> State:
    """Where an image is, from what is on disk."""
    shown = project.shown(entry)
    to_do = State(
        entry.id,
        entry.name,
        entry.problem or "to do",
        fields=shown.to_correct + shown.corrected,
        fields_done=shown.corrected,
    )
    result = read_json(project.results(entry) / "result.json")
    if result is None:
        return to_do
    if "removed" in result:
        return replace(to_do, state="removed")
    holes = len(result.get("holes", ()))
    done = f"done but for {holes} of its tiles" if holes else "done"
    models = _models(project)
    changed = _changed(entry, result, models)
    if not shown.is_current:
        changed.append("not in QuPath yet")
    elif shown.saved_later:
        changed.append("saved in QuPath")
    return replace(
        to_do,
        state=entry.problem or done,
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
        if slide["file"] != file_facts(entry.path):
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
