"""Charts as SVG text: plain, small, and with words for those who do not see them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import count

_WIDTH, _HEIGHT = 400, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 18, 22, 34
_POINTS = 160  # of a curve: more cannot be seen


class Charts:
    """Makes the charts of one page: each has ids of its own."""

    def __init__(self) -> None:
        self._numbers: Iterator[int] = count(1)

    def histogram(
        self, title: str, unit: str, counts: Sequence[int], highest: float, median: float | None
    ) -> str:
        """Bars of equal width from 0 to ``highest``; the last one has what lies beyond, too."""
        total, most = sum(counts), max([*counts, 1])
        plot = _Plot((0, highest), (0, most))
        step = highest / len(counts)
        bars = "".join(
            f"M{plot.x(i * step):.1f} {plot.y(0):.1f}V{plot.y(n):.1f}"
            f"H{plot.x((i + 1) * step) - 1:.1f}V{plot.y(0):.1f}z"
            for i, n in enumerate(counts)
            if n
        )
        peak = counts.index(max(counts)) if total else 0
        words = f"{total:,} nuclei from 0 to {highest:g} {unit} and more."
        middle = ""
        if median is not None:
            words += (
                f" Median {median:.3g} {unit}; most have {peak * step:.3g} to "
                f"{(peak + 1) * step:.3g} {unit}."
            )
            middle = plot.mark(median, f"median {median:.3g}")
        inside = f'<path class="bars" d="{bars}"/>' + middle
        ticks = plot.axis_x(unit, last=f"{highest:g}+") + plot.axis_y()
        return self._svg(title, words, ticks + inside)

    def curves(
        self,
        title: str,
        unit: str,
        series: Mapping[str, Sequence[float]],
        marks: Mapping[str, float] | None = None,
    ) -> str:
        """Lines over steps 1, 2, ... of training; ``marks`` are steps worth a word."""
        values = [v for line in series.values() for v in line if math.isfinite(v)]
        steps = max([2, *map(len, series.values())])
        if not values:
            return ""
        # One wild step at the beginning must not flatten all that follows.
        ordered = sorted(values)
        low, high = ordered[len(ordered) // 200], ordered[-1 - len(ordered) // 200]
        plot = _Plot((1, steps), (min(0.0, low), max(high, low + 1e-6)))
        drawn, words = "", ""
        for i, (name, line) in enumerate(series.items()):
            smooth = _smooth(line)
            path = "".join(
                f"{'L' if k else 'M'}{plot.x(step):.1f} {plot.y(value):.1f}"
                for k, (step, value) in enumerate(smooth)
            )
            drawn += f'<path class="line line-{i}" d="{path}"/>'
            words += f"{name}: {smooth[0][1]:.3g} at first, {smooth[-1][1]:.3g} in the end. "
        for level, (words_of_mark, step) in enumerate((marks or {}).items()):
            drawn += plot.mark(step, words_of_mark, level)
            words += f"{words_of_mark} at step {step:g}. "
        svg = self._svg(title, words, plot.axis_x(unit) + plot.axis_y() + drawn)
        if len(series) == 1:
            return svg
        keys = "".join(
            f'<li><svg viewBox="0 0 18 6" width="18" height="6" aria-hidden="true">'
            f'<path class="line line-{i}" d="M0 3H18"/></svg> {escape(name)}</li>'
            for i, name in enumerate(series)
        )
        return f'{svg}<ul class="keys">{keys}</ul>'

    def _svg(self, title: str, words: str, inside: str) -> str:
        n = next(self._numbers)
        return (
            f'<svg class="chart" role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            f'aria-labelledby="chart-{n}" aria-describedby="words-{n}">'
            f'<title id="chart-{n}">{escape(title)}</title>'
            f'<desc id="words-{n}">{escape(words.strip())}</desc>{inside}</svg>'
        )


class _Plot:
    """Where values lie in the picture."""

    def __init__(self, xs: tuple[float, float], ys: tuple[float, float]) -> None:
        self._xs, self._ys = xs, ys

    def x(self, value: float) -> float:
        low, high = self._xs
        return _LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self._ys
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def axis_x(self, unit: str, last: str | None = None) -> str:
        base = _HEIGHT - _BOTTOM
        axis = f'<path class="axis" d="M{_LEFT} {base}H{_WIDTH - _RIGHT}"/>'
        high = self._xs[1]
        for tick in _ticks(*self._xs):
            text = last if last is not None and tick == high else f"{tick:g}"
            axis += (
                f'<text x="{self.x(tick):.1f}" y="{base + 14}" text-anchor="middle">{text}</text>'
            )
        return axis + (
            f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 5}" text-anchor="end">{escape(unit)}</text>'
        )

    def axis_y(self) -> str:
        return "".join(
            f'<path class="grid" d="M{_LEFT} {self.y(tick):.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text x="{_LEFT - 5}" y="{self.y(tick) + 3.5:.1f}" text-anchor="end">{tick:,g}</text>'
            for tick in _ticks(*self._ys)
        )

    def mark(self, value: float, words: str, level: int = 0) -> str:
        """A line from top to bottom, with words on the side that has room."""
        x = self.x(min(max(value, self._xs[0]), self._xs[1]))
        left = x > (_LEFT + _WIDTH) / 2
        return (
            f'<path class="mark" d="M{x:.1f} {_TOP - 16}V{_HEIGHT - _BOTTOM}"/>'
            f'<text class="said" x="{x - 4 if left else x + 4:.1f}" y="{_TOP - 8 + 14 * level}" '
            f'text-anchor="{"end" if left else "start"}">{escape(words)}</text>'
        )


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers from ``low`` to ``high``."""
    rough = (high - low) / 4
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _smooth(line: Sequence[float]) -> list[tuple[float, float]]:
    """Means of so many values each that few enough points are left: (step, mean)."""
    width = max(1, math.ceil(len(line) / _POINTS))
    if width == 1 and len(line) > 40:
        width = math.ceil(len(line) / 40) // 2 or 1
    points = []
    for first in range(0, len(line), width):
        part = [v for v in line[first : first + width] if math.isfinite(v)]
        if part:
            points.append((first + (len(part) + 1) / 2, sum(part) / len(part)))
    return points
