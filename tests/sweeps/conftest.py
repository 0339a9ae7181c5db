"""A study whose trials are played by a tiny script, and a sweep directory as finished trials leave it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vlmzoo import world
from vlmzoo.config import SweepConfig, dump, parse
from vlmzoo.files import write_json, write_whole
from vlmzoo.sweeps.engine import Command
from vlmzoo.sweeps.plan import Trial, plan

CAPABILITIES = ("existence", "attribute", "counting", "spatial", "reading", "fine_detail", "rare")
SKILL = {"linear": 0.55, "mlp": 0.66, "qformer": 0.6, "perceiver": 0.63, "gated_cross_attention": 0.7}
SIGHT_SKILL = {"nothing": 0.3, "description": 0.9}
"""Of baselines, by what they see."""

PLAYER = """
import json, os, pathlib, sys, yaml
folder = pathlib.Path(sys.argv[1])
run = yaml.safe_load((folder / "config.yaml").read_text())
with (folder.parents[1] / "started.txt").open("a") as log:
    log.write(folder.name + "\\n")
print("loading")
name = run["connector"]["name"]
if name == "broken":
    raise ValueError("layer 3 is not a number")
if name == "killed":
    os.kill(os.getpid(), 9)
if name.startswith("refuses"):
    sys.exit(print("vlmzoo: error: " + ("it" if name == "refuses" else name), file=sys.stderr) or 2)
if name == "silent":
    sys.exit(0)
if name == "endless":
    import time
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(600)
(folder / "predictions").mkdir(exist_ok=True)
item = {"id": "q1", "capability": "count", "prompt": "", "answer": "2", "expected": "2", "score": 1.0}
(folder / "predictions" / "world.jsonl").write_text(json.dumps(item) + "\\n")
scores = {"world": {"accuracy": 1.0, "capabilities": {"count": 1.0}, "num_items": 1}}
threads = os.environ["OMP_NUM_THREADS"]
result = {"config_hash": folder.name, "evaluation": scores, "seconds": 1, "threads": threads}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def study() -> SweepConfig:
    return make_study(["linear", "mlp"], seeds=[0, 1])


def make_study(connectors: list[str], seeds: list[int], **more: Any) -> SweepConfig:
    data = {"path": "world:captions", "template": "plain"}
    rates = {"connector": 1e-3}
    run = {
        "encoder": "world:clip",
        "connector": connectors[0],
        "llm": "world:llama",
        "stages": {
            "align": {"data": data, "lr": rates, "steps": 100},
            "finetune": {"data": "world:conversations", "lr": {**rates, "language": 1e-3}, "steps": 200},
        },
        "evaluation": {"world": {"data": "world:questions"}},
    }
    return parse(SweepConfig, {"run": run, "connectors": connectors, "seeds": seeds, **more})


@pytest.fixture
def player(tmp_path: Path) -> Command:
    """The command of a trial that computes nothing."""
    script = tmp_path / "player.py"
    script.write_text(PLAYER)

    def command(trial: Trial) -> list[str]:
        return [sys.executable, str(script), str(trial.folder)]

    return command


def write_sweep(out: Path, study: SweepConfig, num_items: int = 100) -> list[Trial]:
    """A sweep directory with predictions, metrics and results drawn from SKILL, as real trials leave it."""
    write_whole(out / "study.yaml", dump(study))
    trials = plan(study, out)
    for trial in trials:
        arm = sorted(SKILL).index(trial.run.connector.name) if trial.run.sees == "image" else len(trial.run.sees)
        generator = np.random.default_rng([trial.seed, arm])
        _write_predictions(trial, generator, num_items)
        _write_metrics(trial, generator)
        write_json(trial.folder / "result.json", _result(trial))
    return trials


def _write_predictions(trial: Trial, generator: np.random.Generator, num_items: int) -> None:
    luck = generator.normal(0, 0.02)
    lines = []
    for index, capability in enumerate(CAPABILITIES):
        skill = SIGHT_SKILL.get(trial.run.sees, SKILL[trial.run.connector.name]) + luck
        skill += 0.25 * math.cos(2 * index) if trial.run.sees == "image" else 0
        for item, right in enumerate(generator.random(num_items) < skill):
            prediction = {
                "id": f"{capability}-{item}",
                "capability": capability,
                "prompt": "How many?",
                "answer": "2" if right else "3",
                "expected": "2",
                "score": float(right),
            }
            lines.append(json.dumps(prediction))
    write_whole(trial.folder / "predictions" / "world.jsonl", "\n".join(lines) + "\n")


def _write_metrics(trial: Trial, generator: np.random.Generator) -> None:
    lines = []
    for number, (stage, config) in enumerate(trial.run.stages.items()):
        speed = SKILL[trial.run.connector.name] * (40 + 20 * number)
        for step in range(config.steps or 0):
            loss = (1.2 - number * 0.4) + 2.5 * math.exp(-step / speed) + generator.normal(0, 0.08)
            lines.append(json.dumps({"stage": stage, "step": step, "num_steps": config.steps, "loss": loss}))
    write_whole(trial.folder / "metrics.jsonl", "\n".join(lines) + "\n")


def _result(trial: Trial) -> dict[str, object]:
    tokens = {"qformer": 32, "perceiver": 16, "gated_cross_attention": 1}.get(trial.run.connector.name, 64)
    return {
        "schema": 1,
        "config_hash": trial.hash,
        "connector": trial.run.connector.name,
        "encoder": trial.run.encoder.name,
        "llm": trial.run.llm.name,
        "seed": trial.seed,
        "sees": trial.run.sees,
        "world": world.VERSION,
        "evaluation": {},
        "shuffled": {"world": {"accuracy": 0.31}} if trial.run.sees == "image" else {},
        "visual_tokens": tokens,
        "trainable_parameters": 1000 * tokens + 12345,
        "train_flops": 10**12 * tokens,
        "samples_per_second": 130.5,
        "seconds": 60.0 + tokens / 4,
        "peak_memory_bytes": 700_000_000 + tokens,
        "final_loss": {},
    }
