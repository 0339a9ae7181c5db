"""A real run, tiny: from a YAML and LLaVA JSON to result.json, a saved model, its evaluation and a sweep over it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from tests.checkpoints import run_values, write_data, write_models
from tests.data.conftest import words
from tests.tiny import CLIP, LLAMA
from vlmzoo.cli import main
from vlmzoo.config import DataConfig, RunConfig, SweepConfig, baseline, config_hash, load, parse
from vlmzoo.evaluation.evaluate import evaluate
from vlmzoo.sweeps import trial
from vlmzoo.sweeps.checkpoint import evaluate_checkpoint
from vlmzoo.sweeps.manifest import fingerprints
from vlmzoo.sweeps.plan import plan, resolve
from vlmzoo.sweeps.trial import run_trial

COLOURS = {"red": (220, 30, 30), "left": (30, 30, 220)}
"""Answers that the tokenizer of the tests knows, and what they look like."""


OTHERS = {
    "llama": ("qformer", {"num_queries": 4, "num_layers": 2, "hidden_size": 16, "num_heads": 2}),
    "qwen": ("gated_cross_attention", {"memory": "patches", "every": 1}),
}


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """A run on twelve images of two kinds, as YAML values."""
    (tmp_path / "images").mkdir()
    records = []
    for index in range(12):
        answer = list(COLOURS)[index % 2]
        noise = np.random.default_rng(index).integers(0, 30, (24, 24, 3))
        Image.fromarray((noise + np.array(COLOURS[answer])).clip(0, 255).astype(np.uint8)).save(
            tmp_path / "images" / f"{index}.png"
        )
        turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
        record = {"id": f"i{index}", "image": f"{index}.png", "conversations": turns}
        records.append({**record, "capability": "first" if index < 8 else "second"})
    (tmp_path / "data.json").write_text(json.dumps(records))
    tokenizer = words()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    data = {"path": str(tmp_path / "data.json")}
    stage = {"data": {**data, "template": "plain"}, "lr": {"connector": 1e-2}, "batch_size": 4, "steps": 3}
    return {
        "encoder": {"config": CLIP},
        "connector": "linear",
        "llm": {"config": {**LLAMA, "vocab_size": len(tokenizer)}, "tokenizer": str(tmp_path / "tokenizer")},
        "stages": {"align": stage, "finetune": {**stage, "data": data, "lr": {"connector": 1e-2, "language": 1e-2}}},
        "evaluation": {"colours": {"data": data, "max_new_tokens": 2}},
    }


@pytest.fixture
def run_file(config: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def test_a_run_from_yaml_to_evaluated_checkpoint(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(["train", str(run_file), "--out", str(out), "stages.finetune.steps=2"]) == 0
    assert "colours: " in capsys.readouterr().out
    result = json.loads((out / "result.json").read_text())
    assert result["config_hash"] == config_hash(load(RunConfig, out / "config.yaml"))
    assert result["visual_tokens"] == 9
    assert result["trainable_parameters"] == 32 * 48 + 48
    assert set(result["final_loss"]) == {"align", "finetune"}
    assert result["peak_memory_bytes"] > 10_000_000
    assert set(result["evaluation"]["colours"]["capabilities"]) == {"first", "second"}
    assert len((out / "predictions" / "colours.jsonl").read_text().splitlines()) == 12
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 5
    manifest = json.loads((out / "manifest.json").read_text())
    data = tmp_path / "data.json"
    digest = hashlib.sha256(data.read_bytes()).hexdigest()
    assert manifest["data"] == {str(data): {"file": str(data), "sha256": digest}}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["config_hash"] == result["config_hash"]
    assert manifest["hardware"]["processor"].endswith(torch.backends.cpu.get_cpu_capability())

    for checkpoint in (out, out / "model"):
        assert main(["eval", str(checkpoint), "--task", "colours", "--json", "--out", str(tmp_path / "again")]) == 0
        assert json.loads(capsys.readouterr().out)["tasks"]["colours"] == result["evaluation"]["colours"]
    again = (tmp_path / "again" / "predictions" / "colours.jsonl").read_text()
    assert again == (out / "predictions" / "colours.jsonl").read_text()
    own = ["--data", str(tmp_path / "data.json"), "--json"]
    assert main(["eval", str(out), "--task", "mine", *own]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["mine"]["num_items"] == 12
    assert main(["eval", str(out), "--task", "colors"]) == 2
    assert "did you mean 'colours'?" in capsys.readouterr().err

    monkeypatch.setattr(trial, "train", None)  # a run that has ended trains no more
    assert main(["train", str(run_file), "--out", str(out), "stages.finetune.steps=2"]) == 0


def test_a_directory_of_another_run_is_refused(run_file: Path, tmp_path: Path) -> None:
    run = load(RunConfig, run_file)
    run_trial(dataclasses.replace(run, stages={}), tmp_path / "out")
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        run_trial(run, tmp_path / "out")


def test_stopped_after_training_it_only_evaluates(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load(RunConfig, run_file)
    whole = run_trial(run, tmp_path / "whole", tmp_path / "features")

    def stop(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(trial, "evaluate_task", stop)
        with pytest.raises(KeyboardInterrupt):
            run_trial(run, tmp_path / "cut")
    assert not (tmp_path / "cut" / "result.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr(torch.optim.AdamW, "step", stop)
        continued = run_trial(run, tmp_path / "cut")
    assert continued["evaluation"] == whole["evaluation"]
    assert continued["final_loss"] == whole["final_loss"]
    whole_file, cut_file = (tmp_path / name / "predictions" / "colours.jsonl" for name in ("whole", "cut"))
    assert cut_file.read_text() == whole_file.read_text()


def test_a_sweep_of_real_trials(
    config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = tmp_path / "halves.py"
    plugin.write_text(
        "from torch import nn\n"
        "from vlmzoo.connector import TokenConnector, register\n"
        "@register('halves')\n"
        "class Halves(TokenConnector):\n"
        '    """Every other patch."""\n'
        "    def __init__(self, vision_dim, text_dim):\n"
        "        super().__init__()\n"
        "        self.project = nn.Linear(vision_dim, text_dim)\n"
        "    def num_tokens(self, grid):\n"
        "        return -(-grid[0] * grid[1] // 2)\n"
        "    def forward(self, patches, grid):\n"
        "        return self.project(patches[:, ::2])\n"
    )
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump({"run": config, "connectors": ["linear", "halves"], "seeds": [0]}))
    out = tmp_path / "sweep"
    monkeypatch.chdir(Path(__file__).parents[2])
    command = ["sweep", str(study), "--out", str(out), "--plugin", str(plugin)]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "halves" in shown
    assert "report.html" in shown
    rows = json.loads((out / "summary.json").read_text())["rows"]
    assert {row["connector"]: row["visual_tokens"] for row in rows} == {"linear": 9, "halves": 5}
    assert len(list((out / "cache" / "features").glob("*/*.safetensors"))) == 1
    before = {file: file.stat().st_mtime_ns for file in out.glob("trials/*/result.json")}
    assert len(before) == 2
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == rows
    assert before == {file: file.stat().st_mtime_ns for file in out.glob("trials/*/result.json")}


def test_arms_see_what_they_are_said_to(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blind one the question alone, the oracle a description; a connector, asked again, the next one's image."""
    data = tmp_path / "data.json"
    records = json.loads(data.read_text())
    data.write_text(json.dumps([{**record, "description": "A red cube."} for record in records]))
    config["evaluation"]["colours"]["shuffled"] = 5
    study = parse(
        SweepConfig, {"run": config, "connectors": ["linear"], "seeds": [0], "baselines": ["blind", "oracle"]}
    )
    asked: dict[str, list[tuple[str, list[str]]]] = {}
    evaluated = trial.evaluate

    def spy(model: Any, samples: Any, *arguments: Any, **options: Any) -> Any:
        name = f"{arm.connector}{len(samples)}"
        asked[name] = [(sample.record.turns[0].text, [path.name for path in sample.images]) for sample in samples]
        return evaluated(model, samples, *arguments, **options)

    monkeypatch.setattr(trial, "evaluate", spy)
    results = {}
    for arm in plan(resolve(study), tmp_path / "sweep"):
        results[arm.connector] = run_trial(arm.run, arm.folder)
        assert results[arm.connector]["config_hash"] == arm.hash
    assert asked["linear12"] == [("<image>\nWhat is it?", [f"{index}.png"]) for index in range(12)]
    assert asked["linear5"] == [("<image>\nWhat is it?", [f"{(index + 1) % 5}.png"]) for index in range(5)]
    assert asked["blind12"] == [("What is it?", [])] * 12
    assert asked["oracle12"] == [("A red cube.\nWhat is it?", [])] * 12
    assert set(results["linear"]["shuffled"]["colours"]["capabilities"]) == {"first"}
    assert results["blind"]["shuffled"] == {}
    assert set(results["blind"]["final_loss"]) == {"finetune"}

    data.write_text(json.dumps(records))
    with pytest.raises(ValueError, match=r"data.json\[0\] \(id 'i0'\): has no `description`"):
        run_trial(baseline(parse(RunConfig, config), "oracle"), tmp_path / "untold")


def test_a_manifest_names_cached_data_as_everybody_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VLMZOO_CACHE", str(tmp_path / "cache"))
    found = fingerprints([DataConfig("world:captions", limit=2)])["world:captions"]
    assert found["file"] == "$VLMZOO_CACHE/world/captions-v2-2-0/captions.json"
    file = tmp_path / "cache" / found["file"].removeprefix("$VLMZOO_CACHE/")
    assert found["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_flops_are_those_of_the_steps(config: dict[str, Any], tmp_path: Path) -> None:
    """Counted on the first step of each stage alone: twice the steps, twice the count."""
    found = {}
    for steps in (2, 4):
        for stage in config["stages"].values():
            stage["steps"] = steps
        found[steps] = run_trial(parse(RunConfig, config), tmp_path / str(steps))
    assert found[4]["train_flops"] == 2 * found[2]["train_flops"] > 0
    lines = [json.loads(line) for line in (tmp_path / "2" / "metrics.jsonl").read_text().splitlines()]
    assert ["flops" in line for line in lines] == [True, False] * 2


@pytest.mark.parametrize(("encoder", "llm"), [("siglip", "llama"), ("clip", "qwen"), ("siglip", "qwen")])
def test_checkpoints_of_other_families(encoder: str, llm: str, tmp_path: Path) -> None:
    folder = write_models(tmp_path)
    write_data(folder)
    name, options = OTHERS[llm]
    values = run_values(folder, {"name": name, "options": options}, encoder, llm)
    result = run_trial(parse(RunConfig, values), tmp_path / "out", tmp_path / "features")
    assert result["evaluation"]["colors"]["num_items"] == 16
    assert set(result["final_loss"]) == {"align", "finetune"}
    assert evaluate_checkpoint(tmp_path / "out", ["colors"]) == result["evaluation"]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_model_evaluated_is_the_model_saved(
    config: dict[str, Any], attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit of the logits, in bfloat16 too, where training holds float32 weights."""
    config["dtype"] = "bfloat16"
    config["llm"]["attention"] = attention
    config["stages"]["finetune"]["lr"]["vision"] = 1e-2
    logits: list[torch.Tensor] = []

    def spy(model: Any, samples: Any, batch_of: Any, **options: Any) -> Any:
        with torch.no_grad():
            logits.append(model(**{**batch_of(samples), "labels": None}).logits)
        assert model.language.config._attn_implementation == attention
        return evaluate(model, samples, batch_of, **options)

    monkeypatch.setattr(trial, "evaluate", spy)
    result = run_trial(parse(RunConfig, config), tmp_path / "out")
    assert evaluate_checkpoint(tmp_path / "out", ["colours"]) == result["evaluation"]
    trained, read = logits
    assert trained.dtype == read.dtype == torch.bfloat16
    assert torch.equal(trained, read)
