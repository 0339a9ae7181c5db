"""`gated_cross_attention` against transformers' Idefics block, and against Flamingo's pseudo-code in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from tests.connectors.parts import SMALL, TEXT, VISION, copy_weights, create, distance, random_input, rescale
from vlmzoo.connector import LayerContext
from vlmzoo.connectors._layers import squared_relu

NAME = "gated_cross_attention"
OPTIONS: dict[str, Any] = {"memory": "patches", "every": 1, "num_heads": 4, "head_dim": 8}
IDEFICS = OPTIONS | {
    "norm": "rms",
    "activation": "swiglu",
    "ffn_multiplier": TEXT.intermediate_size / TEXT.hidden_size,
    "first_layer": 0,
}
RENAMES = [
    ("^attention_norm", "input_layernorm"),
    ("^attention_gate", "alpha_cross_attn"),
    (r"^attention\.(query|key)_norm", lambda m: f"cross_attn.{m[1][0]}_layer_norm"),
    (r"^attention\.(query|key|value|out)\.", lambda m: f"cross_attn.{m[1][0]}_proj."),
    ("^feed_forward_norm", "post_attention_layernorm"),
    ("^feed_forward_gate", "alpha_dense"),
    (r"^feed_forward\.(gate|up|down)\.", r"mlp.\1_proj."),
]
GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(2, 9, TEXT.hidden_size, generator=GENERATOR)
MEMORY = torch.randn(2, 3, 5, VISION.hidden_size, generator=GENERATOR)


def context(cache: dict[nn.Module, tuple[Tensor, Tensor]] | None = None) -> LayerContext:
    """Two samples: three images of which one is smaller, and one image that some tokens come before."""
    real = torch.ones(2, 3, 5, dtype=torch.bool)
    real[0, 1, 3:] = False
    real[1, 1:] = False
    seen = torch.tensor([[0, 0, 0, 1, 1, 1, 2, 2, 2], [-1, -1, 0, 0, 0, 0, 0, 0, 0]])
    return LayerContext(MEMORY.clone(), real, seen, cache)


def pair(qk_norm: bool) -> tuple[Any, nn.Module]:
    config = IdeficsConfig(
        hidden_size=TEXT.hidden_size,
        num_attention_heads=4,
        intermediate_size=TEXT.intermediate_size,
        rms_norm_eps=TEXT.norm_eps,
        qk_layer_norms=qk_norm,
        alpha_initializer="ones",
        vision_config={"embed_dim": VISION.hidden_size},
    )
    config._attn_implementation = "eager"
    theirs = IdeficsGatedCrossAttentionLayer(config, layer_idx=0).eval()
    rescale(theirs)
    ours = create(NAME, IDEFICS | {"qk_norm": qk_norm}).blocks["0"]
    copy_weights(theirs, ours, RENAMES)
    return ours, theirs


def difference(ours: Any, theirs: nn.Module) -> float:
    """Their mask is written out here, token by token: the last image's real memory, and no image at all."""
    given = context()
    mask = torch.full((2, 1, 9, 15), torch.finfo(torch.float32).min)
    for sample, row in enumerate(given.image_of_token.tolist()):
        for token, image in enumerate(row):
            for place in range(5):
                if image >= 0 and given.memory_mask[sample, image, place]:
                    mask[sample, 0, token, image * 5 + place] = 0
    want = theirs(
        HIDDEN,
        image_hidden_states=MEMORY.flatten(1, 2),
        image_attention_mask=mask,
        cross_attention_gate=(given.image_of_token >= 0).float(),
    )
    return distance(ours(HIDDEN, given), want)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_equals_idefics(qk_norm: bool) -> None:
    assert difference(*pair(qk_norm)) <= 1e-4


def gelu_gate(ours: Any, patch: pytest.MonkeyPatch) -> None:
    ours.feed_forward.activation = F.gelu


def no_attention_gate(ours: Any, patch: pytest.MonkeyPatch) -> None:
    nn.init.constant_(ours.attention_gate, 20)  # tanh is 1


def no_feed_forward_gate(ours: Any, patch: pytest.MonkeyPatch) -> None:
    nn.init.constant_(ours.feed_forward_gate, 20)


def gate_without_tanh(ours: Any, patch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        ours.attention_gate.copy_(torch.atanh(ours.attention_gate.clamp(-0.99, 0.99)))


def layer_norm(ours: Any, patch: pytest.MonkeyPatch) -> None:
    ours.attention_norm = nn.LayerNorm(TEXT.hidden_size)


def mask_with(change: Callable[[LayerContext], None]) -> Callable[[Any, pytest.MonkeyPatch], None]:
    def fault(ours: Any, patch: pytest.MonkeyPatch) -> None:
        honest = ours._run

        def changed(hidden: Tensor, given: LayerContext) -> Tensor:
            change(given)
            return honest(hidden, given)

        patch.setattr(ours, "_run", changed)

    return fault


def image_before(given: LayerContext) -> None:
    given.image_of_token = (given.image_of_token - 1).clamp(-1)


def first_image(given: LayerContext) -> None:
    given.image_of_token = given.image_of_token.clamp(max=0)


def blind_tokens_see(given: LayerContext) -> None:
    given.image_of_token = given.image_of_token.clamp(min=0)


def padding_seen(given: LayerContext) -> None:
    given.memory_mask = torch.ones_like(given.memory_mask)


MASK_FAULTS = [mask_with(change) for change in (image_before, first_image, blind_tokens_see, padding_seen)]


@pytest.mark.parametrize(
    "fault", [gelu_gate, no_attention_gate, no_feed_forward_gate, gate_without_tanh, layer_norm, *MASK_FAULTS]
)
def test_the_comparison_sees(fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(False)
    fault(ours, monkeypatch)
    assert difference(ours, theirs) > 1e-4


def flamingo(weights: dict[str, Tensor], x: Tensor, media: Tensor, heads: int) -> Tensor:
    """Flamingo, appendix A.1.2: tokens (length, dim) that all see the same media (tokens, dim)."""

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    q, k, v = (
        (source @ weights[f"attention.{part}.weight"].T).unflatten(1, (heads, -1)).transpose(0, 1)
        for source, part in ((norm(x, "attention_norm"), "query"), (media, "key"), (media, "value"))
    )
    scores = (q @ k.mT / q.shape[-1] ** 0.5).exp()
    read = (scores / scores.sum(-1, keepdim=True) @ v).transpose(0, 1).flatten(1)
    x = x + weights["attention_gate"].tanh() * (read @ weights["attention.out.weight"].T)
    inner = squared_relu(norm(x, "feed_forward_norm") @ weights["feed_forward.up.weight"].T)
    return x + weights["feed_forward_gate"].tanh() * (inner @ weights["feed_forward.down.weight"].T)


def test_defaults_are_flamingos() -> None:
    block: Any = create(NAME, OPTIONS).blocks["0"].double()
    rescale(block)
    given = context()
    given.memory = given.memory.double()
    got = block(HIDDEN.double(), given)
    weights = dict(block.named_parameters())
    for sample, row in enumerate(given.image_of_token):
        for image in row.unique().tolist():
            tokens = row == image
            if image >= 0:
                media = given.memory[sample, image][given.memory_mask[sample, image]]
                want = flamingo(weights, HIDDEN[sample, tokens].double(), media, 4)
                assert distance(got[sample, tokens], want) <= 1e-10


def test_closed_gates_change_nothing_and_still_learn() -> None:
    block: Any = create(NAME, OPTIONS).blocks["0"]
    out = block(HIDDEN, context())
    assert torch.equal(out, HIDDEN)
    out.square().sum().backward()
    assert block.attention_gate.grad.abs() > 0
    assert block.feed_forward_gate.grad.abs() > 0


def test_tokens_before_any_image_read_exactly_nothing() -> None:
    block, _ = pair(False)
    with torch.no_grad():
        block.feed_forward_gate.zero_()
    given = context()
    out = block(HIDDEN, given)
    assert torch.equal(out[1, :2], HIDDEN[1, :2])
    assert not torch.equal(out[1, 2:], HIDDEN[1, 2:])
    given.memory, given.memory_mask = given.memory[:, :0], given.memory_mask[:, :0]  # a batch without images
    given.image_of_token = torch.full_like(given.image_of_token, -1)
    assert torch.equal(block(HIDDEN, given), HIDDEN)


def test_keys_and_values_are_kept_for_one_call() -> None:
    block, _ = pair(True)
    cache: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    want = block(HIDDEN, context())
    assert torch.equal(block(HIDDEN, context(cache)), want)
    assert list(cache) == [block]
    later = context(cache)
    later.memory.zero_()  # decoding reads the cache alone
    later.image_of_token = later.image_of_token[:, -1:]
    torch.testing.assert_close(block(HIDDEN[:, -1:], later), want[:, -1:])


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    block, _ = pair(False)
    gradients, calls = [], []
    block.feed_forward.register_forward_hook(lambda *_: calls.append(1))
    for block.gradient_checkpointing in (False, True):
        given, hidden = context(), HIDDEN.clone().requires_grad_()
        given.memory.requires_grad_()
        block.train()(hidden, given).square().sum().backward()
        gradients.append([hidden.grad, given.memory.grad, *(parameter.grad for parameter in block.parameters())])
        block.zero_grad(set_to_none=True)
    assert len(calls) == 3  # once, then forward and again in the backward
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"every": 2}, [1, 3]),  # Flamingo: (i + 1) % 2 == 0
        ({"every": 2, "first_layer": 0}, [0, 2]),  # Idefics: i % 2 == 0
        ({"every": 4}, [3]),
        ({"every": 1}, [0, 1, 2, 3]),
    ],
)
def test_where_blocks_stand(options: dict[str, Any], layers: list[int]) -> None:
    placed = create(NAME, SMALL[NAME] | options).llm_layers()
    assert list(placed) == layers
    assert all(len(blocks) == 1 for blocks in placed.values())


@pytest.mark.parametrize("memory", ["resampler", "patches"])
def test_one_slot_an_image_and_a_memory(memory: str) -> None:
    connector = create(NAME, SMALL[NAME] | {"memory": memory})
    visual = random_input([(2, 3), (2, 2), (1, 2)], crops=[2, 1])
    out = connector(visual)
    assert torch.equal(out.tokens, connector.marker.expand(2, 1, -1))
    assert connector.num_tokens(visual.layouts[0]) == 1
    assert out.memory_mask.sum(1).tolist() == ([5, 5] if memory == "resampler" else [10, 2])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"every": 5}, "its first block would stand before layer 4 of an LLM that has layers 0 to 3"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"memory": "patch"}, "did you mean 'patches'"),
        ({"norm": "rmsnorm"}, "did you mean 'rms'"),
    ],
)
def test_refuses(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        create(NAME, options)
