"""The images of a project whose nuclei are exported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from patchcl_qupath.datatypes import ImageEntry
from patchcl_qupath.errors import ImageError
from patchcl_qupath.project import Project
from patchcl_qupath.storage.records import RemovedRecord, ResultRecord, read_result

OUR_REGION = "PatchCL"  # the annotation that holds imported nuclei in QuPath


@dataclass(frozen=True)
class Places:
    """Where nuclei lie: the names (N,) of the smallest region and of the TMA core of each."""

    parents: pa.Array
    cores: pa.Array


@dataclass(frozen=True, kw_only=True)
class ExportedImage:
    """An image with nuclei; ``nuclei`` is their file, ``folder`` the folder of that."""

    id: str
    name: str
    result: ResultRecord
    folder: Path
    nuclei: Path
    has_cores: bool = False

    @property
    def mpp(self) -> tuple[float, float]:
        """(x, y) µm/px at level 0."""
        return self.result.slide.mpp

    @property
    def class_name(self) -> str:
        """The QuPath class of nuclei that have none of their own."""
        settings = self.result.config.get("result")
        return str(settings["class_name"]) if isinstance(settings, dict) else ""

    @property
    def object_type(self) -> str:
        """What a nucleus is in QuPath, as QuPath's tables write it."""
        return self.result.object_type.capitalize()

    def places(self, centroids: NDArray[np.float64]) -> Places:
        """Where nuclei lie, by their centroids (N, 2) in px at level 0."""
        count = len(centroids)
        return Places(
            parents=pa.repeat(pa.scalar(OUR_REGION), count), cores=pa.nulls(count, pa.string())
        )


def exported_image(project: Project, entry: ImageEntry) -> ExportedImage:
    """An image with its nuclei. Raises ImageError where it has none, or none that can be read."""
    layout = project.layout
    result = read_result(layout.result(entry.id))
    if isinstance(result, RemovedRecord):
        raise ImageError(f"{entry.name}: its nuclei were removed: segment it again")
    if result is None:
        raise ImageError(f"{entry.name} has no nuclei: segment it first")
    return ExportedImage(
        id=entry.id,
        name=entry.name,
        result=result,
        folder=layout.results(entry.id),
        nuclei=layout.nuclei(entry.id),
    )


def file_names(images: Sequence[ExportedImage]) -> list[str]:
    """A name for the file of each image, without suffix: that of the image, as far as any system
    takes it; with the image's id where two would be the same."""
    names = [_file_name(image.name) for image in images]
    lower = [name.casefold() for name in names]
    return [
        name if lower.count(name.casefold()) == 1 else f"{name}-{image.id}"
        for name, image in zip(names, images, strict=True)
    ]


def _file_name(text: str) -> str:
    """A text as a file name on any system."""
    safe = "".join("_" if c in '<>:"/\\|?*' or ord(c) < 32 else c for c in text)
    return safe.strip(" .")[:100] or "image"
