"""What a SampleSet holds of a source, and when its records are checked."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import run_values, write_data, write_models
from vlmzoo import build, samples
from vlmzoo.config import RunConfig, StageConfig, parse
from vlmzoo.data.images import ImageError
from vlmzoo.data.records import Record, RecordError
from vlmzoo.samples import SampleSet
from vlmzoo.sweeps.trial import new_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_models(tmp_path_factory.mktemp("mine"))
    write_data(folder)
    return folder


@pytest.fixture
def parts(folder: Path) -> tuple[Any, Any, StageConfig]:
    run = build.resolve(parse(RunConfig, run_values(folder)))
    return *new_model(run), run.stages["finetune"]


def held() -> int:
    gc.collect()
    return sum(type(item) is Record for item in gc.get_objects())


@pytest.mark.parametrize("group_by", [None, "modality_length"])
def test_no_record_of_a_large_set_is_held(parts: Any, group_by: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, stage = parts
    monkeypatch.setattr(samples, "HELD", 15)
    stage.group_by = group_by
    before = held()
    data = SampleSet(model, processor, stage.data)
    first = next(data.order(stage, 0))
    assert len(data) == 16
    assert held() == before
    made = data.samples(first)
    assert held() == before + len(made) == before + 4


def test_small_sets_are_checked_at_once_and_large_ones_as_they_are_read(
    parts: Any, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor, stage = parts
    values = json.loads((folder / "data.json").read_text())
    values[5]["image"] = "absent.png"
    (tmp_path / "data.json").write_text(json.dumps(values))
    stage.data.path, stage.data.images = str(tmp_path / "data.json"), str(folder / "images")
    with pytest.raises(ImageError, match=r"data\.json\[5\] \(id 'record-5'\): image 'absent\.png' is not in"):
        SampleSet(model, processor, stage.data)
    monkeypatch.setattr(samples, "HELD", 15)
    data = SampleSet(model, processor, stage.data)
    assert len(data.samples([4])) == 1
    with pytest.raises(ImageError, match=r"data\.json\[5\] \(id 'record-5'\): image 'absent\.png' is not in"):
        data.samples([4, 5])


def test_what_an_arm_sees_is_checked_too(parts: Any) -> None:
    model, processor, stage = parts
    with pytest.raises(RecordError, match="has no `description`, which the oracle reads"):
        SampleSet(model, processor, stage.data, sees="description")
    assert all(not record.images for record in SampleSet(model, processor, stage.data, sees="nothing").records)
