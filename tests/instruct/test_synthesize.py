"""The command: what it writes, what it refuses, and a data set that trains."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from tests.instruct import coco
from tests.instruct.server import completion, serving, turns
from vlmzoo import build
from vlmzoo.cli import main
from vlmzoo.config import DataConfig
from vlmzoo.files import held
from vlmzoo.instruct import plan
from vlmzoo.instruct.annotations import read_coco
from vlmzoo.instruct.prompts import KINDS, PromptError, described, read_prompts
from vlmzoo.world.coco import CATEGORIES, write_coco
from vlmzoo.world.datasets import examples
from vlmzoo.world.scenes import draw


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["synthesize", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("vlmzoo: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_world_becomes_a_data_set_that_is_read_as_any(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    assert main(["synthesize", "world:conversations", "--limit", "300", "--out", str(out)]) == 0
    (folder,) = (tmp_path / "cache" / "world").glob("coco-conversations-*")
    records = list(build.source(DataConfig(str(out), str(folder / "images"))))
    assert len(records) > 270
    found = json.loads(out.read_text())
    kinds = Counter(record["kind"] for record in found)
    assert kinds["complex_reasoning"] > kinds["conversation"] > kinds["detailed_description"] > 0
    assert all(record["conversations"][0]["value"].startswith("<image>\n") for record in found)
    assert len({record["id"] for record in found}) == len(found)
    rejected = out.with_suffix(".rejected.jsonl").read_text().splitlines()
    assert len(rejected) + len(found) == 300
    assert all(json.loads(line)["reason"] in ("duplicate", "near_duplicate") for line in rejected)
    before = out.read_bytes()
    assert main(["synthesize", "world:conversations", "--limit", "300", "--out", str(out)]) == 0
    assert out.read_bytes() == before
    assert len(out.with_suffix(".journal.jsonl").read_text().splitlines()) == 300


def test_the_worlds_boxes_are_where_its_objects_are(tmp_path: Path) -> None:
    """Every pixel that is far from the ground lies in a box, and every box holds some."""
    annotations = read_coco(write_coco("conversations", tmp_path, 40, 0))
    assert annotations.categories == tuple(sorted(CATEGORIES, key=CATEGORIES.index))
    for facts, (scene, _) in zip(annotations, examples("conversations", 40, 0), strict=True):
        assert [thing.category for thing in facts.things] == [item.shape for item in scene.objects]
        pixels = draw(scene).astype(int)
        ground = np.median(pixels.reshape(-1, 3), axis=0)
        coloured = abs(pixels - ground).max(2) > 50
        covered = np.zeros_like(coloured)
        for thing in facts.things:
            left, top, right, bottom = (round(value * 72) for value in thing.box)
            assert coloured[top:bottom, left:right].sum() > 0.1 * (bottom - top) * (right - left)
            covered[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = True  # soft edges
        assert not (coloured & ~covered).any()


def test_the_report_draws_boxes_on_the_image_or_on_grey(tmp_path: Path) -> None:
    assert main(["synthesize", "world:validation", "--limit", "30", "--out", str(tmp_path / "a.json")]) == 0
    page = (tmp_path / "a.report.html").read_text()
    assert "data:image/jpeg;base64," in page
    assert main(["synthesize", str(coco.write(tmp_path / "coco", 20)), "--out", str(tmp_path / "b.json")]) == 0
    page = (tmp_path / "b.report.html").read_text()
    assert "data:image" not in page
    assert '<rect x="64.0" y="96.0" width="128.0" height="288.0"' in page
    assert "http" not in page.replace("https://", "http"), "needs nothing but itself"


def test_rubbish_is_rejected_with_reasons_and_exits_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers = ["", "rubbish", "[]", '[{"question": "<b>What?</b>", "answer": "A <script> car."}]']
    with serving(lambda index, text: completion(answers[index % 4])) as server:
        options = ["--teacher", "openai", "--model", "m", "--base-url", server.url, "--proportions", "0:0:1"]
        arguments = ["synthesize", str(coco.write(tmp_path, 8)), "--out", str(tmp_path / "a.json"), *options]
        assert main(arguments) == 1
        assert len(server.asked) == 8
        assert main(arguments) == 1
        assert len(server.asked) == 8, "rubbish is an answer: it is not asked for again"
    assert json.loads((tmp_path / "a.json").read_text()) == []
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "a.rejected.jsonl").read_text().splitlines()]
    assert Counter(reasons) == {"empty": 2, "not_json": 2, "nothing_said": 2, "answer_too_short": 2}
    assert "0 of 8 accepted" in capsys.readouterr().out
    page = (tmp_path / "a.report.html").read_text()
    assert "<script>" not in page
    assert all(reason in page for reason in reasons)


def test_a_server_that_goes_away_is_one_line_and_the_journal_stays(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = coco.write(tmp_path, 8), tmp_path / "a.json"
    with serving(lambda index, text: completion(turns(index)) if index < 3 else "close") as server:
        options = ["--teacher", "openai", "--model", "m", "--base-url", server.url, "--proportions", "1:0:0"]
        options += ["--attempts", "1", "--concurrency", "1", "--out", str(out)]
        assert "no request got an answer meanwhile" in fails(capsys, str(folder), *options)
    assert len(out.with_suffix(".journal.jsonl").read_text().splitlines()) == 3
    assert not out.exists()
    assert "no connection" in fails(capsys, str(folder), *options)
    assert len(out.with_suffix(".journal.jsonl").read_text().splitlines()) == 3


def test_a_dry_run_asks_nothing_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = coco.write(tmp_path / "coco", 158), tmp_path / "out" / "a.json"
    options = ["--teacher", "openai", "--model", "m", "--price-in", "2", "--price-out", "8", "--dry-run"]
    assert main(["synthesize", str(folder), "--out", str(out), *options]) == 0
    rows = {
        line[:21].strip(): line[21:].replace(",", "").split() for line in capsys.readouterr().out.splitlines()[1:-1]
    }
    assert [int(rows[kind][0]) for kind in KINDS] == [58, 23, 77]
    requests, read, written, cost = map(float, rows["in all"])
    assert requests == 158
    assert cost == pytest.approx((2 * read + 8 * written) / 1e6, abs=0.02)
    messages = read_prompts()["conversation"].messages(read_coco(folder)[0])
    assert float(rows["conversation"][1]) == pytest.approx(58 * sum(len(m["content"]) for m in messages) / 4, rel=0.02)
    assert not out.parent.exists()


def test_short_answers_are_asked_for_in_the_first_question(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    assert main(["synthesize", "world:conversations", "--limit", "40", "--out", str(out), "--short"]) == 0
    found = json.loads(out.read_text())
    assert len(found) > 20
    for record in found:
        first, *others = (turn["value"] for turn in record["conversations"][::2])
        assert first.endswith("\nAnswer the question using a single word or phrase.")
        assert not any("single word" in question for question in others)
        assert all(len(turn["value"].split()) <= 2 for turn in record["conversations"][1::2])
        assert record["kind"] == "conversation"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["none", "--out", "a.json"], "none: no such folder"),
        (["world:conversation", "--out", "a.json"], "did you mean 'conversations'?"),
        (["x", "--out", "a.txt"], "expected a file that ends in .json"),
        (["x", "--out", "a.json", "--teacher", "opnai"], "did you mean 'openai'?"),
        (["x", "--out", "a.json", "--teacher", "openai"], "expected --model with it"),
        (["x", "--out", "a.json", "--base-url", "http://x"], "only for --teacher openai"),
        (["x", "--out", "a.json", "--proportions", "1:2"], "as in 58:23:77, got '1:2'"),
        (["x", "--out", "a.json", "--proportions", "0:0:0"], "as in 58:23:77, got '0:0:0'"),
        (["x", "--out", "a.json", "--limit", "0"], "expected a whole number above zero, got '0'"),
        (["x", "--out", "a.json", "--concurrency", "nan"], "expected a whole number above zero, got 'nan'"),
        (["COCO", "--out", "a.json", "--limit", "99"], "--limit 99: 3 images in these proportions allow at most 6"),
        (["COCO", "--out", "a.json", "--images", "none"], "--images none: no such folder"),
        (["COCO", "--out", "a.json", "--short", "--proportions", "1:1:0"], "expected --proportions 1:0:0"),
        (["COCO", "--out", "a.json", "--short", "--teacher", "openai", "--model", "m"], "only for --teacher rules"),
        (["COCO", "--out", "a.json", "--prompts", "none"], "none: no such folder of prompts"),
        (["COCO", "--out", "a.json", "--teacher", "openai", "--model", "m"], "OPENAI_API_KEY is not set"),
        (["COCO", "--out", "a.json", "--teacher", "openai", "--model", "m", "--base-url", "x"], "expected http://"),
        (["COCO", "--out", "a.json", "--teacher", "openai", "--model", "m", "--max-cost", "1"], "expected --price-in"),
        (["COCO", "--out", "a.json", "--teacher", "transformers", "--model", "./none"], "./none: cannot be loaded"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    coco.write(tmp_path / "COCO")
    assert expected in fails(capsys, *arguments)


def test_two_at_once_on_one_file_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held(tmp_path / "a.lock", wait=False):
        assert "another process is writing it" in fails(
            capsys, str(coco.write(tmp_path)), "--out", str(tmp_path / "a.json")
        )


def test_faults_of_annotations_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = coco.instances(5)
    boxes[0]["category_id"] = 77
    assert main(["synthesize", str(coco.write(tmp_path, 5, instances=boxes)), "--out", str(tmp_path / "a.json")]) == 0
    line = "1 x annotation of an unknown category, first category 77"
    assert f"left out {line}" in capsys.readouterr().err
    assert line in (tmp_path / "a.report.html").read_text()


def test_the_plan_keeps_proportions_and_asks_all_images_first() -> None:
    shares = dict(zip(KINDS, (58, 23, 77), strict=True))
    found = list(plan.requests(1580, shares, None, seed=3))
    assert Counter(kind for _, kind in found) == {kind: 10 * share for kind, share in shares.items()}
    assert len({image for image, _ in found}) == 1580
    longer = list(plan.requests(1580, shares, 3000, seed=3))
    assert longer[:1580] == found
    assert len(set(longer)) == 3000, "no image twice for one kind"
    assert list(plan.requests(1580, shares, None, seed=4)) != found


def test_prompts_are_files_that_one_may_edit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shipped = read_prompts()
    shutil.copytree(str(resources.files("vlmzoo.instruct") / "prompts"), tmp_path / "mine")
    assert read_prompts(tmp_path / "mine") == shipped
    facts = read_coco(coco.write(tmp_path / "coco", 1))[0]
    for kind, prompt in shipped.items():
        messages = prompt.messages(facts)
        assert [message["role"] for message in messages][:3] == ["system", "user", "assistant"]
        assert messages[-1] == {"role": "user", "content": described(facts)}
        assert kind == prompt.kind
    assert described(facts).splitlines()[-3:] == [
        "person: [0.1, 0.2, 0.3, 0.8]",
        "dog: [0.5, 0.5, 0.75, 0.9]",
        "frisbee: [0.6, 0.2, 0.7, 0.3]",
    ]
    file = tmp_path / "mine" / "conversation" / "system.txt"
    file.write_text("Ask only about dogs.")
    assert read_prompts(tmp_path / "mine")["conversation"].version != shipped["conversation"].version


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[", "not valid YAML"),
        ("a: 1", "expected a list of examples"),
        ("- {captions: [], objects: []}", "example 1: expected captions, objects and turns"),
        ("- {captions: x, objects: [], turns: []}", "must be lists"),
        ("- {captions: [x], objects: [dog: [1]], turns: []}", "must be texts"),
        ("- {captions: [x], objects: [], turns: [{question: a}]}", r"its turns are no answer \(not_turns\)"),
    ],
)
def test_a_broken_prompt_is_named(text: str, expected: str, tmp_path: Path) -> None:
    shutil.copytree(str(resources.files("vlmzoo.instruct") / "prompts"), tmp_path / "mine")
    (tmp_path / "mine" / "conversation" / "examples.yaml").write_text(text)
    with pytest.raises(PromptError, match=expected):
        read_prompts(tmp_path / "mine")


@pytest.mark.instruct
def test_ten_thousand_records_of_the_world(tmp_path: Path) -> None:
    out = tmp_path / "a.json"
    assert main(["synthesize", "world:conversations", "--limit", "10000", "--out", str(out)]) == 0
    (folder,) = (tmp_path / "cache" / "world").glob("coco-conversations-*")
    assert len(list(build.source(DataConfig(str(out), str(folder / "images"))))) > 9_000
    rejected = [json.loads(line)["reason"] for line in out.with_suffix(".rejected.jsonl").read_text().splitlines()]
    assert set(rejected) <= {"duplicate", "near_duplicate"}, "the gate finds nothing false in exact answers"
