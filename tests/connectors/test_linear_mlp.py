"""`linear` and `mlp` against transformers' projectors of PaliGemma and LLaVA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PaliGemmaConfig, SiglipVisionConfig
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector
from transformers.models.paligemma.modeling_paligemma import PaliGemmaMultiModalProjector

from tests.connectors.parts import TEXT, VISION, copy_weights, create, distance, rescale

PATCHES = torch.randn(2, 6, VISION.hidden_size, generator=torch.Generator().manual_seed(0))


def linear_pair() -> tuple[Any, nn.Module]:
    vision = SiglipVisionConfig(hidden_size=VISION.hidden_size)
    theirs = PaliGemmaMultiModalProjector(PaliGemmaConfig(vision_config=vision, projection_dim=TEXT.hidden_size))
    rescale(theirs)
    ours = create("linear")
    copy_weights(theirs, ours, [("project", "linear")])
    return ours, theirs


def mlp_pair() -> tuple[Any, nn.Module]:
    vision = CLIPVisionConfig(hidden_size=VISION.hidden_size)
    theirs = LlavaMultiModalProjector(
        LlavaConfig(vision_config=vision, text_config=LlamaConfig(hidden_size=TEXT.hidden_size))
    )
    rescale(theirs)
    ours = create("mlp")
    copy_weights(theirs, ours, [("layers.0", "linear_1"), ("layers.2", "linear_2")])
    return ours, theirs


@pytest.mark.parametrize("pair", [linear_pair, mlp_pair])
def test_equals_transformers(pair: Callable[[], tuple[Any, nn.Module]]) -> None:
    ours, theirs = pair()
    assert distance(ours(PATCHES, (2, 3)), theirs(PATCHES)) <= 1e-4


def test_the_comparison_sees_a_missing_bias() -> None:
    ours, theirs = linear_pair()
    ours.project.bias = None
    assert distance(ours(PATCHES, (2, 3)), theirs(PATCHES)) > 1e-2


@pytest.mark.parametrize("wrong", [nn.GELU("tanh"), nn.ReLU(), nn.Identity()], ids=str)
def test_the_comparison_sees_another_activation(wrong: nn.Module) -> None:
    ours, theirs = mlp_pair()
    ours.layers[1] = wrong
    assert distance(ours(PATCHES, (2, 3)), theirs(PATCHES)) > 1e-4


def test_depth() -> None:
    kinds = [type(layer) for layer in create("mlp", {"depth": 3}).layers]
    assert kinds == [nn.Linear, nn.GELU, nn.Linear, nn.GELU, nn.Linear]
    assert len(create("mlp", {"depth": 1}).layers) == 1
    with pytest.raises(ValueError, match="connector 'mlp': depth must be at least 1, got 0"):
        create("mlp", {"depth": 0})
