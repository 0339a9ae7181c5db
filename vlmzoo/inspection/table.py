"""A report as text and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from vlmzoo.inspection.check import Finding, Report

SHOWN = 3  # findings of a kind that are named
LONGEST = 240  # characters of a message


def render(report: Report) -> str:
    """The findings by kind with the first few of each, then how long the records are."""
    errors = _records(report, "error")
    lines = [
        f"{report.name}: {report.records:,} records, {report.images:,} images; "
        f"{errors:,} with errors, {_records(report, 'warning'):,} with warnings"
    ]
    for kind, found in _by_kind(report.findings).items():
        lines.append(f"  {found[0].severity:<8} {kind:<18} {len(found):>9,}")
        lines += [f"      {_short(finding.message)}" for finding in found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"      and {len(found) - SHOWN:,} more")
    for name, measures in statistics(report).items():
        figures = ", ".join(f"{key} {_figure(key, value)}" for key, value in measures.items())
        lines.append(f"  {name}: {figures}")
    if report.max_length is not None and not report.images_counted and report.images:
        lines.append("  an image counts as one token: name an --encoder")
    return "\n".join(lines)


def document(report: Report) -> dict[str, Any]:
    """The report as one JSON document."""
    kinds = {kind: len(found) for kind, found in _by_kind(report.findings).items()}
    return {
        "data": report.name,
        "records": report.records,
        "images": report.images,
        "faulty": report.faulty,
        "kinds": kinds,
        "statistics": statistics(report),
        "findings": [asdict(finding) for finding in report.findings],
    }


def statistics(report: Report) -> dict[str, dict[str, float]]:
    """How many words, tokens and targets a record has; the share that is longer than `max_length`."""
    found = {}
    for name in ("words", "tokens", "targets"):
        values = np.asarray(getattr(report, name))
        if len(values):
            p50, p95 = np.percentile(values, [50, 95])
            found[name] = {
                "min": int(values.min()),
                "median": float(p50),
                "p95": float(p95),
                "max": int(values.max()),
                "sum": int(values.sum()),
            }
    if "tokens" in found and report.max_length is not None:
        share = float((np.asarray(report.tokens) > report.max_length).mean())
        found["tokens"] |= {"max_length": report.max_length, "truncated": share}
    return found


def _by_kind(findings: Sequence[Finding]) -> dict[str, list[Finding]]:
    """Errors first, then by number and name."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.kind, []).append(finding)
    return dict(sorted(groups.items(), key=lambda item: (item[1][0].severity, -len(item[1]), item[0])))


def _records(report: Report, severity: str) -> int:
    return len({finding.index for finding in report.findings if finding.severity == severity} - {None})


def _short(message: str) -> str:
    message = " ".join(message.split())
    return message if len(message) <= LONGEST else f"{message[: LONGEST - 1]}…"


def _figure(name: str, value: float) -> str:
    return f"{value:.1%}" if name == "truncated" else f"{value:,.0f}"
