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


def test_baselines_are_the_same_run_without_images(tmp_path: Path) -> None:
    study = make_study(["linear", "mlp"], [3, 4], baselines=["blind", "oracle"], llms=["world:llama", "world:qwen"])
    trials = plan(study, tmp_path)
    baselines = [trial for trial in trials if trial.is_baseline]
    assert len(trials) == 2 * 2 * (2 + 2)
    assert [(t.connector, t.llm, t.seed) for t in baselines[:4]] == [
        ("blind", "world:llama", 3),
        ("oracle", "world:llama", 3),
        ("blind", "world:qwen", 3),
        ("oracle", "world:qwen", 3),
    ]
    for trial in baselines:
        stages = trial.run.stages
        assert list(stages) == ["finetune"]  # the other trains the connector alone
        assert stages["finetune"].lr == {"language": 1e-3}
        own = study.run.stages["finetune"]
        assert dataclasses.replace(stages["finetune"], lr=own.lr) == own
        assert vars(trial.run.seed) == dict.fromkeys(("init", "data", "dropout"), trial.seed)
        assert trial.run.sees == {"blind": "nothing", "oracle": "description"}[trial.connector]
    others = plan(dataclasses.replace(study, connectors=[ConnectorConfig("qformer")]), tmp_path)
    assert {trial.hash for trial in baselines} == {trial.hash for trial in others if trial.is_baseline}
    bare = plan(dataclasses.replace(study, baselines=[]), tmp_path)
    assert [trial.hash for trial in bare] == [trial.hash for trial in trials if not trial.is_baseline]


def test_a_connectors_own_rate_takes_the_place_of_the_stages(tmp_path: Path) -> None:
    study = make_study(["linear", "mlp"], [0])
    study.connectors[1].lr = 3e-3
    linear, mlp = plan(study, tmp_path)
    assert [stage.lr for stage in linear.run.stages.values()] == [
        {"connector": 1e-3},
        {"connector": 1e-3, "language": 1e-3},
    ]
    assert [stage.lr for stage in mlp.run.stages.values()] == [
        {"connector": 3e-3},
        {"connector": 3e-3, "language": 1e-3},
    ]
    assert study.run.stages["align"].lr == {"connector": 1e-3}


def test_rates_are_a_grid_over_every_connector(tmp_path: Path) -> None:
    trials = plan(make_study(["linear", "mlp"], [0], lrs=[1e-3, 3e-3]), tmp_path)
    assert [trial.connector for trial in trials] == [
        *("linear (lr=0.001)", "linear (lr=0.003)"),
        *("mlp (lr=0.001)", "mlp (lr=0.003)"),
    ]
    assert [trial.run.stages["align"].lr["connector"] for trial in trials] == [1e-3, 3e-3, 1e-3, 3e-3]


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
