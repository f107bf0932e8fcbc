"""Tables of measures: means and spreads of several trainings, and what differs between two runs.

Results are measures by row, set and training: ``{row: {set: [{measure: value}, ...]}}``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.sets import EMPTY
from patchcl_qupath.evaluation.metrics import Kind

Measures = dict[str, float]
Results = dict[str, dict[str, list[Measures]]]

MEAN = "mean of sets"
_ROW, _SET = 29, 16  # widths


@dataclass(frozen=True)
class Column:
    """A measure in a table: its title, its decimals, and whether more of it is better."""

    measure: str
    title: str
    decimals: int
    more_is_better: bool | None

    @property
    def width(self) -> int:
        """Characters of its cells, with a space between."""
        return 10 + (self.decimals > 1)


SCORES = tuple(
    Column(measure, title, 3, True)
    for measure, title in {"dice": "Dice", "aji": "AJI", "pq": "PQ", "f1": "F1"}.items()
)
_TITLES = {Kind.BADLY_OUTLINED: "bad outl."}
KINDS = tuple(Column(kind, _TITLES.get(kind, str(kind)), 1, kind is Kind.RIGHT) for kind in Kind)
ON_EMPTY = tuple(Column(f"{name}_per_mm2", name.replace("_", "+"), 0, False) for name in EMPTY)
IN_ROIS = Column("roi_recall", "in ROIs", 3, True)
SEMANTIC = Column("semantic_dice", "sem. Dice", 3, True)
FORESEEN = Column("foreseen", "foreseen", 2, True)
QUALITY = (*SCORES, *KINDS, *ON_EMPTY, FORESEEN, IN_ROIS, SEMANTIC)
PSEUDO_LABELS = (
    Column("nucleus", "nucleus", 2, True),
    Column("background", "background", 2, True),
    Column("unlabelled", "unlabelled", 2, None),
    Column("iou_50", "IoU > .5", 2, True),
    Column("iou_70", "IoU > .7", 2, True),
    Column("on_nothing", "on nothing", 2, False),
    Column("several", "several", 2, False),
    Column("covered", "covered", 2, True),
    Column("aji", "AJI", 3, True),
    Column("pq", "PQ", 3, True),
)


def columns_of(rows: Sequence[str]) -> tuple[Column, ...]:
    """The columns for rows of one table."""
    return PSEUDO_LABELS if "pseudo-labels" in rows else QUALITY


def show_titles(columns: Sequence[Column]) -> None:
    """Print the head of a table."""
    _print("", "", [column.title for column in columns], columns)


def show(row: str, of: str, measured: Sequence[Measures], columns: Sequence[Column]) -> None:
    """Print the means of several trainings on a set, and half of their range."""
    cells = []
    for column in columns:
        values = _values(measured, column)
        cell = _number(float(np.mean(values)), column) if values else ""
        if len(values) > 1:
            cell += f" ±{_number((max(values) - min(values)) / 2, column)}"
        cells.append(cell)
    _print(row, of, cells, columns)


def mean_of_sets(by_set: dict[str, list[Measures]]) -> list[Measures]:
    """The mean over the sets of each measure that all have, training by training."""
    means = []
    for trainings in zip(*by_set.values(), strict=False):
        common = set.intersection(*(set(each) for each in trainings))
        means.append({name: float(np.mean([each[name] for each in trainings])) for name in common})
    return means


def read_results(path: Path) -> dict[str, Any]:
    """What ``--json`` printed, which is the last line of a file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
        if not isinstance(content["rows"], dict):
            raise TypeError("rows")
    except (OSError, ValueError, LookupError, TypeError) as error:
        sys.exit(f"{path} does not end with what --json prints: {error!r}")
    return dict(content)


def compare(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Print what differs in the second of two results, for each row and set that both have."""
    print("differences; * better, ! worse, by more than the spread of the trainings")
    columns = columns_of([*before["rows"]])
    show_titles(columns)
    for row, sets in before["rows"].items():
        common = {name: sets[name] for name in sets if name in after["rows"].get(row, {})}
        if not common:
            continue
        others = {name: after["rows"][row][name] for name in common}
        pairs = {name: (common[name], others[name]) for name in common}
        pairs[MEAN] = (mean_of_sets(common), mean_of_sets(others))
        for name, (first, second) in pairs.items():
            cells = [_difference(first, second, column) for column in columns]
            _print(row, name, cells, columns)
        aji = {name: _mean_aji(others[name]) - _mean_aji(common[name]) for name in common}
        lower = [name for name, more in aji.items() if more < 0]
        if not np.isnan([*aji.values()]).all():  # of paper-by-labels, pixels are scored
            print(f"{row}: AJI is lower on {len(lower)} of {len(common)} sets: {', '.join(lower)}")


def _mean_aji(trainings: list[Measures]) -> float:
    return float(np.mean([each.get("aji", np.nan) for each in trainings]))


def _difference(before: list[Measures], after: list[Measures], column: Column) -> str:
    """How a measure differs, with a mark where the ranges of the trainings do not overlap."""
    first, second = _values(before, column), _values(after, column)
    if not first or not second:
        return ""
    more = min(second) > max(first)
    is_beyond = min(len(first), len(second)) > 1 and (more or max(second) < min(first))
    mark = " "
    if is_beyond and column.more_is_better is not None:
        mark = "*" if more is column.more_is_better else "!"
    change = float(np.mean(second) - np.mean(first))
    return ("-" if change < 0 else "+") + _number(abs(change), column) + mark


def _values(measured: Sequence[Measures], column: Column) -> list[float]:
    return [each[column.measure] for each in measured if column.measure in each]


def _number(value: float, column: Column) -> str:
    text = f"{value:.{column.decimals}f}"
    return text.removeprefix("0") if column.decimals > 1 else text


def _print(row: str, of: str, cells: Sequence[str], columns: Sequence[Column]) -> None:
    line = f"{row:<{_ROW}}{of:<{_SET}}"
    for cell, column in zip(cells, columns, strict=True):
        line += f"{cell:>{column.width}}"
    print(line.rstrip(), flush=True)
