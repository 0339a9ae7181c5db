"""report.html: a sweep on one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from statistics import fmean
from typing import Any

from vlmzoo.config import SIGHT, SweepConfig, dump
from vlmzoo.evaluation.metrics import exact_match
from vlmzoo.page import page
from vlmzoo.sweeps import charts
from vlmzoo.sweeps.curves import curves
from vlmzoo.sweeps.plan import Trial
from vlmzoo.sweeps.samples import Sample, samples
from vlmzoo.sweeps.summary import Summary
from vlmzoo.sweeps.table import MEASURES, accuracy, count, duration

Row = dict[str, Any]

COSTS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("visual tokens an image", "visual_tokens", count),
    ("parameters of the connector", "trainable_parameters", count),
    ("training FLOPs", "train_flops", count),
    ("seconds a trial", "seconds", "{:g}".format),
)

MOST_NAMED = 3


def colours(trials: Sequence[Trial]) -> dict[str, int]:
    """The number of each connector's colour, by their order in the study."""
    names = dict.fromkeys(trial.connector for trial in trials if not trial.is_baseline)
    return {name: index for index, name in enumerate(names)}


def render(title: str, study: SweepConfig, trials: Sequence[Trial], summary: Summary) -> str:
    """The page as HTML."""
    rows = summary["rows"]
    connectors = [trial for trial in trials if not trial.is_baseline]
    number_of = colours(trials)
    nothing = '<p class="note">No trial has finished yet.</p>'
    return page(
        "vlmzoo.sweeps",
        "report.html",
        title=escape(title),
        facts=_facts(trials),
        finding=_finding(summary),
        warning=_warning(trials),
        accuracy=_accuracy(summary, number_of) if rows else nothing,
        measures=_measures(summary),
        table=_table(rows, number_of) if rows else nothing,
        capabilities=_capabilities(summary, number_of) if rows else nothing,
        pairs=_pairs(rows, number_of),
        costs=_costs(rows, number_of) if rows else nothing,
        curves=_curves(connectors, number_of) or nothing,
        samples=_samples(samples(trials), number_of) or nothing,
        stages=_stages(study),
        recipe=escape(dump(study)),
    )


def _facts(trials: Sequence[Trial]) -> str:
    def some(number: int, noun: str) -> str:
        return f"{number} {noun}{'' if number == 1 else 's'}"

    arms = [trial for trial in trials if not trial.is_baseline]
    connectors, seeds = {trial.connector for trial in arms}, {trial.seed for trial in arms}
    pairs = dict.fromkeys(f"{trial.encoder} → {trial.llm}" for trial in arms)
    facts = [some(len(connectors), "connector"), some(len(seeds), "seed"), some(len(trials), "trial"), *pairs]
    return " · ".join(map(escape, facts))


def _finding(summary: Summary) -> str:
    """What the intervals let one say of the best arm, and of all against the blind one."""
    rows = summary["rows"]
    if not rows:
        return "Nothing to compare yet."
    return f"{_order(rows)}{_above_blind(summary)}"


def _above_blind(summary: Summary) -> str:
    blind, rows = summary["blind"]["accuracy"], summary["rows"]
    if blind is None or any(row["ci95"] is None for row in rows):
        return ""
    by_llm = summary["blind"]["by_llm"]
    below = [_title(row, rows) for row in rows if row["ci95"][0] <= by_llm[row["llm"]]["accuracy"]]
    if below:
        return f" Not shown to use the image at all: {', '.join(below)}."
    closed = [row["gap_closed"] for row in rows if row["gap_closed"] is not None]
    gap = f" The way from there to the text oracle is closed by {_span(closed)} %." if closed else ""
    return f" Every interval lies above the {100 * blind:.1f} % that answering blind reaches.{gap}"


def _span(shares: Sequence[float]) -> str:
    low, high = (f"{100 * share:.0f}" for share in (min(shares), max(shares)))
    return low if low == high else f"{low} to {high}"


def _order(rows: Sequence[Row]) -> str:
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
    if len(level) > MOST_NAMED:
        return f"{lead}; the intervals of {len(level)} of the {len(rows) - 1} others overlap with its own."
    return f"{lead}; the intervals of {', '.join(level[:-1])} and {level[-1]} overlap with its own."


def _warning(trials: Sequence[Trial]) -> str:
    missing = [trial for trial in trials if trial.result() is None]
    if not missing:
        return ""
    named = "; ".join(escape(trial.title) for trial in missing[:MOST_NAMED])
    more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
    said = f"{len(missing)} of {len(trials)} trials have no result and are left out: {named}{more}."
    return f'<p class="warn">{said}</p>'


def _accuracy(summary: Summary, colours: dict[str, int]) -> str:
    rows = summary["rows"]
    found = [(name, summary[name]["accuracy"]) for name in SIGHT]
    marks = [charts.Mark(name, 100 * value) for name, value in found if value is not None]
    return charts.dot_plot([_estimate(row, rows, colours) for row in rows], marks)


def _estimate(row: Row, rows: Sequence[Row], colours: dict[str, int]) -> charts.Estimate:
    low, high = row["ci95"] or (None, None)
    return charts.Estimate(
        _name(row, rows),
        100 * row["accuracy"],
        None if low is None else 100 * low,
        None if high is None else 100 * high,
        colours[row["connector"]],
    )


def _measures(summary: Summary) -> str:
    """What the accuracies can be held against."""
    said = []
    if (blind := summary["blind"]["accuracy"]) is not None:
        said.append(f"<b>Blind</b> ({100 * blind:.1f} %) is the LLM trained on the same data without the images")
    if (oracle := summary["oracle"]["accuracy"]) is not None:
        said.append(f"The <b>oracle</b> ({100 * oracle:.1f} %) reads a description instead")
    if (frequent := summary["frequent"]["accuracy"]) is not None:
        said.append(f"The commonest answer of each capability is right in {100 * frequent:.1f} %")
    shuffled = [row["shuffled"] for row in summary["rows"] if row["shuffled"] is not None]
    if shuffled:
        said.append(f"With the images of other questions the connectors reach {_span(shuffled)} %")
    return " ".join(f"{sentence}." for sentence in said)


def _costs(rows: Sequence[Row], colours: dict[str, int]) -> str:
    panels = []
    for title, key, form in COSTS:
        known = [row for row in rows if row[key]]
        points = [charts.Point(row[key], _estimate(row, rows, colours)) for row in known]
        if points:
            panels.append(charts.scatter(title, points, form))
    used = list(dict.fromkeys(row["connector"] for row in rows))
    legend = charts.legend([(name, colours[name]) for name in used])
    return f'{legend}<div class="panels">{"".join(panels)}</div>'


def _samples(found: Sequence[Sample], colours: dict[str, int]) -> str:
    """Cards that can be narrowed to a capability, and to those about which connectors disagree."""
    if not found:
        return ""
    names = list(dict.fromkeys(sample.capability for sample in found))
    buttons = [f'<button data-capability="{escape(name)}">{escape(name.replace("_", " "))}</button>' for name in names]
    cards = []
    for sample in found:
        image = f'<img src="{sample.image}" alt="" loading="lazy">' if sample.image else '<p class="note">no image</p>'
        lines = []
        for arm, answer in sample.answers.items():
            right = exact_match(answer, sample.expected)
            chip = f'<b class="chip" style="{charts.colour(colours[arm])}"></b>' if arm in colours else ""
            mark, kind = ("✓", "right") if right else ("✗", "wrong")
            lines.append(
                f'<tr class="{kind}"><td>{chip}{_breakable(arm)}</td><td>{escape(answer) or "–"}</td>'
                f"<td>{mark}</td></tr>"
            )
        cards.append(
            f'<article data-capability="{escape(sample.capability)}" data-mixed="{int(sample.disagree)}">{image}'
            f"<p><b>{escape(sample.prompt.replace('<image>', '').strip())}</b><br>"
            f'<span class="part">{escape(sample.capability)}: {escape(sample.expected)}</span></p>'
            f"<table>{''.join(lines)}</table></article>"
        )
    return (
        f'<div class="filter"><button data-capability="" class="on">all</button>{"".join(buttons)}'
        f'<label><input type="checkbox" id="mixed"> only where they disagree</label></div>'
        f'<div class="cards">{"".join(cards)}</div>'
    )


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
    return f"{_breakable(row['connector'])}{below}"


def _breakable(name: str) -> str:
    return escape(name).replace("_", "_<wbr>")


def _table(rows: Sequence[Row], colours: dict[str, int]) -> str:
    def optional(value: float | None, form: str) -> str:
        return "–" if value is None else format(value, form)

    header = ["accuracy, %", "95 % interval", "gap closed", "seeds", "visual tokens", "parameters"]
    header += ["training FLOPs", "samples/s", "memory", "time"]
    lines = []
    for row in rows:
        interval = "–" if row["ci95"] is None else " – ".join(f"{100 * bound:.1f}" for bound in row["ci95"])
        memory = row["peak_memory_bytes"]
        lines.append(
            [
                f"{100 * row['accuracy']:.1f}",
                interval,
                "–" if row["gap_closed"] is None else f"{100 * row['gap_closed']:.0f} %",
                str(len(row["seeds"])),
                optional(row["visual_tokens"], ",d"),
                count(row["trainable_parameters"]),
                count(row["train_flops"]),
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


def _capabilities(summary: Summary, colours: dict[str, int]) -> str:
    rows = summary["rows"]
    names = list(rows[0]["capabilities"])
    shade = _shade([row["capabilities"][name] for row in rows for name in names])
    body = []
    for row in rows:
        cells = "".join(shade(row["capabilities"][name]) for name in names)
        body.append(f"<tr>{_chip(row, rows, colours)}{cells}</tr>")
    for baseline, label in MEASURES.items():
        if (scores := summary[baseline]["capabilities"]) is not None:
            line = "".join(f'<td class="cell">{100 * scores[name]:.0f}</td>' for name in names)
            body.append(f'<tr class="baseline"><td class="name">{label}</td>{line}</tr>')
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in names)
    return f'<table class="heat"><tr><th class="name">connector</th>{head}</tr>{"".join(body)}</table>'


def _pairs(rows: Sequence[Row], colours: dict[str, int]) -> str:
    """A section with every connector's accuracy between every encoder and LLM, where the study varies them."""
    if not rows or not _varied(rows[0], rows):
        return ""
    pairs = sorted({_varied(row, rows) for row in rows})
    arms: dict[str, dict[str, float]] = {}
    for row in rows:
        arms.setdefault(row["connector"], {})[_varied(row, rows)] = row["accuracy"]
    shade = _shade([share for arm in arms.values() for share in arm.values()], digits=1)
    body = []
    for name, arm in sorted(arms.items(), key=lambda item: -fmean(item[1].values())):
        chip = f'<b class="chip" style="{charts.colour(colours[name])}"></b>{_breakable(name)}'
        cells = "".join(shade(arm[pair]) if pair in arm else '<td class="cell">–</td>' for pair in pairs)
        mean = f"{100 * fmean(arm.values()):.1f}" if len(arm) == len(pairs) else "–"
        body.append(f'<tr><td class="name">{chip}</td>{cells}<td class="cell"><b>{mean}</b></td></tr>')
    head = "".join(f"<th>{pair.replace(' → ', ' →<br>')}</th>" for pair in [*pairs, "mean"])
    table = f'<table class="heat"><tr><th class="name">connector</th>{head}</tr>{"".join(body)}</table>'
    return (
        '<section>\n<h2>Between which encoder and LLM</h2>\n<p class="note">Accuracy in percent: does the order of the '
        f'connectors depend on what they join?</p>\n<div class="scroll sticky">{table}</div>\n</section>'
    )


def _shade(values: Sequence[float], digits: int = 0) -> Callable[[float], str]:
    """A table cell with a share in percent, the stronger in colour the larger it is among `values`."""
    low, span = min(values), max(max(values) - min(values), 1e-9)

    def cell(value: float) -> str:
        strength = 8 + 62 * (value - low) / span
        style = f"background:color-mix(in srgb, var(--good) {strength:.0f}%, var(--card))"
        return f'<td class="cell" style="{style}">{100 * value:.{digits}f}</td>'

    return cell


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
        if stage.lora is not None:
            rates += f"; LoRA of rank {stage.lora.rank}" + (f" on {stage.lora.quantize}" if stage.lora.quantize else "")
        cells = [length, str(stage.batch_size), stage.schedule, f"{100 * stage.warmup_ratio:g} %", rates]
        line = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        part = f'<span class="part">{escape(stage.data.path)}</span>'
        body.append(f'<tr><td class="name">{escape(name)}{part}</td>{line}</tr>')
    return f'<table><tr><th class="name">stage</th>{head}</tr>{"".join(body)}</table>'
