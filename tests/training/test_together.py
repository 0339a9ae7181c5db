"""Two processes: the losses, gradients and weights of one, however they share them; killed and started again, the same
bits; and never two trainings where one was meant.

`make test` runs DDP and FSDP2, `make test-scale` ZeRO too, which compiles an operator of DeepSpeed's at first use.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.checkpoints import run_values, write_data, write_models
from tests.training.conftest import metrics
from vlmzoo import build
from vlmzoo.config import RunConfig, parse
from vlmzoo.sweeps.trial import new_model, run_trial
from vlmzoo.training import processes
from vlmzoo.training.processes import Processes

ROOT = Path(__file__).parents[2]
scale = pytest.mark.scale
STRATEGIES = ["ddp", "fsdp2", pytest.param("zero2", marks=scale), pytest.param("zero3", marks=scale)]
CONNECTORS: dict[str, Any] = {
    "mlp": "mlp",
    "perceiver": {"name": "perceiver", "options": {"num_latents": 4, "num_layers": 2, "num_heads": 2, "head_dim": 8}},
    "qformer": {
        "name": "qformer",
        "options": {"num_queries": 4, "num_layers": 2, "hidden_size": 32, "num_heads": 2},
    },
    "gated_cross_attention": {
        "name": "gated_cross_attention",
        "options": {"every": 1, "num_heads": 2, "head_dim": 8},
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_models(tmp_path_factory.mktemp("mine"))
    write_data(folder)
    return folder


def stages(folder: Path, connector: str = "mlp") -> dict[str, Any]:
    """Captions; packed conversations, record by record, some of them text alone; and the encoder moving too."""
    values = run_values(folder, CONNECTORS[connector])
    del values["evaluation"]
    align, finetune = values["stages"]["align"], values["stages"]["finetune"]
    finetune |= {"micro_batch_size": 1, "packing": True}
    values["stages"] = {"align": align, "finetune": finetune}
    return values


def with_encoder(values: dict[str, Any]) -> dict[str, Any]:
    stage = {**values["stages"]["finetune"], "steps": 2, "packing": False}
    values["stages"]["whole"] = {**stage, "lr": {"vision": 1e-3, "connector": 1e-3, "language": 1e-3}}
    return values


def alone(values: dict[str, Any], out: Path) -> None:
    """The same run in one process, without parts and without packing."""
    values = {key: value for key, value in values.items() if key != "parallel"}
    plain = {"micro_batch_size": None, "packing": False}
    values["stages"] = {name: {**stage, **plain} for name, stage in values["stages"].items()}
    run_trial(parse(RunConfig, values), out, out / "cache")


def starter(values: dict[str, Any], out: Path) -> tuple[list[str], dict[str, str]]:
    """What starts two processes by torchrun, and its environment."""
    file = out.parent / f"{out.name}.yaml"
    file.write_text(yaml.safe_dump(values))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    given = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return [*torchrun, str(ROOT / "tests/training/together.py"), str(file), str(out)], given


def together(values: dict[str, Any], out: Path, **environment: str) -> tuple[int, str]:
    """Two processes: exit code and what they said."""
    command, given = starter(values, out)
    found = subprocess.run(command, env={**given, **environment}, capture_output=True, text=True)
    return found.returncode, found.stderr


def same_run(found: Path, expected: Path, values: dict[str, Any], rounding: float = 2e-6, drift: float = 1e-2) -> None:
    """Losses and norms to rounding, and each weight went the same way: AdamW's steps magnify where a gradient is 0."""
    for step, other in zip(metrics(found), metrics(expected), strict=True):
        assert step["loss"] == pytest.approx(other["loss"], rel=rounding), step
        assert step["grad_norm"] == pytest.approx(other["grad_norm"], rel=50 * rounding), step
        assert (step["tokens"], step["samples"]) == (other["tokens"], other["samples"])
    weights, reference = (load_file(out / "model" / "model.safetensors") for out in (found, expected))
    assert weights.keys() == reference.keys()
    before = new_model(build.resolve(parse(RunConfig, values)))[0].state_dict()
    for name, value in reference.items():
        moved = (
            value - before[name]
        ).norm() + 1e-3 * value.numel() ** 0.5  # keys' biases have no gradient but rounding
        assert (weights[name] - value).norm() <= drift * moved, name


def really(strategy: str, seen: list[dict[str, Any]]) -> None:
    """What the processes saw is what was asked for, in every stage."""
    for stage in seen:
        assert stage["processes"] == 2
        assert stage["trained"] > 0
        assert stage["ddp"] == (strategy == "ddp")
        assert stage["dtensors"] == (stage["trained"] if strategy == "fsdp2" else 0)
        assert stage["zero3"] == (stage["trained"] if strategy == "zero3" else 0)
        assert (stage["module"] == "DeepSpeedEngine") == strategy.startswith("zero")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_are_one_run_and_go_on_after_a_kill(strategy: str, folder: Path, tmp_path: Path) -> None:
    values = {**stages(folder), "parallel": strategy, "checkpoint_every": 2}
    if not strategy.startswith("zero"):
        with_encoder(values)
    alone(values, tmp_path / "alone")
    code, said = together(values, tmp_path / "whole")
    assert code == 0, said[-3000:]
    really(strategy, json.loads((tmp_path / "whole" / "seen.json").read_text()))
    same_run(tmp_path / "whole", tmp_path / "alone", values)
    code, _ = together(values, tmp_path / "cut", KILLED_AT="2.7")  # in the second stage, behind a checkpoint in it
    assert code != 0
    assert not (tmp_path / "cut" / "result.json").exists()
    code, said = together(values, tmp_path / "cut")
    assert code == 0, said[-3000:]
    assert json.loads((tmp_path / "cut" / "seen.json").read_text())  # it went on; a finished run makes no engine
    found, expected = (load_file(tmp_path / out / "model" / "model.safetensors") for out in ("cut", "whole"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


@pytest.mark.parametrize(
    "strategy", ["fsdp2", *(pytest.param(name, marks=scale) for name in ("ddp", "zero2", "zero3"))]
)
def test_a_full_disk_or_a_damaged_file_of_one_process_stops_or_sets_back_all(
    strategy: str, folder: Path, tmp_path: Path
) -> None:
    values = {**stages(folder), "parallel": strategy, "checkpoint_every": 1}
    alone(values, tmp_path / "alone")
    rank = 0 if strategy == "ddp" else 1  # whoever writes something within a stage
    code, said = together(values, tmp_path / "out", FULL_AT=f"{rank}.6")
    assert code != 0
    assert "No space left on device" in said
    kept = sorted((tmp_path / "out" / "checkpoints").glob("*"))
    assert len(kept) == 2  # whole ones; what could not be written is gone
    harmed = next(file for file in sorted(kept[-1].rglob("*"), reverse=True) if file.suffix in (".safetensors", ".pt"))
    data = bytearray(harmed.read_bytes())
    data[-1] ^= 1
    harmed.write_bytes(data)
    code, said = together(values, tmp_path / "out")
    assert code == 0, said[-3000:]
    assert said.count("checkpoint passed over") == 1
    assert harmed.name in said
    same_run(tmp_path / "out", tmp_path / "alone", values)


@scale
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_in_bfloat16(strategy: str, folder: Path, tmp_path: Path) -> None:
    values = {**stages(folder), "parallel": strategy, "dtype": "bfloat16"}
    alone(values, tmp_path / "alone")
    code, said = together(values, tmp_path / "whole")
    assert code == 0, said[-3000:]
    same_run(tmp_path / "whole", tmp_path / "alone", values, rounding=2e-3, drift=0.1)


@scale
@pytest.mark.parametrize("connector", [name for name in CONNECTORS if name != "mlp"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_every_kind_of_connector(strategy: str, connector: str, folder: Path, tmp_path: Path) -> None:
    """Latents of its own, text that it reads, layers inside the LLM."""
    values = {**stages(folder, connector), "parallel": strategy}
    alone(values, tmp_path / "alone")
    code, said = together(values, tmp_path / "whole")
    assert code == 0, said[-3000:]
    same_run(tmp_path / "whole", tmp_path / "alone", values)


@scale
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero2", "zero3"])
def test_adapters_are_shared_too(strategy: str, folder: Path, tmp_path: Path) -> None:
    values = {**stages(folder), "parallel": strategy}
    values["stages"]["finetune"]["lora"] = {"rank": 4, "alpha": 8, "dropout": 0.0}
    alone(values, tmp_path / "alone")
    code, said = together(values, tmp_path / "whole")
    assert code == 0, said[-3000:]
    same_run(tmp_path / "whole", tmp_path / "alone", values)


@scale
def test_accelerate_launch_starts_the_same_run(folder: Path, tmp_path: Path) -> None:
    values = {**stages(folder), "parallel": "fsdp2"}
    alone(values, tmp_path / "alone")
    command, given = starter(values, tmp_path / "whole")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    found = subprocess.run([*launch, *command[-3:]], env=given, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr[-3000:]
    same_run(tmp_path / "whole", tmp_path / "alone", values)


@scale
def test_accelerate_launch_without_processes_is_refused(folder: Path, tmp_path: Path) -> None:
    command, given = starter(stages(folder), tmp_path / "out")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    found = subprocess.run([*launch, *command[-3:]], env=given, capture_output=True, text=True)
    assert found.returncode != 0
    assert "accelerate launch was to start several processes and started one" in found.stderr


def test_a_loss_that_is_not_finite_stops_all_and_names_the_records(folder: Path, tmp_path: Path) -> None:
    values = {**stages(folder), "parallel": "fsdp2"}
    values["stages"]["align"] |= {"lr": {"connector": 1e30}, "schedule": "constant", "clip": None, "warmup_ratio": 0}
    code, said = together(values, tmp_path / "out")
    assert code != 0
    assert re.search(
        r"stage align, step [123]: loss (nan|inf|\d).*expected finite ones; records: captions.json\[", said
    )


def test_parts_of_a_step() -> None:
    step = list(range(12))
    one = Processes().micro_batches(step, None)
    assert one == [step]
    found = [Processes(rank, 3).micro_batches(step, 2) for rank in range(3)]
    assert [len(parts) for parts in found] == [2, 2, 2]  # as many in each process
    assert sorted(index for parts in found for part in parts for index in part) == step
    assert [parts[0] for parts in found] == [[0, 1], [2, 3], [4, 5]]  # neighbours, of one length where they are sorted


@pytest.mark.parametrize(
    ("changes", "environment", "message"),
    [
        ({"parallel": "fsdp2"}, {}, "parallel 'fsdp2': expected several processes, started by torchrun; this is one"),
        ({}, {"SLURM_STEP_NUM_TASKS": "4"}, "srun started 4 processes that know nothing of one another"),
        ({}, {"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes that know nothing of one another"),
        (
            {},
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"},
            "accelerate launch was to start several processes and started one; expected it with --multi_gpu",
        ),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP is set; expected parallel in the run"),
        ({}, {"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set; expected a start by torchrun"),
    ],
)
def test_a_wrong_start_is_refused_before_weights_load(
    changes: dict[str, Any],
    environment: dict[str, str],
    message: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    values = {**stages(folder), "encoder": "/nowhere", **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        run_trial(parse(RunConfig, values), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 5}, "stages.align.batch_size: 5 does not divide among 2 processes"),
        ({"lr": {"vision": 1e-3}}, "stages.align.lr.vision: DeepSpeed takes it that all processes compute the same"),
        ({"image_mode": "native"}, "stages.align.data.image_mode: DeepSpeed takes it that all processes compute"),
    ],
)
def test_what_several_processes_cannot_share_is_refused(changes: dict[str, Any], message: str, folder: Path) -> None:
    values = {**stages(folder), "parallel": "zero3"}
    if "image_mode" in changes:
        values["stages"]["align"]["data"] |= changes
    else:
        values["stages"]["align"] |= changes
    with pytest.raises(ValueError, match=re.escape(message)):
        processes.check(parse(RunConfig, values), Processes(0, 2))


def test_another_number_of_processes_is_refused_before_weights_load(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = stages(folder)
    run: Callable[[], Any] = lambda: run_trial(parse(RunConfig, values), tmp_path / "out")  # noqa: E731
    run()
    (tmp_path / "out" / "result.json").unlink()
    for state in (tmp_path / "out" / "checkpoints").glob("*/state.json"):
        state.write_text(json.dumps({**json.loads(state.read_text()), "processes": 8}))
    monkeypatch.setattr("vlmzoo.sweeps.trial.new_model", lambda run: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match="was written by 8 processes, 1 would go on; expected as many"):
        run()


def test_a_killed_starter_leaves_no_process(folder: Path, tmp_path: Path) -> None:
    """torchrun's processes would go on writing without it: their common output ends when the last of them does."""
    values = {**stages(folder), "parallel": "ddp"}
    values["stages"]["align"]["steps"] = 1000
    command, given = starter(values, tmp_path / "out")
    with subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("takes its first step")
        process.send_signal(signal.SIGKILL)
        process.stdout.read()
    assert not (tmp_path / "out" / "result.json").exists()
