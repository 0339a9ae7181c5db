"""The comparison as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

WIDTH = 110
MEASURES = {"oracle": "text oracle", "blind": "blind", "frequent": "commonest answer"}
"""What connectors are held against, by its name in the summary."""
SHORTEST_HEADER = 4
COSTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "tokens": lambda row: "–" if row["visual_tokens"] is None else str(row["visual_tokens"]),
    "params": lambda row: count(row["trainable_parameters"]),
    "time": lambda row: duration(row["seconds"]),
}
"""The last columns, by their headers: visual tokens, the connector's parameters, seconds a trial."""


def render(summary: dict[str, Any]) -> str:
    """The rows of a summary, aligned, best first; names of capabilities are cut, then costs left out, to fit."""
    rows = summary["rows"]
    if not rows:
        return "no trial has finished yet"
    same = {key: len({row[key] for row in rows}) == 1 for key in ("encoder", "llm")}
    parts = [key for key in same if not same[key]]
    longest = max(map(len, [*rows[0]["capabilities"], "x" * SHORTEST_HEADER]))
    layouts = [(length, len(COSTS)) for length in range(longest, SHORTEST_HEADER, -1)]
    layouts += [(SHORTEST_HEADER, num_costs) for num_costs in range(len(COSTS), -1, -1)]
    table = ""
    for length, num_costs in layouts:
        table = _table(summary, length, list(COSTS)[:num_costs], parts)
        if len(table.splitlines()[1]) <= WIDTH:
            break
    common = ", ".join(str(rows[0][key]) for key in same if same[key])
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    plural = "seeds" if len(seeds) > 1 else "seed"
    note = f"accuracy in % ± 95 % interval; {plural} {', '.join(map(str, seeds))}"
    if any(row["gap_closed"] is not None for row in rows):
        note = f"gap: how much of the way from blind to oracle, in %; {note}"
    return f"{table}\n{note}{f'; {common}' if common else ''}"


def _table(summary: dict[str, Any], length: int, costs: Sequence[str], parts: Sequence[str]) -> str:
    """Connectors, best first; below them what they are held against."""
    rows = summary["rows"]
    capabilities = list(rows[0]["capabilities"])
    gap = any(row["gap_closed"] is not None for row in rows)
    header = ["connector", *parts, "accuracy", *(["gap"] if gap else []), *(name[:length] for name in capabilities)]
    lines = [
        [
            row["connector"],
            *(row[part].removeprefix("world:") for part in parts),
            accuracy(row),
            *(["–" if row["gap_closed"] is None else f"{100 * row['gap_closed']:.0f}"] if gap else []),
            *(f"{100 * row['capabilities'][name]:.0f}" for name in capabilities),
            *(COSTS[cost](row) for cost in costs),
        ]
        for row in rows
    ]
    for name, label in MEASURES.items():
        if (found := summary[name])["accuracy"] is not None:
            scores = [f"{100 * found['capabilities'][capability]:.0f}" for capability in capabilities]
            mean = f"{100 * found['accuracy']:.1f}".ljust(len(lines[0][1 + len(parts)]))
            lines.append([label, *[""] * len(parts), mean, *([""] if gap else []), *scores, *[""] * len(costs)])
    return align([*header, *costs], lines, num_left=1 + len(parts))


def align(header: Sequence[str], rows: Sequence[Sequence[str]], *, num_left: int) -> str:
    """Columns as wide as their widest cell: the first `num_left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        sides = "<" * num_left + ">" * (len(cells) - num_left)
        parts = [f"{cell:{side}{width}}" for cell, side, width in zip(cells, sides, widths, strict=True)]
        return "  ".join(parts).rstrip()

    rule = "─" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(header), rule, *map(line, rows)])


def accuracy(row: dict[str, Any]) -> str:
    """`61.3 ± 2.1`, in percent; without the interval where there is none."""
    text = f"{100 * row['accuracy']:.1f}"
    if row["ci95"] is None:
        return f"{text} ± ?"
    low, high = row["ci95"]
    return f"{text} ± {100 * max(high - row['accuracy'], row['accuracy'] - low):.1f}"


def count(number: float | None) -> str:
    """`1.2M`: three digits and a unit."""
    if number is None:
        return "–"
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.0f}"


def duration(seconds: float | None) -> str:
    """`74 s`, `12 min`, `3.5 h`."""
    if seconds is None:
        return "–"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
