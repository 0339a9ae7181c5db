"""The summary says what the predictions say, in the form that readers rely on."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.sweeps.conftest import CAPABILITIES, SKILL, make_study, write_sweep
from vlmzoo.sweeps.metrics import fraction
from vlmzoo.sweeps.plan import plan
from vlmzoo.sweeps.samples import samples
from vlmzoo.sweeps.summary import refuse_other_worlds, summarise, to_csv
from vlmzoo.sweeps.sweep import write_report
from vlmzoo.sweeps.table import WIDTH, count, duration, render
from vlmzoo.world.datasets import examples
from vlmzoo.world.scenes import draw

FIELDS = [
    *("connector", "encoder", "llm", "seeds", "accuracy", "ci95", "dof", "gap_closed", "shuffled", "capabilities"),
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
    assert list(summary) == ["schema", "blind", "oracle", "frequent", "rows"]
    assert summary["blind"] == {"accuracy": None, "capabilities": None}
    assert all(row["gap_closed"] is None for row in summary["rows"])
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
    text = (tmp_path / "report.html").read_text()
    assert "1 of 4 trials have no result and are left out: linear, world:clip, world:llama, seed 0." in text


def test_a_summary_whose_trials_are_elsewhere_is_kept(tmp_path: Path) -> None:
    write_sweep(tmp_path, make_study(["mlp"], [0]))
    write_report(tmp_path)
    kept = (tmp_path / "summary.json").read_bytes()
    shutil.rmtree(tmp_path / "trials")
    with pytest.raises(ValueError, match=r"trials: is not there; summary\.json, which came from it, stays as it is"):
        write_report(tmp_path)
    assert (tmp_path / "summary.json").read_bytes() == kept


def test_many_unfinished_trials_are_counted(tmp_path: Path) -> None:
    trials = write_sweep(tmp_path, make_study(["mlp"], list(range(6))))
    for trial in trials[1:]:
        (trial.folder / "result.json").unlink()
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "5 of 6 trials" in text
    assert "seed 3 and 2 more." in text


def test_rows_are_held_against_their_llms_own_baselines(tmp_path: Path) -> None:
    llms = ["world:llama", "world:qwen"]
    study = make_study(["mlp", "linear"], [0, 1, 2], baselines=["blind", "oracle"], llms=llms)
    summary = summarise(write_sweep(tmp_path, study))
    assert len(summary["rows"]) == 4
    for name, skill in (("blind", 0.3), ("oracle", 0.9)):
        assert summary[name]["accuracy"] == pytest.approx(skill, abs=0.04)
        assert list(summary[name]["by_llm"]) == llms
        assert summary[name]["accuracy"] == pytest.approx(
            np.mean([a["accuracy"] for a in summary[name]["by_llm"].values()])
        )
        assert list(summary[name]["capabilities"]) == list(CAPABILITIES)
    for row in summary["rows"]:
        blind, oracle = (summary[name]["by_llm"][row["llm"]]["accuracy"] for name in ("blind", "oracle"))
        assert row["gap_closed"] == pytest.approx((row["accuracy"] - blind) / (oracle - blind))
        assert row["shuffled"] == pytest.approx(0.31)


def test_baselines_do_not_change_the_connectors_intervals(tmp_path: Path) -> None:
    bare = summarise(write_sweep(tmp_path / "bare", make_study(["mlp", "linear"], [0, 1])))
    study = make_study(["mlp", "linear"], [0, 1], baselines=["blind", "oracle"])
    beside = summarise(write_sweep(tmp_path / "beside", study))
    assert [row["ci95"] for row in bare["rows"]] == [row["ci95"] for row in beside["rows"]]


def test_the_commonest_answer_is_counted_from_what_is_right(tmp_path: Path) -> None:
    (trial,) = write_sweep(tmp_path, make_study(["mlp"], [0]), num_items=1)
    answers = {"count": ["2", "2.", "3", "2"], "read": ["7", "9"]}
    items = [
        {"id": f"{name}{index}", "capability": name, "expected": text, "score": 0}
        for name, texts in answers.items()
        for index, text in enumerate(texts)
    ]
    (trial.folder / "predictions" / "world.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    frequent = summarise([trial])["frequent"]
    assert frequent == {"accuracy": 0.625, "capabilities": {"count": 0.75, "read": 0.5}}


def test_results_from_another_world_are_refused_in_one_table(tmp_path: Path) -> None:
    trials = write_sweep(tmp_path, make_study(["mlp"], [0, 1]))
    file = trials[1].folder / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "world": 1}))
    with pytest.raises(ValueError, match=f"{trials[1].hash}: comes from version 1 of the embedded world, expected 2"):
        summarise(trials)
    with pytest.raises(ValueError, match="comes from version 1"):
        refuse_other_worlds(trials[1:], version=2)
    summarise(trials[1:])  # by itself it can still be read


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
    study = make_study(list(SKILL), [0, 1], baselines=["blind", "oracle"])
    summary = summarise(write_sweep(tmp_path, study))
    header, rule, *lines = render(summary).splitlines()
    assert len(rule) <= WIDTH
    assert [line.split()[0] for line in lines[:5]] == [row["connector"] for row in summary["rows"]]
    assert len({len(line) for line in (header, rule, *lines[:5])}) == 1
    measures = {line[:15].strip(): line for line in lines[5:8]}
    assert list(measures) == ["text oracle", "blind", "commonest answe"]
    width = len("gated_cross_attention")
    for name, line in zip(("oracle", "blind", "frequent"), measures.values(), strict=True):
        assert line[width:].split()[0] == f"{100 * summary[name]['accuracy']:.1f}"


def test_a_study_of_several_encoders_and_llms_fits_too(tmp_path: Path) -> None:
    parts = {"encoders": ["world:clip", "world:siglip"], "llms": ["world:llama", "world:qwen"]}
    study = make_study(list(SKILL), [0, 1], baselines=["blind", "oracle"], **parts)
    summary = summarise(write_sweep(tmp_path, study))
    header, rule, *lines = render(summary).splitlines()
    assert len(rule) <= WIDTH
    assert header.split()[:4] == ["connector", "encoder", "llm", "accuracy"]
    pairs = {tuple(line.split()[1:3]) for line in lines[:20]}
    assert pairs == {(encoder, llm) for encoder in ("clip", "siglip") for llm in ("llama", "qwen")}
    for line, row in zip(lines, summary["rows"], strict=False):
        cells = line.split()
        assert [cells[0], cells[3]] == [row["connector"], f"{100 * row['accuracy']:.1f}"]
        assert cells[7 : 7 + len(CAPABILITIES)] == [f"{100 * row['capabilities'][name]:.0f}" for name in CAPABILITIES]


def test_the_page_holds_connectors_against_encoders_and_llms(tmp_path: Path) -> None:
    study = make_study(["mlp", "linear"], [0, 1], llms=["world:llama", "world:qwen"])
    summary = summarise(write_sweep(tmp_path, study))
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    _, _, table = text.partition("Between which encoder and LLM")
    table = table.partition("</section>")[0]
    for connector in ("mlp", "linear"):
        found = {row["llm"]: row["accuracy"] for row in summary["rows"] if row["connector"] == connector}
        cells = re.findall(r">([\d.]+)<", table.partition(f"</b>{connector}<")[2].partition("</tr>")[0])
        figures = [found["world:llama"], found["world:qwen"], np.mean(list(found.values()))]
        assert cells == [f"{100 * figure:.1f}" for figure in figures]
    write_sweep(tmp_path / "one", make_study(["mlp"], [0, 1]))
    write_report(tmp_path / "one")
    assert "Between which" not in (tmp_path / "one" / "report.html").read_text()


def test_the_pages_first_sentence_names_few(tmp_path: Path) -> None:
    study = make_study(["mlp"], [0, 1], encoders=["world:clip", "world:siglip"], llms=["world:llama", "world:qwen"])
    write_sweep(tmp_path, study)  # the same skill: all four intervals overlap
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "the intervals of mlp (" in text
    study = make_study(["mlp"], [0, 1], encoders=["world:clip", "world:siglip"], llms=list("abc"))
    write_sweep(tmp_path, study)
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "the intervals of 5 of the 5 others overlap with its own" in text


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
        self.links += [value or "" for name, value in attrs if name in ("src", "href") and "data:" not in str(value)]
        if tag not in ("br", "img", "input", "meta", "path", "polygon", "polyline", "wbr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("path", "polygon", "polyline"):
            assert self.open.pop() == tag


def test_the_page_needs_nothing_but_itself_and_is_well_formed(tmp_path: Path) -> None:
    study = make_study(list(SKILL), [0, 1], baselines=["blind", "oracle"])
    study.connectors[0].options["note"] = "<script>alert(1)</script>"
    for trial in write_sweep(tmp_path, study):
        file = trial.folder / "predictions" / "world.jsonl"
        file.write_text(file.read_text().replace("How many?", "<script>alert(2)</script>"))
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.links == []
    assert text.count("<script") == 1
    assert "alert" not in text.partition("<script")[2].partition("</script")[0]
    assert "url(" not in text
    assert "@import" not in text
    assert text.count('<div class="dot"') == 5
    assert text.count('<b class="dot"') == 4 * 5  # tokens, parameters, FLOPs, seconds
    assert text.count("<polyline") == 10
    assert text.count("<article") == 8 * len(CAPABILITIES)


def test_samples_show_where_connectors_disagree(tmp_path: Path) -> None:
    study = make_study(list(SKILL), [0, 1], baselines=["blind", "oracle"])
    trials = write_sweep(tmp_path, study)
    found = samples(trials)
    for name in CAPABILITIES:
        of_capability = [sample for sample in found if sample.capability == name]
        assert len(of_capability) == 8
        assert sum(sample.disagree for sample in of_capability) >= 4
    assert all(list(sample.answers) == [*SKILL, "blind", "oracle"] for sample in found)
    assert samples(plan(make_study(["mlp"], [7]), tmp_path)) == []  # nothing has finished


def test_samples_show_the_image_that_was_asked_about(tmp_path: Path) -> None:
    (trial,) = write_sweep(tmp_path, make_study(["mlp"], [0]), num_items=1)
    file = trial.folder / "predictions" / "world.jsonl"
    item = {"id": "questions-000003", "capability": "spatial", "prompt": "", "answer": "", "expected": "x", "score": 0}
    file.write_text(json.dumps(item) + "\n")
    (sample,) = samples([trial])
    assert sample.image is not None
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(sample.image.partition(",")[2]))))
    *_, (scene, _) = examples("questions", 4, seed=0)
    assert np.abs(shown.astype(int) - draw(scene)).mean() < 6  # JPEG
