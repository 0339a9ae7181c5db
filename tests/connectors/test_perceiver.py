"""`perceiver` against transformers' Idefics, and against Flamingo's pseudo-code in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import IdeficsConfig
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from tests.connectors.parts import VISION, copy_weights, create, distance, random_input, rescale
from vlmzoo.connector import VisualInput
from vlmzoo.connectors import _layers, perceiver
from vlmzoo.connectors._layers import squared_relu
from vlmzoo.kernels import resampler
from vlmzoo.kernels.attention import latent_attention

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
    """Ours on padded grids against theirs on each image without its padding: output and gradients."""
    visual = random_input(GRIDS)
    (features,) = visual.maps
    features.values.requires_grad_()
    want = torch.cat([theirs(row[None, : h * w]) for row, (h, w) in zip(features.values, GRIDS, strict=True)])
    got = ours(visual).tokens
    slope = torch.randn(want.shape, generator=torch.Generator().manual_seed(2))
    leaves = [{"features": features.values} | dict(part.named_parameters()) for part in (ours.resampler, theirs)]
    gradients = [
        dict(zip(given, torch.autograd.grad(out, list(given.values()), slope), strict=True))
        for out, given in zip((got, want), leaves, strict=True)
    ]
    worst = distance(got, want)
    for name, gradient in gradients[0].items():
        renamed = name
        for pattern, replacement in RENAMES:
            renamed = re.sub(pattern, replacement, renamed)
        exact = gradients[1][renamed]
        worst = max(worst, float((gradient - exact).norm() / exact.norm().clamp(min=1)))  # of a key norm's bias it is 0
    return worst


@pytest.fixture(params=["few media", "many media", "many media, recomputed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same media count as few or as many."""
    monkeypatch.setattr(perceiver, "MANY", 10**6 if request.param == "few media" else 1)
    monkeypatch.setattr(resampler, "CHUNK", 4)
    return request.param


def checkpointed(ours: Any, way: str) -> Any:
    ours.resampler.gradient_checkpointing = way.endswith("recomputed")
    return ours


@pytest.mark.parametrize("qk_norm", [False, True])
def test_equals_idefics(qk_norm: bool, way: str) -> None:
    ours, theirs = pair(qk_norm)
    assert difference(checkpointed(ours, way), theirs) <= 1e-4


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


def latents_without_values(ours: Any) -> None:
    for layer in ours.resampler.layers:
        honest = layer.attention.keys_values

        def faulty(memory: Tensor, honest: Callable[[Tensor], Any] = honest) -> tuple[Tensor, Tensor]:
            keys, values = honest(memory)
            return keys, values * (memory.shape[1] != len(ours.resampler.latents))

        layer.attention.keys_values = faulty


@pytest.mark.parametrize(
    "fault", [gelu, mask_ignored, one_layer_less, no_last_norm, one_norm_for_both, latents_without_values]
)
def test_the_comparison_sees(fault: Callable[[Any], None], way: str) -> None:
    ours, theirs = pair(False)
    fault(checkpointed(ours, way))
    assert difference(ours, theirs) > 1e-4


def test_the_comparison_sees_that_latents_are_no_keys() -> None:
    ours, theirs = pair(False)
    no_latents_among_keys(ours)
    assert difference(ours, theirs) > 1e-4


def few_media(part: Any, media: Tensor, mask: Tensor) -> Tensor:
    """The layers, plainly: what must not change by a bit for media as few as the embedded world's."""
    latents = part.latents.expand(len(media), -1, -1)
    visible = F.pad(mask, (0, len(part.latents)), value=True)[:, None, None]
    for layer in part.layers:
        attention, queries = layer.attention, layer.latent_norm(latents)
        keys_values = []
        for memory in (layer.media_norm(media), queries):
            values = attention.value(memory).unflatten(-1, (-1, attention.head_dim))
            keys = attention.key_norm(attention.key(memory).unflatten(-1, (-1, attention.head_dim)))
            keys_values.append((keys.type_as(values), values))
        (k, v), (k2, v2) = keys_values
        q = attention.query_norm(attention.query(queries).unflatten(-1, (-1, attention.head_dim))).type_as(v)
        latents = latents + attention.out(latent_attention(q, k, v, k2=k2, v2=v2, mask=visible).flatten(2))
        latents = latents + layer.feed_forward(layer.feed_forward_norm(latents))
    return part.norm(latents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [36, 81])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_few_media_stay_the_same_to_the_bit(dtype: torch.dtype, tokens: int, trained: bool, qk_norm: bool) -> None:
    options = {"num_latents": 16, "num_layers": 2, "num_heads": 4, "head_dim": 32, "qk_norm": qk_norm}
    part = create("perceiver", options, vision=replace(VISION, hidden_size=64)).resampler
    rescale(part)
    part.gradient_checkpointing = True  # which is for many
    media = torch.randn(4, tokens, 64, generator=torch.Generator().manual_seed(3)).requires_grad_(trained)
    mask = torch.arange(tokens) < torch.tensor([tokens, 20, 1, tokens])[:, None]
    found = []
    for run in (part, partial(few_media, part)):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = run(media, mask)
        leaves = [*part.parameters(), *([media] if trained else [])]
        found.append([out, *torch.autograd.grad(out.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("tokens", [perceiver.MANY - 1, perceiver.MANY])
def test_both_sides_of_the_rule_are_flamingos(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    honest = _layers.resampler_attention
    monkeypatch.setattr(
        _layers, "resampler_attention", lambda *inputs, **named: asked.append(1) or honest(*inputs, **named)
    )
    part = create("perceiver", OPTIONS).resampler
    rescale(part)
    part = part.double()
    media = torch.randn(tokens, VISION.hidden_size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    weights = dict(part.named_parameters())
    got, want = part(media[None])[0], flamingo(weights, media, 2, 3)
    assert len(asked) == (3 if tokens >= perceiver.MANY else 0)
    assert distance(got, want) <= 1e-10
    gradients = [torch.autograd.grad(out.sin().sum(), list(weights.values())) for out in (got, want)]
    assert max(distance(a, b) for a, b in zip(*gradients, strict=True)) <= 1e-9


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
