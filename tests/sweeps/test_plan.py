"""A study becomes trials: named by what they compute, told apart by their labels, each there once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.sweeps.conftest import make_study
from vlmzoo.config import ConnectorConfig, SweepConfig, dump, load, parse
from vlmzoo.files import write_json
from vlmzoo.sweeps.plan import labels, plan, read_result


def test_every_combination_once_seed_by_seed(study: SweepConfig, tmp_path: Path) -> None:
    trials = plan(study, tmp_path)
    assert [(trial.seed, trial.connector) for trial in trials] == [(0, "linear"), (0, "mlp"), (1, "linear"), (1, "mlp")]
    assert len({trial.folder for trial in trials}) == 4


def test_a_directory_is_named_by_what_it_computes(study: SweepConfig, tmp_path: Path) -> None:
    before = {trial.hash for trial in plan(study, tmp_path)}
    longer = dataclasses.replace(study, connectors=[*study.connectors, ConnectorConfig("qformer")])
    assert before < {trial.hash for trial in plan(longer, tmp_path)}
    study.run.stages["align"].steps = 101
    assert before.isdisjoint(trial.hash for trial in plan(study, tmp_path))


def test_a_study_written_and_read_names_the_same_trials(study: SweepConfig, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(dump(study))
    assert plan(load(SweepConfig, file), tmp_path) == plan(study, tmp_path)


def test_a_trial_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="twice: mlp, world:clip, world:llama, seed 1"):
        plan(make_study(["mlp"], seeds=[0, 1, 1]), tmp_path)


def test_nothing_to_compare_is_refused(study: SweepConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one entry in 'connectors'"):
        plan(dataclasses.replace(study, connectors=[]), tmp_path)


def test_labels_say_only_what_differs() -> None:
    parts = parse(
        list[ConnectorConfig],
        [
            {"name": "mlp", "options": {"depth": 2, "width": 8}},
            {"name": "mlp", "options": {"depth": 3, "width": 8}},
            "linear",
        ],
    )
    assert list(labels(parts).values()) == ["mlp (depth=2)", "mlp (depth=3)", "linear"]


def test_results_of_other_configurations_and_halves_do_not_count(tmp_path: Path) -> None:
    assert read_result(tmp_path, "abc") is None
    write_json(tmp_path / "result.json", {"config_hash": "abc"})
    assert read_result(tmp_path, "abc") == {"config_hash": "abc"}
    assert read_result(tmp_path, "abd") is None
    (tmp_path / "result.json").write_text('{"config_hash": "ab')
    assert read_result(tmp_path, "abc") is None
