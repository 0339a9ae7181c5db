"""Killed at random calls, in both stages, between them and while a checkpoint is written, a run ends the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.training.conftest import metrics

ROOT = Path(__file__).parents[2]


def killed(values: dict[str, Any], out: Path, seed: int) -> list[list[Any]]:
    """Where the processes of this run were killed; it ended as the one that nothing killed."""
    file = out.parent / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, str(ROOT / "tests/training/kills.py"), str(file), str(out), str(seed)]
    quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}
    found = subprocess.run(command, env={**os.environ, **quiet}, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    whole = out.with_name(f"{out.name}-whole")
    weights, expected = (load_file(place / "model" / "model.safetensors") for place in (out, whole))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert metrics(out) == metrics(whole)
    assert (out / "predictions" / "colors.jsonl").read_bytes() == (whole / "predictions" / "colors.jsonl").read_bytes()
    return [json.loads(line) for line in (out.parent / f"{out.name}.kills").read_text().splitlines()]


@pytest.fixture
def long(values: dict[str, Any]) -> dict[str, Any]:
    """Six steps a stage, across epochs, with dropout; the second one in parts, packed and grouped."""
    values["checkpoint_every"] = 2
    values["stages"]["align"]["steps"] = 6
    values["stages"]["finetune"] |= {
        "steps": 6,
        "micro_batch_size": 2,
        "packing": True,
        "group_by": "modality_length",
    }
    return values


def test_a_few_kills(long: dict[str, Any], tmp_path: Path) -> None:
    assert len(killed(long, tmp_path / "out", 3)) >= 3


@pytest.mark.scale
def test_twenty_kills_over_both_stages(long: dict[str, Any], tmp_path: Path) -> None:
    places: list[list[Any]] = []
    seed = 0
    while len(places) < 24:
        places += killed(long, tmp_path / str(seed), seed)
        seed += 1
    print(f"{len(places)} kills: {places}")
    assert {stage for stage, _, _ in places} == {"align", "finetune"}
    assert any(saving for _, _, saving in places)
    assert any(saving and step == 5 for _, step, saving in places)  # between the stages, or behind the last
