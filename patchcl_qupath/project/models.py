"""The models of a project, by name."""

from __future__ import annotations

import difflib
from contextlib import suppress
from pathlib import Path

from patchcl_qupath.config import DEFAULT_MODEL, REFINED_MODEL
from patchcl_qupath.errors import ConfigError, ModelError, quoted
from patchcl_qupath.project.protocol import Project
from patchcl_qupath.storage.records import ModelRecord, read_model_record


def existing_model(project: Project, name: str) -> Path:
    """The file of a model. Raises ConfigError for a name that no model has, with the nearest."""
    path = project.layout.model(name)
    if path.exists():
        return path
    names = [found.stem for found in project.layout.model_records() if found.stem != name]
    by_lower = {other.lower(): other for other in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    if near:
        hint = f"do you mean {by_lower[near[0]]}?"
    else:
        hint = f"it has {', '.join(names[:10]) or 'none'}."
    advice = f"to have another, `patchcl-qp train {quoted(project.path)} --model {quoted(name)}`"
    if name == REFINED_MODEL:  # a training without labels under its name would be mistaken for it
        advice = f"`patchcl-qp refine {quoted(project.path)}` makes this one of corrected ROIs"
    raise ConfigError(
        f"no model {name} in {project.path}: {hint} Only the model {DEFAULT_MODEL} is trained by "
        f"itself: {advice}"
    )


def model_record(weights: Path) -> ModelRecord | None:
    """The record of a model: the one beside its weights or, where that is of others, that in them.

    So a training leaves them that is killed as it saves a model, and a person who copies weights
    alone. None for weights that cannot be used.
    """
    if (record := read_model_record(weights)) is not None:
        return record
    from patchcl_qupath.models.model import Model  # which is slow to import

    with suppress(ModelError):
        return Model.load(weights).record
    return None
