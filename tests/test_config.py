"""Runs and studies: read from YAML, changed by overrides, written out whole, and hashed by all that they say."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from vlmzoo.config import (
    ConnectorConfig,
    EncoderConfig,
    RunConfig,
    SeedConfig,
    StageConfig,
    SweepConfig,
    Template,
    assignment,
    config_hash,
    dump,
    load,
    parse,
    to_dict,
)

RUN = """
encoder: world:clip
connector: {name: qformer, options: {num_queries: 4}}
llm: {config: {model_type: llama, hidden_size: 8}, tokenizer: here}
stages:
  align: {data: {path: a.json, template: plain}, lr: {connector: 1e-3}, steps: 5}
  finetune: {data: b.json, lr: {connector: 1.0e-4, language: 2e-5}, epochs: 1, betas: [0.9, 0.95]}
evaluation: {own: {data: c.json}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(RUN)
    return file


@pytest.fixture
def run(file: Path) -> RunConfig:
    return load(RunConfig, file)


def test_values_become_what_the_fields_say(run: RunConfig) -> None:
    assert run.encoder == EncoderConfig(name="world:clip")
    assert run.connector == ConnectorConfig("qformer", {"num_queries": 4})
    align, finetune = run.stages.values()
    assert align.lr == {"connector": 1e-3}  # YAML 1.1 reads 1e-3 as a text
    assert align.data.template is Template.plain
    assert finetune.data.path == "b.json"
    assert finetune.betas == (0.9, 0.95)
    assert isinstance(finetune.epochs, float)
    assert run.seed == SeedConfig(0, 0, 0)


def test_what_is_written_reads_back_the_same(run: RunConfig, tmp_path: Path) -> None:
    again = tmp_path / "again.yaml"
    again.write_text(dump(run))
    assert load(RunConfig, again) == run
    assert parse(RunConfig, to_dict(run)) == run
    assert dump(load(RunConfig, again)) == dump(run)
    assert list(yaml.safe_load(dump(run))["stages"]) == ["align", "finetune"]


def test_every_default_is_written_out(run: RunConfig) -> None:
    def fields(kind: type) -> set[str]:
        return {item.name for item in dataclasses.fields(kind)}

    written = to_dict(run)
    assert set(written) == fields(RunConfig)
    assert set(written["stages"]["align"]) == fields(StageConfig)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("stages.align.steps=7", lambda run: run.stages["align"].steps == 7),
        ("stages.align.lr.language=1e-5", lambda run: run.stages["align"].lr == {"connector": 1e-3, "language": 1e-5}),
        ("connector=mlp", lambda run: run.connector == ConnectorConfig("mlp")),
        ("connector.options.num_queries=9", lambda run: run.connector.options == {"num_queries": 9}),
        (
            "encoder.layer=last_hidden_state",
            lambda run: run.encoder == EncoderConfig("world:clip", layer="last_hidden_state"),
        ),
        ("encoder.layer=-1", lambda run: run.encoder == EncoderConfig("world:clip", layer=-1)),
        ("stages.finetune.data.limit=3", lambda run: run.stages["finetune"].data.limit == 3),
        ("seed={init: 3, data: 4}", lambda run: run.seed == SeedConfig(3, 4, 0)),
        ("evaluation={}", lambda run: run.evaluation == {}),
        ("stages.finetune.clip=null", lambda run: run.stages["finetune"].clip is None),
        ("encoder.name=a=b", lambda run: run.encoder.name == "a=b"),
    ],
)
def test_overrides(override: str, read: Any, file: Path, run: RunConfig) -> None:
    changed = load(RunConfig, file, [override])
    assert read(changed)
    assert not read(run)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "twice.yaml"
    file.write_text("connector: mlp\nstages:\n  align: {steps: 1, lr: {connector: 1}, steps: 2}\n")
    with pytest.raises(ValueError, match=r"twice.yaml: not valid YAML \(key 'steps' stands twice .* line 3, column 41"):
        load(RunConfig, file)


def test_a_merged_key_may_be_given_again(tmp_path: Path) -> None:
    """YAML's merge (`<<`) is for that, however deep the mapping stands that the merged one is taken from."""
    file = tmp_path / "merged.yaml"
    options = "options: {base: &base {depth: 2}, deep: {x: &x {<<: *base, depth: 1}}, again: {<<: *x, depth: 3}}"
    file.write_text(f"{{name: mlp, {options}}}\n")
    assert load(ConnectorConfig, file).options == {
        "base": {"depth": 2},
        "deep": {"x": {"depth": 1}},
        "again": {"depth": 3},
    }


def test_a_key_that_is_no_name_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text("connector: mlp\n? [stages, align]\n: 3\n")
    with pytest.raises(ValueError, match=r"keys.yaml: not valid YAML .*unhashable key"):
        load(RunConfig, file)


def test_the_last_override_holds(file: Path) -> None:
    assert load(RunConfig, file, ["dtype=bfloat16", "dtype=float32"]).dtype == "float32"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "override 'steps': expected KEY=VALUE"),
        ("=3", "override '=3': expected KEY=VALUE"),
        ("dtype={", "override 'dtype={': not valid YAML"),
        ("seed={init: 3, init: 4}", "override 'seed={init: 3, init: 4}': not valid YAML (key 'init' stands twice"),
        ("stages.align.steps.x.y=3", "'stages.align.steps' is no mapping"),
        ("stage.align.steps=3", "unknown key 'stage': 'stage'; did you mean 'stages'?"),
        ("stages.alig.steps=3", "key 'stages.alig.data' is missing; StageConfig needs it"),
        ("seed.init=1.5", "key 'seed.init': expected a whole number, got 1.5"),
        ("seed.init=-1", "key 'seed.init': expected at least 0"),
        ("seed.init=true", "key 'seed.init': expected a whole number, got True"),
        ("seed.init=.nan", "key 'seed.init': expected a whole number, got nan"),
        ("stages.align.clip=much", "key 'stages.align.clip': expected a finite number, got 'much'"),
        ("stages.align.clip=.inf", "key 'stages.align.clip': expected a finite number, got inf"),
        ("stages.align.gradient_checkpointing=1", "expected true or false, got 1"),
        ("stages.align.betas=[0.9]", "expected 2 values, got [0.9]"),
        ("stages.align.betas=[0.9, 1]", "key 'stages.align.betas[1]': expected at least 0 and below 1, got 1.0"),
        ("stages.align.data.path=3", "key 'stages.align.data.path': expected a text, got 3"),
        ("stages.align.data.template=chatty", "did you mean 'chat'? Valid: chat, plain, vicuna_v1"),
        ("stages.align.schedule=cosin", "did you mean 'cosine'? Valid: constant, cosine, linear"),
        ("stages.align.lr=1e-3", "key 'stages.align.lr': expected a mapping, got '1e-3'"),
        ("stages.align.lr={vison: 1}", "did you mean 'vision'?"),
        ("stages=[]", "key 'stages': expected a mapping, got []"),
        ("connector.options.day=2020-01-01", "key 'connector.options.day': expected a value that JSON can hold"),
        ("evaluation.own=3", "key 'evaluation.own': expected a mapping, got 3"),
    ],
)
def test_what_does_not_fit_names_its_key_and_the_file(override: str, expected: str, file: Path) -> None:
    with pytest.raises(ValueError) as found:
        load(RunConfig, file, [override])
    assert str(found.value).startswith(f"{file}: ")
    assert expected in str(found.value)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "key 'RunConfig': expected a mapping, got None"),
        ("- a", "key 'RunConfig': expected a mapping, got ['a']"),
        ("a: [", "not valid YAML"),
        ("!!python/object:os.system x", "not valid YAML"),
        ("encoder: world:clip", "key 'connector' is missing; RunConfig needs it"),
        ("1: 2", "unknown key '1'"),
    ],
)
def test_files_that_hold_no_run(text: str, expected: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(ValueError) as found:
        load(RunConfig, file)
    assert expected in str(found.value)
    assert str(file) in str(found.value)


def test_an_assignment_is_read_as_yaml() -> None:
    assert assignment("a.b=[1, x]", "option", "k=1") == ("a.b", [1, "x"])
    assert assignment("a=", "option", "k=1") == ("a", None)


def leaves(values: Any, place: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    found = [leaf for key, item in items for leaf in leaves(item, (*place, key))]
    return found or [place]


def test_the_hash_changes_with_every_value(run: RunConfig) -> None:
    """Each value of the run, defaults too, is changed alone."""

    @dataclasses.dataclass
    class Plain:
        values: dict[str, Any]

    places = leaves(to_dict(run))
    assert ("stages", "finetune", "betas", 1) in places
    hashes = {config_hash(Plain(to_dict(run)))}
    for *parents, last in places:
        changed = to_dict(run)
        place: Any = changed
        for parent in parents:
            place = place[parent]
        place[last] = "changed"
        hashes.add(config_hash(Plain(changed)))
    assert len(hashes) == len(places) + 1


def test_the_hash_is_of_what_is_said_not_of_how(run: RunConfig, tmp_path: Path) -> None:
    values = to_dict(run)
    assert config_hash(parse(RunConfig, dict(reversed(values.items())))) == config_hash(run)
    assert len(config_hash(run)) == 12
    assert config_hash(dataclasses.replace(run, seed=SeedConfig(1))) != config_hash(run)


def test_the_hash_is_the_same_in_another_process(file: Path, run: RunConfig) -> None:
    code = (
        "import sys; from pathlib import Path; from vlmzoo.config import *\n"
        "print(config_hash(load(RunConfig, Path(sys.argv[1]))))"
    )
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(file)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[1],
            env={"PYTHONHASHSEED": seed},
        )
        assert done.stdout.strip() == config_hash(run)


def test_a_study_is_every_combination_seed_by_seed(run: RunConfig) -> None:
    study = parse(
        SweepConfig,
        {"run": to_dict(run), "connectors": ["mlp", "linear"], "seeds": [3, 4], "encoders": ["a", "b"]},
    )
    found = [(trial.seed.init, trial.encoder.name, trial.connector.name) for trial in study.trials()]
    assert found == [(seed, encoder, name) for seed in (3, 4) for encoder in "ab" for name in ("mlp", "linear")]
    assert all(trial.seed == SeedConfig(trial.seed.init, trial.seed.init, trial.seed.init) for trial in study.trials())
    with pytest.raises(ValueError, match=r"key 'seeds\[1\]': expected at least 0"):
        parse(SweepConfig, {"run": to_dict(run), "connectors": ["mlp"], "seeds": [0, -1]})
