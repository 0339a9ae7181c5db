"""Stages that cannot be had are refused in one line, before any weights are read."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmzoo import build
from vlmzoo.config import LoRAConfig, RunConfig, baseline, config_hash, parse
from vlmzoo.model import VisionLanguageModel
from vlmzoo.sweeps.trial import new_model, run_trial
from vlmzoo.training.check import check
from vlmzoo.training.stages import freeze, make_optimizer

BOTH = {"connector": 1e-3, "language": 1e-4}
RUN = {"steps": 1, "data": "none", "lr": BOTH}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 0}}, "key 'stages.finetune.lora.rank': expected at least 1, got 0"),
        ({"lora": {"dropout": 1}}, "key 'stages.finetune.lora.dropout': expected at least 0 and below 1, got 1.0"),
        ({"lora": {"quantise": "nf4"}}, "unknown key 'stages.finetune.lora.quantise': 'quantise'; did you mean"),
        ({"lora": {"quantize": "nf5"}}, "unknown value of stages.finetune.lora.quantize: 'nf5'; did you mean 'nf4'?"),
        (
            {"lora": {}, "lr": {"connector": 1e-3}},
            "stages.finetune.lora: needs a learning rate for 'language', got those of connector",
        ),
        (
            {"lora": {"targets": ["v_proj", "q_porj"]}},
            "stages.finetune.lora.targets: 'q_porj' matches none of 28 names; the nearest is 'q_proj'",
        ),
        ({"lora": {"targets": ["lm_head"]}}, "stages.finetune.lora.targets: 'lm_head' matches none of 28 names"),
        ({"lora": {"targets": []}}, "stages.finetune.lora.targets: expected at least one pattern, or all-linear"),
        (
            {"lora": {}, "only": {"language": ["*"]}},
            "stages.finetune.only.language: names the LLM's own weights, which lora freezes; name layers in lora",
        ),
        (
            {"only": {"vision": ["*"]}},
            "stages.finetune.only.vision: 'vision' has no learning rate, expected one of connector, language",
        ),
        ({"only": {"connector": []}}, "stages.finetune.only.connector: expected at least one pattern"),
        (
            {"only": {"vision": ["*.layers.2.*", "*.layers.3.*"]}, "lr": {"vision": 1e-4}},
            "stages.finetune.only.vision: '*.layers.3.*' matches none of",
        ),
        (
            {"only": {"connector": ["inner.layer.2.weight"]}},
            "stages.finetune.only.connector: 'inner.layer.2.weight' matches none of 4 names; "
            "the nearest is 'inner.layers.2.weight'",
        ),
        ({"only": {"visoin": ["*"]}}, "unknown value of stages.finetune.only: 'visoin'; did you mean 'vision'?"),
    ],
)  # fmt: skip
def test_it_is_refused_before_weights_are_read(
    changes: dict[str, Any], message: str, values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(build, "_pretrained", read)
    values["stages"]["finetune"] |= changes
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        run_trial(parse(RunConfig, values), tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stages", "parallel", "message"),
    [
        ([None], "ddp", "stages.last.lora.quantize: expected the LLM as it was loaded, but an earlier stage"),
        ([{"rank": 2}], "ddp", "stages.last.lora.quantize: expected the LLM as it was loaded, but an earlier stage"),
        ([], "zero3", "stages.last.lora.quantize: zero3 cannot shard quantized weights, expected ddp or zero2"),
        ([], "fsdp2", "stages.last.lora.quantize: fsdp2 cannot shard quantized weights, expected ddp or zero2"),
    ],
)  # fmt: skip
def test_what_quantized_weights_exclude(stages: list[Any], parallel: str, message: str, values: dict[str, Any]) -> None:
    earlier = {f"stage{index}": {**RUN, "lora": lora} for index, lora in enumerate(stages)}
    values |= {"stages": {**earlier, "last": {**RUN, "lora": {"quantize": "nf4"}}}, "parallel": parallel}
    with pytest.raises(ValueError, match=re.escape(message)):
        check(parse(RunConfig, values))
    values |= {"parallel": "ddp"}
    for stage in earlier.values():
        stage["steps"] = 0  # is skipped, and moves nothing
    check(parse(RunConfig, values))


@pytest.mark.parametrize(("package", "extra"), [("peft", "lora"), ("bitsandbytes", "qlora")])
def test_a_library_that_is_not_there_is_named(
    package: str, extra: str, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest)
    )
    values["stages"]["finetune"]["lora"] = {"quantize": "int8"}
    with pytest.raises(ValueError, match=rf"stages\.finetune\.lora.* needs {package}, got none; .*vlmzoo\[{extra}\]"):
        check(parse(RunConfig, values))


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
def test_names_without_weights_are_those_with_them(encoder: str, values: dict[str, Any], folder: Path) -> None:
    """Every pattern of one parameter is found, in one encoder and in two side by side."""
    values["encoder"] = f"{folder / 'clip'}+{folder / encoder}" if encoder != "clip" else values["encoder"]
    model, _ = new_model(build.resolve(parse(RunConfig, values)))
    names: dict[str, list[str]] = {"vision": [], "connector": [], "language": []}
    for name, _ in model.named_parameters():
        part, _, inner = name.partition(".")
        names[part].append(inner)
    values["stages"] = {"all": {**RUN, "lr": {**BOTH, "vision": 1e-4}, "only": names}}
    check(parse(RunConfig, values))


def test_the_chosen_parameters_train_and_no_others(values: dict[str, Any], tmp_path: Path) -> None:
    values["stages"] = {
        "finetune": {
            **values["stages"]["finetune"],
            "lr": {**BOTH, "vision": 1e-3},
            "only": {"vision": ["*.layers.1.*", "*.position_embedding.*"], "language": ["*.mlp.down_proj.*"]},
        }
    }
    run = parse(RunConfig, values)
    before = new_model(build.resolve(run))[0]
    run_trial(run, tmp_path, tmp_path / "cache")
    after = VisionLanguageModel.from_pretrained(tmp_path / "model")
    moved = {name for name, value in after.named_parameters() if not torch.equal(value, before.get_parameter(name))}
    tower = dict(after.vision.named_parameters(prefix="vision"))
    chosen = {name for name in tower if ".layers.1." in name or ".position_embedding." in name}
    assert len(chosen) == 17
    chosen |= {f"language.model.layers.{index}.mlp.down_proj.weight" for index in range(3)}
    chosen |= {name for name in dict(after.named_parameters()) if name.startswith("connector")}
    assert moved | {name for name in chosen if name.endswith("k_proj.bias")} == chosen  # which change no softmax
    assert not list((tmp_path / "cache").rglob("features/**/*.safetensors"))


def test_what_is_left_out_of_a_part_has_no_gradient_and_no_optimizer(values: dict[str, Any]) -> None:
    values["stages"]["finetune"] |= {"only": {"connector": ["*.weight"], "language": ["*.layers.2.*"]}}
    run = build.resolve(parse(RunConfig, values))
    model, _ = new_model(run)
    freeze(model, run.stages["finetune"])
    optimizer = make_optimizer(model, run.stages["finetune"])
    held = {id(value) for group in optimizer.param_groups for value in group["params"]}
    asked = {name for name, value in model.named_parameters() if value.requires_grad}
    assert held == {id(model.get_parameter(name)) for name in asked}
    language = {name for name in dict(model.language.named_parameters(prefix="language")) if ".layers.2." in name}
    assert asked == language | {f"connector.inner.layers.{index}.weight" for index in (0, 2)}
    stage = dataclasses.replace(run.stages["finetune"], only={"language": ["*.layers.7.*"]})
    with pytest.raises(ValueError, match=r"only\.language: '\*\.layers\.7\.\*' matches none of"):
        freeze(model, stage)


def test_a_baseline_keeps_what_is_said_of_the_llm(values: dict[str, Any]) -> None:
    values["stages"]["finetune"] |= {"only": {"connector": ["*.weight"], "language": ["*.layers.2.*"]}}
    blind = baseline(parse(RunConfig, values), "blind")
    assert blind.stages["finetune"].only == {"language": ["*.layers.2.*"]}
    values["stages"]["finetune"] |= {"only": {"connector": ["*.weight"]}, "lora": {"rank": 4}}
    blind = baseline(parse(RunConfig, values), "blind")
    assert blind.stages["finetune"].only is None
    assert blind.stages["finetune"].lora == LoRAConfig(rank=4)
    check(blind)


def test_runs_without_adapters_keep_their_hash(values: dict[str, Any]) -> None:
    plain = parse(RunConfig, values)
    values["stages"]["finetune"] |= {"lora": None, "only": None}
    assert config_hash(parse(RunConfig, values)) == config_hash(plain)
    values["stages"]["finetune"]["lora"] = {}
    assert config_hash(parse(RunConfig, values)) != config_hash(plain)
    default = parse(RunConfig, values).stages["finetune"].lora
    assert default == LoRAConfig(rank=128, alpha=256, dropout=0.05, targets="all-linear", quantize=None)
