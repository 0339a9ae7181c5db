"""Adapters in the LLM: what peft computes, beside frozen weights, and the same once merged, written or resumed."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.training.conftest import Trained, metrics
from tests.training.test_run import same, stop_at
from vlmzoo import build
from vlmzoo.config import RunConfig, StageConfig, parse
from vlmzoo.connector import ImageLayout
from vlmzoo.model import VisionLanguageModel
from vlmzoo.sweeps.checkpoint import evaluate_checkpoint
from vlmzoo.sweeps.trial import new_model, run_trial
from vlmzoo.training import adapters, checkpoint
from vlmzoo.training.run import flop_counter
from vlmzoo.training.stages import freeze, make_optimizer

Train = Callable[..., Trained]
LORA = {"rank": 4, "alpha": 8, "dropout": 0.1}
IMAGE = tiny.LLAMA["vocab_size"]


def stage(lora: dict[str, Any] | None = LORA, **changes: Any) -> StageConfig:
    given = {"data": "none", "lr": {"connector": 1e-2, "language": 1e-2}, "steps": 1, "lora": lora, **changes}
    return parse(StageConfig, given)


def entered(
    model: VisionLanguageModel, now: StageConfig, earlier: list[StageConfig] | None = None
) -> torch.optim.AdamW:
    adapters.enter(model.language, now, earlier or [], 0)
    freeze(model, now)
    return make_optimizer(model, now)


def batch(model: VisionLanguageModel) -> dict[str, Tensor]:
    """An image, a prompt and an answer of which the last four tokens are supervised."""
    slots = model.num_tokens(ImageLayout(((3, 3),)))
    ids = torch.tensor([[1, 5, 6, *[IMAGE] * slots, 7, 8, 9, 4, 3, 12]])
    labels = ids.clone()
    labels[:, :-4] = -100
    return {"input_ids": ids, "labels": labels, "pixel_values": tiny.pixels(1)}


def take_steps(model: VisionLanguageModel, optimizer: torch.optim.Optimizer, count: int = 2) -> list[float]:
    losses = []
    for step in range(count):
        torch.manual_seed(step)
        loss = model(**batch(model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model: VisionLanguageModel) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**{key: value for key, value in batch(model).items() if key != "labels"}).logits


def test_it_computes_what_peft_does() -> None:
    """The same start, data and dropout: losses of several steps, and every adapter behind them."""
    model = tiny.model("linear", tiny.QWEN)
    theirs = copy.deepcopy(model.language)
    optimizer = entered(model, stage(lr={"language": 1e-2}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules="all-linear", task_type="CAUSAL_LM")
        wrapped: Any = get_peft_model(theirs, config)
    reference = torch.optim.AdamW(
        [value for value in wrapped.parameters() if value.requires_grad], lr=1e-2, weight_decay=0
    )
    wrapped.train()
    ids = torch.tensor([[1, 5, 6, 7, 8, 9, 4, 3, 12, 13]])
    for step in range(4):
        losses = []
        for module, moved in ((model, optimizer), (wrapped, reference)):
            torch.manual_seed(step)
            loss = module(input_ids=ids, labels=ids).loss
            loss.backward()
            moved.step()
            moved.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5), step
    ours = {name: value for name, value in model.language.named_parameters() if "lora_" in name}
    found = {name.removeprefix("base_model.model."): value for name, value in wrapped.named_parameters()}
    assert len(ours) == 2 * 7 * 3
    for name, value in ours.items():
        torch.testing.assert_close(value, found[name], rtol=1e-4, atol=1e-5)


def generated(model: VisionLanguageModel) -> Tensor:
    given = batch(model)
    return model.generate(given["input_ids"], given["pixel_values"], max_new_tokens=3, num_beams=2)


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        ("all-linear", [f"model.layers.{i}.{name}" for i in range(3) for name in (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]),
        (["q_proj", "v_proj"], [f"model.layers.{i}.self_attn.{name}_proj" for i in range(3) for name in "qv"]),
        (["*layers.2.mlp.*"], [f"model.layers.2.mlp.{name}_proj" for name in ("gate", "up", "down")]),
    ],
)  # fmt: skip
def test_each_target_costs_rank_times_its_two_sides(targets: Any, chosen: list[str]) -> None:
    model = tiny.model("linear")
    shapes = {name: tuple(model.language.get_submodule(name).weight.shape) for name in chosen}
    optimizer = entered(model, stage({**LORA, "targets": targets}))
    counts = {group["part"]: sum(value.numel() for value in group["params"]) for group in optimizer.param_groups}
    assert counts["language"] == sum(4 * (rows + columns) for rows, columns in shapes.values())
    assert counts["connector"] == sum(value.numel() for value in model.connector.parameters())
    adapted = {name.partition(".lora_")[0] for name, _ in model.language.named_parameters() if "lora_" in name}
    assert adapted == set(chosen)


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_only_adapters_and_connector_move(quantize: str | None) -> None:
    model = tiny.model("mlp")
    optimizer = entered(model, stage({**LORA, "quantize": quantize}))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    loss = model(**batch(model)).loss
    loss.backward()
    with_gradient = {name for name, value in model.named_parameters() if value.grad is not None}
    optimizer.step()
    take_steps(model, optimizer)  # the first leaves lora_A, whose gradient passes the zeros of lora_B
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    expected = {name for name in before if name.startswith("connector.") or ".lora_" in name}
    assert moved == with_gradient == expected
    assert {id(value) for value in optimizer.state} == {id(model.get_parameter(name)) for name in expected}
    assert {model.get_parameter(name).dtype for name in expected} == {torch.float32}
    held = {None: torch.float32, "nf4": torch.uint8, "int8": torch.int8}[quantize]
    bases = [value.dtype for name, value in before.items() if name.endswith("proj.base_layer.weight")]
    assert bases == [held] * 21
    assert model.get_parameter("language.lm_head.weight").dtype == torch.float32


@pytest.mark.parametrize("connector", ["linear", tiny.MemoryConnector, tiny.HybridConnector])
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_merged_it_answers_the_same(connector: Any, quantize: str | None) -> None:
    """In-LLM layers run where they ran, and what is merged has the names that it had."""
    model = tiny.model(connector)
    names, plain = [name for name, _ in model.named_parameters()], logits(model)
    take_steps(model, entered(model, stage({**LORA, "quantize": quantize})))
    found, answer = logits(model), generated(model)
    assert (found - plain).abs().max() > 0.1
    adapters.merge(model.language, torch.float32)
    torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-4)
    assert torch.equal(generated(model), answer)
    assert [name for name, _ in model.named_parameters()] == names
    assert not hasattr(model.language, "peft_config")


def test_int8_merges_into_the_weights_that_it_stood_for() -> None:
    """Its products round activations too, so that the merged model is near and not the same."""
    model = tiny.model("linear")
    own = copy.deepcopy(model.language).state_dict()
    take_steps(model, entered(model, stage({**LORA, "quantize": "int8"})))
    found = logits(model)
    name = "model.layers.0.mlp.up_proj"
    update = model.language.get_submodule(name).get_delta_weight("default")
    adapters.merge(model.language, torch.float32)
    assert (logits(model) - found).abs().max() < 0.05 * found.abs().max()
    weight = model.language.get_parameter(f"{name}.weight")
    step = own[f"{name}.weight"].abs().amax(1, keepdim=True) / 127
    assert ((weight - update - own[f"{name}.weight"]).abs() <= 0.6 * step).all()
    assert not torch.equal(weight - update, own[f"{name}.weight"])


def test_activations_computed_again_give_the_same_steps() -> None:
    """The connector frozen: nothing but the adapters asks for gradients."""
    found = []
    for again in (False, True):
        model = tiny.model("linear")
        optimizer = entered(model, stage(lr={"language": 1e-2}))
        model.checkpoint_activations(again)
        found.append(take_steps(model, optimizer, 3))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[0][2] < found[0][0]


@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
def test_flops_are_those_of_every_product(quantize: str | None) -> None:
    """Of a frozen layer two products, of what is trained three, however the frozen weights are held."""
    layers = nn_pair(quantize)
    with flop_counter() as counter:
        layers(torch.randn(5, 48, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 5 * 48 * 48 + 3 * 2 * 5 * 4 * (48 + 48)


def nn_pair(quantize: str | None) -> Any:
    model = tiny.model("linear")
    entered(model, stage({**LORA, "quantize": quantize, "targets": ["q_proj"]}))
    return model.language.get_submodule("model.layers.1.self_attn.q_proj")


def test_the_same_adapters_go_on() -> None:
    model, first = tiny.model("linear"), stage()
    take_steps(model, entered(model, first))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = entered(model, stage(lr={"connector": 1e-3, "language": 1e-4}), [first])
    assert same(model.state_dict(), before) == []
    assert [group["peak"] for group in optimizer.param_groups] == [1e-3, 1e-4]
    entered(model, stage(None, lr={"connector": 1e-3}), [first])  # the LLM rests: so do its adapters
    assert same(model.state_dict(), before) == []
    assert not any(value.requires_grad for value in model.language.parameters())


@pytest.mark.parametrize("after", [None, {**LORA, "rank": 2}])
def test_another_way_merges_first(after: dict[str, Any] | None) -> None:
    model, first = tiny.model("linear"), stage()
    take_steps(model, entered(model, first))
    found = logits(model)
    optimizer = entered(model, stage(after), [first])
    torch.testing.assert_close(logits(model), found, rtol=1e-4, atol=1e-4)
    counts = [sum(value.numel() for value in group["params"]) for group in optimizer.param_groups]
    own = sum(value.numel() for value in tiny.model("linear").language.parameters())
    assert counts[1] == (own if after is None else 3 * 2 * (2 * (48 + 48) + 2 * (48 + 24) + 3 * (48 + 64)))


STAGES = {
    "align": {"lr": {"connector": 1e-3}},
    "adapt": {"lr": {"connector": 1e-3, "language": 1e-2}, "lora": LORA},
    "more": {"lr": {"connector": 1e-4, "language": 1e-3}, "lora": LORA},
    "other": {"lr": {"language": 1e-3}, "lora": {**LORA, "targets": ["q_proj"]}},
    "full": {"lr": {"connector": 1e-4, "language": 1e-4, "vision": 1e-3}, "only": {"vision": ["*layers.1.*"]}},
}


def staged(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """A run of these stages, each of two steps, with dropout in the LLM and its adapters."""
    common = {**values["stages"]["finetune"], "steps": 2}
    return {**values, "stages": {name: {**common, **STAGES[name]} for name in names}, "checkpoint_every": 1}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("straight")


@pytest.mark.parametrize("number", [2, 3, 6, 7, 8, 9])
def test_stopped_anywhere_it_ends_the_same(
    number: int,
    values: dict[str, Any],
    tmp_path: Path,
    straight: Path,
    train_in: Train,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between stages and within them: adapters new, kept on, merged with others put in, and merged for good."""
    values = staged(values, *STAGES)
    expected, _ = train_in(values, straight)
    with monkeypatch.context() as patched:
        stop_at(patched, number, RuntimeError("stopped"))
        with pytest.raises(RuntimeError, match="stopped"):
            train_in(values, tmp_path)
    found, _ = train_in(values, tmp_path)
    assert same(found, expected) == []
    assert metrics(tmp_path) == metrics(straight)


def test_quantized_it_ends_the_same_too(
    values: dict[str, Any], tmp_path: Path, train_in: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = staged({**values, "dtype": "bfloat16"}, "align", "adapt", "full")
    values["stages"]["adapt"]["lora"] = {**LORA, "quantize": "nf4"}
    expected, _ = train_in(values, tmp_path / "straight")
    for number in (3, 4):
        out = tmp_path / str(number)
        with monkeypatch.context() as patched:
            stop_at(patched, number, RuntimeError("stopped"))
            with pytest.raises(RuntimeError, match="stopped"):
                train_in(values, out)
        if number == 3:
            kept = load_file(out / "checkpoints" / "00000003" / "model.safetensors")
            assert {name.split(".")[0] for name in kept} == {"connector", "language"}
            assert all(
                ".lora_" in name and value.dtype == torch.float32 for name, value in kept.items() if "lang" in name
            )
        found, _ = train_in(values, out)
        assert same(found, expected) == []


def test_checkpoints_hold_what_differs(
    values: dict[str, Any], tmp_path: Path, train_in: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "KEPT", 10)
    train_in(staged(values, *STAGES), tmp_path)
    held = []
    for number in range(2, 11, 2):
        names = set(load_file(tmp_path / "checkpoints" / f"{number:08}" / "model.safetensors"))
        held.append({"adapters" if ".lora_" in name else name.split(".")[0] for name in names})
    trained = {"connector", "adapters"}
    assert held == [{"connector"}, trained, trained, {*trained, "language"}, {"connector", "language", "vision"}]
    assert all("layers.1." in name for name in names if name.startswith("vision."))


def test_a_run_leaves_a_model_and_its_adapter(values: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """The model is as any other; peft reads the adapter beside it onto the LLM as it was, with the same answers."""
    run = parse(RunConfig, staged(values, "align", "adapt"))
    result = run_trial(run, tmp_path)
    model = VisionLanguageModel.from_pretrained(tmp_path / "model")
    assert set(dict(model.named_parameters())) == set(dict(new_model(build.resolve(run))[0].named_parameters()))
    assert evaluate_checkpoint(tmp_path, ["colors"])["colors"] == result["evaluation"]["colors"]
    ids = torch.tensor([[1, 5, 6, 7, 8, 9, 4, 3]])
    plain = AutoModelForCausalLM.from_pretrained(folder / "llama")
    with torch.no_grad():
        before = plain.eval()(input_ids=ids).logits
        theirs = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).eval()(input_ids=ids).logits
        ours = model.eval().language(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (ours - before).abs().max() > 1e-3


def quantized(weight: Tensor, kind: str) -> Tensor:
    """What a weight is rounded to, by bitsandbytes' own functions."""
    if kind == "nf4":
        return functional.dequantize_4bit(*functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True))
    rows, scale, _ = functional.int8_vectorwise_quant(weight.half())
    return functional.int8_vectorwise_dequant(rows, scale)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_run_leaves_the_same_two(kind: str, values: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    """The adapter is peft's as ever; the model holds the quantized weights, dequantized, with the adapter in them."""
    values = staged(values, "adapt")
    values["stages"]["adapt"]["lora"] = {**LORA, "quantize": kind}
    run_trial(parse(RunConfig, values), tmp_path)
    versions = json.loads((tmp_path / "manifest.json").read_text())["versions"]
    assert {"peft", "bitsandbytes"} <= set(versions)
    model = VisionLanguageModel.from_pretrained(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(folder / "llama")
    own = {name: value.clone() for name, value in plain.state_dict().items()}
    adapter: Any = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).base_model.model
    for name, value in model.language.named_parameters():
        expected = own[name]
        if "_proj" in name:
            update = adapter.get_submodule(name.removesuffix(".weight")).get_delta_weight("default")
            assert update.abs().max() > 1e-4
            expected = quantized(expected, kind) + update
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)


def test_the_adapter_is_not_written_for_another_llm(values: dict[str, Any], tmp_path: Path) -> None:
    run_trial(parse(RunConfig, staged(values, "full", "adapt")), tmp_path)
    assert (tmp_path / "model").is_dir()
    assert not (tmp_path / "adapter").exists()
