"""What was accepted and why the rest was not, with samples to look at, on one page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from vlmzoo.instruct.annotations import Facts
from vlmzoo.instruct.grounding import Turn
from vlmzoo.page import page

SHOWN = 4  # samples of each kind and reason
MOST_REASONS = 12  # of which samples are shown
PICTURE = 480  # pixels a side at most
COLOURS = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """One judged answer; `reason` is None where it was accepted."""

    kind: str
    facts: Facts
    turns: Sequence[Turn]
    text: str
    reason: str | None


@dataclass
class Tally:
    """How many answers were accepted or rejected, by kind and reason, and a few of each drawn evenly from all."""

    seed: int
    faults: list[str]
    counts: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    samples: dict[tuple[str, str | None], list[Sample]] = field(default_factory=dict)
    input_tokens: int = 0
    output_tokens: int = 0

    def __post_init__(self) -> None:
        self._draw = random.Random(self.seed)

    def add(self, sample: Sample) -> None:
        group = sample.kind if sample.reason is None else "", sample.reason
        seen = sum(self.counts[kind, sample.reason] for kind in self.kinds) if sample.reason else self.counts[group]
        kept = self.samples.setdefault(group, [])
        if len(kept) < SHOWN:
            kept.append(sample)
        elif (place := self._draw.randrange(seen + 1)) < SHOWN:
            kept[place] = sample
        self.counts[sample.kind, sample.reason] += 1

    @property
    def kinds(self) -> list[str]:
        return list(dict.fromkeys(kind for kind, _ in self.counts))

    @property
    def accepted(self) -> int:
        return sum(count for (_, reason), count in self.counts.items() if reason is None)

    @property
    def total(self) -> int:
        return self.counts.total()

    @property
    def reasons(self) -> list[str]:
        """The commonest first."""
        found: Counter[str] = Counter()
        for (_, reason), count in self.counts.items():
            if reason is not None:
                found[reason] += count
        return [reason for reason, _ in found.most_common()]

    def table(self) -> str:
        """Plain text: a line a kind, with its reasons."""
        lines = []
        for kind in self.kinds:
            rows = {reason: count for (other, reason), count in self.counts.items() if other == kind}
            refused = ", ".join(f"{rows[reason]} {reason}" for reason in self.reasons if reason in rows)
            total = sum(rows.values())
            lines.append(f"{kind:<21} {rows.get(None, 0)} of {total} accepted" + (f"; {refused}" if refused else ""))
        return "\n".join(lines)


def render(title: str, teacher: str, tally: Tally, images: Path | None) -> str:
    """The page as HTML."""
    share = f"{100 * tally.accepted / tally.total:.1f} %" if tally.total else "nothing"
    accepted = "".join(_card(sample, images) for kind in tally.kinds for sample in tally.samples.get((kind, None), ()))
    rejected = "".join(
        f'<h3><code>{escape(reason)}</code></h3><div class="cards">'
        + "".join(_card(sample, images) for sample in tally.samples["", reason])
        + "</div>"
        for reason in tally.reasons[:MOST_REASONS]
    )
    nothing = '<p class="note">None.</p>'
    return page(
        "vlmzoo.instruct",
        "report.html",
        title=escape(title),
        facts=escape(
            f"{tally.total:,} answers of {teacher.split()[0]} · {tally.input_tokens:,} tokens read · "
            f"{tally.output_tokens:,} written"
        ),
        finding=f"{tally.accepted:,} of {tally.total:,} answers were accepted: {share}.",
        kinds=_kinds(tally),
        reasons=_reasons(tally) if tally.reasons else nothing,
        faults="".join(f"<li>{escape(line)}</li>" for line in tally.faults) or "<li>None.</li>",
        accepted=f'<div class="cards">{accepted}</div>' if accepted else nothing,
        rejected=rejected or nothing,
    )


def _kinds(tally: Tally) -> str:
    rows = []
    for kind in tally.kinds:
        total = sum(count for (other, _), count in tally.counts.items() if other == kind)
        share = 100 * tally.counts[kind, None] / total
        rows.append(
            f'<div class="bar"><span>{escape(_words(kind))}</span><i><b style="width:{share:.1f}%"></b></i>'
            f"<span>{tally.counts[kind, None]:,} of {total:,}</span></div>"
        )
    return "".join(rows)


def _reasons(tally: Tally) -> str:
    kinds = tally.kinds
    head = "".join(f"<th>{escape(_words(kind))}</th>" for kind in kinds)
    rows = "".join(
        f'<tr><td class="name"><code>{escape(reason)}</code></td>'
        + "".join(f"<td>{tally.counts[kind, reason]:,}</td>" for kind in kinds)
        + "</tr>"
        for reason in tally.reasons
    )
    return f'<div class="scroll"><table><tr><th class="name">reason</th>{head}</tr>{rows}</table></div>'


def _card(sample: Sample, images: Path | None) -> str:
    said = "".join(
        f'<p class="ask">{escape(question)}</p><p class="say">{escape(answer)}</p>' for question, answer in sample.turns
    )
    if not sample.turns:
        text = sample.text[:400] + ("…" if len(sample.text) > 400 else "")
        said = f"<pre>{escape(text) or '(nothing)'}</pre>"
    captions = "".join(f"<li>{escape(caption)}</li>" for caption in sample.facts.captions)
    return (
        f'<article>{_picture(sample.facts, images)}<div class="text">'
        f'<span class="kind">{escape(_words(sample.kind))} · image {sample.facts.id}</span>'
        f"{said}<details><summary>its captions</summary><ul>{captions}</ul></details></div></article>"
    )


def _picture(facts: Facts, images: Path | None) -> str:
    """The image, or grey in its place, with its boxes."""
    width, height = facts.size
    unit = max(width, height) / 100  # so that lines and letters are as large in every picture
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="image {facts.id} with its boxes">']
    parts.append(f'<rect class="ground" width="{width}" height="{height}"/>')
    if (uri := _thumbnail(facts, images)) is not None:
        parts.append(f'<image href="{uri}" width="{width}" height="{height}" preserveAspectRatio="none"/>')
    names = list(dict.fromkeys(thing.category for thing in facts.things))
    for thing in facts.things:
        left, top, right, bottom = (value * (width, height)[axis % 2] for axis, value in enumerate(thing.box))
        colour = f"var(--c{names.index(thing.category) % COLOURS})"
        dashes = f' stroke-dasharray="{2 * unit:.2f}"' if thing.crowd else ""
        parts.append(
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" fill="none" '
            f'stroke="{colour}" stroke-width="{0.8 * unit:.2f}"{dashes}/>'
        )
        below = top + 4.6 * unit if top < 5 * unit else top - 1.2 * unit
        inset = 1 * unit if top < 5 * unit else 0
        parts.append(
            f'<text x="{left + inset:.1f}" y="{below:.1f}" font-size="{4.4 * unit:.2f}" fill="{colour}" '
            f'stroke-width="{0.9 * unit:.2f}">{escape(thing.category)}</text>'
        )
    return "".join(parts) + "</svg>"


def _thumbnail(facts: Facts, images: Path | None) -> str | None:
    if images is None:
        return None
    from vlmzoo.data.images import ImageError, image_path, load_image  # takes a second: PyTorch

    try:
        image = load_image(image_path(images.resolve(), facts.file_name, "report"))
    except ImageError:  # the page shows grey: image files need not be there
        return None
    image.thumbnail((PICTURE, PICTURE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _words(kind: str) -> str:
    return kind.replace("_", " ")
