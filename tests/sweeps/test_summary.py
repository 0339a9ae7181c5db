"""The summary says what the predictions say, in the form that readers rely on."""

from __future__ import annotations

import csv
import io
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.sweeps.conftest import CAPABILITIES, SKILL, make_study, write_sweep
from vlmzoo.sweeps.metrics import fraction
from vlmzoo.sweeps.summary import summarise, to_csv
from vlmzoo.sweeps.sweep import write_report
from vlmzoo.sweeps.table import WIDTH, count, duration, render

FIELDS = [
    *("connector", "encoder", "llm", "seeds", "accuracy", "ci95", "dof", "gap_closed", "capabilities"),
    *("visual_tokens", "trainable_parameters", "train_flops", "samples_per_second", "peak_memory_bytes", "seconds"),
]


def test_accuracy_is_counted_from_the_predictions(tmp_path: Path) -> None:
    trials = write_sweep(tmp_path, make_study(["mlp"], [0, 1]), num_items=20)
    (row,) = summarise(trials)["rows"]
    scores: dict[str, list[float]] = {name: [] for name in CAPABILITIES}
    for file in tmp_path.glob("trials/*/predictions/world.jsonl"):
        for line in file.read_text().splitlines():
            item = json.loads(line)
            scores[item["capability"]].append(float(item["answer"] == item["expected"]))
    assert row["capabilities"] == pytest.approx({name: np.mean(right) for name, right in scores.items()})
    assert row["accuracy"] == pytest.approx(np.mean([np.mean(right) for right in scores.values()]))
    assert row["ci95"][0] < row["accuracy"] < row["ci95"][1]


def test_the_form(tmp_path: Path) -> None:
    write_sweep(tmp_path, make_study(list(SKILL), [0, 1]))
    write_report(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == ["schema", "blind", "oracle", "rows"]
    assert summary["blind"] == {"accuracy": None, "capabilities": None}
    assert all(list(row) == FIELDS for row in summary["rows"])
    assert [row["accuracy"] for row in summary["rows"]] == sorted(
        (r["accuracy"] for r in summary["rows"]), reverse=True
    )
    assert summary["rows"][0]["seeds"] == [0, 1]
    table = list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))
    assert [float(line["accuracy"]) for line in table] == [row["accuracy"] for row in summary["rows"]]
    assert {f"capability.{name}" for name in CAPABILITIES} <= set(table[0])


def test_unfinished_trials_are_left_out_and_named(tmp_path: Path) -> None:
    trials = write_sweep(tmp_path, make_study(["mlp", "linear"], [0, 1]))
    (trials[1].folder / "result.json").unlink()
    rows = {row["connector"]: row["seeds"] for row in write_report(tmp_path)["rows"]}
    assert rows == {"mlp": [0, 1], "linear": [1]}
    assert "linear, world:clip, world:llama, seed 0" in (tmp_path / "report.html").read_text()


def test_other_questions_are_refused(tmp_path: Path) -> None:
    trials = write_sweep(tmp_path, make_study(["mlp"], [0, 1]))
    file = trials[1].folder / "predictions" / "world.jsonl"
    file.write_text("\n".join(file.read_text().splitlines()[1:]) + "\n")
    with pytest.raises(ValueError, match=f"{trials[1].hash}: was asked other questions"):
        summarise(trials)


@pytest.mark.parametrize("line", ['{"id": "x"', "[]", '{"id": "x", "capability": "rare", "score": "high"}'])
def test_a_broken_prediction_is_named(tmp_path: Path, line: str) -> None:
    (trial,) = write_sweep(tmp_path, make_study(["mlp"], [0]), num_items=1)
    file = trial.folder / "predictions" / "world.jsonl"
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"world\.jsonl:8: expected a prediction"):
        summarise([trial])


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    trials = write_sweep(tmp_path, make_study(["mlp", "linear"], [0]))
    summary = summarise(trials)
    assert [row["ci95"] for row in summary["rows"]] == [None, None]
    assert "± ?" in render(summary)
    assert write_report(tmp_path) == summary


def test_the_table_is_aligned_and_fits(tmp_path: Path) -> None:
    summary = summarise(write_sweep(tmp_path, make_study(list(SKILL), [0, 1])))
    header, rule, *lines = render(summary).splitlines()
    assert len(rule) <= WIDTH
    assert [line.split()[0] for line in lines[:5]] == [row["connector"] for row in summary["rows"]]
    assert len({len(line) for line in (header, rule, *lines[:5])}) == 1


def test_to_csv_of_nothing_is_empty() -> None:
    assert to_csv({"rows": []}).strip() == ""


def test_units() -> None:
    assert [count(number) for number in (None, 17, 4_210, 1_234_567, 7e9)] == ["–", "17", "4.21K", "1.23M", "7G"]
    assert [duration(s) for s in (None, 74.4, 600, 9000)] == ["–", "74 s", "10 min", "2.5 h"]


def test_progress_is_read_from_whole_lines_alone(tmp_path: Path) -> None:
    (trial,) = write_sweep(tmp_path, make_study(["mlp"], [0]), num_items=1)
    file = trial.folder / "metrics.jsonl"
    assert fraction(trial) == 1
    file.write_text('{"stage": "align", "step": 49, "num_steps": 100, "loss": 1.0}\n{"stage": "al')
    assert fraction(trial) == 0.25
    file.unlink()
    assert fraction(trial) == 0


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "path", "polygon", "polyline", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "polygon", "polyline"):
            assert self.open.pop() == tag


def test_the_page_needs_nothing_but_itself_and_is_well_formed(tmp_path: Path) -> None:
    study = make_study(list(SKILL), [0, 1])
    study.connectors[0].options["note"] = "<script>alert(1)</script>"
    write_sweep(tmp_path, study)
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert "<script" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert text.count('<div class="dot"') == 5
    assert text.count("<polyline") == 10
