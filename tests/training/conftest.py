"""Runs over a folder of tiny checkpoints and data, with dropout in the LLM so that its seed matters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.checkpoints import run_values, write_data, write_models
from vlmzoo import build
from vlmzoo.config import RunConfig, parse
from vlmzoo.sweeps.trial import new_model
from vlmzoo.training.run import TrainingResult, train


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_models(tmp_path_factory.mktemp("mine"))
    write_data(folder)
    config = folder / "llama" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.2}))
    return folder


@pytest.fixture
def values(folder: Path) -> dict[str, Any]:
    """A run of two stages of four steps, as YAML values; a test may change them."""
    return run_values(folder)


Trained = tuple[dict[str, Tensor], TrainingResult]


@pytest.fixture
def train_in() -> Callable[..., Trained]:
    def run(values: dict[str, Any], out: Path, cache: Path | None = None) -> Trained:
        """The weights and the result of a run from wherever `out` stands."""
        resolved = build.resolve(parse(RunConfig, values))
        model, processor = new_model(resolved)
        result = train(model, processor, resolved, out, cache)
        return {name: value.clone() for name, value in model.state_dict().items()}, result

    return run


CLOCK = {"seconds", "data_seconds", "rates", "peak_memory_bytes"}


def metrics(out: Path) -> list[dict[str, Any]]:
    """Every line but its time and memory."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]
