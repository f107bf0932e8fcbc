"""Positive and negative nuclei: by thresholds that a person gives, or by one found on the slide.

Thresholds are optical densities as in QuPath, of the slide's own stain vectors. Percentages and
scores are defined as QuPath defines them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.config import (
    AUTO_POSITIVE,
    GRADES,
    NEGATIVE,
    POSITIVE,
    parse_positive,
)
from patchcl_qupath.datatypes import Nuclei, StainKind, StainVectors
from patchcl_qupath.errors import ConfigError, ImageError
from patchcl_qupath.storage.records import AllredScore, PositivityRecord

USUAL_THRESHOLD = 0.2  # QuPath's default for DAB, which is taken where two modes are not found


@dataclass(frozen=True, kw_only=True)
class Positivity:
    """What makes nuclei positive; ``base_class`` is the class that all of them have else."""

    record: PositivityRecord
    base_class: str

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, from negative to the most positive."""
        names = (POSITIVE,) if len(self.record.thresholds) == 1 else GRADES
        return tuple(f"{self.base_class}: {name}" for name in (NEGATIVE, *names))

    def classes(self, values: NDArray[np.float32]) -> NDArray[np.str_]:
        """The class (N,) of nuclei with these values (N,) of the measurement.

        As in QuPath, a nucleus at a threshold is above it, and one without a value is negative.
        """
        thresholds = np.asarray(self.record.thresholds)
        known = np.nan_to_num(np.asarray(values, np.float64), nan=-np.inf)
        names = np.array(self.class_names)
        return names[np.searchsorted(thresholds, known, side="right")]

    def apply(self, batches: Iterable[Nuclei]) -> Iterable[Nuclei]:
        """Batches of nuclei with their classes."""
        for batch in batches:
            values = batch.measurements[self.record.measurement]
            yield Nuclei(batch.polygons, batch.measurements, batch.uuids, self.classes(values))
