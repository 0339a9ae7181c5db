"""The comparison with transformers can fail: a fault in ours moves the logits, in every class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.connectors.parts import distance
from tests.interop.cases import CASES, parameters
from tests.interop.test_parity import TOLERANCE, logits
from vlmzoo.connector import NORMED
from vlmzoo.interop import from_hf

Fault = Callable[[Any, dict[str, Any]], None]


def layer(value: Any) -> Fault:
    """Another hidden state of the encoder."""

    def plant(ours: Any, inputs: dict[str, Any]) -> None:
        ours.vision.layer = value

    return plant


def causal(ours: Any, inputs: dict[str, Any]) -> None:
    """A prompt read from left to right alone."""
    inputs["token_type_ids"] = None
    ours.config.bidirectional = None


def other_blocks(ours: Any, inputs: dict[str, Any]) -> None:
    """All of the prompt one block, not its images."""
    inputs["token_type_ids"] = None
    ours.config.bidirectional = "prefix"


def without(name: str) -> Fault:
    """Something that the images come with left out."""

    def plant(ours: Any, inputs: dict[str, Any]) -> None:
        inputs.pop(name)

    return plant


def padded_instruction(ours: Any, inputs: dict[str, Any]) -> None:
    """Padding read as a part of the instruction."""
    inputs["qformer_attention_mask"] = torch.ones_like(inputs["qformer_attention_mask"])


def tanh_gelu(ours: Any, inputs: dict[str, Any]) -> None:
    """The approximate GELU."""
    for name, module in ours.connector.named_modules():
        if isinstance(module, nn.GELU):
            ours.connector.set_submodule(name, nn.GELU("tanh"))
        elif getattr(module, "activation", None) is nn.functional.gelu:
            module.activation = lambda x: nn.functional.gelu(x, approximate="tanh")


def unnormed(name: str) -> Fault:
    """A norm left out."""

    def plant(ours: Any, inputs: dict[str, Any]) -> None:
        ours.connector.set_submodule(name, nn.Identity())

    return plant


def swapped(first: str, second: str) -> Fault:
    """Two weights under each other's names."""

    def plant(ours: Any, inputs: dict[str, Any]) -> None:
        one, other = ours.get_parameter(first), ours.get_parameter(second)
        one.data, other.data = other.data, one.data

    return plant


def own_indicators(ours: Any, inputs: dict[str, Any]) -> None:
    """The LLM's own words where images begin and end."""
    ours.get_input_embeddings().weight.data[91:93] = 0.5


def without_newlines(ours: Any, inputs: dict[str, Any]) -> None:
    """Rows of tiles that nothing ends."""
    ours.connector.newline.data.zero_()


def turned(ours: Any, inputs: dict[str, Any]) -> None:
    """Rows taken for columns where positions are counted."""
    module = getattr(ours.connector, "inner", ours.connector)
    grid_of = module.output_grid
    module.output_grid = lambda grid: grid_of(grid)[::-1]


KEY, VALUE = (f"connector.inner.attention.{part}.weight" for part in ("key", "value"))
FAULTS: dict[str, list[Fault]] = {
    "aria": [layer(-2), without("pixel_mask"), swapped(KEY, VALUE), unnormed("inner.memory_norm")],
    "llava": [layer(-3), layer(-1), tanh_gelu],
    "llava_siglip": [layer(NORMED), tanh_gelu],
    "llava_layers": [tanh_gelu],
    "vip_llava": [unnormed("inner.norm"), tanh_gelu],
    "blip_2": [layer(NORMED), unnormed("memory_norm"), tanh_gelu],
    "instruct_blip": [layer(NORMED), padded_instruction, unnormed("memory_norm")],
    "idefics2": [layer(-1), without("pixel_attention_mask"), unnormed("layers.0.media_norm")],
    "idefics3": [layer(-1)],
    "smolvlm": [layer(-1)],
    "janus": [layer(-1), tanh_gelu],
    "mistral3": [layer(-2), unnormed("inner.norm"), tanh_gelu],
    "llava_pixtral": [layer(-2), tanh_gelu],
    "paligemma": [layer(-1), causal],
    "paligemma_2": [causal],
    "gemma3": [layer(-1), causal, other_blocks, unnormed("inner.norm")],
    "perception_lm": [layer(-2), tanh_gelu],
    "perception_lm_without_cls": [layer(-2), tanh_gelu],
    "ovis2": [layer(-1), own_indicators, unnormed("inner.norm")],
    "llava_next": [layer(-3), tanh_gelu, without_newlines],
    "llava_onevision": [layer(-2), tanh_gelu, without_newlines],
    "qwen2_vl": [layer(-2), turned, tanh_gelu, unnormed("inner.merger.norm")],
    "qwen2_5_vl": [layer(-2), turned, tanh_gelu, unnormed("inner.merger.norm")],
    "qwen3_vl": [turned, tanh_gelu, swapped("connector.depths.0.norm.weight", "connector.depths.1.norm.weight")],
    "internvl": [layer(-1), unnormed("inner.norm"), tanh_gelu],
}
PLANTED = [(name, index) for name, faults in FAULTS.items() for index in range(len(faults))]


@pytest.mark.parametrize(("name", "index"), parameters(CASES, *zip(*PLANTED, strict=True)))
def test_a_fault_shows(name: str, index: int) -> None:
    case = CASES[name]
    theirs, inputs = case.build(), case.inputs()
    ours = from_hf(theirs)
    expected = logits(theirs, inputs)
    assert distance(logits(ours, inputs), expected) <= TOLERANCE
    FAULTS[name][index](ours, inputs)
    assert distance(logits(ours, inputs), expected) > TOLERANCE
