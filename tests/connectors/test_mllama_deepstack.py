"""`mllama` and `deepstack` against transformers' Mllama and Qwen3-VL."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer, _prepare_cross_attention_mask
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

from tests.connectors.parts import TEXT, VISION, copy_weights, create, distance, random_input, rescale
from vlmzoo.connector import FeatureMap, LayerContext, TextSpec, VisionSpec, VisualInput
from vlmzoo.connectors import mllama

GRID = (4, 4)
RENAMES = [
    ("attention_norm", "input_layernorm"),
    ("attention_gate", "cross_attn_attn_gate"),
    (r"attention\.(query|key)_norm", lambda m: f"cross_attn.{m[1][0]}_norm"),
    (r"^attention\.(query|key|value|out)", lambda m: f"cross_attn.{m[1][0]}_proj"),
    ("feed_forward_norm", "post_attention_layernorm"),
    ("feed_forward_gate", "cross_attn_mlp_gate"),
    (r"feed_forward\.(gate|up|down)", r"mlp.\1_proj"),
]


def mllama_pair() -> tuple[Any, Any]:
    config = MllamaTextConfig(
        hidden_size=TEXT.hidden_size,
        num_attention_heads=TEXT.num_heads,
        num_key_value_heads=2,
        intermediate_size=TEXT.intermediate_size,
        rms_norm_eps=TEXT.norm_eps,
        cross_attention_layers=[1],
        num_hidden_layers=2,
        vocab_size=TEXT.vocab_size,
        pad_token_id=0,
    )
    config._attn_implementation = "eager"
    theirs = MllamaCrossAttentionDecoderLayer(config, 1)
    rescale(theirs)
    options = {"every": 2, "num_kv_heads": 2, "layers": (-1, 1), "without_image": "everything"}
    connector = create("mllama", options)
    assert list(connector.llm_layers()) == [1, 3]
    (block,) = connector.llm_layers()[1]
    copy_weights(theirs, block, RENAMES)
    return block, theirs


GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = torch.randn(2, 7, TEXT.hidden_size, generator=GENERATOR)
MEMORY = torch.randn(2, 2, 6, TEXT.hidden_size, generator=GENERATOR)


def mllama_context() -> LayerContext:
    """Two images of two crops with three tokens, one of them empty; the first two rows of the text see none."""
    real = torch.ones(2, 2, 6, dtype=torch.bool)
    real[:, 0, 3:] = False
    return LayerContext(MEMORY, real, torch.tensor([[-1, -1, 0, 0, 0, 1, 1]] * 2))


def mllama_difference(ours: Any, theirs: Any) -> float:
    given = mllama_context()
    assert given.memory_mask is not None
    seen = F.one_hot(given.image_of_token + 1, 3)[..., 1:, None] * given.memory_mask[:, None, :, ::3]
    mask, rows = _prepare_cross_attention_mask(seen.float(), 3, torch.float32)
    return distance(ours(HIDDEN, given), theirs(HIDDEN, MEMORY.flatten(1, 2), mask, None, rows))


def test_a_layer_equals_mllamas() -> None:
    assert mllama_difference(*mllama_pair()) <= 1e-4


def test_a_token_without_an_image_is_unchanged() -> None:
    ours, _ = mllama_pair()
    ours.reads_all = False
    found = ours(HIDDEN, mllama_context())
    assert torch.equal(found[:, :2], HIDDEN[:, :2])
    assert (found[:, 2:] != HIDDEN[:, 2:]).any(-1).all()
    other = mllama_context()
    other.image_of_token = torch.full_like(other.image_of_token, -1)  # a sample of text beside others with images
    assert torch.equal(ours(HIDDEN, other), HIDDEN)


def gate_open(ours: Any) -> None:
    ours.attention_gate = nn.Parameter(torch.tensor([100.0]))


def no_query_norm(ours: Any) -> None:
    ours.attention.query_norm = nn.Identity()


def no_key_norm(ours: Any) -> None:
    ours.attention.key_norm = nn.Identity()


def heads_in_turns(ours: Any) -> None:
    ours.attention._shared = lambda x: torch.cat([x, x], dim=2)


def gate_without_tanh(ours: Any) -> None:
    ours.feed_forward_gate = nn.Parameter(ours.feed_forward_gate.detach().clamp(-0.9, 0.9).atanh())


def gelu(ours: Any) -> None:
    ours.feed_forward.activation = F.gelu


def no_image_nothing_read(ours: Any) -> None:
    ours.reads_all = False


FAULTS = [gate_open, no_query_norm, no_key_norm, heads_in_turns, gate_without_tanh, gelu, no_image_nothing_read]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_the_comparison_sees(fault: Callable[[Any], None]) -> None:
    ours, theirs = mllama_pair()
    fault(ours)
    assert mllama_difference(ours, theirs) > 1e-4


def test_the_comparison_sees_the_feed_forward_run_without_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mask that lets tokens without an image see all that they read anyway, nothing else comes."""
    ours, theirs = mllama_pair()
    honest = mllama.media_mask

    def seen(image_of_token: Tensor, real: Tensor) -> Tensor:
        mask = honest(image_of_token, real)
        return mask | ~mask.any((2, 3), keepdim=True)

    monkeypatch.setattr(mllama, "media_mask", seen)
    assert mllama_difference(ours, theirs) > 1e-4


def test_a_layer_has_the_counted_size() -> None:
    vision = VisionSpec(hidden_size=1280, num_layers=32, num_heads=16, norm_eps=1e-5, patch_size=14, has_cls=True)
    text = TextSpec(4096, num_layers=32, num_heads=32, norm_eps=1e-5, intermediate_size=14336, vocab_size=128_256)
    with torch.device("meta"):
        connector = create("mllama", {}, vision, text)
    sizes = [sum(value.numel() for value in block.parameters()) / 1e6 for block in connector.blocks.values()]
    assert sizes == pytest.approx([218.1] * 8, abs=0.1)


def qwen_difference(connector: Any, mergers: list[nn.Module]) -> float:
    first = random_input([GRID] * 2, seed=1)
    maps = [first.maps[0], *(random_input([GRID] * 2, seed=seed).maps[0] for seed in (2, 3))]
    visual = VisualInput(tuple(maps), first.image_of_crop, first.sample_of_image, first.layouts)
    found = connector(visual)
    assert list(found.additions) == [1, 2]

    def call(merger: nn.Module, features: FeatureMap) -> Tensor:
        blocks = rearrange(features.values, "b (h r w c) d -> (b h w r c) d", h=2, r=2, c=2)
        return merger(blocks).unflatten(0, (2, -1))

    want = [call(merger, features) for merger, features in zip(mergers, maps, strict=True)]
    ours = [found.tokens, found.additions[1], found.additions[2]]
    return max(distance(a, b) for a, b in zip(ours, want, strict=True))


def qwen_pair() -> tuple[Any, list[nn.Module]]:
    config = Qwen3VLVisionConfig(hidden_size=VISION.hidden_size, out_hidden_size=TEXT.hidden_size)
    mergers: list[nn.Module] = [
        Qwen3VLVisionPatchMerger(config, use_postshuffle_norm=after) for after in (False, True, True)
    ]
    connector = create("deepstack", {"layers": (1, 2)})
    renames = [(r"project\.up", "linear_fc1"), (r"project\.down", "linear_fc2")]
    for seed, (theirs, ours) in enumerate(zip(mergers, (connector.merger, *connector.depths), strict=True)):
        rescale(theirs, seed)
        copy_weights(theirs, ours, renames)
    return connector, mergers


def test_mergers_equal_qwen3_vls() -> None:
    assert qwen_difference(*qwen_pair()) <= 1e-4


def norm_before(ours: Any) -> None:
    for depth in ours.depths:
        depth.norm = nn.LayerNorm(VISION.hidden_size)
        depth.norm_blocks = False


def depths_swapped(ours: Any) -> None:
    ours.depths = nn.ModuleList(reversed(list(ours.depths)))


@pytest.mark.parametrize("fault", [norm_before, depths_swapped], ids=lambda f: f.__name__)
def test_the_comparison_with_qwen3_vl_sees(fault: Callable[[Any], None]) -> None:
    connector, mergers = qwen_pair()
    fault(connector)
    assert qwen_difference(connector, mergers) > 1e-4
