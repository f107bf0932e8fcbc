"""Charts of the report: their geometry and their words. ``templates/macros.html.j2`` draws them.

Coordinates are those of the SVG, ``WIDTH`` by ``HEIGHT``; texts are plain, the template escapes
them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from patchcl_qupath.storage.records import Histogram, StainHistogram

WIDTH, HEIGHT = 400, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 18, 22, 34  # margins around the plot
_POINTS = 160  # of a curve, at most: more cannot be seen
_SMOOTHED = 40  # points of a curve from which on it is smoothed


@dataclass(frozen=True)
class Path:
    """A line or area: ``kind`` is its CSS class, ``d`` the commands of an SVG path."""

    kind: str
    d: str


@dataclass(frozen=True, kw_only=True)
class Label:
    """A text whose ``anchor`` (start, middle or end) is at (x, y); ``kind`` is its CSS class."""

    x: float
    y: float
    anchor: str
    text: str
    kind: str = ""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart: ``words`` describe it for screen readers; ``legend`` names its lines, if several.

    Where the legend names areas instead, ``swatches`` are their CSS classes.
    """

    id: str
    title: str
    words: str
    paths: tuple[Path, ...]
    labels: tuple[Label, ...]
    legend: tuple[str, ...] = ()
    swatches: tuple[str, ...] = ()
    width: int = WIDTH
    height: int = HEIGHT


@dataclass(frozen=True)
class Mark:
    """A value of x that is marked, such as a step of training, and the text beside the mark."""

    step: float
    text: str


def histogram(
    key: str,
    title: str,
    unit: str,
    data: Histogram | StainHistogram,
) -> Chart:
    """Bars of equal width from 0 to ``data.highest``, and the median.

    The first bar has what is below 0, too, as the last one has what is larger.
    ``key`` identifies the chart on the page.
    Raises ValueError, ArithmeticError or LookupError for a histogram that cannot be drawn.
    """
    total, step = sum(data.counts), data.highest / len(data.counts)
    plot = _Plot(xs=(0, data.highest), ys=(0, max([*data.counts, 1])))
    bars = "".join(
        f"M{plot.x(i * step):.1f} {plot.y(0):.1f}V{plot.y(n):.1f}"
        f"H{plot.x((i + 1) * step) - 1:.1f}V{plot.y(0):.1f}z"
        for i, n in enumerate(data.counts)
        if n
    )
    words = f"{total:,} nuclei, from 0 to {data.highest:g} {unit} and more."
    paths = [*plot.axes(), Path("bars", bars)]
    labels = plot.labels(unit, last=f"{data.highest:g}+")
    if data.median is not None:
        most = data.counts.index(max(data.counts)) * step
        words += (
            f" Median {data.median:.3g} {unit}. The highest bar is that from {most:.3g} to "
            f"{most + step:.3g} {unit}."
        )
        path, label = plot.mark(data.median, f"median {data.median:.3g}")
        paths.append(path)
        labels.append(label)
    return Chart(id=key, title=title, words=words, paths=tuple(paths), labels=tuple(labels))


class Stack(NamedTuple):
    """One class of a histogram by class: its name, its CSS class, and the height of each bar."""

    name: str
    kind: str
    counts: Sequence[int]


def stacked(
    key: str,
    title: str,
    unit: str,
    *,
    highest: float,
    stacks: Sequence[Stack],
    marks: Sequence[Mark],
) -> Chart:
    """Bars of equal width from 0 to ``highest``, each divided among classes, the first at the base.

    ``key`` identifies the chart on the page.
    Raises ValueError, ArithmeticError or LookupError for a histogram that cannot be drawn.
    """
    bars = len(stacks[0].counts)
    step, base = highest / bars, [0] * bars
    whole = [sum(counts) for counts in zip(*(stack.counts for stack in stacks), strict=True)]
    plot = _Plot(xs=(0, highest), ys=(0, max([*whole, 1])))
    paths, labels, words = plot.axes(), plot.labels(unit, last=f"{highest:g}+"), []
    for stack in stacks:
        top = [low + count for low, count in zip(base, stack.counts, strict=True)]
        area = "".join(
            f"M{plot.x(i * step):.1f} {plot.y(base[i]):.1f}V{plot.y(top[i]):.1f}"
            f"H{plot.x((i + 1) * step) - 1:.1f}V{plot.y(base[i]):.1f}z"
            for i, count in enumerate(stack.counts)
            if count
        )
        paths.append(Path(f"bars {stack.kind}", area))
        words.append(f"{stack.name}: {sum(stack.counts):,} nuclei.")
        base = top
    for mark in marks:
        path, label = plot.mark(mark.step, mark.text)
        paths.append(path)
        labels.append(label)
        words.append(f"{mark.text.capitalize()} {unit}.")
    return Chart(
        id=key,
        title=title,
        words=" ".join([f"From 0 to {highest:g} {unit} and more.", *words]),
        paths=tuple(paths),
        labels=tuple(labels),
        legend=tuple(stack.name for stack in stacks),
        swatches=tuple(stack.kind for stack in stacks),
    )


def curves(
    key: str,
    title: str,
    series: Mapping[str, Sequence[float]],
    marks: Sequence[Mark] = (),
) -> Chart | None:
    """Lines over the steps 1, 2, ... of training; None without a finite value.

    ``key`` identifies the chart on the page.
    Raises ValueError, ArithmeticError or LookupError for values that cannot be drawn.
    """
    values = sorted(value for line in series.values() for value in line if math.isfinite(value))
    if not values:
        return None
    # One extreme step at the beginning must not flatten all that follows.
    low, high = values[len(values) // 200], values[-1 - len(values) // 200]
    steps = max([2, *map(len, series.values())])
    plot = _Plot(xs=(1, steps), ys=(min(0.0, low), max(high, low + 1e-6)))
    paths, labels, words = plot.axes(), plot.labels("step"), []
    for i, (name, line) in enumerate(series.items()):
        points = _smooth(line)
        paths.append(Path(f"line line-{i}", plot.line(points)))
        if points:
            first, last = points[0][1], points[-1][1]
            words.append(f"{name}: {first:.3g} at the beginning, {last:.3g} at the end.")
    for level, mark in enumerate(marks):
        path, label = plot.mark(mark.step, mark.text, level)
        paths.append(path)
        labels.append(label)
        words.append(f"{mark.text.capitalize()}.")
    return Chart(
        id=key,
        title=title,
        words=" ".join(words),
        paths=tuple(paths),
        labels=tuple(labels),
        legend=tuple(series) if len(series) > 1 else (),
    )


class _Plot:
    """The frame of a chart: where values lie in it, from (low, high) of each axis."""

    def __init__(self, *, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        self._xs, self._ys = xs, ys

    def x(self, value: float) -> float:
        """The column of a value."""
        low, high = self._xs
        return _LEFT + (value - low) / (high - low) * (WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        """The row of a value; one beyond the axis lies on its end."""
        low, high = self._ys
        part = min(1.0, max(0.0, (value - low) / (high - low)))
        return HEIGHT - _BOTTOM - part * (HEIGHT - _TOP - _BOTTOM)

    def line(self, points: Sequence[tuple[float, float]]) -> str:
        """The commands of a path through points (x, y)."""
        return "".join(
            f"{'L' if i else 'M'}{self.x(x):.1f} {self.y(y):.1f}" for i, (x, y) in enumerate(points)
        )

    def axes(self) -> list[Path]:
        """The x axis, and a line at each tick of the y axis."""
        right = WIDTH - _RIGHT
        return [
            Path("axis", f"M{_LEFT} {HEIGHT - _BOTTOM}H{right}"),
            *(Path("grid", f"M{_LEFT} {self.y(tick):.1f}H{right}") for tick in _ticks(*self._ys)),
        ]

    def labels(self, unit: str, last: str | None = None) -> list[Label]:
        """The numbers of both axes and the unit of x; ``last`` replaces the highest x."""
        base = HEIGHT - _BOTTOM
        below = [
            Label(
                x=round(self.x(tick), 1),
                y=base + 14,
                anchor="middle",
                text=last if last is not None and tick == self._xs[1] else f"{tick:g}",
            )
            for tick in _ticks(*self._xs)
        ]
        beside = [
            Label(x=_LEFT - 5, y=round(self.y(tick) + 3.5, 1), anchor="end", text=f"{tick:,g}")
            for tick in _ticks(*self._ys)
        ]
        return [*below, Label(x=WIDTH - _RIGHT, y=HEIGHT - 5, anchor="end", text=unit), *beside]

    def mark(self, value: float, text: str, level: int = 0) -> tuple[Path, Label]:
        """A line from top to bottom, and a text beside it; levels keep texts apart."""
        x = self.x(min(max(value, self._xs[0]), self._xs[1]))
        left = x > (_LEFT + WIDTH) / 2
        label = Label(
            x=round(x - 4 if left else x + 4, 1),
            y=_TOP - 8 + 14 * level,
            anchor="end" if left else "start",
            text=text,
            kind="mark-label",
        )
        return Path("mark", f"M{x:.1f} {_TOP - 16}V{HEIGHT - _BOTTOM}"), label


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from ``low`` to ``high``."""
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _smooth(line: Sequence[float]) -> list[tuple[float, float]]:
    """Means of equally many values each, so that few enough points are left: (step, mean)."""
    width = max(1, math.ceil(len(line) / _POINTS))
    if width == 1 and len(line) > _SMOOTHED:
        width = math.ceil(len(line) / _SMOOTHED) // 2 or 1
    points = []
    for first in range(0, len(line), width):
        part = [value for value in line[first : first + width] if math.isfinite(value)]
        if part:
            points.append((first + (len(part) + 1) / 2, sum(part) / len(part)))
    return points
