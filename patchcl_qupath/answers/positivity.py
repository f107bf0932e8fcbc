"""Positive and negative nuclei: by thresholds that a person gives, or by one found on the slide.

Thresholds are optical densities as in QuPath, of the slide's own stain vectors. Percentages and
scores are defined as QuPath defines them.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np
from numpy.typing import NDArray

from patchcl_qupath.answers.mixture import USUAL_THRESHOLD, threshold_between
from patchcl_qupath.config import GRADES, INTENSITY_COLOURS, NEGATIVE, POSITIVE, parse_positive
from patchcl_qupath.datatypes import Nuclei, StainVectors
from patchcl_qupath.errors import ImageError
from patchcl_qupath.slides.stain_vectors import dab_of, hematoxylin_of
from patchcl_qupath.storage.parquet import Table, with_classes
from patchcl_qupath.storage.records import AllredScore, PositivityRecord

# Of DAB and hematoxylin over nuclei: at most .27 in the images of DeepLIIF, and 1 without DAB.
_LEAST_CORRELATION = 0.8
_OF_DARK = (
    f"DAB of its nuclei rises with their hematoxylin: the threshold is {USUAL_THRESHOLD}; its "
    "stain vectors may be those of another slide, and what is positive may be dark without DAB: "
    "look at the classes"
)
_OF_CELLS = {"cell", "cytoplasm"}
_IMPLIED = {"nucleus", "od"}  # left out of the names of measurements, or spelt out, without change


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

    def codes(self, values: NDArray[np.float32]) -> NDArray[np.intp]:
        """The number (N,) in ``class_names`` of nuclei with these values (N,) of the measurement.

        As in QuPath, a nucleus at a threshold is above it, and one without a value is negative.
        """
        known = np.nan_to_num(np.asarray(values, np.float32), nan=-np.inf)
        # In the digits of the values: the one nearest to 0.35 is below it.
        thresholds = np.asarray(self.record.thresholds, np.float32)
        return np.searchsorted(thresholds, known, side="right")

    def classes(self, values: NDArray[np.float32]) -> NDArray[np.str_]:
        """The class (N,) of the same nuclei."""
        return np.array(self.class_names)[self.codes(values)]

    def apply(self, batches: Iterable[Nuclei]) -> Iterator[Nuclei]:
        """Batches of nuclei with their classes."""
        for batch in batches:
            values = batch.measurements[self.record.measurement]
            yield replace(batch, classes=self.classes(values))

    def apply_to_table(self, table: Table) -> Table:
        """A table of nuclei with their classes."""
        values = table[self.record.measurement].to_numpy()
        return with_classes(table, self.classes(values))


def check_positive(
    positive: str, image: str, stains: StainVectors, names: Sequence[str], *, with_cells: bool
) -> None:
    """Raise ImageError for an image whose nuclei cannot be classified as ``result.positive`` asks.

    ``stains`` are those that are measured, ``names`` the measurements of nuclei; of their cells and
    of cytoplasm there are the same, if there are cells.
    """
    given = parse_positive(positive)
    words = _words(given[0]) if given else {"dab"}
    if "dab" in words and dab_of(stains) is None:
        raise ImageError(
            f"{image}: --positive needs DAB, and its stains are {' and '.join(stains.names)}: set "
            "its type to Brightfield (H-DAB) in QuPath, or pass --stain h-dab; or leave the image "
            "out with --image"
        )
    if not given:
        return
    if not any(words - _OF_CELLS == _words(name) for name in names):
        raise ImageError(_unknown(image, given[0], names))
    if words & _OF_CELLS and not with_cells:
        raise ImageError(
            f"{image}: {given[0]} for --positive is measured in cells, and there are only nuclei: "
            "pass --expand 5, or a measurement of nuclei"
        )


def find_positivity(
    positive: str,
    *,
    image: str,
    base_class: str,
    stains: StainVectors,
    names: Sequence[str],
    values: Callable[[str], Iterable[NDArray[np.float32]]],
) -> Positivity:
    """What makes nuclei of an image positive, as ``result.positive`` asks.

    ``names`` are the measurements of its nuclei, ``values`` gives those of one, batch by batch:
    they are read for `auto` alone. Raises ImageError.
    """
    given = parse_positive(positive)
    asked = given[0] if given else f"nucleus {dab_of(stains)} mean"
    measurement = _named(asked, names)
    if measurement is None and names:
        raise ImageError(_unknown(image, asked, names))
    record = PositivityRecord(measurement=measurement or asked, thresholds=(USUAL_THRESHOLD,))
    if given:
        record = msgspec.structs.replace(record, thresholds=given[1])
    else:
        hematoxylin = _named(f"nucleus {hematoxylin_of(stains)} mean", names)
        densities = [
            np.concatenate([np.empty(0, np.float32), *(values(name) if name else ())])
            for name in (measurement, hematoxylin)
        ]
        threshold, note = threshold_between(densities[0])
        if note is None and _correlation(*densities) >= _LEAST_CORRELATION:
            threshold, note = USUAL_THRESHOLD, _OF_DARK
        record = msgspec.structs.replace(
            record, thresholds=(threshold,), found=note is None, note=note
        )
    return Positivity(record=record, base_class=base_class)


def _named(asked: str, names: Sequence[str]) -> str | None:
    """The measurement that a person asks for; None without one."""
    return next((name for name in names if _words(name) == _words(asked)), None)


def _correlation(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    """Pearson's coefficient of two measurements (N,) of nuclei; 0 where one is the same in all."""
    both = np.stack([one, other])[:, np.isfinite(one) & np.isfinite(other)].astype(np.float64)
    deviations = both - both.mean(axis=1, keepdims=True)
    lengths = np.linalg.norm(deviations, axis=1)
    return float(deviations[0] @ deviations[1] / lengths.prod()) if lengths.all() else 0.0


def _words(name: str) -> set[str]:
    """What tells a measurement from others: `nucleus-dab-mean` is `DAB: Mean`.

    With cells it is `DAB: Nucleus: Mean`, or `Nucleus: DAB OD mean`.
    """
    plain = re.sub(r"[µμ]m(\^?2)?\b", "", name.lower().replace("um", "µm"))
    return set(re.findall(r"[^\W_]+", plain)) - _IMPLIED


def _unknown(image: str, name: str, names: Sequence[str]) -> str:
    """The error of a measurement that nuclei have not."""
    spelt = [re.sub(r"[^\w.]+", "-", known.lower()).strip("-.") for known in names]
    holding = [one for one, known in zip(spelt, names, strict=True) if _words(name) < _words(known)]
    near = sorted(holding, key=lambda one: not one.endswith("mean"))  # of dab: its mean
    near = near or difflib.get_close_matches(name.lower(), spelt, n=1, cutoff=0.5)
    hint = f"do you mean {near[0]}?" if near else f"there are {', '.join(spelt)}"
    return f"{image}: its nuclei have no measurement {name} for --positive: {hint}"


def intensity_counts(counts: Mapping[str, int]) -> dict[str, int]:
    """The numbers of nuclei of each intensity, of the numbers by class; others are left out."""
    found: dict[str, int] = {}
    for name, count in counts.items():
        last = name.rpartition(":")[2].strip()
        if last in INTENSITY_COLOURS:
            found[last] = found.get(last, 0) + count
    return found


def positive_percent(counts: Mapping[str, int]) -> float | None:
    """The percentage of positive nuclei among positive and negative ones; None without these."""
    found = intensity_counts(counts)
    total = sum(found.values())
    return 100 * (total - found.get(NEGATIVE, 0)) / total if total else None


def h_score(counts: Mapping[str, int]) -> float | None:
    """The H-score, 0 to 300: the sum of the percentages of 1+, 2+ and 3+, times 1, 2 and 3.

    None without nuclei, and where classes have no grades.
    """
    found = intensity_counts(counts)
    total = sum(found.values())
    if not total or not found.keys() & set(GRADES):
        return None
    weighted = sum(grade * found.get(name, 0) for grade, name in enumerate(GRADES, start=1))
    return 100 * weighted / total


def allred_score(counts: Mapping[str, int]) -> AllredScore | None:
    """The Allred score as QuPath defines it; None where there is no H-score.

    The intensity is 3 where the mean grade of positive nuclei is above 7/3, 2 above 5/3, else 1.
    """
    found, percent = intensity_counts(counts), positive_percent(counts)
    if h_score(counts) is None or percent is None:
        return None
    limits = (2 / 3, 1 / 3, 0.1, 0.01)
    graded = [found.get(name, 0) for name in GRADES]
    positive = sum(found.values()) - found.get(NEGATIVE, 0)
    if not positive:
        return AllredScore(proportion=0, intensity=0)
    share = positive / sum(found.values())
    proportion = next((5 - k for k, least in enumerate(limits) if share >= least), 1)
    mean = sum(grade * count for grade, count in enumerate(graded, start=1)) / positive
    return AllredScore(proportion=proportion, intensity=1 + (mean > 5 / 3) + (mean > 7 / 3))
