"""Charts as HTML and inline SVG that stretch with the page while their text keeps its size."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape, unescape

NUM_COLOURS = 8  # --c0 … --c7 in report.html


@dataclass(frozen=True)
class Estimate:
    """A value with its interval, all in percent."""

    label: str  # HTML
    value: float
    low: float | None
    high: float | None
    colour: int


@dataclass(frozen=True)
class Curve:
    """One line with its band; the values are positive, the steps ascend."""

    label: str
    steps: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]
    colour: int


@dataclass(frozen=True)
class Point:
    """An estimate at a cost; the cost is positive."""

    cost: float
    estimate: Estimate


@dataclass(frozen=True)
class Mark:
    """A value that all estimates are held against, in percent."""

    label: str
    value: float


def colour(index: int) -> str:
    return f"--colour: var(--c{index % NUM_COLOURS})"


def _ends(estimates: Sequence[Estimate], marks: Sequence[Mark] = ()) -> tuple[float, float]:
    """The lowest and the highest value of intervals and marks."""
    lows = [item.value if item.low is None else item.low for item in estimates]
    highs = [item.value if item.high is None else item.high for item in estimates]
    values = [mark.value for mark in marks]
    return min([*lows, *values]), max([*highs, *values])


def dot_plot(estimates: Sequence[Estimate], marks: Sequence[Mark] = ()) -> str:
    """A row an estimate: its label, the interval with a dot on a common scale, the figure; marks are lines."""
    ticks = linear_ticks(*_ends(estimates, marks))
    first, last = ticks[0], ticks[-1]

    def place(value: float) -> float:
        return 100 * (value - first) / (last - first)

    lines = "".join(f'<i style="left:{place(tick):.2f}%"></i>' for tick in ticks)
    lines += "".join(f'<i class="mark" style="left:{place(mark.value):.2f}%"></i>' for mark in marks)
    named = "".join(
        f'<span style="left:{place(mark.value):.2f}%">{escape(mark.label)}<br>{mark.value:.1f}</span>' for mark in marks
    )
    head = f'<div class="blank"></div><div class="marks">{named}</div><div class="blank"></div>' if marks else ""
    rows = []
    for item in estimates:
        span, half = "", ""
        if item.low is not None and item.high is not None:
            left, right = place(item.low), place(item.high)
            span = f'<div class="span" style="left:{left:.2f}%;width:{right - left:.2f}%"></div>'
            half = f" ± {max(item.high - item.value, item.value - item.low):.1f}"
        rows.append(
            f'<div class="label">{item.label}</div>'
            f'<div class="track" style="{colour(item.colour)}">{lines}{span}'
            f'<div class="dot" style="left:{place(item.value):.2f}%"></div></div>'
            f'<div class="value">{item.value:.1f}{half}</div>'
        )
    labels = "".join(f'<span style="left:{place(tick):.2f}%">{tick:g} %</span>' for tick in ticks)
    axis = f'<div class="blank"></div><div class="axis">{labels}</div><div class="blank"></div>'
    return f'<div class="dots">{head}{"".join(rows)}{axis}</div>'


def scatter(title: str, points: Sequence[Point], form: Callable[[float], str]) -> str:
    """Values with their intervals over a logarithmic axis of costs, which `form` writes."""
    ticks = linear_ticks(*_ends([point.estimate for point in points]))
    bottom, top = ticks[0], ticks[-1]
    costs = [point.cost for point in points]
    left, right = min(costs) / 1.35, max(costs) * 1.35

    def x(cost: float) -> float:
        return 100 * math.log(cost / left) / math.log(right / left)

    def y(value: float) -> float:
        return 100 * (top - value) / (top - bottom)

    drawn = [f'<path d="M0 {y(tick):.2f}H100" stroke="var(--grid)"/>' for tick in ticks]
    dots = []
    for point in points:
        item, place = point.estimate, x(point.cost)
        if item.low is not None and item.high is not None:
            drawn.append(
                f'<path d="M{place:.2f} {y(item.low):.2f}V{y(item.high):.2f}" stroke="var(--colour)" '
                f'stroke-width="6" stroke-linecap="round" opacity=".3" style="{colour(item.colour)}"/>'
            )
        name = f"{plain(item.label)}: {item.value:.1f} % at {form(point.cost)}"
        dots.append(
            f'<b class="dot" title="{escape(name)}" '
            f'style="left:{place:.2f}%;top:{y(item.value):.2f}%;{colour(item.colour)}"></b>'
        )
    names = ", ".join(plain(point.estimate.label) for point in points)
    svg = (
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(f"{title}: accuracy of {names}")}">{"".join(drawn)}</svg>'
    )
    marks = [f'<span class="y" style="top:{y(tick):.2f}%">{tick:g}</span>' for tick in ticks]
    costs_at = apart([tick for tick in log_ticks(left, right) if left <= tick <= right], x)
    marks += [f'<span class="x" style="left:{x(tick):.2f}%">{form(tick)}</span>' for tick in costs_at]
    inside = f"{svg}{''.join(dots)}{''.join(marks)}"
    return f'<div><h3>{escape(title)}</h3><div class="plot">{inside}</div><p class="under">&nbsp;</p></div>'


def plain(label: str) -> str:
    """The text of an HTML label."""
    return unescape(re.sub("<[^>]+>", " ", label.replace("<wbr>", "")))


def apart(ticks: Sequence[float], place: Callable[[float], float], least: float = 14.0) -> list[float]:
    """The ticks whose places are at least so many percent from the one before."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or place(tick) - place(kept[-1]) >= least:
            kept.append(tick)
    return kept


def line_plot(title: str, curves: Sequence[Curve]) -> str:
    """Curves over steps on a logarithmic axis, each with its band."""
    lows = [value for curve in curves for value in curve.low]
    highs = [value for curve in curves for value in curve.high]
    bottom, top = min(lows), max(highs)
    bottom, top = bottom / 1.05, top * 1.05
    last = max(curve.steps[-1] for curve in curves)

    def x(step: float) -> float:
        return 100 * step / last

    def y(value: float) -> float:
        return 100 * math.log(top / value) / math.log(top / bottom)

    def points(steps: Sequence[float], values: Sequence[float]) -> str:
        return " ".join(f"{x(step):.2f},{y(value):.2f}" for step, value in zip(steps, values, strict=True))

    ticks = [tick for tick in log_ticks(bottom, top) if bottom <= tick <= top]
    steps = [tick for tick in linear_ticks(0, last) if tick <= 1.02 * last]  # a curve ends half a span early
    drawn = [f'<path d="M0 {y(tick):.2f}H100" stroke="var(--grid)"/>' for tick in ticks]
    for curve in curves:
        around = f"{points(curve.steps, curve.high)} {points(curve.steps[::-1], curve.low[::-1])}"
        drawn.append(f'<polygon points="{around}" fill="var(--colour)" opacity=".15" style="{colour(curve.colour)}"/>')
    for curve in curves:
        drawn.append(
            f'<polyline points="{points(curve.steps, curve.mean)}" fill="none" stroke="var(--colour)" '
            f'stroke-width="2" stroke-linejoin="round" style="{colour(curve.colour)}"/>'
        )
    names = ", ".join(curve.label for curve in curves)
    svg = (
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(f"{title}: loss by step of {names}")}">{"".join(drawn)}</svg>'
    )
    marks = [f'<span class="y" style="top:{y(tick):.2f}%">{tick:g}</span>' for tick in ticks]
    marks += [f'<span class="x" style="left:{x(tick):.2f}%">{tick:g}</span>' for tick in steps]
    return f'<div><h3>{escape(title)}</h3><div class="plot">{svg}{"".join(marks)}</div><p class="under">step</p></div>'


def legend(labels: Sequence[tuple[str, int]]) -> str:
    chips = [f'<span><b class="chip" style="{colour(index)}"></b>{escape(label)}</span>' for label, index in labels]
    return f'<div class="legend">{"".join(chips)}</div>'


def linear_ticks(low: float, high: float) -> list[float]:
    """Three to seven round values; the first is at most `low`, the last at least `high`."""
    span = max(high - low, 1e-6)
    power = 10.0 ** math.floor(math.log10(span))
    step = next(step for step in (power * 0.2, power * 0.5, power, power * 2, power * 5) if span / step <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 10) for index in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Values 1, 2 and 5 of each power of ten around a range; more of them where it is short."""
    digits = (1, 2, 5) if high / low > 10 else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [round(digit * 10.0**power, 10) for power in powers for digit in digits]
