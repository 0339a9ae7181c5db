"""`perceiver` against transformers' Idefics, and against Flamingo's pseudo-code in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from tests.connectors.parts import VISION, copy_weights, create, distance, random_input, rescale
from vlmzoo.connector import VisualInput
from vlmzoo.connectors._layers import squared_relu

OPTIONS: dict[str, Any] = {"num_latents": 5, "num_layers": 3, "num_heads": 2, "head_dim": 10}
IDEFICS = OPTIONS | {"activation": "relu"}
GRIDS = [(2, 3), (3, 3), (1, 1)]
RENAMES = [
    (r"^norm", "layer_norm"),
    (r"^layers\.(\d+)\.attention\.out", r"blocks.\1.0.output_proj"),
    (r"^layers\.(\d+)\.attention\.(query|key)_norm", lambda m: f"blocks.{m[1]}.0.{m[2][0]}_layer_norm"),
    (r"^layers\.(\d+)\.attention\.(query|key|value)", lambda m: f"blocks.{m[1]}.0.{m[2][0]}_proj"),
    (r"^layers\.(\d+)\.media_norm", r"blocks.\1.0.context_layer_norm"),
    (r"^layers\.(\d+)\.latent_norm", r"blocks.\1.0.latents_layer_norm"),
    (r"^layers\.(\d+)\.feed_forward_norm", r"blocks.\1.1.ln"),
    (r"^layers\.(\d+)\.feed_forward\.up", r"blocks.\1.1.fc"),
    (r"^layers\.(\d+)\.feed_forward\.down", r"blocks.\1.1.c_proj"),
]


def pair(qk_norm: bool) -> tuple[Any, nn.Module]:
    config = IdeficsConfig(
        vision_config={"embed_dim": VISION.hidden_size}, perceiver_config={"qk_layer_norms_perceiver": qk_norm}
    )
    theirs = IdeficsPerceiverResampler(config, VISION.hidden_size, 3, 2, 10, 5)
    rescale(theirs)
    ours = create("perceiver", IDEFICS | {"qk_norm": qk_norm})
    copy_weights(theirs, ours.resampler, RENAMES)
    ours.project = nn.Identity()
    return ours, theirs


def difference(ours: Any, theirs: nn.Module) -> float:
    """Ours on padded grids against theirs on each image without its padding."""
    visual = random_input(GRIDS)
    (features,) = visual.maps
    want = torch.cat([theirs(row[None, : h * w]) for row, (h, w) in zip(features.values, GRIDS, strict=True)])
    return distance(ours(visual).tokens, want)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_equals_idefics(qk_norm: bool) -> None:
    assert difference(*pair(qk_norm)) <= 1e-4


def gelu(ours: Any) -> None:
    for layer in ours.resampler.layers:
        layer.feed_forward.activation = F.gelu


def no_latents_among_keys(ours: Any) -> None:
    for layer in ours.resampler.layers:
        honest = layer.attention.forward
        layer.attention.forward = lambda q, media, latents, mask, honest=honest: honest(
            q, media, None, mask[..., : media[0].shape[1]]
        )


def mask_ignored(ours: Any) -> None:
    honest = ours.resampler.forward
    ours.resampler.forward = lambda media, mask: honest(media, torch.ones_like(mask))


def one_layer_less(ours: Any) -> None:
    ours.resampler.layers = ours.resampler.layers[:-1]


def no_last_norm(ours: Any) -> None:
    ours.resampler.norm = nn.Identity()


def one_norm_for_both(ours: Any) -> None:
    for layer in ours.resampler.layers:
        layer.media_norm = layer.latent_norm


@pytest.mark.parametrize(
    "fault", [gelu, no_latents_among_keys, mask_ignored, one_layer_less, no_last_norm, one_norm_for_both]
)
def test_the_comparison_sees(fault: Callable[[Any], None]) -> None:
    ours, theirs = pair(False)
    fault(ours)
    assert difference(ours, theirs) > 1e-4


def flamingo(weights: dict[str, Tensor], media: Tensor, heads: int, layers: int) -> Tensor:
    """Flamingo, appendix A.1.1, on one image's media (tokens, dim)."""

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    x = weights["latents"]
    for i in range(layers):
        own, seen = norm(x, f"layers.{i}.latent_norm"), norm(media, f"layers.{i}.media_norm")
        keys = torch.cat([seen, own])
        q, k, v = (
            (source @ weights[f"layers.{i}.attention.{part}.weight"].T).unflatten(1, (heads, -1)).transpose(0, 1)
            for source, part in ((own, "query"), (keys, "key"), (keys, "value"))
        )
        scores = (q @ k.mT / q.shape[-1] ** 0.5).exp()
        read = (scores / scores.sum(-1, keepdim=True) @ v).transpose(0, 1).flatten(1)
        x = x + read @ weights[f"layers.{i}.attention.out.weight"].T
        inner = norm(x, f"layers.{i}.feed_forward_norm") @ weights[f"layers.{i}.feed_forward.up.weight"].T
        x = x + squared_relu(inner) @ weights[f"layers.{i}.feed_forward.down.weight"].T
    return norm(x, "norm")


def test_defaults_are_flamingos() -> None:
    ours = create("perceiver", OPTIONS)
    rescale(ours)
    ours = ours.double()
    visual = random_input(GRIDS)
    (features,) = visual.maps
    features.values = features.values.double()
    weights = dict(ours.resampler.named_parameters())
    want = [flamingo(weights, row[: h * w], 2, 3) for row, (h, w) in zip(features.values, GRIDS, strict=True)]
    assert distance(ours(visual).tokens, ours.project(torch.stack(want))) <= 1e-10


def test_crops_of_an_image_are_read_together() -> None:
    ours, theirs = pair(False)
    visual: VisualInput = random_input([(2, 2)] * 3, crops=[2, 1])
    (features,) = visual.maps
    want = torch.cat([theirs(features.values[:2].flatten(0, 1)[None]), theirs(features.values[2:])])
    assert distance(ours(visual).tokens, want) <= 1e-4


def test_refuses_an_unknown_activation() -> None:
    with pytest.raises(ValueError, match="unknown activation 'glu'; did you mean 'gelu'"):
        create("perceiver", {"activation": "glu"})
