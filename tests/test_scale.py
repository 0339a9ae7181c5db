"""docs/scale.md: its tables are what the script counts, its counts are right, and its commands are this program's."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from experiments.benchmarks import capacity
from experiments.benchmarks import capacity_model as model
from experiments.benchmarks.capacity_model import A100, H100, H200, LLMS, LORA, TUNE, Llm
from vlmzoo import cli, commands
from vlmzoo.config import RunConfig, load

PAGE = (Path(__file__).parents[1] / "docs/scale.md").read_text()
SMALL = Llm("small", 384, 1032, 2)
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_its_tables_are_counted() -> None:
    assert capacity.render(PAGE) == PAGE, "run `make docs`"


def test_a_marker_that_nobody_fills_is_refused() -> None:
    with pytest.raises(ValueError, match="markers nothing: expected"):
        capacity.render("<!-- capacity: nothing -->\n<!-- end -->\n")


@pytest.mark.parametrize("trained", [False, True])
def test_a_layer_is_counted_at_any_length(trained: bool) -> None:
    found, length = model.decoder_layer(SMALL, 300, trained), 300
    assert found == model.counted_layer(SMALL, length, trained)
    linear, attention = SMALL.layer_parameters - 2 * SMALL.dim, 2 * length**2 * SMALL.dim
    assert found.forward == 2 * linear * length + 2 * attention
    assert found.backward == (4 if trained else 2) * linear * length + 5 * attention


class Layer(LlamaDecoderLayer):
    """Takes the hidden states alone."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        rotary = torch.zeros(1, hidden.shape[1], 128)
        return super().forward(hidden, position_embeddings=(rotary, rotary))


@pytest.mark.parametrize("trained", [False, True])
def test_layers_keep_as_much_as_one_keeps(trained: bool) -> None:
    torch.set_default_dtype(torch.float32 if trained else torch.bfloat16)
    try:
        with FakeTensorMode():
            layers = nn.Sequential(*(Layer(SMALL.config, index) for index in range(3))).requires_grad_(trained)
            hidden = torch.zeros(1, 300, SMALL.dim, requires_grad=True)
            found = model.count(layers, lambda: layers(hidden), autocast=trained)
    finally:
        torch.set_default_dtype(torch.float32)
    alone = model.decoder_layer(SMALL, 300, trained)
    assert found.forward == 3 * alone.forward
    assert found.kept == pytest.approx(3 * alone.kept, rel=0.02)  # a layer's end is the next one's start


def test_the_real_shapes_are_the_real_ones() -> None:
    for llm, parameters in zip(LLMS, (6_738_415_616, 13_015_864_320), strict=True):
        with torch.device("meta"):
            whole = LlamaForCausalLM(llm.config)
        assert llm.parameters == sum(p.numel() for p in whole.parameters()) == parameters
        linears = [m for name, m in whole.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]
        assert llm.lora_parameters == sum(128 * (m.in_features + m.out_features) for m in linears)
    assert model.encoder().forward == pytest.approx(0.382e12, rel=2e-3)
    assert model.connector("mlp", LLMS[0], 24)[0].forward == pytest.approx(0.024e12, rel=1e-2)


def test_memory_and_traffic_follow_the_strategy() -> None:
    llm = LLMS[0]
    trained, frozen = model.parameters(TUNE, "mlp", llm, "ddp")
    assert trained == llm.parameters + model.connector("mlp", llm, TUNE.text)[0].parameters
    alone = model.memory(TUNE, "mlp", llm, "ddp", 8)
    assert alone.weights + alone.gradients + alone.optimizer == 18 * trained + 2 * frozen
    assert model.traffic(TUNE, "mlp", llm, "ddp", 8) == 2 * 4 * trained * 7 / 8
    assert model.traffic(TUNE, "mlp", llm, "ddp", 1) == 0
    sizes = {s: model.memory(TUNE, "mlp", llm, s, 8).total for s in (*model.STRATEGIES, LORA)}
    assert sizes["ddp"] > sizes["zero2"] > sizes["fsdp2"]
    assert sizes[LORA] < sizes["zero2"]
    assert model.memory(TUNE, "mlp", llm, "fsdp2", 64).total < sizes["fsdp2"]
    assert model.activations(TUNE, "mlp", llm) < model.activations(TUNE, "mlp", llm, checkpointing=False) / 5


def test_a_plan_keeps_within_memory_and_grows_no_slower() -> None:
    small, large = LLMS
    assert model.run_hours("mlp", small, A100, 1) is None
    assert model.run_hours("mlp", small, A100, 1, lora=True) is not None
    assert model.plan(large, A100, 1) is None  # gated cross-attention's own layers do not fit beside the 13B
    for llm in LLMS:
        for gpu in (A100, H100, H200):
            plans = [plan for cluster in model.CLUSTERS if (plan := model.plan(llm, gpu, cluster)) is not None]
            assert [plan.hours for plan in plans] == sorted((plan.hours for plan in plans), reverse=True)
            assert all(plan.at_once <= 15 for plan in plans)
    longest = max(model.run_hours(name, small, H100, 64) or 0.0 for name in model.CONNECTORS)
    plan = model.plan(small, H100, 512)
    assert plan is not None
    assert plan.hours >= longest


def test_published_hours_are_within_a_third() -> None:
    for (name, stage), published in model.PUBLISHED.items():
        llm = next(llm for llm in LLMS if llm.name == name)
        planned = model.stage_hours("mlp", llm, A100, 8)
        assert planned is not None
        assert planned[stage == TUNE.name] == pytest.approx(published, rel=1 / 3)


@pytest.mark.parametrize("block", BLOCKS)
def test_its_start_lines_are_shell_and_ours(block: str, tmp_path: Path) -> None:
    subprocess.run(["bash", "-n"], input=block, text=True, check=True)
    (line,) = re.findall(r"vlmzoo train (.*)$", block.replace("\\\n", " "), flags=re.MULTILINE)
    (yaml,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)
    file = tmp_path / "llava-1.5-7b.yaml"
    file.write_text(yaml)
    parser = cli.Parser()
    cli.COMMANDS["train"].arguments(parser)
    args = parser.parse(shlex.split(line.replace("$connector", "qformer").replace("$seed", "2")))
    run = load(RunConfig, file, args.overrides)
    assert str(args.config) == file.name
    assert run.parallel == ("fsdp2" if "parallel=fsdp2" in line else "ddp")
    assert (run.seed.dropout, run.connector.name) == ((2, "qformer") if "seed" in line else (0, "mlp"))


def test_without_a_cache_none_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("encoder: world:clip\nconnector: mlp\nllm: world:llama\nstages: {}\n")
    caches = []

    def run_trial(run: RunConfig, out: Path, cache: Path | None, track: list[str]) -> None:
        caches.append(cache)
        raise ValueError("seen")

    command = ["train", str(file), "--out", str(tmp_path / "out")]
    with mock.patch("vlmzoo.sweeps.trial.run_trial", run_trial):
        for options in ([], ["--no-cache"], ["--cache", str(tmp_path)]):
            with pytest.raises(ValueError, match="seen"):
                commands.train(_parsed([*command, *options]))
    assert caches == [tmp_path / "out" / "cache", None, tmp_path]
    assert cli.main([*command, "--no-cache", "--cache", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "vlmzoo: error: --no-cache: --cache was given too\n"


def _parsed(command: list[str]) -> argparse.Namespace:
    parser = cli.Parser()
    cli.COMMANDS[command[0]].arguments(parser)
    return parser.parse(command[1:])
