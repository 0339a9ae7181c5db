"""What holds for each of the five connectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.connectors.parts import SMALL, TEXT, adapted, create, distance, random_input, rescale
from vlmzoo.connector import Connector, InLLMLayer, LayerContext, TextSpec, VisionSpec, VisualInput, VisualTokens

NAMES = list(SMALL)
CLIP_L = VisionSpec(hidden_size=1024, num_layers=24, num_heads=16, norm_eps=1e-5, patch_size=14, has_cls=True)
VICUNA = TextSpec(4096, num_layers=32, num_heads=32, norm_eps=1e-5, intermediate_size=11008, vocab_size=30522)


def millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize(
    ("name", "options", "counted"),
    [
        ("linear", {}, 4.20),
        ("mlp", {}, 20.98),
        ("qformer", {}, 104.8),
        ("qformer", {"instruction": True}, 185.3),
        ("perceiver", {}, 63.0 + 4.2),  # and its projection
        ("sva", {}, 51.4 + 157.4),  # before the LLM and inside it
    ],
)
def test_default_sizes_are_the_counted_ones(name: str, options: dict[str, Any], counted: float) -> None:
    with torch.device("meta"):
        connector = create(name, options, CLIP_L, VICUNA)
    assert millions(connector) == pytest.approx(counted, abs=0.06)


@pytest.mark.parametrize(
    ("options", "counted"),
    [
        ({}, 139.5),
        ({"num_heads": 32, "head_dim": 128, "ffn_multiplier": 11008 / 4096, "activation": "swiglu"}, 177.2),
    ],
    ids=["Flamingo", "Idefics"],
)
def test_a_block_has_the_counted_size(options: dict[str, Any], counted: float) -> None:
    with torch.device("meta"):
        connector = create("gated_cross_attention", options, CLIP_L, VICUNA)
    assert list(connector.llm_layers()) == [3, 7, 11, 15, 19, 23, 27, 31]
    assert [millions(block) for block in connector.blocks.values()] == pytest.approx([counted] * 8, abs=0.06)
    if not options:
        assert millions(connector.resampler) == pytest.approx(63.0, abs=0.06)


def run(connector: Connector, visual: VisualInput) -> tuple[torch.Tensor, VisualTokens]:
    """Everything that reaches the LLM, as one tensor of the images' (or samples') rows, and the tokens."""
    out = connector(visual)
    layers: list[InLLMLayer] = [layer for run in connector.llm_layers().values() for layer in run]
    if not layers:
        return out.tokens * out.mask[..., None], out
    assert out.memory is not None
    assert out.memory_mask is not None
    hidden = torch.linspace(-1, 1, 3 * TEXT.hidden_size).reshape(1, 3, -1).to(out.tokens)
    hidden = torch.cat([out.tokens, hidden.expand(len(out.tokens), -1, -1)], 1)
    seen = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    for layer in layers:  # every image is a sample of its own
        hidden = layer(hidden, LayerContext(out.memory[:, None], out.memory_mask[:, None], seen))
    return hidden, out


def rescaled(name: str) -> Connector:
    connector = adapted(create(name))
    rescale(connector)
    return connector


@pytest.mark.parametrize("name", NAMES)
def test_token_counts_and_crops(name: str) -> None:
    connector = rescaled(name)
    visual = random_input([(2, 3), (2, 2), (2, 2), (1, 1)], crops=[2, 1, 1])
    _, out = run(connector, visual)
    assert out.mask.sum(1).tolist() == [connector.num_tokens(layout) for layout in visual.layouts]
    assert out.tokens.shape[-1] == TEXT.hidden_size


@pytest.mark.parametrize("name", NAMES)
def test_padding_and_other_images_have_no_influence(name: str) -> None:
    connector = rescaled(name)
    grids = [(2, 3), (2, 2), (3, 1)]
    visual = random_input(grids)
    want, _ = run(connector, visual)
    (features,) = visual.maps
    features.values[~features.mask] = torch.nan
    assert distance(run(connector, visual)[0], want) <= 1e-5
    features.values[0] = 7.0
    changed, _ = run(connector, visual)
    assert distance(changed[1:], want[1:]) <= 1e-5
    assert distance(changed[0], want[0]) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns_but_those_named(name: str) -> None:
    connector = rescaled(name)
    out, _ = run(connector, random_input([(2, 3)] * 3))
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(5))).sum().backward()
    without = {key for key, value in connector.named_parameters() if value.grad is None or not value.grad.any()}
    assert without == connector.without_gradient


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtype_is_kept(name: str, dtype: torch.dtype) -> None:
    connector = rescaled(name)
    want, _ = run(connector, random_input([(2, 3)] * 2))
    visual = random_input([(2, 3)] * 2)
    (features,) = visual.maps
    assert features.cls is not None
    features.values, features.cls = features.values.to(dtype), features.cls.to(dtype)
    got, out = run(connector.to(dtype), visual)
    assert out.tokens.dtype == dtype
    assert distance(got, want) <= (0 if dtype == torch.float32 else 0.05) * float(want.detach().abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str) -> None:
    connector = rescaled(name)
    want, _ = run(connector, random_input([(2, 3)] * 2))
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = run(connector, random_input([(2, 3)] * 2))
    assert distance(got, want) <= 0.05 * float(want.detach().abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole(name: str) -> None:
    connector = rescaled(name)
    in_order = name in ("linear", "mlp")  # their adapter joins crops by looking at the data
    visual = random_input([(2, 2)] * 3, None if in_order else [2, 1])
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(connector, visual)[0], run(connector, visual)[0])


@pytest.mark.parametrize("name", NAMES)
def test_meta_device_and_one_seed(name: str) -> None:
    with torch.device("meta"):
        empty = create(name)
    assert all(value.is_meta for value in empty.state_dict().values())
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(create(name).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])
    empty.to_empty(device="cpu").load_state_dict(states[0])
    want = adapted(create(name))
    want.load_state_dict(adapted(empty).state_dict())
    assert torch.equal(run(adapted(empty), random_input([(2, 3)]))[0], run(want, random_input([(2, 3)]))[0])
