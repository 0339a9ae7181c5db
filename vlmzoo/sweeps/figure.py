"""figure.svg: every arm's accuracy with its interval as one picture, for a README or a paper."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from vlmzoo.sweeps.charts import linear_ticks
from vlmzoo.sweeps.table import MEASURES, accuracy

WIDTH, LABELS, VALUES = 820, 250, 100  # pixels: the picture, its left column, its right one
ROW, TOP, BOTTOM = 34, 46, 34
COLOURS = ("#2a6fbb", "#d2622b", "#2f8f5b", "#8a56b8", "#b08300", "#c43d74", "#2792a3", "#6f6f6f")  # report.html's
STYLE = """
text { font: 14px system-ui, "Segoe UI", Roboto, sans-serif; fill: #1d2126; }
.soft { fill: #5d6670; font-size: 12px; } .grid { stroke: #ecece8; } .mark { stroke: #5d6670; stroke-dasharray: 4 4; }
.value { text-anchor: end; font-variant-numeric: tabular-nums; } .middle { text-anchor: middle; }
@media (prefers-color-scheme: dark) {
  text { fill: #e9ebec; } .soft { fill: #9aa4ad; } .grid { stroke: #282d32; } .mark { stroke: #9aa4ad; }
}
"""


def render(summary: dict[str, Any], colours: Mapping[str, int]) -> str:
    """The picture as SVG; connectors in the order of the rows, each in its colour; blind and oracle as lines."""
    rows = summary["rows"]
    marks = {MEASURES[name]: summary[name]["accuracy"] for name in ("blind", "oracle")}
    marks = {label: 100 * value for label, value in marks.items() if value is not None}
    ends = [100 * bound for row in rows for bound in (row["ci95"] or [row["accuracy"]])]
    ticks = linear_ticks(min([*ends, *marks.values()], default=0), max([*ends, *marks.values()], default=100))
    bottom = TOP + ROW * len(rows)

    def x(percent: float) -> float:
        return LABELS + (WIDTH - LABELS - VALUES) * (percent - ticks[0]) / (ticks[-1] - ticks[0])

    drawn = [f'<path class="grid" d="M{x(tick):.1f} {TOP}V{bottom}"/>' for tick in ticks]
    drawn += [f'<text class="soft middle" x="{x(tick):.1f}" y="{bottom + 20}">{tick:g} %</text>' for tick in ticks]
    for label, value in marks.items():
        drawn.append(f'<path class="mark" d="M{x(value):.1f} {TOP - 6}V{bottom}"/>')
        drawn.append(f'<text class="soft middle" x="{x(value):.1f}" y="{TOP - 14}">{label} {value:.1f}</text>')
    for number, row in enumerate(rows):
        colour = COLOURS[colours[row["connector"]] % len(COLOURS)]
        y = TOP + ROW * (number + 0.5)
        parts = [row[key] for key in ("encoder", "llm") if len({other[key] for other in rows}) > 1]
        varied = f' <tspan class="soft">{escape(" → ".join(parts).replace("world:", ""))}</tspan>' if parts else ""
        drawn.append(f'<text x="0" y="{y + 5:.1f}">{escape(row["connector"])}{varied}</text>')
        if row["ci95"] is not None:
            low, high = (x(100 * bound) for bound in row["ci95"])
            drawn.append(
                f'<path d="M{low:.1f} {y}H{high:.1f}" stroke="{colour}" stroke-width="9" stroke-linecap="round" '
                f'opacity=".35"/>'
            )
        drawn.append(f'<circle cx="{x(100 * row["accuracy"]):.1f}" cy="{y}" r="6" fill="{colour}"/>')
        drawn.append(f'<text class="value" x="{WIDTH}" y="{y + 5:.1f}">{accuracy(row)}</text>')
    height = bottom + BOTTOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" aria-label="accuracy of every connector with its 95 % interval"><style>{STYLE}</style>'
        f"{''.join(drawn)}</svg>\n"
    )
