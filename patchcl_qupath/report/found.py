"""What runs left in a project, for the report. Files may be missing, old or damaged."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.project import Project
from patchcl_qupath.storage.files import read_json

Facts = dict[str, Any]


@dataclass(frozen=True)
class FoundImage:
    """One image: None is what is not known. ``pictures`` is the folder that ``figures`` are of."""

    id: str
    name: str
    pictures: Path
    result: Facts | None = None  # what made its nuclei
    figures: Facts | None = None
    nuclei: int | None = None
    tissue_mm2: float | None = None
    median_area: float | None = None  # um2
    probability: float | None = None  # mean over its nuclei
    seconds: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def density(self) -> float | None:
        """Nuclei per mm2 of tissue."""
        return (
            self.nuclei / self.tissue_mm2 if self.nuclei is not None and self.tissue_mm2 else None
        )


@dataclass(frozen=True)
class FoundModel:
    """A model, and the images whose nuclei it made."""

    name: str
    facts: Facts
    images: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FoundRun:
    """What made the nuclei of some images."""

    id: str
    facts: Facts
    images: list[str]


def find_image(project: Project, entry: ImageEntry) -> FoundImage:
    """What there is of an image, and what is to be said of it."""
    report = project.output / "report"
    pictures = report / "images" / entry.id
    result = read_json(project.results(entry) / "result.json")
    outcome = read_json(report / "outcomes" / f"{entry.id}.json")
    figures = read_json(pictures / "figures.json")
    warnings = [entry.problem] if entry.problem else []
    if result is None and outcome is None and not warnings:
        warnings.append("not done yet")
    if outcome and outcome.get("problem") and outcome["problem"] not in warnings:
        warnings.append(f"failed: {outcome['problem']}")
    if outcome and outcome.get("note"):
        warnings.append(str(outcome["note"]))
    if result is not None and "removed" in result:
        warnings.append("its nuclei were removed")
        result = None
    nuclei, tissue = _number(result, "nuclei"), _number(result, "tissue_mm2")
    if result is None or nuclei is None or tissue is None or "run" not in result:
        return FoundImage(entry.id, entry.name, pictures, warnings=tuple(warnings))
    if outcome and outcome.get("problem"):
        warnings.append("what is shown is what an earlier run found")
    if failed_tiles := result.get("holes"):
        tiles = f" of {outcome['tiles']}" if outcome and outcome.get("tiles") else ""
        warnings.append(
            f"{len(failed_tiles)}{tiles} tiles were left out: {failed_tiles[0]['reason']}"
        )
    if not figures or any(figures.get(key) != result[key] for key in ("run", "nuclei")):
        warnings.append("its pictures were not made: run again")
        figures = None
    return FoundImage(
        entry.id,
        entry.name,
        pictures,
        result,
        figures,
        int(nuclei),
        tissue,
        _number(figures, "area", "median"),
        _number(figures, "probability"),
        None if outcome and outcome.get("problem") else _number(outcome, "seconds"),
        tuple(warnings),
    )


def find_models(project: Project, images: list[FoundImage]) -> list[FoundModel]:
    """The project's models, by name."""
    models = []
    for path in sorted((project.output / "models").glob("*.json")):
        facts = read_json(path)
        if facts is not None and "digest" in facts:
            used = [i.name for i in images if i.result and i.result.get("model") == facts["digest"]]
            models.append(FoundModel(path.stem, facts, used))
    return models


def find_runs(project: Project, images: list[FoundImage]) -> list[FoundRun]:
    """The runs that made the nuclei which are there."""
    runs: dict[str, FoundRun] = {}
    for image in images:
        if image.result is not None:
            name = str(image.result["run"])
            if name not in runs:
                facts = image.result | (
                    read_json(project.output / "runs" / name / "run.json") or {}
                )
                runs[name] = FoundRun(name, facts, [])
            runs[name].images.append(image.name)
    return list(runs.values())


def _number(facts: Facts | None, *keys: str) -> float | None:
    """A number of a file; None where it has none in that place."""
    value: Any = facts
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value if isinstance(value, int | float) else None
