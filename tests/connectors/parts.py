"""Small specs, inputs and weights for the tests of the connectors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmzoo import build
from vlmzoo.connector import (
    Connector,
    FeatureMap,
    Grid,
    ImageLayout,
    Instruction,
    TextSpec,
    TokenConnector,
    TokenConnectorAdapter,
    VisionSpec,
    VisualInput,
    connectors,
)

VISION = VisionSpec(hidden_size=24, num_layers=3, num_heads=2, norm_eps=1e-6, patch_size=14, has_cls=True)
TEXT = TextSpec(hidden_size=32, num_layers=4, num_heads=4, norm_eps=1e-6, intermediate_size=86, vocab_size=50)
SMALL: dict[str, dict[str, Any]] = {
    "linear": {},
    "mlp": {},
    "qformer": {"num_queries": 5, "num_layers": 3, "hidden_size": 16, "num_heads": 2, "instruction": True},
    "perceiver": {"num_latents": 5, "num_layers": 2, "num_heads": 2, "head_dim": 8},
    "gated_cross_attention": {"every": 2, "num_heads": 2, "head_dim": 8, "num_latents": 5, "num_resampler_layers": 1},
}
build.load_connectors()


def create(name: str, options: dict[str, Any] | None = None, vision: VisionSpec = VISION, text: TextSpec = TEXT) -> Any:
    """A connector as `build` makes it, without the adapter."""
    provided = {"vision_dim": vision.hidden_size, "text_dim": text.hidden_size, "vision": vision, "text": text}
    return connectors.create(name, SMALL[name] if options is None else options, provided)


def adapted(part: Connector | TokenConnector) -> Connector:
    return TokenConnectorAdapter(part) if isinstance(part, TokenConnector) else part


def rescale(module: nn.Module, seed: int = 0) -> None:
    """Random weights under which a wrong operation shows: matrices by 1/sqrt(fan_in), vectors moved, gates open."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.add_(0.5 * noise)
            elif name.endswith(("latents", "queries", "query_tokens", "embeddings.weight")):
                parameter.copy_(noise)
            else:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)


def copy_weights(
    source: nn.Module, target: nn.Module, renames: Sequence[tuple[str, Any]], leave: tuple[str, ...] = ()
) -> None:
    """Weights of transformers' module in ours. `renames` (patterns, in order) turn our names into theirs.

    Each of theirs must be used, but for those that begin with one of `leave`.
    """
    theirs = {name: value for name, value in source.named_parameters() if not name.startswith(leave)}
    state = {}
    for name, parameter in target.named_parameters():
        renamed = name
        for pattern, replacement in renames:
            renamed = re.sub(pattern, replacement, renamed)
        state[name] = theirs.pop(renamed).reshape(parameter.shape)
    assert not theirs, f"not copied: {sorted(theirs)}"
    target.load_state_dict(state)


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach().double()).abs().max())


def visual_input(
    values: Tensor,
    grids: Sequence[Grid],
    crops: Sequence[int] | None = None,
    cls: Tensor | None = None,
    instruction: Instruction | None = None,
) -> VisualInput:
    """Crops (crops, patches, dim) with their grids, so many crops an image (default: one)."""
    crops = crops or [1] * len(values)
    lengths = torch.tensor([height * width for height, width in grids])
    mask = torch.arange(values.shape[1]) < lengths[:, None]
    layouts, first = [], 0
    for count in crops:
        layouts.append(ImageLayout(tuple(grids[first : first + count])))
        first += count
    image_of_crop = torch.arange(len(crops)).repeat_interleave(torch.tensor(crops))
    features = FeatureMap(values, tuple(grids), mask.to(values.device), cls)
    samples = torch.arange(len(crops), device=values.device)
    return VisualInput((features,), image_of_crop.to(values.device), samples, tuple(layouts), instruction)


def random_input(
    grids: Sequence[Grid], crops: Sequence[int] | None = None, vision: VisionSpec = VISION, seed: int = 1
) -> VisualInput:
    """Random features, CLS and an instruction for crops of these grids."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(len(grids), max(h * w for h, w in grids), vision.hidden_size, generator=generator)
    cls = torch.randn(len(grids), vision.hidden_size, generator=generator)
    num_images = len(crops or grids)
    ids = torch.randint(0, TEXT.vocab_size, (num_images, 6), generator=generator)
    mask = torch.arange(6) < torch.randint(1, 7, (num_images, 1), generator=generator)
    return visual_input(values, grids, crops, cls, Instruction(ids, mask))
