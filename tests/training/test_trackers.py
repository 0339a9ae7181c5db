"""What a step is measured by, and trackers: told every figure, no step twice, refused before anything is loaded."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.training.conftest import Trained, metrics
from vlmzoo import build, cli
from vlmzoo.config import RunConfig, parse
from vlmzoo.sweeps.engine import train_command
from vlmzoo.sweeps.plan import Trial
from vlmzoo.sweeps.trial import new_model
from vlmzoo.training import run as loop
from vlmzoo.training import trackers
from vlmzoo.training.log import Log
from vlmzoo.training.measures import matmul_rate, part_norms, rates
from vlmzoo.training.run import train
from vlmzoo.training.trackers import Told, Trackers


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def line(total: int, loss: float) -> dict[str, Any]:
    return {"stage": "align", "step": total, "num_steps": 9, "total": total, "loss": loss, "lr": {"connector": 0.1}}


@pytest.fixture
def run(values: dict[str, Any]) -> RunConfig:
    return parse(RunConfig, values)


def test_tensorboard_holds_every_figure_once(
    values: dict[str, Any], tmp_path: Path, train_in: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def tracked(out: Path) -> dict[str, Any]:
        resolved = build.resolve(parse(RunConfig, values))
        model, processor = new_model(resolved)
        train(model, processor, resolved, out, track=["tensorboard"])
        return model.state_dict()

    take_step, taken = loop.take_step, iter(range(100))

    def step(*arguments: Any) -> dict[str, Any]:
        if next(taken) == 6:  # the last checkpoint is that of step 4: 4 and 5 are taken again
            raise RuntimeError("stopped")
        return take_step(*arguments)

    monkeypatch.setattr(loop, "take_step", step)
    out = tmp_path / "tracked"
    with pytest.raises(RuntimeError, match="stopped"):
        tracked(out)
    weights = tracked(out)
    plain, _ = train_in(values, tmp_path / "plain")
    assert all(torch.equal(weights[name], value) for name, value in plain.items())
    assert metrics(out) == metrics(tmp_path / "plain")

    folder = out / "tracking" / "tensorboard"
    assert len(list(folder.iterdir())) == 2
    found = EventAccumulator(str(folder)).Reload()
    expected = {(name, line["total"]): value for line in lines(out) for name, value in trackers.figures(line).items()}
    shown = [(name, event.step) for name in found.Tags()["scalars"] for event in found.Scalars(name)]
    assert sorted(shown) == sorted(expected)
    assert {"align/loss", "finetune/grad_norms/language", "finetune/lr/connector", "align/rates/mfu"} <= {
        name for name, _ in expected
    }
    for name in found.Tags()["scalars"]:
        for event in found.Scalars(name):
            assert event.value == pytest.approx(expected[name, event.step], rel=1e-6), name


def test_a_step_says_what_it_took(values: dict[str, Any], tmp_path: Path, train_in: Callable[..., Trained]) -> None:
    train_in(values, tmp_path)
    for line in lines(tmp_path):
        parts = {"connector"} if line["stage"] == "align" else {"connector", "language"}
        assert set(line["grad_norms"]) == parts
        assert math.hypot(*line["grad_norms"].values()) == pytest.approx(line["grad_norm"], rel=1e-5)
        assert 0 < line["data_seconds"] < line["seconds"]
        assert line["all_tokens"] > line["tokens"]
        assert line["peak_memory_bytes"] > 0
        assert line["rates"]["samples_per_second"] == line["samples"] / line["seconds"]
        assert line["rates"]["mfu"] == line["rates"]["flops_per_second"] / matmul_rate("cpu", torch.float32)


def test_rates_scale_the_flops_counted_first() -> None:
    first = {"all_tokens": 100, "flops": 1_000}
    step = {"all_tokens": 150, "tokens": 30, "samples": 5, "seconds": 2.0}
    assert rates(step, first, 3_000.0) == {
        "tokens_per_second": 75.0,
        "targets_per_second": 15.0,
        "samples_per_second": 2.5,
        "flops_per_second": 750.0,
        "mfu": 0.25,
    }
    assert "mfu" not in rates(step, {"flops": 1_000}, 3_000.0)  # begun before all tokens were counted


def test_gradient_norms_are_those_of_the_parts() -> None:
    linear, other, unused = nn.Linear(3, 2, bias=False), nn.Linear(2, 1, bias=False), nn.Linear(1, 1)
    groups = [
        {"params": list(module.parameters()), "part": part}
        for part, module in {"connector": linear, "language": other, "vision": unused}.items()
    ]
    optimizer = torch.optim.AdamW(groups)
    linear.weight.grad = torch.full((2, 3), 2.0)
    other.weight.grad = torch.tensor([[3.0, 4.0]])
    assert {part: norm.item() for part, norm in part_norms(optimizer).items()} == {
        "connector": pytest.approx(math.sqrt(24)),
        "language": 5.0,
    }


def test_a_run_begun_by_an_older_version_goes_on(run: RunConfig, tmp_path: Path) -> None:
    old = {"stage": "align", "step": 0, "num_steps": 2, "total": 0, "loss": 1.0, "grad_norm": 1.0, "tokens": 3}
    old |= {"samples": 2, "flops": 10, "lr": {"connector": 1e-3}, "seconds": 0.5}
    file = tmp_path / "metrics.jsonl"
    file.write_text(json.dumps(old) + "\n")
    log = Log(file, 1, Trackers([], run, tmp_path, 1))
    assert log.first["align"] == old
    assert log.flops == 20
    log.close()
    assert not (tmp_path / "tracking").exists()


def test_what_was_told_is_told_once(tmp_path: Path) -> None:
    told = Told(tmp_path / "wandb.txt")
    assert [told.first_time(step) for step in (0, 1, 2)] == [True, True, True]
    again = Told(tmp_path / "wandb.txt")  # of the next process, which goes on at step 1
    assert again.id == told.id
    assert [again.first_time(step) for step in (1, 2, 3)] == [False, False, True]


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_trackers_are_refused_in_one_line(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(tmp_path / "not-there.yaml")  # never read
    assert cli.main([command, config, "--track", "tensorbord"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "unknown tracker 'tensorbord'; did you mean 'tensorboard'?" in said
    monkeypatch.setattr(trackers, "find_spec", lambda name: None if name == "wandb" else object())
    assert cli.main([command, config, "--track", "tensorboard", "--track", "wandb"]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said == "vlmzoo: error: --track wandb: wandb is not installed; pip install 'vlmzoo[tracking]' has it"


def test_a_tracker_that_does_not_start_says_so(run: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "tracking").mkdir()
    (tmp_path / "tracking" / "tensorboard").write_text("in its way")
    told = Trackers(["tensorboard"], run, tmp_path, 0)
    with pytest.raises(ValueError, match=r"^--track tensorboard: does not start \(.*tensorboard.*\)$"):
        told.log(line(0, 1.0))


def test_a_sweep_hands_them_to_its_trials(run: RunConfig, tmp_path: Path) -> None:
    trial = Trial(run, tmp_path / "trial", "mlp", "clip", "llama")
    command = train_command(tmp_path, [], ["tensorboard", "trackio"])(trial)
    assert command[-4:] == ["--track", "tensorboard", "--track", "trackio"]


def track_twice(name: str, run: RunConfig, out: Path) -> None:
    """Steps 0 to 3, then, as after a kill, 2 to 5."""
    for start in (0, 2):
        told = Trackers([name], run, out, start)
        for step in range(start, start + 4):
            told.log(line(step, 1.0 / (1 + step)))
        told.close()


def test_wandb_offline_holds_every_step_once(run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    track_twice("wandb", run, tmp_path)
    found, runs = [], set()
    for file in sorted(tmp_path.glob("tracking/wandb/offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime):
        content, place = file.read_bytes(), 7
        while place < len(content):  # LevelDB's log: checksum, length and kind before each record, all small here
            length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
            assert kind == 1
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content[place + 7 : place + 7 + length])
            place += 7 + length
            if record.HasField("run"):
                runs.add((record.run.project, record.run.run_id))
            if record.HasField("history"):
                losses = [item.value_json for item in record.history.item if "align/loss" in item.nested_key]
                found.append((record.history.step.num, float(losses[0])))
    assert len(runs) == 1
    assert found == [(step, pytest.approx(1 / (1 + step))) for step in range(6)]


def test_trackio_holds_every_step_once(run: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    pytest.importorskip("trackio", reason="trackio is not installed")
    from trackio.sqlite_storage import SQLiteStorage

    track_twice("trackio", run, tmp_path)
    (name,) = SQLiteStorage.get_runs("vlmzoo")
    found = [(entry["step"], entry["align/loss"]) for entry in SQLiteStorage.get_logs("vlmzoo", name)]
    assert found == [(step, pytest.approx(1 / (1 + step))) for step in range(6)]
