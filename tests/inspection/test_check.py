"""Everything that is wrong with a data set is found, each with its record, whatever the number of workers."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from PIL import Image

from tests.inspection.conftest import FOUND, MAX_LENGTH, RECORDS, WARNINGS, record
from vlmzoo.config import DataConfig
from vlmzoo.data.records import RecordError
from vlmzoo.inspection import check as checking
from vlmzoo.inspection.check import Report, check
from vlmzoo.inspection.subject import Subject, of_data, of_run
from vlmzoo.inspection.table import document, render, statistics


def subject(data: Path, encoder: str | None = "world:clip") -> Subject:
    (found,) = of_data(DataConfig(str(data), max_length=MAX_LENGTH), llm="world:llama", encoder=encoder)
    return found


def kinds(report: Report) -> list[tuple[int | None, str]]:
    return [(finding.index, finding.kind) for finding in report.findings]


def test_every_fault_is_found_with_its_record(data: Path) -> None:
    report = check(subject(data), 2)
    assert kinds(report) == FOUND
    assert report.records == len(RECORDS)
    assert report.faulty
    for finding in report.findings:
        assert (finding.severity == "warning") == (finding.kind in WARNINGS)
        if finding.index is not None:
            assert finding.message.startswith(f"train.json[{finding.index}]")
            assert finding.where.startswith(f"train.json[{finding.index}]")


def test_the_report_does_not_depend_on_the_workers(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "CHUNK", 2)
    one, three = (check(subject(data), workers) for workers in (1, 3))
    assert asdict(one) == asdict(three)


def test_without_a_tokenizer_structure_images_and_copies_are_checked(data: Path) -> None:
    report = check(*of_data(DataConfig(str(data))), 2)
    of_tokens = {"cut-targets", "no-target", "template", "images-cut"}
    assert kinds(report) == [(index, kind) for index, kind in FOUND if kind not in of_tokens]
    assert set(statistics(report)) == {"words"}


def test_tokens_are_those_that_training_sees(data: Path) -> None:
    whole = replace(subject(data), data=DataConfig(str(data), limit=2))
    report = check(whole, 1)
    assert whole.builder is not None
    samples = whole.builder.build(list(whole.source()))
    assert report.tokens.tolist() == [len(sample.input_ids) for sample in samples]
    assert report.targets.tolist() == [sum(label != -100 for label in sample.labels) for sample in samples]
    text_alone = check(replace(subject(data, None), data=whole.data), 1)
    assert [more - less for more, less in zip(report.tokens, text_alone.tokens, strict=True)] == [35, 35]
    assert "an image counts as one token" in render(text_alone)


def test_a_cut_says_how_many_targets_go_with_it(data: Path) -> None:
    data.write_text(json.dumps([record("a", "Hello", "red", "why " * 100, "blue")]))
    (finding,) = check(replace(subject(data), data=DataConfig(str(data), limit=1)), 1).findings
    assert finding.kind == "cut-targets"
    assert "2 of 4 targets" in finding.message


def test_a_sound_set_has_no_finding(data: Path) -> None:
    (data.parent / "images" / "unused.png").unlink()
    for name in ("g.jpg", "half.jpg", "huge.png"):
        (data.parent / "images" / name).unlink()
    data.write_text(json.dumps(RECORDS[:1]))
    report = check(subject(data), 1)
    assert (report.findings, report.faulty, report.images) == ([], False, 1)


def test_a_file_that_cannot_be_parsed_is_a_finding_and_a_missing_one_an_error(data: Path) -> None:
    data.write_text("[{")
    report = check(*of_data(DataConfig(str(data))), 1)
    assert [(finding.kind, finding.index) for finding in report.findings] == [("bad-structure", None)]
    with pytest.raises(RecordError, match="no such file"):
        check(*of_data(DataConfig(str(data.with_name("other.json")))), 1)


def test_an_image_is_decoded_once_and_reported_for_each_of_its_records(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = Counter[str]()
    load = checking.load_image

    def counted(image: Path) -> Image.Image:
        opened[image.name] += 1
        return load(image)

    monkeypatch.setattr(checking, "load_image", counted)
    data.write_text(json.dumps([record(str(n), "<image>\nWhat?", f"{n}", image="half.jpg") for n in range(5)]))
    report = check(*of_data(DataConfig(str(data), limit=5)), 1)
    assert kinds(report) == [(index, "broken-image") for index in range(5)]
    assert opened == {"half.jpg": 1}


def test_a_run_is_checked_stage_by_stage(data: Path, tmp_path: Path) -> None:
    stage = f"{{data: {{path: {data}, max_length: {MAX_LENGTH}}}, lr: {{connector: 1e-3}}, steps: 1}}"
    file = tmp_path / "run.yaml"
    file.write_text(
        f"encoder: world:clip\nconnector: mlp\nllm: world:llama\nstages:\n  first: {stage}\n  second: {stage}\n"
    )
    first, second = of_run(file)
    assert (first.name, second.name) == ("first", "second")
    assert kinds(check(first, 2)) == FOUND
    assert [found.name for found in of_run(file, stage="second")] == ["second"]
    with pytest.raises(ValueError, match="unknown stage 'secnd'; did you mean 'second'"):
        of_run(file, stage="secnd")
    (wider,) = of_run(file, ["stages.first.data.max_length=2048"], "first")
    assert "images-cut" not in dict(kinds(check(wider, 1))).values()


def test_the_table_shows_the_first_few_of_each_kind_and_the_document_all(data: Path) -> None:
    data.write_text(json.dumps([record(str(n), "Hello", " ") for n in range(5)] + [record("a", "Hi", "Hello")]))
    report = check(*of_data(DataConfig(str(data), limit=6)), 1)
    table = render(report)
    assert "6 records, 0 images; 5 with errors, 0 with warnings" in table
    assert "train.json[2] (id '2')" in table
    assert "train.json[3]" not in table
    assert "and 2 more" in table
    written = json.loads(json.dumps(document(report)))
    assert [finding["index"] for finding in written["findings"]] == [0, 1, 2, 3, 4]
    assert written["kinds"] == {"empty-answer": 5}


def test_memory_holds_hashes_not_texts(data: Path) -> None:
    long = [record(str(n), "Hello " * 1000, "Hi " * 1000) for n in range(20)]
    data.write_text(json.dumps(long))
    report = check(*of_data(DataConfig(str(data), limit=20)), 1)
    assert report.findings == [f for f in report.findings if f.kind == "duplicate-record"]
    assert len(report.findings) == 19
    assert max(len(finding.message) for finding in report.findings) < 200
