"""The one loop: what it computes, what it leaves alone, and that it ends the same wherever it was stopped."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from tests.checkpoints import run_values
from tests.tiny import LLAMA
from tests.training.conftest import Trained, metrics
from vlmzoo import build
from vlmzoo.config import RunConfig, StageConfig, config_hash, parse
from vlmzoo.data.images import ImageError
from vlmzoo.data.order import batches
from vlmzoo.data.prefetch import prefetched
from vlmzoo.language.layers import decoder_layers
from vlmzoo.model import VisionLanguageModel
from vlmzoo.samples import SampleSet
from vlmzoo.sweeps.trial import new_model, run_trial
from vlmzoo.training import run as loop
from vlmzoo.training.engines import Engine
from vlmzoo.training.processes import Processes
from vlmzoo.training.run import flop_counter
from vlmzoo.training.stages import freeze, rate

Train = Callable[..., Trained]


def same(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The names of weights that differ in any bit."""
    assert found.keys() == expected.keys()
    return [name for name in expected if not torch.equal(found[name], expected[name])]


def stop_at(monkeypatch: pytest.MonkeyPatch, number: int, error: BaseException) -> None:
    """The step with this number (from 0, over all stages) raises before it does anything."""
    take_step, taken = loop.take_step, iter(range(1000))

    def step(*arguments: Any) -> dict[str, Any]:
        if next(taken) == number:
            raise error
        return take_step(*arguments)

    monkeypatch.setattr(loop, "take_step", step)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("straight")


@pytest.mark.parametrize("number", [1, 3, 4, 5, 7])
def test_stopped_at_any_step_it_ends_the_same(
    number: int,
    values: dict[str, Any],
    tmp_path: Path,
    straight: Path,
    train_in: Train,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected, _ = train_in(values, straight)  # computed once: afterwards its checkpoint is read
    with monkeypatch.context() as patched:
        stop_at(patched, number, RuntimeError("stopped"))
        with pytest.raises(RuntimeError, match="stopped"):
            train_in(values, tmp_path)
    found, result = train_in(values, tmp_path)
    assert same(found, expected) == []
    assert metrics(tmp_path) == metrics(straight)
    assert [line["step"] for line in metrics(tmp_path)] == [0, 1, 2, 3] * 2
    assert set(result.final_loss) == {"align", "finetune"}


def test_dropout_and_order_have_their_own_seeds(values: dict[str, Any], tmp_path: Path, train_in: Train) -> None:
    weights = {}
    for index, seed in enumerate([{}, {"dropout": 1}, {"data": 1}, {"init": 1}, {}]):
        weights[index] = train_in({**values, "seed": seed}, tmp_path / str(index))[0]
    assert same(weights[4], weights[0]) == []
    for index in (1, 2, 3):
        assert same(weights[index], weights[0]) != [], index
    first = [metrics(tmp_path / str(index))[0]["loss"] for index in range(4)]
    assert first[1] == first[0]  # stage 1 freezes the LLM: no dropout there
    assert first[2] != first[0]
    assert first[3] != first[0]


def test_killed_and_started_again_it_ends_the_same(values: dict[str, Any], tmp_path: Path) -> None:
    plugin = tmp_path / "dies.py"
    plugin.write_text(
        "import os, signal\n"
        "from torch import nn\n"
        "from vlmzoo.connector import TokenConnector, register\n"
        "@register('dies')\n"
        "class Dies(TokenConnector):\n"
        '    """Kills its process in one of its forwards."""\n'
        "    def __init__(self, vision_dim, text_dim):\n"
        "        super().__init__()\n"
        "        self.project, self.forwards = nn.Linear(vision_dim, text_dim), 0\n"
        "    def num_tokens(self, grid):\n"
        "        return grid[0] * grid[1]\n"
        "    def forward(self, patches, grid):\n"
        "        self.forwards += 1\n"
        "        if str(self.forwards) == os.environ.get('DIES_AT'):\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return self.project(patches)\n"
    )
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**values, "connector": "dies"}))

    def train(out: str, **environment: str) -> int:
        command = [sys.executable, "-m", "vlmzoo", "train", str(file), "--plugin", str(plugin), "--out", out]
        return subprocess.run(command, cwd=tmp_path, env={**os.environ, **environment}, capture_output=True).returncode

    root = str(Path(__file__).parents[2])
    assert train("cut", PYTHONPATH=root, DIES_AT="6") == -signal.SIGKILL
    assert train("cut", PYTHONPATH=root) == 0
    assert train("whole", PYTHONPATH=root) == 0
    found, expected = (load_file(tmp_path / out / "model" / "model.safetensors") for out in ("cut", "whole"))
    assert same(found, expected) == []
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")


def test_ctrl_c_ends_the_step_and_keeps_it(
    values: dict[str, Any], tmp_path: Path, straight: Path, train_in: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = train_in(values, straight)
    take_step, taken = loop.take_step, []

    def step(*arguments: Any) -> dict[str, Any]:
        taken.append(None)
        if len(taken) == 2:
            signal.raise_signal(signal.SIGINT)
        return take_step(*arguments)

    monkeypatch.setattr(loop, "take_step", step)
    with pytest.raises(KeyboardInterrupt):
        train_in(values, tmp_path)
    assert len(metrics(tmp_path)) == 2
    found, _ = train_in(values, tmp_path)
    assert len(taken) == 8  # no step was taken twice
    assert same(found, expected) == []


@pytest.mark.parametrize("size", [1, 3])
def test_any_split_of_a_batch_gives_the_same_updates(
    size: int, values: dict[str, Any], tmp_path: Path, train_in: Train
) -> None:
    del values["stages"]["finetune"]["lr"]["language"]  # whose dropout is drawn batch by batch
    whole, _ = train_in(values, tmp_path / "whole")
    for stage in values["stages"].values():
        stage["micro_batch_size"] = size
    split, _ = train_in(values, tmp_path / "split")
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-4, atol=1e-6)
    for found, expected in zip(metrics(tmp_path / "split"), metrics(tmp_path / "whole"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert found["tokens"] == expected["tokens"]


def engine_of(model: VisionLanguageModel, stage: StageConfig, run: RunConfig) -> Engine:
    freeze(model, stage)
    return Engine(model, [stage], run, Processes())


def test_the_loss_is_summed_over_targets_and_divided_once(values: dict[str, Any]) -> None:
    run = build.resolve(parse(RunConfig, values))
    model, processor = new_model(run)
    stage = run.stages["finetune"]
    stage.micro_batch_size = 1
    data = SampleSet(model, processor, stage.data)
    chosen = [0, 4, 6]  # one picture, text alone, two pictures: of different numbers of targets
    total, count = 0.0, 0
    with torch.no_grad():
        for sample in data.samples(chosen):
            batch = data.batch([sample])
            logits = model(**{key: value for key, value in batch.items() if key != "labels"}).logits.double()
            labels = batch["labels"][0, 1:]
            total += F.cross_entropy(logits[0, :-1], labels, reduction="sum").item()
            count += int((labels != -100).sum())
    engine = engine_of(model, stage, run)
    model.eval()  # without dropout, as above
    figures = loop.take_step(engine, data, loop.make_step(engine, data, chosen))
    assert figures["loss"] == pytest.approx(total / count, rel=1e-5)
    assert figures["tokens"] == count


def test_features_are_cached_until_the_encoder_moves(values: dict[str, Any], tmp_path: Path, train_in: Train) -> None:
    """What one run alone could use is not written to the folder that all share."""
    values["stages"]["align"]["lr"]["vision"] = 1e-4
    run = build.resolve(parse(RunConfig, values))
    assert [loop.moves_vision(run, index) for index in range(2)] == [True, True]
    values["stages"] = {"first": values["stages"]["finetune"], **values["stages"]}
    run = build.resolve(parse(RunConfig, values))
    assert [loop.moves_vision(run, index) for index in range(3)] == [False, True, True]
    train_in(values, tmp_path / "out", tmp_path / "cache")
    assert len(list((tmp_path / "cache" / "features").rglob("*.safetensors"))) == 1
    assert len(list((tmp_path / "cache" / "tokens").rglob("*.safetensors"))) == 2  # what both templates make of it


def test_images_of_many_sizes_train_and_answer_in_tiles(folder: Path, tmp_path: Path) -> None:
    """Slots, crops and sizes go together through both stages, the evaluation and its images that are swapped."""
    shutil.copytree(folder, tmp_path / "mine")
    for index, path in enumerate(sorted((tmp_path / "mine" / "images").iterdir())):
        with Image.open(path) as image:
            image.resize((10 + 7 * (index % 5), 20 + 9 * (index % 4))).save(path)
    values = run_values(tmp_path / "mine", "anyres")
    values["evaluation"]["colors"]["shuffled"] = 8
    run = build.resolve(parse(RunConfig, values))
    model, processor = new_model(run)
    data = SampleSet(model, processor, run.stages["finetune"].data, tmp_path / "cache")
    batch = data.batch(data.samples(range(8)))
    assert len({tuple(size) for size in batch["image_sizes"].tolist()}) > 3
    assert len(batch["pixel_values"]) == batch["num_crops"].sum() > 2 * len(batch["num_crops"])
    assert model(**batch).loss.isfinite()
    result = run_trial(run, tmp_path / "trial", tmp_path / "cache")
    assert result["visual_tokens"] == 9 + 3 * 5
    assert not list((tmp_path / "cache").rglob("features/**/*.safetensors"))


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_the_gradient_is_clipped_over_all_parts(values: dict[str, Any], clip: float | None) -> None:
    run = build.resolve(parse(RunConfig, values))
    stage = dataclasses.replace(run.stages["finetune"], clip=clip)
    model, processor = new_model(run)
    engine = engine_of(model, stage, run)
    data = SampleSet(model, processor, stage.data)
    figures = loop.take_step(engine, data, loop.make_step(engine, data, [0, 1]))
    gradients = [value.grad for value in model.parameters() if value.grad is not None]
    norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    assert figures["grad_norm"] > 0.1  # before it is clipped
    assert norm == pytest.approx(figures["grad_norm"] if clip is None else clip, rel=1e-3)


def test_what_is_frozen_stays_as_it_is(
    values: dict[str, Any], tmp_path: Path, train_in: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[set[str], set[str], int]] = []
    take_step = loop.take_step

    def step(engine: Engine, *rest: Any) -> dict[str, Any]:
        figures = take_step(engine, *rest)
        model, optimizer = engine.model, engine.optimizer
        training = {name.split(".")[0] for name, module in model.named_modules() if name and module.training}
        moved = {name.split(".")[0] for name, value in model.named_parameters() if value.grad is not None}
        seen.append((training, moved, sum(len(group["params"]) for group in optimizer.param_groups)))
        return figures

    monkeypatch.setattr(loop, "take_step", step)
    before = new_model(build.resolve(parse(RunConfig, values)))[0].state_dict()
    del values["stages"]["finetune"]
    after, result = train_in(values, tmp_path)
    assert seen[-1] == ({"connector"}, {"connector"}, 4)
    changed = {name.split(".")[0] for name in same(after, before)}
    assert changed == {"connector"}
    assert result.trainable_parameters == {"align": 32 * 48 + 48 + 48 * 48 + 48}


def test_what_a_connector_leaves_untrained_has_no_optimizer(
    values: dict[str, Any], tmp_path: Path, train_in: Train
) -> None:
    options = {"num_queries": 3, "num_layers": 1, "hidden_size": 16, "num_heads": 2}
    values["connector"] = {"name": "minigpt4", "options": options}
    before = new_model(build.resolve(parse(RunConfig, values)))[0].state_dict()
    after, result = train_in(values, tmp_path)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    moved = {name for name in changed if name.startswith("connector.")}
    assert moved == {"connector.project.weight", "connector.project.bias"}
    assert result.trainable_parameters["align"] == sum(before[name].numel() for name in moved)


def test_a_stage_of_no_steps_is_skipped(values: dict[str, Any], tmp_path: Path, train_in: Train) -> None:
    values["stages"]["align"]["steps"] = 0
    _, result = train_in(values, tmp_path)
    assert {line["stage"] for line in metrics(tmp_path)} == {"finetune"}
    assert set(result.final_loss) == {"finetune"}


def test_text_alone_trains_too(values: dict[str, Any], tmp_path: Path, train_in: Train) -> None:
    values["stages"]["align"] = {**values["stages"]["finetune"], "lr": {"connector": 1e-3}}  # nothing to move by text
    for stage in values["stages"].values():
        stage |= {"batch_size": 1, "steps": 16}
    train_in(values, tmp_path)
    assert len(metrics(tmp_path)) == 32
    assert 0.0 in [line["grad_norm"] for line in metrics(tmp_path)[:16]]


def test_bfloat16_keeps_trained_weights_in_float32(values: dict[str, Any], tmp_path: Path, train_in: Train) -> None:
    weights, _ = train_in({**values, "dtype": "bfloat16"}, tmp_path)
    for name, value in weights.items():
        assert value.dtype == (torch.bfloat16 if name.startswith("vision") else torch.float32), name
    exact, _ = train_in(values, tmp_path / "float32")
    for found, expected in zip(metrics(tmp_path), metrics(tmp_path / "float32"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=0.05)
    assert exact


def test_recomputed_activations_give_the_same_run(values: dict[str, Any], tmp_path: Path, train_in: Train) -> None:
    expected, _ = train_in(values, tmp_path / "plain")
    for stage in values["stages"].values():
        stage["gradient_checkpointing"] = True
    found, _ = train_in(values, tmp_path / "recomputed")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [{"packing": True}, {"packing": True, "micro_batch_size": 2}, {"group_by": "length", "micro_batch_size": 2}],
)
def test_how_a_step_is_laid_out_does_not_change_it(
    options: dict[str, Any], values: dict[str, Any], tmp_path: Path, train_in: Train
) -> None:
    del values["stages"]["finetune"]["lr"]["language"]  # whose dropout is drawn batch by batch
    whole, _ = train_in(values, tmp_path / "whole")
    for stage in values["stages"].values():
        stage |= options
    other, _ = train_in(values, tmp_path / "other")
    for name, value in whole.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6)
    for found, expected in zip(metrics(tmp_path / "other"), metrics(tmp_path / "whole"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_parts_of_a_step_hold_samples_of_like_length(values: dict[str, Any]) -> None:
    run = build.resolve(parse(RunConfig, values))
    model, processor = new_model(run)
    stage = dataclasses.replace(run.stages["finetune"], group_by="modality_length", batch_size=8)
    data = SampleSet(model, processor, stage.data)
    plain = dataclasses.replace(stage, group_by=None)
    for batch in itertools.islice(data.order(stage, 0), 4):
        words = [sum(len(turn.text.split()) for turn in data.records[index].turns) for index in batch]
        assert words == sorted(words, reverse=True)
    alike = dataclasses.replace(stage, group_by="length")
    for batch, other in zip(data.order(alike, 0), itertools.islice(data.order(plain, 0), 4), strict=False):
        assert sorted(batch) == sorted(other)  # the same steps


def test_compiled_layers_give_the_same_run(
    values: dict[str, Any], tmp_path: Path, train_in: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated ahead, as for a kernel compiler, but run by PyTorch's own kernels."""
    compile_layers, traced = torch.compile, []
    del values["stages"]["align"]
    values["connector"] = {"name": "gated_cross_attention", "options": {"every": 1, "num_heads": 2, "head_dim": 8}}
    del values["stages"]["finetune"]["lr"]["language"]
    expected, _ = train_in(values, tmp_path / "plain")

    def traced_compile(function: Any, **options: Any) -> Any:
        traced.append(function)
        return compile_layers(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", traced_compile)
    values["stages"]["finetune"] |= {"compile": True, "packing": True}
    found, _ = train_in(values, tmp_path / "compiled")
    assert len(traced) == 3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


def test_what_an_elementwise_operation_gives_back_is_not_kept(
    values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = build.resolve(parse(RunConfig, values))
    model, processor = new_model(run)
    data = SampleSet(model, processor, run.stages["finetune"].data)
    engine = engine_of(model, run.stages["finetune"], run)
    gates: list[weakref.ref[Any]] = []
    layers: Any = decoder_layers(model.language)
    for layer in layers:
        layer.mlp.act_fn.register_forward_hook(
            lambda module, args, output: gates.append(weakref.ref(output.untyped_storage()))
        )
    kept: list[int] = []
    monkeypatch.setattr(engine, "differentiate", lambda *_: kept.append(sum(gate() is not None for gate in gates)))
    engine.backward(data.to_device(data.on_host(data.samples([0, 4]))), 3, last=True)
    assert len(gates) == len(layers)
    assert kept == [0]


@pytest.mark.parametrize("llm", ["llama", "qwen2_vl_text"])
def test_an_idle_image_changes_nothing_and_reaches_every_weight(llm: str, values: dict[str, Any]) -> None:
    """A batch without images, with one that no sample sees: the same loss, and a gradient of 0 in the connector."""
    if llm != "llama":  # which takes positions on the grids of images
        rotary = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 2, 2]}
        config = {**LLAMA, "model_type": llm, "rope_parameters": rotary}
        values["llm"] = {"config": config, "tokenizer": values["llm"]}
    run = build.resolve(parse(RunConfig, values))
    model, processor = new_model(run)
    data = SampleSet(model, processor, run.stages["finetune"].data)
    host = data.on_host(data.samples([4, 9]))
    engine = engine_of(model, run.stages["finetune"], run)
    model.eval()
    assert "idle_images" in data.to_device(host, idle=True)
    assert "idle_images" not in data.to_device(data.on_host(data.samples([0, 4])), idle=True)
    plain = engine.backward(data.to_device(host), 3, last=True)
    assert all(parameter.grad is None for parameter in model.connector.parameters())
    engine.clear()
    idle = engine.backward(data.to_device(host, idle=True), 3, last=True)
    assert torch.equal(idle, plain)
    for parameter in model.connector.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_a_loss_that_is_not_finite_names_its_records(values: dict[str, Any]) -> None:
    run = build.resolve(parse(RunConfig, values))
    model, processor = new_model(run)
    stage = run.stages["align"]
    data = SampleSet(model, processor, stage.data)
    engine = engine_of(model, stage, run)
    with torch.no_grad():
        model.get_parameter("language.lm_head.weight").fill_(torch.nan)
    before = {name: value.clone() for name, value in model.connector.state_dict().items()}
    with pytest.raises(ValueError, match=r"loss nan .*records: captions.json\[3\] .*captions.json\[5\]"):
        loop.take_step(engine, data, loop.make_step(engine, data, [3, 5]))
    assert same(model.connector.state_dict(), before) == []


@pytest.mark.parametrize(
    ("schedule", "reference"),
    [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)],
)
def test_schedules_are_those_of_transformers(schedule: Any, reference: Any) -> None:
    """After the warm-up; in it, the first step already moves instead of taking a rate of 0."""
    stage = StageConfig(data=None, lr={"connector": 1.0}, schedule=schedule, warmup_ratio=0.1)  # pyright: ignore
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = reference(optimizer, num_warmup_steps=5, num_training_steps=50)
    for step in range(50):
        expected = scheduler.get_last_lr()[0] if step >= 5 else (step + 1) / 5
        assert rate(stage, step, 50) == pytest.approx(expected, abs=1e-9), step
        optimizer.step()
        scheduler.step()


def test_each_part_has_its_own_rate(values: dict[str, Any], tmp_path: Path, train_in: Train) -> None:
    values["stages"]["finetune"]["lr"] = {"connector": 1e-3, "language": 1e-4, "vision": 1e-5}
    before = new_model(build.resolve(parse(RunConfig, values)))[0].state_dict()
    after, _ = train_in(values, tmp_path)
    for line in metrics(tmp_path)[4:]:
        assert line["lr"]["connector"] == pytest.approx(10 * line["lr"]["language"])
        assert line["lr"]["language"] == pytest.approx(10 * line["lr"]["vision"])
    assert {name.split(".")[0] for name in same(after, before)} == {"connector", "language", "vision"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": {}}, "stages.finetune: a stage needs a learning rate for at least one of vision, connector, language"),
        ({"epochs": 1}, "stages.finetune: a stage needs either steps or epochs, got steps=4 and epochs=1.0"),
        ({"steps": None}, "stages.finetune: a stage needs either steps or epochs, got steps=None and epochs=None"),
    ],
)
def test_a_stage_that_cannot_be_trained_is_refused_before_the_first_one(
    changes: dict[str, Any], message: str, values: dict[str, Any], tmp_path: Path
) -> None:
    values["stages"]["finetune"] |= changes
    with pytest.raises(ValueError, match=re.escape(message)):
        run_trial(parse(RunConfig, values), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_flops_of_attention_are_those_of_its_products() -> None:
    """Two products forward; five backward, one of them the scores again, which a fused kernel does not keep."""
    batch, heads, length, keys, dim = 2, 3, 5, 7, 4
    q = torch.randn(batch, heads, length, dim, requires_grad=True)
    k, v = (torch.randn(batch, heads, keys, dim, requires_grad=True) for _ in range(2))
    with flop_counter() as counter:
        out = F.scaled_dot_product_attention(q, k, v)
    product = 2 * batch * heads * length * keys * dim
    assert counter.get_total_flops() == 2 * product
    with flop_counter() as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * product


def test_flops_of_a_layer_are_three_products() -> None:
    layer = nn.Linear(4, 6)
    with flop_counter() as counter:
        layer(torch.randn(5, 4, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * 4 * 6


@pytest.mark.parametrize("cached", [False, True])
def test_batches_made_ahead_are_those_made_in_turn(values: dict[str, Any], tmp_path: Path, cached: bool) -> None:
    run = build.resolve(parse(RunConfig, values))
    model, processor = new_model(run)
    data = SampleSet(model, processor, run.stages["finetune"].data, tmp_path / "cache" if cached else None)
    data.open_cache()
    order = list(itertools.islice(batches(len(data), 4, 0), 10))
    ahead = prefetched(order, lambda indices: data.on_host(data.samples(indices)), 3, workers=2)
    for indices, host in zip(order, ahead, strict=True):
        found, expected = data.to_device(host), data.batch(data.samples(indices))
        assert found.keys() == expected.keys()
        assert ("image_features" in found) == cached
        for key, value in found.items():
            if key == "image_features":
                assert torch.equal(value[0].values, expected[key][0].values)
            elif key == "layout":
                assert torch.equal(value.targets, expected[key].targets)
                assert (value.lengths, value.slots) == (expected[key].lengths, expected[key].slots)
            else:
                assert torch.equal(value, expected[key])


def test_an_image_that_breaks_is_named_when_its_batch_has_its_turn(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "mine")
    (tmp_path / "mine" / "images" / "2-0.png").write_bytes(b"no image")
    run = build.resolve(parse(RunConfig, run_values(tmp_path / "mine")))
    model, processor = new_model(run)
    data = SampleSet(model, processor, run.stages["finetune"].data)
    ahead = prefetched(range(4), lambda index: data.on_host(data.samples([index])), 4)
    assert len([next(ahead), next(ahead)]) == 2
    with pytest.raises(ImageError, match=r"record-2.*2-0.png cannot be decoded"):
        next(ahead)


def test_narrower_features_are_another_run_near_the_first(
    values: dict[str, Any], tmp_path: Path, train_in: Train
) -> None:
    exact = train_in(values, tmp_path / "exact", tmp_path / "cache")[1].final_loss
    key = config_hash(parse(RunConfig, values))
    for features in ("bfloat16", "float8"):
        values["features"] = features
        assert config_hash(parse(RunConfig, values)) != key
        result = train_in(values, tmp_path / features, tmp_path / "cache")[1]
        loss = result.final_loss
        assert result.feature_error.keys() == {"align", "finetune"}
        assert all(0 < error < 0.04 for error in result.feature_error.values())
        assert loss != exact
        assert loss == pytest.approx(exact, rel=0.05)


def test_the_manifest_says_how_far_narrower_features_are_off(values: dict[str, Any], tmp_path: Path) -> None:
    run = parse(RunConfig, {**values, "features": "float8"})
    run_trial(run, tmp_path / "trial", tmp_path / "cache")
    errors = json.loads((tmp_path / "trial" / "manifest.json").read_text())["feature_error"]
    assert errors.keys() == {"align", "finetune"}
    assert all(0 < error < 0.04 for error in errors.values())
