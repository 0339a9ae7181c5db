"""Charts as HTML and inline SVG that stretch with the page while their text keeps its size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

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


def colour(index: int) -> str:
    return f"--colour: var(--c{index % NUM_COLOURS})"


def dot_plot(estimates: Sequence[Estimate]) -> str:
    """A row an estimate: its label, the interval with a dot on a common scale, the figure."""
    lows = [item.value if item.low is None else item.low for item in estimates]
    highs = [item.value if item.high is None else item.high for item in estimates]
    ticks = linear_ticks(min(lows), max(highs))
    first, last = ticks[0], ticks[-1]

    def place(value: float) -> float:
        return 100 * (value - first) / (last - first)

    lines = "".join(f'<i style="left:{place(tick):.2f}%"></i>' for tick in ticks)
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
    return f'<div class="dots">{"".join(rows)}{axis}</div>'


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
