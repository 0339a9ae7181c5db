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
    connector = create("mllama", {"every": 2, "num_kv_heads": 2, "layers": (-1, 1)})
    assert list(connector.llm_layers()) == [1, 3]
    (block,) = connector.llm_layers()[1]
    copy_weights(theirs, block, RENAMES)
    return block, theirs


def mllama_difference(ours: Any, theirs: Any) -> float:
    """Two images of three tokens; the first two rows of the text see none, which the two treat differently."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, TEXT.hidden_size, generator=generator)
    memory = torch.randn(2, 2, 3, TEXT.hidden_size, generator=generator)
    image_of_token = torch.tensor([[-1, -1, 0, 0, 0, 1, 1]] * 2)
    seen = F.one_hot(image_of_token + 1, 3)[..., 1:, None].float()
    mask, rows = _prepare_cross_attention_mask(seen, 3, torch.float32)
    want = theirs(hidden, memory.flatten(1, 2), mask, None, rows)
    found = ours(hidden, LayerContext(memory, torch.ones(2, 2, 3, dtype=torch.bool), image_of_token))
    assert torch.equal(found[:, :2], hidden[:, :2])
    return distance(found[:, 2:], want[:, 2:])


def test_a_layer_equals_mllamas() -> None:
    assert mllama_difference(*mllama_pair()) <= 1e-4


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


@pytest.mark.parametrize(
    "fault", [gate_open, no_query_norm, no_key_norm, heads_in_turns, gate_without_tanh, gelu], ids=lambda f: f.__name__
)
def test_the_comparison_sees(fault: Callable[[Any], None]) -> None:
    ours, theirs = mllama_pair()
    fault(ours)
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
