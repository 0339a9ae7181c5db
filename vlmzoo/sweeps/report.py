"""report.html: a sweep on one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from vlmzoo import __version__
from vlmzoo.config import SweepConfig, dump
from vlmzoo.sweeps import charts
from vlmzoo.sweeps.curves import curves
from vlmzoo.sweeps.plan import Trial
from vlmzoo.sweeps.summary import Summary
from vlmzoo.sweeps.table import accuracy, count, duration

Row = dict[str, Any]


def render(title: str, study: SweepConfig, trials: Sequence[Trial], summary: Summary) -> str:
    """The page as HTML."""
    template = Template((resources.files("vlmzoo.sweeps") / "report.html").read_text(encoding="utf-8"))
    rows = summary["rows"]
    colours = {name: index for index, name in enumerate(dict.fromkeys(trial.connector for trial in trials))}
    nothing = '<p class="note">No trial has finished yet.</p>'
    return template.substitute(
        title=escape(title),
        facts=_facts(trials),
        finding=_finding(rows),
        warning=_warning(trials),
        accuracy=_accuracy(rows, colours) if rows else nothing,
        table=_table(rows, colours) if rows else nothing,
        capabilities=_capabilities(rows, colours) if rows else nothing,
        curves=_curves(trials, colours) or nothing,
        stages=_stages(study),
        recipe=escape(dump(study)),
        version=__version__,
    )


def _facts(trials: Sequence[Trial]) -> str:
    def some(number: int, noun: str) -> str:
        return f"{number} {noun}{'' if number == 1 else 's'}"

    connectors, seeds = {trial.connector for trial in trials}, {trial.seed for trial in trials}
    pairs = dict.fromkeys(f"{trial.encoder} → {trial.llm}" for trial in trials)
    facts = [some(len(connectors), "connector"), some(len(seeds), "seed"), some(len(trials), "trial"), *pairs]
    return " · ".join(map(escape, facts))


def _finding(rows: Sequence[Row]) -> str:
    """What the intervals let one say of the best arm."""
    if not rows:
        return "Nothing to compare yet."
    best = rows[0]
    lead = f"<b>{_title(best, rows)}</b> {'leads with' if len(rows) > 1 else 'reaches'} {accuracy(best)} %"
    if len(rows) == 1:
        return f"{lead}."
    if best["ci95"] is None:
        return f"{lead}; one seed gives no interval, so nothing can be said about the order."
    level = [_title(row, rows) for row in rows[1:] if row["ci95"][1] >= best["ci95"][0]]
    if not level:
        return f"{lead}, and its interval lies above all others."
    if len(level) == 1:
        return f"{lead}; the interval of {level[0]} overlaps with its own."
    return f"{lead}; the intervals of {', '.join(level[:-1])} and {level[-1]} overlap with its own."


def _warning(trials: Sequence[Trial]) -> str:
    missing = [trial for trial in trials if trial.result() is None]
    if not missing:
        return ""
    named = "; ".join(escape(trial.title) for trial in missing)
    return f'<p class="warn">{len(missing)} of {len(trials)} trials have no result and are left out: {named}.</p>'


def _accuracy(rows: Sequence[Row], colours: dict[str, int]) -> str:
    estimates = []
    for row in rows:
        low, high = row["ci95"] or (None, None)
        estimates.append(
            charts.Estimate(
                _name(row, rows),
                100 * row["accuracy"],
                None if low is None else 100 * low,
                None if high is None else 100 * high,
                colours[row["connector"]],
            )
        )
    return charts.dot_plot(estimates)


def _varied(row: Row, rows: Sequence[Row]) -> str:
    """The encoder and the LLM of a row, where the study varies them."""
    return escape(" → ".join(row[key] for key in ("encoder", "llm") if len({other[key] for other in rows}) > 1))


def _title(row: Row, rows: Sequence[Row]) -> str:
    varied = _varied(row, rows)
    return f"{escape(row['connector'])}{f' ({varied})' if varied else ''}"


def _name(row: Row, rows: Sequence[Row]) -> str:
    """The connector, and below it what else the study varies; long names may break at their underscores."""
    varied = _varied(row, rows)
    below = f'<span class="part">{varied}</span>' if varied else ""
    return f"{escape(row['connector']).replace('_', '_<wbr>')}{below}"


def _table(rows: Sequence[Row], colours: dict[str, int]) -> str:
    def optional(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    header = ["accuracy, %", "95 % interval", "seeds", "visual tokens", "parameters", "samples/s", "memory", "time"]
    lines = []
    for row in rows:
        interval = "–" if row["ci95"] is None else " – ".join(f"{100 * bound:.1f}" for bound in row["ci95"])
        memory = row["peak_memory_bytes"]
        lines.append(
            [
                f"{100 * row['accuracy']:.1f}",
                interval,
                str(len(row["seeds"])),
                optional(row["visual_tokens"], ",d"),
                count(row["trainable_parameters"]),
                optional(row["samples_per_second"], ",.0f"),
                "–" if memory is None else f"{memory / 2**30:.2f} GiB",
                duration(row["seconds"]),
            ]
        )
    cells = ["".join(f"<td>{cell}</td>" for cell in line) for line in lines]
    names = [_chip(row, rows, colours) for row in rows]
    body = "".join(f"<tr>{name}{line}</tr>" for name, line in zip(names, cells, strict=True))
    head = "".join(f"<th>{name}</th>" for name in header)
    return f'<table><tr><th class="name">connector</th>{head}</tr>{body}</table>'


def _chip(row: Row, rows: Sequence[Row], colours: dict[str, int]) -> str:
    style = charts.colour(colours[row["connector"]])
    return f'<td class="name"><b class="chip" style="{style}"></b>{_name(row, rows)}</td>'


def _capabilities(rows: Sequence[Row], colours: dict[str, int]) -> str:
    names = list(rows[0]["capabilities"])
    values = [row["capabilities"][name] for row in rows for name in names]
    low, span = min(values), max(max(values) - min(values), 1e-9)
    body = []
    for row in rows:
        cells = []
        for name in names:
            value = row["capabilities"][name]
            strength = 8 + 62 * (value - low) / span
            shade = f"background:color-mix(in srgb, var(--heat) {strength:.0f}%, var(--card))"
            cells.append(f'<td class="cell" style="{shade}">{100 * value:.0f}</td>')
        body.append(f"<tr>{_chip(row, rows, colours)}{''.join(cells)}</tr>")
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in names)
    return f'<table class="heat"><tr><th class="name">connector</th>{head}</tr>{"".join(body)}</table>'


def _curves(trials: Sequence[Trial], colours: dict[str, int]) -> str:
    panels = []
    pairs = dict.fromkeys((trial.encoder, trial.llm) for trial in trials)
    for pair in pairs:
        of_pair = [trial for trial in trials if (trial.encoder, trial.llm) == pair]
        for stage in of_pair[0].run.stages:
            found = curves(of_pair, stage, colours)
            if found:
                title = stage if len(pairs) == 1 else f"{stage}: {' → '.join(pair)}"
                panels.append(charts.line_plot(title, found))
    if not panels:
        return ""
    return f'{charts.legend(list(colours.items()))}<div class="panels">{"".join(panels)}</div>'


def _stages(study: SweepConfig) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("length", "batch", "schedule", "warm-up", "learning rates"))
    body = []
    for name, stage in study.run.stages.items():
        length = f"{stage.steps} steps" if stage.steps is not None else f"{stage.epochs} epochs"
        rates = ", ".join(f"{part} {rate:g}" for part, rate in stage.lr.items())
        cells = [length, str(stage.batch_size), stage.schedule, f"{100 * stage.warmup_ratio:g} %", rates]
        line = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        part = f'<span class="part">{escape(stage.data.path)}</span>'
        body.append(f'<tr><td class="name">{escape(name)}{part}</td>{line}</tr>')
    return f'<table><tr><th class="name">stage</th>{head}</tr>{"".join(body)}</table>'
